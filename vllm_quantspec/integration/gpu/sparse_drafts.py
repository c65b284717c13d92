"""Sparse drafts on an NVIDIA GPU: the buffers between verification and the drafts, and what is launched where.

    verification, in every layer   decode attention leaves raw masses, `reduce_scores` makes the layer's scores of them
    head of the drafts' graph      `choose`: how many pages, and which, of every request, layer and KV head
    a draft step, in every layer   decode attention reads the layer's list

Everything is decided on the device (design rule 6); `reduce_scores` and `page_selection` are the kernels. A step's scores
are used by the drafts that follow it and by nothing else: no request keeps any (SnapKV's choice, a baseline, is kept by the
request's row).

Memory (design rule 5): one slot for each page that the step's requests read, of all together. There are no more slots than
the pool can hold pages, and all are allocated before vLLM measures what is left for the pool. Where requests share
prefixes they may read more pages than the pool has; those that find no slots have drafts that read everything.

Steps in which no request can have sparse drafts are plain: with ``draft_context: auto`` they launch nothing of this, in
graphs of their own (`step_graphs`).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_quantspec import sparse_policy
from vllm_quantspec.config import draft_budget
from vllm_quantspec.integration.cache.metadata import LayerSettings, QuantSpecMetadata
from vllm_quantspec.integration.draft.model import DraftModel
from vllm_quantspec.integration.draft.read_share import ReadShare, labels_of
from vllm_quantspec.integration.draft.sparse import log_budget, may_pay, min_pages_of_batch, number_layers, tell_layers
from vllm_quantspec.kernels import cpu_page_selection, page_selection, reduce_scores, snapkv
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

    ``plain`` says of the present step, from `begin_step` on, that none of its requests has sparse drafts: its metadata then
    carry no page scores. Always False where not ``has_plain_steps``.
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
        budget = draft_budget(config.draft_context, group)
        self.limits = budget._asdict() | {"min_total_pages": min_total_pages}
        self.share = ReadShare(labels)
        self.min_scored_pages = budget.min_scored_pages
        # What SnapKV has chosen is kept whatever the batch is, and ends with a step that does not score the request.
        self.min_scored_total = 0 if self.policy == "snapkv" else min_total_pages
        slots = min(requests * self.max_pages, pages_of_pool(vllm_config, num_layers, heads * fmt.head_bytes, device))

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        # With a budget that the user chose nearly all steps are sparse: graphs of other ones would be memory for nothing.
        # What SnapKV has chosen ends with a step that is seen not to score the request.
        self.has_plain_steps = config.draft_context == "auto" and self.policy != "snapkv"
        self.plain = False
        self.begin, self.num_scored, self.num_rows, self.count, self.dense_from = (zeros(requests) for _ in range(5))
        self.reads_all = zeros(requests)  # 1 for requests that are not scored, whatever their length
        self._any_reads_all, self._not_scored = False, np.zeros((), dtype=bool)  # the same on the host, of the step's
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
        names = ("begin", "num_scored", "num_rows", "count", "dense_from", "reads_all", "snap_pages", "snap_count", "fresh")
        self._state = {name: getattr(self, name) for name in names if hasattr(self, name)}
        logger.debug(
            "Sparse drafts: %d MiB for %d pages per layer",
            sum(x.numel() * x.element_size() for x in buffers) // MIB,
            slots,
        )

    def keep_with(self, model: nn.Module) -> None:
        """Make what a step leaves for the next one buffers of ``model``, which vLLM brings through sleep level 2.

        The memory of all else is given away then, and comes back with anything in it. Scores and lists are written before
        they are read.
        """
        for name, tensor in self._state.items():
            model.register_buffer(f"quantspec_{name}", tensor, persistent=False)

    def begin_step(self, requests: Sequence[str], most_tokens: np.ndarray, reading_all: Collection[str]) -> None:
        """Once per step, on the host, before its metadata are built and its graph is replayed.

        Args:
            requests: names of the batch's requests, in its order.
            most_tokens: int [num_reqs], what each of them has at most, the step's own tokens and all drafts included.
            reading_all: names of requests whose drafts shall read everything.
        """
        flags = np.zeros(len(self.reads_all), dtype=np.int32)
        if reading_all:
            flags[: len(requests)] = [name in reading_all for name in requests]
        if self._any_reads_all or flags.any():  # a graph reads them: written in place, on the runner's stream
            async_tensor_h2d(flags, out=self.reads_all)
            self._any_reads_all = bool(flags.any())
        self._not_scored = flags[: len(requests)] != 0
        self.plain = self.has_plain_steps and not self._chosen_at_most(most_tokens, np.zeros(len(requests), bool)).any()

    def _chosen_at_most(self, lengths: np.ndarray, not_scored: np.ndarray) -> np.ndarray:
        """`sparse_policy.chosen_pages` of the step's requests; of shorter ones the device chooses none where this is 0."""
        pages = np.maximum(lengths // self.format.group_size - 1, 0)
        scored = np.where(self._not_scored | not_scored, 0, pages)
        return sparse_policy.chosen_pages(scored, min_scored_pages=self.min_scored_pages, **self.limits)

    def prepare(self, md: QuantSpecMetadata) -> None:
        """Once per step: which requests are scored, and where."""
        n = md.num_decodes
        scored_pages(
            self.format,
            md.query_start_loc[: n + 1],
            md.seq_lens[:n],
            self.begin,
            self.num_scored,
            reads_all=self.reads_all,
            num_slots=self.page_list.shape[2],
            min_pages=self.min_scored_pages,
            min_total_pages=self.min_scored_total,
        )

    def reduce(self, md: QuantSpecMetadata, layer: int) -> None:
        n, out = md.num_decodes, self.scores_out
        reduce_scores.reduce_scores(
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
        pages = np.maximum(lengths // self.format.group_size - 1, 0)
        chosen = self._chosen_at_most(lengths, np.zeros_like(from_prompt) if self.policy == "window" else from_prompt)
        self.share.add(int(np.where(chosen > 0, chosen, pages).sum()), int(pages.sum()), steps)

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
            begin, pages = cpu_page_selection.scored_pages(
                self.format,
                starts,
                seq_lens,
                self.page_list.shape[2],
                self.min_scored_pages,
                self.min_scored_total,
                self.reads_all[:num_reqs],
            )
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


def of_engine(vllm_config: VllmConfig) -> SparseDrafts | None:
    """What `make` has told the engine's layers."""
    layers = vllm_config.compilation_config.static_forward_context.values()
    found = (getattr(getattr(layer, "impl", None), "page_scores", None) for layer in layers)
    return next((x for x in found if x is not None), None)


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
    pays = may_pay(vllm_config, settings.format, min_total)
    if labels:
        min_tokens = min_total * settings.format.group_size if pays else None
        log_budget(config.draft_context, config.draft_selection, min_tokens)
    if not pays:
        return None
    sparse = SparseDrafts(vllm_config, settings, num_layers, min_total, device, labels=labels)
    sparse.keep_with(draft.model)
    tell_layers(draft, layers, sparse)
    return sparse
