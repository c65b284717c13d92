"""Names the scheduler of ours that an engine needs, if any, without importing it."""

from __future__ import annotations

import logging

from vllm.config import VllmConfig

PATH = "vllm_quantspec.integration.draft."


def _of_others(record: logging.LogRecord) -> bool:
    return not (record.args and str(record.args[0]).startswith(PATH))


def silence_warning() -> None:
    """vLLM warns of schedulers that are not its own, as if the user had chosen one that might not fit: not of ours."""
    logging.getLogger("vllm.config.scheduler").addFilter(_of_others)


def use_scheduler(config: VllmConfig) -> None:
    """Set ``scheduler_cls`` of an engine whose number of drafts, or what these read, is chosen while running."""
    speculative = config.speculative_config
    length, sparse = getattr(speculative, "chooses_number", False), getattr(speculative, "weighs_sparse_drafts", False)
    if length or sparse:
        name = "Async" * config.scheduler_config.async_scheduling + "Sparse" * sparse + "DraftLength" * length + "Scheduler"
        config.scheduler_config.scheduler_cls = PATH + ("sparse_scheduler." if sparse else "scheduler.") + name
