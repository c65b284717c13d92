"""How much of the cache sparse drafts read."""

from __future__ import annotations

import math
from dataclasses import asdict

from vllm_quantspec import sparse_policy
from vllm_quantspec.config import draft_budget
from vllm_quantspec.estimate.draft_weights import draft_bytes
from vllm_quantspec.estimate.sizes import Model
from vllm_quantspec.format import PageFormat, window_start


def cycle_bytes(
    model: Model, tensor_parallel_size: int, group_size: int, page_bits: int, draft_experts: str, wide_share: float = 0.0
) -> sparse_policy.CycleBytes:
    """What the policy of sparse drafts goes by, of one of so many GPUs. Arguments as of `speed`."""
    tp = tensor_parallel_size
    fmt = PageFormat(max(1, model.num_kv_heads // tp), model.head_size, group_size, model.dtype, page_bits)
    read, in_int4 = model.weights - model.embedding_weights, model.int4_weights(draft_experts)
    return sparse_policy.CycleBytes(
        draft_weight_bytes=(draft_bytes(model, draft_experts, wide_share) + (read - in_int4) * model.dtype.itemsize) / tp,
        target_weight_bytes=(model.weight_bytes - model.embedding_weights * model.dtype.itemsize) / tp,
        draft_kv_bytes=model.num_layers * fmt.bytes_per_token(4),
        target_kv_bytes=model.num_layers * fmt.bytes_per_token(),
    )


def draft_share(
    model: Model,
    context: int,
    batch: int,
    tensor_parallel_size: int,
    group_size: int,
    num_speculative_tokens: int,
    page_bits: int,
    draft_context: str | int | float,
    draft_experts: str,
    wide_share: float = 0.0,
) -> float:
    """The share of the old tokens of ``batch`` requests of ``context`` tokens each that a draft step reads, 0 to 1."""
    budget, old = draft_budget(draft_context, group_size), window_start(context, group_size) // group_size
    if budget is None or not old:
        return 1.0
    least = 0
    if draft_context == "auto":
        least = sparse_policy.min_total_pages(
            **asdict(cycle_bytes(model, tensor_parallel_size, group_size, page_bits, draft_experts, wide_share)),
            num_speculative_tokens=num_speculative_tokens,
            fraction=budget.fraction,
            group_size=group_size,
        )
    chosen = max(budget.pages, math.ceil(budget.fraction * old))
    return 1.0 if old < budget.min_pages or chosen >= old or old * batch < least else chosen / old
