"""Pages that are chosen once after the prompt (SnapKV's choice, a baseline), on a GPU. `cpu_page_selection` specifies it.

At the head of the drafts `plan_snapkv` and `select_snapkv` take the place of `page_selection`'s `plan_selection` and
`select_pages`; what is said there of lengths, grids and CUDA graphs is true here as well. A request's choice is kept in the
row of the state that `idx_mapping` names.
"""

import torch

from vllm_quantspec.kernels.launch import check_device, check_int32, jit, overlap, tl
from vllm_quantspec.kernels.page_selection import (
    PLAN,
    SELECT,
    budget_of,
    check_plan,
    check_selection,
    keys_of,
    largest,
    options,
    padded_requests,
    strides_of,
    write_blocks,
)


def plan_snapkv(
    num_scored: torch.Tensor,
    idx_mapping: torch.Tensor,
    snap_pages: torch.Tensor,
    snap_count: torch.Tensor,
    count: torch.Tensor,
    dense_from: torch.Tensor,
    fresh: torch.Tensor,
    *,
    pages: int,
    fraction: float,
    min_pages: int,
    min_total_pages: int,
) -> None:
    """`plan_selection` for pages that are chosen once, as `cpu_page_selection.plan_snapkv`; uses `num_scored` up.

    Args:
        num_scored: int32 [R], read and set to 0.
        idx_mapping: int32 or int64 [at least R], each request's row of the state; -1 for the padding of a CUDA graph.
        snap_pages, snap_count: int32 [N], the state; zeros when it is made.
        count, dense_from, fresh: int32 [at least R], of one length, written as a whole: 0 beyond the R requests.
        pages, fraction, min_pages, min_total_pages: as in `cpu_page_selection.plan_selection`.

    Raises:
        ValueError: if an argument does not fit the above.
        RuntimeError: where Triton is not installed.
    """
    requests = check_plan(num_scored, count, dense_from, pages, fraction)
    _check_mapping(requests, idx_mapping)
    check_int32(snap_pages=snap_pages, snap_count=snap_count, fresh=fresh)
    if snap_pages.shape != snap_count.shape or fresh.shape != count.shape:
        raise ValueError(
            f"snap_pages {list(snap_pages.shape)} and snap_count {list(snap_count.shape)}, or count {list(count.shape)} and "
            f"fresh {list(fresh.shape)}, differ in length."
        )
    check_device(num_scored)
    _plan_snapkv[(1,)](
        num_scored,
        idx_mapping,
        snap_pages,
        snap_count,
        count,
        dense_from,
        fresh,
        requests,
        count.shape[0],
        snap_pages.shape[0],
        pages,
        fraction,
        min_pages,
        min_total_pages,
        RP=padded_requests(count.shape[0]),
        **overlap(num_scored),
    )


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
    *,
    max_pages: int,
) -> None:
    """`select_pages` for pages that are chosen once, as `cpu_page_selection.select_snapkv`: chooses, or reads its choice.

    Args:
        fresh: int32 [at least R], of `plan_snapkv`.
        idx_mapping: int32 or int64 [at least R], each request's row of the state.
        snap: int32 [L, H, N, words], contiguous: bit p % 32 of word p // 32 says that page p was chosen; 32 * words are at
            least max_pages. Bits of pages that the state does not cover, those from snap_pages on, mean nothing.
        Others: as in `select_pages`.

    Raises:
        ValueError: if an argument does not fit the above.
        RuntimeError: where Triton is not installed.
    """
    if scores is None:
        raise ValueError("Pages that are chosen once need scores.")
    tables = {"fresh": fresh, "block_table": block_table}
    grid, constants = check_selection(
        scores, begin, num_rows, page_list, max_pages, count=count, dense_from=dense_from, **tables
    )
    _check_mapping(num_rows.shape[0], idx_mapping)
    check_int32(snap=snap)
    if (
        snap.dim() != 4
        or snap.shape[:2] != page_list.shape[:2]
        or not snap.is_contiguous()
        or 32 * snap.shape[3] < max_pages
    ):
        raise ValueError(
            f"snap must be contiguous [{page_list.shape[0]}, {page_list.shape[1]}, any, {-(-max_pages // 32)} or more], "
            f"got {list(snap.shape)}."
        )
    check_device(page_list)
    _select_snapkv[grid](
        scores,
        begin,
        num_rows,
        count,
        dense_from,
        fresh,
        idx_mapping,
        snap,
        block_table,
        page_list,
        block_table.stride(0),
        block_table.shape[1],
        page_list.shape[2],
        *strides_of(scores),
        snap.shape[2],
        snap.shape[3],
        **constants,
    )


def _check_mapping(requests: int, idx_mapping: torch.Tensor) -> None:
    if idx_mapping.dtype not in (torch.int32, torch.int64) or idx_mapping.dim() != 1 or idx_mapping.stride(0) != 1:
        raise ValueError(
            f"idx_mapping must be contiguous int32 or int64 [any], got {idx_mapping.dtype} {list(idx_mapping.shape)}."
        )
    if idx_mapping.shape[0] < requests:
        raise ValueError(f"idx_mapping has {idx_mapping.shape[0]} entries, for {requests} requests.")


# --- Kernels ----------------------------------------------------------------------------------------------------------


@jit(**options(*PLAN, "idx_mapping", "snap_pages", "snap_count", "fresh", "states"))
def _plan_snapkv(
    num_scored,
    idx_mapping,
    snap_pages,
    snap_count,
    count,
    dense_from,
    fresh,
    requests,
    entries,
    states,
    pages,
    fraction,
    min_pages,
    min_total_pages,
    RP: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    r = tl.arange(0, RP)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    state = tl.load(idx_mapping + r, mask=r < requests, other=-1).to(tl.int64)
    real = (state >= 0) & (state < states)
    scored = tl.load(num_scored + r, mask=r < requests, other=0)
    scored = tl.where(real, scored, 0)
    old_pages = tl.load(snap_pages + state, mask=real, other=0)
    old_count = tl.load(snap_count + state, mask=real, other=0)
    chosen = budget_of(scored, pages, fraction, min_pages, min_total_pages)
    kept = (scored > 0) & (old_pages > 0)
    is_fresh = (chosen > 0) & (old_pages == 0)
    chosen = tl.where(kept, old_count, chosen)
    covered = tl.where(kept, old_pages, tl.where(is_fresh, scored, 0))
    tl.store(snap_pages + state, covered, mask=real)
    tl.store(snap_count + state, chosen, mask=real)
    tl.store(count + r, chosen, mask=r < entries)
    tl.store(dense_from + r, covered, mask=r < entries)
    tl.store(fresh + r, is_fresh.to(tl.int32), mask=r < entries)
    tl.store(num_scored + r, 0, mask=r < requests)


@jit(**options(*SELECT, "fresh", "idx_mapping", "states", "words"))
def _select_snapkv(
    scores,
    begin,
    num_rows,
    count,
    dense_from,
    fresh,
    idx_mapping,
    snap,
    block_table,
    page_list,
    table_stride,
    table_width,
    slots,
    layer_stride,
    head_stride,
    states,
    words,
    Q: tl.constexpr,
    PAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    r, head, layer = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    chosen = tl.load(count + r)
    if chosen == 0:
        return
    pages = tl.load(dense_from + r)
    first = tl.load(begin + r)
    page = tl.arange(0, PAGES)
    table_row = block_table + r.to(tl.int64) * table_stride
    layer_and_head = layer * tl.num_programs(1) + head
    page_list += layer_and_head * slots + first
    snap += (layer_and_head * states + tl.load(idx_mapping + r).to(tl.int64)) * words
    if tl.load(fresh + r) != 0:
        scores += layer * layer_stride + head.to(tl.int64) * head_stride + first.to(tl.int64) * Q
        keys = keys_of(scores, page, pages, tl.load(num_rows + r), Q)
        selected, place = largest(keys, chosen)
        bits = selected.to(tl.int32) << page % 32
        word = tl.arange(0, PAGES // 32)
        tl.store(snap + word, tl.xor_sum(tl.reshape(bits, (PAGES // 32, 32)), axis=1), mask=word < words)
    else:
        there = page < pages
        selected = (tl.load(snap + page // 32, mask=there, other=0) >> page % 32 & 1) != 0
        place = tl.cumsum(selected.to(tl.int32), axis=0)
    write_blocks(page_list, table_row, table_width, page, place - 1, selected)
