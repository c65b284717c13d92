"""How many drafts were n-grams, and how many of them were accepted: in the log, and for Prometheus as `read_share`'s are."""

from __future__ import annotations

from contextlib import suppress
from functools import cache

import numpy as np
from prometheus_client import REGISTRY, Counter
from vllm.logger import init_logger

logger = init_logger("vllm.quantspec.ngram")


@cache
def _counters() -> tuple[Counter, Counter]:
    """Of this process."""
    labels = ["model_name", "engine"]
    return (
        Counter("vllm:quantspec_ngram_draft_tokens", "Drafts of requests that drafted by n-grams.", labels, registry=None),
        Counter("vllm:quantspec_ngram_accepted_tokens", "Those of them that were accepted.", labels, registry=None),
    )


class NgramCount:
    """Drafts that n-grams were asked for. (Where a request's text had moved on, a few of them may be the model's.)

    Args:
        labels: of this engine's counters, see `read_share.labels_of`; None to count for the log alone.
    """

    def __init__(self, labels: tuple[str, str] | None) -> None:
        self._labels = labels
        self._of_engine: list[Counter] = []
        self.drafted = self.accepted = 0  # since the engine started
        self._before = (0, 0)

    def add(self, drafted: int, accepted: int) -> None:
        """A verification of a request: ``accepted`` of ``drafted`` tokens."""
        self.drafted += drafted
        self.accepted += accepted
        if self._labels is None:
            return
        if not self._of_engine:
            self._register()
        for counter, number in zip(self._of_engine, (drafted, accepted), strict=True):
            counter.inc(number)

    def _register(self) -> None:
        """At the first draft: vLLM drops all metrics of its name at start."""
        for counter in _counters():
            with suppress(ValueError):  # an engine before this one, in the same process
                REGISTRY.register(counter)
            self._of_engine.append(counter.labels(*self._labels))

    def log(self, mean_rates: list[np.ndarray]) -> None:
        """What was drafted since the last line, and what n-grams are expected to bring: first drafts of short matches, and
        of copies, as of `NgramWatch.mean_rates`."""
        drafted, accepted = self.drafted - self._before[0], self.accepted - self._before[1]
        self._before = self.drafted, self.accepted
        short, copies = (rates[0] for rates in mean_rates)
        logger.info(
            "N-grams: %d drafts, %d of them accepted; expected of the first: %.2f after a short match, %.2f in a copy",
            drafted,
            accepted,
            short,
            copies,
        )
