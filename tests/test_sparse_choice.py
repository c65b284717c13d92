"""Whose sparse drafts are given up: simulated requests, whose drafts are accepted at rates that the policy does not know."""

import numpy as np
import pytest

from vllm_quantspec.config import draft_budget
from vllm_quantspec.sparse_choice import SPARSE, TRIAL_GAP, WHOLE, SparseChoice
from vllm_quantspec.sparse_policy import CycleBytes, chosen_pages

G, DRAFTS = 128, 5
MODEL_8B = CycleBytes(4.0e9, 15.0e9, 34_816, 67_584)
NOVELS = (0.938, 0.91)  # accepted of drafts that read everything, and of sparse ones


class Simulation:
    """Cycles of requests that stay; outcomes come a cycle late, as with async scheduling."""

    def __init__(self, tokens: list[int], rates_of, seed: int = 0, answer: int = 100) -> None:
        self.choice = SparseChoice(MODEL_8B, draft_budget("auto", G), G, DRAFTS)
        self.tokens, self.rates_of, self.answer = np.array(tokens), rates_of, answer
        self.rng = np.random.default_rng(seed)
        self.sparse: list[list[bool]] = []  # [cycle][request]
        self.brought = self.read = 0.0

    def run(self, cycles: int) -> None:
        waiting, size = [], len(self.tokens)
        for cycle in range(cycles):
            names = [f"{i}, {(cycle + 7 * i) // self.answer}" for i in range(size)]
            new = [(cycle + 7 * i) % self.answer == 0 for i in range(size)]
            for i in np.flatnonzero(new):
                self.choice.forget(f"{i}, {(cycle + 7 * i) // self.answer - 1}")
            whole, sparse = self.choice.choose(names, self.tokens, [not x for x in new], DRAFTS)
            assert not whole & sparse
            is_sparse = [name in sparse for name in names]
            self.sparse.append(is_sparse)
            accepted = []
            for i, kind in enumerate(is_sparse):
                held = self.rng.random(DRAFTS) < self.rates_of(i, cycle)[kind]
                accepted.append(int(held.cumprod().sum()))
            self.brought += sum(accepted) + size
            self.read += self.bytes(np.array(is_sparse))
            waiting.append((names, is_sparse, [DRAFTS] * size, accepted))
            if len(waiting) > 1:
                seen = [row for row in zip(*waiting.pop(0), strict=True) if row[0] in names]
                if seen:
                    self.choice.observe(*map(list, zip(*seen, strict=True)))

    def bytes(self, is_sparse: np.ndarray) -> float:
        pages = self.tokens // G - 1
        read = np.where(is_sparse, np.maximum(8, -(-pages // 16)), pages).sum() * G
        draft = MODEL_8B.draft_weight_bytes + MODEL_8B.draft_kv_bytes * read
        return DRAFTS * draft + MODEL_8B.target_weight_bytes + MODEL_8B.target_kv_bytes * pages.sum() * G

    def always(self, kind: int) -> float:
        """Tokens per byte if all drafts were of one kind; at the rates of cycle 0."""
        tokens = sum(sum(self.rates_of(i, 0)[kind] ** n for n in range(DRAFTS + 1)) for i in range(len(self.tokens)))
        return tokens / self.bytes(np.full(len(self.tokens), bool(kind)))

    @property
    def yields(self) -> float:
        return self.brought / self.read


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("tokens", "rates", "least_share", "most_share"),
    [
        ([131072], NOVELS, 0.9, 1),
        ([131072], (0.92, 0.6), 0, 0.2),
        ([131072], (0.6, 0.57), 0.85, 1),  # a text that is hard to draft, whatever is read
        ([32768], NOVELS, 0.6, 1),
        ([32768] * 16, NOVELS, 0.95, 1),
        ([65536] * 4, (0.9, 0.45), 0, 0.9),
    ],
)
def test_it_yields_nearly_what_the_better_kind_does(tokens, rates, least_share, most_share, seed):
    simulation = Simulation(tokens, lambda i, cycle: rates, seed)
    simulation.run(1200)
    # Noise of so few tokens is 2 % of them.
    assert simulation.yields > 0.96 * max(simulation.always(WHOLE), simulation.always(SPARSE))
    assert least_share <= np.mean(simulation.sparse) <= most_share


def test_one_request_of_two_is_given_up():
    """Where what its sparse drafts save is not worth the tokens that they lose, of both requests together."""
    simulation = Simulation([32768, 32768], lambda i, cycle: NOVELS if i == 0 else (0.93, 0.2), answer=10**6)
    simulation.run(600)
    good, bad = np.mean(simulation.sparse[100:], axis=0)
    assert good > 0.9 and bad < 0.1


def test_a_request_comes_back_when_its_sparse_drafts_are_accepted_again():
    rates = {0: NOVELS, 1: (0.93, 0.3), 2: NOVELS}
    simulation = Simulation([131072], lambda i, cycle: rates[cycle // 700], answer=10**6)
    simulation.run(2100)
    shares = [np.mean(simulation.sparse[begin : begin + 400]) for begin in (100, 1000, 1700)]
    assert shares[0] > 0.9 and shares[1] < 0.2 and shares[2] > 0.8, shares


def test_no_cycle_is_spent_where_sparse_drafts_save_much():
    simulation = Simulation([131072] * 4, lambda i, cycle: NOVELS)
    simulation.run(500)
    assert simulation.choice.num_trials == 0


def test_trials_of_a_request_are_apart_and_cost_little():
    simulation = Simulation([32768], lambda i, cycle: (0.93, 0.3), answer=10**6)
    simulation.run(1500)
    sparse = np.flatnonzero([row[0] for row in simulation.sparse[200:]])
    assert len(sparse) > 1 and np.diff(sparse).min() > TRIAL_GAP
    assert simulation.yields > 0.98 * simulation.always(WHOLE)


def test_short_requests_and_steps_without_drafts_are_left_alone():
    choice = SparseChoice(MODEL_8B, draft_budget("auto", G), G, DRAFTS)
    assert choice.choose(["a", "b"], [1000, 4000], [True, True], DRAFTS) == (set(), set())
    assert choice.choose(["a", "b"], [131072] * 2, [True, True], 0) == (set(), set())
    assert choice.choose(["a", "b"], [131072] * 2, [False, True], DRAFTS) == (set(), {"b"})
    assert choice.choose(["c"], [2**20], [False], DRAFTS) == (set(), set())


def test_rates_of_requests_are_drawn_to_the_mean_and_to_their_other_kind():
    choice = SparseChoice(MODEL_8B, draft_budget("auto", G), G, DRAFTS)
    for _ in range(40):
        choice.observe(["good", "bad", "other"], [True, True, False], [DRAFTS] * 3, [DRAFTS, 1, 4])
    rates, deviations = choice.rates(["good", "bad", "other", "new"])
    assert rates[0, SPARSE] > 0.95 and rates[1, SPARSE] < 0.65
    assert rates[1, WHOLE] < rates[3, WHOLE] < rates[0, WHOLE]  # a text that is hard is so with both kinds, until it is seen
    assert rates[1, SPARSE] < rates[3, SPARSE] < rates[0, SPARSE]
    assert deviations[1, SPARSE] < deviations[1, WHOLE] and (deviations > 0).all()
    choice.forget("bad")
    again, _ = choice.rates(["bad", "new"])
    assert (again[0] == again[1]).all()


def test_rows_of_requests_that_are_over_are_used_again():
    choice, names = SparseChoice(MODEL_8B, draft_budget("auto", G), G, DRAFTS), []
    for i in range(200):
        names.append(f"r{i}")
        choice.observe(names[-20:], [i % 2 == 0] * len(names[-20:]), [DRAFTS] * len(names[-20:]), [2] * len(names[-20:]))
        if len(names) >= 20:
            choice.forget(names[-20])
    assert len(choice._rows) <= 20 and len(choice._drafts) <= 64
    choice.forget("never seen")


def test_chosen_pages():
    limits = {"pages": 8, "fraction": 1 / 16, "min_pages": 32, "min_scored_pages": 32, "min_total_pages": 100}
    pages = np.array([31, 32, 40, 1000])
    assert chosen_pages(pages, **limits).tolist() == [0, 8, 8, 63]
    assert chosen_pages(pages[:3], **limits).tolist() == [0, 0, 0]  # too few together, as the first does not count
    assert chosen_pages(pages, **limits | {"fraction": 1.0}).tolist() == [0, 0, 0, 0]
    assert chosen_pages(np.array([0, 0]), **limits | {"min_total_pages": 0}).tolist() == [0, 0]
