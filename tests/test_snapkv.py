"""Pages that are chosen once after the prompt: the twin against sentences about it, the Triton kernels against the twin."""

import random

import pytest
import torch
from interpreter import DEVICE, INTERPRETED, RUNS, run_in_the_interpreter, runs
from selection_tools import BF16, LARGE, LIMITS, Step, compile_only, ints, longer, plan_arguments, selection_arguments

from vllm_quantspec.kernels import cpu_page_selection as twin
from vllm_quantspec.kernels import page_selection, snapkv
from vllm_quantspec.kernels.snapkv import plan_snapkv, select_snapkv

pytest.importorskip("triton")


@pytest.mark.skipif(RUNS, reason="the tests run in this process")
def test_in_the_interpreter():
    run_in_the_interpreter(__file__)


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
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])  # the CPU engine's rows, and the GPU runner's
@pytest.mark.parametrize("seed", range(20 if LARGE else 4))
def test_snapkv(seed, dtype):
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
        scores, idx_mapping = step.random_scores(number, rng.choice(["random", "ties"])), ints(rows).to(dtype)
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
        for x, y in zip(here, state, strict=True):
            assert torch.equal(x.cpu(), y)
        # Of pages that no choice covers anything may be left: kernels write as many words as the longest request needs.
        page = torch.arange(32 * snap.shape[-1])
        covered = page < state[0][:, None]
        bits, expected_bits = ((x[..., page // 32] >> page % 32 & 1) * covered for x in (here_snap.cpu(), snap))
        assert torch.equal(bits, expected_bits)
        choices, kept = choices + int(fresh.sum()), kept + int((count > 0).sum() - fresh.sum())
    assert choices and kept and (guarded[:, [0, -1]] == 55).all()


# --- Arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "change", "message"),
    [
        (plan_snapkv, {"snap_count": ints([0] * 3)}, "differ in length"),
        (plan_snapkv, {"fresh": ints([0] * 4)}, "differ in length"),
        (plan_snapkv, {"idx_mapping": ints([0] * 2)}, "idx_mapping has 2 entries"),
        (plan_snapkv, {"idx_mapping": torch.zeros(3)}, "idx_mapping must be contiguous int32 or int64"),
        (select_snapkv, {"idx_mapping": torch.zeros(6, dtype=torch.int64)[::2]}, "idx_mapping must be contiguous"),
        (select_snapkv, {"idx_mapping": ints([0])}, "idx_mapping has 1 entries, for 3 requests"),
        (select_snapkv, {"scores": None}, "need scores"),
        (select_snapkv, {"max_pages": 33}, "snap must be contiguous"),
        (select_snapkv, {"fresh": ints([0])}, "fresh has 1 entries"),
    ],
)
def test_arguments_that_do_not_fit(function, change, message):
    step, r, n = Step(6, [9, 0, 12], num_slots=32), ints([0] * 3), ints([0] * 4)
    good = {
        plan_snapkv: plan_arguments(step) | {"idx_mapping": r, "snap_pages": n, "snap_count": n, "fresh": r.clone()},
        select_snapkv: selection_arguments(step)
        | {"fresh": r, "idx_mapping": r, "snap": torch.zeros(1, 2, 4, 1, dtype=torch.int32)},
    }
    with pytest.raises(ValueError, match=message):
        function(**good[function] | change)


# --- Without a GPU: Triton's compiler ---------------------------------------------------------------------------------

KERNELS = ["_plan_snapkv", "_select_snapkv"]


@pytest.fixture
def compiled(monkeypatch):
    with compile_only(monkeypatch, [snapkv, page_selection], KERNELS) as names:  # page_selection: options of a launch
        yield names


@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="other tests compile the kernels")
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_kernels_compile_for_a_gpu_and_once(compiled, dtype):
    """Batches of other sizes and pieces of other tensors need no other variant."""
    layers, heads, queries, slots, most = 3, 2, 5, 301, 100
    scores = torch.zeros(layers, heads, slots, queries, dtype=BF16)
    lists, snap = (torch.zeros(layers, heads, n, dtype=torch.int32) for n in (slots, 64 * 4))
    snap = snap.view(layers, heads, 64, 4)
    for number, requests in enumerate([1, 40, 16, 2, 17, 33]):
        numbers = torch.zeros(200 + requests, dtype=torch.int32)[number:]
        states, table = numbers[:64], torch.zeros(requests, 101 + number, dtype=torch.int32)
        some, rows = numbers[:requests], numbers.to(dtype)[number : number + requests]
        plan_snapkv(some, rows, states, states, states, states, states, **LIMITS)
        select_snapkv(scores, numbers, some, numbers, numbers, numbers, rows, snap, table, lists, max_pages=most)
    assert sorted(compiled) == KERNELS
