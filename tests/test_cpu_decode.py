"""The compiled CPU kernel against an oracle, on the reference's own test cases."""

import random
from types import SimpleNamespace

import pytest
import torch
from test_reference import DTYPES, SHAPES, Cache, assert_close, boundary_lengths, check_pages_of_4_bits

from vllm_quantspec.format import PageFormat, window_start
from vllm_quantspec.kernels import cpu_decode, cpu_page_selection, cpu_prefill, cpu_threads, reference
from vllm_quantspec.kernels.cpu_decode import PageSelection, ScoresOut, decode_attention


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


# --- Sparse drafts: what a page weighs, and reading chosen pages only -------------------------------------------------


def random_cache(seed: int, *, query_lens: bool, hits: bool = True) -> Cache:
    """Requests of random length, some from a prefix hit, in a random shape."""
    rng = random.Random(seed)
    num_heads, kv_heads, dim, group = rng.choice(SHAPES)
    seq_lens = [rng.randint(1, 14 * group) for _ in range(rng.randint(1, 5))]
    lens = [min(n, rng.randint(1, 9)) if query_lens else 1 for n in seq_lens]
    # A hit of whole pages, sometimes one that reaches into the window.
    cached = [rng.choice([0, 0, (n - 1) // group * group]) if hits else 0 for n in seq_lens]
    lens = [min(q, n - hit) for q, n, hit in zip(lens, seq_lens, cached, strict=True)]
    fmt = PageFormat(kv_heads, dim, group, rng.choice(DTYPES), bits=rng.choice([4, 8]))
    return Cache(num_heads, fmt, seq_lens, lens, cached, seed=seed)


def scored(cache: Cache, num_slots: int = 10_000) -> tuple[torch.Tensor, torch.Tensor]:
    return cpu_page_selection.scored_pages(cache.fmt, cache.query_start_loc, torch.tensor(cache.seq_lens).int(), num_slots)


def mass_twin(cache: Cache, begin: torch.Tensor, num_scored: torch.Tensor, scores: torch.Tensor) -> None:
    """Write to ``scores`` [H, C, Q] in float64 what a verification must leave there."""
    fmt, heads = cache.fmt, cache.fmt.num_kv_heads
    for r, (length, query_len) in enumerate(zip(cache.seq_lens, cache.query_lens, strict=True)):
        first = length - query_len
        exact = reference.exact_start(fmt, cache.window_table[r], first)
        for i in range(query_len):
            start = max(window_start(first + i, fmt.group_size), exact)
            tables = (cache.block_table[r], cache.window_table[r])
            keys, _ = reference.read_cache(fmt, cache.pages, cache.window, *tables, start, first + i + 1, fmt.bits)
            query = cache.query[int(cache.query_start_loc[r]) + i].double().unflatten(0, (heads, -1))
            probs = (torch.einsum("hgd,shd->hgs", query, keys.double()) * cache.softmax_scale).softmax(-1).sum(1)
            pages = int(num_scored[r])
            of_pages = probs[:, : pages * fmt.group_size].unflatten(1, (pages, fmt.group_size)).sum(-1)
            scores[:, int(begin[r]) : int(begin[r]) + pages, i] = of_pages


@pytest.mark.parametrize("seed", range(12))
def test_mass_of_pages(seed, monkeypatch):
    monkeypatch.setattr(cpu_decode, "_PAGES_PER_TASK", 1 + seed % 5)
    cache = random_cache(seed, query_lens=True)
    begin, num_scored = scored(cache)
    shape = cache.fmt.num_kv_heads, int(num_scored.sum()) + 3, max(cache.query_lens) + 1
    expected, scores = torch.full(shape, -7.0, dtype=torch.float64), torch.full(shape, -7.0)
    mass_twin(cache, begin, num_scored, expected)
    bits = cache.fmt.bits
    plain = cache.decode(bits, decode_attention)
    out = cache.decode(bits, lambda *arguments: decode_attention(*arguments, ScoresOut(scores, begin, num_scored)))
    assert torch.equal(out, plain)  # what is left for the drafts changes nothing
    torch.testing.assert_close(scores.double(), expected, atol=2e-5, rtol=2e-4)
    assert (scores[:, int(num_scored.sum()) :] == -7).all()


def test_mass_of_some_requests_only():
    cache = Cache(4, PageFormat(2, 64, 64, torch.float32), [900, 700, 64, 1300], [5, 1, 2, 5])
    begin, num_scored = scored(cache, 25)  # the last one does not fit
    assert num_scored.tolist() == [12, 9, 0, 0]
    num_scored[0] = 0  # a request that is not to be scored
    expected, scores = torch.full((2, 25, 5), -7.0, dtype=torch.float64), torch.full((2, 25, 5), -7.0)
    mass_twin(cache, begin, num_scored, expected)
    cache.decode(8, lambda *arguments: decode_attention(*arguments, ScoresOut(scores, begin, num_scored)))
    torch.testing.assert_close(scores.double(), expected, atol=2e-5, rtol=2e-4)


def test_mass_of_sharp_and_of_spread_attention():
    """All on one page, whose neighbours weigh nothing a float can hold, and the same on every token."""
    for scale in (1e-3, 1.0, 100.0):
        cache = Cache(4, PageFormat(2, 128, 128, torch.float32), [4000, 700], [3, 1])
        cache.softmax_scale *= scale
        begin, num_scored = scored(cache)
        scores = torch.zeros(2, int(num_scored.sum()), 3)
        expected = torch.zeros_like(scores, dtype=torch.float64)
        mass_twin(cache, begin, num_scored, expected)
        out = ScoresOut(scores, begin, num_scored)
        cache.decode(8, lambda *arguments, out=out: decode_attention(*arguments, out))
        assert scores.isfinite().all() and scores.max() <= 2
        torch.testing.assert_close(scores.double(), expected, atol=1e-4, rtol=2e-3)


@pytest.mark.parametrize("seed", range(12))
def test_chosen_pages_are_all_that_is_read(seed, monkeypatch):
    """Against a cache in which only they exist: the other pages hold NaN, and the reference has them masked out."""
    monkeypatch.setattr(cpu_decode, "_PAGES_PER_TASK", 1 + seed % 5)
    rng, cache = random.Random(100 + seed), random_cache(seed, query_lens=False)
    fmt, heads, group = cache.fmt, cache.fmt.num_kv_heads, cache.fmt.group_size
    begin, num_old = scored(cache)
    # The choice is of an earlier step: some pages are newer than it, and some requests have none.
    dense_from = torch.tensor([rng.choice([0, n, max(n - 2, 0)]) for n in num_old.tolist()]).int()
    count = torch.tensor([rng.randint(1, n) if n else 0 for n in dense_from.tolist()]).int()
    page_list = torch.full((heads, int(num_old.sum()) + 2), -1, dtype=torch.int32)
    pages, expected = cache.pages.clone(), []
    cache.pages[cache.block_table.flatten().long()] = 0xFF  # not the windows, which are blocks of the same pool
    for r, (length, chosen) in enumerate(zip(cache.seq_lens, count.tolist(), strict=True)):
        exact = reference.exact_start(fmt, cache.window_table[r], length - 1)
        start = max(window_start(length - 1, group), exact)
        tables = (cache.block_table[r], cache.window_table[r])
        keys, values = reference.read_cache(fmt, pages, cache.window, *tables, start, length, 4)
        query, out = cache.query[r : r + 1], []
        for h in range(heads):
            numbers = sorted(rng.sample(range(int(dense_from[r])), chosen))
            page_list[h, int(begin[r]) : int(begin[r]) + chosen] = cache.block_table[r, numbers]
            read = [*numbers, *range(int(dense_from[r]), -(-start // group))]
            ids = cache.block_table[r, read].long()
            cache.pages[ids, h] = pages[ids, h]
            seen = torch.zeros(length, dtype=torch.bool)
            seen[start:] = True
            for page in read:
                seen[page * group : min((page + 1) * group, start)] = True
            own = query.unflatten(1, (heads, -1))[:, h]
            k, v = (x[seen, h : h + 1].double() for x in (keys, values))
            probs = (torch.einsum("tqd,sjd->tqs", own.double(), k) * cache.softmax_scale).softmax(-1)
            out.append(torch.einsum("tqs,sjd->tqd", probs, v))
        expected.append(torch.cat(out, dim=1))
    selection = PageSelection(page_list, begin, count, dense_from)
    got = cache.decode(4, lambda *arguments: decode_attention(*arguments, selection=selection))
    assert_close(got, torch.cat(expected), fmt.dtype)


def test_choosing_every_page_is_reading_everything():
    cache = Cache(4, PageFormat(2, 64, 128, torch.bfloat16), [2000, 3, 900], [1, 1, 1])
    begin, num_old = scored(cache)
    page_list = torch.cat([cache.block_table[r, :n] for r, n in enumerate(num_old.tolist())]).int().expand(2, -1)
    selection = PageSelection(page_list.contiguous(), begin, num_old, num_old)
    got = cache.decode(4, lambda *arguments: decode_attention(*arguments, selection=selection))
    assert torch.equal(got, cache.decode(4, decode_attention))


def test_a_choice_of_more_pages_than_a_request_has_is_not_used():
    """A request that was preempted after the choice has fewer pages for a while: it reads all that it has."""
    cache = Cache(4, PageFormat(2, 64, 64, torch.float32), [500], [1])
    ones = torch.ones(1, dtype=torch.int32)
    selection = PageSelection(torch.full((2, 9), 10**6, dtype=torch.int32), 0 * ones, ones, 9 * ones)
    got = cache.decode(4, lambda *arguments: decode_attention(*arguments, selection=selection))
    assert_close(got, cache.oracle(4), torch.float32)
