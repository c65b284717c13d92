"""What a step's attention is told: the batch, once per KV cache group, and the settings of a layer, once per engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from vllm_quantspec.format import PageFormat

# The exact window of an attention layer is a KV cache layer of its own, named like it.
WINDOW_SUFFIX = ".window"


@dataclass(frozen=True)
class LayerSettings:
    """What does not change from step to step.

    draft_bits: bits of a page that the draft reads, 4 or 8; the target reads all that there are, ``format.bits``.
    max_unverified: the most drafts that a step may hold for one request.
    fa_version: version of FlashAttention, which a GPU's prefill uses; None on the CPU.
    layer: the layer's number in the scores and page lists of sparse drafts; the draft's layer has its target layer's.
    """

    format: PageFormat
    num_heads: int
    scale: float
    draft_bits: int
    max_unverified: int
    fa_version: int | None
    layer: int = 0


@dataclass
class QuantSpecMetadata:
    """One step's batch, decode and verification rows first (the runner reorders).

    ``query_start_loc`` [num_reqs + 1] and ``seq_lens`` [num_reqs] int32 count the step's own tokens;
    ``num_unverified`` [num_reqs] int32 of a request's query tokens, its last ones, are drafts. On a GPU the tensors are
    the runner's persistent buffers, so a captured CUDA graph replays with later contents; ``max_query_len`` of the
    decode rows and ``prefill`` (the plan of the others, if any) are fixed at capture.
    """

    num_actual_tokens: int
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    num_unverified: torch.Tensor
    block_table: torch.Tensor
    num_decodes: int
    num_decode_tokens: int
    max_query_len: int = 1
    prefill: Any = None
    # Sparse drafts, None without and in a plain step (`gpu.step_graphs`): where the target's layers leave what each page
    # weighs, and the pages that the draft's layers read. On a GPU the first is `gpu.sparse_drafts.SparseDrafts`, which says
    # both; on a CPU they are `cpu.page_scores.PageScores` and, of metadata of a draft step, a `PageSelection` of all layers.
    page_scores: Any = None
    selection: Any = None
    # What a platform works out once per step and reuses in all layers.
    shared: dict[str, Any] = field(default_factory=dict, repr=False)


@dataclass
class WindowMetadata:
    block_table: torch.Tensor
