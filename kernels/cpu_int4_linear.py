"""INT4 linear layers on any CPU, as loops that LLVM turns into vector instructions (Numba).

The weight is that of weights.py: ``(code - zero) * scale`` in groups of input channels. A byte holds channel ``i`` of its
group in the low half and channel ``i + group / 2`` in the high half, so that both halves meet consecutive inputs. Products
and sums are float32 and the zero point is subtracted once per group, ``scale * (sum(code * x) - zero * sum(x))``: the
result is that of the dequantized weight, whatever the dtype of the inputs.

Few rows read the codes as they are; for many, parts of the weight are written out in float32 for PyTorch's product.

Numbers, and what else was tried: benchmarks/cpu_int4_linear.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
import torch

from vllm_quantspec.kernels.cpu_threads import split
from vllm_quantspec.kernels.numba_jit import jit
from vllm_quantspec.rotation import rotate_inputs

GROUP_SIZES = (32, 64, 128)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Output channels come in multiples of this, as in vLLM's kernel: the same layers run in INT4 on every CPU.
MULTIPLE = 32
# From this many rows on it is faster to write the weight out.
MANY_ROWS = 16
# Weights that are written out at a time, per thread: what stays in a core's cache.
_WRITTEN = 1 << 18
# Products below which a second thread is not worth the time to wake it.
_PRODUCTS_PER_TASK = 1 << 21


class CpuLinear(NamedTuple):
    """A weight of shape [out, in] as the kernel reads it.

    codes: uint8 [out, in / 2]; scales: float32 [out, in / group]; zeros: uint8 [out, in / group].
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor


def pack(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, group_size: int) -> CpuLinear:
    """From codes (uint8 [out, in], 0..15), scales (any float) and zero points ([out, in / group], 0..15)."""
    halves = codes.unflatten(1, (-1, 2, group_size // 2))
    packed = (halves[:, :, 0] | halves[:, :, 1] << 4).flatten(1)
    return CpuLinear(packed.contiguous(), scales.float().contiguous(), zeros.to(torch.uint8).contiguous())


def supported(in_features: int, out_features: int, group_size: int, dtype: torch.dtype) -> str | None:
    """Why the kernel does not take this shape, or None if it does."""
    if group_size not in GROUP_SIZES or in_features % group_size:
        return f"the CPU's kernel takes groups of 32, 64 or 128 that divide {in_features} channels, not {group_size}"
    if out_features % MULTIPLE:
        return f"the CPU's kernel takes multiples of {MULTIPLE} output channels, not {out_features}"
    if dtype not in DTYPES:
        return f"the CPU's kernel takes bfloat16, float16 or float32 activations, not {dtype}"
    return None


@jit
def _group_sums(x, group, out):
    """Sums of ``x`` [rows, in] over each group: out [rows, in / group]."""
    for m in range(out.shape[0]):
        for g in range(out.shape[1]):
            part = x[m, g * group : g * group + group]
            total = np.float32(0.0)
            for i in range(group):
                total += part[i]
            out[m, g] = total


@cache
def _few_rows(group: int):
    """The kernel for a group size, a constant in it: LLVM knows how often the inner loop runs."""
    half = group // 2

    @jit
    def few_rows(begin, end, codes, scales, zeros, x, sums, out):
        """out [rows, out] for output channels ``4 * begin`` to ``4 * end``."""
        rows, groups = x.shape[0], scales.shape[1]
        fours = rows if rows % 4 != 1 else rows - 1
        # Four rows of x and one of the weight: its codes are converted once. Where two or three are left, the last row
        # stands in for those that are missing: still less work than one by one.
        for n in range(4 * begin, 4 * end):
            weight = codes[n]
            for m in range(0, fours, 4):
                m1, m2, m3 = min(m + 1, rows - 1), min(m + 2, rows - 1), min(m + 3, rows - 1)
                x0, x1, x2, x3 = x[m], x[m1], x[m2], x[m3]
                t0, t1, t2, t3 = np.float32(0.0), np.float32(0.0), np.float32(0.0), np.float32(0.0)
                for g in range(groups):
                    c, at = weight[g * half : g * half + half], g * group
                    l0, h0 = x0[at : at + half], x0[at + half : at + group]
                    l1, h1 = x1[at : at + half], x1[at + half : at + group]
                    l2, h2 = x2[at : at + half], x2[at + half : at + group]
                    l3, h3 = x3[at : at + half], x3[at + half : at + group]
                    a0, a1, a2, a3 = np.float32(0.0), np.float32(0.0), np.float32(0.0), np.float32(0.0)
                    for i in range(half):
                        u = np.int32(c[i])
                        low, high = np.float32(u & np.int32(15)), np.float32(u >> np.int32(4))
                        a0 += low * l0[i] + high * h0[i]
                        a1 += low * l1[i] + high * h1[i]
                        a2 += low * l2[i] + high * h2[i]
                        a3 += low * l3[i] + high * h3[i]
                    s, z = scales[n, g], np.float32(zeros[n, g])
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
                    at = g * half
                    c0, c1, c2, c3 = w0[at : at + half], w1[at : at + half], w2[at : at + half], w3[at : at + half]
                    lower, upper = row[2 * at : 2 * at + half], row[2 * at + half : 2 * at + group]
                    a0, a1, a2, a3 = np.float32(0.0), np.float32(0.0), np.float32(0.0), np.float32(0.0)
                    for i in range(half):
                        u0, u1, u2, u3 = np.int32(c0[i]), np.int32(c1[i]), np.int32(c2[i]), np.int32(c3[i])
                        a0 += np.float32(u0 & np.int32(15)) * lower[i] + np.float32(u0 >> np.int32(4)) * upper[i]
                        a1 += np.float32(u1 & np.int32(15)) * lower[i] + np.float32(u1 >> np.int32(4)) * upper[i]
                        a2 += np.float32(u2 & np.int32(15)) * lower[i] + np.float32(u2 >> np.int32(4)) * upper[i]
                        a3 += np.float32(u3 & np.int32(15)) * lower[i] + np.float32(u3 >> np.int32(4)) * upper[i]
                    total = sums[m, g]
                    t0 += scales[n, g] * (a0 - np.float32(zeros[n, g]) * total)
                    t1 += scales[n + 1, g] * (a1 - np.float32(zeros[n + 1, g]) * total)
                    t2 += scales[n + 2, g] * (a2 - np.float32(zeros[n + 2, g]) * total)
                    t3 += scales[n + 3, g] * (a3 - np.float32(zeros[n + 3, g]) * total)
                out[m, n], out[m, n + 1], out[m, n + 2], out[m, n + 3] = t0, t1, t2, t3

    return few_rows


@jit
def _dequantize(begin, end, codes, scales, zeros, half, out):
    """Rows ``begin`` to ``end`` of the weight in float32: out [out, in]."""
    for n in range(begin, end):
        for g in range(scales.shape[1]):
            c, s, z = codes[n, g * half : g * half + half], scales[n, g], np.float32(zeros[n, g])
            low = out[n, 2 * g * half : 2 * g * half + half]
            high = out[n, 2 * g * half + half : 2 * g * half + 2 * half]
            for i in range(half):
                u = np.int32(c[i])
                low[i] = (np.float32(u & np.int32(15)) - z) * s
                high[i] = (np.float32(u >> np.int32(4)) - z) * s


def cpu_int4_linear(
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
    """
    rows, in_features = x.shape
    out_features, groups = scales.shape
    if in_features != 2 * codes.shape[1] or x.dtype not in DTYPES:
        raise ValueError(f"cpu_int4_linear: x is {x.dtype} {tuple(x.shape)}, the codes are {tuple(codes.shape)}.")
    return multiply(x, CpuLinear(codes, scales, zeros), bias, rotated, _few_rows(in_features // groups), _dequantize)


def multiply(
    x: torch.Tensor, weight: CpuLinear, bias: torch.Tensor | None, rotated: bool, few_rows: Callable, dequantize: Callable
) -> torch.Tensor:
    """A linear by the loops of a number of bits: ``few_rows`` for the weight's group size, ``dequantize`` for many rows."""
    (rows, in_features), (out_features, groups) = x.shape, weight.scales.shape
    group = in_features // groups
    inputs = rotate_inputs(x) if rotated else x.float().contiguous()
    out = torch.empty(rows, out_features, dtype=torch.float32)
    arrays = tuple(tensor.numpy() for tensor in weight)
    if rows >= MANY_ROWS:
        _many_rows(arrays, dequantize, inputs, out)
    elif rows:
        sums = np.empty((rows, groups), np.float32)
        _group_sums(inputs.numpy(), group, sums)
        arguments = (*arrays, inputs.numpy(), sums, out.numpy())
        tasks = max(1, rows * in_features * out_features // _PRODUCTS_PER_TASK)
        split(few_rows, out_features // 4, arguments, tasks)
    if bias is not None:
        out += bias
    return out.to(x.dtype)


def _many_rows(weight: tuple[np.ndarray, ...], dequantize: Callable, x: torch.Tensor, out: torch.Tensor) -> None:
    codes, scales, _ = weight
    bytes_per_group = codes.shape[1] // scales.shape[1]
    (out_features, in_features), threads = out.shape[1:] + x.shape[1:], torch.get_num_threads()
    part = min(out_features, max(MULTIPLE, threads * _WRITTEN // in_features))
    written = torch.empty(part, in_features, dtype=torch.float32)
    for start in range(0, out_features, part):
        here = slice(start, min(start + part, out_features))
        number = here.stop - here.start
        tasks = max(1, number * in_features // _WRITTEN)
        split(dequantize, number, (*(w[here] for w in weight), bytes_per_group, written.numpy()), tasks)
        out[:, here] = x @ written[:number].t()


def _fake(x, codes, scales, zeros, bias=None, rotated=False):
    return x.new_empty(x.shape[0], codes.shape[0])


# One operator, because torch.compile must not see a choice that depends on the number of rows.
_library = torch.library.Library("vllm_quantspec", "FRAGMENT")
_library.define(
    "cpu_int4_linear(Tensor x, Tensor codes, Tensor scales, Tensor zeros, Tensor? bias=None, bool rotated=False) -> Tensor"
)
_library.impl("cpu_int4_linear", cpu_int4_linear, "CPU")
torch.library.register_fake("vllm_quantspec::cpu_int4_linear", _fake, lib=_library)


@cache
def warm_up(group_size: int) -> None:
    """Compile what a group size needs (some seconds, once per installation: kept on disk) before it is needed."""
    codes, ones = torch.ones(MULTIPLE, group_size, dtype=torch.uint8), torch.ones(MULTIPLE, 1, dtype=torch.uint8)
    weight = pack(codes, ones, ones, group_size)
    for rows in (1, MANY_ROWS):
        cpu_int4_linear(torch.ones(rows, group_size), *weight)
