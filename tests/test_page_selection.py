"""Which pages sparse drafts read: the twin against sentences about it, the Triton kernels against the twin."""

import random

import pytest
import torch
from interpreter import DEVICE, INTERPRETED, RUNS, run_in_the_interpreter, runs
from selection_tools import (
    BF16,
    FMT,
    FP32,
    LARGE,
    LIMITS,
    NAN,
    Step,
    compile_only,
    ints,
    longer,
    plan_arguments,
    random_step,
    selection_arguments,
)

from vllm_quantspec.kernels import cpu_page_selection as twin
from vllm_quantspec.kernels import page_selection
from vllm_quantspec.kernels import reduce_scores as reduction
from vllm_quantspec.kernels.page_selection import plan_selection, select_pages
from vllm_quantspec.kernels.reduce_scores import reduce_scores

pytest.importorskip("triton")

on_gpu = pytest.mark.skipif(not LARGE, reason="needs a CUDA GPU")


@pytest.mark.skipif(RUNS, reason="the tests run in this process")
def test_in_the_interpreter():
    run_in_the_interpreter(__file__)


@pytest.fixture(autouse=True)
def large_ctas(monkeypatch):
    if INTERPRETED:  # each costs milliseconds
        monkeypatch.setattr(reduction, "REDUCE_PAGES", 128)
        monkeypatch.setattr(reduction, "REDUCE_ELEMENTS", 1 << 14)


SEEDS = range(200 if LARGE else 10)
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


# --- Arguments --------------------------------------------------------------------------------------------------------


def arguments():
    """Of each function, by name, that fit."""
    step = Step(6, [9, 0, 12], num_slots=32)
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
        plan_selection: plan_arguments(step),
        select_pages: selection_arguments(step),
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
        (select_pages, {"scores": torch.zeros(1, 2, 32, 5).half()}, "bfloat16 or fp32"),
        (select_pages, {"scores": torch.zeros(2, 2, 32, 5)}, "of 2 layers, page_list is of 1"),
        (select_pages, {"scores": torch.zeros(1, 1, 32, 5)}, "of 2 heads and 32 contiguous slots"),
        (select_pages, {"page_list": torch.zeros(1, 2, 32)}, "page_list must be int32"),
        (select_pages, {"page_list": torch.zeros(2, 32, dtype=torch.int32)}, "page_list must be contiguous"),
        (select_pages, {"block_table": ints([[0]])}, "block_table has 1 entries, for 3 requests"),
        (select_pages, {"max_pages": 16385}, "max_pages must be 1 to 16384"),
    ],
)
def test_arguments_that_do_not_fit(function, change, message):
    good = arguments()[function]
    with pytest.raises(ValueError, match=message):
        function(**good | change)


# --- Without a GPU: Triton's compiler ---------------------------------------------------------------------------------

KERNELS = ["_reduce_scores", "_plan_selection", "_select_pages"]


@pytest.fixture
def compiled(monkeypatch):
    with compile_only(monkeypatch, [reduction, page_selection], KERNELS) as names:
        yield names


@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="other tests compile the kernels")
def test_kernels_compile_for_a_gpu_and_once(compiled):
    """Batches of other sizes and pieces of other tensors need no other variant, but for one with many requests."""
    layers, heads, group, queries, slots, most = 3, 2, 4, 5, 301, 100
    raw, flags = torch.zeros(slots, heads, 2, 24, 2), torch.zeros(slots, heads, 3, dtype=torch.uint8)
    scores = torch.zeros(layers, heads, slots, queries, dtype=BF16)
    lists = torch.zeros(layers, heads, slots, dtype=torch.int32)
    for number, requests in enumerate([1, 40, 16, 2, 17, 33]):
        numbers = torch.zeros(200 + requests, dtype=torch.int32)[number:]
        states, table = numbers[:64], torch.zeros(requests, 101 + number, dtype=torch.int32)
        some = numbers[:requests]
        lse = torch.zeros(requests * queries, heads * group)
        for layer in range(layers):
            reduce_scores(raw, flags, lse, numbers[: requests + 1], some, some, scores[layer], max_pages=most)
        plan_selection(some, states, states, **LIMITS)
        for s in (scores, None):
            select_pages(s, numbers, some, numbers, numbers, table, lists, max_pages=most)
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
