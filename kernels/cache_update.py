"""What a forward pass writes: the step's keys and values into the window, completed pages quantized. Triton kernels.

Everything is read on the device: positions and lengths from `query_start_loc` and `seq_lens`, addresses from the two
block tables. Grids depend on shapes and host integers only, so a captured CUDA graph replays with any lengths that fit
them. Run each function once with the same shapes before capturing: Triton compiles on the first call.

`step.plan_step` with `step.write_window` and `step.quantize_completed` compute the same in plain PyTorch.
"""

import torch

from vllm_quantspec.format import PageFormat
from vllm_quantspec.kernels.launch import (
    check_device,
    check_int32,
    check_metadata,
    check_pages,
    check_rows,
    check_window,
    jit,
    overlap,
    power_of_two,
    tl,
)
from vllm_quantspec.kernels.page_pieces import quantize_keys, quantize_values

# Launch configurations, found on an H200 (see benchmarks/NOTES.md).
STORE_CTAS = 4096  # with more tokens to look at, a CTA takes several
STORE_WARPS = 4
QUANTIZE_CTAS = 1056  # at most so many; each then takes several pieces of pages
QUANTIZE_DECODE_CTAS = 528  # the same where few pages can be complete: most steps only find that none is
QUANTIZE_WARPS = 4
QUANTIZE_REGISTERS = 96  # of a thread, up to head size 128


def store(
    fmt: PageFormat,
    window: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    window_block_table: torch.Tensor,
    *,
    max_query_len: int,
) -> None:
    """Store the step's keys and values where their positions have a window block.

    Query token i of request r has position seq_lens[r] - query_len + i. Contract: only the newest 4 * group_size + 64
    query tokens of a request are looked at. Older ones are not stored, even where an earlier step's block has room for
    them: no later step reads them from the window, and this one has them in key and value.

    Args:
        window: fmt.dtype [num_blocks, H, W, 2*D]; the strides of blocks and heads are free.
        key, value: floating point [T, H, D]; the strides of tokens and heads are free.
        query_start_loc: int32 [R+1], offsets into the tokens of key and value; requests may be empty.
        seq_lens: int32 [R], lengths that include the step's own tokens.
        window_block_table: int32 [R, any], window block ids; entry = position // W, 0 = no block.
        max_query_len: no request has more query tokens than this.

    Raises:
        ValueError: if an argument does not fit the above.
        RuntimeError: where Triton is not installed.
    """
    check_window(fmt, window)
    check_rows(fmt, key=key, value=value)
    check_metadata(query_start_loc, seq_lens, window_block_table=window_block_table)
    if max_query_len < 1:
        raise ValueError(f"max_query_len must be at least 1, got {max_query_len}.")
    check_device(window)
    visited, requests = min(max_query_len, 4 * fmt.group_size + 64), seq_lens.shape[0]
    tokens = 1
    while tokens < 16 and requests * visited > STORE_CTAS * tokens:
        tokens *= 4
    _store[(requests, -(-visited // tokens))](
        key,
        value,
        window,
        query_start_loc,
        seq_lens,
        window_block_table,
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        window.stride(0),
        window.stride(1),
        window_block_table.stride(0),
        window_block_table.shape[1],
        H=fmt.num_kv_heads,
        D=fmt.head_size,
        W=fmt.window_block_size,
        TOKENS=tokens,
        HP=power_of_two(fmt.num_kv_heads),
        DP=power_of_two(fmt.head_size),
        num_warps=STORE_WARPS,
        **overlap(window),
    )


def quantize(
    fmt: PageFormat,
    pages: torch.Tensor,
    window: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    num_unverified: torch.Tensor,
    block_table: torch.Tensor,
    window_block_table: torch.Tensor,
    *,
    max_query_len: int,
    max_unverified: int,
) -> None:
    """Quantize the pages whose last token is verified by now, from exact values: the bytes of `format.encode_pages`.

    A request whose step starts at position p0 gets its pages from max(p0 - max_unverified, 0) // G on (see `step`), but
    none that begins before the tokens the window still holds, up to (seq_len - num_unverified) // G, exclusive. Tokens
    from p0 on come from key and value, earlier ones from the window. Page 0 is never written.

    Args:
        pages: uint8 [num_blocks, H, head_bytes]; the strides of blocks and heads are free, but even.
        window: fmt.dtype [num_blocks, H, W, 2*D]; the strides of blocks and heads are free.
        key, value: floating point [T, H, D], the step's own; the strides of tokens and heads are free.
        query_start_loc: int32 [R+1], offsets into the tokens of key and value; requests may be empty.
        seq_lens: int32 [R], lengths that include the step's own tokens.
        num_unverified: int32 [R], how many of a request's last query tokens are drafts.
        block_table: int32 [R, any], page ids; entry = position // G.
        window_block_table: int32 [R, any], window block ids; entry = position // W, 0 = no block.
        max_query_len: no request has more query tokens than this.
        max_unverified: the most drafts a step may hold.

    Raises:
        ValueError: if an argument does not fit the above.
        RuntimeError: where Triton is not installed.
    """
    check_pages(fmt, pages)
    check_window(fmt, window)
    check_rows(fmt, key=key, value=value)
    check_metadata(query_start_loc, seq_lens, block_table=block_table, window_block_table=window_block_table)
    check_int32(num_unverified=num_unverified)
    if max_query_len < 1 or max_unverified < 0:
        raise ValueError(f"Need a positive max_query_len and max_unverified >= 0, got {max_query_len}, {max_unverified}.")
    check_device(window)
    group, dim, requests = fmt.group_size, fmt.head_size, seq_lens.shape[0]
    # Of keys and of values, see `page_pieces`.
    pieces = fmt.num_kv_heads * (dim // 32 + group // 32)
    max_pages = -(-(max_query_len + max_unverified) // group)
    ctas = min(requests * max_pages * pieces, QUANTIZE_DECODE_CTAS if max_pages == 1 else QUANTIZE_CTAS)
    _quantize[(ctas,)](
        key,
        value,
        window,
        pages,
        query_start_loc,
        seq_lens,
        num_unverified,
        block_table,
        window_block_table,
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        window.stride(0),
        window.stride(1),
        pages.stride(0),
        pages.stride(1),
        block_table.stride(0),
        block_table.shape[1],
        window_block_table.stride(0),
        window_block_table.shape[1],
        requests,
        max_unverified,
        H=fmt.num_kv_heads,
        D=dim,
        G=group,
        W=fmt.window_block_size,
        VG=fmt.value_group_size,
        DP=power_of_two(dim),
        # Few sizes, as Triton compiles for each.
        RP=next((n for n in (16, 64, 256) if n >= requests), power_of_two(requests)),
        PAGE_BITS=fmt.bits,
        num_warps=QUANTIZE_WARPS,
        maxnreg=QUANTIZE_REGISTERS if dim <= 128 else None,
        **overlap(window),
    )


# --- Kernels ----------------------------------------------------------------------------------------------------------

# Values whose alignment changes from step to step must not make Triton compile again.
STORE_OPTIONS = {
    "do_not_specialize": ["window_table_stride", "window_table_width"],
    "do_not_specialize_on_alignment": ["query_start_loc", "seq_lens", "window_table"],
}
QUANTIZE_OPTIONS = {
    "do_not_specialize": [*STORE_OPTIONS["do_not_specialize"], "table_stride", "table_width", "requests", "max_unverified"],
    "do_not_specialize_on_alignment": [
        *STORE_OPTIONS["do_not_specialize_on_alignment"],
        "num_unverified",
        "block_table",
    ],
}


@jit(**STORE_OPTIONS)
def _store(
    key,
    value,
    window,
    query_start_loc,
    seq_lens,
    window_table,
    key_stride,
    key_head_stride,
    value_stride,
    value_head_stride,
    window_stride,
    window_head_stride,
    window_table_stride,
    window_table_width,
    H: tl.constexpr,
    D: tl.constexpr,
    W: tl.constexpr,
    TOKENS: tl.constexpr,
    HP: tl.constexpr,
    DP: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    r = tl.program_id(0)
    start = tl.load(query_start_loc + r)
    end = tl.load(query_start_loc + r + 1)
    seq_len = tl.load(seq_lens + r)
    newest = tl.program_id(1) * TOKENS  # counted from the newest token back
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if newest >= end - start:
        return
    row = tl.arange(0, TOKENS * HP)
    back = newest + row // HP + 1
    head = row % HP
    index, position = end - back, seq_len - back
    there = (index >= start) & (position >= 0) & (head < H)
    entry = position // W
    mask = there & (entry < window_table_width)
    block = tl.load(window_table + r.to(tl.int64) * window_table_stride + entry, mask=mask, other=0)
    channel = tl.arange(0, DP)[None, :]
    # Not masked by the block: the reads need not wait for it.
    reads = there[:, None] & (channel < D)
    index = index.to(tl.int64)
    k = tl.load(key + (index * key_stride + head * key_head_stride)[:, None] + channel, mask=reads)
    v = tl.load(value + (index * value_stride + head * value_head_stride)[:, None] + channel, mask=reads)
    writes = reads & (block > 0)[:, None]
    at = block.to(tl.int64) * window_stride + head * window_head_stride + position % W * (2 * D)
    out = window + at[:, None] + channel
    tl.store(out, k.to(window.dtype.element_ty), mask=writes)
    tl.store(out + D, v.to(window.dtype.element_ty), mask=writes)


@jit
def exact_start(first, window_row, width, mask, G: tl.constexpr, W: tl.constexpr):
    """As reference.exact_start, for requests [N]: their first positions, and pointers to their rows of the table."""
    start = tl.maximum(first // G - 1, 0) * G  # format.window_start
    entry = (start // W)[:, None] + tl.arange(0, 2 * G // W)[None, :]
    needed = mask[:, None] & (entry * W < first[:, None])
    block = tl.load(window_row[:, None] + entry, mask=needed & (entry < width), other=0)
    after_missing = tl.max(tl.where(needed & (block <= 0), (entry + 1) * W, 0), axis=1)
    return tl.minimum(tl.maximum(start, after_missing), first)


@jit
def _load_exact(
    own,
    window,
    position,
    channel,
    mask,
    first,
    own_row,
    own_stride,
    window_row,
    window_table_width,
    window_stride,
    D: tl.constexpr,
    W: tl.constexpr,
):
    """fp32 [tokens, channels]: `own` from position `first` on (its row `own_row` is position 0), else the window."""
    fresh = position >= first
    row = (own_row + position).to(tl.int64)
    x = tl.load(own + row[:, None] * own_stride + channel, mask=mask & fresh[:, None], other=0.0).to(tl.float32)
    entry = position // W
    block = tl.load(window_row + entry, mask=(position < first) & (entry < window_table_width), other=0)
    at = block.to(tl.int64) * window_stride + position % W * (2 * D)
    old = mask & (block > 0)[:, None]
    exact = tl.load(window + at[:, None] + channel, mask=old, other=0.0).to(tl.float32)
    return tl.where(fresh[:, None], x, exact)


@jit(**QUANTIZE_OPTIONS)
def _quantize(
    key,
    value,
    window,
    pages,
    query_start_loc,
    seq_lens,
    num_unverified,
    block_table,
    window_table,
    key_stride,
    key_head_stride,
    value_stride,
    value_head_stride,
    window_stride,
    window_head_stride,
    page_stride,
    page_head_stride,
    table_stride,
    table_width,
    window_table_stride,
    window_table_width,
    requests,
    max_unverified,
    H: tl.constexpr,
    D: tl.constexpr,
    G: tl.constexpr,
    W: tl.constexpr,
    VG: tl.constexpr,
    DP: tl.constexpr,
    RP: tl.constexpr,
    PAGE_BITS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    PIECES: tl.constexpr = D // 32 + G // 32
    DRAFT_BYTES: tl.constexpr = G * D + 4 * D + 4 * G * (D // VG)
    # Which pages are due, of all requests: every CTA finds its share without a plan that is written first.
    r = tl.arange(0, RP)
    real = r < requests
    start = tl.load(query_start_loc + r, mask=real, other=0)
    end = tl.load(query_start_loc + r + 1, mask=real, other=0)
    seq_len = tl.load(seq_lens + r, mask=real, other=0)
    drafts = tl.load(num_unverified + r, mask=real, other=0)
    first = seq_len - (end - start)
    low = tl.maximum(first - max_unverified, 0) // G
    high = tl.maximum(seq_len - drafts, 0) // G
    due = (end > start) & (high > low)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if tl.sum(due.to(tl.int32)) == 0:
        return
    window_rows = window_table + r.to(tl.int64) * window_table_stride
    exact = tl.maximum(exact_start(first, window_rows, window_table_width, due, G, W), 0)
    low = tl.maximum(low, (exact + G - 1) // G)
    count = tl.where(due, tl.maximum(high - low, 0), 0)
    until = tl.cumsum(count, 0)
    total = tl.sum(count) * (H * PIECES)
    for item in range(tl.program_id(0), total, tl.num_programs(0)):
        piece = item % PIECES
        head = item // PIECES % H
        nth = item // (PIECES * H)
        owner = tl.sum((until <= nth).to(tl.int32))
        own = r == owner
        page = nth + tl.sum(tl.where(own, low - (until - count), 0))
        page_first = tl.sum(tl.where(own, first, 0))
        own_row = tl.sum(tl.where(own, start, 0)) - page_first
        row = owner.to(tl.int64)
        page_id = tl.load(block_table + row * table_stride + page, mask=page < table_width, other=0)
        out = pages + page_id.to(tl.int64) * page_stride + head * page_head_stride
        window_row = window_table + row * window_table_stride
        head_window = window + head * window_head_stride
        if piece < D // 32:
            keys = _load_exact(
                key + head * key_head_stride,
                head_window,
                page * G + tl.arange(0, G),
                piece * 32 + tl.arange(0, 32)[None, :],
                tl.full((1, 32), 1, tl.int1),
                page_first,
                own_row,
                key_stride,
                window_row,
                window_table_width,
                window_stride,
                D,
                W,
            )
            if page_id > 0:  # not earlier: the reads above need not wait for it
                quantize_keys(keys, out, piece, page == 0, D, G, DRAFT_BYTES, PAGE_BITS)
        else:
            column = piece - D // 32
            channel = tl.arange(0, DP)[None, :]
            values = _load_exact(
                value + head * value_head_stride,
                head_window + D,
                page * G + column * 32 + tl.arange(0, 32),
                channel,
                channel < D,
                page_first,
                own_row,
                value_stride,
                window_row,
                window_table_width,
                window_stride,
                D,
                W,
            )
            if page_id > 0:
                quantize_values(values, out, column, D, DP, G, VG, DRAFT_BYTES, PAGE_BITS)
