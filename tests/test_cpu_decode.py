"""The compiled CPU kernel against an oracle, on the reference's own test cases."""

from types import SimpleNamespace

import pytest
import torch
from test_reference import DTYPES, SHAPES, Cache, assert_close, boundary_lengths, check_pages_of_4_bits

from vllm_quantspec.format import PageFormat
from vllm_quantspec.kernels import cpu_decode, cpu_prefill, cpu_threads
from vllm_quantspec.kernels.cpu_decode import decode_attention


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_naive(shape, dtype, bits):
    num_heads, kv_heads, dim, group = shape
    seq_lens = boundary_lengths(group)
    query_lens = [min(n, 1 + i % 9) for i, n in enumerate(seq_lens)]
    cache = Cache(num_heads, PageFormat(kv_heads, dim, group, dtype), seq_lens, query_lens)
    assert_close(cache.decode(bits, decode_attention), cache.oracle(bits), dtype)


@pytest.mark.parametrize("bits", [4, 8])
def test_across_a_group_boundary(bits):
    for crossing in range(1, 9):
        lengths = [192 + crossing, 640 + 9 - crossing, 64 + crossing]
        cache = Cache(4, PageFormat(2, 64, 64, torch.float32), lengths, [9, 9, 9], seed=crossing)
        assert_close(cache.decode(bits, decode_attention), cache.oracle(bits), torch.float32)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pages_of_4_bits(shape):
    """With the CPU engine's prefill, which reads them too."""
    num_heads, kv_heads, dim, group = shape
    kernels = SimpleNamespace(decode_attention=decode_attention, prefill_attention=cpu_prefill.prefill_attention)
    check_pages_of_4_bits(kernels, num_heads, PageFormat(kv_heads, dim, group, torch.float32, bits=4))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_after_a_prefix_hit(dtype):
    group = 128
    seq_lens = [group + 1, 2 * group + 1, 2 * group + 5, 3 * group + 9, 4 * group + 2, 700]
    hits = [group, 2 * group, 2 * group, 2 * group, group, 0]
    cache = Cache(4, PageFormat(2, 64, group, dtype), seq_lens, [1, 1, 5, 9, 2, 3], hits)
    for bits in (4, 8):
        assert_close(cache.decode(bits, decode_attention), cache.oracle(bits), dtype)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("pages_per_task", [1, 3, 16])
def test_split_over_tasks_and_threads(threads, pages_per_task, monkeypatch):
    monkeypatch.setattr(cpu_decode, "_PAGES_PER_TASK", pages_per_task)
    monkeypatch.setattr(cpu_threads, "CPUS", cpu_threads.CPUS and set(cpu_threads.CPUS))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    cache = Cache(4, PageFormat(2, 64, 64, torch.float32), [300, 10, 2900, 64, 513], [1, 0, 33, 2, 17])
    assert_close(cache.decode(8, decode_attention), cache.oracle(8), torch.float32)


def test_padding_is_ignored():
    cache = Cache(4, PageFormat(2, 64, 64, torch.bfloat16), [300, 65], [2, 1])
    whole = cache.decode(4, decode_attention)
    cache.seq_lens = [300, 65, 0, 0]
    cache.query_start_loc = torch.tensor([0, 2, 3, 3, 3])
    cache.block_table = torch.cat((cache.block_table, torch.zeros_like(cache.block_table)))
    cache.window_table = torch.cat((cache.window_table, torch.zeros_like(cache.window_table)))
    cache.query = torch.cat((cache.query, torch.full_like(cache.query[:2], torch.nan)))
    padded = cache.decode(4, decode_attention)
    assert torch.equal(padded[:3], whole) and not padded[3:].isnan().any()


def test_attention_that_is_spread_and_attention_that_is_sharp():
    """Probabilities from 1 / length for every token to all on one: sums and the exponential keep their accuracy."""
    for scale in (1e-3, 1.0, 30.0):
        cache = Cache(4, PageFormat(2, 128, 128, torch.float32), [4000, 129], [3, 1])
        cache.softmax_scale *= scale
        assert_close(cache.decode(8, decode_attention), cache.oracle(8), torch.float32)


def test_exponential():
    import numpy as np

    x = np.linspace(-140, 0, 1001).astype(np.float32)
    expected = np.exp2(x.astype(np.float64))
    got = x.copy()
    cpu_decode._exp2(got, len(x), np.empty(len(x), np.uint32))
    normal = expected >= 2.0**-126
    assert np.max(np.abs(got[normal] / expected[normal] - 1)) < 3e-7
    assert np.all(got[~normal] < 2.0**-125)


def test_half_precision_conversion():
    import numpy as np

    every = np.arange(65536, dtype=np.uint16)
    finite = np.isfinite(every.view(np.float16))
    out = np.empty(65536, np.float32)
    cpu_decode._half_to_float(every, 0, 65536, np.empty(65536, np.uint32), out)
    assert np.array_equal(out[finite], every.view(np.float16)[finite].astype(np.float32))
