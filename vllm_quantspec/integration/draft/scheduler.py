"""vLLM's scheduler, with the number of drafts of each step chosen by `DraftLength` (``num_speculative_tokens: auto``).

The number travels to the workers in ``SchedulerOutput.num_spec_tokens_to_schedule``, as with vLLM's own schedules, so the
ranks of tensor parallelism agree. It says how many tokens the step drafts after it has sampled; the next step verifies them.
Acceptance and times come from outputs that the scheduler gets anyway: nothing waits for the device. With async scheduling
they are those of a step before.

With ``ngram: auto`` the whole plan travels beside the number, in an attribute of ``SchedulerOutput`` (`plan_of`): which
requests draft by n-grams, and whether the model drafts at all.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.outputs import ModelRunnerOutput

from vllm_quantspec import estimate
from vllm_quantspec.config import AUTO_NUMBERS, NGRAM_NUMBERS
from vllm_quantspec.draft_length import TIMES_NEEDED, DraftLength, Drafts, Plan
from vllm_quantspec.integration.draft.ngram_count import NgramCount
from vllm_quantspec.integration.draft.ngram_plan import set_plan
from vllm_quantspec.integration.draft.read_share import labels_of
from vllm_quantspec.integration.startup.cache_dtype import page_bits

logger = init_logger("vllm.quantspec.draft_length")

# Seconds between two lines in the log, as vLLM's own.
LOG_INTERVAL = 10.0
# Bytes per second of the GPU that the cost model is asked about; a step's times are measured, this is their first shape.
BANDWIDTH = 4.26e12
# Where the cost model does not know the model: a draft step takes this share of a step, and this a further row.
DRAFT_SHARE, ROW_SHARE = 0.4, 0.02
# With async scheduling, steps in a row that are tried without the model's drafts. The last two are beside steps with
# drafts, see `DraftLengthScheduler._is_even`; the others' times are enough to make theirs known at once.
IDLE_PROBE_STEPS = TIMES_NEEDED + 2


def step_seconds(config: VllmConfig):
    """What the cost model expects of steps: ``predict`` as of `StepTimes`, for `AUTO_NUMBERS`.

    And then, where n-grams may be drafted, for `NGRAM_NUMBERS`: verifications, without drafts of the model.
    """
    ngram_numbers = NGRAM_NUMBERS if config.speculative_config.ngram == "auto" else ()
    speculative, parallel = config.speculative_config, config.parallel_config
    try:
        model = estimate.model_from(config.model_config.hf_config.to_dict(), config.model_config.model)
    except ValueError as error:
        logger.info("The number of drafts is chosen by measured times alone, without the cost model: %s", error)
        model = None

    @lru_cache(maxsize=4096)
    def of_rounded(batch: int, context: int) -> tuple[float, ...]:
        if model is None:
            drafting = tuple(1 + number * (DRAFT_SHARE + ROW_SHARE) for number in AUTO_NUMBERS)
            return drafting + tuple(1 + number * ROW_SHARE for number in ngram_numbers)
        speeds = [
            estimate.speed(
                model,
                BANDWIDTH,
                context,
                batch,
                parallel.tensor_parallel_size,
                speculative.group_size,
                1.0,
                number,
                quantize_lm_head=speculative.quantize_lm_head,
                page_bits=page_bits(config),
                draft_context=speculative.draft_context,
                draft_experts=speculative.draft_experts,
                wide_share=speculative.wide_share,
                join_layers=speculative.join_layers,
            )
            for number in AUTO_NUMBERS + ngram_numbers
        ]
        drafting = tuple(speed.cycle / 1e3 for speed in speeds[: len(AUTO_NUMBERS)])
        verifying = zip(speeds[len(AUTO_NUMBERS) :], ngram_numbers, strict=True)
        return drafting + tuple((speed.cycle - number * speed.draft_step) / 1e3 for speed, number in verifying)

    def predict(batch: int, context: float) -> tuple[float, ...]:
        # To a sixteenth, so that few are ever computed; ratios of a few numbers of drafts move far less.
        step = 1 << max(0, int(context).bit_length() - 4)
        return of_rounded(batch, max(1, round(context / step) * step))

    return predict


def outcomes_of(
    scheduler: Scheduler, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
) -> list[tuple[str, int, int]]:
    """What became of a step's drafts: (request, how many it had, how many were accepted) of those that had any."""
    sampled, invalid = model_runner_output.sampled_token_ids, scheduler_output.num_invalid_spec_tokens or {}
    outcomes = []
    for request_id, drafts in scheduler_output.scheduled_spec_decode_tokens.items():
        tokens = sampled[model_runner_output.req_id_to_index[request_id]] if sampled else ()
        num_drafts = len(drafts) - invalid.get(request_id, 0)
        if tokens and num_drafts and request_id in scheduler.requests:
            outcomes.append((request_id, num_drafts, min(len(tokens) - 1, num_drafts)))
    return outcomes


@dataclass(frozen=True)
class _Step:
    """A step on its way: when it was scheduled, and what it does."""

    scheduled_at: float
    batch: int  # requests that sample
    context: float  # tokens of each, on average
    verified: Drafts  # of a request, at most
    drafted: Plan  # after that
    has_prompt: bool
    by_ngrams: frozenset[str] | None  # requests whose verified drafts were to be n-grams; None for all

    def is_by_ngrams(self, request_id: str) -> bool:
        return self.by_ngrams is None or request_id in self.by_ngrams


class DraftLengthScheduler(Scheduler):
    """Without async scheduling a step's time is that of its verification and of the drafts after it."""

    times_end_before_drafts = False
    steps_ahead = 1  # whose tokens are not known when the drafts that follow them are decided on: the step's own

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        # Without async scheduling a verified number can be timed only if as many are drafted beside it.
        probe_steps = (1, IDLE_PROBE_STEPS, 1) if self.times_end_before_drafts else (2, 2)
        speculative, ngrams = self.vllm_config.speculative_config, {}
        self.ngrams = self._ngram_count = None
        if speculative.ngram == "auto":
            from vllm_quantspec.ngram_watch import NgramWatch  # compiles with Numba

            lengths = speculative.prompt_lookup_min, speculative.prompt_lookup_max
            self.ngrams = NgramWatch(*lengths, NGRAM_NUMBERS[-1], self.steps_ahead)
            self._ngram_count = NgramCount(labels_of(self.vllm_config))
            ngrams = {"ngrams": self.ngrams, "ngram_numbers": NGRAM_NUMBERS}
        self.draft_length = DraftLength(step_seconds(self.vllm_config), AUTO_NUMBERS, *probe_steps, **ngrams)
        self._plan = Plan(Drafts(0))  # of the step before: what this one verifies
        self._steps: dict[int, _Step] = {}
        self._last_output_at, self._last_step_had_prompt, self._last_step_had_drafts = 0.0, True, False
        self._chosen: Counter[Drafts] = Counter()
        self._logged_at = time.monotonic()

    def _update_after_schedule(self, scheduler_output: SchedulerOutput) -> None:
        # AsyncScheduler's own method calls this one first, and then makes room for as many drafts.
        super()._update_after_schedule(scheduler_output)
        for request_id in scheduler_output.finished_req_ids:
            self.draft_length.forget(request_id)
        if scheduler_output.num_scheduled_tokens:
            self._choose(scheduler_output)

    def _choose(self, scheduler_output: SchedulerOutput) -> None:
        drafts = scheduler_output.scheduled_spec_decode_tokens
        sampling: list[str] = []
        has_prompt, context, verified = False, 0, 0
        for request_id, num_tokens in scheduler_output.num_scheduled_tokens.items():
            request = self.requests[request_id]
            num_drafts = len(drafts.get(request_id, ()))
            has_prompt |= num_tokens > 1 + num_drafts
            if not request.is_prefill_chunk:
                sampling.append(request_id)
                context += request.num_computed_tokens
                verified = max(verified, num_drafts)
        context /= max(1, len(sampling))
        before, self._plan = self._plan, self.draft_length.choose(sampling, context, has_prompt)
        scheduler_output.num_spec_tokens_to_schedule = self._plan.drafts.number
        if self.ngrams is not None:
            set_plan(scheduler_output, self._plan)
        now = time.monotonic()
        # Of n-grams there may be fewer than planned; the time is still what the plan takes.
        verified = before.drafts if before.drafts.by_ngrams else Drafts(verified)
        by_ngrams = None if before.drafts.by_ngrams else before.ngram_requests
        step = _Step(now, len(sampling), context, verified, self._plan, has_prompt, by_ngrams)
        self._steps[id(scheduler_output)] = step
        if sampling:
            self._chosen[self._plan.drafts] += 1
        if now - self._logged_at >= LOG_INTERVAL:
            self._log(now)

    def has_ngrams(self, scheduler_output: SchedulerOutput, request_id: str) -> bool:
        """Whether the drafts of a request that a step on its way verifies were to be n-grams."""
        step = self._steps.get(id(scheduler_output))
        return step is not None and step.is_by_ngrams(request_id)

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        step = self._steps.pop(id(scheduler_output), None)
        if step is not None:
            self._learn_time(step)
            self._learn_acceptance(step, scheduler_output, model_runner_output)
            if self.ngrams is not None:
                self._learn_ngrams(model_runner_output)
        return super().update_from_output(scheduler_output, model_runner_output)

    def _learn_time(self, step: _Step) -> None:
        now = time.monotonic()
        # The device turned to this step when it had the one before behind it, or, if it was idle, when this one came.
        seconds = now - max(self._last_output_at, step.scheduled_at)
        if self._is_even(step) and step.batch and not (step.has_prompt or self._last_step_had_prompt):
            self.draft_length.observe_time(step.batch, step.context, step.verified, seconds)
        self._last_output_at, self._last_step_had_prompt = now, step.has_prompt
        self._last_step_had_drafts = step.verified.by_model

    def _is_even(self, step: _Step) -> bool:
        """Whether the time between the output before a step's and its own is that of its verified number alone."""
        if not self.times_end_before_drafts:
            return step.verified == step.drafted.drafts
        # The device drafted these before it verified them. Meanwhile, though, the host launched the next step and the drafts
        # after it. A step without drafts is over before that, if the host is slow: its output waits for drafts of others. So
        # the first step with drafts seems to begin late, and to take less than it does.
        if step.verified.by_model:
            return self._last_step_had_drafts
        return not (step.drafted.drafts.by_model or self._plan.drafts.by_model)

    def _learn_acceptance(
        self, step: _Step, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> None:
        of_model = []
        for outcome in outcomes_of(self, scheduler_output, model_runner_output):
            if step.is_by_ngrams(outcome[0]):
                self._ngram_count.add(*outcome[1:])
            else:
                of_model.append(outcome)
        if of_model:
            self.draft_length.observe_acceptance(*map(list, zip(*of_model, strict=True)))

    def _learn_ngrams(self, model_runner_output: ModelRunnerOutput) -> None:
        """What n-grams would have brought, of the new tokens, whoever drafted; before these are the requests' own."""
        sampled = model_runner_output.sampled_token_ids
        requests, new_tokens = [], []
        for request_id, row in model_runner_output.req_id_to_index.items() if sampled else ():
            request, tokens = self.requests.get(request_id), sampled[row]
            if request is None or not tokens or request.prompt_token_ids is None:
                continue
            # Where tokens were taken back (a preemption that discards them), the text is read anew.
            if self.ngrams.length(request_id) != request.num_tokens:
                self.ngrams.follow(request_id, request.all_token_ids)
            requests.append(request_id)
            new_tokens.append(tokens)
        if requests:
            self.ngrams.observe(requests, new_tokens)

    def _log(self, now: float) -> None:
        steps = self._chosen.total()
        if steps:
            shares = ", ".join(
                f"{drafts.number}{' of n-grams' * drafts.by_ngrams} in {100 * n / steps:.0f} %"
                for drafts, n in sorted(self._chosen.items())
            )
            rates = " ".join(f"{rate:.2f}" for rate in self.draft_length.acceptance.mean_rates())
            logger.info(
                "Number of drafts: %s of %d steps; accepted if those before were, by position: %s; %d trials so far",
                shares,
                steps,
                rates,
                self.draft_length.num_probes,
            )
        if self._ngram_count is not None:
            self._ngram_count.log(self.ngrams.mean_rates())
        self._chosen.clear()
        self._logged_at = now


class AsyncDraftLengthScheduler(AsyncScheduler, DraftLengthScheduler):
    """With async scheduling outputs come when tokens are sampled: from one to the next the device drafts, then verifies."""

    times_end_before_drafts = True
    steps_ahead = 2
