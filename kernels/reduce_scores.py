"""Scores of a layer's old pages, from what decode attention leaves in a verification: a Triton kernel.

`page_selection` chooses by them; what is said there of lengths, grids and CUDA graphs is true here as well.
"""

import torch

from vllm_quantspec.kernels.launch import check_device, jit, overlap, power_of_two, tl
from vllm_quantspec.kernels.page_selection import check_max_pages, check_requests, check_scores, options

# Launch configurations; see benchmarks/page_selection.py.
REDUCE_PAGES = 64  # of a CTA at most; fewer where they have many rows:
REDUCE_ELEMENTS = 2048  # that a CTA reads, padding included
REDUCE_WARPS = 4


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
    check_scores(scores_of_layer[None], heads, slots)
    requests, queries, group = query_start_loc.shape[0] - 1, scores_of_layer.shape[2], lse.shape[1] // heads
    if rows < queries * group:
        raise ValueError(f"raw has {rows} rows of a KV head; {queries} query tokens of {group} heads need more.")
    check_requests(requests, query_start_loc=query_start_loc, begin=begin, num_scored=num_scored)
    check_max_pages(max_pages)
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
