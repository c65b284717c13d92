"""Which old pages a sparse draft reads, in plain PyTorch: what the CPU engine runs and `page_selection` is checked against.

Verification reads the whole cache; it leaves, for each of its query rows, the attention mass of every old page. At the head
of the drafts the mass of the rows that turned out to be verified is summed, and each layer and KV head reads the pages
with most of it. A choice that is bad costs acceptance, never the output (design rule 1).

Shapes and names:

    scores      bf16 or fp32 [L, H, C, Q]   attention mass of a page in a query row, summed over the query heads of the KV
                                            head: 0 to Hq / H. L layers, H KV heads, C slots, Q the most rows of a request
    begin       int32 [R]   request r's pages are the slots begin[r] + page, in `scores` and in `page_list`
    num_scored  int32 [R]   pages that the last verification has scored, 0 to num_scored[r] - 1; 0: none, or no room
    num_rows    int32 [R]   of its rows, the first ones, that are verified by now
    page_list   int32 [L, H, C]   pool blocks of the chosen pages, in the order of their positions
    count       int32 [R]   how many of them, the same in every layer and head; 0: every page is read
    dense_from  int32 [R]   pages from this one on are read as well, whatever was chosen: those newer than the scores

So a draft reads page_list[l, h, begin[r] : begin[r] + count[r]], then pages dense_from[r] on, then the exact window; with
count 0 and dense_from 0 that is the whole cache.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from vllm_quantspec.format import PageFormat, window_start


class PageSelection(NamedTuple):
    """Which old pages a draft step's attention reads: of one layer, or of all, before `of_layer`.

    page_list: int32 [H, C] or [L, H, C], contiguous rows. begin, count, dense_from: int32 [R or more].
    """

    page_list: torch.Tensor
    begin: torch.Tensor
    count: torch.Tensor
    dense_from: torch.Tensor

    def of_layer(self, layer: int) -> PageSelection:
        return self._replace(page_list=self.page_list[layer])


def scored_pages(
    fmt: PageFormat,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    num_slots: int,
    min_pages: int = 0,
    min_total_pages: int = 0,
    reads_all: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where a verification step's scores go: ``begin`` and ``num_scored`` int32 [R].

    All pages that the step's first row reads are scored, of requests that have ``min_pages`` or more and 0 in ``reads_all``
    int [R] (None: in all), if those have ``min_total_pages`` together. Requests follow one another; one that does not fit
    into the ``num_slots`` slots any more, and all after it, have none.
    """
    queries = query_start_loc.diff()
    first = seq_lens - queries
    pages = window_start(first.clamp_min(0), fmt.group_size) // fmt.group_size
    pages = pages * ((queries > 0) & (pages >= min_pages))
    if reads_all is not None:
        pages = pages * (reads_all == 0)
    pages = pages * (pages.sum() >= min_total_pages)
    end = pages.cumsum(0)
    fits = end <= num_slots
    return (end - pages).int() * fits, (pages * fits).int()


def plan_selection(
    num_scored: torch.Tensor,
    *,
    pages: int,
    fraction: float,
    min_pages: int,
    min_total_pages: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """How many pages each request's drafts choose: ``count`` and ``dense_from`` int32 [R].

    A request chooses ``pages``, or ``fraction`` of those that were scored if that is more. It reads everything if it has
    fewer than ``min_pages`` scored pages, if the choice would be all of them, or if all requests together have fewer than
    ``min_total_pages``.
    """
    budget = (num_scored * fraction).ceil().int().clamp_min(pages)
    sparse = (num_scored >= max(min_pages, 1)) & (budget < num_scored) & (num_scored.sum() >= min_total_pages)
    return budget * sparse, num_scored.int() * sparse


def select_pages(
    scores: torch.Tensor | None,
    begin: torch.Tensor,
    num_rows: torch.Tensor,
    count: torch.Tensor,
    dense_from: torch.Tensor,
    block_table: torch.Tensor,
    page_list: torch.Tensor,
) -> None:
    """Write each request's ``count`` pages of most mass, and page 0 among them, to ``page_list``.

    Of pages with equal mass the first are taken. Entries of ``page_list`` beyond a request's count are left as they are.

    Args:
        scores: None for page 0 and the newest ones (StreamingLLM's choice).
        block_table: int32 [R, any], page ids; entry = position // G.
    """
    for r, (chosen, pages) in enumerate(zip(count.tolist(), dense_from.tolist(), strict=True)):
        if chosen:
            own = _choose(scores, int(begin[r]), pages, int(num_rows[r]), chosen, page_list)
            page_list[:, :, int(begin[r]) : int(begin[r]) + chosen] = block_table[r].int()[own]


def _choose(
    scores: torch.Tensor | None, begin: int, pages: int, num_rows: int, chosen: int, page_list: torch.Tensor
) -> torch.Tensor:
    """The chosen ones of a request's pages, int64 [L, H, chosen], in the order of their positions."""
    if scores is None:
        mass = torch.arange(pages, dtype=torch.float32).expand(*page_list.shape[:2], pages).clone()
    else:
        rows = scores[:, :, begin : begin + pages, : max(num_rows, 1)].float()
        mass = rows[..., 0].clone()
        for row in rows.unbind(-1)[1:]:  # in this order, so that every implementation has the same sums
            mass += row
    mass[..., 0] = torch.inf
    return mass.sort(dim=-1, descending=True, stable=True).indices[..., :chosen].sort(dim=-1).values


# --- Pages that are chosen once, after the prompt (SnapKV's choice, a baseline) ---------------------------------------
#
# State, in rows that belong to requests as long as they run:
#
#     idx_mapping  int32 or int64 [R]   each request's row; negative: none, the request is padding
#     snap_pages   int32 [N]   pages that were scored when the choice was made; 0: no choice yet
#     snap_count   int32 [N]   how many of them were chosen
#     snap         int32 [L, H, N, words]   which: bit page % 32 of word page // 32; those of pages from snap_pages on mean
#                                           nothing


def plan_snapkv(
    num_scored: torch.Tensor,
    idx_mapping: torch.Tensor,
    snap_pages: torch.Tensor,
    snap_count: torch.Tensor,
    *,
    pages: int,
    fraction: float,
    min_pages: int,
    min_total_pages: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``count`` and ``dense_from`` as of `plan_selection`, and ``fresh`` int32 [R]: 1 where the choice is to be made now.

    The first time that `plan_selection` lets a request choose, the choice is stored; it is kept, whatever the batch is,
    until a step does not score the request: that is one of its prompt, maybe of another request that has its row now.
    """
    rows = idx_mapping.long().clamp_min(0)
    real = idx_mapping >= 0
    limits = {"pages": pages, "fraction": fraction, "min_pages": min_pages, "min_total_pages": min_total_pages}
    count, dense_from = plan_selection(num_scored * real, **limits)
    kept = real & (num_scored > 0) & (snap_pages[rows] > 0)
    fresh = (count > 0) & ~kept
    count = torch.where(kept, snap_count[rows], count)
    dense_from = torch.where(kept, snap_pages[rows], dense_from)
    snap_count[rows[real]], snap_pages[rows[real]] = count[real], dense_from[real]
    return count, dense_from, fresh.int()


def select_snapkv(
    scores: torch.Tensor,
    begin: torch.Tensor,
    num_rows: torch.Tensor,
    count: torch.Tensor,
    dense_from: torch.Tensor,
    fresh: torch.Tensor,
    idx_mapping: torch.Tensor,
    snap: torch.Tensor,
    block_table: torch.Tensor,
    page_list: torch.Tensor,
) -> None:
    """As `select_pages` where ``fresh``, and remembered in ``snap``; elsewhere the pages that ``snap`` says."""
    for r, (chosen, pages) in enumerate(zip(count.tolist(), dense_from.tolist(), strict=True)):
        if not chosen:
            continue
        words = snap[:, :, int(idx_mapping[r])]
        page = torch.arange(pages)
        if fresh[r]:
            own = _choose(scores, int(begin[r]), pages, int(num_rows[r]), chosen, page_list)
            bits = torch.zeros(*page_list.shape[:2], 32 * words.shape[2], dtype=torch.int64).scatter_(-1, own, 1)
            words.copy_((bits.unflatten(-1, (-1, 32)) << torch.arange(32)).sum(-1))  # the last bit becomes the sign
        is_chosen = (words[..., page // 32] >> (page % 32) & 1).bool()
        own = page.expand(is_chosen.shape)[is_chosen].view(*is_chosen.shape[:2], chosen)
        page_list[:, :, int(begin[r]) : int(begin[r]) + chosen] = block_table[r].int()[own]
