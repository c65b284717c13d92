"""A GPU's prefill, with PyTorch in place of FlashAttention and of the gather kernel: plan, pieces and their merging."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vllm_quantspec.format import PageFormat
from vllm_quantspec.integration.gpu import prefill
from vllm_quantspec.kernels import reference


@pytest.mark.parametrize(("first", "max_tokens"), [([0, 0], 100), ([5], 100), ([300, 0, 7], 64), ([1000, 999, 3], 1)])
def test_pieces_cover_every_context_once(first, max_tokens):
    first = np.array(first, dtype=np.int32)
    seen = [np.zeros(n, dtype=int) for n in first]
    for starts, lengths in prefill.split_context(first, max_tokens):
        assert lengths.sum() <= max(max_tokens, len(first)) and lengths.max() > 0
        for row, start, length in zip(seen, starts, lengths, strict=True):
            row[start : start + length] += 1
            assert start + length <= len(row)
    assert all((row == 1).all() for row in seen)


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize(
    ("lengths", "max_tokens"), [([131072] + 63 * [2000], 65536), (64 * [4000], 65536), ([7, 0, 90000], 1024), ([5], 1024)]
)
def test_as_few_pieces_as_the_tokens_need(lengths, max_tokens, order):
    """One long context beside many short ones is cut no finer than its tokens are."""
    first = np.array(lengths[::order], dtype=np.int32)
    pieces = prefill.split_context(first, max_tokens)
    assert len(pieces) == -(-int(first.sum()) // max_tokens)


def flash_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, return_softmax_lse=False, out=None, **_):
    """What vLLM's flash_attn_varlen_func computes: [T, Hq, D], and log-sum-exps [Hq, T]."""
    result, lses = torch.zeros_like(q) if out is None else out, torch.full((q.shape[1], q.shape[0]), -torch.inf)
    for r in range(len(cu_seqlens_q) - 1):
        (a, b), (c, d) = cu_seqlens_q[r : r + 2].tolist(), cu_seqlens_k[r : r + 2].tolist()
        if a == b or c == d:
            continue
        keys, values = (x[c:d].repeat_interleave(q.shape[1] // x.shape[1], dim=1).float() for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[a:b].float(), keys) * softmax_scale
        if causal:
            hidden = torch.ones(b - a, d - c).triu(1 + (d - c) - (b - a)).bool()
            scores = scores.masked_fill(hidden, -torch.inf)
        lses[:, a:b] = scores.logsumexp(-1)
        result[a:b] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values).to(q.dtype)
    return (result, lses) if return_softmax_lse else result


def gather(fmt, pages, window, out_key, out_value, cu_seqlens, starts, first, block_table, window_table, *, max_len):
    """`gather_context` by the reference: everything older is read from pages, the window from its blocks."""
    size, group = fmt.window_block_size, fmt.group_size
    for r, start in enumerate(starts.tolist()):
        row, end = cu_seqlens[r : r + 2].tolist()
        boundary = reference.exact_start(fmt, window_table[r], int(first[r]))
        for position in range(start, start + end - row):
            if position < boundary:
                keys, values = reference.dequantize_pages(
                    fmt, pages, block_table[r, position // group, None], 8, fmt.dtype
                )
                key, value = keys[0, position % group], values[0, position % group]
            else:
                exact = window[window_table[r, position // size], :, position % size]
                key, value = exact[:, : fmt.head_size], exact[:, fmt.head_size :]
            out_key[row + position - start], out_value[row + position - start] = key, value


@pytest.mark.parametrize("piece", [64, 1024])
def test_against_the_reference(piece, monkeypatch):
    monkeypatch.setattr(prefill, "flash_attn_varlen_func", flash_attention, raising=False)
    monkeypatch.setattr(prefill, "gather_context", gather)
    monkeypatch.setattr(prefill, "piece_tokens", lambda *shape: piece)
    torch.manual_seed(0)
    fmt = PageFormat(2, 64, 64, torch.float32)
    rows = [(0, 90), (333, 70), (150, 1), (512, 33)]  # tokens before the chunk, tokens of it
    num_pages, num_blocks = 40, 60
    pages = torch.zeros(num_pages, 2, fmt.head_bytes, dtype=torch.uint8)
    window = torch.randn(num_blocks, 2, fmt.window_block_size, 128)
    reference.quantize_pages(
        fmt, pages, torch.arange(num_pages), torch.randn(num_pages, 64, 2, 64), torch.randn(num_pages, 64, 2, 64)
    )
    block_table = torch.randperm(num_pages)[: 4 * 10].view(4, 10).int()
    window_table = torch.zeros(4, 600 // fmt.window_block_size + 2, dtype=torch.int32)
    free = iter(torch.randperm(num_blocks - 1).add(1).tolist())
    for r, (first, _) in enumerate(rows[:3]):  # the last is a prefix-cache hit: no exact copy
        low = max(0, (first // 64 - 1) * 64)
        for entry in range(low // fmt.window_block_size, first // fmt.window_block_size + 1):
            window_table[r, entry] = next(free)
    total = sum(n for _, n in rows)
    query, key, value = torch.randn(total, 4, 64), torch.randn(total, 2, 64), torch.randn(total, 2, 64)
    starts = torch.tensor([0] + list(np.cumsum([n for _, n in rows])), dtype=torch.int32)
    seq_lens = torch.tensor([a + n for a, n in rows], dtype=torch.int32)

    class Spec:
        num_kv_heads, head_size = 2, 64

    # A decode row of 7 tokens comes before.
    common = SimpleNamespace(
        query_start_loc=starts,
        query_start_loc_cpu=torch.cat((torch.zeros(1, dtype=torch.int32), starts + 7)),
        seq_lens_cpu_upper_bound=torch.cat((torch.tensor([100], dtype=torch.int32), seq_lens)),
    )
    plan = prefill.plan_prefill(Spec, common, 1)
    assert len(plan.pieces) == -(-(333 + 150 + 512) // piece)
    output = torch.full_like(query, torch.nan)
    prefill.prefill_attention(
        fmt, plan, pages, window, query, key, value, block_table, window_table, 0.125, 3, output
    )  # fmt: skip
    for r, (a, b) in enumerate(zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)):
        expected = reference.prefill_attention(
            fmt, pages, window, query[a:b], key[a:b], value[a:b], int(seq_lens[r]), block_table[r], window_table[r], 0.125
        )
        torch.testing.assert_close(output[a:b], expected, atol=2e-5, rtol=1e-4)
