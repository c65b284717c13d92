"""vLLM's scheduler, with the number of drafts of each step chosen by `DraftLength` (``num_speculative_tokens: auto``).

The number travels to the workers in ``SchedulerOutput.num_spec_tokens_to_schedule``, as with vLLM's own schedules, so the
ranks of tensor parallelism agree. It says how many tokens the step drafts after it has sampled; the next step verifies them.
Acceptance and times come from outputs that the scheduler gets anyway: nothing waits for the device. With async scheduling
they are those of a step before.
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
from vllm_quantspec.config import AUTO_NUMBERS
from vllm_quantspec.draft_length import DraftLength
from vllm_quantspec.integration.startup.cache_dtype import page_bits

logger = init_logger("vllm.quantspec.draft_length")

# Seconds between two lines in the log, as vLLM's own.
LOG_INTERVAL = 10.0
# Bytes per second of the GPU that the cost model is asked about; a step's times are measured, this is their first shape.
BANDWIDTH = 4.26e12
# Where the cost model does not know the model: a draft step takes this share of a step, and this a further row.
DRAFT_SHARE, ROW_SHARE = 0.4, 0.02


def step_seconds(config: VllmConfig):
    """What the cost model expects of steps: ``predict`` as of `StepTimes`, for `AUTO_NUMBERS`."""
    speculative, parallel = config.speculative_config, config.parallel_config
    try:
        model = estimate.model_from(config.model_config.hf_config.to_dict(), config.model_config.model)
    except ValueError as error:
        logger.info("The number of drafts is chosen by measured times alone, without the cost model: %s", error)
        model = None

    @lru_cache(maxsize=4096)
    def of_rounded(batch: int, context: int) -> tuple[float, ...]:
        if model is None:
            return tuple(1 + number * (DRAFT_SHARE + ROW_SHARE) for number in AUTO_NUMBERS)
        return tuple(
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
            ).cycle
            / 1e3
            for number in AUTO_NUMBERS
        )

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
    verified: int  # drafts of a request, at most
    drafted: int  # tokens of a request after that
    has_prompt: bool


class DraftLengthScheduler(Scheduler):
    """Without async scheduling a step's time is that of its verification and of the drafts after it."""

    times_end_before_drafts = False

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        # One verified number can be timed only if as many are drafted beside it.
        probe_steps = 1 if self.times_end_before_drafts else 2
        self.draft_length = DraftLength(step_seconds(self.vllm_config), AUTO_NUMBERS, probe_steps)
        self._steps: dict[int, _Step] = {}
        self._last_output_at, self._last_step_had_prompt = 0.0, True
        self._chosen: Counter[int] = Counter()
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
        number = self.draft_length.choose(sampling, context, has_prompt)
        scheduler_output.num_spec_tokens_to_schedule = number
        now = time.monotonic()
        self._steps[id(scheduler_output)] = _Step(now, len(sampling), context, verified, number, has_prompt)
        if sampling:
            self._chosen[number] += 1
        if now - self._logged_at >= LOG_INTERVAL:
            self._log(now)

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        step = self._steps.pop(id(scheduler_output), None)
        if step is not None:
            self._learn_time(step)
            self._learn_acceptance(scheduler_output, model_runner_output)
        return super().update_from_output(scheduler_output, model_runner_output)

    def _learn_time(self, step: _Step) -> None:
        now = time.monotonic()
        # The device turned to this step when it had the one before behind it, or, if it was idle, when this one came.
        seconds = now - max(self._last_output_at, step.scheduled_at)
        # What was drafted for this step was drafted in it or, with async scheduling, before it, by this measure of time.
        is_even = self.times_end_before_drafts or step.verified == step.drafted
        if is_even and step.batch and not (step.has_prompt or self._last_step_had_prompt):
            self.draft_length.observe_time(step.batch, step.context, step.verified, seconds)
        self._last_output_at, self._last_step_had_prompt = now, step.has_prompt

    def _learn_acceptance(self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput) -> None:
        outcomes = outcomes_of(self, scheduler_output, model_runner_output)
        if outcomes:
            self.draft_length.observe_acceptance(*map(list, zip(*outcomes, strict=True)))

    def _log(self, now: float) -> None:
        steps = self._chosen.total()
        if steps:
            shares = ", ".join(f"{number} in {100 * n / steps:.0f} %" for number, n in sorted(self._chosen.items()))
            rates = " ".join(f"{rate:.2f}" for rate in self.draft_length.acceptance.mean_rates())
            logger.info(
                "Number of drafts: %s of %d steps; accepted if those before were, by position: %s; %d trials so far",
                shares,
                steps,
                rates,
                self.draft_length.num_probes,
            )
        self._chosen.clear()
        self._logged_at = now


class AsyncDraftLengthScheduler(AsyncScheduler, DraftLengthScheduler):
    """With async scheduling outputs come when tokens are sampled: from one to the next the device drafts, then verifies."""

    times_end_before_drafts = True
