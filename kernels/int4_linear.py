"""Linear layers with 4-bit or 8-bit weights for a few tokens: ``torch.ops.vllm_quantspec.int4_linear``.

On a GPU a CUDA kernel, compiled by NVRTC when a shape is first used, reads the packed weight once at nearly the
memory's bandwidth; on the CPU the same operator is plain PyTorch (`reference`). There are three kernels, on one layout: the
ideas are in ``int4_linear.cu`` (up to 16 tokens), ``int4_linear_wide.cu`` (more) and ``int4_linear_fp8.cu`` (Hopper).

Packed layout. Rows are cut in tiles of 16, input channels in chunks of 128 (the last one padded). A chunk of a tile is
what eight mma.m16n8k16 take as their A operand, in fragment order: lane ``4*g + t`` holds the words ``[half][lane][word]``;
word ``w`` of half ``h`` is product ``s = 4*h + w``, its bits ``4*p..4*p+3`` and ``16+4*p..`` are the two channels of
register ``p`` of the fragment: row ``g + 8*(p % 2)``, channels ``32*(s//2) + 8*t + 4*(s%2) + 2*(p//2)`` and one more.
In 8 bits a lane has ``[quarter][lane][16 bytes]``; quarter ``s//2`` holds products ``2*(s//2)`` and one more, 8 bytes each:
byte ``4*(p//2) + 2*i + p%2`` is channel ``i`` of the two of register ``p``.
Scales lie beside them as [tile][chunk][group][g][row g or g + 8][scale, MAGIC + zero], in the activations' dtype; in 8 bits
the zero point's level stands in for MAGIC + zero.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from vllm_quantspec import levels
from vllm_quantspec.kernels import nvrtc
from vllm_quantspec.kernels.device import MIN_CAPABILITY, Device, device_properties
from vllm_quantspec.kernels.int4_linear_fp8 import INPUT_THREADS, INPUTS_SOURCE, Fp8Plan, choose_fp8_plan, is_faster, split
from vllm_quantspec.kernels.int4_linear_wide import WidePlan, choose_wide_plan
from vllm_quantspec.kernels.workspace import Workspace
from vllm_quantspec.rotation import rotate_inputs
from vllm_quantspec.weights import WEIGHT_GROUP_SIZES

SOURCE = Path(__file__).with_suffix(".cu")
ROWS, CHUNK = 16, 128
# Codes become floats by being ORed into this number's mantissa, so zero points are stored with it added.
MAGIC = {torch.bfloat16: 128, torch.float16: 64}
# Up to this many tokens the warps of a CTA share row tiles; beyond it they share tokens, in the other kernel.
MAX_NARROW = 16
# Chunks of 128 channels from which a linear of one or two row tiles per CTA has more warps, and row tiles per multiprocessor
# above which a launch has two CTAs there: measured on an H200 (benchmarks/NOTES.md, "Plans behind a norm").
MANY_CHUNKS, MANY_TILES = 48, 11
# On Hopper a third kernel, with FP8 products (int4_linear_fp8.py), takes bfloat16 inputs of more than MAX_ALIKE and up to
# MAX_FP8 tokens, where it is faster. (float16 has more bits than its inputs hold.)
MAX_ALIKE, MAX_FP8 = 8, 64
# Up to so many tokens an H200 is faster with 4 bits than with a BF16 weight, 1.24 times (results/int4_linear-wide.json).
MAX_FASTER_TOKENS = 64
# The same for 8 bits: with more, each 16 tokens read the weight anew.
MAX_FASTER_TOKENS_8_BITS = MAX_NARROW
# Weights that `pack` works on at a time.
MAX_PACKED_AT_ONCE = 1 << 27


@dataclass(frozen=True)
class PackedLinear:
    """A 4-bit or 8-bit weight as the kernel reads it; the layout is in the module's docstring.

    codes: uint8 [out / 16, ceil(in / 128), 256 * bits].
    scales_zeros: bfloat16 or float16, the activations' dtype, [out / 16, ceil(in / 128), 128 / group_size, 8, 2, 2].
    """

    codes: torch.Tensor
    scales_zeros: torch.Tensor
    out_features: int
    in_features: int
    group_size: int
    bits: int = 4

    @property
    def num_bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in (self.codes, self.scales_zeros))


def supported(
    in_features: int,
    out_features: int,
    group_size: int,
    dtype: torch.dtype,
    capability: tuple[int, int] | None = None,
) -> str | None:
    """Why the kernel does not take a weight of this (local) shape, or None if it does.

    ``capability`` is the GPU's compute capability; None stands for the CPU, where the operator is plain PyTorch.
    """
    if dtype not in MAGIC:
        return f"INT4 linears take bfloat16 or float16 activations, not {dtype}."
    if group_size not in WEIGHT_GROUP_SIZES:
        return f"INT4 linears take groups of {', '.join(map(str, WEIGHT_GROUP_SIZES))} channels, not {group_size}."
    if in_features <= 0 or in_features % group_size:
        return f"{in_features} input channels are not divisible by the group size {group_size}."
    if out_features <= 0 or out_features % ROWS:
        return f"{out_features} output channels are not divisible by {ROWS}."
    if capability is not None and tuple(capability) < MIN_CAPABILITY:
        return f"INT4 linears need compute capability 8.0 or newer, this GPU has {capability[0]}.{capability[1]}."
    return None


# --- Packing ----------------------------------------------------------------------------------------------------------

# A chunk's codes [row half, g, j, t, s % 2, register // 2, channel % 2] go to [s // 4, g, t, s % 4, channel % 2,
# register], where a register is a nibble and register = 2 * (register // 2) + row half, s = 2 * j + s % 2.
_TO_FRAGMENTS = (0, 1, 4, 2, 5, 6, 3, 8, 7, 9)


def pack(
    codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, group_size: int, bits: int = 4
) -> PackedLinear:
    """Bring a quantized weight into the kernel's order, on the tensors' device and with tensor operations only.

    Args:
        codes: uint8 [out, in], below 2^bits; out divisible by 16.
        scales: bfloat16 or float16 [out, in / group_size], in the dtype of the activations.
        zeros: uint8 [out, in / group_size], codes as well.
        group_size: 128, 64 or 32.
        bits: 4, or 8 with the levels of `vllm_quantspec.levels`.

    Raises:
        ValueError: the shapes or dtypes do not fit the above.
    """
    if codes.dim() != 2 or codes.dtype != torch.uint8:
        raise ValueError(f"codes must be uint8 [out, in], got {codes.dtype} {list(codes.shape)}.")
    rows, channels = codes.shape
    if (reason := supported(channels, rows, group_size, scales.dtype)) is not None:
        raise ValueError(reason)
    groups = channels // group_size
    for name, x in (("scales", scales), ("zeros", zeros)):
        if x.shape != (rows, groups):
            raise ValueError(f"{name} must be [out, in / group_size] = {[rows, groups]}, got {list(x.shape)}.")
    if zeros.dtype != torch.uint8:
        raise ValueError(f"zeros must be uint8, got {zeros.dtype}.")
    if bits not in levels.BITS:
        raise ValueError(f"bits must be 4 or 8, got {bits}.")
    # A large vocabulary's weight is packed piece by piece: each step of it makes a copy.
    step = ROWS * max(1, MAX_PACKED_AT_ONCE // (ROWS * channels))
    parts = [_pack_rows(*(x[i : i + step] for x in (codes, scales, zeros)), group_size, bits) for i in range(0, rows, step)]
    return PackedLinear(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)), rows, channels, group_size, bits)


def _pack_rows(
    codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, group_size: int, bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    (rows, channels), groups = codes.shape, scales.shape[1]
    tiles, chunks = rows // ROWS, -(-channels // CHUNK)
    codes = F.pad(codes, (0, chunks * CHUNK - channels))
    #                 tile, half, g, chunk, j, t, s % 2, register // 2, channel % 2
    codes = codes.view(tiles, 2, 8, chunks, 4, 4, 2, 2, 2).movedim(3, 1)
    if bits == 8:
        # [tile, chunk, j, g, t, s % 2, register // 2, channel % 2, half]
        codes = codes.permute(0, 1, 4, 3, 5, 6, 7, 8, 2).reshape(tiles, chunks, 2048)
        zeros = levels.levels(zeros, 8)
    else:
        # [tile, chunk, s // 4, g, t, s // 2 % 2, s % 2, channel % 2, register // 2, half]
        codes = codes.unflatten(4, (2, 2)).permute(0, 1, 4, 3, 6, 5, 7, 9, 8, 2)
        codes = codes.reshape(tiles, chunks, 2, 32, 4, 8)
        codes = (codes[..., 0::2] | codes[..., 1::2] << 4).reshape(tiles, chunks, 1024)
        zeros = zeros + MAGIC[scales.dtype]

    per_chunk = CHUNK // group_size
    pairs = torch.stack((scales, zeros.to(scales.dtype)), dim=-1)
    pairs = F.pad(pairs, (0, 0, 0, chunks * per_chunk - groups))
    return codes, pairs.view(tiles, 2, 8, chunks, per_chunk, 2).permute(0, 3, 4, 2, 1, 5).contiguous()


def unpack(packed: PackedLinear) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """codes, scales and zeros as `pack` took them."""
    codes, scales, zeros = _unpack(packed.codes, packed.scales_zeros)
    groups = packed.in_features // packed.group_size
    return codes[:, : packed.in_features], scales[:, :groups], zeros[:, :groups]


def _unpack(codes: torch.Tensor, scales_zeros: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scales and zeros with the padding of the last chunk."""
    tiles, chunks = codes.shape[:2]
    pairs = scales_zeros.permute(0, 4, 3, 1, 2, 5).reshape(tiles * ROWS, -1, 2)
    if _bits(codes) == 8:
        # [tile, chunk, j, g, t, s % 2, register // 2, channel % 2, half]
        codes = codes.view(tiles, chunks, 4, 8, 4, 2, 2, 2, 2).permute(0, 8, 3, 1, 2, 4, 5, 6, 7)
        zeros = levels.codes(pairs[..., 1].float().clamp_min_(levels.lowest(8)), 8)
        return codes.reshape(tiles * ROWS, chunks * CHUNK), pairs[..., 0].contiguous(), zeros
    codes = torch.stack((codes & 15, codes >> 4), dim=-1).view(tiles, chunks, 2, 8, 4, 2, 2, 2, 2, 2)
    # [tile, chunk, s // 4, g, t, s // 2 % 2, s % 2, channel % 2, register // 2, half]
    codes = codes.permute(0, 9, 3, 1, 2, 5, 4, 6, 8, 7).reshape(tiles * ROWS, chunks * CHUNK)
    zeros = (pairs[..., 1].float() - MAGIC[scales_zeros.dtype]).clamp_min_(0).to(torch.uint8)
    return codes, pairs[..., 0].contiguous(), zeros


def dequantize(codes: torch.Tensor, scales_zeros: torch.Tensor) -> torch.Tensor:
    """The weight of a `PackedLinear` in fp32, with the padding of the last chunk."""
    codes_of, scales, zeros = _unpack(codes, scales_zeros)
    steps = levels.levels(codes_of.view(*scales.shape, -1), _bits(codes))
    steps = steps - levels.levels(zeros.unsqueeze(-1), _bits(codes))
    return (steps * scales.unsqueeze(-1).float()).view(len(scales), -1)


def _bits(codes: torch.Tensor) -> int:
    return codes.shape[2] // 256


def max_faster_tokens(codes: torch.Tensor) -> int:
    """Up to so many tokens a packed weight is faster than one in 16 bits."""
    return MAX_FASTER_TOKENS if _bits(codes) == 4 else MAX_FASTER_TOKENS_8_BITS


# --- The operator -----------------------------------------------------------------------------------------------------


def int4_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales_zeros: torch.Tensor,
    bias: torch.Tensor | None = None,
    rotated: bool = False,
    fp8_inputs: bool = False,
) -> torch.Tensor:
    """``x W^T + bias`` with the weight of a `PackedLinear`, in fp32 sums.

    A token's result is the same whatever the others, and for any number of them up to 8 (in 8 bits for any number).

    Can be captured in a CUDA graph, after one run with the same shapes. Launches on a device share a workspace,
    so they have to follow one another, on one stream or ordered by events. A launch starts to read the weight
    before the kernel in front of it ends, so that one must not be writing the weight. With more than 8 tokens CTAs of a
    launch may wait for one another; other kernels on the GPU must not wait for this one.

    Args:
        x: [M, in] in the dtype of scales_zeros; rows may be strided.
        codes, scales_zeros: the tensors of a `PackedLinear`.
        bias: [out] in the same dtype, or None.
        rotated: the weight is that of rotated inputs: x is rotated here (`vllm_quantspec.rotation`), in fp32, and rounded to
            its dtype once.
        fp8_inputs: with 4 bits, x may be rounded to an e4m3 number each (`split`), and is where that is faster: from 9 to
            64 tokens.

    Returns:
        [M, out] in the same dtype.

    Raises:
        ValueError: an argument does not fit the above.
        RuntimeError: on a GPU older than compute capability 8.0, or where a shape is first seen during a capture.
    """
    return torch.ops.vllm_quantspec.int4_linear(x, codes, scales_zeros, bias, rotated, fp8_inputs)


def faster_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales_zeros: torch.Tensor,
    bias: torch.Tensor | None,
    original: torch.Tensor | None,
    rotated: bool = False,
    fp8_inputs: bool = False,
) -> torch.Tensor:
    """`int4_linear`, or with ``original``, the weight in 16 bits ([out, in]), from as many rows on as that is faster."""
    if is_original_faster(x.shape[0], codes, original):
        return F.linear(x, original, bias)
    return int4_linear(x, codes, scales_zeros, bias, rotated, fp8_inputs)


def is_original_faster(tokens: int, codes: torch.Tensor, original: torch.Tensor | None) -> bool:
    """Whether `faster_linear` multiplies so many tokens by the weight in 16 bits."""
    return original is not None and tokens > max_faster_tokens(codes)


def reference(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales_zeros: torch.Tensor,
    bias: torch.Tensor | None = None,
    rotated: bool = False,
    parts: int | None = None,
) -> torch.Tensor:
    """`int4_linear` in plain PyTorch, accumulated in fp32; with ``parts``, of inputs that are so many e4m3 numbers each."""
    check(x, codes, scales_zeros, bias)
    weight = dequantize(codes, scales_zeros)[:, : x.shape[1]]
    inputs = rotate_inputs(x).to(x.dtype) if rotated else x
    out = (inputs.float() if parts is None else split(inputs, parts)) @ weight.t()
    return (out if bias is None else out + bias.float()).to(x.dtype)


def check(x: torch.Tensor, codes: torch.Tensor, scales_zeros: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Raises:
    ValueError: these are not arguments of `int4_linear`.
    """
    if x.dim() != 2 or x.dtype not in MAGIC:
        raise ValueError(f"x must be bfloat16 or float16 [M, in], got {x.dtype} {list(x.shape)}.")
    if x.dtype != scales_zeros.dtype:
        raise ValueError(f"x is {x.dtype} but the weight was packed for {scales_zeros.dtype}.")
    shapes_fit = codes.dim() == 3 and scales_zeros.dim() == 6 and codes.shape[:2] == scales_zeros.shape[:2]
    if not shapes_fit or codes.shape[2] not in (1024, 2048):
        raise ValueError(
            f"codes {list(codes.shape)} and scales_zeros {list(scales_zeros.shape)} are not those of a PackedLinear."
        )
    channels = x.shape[1]
    if codes.shape[1] != -(-channels // CHUNK) or channels % (CHUNK // scales_zeros.shape[2]):
        raise ValueError(f"x has {channels} channels, the weight was packed for another number ({codes.shape[1]} chunks).")
    if not codes.is_contiguous() or not scales_zeros.is_contiguous():
        raise ValueError("codes and scales_zeros must be contiguous.")
    if bias is not None and (bias.shape != (codes.shape[0] * ROWS,) or bias.dtype != x.dtype or not bias.is_contiguous()):
        raise ValueError(f"bias must be {x.dtype} [{codes.shape[0] * ROWS}], got {bias.dtype} {list(bias.shape)}.")


def rounds_inputs(tokens: int, bits: int = 4) -> bool:
    """Whether `int4_linear` rounds so many tokens' inputs to e4m3 numbers where it may."""
    return bits == 4 and MAX_ALIKE < tokens <= MAX_FP8


def _cpu(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales_zeros: torch.Tensor,
    bias: torch.Tensor | None = None,
    rotated: bool = False,
    fp8_inputs: bool = False,
) -> torch.Tensor:
    parts = 1 if fp8_inputs and rounds_inputs(len(x), _bits(codes)) else None
    return reference(x, codes, scales_zeros, bias, rotated, parts)


def _cuda(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales_zeros: torch.Tensor,
    bias: torch.Tensor | None = None,
    rotated: bool = False,
    fp8_inputs: bool = False,
) -> torch.Tensor:
    check(x, codes, scales_zeros, bias)
    out = x.new_empty(x.shape[0], codes.shape[0] * ROWS)
    if x.shape[0] == 0:
        return out
    return launch(x, codes, scales_zeros, bias, out, rotated=rotated, fp8_inputs=fp8_inputs)


def _fake(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales_zeros: torch.Tensor,
    bias: torch.Tensor | None = None,
    rotated: bool = False,
    fp8_inputs: bool = False,
) -> torch.Tensor:
    return x.new_empty(x.shape[0], codes.shape[0] * ROWS)


_library = torch.library.Library("vllm_quantspec", "FRAGMENT")
_library.define(
    "int4_linear(Tensor x, Tensor codes, Tensor scales_zeros, Tensor? bias=None, bool rotated=False, bool fp8_inputs=False) "
    "-> Tensor"
)
_library.impl("int4_linear", _cpu, "CPU")
_library.impl("int4_linear", _cuda, "CUDA")
torch.library.register_fake("vllm_quantspec::int4_linear", _fake, lib=_library)


# --- Launching --------------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """How a launch of ``int4_linear.cu`` divides its work; the names are the macros' of the kernel."""

    warps: int  # that multiply; one more fills the ring
    stages: int
    tiles: int  # row tiles a CTA adds up in one pass
    batch: int  # row tiles of a stage
    token_tiles: int  # tiles of 8 tokens a CTA adds up
    splits: int  # CTAs that share the input channels of a row tile
    blocks: int  # CTAs along the rows
    min_ctas: int = 2  # CTAs that registers allow on a multiprocessor
    overlap: bool = True  # programmatic dependent launch
    bits: int = 4

    source = SOURCE
    features = ""

    @property
    def uses_workspace(self) -> bool:
        return self.splits > 1

    @property
    def threads(self) -> int:
        return 32 * (self.warps + 1)

    def shared_bytes(self, group_size: int) -> int:
        unit = 256 * self.bits + 64 * (CHUNK // group_size)
        return self.warps * (self.stages * self.batch * unit + 512 * self.tiles * self.token_tiles)

    def macros(self, group_size: int, bf16: bool, rotated: bool = False) -> dict[str, int]:
        """What the kernel's source is compiled with."""
        return {
            "GROUP_SIZE": group_size,
            "IS_BF16": int(bf16),
            "WARPS": self.warps,
            "STAGES": self.stages,
            "TILES": self.tiles,
            "TOKEN_TILES": self.token_tiles,
            "SPLITS": self.splits,
            "BATCH": self.batch,
            "MIN_CTAS": self.min_ctas,
            "ROTATED": int(rotated),
            "CODE_BITS": self.bits,
        }


class Params(ctypes.Structure):
    """What the kernels for INT4 linears take (``int4_linear.cuh``)."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("x", "codes", "scales", "bias", "out", "partial", "arrived")]
        + [("x_stride", ctypes.c_int64)]
        + [(name, ctypes.c_int) for name in ("tokens", "channels", "tiles", "chunks")]
    )


# Launches a kernel that fills ``params.out`` with the inputs of so many blocks of tokens, as the plan's kernel reads them.
Convert = Callable[[Params, Fp8Plan, int], None]


def launch(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales_zeros: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    plan: Plan | WidePlan | Fp8Plan | None = None,
    rotated: bool = False,
    fp8_inputs: bool = False,
    convert: Convert | None = None,
) -> torch.Tensor:
    """The kernel on checked arguments, into a contiguous ``out``; ``plan`` overrides the launch, for tuning.

    ``convert`` launches what computes the inputs for FP8 products, in the place of reading them from ``x``.
    """
    x = nvrtc.aligned_rows(x)
    tiles, chunks = codes.shape[:2]
    tokens, channels = len(x), x.shape[1] if convert is None else chunks * CHUNK
    device = x.device.index
    group_size, bf16 = CHUNK // scales_zeros.shape[2], x.dtype == torch.bfloat16
    with torch.cuda.device(device):
        if plan is None:
            plan = choose_plan(tiles, chunks, scales_zeros.shape[2], tokens, device, _bits(codes), bf16, fp8_inputs)
        kernel = _kernel(plan, group_size, bf16, device, rotated)
        token_blocks = -(-tokens // (8 * plan.token_tiles))
        if isinstance(plan, Fp8Plan) and not plan.is_resident(token_blocks, device_properties(device)):
            raise ValueError(f"CTAs of {plan} wait for one another, but would not all be on the GPU at once.")
        partial, arrived = 0, 0
        if plan.uses_workspace:
            floats = plan.splits * token_blocks * plan.token_tiles * tiles * 128
            partial, arrived = (t.data_ptr() for t in _workspace.tensors(device, floats, plan.blocks * token_blocks))
        params = Params(
            *(t.data_ptr() for t in (x, codes, scales_zeros)),
            0 if bias is None else bias.data_ptr(),
            out.data_ptr(),
            *(partial, arrived, x.stride(0), tokens, channels, tiles, chunks),
        )
        if isinstance(plan, Fp8Plan) and plan.ready:
            (ready,) = _ready.tensors(device, token_blocks * -(-chunks // 2) * plan.input_bytes(group_size))
            params.out = ready.data_ptr()
            if convert is None:
                converts = _inputs_kernel(plan, group_size, bf16, device, rotated)
                nvrtc.launch(converts, params, token_blocks, plan.input_blocks(chunks))
            else:
                convert(params, plan, token_blocks)
            params.x, params.out = ready.data_ptr(), out.data_ptr()
        nvrtc.launch(kernel, params, token_blocks)
    return out


@cache
def choose_plan(
    tiles: int,
    chunks: int,
    groups: int,
    tokens: int,
    device: int,
    bits: int = 4,
    bf16: bool = True,
    fp8_inputs: bool = False,
) -> Plan | WidePlan | Fp8Plan:
    """The launch for a weight of ``tiles`` x ``chunks``; sums are in one order up to 16 tokens (8 with FP8 products), in
    8 bits for any number."""
    properties = device_properties(device)
    if properties.has_wgmma and rounds_inputs(tokens, bits):
        if fp8_inputs:
            return choose_fp8_plan(tiles, chunks, groups, tokens, properties, 1)
        if bf16 and is_faster(tiles, chunks, tokens):
            return choose_fp8_plan(tiles, chunks, groups, tokens, properties)
    if tokens > MAX_NARROW and bits == 4:
        return choose_wide_plan(tiles, chunks, groups, tokens, properties)
    return narrow_plan(tiles, chunks, groups, tokens, properties, bits)


def narrow_plan(tiles: int, chunks: int, groups: int, tokens: int, properties: Device, bits: int = 4) -> Plan:
    """The launch of ``int4_linear.cu``, in passes of up to 16 tokens."""
    sms, warps = properties.num_multiprocessors, 8

    def cost(splits: int) -> float:
        """Units (a tile's chunk) that the busiest warp reads; adding up across CTAs takes as long as a few."""
        return -(-tiles // max(1, sms // splits)) * -(-chunks // (splits * warps)) + (3 * (splits > 1))

    splits = min((s for s in range(1, 9) if s <= max(1, chunks // warps)), key=cost)
    # All multiprocessors take part, or the next launch's CTAs would crowd on those that do not.
    blocks = min(tiles, max(1, sms // splits))
    per_block = -(-tiles // blocks)
    # Many channels of few rows: more warps share what each has to read in turn. The same for all numbers of tokens, since it
    # decides the order of sums.
    few_rows = bits == 4 and splits == 1 and per_block <= 2 and chunks >= MANY_CHUNKS
    if few_rows:
        warps = 12
    token_tiles = 1 if tokens <= 8 else 2
    two = token_tiles == 1 and per_block > (8 if bits == 8 else MANY_TILES)
    if two:
        blocks *= 2  # a long launch hides its CTAs' latencies behind each other, not behind the next launch
    per_block = -(-tiles // blocks)
    per_pass = -(-per_block // -(-per_block // (8 // token_tiles)))
    # A short launch gains by room for the next one's CTA beside its own, which fills its ring meanwhile; one of 3 row tiles
    # and more, or of many channels, by a longer ring.
    long_ring = bits == 4 and token_tiles == 1 and not two and (per_block > 2 or few_rows)
    min_ctas = 2 if token_tiles == 1 and not long_ring else 1
    plan = Plan(warps, 0, per_pass, 1, token_tiles, splits, blocks, min_ctas, bits=bits)
    room = properties.shared_memory_per_multiprocessor // 2
    if long_ring:
        room = min(2 * room, properties.shared_memory_per_block)
    budget = room - 2048 - plan.shared_bytes(CHUNK // groups)
    return plan._replace(stages=max(2, min(budget // (warps * (256 * bits + 64 * groups)), 16)))


def _refuse_capture() -> None:
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("Run int4_linear once with these shapes before capturing it in a CUDA graph.")


@cache
def _kernel(
    plan: Plan | WidePlan | Fp8Plan, group_size: int, bf16: bool, device: int, rotated: bool = False
) -> nvrtc.Kernel:
    capability = device_properties(device).capability
    if capability < MIN_CAPABILITY:
        raise RuntimeError(supported(128, 16, 128, torch.bfloat16, capability))
    _refuse_capture()
    return nvrtc.load(
        plan.source,
        plan.macros(group_size, bf16, rotated),
        device,
        features=plan.features,
        grid=(plan.blocks, plan.splits),
        threads=plan.threads,
        shared_bytes=plan.shared_bytes(group_size),
        overlap=plan.overlap,
    )


@cache
def _inputs_kernel(plan: Fp8Plan, group_size: int, bf16: bool, device: int, rotated: bool) -> nvrtc.Kernel:
    """What converts the inputs of a launch, where that is a launch of its own."""
    _refuse_capture()
    return nvrtc.load(
        INPUTS_SOURCE,
        plan.input_macros(group_size, bf16, rotated),
        device,
        grid=(1, 1),
        threads=INPUT_THREADS,
        shared_bytes=0,
        overlap=plan.overlap,
    )


# Partial sums and arrival counters; converted inputs.
_workspace = Workspace("int4_linear", (torch.float32, 1 << 20), (torch.int32, 1 << 12))
_ready = Workspace("int4_linear", (torch.uint8, 1 << 20))
