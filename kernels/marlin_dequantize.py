"""The 16-bit weight of a 4-bit one in Marlin's layout, to multiply a prompt's tokens by.

Such a product is bound by its arithmetic, of which unpacking is a small part: a step of many tokens writes the weight of one
linear in 16 bits, multiplies by it, and forgets it. The idea of the kernel is in ``marlin_dequantize.cu``;
`marlin_linear.dequantize` is the same in plain PyTorch, before rounding.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch

from vllm_quantspec.kernels import nvrtc
from vllm_quantspec.kernels.marlin_linear import STRIP, UNIT, Kind, MarlinWeight, dequantize, kind_of

SOURCE = Path(__file__).with_suffix(".cu")
THREADS = 128


class _Params(ctypes.Structure):
    _names = ("codes", "scales", "zeros", "out")
    _fields_ = [(name, ctypes.c_void_p) for name in _names] + [(name, ctypes.c_int) for name in ("strips", "units")]


def marlin_dequantize(weight: MarlinWeight) -> torch.Tensor:
    """[out, in] in the scales' dtype: ``(code - zero) * scale``, rounded once.

    Can be captured in a CUDA graph, after one run. On a CPU it is `marlin_linear.dequantize`, rounded.

    Args:
        weight: contiguous tensors of a weight that `marlin_linear.supported` takes.

    Raises:
        RuntimeError: first called while a CUDA graph is captured.
    """
    if not weight.codes.is_cuda:
        return dequantize(weight).to(weight.scales.dtype)
    device = weight.codes.device.index
    out = torch.empty(weight.out_features, weight.in_features, dtype=weight.scales.dtype, device=weight.codes.device)
    strips, units = weight.out_features // STRIP, weight.in_features // UNIT
    with torch.cuda.device(device):
        params = _Params(*(0 if t is None else t.data_ptr() for t in (*weight, out)), strips, units)
        nvrtc.launch(_kernel(kind_of(weight), device), params, strips, units)
    return out


def macros_of(kind: Kind) -> dict[str, int]:
    """What the kernel's source is compiled with."""
    return {"GROUP_SIZE": kind.group_size, "HAS_ZEROS": int(kind.has_zeros), "IS_BF16": int(kind.bf16)}


@cache
def _kernel(kind: Kind, device: int) -> nvrtc.Kernel:
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("Run marlin_dequantize once with this kind of weight before capturing it in a CUDA graph.")
    return nvrtc.load(SOURCE, macros_of(kind), device, grid=(1, 1), threads=THREADS, shared_bytes=0, overlap=False)
