"""What a decoder layer of the draft computes between two attentions, in one launch.

``o`` -> add residual, RMSNorm -> ``gate_up`` -> silu(gate) * up -> ``down`` -> add residual, RMSNorm -> the next layer's
``qkv``, for 1 to 4 tokens, with INT4 weights in groups of 128 as `int4_linear` packs them. The ideas are in
``draft_layer.cu``; on the CPU the operator, ``torch.ops.vllm_quantspec.draft_layer``, is plain PyTorch (`reference`).
"""

import ctypes
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from vllm_quantspec.kernels import nvrtc
from vllm_quantspec.kernels.device import Device, device_properties
from vllm_quantspec.kernels.int4_linear import CHUNK, MAGIC, ROWS, dequantize
from vllm_quantspec.kernels.workspace import Workspace

SOURCE = Path(__file__).with_suffix(".cu")
MAX_TOKENS = 4
# Bulk copies, and launches that begin under the end of the one before.
MIN_CAPABILITY = (9, 0)
UNIT = 1024 + 64  # bytes of a row tile's chunk: codes, then scales and zero points
# Pieces of 8 channels in a thread's registers, and bytes of weights that a CTA asks for at a time.
MAX_PIECES, FLIGHT_BYTES = 8, 52 << 10


class Shape(NamedTuple):
    """Sizes of a layer: channels of the attention's output, of the residual, rows of gate (as many as of up), and of qkv."""

    attention: int
    hidden: int
    intermediate: int
    qkv: int


def supported(
    shape: Shape, group_size: int, dtype: torch.dtype, capability: tuple[int, int] | None = None, bits: int = 4
) -> str | None:
    """Why the kernel does not take such layers, or None if it does. ``capability`` is the GPU's; None stands for the CPU."""
    if dtype not in MAGIC:
        return f"draft_layer takes bfloat16 or float16 activations, not {dtype}."
    if group_size != CHUNK or bits != 4:
        return f"draft_layer takes weights of 4 bits in groups of {CHUNK}, not {bits} bits in groups of {group_size}."
    for name, size, unit in zip(Shape._fields, shape, (CHUNK, CHUNK, CHUNK, ROWS), strict=True):
        if size <= 0 or size % unit:
            return f"{size} ({name}) is not divisible by {unit}."
    if capability is not None and tuple(capability) < MIN_CAPABILITY:
        return f"draft_layer needs compute capability 9.0 or newer, this GPU has {capability[0]}.{capability[1]}."
    return None


# --- The operator -----------------------------------------------------------------------------------------------------


def draft_layer(
    attention: torch.Tensor,
    residual: torch.Tensor,
    weights: list[torch.Tensor],
    norm: torch.Tensor,
    next_norm: torch.Tensor,
    bias: torch.Tensor | None,
    epsilon: float,
    next_epsilon: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The next layer's qkv, and the residual that its attention's result is added to.

    A token's result is the same whatever the others. Can be captured in a CUDA graph, after one run with the same shapes.
    The CTAs of a launch wait for each other: launches on a device have to follow one another, on one stream or ordered by
    events, and no other kernel may wait for this one. A launch starts to read weights before the kernel in front of it ends,
    so that one must not be writing them.

    Args:
        attention: [M, in of o], M from 1 to 4, bfloat16 or float16; rows may be strided, as those of ``residual``.
        residual: [M, hidden] in the same dtype.
        weights: codes and scales_zeros of the `PackedLinear` of o, gate_up, down and qkv, in this order.
        norm, next_norm: [hidden], weights of the RMSNorm before gate_up and of the one before qkv.
        bias: of qkv, or None.

    Returns:
        [M, out of qkv], [M, hidden].

    Raises:
        ValueError: an argument does not fit the above.
        RuntimeError: on a GPU older than compute capability 9.0 or one that cannot hold the launch, or where a shape is
            first seen during a capture.
    """
    return torch.ops.vllm_quantspec.draft_layer(
        attention, residual, weights, norm, next_norm, bias, epsilon, next_epsilon
    )


def reference(
    attention: torch.Tensor,
    residual: torch.Tensor,
    weights: list[torch.Tensor],
    norm: torch.Tensor,
    next_norm: torch.Tensor,
    bias: torch.Tensor | None,
    epsilon: float,
    next_epsilon: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`draft_layer` in plain PyTorch: sums in fp32, rounded where the kernel rounds to the dtype."""
    _check(attention, residual, weights, norm, next_norm, bias)
    dtype = attention.dtype
    o, gate_up, down, qkv = (dequantize(*weights[i : i + 2]) for i in range(0, 8, 2))

    def normalized(x, weight, eps):
        x = x.float()
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.float()

    hidden = (attention.float() @ o.t() + residual.float()).to(dtype)
    gate, up = (normalized(hidden, norm, epsilon) @ gate_up.t()).chunk(2, dim=-1)
    activated = (F.silu(gate) * up).to(dtype).float()
    hidden = (activated @ down.t() + hidden.float()).to(dtype)
    out = normalized(hidden, next_norm, next_epsilon) @ qkv.t()
    return (out if bias is None else out + bias.float()).to(dtype), hidden


def _check(attention, residual, weights, norm, next_norm, bias) -> Shape:
    if attention.dim() != 2 or attention.dtype not in MAGIC:
        raise ValueError(f"attention must be bfloat16 or float16 [M, in], got {attention.dtype} {list(attention.shape)}.")
    if not 1 <= len(attention) <= MAX_TOKENS:
        raise ValueError(f"draft_layer takes 1 to {MAX_TOKENS} tokens, not {len(attention)}.")
    if len(weights) != 8:
        raise ValueError(f"weights must be codes and scales_zeros of o, gate_up, down and qkv, got {len(weights)} tensors.")
    dtype, sizes = attention.dtype, []
    for name, codes, scales in zip(("o", "gate_up", "down", "qkv"), weights[::2], weights[1::2], strict=True):
        if codes.dim() != 3 or codes.shape[2] != 1024 or scales.shape != (*codes.shape[:2], 1, 8, 2, 2):
            raise ValueError(
                f"codes {list(codes.shape)} and scales_zeros {list(scales.shape)} of {name} are not those of a PackedLinear "
                f"of 4 bits in groups of {CHUNK}."
            )
        if scales.dtype != dtype:
            raise ValueError(f"attention is {dtype} but {name} was packed for {scales.dtype}.")
        if not codes.is_contiguous() or not scales.is_contiguous() or (codes.data_ptr() | scales.data_ptr()) % 16:
            raise ValueError(f"codes and scales_zeros of {name} must be contiguous and begin at multiples of 16 bytes.")
        sizes.append((codes.shape[1] * CHUNK, codes.shape[0] * ROWS))
    (inputs, hidden), (_, twice), _, (_, qkv) = sizes
    expected = [(inputs, hidden), (hidden, twice), (twice // 2, hidden), (hidden, qkv)]
    if sizes != expected or twice % (2 * CHUNK) or attention.shape[1] != inputs:
        raise ValueError(
            f"attention has {attention.shape[1]} channels; o, gate_up, down and qkv are (in, out) "
            f"{', '.join(map(str, sizes))}: these do not follow one another."
        )
    if residual.shape != (len(attention), hidden) or residual.dtype != dtype:
        raise ValueError(
            f"residual must be {dtype} {[len(attention), hidden]}, got {residual.dtype} {list(residual.shape)}."
        )
    vectors = {"norm": (norm, hidden), "next_norm": (next_norm, hidden)} | ({} if bias is None else {"bias": (bias, qkv)})
    for name, (x, size) in vectors.items():
        if x.shape != (size,) or x.dtype != dtype or not x.is_contiguous() or x.data_ptr() % 16:
            raise ValueError(f"{name} must be contiguous {dtype} [{size}], got {x.dtype} {list(x.shape)}.")
    return Shape(inputs, hidden, twice // 2, qkv)


def _cuda(attention, residual, weights, norm, next_norm, bias, epsilon, next_epsilon):
    _check(attention, residual, weights, norm, next_norm, bias)
    return launch(attention, residual, weights, norm, next_norm, bias, epsilon, next_epsilon)


def _fake(attention, residual, weights, norm, next_norm, bias, epsilon, next_epsilon):
    # Not len(): the number of rows is a symbol here, and must not become a number.
    return attention.new_empty(attention.shape[0], weights[6].shape[0] * ROWS), torch.empty_like(
        residual, memory_format=torch.contiguous_format
    )


_library = torch.library.Library("vllm_quantspec", "FRAGMENT")
_library.define(
    "draft_layer(Tensor attention, Tensor residual, Tensor[] weights, Tensor norm, Tensor next_norm, Tensor? bias, "
    "float epsilon, float next_epsilon) -> (Tensor, Tensor)"
)
_library.impl("draft_layer", reference, "CPU")
_library.impl("draft_layer", _cuda, "CUDA")
torch.library.register_fake("vllm_quantspec::draft_layer", _fake, lib=_library)


# --- Launching --------------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """How a launch of ``draft_layer.cu`` divides its work; the names are the macros' of the kernel."""

    warps: int  # that multiply; one more fills the ring
    stages: int
    flight: int  # stages that are asked for at a time
    tokens: int
    hidden_tiles: int  # row tiles of o and down that a CTA adds up in one pass
    pairs: int  # row tiles of gate, with as many of up
    qkv_tiles: int
    pieces: int  # of 8 channels of a token, that a thread normalizes
    blocks: int
    min_ctas: int = 1  # CTAs on a multiprocessor
    overlap: bool = True  # programmatic dependent launch

    @property
    def threads(self) -> int:
        return 32 * (self.warps + 1)

    def shared_bytes(self, shape: Shape) -> int:
        """Dynamic shared memory: the ring, squares, and what the largest phase needs for inputs and sums."""
        tiles = self.hidden_tiles, 2 * self.pairs, self.hidden_tiles, self.qkv_tiles
        inputs = shape.attention, shape.hidden, shape.intermediate, shape.hidden
        rest = self.tokens * max(n // CHUNK * 272 + 64 * self.warps * t for n, t in zip(inputs, tiles, strict=True))
        return self.warps * self.stages * UNIT + -(-shape.hidden // CHUNK * self.tokens * 4 // 128) * 128 + rest

    @property
    def static_bytes(self) -> int:
        return 16 * self.stages

    def macros(self, bf16: bool) -> dict[str, int]:
        """What the kernel's source is compiled with."""
        return {"IS_BF16": int(bf16)} | {
            name.upper(): getattr(self, name) for name in self._fields if name not in ("blocks", "overlap")
        }


@cache
def choose_plan(shape: Shape, tokens: int, device: int) -> Plan:
    """The launch for layers of such sizes.

    Raises:
        RuntimeError: the GPU's shared memory cannot hold it.
    """
    return plan_of(shape, tokens, device_properties(device))


def plan_of(
    shape: Shape, tokens: int, gpu: Device, warps: int | None = None, pairs: int | None = None, min_ctas: int = 1
) -> Plan:
    """`choose_plan` with a number of warps, of row tiles of gate in a pass, or of CTAs on a multiprocessor of one's own."""
    blocks = gpu.num_multiprocessors * min_ctas
    chunks = [n // CHUNK for n in (shape.attention, shape.hidden, shape.intermediate)]
    if warps is None:  # fewest idle in the last round of a phase; many hide their latencies
        warps = min(range(12, 17), key=lambda w: (sum(-(-c // w) * w for c in (*chunks, chunks[1])), -w))
    hidden, gate, qkv = (-(-n // ROWS // blocks) for n in (shape.hidden, shape.intermediate, shape.qkv))

    def per_pass(tiles: int, most: int) -> int:
        return -(-tiles // -(-tiles // most))

    most = 4 * warps // tokens  # a thread finishes one position
    pieces = -(-tokens * shape.hidden // (256 * warps))
    whole = min(gpu.shared_memory_per_block, gpu.shared_memory_per_multiprocessor // min_ctas - 1024) - 1024
    # As many as registers hold: a thread of 16 warps has 128 of them, and more tokens need some more (H200).
    fitting = 2 if tokens > 2 else 10 if warps < 16 else 7 if tokens == 1 else 4
    pairs = min(pairs or fitting, most)
    tiles = per_pass(hidden, min(3, most)), per_pass(gate, pairs), per_pass(qkv, min(4, most))
    flight = max(2, round(FLIGHT_BYTES / (warps * UNIT)))
    plan = Plan(warps, 0, flight, tokens, *tiles, pieces, blocks, min_ctas)
    stages = (whole - plan.shared_bytes(shape)) // (warps * UNIT + 16)
    if stages < 2 or pieces > MAX_PIECES:
        raise RuntimeError(
            f"draft_layer: {gpu.name} cannot hold a launch for {tokens} tokens of {shape} "
            f"({gpu.shared_memory_per_block} bytes of shared memory per block)."
        )
    stages = min(stages, 32)
    return plan._replace(stages=stages, flight=min(flight, stages))


class _Linear(ctypes.Structure):
    _fields_ = [("codes", ctypes.c_void_p), ("scales", ctypes.c_void_p), ("tiles", ctypes.c_int), ("chunks", ctypes.c_int)]


class _Params(ctypes.Structure):
    _fields_ = (
        [(name, _Linear) for name in ("o", "gate_up", "down", "qkv")]
        + [
            (name, ctypes.c_void_p)
            for name in ("attention", "residual", "norm", "next_norm", "bias", "activated", "hidden", "out", "arrived")
        ]
        + [(name, ctypes.c_int64) for name in ("attention_stride", "residual_stride")]
        + [(name, ctypes.c_float) for name in ("epsilon", "next_epsilon")]
    )


def params_of(attention, residual, weights, norm, next_norm, bias, epsilon, next_epsilon, activated, hidden, out, arrived):
    """The kernel's argument; the last four are written."""
    linears = [_Linear(c.data_ptr(), s.data_ptr(), *c.shape[:2]) for c, s in zip(weights[::2], weights[1::2], strict=True)]
    return _Params(
        *linears,
        *(t.data_ptr() for t in (attention, residual, norm, next_norm)),
        0 if bias is None else bias.data_ptr(),
        *(t.data_ptr() for t in (activated, hidden, out, arrived)),
        *(attention.stride(0), residual.stride(0), epsilon, next_epsilon),
    )


def launch(
    attention: torch.Tensor,
    residual: torch.Tensor,
    weights: list[torch.Tensor],
    norm: torch.Tensor,
    next_norm: torch.Tensor,
    bias: torch.Tensor | None,
    epsilon: float,
    next_epsilon: float,
    plan: Plan | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernel on checked arguments; ``plan`` overrides the launch, for tuning."""
    if attention.stride(1) != 1 or attention.stride(0) % 8 or attention.data_ptr() % 16:
        attention = attention.clone(memory_format=torch.contiguous_format)
    if residual.stride(1) != 1:
        residual = residual.contiguous()
    device, tokens = attention.device.index, len(attention)
    intermediate = weights[4].shape[1] * CHUNK
    shape = Shape(attention.shape[1], residual.shape[1], intermediate, weights[6].shape[0] * ROWS)
    hidden = torch.empty(tokens, shape.hidden, dtype=attention.dtype, device=attention.device)
    out = attention.new_empty(tokens, shape.qkv)
    with torch.cuda.device(device):
        if plan is None:
            plan = choose_plan(shape, tokens, device)
        kernel = _kernel(plan, shape, attention.dtype == torch.bfloat16, device)
        activated, arrived = _workspace.tensors(device, tokens * intermediate, 1)
        written = (activated, hidden, out, arrived)
        params = params_of(attention, residual, weights, norm, next_norm, bias, epsilon, next_epsilon, *written)
        nvrtc.launch(kernel, params)
    return out, hidden


@cache
def _kernel(plan: Plan, shape: Shape, bf16: bool, device: int) -> nvrtc.Kernel:
    properties = device_properties(device)
    if properties.capability < MIN_CAPABILITY:
        raise RuntimeError(supported(Shape(CHUNK, CHUNK, CHUNK, ROWS), CHUNK, torch.bfloat16, properties.capability))
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("Run draft_layer once with these shapes before capturing it in a CUDA graph.")
    shared = plan.shared_bytes(shape)
    kernel = nvrtc.load(
        SOURCE,
        plan.macros(bf16),
        device,
        grid=(plan.blocks, 1),
        threads=plan.threads,
        shared_bytes=shared,
        overlap=plan.overlap,
    )
    # CTAs wait for each other, so all of them must fit on the GPU together.
    each = nvrtc.call("cuOccupancyMaxActiveBlocksPerMultiprocessor", kernel.function, plan.threads, shared)
    if each * properties.num_multiprocessors < plan.blocks:
        raise RuntimeError(
            f"draft_layer: {properties.name} holds {each} CTAs of {plan.threads} threads and {shared} bytes of shared "
            f"memory per multiprocessor; the launch needs {plan.blocks} CTAs together."
        )
    return kernel


# silu(gate) * up, and the counter by which CTAs wait for each other. (16-bit integers stand for the activations' dtype.)
_workspace = Workspace("draft_layer", (torch.int16, 1 << 17), (torch.int32, 32))
