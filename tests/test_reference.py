"""The specification against an oracle that knows the exact keys and values, softmax in fp64."""

import math

import pytest
import torch

from vllm_quantspec import format
from vllm_quantspec.format import PageFormat, window_start
from vllm_quantspec.kernels import reference, step

SHAPES = [  # query heads, KV heads, head size, group size
    (4, 2, 64, 128),
    (2, 2, 96, 64),
    (4, 1, 128, 128),
    (6, 2, 256, 128),
    (4, 2, 128, 64),
]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
TOLERANCE = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 2e-5}
SEED = 1234


class Cache:
    """A pool whose unused memory holds NaN, filled with random requests; keeps the exact keys and values too."""

    def __init__(self, num_heads, fmt, seq_lens, query_lens, hits=None, seed=SEED):
        self.fmt, self.generator = fmt, torch.Generator().manual_seed(seed)
        self.num_heads, self.seq_lens, self.query_lens = num_heads, seq_lens, query_lens
        self.hits = hits or [0] * len(seq_lens)
        heads, dim, group, size = fmt.num_kv_heads, fmt.head_size, fmt.group_size, fmt.window_block_size
        longest = max(seq_lens) + 1
        wide, wide_window = longest // group + 3, longest // size + 3
        num_blocks = 1 + len(seq_lens) * (wide + wide_window)
        stride = fmt.head_bytes * heads + 64
        pool = torch.full((num_blocks, stride), 0xFF, dtype=torch.uint8)
        self.pages = pool[:, : fmt.page_bytes].view(num_blocks, heads, fmt.head_bytes)
        window_bytes = heads * size * 2 * dim * fmt.dtype.itemsize
        self.window = pool[:, :window_bytes].view(fmt.dtype).view(num_blocks, heads, size, 2 * dim)
        assert self.window.float().isnan().any()

        # Unused entries point at blocks full of NaN.
        ids = (torch.randperm(num_blocks - 1, generator=self.generator) + 1).int()
        n = len(seq_lens)
        self.block_table = ids[: n * wide].view(n, wide)
        self.window_table = ids[n * wide : n * (wide + wide_window)].view(n, wide_window).clone()
        self.keys, self.values = [], []
        for r, (length, query_len) in enumerate(zip(seq_lens, query_lens, strict=True)):
            outliers = torch.where(torch.rand(heads, dim, generator=self.generator) < 0.05, 8.0, 0.0)
            k = (self.randn(length, heads, dim) + outliers).to(fmt.dtype)
            v = self.randn(length, heads, dim).to(fmt.dtype)
            self.keys.append(k)
            self.values.append(v)
            self.window_table[r, : self.hits[r] // size] = 0
            self.fill(r, length, query_len)
        self.query_start_loc = torch.tensor([0, *query_lens]).cumsum(0).int()
        self.query = self.randn(sum(query_lens), num_heads, dim).to(fmt.dtype)
        self.softmax_scale = 1 / math.sqrt(dim)

    def randn(self, *shape):
        return torch.randn(*shape, generator=self.generator)

    def fill(self, r, length, query_len):
        """Pages that the request's step may read, and the exact tokens of its window."""
        fmt, group = self.fmt, self.fmt.group_size
        first = length - query_len
        full = max(first // group, self.hits[r] // group)
        if full:
            exact = [x[r][: full * group].unflatten(0, (full, group)) for x in (self.keys, self.values)]
            reference.quantize_pages(fmt, self.pages, self.block_table[r, :full], *exact)
        tokens = torch.arange(max(self.hits[r], window_start(first, group)), length)
        slots = step.window_slots(fmt, self.window_table, torch.full_like(tokens, r), tokens)
        step.write_window(fmt, self.window, slots, self.keys[r][tokens], self.values[r][tokens])

    def decode(self, bits, kernel=reference.decode_attention):
        return kernel(
            self.fmt,
            self.pages,
            self.window,
            self.query,
            self.query_start_loc,
            torch.tensor(self.seq_lens).int(),
            self.block_table,
            self.window_table,
            self.softmax_scale,
            bits,
        )

    def prefill(self, kernel=reference.prefill_attention, r=0):
        own = slice(self.seq_lens[r] - self.query_lens[r], None)
        tokens = slice(int(self.query_start_loc[r]), int(self.query_start_loc[r + 1]))
        return kernel(
            self.fmt,
            self.pages,
            self.window,
            self.query[tokens],
            self.keys[r][own],
            self.values[r][own],
            self.seq_lens[r],
            self.block_table[r],
            self.window_table[r],
            self.softmax_scale,
        )

    def oracle(self, bits, prefill=False):
        """What decode_attention (or prefill_attention) must return, in fp64."""
        group, outputs = self.fmt.group_size, []
        for r, (length, query_len) in enumerate(zip(self.seq_lens, self.query_lens, strict=True)):
            first = length - query_len
            for i in range(query_len):
                position = first + i
                anchor = first if prefill else position
                boundary = max(window_start(anchor, group), min(self.hits[r], first))
                k, v = (x[r][: position + 1].double() for x in (self.keys, self.values))
                if boundary:
                    ids = self.block_table[r, : boundary // group]
                    old = reference.dequantize_pages(self.fmt, self.pages, ids, bits, torch.float32)
                    k[:boundary], v[:boundary] = (x.flatten(0, 1).double() for x in old)
                q = self.query[int(self.query_start_loc[r]) + i].double()
                k, v = (x.repeat_interleave(self.num_heads // self.fmt.num_kv_heads, dim=1) for x in (k, v))
                scores = torch.einsum("hd,jhd->hj", q, k) * self.softmax_scale
                outputs.append(torch.einsum("hj,jhd->hd", scores.softmax(-1), v))
        return torch.stack(outputs)


def assert_close(actual, expected, dtype):
    assert actual.dtype == dtype
    assert not actual.isnan().any()
    torch.testing.assert_close(actual.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def boundary_lengths(group):
    return [1, 9, group - 1, group, group + 1, 2 * group - 1, 2 * group, 2 * group + 1, 3 * group, 5 * group + 3]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decode_matches_naive(shape, dtype, bits):
    num_heads, kv_heads, dim, group = shape
    fmt = PageFormat(kv_heads, dim, group, dtype)
    seq_lens = boundary_lengths(group)
    query_lens = [min(n, 1 + i % 9) for i, n in enumerate(seq_lens)]
    cache = Cache(num_heads, fmt, seq_lens, query_lens)
    assert_close(cache.decode(bits), cache.oracle(bits), dtype)


@pytest.mark.parametrize("bits", [4, 8])
def test_decode_across_a_group_boundary(bits):
    """Rows of one request read different numbers of pages, and the last row's pages are not the first row's."""
    fmt = PageFormat(2, 64, 64, torch.float32)
    for crossing in range(1, 9):
        cache = Cache(4, fmt, [192 + crossing, 640 + 9 - crossing, 64 + crossing], [9, 9, 9], seed=crossing)
        assert_close(cache.decode(bits), cache.oracle(bits), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decode_after_a_prefix_hit(dtype):
    """Tokens of the hit have no window blocks: they are read quantized although they are new."""
    group = 128
    fmt = PageFormat(2, 64, group, dtype)
    seq_lens = [group + 1, 2 * group + 1, 2 * group + 5, 3 * group + 9, 4 * group + 2, 700]
    hits = [group, 2 * group, 2 * group, 2 * group, group, 0]
    cache = Cache(4, fmt, seq_lens, [1, 1, 5, 9, 2, 3], hits)
    for bits in (4, 8):
        assert_close(cache.decode(bits), cache.oracle(bits), dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pages_of_4_bits(shape):
    """Decode, verification and prefill on pages that have the upper codes alone."""
    num_heads, kv_heads, dim, group = shape
    check_pages_of_4_bits(reference, num_heads, PageFormat(kv_heads, dim, group, torch.float32, bits=4))


def check_pages_of_4_bits(kernels, num_heads, fmt):
    group = fmt.group_size
    seq_lens = boundary_lengths(group)
    cache = Cache(num_heads, fmt, seq_lens, [min(n, 1 + i % 9) for i, n in enumerate(seq_lens)])
    assert_close(cache.decode(4, kernels.decode_attention), cache.oracle(4), fmt.dtype)
    for seq_len, query_len, hit in [(group + 7, 7, group), (3 * group + 5, 2 * group, group), (4 * group + 1, 33, 0)]:
        cache = Cache(num_heads, fmt, [seq_len], [query_len], [hit])
        assert_close(cache.prefill(kernels.prefill_attention), cache.oracle(4, prefill=True), fmt.dtype)


def test_many_rows_and_requests_without_tokens():
    fmt = PageFormat(2, 64, 64, torch.float32)
    cache = Cache(4, fmt, [300, 10, 900, 64, 513], [1, 0, 33, 2, 17])
    assert_close(cache.decode(8), cache.oracle(8), torch.float32)


def test_padding_is_ignored():
    """Padded requests (length 0, no tokens, null tables) and padded tokens change nothing."""
    fmt = PageFormat(2, 64, 64, torch.bfloat16)
    cache = Cache(4, fmt, [300, 65], [2, 1])
    whole = cache.decode(4)
    cache.seq_lens = [300, 65, 0, 0]
    cache.query_start_loc = torch.tensor([0, 2, 3, 3, 3])
    null = torch.zeros(2, 99, dtype=torch.int32)
    cache.block_table = torch.cat((cache.block_table, null[:, : cache.block_table.shape[1]]))
    cache.window_table = torch.cat((cache.window_table, null[:, : cache.window_table.shape[1]]))
    cache.query = torch.cat((cache.query, torch.full_like(cache.query[:2], torch.nan)))
    padded = cache.decode(4)
    assert torch.equal(padded[:3], whole)
    assert not padded[3:].isnan().any()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_prefill_matches_naive(shape, dtype):
    num_heads, kv_heads, dim, group = shape
    fmt = PageFormat(kv_heads, dim, group, dtype)
    cases = [(1, 1, 0), (group, group, 0), (group + 7, 7, 0), (group + 7, 7, group), (3 * group + 5, 2 * group, group)]
    cases += [(4 * group, 33, 2 * group), (4 * group + 1, group // 2, 0)]
    for seq_len, query_len, hit in cases:
        cache = Cache(num_heads, fmt, [seq_len], [query_len], [hit])
        assert_close(cache.prefill(), cache.oracle(8, prefill=True), dtype)


def slow_reading(fmt, data, lower):
    """Keys and values [n, G, H, D] of pages' bytes by the functions of format.py."""
    keys, values = (
        [unpack(fmt.field(data, f"{kind}_{half}"), fmt.head_size) for half in ("upper", "lower")]
        for kind, unpack in (("k", format.unpack_key_codes), ("v", format.unpack_value_codes))
    )
    k_scales = [format.unpermute_scales(fmt.field(data, name)) for name in ("k_scale", "k_min")]
    v_scales = [format.unpermute_value_scales(fmt.field(data, name), fmt.group_size) for name in ("v_scale", "v_min")]
    keys = format.dequantize_keys(keys[0], keys[1] if lower else None, *k_scales)
    values = format.dequantize_values(values[0], values[1] if lower else None, *v_scales)
    return keys.transpose(1, 2), values.transpose(1, 2)


def test_pages_round_trip_and_untouched_neighbours():
    for num_heads, kv_heads, dim, group in SHAPES:
        fmt = PageFormat(kv_heads, dim, group)
        cache = Cache(num_heads, fmt, [1], [1])
        before = cache.pages.clone()
        keys, values = torch.randn(2, 2, group, kv_heads, dim)
        ids = torch.tensor([3, 1])
        reference.quantize_pages(fmt, cache.pages, ids, keys, values)
        others = [i for i in range(len(before)) if i not in ids]
        assert torch.equal(cache.pages[others], before[others])
        draft = reference.dequantize_pages(fmt, cache.pages, ids, 4, torch.float32)
        target = reference.dequantize_pages(fmt, cache.pages, ids, 8, torch.float32)
        data = cache.pages[ids]
        for x, kind in ((draft, None), (target, "lower")):
            for actual, expected in zip(x, slow_reading(fmt, data, kind), strict=True):
                torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
        for exact, coarse, fine in zip((keys, values), draft, target, strict=True):
            assert (coarse - exact).abs().max() < 0.3
            assert (fine - exact).abs().max() < 0.04


def test_wrong_reading_is_refused():
    cache = Cache(4, PageFormat(2, 64), [5], [1])
    with pytest.raises(ValueError, match="bits must be 4 or 8"):
        cache.decode(6)
    with pytest.raises(ValueError, match="bits must be 4, as the page has no more"):
        Cache(4, PageFormat(2, 64, bits=4), [5], [1]).decode(8)
