"""Sparse drafts on an NVIDIA GPU: the buffers between verification and the drafts, and what is launched where.

    verification, in every layer   decode attention leaves raw masses, `reduce_scores` makes the layer's scores of them
    head of the drafts' graph      `choose`: how many pages, and which, of every request, layer and KV head
    a draft step, in every layer   decode attention reads the layer's list

Everything is decided on the device (design rule 6); `page_selection` has the kernels. A step's scores are used by the
drafts that follow it and by nothing else: no request keeps any (SnapKV's choice, a baseline, is kept by the request's row).

Memory (design rule 5): one slot for each page that the step's requests read, of all together. There are no more slots than
the pool can hold pages, and all are allocated before vLLM measures what is left for the pool. Where requests share
prefixes they may read more pages than the pool has; those that find no slots have drafts that read everything.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.logger import init_logger

from vllm_quantspec.config import draft_budget
from vllm_quantspec.integration.cache.metadata import LayerSettings, QuantSpecMetadata
from vllm_quantspec.integration.draft.model import DraftModel
from vllm_quantspec.integration.draft.read_share import ReadShare, labels_of
from vllm_quantspec.integration.draft.sparse import log_budget, min_pages_of_batch, number_layers, tell_layers
from vllm_quantspec.kernels import cpu_page_selection, page_selection, snapkv
from vllm_quantspec.kernels.cpu_page_selection import PageSelection
from vllm_quantspec.kernels.decode_attention import ScoresOut, raw_rows
from vllm_quantspec.kernels.scored_pages import scored_pages

logger = init_logger("vllm.quantspec.sparse_drafts")
MIB = 1 << 20


class SparseDrafts:
    """Buffers and launches of one engine's sparse drafts.

    Args:
        settings: of the layers, which are all alike.
        num_layers: of the target, numbered by `number_layers`.
        min_total_pages: a batch with fewer old pages is read as a whole.
        labels: as of `ReadShare`.

    Raises:
        ValueError: requests of this model's length have more pages than the selection can hold.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        settings: LayerSettings,
        num_layers: int,
        min_total_pages: int,
        device: torch.device,
        *,
        labels: tuple[str, str] | None = None,
    ) -> None:
        config, fmt = vllm_config.speculative_config, settings.format
        self.policy = config.draft_selection
        self.format = fmt
        group, heads, drafts = fmt.group_size, fmt.num_kv_heads, config.num_speculative_tokens
        requests, longest = vllm_config.scheduler_config.max_num_seqs, vllm_config.model_config.max_model_len
        self.max_pages = -(-longest // group)
        if self.max_pages > page_selection.MAX_PAGES:
            raise ValueError(
                f"quantspec: draft_context {config.draft_context!r} chooses among at most {page_selection.MAX_PAGES} pages "
                f"of {group} tokens, but --max-model-len is {longest}; set draft_context to 'all'."
            )
        budget = draft_budget(config.draft_context, group)
        self.limits = budget._asdict() | {"min_total_pages": min_total_pages}
        self.share = ReadShare(labels)
        self.min_scored_pages = budget.min_scored_pages
        # What SnapKV has chosen is kept whatever the batch is, and ends with a step that does not score the request.
        self.min_scored_total = 0 if self.policy == "snapkv" else min_total_pages
        slots = min(requests * self.max_pages, pages_of_pool(vllm_config, num_layers, heads * fmt.head_bytes, device))

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.begin, self.num_scored, self.num_rows, self.count, self.dense_from = (zeros(requests) for _ in range(5))
        self.page_list = zeros(num_layers, heads, slots)
        buffers = [self.page_list]
        self.scores = self.scores_out = self.snap = None
        if self.policy != "window":
            per_head = settings.num_heads // heads
            rows = raw_rows(fmt.head_size, fmt.group_size, (drafts + 1) * per_head)
            self.scores = zeros(num_layers, heads, slots, drafts + 1, dtype=torch.bfloat16)
            lse = zeros(requests * (drafts + 1), settings.num_heads, dtype=torch.float32)
            raw = zeros(slots, heads, 2, rows, 2, dtype=torch.float32)
            flags = zeros(slots, heads, rows // 8, dtype=torch.uint8)
            self.scores_out = ScoresOut(raw, flags, lse, self.begin, self.num_scored)
            buffers += [self.scores, lse, raw, flags]
        if self.policy == "snapkv":
            self.snap = zeros(num_layers, heads, requests, -(-self.max_pages // 32))
            self.snap_pages, self.snap_count, self.fresh = (zeros(requests) for _ in range(3))
            buffers += [self.snap]
        logger.debug(
            "Sparse drafts: %d MiB for %d pages per layer",
            sum(x.numel() * x.element_size() for x in buffers) // MIB,
            slots,
        )

    def prepare(self, md: QuantSpecMetadata) -> None:
        """Once per step: which requests are scored, and where."""
        n = md.num_decodes
        scored_pages(
            self.format,
            md.query_start_loc[: n + 1],
            md.seq_lens[:n],
            self.begin,
            self.num_scored,
            num_slots=self.page_list.shape[2],
            min_pages=self.min_scored_pages,
            min_total_pages=self.min_scored_total,
        )

    def reduce(self, md: QuantSpecMetadata, layer: int) -> None:
        n, out = md.num_decodes, self.scores_out
        page_selection.reduce_scores(
            out.raw,
            out.flags,
            out.lse,
            md.query_start_loc[: n + 1],
            self.begin,
            self.num_scored,
            self.scores[layer],
            max_pages=self.max_pages,
        )

    def selection(self, layer: int) -> PageSelection:
        return PageSelection(self.page_list[layer], self.begin, self.count, self.dense_from)

    def set_verified_rows(self, query_start_loc: torch.Tensor, num_rejected: torch.Tensor) -> None:
        """How many of each request's query tokens are verified: ``query_start_loc`` [R+1], ``num_rejected`` [R] int32."""
        n = num_rejected.shape[0]
        torch.sub(query_start_loc.diff(), num_rejected, out=self.num_rows[:n])

    def count_reading(self, lengths: np.ndarray, from_prompt: np.ndarray, steps: int) -> None:
        """Take a cycle of ``steps`` draft steps into `share`: from numbers that the host has, so it is not quite exact.

        Args:
            lengths: int [num_reqs], tokens of each request, or a few more. from_prompt: bool, requests that are not scored.
        """
        group, limits = self.format.group_size, self.limits
        pages = np.maximum(lengths // group - 1, 0)
        scored = pages if self.policy == "window" else np.where(from_prompt, 0, pages)
        budget = np.maximum(np.ceil(scored * limits["fraction"]), limits["pages"])
        sparse = (scored >= limits["min_pages"]) & (budget < scored) & (scored.sum() >= limits["min_total_pages"])
        self.share.add(int(np.where(sparse, budget, pages).sum()), int(pages.sum()), steps)

    def forget(self) -> None:
        """The step's scores: no drafts follow it."""
        self.num_scored.zero_()

    def choose(self, num_reqs: int, seq_lens: torch.Tensor, block_table: torch.Tensor, idx_mapping: torch.Tensor) -> None:
        """Which pages the drafts that follow read; captured at the head of their graph.

        Args:
            seq_lens: int32 [num_reqs], that include the first draft step's own token.
            block_table: int32 [num_reqs, any], of pages.
            idx_mapping: int32 [num_reqs], each request's row in the runner's state.
        """
        if self.policy == "window":  # all requests, those that come from their prompt too
            starts = torch.arange(num_reqs + 1, dtype=torch.int32, device=seq_lens.device)
            begin, pages = cpu_page_selection.scored_pages(self.format, starts, seq_lens, self.page_list.shape[2])
            self.begin[:num_reqs].copy_(begin)
            self.num_scored[:num_reqs].copy_(pages)
        selection = (self.begin, self.num_rows[:num_reqs], self.count, self.dense_from)
        if self.policy == "snapkv":
            snapkv.plan_snapkv(
                self.num_scored[:num_reqs],
                idx_mapping,
                self.snap_pages,
                self.snap_count,
                self.count,
                self.dense_from,
                self.fresh,
                **self.limits,
            )
            snapkv.select_snapkv(
                self.scores,
                *selection,
                self.fresh,
                idx_mapping,
                self.snap,
                block_table,
                self.page_list,
                max_pages=self.max_pages,
            )
            return
        page_selection.plan_selection(self.num_scored[:num_reqs], self.count, self.dense_from, **self.limits)
        page_selection.select_pages(self.scores, *selection, block_table, self.page_list, max_pages=self.max_pages)


def pages_of_pool(vllm_config: VllmConfig, num_layers: int, page_bytes: int, device: torch.device) -> int:
    """An upper bound of the pages per layer that vLLM's pool will have, before vLLM knows."""
    cache = vllm_config.cache_config
    free, total = torch.cuda.mem_get_info(device)
    left = min(free, cache.gpu_memory_utilization * total)
    if cache.kv_cache_memory_bytes is not None:
        left = cache.kv_cache_memory_bytes
    pages = max(1, int(left) // (num_layers * page_bytes))
    return min(pages, cache.num_gpu_blocks_override or pages)


def make(vllm_config: VllmConfig, target_model: nn.Module, draft: DraftModel, device: torch.device) -> SparseDrafts | None:
    """For an engine with these options, or None where drafts read everything; the layers know of it then."""
    config = vllm_config.speculative_config
    if config.draft_context == "all":
        return None
    layers = vllm_config.compilation_config.static_forward_context
    num_layers = number_layers(draft, layers)
    settings = layers[next(iter(draft.attention_layers))].impl.settings
    min_total = min_pages_of_batch(vllm_config, target_model, draft, settings.format)
    labels = labels_of(vllm_config)
    if labels:
        log_budget(config.draft_context, config.draft_selection, min_total * settings.format.group_size)
    sparse = SparseDrafts(vllm_config, settings, num_layers, min_total, device, labels=labels)
    tell_layers(draft, layers, sparse)
    return sparse
