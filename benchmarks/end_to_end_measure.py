"""Decoding timed at one point, in an engine of this process: what end_to_end.py measures, and where a step's time goes."""

import contextlib
import copy
import statistics
import time
from collections import Counter
from collections.abc import Iterator

from end_to_end_configs import DRAFTS_AUTO, HELD

from vllm_quantspec.config import AUTO_NUMBERS
from vllm_quantspec.draft_length import Drafts, Plan
from vllm_quantspec.estimate import GIB

WARM_UP = 16
# Tokens of the sequences that the policy of ``drafts-auto`` learns on, and how many times --repeats it is timed for.
LEARN_TOKENS, CHOSEN_REPEATS = 512, 4
# Room behind a context: the first sequences of a batch decode while the prompts of the last are still being skipped.
MAX_TOKENS = 2048


class Cache:
    """The KV cache of an engine that runs in this process."""

    def __init__(self, llm):
        self.vllm_config = llm.llm_engine.vllm_config
        self.scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        self.config = self.scheduler.kv_cache_config
        # Groups of layers share the memory of the pool: one group's tensors are all of it.
        layers = set(self.config.kv_cache_groups[0].layer_names)
        self.gib = sum(t.size for t in self.config.kv_cache_tensors if layers & set(t.layers)) / GIB

    def sequences(self, length: int) -> float:
        """How many of `length` tokens fit, by vLLM's own count."""
        from vllm.v1.core.kv_cache_utils import get_max_concurrency_for_kv_cache_config

        config = copy.copy(self.vllm_config)
        config.model_config = copy.copy(config.model_config)
        config.model_config.max_model_len = length
        return get_max_concurrency_for_kv_cache_config(config, self.config)

    def used_gib(self) -> float:
        free = self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
        return self.gib * (1 - free / self.config.num_blocks)


@contextlib.contextmanager
def draft_numbers(scheduler, held: int | None) -> Iterator[list[int]]:
    """With the number of drafts held, and nothing learned, or, with None, chosen.

    Yields the numbers of all steps with requests, as they come.
    """
    policy, numbers = scheduler.draft_length, []
    choose = policy.choose

    def choose_or_hold(requests, context, with_prompts=False):
        plan = choose(requests, context, with_prompts) if held is None else Plan(Drafts(held if requests else 0))
        if requests:
            numbers.append(plan.drafts.number)
        return plan

    put = {"choose": choose_or_hold}
    if held is not None:
        put |= dict.fromkeys(("observe_acceptance", "observe_time"), lambda *seen: None)
    vars(policy).update(put)
    try:
        yield numbers
    finally:
        for name in put:
            delattr(policy, name)


def measure_draft_numbers(llm, cache: Cache, context: int, batch: int, args) -> Iterator[dict]:
    """The rows of ``drafts-auto`` at one point: the number of drafts chosen, and each number held."""
    size = llm, cache, context, batch
    with draft_numbers(cache.scheduler, None) as numbers:
        while len(numbers) < args.learn:
            measure(*size, LEARN_TOKENS, 1, False)
        learned = len(numbers)
        row = measure(*size, args.tokens, args.repeats * CHOSEN_REPEATS, DRAFTS_AUTO in args.profile, numbers)
    yield {"config": DRAFTS_AUTO, "learned_steps": learned, **row}
    for number in AUTO_NUMBERS:
        with draft_numbers(cache.scheduler, number):
            row = measure(*size, args.tokens, args.repeats, f"{HELD}-{number}" in args.profile)
        yield {"config": f"{HELD}-{number}", **row}


def measure(
    llm, cache: Cache, context: int, batch: int, tokens: int, repeats: int, profile: bool, numbers: list[int] | None = None
) -> dict:
    """Decode `batch` sequences at about `context` tokens: ms per token, per engine step, and tokens per step.

    ``numbers``: of `draft_numbers`, where steps differ; then ms per step are the mean of all, not the median of stretches.
    """
    from vllm import SamplingParams

    engine = llm.llm_engine
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=MAX_TOKENS, detokenize=False)
    prompt = [7 + i % 400 for i in range(context - (WARM_UP + repeats * tokens) // 2)]
    names = [f"{context}-{batch}-{i}-{time.time()}" for i in range(batch)]
    for name in names:
        engine.add_request(name, {"prompt_token_ids": prompt}, params)
    counts: dict[str, int] = {}
    marks: list[tuple[float, int, int]] = []
    first_number = last_number = 0
    steps, trace, first = 0, None, 0
    while len(marks) <= repeats or (profile and "stop" not in trace):
        for output in engine.step():
            counts[output.request_id] = len(output.outputs[0].token_ids)
        steps += 1
        if len(counts) < batch:
            continue
        done = min(counts.values())
        first = first or done  # all prompts are through
        if done >= first + WARM_UP + len(marks) * tokens and len(marks) <= repeats:
            marks.append((time.perf_counter(), sum(counts.values()), steps))
            if numbers is not None:
                first_number, last_number = first_number if len(marks) > 1 else len(numbers), len(numbers)
            running = len(cache.scheduler.running)
            assert running == batch, f"{running} of {batch} sequences of {context} tokens run: raise MAX_TOKENS?"
        if profile and trace is None and len(marks) > repeats:
            trace = start_profile(steps)
        if trace is not None and steps >= trace["first"] + 8:
            stop_profile(trace, steps)
    kv_gib = cache.used_gib()
    engine.abort_request(names)
    while engine.has_unfinished_requests():
        engine.step()
    stretches = [(b[0] - a[0], (b[1] - a[1]) / batch, b[2] - a[2]) for a, b in zip(marks[:-1], marks[1:], strict=True)]
    result = {
        "ms_per_token": 1e3 * statistics.median(t / n for t, n, _ in stretches),
        "ms_per_step": 1e3 * statistics.median(t / s for t, _, s in stretches),
        "tokens_per_step": sum(n for _, n, _ in stretches) / sum(s for _, _, s in stretches),
        "kv_gib": kv_gib,
    }
    if numbers is not None:
        result["ms_per_step"] = 1e3 * (marks[-1][0] - marks[0][0]) / (marks[-1][2] - marks[0][2])
        result["numbers"] = dict(sorted(Counter(numbers[first_number:last_number]).items()))
    if trace is not None:
        result |= trace["result"]
    return result


def start_profile(step: int) -> dict:
    import torch

    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
    profiler.start()
    return {"profiler": profiler, "first": step}


def stop_profile(trace: dict, step: int) -> None:
    """Where a step's time goes: kernels by name, and how long the GPU had nothing to do."""
    import torch

    torch.cuda.synchronize()
    profiler, cycles = trace["profiler"], step - trace["first"]
    profiler.stop()
    events = [
        e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA and e.time_range.elapsed_us() > 0
    ]
    spans = sorted((e.time_range.start, e.time_range.end) for e in events)
    idle_host, idle_all, end = 0.0, 0.0, spans[0][1]
    for first, last in spans[1:]:
        gap = first - end
        if gap > 0:
            idle_all += gap
            idle_host += gap if gap > 10 else 0  # shorter ones lie between two kernels of one graph
        end = max(end, last)
    by_name: dict[str, float] = {}
    for e in events:
        by_name[e.name] = by_name.get(e.name, 0) + e.time_range.elapsed_us()
    top = sorted(by_name.items(), key=lambda item: -item[1])[:14]
    trace["stop"] = True
    trace["result"] = {
        "gpu_idle_ms_per_step": idle_host / cycles / 1e3,
        "gaps_between_kernels_ms_per_step": (idle_all - idle_host) / cycles / 1e3,
        "kernels_ms_per_step": {name[:70]: round(t / cycles / 1e3, 4) for name, t in top},
    }
