"""Where sparse drafts pay: a model of a cycle in bytes read. For ``draft_context: auto``. No vLLM import.

A cycle is ``num_speculative_tokens`` draft steps and a verification. A draft step reads the draft's weights and the old
tokens' 4 bits, a verification the target's weights and all bits of the old tokens; T is the number of old tokens of all
requests together. Reading only a fraction f of them saves bytes of each draft step, and costs some acceptance, that is a
share of what the cycle brings:

    cycle(T) = drafts * (draft weights + draft KV * T) + target weights + target KV * T
    saved(T) = drafts * draft KV * T * (1 - f)
    sparse drafts pay if saved(T) > LOST_TOKENS * cycle(T)

Both are linear in T, so they pay from some T on, or never.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

# The share of a cycle's expected tokens that sparse drafts lose. Where drafts read a sixteenth, 5 drafts bring 4.82 tokens
# instead of 5.12, 8 bring 6.36 instead of 6.96 (books-30m, 32k tokens, benchmarks/results/sparse_acceptance-books-30m.json).
LOST_TOKENS = 0.07
# More pages than there can be, in an int32.
NEVER = 2**31 - 1


@dataclass(frozen=True)
class CycleBytes:
    """What a cycle reads, as of `min_total_pages`."""

    draft_weight_bytes: float
    target_weight_bytes: float
    draft_kv_bytes: float
    target_kv_bytes: float


def min_total_pages(
    *,
    draft_weight_bytes: float,
    target_weight_bytes: float,
    draft_kv_bytes: float,
    target_kv_bytes: float,
    num_speculative_tokens: int,
    fraction: float,
    group_size: int,
) -> int:
    """Old pages of all requests of a batch together from which on sparse drafts pay; `NEVER` if they do not at any length.

    Args:
        draft_weight_bytes, target_weight_bytes: that a step reads, of one worker.
        draft_kv_bytes, target_kv_bytes: of a token that a draft step and a verification read, of all layers of one worker.
        fraction: of the old tokens that sparse drafts read, 0 to 1.
        group_size: tokens of a page.
    """
    drafts = num_speculative_tokens
    per_token = drafts * draft_kv_bytes * (1 - fraction) - LOST_TOKENS * (drafts * draft_kv_bytes + target_kv_bytes)
    if per_token <= 0:
        return NEVER
    tokens = LOST_TOKENS * (drafts * draft_weight_bytes + target_weight_bytes) / per_token
    return min(math.ceil(tokens / group_size), NEVER)


def chosen_pages(
    old_pages: np.ndarray, *, pages: int, fraction: float, min_pages: int, min_scored_pages: int, min_total_pages: int
) -> np.ndarray:
    """What `cpu_page_selection.scored_pages` and then `plan_selection` come to, of numbers that the host has.

    A request with more old pages is never read as a whole where it would not be with fewer: bounds give a bound.

    Args:
        old_pages: int [R], pages below each request's exact window; 0 for one that is not scored.
        pages, fraction, min_pages: as of `config.DraftBudget`.
        min_scored_pages, min_total_pages: a request with fewer, and a batch with fewer in such requests, is read as a whole.

    Returns:
        int64 [R], pages that each request's drafts choose; 0 for all.
    """
    scored = np.where(old_pages >= max(min_scored_pages, 1), old_pages, 0).astype(np.int64)
    budget = np.maximum(np.ceil(scored * fraction), pages).astype(np.int64)
    sparse = (scored >= max(min_pages, 1)) & (budget < scored) & (scored.sum() >= min_total_pages)
    return np.where(sparse, budget, 0)
