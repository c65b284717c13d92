"""The Triton cache kernels against the reference, byte for byte: on a GPU, or else in Triton's interpreter."""

import random

import pytest
import torch
from interpreter import DEVICE, INTERPRETED, RUNS, run_in_the_interpreter, runs

from vllm_quantspec.format import PageFormat, window_start
from vllm_quantspec.kernels import reference
from vllm_quantspec.kernels.step import plan_step, quantize_completed, write_window

pytest.importorskip("triton")

on_gpu = pytest.mark.skipif(DEVICE != "cuda" or INTERPRETED, reason="needs a CUDA GPU")

if RUNS:
    from vllm_quantspec.kernels import cache_update
    from vllm_quantspec.kernels.cache_update import quantize, store
    from vllm_quantspec.kernels.gather_context import gather_context
    from vllm_quantspec.kernels.warm_up import warm_up_prefill

SHAPES = [(128, 128), (128, 64), (64, 128), (64, 64), (96, 64), (96, 128), (256, 64), (256, 128)]  # head and group size
DTYPES = [torch.bfloat16, torch.float16]
CASES = [(*shape, dtype) for shape in SHAPES for dtype in DTYPES]
if INTERPRETED:  # every head and group size with both dtypes, not each pair of them
    CASES = [(*shape, DTYPES[(i + i // 2) % 2]) for i, shape in enumerate(SHAPES)]


@pytest.mark.skipif(RUNS, reason="the tests run in this process")
def test_in_the_interpreter():
    run_in_the_interpreter(__file__)


@pytest.fixture(autouse=True)
def few_ctas(monkeypatch):
    if RUNS and INTERPRETED:  # each costs milliseconds; few make each take several pieces, too
        monkeypatch.setattr(cache_update, "QUANTIZE_CTAS", 3)
        monkeypatch.setattr(cache_update, "QUANTIZE_DECODE_CTAS", 2)
        monkeypatch.setattr(cache_update, "STORE_CTAS", 100)


def tokens_like_a_model(count, heads, dim, dtype, generator):
    """Keys with outlier channels and channels of zeros and constants; values with tokens of very different size."""
    keys = torch.randn(count, heads, dim, generator=generator)
    keys = keys + torch.randn(heads, dim, generator=generator) * 2
    keys[..., ::37] *= 100
    keys[..., 5] = 0
    keys[..., 6] = 3.25
    values = torch.randn(count, heads, dim, generator=generator)
    values *= torch.randn(count, heads, 1, generator=generator).exp()
    values[::11] = -1.5
    return keys.to(dtype), values.to(dtype)


class Batch:
    """Random requests, of (first position, query tokens, drafts, tokens of a prefix hit) each, over one pool.

    Blocks are further apart than their bytes, key and value are slices of a fused projection, query_start_loc is a
    slice that does not begin at 0, and what no token has written is NaN.
    """

    def __init__(self, fmt, rows, max_drafts, seed=0, newest_only=True):
        generator = torch.Generator().manual_seed(seed)
        heads, dim, group, size = fmt.num_kv_heads, fmt.head_size, fmt.group_size, fmt.window_block_size
        self.fmt, self.rows, self.max_drafts = fmt, rows, max_drafts
        self.max_query_len = max(1, *(row[1] for row in rows))
        lengths = [first + query_len for first, query_len, _, _ in rows]
        width = max(lengths) // group + 3
        ids = torch.randperm(len(rows) * width, generator=generator).int() + 1
        self.block_table = ids.view(len(rows), width).clone()
        pool = torch.full((len(ids) + 1, heads, fmt.head_bytes + 48), 0xA5, dtype=torch.uint8)
        self.pages = pool[:, :, : fmt.head_bytes]
        self.window_block_table = torch.zeros(len(rows), max(lengths) // size + 1, dtype=torch.int32)
        blocks = []
        for r, (first, query_len, _, hit) in enumerate(rows):
            held = window_start(first, group)
            kept = window_start(first + query_len - max_drafts, group) if newest_only else 0
            for entry in range(-(-(first + query_len) // size)):
                position = entry * size
                old = held <= position < first and position >= hit
                if old or position + size > max(first, kept, hit):
                    blocks.append((r, entry))
        order = torch.randperm(len(blocks), generator=generator) + 1
        pool = torch.full((len(blocks) + 1, 2, heads, size, 2 * dim), float("nan"), dtype=fmt.dtype)
        self.window = pool[:, 1]
        for (r, entry), block in zip(blocks, order.tolist(), strict=True):
            self.window_block_table[r, entry] = block
        tokens = [tokens_like_a_model(n, heads, dim, fmt.dtype, generator) for n in lengths]
        self.tokens = tokens
        for r, (first, _, _, _) in enumerate(rows):
            both = torch.cat(tokens[r], dim=-1)
            for entry in range(-(-first // size)):
                if block := int(self.window_block_table[r, entry]):
                    old = both[entry * size : min(first, (entry + 1) * size)]
                    self.window[block, :, : len(old)] = old.transpose(0, 1)
        fresh = [torch.cat([x[k][first:] for x, (first, *_) in zip(tokens, rows, strict=True)]) for k in (0, 1)]
        self.offset = 3
        qkv = torch.full((len(fresh[0]) + 5, (4 * heads) * dim), float("nan"), dtype=fmt.dtype)
        self.key = qkv[:, 2 * heads * dim : 3 * heads * dim].view(-1, heads, dim)
        self.value = qkv[:, 3 * heads * dim :].view(-1, heads, dim)
        self.key[3:-2], self.value[3:-2] = fresh
        starts = torch.tensor([0, 3, *(row[1] for row in rows)]).cumsum(0).int()
        self.query_start_loc = starts[1:]
        self.seq_lens = torch.tensor(lengths, dtype=torch.int32)
        self.num_unverified = torch.tensor([row[2] for row in rows], dtype=torch.int32)

    def on(self, device):
        """The same batch on another device, with its strides."""
        copy = object.__new__(Batch)
        copy.__dict__.update(self.__dict__)
        for name in ("pages", "window", "key", "value", "query_start_loc"):
            view = getattr(self, name)
            flat = torch.empty(0, dtype=view.dtype).set_(view.untyped_storage())
            setattr(copy, name, flat.clone().to(device).as_strided(view.shape, view.stride(), view.storage_offset()))
        for name in ("block_table", "window_block_table", "seq_lens", "num_unverified"):
            setattr(copy, name, getattr(self, name).clone().to(device))
        return copy

    def expect(self):
        """Window and pages after the step, by the reference."""
        starts = self.query_start_loc - self.query_start_loc[0]
        plan = plan_step(
            self.fmt,
            starts,
            self.seq_lens,
            self.num_unverified,
            self.block_table,
            self.window_block_table,
            max_unverified=self.max_drafts,
        )
        own = slice(int(self.query_start_loc[0]), int(self.query_start_loc[-1]))
        window, pages = self.window.clone(), self.pages.clone()
        write_window(self.fmt, window, plan.window_slots, self.key[own], self.value[own])
        quantize_completed(self.fmt, plan, pages, window, self.key[own], self.value[own])
        return window, pages, plan.page_ids

    def store(self):
        store(
            self.fmt,
            self.window,
            self.key,
            self.value,
            self.query_start_loc,
            self.seq_lens,
            self.window_block_table,
            max_query_len=self.max_query_len,
        )

    def quantize(self):
        quantize(
            self.fmt,
            self.pages,
            self.window,
            self.key,
            self.value,
            self.query_start_loc,
            self.seq_lens,
            self.num_unverified,
            self.block_table,
            self.window_block_table,
            max_query_len=self.max_query_len,
            max_unverified=self.max_drafts,
        )


def same_bits(a, b):
    a, b = (x.cpu().contiguous().view(torch.uint8) for x in (a, b))
    return torch.equal(a, b)


def check_step(batch):
    """Store and quantize; returns how many pages were due."""
    window, pages, page_ids = batch.expect()
    here = batch.on(DEVICE)
    here.store()
    assert same_bits(here.window, window)
    here.quantize()
    assert same_bits(here.window, window)
    assert same_bits(here.pages, pages)
    whole = here.pages.as_strided(here.pages.shape[:2] + (here.pages.stride(1),), here.pages.stride())
    assert (whole[:-1, :, here.fmt.head_bytes :] == 0xA5).all()
    return page_ids.numel()


def random_rows(rng, group, count, max_drafts):
    rows = []
    for _ in range(count):
        hit = rng.choice([0, 0, group, 3 * group])
        first = hit + rng.choice([0, 1, group - 1, group, group + 1, 2 * group, rng.randrange(4 * group)])
        drafts = rng.randrange(max_drafts + 1) if rng.random() < 0.5 else 0
        length = drafts + (1 if drafts or rng.random() < 0.5 else rng.randrange(1, 3 * group))
        rows.append((first, length, drafts, hit))
    return rows


@runs
@pytest.mark.parametrize("head_size, group_size, dtype", CASES)
def test_shapes(head_size, group_size, dtype):
    """A prefill of two pages, one page completed by one token, by lookback, none, and an empty row."""
    heads = 3 if head_size == 64 else 1
    fmt = PageFormat(heads, head_size, group_size, dtype)
    assert check_step(Batch(fmt, rows_of_all_kinds(group_size), max_drafts=4)) == 4


def rows_of_all_kinds(g):
    return [(0, 2 * g + 3, 0, 0), (3 * g - 1, 1, 0, 0), (2 * g + 1, 5, 4, 0), (g + 7, 1, 0, 0), (0, 0, 0, 0)]


@runs
@pytest.mark.parametrize("head_size, group_size", SHAPES)
def test_pages_of_4_bits(head_size, group_size):
    """Quantized without their lower codes, of which not a byte is written, and gathered again."""
    fmt = PageFormat(1, head_size, group_size, bits=4)
    assert check_step(Batch(fmt, rows_of_all_kinds(group_size), max_drafts=4)) == 4
    g = group_size
    Context(fmt, [(3 * g + 5, 0, 3 * g + 5, 0), (4 * g, g + 9, 3 * g - 1, 0), (2 * g + 40, g, 2 * g + 40, 2 * g)]).check(4)


@runs
def test_float32():
    assert check_step(Batch(PageFormat(1, 64, 64, torch.float32), [(70, 100, 0, 0), (60, 6, 2, 0)], max_drafts=4)) == 2


@runs
@pytest.mark.parametrize("seed", range(60 if DEVICE == "cuda" and not INTERPRETED else 6))
def test_random_batches(seed):
    rng = random.Random(seed)
    max_drafts = rng.choice([0, 1, 4, 8])
    group = rng.choice([64, 128])
    fmt = PageFormat(rng.choice([1, 2, 5]) if DEVICE == "cuda" else 1, 64, group, rng.choice(DTYPES))
    count = rng.randrange(1, 5 if INTERPRETED else 40)
    check_step(Batch(fmt, random_rows(rng, group, count, max_drafts), max_drafts, seed))


@runs
@pytest.mark.parametrize("bits", [4, 8])
def test_huge_and_tiny_values(bits):
    """Scales and minima stop at fp16's range; spreads below fp16's smallest number make flat groups."""
    batch = Batch(PageFormat(1, 64, 64, bits=bits), [(0, 64, 0, 0)], max_drafts=0)
    batch.key[3:-2, :, 0] *= 1e30
    batch.key[3:-2, :, 1] = batch.key[3:-2, :, 1] * 1e3 + 70_000
    batch.key[3:-2, :, 2] = batch.key[3:-2, :, 2] * 1e3 - 1e6
    batch.key[3:-2, :, 3] *= 1e-8
    batch.key[3:-2, :, 4] *= 1e-6
    batch.key[3:-2, :, 7] = 3e38 * batch.key[3:-2, :, 7].sign()
    batch.value[3:9] *= 1e30
    batch.value[9:12] *= 1e-30
    assert check_step(batch) == 1


@runs
def test_nothing_to_store():
    """No window block, a table that is too narrow, page 0, and rows longer than their sequence."""
    batch = Batch(PageFormat(1, 64, 64), [(0, 70, 0, 0), (60, 8, 0, 0)], max_drafts=0).on(DEVICE)
    batch.block_table.zero_()
    batch.window_block_table = batch.window_block_table[:, :1]
    batch.window_block_table[1] = 0
    before, untouched = batch.window.clone(), batch.pages.clone()
    batch.store()
    size = batch.fmt.window_block_size
    block = int(batch.window_block_table[0, 0])
    expected = torch.cat((batch.key[3 : 3 + size], batch.value[3 : 3 + size]), dim=-1).transpose(0, 1)
    assert same_bits(batch.window[block], expected)
    batch.window[block] = before[block]
    assert same_bits(batch.window, before)
    batch.quantize()
    assert same_bits(batch.pages, untouched)
    batch.seq_lens[:] = torch.tensor([30, 0], dtype=torch.int32)  # of a warm-up, perhaps
    batch.store()
    batch.quantize()
    assert same_bits(batch.pages, untouched)


@runs
def test_warm_up_changes_nothing():
    batch = Batch(PageFormat(2, 64, 64), [(300, 40, 0, 0), (0, 8, 0, 0)], max_drafts=0).on(DEVICE)
    tables = (batch.block_table, batch.window_block_table)
    before = [x.clone() for x in (batch.pages, batch.window, *tables)]
    warm_up_prefill(batch.fmt, batch.pages, batch.window, batch.key, batch.value, *tables)
    assert all(same_bits(a, b) for a, b in zip(before, (batch.pages, batch.window, *tables), strict=True))


@runs
def test_only_the_newest_tokens_of_a_long_query_are_stored():
    """The first tokens of this chunk have room in a block of earlier ones."""
    batch = Batch(PageFormat(1, 64, 64), [(260, 700, 0, 0)], max_drafts=0)
    size, newest = batch.fmt.window_block_size, 4 * batch.fmt.group_size + 64
    expected = batch.expect()[0]
    block = int(batch.window_block_table[0, 260 // size])
    assert block and 260 % size and not batch.window_block_table[0, 260 // size + 1 : (960 - newest) // size].any()
    expected[block] = batch.window[block]
    batch = batch.on(DEVICE)
    batch.store()
    assert same_bits(batch.window, expected)


@runs
def test_store_converts():
    batch = Batch(PageFormat(2, 64, 64, torch.float16), [(0, 40, 0, 0)], max_drafts=0)
    expected = batch.expect()[0]
    batch.key, batch.value = batch.key.float(), batch.value.float()
    batch = batch.on(DEVICE)
    batch.store()
    assert same_bits(batch.window, expected)


# --- gather_context ---------------------------------------------------------------------------------------------------


def rounded(x, dtype):
    """fp32 x in `dtype`: as a GPU does it, or cut off, as Triton's interpreter makes bfloat16."""
    if INTERPRETED and dtype == torch.bfloat16:
        x = (x.view(torch.int32) & -65536).view(torch.float32)
    return x.to(dtype)


class Context:
    """Requests of (first, begin, end, hit): pages of all complete tokens before `first`, and the window around it."""

    def __init__(self, fmt, rows, seed=0):
        self.fmt, self.rows = fmt, rows
        batch = Batch(fmt, [(first, 1, 0, hit) for first, _, _, hit in rows], max_drafts=0, seed=seed)
        group = fmt.group_size
        for r, (first, *_) in enumerate(rows):
            if count := first // group:
                keys, values = (x[: count * group].unflatten(0, (count, group)) for x in batch.tokens[r])
                pages = batch.pages.contiguous()
                reference.quantize_pages(fmt, pages, batch.block_table[r, :count].long(), keys, values)
                batch.pages.copy_(pages)
        self.batch = batch
        lengths = [end - begin for _, begin, end, _ in rows]
        self.cu_seqlens = torch.tensor([2, *lengths]).cumsum(0).int()
        self.max_len = max(1, *lengths)
        self.starts, self.first = (torch.tensor([row[i] for row in rows], dtype=torch.int32) for i in (1, 0))

    def expect(self, bits, dtype):
        heads, dim, size = self.fmt.num_kv_heads, self.fmt.head_size, self.fmt.window_block_size
        keys, values = (torch.full((int(self.cu_seqlens[-1]) + 2, heads, dim), 7.0, dtype=dtype) for _ in range(2))
        for r, (first, begin, end, _) in enumerate(self.rows):
            table = self.batch.window_block_table[r : r + 1]
            boundary = reference.exact_start(self.fmt, table[0], first)
            row = int(self.cu_seqlens[r])
            if begin < min(boundary, end):
                ids = self.batch.block_table[r, : -(-min(boundary, end) // self.fmt.group_size)].long()
                pages = self.batch.pages.contiguous()
                old = reference.dequantize_pages(self.fmt, pages, ids, bits, torch.float32)
                for out, x in zip((keys, values), old, strict=True):
                    part = rounded(x.flatten(0, 1)[begin : min(boundary, end)], dtype)
                    out[row : row + len(part)] = part
            for token in range(max(begin, boundary), end):
                exact = self.batch.window[int(table[0, token // size]), :, token % size]
                keys[row + token - begin], values[row + token - begin] = exact.split(dim, dim=-1)
        return keys, values

    def run(self, bits=8, dtype=None):
        batch, dtype = self.batch.on(DEVICE), dtype or self.fmt.dtype
        heads, dim = self.fmt.num_kv_heads, self.fmt.head_size
        out = torch.full((int(self.cu_seqlens[-1]) + 2, 2 * heads + 1, dim), 7.0, dtype=dtype, device=DEVICE)
        keys, values = out[:, :heads], out[:, heads : 2 * heads]
        lengths = (x.to(DEVICE) for x in (self.cu_seqlens, self.starts, self.first))
        tables = batch.block_table, batch.window_block_table
        read = {} if bits == self.fmt.bits else {"bits": bits}  # by default all that there are
        gather_context(self.fmt, batch.pages, batch.window, keys, values, *lengths, *tables, max_len=self.max_len, **read)
        assert (out[:, -1] == 7).all()
        return keys.cpu(), values.cpu()

    def check(self, bits=8, dtype=None):
        for got, expected in zip(self.run(bits, dtype), self.expect(bits, dtype or self.fmt.dtype), strict=True):
            assert same_bits(got, expected)


@runs
@pytest.mark.parametrize("head_size, group_size, dtype", CASES)
def test_gather_shapes(head_size, group_size, dtype):
    g = group_size
    rows = [(3 * g + 5, 0, 3 * g + 5, 0), (4 * g, g + 9, 3 * g - 1, 0), (5, 0, 5, 0), (2 * g, 0, 0, 0)]
    rows += [(4 * g + 40, 3 * g, 4 * g + 40, 4 * g)]  # nothing of the prefix hit is in the window
    Context(PageFormat(3 if head_size == 64 else 1, head_size, group_size, dtype), rows).check()


@runs
def test_gather_draft_and_dtypes():
    context = Context(PageFormat(2, 64, 64), [(300, 17, 300, 0), (200, 0, 190, 128)])
    context.check(4)
    context.check(8, torch.float16)
    context.check(8, torch.float32)


@runs
def test_gathered_context_is_what_prefill_attention_reads():
    fmt = PageFormat(2, 64, 64)
    rows = [(200, 0, 200, 0), (333, 0, 333, 320), (256, 0, 256, 256)]
    context = Context(fmt, rows)
    keys, values = (x.bfloat16() for x in context.run(dtype=torch.float32))
    generator = torch.Generator().manual_seed(5)
    for r, (first, *_) in enumerate(rows):
        query = torch.randn(9, 4, 64, generator=generator).bfloat16()
        own = tokens_like_a_model(9, 2, 64, fmt.dtype, generator)
        batch = context.batch
        expected = reference.prefill_attention(
            fmt,
            batch.pages.contiguous(),
            batch.window,
            query,
            *own,
            first + 9,
            batch.block_table[r],
            batch.window_block_table[r],
            0.125,
        )
        at = slice(int(context.cu_seqlens[r]), int(context.cu_seqlens[r + 1]))
        k, v = (torch.cat(x).float().repeat_interleave(2, dim=1) for x in ((keys[at], own[0]), (values[at], own[1])))
        scores = torch.einsum("qhd,khd->hqk", query.float(), k) * 0.125
        hidden = torch.arange(first + 9) > torch.arange(first, first + 9)[:, None]
        probs = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        got = torch.einsum("hqk,khd->qhd", probs, v)
        assert (got - expected.float()).norm() / got.norm() < 1e-2


# --- Arguments --------------------------------------------------------------------------------------------------------


@runs
def test_refuses():
    batch = Batch(PageFormat(1, 64, 64), [(0, 3, 0, 0)], max_drafts=0).on(DEVICE)
    for name, bad, message in (
        ("key", batch.key.int(), "key must be floating point"),
        ("value", batch.value[..., :32], "value must be floating point"),
        ("window", batch.window.half(), "window must be torch.bfloat16"),
        ("seq_lens", batch.seq_lens.long(), "seq_lens must be int32"),
        ("query_start_loc", batch.query_start_loc[:1], "one start more than the 1 requests"),
        ("max_query_len", 0, "positive max_query_len|at least 1"),
    ):
        good = getattr(batch, name)
        setattr(batch, name, bad)
        for call in (batch.store, batch.quantize):
            with pytest.raises(ValueError, match=message):
                call()
        setattr(batch, name, good)
    batch.pages = batch.pages[..., 1:]
    with pytest.raises(ValueError, match="pages must be uint8"):
        batch.quantize()
    context = Context(PageFormat(1, 64, 64), [(70, 0, 70, 0)])
    with pytest.raises(ValueError, match="bits must be 4 or 8"):
        context.run(6)
    context.starts = context.starts.long()
    with pytest.raises(ValueError, match="starts must be int32"):
        context.run()


# --- Only on a GPU ----------------------------------------------------------------------------------------------------


@on_gpu
@pytest.mark.parametrize("head_size, group_size", [(128, 128), (96, 64), (256, 128)])
def test_large(head_size, group_size):
    fmt = PageFormat(8, head_size, group_size)
    rng = random.Random(1)
    rows = random_rows(rng, group_size, 90, 4) + [(1024, 8192, 0, 0), (0, 3000, 0, 0)]
    assert check_step(Batch(fmt, rows, max_drafts=4)) > 60
    Context(fmt, [(5000, 100, 4900, 0), (9000, 0, 9000, 0), (3000, 2000, 3000, 2944)]).check()


@on_gpu
def test_cuda_graph_replays_other_lengths():
    fmt = PageFormat(2, 128)
    graph, static = None, None
    for seed in range(5):
        rng = random.Random(seed)
        rows = [(rng.randrange(120, 700), 5, rng.randrange(5), 0) for _ in range(7)] + [(0, 0, 0, 0)]
        rows[0] = (128 * (seed + 1) - 1, 1, 0, 0)
        batch = Batch(fmt, [*rows, (1000, 5, 4, 0)], max_drafts=4, seed=seed)
        window, pages, _ = batch.expect()
        here = batch.on(DEVICE)
        if graph is None:
            here.store()
            here.quantize()
            # Room for the pools of all batches.
            tensors = ("key", "value", "query_start_loc", "seq_lens", "num_unverified", "block_table", "window_block_table")
            static = here
            static.pages = torch.zeros(200, 2, fmt.head_bytes, dtype=torch.uint8, device=DEVICE)
            static.window = torch.zeros(200, *batch.window.shape[1:], dtype=fmt.dtype, device=DEVICE)
            for name in ("key", "value"):
                setattr(static, name, torch.zeros(60, 2, 128, dtype=fmt.dtype, device=DEVICE))
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                static.store()
                static.quantize()
        here = batch.on(DEVICE)
        for name in ("pages", "window", *tensors):
            getattr(static, name)[: len(getattr(here, name))].copy_(getattr(here, name))
        graph.replay()
        assert same_bits(static.window[: len(window)], window)
        assert same_bits(static.pages[: len(pages)], pages)
