"""Which old pages a sparse draft reads, on a GPU: Triton kernels. `cpu_page_selection` says what they compute.

    verification, layer by layer    decode attention -> `raw`, `lse`;  `reduce_scores` -> the layer's scores
    head of the drafts              `plan_selection` -> how many pages;  `select_pages` -> which ones, for all layers

`snapkv` has what takes the place of the last two where pages are chosen once after the prompt.

Lengths and counts are read on the device. Grids depend on shapes and host integers only, so a captured CUDA graph replays
with any lengths that fit them. Run each function once with the same shapes before capturing: Triton compiles on the first
call. What is written for CUDA graphs (`begin`, `num_scored`, `count`, `dense_from`, ...) are persistent tensors: they may
have more entries than the step has requests.
"""

import torch

from vllm_quantspec.kernels.launch import check_device, check_int32, jit, overlap, power_of_two, tl

# Launch configurations; see benchmarks/page_selection.py.
REDUCE_PAGES = 64  # of a CTA at most; fewer where they have many rows:
REDUCE_ELEMENTS = 2048  # that a CTA reads, padding included
REDUCE_WARPS = 4
SELECT_PAGES_PER_WARP = 256
MAX_PAGES = 16384  # a CTA holds a request's pages in registers


def reduce_scores(
    raw: torch.Tensor,
    flags: torch.Tensor,
    lse: torch.Tensor,
    query_start_loc: torch.Tensor,
    begin: torch.Tensor,
    num_scored: torch.Tensor,
    scores_of_layer: torch.Tensor,
    *,
    max_pages: int,
) -> None:
    """Normalise what decode attention left for one layer, and sum it over the query heads of each KV head.

    For each request r, page < num_scored[r] and query token q of the request:

        scores_of_layer[h, begin[r] + page, q] = sum over head g of the group of
            mass(page, h, row q * Hq / H + g) / 2 ** lse[query_start_loc[r] + q, h * Hq / H + g]

    where the mass of a page, a sum of 2^score, is what its readers had summed after it, less what they had summed before:

        had(page, part) = sum * 2 ** top of raw[begin[r] + page, h, part, row]
        mass(page) = had(page, 0) - (had(page - 1, its last part), unless flag 1) + (had(page, 1), unless flag 2)

    A term is 0 to 1, as it is without rounding, even where its input is not finite. Nothing else is written.

    Args:
        raw: fp32 [C, H, 2, M, 2], contiguous, and flags: uint8 [C, H, M / 8], contiguous: see `decode_attention.ScoresOut`.
        lse: fp32 [T, Hq], contiguous: base-2 logs of the rows' whole sums.
        query_start_loc: int32 [R+1], offsets into the tokens of lse.
        begin, num_scored: int32 [at least R]; requests follow one another: none begins before the end of an earlier one.
        scores_of_layer: bfloat16 or fp32 [H, C, Q], contiguous pages; the stride of heads is free. Query tokens of a scored
            request: at most Q.
        max_pages: no request has more scored pages than this.

    Raises:
        ValueError: if an argument does not fit the above.
        RuntimeError: where Triton is not installed.
    """
    slots, heads, _, rows, _ = raw.shape if raw.dim() == 5 else (0, 0, 0, 0, 0)
    fits = raw.dtype == torch.float32 and raw.shape == (slots, heads, 2, rows, 2) and rows % 8 == 0 and raw.is_contiguous()
    if not fits:
        raise ValueError(f"raw must be contiguous fp32 [any, any, 2, 8 times any, 2], got {raw.dtype} {list(raw.shape)}.")
    if flags.dtype != torch.uint8 or flags.shape != (slots, heads, rows // 8) or not flags.is_contiguous():
        raise ValueError(
            f"flags must be contiguous uint8 [{slots}, {heads}, {rows // 8}], got {flags.dtype} {list(flags.shape)}."
        )
    if lse.dtype != torch.float32 or lse.dim() != 2 or not lse.is_contiguous() or lse.shape[1] % max(heads, 1):
        raise ValueError(
            f"lse must be contiguous fp32 [tokens, a multiple of {heads} heads], got {lse.dtype} {list(lse.shape)}."
        )
    _check_scores(scores_of_layer[None], heads, slots)
    requests, queries, group = query_start_loc.shape[0] - 1, scores_of_layer.shape[2], lse.shape[1] // heads
    if rows < queries * group:
        raise ValueError(f"raw has {rows} rows of a KV head; {queries} query tokens of {group} heads need more.")
    check_requests(requests, query_start_loc=query_start_loc, begin=begin, num_scored=num_scored)
    _check_max_pages(max_pages)
    check_device(raw)
    tile = power_of_two(queries) * power_of_two(group) * 2
    pages = min(REDUCE_PAGES, max(4, REDUCE_ELEMENTS // tile))
    # Over slots, not over requests: few programs are without work, whatever the lengths.
    _reduce_scores[(heads, -(-min(slots, requests * max_pages) // pages))](
        raw.view(torch.int64),
        flags,
        lse,
        query_start_loc,
        begin,
        num_scored,
        scores_of_layer,
        requests,
        rows,
        scores_of_layer.stride(0),
        H=heads,
        Q=queries,
        GROUP=group,
        PAGES=pages,
        QP=power_of_two(queries),
        GP=power_of_two(group),
        REQUESTS=16 if requests <= 16 else 128,  # few variants, as Triton compiles for each
        num_warps=REDUCE_WARPS,
        **overlap(raw),
    )


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


def _check_max_pages(max_pages: int) -> None:
    if not 1 <= max_pages <= MAX_PAGES:
        raise ValueError(f"max_pages must be 1 to {MAX_PAGES}, got {max_pages}.")


def _check_scores(scores: torch.Tensor, heads: int, slots: int) -> None:
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
        _check_scores(scores, heads, slots)
        if scores.shape[0] != layers:
            raise ValueError(f"scores are of {scores.shape[0]} layers, page_list is of {layers}.")
    _check_max_pages(max_pages)
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
def _had(pair, norm):
    """sum * 2 ** (top - norm) of a sum, the lower half of 8 bytes, and a top; 0 for nothing."""
    total = pair.to(tl.int32).to(tl.float32, bitcast=True)
    top = (pair >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    return tl.where(pair == 0, 0.0, total * tl.exp2(top - norm))


@jit(**options("scores", "query_start_loc", "begin", "num_scored", "requests", "rows", "head_stride"))
def _reduce_scores(
    raw,
    flags,
    lse,
    query_start_loc,
    begin,
    num_scored,
    scores,
    requests,
    rows,
    head_stride,
    H: tl.constexpr,
    Q: tl.constexpr,
    GROUP: tl.constexpr,
    PAGES: tl.constexpr,
    QP: tl.constexpr,
    GP: tl.constexpr,
    REQUESTS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    head = tl.program_id(0)
    slot = tl.program_id(1) * PAGES + tl.arange(0, PAGES)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    # The query tokens of the request that a slot belongs to; none, if it belongs to none.
    first = tl.zeros([PAGES], tl.int32)
    tokens = tl.zeros([PAGES], tl.int32)
    page = tl.zeros([PAGES], tl.int32)
    for chunk in range(0, requests, REQUESTS):
        r = chunk + tl.arange(0, REQUESTS)
        real = r < requests
        slot_begin = tl.load(begin + r, mask=real, other=0)
        pages = tl.load(num_scored + r, mask=real, other=0)
        start = tl.load(query_start_loc + r, mask=real, other=0)
        end = tl.load(query_start_loc + r + 1, mask=real, other=0)
        own = (slot[:, None] >= slot_begin[None, :]) & (slot[:, None] < (slot_begin + pages)[None, :])
        first = tl.maximum(first, tl.max(tl.where(own, start[None, :], 0), axis=1))
        tokens = tl.maximum(tokens, tl.max(tl.where(own, (end - start)[None, :], 0), axis=1))
        page = tl.maximum(page, tl.max(tl.where(own, slot[:, None] - slot_begin[None, :], 0), axis=1))
    if tl.max(tokens, axis=0) > 0:
        q = tl.arange(0, QP)[None, :]
        there = (q < tokens[:, None]) & (q < Q)
        g = tl.arange(0, GP)[None, None, :]
        mask = there[:, :, None] & (g < GROUP)
        row = (q * GROUP)[:, :, None] + g
        token = (first[:, None] + q).to(tl.int64) * (H * GROUP) + head * GROUP
        norm = tl.load(lse + token[:, :, None] + g, mask=mask, other=0)
        at = (slot.to(tl.int64) * H + head)[:, None, None]
        before = at - tl.where(page > 0, H, 0)[:, None, None]
        flag = tl.load(flags + at * (rows // 8) + row // 8, mask=mask, other=3)
        flag_before = tl.load(flags + before * (rows // 8) + row // 8, mask=mask, other=3)
        here = tl.load(raw + at * 2 * rows + row, mask=mask, other=0)
        # Of the page before, the part that its last reader left.
        subtract = mask & (flag % 2 == 0) & (page > 0)[:, None, None]
        last = 1 - flag_before.to(tl.int32) // 2
        there_before = tl.load(raw + (before * 2 + last) * rows + row, mask=subtract, other=0)
        rest = tl.load(raw + (at * 2 + 1) * rows + row, mask=mask & (flag < 2), other=0)
        mass = _had(here, norm) - _had(there_before, norm) + _had(rest, norm)
        mass = tl.where(mass <= 1, tl.maximum(mass, 0.0), 1.0)  # NaN is not either
        mass = tl.sum(tl.where(mask, mass, 0.0), axis=2)
        out = scores + head.to(tl.int64) * head_stride + slot.to(tl.int64)[:, None] * Q + q
        tl.store(out, mass.to(scores.dtype.element_ty), mask=there)


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
