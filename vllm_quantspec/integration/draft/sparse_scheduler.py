"""vLLM's scheduler, with whole caches for requests whose sparse drafts do not pay (``draft_context: auto``).

`SparseChoice` decides by how many drafts were accepted, which the scheduler hears anyway: with async scheduling, of a step
before. The workers hear of it by the step's output (`sparse.let_read_all`), all ranks alike, so nothing waits for a device.
They decide by length and batch themselves; here that is worked out again, from the model's sizes, so that acceptance is
counted for the kind of drafts that it is of. The number of drafts may be chosen too: by the class before this one, first.
"""

from __future__ import annotations

import time
from dataclasses import replace

from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.outputs import ModelRunnerOutput

from vllm_quantspec import estimate
from vllm_quantspec.config import draft_budget
from vllm_quantspec.integration.draft.scheduler import LOG_INTERVAL, DraftLengthScheduler, outcomes_of
from vllm_quantspec.integration.draft.sparse import let_read_all
from vllm_quantspec.integration.startup.cache_dtype import page_bits
from vllm_quantspec.sparse_choice import SparseChoice

logger = init_logger("vllm.quantspec.sparse")


def make_choice(config: VllmConfig) -> SparseChoice | None:
    """For an engine of these options; None where the cost model does not know the model's sizes, and says so."""
    speculative = config.speculative_config
    try:
        model = estimate.model_from(config.model_config.hf_config.to_dict(), config.model_config.model)
    except ValueError as error:
        logger.info("Sparse drafts are chosen by length and batch alone, whatever is accepted of them: %s", error)
        return None
    group, tp = speculative.group_size, config.parallel_config.tensor_parallel_size
    cycle = estimate.cycle_bytes(model, tp, group, page_bits(config), speculative.draft_experts, speculative.wide_share)
    if speculative.draft_weights == "target":
        cycle = replace(cycle, draft_weight_bytes=cycle.target_weight_bytes)
    if speculative.draft_kv == "int8":
        cycle = replace(cycle, draft_kv_bytes=cycle.target_kv_bytes)
    return SparseChoice(cycle, draft_budget("auto", group), group, speculative.num_speculative_tokens)


class SparseScheduler(Scheduler):
    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.sparse_choice = make_choice(self.vllm_config)
        self._scores_prompts = self.vllm_config.speculative_config.draft_selection == "window"
        self._sparse: set[str] = set()  # requests whose drafts were sparse when they were drafted last
        self._verified: dict[int, set[str]] = {}  # those of a step on its way that verifies such drafts
        self._drafted = self._kept_whole = 0  # requests' cycles since the last line in the log
        self._said_at = time.monotonic()

    def has_ngrams(self, scheduler_output: SchedulerOutput, request_id: str) -> bool:
        """As of `DraftLengthScheduler`: without it nobody but the model drafts."""
        return isinstance(self, DraftLengthScheduler) and DraftLengthScheduler.has_ngrams(self, scheduler_output, request_id)

    def _update_after_schedule(self, scheduler_output: SchedulerOutput) -> None:
        super()._update_after_schedule(scheduler_output)
        if self.sparse_choice is None:
            return
        for request_id in scheduler_output.finished_req_ids:
            self.sparse_choice.forget(request_id)
            self._sparse.discard(request_id)
        if scheduler_output.num_scheduled_tokens:
            self._choose_kinds(scheduler_output)

    def _choose_kinds(self, scheduler_output: SchedulerOutput) -> None:
        drafts = scheduler_output.scheduled_spec_decode_tokens
        self._verified[id(scheduler_output)] = self._sparse & drafts.keys()
        names: list[str] = []
        tokens, scored = [], []
        for request_id, num_tokens in scheduler_output.num_scheduled_tokens.items():
            request = self.requests[request_id]
            if not request.is_prefill_chunk:
                names.append(request_id)
                tokens.append(request.num_computed_tokens)
                scored.append(self._scores_prompts or num_tokens == 1 + len(drafts.get(request_id, ())))
        number = scheduler_output.num_spec_tokens_to_schedule
        reading_all, sparse = self.sparse_choice.choose(names, tokens, scored, number) if names else (set(), set())
        let_read_all(scheduler_output, reading_all)
        self._sparse -= scheduler_output.num_scheduled_tokens.keys()
        self._sparse |= sparse
        self._drafted += len(reading_all) + len(sparse)
        self._kept_whole += len(reading_all)
        now = time.monotonic()
        if now - self._said_at >= LOG_INTERVAL:
            self._say(now)

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        sparse = self._verified.pop(id(scheduler_output), None)
        if sparse is not None:
            outcomes = [
                outcome
                for outcome in outcomes_of(self, scheduler_output, model_runner_output)
                if not self.has_ngrams(scheduler_output, outcome[0])
            ]
            if outcomes:
                names, drafted, accepted = map(list, zip(*outcomes, strict=True))
                self.sparse_choice.observe(names, [name in sparse for name in names], drafted, accepted)
        return super().update_from_output(scheduler_output, model_runner_output)

    def _say(self, now: float) -> None:
        if self._kept_whole:
            share = 100 * self._kept_whole / self._drafted
            logger.info("Of requests long enough for sparse drafts %.0f %% read everything, as accepted drafts say", share)
        self._drafted = self._kept_whole = 0
        self._said_at = now


class AsyncSparseScheduler(AsyncScheduler, SparseScheduler):
    """With async scheduling."""


class SparseDraftLengthScheduler(SparseScheduler, DraftLengthScheduler):
    """The number of drafts is chosen too."""


class AsyncSparseDraftLengthScheduler(AsyncScheduler, SparseScheduler, DraftLengthScheduler):
    """Both, with async scheduling."""

    times_end_before_drafts = True
