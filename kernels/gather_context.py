"""The context before a prefill chunk, dequantized into contiguous keys and values: a Triton kernel.

`reference.prefill_attention` reads the same context the same way. As in `cache_update`, lengths and addresses are read on
the device, and the grid depends on shapes and host integers only.
"""

import torch

from vllm_quantspec.format import PageFormat
from vllm_quantspec.kernels.cache_update import exact_start
from vllm_quantspec.kernels.launch import (
    check_device,
    check_int32,
    check_pages,
    check_rows,
    check_window,
    jit,
    power_of_two,
    tl,
)

# Found on an H200 (see benchmarks/NOTES.md).
UNITS = 1  # rows of 32 tokens that a CTA holds at a time
WARPS = 4


def gather_context(
    fmt: PageFormat,
    pages: torch.Tensor,
    window: torch.Tensor,
    out_key: torch.Tensor,
    out_value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    starts: torch.Tensor,
    first: torch.Tensor,
    block_table: torch.Tensor,
    window_block_table: torch.Tensor,
    *,
    max_len: int,
    bits: int | None = None,
) -> None:
    """Write a piece of each request's context to its rows cu_seqlens[r] to cu_seqlens[r+1] of out_key and out_value.

    The rows are the tokens at positions starts[r] on, as the query token at position first[r] reads them: exact, from
    the window, from max(window_start(first), exact_start) on, else from pages. Tokens at first[r] or later that have no
    window block, and rows of no request, are left as they are.

    Args:
        pages: uint8 [num_blocks, H, head_bytes]; the strides of blocks and heads are free, but even.
        window: fmt.dtype [num_blocks, H, W, 2*D]; the strides of blocks and heads are free.
        out_key, out_value: bfloat16, float16 or float32 [S, H, D]; the strides of rows and heads are free.
        cu_seqlens: int32 [R+1]; pieces may be empty.
        starts: int32 [R], position of each piece's first token.
        first: int32 [R], position of the chunk's first own token.
        block_table: int32 [R, any], page ids; entry = position // G.
        window_block_table: int32 [R, any], window block ids; entry = position // W, 0 = no block.
        max_len: no piece is longer than this.
        bits: of each code that are read: 4 reads the upper codes of pages, 8 both; None all that the pages have.

    Raises:
        ValueError: if an argument does not fit the above.
        RuntimeError: where Triton is not installed.
    """
    bits = fmt.bits if bits is None else bits
    fmt.check_bits(bits)
    if max_len < 1:
        raise ValueError(f"max_len must be at least 1, got {max_len}.")
    check_pages(fmt, pages)
    check_window(fmt, window)
    check_rows(fmt, out_key=out_key, out_value=out_value)
    check_int32(
        cu_seqlens=cu_seqlens, starts=starts, first=first, block_table=block_table, window_block_table=window_block_table
    )
    if out_key.dtype != out_value.dtype:
        raise ValueError(f"out_key and out_value must have one dtype, got {out_key.dtype} and {out_value.dtype}.")
    requests = starts.shape[0]
    if cu_seqlens.shape[0] != requests + 1 or any(x.shape[0] != requests for x in (first, block_table, window_block_table)):
        raise ValueError(f"cu_seqlens, first and the tables must fit the {requests} requests of starts.")
    check_device(window)
    group, dim = fmt.group_size, fmt.head_size
    # A piece may begin at any token of its first page.
    _gather[((max_len + 2 * group - 2) // group, 2 * fmt.num_kv_heads, requests)](
        pages,
        window,
        out_key,
        out_value,
        cu_seqlens,
        starts,
        first,
        block_table,
        window_block_table,
        pages.stride(0),
        pages.stride(1),
        window.stride(0),
        window.stride(1),
        out_key.stride(0),
        out_key.stride(1),
        out_value.stride(0),
        out_value.stride(1),
        block_table.stride(0),
        block_table.shape[1],
        window_block_table.stride(0),
        window_block_table.shape[1],
        D=dim,
        G=group,
        W=fmt.window_block_size,
        VG=fmt.value_group_size,
        DP=power_of_two(dim),
        CODE_BITS=bits,
        UNITS=UNITS,
        num_warps=WARPS,
    )


@jit
def _float(codes):
    """Codes uint8 -> fp32, without the slow conversion instruction."""
    return (codes.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0


@jit
def _load_codes(
    upper, D: tl.constexpr, DP: tl.constexpr, DRAFT_BYTES: tl.constexpr, CODE_BITS: tl.constexpr, UNITS: tl.constexpr
):
    """Codes uint8 [UNITS, DP/32, g, t, y, e, par, b] of UNITS rows (keys) or columns (values) of tiles at `upper`."""
    byte = tl.arange(0, UNITS * DP * 16)
    if D == DP:
        at = upper + byte
        mask = byte >= 0
    else:
        at = upper + byte // (DP * 16) * (D * 16) + byte % (DP * 16)
        mask = byte % (DP * 16) < D * 16
    u = tl.load(at, mask=mask, other=0)
    if CODE_BITS == 8:
        w = tl.load(at + DRAFT_BYTES, mask=mask, other=0)
        codes = tl.join((u << 4) | (w & 15), (u & 0xF0) | (w >> 4))
    else:
        codes = tl.join(u & 15, u >> 4)
    return tl.reshape(codes, (UNITS, DP // 32, 8, 4, 4, 2, 2, 2))


@jit
def _factor_and_offset(scales, minima, CODE_BITS: tl.constexpr):
    s = tl.load(scales).to(tl.float32)
    z = tl.load(minima).to(tl.float32)
    if CODE_BITS == 8:  # codes are 16 * upper + lower + 8
        z = z - s * 0.5
        s = s * 0.0625
    return s, z


@jit
def _gather_keys(
    head_page,
    out,
    out_stride,
    row_zero,
    page,
    begin,
    end,
    D: tl.constexpr,
    DP: tl.constexpr,
    G: tl.constexpr,
    DRAFT_BYTES: tl.constexpr,
    CODE_BITS: tl.constexpr,
    UNITS: tl.constexpr,
):
    TOKENS: tl.constexpr = 32 * UNITS
    channel = tl.arange(0, DP)[None, :]
    # channel = s*16 + h*8 + t*2 + e, stored as [t][s][h][e]
    at = channel // 2 % 4 * (D // 4) + channel // 16 * 4 + channel // 8 % 2 * 2 + channel % 2
    at = (head_page + G * D).to(tl.pointer_type(tl.float16)) + tl.where(channel < D, at, 0)
    s, z = _factor_and_offset(at, at + D, CODE_BITS)
    for unit in range(0, G // TOKENS):
        position = page * G + unit * TOKENS + tl.arange(0, TOKENS)
        codes = _load_codes(head_page + unit * (TOKENS * D // 2), D, DP, DRAFT_BYTES, CODE_BITS, UNITS)
        # (n, j, g, t, y, e, par, b) -> (n, y, g, j, par, b, t, e)
        codes = tl.reshape(tl.permute(codes, (0, 4, 2, 1, 6, 7, 3, 5)), (TOKENS, DP))
        x = _float(codes) * s + z
        rows = (row_zero + position).to(tl.int64) * out_stride
        mask = ((position >= begin) & (position < end))[:, None] & (channel < D)
        tl.store(out + rows[:, None] + channel, x.to(out.dtype.element_ty), mask=mask)


@jit
def _gather_values(
    head_page,
    out,
    out_stride,
    row_zero,
    page,
    begin,
    end,
    D: tl.constexpr,
    DP: tl.constexpr,
    G: tl.constexpr,
    VG: tl.constexpr,
    DRAFT_BYTES: tl.constexpr,
    CODE_BITS: tl.constexpr,
    UNITS: tl.constexpr,
):
    TOKENS: tl.constexpr = 32 * UNITS
    channel = tl.arange(0, DP)[None, :]
    scales = (head_page + G * D + 4 * D).to(tl.pointer_type(tl.float16))
    for unit in range(0, G // TOKENS):
        token = unit * TOKENS + tl.arange(0, TOKENS)
        # token = s*16 + h*8 + t*2 + e, stored as [t][s][h][e], for each group of channels
        at = (token // 2 % 4 * (G // 4) + token // 16 * 4 + token // 8 % 2 * 2 + token % 2)[:, None]
        if VG < D:
            at = tl.where(channel < D, at + channel // VG * G, 0)
        s, z = _factor_and_offset(scales + at, scales + at + D // VG * G, CODE_BITS)
        codes = _load_codes(head_page + (G + unit * TOKENS) * D // 2, D, DP, DRAFT_BYTES, CODE_BITS, UNITS)
        # (n, dq, g, t, y, e, par, b) -> (n, par, b, t, e, dq, y, g)
        codes = tl.reshape(tl.permute(codes, (0, 6, 7, 3, 5, 1, 4, 2)), (TOKENS, DP))
        x = _float(codes) * s + z
        position = page * G + token
        rows = (row_zero + position).to(tl.int64) * out_stride
        mask = ((position >= begin) & (position < end))[:, None] & (channel < D)
        tl.store(out + rows[:, None] + channel, x.to(out.dtype.element_ty), mask=mask)


@jit(
    do_not_specialize=["table_stride", "table_width", "window_table_stride", "window_table_width"],
    do_not_specialize_on_alignment=["cu_seqlens", "starts", "firsts", "block_table", "window_table"],
)
def _gather(
    pages,
    window,
    out_key,
    out_value,
    cu_seqlens,
    starts,
    firsts,
    block_table,
    window_table,
    page_stride,
    page_head_stride,
    window_stride,
    window_head_stride,
    key_stride,
    key_head_stride,
    value_stride,
    value_head_stride,
    table_stride,
    table_width,
    window_table_stride,
    window_table_width,
    D: tl.constexpr,
    G: tl.constexpr,
    W: tl.constexpr,
    VG: tl.constexpr,
    DP: tl.constexpr,
    CODE_BITS: tl.constexpr,
    UNITS: tl.constexpr,
):
    DRAFT_BYTES: tl.constexpr = G * D + 4 * D + 4 * G * (D // VG)
    TOKENS: tl.constexpr = 32 * UNITS
    r = tl.program_id(2)
    head = tl.program_id(1) // 2
    is_value = tl.program_id(1) % 2
    row_start = tl.load(cu_seqlens + r)
    length = tl.load(cu_seqlens + r + 1) - row_start
    begin = tl.load(starts + r)
    first = tl.load(firsts + r)
    page = begin // G + tl.program_id(0)
    if page * G >= begin + length:
        return
    row = r.to(tl.int64)
    page_id = tl.load(block_table + row * table_stride + page, mask=page < table_width, other=0)
    window_row = window_table + row * window_table_stride
    one = tl.zeros((1,), tl.int32)
    boundary = tl.max(exact_start(one + first, window_row + one, window_table_width, one == 0, G, W), axis=0)

    head_page = pages + page_id.to(tl.int64) * page_stride + head * page_head_stride
    channel = tl.arange(0, DP)[None, :]
    if is_value == 0:
        out, out_stride = out_key + head * key_head_stride, key_stride
    else:
        out, out_stride = out_value + head * value_head_stride, value_stride
    old_end = tl.minimum(boundary, begin + length)

    row_zero = row_start - begin  # where position 0 would be
    if page * G < boundary:
        if is_value == 0:
            _gather_keys(head_page, out, out_stride, row_zero, page, begin, old_end, D, DP, G, DRAFT_BYTES, CODE_BITS, UNITS)
        else:
            _gather_values(
                head_page, out, out_stride, row_zero, page, begin, old_end, D, DP, G, VG, DRAFT_BYTES, CODE_BITS, UNITS
            )

    if page * G + G > boundary:
        exact = window + head * window_head_stride + is_value * D
        for unit in range(0, G // TOKENS):
            position = page * G + unit * TOKENS + tl.arange(0, TOKENS)
            entry = position // W
            due = (position >= begin) & (position >= boundary) & (position < begin + length)
            block = tl.load(window_row + entry, mask=due & (entry < window_table_width), other=0)
            mask = (block > 0)[:, None] & (channel < D)
            at = block.to(tl.int64) * window_stride + position % W * (2 * D)
            x = tl.load(exact + at[:, None] + channel, mask=mask)
            rows = (row_zero + position).to(tl.int64) * out_stride
            tl.store(out + rows[:, None] + channel, x.to(out_key.dtype.element_ty), mask=mask)
