"""The search for each group's scale and zero point in 4 bits: a Triton kernel for a GPU, plain PyTorch elsewhere.

A group knows nothing of another, so a program takes some and keeps them in registers. In PyTorch a search is some 210
launches; GPTQ searches one group of channels after another, thousands of times for an 8B model.
"""

import torch

from vllm_quantspec import levels
from vllm_quantspec.kernels.launch import check_device, jit, tl

# Ranges that are tried: the full one, and each by so much of it narrower. Below 0.76 clipping never won on real weights.
NARROWER, TRIES = 0.04, 7
MAX_CODE = 15
# Elements of a program, which are in registers, and how many groups it has at most.
_ELEMENTS, _MOST_GROUPS = 2048, 64


def stored(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``scale`` rounded to ``dtype``, in float32 and never zero (a zero scale would make the codes undefined)."""
    return scale.to(dtype).clamp_min(torch.finfo(dtype).tiny).float()


def search_range(
    x: torch.Tensor, importance: torch.Tensor | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale and zero point of least error of each group, among clipped ranges and their least-squares scales.

    Args:
        x: float32 [n, G], G a power of two; rows may be strided. It stays as it is.
        importance: float32 [G], by which a channel's squared error counts; None: all alike.
        dtype: of the scales as they are kept: bfloat16, float16 or float32.

    Returns:
        Scales, representable in ``dtype``, and zero points (codes, 0..15), both float32 [n, 1].

    Raises:
        ValueError: not on a GPU, or a shape or dtype that does not fit the above.
        RuntimeError: Triton is not installed.
    """
    check_device(x)
    n, size = x.shape
    if x.dtype != torch.float32 or size & (size - 1) or x.stride(1) != 1:
        raise ValueError(f"search_range: x is {x.dtype} {list(x.shape)}, not float32 in contiguous rows of 2^n channels.")
    if importance is not None and (importance.dtype != torch.float32 or importance.shape != (size,)):
        raise ValueError(f"search_range: importance is {importance.dtype} {list(importance.shape)} for {size} channels.")
    scale, zero = (torch.empty(n, 1, dtype=torch.float32, device=x.device) for _ in range(2))
    if n:
        groups = max(1, min(_MOST_GROUPS, _ELEMENTS // size))
        types = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
        _search_range[(-(-n // groups),)](
            *(x, x if importance is None else importance.contiguous(), scale, zero, n, x.stride(0)),
            **{"G": size, "R": groups, "WEIGHED": importance is not None, "TRIES": TRIES, "NARROWER": NARROWER},
            **{"STORED": types[dtype], "TINY": torch.finfo(dtype).tiny, "ROUNDER": levels.ROUNDER, "num_warps": 4},
        )
    return scale, zero


def reference(
    x: torch.Tensor, importance: torch.Tensor | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """`search_range` in plain PyTorch, on any device; ``x`` may have more dimensions in front, and any G."""
    return narrowed(x, *full_range(x, dtype, 4), importance, dtype)


def full_range(x: torch.Tensor, dtype: torch.dtype, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and level of zero that span each group of ``x`` [..., G] in 4 or 8 bits, each [..., 1]."""
    # Zero has to be inside the range, or its level would not be one of those that there are.
    low, high = x.amin(-1, keepdim=True).clamp_max_(0), x.amax(-1, keepdim=True).clamp_min_(0)
    scale = stored((high - low) / levels.span(bits), dtype)
    return scale, levels.nearest((-low / scale).add_(levels.lowest(bits)), bits)


def narrowed(
    x: torch.Tensor,
    full_scale: torch.Tensor,
    full_zero: torch.Tensor,
    importance: torch.Tensor | None,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best of a range [..., 1] of each group of ``x`` [..., G], narrower ones, and their least-squares scales."""

    def weigh(values: torch.Tensor) -> torch.Tensor:
        return values if importance is None else values * importance

    def try_out(scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        """Keep (scale, zero) where it is better; return its integers ``code - zero``."""
        steps = levels.round_whole(x / scale)
        steps = torch.minimum(torch.maximum(steps, -zero), MAX_CODE - zero)
        difference = torch.addcmul(x, steps, scale, value=-1)
        error = weigh(difference.square_()).sum(-1, keepdim=True)
        better = error < best[0]
        best[0] = torch.where(better, error, best[0])
        best[1] = torch.where(better, scale, best[1])
        best[2] = torch.where(better, zero, best[2])
        return steps

    best = [torch.full_like(full_scale, torch.inf), full_scale, full_zero]
    low = -full_zero * full_scale
    for shrink in (1.0 - NARROWER * i for i in range(TRIES)):
        scale = full_scale if shrink == 1.0 else stored(full_scale * shrink, dtype)
        zero = full_zero if shrink == 1.0 else levels.round_whole(-low * shrink / scale).clamp_(0, MAX_CODE)
        steps = try_out(scale, zero)
        weighted = weigh(steps)
        norm = (weighted * steps).sum(-1, keepdim=True)
        fitted = (weighted * x).sum(-1, keepdim=True) / norm.clamp_min(1e-20)
        usable = (norm > 0) & (fitted > 0)
        try_out(stored(torch.where(usable, fitted, scale), dtype), zero)
    return best[1], best[2]


@jit
def _stored(scale, STORED: tl.constexpr, TINY: tl.constexpr):
    if STORED is tl.bfloat16:  # by hand, to the nearest and halves to even: Triton's interpreter cuts off
        bits = scale.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return tl.maximum(bits.to(tl.float32, bitcast=True), TINY)
    return tl.maximum(scale.to(STORED).to(tl.float32), TINY)


@jit
def _whole(x, ROUNDER: tl.constexpr):
    return x + ROUNDER - ROUNDER


@jit
def _steps(x, scale, zero, ROUNDER: tl.constexpr):
    """The integers ``code - zero`` of x [R, G]."""
    steps = _whole(tl.div_rn(x, scale[:, None] + tl.zeros_like(x)), ROUNDER)
    return tl.minimum(tl.maximum(steps, -zero[:, None]), 15.0 - zero[:, None])


@jit(do_not_specialize=["n"])
def _search_range(
    x,
    importance,
    scales,
    zeros,
    n,
    x_stride,
    G: tl.constexpr,
    R: tl.constexpr,
    WEIGHED: tl.constexpr,
    TRIES: tl.constexpr,
    NARROWER: tl.constexpr,
    STORED: tl.constexpr,
    TINY: tl.constexpr,
    ROUNDER: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    there, channel = row < n, tl.arange(0, G)
    w = tl.load(x + row[:, None] * x_stride + channel[None, :], mask=there[:, None], other=0.0)
    weight = tl.load(importance + channel)[None, :] if WEIGHED else 1.0
    low, high = tl.minimum(tl.min(w, 1), 0.0), tl.maximum(tl.max(w, 1), 0.0)
    full_scale = _stored(tl.div_rn(high - low, tl.full([R], 15.0, tl.float32)), STORED, TINY)
    full_zero = tl.minimum(tl.maximum(_whole(tl.div_rn(-low, full_scale), ROUNDER), 0.0), 15.0)
    best_error = tl.full([R], float("inf"), tl.float32)
    best_scale, best_zero, span = full_scale, full_zero, full_zero * full_scale
    for i in tl.static_range(TRIES):
        shrink = 1.0 - NARROWER * i
        scale = _stored(full_scale * shrink, STORED, TINY)
        zero = tl.minimum(tl.maximum(_whole(tl.div_rn(span * shrink, scale), ROUNDER), 0.0), 15.0)
        steps = _steps(w, scale, zero, ROUNDER)
        difference = w - steps * scale[:, None]
        error = tl.sum(difference * difference * weight, 1)
        better = error < best_error
        best_error = tl.where(better, error, best_error)
        best_scale, best_zero = tl.where(better, scale, best_scale), tl.where(better, zero, best_zero)
        norm, fitted = tl.sum(steps * steps * weight, 1), tl.sum(steps * w * weight, 1)
        fitted = tl.div_rn(fitted, tl.maximum(norm, 1e-20))
        scale = _stored(tl.where((norm > 0) & (fitted > 0), fitted, scale), STORED, TINY)
        steps = _steps(w, scale, zero, ROUNDER)
        difference = w - steps * scale[:, None]
        error = tl.sum(difference * difference * weight, 1)
        better = error < best_error
        best_error = tl.where(better, error, best_error)
        best_scale, best_zero = tl.where(better, scale, best_scale), tl.where(better, zero, best_zero)
    tl.store(scales + row, best_scale, mask=there)
    tl.store(zeros + row, best_zero, mask=there)
