"""Attention of a prefill chunk on the CPU: pages dequantized in a few operations, then PyTorch's fused attention."""

from functools import cache

import torch
import torch.nn.functional as F

from vllm_quantspec.format import PageFormat, unpermute_scales, unpermute_value_scales
from vllm_quantspec.kernels.step import exact_start

# Multiples to which the queries, and the tokens before them, are padded.
QUERY_PADDING, CONTEXT_PADDING = 64, 256


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
    """Arguments and result as of `reference.prefill_attention`; tensors are on the CPU."""
    num_tokens, dtype, size = query.shape[0], query.dtype, fmt.window_block_size
    first = seq_len - num_tokens
    start = int(exact_start(fmt, window_table_row[None], torch.tensor([first])))

    keys, values = [key], [value]
    if start < first:
        blocks = window[window_table_row[start // size : (first - 1) // size + 1]].transpose(1, 2).flatten(0, 1)
        exact = blocks[start % size : start % size + first - start].to(dtype)
        keys.insert(0, exact[..., : fmt.head_size])
        values.insert(0, exact[..., fmt.head_size :])
    if start > 0:
        ids = block_table_row[: -(-start // fmt.group_size)]
        old_keys, old_values = dequantize_pages(fmt, pages, ids, fmt.bits, dtype)
        keys.insert(0, old_keys.flatten(0, 1)[:start])
        values.insert(0, old_values.flatten(0, 1)[:start])
    keys, values = (torch.cat(x).transpose(0, 1) for x in (keys, values))  # [H, S, D]
    # Query heads of one KV head form the batch, over which keys and values are broadcast, not copied.
    q = query.view(num_tokens, fmt.num_kv_heads, -1, fmt.head_size).permute(2, 1, 0, 3)
    k, v = (x.expand(q.shape[0], -1, -1, -1) for x in (keys, values))
    return _causal_suffix(q, k, v, softmax_scale).permute(2, 1, 0, 3).flatten(1, 2)


def _causal_suffix(q, k, v, softmax_scale):
    """Attention of the last tokens q [B, H, T, D] of a sequence k, v [B, H, S, D], by PyTorch's fused kernel.

    Without a mask: what lies before q, and q itself, are joined by their log-sum-exps.

    Lengths are padded, since PyTorch keeps what it has compiled for each length: a server's memory would grow with every
    new one.
    """
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    num_tokens = q.shape[2]
    first = k.shape[2] - num_tokens
    own = (0, 0, 0, -num_tokens % QUERY_PADDING)
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


# --- Pages ------------------------------------------------------------------------------------------------------------


def dequantize_pages(
    fmt: PageFormat, pages: torch.Tensor, page_ids: torch.Tensor, bits: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [n, G, H, D] of the pages `page_ids` [n], read with 4 or 8 `bits`."""
    fmt.check_bits(bits)
    data = pages.view(torch.int64)[page_ids].view(torch.uint8)
    k_scale, k_min = (unpermute_scales(fmt.field(data, name)).float() for name in ("k_scale", "k_min"))
    v_scale, v_min = (unpermute_value_scales(fmt.field(data, name), fmt.group_size).float() for name in ("v_scale", "v_min"))
    if bits == 8:
        # One multiplication for both halves of the code.
        k_scale, k_min = k_scale / 16, k_min - k_scale / 2
        v_scale, v_min = v_scale / 16, v_min - v_scale / 2
    keys = torch.addcmul(k_min[..., None, :], _codes(fmt, data, "k", bits), k_scale[..., None, :])
    values = _codes(fmt, data, "v", bits).unflatten(-1, (fmt.num_value_groups, -1))
    values = torch.addcmul(v_min[..., None], values, v_scale[..., None]).flatten(-2)
    return keys.to(dtype).transpose(1, 2), values.to(dtype).transpose(1, 2)


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


@cache
def _code_order(kind: str, group_size: int, head_size: int, device: torch.device) -> torch.Tensor:
    """Where code [token, channel] lies in all low nibbles, then all high nibbles, of the stored bytes; [G*D]."""
    half = group_size * head_size // 2
    tiles = (group_size // 32, head_size // 32)
    order = torch.arange(2 * half, device=device).view(2, *tiles, 8, 4, 4, 2, 2)
    # keys (b, tq, j, g, t, y, e, par) -> (tq, y, g, j, par, b, t, e)
    # values (b, jp, dq, g, t, y, e, par) -> (jp, par, b, t, e, dq, y, g)
    return order.permute((1, 5, 3, 2, 7, 0, 4, 6) if kind == "k" else (1, 7, 0, 4, 6, 2, 5, 3)).flatten()
