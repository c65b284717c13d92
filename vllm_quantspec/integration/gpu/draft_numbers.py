"""CUDA graphs for every number of drafts that a step may have.

vLLM captures them for the numbers in its schedule by batch size, as far as ``max_num_seqs`` reaches into it. Where the
number is chosen while running (``num_speculative_tokens: auto``) the batch size says nothing: all numbers need graphs.
"""

from __future__ import annotations

from vllm.config import VllmConfig
from vllm.v1.spec_decode.dynamic.utils import build_dynamic_sd_schedule_lookup

from vllm_quantspec.config import AUTO_NUMBERS, AUTO_SCHEDULE, NGRAM_SCHEDULE


def is_chosen(schedule) -> bool:
    """Whether a schedule is one of those that stand for a number of drafts chosen while running."""
    return [list(entry) for entry in schedule] in (AUTO_SCHEDULE, NGRAM_SCHEDULE)


def with_every_number(build_lookup):
    """``build_dynamic_sd_schedule_lookup``, long enough for every number that is chosen from; other schedules as before."""

    def build_lookup_of_every_number(schedule, vllm_max_batch_size: int, vllm_num_speculative_tokens: int) -> list[int]:
        if is_chosen(schedule):
            vllm_max_batch_size = max(vllm_max_batch_size, len(schedule))
        return build_lookup(schedule, vllm_max_batch_size, vllm_num_speculative_tokens)

    return build_lookup_of_every_number


def numbers_of_drafts(config: VllmConfig, max_num_reqs: int) -> list[int]:
    """Numbers of the model's drafts above 0 that a step of an engine with a schedule may have, descending."""
    schedule = config.speculative_config.num_speculative_tokens_per_batch_size
    if is_chosen(schedule):  # n-grams need no graph of drafts
        return sorted(set(AUTO_NUMBERS) - {0}, reverse=True)
    lookup = build_dynamic_sd_schedule_lookup(schedule, max_num_reqs, config.num_speculative_tokens)
    return sorted(set(lookup) - {0}, reverse=True)
