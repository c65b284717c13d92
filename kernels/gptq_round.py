"""GPTQ's innermost loop, a group of channels one after another: a Triton kernel for a GPU, plain PyTorch elsewhere.

Rows of a weight know nothing of each other, so a program takes some of them and keeps them in registers. In PyTorch each
channel is some ten launches, and an 8B model has nearly a million channels.
"""

import torch

from vllm_quantspec import levels
from vllm_quantspec.kernels.launch import check_device, jit, tl

# Rows of a program.
ROWS = 16


def round_group(
    x: torch.Tensor, feedback: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int = 4
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round the channels of a group in turn, each error taken from those that are still to come.

    Args:
        x: float32 [rows, G], G a power of two; rows may be strided. It stays as it is.
        feedback: float32 [G, G], the group's part of the upper Cholesky factor; rows may be strided.
        scale, zero: float32 [rows, 1]; zero is a level.
        bits: 4 or 8, see `vllm_quantspec.levels`.

    Returns:
        Levels (in 4 bits the codes, 0..15) and the errors divided by the diagonal of ``feedback``, both float32 [rows, G].

    Raises:
        ValueError: not on a GPU, or a shape or dtype that does not fit the above.
        RuntimeError: Triton is not installed.
    """
    rows, size = x.shape
    check_device(x)
    tensors, shapes = (x, feedback, scale, zero), (x.shape, (size, size), (rows, 1), (rows, 1))
    if any(t.dtype != torch.float32 or t.shape != s for t, s in zip(tensors, shapes, strict=True)):
        raise ValueError(f"round_group: x is {x.dtype} {list(x.shape)}, which the other arguments do not fit.")
    if size & (size - 1) or x.stride(1) != 1 or feedback.stride(1) != 1:
        raise ValueError(f"round_group: {size} channels are no power of two, or a row is not contiguous.")
    rounded, errors = (torch.empty(rows, size, dtype=torch.float32, device=x.device) for _ in range(2))
    if rows:
        scale, zero = scale.contiguous(), zero.contiguous()
        grid = (-(-rows // ROWS),)
        strides = x.stride(0), feedback.stride(0)
        _round_group[grid](
            *(x, feedback, scale, zero, rounded, errors, rows, *strides),
            **{"G": size, "R": ROWS, "BITS": bits, "ROUNDER": levels.ROUNDER, "num_warps": 4},
        )
    return rounded, errors


def reference(
    x: torch.Tensor, feedback: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int = 4
) -> tuple[torch.Tensor, torch.Tensor]:
    """`round_group` in plain PyTorch, on any device."""
    x, rounded, errors = x.clone(), torch.empty_like(x), torch.empty_like(x)
    for i in range(x.shape[1]):
        column = x[:, i : i + 1]
        if bits == 4:
            level = levels.round_whole(column / scale).add_(zero).clamp_(0, 15)
        else:
            level = levels.nearest(column / scale + zero, bits)
        error = (column - (level - zero) * scale) / feedback[i, i]
        x[:, i + 1 :].addmm_(error, feedback[i : i + 1, i + 1 :], alpha=-1)
        rounded[:, i : i + 1], errors[:, i : i + 1] = level, error
    return rounded, errors


@jit(do_not_specialize=["rows"])
def _round_group(
    x,
    feedback,
    scale,
    zero,
    rounded,
    errors,
    rows,
    x_stride,
    feedback_stride,
    G: tl.constexpr,
    R: tl.constexpr,
    BITS: tl.constexpr,
    ROUNDER: tl.constexpr,
):
    row = tl.program_id(0) * R + tl.arange(0, R)
    there, channel = row < rows, tl.arange(0, G)
    at = row.to(tl.int64)[:, None]
    w = tl.load(x + at * x_stride + channel[None, :], mask=there[:, None], other=0.0)
    s, z = tl.load(scale + row, mask=there, other=1.0), tl.load(zero + row, mask=there, other=0.0)
    all_levels, all_errors = tl.zeros([R, G], tl.float32), tl.zeros([R, G], tl.float32)
    for i in range(G):
        here = channel == i
        spread = tl.load(feedback + i * feedback_stride + channel)
        column = tl.sum(tl.where(here[None, :], w, 0.0), 1)
        if BITS == 4:
            level = tl.div_rn(column, s) + ROUNDER - ROUNDER + z
            level = tl.minimum(tl.maximum(level, 0.0), 15.0)
        else:  # levels.nearest: steps of 2 from 256 on
            level = tl.div_rn(column, s) + z
            step = tl.where(level >= 256.0, 2.0, 1.0)
            level = (level / step + ROUNDER - ROUNDER) * step
            level = tl.minimum(tl.maximum(level, 128.0), 510.0)
        error = (column - (level - z) * s) / tl.sum(tl.where(here, spread, 0.0), 0)
        w -= tl.where(channel > i, spread, 0.0)[None, :] * error[:, None]
        all_levels = tl.where(here[None, :], level[:, None], all_levels)
        all_errors = tl.where(here[None, :], error[:, None], all_errors)
    to = at * G + channel[None, :]
    tl.store(rounded + to, all_levels, mask=there[:, None])
    tl.store(errors + to, all_errors, mask=there[:, None])
