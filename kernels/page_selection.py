"""Which old pages a sparse draft reads, on a GPU: Triton kernels. `cpu_page_selection` says what they compute.

    verification, layer by layer    decode attention -> `raw`, `lse`;  `reduce_scores` -> the layer's scores
    head of the drafts              `plan_selection` -> how many pages;  `select_pages` -> which ones, for all layers

The last two are here. `snapkv` has what takes their place where pages are chosen once after the prompt.

Lengths and counts are read on the device. Grids depend on shapes and host integers only, so a captured CUDA graph replays
with any lengths that fit them. Run each function once with the same shapes before capturing: Triton compiles on the first
call. What is written for CUDA graphs (`begin`, `num_scored`, `count`, `dense_from`, ...) are persistent tensors: they may
have more entries than the step has requests.
"""

import torch

from vllm_quantspec.kernels.launch import check_device, check_int32, jit, overlap, power_of_two, tl

# Launch configurations; see benchmarks/page_selection.py.
SELECT_PAGES_PER_WARP = 256
MAX_PAGES = 16384  # a CTA holds a request's pages in registers


def plan_selection(
    num_scored: torch.Tensor,
    count: torch.Tensor,
    dense_from: torch.Tensor,
    *,
    pages: int,
    fraction: float,
    min_pages: int,
    min_total_pages: int,
) -> None:
    """How many pages each request's drafts choose, as `cpu_page_selection.plan_selection`; uses `num_scored` up.

    ``num_scored`` is 0 afterwards: a step that scores nothing leaves nothing of an older one behind.

    Args:
        num_scored: int32 [R], read and set to 0.
        count, dense_from: int32 [at least R], written as a whole: 0 beyond the R requests.
        pages, fraction, min_pages, min_total_pages: as in `cpu_page_selection.plan_selection`.

    Raises:
        ValueError: if an argument does not fit the above.
        RuntimeError: where Triton is not installed.
    """
    requests = check_plan(num_scored, count, dense_from, pages, fraction)
    check_device(num_scored)
    _plan_selection[(1,)](
        num_scored,
        count,
        dense_from,
        requests,
        count.shape[0],
        pages,
        fraction,
        min_pages,
        min_total_pages,
        RP=padded_requests(count.shape[0]),
        **overlap(num_scored),
    )


def select_pages(
    scores: torch.Tensor | None,
    begin: torch.Tensor,
    num_rows: torch.Tensor,
    count: torch.Tensor,
    dense_from: torch.Tensor,
    block_table: torch.Tensor,
    page_list: torch.Tensor,
    *,
    max_pages: int,
) -> None:
    """Write each request's `count` pages of most mass, page 0 among them, to `page_list`, for all layers and KV heads.

    As `cpu_page_selection.select_pages`, to the same pages. A request with count 0 costs next to nothing.

    Args:
        scores: bfloat16 or fp32 [L, H, C, Q], no NaN, contiguous pages; the strides of layers and heads are free. None for
            page 0 and the newest ones.
        begin, count, dense_from: int32 [at least R], of `reduce_scores` and `plan_selection`: count is at most dense_from.
        num_rows: int32 [R], how many of a request's rows are verified by now: the first ones; at least one is used.
        block_table: int32 [at least R, any], page ids; entry = position // G.
        page_list: int32 [L, H, C], contiguous; written from begin[r] on.
        max_pages: no request has more scored pages than this; at most MAX_PAGES.

    Raises:
        ValueError: if an argument does not fit the above.
        RuntimeError: where Triton is not installed.
    """
    grid, constants = check_selection(
        scores, begin, num_rows, page_list, max_pages, count=count, dense_from=dense_from, block_table=block_table
    )
    check_device(page_list)
    _select_pages[grid](
        scores,
        begin,
        num_rows,
        count,
        dense_from,
        block_table,
        page_list,
        block_table.stride(0),
        block_table.shape[1],
        page_list.shape[2],
        *strides_of(scores),
        **constants,
    )


# --- Checks -----------------------------------------------------------------------------------------------------------


def check_requests(requests: int, **tensors: torch.Tensor) -> None:
    check_int32(**tensors)
    for name, x in tensors.items():
        if requests < 1 or x.shape[0] < requests:
            raise ValueError(f"{name} has {x.shape[0]} entries, for {requests} requests.")


def check_max_pages(max_pages: int) -> None:
    if not 1 <= max_pages <= MAX_PAGES:
        raise ValueError(f"max_pages must be 1 to {MAX_PAGES}, got {max_pages}.")


def check_scores(scores: torch.Tensor, heads: int, slots: int) -> None:
    fits = scores.dim() == 4 and scores.shape[1:3] == (heads, slots) and scores.stride()[2:] == (scores.shape[3], 1)
    if not fits or scores.dtype not in (torch.bfloat16, torch.float32) or scores.shape[3] < 1:
        raise ValueError(
            f"scores must be bfloat16 or fp32 of {heads} heads and {slots} contiguous slots, got {scores.dtype} "
            f"{list(scores.shape)} with strides {scores.stride()}."
        )


def check_plan(num_scored: torch.Tensor, count: torch.Tensor, dense_from: torch.Tensor, pages: int, fraction: float) -> int:
    """The number of requests."""
    requests = num_scored.shape[0]
    check_requests(requests, num_scored=num_scored, count=count, dense_from=dense_from)
    if count.shape != dense_from.shape:
        raise ValueError(f"count {list(count.shape)} and dense_from {list(dense_from.shape)} differ in length.")
    if pages < 1 or not 0 <= fraction <= 1:
        raise ValueError(f"Need at least one page and a fraction of 0 to 1, got {pages} and {fraction}.")
    return requests


def check_selection(
    scores: torch.Tensor | None,
    begin: torch.Tensor,
    num_rows: torch.Tensor,
    page_list: torch.Tensor,
    max_pages: int,
    **tables: torch.Tensor,
) -> tuple[tuple[int, int, int], dict]:
    """The grid of a selection, and the constants of its kernel."""
    requests = num_rows.shape[0]
    check_requests(requests, num_rows=num_rows, begin=begin, **tables)
    check_int32(page_list=page_list)
    if page_list.dim() != 3 or not page_list.is_contiguous():
        raise ValueError(f"page_list must be contiguous [layers, heads, slots], got {list(page_list.shape)}.")
    layers, heads, slots = page_list.shape
    if scores is not None:
        check_scores(scores, heads, slots)
        if scores.shape[0] != layers:
            raise ValueError(f"scores are of {scores.shape[0]} layers, page_list is of {layers}.")
    check_max_pages(max_pages)
    padded = max(32, power_of_two(max_pages))
    warps = min(32, max(4, padded // SELECT_PAGES_PER_WARP))
    constants = {"Q": 1 if scores is None else scores.shape[3], "PAGES": padded, "num_warps": warps}
    return (requests, heads, layers), constants | overlap(page_list)


def strides_of(scores: torch.Tensor | None) -> tuple[int, int]:
    """Of layers and heads."""
    return (0, 0) if scores is None else scores.stride()[:2]


def padded_requests(requests: int) -> int:
    return max(32, power_of_two(requests))


# --- Kernels ----------------------------------------------------------------------------------------------------------

# Values that change from step to step, or with the size of a cache, must not make Triton compile again.
NUMBERS = ["requests", "entries", "rows", "states", "words", "slots", "table_stride", "table_width", "head_stride"]
NUMBERS += ["layer_stride", "pages", "min_pages", "min_total_pages"]
TENSORS = ["scores", "query_start_loc", "begin", "num_scored", "num_rows", "count", "dense_from", "block_table"]
TENSORS += ["fresh", "idx_mapping", "snap_pages", "snap_count"]


def options(*parameters: str) -> dict[str, list[str]]:
    return {
        "do_not_specialize": [name for name in parameters if name in NUMBERS],
        "do_not_specialize_on_alignment": [name for name in parameters if name in TENSORS],
    }


@jit
def budget_of(num_scored, pages, fraction, min_pages, min_total_pages):
    """How many of [R] scored pages are chosen; 0 for all."""
    budget = tl.maximum(tl.ceil(num_scored.to(tl.float32) * fraction).to(tl.int32), pages)
    sparse = (num_scored >= tl.maximum(min_pages, 1)) & (budget < num_scored) & (tl.sum(num_scored) >= min_total_pages)
    return tl.where(sparse, budget, 0)


PLAN = ("num_scored", "count", "dense_from", "requests", "entries", "pages", "min_pages", "min_total_pages")


@jit(**options(*PLAN))
def _plan_selection(
    num_scored,
    count,
    dense_from,
    requests,
    entries,
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
    scored = tl.load(num_scored + r, mask=r < requests, other=0)
    chosen = budget_of(scored, pages, fraction, min_pages, min_total_pages)
    tl.store(count + r, chosen, mask=r < entries)
    tl.store(dense_from + r, tl.where(chosen > 0, scored, 0), mask=r < entries)
    tl.store(num_scored + r, 0, mask=r < requests)


@jit
def keys_of(scores, page, pages, num_rows, Q: tl.constexpr):
    """Mass of the pages as integers in the same order: floats that are not negative compare like their bits. -1: no page."""
    mass = tl.zeros(page.shape, tl.float32)
    for q in tl.static_range(Q):  # one row after the other: the same sums as the twin's
        to_read = tl.where(q < tl.maximum(num_rows, 1), pages, 0)
        row = tl.load(scores + page * Q + q, mask=page < to_read, other=0)
        mass += row.to(tl.float32)
    mass = tl.where(page == 0, float("inf"), mass)
    return tl.where(page < pages, mass.to(tl.int32, bitcast=True), -1)


@jit
def largest(keys, chosen):
    """Which keys are the `chosen` largest, of equal ones the first; and how many of those are before each, itself included.

    Bisection for the smallest key that is in. It ends when it separates exactly `chosen` keys, mostly after half of the
    bits: masses are rarely equal.
    """
    low = tl.full([], 0, tl.int32)  # at least `chosen` keys are as large
    high = tl.full([], 0x7F800001, tl.int32)  # fewer are
    while high - low > 1:
        middle = low + (high - low) // 2
        as_large = tl.sum((keys >= middle).to(tl.int32), axis=0)
        low = tl.where(as_large >= chosen, middle, low)
        high = tl.where(as_large > chosen, high, tl.where(as_large == chosen, middle + 1, middle))
    above, equal = keys > low, keys == low
    room = chosen - tl.sum(above.to(tl.int32), axis=0)
    # Both numbers at once, 16 bits each.
    ranks = tl.cumsum(above.to(tl.int32) + (equal.to(tl.int32) << 16), axis=0)
    equals = ranks >> 16
    return above | (equal & (equals <= room)), (ranks & 0xFFFF) + tl.minimum(equals, room)


@jit
def write_blocks(page_list, table_row, table_width, page, place, mask):
    """Put the blocks of `page` at `place` of a list."""
    block = tl.load(table_row + page, mask=mask & (page < table_width), other=0)
    tl.store(page_list + place, block, mask=mask)


SELECT = ("scores", "begin", "num_rows", "count", "dense_from", "block_table", "table_stride", "table_width", "slots")
SELECT += ("layer_stride", "head_stride")


@jit(**options(*SELECT))
def _select_pages(
    scores,
    begin,
    num_rows,
    count,
    dense_from,
    block_table,
    page_list,
    table_stride,
    table_width,
    slots,
    layer_stride,
    head_stride,
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
    page_list += (layer * tl.num_programs(1) + head) * slots + first
    if scores is None:
        newest = tl.where(page == 0, 0, pages - chosen + page)
        write_blocks(page_list, table_row, table_width, newest, page, page < chosen)
    else:
        scores += layer * layer_stride + head.to(tl.int64) * head_stride + first.to(tl.int64) * Q
        keys = keys_of(scores, page, pages, tl.load(num_rows + r), Q)
        selected, place = largest(keys, chosen)
        write_blocks(page_list, table_row, table_width, page, place - 1, selected)
