"""Names the scheduler that chooses the number of drafts (``num_speculative_tokens: auto``), without importing it."""

from __future__ import annotations

from vllm.config import VllmConfig

PATH = "vllm_quantspec.integration.draft.scheduler."


def use_scheduler(config: VllmConfig) -> None:
    """Set ``scheduler_cls`` of an engine whose number of drafts is chosen while running; leave others as they are."""
    if getattr(config.speculative_config, "chooses_number", False):
        name = "AsyncDraftLengthScheduler" if config.scheduler_config.async_scheduling else "DraftLengthScheduler"
        config.scheduler_config.scheduler_cls = PATH + name
