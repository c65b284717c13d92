"""What sparse drafts need on any engine: numbers for the layers, where ``auto`` begins to pay, and what the log says of it.

Where scores are kept and pages are chosen is the engine's own: ``cpu/page_scores.py``, ``gpu/sparse_drafts.py``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from vllm_quantspec import sparse_policy
from vllm_quantspec.config import draft_budget
from vllm_quantspec.integration.draft.loaded import loaded_bytes

if TYPE_CHECKING:
    from collections.abc import Collection

    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput

    from vllm_quantspec.format import PageFormat
    from vllm_quantspec.integration.draft.model import DraftModel

logger = init_logger("vllm.quantspec.sparse")

# An attribute of vLLM's SchedulerOutput that is ours: it travels to all workers, as everything that is in there.
READING_ALL = "quantspec_reading_all"


def let_read_all(scheduler_output: SchedulerOutput, requests: Collection[str]) -> None:
    """Tell the workers: the drafts that follow this step read everything of these requests, by name."""
    if requests:
        setattr(scheduler_output, READING_ALL, frozenset(requests))


def reading_all(scheduler_output: SchedulerOutput) -> frozenset[str]:
    """What the scheduler has told by `let_read_all`."""
    return getattr(scheduler_output, READING_ALL, frozenset())


def number_layers(draft: DraftModel, layers: dict[str, nn.Module]) -> int:
    """Give each attention layer of the target, and the draft's on it, its number in scores and page lists; how many.

    Args:
        layers: {name: layer}, the engine's static forward context.
    """
    for number, names in enumerate(draft.attention_layers.items()):
        for name in names:
            layers[name].impl.settings = replace(layers[name].impl.settings, layer=number)
    return len(draft.attention_layers)


def tell_layers(draft: DraftModel, layers: dict[str, nn.Module], page_scores: Any) -> None:
    """Let the metadata of all these layers carry ``page_scores``, the engine's own (`QuantSpecMetadata.page_scores`)."""
    for names in draft.attention_layers.items():
        for name in names:
            layers[name].impl.page_scores = page_scores


def min_pages_of_batch(vllm_config: VllmConfig, target_model: nn.Module, draft: DraftModel, fmt: PageFormat) -> int:
    """`sparse_policy.min_total_pages` of this worker with ``draft_context: auto``; 0 with a context that the user chose."""
    config = vllm_config.speculative_config
    if config.draft_context != "auto":
        return 0
    layers, target = len(draft.attention_layers), read_bytes(target_model)
    return sparse_policy.min_total_pages(
        draft_weight_bytes=target - draft.target_bytes + draft.int4_bytes,
        target_weight_bytes=target,
        draft_kv_bytes=layers * fmt.bytes_per_token(8 if config.draft_kv == "int8" else 4),
        target_kv_bytes=layers * fmt.bytes_per_token(),
        num_speculative_tokens=config.num_speculative_tokens,
        fraction=draft_budget("auto", fmt.group_size).fraction,
        group_size=fmt.group_size,
    )


def may_pay(vllm_config: VllmConfig, fmt: PageFormat, min_total_pages: int) -> bool:
    """Whether any batch of this engine is long enough for sparse drafts, at ``min_pages_of_batch``."""
    config = vllm_config.speculative_config
    longest = vllm_config.model_config.max_model_len // fmt.group_size - 1
    budget = draft_budget(config.draft_context, fmt.group_size)
    chosen = sparse_policy.chosen_pages(
        np.full(vllm_config.scheduler_config.max_num_seqs, max(0, longest)),
        min_scored_pages=budget.min_scored_pages,
        min_total_pages=min_total_pages,
        **budget._asdict(),
    )
    return bool(chosen.any())


def read_bytes(model: nn.Module) -> int:
    """Bytes of this worker's weights that a step of ``model`` reads: all but an input embedding beside the output layer.

    All experts of a mixture count, though a step reads some: sparse drafts then begin at longer contexts than they could.
    """
    modules = list(model.modules())
    has_head = any(isinstance(module, ParallelLMHead) for module in modules)
    total = 0
    for module in modules:
        if isinstance(module, VocabParallelEmbedding) and has_head and not isinstance(module, ParallelLMHead):
            continue
        if isinstance(module, LinearBase | VocabParallelEmbedding):
            total += loaded_bytes(module)
        else:
            total += sum(weight.nbytes for weight in module.parameters(recurse=False))
    return total


def log_budget(draft_context: str | int | float, selection: str, min_tokens: int | None) -> None:
    """Say at start what drafts will read, ``min_tokens`` being those of a batch from which on they read less than all (None:
    no batch of this engine has as many)."""
    if min_tokens is None:
        logger.info("Sparse drafts would not pay at any length that this engine has: drafts read the whole cache")
    else:
        beginning = f", from {min_tokens} tokens of a batch on" if min_tokens else ""
        logger.info("Sparse drafts: draft_context %s, pages chosen by %s%s", draft_context, selection, beginning)
