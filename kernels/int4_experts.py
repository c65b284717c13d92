"""A mixture's experts in INT4 for a few tokens: two Triton launches, on the weights in the layout of vLLM's Marlin kernel.

The first computes ``activation(x gate^T) * (x up^T)`` for each token and each of its experts, the second the weighted sum
of their ``down``. Tokens are not sorted by expert, so an expert that two tokens chose is read twice (the second time likely
out of the L2 cache): made for as few tokens as rarely share one. Many tokens are Marlin's, which reads the same bytes.

Layout, of one expert's weight [out, in] in groups of input channels:

    codes   int32 [in / 16, 2 * out]. A row has 16 channels; 128 words of it have 64 outputs. Word ``16 * c + 4 * q + j``
            has the outputs ``16 * j + c`` (nibbles 0, 4, 1, 5) and ``16 * j + c + 8`` (nibbles 2, 6, 3, 7) of the
            channels ``2 * q``, ``2 * q + 1``, ``2 * q + 8``, ``2 * q + 9``.
    scales  [in / group, out]; of each 64 outputs, ``8 * a + c`` lies at ``8 * c + a``.
    zeros   int32 [in / group, out / 8]; of each 64 outputs, word ``c`` has ``16 * j + c`` in nibble ``j`` and
            ``16 * j + c + 8`` in nibble ``4 + j``.

`reference` computes the same in plain PyTorch.
"""

from __future__ import annotations

from functools import cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

from vllm_quantspec.kernels.launch import check_device, jit, overlap, power_of_two, tl

ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh")}
# Up to so many tokens; not measured yet, see benchmarks/NOTES.md.
MAX_TOKENS = 8
# Of a program: outputs (an eighth of each 64 times this), input channels at a time, warps.
PARTS, CHANNELS, WARPS = 2, 512, 4
# Order of eight codes in a word: those that become floats together lie 16 bits apart.
_INTERLEAVE = [0, 2, 4, 6, 1, 3, 5, 7]


class Packed(NamedTuple):
    """All experts' weights, as the module's docstring says, each with a first dimension of experts."""

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor


# --- Packing ----------------------------------------------------------------------------------------------------------


def pack(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> Packed:
    """From codes (uint8 [experts, out, in], 0..15), scales and zero points ([experts, out, in / group]).

    ``out`` is divisible by 64, ``in`` by 16. Tensor operations alone, on the tensors' device.
    """
    number, out_features, in_features = codes.shape
    if out_features % 64 or in_features % 16 or scales.shape != zeros.shape or in_features % scales.shape[2]:
        raise ValueError(f"experts of {out_features} x {in_features} with scales {list(scales.shape)} cannot be packed.")
    tiles = codes.transpose(1, 2).reshape(number, in_features // 16, 16, out_features // 16, 16)
    tiles = tiles.transpose(2, 3).reshape(number, in_features // 16, out_features // 64, 1024)
    words = _words(tiles[..., _order(codes.device)]).flatten(2)
    zero_words = _words(_eights(zeros).unflatten(-1, (-1, 8))[..., _INTERLEAVE]).flatten(2)
    return Packed(words, _eights(scales).contiguous(), zero_words)


def dequantize(packed: Packed) -> torch.Tensor:
    """float32 [experts, out, in]: ``(code - zero) * scale``."""
    codes, scales, zeros = packed
    number, rows, width = codes.shape
    out_features, in_features = width // 2, 16 * rows
    tiles = torch.empty(number, rows, out_features // 64, 1024, device=codes.device)
    tiles[..., _order(codes.device)] = _nibbles(codes).unflatten(2, (-1, 1024)).float()
    levels = tiles.view(number, rows, out_features // 16, 16, 16).transpose(2, 3).reshape(number, in_features, out_features)
    undone = torch.empty(number, zeros.shape[1], out_features // 8, 8, device=codes.device)
    undone[..., _INTERLEAVE] = _nibbles(zeros).unflatten(2, (-1, 8)).float()
    s, z = (x.unflatten(2, (-1, 8, 8)).transpose(3, 4).flatten(2).transpose(1, 2) for x in (scales, undone.flatten(2)))
    levels = levels.transpose(1, 2).unflatten(2, (scales.shape[1], -1))
    return ((levels - z.unsqueeze(-1)) * s.float().unsqueeze(-1)).flatten(2)


def _eights(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2).unflatten(2, (-1, 8, 8)).transpose(3, 4).flatten(2)


@cache
def _order(device: torch.device) -> torch.Tensor:
    """int64 [1024]: the place, in four 16 x 16 tiles one behind the other, of each code of 64 outputs and 16 channels."""
    lane, tile, block, register = torch.meshgrid(*(torch.arange(n) for n in (32, 4, 2, 4)), indexing="ij")
    row = 2 * (lane % 4) + torch.tensor([0, 1, 8, 9])[register]
    order = 256 * tile + 16 * row + lane // 4 + 8 * block
    return order.reshape(-1, 8)[:, _INTERLEAVE].flatten().to(device)


def _words(codes: torch.Tensor) -> torch.Tensor:
    """uint8 [..., 8 * n] -> int32 [..., n], the first code in the lowest bits."""
    return (codes[..., 0::2] | codes[..., 1::2] << 4).contiguous().view(torch.int32)


def _nibbles(words: torch.Tensor) -> torch.Tensor:
    pairs = words.contiguous().view(torch.uint8)
    return torch.stack((pairs & 15, pairs >> 4), dim=-1).flatten(-2)


# --- The operator -----------------------------------------------------------------------------------------------------


def int4_experts(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    w13: Packed,
    w2: Packed,
    activation: str = "silu",
) -> torch.Tensor:
    """Sum over a token's experts of ``weight * (activation(x gate^T) * (x up^T)) down^T``, in fp32 sums.

    A token's result is the same whatever the others. Can be captured in a CUDA graph.

    Args:
        x: [tokens, hidden] in the dtype of the scales; rows may be strided.
        topk_weights: float32 [tokens, experts per token], topk_ids: int32 or int64 likewise, 0 .. experts - 1; contiguous.
        w13: the outputs are those of the gate and then those of up; w2: of down.
        activation: a key of ``ACTIVATIONS``.

    Returns:
        [tokens, hidden] in x's dtype.

    Raises:
        ValueError: an argument does not fit the above.
        RuntimeError: where Triton is not installed.
    """
    _check(x, topk_weights, topk_ids, w13, w2, activation)
    check_device(x)
    (tokens, hidden), chosen = x.shape, topk_ids.shape[1]
    width = w13.codes.shape[2] // 4
    inner = torch.empty(tokens * chosen, width, dtype=torch.float32, device=x.device)
    out = torch.empty(tokens, hidden, dtype=x.dtype, device=x.device)
    if tokens == 0:
        return out
    options = {"PARTS": PARTS, "num_warps": WARPS, **overlap(x)}
    strips = 8 // PARTS
    _gate_up[(width // 64 * strips, tokens * chosen)](
        x,
        topk_ids,
        *w13,
        inner,
        x.stride(0),
        HIDDEN=hidden,
        WIDTH=width,
        CHOSEN=chosen,
        ACTIVATION=activation,
        **_groups_of(w13, hidden),
        **options,
    )
    _down[(hidden // 64 * strips, tokens)](
        inner,
        topk_weights,
        topk_ids,
        *w2,
        out,
        HIDDEN=hidden,
        WIDTH=width,
        CHOSEN=chosen,
        **_groups_of(w2, width),
        **options,
    )
    return out


def _groups_of(weight: Packed, in_features: int) -> dict[str, int]:
    group = in_features // weight.scales.shape[1]
    return {"GROUP": group, "GROUPS": min(power_of_two(in_features // group), CHANNELS // group)}


def reference(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    w13: Packed,
    w2: Packed,
    activation: str = "silu",
) -> torch.Tensor:
    """`int4_experts` in plain PyTorch, token by token: the experts of all tokens together may be larger than a GPU."""
    _check(x, topk_weights, topk_ids, w13, w2, activation)
    gate_and_up, down, out = dequantize(w13), dequantize(w2), torch.empty_like(x)
    for token, weights, ids, row in zip(x.float(), topk_weights, topk_ids.long(), out, strict=True):
        gate, up = torch.einsum("koi,i->ko", gate_and_up[ids], token).chunk(2, dim=-1)
        row.copy_(weights @ torch.einsum("koi,ki->ko", down[ids], ACTIVATIONS[activation](gate) * up))
    return out


def _check(x, topk_weights, topk_ids, w13: Packed, w2: Packed, activation: str) -> None:
    if x.dim() != 2 or x.dtype != w13.scales.dtype or x.stride(1) != 1:
        raise ValueError(
            f"x must be {w13.scales.dtype} [tokens, hidden] with contiguous rows, got {x.dtype} {list(x.shape)}."
        )
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, not {activation!r}.")
    hidden, width = x.shape[1], w13.codes.shape[2] // 4
    number = w13.codes.shape[0]
    if w13.codes.shape[1] * 16 != hidden or w2.codes.shape != (number, width // 16, 2 * hidden):
        raise ValueError(f"weights {list(w13.codes.shape)} and {list(w2.codes.shape)} are not those of x {list(x.shape)}.")
    if topk_weights.shape != topk_ids.shape or topk_ids.shape[0] != x.shape[0] or topk_weights.dtype != torch.float32:
        raise ValueError("topk_weights (float32) and topk_ids must be [tokens, experts per token].")
    if topk_ids.dtype not in (torch.int32, torch.int64) or not (topk_ids.is_contiguous() and topk_weights.is_contiguous()):
        raise ValueError(f"topk_ids must be int32 or int64, and contiguous as topk_weights, got {topk_ids.dtype}.")
    if not all(part.is_contiguous() for part in (*w13, *w2)):
        raise ValueError("packed weights must be contiguous.")


@jit
def _add_strip(
    low,
    high,
    codes,
    scales,
    zeros,
    x,
    factor,
    strip,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Add ``factor`` times the products of a strip's two halves of outputs, each [GROUPS, GROUP / 16, 16 * PARTS].

    A word's four channels stay apart until `_outputs`. ``codes``, ``scales``, ``zeros`` are an expert's.
    """
    word = tl.arange(0, 16 * PARTS)[None, None, :]
    row = tl.arange(0, GROUP // 16)[None, :, None]
    j, q, c = word % 4, word // 4 % 4, word // 16
    tile, first = strip // (8 // PARTS), strip % (8 // PARTS) * PARTS
    x += 16 * row + 2 * q
    codes += tile * 128 + first * 16 + word
    # For every row, though rows of a group have the same: a smaller tensor would go through shared memory, and the barriers
    # would keep the loads of the next channels back.
    scales += tile * 64 + (first + c) * 8 + 2 * j + 0 * row
    zeros += tile * 8 + first + c + 0 * row
    for start in tl.static_range(0, IN // GROUP, GROUPS):
        group = start + tl.arange(0, GROUPS)[:, None, None]
        there = group < IN // GROUP
        w = tl.load(codes + (group * (GROUP // 16) + row) * (2 * OUT), mask=there, other=0)
        x0 = tl.load(x + group * GROUP, mask=there, other=0).to(tl.float32)
        x1 = tl.load(x + group * GROUP + 1, mask=there, other=0).to(tl.float32)
        x8 = tl.load(x + group * GROUP + 8, mask=there, other=0).to(tl.float32)
        x9 = tl.load(x + group * GROUP + 9, mask=there, other=0).to(tl.float32)
        s_low = tl.load(scales + group * OUT, mask=there, other=0).to(tl.float32) * factor
        s_high = tl.load(scales + group * OUT + 1, mask=there, other=0).to(tl.float32) * factor
        z = tl.load(zeros + group * (OUT // 8), mask=there, other=0)
        z_low, z_high = (z >> 4 * j & 15).to(tl.float32), (z >> 4 * j + 16 & 15).to(tl.float32)
        total = x0 + x1 + x8 + x9
        dot = (w & 15).to(tl.float32) * x0 + (w >> 16 & 15).to(tl.float32) * x1
        dot += (w >> 4 & 15).to(tl.float32) * x8 + (w >> 20 & 15).to(tl.float32) * x9
        low += s_low * (dot - z_low * total)
        dot = (w >> 8 & 15).to(tl.float32) * x0 + (w >> 24 & 15).to(tl.float32) * x1
        dot += (w >> 12 & 15).to(tl.float32) * x8 + (w >> 28 & 15).to(tl.float32) * x9
        high += s_high * (dot - z_high * total)
    return low, high


@jit
def _outputs(sums, PARTS: tl.constexpr):
    """[PARTS, 4]: a strip's sums over channels, of the outputs ``16 * j + c`` (or 8 more) of its tile."""
    return tl.sum(tl.reshape(tl.sum(tl.sum(sums, 0), 0), [PARTS, 4, 4]), 1)


@jit
def _places(strip, PARTS: tl.constexpr):
    """[PARTS, 4]: the outputs of a strip's first half; those of the second are 8 more."""
    c = strip % (8 // PARTS) * PARTS + tl.arange(0, PARTS)[:, None]
    return strip // (8 // PARTS) * 64 + 16 * tl.arange(0, 4)[None, :] + c


@jit
def _activated(gate, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        return gate * tl.sigmoid(gate)
    if ACTIVATION == "gelu":
        return 0.5 * gate * (1 + tl.erf(gate * 0.7071067811865476))
    # 1 + tanh(u) = 2 sigmoid(2 u)
    return gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))


@jit
def _gate_up(
    x,
    topk_ids,
    codes,
    scales,
    zeros,
    inner,
    x_stride,
    HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    CHOSEN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    PARTS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    strip, pair = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    expert = tl.load(topk_ids + pair).to(tl.int64)
    x += pair // CHOSEN * x_stride
    codes += expert * (HIDDEN // 16 * 4 * WIDTH)
    scales += expert * (HIDDEN // GROUP * 2 * WIDTH)
    zeros += expert * (HIDDEN // GROUP * (WIDTH // 4))
    nothing = tl.zeros([GROUPS, GROUP // 16, 16 * PARTS], tl.float32)
    up_strip = strip + WIDTH // 64 * (8 // PARTS)
    gate_low, gate_high = _add_strip(
        nothing, nothing, codes, scales, zeros, x, 1.0, strip, HIDDEN, 2 * WIDTH, GROUP, GROUPS, PARTS
    )
    up_low, up_high = _add_strip(
        nothing, nothing, codes, scales, zeros, x, 1.0, up_strip, HIDDEN, 2 * WIDTH, GROUP, GROUPS, PARTS
    )
    inner += pair * WIDTH + _places(strip, PARTS)
    tl.store(inner, _activated(_outputs(gate_low, PARTS), ACTIVATION) * _outputs(up_low, PARTS))
    tl.store(inner + 8, _activated(_outputs(gate_high, PARTS), ACTIVATION) * _outputs(up_high, PARTS))


@jit
def _down(
    inner,
    topk_weights,
    topk_ids,
    codes,
    scales,
    zeros,
    out,
    HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    CHOSEN: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    PARTS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    strip, token = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    low = tl.zeros([GROUPS, GROUP // 16, 16 * PARTS], tl.float32)
    high = tl.zeros([GROUPS, GROUP // 16, 16 * PARTS], tl.float32)
    for place in range(CHOSEN):
        pair = token * CHOSEN + place
        expert = tl.load(topk_ids + pair).to(tl.int64)
        low, high = _add_strip(
            low,
            high,
            codes + expert * (WIDTH // 16 * 2 * HIDDEN),
            scales + expert * (WIDTH // GROUP * HIDDEN),
            zeros + expert * (WIDTH // GROUP * (HIDDEN // 8)),
            inner + pair * WIDTH,
            tl.load(topk_weights + pair),
            strip,
            WIDTH,
            HIDDEN,
            GROUP,
            GROUPS,
            PARTS,
        )
    out += token * HIDDEN + _places(strip, PARTS)
    tl.store(out, _outputs(low, PARTS).to(out.dtype.element_ty))
    tl.store(out + 8, _outputs(high, PARTS).to(out.dtype.element_ty))
