"""Linears of a 4-bit checkpoint that the draft shares with the target: its weights are the target's own 4 bits.

Those that `gpu/marlin_linears.py` runs, with the option ``one_copy``.
"""

from __future__ import annotations

from torch import nn

SHARED = "it is in 4 bits already: target and draft read one copy"
_MARK = "quantspec_one_copy"


def mark(layer: nn.Module, weights: tuple[str, ...]) -> None:
    """Let drafts share ``layer``. ``weights``: names of its codes, scales and, if it has some, zero points."""
    setattr(layer, _MARK, weights)


def is_shared(layer: nn.Module) -> bool:
    """Whether the draft reads the weights of this loaded linear of the target as they are."""
    return bool(weights_of(layer))


def weights_of(layer: nn.Module) -> tuple[str, ...]:
    """The names of a shared linear's attributes that are, in this order, a `MarlinWeight`; of others none."""
    return getattr(layer, _MARK, ())
