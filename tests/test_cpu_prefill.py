"""The CPU engine's prefill against the specification and the oracle, on the specification's own test cases."""

import pytest
import torch
from test_reference import DTYPES, SHAPES, TOLERANCE, Cache, assert_close

from vllm_quantspec.format import PageFormat
from vllm_quantspec.kernels import cpu_prefill, reference
from vllm_quantspec.kernels.cpu_prefill import prefill_attention


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_naive(shape, dtype):
    num_heads, kv_heads, dim, group = shape
    fmt = PageFormat(kv_heads, dim, group, dtype)
    cases = [(1, 1, 0), (group, group, 0), (group + 7, 7, 0), (group + 7, 7, group), (3 * group + 5, 2 * group, group)]
    cases += [(4 * group, 33, 2 * group), (4 * group + 1, group // 2, 0)]
    for seq_len, query_len, hit in cases:
        cache = Cache(num_heads, fmt, [seq_len], [query_len], [hit])
        assert_close(cache.prefill(prefill_attention), cache.oracle(8, prefill=True), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lengths_around_the_padding(dtype):
    fmt = PageFormat(2, 64, 64, dtype)
    own, before = cpu_prefill.QUERY_PADDING, cpu_prefill.CONTEXT_PADDING
    for query_len in (own - 1, own, 2 * own + 22):
        for first in (before - 1, before, before + 1, 350):
            cache = Cache(4, fmt, [first + query_len], [query_len])
            got, expected = cache.prefill(prefill_attention), cache.prefill()
            torch.testing.assert_close(got, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pages_are_read_as_specified(shape, bits):
    num_heads, kv_heads, dim, group = shape
    fmt = PageFormat(kv_heads, dim, group)
    cache = Cache(num_heads, fmt, [5 * group], [1])
    arguments = (fmt, cache.pages, cache.block_table[0, :4], bits, torch.float32)
    for got, expected in zip(cpu_prefill.dequantize_pages(*arguments), reference.dequantize_pages(*arguments), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
