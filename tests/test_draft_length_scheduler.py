"""What an async scheduler takes for the time of a step, on a simulated host and device; no engine."""

import random
from collections import Counter, deque
from types import SimpleNamespace

import pytest

from vllm_quantspec.config import AUTO_NUMBERS
from vllm_quantspec.draft_length import DraftLength
from vllm_quantspec.integration.draft import scheduler as scheduler_module
from vllm_quantspec.integration.draft.scheduler import IDLE_PROBE_STEPS, AsyncDraftLengthScheduler

# Seconds that a device needs: without drafts, for a draft and its row, and for drafting at all.
ALONE, DRAFT, ANY_DRAFTS = 0.0041, 0.0032, 0.0014


def device_seconds(number: int) -> float:
    return ALONE + DRAFT * number + ANY_DRAFTS * (number > 0)


class Pipeline:
    """An engine core's loop: it launches a step, then waits for the output of the step before and hands that in.

    A launch takes the host ``host_verify`` seconds, and ``host_draft`` more if drafts follow; each draft is accepted with
    ``rate`` if those before it were.
    """

    def __init__(self, monkeypatch, rate: float, host_verify: float, host_draft: float):
        self.rate, self.host_verify, self.host_draft = rate, host_verify, host_draft
        self.rng, self.host, self.device, self.chosen = random.Random(0), 0.0, 0.0, []
        self.on_their_way = deque()
        monkeypatch.setattr(scheduler_module.time, "monotonic", lambda: self.host)
        scheduler = self.scheduler = object.__new__(AsyncDraftLengthScheduler)
        scheduler.requests = {"a": SimpleNamespace(is_prefill_chunk=False, num_computed_tokens=8192)}
        scheduler.draft_length = DraftLength(
            lambda batch, context: [ALONE + DRAFT * number for number in AUTO_NUMBERS], AUTO_NUMBERS, 1, IDLE_PROBE_STEPS, 1
        )
        scheduler.ngrams, scheduler._plan, scheduler._steps = None, scheduler_module.Plan(scheduler_module.Drafts(0)), {}
        scheduler._last_output_at, scheduler._last_step_had_prompt = 0.0, False
        scheduler._last_step_had_drafts = False
        scheduler._chosen, scheduler._logged_at = Counter(), float("inf")

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self._launch()
            if len(self.on_their_way) == 2:
                self._hand_in()

    def _launch(self) -> None:
        verified = self.scheduler._plan.drafts.number
        drafts = {"a": [5] * verified} if verified else {}
        output = SimpleNamespace(num_scheduled_tokens={"a": 1 + verified}, scheduled_spec_decode_tokens=drafts)
        self.scheduler._choose(output)
        number = output.num_spec_tokens_to_schedule
        self.chosen.append(number)
        self.host += self.host_verify
        sampled_at = self.device = max(self.device, self.host) + ALONE
        if number:
            self.host += self.host_draft
            self.device = max(self.device, self.host) + device_seconds(number) - ALONE
        self.on_their_way.append((output, verified, sampled_at))

    def _hand_in(self) -> None:
        output, verified, sampled_at = self.on_their_way.popleft()
        self.host = max(self.host, sampled_at)
        self.scheduler._learn_time(self.scheduler._steps.pop(id(output)))
        accepted = 0
        while accepted < verified and self.rng.random() < self.rate:
            accepted += 1
        if verified:
            self.scheduler.draft_length.observe_acceptance(["a"], [verified], [accepted])


@pytest.mark.parametrize(("host_verify", "host_draft"), [(0.0005, 0.0005), (0.003, 0.004)])
def test_a_slow_host_does_not_hide_how_fast_a_step_without_drafts_is(monkeypatch, host_verify, host_draft):
    """Drafts lose here. Launching them takes a slow host longer than the device needs for a step without."""
    pipeline = Pipeline(monkeypatch, 0.8, host_verify, host_draft)
    pipeline.run(400)
    seconds = pipeline.scheduler.draft_length.times.estimate(1, 8192.0)
    assert seconds[0] == pytest.approx(ALONE, rel=0.02)
    assert Counter(pipeline.chosen[-200:])[0] > 160


def test_drafts_that_lose_do_not_look_good_because_an_output_before_them_was_late(monkeypatch):
    """They are tried out of steps without, whose last output waits until the slow host has launched the drafts."""
    pipeline = Pipeline(monkeypatch, 0.85, 0.003, 0.004)
    pipeline.run(1200)
    assert Counter(pipeline.chosen[-600:])[0] > 570  # it had been 473
    assert pipeline.scheduler.draft_length.times.estimate(1, 8192.0)[1] == pytest.approx(device_seconds(1), rel=0.02)


def test_times_of_steps_with_drafts_are_those_of_the_device(monkeypatch):
    pipeline = Pipeline(monkeypatch, 0.97, 0.003, 0.004)
    pipeline.run(600)
    times = pipeline.scheduler.draft_length.times
    known = [i for i in range(len(AUTO_NUMBERS)) if times.known(1, i)]
    assert {0, 3, 4} <= set(known)
    for i in known:
        # The second of a number, too, may follow an output that came late by a little.
        assert times.estimate(1, 8192.0)[i] == pytest.approx(device_seconds(AUTO_NUMBERS[i]), rel=0.08)
