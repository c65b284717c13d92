"""Whose sparse drafts lose more than they save, by measured acceptance. For ``draft_context: auto``. No vLLM import.

`sparse_policy` says from which length and batch on sparse drafts pay, if they lose as many tokens as they do on novels. Of
some texts they lose more. Here each request has two rates, at which drafts that read everything and sparse ones were
accepted, drawn to the means of all requests while little is known; and by the cost model's bytes:

    price  = bytes of a cycle / tokens that it brings, of all requests together
    gain   = bytes that a request's sparse drafts save in a cycle - price * tokens that they lose

A request whose gain is below zero reads everything, until it is above. What is learned of one kind of drafts says little of
the other, so a request has the other kind now and then, for a cycle: where it could gain by that, within what its rates
leave open, and as often as a small share of all bytes allows. Where sparse drafts save much nothing is left open soon, and
no cycle is spent. Nothing here is random.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import numpy as np

from vllm_quantspec.config import DraftBudget
from vllm_quantspec.sparse_policy import CycleBytes, chosen_pages, min_total_pages

# Kinds of drafts, as columns.
WHOLE, SPARSE = 0, 1
# The rate at which drafts are accepted before anything is known, by how much less sparse ones are, and how many drafts both
# are worth. (0.938 and 0.91 on novels, see `sparse_policy.LOST_TOKENS`.)
PRIOR, PRIOR_LOST, PRIOR_WEIGHT = 0.85, 0.028, 40.0
# How many drafts of its own it takes until a request's rate is halfway from the others' to its own.
MEAN_WEIGHT = 20.0
# What an observation leaves of those before it: of a request's own kind of drafts, of the other kind, of the means.
REQUEST_MEMORY, OTHER_MEMORY, MEAN_MEMORY = 0.97, 0.995, 0.998
# A request changes its kind for a gain of this share of its part of a cycle.
HYSTERESIS = 0.005
# The share of all bytes that trials may lose, what of it may be saved up in cycles, and cycles between two of a request.
TRIAL_SHARE, TRIAL_SAVINGS, TRIAL_GAP = 0.005, 1.0, 8
# Least variance of whether a draft is accepted: rates of 0 and 1 are not certain.
LEAST_VARIANCE = 0.02


class SparseChoice:
    """Chooses, in every step, which requests' drafts read everything though they could be sparse.

    Args:
        cycle: bytes that a cycle reads.
        budget: of ``draft_context: auto``.
        group_size: tokens of a page.
        num_speculative_tokens: of a cycle, at most.
    """

    def __init__(self, cycle: CycleBytes, budget: DraftBudget, group_size: int, num_speculative_tokens: int) -> None:
        self.cycle, self.group_size = cycle, group_size
        least = min_total_pages(
            **asdict(cycle),
            num_speculative_tokens=num_speculative_tokens,
            fraction=budget.fraction,
            group_size=group_size,
        )
        self.limits = {**budget._asdict(), "min_scored_pages": budget.min_scored_pages, "min_total_pages": least}
        self.num_trials = 0
        self._rows: dict[str, int] = {}
        self._free = list(range(8))
        self._drafts = np.zeros((8, 2))  # [row, kind]: drafts that were verified, as far as they are remembered
        self._accepted = np.zeros((8, 2))
        self._reads_all = np.zeros(8, dtype=bool)  # by choice
        self._cycles_since_trial = np.full(8, TRIAL_GAP)
        self._mean_drafts, self._mean_accepted = np.zeros(2), np.zeros(2)
        self._savings = 0.0  # bytes

    def observe(
        self, requests: Sequence[str], sparse: Sequence[bool], drafted: Sequence[int], accepted: Sequence[int]
    ) -> None:
        """A verification: of ``drafted`` tokens of each request, ``sparse`` or not, the first ``accepted`` were accepted.

        Each name at most once.
        """
        rows, kind = self._rows_of(requests), np.asarray(sparse, dtype=np.int64)
        held = np.asarray(accepted, dtype=float)
        seen = np.minimum(held + 1, drafted)  # those after the first that was rejected tell nothing
        kept = np.full((len(rows), 2), OTHER_MEMORY)
        kept[np.arange(len(rows)), kind] = REQUEST_MEMORY
        self._drafts[rows] *= kept
        self._accepted[rows] *= kept
        self._drafts[rows, kind] += seen
        self._accepted[rows, kind] += held
        kept = MEAN_MEMORY ** np.bincount(kind, minlength=2)
        self._mean_drafts = self._mean_drafts * kept + np.bincount(kind, seen, 2)
        self._mean_accepted = self._mean_accepted * kept + np.bincount(kind, held, 2)

    def rates(self, requests: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """How often each request's drafts of both kinds are accepted, if those before were, and how far that may be off.

        Returns:
            Two of [num_requests, 2], 0 to 1: the rates, and their standard deviations.
        """
        # -1 stands for a request that is not known: no drafts.
        rows = np.array([self._rows.get(name, -1) for name in requests], dtype=np.int64)
        known = (rows >= 0)[:, None]
        drafts, accepted = self._drafts[rows] * known, self._accepted[rows] * known
        mean, prior = np.empty(2), PRIOR
        for kind in (WHOLE, SPARSE):
            mean[kind] = (self._mean_accepted[kind] + PRIOR_WEIGHT * prior) / (self._mean_drafts[kind] + PRIOR_WEIGHT)
            prior = mean[kind] - PRIOR_LOST
        # Who is better or worse than others with one kind of drafts is expected to be so with the other.
        apart = (accepted - drafts * mean) / (drafts + MEAN_WEIGHT)
        rates = (accepted + MEAN_WEIGHT * np.clip(mean + apart[:, ::-1], 0, 1)) / (drafts + MEAN_WEIGHT)
        return rates, np.sqrt(np.maximum(rates * (1 - rates), LEAST_VARIANCE) / (drafts + MEAN_WEIGHT))

    def choose(
        self, requests: Sequence[str], tokens: Sequence[int], scored: Sequence[bool], number: int
    ) -> tuple[set[str], set[str]]:
        """For the next cycle of ``requests``, those that sample in this step.

        Args:
            tokens: of each request. scored: whether its drafts could be sparse if it were long enough.
            number: of drafts of each.

        Returns:
            Names of requests that shall read everything, and of those that are expected to have sparse drafts.
        """
        pages = np.maximum(np.asarray(tokens, dtype=np.int64) // self.group_size - 1, 0)
        chosen = chosen_pages(np.where(scored, pages, 0), **self.limits)
        could = chosen > 0
        if not number or not could.any():
            return set(), set()
        rows = self._rows_of(requests)
        reads_all = self._reads_all[rows]
        rates, deviations = self.rates(requests)
        brings, at_best = _tokens(rates, number), _tokens(np.minimum(rates + deviations, 1), number)
        cycle, saved = self._bytes(pages, np.where(could, chosen, pages), ~reads_all, number)
        price = cycle / np.where(could & ~reads_all, brings[:, SPARSE], brings[:, WHOLE]).sum()
        gain = saved - price * (brings[:, WHOLE] - brings[:, SPARSE])
        margin = HYSTERESIS * cycle / len(requests)
        reads_all ^= could & np.where(reads_all, gain > margin, gain < -margin)
        self._reads_all[rows] = reads_all

        by_sparse = saved - price * (brings[:, WHOLE] - at_best[:, SPARSE])
        by_whole = price * (at_best[:, WHOLE] - brings[:, SPARSE]) - saved
        promise = np.where(could, np.where(reads_all, by_sparse, by_whole), 0)
        trial = self._tried(rows, promise, np.abs(gain), cycle, margin)
        if trial is not None:
            reads_all[trial] ^= True
        sparse = chosen_pages(np.where(scored & ~reads_all, pages, 0), **self.limits) > 0
        return _named(requests, could & reads_all), _named(requests, sparse)

    def _bytes(
        self, pages: np.ndarray, sparse_pages: np.ndarray, is_sparse: np.ndarray, number: int
    ) -> tuple[float, np.ndarray]:
        """Of a cycle, and those that each request's sparse drafts save in it, be they sparse now or not.

        ``pages`` are all that requests have, ``sparse_pages`` those that sparse drafts of them read.
        """
        cycle = self.cycle
        old, read = (x.sum() * self.group_size for x in (pages, np.where(is_sparse, sparse_pages, pages)))
        draft = cycle.draft_weight_bytes + cycle.draft_kv_bytes * read
        total = number * draft + cycle.target_weight_bytes + cycle.target_kv_bytes * old
        return total, number * cycle.draft_kv_bytes * self.group_size * (pages - sparse_pages)

    def _tried(self, rows: np.ndarray, promise: np.ndarray, costs: np.ndarray, cycle: float, margin: float) -> int | None:
        """The request, if any, that has the other kind of drafts for once: the one that could gain most by it."""
        self._savings = min(self._savings + TRIAL_SHARE * cycle, TRIAL_SAVINGS * cycle)
        self._cycles_since_trial[rows] += 1
        ready = (promise > margin) & (costs <= self._savings) & (self._cycles_since_trial[rows] > TRIAL_GAP)
        if not ready.any():
            return None
        trial = int(np.where(ready, promise, -np.inf).argmax())
        self._savings -= costs[trial]
        self._cycles_since_trial[rows[trial]] = 0
        self.num_trials += 1
        return trial

    def forget(self, request: str) -> None:
        """``request`` is over."""
        row = self._rows.pop(request, None)
        if row is not None:
            self._free.append(row)

    def _rows_of(self, requests: Sequence[str]) -> np.ndarray:
        return np.array([self._row(name) for name in requests], dtype=np.int64)

    def _row(self, request: str) -> int:
        row = self._rows.get(request)
        if row is None:
            if not self._free:
                size = len(self._drafts)
                self._free = list(range(size, 2 * size))
                for name in ("_drafts", "_accepted", "_reads_all", "_cycles_since_trial"):
                    setattr(self, name, np.concatenate([getattr(self, name)] * 2))
            row = self._rows[request] = self._free.pop()
            self._drafts[row] = self._accepted[row] = 0.0
            self._reads_all[row], self._cycles_since_trial[row] = False, TRIAL_GAP
        return row


def _named(requests: Sequence[str], which: np.ndarray) -> set[str]:
    return {name for name, x in zip(requests, which, strict=True) if x}


def _tokens(rates: np.ndarray, number: int) -> np.ndarray:
    """Mean tokens of a verification of ``number`` drafts, each accepted with ``rates`` if those before it were."""
    return (rates[..., None] ** np.arange(number + 1)).sum(-1)
