"""A mixture's experts in INT4 for a few tokens: two launches, on the weights in the layout of vLLM's Marlin kernel.

On a GPU a CUDA kernel, compiled by NVRTC when a shape is first used, reads each chosen expert once for 8 tokens, without
sorting them first; its idea is in ``int4_experts.cu``. The first launch computes ``x gate^T`` and ``x up^T`` for each token
and each of its experts, the second ``activation(gate) * up`` and the weighted sum of ``down``. Many tokens are Marlin's,
which reads the same bytes.

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

import ctypes
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from vllm_quantspec.kernels import nvrtc
from vllm_quantspec.kernels.device import MIN_CAPABILITY, device_properties
from vllm_quantspec.kernels.workspace import Workspace

SOURCE = Path(__file__).with_suffix(".cu")
ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh")}
GROUP_SIZES = (32, 64, 128)
# Up to so many tokens, where they have most experts of a mixture; not measured yet, see benchmarks/NOTES.md.
MAX_TOKENS = 32
# Outputs of a strip; tokens that read an expert's bytes together; tokens of a launch.
STRIP, LOT, MAX_LAUNCHED = 64, 8, 64
# Input channels of which a CTA holds the tokens' values.
MAX_CHANNELS = 2048
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
    s = scales.unflatten(2, (-1, 8, 8)).transpose(3, 4).flatten(2).transpose(1, 2)
    z = unpack_zeros(zeros).float().transpose(1, 2)
    levels = levels.transpose(1, 2).unflatten(2, (scales.shape[1], -1))
    return ((levels - z.unsqueeze(-1)) * s.float().unsqueeze(-1)).flatten(2)


def unpack_zeros(zeros: torch.Tensor) -> torch.Tensor:
    """uint8 [..., groups, out]: zero points of ``zeros``, int32 [..., groups, out / 8]."""
    undone = torch.empty(*zeros.shape, 8, dtype=torch.uint8, device=zeros.device)
    undone[..., _INTERLEAVE] = _nibbles(zeros).unflatten(-1, (-1, 8))
    return undone.flatten(-2).unflatten(-1, (-1, 8, 8)).transpose(-1, -2).flatten(-3)


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
    plans: tuple[Plan, Plan] | None = None,
) -> torch.Tensor:
    """Sum over a token's experts of ``weight * (activation(x gate^T) * (x up^T)) down^T``, in fp32 sums.

    What ``down`` multiplies is rounded to x's dtype. A token's result is the same whatever the others. Can be captured in a
    CUDA graph, after one run with any number of tokens. Launches on a device share a workspace, so they have to follow one
    another.

    Args:
        x: [tokens, hidden] in the dtype of the scales, bfloat16 or float16; rows may be strided.
        topk_weights: float32 [tokens, experts per token], topk_ids: int32 or int64 likewise, 0 .. experts - 1; contiguous.
        w13: the outputs are those of the gate and then those of up; w2: of down. Hidden size and width are multiples of 64,
            groups have 32, 64 or 128 channels.
        activation: a key of ``ACTIVATIONS``.
        plans: of both launches, for tuning.

    Returns:
        [tokens, hidden] in x's dtype.

    Raises:
        ValueError: an argument does not fit the above, or is not on a GPU.
        RuntimeError: on a GPU older than compute capability 8.0, or where a shape is first seen during a capture.
    """
    _check(x, topk_weights, topk_ids, w13, w2, activation)
    if not x.is_cuda:
        raise ValueError(f"int4_experts runs on a GPU, not on {x.device}; reference computes the same in PyTorch.")
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    with torch.cuda.device(x.device.index):
        for first in range(0, x.shape[0], MAX_LAUNCHED):
            some = slice(first, first + MAX_LAUNCHED)
            _launch(x[some], topk_weights[some], topk_ids[some], w13, w2, activation, plans, out[some])
    return out


def reference(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    w13: Packed,
    w2: Packed,
    activation: str = "silu",
) -> torch.Tensor:
    """`int4_experts` in plain PyTorch, an expert at a time; what ``down`` multiplies stays in fp32."""
    _check(x, topk_weights, topk_ids, w13, w2, activation)
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in topk_ids.unique().tolist():
        gate_up, down = (dequantize(Packed(*(part[expert : expert + 1] for part in w)))[0] for w in (w13, w2))
        token, place = (topk_ids == expert).nonzero(as_tuple=True)
        gate, up = (x[token].float() @ gate_up.t()).chunk(2, dim=-1)
        inner = ACTIVATIONS[activation](gate) * up
        out.index_add_(0, token, topk_weights[token, place].unsqueeze(-1) * (inner @ down.t()))
    return out.to(x.dtype)


def _check(x, topk_weights, topk_ids, w13: Packed, w2: Packed, activation: str) -> None:
    if x.dim() != 2 or x.dtype != w13.scales.dtype or x.stride(1) != 1:
        raise ValueError(
            f"x must be {w13.scales.dtype} [tokens, hidden] with contiguous rows, got {x.dtype} {list(x.shape)}."
        )
    if x.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"INT4 experts take bfloat16 or float16 activations, not {x.dtype}.")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, not {activation!r}.")
    hidden, width = x.shape[1], w13.codes.shape[2] // 4
    number = w13.codes.shape[0]
    if w13.codes.shape[1] * 16 != hidden or w2.codes.shape != (number, width // 16, 2 * hidden):
        raise ValueError(f"weights {list(w13.codes.shape)} and {list(w2.codes.shape)} are not those of x {list(x.shape)}.")
    if hidden % STRIP or width % STRIP or not {_group_of(w13), _group_of(w2)} <= set(GROUP_SIZES):
        raise ValueError(
            f"hidden size and width must be multiples of {STRIP}, in groups of 32, 64 or 128 channels, not {hidden} and "
            f"{width} in groups of {_group_of(w13)} and {_group_of(w2)}."
        )
    if topk_weights.shape != topk_ids.shape or topk_ids.shape[0] != x.shape[0] or topk_weights.dtype != torch.float32:
        raise ValueError("topk_weights (float32) and topk_ids must be [tokens, experts per token].")
    if topk_ids.dtype not in (torch.int32, torch.int64) or not (topk_ids.is_contiguous() and topk_weights.is_contiguous()):
        raise ValueError(f"topk_ids must be int32 or int64, and contiguous as topk_weights, got {topk_ids.dtype}.")
    if not all(part.is_contiguous() for part in (*w13, *w2)):
        raise ValueError("packed weights must be contiguous.")


def _group_of(weight: Packed) -> int:
    return weight.codes.shape[1] * 16 // weight.scales.shape[1]


# --- Launching --------------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """How a launch divides its work. ``strips`` alone may depend on the number of tokens: the others order the sums."""

    warps: int
    splits: int  # CTAs that share the input channels of a strip
    min_ctas: int  # CTAs that registers allow on a multiprocessor
    strips: int  # that a CTA computes one after the other

    def shared_bytes(self, in_features: int) -> int:
        unit = unit_of(in_features)
        channels = -(-in_features // unit // self.splits) * unit
        return LOT * (channels + 8) * 2 + self.warps * (2048 + unit // 16 * 512)


class _Params(ctypes.Structure):
    _names = ("x", "gate_up", "ids", "topk_weights", "codes", "scales", "zeros", "sums", "arrived", "out")
    _fields_ = (
        [(name, ctypes.c_void_p) for name in _names]
        + [("x_stride", ctypes.c_int64)]
        + [(name, ctypes.c_int) for name in ("pairs", "id_stride", "strips")]
    )


def unit_of(in_features: int) -> int:
    """Channels that a warp has in flight."""
    return 64 if in_features % 128 else 128


@cache
def choose_plan(
    in_features: int, out_features: int, group: int, number: int, chosen: int, tokens: int, down: bool, device: int
) -> Plan:
    """For one of the two products, of ``tokens`` that choose ``chosen`` of ``number`` experts each."""
    sms = device_properties(device).num_multiprocessors
    unit = unit_of(in_features)
    units, strips = in_features // unit, out_features // STRIP

    def cost(splits: int) -> int:
        """Bytes through the busiest multiprocessor for one token; a CTA takes as long as some more."""
        ctas = chosen * strips * splits
        return -(-ctas // sms) * (-(-units // splits) * unit * STRIP // 2 + 4096)

    splits = min(range(-(-in_features // MAX_CHANNELS), min(units, 16) + 1), key=cost)
    most = -(-units // splits)
    # Those that are idle least, and then as many as there may be.
    warps = min(range(min(4, most), 9), key=lambda w: (-(-most // w) * w, -w))
    # Few registers for one wave at one token; more for the activation, and for the scales of several groups.
    min_ctas = min(16, (24 if unit == group and not down else 20 if unit == group else 16) // warps)
    read = number * (1 - (1 - min(1, chosen / number)) ** tokens)  # experts, if they are chosen evenly
    each = 1
    while each < 8 and read * strips * splits / (2 * each) >= 6 * sms:
        each *= 2
    return Plan(warps, splits, min_ctas, each)


def macros_of(
    plan: Plan,
    in_features: int,
    out_features: int,
    group: int,
    chosen: int,
    bf16: bool,
    activation: str,
    in_splits: int,
) -> dict[str, int]:
    """What the kernel's source is compiled with; ``in_splits``: of the launch before ``down``, 0 for the first launch."""
    return {
        "DOWN": int(in_splits > 0),
        "GROUP_SIZE": group,
        "IS_BF16": int(bf16),
        "WARPS": plan.warps,
        "UNIT": unit_of(in_features),
        "IN_FEATURES": in_features,
        "OUT_FEATURES": out_features,
        "SPLITS": plan.splits,
        "IN_SPLITS": in_splits,
        "CHOSEN": chosen,
        "ACTIVATION": list(ACTIVATIONS).index(activation),
        "MIN_CTAS": plan.min_ctas,
    }


def _launch(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    w13: Packed,
    w2: Packed,
    activation: str,
    plans: tuple[Plan, Plan] | None,
    out: torch.Tensor,
) -> None:
    """Both launches on checked arguments of up to ``MAX_LAUNCHED`` tokens."""
    x = nvrtc.aligned_rows(x)
    (tokens, hidden), chosen, device = x.shape, topk_ids.shape[1], x.device.index
    width, pairs = w13.codes.shape[2] // 4, topk_ids.numel()
    shapes = [(hidden, 2 * width, _group_of(w13)), (width, hidden, _group_of(w2))]
    if plans is None:
        number = w13.codes.shape[0]
        plans = tuple(
            choose_plan(*shape, number, chosen, tokens, down, device)
            for shape, down in zip(shapes, (False, True), strict=True)
        )
    sums, in_splits = None, 0
    for shape, plan, weight in zip(shapes, plans, (w13, w2), strict=True):
        blocks = -(-shape[1] // (STRIP * plan.strips))
        # In a graph's own memory, where one is captured.
        gate_up, sums = sums, torch.empty(plan.splits * pairs * shape[1], dtype=torch.float32, device=x.device)
        (arrived,) = _workspace.tensors(device, tokens * blocks)
        kernel = _kernel(plan._replace(strips=1), *shape, chosen, x.dtype == torch.bfloat16, activation, in_splits, device)
        params = _Params(
            x.data_ptr(),
            0 if gate_up is None else gate_up.data_ptr(),
            *(t.data_ptr() for t in (topk_ids, topk_weights, *weight, sums, arrived, out)),
            x.stride(0),
            pairs,
            topk_ids.element_size() // 4,
            plan.strips,
        )
        nvrtc.launch(kernel, params, pairs, blocks)
        in_splits = plan.splits


@cache
def _kernel(
    plan: Plan,
    in_features: int,
    out_features: int,
    group: int,
    chosen: int,
    bf16: bool,
    activation: str,
    in_splits: int,
    device: int,
) -> nvrtc.Kernel:
    capability = device_properties(device).capability
    if capability < MIN_CAPABILITY:
        name = ".".join(map(str, capability))
        raise RuntimeError(f"INT4 experts need compute capability 8.0 or newer, this GPU has {name}.")
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("Run int4_experts once with these shapes before capturing it in a CUDA graph.")
    return nvrtc.load(
        SOURCE,
        macros_of(plan, in_features, out_features, group, chosen, bf16, activation, in_splits),
        device,
        grid=(1, plan.splits),
        threads=32 * plan.warps,
        shared_bytes=plan.shared_bytes(in_features),
        overlap=True,
    )


# Arrival counters.
_workspace = Workspace("int4_experts", (torch.int32, 1 << 14))
