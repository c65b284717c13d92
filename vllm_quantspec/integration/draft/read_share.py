"""How much of the cache sparse drafts read: in the log now and then, as vLLM's numbers of drafts are, and for Prometheus.

vLLM takes from its workers no numbers that it does not know, and a server's ``/metrics`` shows its own process. But where
``PROMETHEUS_MULTIPROC_DIR`` is set, it shows what all processes count: then these counters are there, beside vLLM's.
"""

from __future__ import annotations

import time
from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING

from prometheus_client import REGISTRY, Counter
from vllm import envs
from vllm.logger import init_logger

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger("vllm.quantspec.sparse")


@cache
def _counters() -> tuple[Counter, Counter]:
    """Of this process. Pages of layers and KV heads are alike, so those of one are counted."""
    labels = ["model_name", "engine"]
    read = "Old KV cache pages that draft steps have read, per layer and KV head."
    old = "Old KV cache pages that draft steps would have read of the whole cache, per layer and KV head."
    return (
        Counter("vllm:quantspec_draft_pages_read", read, labels, registry=None),
        Counter("vllm:quantspec_draft_pages", old, labels, registry=None),
    )


class ReadShare:
    """The share of the old tokens that draft steps read. Host numbers only: a selection's size follows from lengths, which
    the host knows.

    Args:
        labels: of this engine's counters, see `labels_of`; None for a worker that says nothing, as another does.
    """

    def __init__(self, labels: tuple[str, str] | None) -> None:
        self._labels, self._last = labels, time.monotonic()
        self._of_engine: list[Counter] = []
        self.read = self.old = 0  # tokens or pages, of all steps so far
        self._before = (0, 0, 0)
        self._steps = 0

    @property
    def mean(self) -> float:
        """Since the engine started: 0 to 1; 1 where nothing was old."""
        return self.read / self.old if self.old else 1.0

    def add(self, read: int, old: int, steps: int) -> None:
        """A cycle of ``steps`` draft steps, each of which reads ``read`` of ``old`` pages, of all requests together."""
        self.read += read * steps
        self.old += old * steps
        self._steps += steps
        if self._labels is None:
            return
        if not self._of_engine:
            self._register()
        for counter, pages in zip(self._of_engine, (read, old), strict=True):
            counter.inc(pages * steps)
        if time.monotonic() - self._last >= envs.VLLM_LOG_STATS_INTERVAL:
            self.log()

    def _register(self) -> None:
        """In the first cycle: vLLM, which has none yet when its workers start, drops all metrics of its name at start."""
        for counter in _counters():
            with suppress(ValueError):  # an engine before this one, in the same process
                REGISTRY.register(counter)
            self._of_engine.append(counter.labels(*self._labels))

    def log(self) -> None:
        read, old, steps = (now - then for now, then in zip((self.read, self.old, self._steps), self._before, strict=True))
        if old:
            logger.info(
                "quantspec: draft steps read %.1f %% of the cache (mean of the last %d steps)", 100 * read / old, steps
            )
        self._last, self._before = time.monotonic(), (self.read, self.old, self._steps)


def labels_of(vllm_config: VllmConfig) -> tuple[str, str] | None:
    """Values of the labels that vLLM's own metrics have; None in all workers of an engine but the first."""
    parallel = vllm_config.parallel_config
    if parallel.rank != 0:
        return None
    return str(vllm_config.model_config.served_model_name), str(parallel.data_parallel_index)
