"""CUDA graphs for every number of drafts that a step may have.

vLLM captures them for the numbers in its schedule by batch size, as far as ``max_num_seqs`` reaches into it. Where the
number is chosen while running (``num_speculative_tokens: auto``) the batch size says nothing: all numbers need graphs.
"""

from __future__ import annotations

from vllm.config import VllmConfig
from vllm.v1.spec_decode.dynamic.utils import build_dynamic_sd_schedule_lookup

from vllm_quantspec.config import AUTO_SCHEDULE


def with_every_number(build_lookup):
    """``build_dynamic_sd_schedule_lookup``, long enough for every number of `AUTO_SCHEDULE`; other schedules as before."""

    def build_lookup_of_every_number(schedule, vllm_max_batch_size: int, vllm_num_speculative_tokens: int) -> list[int]:
        if [tuple(entry) for entry in schedule] == [tuple(entry) for entry in AUTO_SCHEDULE]:
            vllm_max_batch_size = max(vllm_max_batch_size, len(AUTO_SCHEDULE))
        return build_lookup(schedule, vllm_max_batch_size, vllm_num_speculative_tokens)

    return build_lookup_of_every_number


def numbers_of_drafts(config: VllmConfig, max_num_reqs: int) -> list[int]:
    """Numbers of drafts above 0 that a step of an engine with a schedule may have, descending."""
    lookup = with_every_number(build_dynamic_sd_schedule_lookup)(
        config.speculative_config.num_speculative_tokens_per_batch_size, max_num_reqs, config.num_speculative_tokens
    )
    return sorted(set(lookup) - {0}, reverse=True)
