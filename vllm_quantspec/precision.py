"""Which linears of a draft get 8 bits instead of 4, by what each loses and costs. No vLLM import.

A linear's loss is the KL divergence, in nats per token, of the model with this linear in 4 bits from the model itself.
Losses of several linears add up well enough, and a draft is accepted with about ``1 - 0.48 * sqrt(KL)`` when sampling: so it
was for every rounding of SmolLM2-135M and books-30m that was measured (benchmarks/NOTES.md, "Mixed precision").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

REJECTED_PER_ROOT_KL = 0.48
# What drafts lose without any rounding of weights, as they read 4 bits of the cache; and where they read a part of it, as
# books-30m did with the target's weights (benchmarks/results/sparse_acceptance-books-30m.json).
CACHE_KL, SPARSE_KL = 0.0007, 0.025
# What a linear loses in 8 bits, of its loss in 4: next to nothing. GPTQ leaves less of the loss in 4.
WIDE_LOSS = {"search": 0.01, "gptq": 0.02}
# With less to gain than this, all linears stay in 4 bits: it is less than a cost model knows.
LEAST_GAIN = 0.01


def acceptance(kl: float) -> float:
    """The expected probability that a draft is accepted, whose distribution is ``kl`` nats from the target's."""
    return max(0.0, 1 - REJECTED_PER_ROOT_KL * math.sqrt(kl))


@dataclass(frozen=True)
class Linear:
    """A linear that may have either precision; ``*_bits`` per weight, with scales and zero points; losses in nats."""

    name: str
    weights: int
    narrow_bits: float
    wide_bits: float
    loss: float
    wide_loss: float


@dataclass(frozen=True)
class Choice:
    """The linears in 8 bits, the average bits per weight, the share of weights in 8 bits, and what all of it loses."""

    wide: frozenset[str]
    bits: float
    share: float
    kl: float

    @property
    def acceptance(self) -> float:
        """Of drafts that read the whole cache."""
        return acceptance(self.kl)

    @property
    def sparse_acceptance(self) -> float:
        """Of drafts that read a part of it."""
        return acceptance(self.kl + SPARSE_KL)


def average_bits(linears: Sequence[Linear], wide: frozenset[str]) -> float:
    total = sum(x.weights for x in linears)
    return sum(x.weights * (x.wide_bits if x.name in wide else x.narrow_bits) for x in linears) / total


def _choice(linears: Sequence[Linear], wide: frozenset[str]) -> Choice:
    total = sum(x.weights for x in linears)
    share = sum(x.weights for x in linears if x.name in wide) / total
    kl = CACHE_KL + sum(x.wide_loss if x.name in wide else x.loss for x in linears)
    return Choice(wide, average_bits(linears, wide), share, kl)


def _in_order(linears: Sequence[Linear]) -> list[Linear]:
    """Those that 8 bits win most of per byte first."""
    return sorted(linears, key=lambda x: ((x.wide_loss - x.loss) / (x.weights * (x.wide_bits - x.narrow_bits)), x.name))


def within(linears: Sequence[Linear], weight_bits: float) -> Choice:
    """8 bits for those that lose most per byte, as long as the average is at most ``weight_bits``."""
    wide: frozenset[str] = frozenset()
    for linear in _in_order(linears):
        more = wide | {linear.name}
        if average_bits(linears, more) <= weight_bits:
            wide = more
    return _choice(linears, wide)


def fastest(
    linears: Sequence[Linear],
    ms_per_token: Callable[[Choice], float],
    some: bool = False,
    most_bytes: float = math.inf,
) -> Choice:
    """The best choice by a cost model, from none in 8 bits to all, in the order of loss per byte.

    Args:
        some: at least one in 8 bits; otherwise none, where little is gained.
        most_bytes: that 8 bits may take beyond 4.
    """
    none, wide, more, choices = _choice(linears, frozenset()), frozenset(), 0.0, []
    for linear in _in_order(linears):
        wide, more = wide | {linear.name}, more + linear.weights * (linear.wide_bits - linear.narrow_bits) / 8
        if more <= most_bytes:
            choices.append(_choice(linears, wide))
    best = min(choices, key=ms_per_token, default=none)
    return best if some or ms_per_token(best) < (1 - LEAST_GAIN) * ms_per_token(none) else none
