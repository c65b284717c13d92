"""Linear layers on 4-bit weights in the layout of vLLM's Marlin kernel: ``torch.ops.vllm_quantspec.marlin_linear``.

A checkpoint in 4 bits (AWQ, GPTQ, compressed-tensors) keeps its codes, scales and zero points: nothing is rounded again, and
vLLM's Marlin kernel reads the same tensors. On a GPU a CUDA kernel, compiled by NVRTC when a shape is first used, serves a
few tokens; its idea is in ``marlin_linear.cu``. On the CPU the operator is plain PyTorch (`reference`).

Layout of a weight [out, in]; that of groups is `int4_experts`'s of one expert:

    codes   int32 [in / 16, 2 * out], 0..15.
    scales  [groups, out] in the activations' dtype. One group stands for a scale per output: then of each 32 outputs
            ``8 * a + 2 * c + d`` lies at ``8 * c + 2 * a + d``.
    zeros   int32 [groups, out / 8], or None: then 8 is the zero point of all.
    bias    [out], ordered as one scale per output is, or None.
"""

from __future__ import annotations

import ctypes
import math
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from vllm_quantspec.kernels import int4_experts, nvrtc
from vllm_quantspec.kernels.device import MIN_CAPABILITY, device_properties
from vllm_quantspec.kernels.workspace import Workspace

SOURCE = Path(__file__).with_suffix(".cu")
GROUP_SIZES = (32, 64, 128)
MIDDLE = 8
# Outputs of a strip; input channels of a warp's unit.
STRIP, UNIT = 64, 64
# Codes that are unpacked at a time while a weight is brought into this order.
_AT_ONCE = 1 << 26


class MarlinWeight(NamedTuple):
    """A weight as the module's docstring says."""

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None

    @property
    def in_features(self) -> int:
        return self.codes.shape[0] * 16

    @property
    def out_features(self) -> int:
        return self.codes.shape[1] // 2


def supported(
    in_features: int,
    out_features: int,
    group_size: int,
    dtype: torch.dtype,
    capability: tuple[int, int] | None = None,
) -> str | None:
    """Why the kernel does not take a weight of this (local) shape, or None if it does.

    Args:
        group_size: input channels per scale, or -1 for a scale per output.
        capability: the GPU's compute capability; None stands for the CPU, where the operator is plain PyTorch.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return f"4-bit linears in Marlin's order take bfloat16 or float16 activations, not {dtype}."
    if in_features <= 0 or out_features <= 0 or in_features % UNIT or out_features % STRIP:
        return f"{out_features} x {in_features} is not a multiple of {STRIP} x {UNIT} (outputs by input channels)."
    if group_size not in (-1, in_features) and (group_size not in GROUP_SIZES or in_features % group_size):
        return f"Groups of {group_size} of {in_features} input channels are not groups of 32, 64 or 128, nor one."
    if capability is not None and tuple(capability) < MIN_CAPABILITY:
        return f"4-bit linears need compute capability 8.0 or newer, this GPU has {capability[0]}.{capability[1]}."
    return None


# --- Packing ----------------------------------------------------------------------------------------------------------


def pack(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None = None) -> MarlinWeight:
    """From codes (uint8 [out, in], 0..15), scales ([out, groups]) and zero points (uint8 likewise, or None).

    Tensor operations alone, on the tensors' device.

    Raises:
        ValueError: the shapes do not fit the above, or the kernel.
    """
    out_features, in_features = codes.shape
    groups = scales.shape[1]
    fits = scales.shape[0] == out_features and groups > 0 and in_features % groups == 0
    if not fits or (zeros is not None and zeros.shape != scales.shape):
        raise ValueError(f"codes {list(codes.shape)} and scales {list(scales.shape)} are not those of one weight.")
    if (reason := supported(in_features, out_features, in_features // groups, torch.bfloat16)) is not None:
        raise ValueError(reason)
    no_zeros = codes.new_zeros(scales.shape)
    packed = int4_experts.pack(codes[None], scales[None], (no_zeros if zeros is None else zeros)[None])
    ordered = packed.scales[0] if groups > 1 else single_order(scales.t())
    return MarlinWeight(packed.codes[0], ordered.contiguous(), None if zeros is None else packed.zeros[0])


def repack(words: torch.Tensor) -> torch.Tensor:
    """GPTQ's words (int32 [in / 8, out], eight channels each, the first in the lowest bits) as Marlin's codes.

    vLLM has a kernel for it, which not every build can run on every GPU; this is tensor operations alone.
    """
    rows, out_features = words.shape
    step = max(2, _AT_ONCE // (8 * out_features) // 2 * 2)
    return torch.cat([_repack(words[first : first + step]) for first in range(0, rows, step)])


def _repack(words: torch.Tensor) -> torch.Tensor:
    rows, out_features = words.shape
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=words.device).view(1, 8, 1)
    codes = (words.unsqueeze(1) >> shifts & 15).to(torch.uint8).reshape(8 * rows, out_features).t()
    nothing = codes.new_zeros(1, out_features, 1)
    return int4_experts.pack(codes[None], nothing, nothing).codes[0]


def dequantize(weight: MarlinWeight) -> torch.Tensor:
    """float32 [out, in]: ``(code - zero) * scale``, on the tensors' device."""
    codes, scales, zeros = weight
    groups, out_features = scales.shape
    levels = torch.ones(1, 1, out_features, dtype=torch.float32, device=codes.device)
    nothing = torch.zeros(1, 1, out_features // 8, dtype=torch.int32, device=codes.device)
    plain = int4_experts.dequantize(int4_experts.Packed(codes[None], levels, nothing))[0]
    in_eights = scales.unflatten(1, (-1, 8, 8)).transpose(2, 3).flatten(1)
    scales = in_eights if groups > 1 else single_order_undone(scales)
    points = scales.new_full(scales.shape, MIDDLE) if zeros is None else int4_experts.unpack_zeros(zeros)
    plain = plain.unflatten(1, (groups, -1)) - points.t().float().unsqueeze(-1)
    return (plain * scales.t().float().unsqueeze(-1)).flatten(1)


def single_order(x: torch.Tensor) -> torch.Tensor:
    """[..., out] in the order of biases and of scales per output."""
    return x.unflatten(-1, (-1, 4, 4, 2)).transpose(-2, -3).flatten(-4)


# It swaps two dimensions of the same size.
single_order_undone = single_order


# --- The operator -----------------------------------------------------------------------------------------------------


def marlin_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """``x W^T + bias`` with the weight of a `MarlinWeight`, in fp32 sums.

    A token's result is the same whatever the others, for any number of them. Can be captured in a CUDA graph, after one run
    with the same shapes. Launches on a device share a workspace, so they have to follow one another. A launch starts to read
    the weight before the kernel in front of it ends, so that one must not be writing the weight.

    Args:
        x: [M, in] in the dtype of scales, bfloat16 or float16; rows may be strided.
        codes, scales, zeros: the tensors of a `MarlinWeight`.
        bias: [out] in the same dtype and in Marlin's order (`single_order`), or None.

    Returns:
        [M, out] in the same dtype, outputs in their own order.

    Raises:
        ValueError: an argument does not fit the above.
        RuntimeError: on a GPU older than compute capability 8.0, or where a shape is first seen during a capture.
    """
    return torch.ops.vllm_quantspec.marlin_linear(x, codes, scales, zeros, bias)


def reference(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """`marlin_linear` in plain PyTorch, accumulated in fp32."""
    check(x, codes, scales, zeros, bias)
    out = x.float() @ dequantize(MarlinWeight(codes, scales, zeros)).t()
    return (out if bias is None else out + single_order_undone(bias).float()).to(x.dtype)


def check(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> None:
    """Raises:
    ValueError: `marlin_linear`'s arguments are not what it takes.
    """
    if x.dim() != 2 or x.dtype != scales.dtype:
        raise ValueError(f"x must be {scales.dtype} [M, in], got {x.dtype} {list(x.shape)}.")
    if codes.dim() != 2 or codes.dtype != torch.int32 or scales.dim() != 2 or codes.shape[1] != 2 * scales.shape[1]:
        raise ValueError(
            f"codes {codes.dtype} {list(codes.shape)} and scales {list(scales.shape)} are not those of a MarlinWeight."
        )
    groups, out_features = scales.shape
    in_features = codes.shape[0] * 16
    if in_features != x.shape[1] or groups == 0 or in_features % groups:
        raise ValueError(f"x has {x.shape[1]} channels, the weight {in_features} in {groups} groups.")
    if (reason := supported(in_features, out_features, in_features // groups, x.dtype)) is not None:
        raise ValueError(reason)
    if zeros is not None and (zeros.shape != (groups, out_features // 8) or zeros.dtype != torch.int32):
        raise ValueError(f"zeros must be int32 {[groups, out_features // 8]}, got {zeros.dtype} {list(zeros.shape)}.")
    if bias is not None and (bias.shape != (out_features,) or bias.dtype != x.dtype):
        raise ValueError(f"bias must be {x.dtype} [{out_features}], got {bias.dtype} {list(bias.shape)}.")
    if not all(part.is_contiguous() for part in (codes, scales, zeros, bias) if part is not None):
        raise ValueError("codes, scales, zeros and bias must be contiguous.")


def _cuda(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    check(x, codes, scales, zeros, bias)
    out = x.new_empty(x.shape[0], scales.shape[1])
    return launch(x, MarlinWeight(codes, scales, zeros), bias, out) if x.shape[0] else out


def _fake(x, codes, scales, zeros=None, bias=None):
    return x.new_empty(x.shape[0], scales.shape[1])


_library = torch.library.Library("vllm_quantspec", "FRAGMENT")
_library.define("marlin_linear(Tensor x, Tensor codes, Tensor scales, Tensor? zeros=None, Tensor? bias=None) -> Tensor")
_library.impl("marlin_linear", reference, "CPU")
_library.impl("marlin_linear", _cuda, "CUDA")
torch.library.register_fake("vllm_quantspec::marlin_linear", _fake, lib=_library)


# --- Launching --------------------------------------------------------------------------------------------------------


class Kind(NamedTuple):
    """What the kernel's source depends on beside the plan. group_size: 0 for a scale per output."""

    group_size: int
    has_zeros: bool
    bf16: bool

    @property
    def stage_bytes(self) -> int:
        """Of one warp's unit in the ring: codes, scales and zero points."""
        groups = UNIT // min(self.group_size or UNIT, UNIT)
        return UNIT * 32 + groups * (128 * bool(self.group_size) + 32 * self.has_zeros)


class Plan(NamedTuple):
    """How a launch divides its work. ``warps`` and ``splits`` order the sums, so they do not depend on the tokens."""

    warps: int  # that multiply; one more fills the ring
    stages: int
    token_tiles: int  # tiles of 8 tokens that a CTA adds up
    splits: int  # CTAs that share the input channels of a strip
    blocks: int  # CTAs along the outputs
    x_slots: int  # units of tokens' values that a warp has room for
    resident: bool  # these are all of its units
    min_ctas: int  # CTAs that registers allow on a multiprocessor
    overlap: bool = True  # programmatic dependent launch

    @property
    def x_and_sums_bytes(self) -> int:
        return self.warps * self.token_tiles * (self.x_slots * 8 * (UNIT * 2 + 16) + 2048)

    def shared_bytes(self, kind: Kind) -> int:
        return self.stages * self.warps * kind.stage_bytes + self.x_and_sums_bytes


class _Params(ctypes.Structure):
    _names = ("x", "codes", "scales", "zeros", "bias", "out", "partial", "arrived")
    _fields_ = (
        [(name, ctypes.c_void_p) for name in _names]
        + [("x_stride", ctypes.c_int64)]
        + [(name, ctypes.c_int) for name in ("tokens", "strips", "units")]
    )


def kind_of(weight: MarlinWeight) -> Kind:
    groups = weight.scales.shape[0]
    group_size = 0 if groups == 1 else weight.in_features // groups
    return Kind(group_size, weight.zeros is not None, weight.scales.dtype == torch.bfloat16)


@cache
def choose_plan(strips: int, units: int, kind: Kind, tokens: int, device: int) -> Plan:
    """The launch for a weight of ``strips`` x ``units``; its sums are in one order for any number of tokens."""
    properties = device_properties(device)
    sms, shared = properties.num_multiprocessors, properties.shared_memory_per_multiprocessor
    warps = 8 if shared >= 200 << 10 else 4  # of 32 tokens, too, values and sums must have room

    def rounds(splits: int) -> int:
        return math.ceil(math.ceil(units / splits) / warps)

    def blocks(splits: int, resident: int) -> int:
        return min(strips, max(1, sms * resident // splits))

    def cost(option: tuple[int, int]) -> float:
        """Rounds of the busiest multiprocessor (``warps`` units each); adding up parts takes as long as some."""
        splits, resident = option
        per_block = -(-strips // blocks(*option))
        load = resident * per_block * rounds(splits)
        if resident == 1:
            load *= 1.1  # nothing hides a CTA's latencies
        elif load < 16:
            return float("inf")  # the next launch's CTAs hide those of a short one
        again = 0.25 * load if per_block > 1 and rounds(splits) > 4 else 0  # x is read for each strip
        return load + again + 1.5 * (splits > 1)

    options = [(s, resident) for s in range(1, 9) for resident in (1, 2) if s <= max(1, units // warps)]
    splits, resident = min(options, key=cost)
    token_tiles = 1 if tokens <= 8 else 2 if tokens <= 16 else 4
    min_ctas = 2 if token_tiles == 1 else 1
    number = blocks(splits, min(resident, min_ctas))
    slots = rounds(splits) if rounds(splits) * token_tiles <= 8 and rounds(splits) <= 4 else 3 if token_tiles < 4 else 2
    plan = Plan(warps, 0, token_tiles, splits, number, slots, slots >= rounds(splits), min_ctas)
    # Room for two CTAs: the next launch's fills its ring while this one's adds up.
    budget = min(shared // min_ctas, properties.shared_memory_per_block) - 2048 - plan.x_and_sums_bytes
    return plan._replace(stages=max(2, min(budget // (warps * kind.stage_bytes), 8)))


def macros_of(plan: Plan, kind: Kind) -> dict[str, int]:
    """What the kernel's source is compiled with."""
    return {
        "GROUP_SIZE": kind.group_size,
        "HAS_ZEROS": int(kind.has_zeros),
        "IS_BF16": int(kind.bf16),
        "WARPS": plan.warps,
        "STAGES": plan.stages,
        "TOKEN_TILES": plan.token_tiles,
        "SPLITS": plan.splits,
        "X_SLOTS": plan.x_slots,
        "RESIDENT": int(plan.resident),
        "MIN_CTAS": plan.min_ctas,
    }


def launch(
    x: torch.Tensor,
    weight: MarlinWeight,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    plan: Plan | None = None,
) -> torch.Tensor:
    """The kernel on checked arguments, into a contiguous ``out``; ``plan`` overrides the launch, for tuning."""
    x = nvrtc.aligned_rows(x)
    tokens, device, kind = x.shape[0], x.device.index, kind_of(weight)
    strips, units = weight.out_features // STRIP, weight.in_features // UNIT
    with torch.cuda.device(device):
        if plan is None:
            plan = choose_plan(strips, units, kind, tokens, device)
        kernel = _kernel(plan, kind, device)
        token_blocks = -(-tokens // (8 * plan.token_tiles))
        partial, arrived = 0, 0
        if plan.splits > 1:
            floats = plan.splits * token_blocks * plan.token_tiles * strips * 512
            partial, arrived = (t.data_ptr() for t in _workspace.tensors(device, floats, plan.blocks * token_blocks))
        params = _Params(
            *(0 if t is None else t.data_ptr() for t in (x, *weight, bias, out)),
            *(partial, arrived, x.stride(0), tokens, strips, units),
        )
        nvrtc.launch(kernel, params, token_blocks)
    return out


@cache
def _kernel(plan: Plan, kind: Kind, device: int) -> nvrtc.Kernel:
    capability = device_properties(device).capability
    if capability < MIN_CAPABILITY:
        raise RuntimeError(supported(UNIT, STRIP, -1, torch.bfloat16, capability))
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("Run marlin_linear once with these shapes before capturing it in a CUDA graph.")
    return nvrtc.load(
        SOURCE,
        macros_of(plan, kind),
        device,
        grid=(plan.blocks, plan.splits),
        threads=32 * (plan.warps + 1),
        shared_bytes=plan.shared_bytes(kind),
        overlap=plan.overlap,
    )


# Partial sums and arrival counters.
_workspace = Workspace("marlin_linear", (torch.float32, 1 << 20), (torch.int32, 1 << 12))
