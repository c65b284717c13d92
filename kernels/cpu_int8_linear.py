"""Linear layers with 8-bit weights on any CPU, as loops that LLVM turns into vector instructions (Numba).

The weight is that of weights.py, ``(level(code) - level(zero)) * scale``, a byte per code. Levels are found by arithmetic,
``max(code + 128, 2 * code)`` (levels.py), and products and sums are float32, as in cpu_int4_linear.py: the result is that of
the dequantized weight, whatever the dtype of the inputs.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch

from vllm_quantspec.kernels.cpu_int4_linear import DTYPES, MANY_ROWS, MULTIPLE, CpuLinear, multiply
from vllm_quantspec.kernels.numba_jit import jit


def pack(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> CpuLinear:
    """From codes (uint8 [out, in]), scales (any float) and zero points ([out, in / group], codes as well)."""
    return CpuLinear(codes.contiguous(), scales.float().contiguous(), zeros.to(torch.uint8).contiguous())


@jit
def _level(code):
    u = np.int32(code)
    return np.float32(max(u + np.int32(128), u + u))


@cache
def _few_rows(group: int):
    """The kernel for a group size, a constant in it: LLVM knows how often the inner loop runs."""

    @jit
    def few_rows(begin, end, codes, scales, zeros, x, sums, out):
        """out [rows, out] for output channels ``4 * begin`` to ``4 * end``."""
        rows, groups = x.shape[0], scales.shape[1]
        fours = rows if rows % 4 != 1 else rows - 1
        # Four rows of x and one of the weight, whose levels are found once; the last row stands in for missing ones.
        for n in range(4 * begin, 4 * end):
            weight = codes[n]
            for m in range(0, fours, 4):
                m1, m2, m3 = min(m + 1, rows - 1), min(m + 2, rows - 1), min(m + 3, rows - 1)
                x0, x1, x2, x3 = x[m], x[m1], x[m2], x[m3]
                t0, t1, t2, t3 = np.float32(0.0), np.float32(0.0), np.float32(0.0), np.float32(0.0)
                for g in range(groups):
                    at = g * group
                    c, y0, y1 = weight[at : at + group], x0[at : at + group], x1[at : at + group]
                    y2, y3 = x2[at : at + group], x3[at : at + group]
                    a0, a1, a2, a3 = np.float32(0.0), np.float32(0.0), np.float32(0.0), np.float32(0.0)
                    for i in range(group):
                        level = _level(c[i])
                        a0 += level * y0[i]
                        a1 += level * y1[i]
                        a2 += level * y2[i]
                        a3 += level * y3[i]
                    s, z = scales[n, g], _level(zeros[n, g])
                    t0 += s * (a0 - z * sums[m, g])
                    t1 += s * (a1 - z * sums[m1, g])
                    t2 += s * (a2 - z * sums[m2, g])
                    t3 += s * (a3 - z * sums[m3, g])
                out[m, n], out[m1, n], out[m2, n], out[m3, n] = t0, t1, t2, t3
        # A single row of x and four of the weight: four sums under way hide each other's latency.
        for n in range(4 * begin, 4 * end, 4):
            w0, w1, w2, w3 = codes[n], codes[n + 1], codes[n + 2], codes[n + 3]
            for m in range(fours, rows):
                row = x[m]
                t0, t1, t2, t3 = np.float32(0.0), np.float32(0.0), np.float32(0.0), np.float32(0.0)
                for g in range(groups):
                    at = g * group
                    c0, c1, y = w0[at : at + group], w1[at : at + group], row[at : at + group]
                    c2, c3 = w2[at : at + group], w3[at : at + group]
                    a0, a1, a2, a3 = np.float32(0.0), np.float32(0.0), np.float32(0.0), np.float32(0.0)
                    for i in range(group):
                        a0 += _level(c0[i]) * y[i]
                        a1 += _level(c1[i]) * y[i]
                        a2 += _level(c2[i]) * y[i]
                        a3 += _level(c3[i]) * y[i]
                    total = sums[m, g]
                    t0 += scales[n, g] * (a0 - _level(zeros[n, g]) * total)
                    t1 += scales[n + 1, g] * (a1 - _level(zeros[n + 1, g]) * total)
                    t2 += scales[n + 2, g] * (a2 - _level(zeros[n + 2, g]) * total)
                    t3 += scales[n + 3, g] * (a3 - _level(zeros[n + 3, g]) * total)
                out[m, n], out[m, n + 1], out[m, n + 2], out[m, n + 3] = t0, t1, t2, t3

    return few_rows


@jit
def _dequantize(begin, end, codes, scales, zeros, group, out):
    """Rows ``begin`` to ``end`` of the weight in float32: out [out, in]."""
    for n in range(begin, end):
        for g in range(scales.shape[1]):
            c, s, z = codes[n, g * group : g * group + group], scales[n, g], _level(zeros[n, g])
            written = out[n, g * group : g * group + group]
            for i in range(group):
                written[i] = (_level(c[i]) - z) * s


def cpu_int8_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    bias: torch.Tensor | None = None,
    rotated: bool = False,
) -> torch.Tensor:
    """``x @ weight.T + bias`` for any number of rows.

    Args:
        x: bfloat16, float16 or float32 [rows, in].
        codes, scales, zeros: as of `pack`.
        bias: [out], any float dtype, or None.
        rotated: the weight is that of rotated inputs: x is rotated here, in float32 (`vllm_quantspec.rotation`).

    Returns:
        [rows, out] in x's dtype, rounded once. The last bits may depend on how many rows there are.

    Raises:
        ValueError: x is of another dtype, or has another number of channels than the codes.
    """
    if x.shape[1] != codes.shape[1] or x.dtype not in DTYPES:
        raise ValueError(f"cpu_int8_linear: x is {x.dtype} {tuple(x.shape)}, the codes are {tuple(codes.shape)}.")
    group = x.shape[1] // scales.shape[1]
    return multiply(x, CpuLinear(codes, scales, zeros), bias, rotated, _few_rows(group), _dequantize)


def _fake(x, codes, scales, zeros, bias=None, rotated=False):
    return x.new_empty(x.shape[0], codes.shape[0])


# One operator, because torch.compile must not see a choice that depends on the number of rows.
_library = torch.library.Library("vllm_quantspec", "FRAGMENT")
_library.define(
    "cpu_int8_linear(Tensor x, Tensor codes, Tensor scales, Tensor zeros, Tensor? bias=None, bool rotated=False) -> Tensor"
)
_library.impl("cpu_int8_linear", cpu_int8_linear, "CPU")
torch.library.register_fake("vllm_quantspec::cpu_int8_linear", _fake, lib=_library)


@cache
def warm_up(group_size: int) -> None:
    """Compile what a group size needs (some seconds, once per installation: kept on disk) before it is needed."""
    codes, ones = torch.ones(MULTIPLE, group_size, dtype=torch.uint8), torch.ones(MULTIPLE, 1, dtype=torch.uint8)
    weight = pack(codes, ones, ones)
    for rows in (1, MANY_ROWS):
        cpu_int8_linear(torch.ones(rows, group_size), *weight)
