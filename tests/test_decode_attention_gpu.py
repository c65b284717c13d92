"""The CUDA decode attention against the reference, on a GPU: lengths, boundaries, missing window blocks, graphs."""

import pytest
import torch

from vllm_quantspec.format import PageFormat, window_start
from vllm_quantspec.kernels import cache_update, cpu_page_selection, reduce_scores, reference

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)
pytest.importorskip("cuda.bindings", reason="needs cuda.bindings, which comes with CUDA PyTorch")

from vllm_quantspec.kernels.decode_attention import (  # noqa: E402
    PageSelection,
    RowPlan,
    ScoresOut,
    decode_attention,
    raw_rows,
)
from vllm_quantspec.kernels.device import device_properties  # noqa: E402
from vllm_quantspec.kernels.scored_pages import scored_pages  # noqa: E402

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

    def expected(self, bits, **options):
        return reference.decode_attention(*self.arguments(bits, self.window.nan_to_num(0)), **options)

    def choose(self, share: float, seed: int = 0) -> PageSelection:
        """Random pages of each KV head; the last request reads all of its, where there is more than one."""
        generator = torch.Generator().manual_seed(seed)
        begin, pages = cpu_page_selection.scored_pages(self.fmt, self.query_start_loc, self.seq_lens, 1 << 30)
        dense = (pages - (pages > 3).int() * torch.arange(len(pages), device=DEVICE).int() % 2).clamp_min(0)
        count = (dense * share).ceil().int()
        if len(count) > 1:
            count[-1] = dense[-1] = 0
        lists = torch.full((self.fmt.num_kv_heads, int(pages.sum()) + 7), 1 << 30, dtype=torch.int32, device=DEVICE)
        for r, (b, n, k) in enumerate(zip(begin.tolist(), dense.tolist(), count.tolist(), strict=True)):
            for row in lists:
                chosen = torch.randperm(n, generator=generator)[:k].sort().values
                row[b : b + k] = self.block_table[r, chosen.to(DEVICE)]
        return PageSelection(lists, begin, count, dense)

    def scored(self, bits, slots=None, **options):
        """Masses float32 [H, C, Q] as the kernel leaves them, begin and num_scored."""
        fmt, per_head = self.fmt, self.query.shape[1] // self.fmt.num_kv_heads
        pages = int((self.seq_lens // fmt.group_size).sum()) + 5
        slots = pages if slots is None else slots
        rows = raw_rows(fmt.head_size, fmt.group_size, (self.max_query_len + 1) * per_head)
        raw = torch.full((slots, fmt.num_kv_heads, 2, rows, 2), float("nan"), device=DEVICE)
        flags = torch.full((slots, fmt.num_kv_heads, rows // 8), 77, dtype=torch.uint8, device=DEVICE)
        lse = torch.full((len(self.query) + 2, self.query.shape[1]), float("nan"), device=DEVICE)
        begin, num_scored = torch.full((2, len(self.seq_lens) + 1), -7, dtype=torch.int32, device=DEVICE)
        scored_pages(fmt, self.query_start_loc, self.seq_lens, begin, num_scored, num_slots=slots)
        out = self.run(bits, scores=ScoresOut(raw, flags, lse, begin, num_scored), **options)
        result = torch.full((fmt.num_kv_heads, slots, self.max_query_len), float("nan"), device=DEVICE)
        reduce_scores.reduce_scores(
            raw, flags, lse, self.query_start_loc, begin, num_scored, result, max_pages=max(1, slots)
        )
        return out, result, begin[:-1], num_scored[:-1]

    def check(self, bits, **options):
        twin = {name: options[name] for name in ("selection",) if name in options}
        got, expected = self.run(bits, **options).float(), self.expected(bits, **twin).float()
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


@pytest.mark.parametrize("warps_and_stages", [(8, 8), (4, 8), (4, 12)])
@pytest.mark.parametrize("tiles", range(2, 9))
@pytest.mark.parametrize("wgmma", [False, True])
def test_teams_of_four(wgmma, tiles, warps_and_stages):
    """Requests that end in the middle of a page, and one that teams share; all rows in one pass."""
    if wgmma and not device_properties(torch.cuda.current_device()).has_wgmma:
        pytest.skip("needs a Hopper GPU")
    lengths = [tiles, 70_000, 128 * 6 + 3, 128 * 6 + tiles - 1, 128 * 20, 2500]
    case = Case(PageFormat(2, 128), 2 * 8, lengths, [tiles] * len(lengths), hits=[0, 0, 0, 0, 0, 128 * 19])
    case.check(8, plan=RowPlan(1, tiles, 4, wgmma), warps_and_stages=warps_and_stages)


@pytest.mark.parametrize("bits", [4, 8])
def test_chosen_pages_of_many_rows(bits):
    lengths = [40 * 128 + 3, 2 * 128 + 7, 5 * 128 + 17, 133 * 128 + 5, 5, 9 * 128 + 8]
    case = Case(PageFormat(2, 128), 2 * 8, lengths, [5] * len(lengths), hits=[0, 0, 4 * 128, 0, 0, 0])
    case.check(bits, selection=case.choose(0.5))


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


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
@pytest.mark.parametrize(
    "head_size, group_size, heads, query_heads",
    [(128, 128, 8, 32), (128, 64, 2, 14), (64, 128, 2, 4), (64, 64, 2, 32), (96, 64, 2, 8), (256, 128, 2, 16)],
)
def test_chosen_pages(head_size, group_size, heads, query_heads, share):
    fmt = PageFormat(heads, head_size, group_size)
    lengths = [40 * group_size + 3, 2 * group_size, 5 * group_size + 17, 133 * group_size + 5, 3, 9 * group_size]
    case = Case(fmt, query_heads, lengths, [1] * len(lengths), hits=[0, 0, 4 * group_size, 0, 0, 0])
    case.check(4, selection=case.choose(share))


@pytest.mark.parametrize("batch", [1, 7, 200])
def test_chosen_pages_of_many_lengths(batch):
    generator = torch.Generator().manual_seed(batch)
    lengths = [int(2 ** (6 + 9 * torch.rand(1, generator=generator))) for _ in range(batch)]
    case = Case(PageFormat(2, 128), 8, lengths, [1] * batch)
    case.check(4, selection=case.choose(0.2))


def test_a_choice_that_does_not_fit_the_length_is_not_used():
    case = Case(PageFormat(2, 128), 8, [3000, 1000], [1, 1])
    selection = case.choose(0.3)
    selection.dense_from[:] = 30
    selection.count[:] = 5
    assert torch.equal(case.run(4, selection=selection), case.run(4))


@pytest.mark.parametrize("query_len", [1, 5, 9])
@pytest.mark.parametrize(
    "head_size, group_size, heads, query_heads, bits",
    [
        (128, 128, 8, 32, 8),
        (128, 128, 2, 2, 8),
        (128, 64, 2, 14, 8),
        (64, 128, 2, 4, 8),
        (64, 64, 2, 32, 8),
        (96, 64, 2, 8, 8),
        (256, 128, 2, 16, 8),
        (128, 128, 8, 32, 4),
    ],
)
def test_scores(head_size, group_size, heads, query_heads, bits, query_len):
    fmt = PageFormat(heads, head_size, group_size, bits=bits)
    lengths = [40 * group_size + 3, query_len, 5 * group_size + 17, 133 * group_size + 5, 2 * group_size + 1]
    query_lens = [query_len, query_len, 1, query_len, query_len]
    case = Case(fmt, query_heads, lengths, query_lens, hits=[0, 0, 4 * group_size, 0, 0])
    out, got, begin, num_scored = case.scored(bits)
    # Cut between warps elsewhere, so partial sums of other pages are rounded: outputs near zero, of parts that cancel, move
    # by the rounding of those parts.
    torch.testing.assert_close(out, case.run(bits), rtol=0.02, atol=4e-3)
    expected = torch.full_like(got, float("nan"))
    begins, pages = cpu_page_selection.scored_pages(fmt, case.query_start_loc, case.seq_lens, got.shape[1])
    case.expected(bits, scores=expected, begin=begins)
    assert torch.equal(num_scored, pages) and torch.equal(begin[pages > 0], begins[pages > 0])
    assert torch.equal(got.isnan(), expected.isnan())
    torch.testing.assert_close(got, expected, rtol=0.02, atol=1e-4, equal_nan=True)  # tops of some 100 are rounded


def test_scores_of_long_and_many_requests():
    generator = torch.Generator().manual_seed(1)
    lengths = [int(2 ** (4 + 9 * torch.rand(1, generator=generator))) for _ in range(90)] + [70_000]
    case = Case(PageFormat(2, 128), 8, lengths, [1 + i % 5 for i in range(90)] + [5])
    _, got, begin, num_scored = case.scored(8)
    expected = torch.full_like(got, float("nan"))
    begins, pages = cpu_page_selection.scored_pages(case.fmt, case.query_start_loc, case.seq_lens, got.shape[1])
    case.expected(8, scores=expected, begin=begins)
    assert torch.equal(num_scored, pages)
    assert torch.equal(got.isnan(), expected.isnan())
    torch.testing.assert_close(got, expected, rtol=0.02, atol=1e-4, equal_nan=True)  # tops of some 100 are rounded


def test_scores_that_do_not_fit():
    case = Case(PageFormat(2, 128), 8, [3000, 9000, 700], [5, 5, 5])
    _, got, begin, num_scored = case.scored(8, slots=30)
    assert num_scored.tolist() == [22, 0, 0] and begin.tolist() == [0, 0, 0]
    assert got[:, :22].isfinite().all() and got[:, 22:].isnan().all()
