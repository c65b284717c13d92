"""Linears of a decoder layer together with what lies in front of them, in 4 or 8 bits, for a few tokens.

`normalized_linear` is the residual's sum, RMSNorm and a linear; `activated_linear` is ``silu(gate) * up`` and a linear. On a
GPU a small kernel (``linear_inputs.cu``) computes the linear's inputs, in the form that the linear's kernel reads, and lets
that one begin to read its weight meanwhile; on the CPU the operators are plain PyTorch. The weights are `int4_linear`'s.
"""

import ctypes
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F

from vllm_quantspec.kernels import int4_linear, nvrtc
from vllm_quantspec.kernels.int4_linear import CHUNK, ROWS
from vllm_quantspec.kernels.int4_linear_fp8 import INPUT_THREADS, Fp8Plan

SOURCE = Path(__file__).with_name("linear_inputs.cu")
# Pieces of 8 channels in a thread's registers.
MAX_PIECES = 8


def supported(in_features: int) -> str | None:
    """Why the kernels do not take a linear with so many inputs, or None if they do."""
    if in_features <= 0 or in_features % CHUNK:
        return f"{in_features} input channels are not divisible by {CHUNK}."
    if pieces_of(in_features) > MAX_PIECES:
        return f"{in_features} input channels are more than {MAX_PIECES * 8 * INPUT_THREADS}."
    return None


def pieces_of(channels: int) -> int:
    """Pieces of 8 channels that a thread has."""
    return -(-channels // (8 * INPUT_THREADS))


# --- The operators ----------------------------------------------------------------------------------------------------


def normalized_linear(
    x: torch.Tensor,
    residual: torch.Tensor,
    norm: torch.Tensor,
    epsilon: float,
    codes: torch.Tensor,
    scales_zeros: torch.Tensor,
    bias: torch.Tensor | None = None,
    original: torch.Tensor | None = None,
    fp8_inputs: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``RMSNorm(x + residual) W^T + bias``, and ``x + residual``.

    Args:
        x, residual: [M, in], bfloat16 or float16; rows may be strided, by multiples of 8.
        norm: [in], weight of the RMSNorm, which a launch starts to read early, as the linear's. epsilon: what it adds to the
            mean square.
        codes, scales_zeros, bias, fp8_inputs: as of `int4_linear`; what that says of launches holds here.
        original: the weight in 16 bits, [out, in], which serves from as many tokens on as it is the faster one; or None.

    Returns:
        [M, out], [M, in].

    Raises:
        ValueError: an argument does not fit the above.
    """
    return torch.ops.vllm_quantspec.normalized_linear(
        x, residual, norm, epsilon, codes, scales_zeros, bias, original, fp8_inputs
    )


def activated_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales_zeros: torch.Tensor,
    original: torch.Tensor | None = None,
    fp8_inputs: bool = False,
) -> torch.Tensor:
    """``(silu(gate) * up) W^T`` of x = [gate, up], [M, 2 * in]; the rest as of `normalized_linear`. Returns [M, out]."""
    return torch.ops.vllm_quantspec.activated_linear(x, codes, scales_zeros, original, fp8_inputs)


def normalized(
    x: torch.Tensor, residual: torch.Tensor, norm: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The inputs of `normalized_linear`'s linear, and the sum, in plain PyTorch: rounded where the kernel rounds."""
    total = (x.float() + residual.float()).to(x.dtype)
    wide = total.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon) * norm.float()).to(x.dtype), total


def activated(x: torch.Tensor) -> torch.Tensor:
    """The inputs of `activated_linear`'s linear, in plain PyTorch."""
    gate, up = x.float().chunk(2, dim=-1)
    return (F.silu(gate) * up).to(x.dtype)


def _check(x, times: int, codes, scales_zeros, bias=None) -> None:
    """Of x [M, ``times`` * in] and the weight."""
    channels = codes.shape[1] * CHUNK if codes.dim() == 3 else 0
    if x.dim() != 2 or x.shape[1] != times * channels:
        raise ValueError(f"x is {list(x.shape)}, but the weight has {channels} channels.")
    if (reason := supported(channels)) is not None:
        raise ValueError(reason)
    int4_linear.check(x[:, :channels], codes, scales_zeros, bias)


def _check_sum(x, residual, norm) -> None:
    if residual.shape != x.shape or norm.shape != x.shape[1:] or not residual.dtype == norm.dtype == x.dtype:
        raise ValueError(
            f"x is {x.dtype} {list(x.shape)}, which a residual of {residual.dtype} {list(residual.shape)} and a norm of "
            f"{norm.dtype} {list(norm.shape)} do not fit."
        )


def _normalized_cpu(x, residual, norm, epsilon, codes, scales_zeros, bias=None, original=None, fp8_inputs=False):
    _check(x, 1, codes, scales_zeros, bias)
    _check_sum(x, residual, norm)
    inputs, total = normalized(x, residual, norm, epsilon)
    return int4_linear.faster_linear(inputs, codes, scales_zeros, bias, original, fp8_inputs=fp8_inputs), total


def _activated_cpu(x, codes, scales_zeros, original=None, fp8_inputs=False):
    _check(x, 2, codes, scales_zeros)
    return int4_linear.faster_linear(activated(x), codes, scales_zeros, None, original, fp8_inputs=fp8_inputs)


def _normalized_cuda(x, residual, norm, epsilon, codes, scales_zeros, bias=None, original=None, fp8_inputs=False):
    _check(x, 1, codes, scales_zeros, bias)
    _check_sum(x, residual, norm)
    if norm.data_ptr() % 16 or not norm.is_contiguous():  # a copy would be read before it is written
        raise ValueError("norm must be contiguous and begin at a multiple of 16 bytes.")
    total, residual = x.new_empty(x.shape), nvrtc.aligned_rows(residual)
    params = _Params(
        residual=residual.data_ptr(),
        norm=norm.data_ptr(),
        sum=total.data_ptr(),
        residual_stride=residual.stride(0),
        epsilon=epsilon,
    )
    return _launch(x, params, False, codes, scales_zeros, bias, original, fp8_inputs), total


def _activated_cuda(x, codes, scales_zeros, original=None, fp8_inputs=False):
    _check(x, 2, codes, scales_zeros)
    return _launch(x, _Params(), True, codes, scales_zeros, None, original, fp8_inputs)


def _normalized_fake(x, residual, norm, epsilon, codes, scales_zeros, bias=None, original=None, fp8_inputs=False):
    return x.new_empty(x.shape[0], codes.shape[0] * ROWS), x.new_empty(x.shape)


def _activated_fake(x, codes, scales_zeros, original=None, fp8_inputs=False):
    return x.new_empty(x.shape[0], codes.shape[0] * ROWS)


_library = torch.library.Library("vllm_quantspec", "FRAGMENT")
_library.define(
    "normalized_linear(Tensor x, Tensor residual, Tensor norm, float epsilon, Tensor codes, Tensor scales_zeros, "
    "Tensor? bias=None, Tensor? original=None, bool fp8_inputs=False) -> (Tensor, Tensor)"
)
_library.define(
    "activated_linear(Tensor x, Tensor codes, Tensor scales_zeros, Tensor? original=None, bool fp8_inputs=False) -> Tensor"
)
for _name, _functions in {
    "normalized_linear": (_normalized_cpu, _normalized_cuda, _normalized_fake),
    "activated_linear": (_activated_cpu, _activated_cuda, _activated_fake),
}.items():
    _library.impl(_name, _functions[0], "CPU")
    _library.impl(_name, _functions[1], "CUDA")
    torch.library.register_fake(f"vllm_quantspec::{_name}", _functions[2], lib=_library)


# --- Launching --------------------------------------------------------------------------------------------------------


class _Params(ctypes.Structure):
    """``Inputs`` of ``linear_inputs.cu``."""

    _fields_ = (
        ("p", int4_linear.Params),
        ("residual", ctypes.c_void_p),
        ("norm", ctypes.c_void_p),
        ("sum", ctypes.c_void_p),
        ("residual_stride", ctypes.c_int64),
        ("epsilon", ctypes.c_float),
    )


def _launch(x, params: _Params, is_activated: bool, codes, scales_zeros, bias, original, fp8_inputs) -> torch.Tensor:
    x, tokens, chunks = nvrtc.aligned_rows(x), len(x), codes.shape[1]
    out = x.new_empty(tokens, codes.shape[0] * ROWS)
    if not tokens:
        return out
    bf16, device, channels = x.dtype == torch.bfloat16, x.device.index, chunks * CHUNK
    takes_original = int4_linear.is_original_faster(tokens, codes, original)
    if not takes_original:
        groups, bits = scales_zeros.shape[2], codes.shape[2] // 256
        plan = int4_linear.choose_plan(codes.shape[0], chunks, groups, tokens, device, bits, bf16, fp8_inputs)
        if isinstance(plan, Fp8Plan) and plan.ready:
            convert = partial(_convert, params, is_activated, CHUNK // groups, bf16, device)
            return int4_linear.launch(x, codes, scales_zeros, bias, out, plan, convert=convert)
    inputs = x.new_empty(tokens, channels)
    params.p = int4_linear.Params(
        x=x.data_ptr(), out=inputs.data_ptr(), x_stride=x.stride(0), tokens=tokens, channels=channels, chunks=chunks
    )
    with torch.cuda.device(device):
        nvrtc.launch(_kernel(is_activated, pieces_of(channels), bf16, device), params, grid_x=tokens)
    if takes_original:
        return F.linear(inputs, original, bias)
    return int4_linear.launch(inputs, codes, scales_zeros, bias, out, plan)


def _convert(
    params: _Params,
    is_activated: bool,
    group_size: int,
    bf16: bool,
    device: int,
    linear: int4_linear.Params,
    plan: Fp8Plan,
    token_blocks: int,
) -> None:
    """An `int4_linear.Convert`: inputs for FP8 products."""
    params.p = linear
    macros = tuple(plan.input_macros(group_size, bf16).items())
    kernel = _kernel(is_activated, pieces_of(linear.channels), bf16, device, macros, plan.overlap)
    nvrtc.launch(kernel, params, token_blocks, plan.input_blocks(linear.chunks))


@cache
def _kernel(
    is_activated: bool,
    pieces: int,
    bf16: bool,
    device: int,
    fp8_macros: tuple[tuple[str, int], ...] = (),
    overlap: bool = True,
) -> nvrtc.Kernel:
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("Run fused linears once with these shapes before capturing them in a CUDA graph.")
    return nvrtc.load(SOURCE, macros_of(is_activated, pieces, bf16, fp8_macros), device, **_LAUNCH, overlap=overlap)


_LAUNCH = {"grid": (1, 1), "threads": INPUT_THREADS, "shared_bytes": 0}


def macros_of(
    is_activated: bool, pieces: int, bf16: bool, fp8_macros: tuple[tuple[str, int], ...] = ()
) -> dict[str, int]:
    """What ``linear_inputs.cu`` is compiled with; ``fp8_macros``: those of the plan, if it has FP8 products."""
    own = {"IS_BF16": int(bf16), "ROTATED": 0, "ACTIVATED": int(is_activated), "FP8": int(bool(fp8_macros))}
    return own | {"PIECES": pieces} | dict(fp8_macros)
