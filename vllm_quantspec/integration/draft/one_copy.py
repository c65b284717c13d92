"""Linears of a 4-bit checkpoint that the draft shares with the target: its weights are the target's own 4 bits.

On a GPU those that `gpu/marlin_linears.py` runs, with the option ``one_copy``. On a CPU all that vLLM's kernel for 4 bits
runs: a copy would run on the same kernel.
"""

from __future__ import annotations

from torch import nn
from vllm.model_executor.kernels.linear import MPLinearKernel
from vllm.platforms import current_platform
from vllm.scalar_type import scalar_types

SHARED = "it is in 4 bits already: target and draft read one copy"
_MARK = "quantspec_one_copy"


def mark(layer: nn.Module) -> None:
    """Let drafts share ``layer``."""
    setattr(layer, _MARK, True)


def is_shared(layer: nn.Module) -> bool:
    """Whether the draft reads the weights of this loaded linear of the target as they are."""
    if getattr(layer, _MARK, False):
        return True
    kernel = getattr(getattr(layer, "scheme", None) or layer.quant_method, "kernel", None)
    four_bits = (scalar_types.uint4, scalar_types.uint4b8)
    return current_platform.is_cpu() and isinstance(kernel, MPLinearKernel) and kernel.config.weight_type in four_bits
