"""Draft logits are finite, whatever the draft's weights hold.

vLLM verifies a sampled draft by the ratio of two probabilities, and where it rejects the draft it draws from what the target
has more of. With a NaN among the draft's logits no token has more: it would draw token 0. The draft's weights may hold
anything (sleep level 2 discards them, and they come back with the next `load_weights`), so this is seen to here. Any finite
draft leaves the output as it is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import nn

# Far above any logit that means something, and far below what a division by a temperature makes infinite.
LARGEST = 2.0**15


def make_finite(logits: torch.Tensor) -> torch.Tensor:
    """``logits``, each brought into ``-LARGEST`` to ``LARGEST``, in place; NaN becomes ``LARGEST``."""
    # fmin and fmax ignore a NaN, unlike clamp. A number on the CPU is an argument of the kernel, also inside a CUDA graph.
    torch.fmin(logits, torch.tensor(LARGEST, dtype=logits.dtype), out=logits)
    return torch.fmax(logits, torch.tensor(-LARGEST, dtype=logits.dtype), out=logits)


def with_finite_logits(model: nn.Module) -> None:
    """Let ``model.compute_logits`` return finite logits."""
    model.compute_logits = _finite(model.compute_logits)


def _finite(compute_logits: Callable) -> Callable:
    @functools.wraps(compute_logits)
    def compute_finite_logits(*args, **kwargs) -> torch.Tensor | None:
        logits = compute_logits(*args, **kwargs)
        return None if logits is None else make_finite(logits)  # only the first rank has them on some platforms

    return compute_finite_logits
