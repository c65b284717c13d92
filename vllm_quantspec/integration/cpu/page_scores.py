"""Sparse drafts on the CPU engine: what verification leaves of each old page, and what is chosen by it. One per worker.

    the target's layers, decode and verification rows    `PageScores.of_layer` -> each page's mass in each row
    head of the drafts                                   `PageScores.select` -> the pages that every draft step reads
    the draft's layers                                   `PageSelection.of_layer`

Scores are made anew in each step, as large as the pages of its requests; `cpu_page_selection` specifies the choice. What a
prompt's rows attend to is not scored: in the cycle after a prompt's last chunk its request reads everything.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from vllm_quantspec import sparse_policy
from vllm_quantspec.config import DraftBudget, draft_budget
from vllm_quantspec.format import PageFormat, window_start
from vllm_quantspec.integration.cpu import llvm_scan
from vllm_quantspec.integration.draft.read_share import ReadShare, labels_of
from vllm_quantspec.integration.draft.sparse import log_budget, may_pay, min_pages_of_batch, number_layers, tell_layers
from vllm_quantspec.kernels import cpu_page_selection
from vllm_quantspec.kernels.cpu_decode import ScoresOut
from vllm_quantspec.kernels.cpu_page_selection import PageSelection

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_quantspec.integration.draft.model import DraftModel

llvm_scan.install()  # cpu_decode has loaded Numba


class PageScores:
    """The state of sparse drafts in one worker of a CPU engine.

    ``plain`` is as of `gpu.sparse_drafts.SparseDrafts`, where it saves launches: there are none here.

    Args:
        num_layers: L, the target's attention layers, numbered by `number_layers`.
        selection: as of `QuantSpecOptions.draft_selection`.
        min_total_pages: a batch with fewer old pages is read as a whole.
        max_requests: the most in a batch. max_pages: the most of a request.
        labels: as of `ReadShare`.
    """

    plain = False

    def __init__(
        self,
        fmt: PageFormat,
        num_layers: int,
        budget: DraftBudget,
        selection: str,
        *,
        min_total_pages: int = 0,
        max_requests: int,
        max_pages: int,
        labels: tuple[str, str] | None = None,
    ) -> None:
        self.fmt, self.num_layers, self.selection = fmt, num_layers, selection
        self._limits = {**budget._asdict(), "min_total_pages": min_total_pages}
        # What SnapKV has chosen is kept whatever the batch is, and ends with a step that does not score the request.
        self._min_scored = budget.min_scored_pages, 0 if selection == "snapkv" else min_total_pages
        self.share = ReadShare(labels)
        self._scores: torch.Tensor | None = None
        self._begin = self._num_scored = torch.zeros(0, dtype=torch.int32)
        self._reads_all = torch.zeros(0, dtype=torch.bool)
        self._snap = _Snapshots(num_layers, fmt.num_kv_heads, max_requests, max_pages) if selection == "snapkv" else None

    # --- Verification ---

    def begin_step(self, requests: Sequence[str], reading_all: Container[str]) -> None:
        """Before a step of the target, whose requests these are, in its order: the drafts of some shall read everything."""
        self._reads_all = torch.tensor([name in reading_all for name in requests], dtype=torch.bool)

    def start_step(self, query_start_loc: torch.Tensor, seq_lens: torch.Tensor) -> None:
        """A step of the target begins, of whose requests these are scored if they are long enough: its decode and
        verification rows.

        Args:
            query_start_loc: int32 [R + 1]; seq_lens: int32 [R], the step's tokens included. R may be 0.
        """
        slots = sparse_policy.NEVER  # as many as there are pages
        reads_all = self._reads_all[: len(seq_lens)]
        reads_all = nn.functional.pad(reads_all, (0, len(seq_lens) - len(reads_all)))  # a step that was not announced
        self._begin, self._num_scored = cpu_page_selection.scored_pages(
            self.fmt, query_start_loc, seq_lens, slots, *self._min_scored, reads_all
        )
        self._scores = None
        slots = int(self._num_scored.sum())
        if slots and self.selection != "window":
            rows = int(query_start_loc.diff().max())
            self._scores = torch.empty(self.num_layers, self.fmt.num_kv_heads, slots, rows)

    def of_layer(self, layer: int) -> ScoresOut | None:
        """Where this layer's attention leaves the scores of the step; None if nothing is scored."""
        return None if self._scores is None else ScoresOut(self._scores[layer], self._begin, self._num_scored)

    # --- Drafts ---

    def select(
        self, num_rows: torch.Tensor, block_table: torch.Tensor, requests: Sequence[str], computing_prompt: torch.Tensor
    ) -> PageSelection | None:
        """The pages that the drafts after the last step read; None if that is all of them.

        Args:
            num_rows: int [R], how many of each request's query tokens are verified by now.
            block_table: int32 [R, any], page ids. requests: the ids of the batch's requests.
            computing_prompt: bool [R], requests whose prompt is not computed yet: nobody takes their drafts.
        """
        missing = len(num_rows) - len(self._num_scored)  # rows of prompts, which come last
        begin, num_scored = (nn.functional.pad(x, (0, missing)) for x in (self._begin, self._num_scored))
        num_scored = num_scored * ~computing_prompt
        if self._snap is not None:
            return self._snap.select(self._scores, begin, num_scored, num_rows, block_table, requests, self._limits)
        count, dense_from = cpu_page_selection.plan_selection(num_scored, **self._limits)
        if not count.any():
            return None
        slots = int((begin + count).max())
        page_list = torch.empty(self.num_layers, self.fmt.num_kv_heads, slots, dtype=torch.int32)
        cpu_page_selection.select_pages(self._scores, begin, num_rows, count, dense_from, block_table, page_list)
        return PageSelection(page_list, begin, count, dense_from)

    def count_reading(self, selection: PageSelection | None, lengths: torch.Tensor, steps: int) -> None:
        """Take a cycle into `share`: ``lengths`` int [R], verified tokens of the requests that are drafted for."""
        old = int((window_start(lengths, self.fmt.group_size) // self.fmt.group_size).sum())
        left_out = int((selection.dense_from - selection.count).sum()) if selection else 0
        self.share.add(old - left_out, old, steps)

    def forget(self, requests: Container[str]) -> None:
        """Requests that compute their prompt again, or are gone."""
        if self._snap is not None:
            self._snap.forget(requests)


class _Snapshots:
    """SnapKV's choice, made once after the prompt: the state of `cpu_page_selection.plan_snapkv`, a row per request."""

    def __init__(self, num_layers: int, num_kv_heads: int, max_requests: int, max_pages: int) -> None:
        self.pages = torch.zeros(max_requests, dtype=torch.int32)
        self.counts = torch.zeros(max_requests, dtype=torch.int32)
        self.chosen = torch.zeros(num_layers, num_kv_heads, max_requests, -(-max_pages // 32), dtype=torch.int32)
        self.row_of: dict[str, int] = {}
        self._free = list(range(max_requests))

    def select(self, scores, begin, num_scored, num_rows, block_table, requests, limits) -> PageSelection | None:
        rows = torch.tensor(self._rows(requests), dtype=torch.int32)
        count, dense_from, fresh = cpu_page_selection.plan_snapkv(num_scored, rows, self.pages, self.counts, **limits)
        if not count.any():
            return None
        page_list = torch.empty(*self.chosen.shape[:2], int((begin + count).max()), dtype=torch.int32)
        cpu_page_selection.select_snapkv(
            scores, begin, num_rows, count, dense_from, fresh, rows, self.chosen, block_table, page_list
        )
        return PageSelection(page_list, begin, count, dense_from)

    def _rows(self, requests: Sequence[str]) -> list[int]:
        """Each request's row; one that is new takes a free one, or that of a request which is not in the batch."""
        new = [name for name in requests if name not in self.row_of]
        if len(new) > len(self._free):
            waiting = [name for name in self.row_of if name not in set(requests)]
            self.forget(set(waiting[: len(new) - len(self._free)]))
        for name in new:
            self.row_of[name] = self._free.pop()
        return [self.row_of[name] for name in requests]

    def forget(self, requests: Container[str]) -> None:
        for name in [name for name in self.row_of if name in requests]:
            row = self.row_of.pop(name)
            self.pages[row] = self.counts[row] = 0
            self._free.append(row)


def make_page_scores(
    vllm_config: VllmConfig, target_model: nn.Module, draft: DraftModel, layers: dict[str, nn.Module]
) -> PageScores | None:
    """What an engine of these options needs; None if its drafts read everything."""
    config = vllm_config.speculative_config
    budget = draft_budget(config.draft_context, config.group_size)
    if budget is None:
        return None
    num_layers = number_layers(draft, layers)
    fmt = layers[next(iter(draft.attention_layers))].impl.settings.format
    min_total = min_pages_of_batch(vllm_config, target_model, draft, fmt)
    labels = labels_of(vllm_config)
    pays = may_pay(vllm_config, fmt, min_total)
    if labels:
        log_budget(config.draft_context, config.draft_selection, min_total * fmt.group_size if pays else None)
    if not pays:
        return None
    page_scores = PageScores(
        fmt,
        num_layers,
        budget,
        config.draft_selection,
        min_total_pages=min_total,
        max_requests=vllm_config.scheduler_config.max_num_seqs,
        max_pages=-(-vllm_config.model_config.max_model_len // fmt.group_size),
        labels=labels,
    )
    tell_layers(draft, layers, page_scores)
    return page_scores
