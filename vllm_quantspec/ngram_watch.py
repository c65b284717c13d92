"""What n-grams would bring: how often what followed last time follows again, learned from the texts as they come.

Nothing has to be drafted for that: every token that a request gets, by whatever drafts, says whether an n-gram would have
been right. So a text that begins to repeat itself is noticed at once, and looking costs the host some microseconds per
request and step, the device nothing. No vLLM import; nothing here is random.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vllm_quantspec.draft_length import Acceptance
from vllm_quantspec.kernels.ngram_index import Match, NgramIndex

# A match of so many tokens is taken for a copy; shorter ones are counted apart, since chance brings them in any text.
COPY_LENGTH = 12
# Acceptance before anything is known, of short matches and of copies.
PRIORS = (0.3, 0.85)
# What an observation leaves of those before it in a request, and how many of them the engine's mean is worth.
MEMORY, MEAN_WEIGHT = 0.9, 2.0


@dataclass
class _Followed:
    """A request: its text, and what the text's end repeats, as it was some steps before (the first) to now (the last)."""

    index: NgramIndex
    matches: deque[Match | None]

    @property
    def match(self) -> Match | None:
        return self.matches[-1]


class NgramWatch:
    """Follows requests, and expects of each what n-gram drafts would bring.

    Args:
        shortest, longest: tokens of the n-grams that are looked for.
        num_positions: most drafts of a request.
        steps_ahead: so many steps' tokens are not known yet when drafts are decided on. An n-gram that is gone by the time
            that it is drafted for counts as a draft that was rejected.

    Raises:
        ValueError: lengths that are out of order.
    """

    def __init__(self, shortest: int, longest: int, num_positions: int, steps_ahead: int = 0) -> None:
        self.num_positions, self._lengths, self._steps_ahead = num_positions, (shortest, longest), steps_ahead
        self._followed: dict[str, _Followed] = {}
        self._acceptance = [Acceptance(num_positions, prior, MEMORY, MEAN_WEIGHT) for prior in PRIORS]
        NgramIndex([1, 2, 3], shortest, longest).find()  # compiles it

    def length(self, request: str) -> int:
        """Tokens of ``request`` that are known; 0 if it is not followed."""
        followed = self._followed.get(request)
        return followed.index.length if followed else 0

    def follow(self, request: str, tokens: Sequence[int]) -> None:
        """``request`` is new, and has these tokens, its prompt and what there is of its answer."""
        index = NgramIndex(tokens, *self._lengths)
        self._followed[request] = _Followed(index, deque([index.find()], maxlen=self._steps_ahead + 1))

    def observe(self, requests: Sequence[str], new_tokens: Sequence[Sequence[int]]) -> None:
        """A step brought ``new_tokens`` of each of ``requests``, all of which are followed; each name at most once."""
        names, drafted, accepted = ([], []), ([], []), ([], [])
        for request, tokens in zip(requests, new_tokens, strict=True):
            followed = self._followed[request]
            is_old = len(followed.matches) > self._steps_ahead
            decided_by = followed.matches[0] if is_old else None
            if decided_by is not None and tokens:
                is_copy = decided_by.length >= COPY_LENGTH
                tried, held = self._verdict(followed, tokens)
                names[is_copy].append(request)
                drafted[is_copy].append(tried)
                accepted[is_copy].append(held)
            followed.index.extend(tokens)
            followed.matches.append(followed.index.find())
        for acceptance, *seen in zip(self._acceptance, names, drafted, accepted, strict=True):
            if seen[0]:
                acceptance.observe(*seen)

    def _verdict(self, followed: _Followed, tokens: Sequence[int]) -> tuple[int, int]:
        """(drafts that the new tokens tell of, how many of them were right), had n-grams drafted for this step."""
        if followed.match is None:
            return 1, 0
        start = followed.match.start
        drafts = followed.index.tokens[start : start + min(self.num_positions, len(tokens))].tolist()
        held = next((i for i, (draft, token) in enumerate(zip(drafts, tokens, strict=False)) if draft != token), len(drafts))
        return len(drafts), held

    def expected_tokens(self, requests: Sequence[str]) -> np.ndarray | None:
        """Of each request, by its number of n-gram drafts, the tokens that a step brings; [num_requests, num_positions + 1].

        1 where nothing repeats itself; None where nothing does in any of them.
        """
        matches = [followed.match if (followed := self._followed.get(request)) else None for request in requests]
        if not any(matches):
            return None
        tokens = np.ones((len(requests), self.num_positions + 1))
        for is_copy, acceptance in enumerate(self._acceptance):
            rows = [row for row, match in enumerate(matches) if match and (match.length >= COPY_LENGTH) == is_copy]
            if rows:
                tokens[rows, 1:] += acceptance.rates([requests[row] for row in rows]).cumprod(1)
        tokens[:, 1:] = 1 + (tokens[:, 1:] - 1).cumsum(1)
        return tokens

    def mean_rates(self) -> list[np.ndarray]:
        """Acceptance of short matches and of copies, of all requests, as of `Acceptance.mean_rates`."""
        return [acceptance.mean_rates() for acceptance in self._acceptance]

    def forget(self, request: str) -> None:
        """``request`` is over."""
        self._followed.pop(request, None)
        for acceptance in self._acceptance:
            acceptance.forget(request)
