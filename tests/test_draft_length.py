"""The number of drafts is chosen well, whatever acceptance and times are: on simulated engines, whose best is known."""

import random
from collections import Counter

import numpy as np
import pytest

from vllm_quantspec.config import AUTO_NUMBERS
from vllm_quantspec.draft_length import Acceptance, DraftLength, Drafts, Plan, StepTimes

LONGEST = AUTO_NUMBERS[-1]


def expected_tokens(number: int, rates: list[float]) -> float:
    """Of a verification of so many drafts."""
    return 1 + np.cumprod(rates[:number]).sum()


class Simulation:
    """Requests whose i-th draft is accepted with ``rates(request, step)[i]``; a step takes ``seconds(number)``.

    The policy expects other times than these: a draft step of a third of a step, whatever it really takes.
    """

    def __init__(self, rates, seconds, batch: int = 1, seed: int = 0, probe_steps=(1,), noise: float = 0.03):
        self.rates, self.seconds, self.noise = rates, seconds, noise
        self.requests = [f"request-{i}" for i in range(batch)]
        self.policy = DraftLength(lambda batch, context: [1 + n / 3 for n in AUTO_NUMBERS], AUTO_NUMBERS, *probe_steps)
        self.rng = random.Random(seed)
        self.tokens, self.time, self.chosen, self.step = 0.0, 0.0, [], 0

    def run(self, steps: int, with_prompts: bool = False) -> float:
        """Tokens per second and request of so many steps: those expected of the numbers chosen, whatever luck they had."""
        tokens, elapsed = self.tokens, self.time
        for _ in range(steps):
            number = self.policy.choose(self.requests, 1000.0, with_prompts).drafts.number
            accepted = []
            for index in range(len(self.requests)):
                rates, count = self.rates(index, self.step), 0
                while count < number and self.rng.random() < rates[count]:
                    count += 1
                accepted.append(count)
                self.tokens += expected_tokens(number, rates)
            self.time += self.seconds(number)
            if number:
                self.policy.observe_acceptance(self.requests, [number] * len(self.requests), accepted)
            if not with_prompts:
                measured = self.seconds(number) * (1 + self.noise * self.rng.gauss(0, 1))
                self.policy.observe_time(len(self.requests), 1000.0, Drafts(number), measured)
            self.chosen.append(number)
            self.step += 1
        return (self.tokens - tokens) / (self.time - elapsed) / len(self.requests)


@pytest.mark.parametrize("probe_steps", [(1,), (1, 5)])  # the latter as an async scheduler has it
@pytest.mark.parametrize("batch", [1, 6])
@pytest.mark.parametrize("share", [0.1, 0.35, 0.6, 0.95])
@pytest.mark.parametrize("rate", [0.97, 0.85, 0.6, 0.3])
def test_within_two_percent_of_the_best_number(rate, share, batch, probe_steps):
    """A draft step takes ``share`` of a step without drafts, and each row of a verification one percent more."""

    def seconds(number):
        return 0.02 * (1 + number * (share + 0.01))

    rates = [rate] * LONGEST
    best = max(expected_tokens(number, rates) / seconds(number) for number in AUTO_NUMBERS)
    simulation = Simulation(lambda *_: rates, seconds, batch, probe_steps=probe_steps)
    assert simulation.run(300) > 0.93 * best  # while it learns that the times are others
    assert simulation.run(900) > 0.98 * best


def test_without_gain_nothing_is_drafted():
    simulation = Simulation(lambda *_: [0.2] * LONGEST, lambda number: 0.01 * (1 + 0.9 * number), batch=4)
    simulation.run(100)
    simulation.chosen.clear()
    simulation.run(1000)
    assert Counter(simulation.chosen)[0] > 950
    assert set(simulation.chosen) == {0, 1}  # what it costs to look whether that is still so


def test_a_step_without_drafts_is_timed_even_where_drafts_win_most():
    """Five in a row, as an async scheduler needs them, lose more than four steps' time here."""
    simulation = Simulation(lambda *_: [0.99] * LONGEST, lambda number: 0.02 * (1 + 0.005 * number), probe_steps=(1, 5))
    policy = simulation.policy
    policy.times.predict = lambda batch, context: [simulation.seconds(number) for number in AUTO_NUMBERS]
    for _ in range(200):
        policy.observe_acceptance(simulation.requests, [LONGEST], [LONGEST])
    simulation.run(800)
    assert policy.times.known(1, 0)
    assert Counter(simulation.chosen[-300:])[8] > 280


def test_verification_that_leaps_is_seen():
    """Times that the model does not expect: from 4 drafts on the cache is read twice."""

    def seconds(number):
        return 0.01 * (1 + 0.15 * number + (number > 3))

    simulation = Simulation(lambda *_: [0.95] * LONGEST, seconds)
    simulation.run(300)
    simulation.chosen.clear()
    simulation.run(500)
    assert Counter(simulation.chosen).most_common(1)[0][0] == 3


@pytest.mark.parametrize("probe_steps", [(1,), (2,), (1, 5)])
def test_a_request_that_turns_predictable_is_noticed(probe_steps):
    rates = {False: [0.1] * LONGEST, True: [0.97] * LONGEST}
    simulation = Simulation(
        lambda index, step: rates[step >= 2000], lambda number: 0.01 * (1 + 0.4 * number), probe_steps=probe_steps
    )
    simulation.run(2000)
    assert Counter(simulation.chosen[-500:])[0] > 450
    simulation.run(600)
    simulation.chosen.clear()
    simulation.run(200)
    assert Counter(simulation.chosen)[6] + Counter(simulation.chosen)[8] + Counter(simulation.chosen)[4] > 150


def test_requests_have_rates_of_their_own():
    """One of four is predictable: left alone, it gets more drafts than the others do."""
    simulation = Simulation(
        lambda index, _: [0.97 if index == 0 else 0.3] * LONGEST, lambda number: 0.01 * (1 + 0.25 * number), batch=4
    )
    simulation.run(400)
    acceptance = simulation.policy.acceptance
    assert acceptance.rates(["request-0"])[0, 0] > 0.85 and acceptance.rates(["request-1"])[0, 0] < 0.5
    for name, right in (("request-0", {4, 6, 8}), ("request-1", {0, 1})):
        chosen = Counter(simulation.policy.choose([name], 1000.0).drafts.number for _ in range(100))
        assert sum(chosen[number] for number in right) > 80, (name, chosen)  # else a trial


def test_nothing_is_drafted_where_prompts_never_end():
    """Steps without prompts set the price of a token; where there are none, tokens that ride along are cheap."""
    simulation = Simulation(lambda *_: [0.9] * LONGEST, lambda number: 0.01 * (1 + 0.3 * number), batch=4)
    simulation.run(300)
    alone = simulation.chosen[-1]
    assert alone > 2
    simulation.run(20, with_prompts=True)
    assert simulation.chosen[-1] >= 2  # now and then a prompt changes little
    simulation.run(600, with_prompts=True)
    assert simulation.chosen[-100:] == [0] * 100
    simulation.run(300)
    assert Counter(simulation.chosen[-100:]).most_common(1)[0][0] > 2


def test_near_ties_do_not_make_it_change_every_step():
    simulation = Simulation(lambda *_: [0.9] * LONGEST, lambda number: 0.01 * (1 + 0.3 * number), batch=4)
    simulation.run(500)
    changes = [a != b for a, b in zip(simulation.chosen[-500:], simulation.chosen[-499:], strict=False)]
    assert sum(changes) < 120


def test_acceptance_is_that_of_the_tokens_that_were_tried():
    acceptance = Acceptance(4)
    for _ in range(400):
        acceptance.observe(["a", "b"], [4, 2], [1, 2])
    a, b = acceptance.rates(["a", "b"])
    assert a[0] > 0.97 and a[1] < 0.1  # the second is always rejected, the others never looked at
    assert b[0] > 0.97 and b[1] > 0.9
    tokens = acceptance.expected_tokens(["a", "b"])
    assert (tokens[:, 0] == 1).all() and 3.9 < tokens[:, 1].sum() < 4 and (np.diff(tokens) > 0).all()
    assert np.allclose(tokens[1:], acceptance.expected_tokens(["b"]))


def test_a_request_that_is_over_leaves_nothing_but_the_mean():
    acceptance = Acceptance(3)
    for index in range(100):
        acceptance.observe([f"r{index}"], [3], [3 if index % 2 else 0])
        if index:
            acceptance.forget(f"r{index - 1}")
    assert len(acceptance._rows) == 1 and len(acceptance._trials) == 8
    new = acceptance.rates(["unknown"])
    assert np.allclose(new, acceptance.mean_rates()[None]) and 0.4 < new[0, 0] < 0.6
    acceptance.forget("unknown")
    for index in range(40):  # more at a time than there is room for at first
        acceptance.observe([f"s{index}"], [3], [3 * (index % 2)])
    assert acceptance.rates(["s1"])[0, 0] > acceptance.rates(["s0"])[0, 0]


def test_times_correct_the_model_where_they_are_known():
    times = StepTimes(lambda batch, context: [batch + context / 1000, 2 * batch + context / 1000], 2)
    assert np.allclose(times.estimate(2, 1000), [3, 5])
    times.observe(2, 1000, 0, 0.3)
    # The other choice is a tenth of the model's time as well, and so are other batches and contexts.
    assert np.allclose(times.estimate(2, 1000), [0.3, 0.5]) and np.allclose(times.estimate(4, 2000), [0.6, 1.0])
    for _ in range(3):
        times.observe(2, 1000, 1, 1.0)
    assert times.known(2, 1) and not times.known(2, 0) and not times.known(64, 1)
    assert np.isclose(times.estimate(2, 1000)[1], 1.0)
    for _ in range(3):
        times.observe(2, 1000, 1, 1000.0)  # something else had the machine
    times.observe(2, 1000, 1, 1.0)
    assert np.isclose(times.estimate(2, 1000)[1], 1.0)
    times.observe(2, 1000, 1, 0.0)  # a clock that stood still


def test_numbers_that_are_not_chosen_from_are_passed_over():
    policy = DraftLength(lambda batch, context: [1.0, 1.3], (0, 2))
    policy.observe_time(1, 100.0, Drafts(1), 50.0)
    assert policy.choose(["a"], 100.0) == Plan(Drafts(2))
    assert policy.choose([], 0.0) == Plan(Drafts(0))
    with pytest.raises(ValueError, match="must ascend from 0"):
        DraftLength(lambda batch, context: [1.0, 1.3], (1, 2))


def test_steps_that_wait_now_and_then_cost_what_they_cost_on_average():
    """Drafts would pay, but for one step with drafts in five that waits for a busy host."""
    times = StepTimes(lambda batch, context: [1.0, 1.7], 2)
    for index in range(15):
        times.observe(1, 1000.0, 0, 1.0)
        times.observe(1, 1000.0, 1, 4.2 if index % 5 == 0 else 1.7)
    assert np.allclose(times.estimate(1, 1000.0), [1.0, 2.2])
