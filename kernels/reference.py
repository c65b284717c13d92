"""The operations on quantized pages and window blocks, in plain PyTorch, for any device.

They define what the other kernels must compute, and serve the CPU. Shapes and names:

    pages   uint8 [num_blocks, H, head_bytes]      views of the same pool memory; the block stride may be larger.
    window  dtype [num_blocks, H, W, 2*D]          Block 0 is the null block: an entry 0 in a table means "not there".

H KV heads, D channels, G tokens per page, W tokens per window block (keys, then values, in the last dim), R requests,
T tokens. A query at position p reads tokens from window_start(p) on exact, from the window, and older ones from pages.
"""

from functools import cache

import torch
import torch.nn.functional as F

from vllm_quantspec.format import (
    PageFormat,
    check_bits,
    pack_key_codes,
    pack_value_codes,
    permute_scales,
    permute_value_scales,
    quantize_keys,
    quantize_values,
    unpermute_scales,
    unpermute_value_scales,
    window_start,
)

# fp32 codes that one chunk of `decode_attention` unpacks at a time; keys, then values, stay in the L2 cache.
CHUNK_BYTES = 2 << 20
# Multiples to which a CPU prefill pads its queries, and the tokens before them.
PREFILL_PADDING, CONTEXT_PADDING = 64, 256
# Attention scores that one block of `prefill_attention` may hold, in elements of one query head.
PREFILL_SCORES = 1 << 25


# --- The window -------------------------------------------------------------------------------------------------------


def write_window(fmt: PageFormat, window: torch.Tensor, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    """Store key and value [T, H, D] at `slots` int64 [T] = window block id * W + offset; slots below W are skipped."""
    size = fmt.window_block_size
    block, offset = slots.clamp(min=0) // size, slots.clamp(min=0) % size
    new = torch.cat((key, value), dim=-1).to(window.dtype)
    # A skipped token rewrites what its slot of the null block holds: no boolean index, so no host synchronisation.
    new = torch.where((slots >= size)[:, None, None], new, window[block, :, offset])
    window[block, :, offset] = new


def window_slots(
    fmt: PageFormat, window_block_table: torch.Tensor, row_of_token: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """Slots int64 [T] of tokens at `positions` [T] of requests `row_of_token` [T]; -1 where the table has no block."""
    size, width = fmt.window_block_size, window_block_table.shape[1]
    entry = positions // size
    block = window_block_table[row_of_token, entry.clamp(0, width - 1)].long()
    there = (block > 0) & (entry < width) & (positions >= 0)
    return torch.where(there, block * size + positions % size, -1)


def exact_start(fmt: PageFormat, window_block_table: torch.Tensor, first_positions: torch.Tensor) -> torch.Tensor:
    """First position [R] from which on each request's window holds every token up to its `first_positions` [R].

    At least window_start(first position); later only after a prefix-cache hit, whose tokens have no window blocks.
    """
    size, width = fmt.window_block_size, window_block_table.shape[1]
    start = window_start(first_positions, fmt.group_size)
    entries = start[:, None] // size + torch.arange(2 * fmt.group_size // size, device=start.device)
    blocks = window_block_table.gather(1, entries.clamp(max=width - 1).long())
    missing = (blocks <= 0) & (entries * size < first_positions[:, None])
    after_missing = torch.where(missing, (entries + 1) * size, 0).amax(dim=1)
    return torch.minimum(torch.maximum(start, after_missing), first_positions)


# --- Pages ------------------------------------------------------------------------------------------------------------


def quantize_pages(
    fmt: PageFormat, pages: torch.Tensor, page_ids: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
) -> None:
    """Quantize exact keys and values [n, G, H, D] into the pages `page_ids` [n], every byte of them."""
    k_upper, k_lower, k_scale, k_min = quantize_keys(keys.transpose(1, 2))
    v_upper, v_lower, v_scale, v_min = quantize_values(values.transpose(1, 2), fmt.value_group_size)
    fields = {
        "k_upper": pack_key_codes(k_upper),
        "v_upper": pack_value_codes(v_upper),
        "k_scale": permute_scales(k_scale),
        "k_min": permute_scales(k_min),
        "v_scale": permute_value_scales(v_scale),
        "v_min": permute_value_scales(v_min),
        "k_lower": pack_key_codes(k_lower),
        "v_lower": pack_value_codes(v_lower),
    }
    stored = [fields[name].contiguous().view(torch.uint8) for name in fmt.field_ranges]
    pages[page_ids] = torch.cat(stored, dim=-1)


def dequantize_pages(
    fmt: PageFormat, pages: torch.Tensor, page_ids: torch.Tensor, bits: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [n, G, H, D] of the pages `page_ids` [n], bits with 4 or 8 `bits`."""
    check_bits(bits)
    data = pages.view(torch.int64)[page_ids].view(torch.uint8)
    k_scale, k_min = (unpermute_scales(fmt.field(data, name)).float() for name in ("k_scale", "k_min"))
    v_scale, v_min = (unpermute_value_scales(fmt.field(data, name), fmt.group_size).float() for name in ("v_scale", "v_min"))
    if bits == 8:
        # As in `_scales`: one multiplication for both halves of the code.
        k_scale, k_min = k_scale / 16, k_min - k_scale / 2
        v_scale, v_min = v_scale / 16, v_min - v_scale / 2
    keys = torch.addcmul(k_min[..., None, :], _codes(fmt, data, "k", bits), k_scale[..., None, :])
    values = _codes(fmt, data, "v", bits).unflatten(-1, (fmt.num_value_groups, -1))
    values = torch.addcmul(v_min[..., None], values, v_scale[..., None]).flatten(-2)
    return keys.to(dtype).transpose(1, 2), values.to(dtype).transpose(1, 2)


@cache
def _code_order(kind: str, group_size: int, head_size: int, device: torch.device) -> torch.Tensor:
    """Where code [token, channel] lies in all low nibbles, then all high nibbles, of the stored bytes; [G*D]."""
    half = group_size * head_size // 2
    tiles = (group_size // 32, head_size // 32)
    order = torch.arange(2 * half, device=device).view(2, *tiles, 8, 4, 4, 2, 2)
    # keys (b, tq, j, g, t, y, e, par) -> (tq, y, g, j, par, b, t, e)
    # values (b, jp, dq, g, t, y, e, par) -> (jp, par, b, t, e, dq, y, g)
    return order.permute((1, 5, 3, 2, 7, 0, 4, 6) if kind == "k" else (1, 7, 0, 4, 6, 2, 5, 3)).flatten()


def _codes(fmt: PageFormat, data: torch.Tensor, kind: str, bits: int) -> torch.Tensor:
    """Codes fp32 [n, H, G, D] of the keys or values ("k", "v") of pages `data`: U or 16*U + L + 8."""
    upper = fmt.field(data, kind + "_upper")
    even, odd = upper & 15, upper >> 4
    if bits == 8:
        lower = fmt.field(data, kind + "_lower")
        even, odd = even * 16 + (lower & 15), odd * 16 + (lower >> 4)
    codes = torch.cat((even, odd), dim=-1)
    order = _code_order(kind, fmt.group_size, fmt.head_size, data.device)
    return codes.gather(-1, order.expand(codes.shape)).float().unflatten(-1, (fmt.group_size, fmt.head_size))


# --- Decode -----------------------------------------------------------------------------------------------------------


@cache
def _column_order(length: int, device: torch.device) -> torch.Tensor:
    """Columns (see format.py) in the order in which `_field_rows` leaves them: b, then j, t, e, par."""
    # column = j*32 + par*16 + b*8 + t*2 + e
    return torch.arange(length, device=device).view(-1, 2, 2, 4, 2).permute(2, 0, 3, 4, 1).flatten()


@cache
def _scale_order(length: int, device: torch.device) -> torch.Tensor:
    """Where the scales of columns in `_column_order` are stored."""
    # (t, j, par, b, e) -> (b, j, t, e, par)
    return torch.arange(length, device=device).view(4, -1, 2, 2, 2).permute(3, 1, 0, 4, 2).flatten()


def _scales(fmt: PageFormat, data: torch.Tensor, kind: str, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Factor and offset fp32 of the codes of `_field_rows`: keys' [n, H, D], values' [n, H, value groups, G]."""
    shape = (fmt.head_size,) if kind == "k" else (fmt.num_value_groups, fmt.group_size)
    stored = [fmt.field(data, kind + name).unflatten(-1, shape).float() for name in ("_scale", "_min")]
    order = _scale_order(shape[-1], data.device)
    scale, minimum = (x.gather(-1, order.expand(x.shape)) for x in stored)
    if bits == 4:
        return scale, minimum
    return scale / 16, minimum - scale / 2  # 8 steps of scale / 16: the lower codes are stored + 8


@cache
def _key_words(group_size: int, head_size: int, device: torch.device) -> torch.Tensor:
    """Stored 32-bit words of keys, in the order rows (tokens in `_column_order`) x words (j, t); [G*D/8]."""
    words = torch.arange(group_size * head_size // 8, device=device)
    # (tq, j, t', e', t, par', b') -> (b', tq, t', e', par', j, t), where token = tq*32 + par'*16 + b'*8 + t'*2 + e'
    return words.view(group_size // 32, head_size // 32, 4, 2, 4, 2, 2).permute(6, 0, 2, 3, 5, 1, 4).flatten()


@cache
def _value_words(group_size: int, head_size: int, device: torch.device) -> torch.Tensor:
    """Stored 32-bit words of values, in the order rows (channels) x words (jp, t); [G*D/8]."""
    words = torch.arange(group_size * head_size // 8, device=device)
    # (jp, dq, g, t, y) -> (dq, y, g, jp, t)
    return words.view(group_size // 32, head_size // 32, 8, 4, 4).permute(1, 4, 2, 0, 3).flatten()


def _field_rows(
    fmt: PageFormat, data: torch.Tensor, kind: str, order: torch.Tensor, bits: int, scratch: torch.Tensor
) -> torch.Tensor:
    """Codes fp32 [n, H, G*D] of the keys or values ("k", "v") of pages `data` [n, H, bytes].

    Rows of columns, these in `_column_order`; U for the draft, 16*U + L + 8 for the target. The result lies in
    `scratch`, because converting into fresh memory is slower.
    """
    # Moving words is an eighth of the work of moving codes, and `gather` moves them faster than a strided copy does.
    upper = _gather_words(fmt.field(data, kind + "_upper"), order)
    nibbles, high_nibbles = 0x0F0F0F0F, -0x0F0F0F10
    columns = fmt.head_size if kind == "k" else fmt.group_size
    if bits == 4:
        even, odd = upper & nibbles, (upper >> 4).bitwise_and_(nibbles)
    else:
        lower = _gather_words(fmt.field(data, kind + "_lower"), order)
        even = (upper & nibbles).bitwise_left_shift_(4).bitwise_or_(lower & nibbles)
        odd = (upper & high_nibbles).bitwise_or_((lower >> 4).bitwise_and_(nibbles))
    halves = [words.unflatten(-1, (-1, columns // 8)) for words in (even, odd)]
    codes = torch.cat(halves, dim=-1).flatten(2).view(torch.uint8)
    return scratch[: codes.numel()].view(codes.shape).copy_(codes)


def _gather_words(field: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    words = field.view(torch.int32)
    return words.gather(-1, order.expand(words.shape))


class _SoftmaxSum:
    """A running softmax-weighted sum over chunks of tokens, per request, head and query row."""

    def __init__(self, shape: tuple[int, ...], head_size: int, device: torch.device):
        # Finite, so that a masked score (-inf) minus this is never NaN.
        self.maximum = torch.full(shape, -1e30, device=device)
        self.total = torch.zeros(shape, device=device)
        self.output = torch.zeros(*shape, head_size, device=device)

    def add(self, requests: torch.Tensor, scores: torch.Tensor, weighted_sum) -> None:
        """Add tokens with `scores` [n, H, M, tokens] of the sorted `requests` [n].

        `weighted_sum` maps probabilities like `scores` to [n, H, M, D].
        """
        first, last = int(requests[0]), int(requests[-1])
        span, index = slice(first, last + 1), requests - first
        maximum, total, output = self.maximum[span], self.total[span], self.output[span]
        if first == last:
            new = torch.maximum(maximum, scores.amax(dim=(0, -1)))
            probs = scores.sub_(new[0, ..., None]).exp_()
        else:
            highest = scores.amax(dim=-1)
            new = maximum.scatter_reduce(0, index[:, None, None].expand_as(highest), highest, "amax")
            probs = scores.sub_(new[index][..., None]).exp_()
        decay = (maximum - new).exp_()
        maximum.copy_(new)
        total.mul_(decay).index_add_(0, index, probs.sum(dim=-1))
        output.mul_(decay[..., None]).index_add_(0, index, weighted_sum(probs))

    def result(self) -> torch.Tensor:
        return self.output / self.total.clamp(min=1e-30)[..., None]


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
) -> torch.Tensor:
    """Causal attention of a few query tokens per request; the step's own keys and values are in the window already.

    Args:
        query: [T, Hq, D], the tokens of all requests one after another.
        query_start_loc: [R+1]; query tokens of one request may be any number, even 0.
        seq_lens: [R], lengths that include the step's own tokens.
        block_table: [R, any], page ids; entry = position // G.
        window_block_table: [R, any], window block ids; entry = position // W.
        bits: of each code that are read: 4 reads the upper codes of pages, 8 both.

    Returns:
        [T, Hq, D] in the query's dtype.
    """
    check_bits(bits)
    device, heads, dim = query.device, fmt.num_kv_heads, fmt.head_size
    per_head = query.shape[1] // heads
    query_lens = query_start_loc.diff()
    rows = max(1, int(query_lens.max()))
    requests = torch.repeat_interleave(query_lens)
    offsets = torch.arange(len(requests), device=device) - query_start_loc[requests]

    # Query rows of one request and KV head, padded to the longest request: [R, H, rows * per_head, D].
    padded = torch.zeros(len(seq_lens), rows, heads, per_head, dim, device=device)
    padded[requests, offsets] = query[: len(requests)].view(-1, heads, per_head, dim).float() * softmax_scale
    q = padded.permute(0, 2, 1, 3, 4).flatten(2, 3)

    first = (seq_lens - query_lens).clamp(min=0)
    last = seq_lens - 1
    positions = torch.minimum(first[:, None] + torch.arange(rows, device=device), last[:, None])
    start = exact_start(fmt, window_block_table, first)
    boundary = torch.maximum(window_start(positions, fmt.group_size), start[:, None])  # [R, rows], ascending
    per_row = [x.repeat_interleave(per_head, dim=1) for x in (positions, boundary)]  # [R, M]

    acc = _SoftmaxSum(q.shape[:3], dim, device)
    _add_window(acc, fmt, window, window_block_table, q, *per_row, query_lens > 0)
    _add_pages(acc, fmt, pages, block_table, q, per_row[1], bits)
    output = acc.result().unflatten(2, (rows, per_head)).transpose(1, 2)  # [R, rows, H, per_head, D]
    result = torch.zeros_like(query)
    result[: len(requests)] = output[requests, offsets].flatten(1, 2).to(query.dtype)
    return result


def _flatten_ranges(first: torch.Tensor, count: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Request and value of every element of the ranges [first, first + count) of R requests."""
    requests = torch.repeat_interleave(count)
    starts = count.cumsum(0) - count
    return requests, torch.arange(len(requests), device=count.device) - starts[requests] + first[requests]


def _add_window(acc, fmt, window, window_block_table, q, positions, boundary, active) -> None:
    """Window blocks from the first row's boundary to the last row's position; q [R, H, M, D], the rest [R, M]."""
    size = fmt.window_block_size
    first, last = boundary[:, 0], positions[:, -1]
    count = torch.where(active, last // size - first // size + 1, 0).clamp(min=0)
    requests, entries = _flatten_ranges(first // size, count)
    blocks = window_block_table[requests, entries]
    tokens = entries[:, None] * size + torch.arange(size, device=q.device)
    chunk = max(1, CHUNK_BYTES // (window[0].numel() * 4))
    for i in range(0, len(requests), chunk):
        r, token = requests[i : i + chunk], tokens[i : i + chunk]
        keys, values = window[blocks[i : i + chunk]].float().split(fmt.head_size, dim=-1)
        scores = q[r] @ keys.transpose(-1, -2)
        token_rows = token[:, None, :]
        hidden = (token_rows < boundary[r][..., None]) | (token_rows > positions[r][..., None])
        scores.masked_fill_(hidden[:, None], -torch.inf)
        # Memory that no row reads may hold NaN, and 0 * NaN is NaN.
        unread = hidden.all(dim=1)
        values = values.masked_fill(unread[:, None, :, None], 0)
        acc.add(r, scores, lambda probs, values=values: probs @ values)


def _add_pages(acc, fmt, pages, block_table, q, boundary, bits) -> None:
    """Pages below each row's boundary [R, M]; q [R, H, M, D]."""
    group, dim, device = fmt.group_size, fmt.head_size, q.device
    count = (boundary[:, -1] + group - 1) // group
    requests, blocks = _flatten_ranges(torch.zeros_like(count), count)
    if len(requests) == 0:
        return
    ids = block_table[requests, blocks]
    partial = (blocks + 1) * group > boundary[requests, 0]  # pages that the first row does not read whole
    tokens = _column_order(group, device)
    q_columns = q[..., _column_order(dim, device)]
    data_bytes = fmt.draft_bytes if bits == 4 else fmt.head_bytes
    chunk = max(1, CHUNK_BYTES // (fmt.num_kv_heads * group * dim * 4))
    scratch = torch.empty(min(chunk, len(requests)) * fmt.num_kv_heads * group * dim, device=device)
    for i in range(0, len(requests), chunk):
        r = requests[i : i + chunk]
        data = pages[..., :data_bytes].view(torch.int64)[ids[i : i + chunk]].view(torch.uint8)
        scores = _page_scores(fmt, data, q_columns[r], bits, scratch)
        if partial[i : i + chunk].any():
            token = blocks[i : i + chunk, None] * group + tokens
            scores.masked_fill_((token[:, None, :] >= boundary[r][..., None])[:, None], -torch.inf)
        acc.add(r, scores, lambda probs, data=data: _page_sum(fmt, data, probs, bits, scratch))


def _page_scores(fmt, data, q, bits, scratch):
    """q [n, H, M, D] in `_column_order` . keys of pages -> [n, H, M, G], tokens in `_column_order`."""
    order = _key_words(fmt.group_size, fmt.head_size, data.device)
    codes = _field_rows(fmt, data, "k", order, bits, scratch).unflatten(-1, (fmt.group_size, fmt.head_size))
    scale, offset = _scales(fmt, data, "k", bits)
    scores = (q * scale[:, :, None]) @ codes.transpose(-1, -2)
    return scores.add_(q @ offset[..., None])


def _page_sum(fmt, data, probs, bits, scratch):
    """probs [n, H, M, G], tokens in `_column_order`, . values of pages -> [n, H, M, D]."""
    group, value_groups = fmt.group_size, fmt.num_value_groups
    order = _value_words(group, fmt.head_size, data.device)
    codes = _field_rows(fmt, data, "v", order, bits, scratch).unflatten(-1, (value_groups, -1, group))
    scale, offset = _scales(fmt, data, "v", bits)
    probs = probs[:, :, None]  # [n, H, 1, M, G] against [n, H, value groups, ...]
    output = (probs * scale[..., None, :]) @ codes.transpose(-1, -2)
    output = output.add_(probs @ offset[..., None])
    return output.transpose(2, 3).flatten(3)


# --- Prefill ----------------------------------------------------------------------------------------------------------


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
    num_tokens, dtype, size = query.shape[0], query.dtype, fmt.window_block_size
    first = torch.tensor([seq_len - num_tokens], device=query.device)
    start = torch.maximum(window_start(first, fmt.group_size), exact_start(fmt, window_table_row[None], first))
    first, start = int(first), int(start)

    keys, values = [key], [value]
    if start < first:
        blocks = window[window_table_row[start // size : (first - 1) // size + 1]].transpose(1, 2).flatten(0, 1)
        exact = blocks[start % size : start % size + first - start].to(dtype)
        keys.insert(0, exact[..., : fmt.head_size])
        values.insert(0, exact[..., fmt.head_size :])
    if start > 0:
        ids = block_table_row[: -(-start // fmt.group_size)]
        old_keys, old_values = dequantize_pages(fmt, pages, ids, 8, dtype)
        keys.insert(0, old_keys.flatten(0, 1)[:start])
        values.insert(0, old_values.flatten(0, 1)[:start])
    keys, values = (torch.cat(x).transpose(0, 1) for x in (keys, values))  # [H, S, D]
    # Query heads of one KV head form the batch, over which keys and values are broadcast, not copied.
    q = query.view(num_tokens, fmt.num_kv_heads, -1, fmt.head_size).permute(2, 1, 0, 3)
    k, v = (x.expand(q.shape[0], -1, -1, -1) for x in (keys, values))
    attend = _causal_suffix_cpu if query.device.type == "cpu" else _causal_suffix
    return attend(q, k, v, softmax_scale).permute(2, 1, 0, 3).flatten(1, 2)


def _causal_suffix(q, k, v, softmax_scale):
    """Attention of the last tokens q [B, H, T, D] of a sequence k, v [B, H, S, D], in blocks of queries."""
    num_tokens, seq_len = q.shape[2], k.shape[2]
    first, outputs = seq_len - num_tokens, []
    step = max(1, PREFILL_SCORES // seq_len)
    for i in range(0, num_tokens, step):
        length = first + min(i + step, num_tokens)
        rows = torch.arange(first + i, length, device=q.device)
        mask = torch.arange(length, device=q.device) <= rows[:, None]
        block = F.scaled_dot_product_attention(
            q[:, :, i : i + step], k[:, :, :length], v[:, :, :length], attn_mask=mask, scale=softmax_scale
        )
        outputs.append(block)
    return torch.cat(outputs, dim=2)


def _causal_suffix_cpu(q, k, v, softmax_scale):
    """The same without a mask: what lies before q, and q itself, by the fused kernel, joined by their log-sum-exps.

    Lengths are padded, since PyTorch keeps what it has compiled for each length: a server's memory would grow with every
    new one.
    """
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    num_tokens = q.shape[2]
    first = k.shape[2] - num_tokens
    own = (0, 0, 0, -num_tokens % PREFILL_PADDING)
    # Rows and keys past the end come after all others: no row sees them that is not cut off again.
    q, own_k, own_v = (F.pad(x, own) for x in (q, k[:, :, first:], v[:, :, first:]))
    out, own_lse = flash(q, own_k, own_v, 0.0, True, scale=softmax_scale)
    if first:
        pad = -first % CONTEXT_PADDING
        old_k, old_v = (F.pad(x[:, :, :first], (0, 0, 0, pad)) for x in (k, v))
        mask = torch.zeros(first + pad, dtype=q.dtype)
        mask[first:] = -torch.inf
        mask = mask.expand(1, 1, q.shape[2], -1) if pad else None
        old, old_lse = flash(q, old_k, old_v, 0.0, False, attn_mask=mask, scale=softmax_scale)
        weight = torch.sigmoid(own_lse - old_lse)[..., None]
        out = torch.lerp(old.float(), out.float(), weight).to(q.dtype)
    return out[:, :, :num_tokens]
