"""Which pages sparse drafts read: the twin against sentences about it, the Triton kernels against the twin."""

import random
from collections import defaultdict

import pytest
import torch
from interpreter import DEVICE, INTERPRETED, RUNS, run_in_the_interpreter, runs

from vllm_quantspec.format import PageFormat
from vllm_quantspec.kernels import cpu_page_selection as twin
from vllm_quantspec.kernels import page_selection
from vllm_quantspec.kernels.page_selection import (
    plan_selection,
    plan_snapkv,
    reduce_scores,
    select_pages,
    select_snapkv,
)

pytest.importorskip("triton")

LARGE = DEVICE == "cuda" and not INTERPRETED
on_gpu = pytest.mark.skipif(not LARGE, reason="needs a CUDA GPU")
FMT = PageFormat(1, 64, 64)
BF16, FP32 = torch.bfloat16, torch.float32
NAN = float("nan")
LIMITS = {"pages": 3, "fraction": 0.125, "min_pages": 8, "min_total_pages": 12}


@pytest.mark.skipif(RUNS, reason="the tests run in this process")
def test_in_the_interpreter():
    run_in_the_interpreter(__file__)


@pytest.fixture(autouse=True)
def large_ctas(monkeypatch):
    if INTERPRETED:  # each costs milliseconds
        monkeypatch.setattr(page_selection, "REDUCE_PAGES", 128)
        monkeypatch.setattr(page_selection, "REDUCE_ELEMENTS", 1 << 14)


def ints(values, device="cpu"):
    return torch.tensor(values, dtype=torch.int32, device=device)


def longer(x, more=3, filler=99):
    """The same with entries behind it, as persistent tensors have them, on the device."""
    return torch.cat((x, x.new_full((more,), filler))).to(DEVICE)


def leave(mass, generator):
    """What readers leave of pages with ``mass`` fp64 [L, count, H, M], rows in tiles of 8: raw and flags.

    A reader begins anywhere, in the middle of a page too, where it has nothing summed yet; `top` is any number.
    """
    layers, count, heads, rows = mass.shape

    def rand(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    raw = torch.full((layers, count, heads, 2, rows, 2), NAN)
    fresh, whole = (rand(2, layers, count, heads, rows // 8) < torch.tensor([0.2, 0.7]).view(2, 1, 1, 1, 1)).unbind()
    fresh[:, 0] = True
    had = torch.zeros(layers, heads, rows, dtype=torch.float64)

    def leave_part(page, part, where):
        top = had.clamp_min(1e-30).log2() + rand(had.shape) * 4 - 2
        pairs = torch.stack((had * torch.exp2(-top), top), dim=-1).float()
        raw[:, page, :, part] = torch.where(where[..., None], pairs, NAN)

    for page in range(count):
        is_fresh, is_whole = (x[:, page].repeat_interleave(8, -1) for x in (fresh, whole))
        here = mass[:, page] * torch.where(is_whole, 1.0, rand(had.shape))
        had = torch.where(is_fresh, 0, had) + here
        leave_part(page, 0, torch.ones_like(is_whole))
        had = torch.where(is_whole, had, mass[:, page] - here)
        leave_part(page, 1, ~is_whole)
    return raw, fresh.byte() + 2 * whole.byte()


class Step:
    """A verification step of requests that have `pages` scored pages each, and what its attention leaves.

    What no request owns is NaN: slots, rows and tokens. A request with 0 pages may be one of a prompt.
    """

    def __init__(self, seed, pages, heads=2, layers=1, queries=5, group=4, num_slots=None, more_rows=3):
        rng = random.Random(seed)
        generator = torch.Generator().manual_seed(seed)
        self.heads, self.layers, self.queries, self.group = heads, layers, queries, group
        tokens = [rng.randrange(1, queries + 1) if n else rng.choice([0, 1, queries, 3 * queries]) for n in pages]
        first = [(n + 1) * 64 + rng.randrange(64) if n else rng.randrange(128) for n in pages]
        self.seq_lens = ints(first) + ints(tokens)
        self.query_start_loc = ints([2, *tokens]).cumsum(0).int()
        self.slots = sum(pages) + rng.randrange(1, 40) if num_slots is None else num_slots
        self.begin, self.num_scored = twin.scored_pages(FMT, self.query_start_loc, self.seq_lens, self.slots)
        self.max_pages = max(1, *pages) + rng.randrange(3)
        self.num_rows = ints([rng.randrange(0, max(n, 1) + 1) for n in tokens])
        self.width = self.max_pages + 3
        self.block_table = torch.randperm(len(pages) * self.width, generator=generator).int().view(len(pages), -1)[:, :-1]
        rows, all_tokens = -(-(queries * group + more_rows) // 8) * 8, int(self.query_start_loc[-1]) + 1
        self.mass = torch.full((layers, self.slots, heads, rows), NAN, dtype=torch.float64)
        self.raw = torch.full((layers, self.slots, heads, 2, rows, 2), NAN)
        self.flags = torch.full((layers, self.slots, heads, rows // 8), 77, dtype=torch.uint8)
        self.lse = torch.full((layers, all_tokens, heads, group), NAN)
        for start, n, begin, count in zip(
            self.query_start_loc.tolist(), tokens, self.begin.tolist(), self.num_scored.tolist(), strict=False
        ):
            if count:
                mass = (torch.randn(layers, count, heads, rows, generator=generator).double() * 4 + 3).exp2()
                slots = slice(begin, begin + count)
                self.mass[:, slots] = mass
                self.raw[:, slots], self.flags[:, slots] = leave(mass, generator)
                whole = (mass[..., : n * group].sum(1) + 0.1).log2().float()  # and something in the window
                self.lse[:, start : start + n] = whole.unflatten(2, (n, group)).transpose(1, 2)
        self.lse = self.lse.flatten(2)

    def expected_scores(self, layer, out):
        """`reduce_scores` in float64, into out [H, C, Q]."""
        for r, (begin, count) in enumerate(zip(self.begin.tolist(), self.num_scored.tolist(), strict=True)):
            start, end = self.query_start_loc[r : r + 2].tolist()
            if count:
                x = self.mass[layer, begin : begin + count, :, : (end - start) * self.group]
                x = x.unflatten(2, (end - start, self.group))  # [pages, H, q, g]
                norm = self.lse[layer, start:end].double().view(end - start, self.heads, self.group).transpose(0, 1)
                mass = (x * (-norm).exp2()).sum(3)
                out[:, begin : begin + count, : end - start] = mass.transpose(0, 1)
        return out

    def reduce(self, layer, scores_of_layer):
        reduce_scores(
            self.raw[layer].to(DEVICE),
            self.flags[layer].to(DEVICE),
            self.lse[layer].to(DEVICE),
            longer(self.query_start_loc, 0),
            longer(self.begin),
            longer(self.num_scored),
            scores_of_layer,
            max_pages=self.max_pages,
        )

    def random_scores(self, seed, kind, dtype=BF16):
        """[L, H, C, Q]; NaN where nothing is to be read."""
        generator = torch.Generator().manual_seed(seed)
        shape = (self.layers, self.heads, self.slots, self.queries)
        scores = (torch.randn(shape, generator=generator) * 3 - 4).exp()
        if kind == "ties":
            scores = torch.randint(0, 3, shape, generator=generator) / 4
        elif kind == "zeros":
            scores[torch.rand(shape[:3], generator=generator) < 0.8] = 0
        owned = torch.zeros(shape[2:], dtype=torch.bool)
        for begin, count, n in zip(self.begin.tolist(), self.num_scored.tolist(), self.num_rows.tolist(), strict=True):
            owned[begin : begin + count, : max(n, 1)] = True
        return scores.masked_fill(~owned, NAN).to(dtype)

    def random_counts(self, seed):
        rng = random.Random(seed)
        count = ints([rng.choice([0, 1, n, n - 1, rng.randrange(n + 1)]) for n in self.num_scored.tolist()])
        count = count.clamp_min(0).minimum(self.num_scored)
        return count, self.num_scored * (count > 0)

    def select(self, scores, count, dense_from, fresh_page_list):
        table = torch.full((len(count), self.width + 2), -5, dtype=torch.int32, device=DEVICE)[:, 1 : self.width]
        table.copy_(self.block_table)
        select_pages(
            scores,
            longer(self.begin),
            longer(self.num_rows, 0),
            longer(count),
            longer(dense_from),
            table,
            fresh_page_list,
            max_pages=self.max_pages,
        )
        return fresh_page_list.cpu()

    def page_list(self):
        return torch.full((self.layers, self.heads, self.slots), -7, dtype=torch.int32)


def random_step(seed, most_programs):
    """Of 1 to 17 requests with 0 to 600 pages, some of which do not fit."""
    rng = random.Random(seed)
    requests = rng.choice([1, 2, 3, 5, 9, 16, 17])
    heads = max(1, min(rng.randrange(1, 9), most_programs // requests))
    layers = max(1, min(rng.randrange(1, 4), most_programs // (requests * heads)))
    pages = [rng.choice([0, 1, 2, 31, 32, 33, rng.randrange(601), rng.randrange(100)]) for _ in range(requests)]
    shape = {"heads": heads, "layers": layers, "queries": rng.randrange(1, 10), "group": rng.randrange(1, 9)}
    if rng.random() < 0.4 and sum(pages) > 1:
        shape["num_slots"] = rng.randrange(1, sum(pages))
    return Step(seed, pages, more_rows=rng.randrange(4), **shape)


SEEDS = range(200 if LARGE else 16)
PROGRAMS = 10_000 if LARGE else 40


# --- The twin ---------------------------------------------------------------------------------------------------------


def test_pages_are_scored_one_request_after_the_other_while_there_is_room():
    starts, lengths = ints([0, 5, 6, 106, 107]), ints([64 * 11 + 5, 64 * 5, 100, 64 * 21 + 1])
    begin, num_scored = twin.scored_pages(FMT, starts, lengths, 100)
    assert begin.tolist() == [0, 10, 13, 13] and num_scored.tolist() == [10, 3, 0, 20]
    begin, num_scored = twin.scored_pages(FMT, starts, lengths, 32)
    assert begin.tolist() == [0, 10, 13, 0] and num_scored.tolist() == [10, 3, 0, 0]


def test_how_many_pages_are_chosen():
    scored = ints([0, 1, 7, 8, 40, 41])
    count, dense_from = twin.plan_selection(scored, **LIMITS)
    assert count.tolist() == [0, 0, 0, 3, 5, 6] and dense_from.tolist() == [0, 0, 0, 8, 40, 41]
    count, dense_from = twin.plan_selection(scored, **LIMITS | {"min_total_pages": 98})
    assert not count.any() and not dense_from.any()
    count, dense_from = twin.plan_selection(scored, **LIMITS | {"pages": 40})
    assert count.tolist() == [0, 0, 0, 0, 0, 40] and dense_from.tolist() == [0, 0, 0, 0, 0, 41]


@pytest.mark.parametrize("kind", ["random", "ties", "zeros"])
def test_the_pages_of_most_mass_are_chosen(kind):
    step = Step(1, [40, 0, 7, 200], heads=3, layers=2)
    count, dense_from = ints([6, 0, 7, 30]), step.num_scored
    scores, got = step.random_scores(1, kind), step.page_list()
    twin.select_pages(scores, step.begin, step.num_rows, count, dense_from, step.block_table, got)
    for r in (0, 2, 3):
        begin, pages = int(step.begin[r]), int(step.num_scored[r])
        mass = scores[:, :, begin : begin + pages, : max(int(step.num_rows[r]), 1)].double().sum(-1)
        for own, chosen in zip(mass.flatten(0, 1), got[:, :, begin : begin + int(count[r])].flatten(0, 1), strict=True):
            best = {0, *sorted(range(1, pages), key=lambda p: (-own[p].item(), p))[: int(count[r]) - 1]}
            assert chosen.tolist() == step.block_table[r, sorted(best)].tolist()


def test_without_scores_the_newest_pages_are_chosen():
    step = Step(2, [9], heads=1)
    got = step.page_list()
    twin.select_pages(None, step.begin, step.num_rows, ints([3]), ints([9]), step.block_table, got)
    assert got[0, 0, :4].tolist() == [*step.block_table[0, [0, 7, 8]].tolist(), -7]


def test_snapkv_chooses_once_after_the_prompt():
    state = torch.zeros(4, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)

    def plan(scored, rows, **limits):
        return [x.tolist() for x in twin.plan_snapkv(ints(scored), ints(rows), *state, **LIMITS | limits)]

    assert plan([0, 40], [2, 1]) == [[0, 5], [0, 40], [0, 1]]  # one after its prompt, one with a prompt
    assert plan([80, 90], [1, 2]) == [[5, 12], [40, 90], [0, 1]]  # in another order; the first keeps what it has
    assert plan([91, 8, 0], [2, 3, -1]) == [[12, 3, 0], [90, 8, 0], [0, 1, 0]]
    assert plan([9], [3], min_total_pages=50) == [[3], [8], [0]]  # what is chosen stays, whatever the batch is
    assert plan([0], [1]) == [[0], [0], [0]]  # another request has the row now
    assert plan([50, 7], [1, 0]) == [[7, 0], [50, 0], [1, 0]]  # too few pages are not a choice
    assert plan([51, 30], [1, 0]) == [[7, 4], [50, 30], [0, 1]]
    assert state[0].tolist() == [30, 50, 90, 8] and state[1].tolist() == [4, 7, 12, 3]


# --- The kernels ------------------------------------------------------------------------------------------------------


def check_reduce(step, dtype=BF16):
    tolerance = {"rtol": 2**-7, "atol": 1e-5} if dtype == BF16 else {"rtol": 2e-5, "atol": 1e-5}
    for layer in range(step.layers):
        scores = torch.full((step.heads, step.slots + 2, step.queries), -3.0, dtype=dtype, device=DEVICE)
        step.reduce(layer, scores[:, 1:-1])
        expected = step.expected_scores(layer, torch.full_like(scores[:, 1:-1], -3, device="cpu"))
        torch.testing.assert_close(scores[:, 1:-1].cpu(), expected, **tolerance)
        assert ((scores == -3).cpu()[:, 1:-1] == (expected == -3)).all() and (scores[:, [0, -1]] == -3).all()


@runs
@pytest.mark.parametrize("seed", SEEDS)
def test_reduce(seed):
    check_reduce(random_step(seed, PROGRAMS), FP32 if seed % 5 == 0 else BF16)


@runs
def test_reduce_many_requests():
    """More than a CTA looks at together."""
    rng = random.Random(0)
    check_reduce(Step(3, [rng.choice([0, 1, 2, 5]) for _ in range(700)], heads=1, queries=2, group=2))


@runs
def test_reduce_stays_finite():
    """A norm that is too small, infinite or NaN, and masses that are."""
    step = Step(4, [6], heads=1, queries=1, group=4, more_rows=0)
    step.raw[0, :, 0, 0, :4] = torch.tensor([[1.0, 0], [5, 1e30], [NAN, 0], [3, 0]])
    step.flags[0] = 3
    step.lse[0, 2] = torch.tensor([0, -1e30, 2, float("inf")])
    scores = torch.zeros(1, step.slots, 1, dtype=BF16, device=DEVICE)
    step.reduce(0, scores)
    assert scores[0, :6, 0].tolist() == [3.0] * 6  # 1; 1; 1; 0


@runs
@pytest.mark.parametrize("seed", range(60 if LARGE else 25))
def test_plan(seed):
    rng = random.Random(seed)
    requests = rng.choice([1, 2, 17, 64, 200, 1024])
    scored = ints([rng.choice([0, 1, 7, 8, 9, rng.randrange(4000)]) for _ in range(requests)])
    limits = {
        "pages": rng.choice([1, 3, 16, 64]),
        "fraction": rng.choice([0.0, 1 / 16, 0.1, 0.3, 1.0, rng.random()]),
        "min_pages": rng.choice([0, 1, 8, 100]),
        "min_total_pages": rng.choice([0, 1, int(scored.sum()), int(scored.sum()) + 1]),
    }
    expected = twin.plan_selection(scored, **limits)
    more = rng.randrange(9)
    device, got = longer(scored), [torch.full((requests + more,), 99, dtype=torch.int32, device=DEVICE) for _ in range(2)]
    plan_selection(device[:requests], *got, **limits)
    for x, y in zip(got, expected, strict=True):
        assert x.tolist() == y.tolist() + [0] * more
    assert device.tolist() == [0] * requests + [99] * 3
    plan_selection(device[:requests], *got, **limits)
    assert not got[0].any() and not got[1].any()


@runs
@pytest.mark.parametrize("kind", ["random", "ties", "zeros"])
@pytest.mark.parametrize("seed", SEEDS)
def test_select(seed, kind):
    step = random_step(seed, PROGRAMS if LARGE else 20)
    scores = step.random_scores(seed, kind, FP32 if seed % 5 == 1 else BF16)
    count, dense_from = step.random_counts(seed)
    expected = step.page_list()
    twin.select_pages(scores, step.begin, step.num_rows, count, dense_from, step.block_table, expected)
    apart = torch.full((step.layers, step.heads + 1, *scores.shape[2:]), NAN, dtype=scores.dtype, device=DEVICE)[:, :-1]
    assert torch.equal(step.select(apart.copy_(scores), count, dense_from, step.page_list().to(DEVICE)), expected)


@runs
@pytest.mark.parametrize("seed", range(3))
def test_select_the_newest(seed):
    step = random_step(seed, PROGRAMS)
    count, dense_from = step.random_counts(seed)
    expected = step.page_list()
    twin.select_pages(None, step.begin, step.num_rows, count, dense_from, step.block_table, expected)
    assert torch.equal(step.select(None, count, dense_from, step.page_list().to(DEVICE)), expected)


@runs
@pytest.mark.parametrize("pages", [4096, 3000, page_selection.MAX_PAGES])
def test_select_of_many_pages(pages):
    step = Step(5, [pages], heads=1, queries=3, group=1)
    for kind in ("random", "ties"):
        scores, count = step.random_scores(5, kind), ints([pages // 5])
        expected = step.page_list()
        step.max_pages = pages
        twin.select_pages(scores, step.begin, step.num_rows, count, step.num_scored, step.block_table, expected)
        assert torch.equal(step.select(scores.to(DEVICE), count, step.num_scored, step.page_list().to(DEVICE)), expected)


class Requests:
    """Requests that come and go, in rows of a state, and lengthen from step to step."""

    def __init__(self, seed, rows):
        self.rng = random.Random(seed)
        self.pages: dict[int, int] = {}  # by row; 0: its prompt is computed
        self.rows = rows

    def step(self):
        """Rows, with padding among them, and scored pages of this step's requests."""
        rng = self.rng
        for row in range(self.rows):
            if row not in self.pages:
                if rng.random() < 0.4:
                    self.pages[row] = 0
            elif rng.random() < 0.15:
                del self.pages[row]
            elif self.pages[row] == 0:
                self.pages[row] = rng.choice([1, 7, 8, 33, rng.randrange(1, 110)])
            else:
                self.pages[row] += rng.randrange(2)
        rows = rng.sample(sorted(self.pages), len(self.pages)) + [-1] * rng.randrange(3)
        rows = rows or [-1]
        return rows, [self.pages.get(row, 0) for row in rows]


@runs
@pytest.mark.parametrize("seed", range(20 if LARGE else 4))
def test_snapkv(seed):
    rng = random.Random(seed)
    heads, layers, state_rows = rng.randrange(1, 3), rng.randrange(1, 3), 6
    state = [torch.zeros(state_rows, dtype=torch.int32) for _ in range(2)]
    snap = torch.zeros(layers, heads, state_rows, 5, dtype=torch.int32)
    guarded = torch.full((2, state_rows + 2), 55, dtype=torch.int32, device=DEVICE)
    here, here_snap = guarded[:, 1:-1].zero_(), torch.zeros_like(snap, device=DEVICE)
    requests, choices, kept = Requests(seed, state_rows), 0, 0
    for number in range(60 if LARGE else 12):
        rows, pages = requests.step()
        step = Step(100 * seed + number, pages, heads, layers, num_slots=500)
        scores, idx_mapping = step.random_scores(number, rng.choice(["random", "ties"])), ints(rows)
        count, dense_from, fresh = twin.plan_snapkv(step.num_scored, idx_mapping, *state, **LIMITS)
        expected = step.page_list()
        metadata = count, dense_from, fresh, idx_mapping
        twin.select_snapkv(scores, step.begin, step.num_rows, *metadata, snap, step.block_table, expected)

        scored, got = longer(step.num_scored), [longer(torch.zeros_like(count)) for _ in range(3)]
        mapping, lists = longer(idx_mapping), step.page_list().to(DEVICE)
        plan_snapkv(scored[: len(rows)], mapping, *here, *got, **LIMITS)
        for x, y in zip(got, (count, dense_from, fresh), strict=True):
            assert x.tolist() == y.tolist() + [0] * 3
        assert not scored[: len(rows)].any()
        numbers, table = (longer(step.begin), longer(step.num_rows, 0)), step.block_table.to(DEVICE)
        select_snapkv(scores.to(DEVICE), *numbers, *got, mapping, here_snap, table, lists, max_pages=step.max_pages)
        assert torch.equal(lists.cpu(), expected)
        for x, y in zip((*here, here_snap), (*state, snap), strict=True):
            assert torch.equal(x.cpu(), y)
        choices, kept = choices + int(fresh.sum()), kept + int((count > 0).sum() - fresh.sum())
    assert choices and kept and (guarded[:, [0, -1]] == 55).all()


# --- Arguments --------------------------------------------------------------------------------------------------------


def arguments():
    """Of each function, by name, that fit."""
    step = Step(6, [9, 0, 12], num_slots=32)
    count, dense_from = step.random_counts(0)
    r, n = ints([0] * 3), ints([0] * 4)
    selection = {
        "scores": step.random_scores(0, "random"),
        "begin": step.begin,
        "num_rows": step.num_rows,
        "count": count,
        "dense_from": dense_from,
        "block_table": step.block_table,
        "page_list": step.page_list(),
        "max_pages": 32,
    }
    plan = {"num_scored": step.num_scored, "count": r.clone(), "dense_from": r.clone(), **LIMITS}
    return {
        reduce_scores: {
            "raw": step.raw[0],
            "flags": step.flags[0],
            "lse": step.lse[0],
            "query_start_loc": step.query_start_loc,
            "begin": step.begin,
            "num_scored": step.num_scored,
            "scores_of_layer": torch.zeros(2, 32, 5, dtype=BF16),
            "max_pages": 32,
        },
        plan_selection: plan,
        select_pages: selection,
        plan_snapkv: plan | {"idx_mapping": r, "snap_pages": n, "snap_count": n, "fresh": r.clone()},
        select_snapkv: selection | {"fresh": r, "idx_mapping": r, "snap": torch.zeros(1, 2, 4, 1, dtype=torch.int32)},
    }


@pytest.mark.parametrize(
    ("function", "change", "message"),
    [
        (reduce_scores, {"raw": torch.zeros(32, 2, 2, 24, 1)}, "raw must be contiguous fp32"),
        (reduce_scores, {"raw": torch.zeros(32, 2, 2, 24, 2).half()}, "raw must be contiguous fp32"),
        (reduce_scores, {"raw": torch.zeros(32, 2, 2, 23, 2)}, "raw must be contiguous fp32"),
        (reduce_scores, {"raw": torch.zeros(31, 2, 2, 24, 2)}, "flags must be contiguous uint8"),
        (
            reduce_scores,
            {"raw": torch.zeros(31, 2, 2, 24, 2), "flags": torch.zeros(31, 2, 3, dtype=torch.uint8)},
            "of 2 heads and 31 contiguous slots",
        ),
        (
            reduce_scores,
            {"raw": torch.zeros(32, 2, 2, 16, 2), "flags": torch.zeros(32, 2, 2, dtype=torch.uint8)},
            "16 rows of a KV head; 5 query tokens of 4 heads",
        ),
        (reduce_scores, {"lse": torch.zeros(20, 7)}, "a multiple of 2 heads"),
        (reduce_scores, {"query_start_loc": ints([0])}, "for 0 requests"),
        (reduce_scores, {"begin": ints([0, 1])}, "begin has 2 entries, for 3 requests"),
        (reduce_scores, {"num_scored": torch.zeros(3)}, "num_scored must be int32"),
        (reduce_scores, {"scores_of_layer": torch.zeros(2, 32, 10, dtype=BF16)[..., ::2]}, "contiguous slots"),
        (reduce_scores, {"max_pages": 0}, "max_pages must be 1 to 16384, got 0"),
        (plan_selection, {"count": ints([0] * 2)}, "count has 2 entries, for 3 requests"),
        (plan_selection, {"dense_from": ints([0] * 4)}, "differ in length"),
        (plan_selection, {"pages": 0}, "at least one page"),
        (plan_selection, {"fraction": 1.5}, "a fraction of 0 to 1"),
        (plan_snapkv, {"snap_count": ints([0] * 3)}, "differ in length"),
        (plan_snapkv, {"fresh": ints([0] * 4)}, "differ in length"),
        (plan_snapkv, {"idx_mapping": ints([0] * 2)}, "idx_mapping has 2 entries"),
        (select_pages, {"scores": torch.zeros(1, 2, 32, 5).half()}, "bfloat16 or fp32"),
        (select_pages, {"scores": torch.zeros(2, 2, 32, 5)}, "of 2 layers, page_list is of 1"),
        (select_pages, {"scores": torch.zeros(1, 1, 32, 5)}, "of 2 heads and 32 contiguous slots"),
        (select_pages, {"page_list": torch.zeros(1, 2, 32)}, "page_list must be int32"),
        (select_pages, {"page_list": torch.zeros(2, 32, dtype=torch.int32)}, "page_list must be contiguous"),
        (select_pages, {"block_table": ints([[0]])}, "block_table has 1 entries, for 3 requests"),
        (select_pages, {"max_pages": 16385}, "max_pages must be 1 to 16384"),
        (select_snapkv, {"scores": None}, "need scores"),
        (select_snapkv, {"max_pages": 33}, "snap must be contiguous"),
        (select_snapkv, {"fresh": ints([0])}, "fresh has 1 entries"),
    ],
)
def test_arguments_that_do_not_fit(function, change, message):
    good = arguments()[function]
    with pytest.raises(ValueError, match=message):
        function(**good | change)


# --- Without a GPU: Triton's compiler ---------------------------------------------------------------------------------


@pytest.fixture
def compiled(monkeypatch):
    """The names of kernels that launches on Hopper compile, one for every variant: really, but nothing runs."""
    import triton
    from test_warm_up import NoGpu, NoKernel
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    names = []

    def compile_only(self, key, signature, device, constexprs, options, attrs, warmup):
        source = self.ASTSource(self, signature, constexprs, attrs)
        triton.compile(source, target=NoGpu().get_current_target(), options=options.__dict__)
        names.append(self.__name__)
        self.device_caches[0][0][key] = NoKernel()
        return self.device_caches[0][0][key]

    monkeypatch.setattr(JITFunction, "_do_compile", compile_only)
    for kernel in vars(page_selection).values():
        if isinstance(kernel, JITFunction) and kernel.__name__ in KERNELS:
            monkeypatch.setattr(kernel, "device_caches", defaultdict(kernel.create_binder))
    monkeypatch.setattr(page_selection, "check_device", lambda x: None)
    monkeypatch.setattr(page_selection, "overlap", lambda x: {"OVERLAP": True, "launch_pdl": True})
    driver.set_active(NoGpu())
    yield names
    driver.set_active(None)  # whatever there is


KERNELS = ["_reduce_scores", "_plan_selection", "_select_pages", "_plan_snapkv", "_select_snapkv"]


@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="other tests compile the kernels")
def test_kernels_compile_for_a_gpu_and_once(compiled):
    """Batches of other sizes and pieces of other tensors need no other variant, but for one with many requests."""
    layers, heads, group, queries, slots, most = 3, 2, 4, 5, 301, 100
    raw, flags = torch.zeros(slots, heads, 2, 24, 2), torch.zeros(slots, heads, 3, dtype=torch.uint8)
    scores = torch.zeros(layers, heads, slots, queries, dtype=BF16)
    lists, snap = (torch.zeros(layers, heads, n, dtype=torch.int32) for n in (slots, 64 * 4))
    snap = snap.view(layers, heads, 64, 4)
    for number, requests in enumerate([1, 40, 16, 2, 17, 33]):
        numbers = torch.zeros(200 + requests, dtype=torch.int32)[number:]
        states, table = numbers[:64], torch.zeros(requests, 101 + number, dtype=torch.int32)
        some = numbers[:requests]
        lse = torch.zeros(requests * queries, heads * group)
        for layer in range(layers):
            reduce_scores(raw, flags, lse, numbers[: requests + 1], some, some, scores[layer], max_pages=most)
        plan_selection(some, states, states, **LIMITS)
        plan_snapkv(some, some, states, states, states, states, states, **LIMITS)
        for s in (scores, None):
            select_pages(s, numbers, some, numbers, numbers, table, lists, max_pages=most)
        select_snapkv(scores, numbers, some, numbers, numbers, numbers, some, snap, table, lists, max_pages=most)
    assert sorted(compiled) == sorted([*KERNELS, "_reduce_scores", "_select_pages"])


# --- Only on a GPU ----------------------------------------------------------------------------------------------------


@on_gpu
def test_cuda_graph_replays_other_lengths():
    """Reductions of all layers, plan and selection, for other requests than those that were captured."""
    layers, heads, slots, most, requests = 3, 8, 4000, 600, 12
    shape = {"heads": heads, "layers": layers, "queries": 5, "group": 4, "num_slots": slots, "more_rows": 4}

    def batch(seed):
        rng = random.Random(seed)
        step = Step(seed, [rng.choice([0, 5, rng.randrange(601), rng.randrange(100)]) for _ in range(requests)], **shape)
        lse = torch.zeros(layers, 300, heads * 4)
        lse[:, : step.lse.shape[1]] = step.lse
        table = torch.zeros(requests, most + 5, dtype=torch.int32)
        table[:, : step.block_table.shape[1]] = step.block_table
        return step, [step.raw, step.flags, lse, step.query_start_loc, step.begin, step.num_scored, step.num_rows, table]

    static = [x.to(DEVICE) for x in batch(0)[1]]
    raw, flags, lse, query_start_loc, begin, num_scored, num_rows, table = static
    scores = torch.zeros(layers, heads, slots, 5, dtype=BF16, device=DEVICE)
    count, dense_from = (torch.zeros(64, dtype=torch.int32, device=DEVICE) for _ in range(2))
    lists = torch.zeros(layers, heads, slots, dtype=torch.int32, device=DEVICE)

    def launch():
        for layer in range(layers):
            reduce_scores(
                raw[layer], flags[layer], lse[layer], query_start_loc, begin, num_scored, scores[layer], max_pages=most
            )
        plan_selection(num_scored, count, dense_from, **LIMITS)
        select_pages(scores, begin, num_rows, count, dense_from, table, lists, max_pages=most)

    launch()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    for seed in range(1, 8):
        step, tensors = batch(seed)
        for x, y in zip(static, tensors, strict=True):
            x.copy_(y)
        lists.fill_(-7)
        graph.replay()
        for layer in range(layers):
            here = scores[layer].cpu()
            torch.testing.assert_close(here, step.expected_scores(layer, here.clone()), rtol=2**-7, atol=1e-5)
        plan = twin.plan_selection(step.num_scored, **LIMITS)
        for x, y in zip((count, dense_from), plan, strict=True):
            assert x.tolist() == y.tolist() + [0] * (64 - requests)
        expected = step.page_list()
        twin.select_pages(scores.cpu(), step.begin, step.num_rows, *plan, step.block_table, expected)
        assert torch.equal(lists.cpu(), expected)
        assert not num_scored.any()
    graph.replay()  # nothing was scored since
    assert not count.any() and not dense_from.any()
