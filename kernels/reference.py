"""What the kernels compute: the specification, in plain PyTorch for any device, one request and one token at a time.

Nothing but tests and benchmarks runs this. Shapes and names:

    pages   uint8 [num_blocks, H, head_bytes]      views of the same pool memory; the block stride may be larger.
    window  dtype [num_blocks, H, W, 2*D]          Block 0 is the null block: an entry 0 in a table means "not there".

H KV heads, D channels, G tokens per page, W tokens per window block (keys, then values, in the last dim), R requests,
T tokens. A query at position p reads tokens from window_start(p) on exact, from the window, and older ones from pages.

What a step writes is specified in `step`: `plan_step`, `write_window` and `quantize_completed`.
"""

import torch

from vllm_quantspec.format import (
    PageFormat,
    encode_pages,
    unpack_key_codes,
    unpack_value_codes,
    unpermute_scales,
    unpermute_value_scales,
    window_start,
)


def quantize_pages(
    fmt: PageFormat,
    pages: torch.Tensor,
    page_ids: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    is_first: torch.Tensor | None = None,
) -> None:
    """Quantize exact keys and values [n, G, H, D] into the pages `page_ids` [n], every byte of them; `is_first` as of
    `encode_pages`."""
    pages[page_ids] = encode_pages(fmt, keys, values, is_first)


def dequantize_pages(
    fmt: PageFormat, pages: torch.Tensor, page_ids: torch.Tensor, bits: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [n, G, H, D] of the pages `page_ids` [n], read with 4 or 8 `bits` of each code."""
    fmt.check_bits(bits)
    data = pages[page_ids]
    k_codes, v_codes = (unpack(fmt.field(data, name), fmt.head_size).float() for name, unpack in _UPPER)
    k_scale, k_min = (unpermute_scales(fmt.field(data, name)).float() for name in ("k_scale", "k_min"))
    v_scale, v_min = (unpermute_value_scales(fmt.field(data, name), fmt.group_size).float() for name in ("v_scale", "v_min"))
    if bits == 8:
        # upper * scale + (lower - 8) * scale / 16, as one multiplication of 16 * upper + lower.
        k_lower, v_lower = (unpack(fmt.field(data, name), fmt.head_size).float() for name, unpack in _LOWER)
        k_codes, k_scale, k_min = 16 * k_codes + k_lower, k_scale / 16, k_min - k_scale / 2
        v_codes, v_scale, v_min = 16 * v_codes + v_lower, v_scale / 16, v_min - v_scale / 2
    keys = torch.addcmul(k_min[..., None, :], k_codes, k_scale[..., None, :])
    v_codes = v_codes.unflatten(-1, (fmt.num_value_groups, -1))
    values = torch.addcmul(v_min[..., None], v_codes, v_scale[..., None]).flatten(-2)
    return keys.to(dtype).transpose(1, 2), values.to(dtype).transpose(1, 2)


_UPPER = ("k_upper", unpack_key_codes), ("v_upper", unpack_value_codes)
_LOWER = ("k_lower", unpack_key_codes), ("v_lower", unpack_value_codes)


def exact_start(fmt: PageFormat, window_table_row: torch.Tensor, first: int) -> int:
    """First position from which on a request's window holds every token up to `first`, its step's first position.

    At least window_start(first); later only after a prefix-cache hit, whose tokens have no window blocks.
    """
    start, blocks = window_start(first, fmt.group_size), window_table_row.tolist()
    for position in range(start, first):
        entry = position // fmt.window_block_size
        if entry >= len(blocks) or blocks[entry] <= 0:
            start = position + 1
    return start


def read_cache(
    fmt: PageFormat,
    pages: torch.Tensor,
    window: torch.Tensor,
    block_table_row: torch.Tensor,
    window_table_row: torch.Tensor,
    start: int,
    end: int,
    bits: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A request's keys and values fp32 [end, H, D]: from pages below position `start`, from the window from there on."""
    ids = block_table_row[: -(-start // fmt.group_size)].long()
    old = (x.flatten(0, 1)[:start] for x in dequantize_pages(fmt, pages, ids, bits, torch.float32))
    position = torch.arange(start, end, device=window.device)
    blocks = window_table_row[position // fmt.window_block_size].long()
    exact = window[blocks, :, position % fmt.window_block_size].float().split(fmt.head_size, dim=-1)
    keys, values = (torch.cat(parts) for parts in zip(old, exact, strict=True))
    return keys, values


def attention_probs(
    query: torch.Tensor, keys: torch.Tensor, first: int, softmax_scale: float, keep: torch.Tensor | None = None
) -> torch.Tensor:
    """Probabilities fp32 [H, Hq/H, T, S] of query tokens [T, Hq, D] at positions `first` on over keys [S, H, D].

    `keep` bool [H, S]: what each KV head reads at all.
    """
    q = query.float().unflatten(1, (keys.shape[1], -1))
    scores = torch.einsum("thqd,shd->hqts", q, keys.float()) * softmax_scale
    position = first + torch.arange(len(query), device=query.device)
    hidden = torch.arange(len(keys), device=query.device) > position[:, None]
    if keep is not None:
        hidden = hidden | ~keep[:, None, None]
    return scores.masked_fill(hidden, -torch.inf).softmax(-1)


def causal_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, first: int, softmax_scale: float
) -> torch.Tensor:
    """Attention fp32 [T, Hq, D] of query tokens [T, Hq, D] at positions `first` on over all tokens' [S, H, D]."""
    return torch.einsum("hqts,shd->thqd", attention_probs(query, keys, first, softmax_scale), values.float()).flatten(1, 2)


def chosen_tokens(fmt: PageFormat, selection, block_table_row: torch.Tensor, r: int, length: int) -> torch.Tensor:
    """bool [H, length]: what request r's drafts read of its first `length` tokens; `selection` as in `decode_attention`."""
    begin, count, dense = (int(x[r]) for x in (selection.begin, selection.count, selection.dense_from))
    page = torch.arange(length, device=block_table_row.device) // fmt.group_size
    chosen = selection.page_list[:, begin : begin + count]
    listed = (block_table_row[page][None, :, None] == chosen[:, None]).any(-1)
    return listed & (page < dense) | (page >= dense)


def decode_attention(
    fmt: PageFormat,
    pages: torch.Tensor,
    window: torch.Tensor,
    query: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    window_block_table: torch.Tensor,
    softmax_scale: float,
    bits: int,
    selection=None,
    scores: torch.Tensor | None = None,
    begin: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of a few query tokens per request; the step's own keys and values are in the window already.

    Args:
        query: [T, Hq, D], the tokens of all requests one after another.
        query_start_loc: [R+1]; query tokens of one request may be any number, even 0.
        seq_lens: [R], lengths that include the step's own tokens.
        block_table: [R, any], page ids; entry = position // G.
        window_block_table: [R, any], window block ids; entry = position // W.
        bits: of each code that are read: 4 reads the upper codes of pages, 8 both.
        selection: of one layer, with page_list [H, C], begin, count and dense_from [R] of `cpu_page_selection`: of pages
            below dense_from, only those of the list are read.
        scores: [H, C, Q], gets the attention mass of the pages below window_start of each request's first token, at
            begin [R] on.

    Returns:
        [T, Hq, D] in the query's dtype.
    """
    fmt.check_bits(bits)
    starts, out = query_start_loc.tolist(), torch.zeros_like(query)
    for r, seq_len in enumerate(seq_lens.tolist()):
        first = seq_len - (starts[r + 1] - starts[r])
        exact = exact_start(fmt, window_block_table[r], first)
        for i in range(starts[r], starts[r + 1]):
            position = first + i - starts[r]
            start = max(window_start(position, fmt.group_size), exact)
            caches = (pages, window, block_table[r], window_block_table[r])
            keys, values = read_cache(fmt, *caches, start, position + 1, bits)
            keep = None if selection is None else chosen_tokens(fmt, selection, block_table[r], r, position + 1)
            probs = attention_probs(query[i : i + 1], keys, position, softmax_scale, keep)
            out[i] = torch.einsum("hqts,shd->thqd", probs, values.float()).flatten(1, 2)[0]
            if scores is not None:
                count = window_start(first, fmt.group_size) // fmt.group_size
                mass = probs[:, :, 0, : count * fmt.group_size].unflatten(-1, (count, fmt.group_size)).sum((1, 3))
                scores[:, int(begin[r]) : int(begin[r]) + count, i - starts[r]] = mass.to(scores.dtype)
    return out


def prefill_attention(
    fmt: PageFormat,
    pages: torch.Tensor,
    window: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    seq_len: int,
    block_table_row: torch.Tensor,
    window_table_row: torch.Tensor,
    softmax_scale: float,
) -> torch.Tensor:
    """Causal attention of one request's prefill chunk: pages and window as its first token reads them, then itself.

    Args:
        query: [T, Hq, D]; key, value: [T, H, D], the chunk's own.
        seq_len: length that includes the chunk.
        block_table_row, window_table_row: the request's page ids and window block ids.

    Returns:
        [T, Hq, D] in the query's dtype.
    """
    first = seq_len - len(query)
    start = exact_start(fmt, window_table_row, first)
    old = read_cache(fmt, pages, window, block_table_row, window_table_row, start, first, fmt.bits)
    keys, values = (torch.cat((x.to(query.dtype), own)) for x, own in zip(old, (key, value), strict=True))
    return causal_attention(query, keys, values, first, softmax_scale).to(query.dtype)
