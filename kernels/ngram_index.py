"""Where a text repeats itself: the n-gram at its end, and where it was last. Tokens of one request, indexed as they come.

A lookup takes a microsecond, whatever the length of the text, so a scheduler can afford one per request and step. What the
drafts are is up to vLLM's own n-gram kernels, which search the tokens on the worker.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vllm_quantspec.kernels.numba_jit import jit

# Slots that are looked at before an n-gram counts as unknown; tables are at most half full, so hardly one is lost.
PROBES = 16
# A longer match says no more.
LONGEST_MATCH = 32
FIRST_CAPACITY = 1024


@jit
def _slot(tokens, end, n, table):
    """The slot of ``table`` that has, or may take, the n-gram whose last token is at ``end``; -1 if all are others'."""
    value = np.uint64(n)
    for i in range(end - n + 1, end + 1):
        value = (value ^ np.uint64(tokens[i])) * np.uint64(0x9E3779B97F4A7C15)
        value ^= value >> np.uint64(29)
    mask = np.uint64(table.shape[0] - 1)
    for probe in range(PROBES):
        slot = np.int64((value + np.uint64(probe)) & mask)
        known = table[slot]
        if known < 0:
            return slot
        same = True
        for i in range(n):
            if tokens[known - i] != tokens[end - i]:
                same = False
                break
        if same:
            return slot
    return -1


@jit
def _enter(tokens, first, last, tables, shortest):
    """Enter the n-grams whose last tokens are at ``first`` to ``last - 1``; a later one takes the place of the same."""
    for end in range(first, last):
        for row in range(tables.shape[0]):
            n = shortest + row
            if end + 1 >= n:
                slot = _slot(tokens, end, n, tables[row])
                if slot >= 0:
                    tables[row, slot] = end


@jit
def _find(tokens, length, tables, shortest):
    """(position after the last earlier occurrence of the longest known n-gram at the end, tokens that match), or (-1, 0)."""
    for row in range(tables.shape[0] - 1, -1, -1):
        n = shortest + row
        if length <= n:
            continue
        slot = _slot(tokens, length - 1, n, tables[row])
        if slot < 0 or tables[row, slot] < 0:
            continue
        end = tables[row, slot]
        matched = n
        while matched < LONGEST_MATCH and matched <= end and tokens[end - matched] == tokens[length - 1 - matched]:
            matched += 1
        return end + 1, matched
    return -1, 0


class Match(NamedTuple):
    """``start``: position of the token that followed last time. ``length``: tokens before it that are the text's last."""

    start: int
    length: int


class NgramIndex:
    """The tokens of one request, and where each n-gram of them was last.

    Args:
        tokens: token ids so far, any sequence of integers.
        shortest, longest: tokens of the n-grams that are looked for, 1 <= shortest <= longest.

    Raises:
        ValueError: lengths that are out of order.
    """

    def __init__(self, tokens: Sequence[int], shortest: int, longest: int) -> None:
        if not 1 <= shortest <= longest:
            raise ValueError(f"n-grams of {shortest} to {longest} tokens: the lengths must ascend from 1.")
        self._shortest, self._num_lengths = shortest, longest - shortest + 1
        self.length = 0
        self._tokens = np.empty(0, dtype=np.int32)
        self.extend(tokens)

    @property
    def tokens(self) -> np.ndarray:
        """All tokens; int32 [length]."""
        return self._tokens[: self.length]

    def extend(self, tokens: Sequence[int]) -> None:
        """Append token ids."""
        first, self.length = self.length, self.length + len(tokens)
        if self.length >= len(self._tokens):
            capacity = max(FIRST_CAPACITY, 1 << self.length.bit_length())
            grown = np.empty(capacity, dtype=np.int32)
            grown[:first] = self._tokens[:first]
            self._tokens = grown
            self._tables = np.full((self._num_lengths, 2 * capacity), -1, dtype=np.int32)
            entered = 0
        else:
            entered = max(0, first - 1)
        self._tokens[first : self.length] = tokens
        # Not the n-gram at the very end: it would be found to match itself.
        _enter(self._tokens, entered, self.length - 1, self._tables, self._shortest)

    def find(self) -> Match | None:
        """What the text's end repeats: its longest n-gram that was there before, where it was last."""
        start, length = _find(self._tokens, self.length, self._tables, self._shortest)
        return Match(start, length) if length else None
