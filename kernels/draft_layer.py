"""What a decoder layer of the draft computes between two attentions, in one launch.

``o`` -> add residual, RMSNorm -> ``gate_up`` -> silu(gate) * up -> ``down`` -> add residual, RMSNorm -> the next layer's
``qkv``, with INT4 weights in groups of 128: as `int4_linear` packs them, for 1 to 4 tokens, or in the order of vLLM's Marlin
kernel (`marlin_linear`), for 1 or 2. The ideas are in ``draft_layer.cu``; on the CPU the operator,
``torch.ops.vllm_quantspec.draft_layer``, is plain PyTorch (`reference`).
"""

import ctypes
from enum import Enum
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from vllm_quantspec.kernels import marlin_linear, nvrtc
from vllm_quantspec.kernels.device import Device, device_properties
from vllm_quantspec.kernels.int4_linear import CHUNK, MAGIC, ROWS, dequantize
from vllm_quantspec.kernels.marlin_linear import STRIP, MarlinWeight
from vllm_quantspec.kernels.workspace import Workspace

SOURCE = Path(__file__).with_suffix(".cu")
MAX_TOKENS = 4
# Bulk copies, and launches that begin under the end of the one before.
MIN_CAPABILITY = (9, 0)
UNIT = 1024 + 64  # bytes of a row tile's chunk: codes, then scales and zero points
LINEARS = "o", "gate_up", "down", "qkv"
# Pieces of 8 channels in a thread's registers, and bytes of weights that a CTA asks for at a time.
MAX_PIECES, FLIGHT_BYTES = 8, 52 << 10


class Order(Enum):
    """Of weights: as `int4_linear` packs them, or a `MarlinWeight`'s, around 8 or with zero points."""

    PACKED = "packed"
    MARLIN = "marlin"
    MARLIN_ZEROS = "marlin_zeros"

    @property
    def is_marlin(self) -> bool:
        return self is not Order.PACKED

    @property
    def has_zeros(self) -> bool:
        return self is Order.MARLIN_ZEROS

    @property
    def max_tokens(self) -> int:
        return 2 if self.is_marlin else MAX_TOKENS


class Shape(NamedTuple):
    """Sizes of a layer: channels of the attention's output, of the residual, rows of gate (as many as of up), and of qkv."""

    attention: int
    hidden: int
    intermediate: int
    qkv: int


def supported(
    shape: Shape,
    group_size: int,
    dtype: torch.dtype,
    capability: tuple[int, int] | None = None,
    bits: int = 4,
    order: Order = Order.PACKED,
) -> str | None:
    """Why the kernel does not take such layers, or None if it does. ``capability`` is the GPU's; None stands for the CPU."""
    if dtype not in MAGIC:
        return f"draft_layer takes bfloat16 or float16 activations, not {dtype}."
    if group_size != CHUNK or bits != 4:
        return f"draft_layer takes weights of 4 bits in groups of {CHUNK}, not {bits} bits in groups of {group_size}."
    units = CHUNK, CHUNK, CHUNK, STRIP if order.is_marlin else ROWS
    for name, size, unit in zip(Shape._fields, shape, units, strict=True):
        if size <= 0 or size % unit:
            return f"{size} ({name}) is not divisible by {unit}."
    if order.is_marlin and CHUNK in shape[:3]:
        return f"A linear of {CHUNK} channels has one group, whose scales Marlin keeps in another order."
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
        weights: codes and scales_zeros of the `PackedLinear` of o, gate_up, down and qkv, in this order. Or codes, scales
            and, unless all are None, zeros of the `MarlinWeight` of each, for M of 1 or 2.
        norm, next_norm: [hidden], weights of the RMSNorm before gate_up and of the one before qkv.
        bias: of qkv, with a `MarlinWeight` in Marlin's order (`marlin_linear.single_order`), or None.

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
    order, _ = _check(attention, residual, weights, norm, next_norm, bias)
    dtype = attention.dtype
    if order.is_marlin:
        o, gate_up, down, qkv = map(marlin_linear.dequantize, _marlin_weights(weights))
        bias = None if bias is None else marlin_linear.single_order_undone(bias)
    else:
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


def _order_of(weights: list[torch.Tensor]) -> Order:
    if weights and weights[0].dim() == 2:
        return Order.MARLIN_ZEROS if len(weights) == 12 else Order.MARLIN
    return Order.PACKED


def _marlin_weights(weights: list[torch.Tensor]) -> list[MarlinWeight]:
    step = len(weights) // 4
    return [MarlinWeight(*weights[i : i + 2], weights[i + 2] if step == 3 else None) for i in range(0, 4 * step, step)]


def _sizes_of(weights: list[torch.Tensor], order: Order) -> list[tuple[int, int]]:
    """(in, out) of each linear."""
    if order.is_marlin:
        return [(w.in_features, w.out_features) for w in _marlin_weights(weights)]
    return [(codes.shape[1] * CHUNK, codes.shape[0] * ROWS) for codes in weights[::2]]


def _shape_of(weights: list[torch.Tensor], order: Order) -> Shape:
    (attention, hidden), _, (intermediate, _), (_, qkv) = _sizes_of(weights, order)
    return Shape(attention, hidden, intermediate, qkv)


def _check(attention, residual, weights, norm, next_norm, bias) -> tuple[Order, Shape]:
    if attention.dim() != 2 or attention.dtype not in MAGIC:
        raise ValueError(f"attention must be bfloat16 or float16 [M, in], got {attention.dtype} {list(attention.shape)}.")
    order = _order_of(weights)
    if not 1 <= len(attention) <= order.max_tokens:
        of = " with weights in Marlin's order" if order.is_marlin else ""
        raise ValueError(f"draft_layer takes 1 to {order.max_tokens} tokens{of}, not {len(attention)}.")
    if order.is_marlin:
        _check_marlin(weights, attention.dtype)
    else:
        _check_packed(weights, attention.dtype)
    dtype, sizes = attention.dtype, _sizes_of(weights, order)
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
    return order, Shape(inputs, hidden, twice // 2, qkv)


def _check_packed(weights: list[torch.Tensor], dtype: torch.dtype) -> None:
    if len(weights) != 8:
        raise ValueError(f"weights must be codes and scales_zeros of o, gate_up, down and qkv, got {len(weights)} tensors.")
    for name, codes, scales in zip(LINEARS, weights[::2], weights[1::2], strict=True):
        if codes.dim() != 3 or codes.shape[2] != 1024 or scales.shape != (*codes.shape[:2], 1, 8, 2, 2):
            raise ValueError(
                f"codes {list(codes.shape)} and scales_zeros {list(scales.shape)} of {name} are not those of a PackedLinear "
                f"of 4 bits in groups of {CHUNK}."
            )
        if scales.dtype != dtype:
            raise ValueError(f"attention is {dtype} but {name} was packed for {scales.dtype}.")
        if not codes.is_contiguous() or not scales.is_contiguous() or (codes.data_ptr() | scales.data_ptr()) % 16:
            raise ValueError(f"codes and scales_zeros of {name} must be contiguous and begin at multiples of 16 bytes.")


def _check_marlin(weights: list[torch.Tensor], dtype: torch.dtype) -> None:
    if len(weights) not in (8, 12):
        raise ValueError(
            f"weights must be codes, scales and perhaps zeros of o, gate_up, down and qkv, got {len(weights)} tensors."
        )
    for name, (codes, scales, zeros) in zip(LINEARS, _marlin_weights(weights), strict=True):
        shapes = [None if t is None else list(t.shape) for t in (codes, scales, zeros)]
        fits = codes.dim() == scales.dim() == 2 and codes.dtype == torch.int32 and scales.shape[1] % STRIP == 0
        groups = (codes.shape[0] * 16 // CHUNK, codes.shape[1] // 2)
        fits = fits and scales.shape == groups and codes.shape[0] % (CHUNK // 16) == 0 and codes.shape[1] % 2 == 0
        fits = fits and groups[0] > 1  # of one group scales are in another order
        if not fits or (zeros is not None and (zeros.dtype, zeros.shape) != (torch.int32, (groups[0], groups[1] // 8))):
            raise ValueError(
                f"codes, scales and zeros {shapes} of {name} are not those of a MarlinWeight in two or more "
                f"groups of {CHUNK}."
            )
        if scales.dtype != dtype:
            raise ValueError(f"attention is {dtype} but the scales of {name} are {scales.dtype}.")
        if any(not t.is_contiguous() or t.data_ptr() % 16 for t in (codes, scales, zeros) if t is not None):
            raise ValueError(f"codes, scales and zeros of {name} must be contiguous and begin at multiples of 16 bytes.")


def _cuda(attention, residual, weights, norm, next_norm, bias, epsilon, next_epsilon):
    _check(attention, residual, weights, norm, next_norm, bias)
    return launch(attention, residual, weights, norm, next_norm, bias, epsilon, next_epsilon)


def _fake(attention, residual, weights, norm, next_norm, bias, epsilon, next_epsilon):
    # Not len(): the number of rows is a symbol here, and must not become a number.
    out = attention.new_empty(attention.shape[0], _shape_of(weights, _order_of(weights)).qkv)
    return out, torch.empty_like(residual, memory_format=torch.contiguous_format)


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
    order: Order = Order.PACKED

    @property
    def threads(self) -> int:
        return 32 * (self.warps + 1)

    def shared_bytes(self, shape: Shape) -> int:
        """Dynamic shared memory: the ring, squares, and what the largest phase needs for inputs and sums."""
        tiles = self.hidden_tiles, 2 * self.pairs, self.hidden_tiles, self.qkv_tiles
        inputs = shape.attention, shape.hidden, shape.intermediate, shape.hidden
        per_chunk = self.tokens * 272 + 32 * self.order.is_marlin
        rest = max(n // CHUNK * per_chunk + 64 * self.tokens * self.warps * t for n, t in zip(inputs, tiles, strict=True))
        return self.stages * self.stage_bytes + _in_128(shape.hidden // CHUNK * self.tokens * 4) + rest

    @property
    def stage_bytes(self) -> int:
        """Of a row tile's chunks, one for each warp: codes, scales and zero points."""
        if not self.order.is_marlin:
            return self.warps * UNIT
        return self.warps * 1024 + _in_128(self.warps * 32) + self.order.has_zeros * _in_128(self.warps * 16)

    @property
    def static_bytes(self) -> int:
        return 16 * self.stages

    def macros(self, bf16: bool) -> dict[str, int]:
        """What the kernel's source is compiled with."""
        return {"IS_BF16": int(bf16)} | {
            name.upper(): getattr(self, name) for name in self._fields if name not in ("blocks", "overlap", "order")
        } | {"MARLIN": int(self.order.is_marlin), "HAS_ZEROS": int(self.order.has_zeros)}


def _in_128(num_bytes: int) -> int:
    return -(-num_bytes // 128) * 128


@cache
def choose_plan(shape: Shape, tokens: int, device: int, order: Order = Order.PACKED) -> Plan:
    """The launch for layers of such sizes.

    Raises:
        RuntimeError: the GPU's shared memory cannot hold it.
    """
    return plan_of(shape, tokens, device_properties(device), order=order)


def plan_of(
    shape: Shape,
    tokens: int,
    gpu: Device,
    warps: int | None = None,
    pairs: int | None = None,
    min_ctas: int = 1,
    order: Order = Order.PACKED,
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
    fitting = 2 if tokens > 2 else 10 if warps < 16 else 7 if tokens == 1 or order.is_marlin else 4
    pairs = min(pairs or fitting, most)
    tiles = per_pass(hidden, min(3, most)), per_pass(gate, pairs), per_pass(qkv, min(4, most))
    flight = max(2, round(FLIGHT_BYTES / (warps * UNIT)))
    plan = Plan(warps, 0, flight, tokens, *tiles, pieces, blocks, min_ctas, order=order)
    stages = (whole - plan.shared_bytes(shape)) // (plan.stage_bytes + 16)
    if stages < 2 or pieces > MAX_PIECES:
        raise RuntimeError(
            f"draft_layer: {gpu.name} cannot hold a launch for {tokens} tokens of {shape} "
            f"({gpu.shared_memory_per_block} bytes of shared memory per block)."
        )
    stages = min(stages, 32)
    return plan._replace(stages=stages, flight=min(flight, stages))


class _Packed(ctypes.Structure):
    _fields_ = [("codes", ctypes.c_void_p), ("scales", ctypes.c_void_p), ("tiles", ctypes.c_int), ("chunks", ctypes.c_int)]


class _Marlin(ctypes.Structure):
    # Tensor maps are aligned to 64 bytes, and so is what has some.
    _fields_ = [(name, nvrtc.TensorMap) for name in ("codes", "scales", "zeros")] + [
        ("tiles", ctypes.c_int),
        ("chunks", ctypes.c_int),
        ("_unused", ctypes.c_byte * 56),
    ]


_REST = (
    [
        (name, ctypes.c_void_p)
        for name in ("attention", "residual", "norm", "next_norm", "bias", "activated", "hidden", "out", "arrived")
    ]
    + [(name, ctypes.c_int64) for name in ("attention_stride", "residual_stride")]
    + [(name, ctypes.c_float) for name in ("epsilon", "next_epsilon")]
)


class _Params(ctypes.Structure):
    _fields_ = [(name, _Packed) for name in LINEARS] + _REST


class _MarlinParams(ctypes.Structure):
    _fields_ = [(name, _Marlin) for name in LINEARS] + _REST + [("_unused", ctypes.c_byte * 32)]


def params_of(
    attention, residual, weights, norm, next_norm, bias, epsilon, next_epsilon, activated, hidden, out, arrived, warps
):
    """The kernel's argument, for so many warps that multiply; the four before are written."""
    if _order_of(weights).is_marlin:
        kind, linears = _MarlinParams, [_marlin_linear(w, warps) for w in _marlin_weights(weights)]
    else:
        pairs = zip(weights[::2], weights[1::2], strict=True)
        kind, linears = _Params, [_Packed(c.data_ptr(), s.data_ptr(), *c.shape[:2]) for c, s in pairs]
    return kind(
        *linears,
        *(t.data_ptr() for t in (attention, residual, norm, next_norm)),
        0 if bias is None else bias.data_ptr(),
        *(t.data_ptr() for t in (activated, hidden, out, arrived)),
        *(attention.stride(0), residual.stride(0), epsilon, next_epsilon),
    )


def _marlin_linear(weight: MarlinWeight, warps: int) -> _Marlin:
    """Boxes are what a stage has of a row tile: elements of a row, and rows of ``warps`` chunks."""
    boxes = (32, 8 * warps), (ROWS, warps), (4, warps)
    maps = [
        nvrtc.TensorMap() if t is None else nvrtc.tensor_map(t.data_ptr(), *t.shape, t.element_size(), *box)
        for t, box in zip(weight, boxes, strict=True)
    ]
    return _Marlin(*maps, weight.out_features // ROWS, weight.in_features // CHUNK)


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
    attention = nvrtc.aligned_rows(attention)
    if residual.stride(1) != 1:
        residual = residual.contiguous()
    device, tokens, order = attention.device.index, len(attention), _order_of(weights)
    shape = _shape_of(weights, order)
    hidden = torch.empty(tokens, shape.hidden, dtype=attention.dtype, device=attention.device)
    out = attention.new_empty(tokens, shape.qkv)
    with torch.cuda.device(device):
        if plan is None:
            plan = choose_plan(shape, tokens, device, order)
        kernel = _kernel(plan, shape, attention.dtype == torch.bfloat16, device)
        activated, arrived = _workspace.tensors(device, tokens * shape.intermediate, 1)
        written = (activated, hidden, out, arrived)
        given = (attention, residual, weights, norm, next_norm, bias, epsilon, next_epsilon)
        nvrtc.launch(kernel, params_of(*given, *written, plan.warps))
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
