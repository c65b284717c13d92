"""Names the scheduler of ours that an engine needs, if any, without importing it."""

from __future__ import annotations

from vllm.config import VllmConfig

PATH = "vllm_quantspec.integration.draft."


def use_scheduler(config: VllmConfig) -> None:
    """Set ``scheduler_cls`` of an engine whose number of drafts, or what these read, is chosen while running."""
    speculative = config.speculative_config
    length, sparse = getattr(speculative, "chooses_number", False), getattr(speculative, "weighs_sparse_drafts", False)
    if length or sparse:
        name = "Async" * config.scheduler_config.async_scheduling + "Sparse" * sparse + "DraftLength" * length + "Scheduler"
        config.scheduler_config.scheduler_cls = PATH + ("sparse_scheduler." if sparse else "scheduler.") + name
