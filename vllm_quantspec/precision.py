"""Which linears of a draft get 8 bits instead of 4, by what each loses and costs. No vLLM import.

A linear's loss is the KL divergence, in nats per token, of the model with this linear alone in 4 bits from the model itself.
Losses of several linears add up well enough, and a draft is accepted with about ``1 - 0.48 * sqrt(KL)`` when sampling: so it
was for every rounding of SmolLM2-135M and books-30m that was measured (benchmarks/NOTES.md, "Mixed precision").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

REJECTED_PER_ROOT_KL = 0.48
# What drafts lose without any rounding of weights, as they read 4 bits of the cache.
CACHE_KL = 0.0007


@dataclass(frozen=True)
class Linear:
    """A linear that may have either precision; ``*_bits`` per weight, with scales and zero points; loss in nats."""

    name: str
    weights: int
    narrow_bits: float
    wide_bits: float
    loss: float


@dataclass(frozen=True)
class Choice:
    """The linears in 8 bits, the average bits per weight, the share of weights in 8 bits, and the expected acceptance."""

    wide: frozenset[str]
    bits: float
    share: float
    acceptance: float


def average_bits(linears: Sequence[Linear], wide: frozenset[str]) -> float:
    total = sum(x.weights for x in linears)
    return sum(x.weights * (x.wide_bits if x.name in wide else x.narrow_bits) for x in linears) / total


def _choice(linears: Sequence[Linear], wide: frozenset[str]) -> Choice:
    total = sum(x.weights for x in linears)
    share = sum(x.weights for x in linears if x.name in wide) / total
    # 8 bits lose next to nothing: a hundredth of what 4 do.
    kl = CACHE_KL + sum(x.loss * (0.01 if x.name in wide else 1) for x in linears)
    return Choice(wide, average_bits(linears, wide), share, max(0.0, 1 - REJECTED_PER_ROOT_KL * math.sqrt(kl)))


def _in_order(linears: Sequence[Linear]) -> list[Linear]:
    """Those that lose most per byte first."""
    return sorted(linears, key=lambda x: (-x.loss / (x.weights * (x.wide_bits - x.narrow_bits)), x.name))


def within(linears: Sequence[Linear], weight_bits: float) -> Choice:
    """8 bits for those that lose most per byte, as long as the average is at most ``weight_bits``."""
    wide: frozenset[str] = frozenset()
    for linear in _in_order(linears):
        more = wide | {linear.name}
        if average_bits(linears, more) <= weight_bits:
            wide = more
    return _choice(linears, wide)


def fastest(linears: Sequence[Linear], ms_per_token: Callable[[Choice], float], some: bool = False) -> Choice:
    """The best choice by a cost model, from none in 8 bits (``some``: from one) to all, in the order of loss per byte."""
    wide, choices = frozenset(), [] if some else [_choice(linears, frozenset())]
    for linear in _in_order(linears):
        wide = wide | {linear.name}
        choices.append(_choice(linears, wide))
    return min(choices, key=ms_per_token)
