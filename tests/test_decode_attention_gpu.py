"""The CUDA decode attention against the reference, on a GPU: lengths, boundaries, missing window blocks, graphs."""

import pytest
import torch

from vllm_quantspec.format import PageFormat, window_start
from vllm_quantspec.kernels import cache_update, reference

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)
pytest.importorskip("cuda.bindings", reason="needs cuda.bindings, which comes with CUDA PyTorch")

from vllm_quantspec.kernels.decode_attention import decode_attention  # noqa: E402

DEVICE = "cuda"


class Case:
    """Random requests over one pool; keys have outlier channels. Nothing that must not be read is finite."""

    def __init__(self, fmt, query_heads, seq_lens, query_lens, hits=None, seed=0):
        generator = torch.Generator(DEVICE).manual_seed(seed)

        def randn(*shape):
            return torch.randn(*shape, generator=generator, device=DEVICE)

        heads, dim, group, size = fmt.num_kv_heads, fmt.head_size, fmt.group_size, fmt.window_block_size
        requests, hits = len(seq_lens), hits or [0] * len(seq_lens)
        num_pages = [n // group + 1 for n in seq_lens]
        ids = torch.randperm(sum(num_pages), generator=generator, device=DEVICE).int() + 1
        self.fmt, self.max_query_len = fmt, max(query_lens)
        self.block_table = torch.zeros(requests, max(num_pages) + 3, dtype=torch.int32, device=DEVICE)
        # The block stride is larger than a page's bytes, as in a pool that other layers' blocks share.
        pool = torch.full((len(ids) + 1, heads * fmt.head_bytes + 64), 0xFF, dtype=torch.uint8, device=DEVICE)
        self.pages = pool[:, : heads * fmt.head_bytes].view(-1, heads, fmt.head_bytes)
        self.window_block_table = torch.zeros(requests, max(seq_lens) // size + 4, dtype=torch.int32, device=DEVICE)
        channel = 0.3 + torch.rand(heads, 1, dim, generator=generator, device=DEVICE) * 2
        channel[..., ::37] *= 8
        windows, page = [torch.full((1, heads, size, 2 * dim), float("nan"), device=DEVICE)], 0
        for r, (length, query_len, hit) in enumerate(zip(seq_lens, query_lens, hits, strict=True)):
            count = num_pages[r]
            keys = randn(heads, count * group, dim) * channel + randn(heads, 1, dim) * channel
            values = randn(heads, count * group, dim) * (0.2 + randn(heads, count * group, 1).abs())
            keys, values = keys.to(fmt.dtype), values.to(fmt.dtype)
            full = max(0, length - query_len) // group  # pages complete before this step
            pages = ids[page : page + count]
            self.block_table[r, :count] = pages
            for first in range(0, full, 64):
                chosen = slice(first, min(full, first + 64))
                split = [x.unflatten(1, (count, group))[:, chosen].permute(1, 2, 0, 3) for x in (keys, values)]
                reference.quantize_pages(fmt, self.pages, pages[chosen].long(), *split)
            page += count
            first_exact = max(window_start(length - query_len, group), hit)
            for entry in range(first_exact // size, -(-length // size)):
                block = torch.full((1, heads, size, 2 * dim), float("nan"), device=DEVICE)
                used = min(size, length - entry * size)
                at = slice(entry * size, entry * size + used)
                block[0, :, :used] = torch.cat((keys[:, at], values[:, at]), dim=-1)
                self.window_block_table[r, entry] = len(windows)
                windows.append(block)
        self.window = torch.cat(windows).to(fmt.dtype)
        self.seq_lens = torch.tensor(seq_lens, dtype=torch.int32, device=DEVICE)
        starts = torch.tensor([0, *query_lens], device=DEVICE).cumsum(0)
        self.query_start_loc = starts.int()
        self.query = (randn(sum(query_lens), query_heads, dim) * 0.7).to(fmt.dtype)

    def arguments(self, bits, window=None):
        lengths = (self.query_start_loc, self.seq_lens, self.block_table, self.window_block_table)
        window = self.window if window is None else window
        return (self.fmt, self.pages, window, self.query, *lengths, self.fmt.head_size**-0.5, bits)

    def run(self, bits, **options):
        out = torch.full_like(self.query, float("nan"))
        decode_attention(*self.arguments(bits), max_query_len=self.max_query_len, out=out, **options)
        return out

    def expected(self, bits):
        return reference.decode_attention(*self.arguments(bits, self.window.nan_to_num(0)))

    def check(self, bits, **options):
        got, expected = self.run(bits, **options).float(), self.expected(bits).float()
        error = (got - expected).norm(dim=-1) / expected.norm(dim=-1).clamp(min=1e-3)
        assert error.max() < (1e-2 if self.fmt.dtype == torch.bfloat16 else 4e-3)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "head_size, group_size, heads, query_heads",
    [(128, 128, 8, 32), (128, 64, 2, 2), (64, 128, 2, 4), (64, 64, 2, 32), (96, 64, 2, 8), (256, 128, 2, 16)],
)
def test_shapes(head_size, group_size, heads, query_heads, dtype, bits):
    fmt = PageFormat(heads, head_size, group_size, dtype)
    lengths = [1, 2 * group_size, 5 * group_size + 17, 33 * group_size + 5, 700]
    Case(fmt, query_heads, lengths, [1] * len(lengths)).check(bits)


@pytest.mark.parametrize("group", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize("query_len", range(1, 10))
def test_query_tokens(group, query_len):
    lengths = [query_len, 4000, 128 * 6 + 3, 128 * 6 + query_len - 1, 128 * 20, 300]
    Case(PageFormat(2, 128), 2 * group, lengths, [query_len] * len(lengths)).check(8)


@pytest.mark.parametrize("query_len", [1, 5, 9])
@pytest.mark.parametrize(
    "head_size, group_size, heads, query_heads",
    [(128, 128, 8, 32), (128, 64, 2, 14), (64, 128, 2, 4), (64, 64, 2, 32), (96, 64, 2, 8), (256, 128, 2, 16)],
)
def test_pages_of_4_bits(head_size, group_size, heads, query_heads, query_len):
    fmt = PageFormat(heads, head_size, group_size, bits=4)
    lengths = [query_len, 2 * group_size + 4, 5 * group_size + 17, 33 * group_size + 5, 700]
    hits = [0, 0, 3 * group_size, 0, 0]
    Case(fmt, query_heads, lengths, [query_len] * len(lengths), hits).check(4, pages_may_change=True)


@pytest.mark.parametrize("bits", [4, 8])
def test_uneven(bits):
    generator = torch.Generator().manual_seed(1)
    lengths = [int(2 ** (4 + 11 * torch.rand(1, generator=generator))) for _ in range(255)] + [70_000]
    query_lens = [1 + i % 5 if n > 5 else 1 for i, n in enumerate(lengths)]
    Case(PageFormat(2, 128), 8, lengths, query_lens).check(bits)


@pytest.mark.parametrize("bits", [4, 8])
def test_long(bits):
    Case(PageFormat(2, 128), 8, [256 * 1024 - 3], [3]).check(bits)


@pytest.mark.parametrize("query_len", [1, 5])
def test_prefix_hits(query_len):
    lengths = [128 * n + 1 + extra for n in (3, 8, 9, 12) for extra in (4, 60, 100)]
    hits = [(n - 1) // 128 * 128 - back for n, back in zip(lengths, (0, 128, 256) * 4, strict=True)]
    hits = [hit if hit <= n - query_len else 0 for hit, n in zip(hits, lengths, strict=True)]
    Case(PageFormat(2, 128), 8, lengths, [query_len] * len(lengths), hits).check(8)


def test_small_codes_of_large_sums():
    """Attention spread evenly over a long context: the average of many values, not of their offsets."""
    case = Case(PageFormat(1, 128), 4, [100_000], [1])
    case.query *= 0.01
    case.check(4)


def test_empty_requests():
    case = Case(PageFormat(2, 128), 8, [500, 300, 1000], [1, 1, 1])
    case.query_start_loc = torch.tensor([0, 1, 1, 2], dtype=torch.int32, device=DEVICE)
    case.query = case.query[:2]
    case.check(4)
    case.seq_lens[1] = 0
    case.check(4)


def test_cuda_graph_replays_other_lengths():
    case = Case(PageFormat(2, 128), 8, [9000, 200, 3000], [2, 2, 2])
    out = case.run(4)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decode_attention(*case.arguments(4), max_query_len=2, out=out)
    for _ in range(3):
        for x in (case.block_table, case.window_block_table, case.seq_lens):
            x.copy_(x.roll(1, 0))
        case.query.copy_(torch.randn_like(case.query))
        graph.replay()
        expected = case.expected(4).float()
        assert (out.float() - expected).norm() / expected.norm() < 1e-2


@pytest.mark.parametrize("bits", [4, 8])
def test_overlaps_with_the_stores_around_it(bits):
    """Layer after layer, each storing into the same window: attention reads its own, and the next waits until it has."""
    query_lens = [1] * 5 if bits == 4 else [5] * 5
    case = Case(PageFormat(2, 128), 8, [9000, 200, 3000, 70, 513], query_lens)
    layers, tokens = 24, sum(query_lens)
    new = torch.randn(layers, 2, tokens, 2, 128, device=DEVICE).to(case.fmt.dtype)
    queries = torch.randn(layers, *case.query.shape, device=DEVICE).to(case.fmt.dtype)

    def run(outs, overlap):
        for (key, value), query, out in zip(new, queries, outs, strict=True):
            lengths = (case.query_start_loc, case.seq_lens, case.window_block_table)
            cache_update.store(case.fmt, case.window, key, value, *lengths, max_query_len=case.max_query_len)
            case.query = query
            options = {"max_query_len": case.max_query_len, "out": out, "overlap": overlap}
            decode_attention(*case.arguments(bits), **options)

    expected, outs = torch.empty_like(queries), torch.empty_like(queries)
    run(expected, False)
    run(outs, True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(outs, True)
    for _ in range(20):
        outs.zero_()
        graph.replay()
        assert torch.equal(outs, expected)


@pytest.mark.parametrize("bits", [4, 8])
def test_target_reads_pages_that_were_quantized_just_before(bits):
    """Requests that share a prefix: one completes a page, and the other reads it in the same step."""
    fmt = PageFormat(2, 128, bits=bits)
    case = Case(fmt, 8, [9000, 4 * 128 + 3], [1, 3], hits=[0, 4 * 128])
    writer = {
        "query_start_loc": torch.tensor([0, 4 * 128], dtype=torch.int32, device=DEVICE),
        "seq_lens": torch.tensor([4 * 128], dtype=torch.int32, device=DEVICE),
        "num_unverified": torch.zeros(1, dtype=torch.int32, device=DEVICE),
        "block_table": case.block_table[1:],
        "window_block_table": torch.zeros(1, 64, dtype=torch.int32, device=DEVICE),
    }
    sizes = {"max_query_len": 4 * 128, "max_unverified": 4}
    new = torch.randn(24, 2, 4 * 128, 2, 128, device=DEVICE).to(fmt.dtype)
    options = {"max_query_len": case.max_query_len, "pages_may_change": True}

    def run(outs, overlap):
        for (key, value), out in zip(new, outs, strict=True):
            cache_update.quantize(fmt, case.pages, case.window, key, value, **writer, **sizes)
            decode_attention(*case.arguments(bits), out=out, overlap=overlap, **options)

    expected, outs = (torch.empty(24, *case.query.shape, dtype=fmt.dtype, device=DEVICE) for _ in range(2))
    run(expected, False)
    assert not torch.equal(expected[0, 1:], expected[1, 1:])
    for _ in range(20):
        outs.zero_()
        run(outs, True)
        assert torch.equal(outs, expected)


def test_repeated_runs_agree():
    case = Case(PageFormat(8, 128), 32, [20_000, 100, 3000], [1, 1, 1])
    first = case.run(4)
    assert all(torch.equal(case.run(4), first) for _ in range(20))


def test_refuses():
    case = Case(PageFormat(2, 128), 8, [300], [1])
    with pytest.raises(ValueError, match="bits must be 4 or 8"):
        case.run(6)
    case.seq_lens = case.seq_lens.long()
    with pytest.raises(ValueError, match="seq_lens must be int32"):
        case.run(4)
