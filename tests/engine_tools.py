"""Start an engine in this process, run prompts, compare what two engines said."""

from __future__ import annotations

import asyncio
import gc
import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from vllm import LLM, RequestOutput, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

# Rule 3 moves logits by the 8-bit error of the newest tokens: at most this much at a step's likeliest token (nats).
RULE_3 = 0.25

MAX_IDLE_STEPS = 5000  # a prompt in chunks takes a few dozen

# Of the larger model and long prompts: a CPU without AVX-512 computes these in float32 far faster than in bfloat16.
LONG_DTYPE = "float32" if current_platform.is_cpu() and not torch.cpu._is_avx512_supported() else "bfloat16"

QUANTSPEC_CACHE = {"attention_backend": "QUANTSPEC"}  # the hierarchical cache with speculation off

# vLLM collects garbage nine times in an engine's life, each time among all that was ever imported: a third of the time that
# a small engine takes. Here what is there before an engine starts is left out, and vLLM may not undo that.
_leave_out_of_collections = gc.freeze
gc.freeze = gc.unfreeze = lambda: None
_engines = 0  # that run in this process

# Each engine on a CPU would look through every module for kernels to replace, for four tenths of a second: once is enough.
_replace_kernels_once = cache(current_platform.register_triton_kernel_overrides)
type(current_platform).register_triton_kernel_overrides = staticmethod(_replace_kernels_once)

CPU_CACHE_BYTES = 256 << 20  # to fill 1 GiB with zeros takes as long as the rest of a small engine's start


@contextmanager
def engine(model: str, **kwargs) -> Iterator[LLM]:
    """An engine that frees everything on exit, so that the next one can start in the same process.

    Eager on a CPU, where compiling takes longer than the test; with torch.compile and CUDA graphs on a GPU.
    """
    kwargs.setdefault("enforce_eager", current_platform.is_cpu())
    if current_platform.is_cpu():
        kwargs.setdefault("kv_cache_memory_bytes", CPU_CACHE_BYTES)
    else:
        # A fixed size: what other processes do to the card's memory does not matter then.
        kwargs.setdefault("gpu_memory_utilization", 0.2)
        kwargs.setdefault("kv_cache_memory_bytes", 4 << 30)
    kwargs.setdefault("max_model_len", 4096)
    kwargs.setdefault("max_num_seqs", 16)
    kwargs.setdefault("disable_log_stats", False)
    global _engines
    if not _engines:
        _leave_out_of_collections()
    threads, llm = torch.get_num_threads(), None
    _engines += 1
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)  # for processes that tests start; here it would win
            llm = LLM(model, **kwargs)
        _fail_for_good(llm)
        yield llm
    finally:
        _engines -= 1
        # vLLM's n-grams run on Numba's threads, which are OpenMP's, and then so does PyTorch: two for one core.
        torch.set_num_threads(threads)
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
            vars(llm).clear()  # a test's variable keeps the rest
        cleanup_dist_env_and_memory()  # it collects garbage


def _fail_for_good(llm: LLM) -> None:
    """Make an engine that failed once, or gets nowhere, raise at every later step.

    In this process vLLM keeps the requests of a step that raised as running, with nothing left to compute for them. Once
    they hold every seat, ``generate`` takes steps that schedule nothing, for ever.
    """
    engine, failure, idle = llm.llm_engine, None, 0
    step = engine.step

    def guarded_step():
        nonlocal failure, idle
        if failure is not None:
            raise RuntimeError("this engine failed before, see the first test that used it") from failure
        try:
            outputs = step()
            idle = 0 if outputs else idle + 1
            if idle > MAX_IDLE_STEPS:
                raise RuntimeError(f"the engine took {idle} steps in a row without an output")
        except Exception as error:
            failure = error
            raise
        return outputs

    engine.step = guarded_step


def draft_of(llm: LLM):
    """The `DraftModel` of an engine in this process, on either model runner."""
    found = []
    llm.collective_rpc(lambda worker: found.append(worker.model_runner))
    return (found[0].drafter if hasattr(found[0], "drafter") else found[0].speculator).draft


def put_errors_into_drafts(monkeypatch, share: float, seed: int) -> None:
    """Of the CPU engine's drafts, replace one token of this ``share``: every kind of rejection occurs."""
    from vllm_quantspec.integration.cpu.proposer import QuantSpecProposer

    rng, propose = random.Random(seed), QuantSpecProposer.propose

    def propose_with_errors(self, *args, **kwargs):
        drafts = propose(self, *args, **kwargs)
        for row in drafts:
            if rng.random() < share:
                row[rng.randrange(len(row))] = rng.randrange(4000)
        return drafts

    monkeypatch.setattr(QuantSpecProposer, "propose", propose_with_errors)


def quantspec(num_speculative_tokens: int | str = 4, **options) -> dict:
    """Engine arguments for speculation."""
    config = {"method": "quantspec", "num_speculative_tokens": num_speculative_tokens, **options}
    return {"speculative_config": config}


def abort_one_of_three(llm: LLM, prompts: Sequence[list[int]], max_tokens: int) -> list[Answer | None]:
    """Greedy answers to three prompts, the second of which is aborted between steps, while it is drafted for."""
    core, finished, step = llm.llm_engine, {}, 0
    for i, prompt in enumerate(prompts):
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, logprobs=5)
        core.add_request(f"abort-{i}", {"prompt_token_ids": prompt}, params)
    while core.has_unfinished_requests():
        for output in core.step():
            if output.finished:
                finished[output.request_id] = answer_of(output)
        step += 1
        if step == 4:
            core.abort_request(["abort-1"])
    aborted = finished.pop("abort-1", None)
    assert aborted is None or len(aborted.tokens) < max_tokens
    return [finished["abort-0"], aborted, finished["abort-2"]]


@dataclass
class Answer:
    """One request's output: tokens, why it ended, and the five likeliest tokens (log-probabilities) at each step."""

    tokens: list[int]
    finish_reason: str | None
    top: list[dict[int, float]]
    num_cached_tokens: int = 0


def generate(llm: LLM, prompts: Sequence[list[int]], max_tokens: int | Sequence[int] = 32, **sampling) -> list[Answer]:
    """Run token-id prompts as one batch, greedily unless told otherwise."""
    sampling = {"temperature": 0.0, "ignore_eos": True, "logprobs": 5, **sampling}
    lengths = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else max_tokens
    params = [SamplingParams(max_tokens=n, **sampling) for n in lengths]
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    return [answer_of(output) for output in outputs]


def generate_on_ranks(
    arguments: AsyncEngineArgs, rounds: Sequence[Sequence[tuple[list[int], int]]], max_tokens: int
) -> list[list[Answer]]:
    """Greedy answers of data-parallel engines to rounds of (prompt, rank), the prompts of a round together."""

    async def ask(llm: AsyncLLM, name: str, prompt: list[int], rank: int) -> Answer:
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True, logprobs=5)
        sampling.output_kind = RequestOutputKind.FINAL_ONLY
        request = llm.generate({"prompt_token_ids": prompt}, sampling, name, data_parallel_rank=rank)
        return [answer_of(output) async for output in request][-1]

    async def run() -> list[list[Answer]]:
        llm = AsyncLLM.from_engine_args(arguments)
        try:
            return [
                await asyncio.gather(*(ask(llm, f"{i}-{j}", *request) for j, request in enumerate(requests)))
                for i, requests in enumerate(rounds)
            ]
        finally:
            llm.shutdown()

    return asyncio.run(run())


def answer_of(output: RequestOutput) -> Answer:
    completion = output.outputs[0]
    top = [{token: lp.logprob for token, lp in step.items()} for step in completion.logprobs or []]
    return Answer(list(completion.token_ids), completion.finish_reason, top, output.num_cached_tokens or 0)


def divergence(expected: Answer, actual: Answer) -> tuple[int, float] | None:
    """None if the tokens are the same; else the first step that differs, and by how much the expected engine
    preferred its own token there (in nats; infinite if the other token was not among its five likeliest)."""
    for step, (a, b) in enumerate(zip(expected.tokens, actual.tokens, strict=False)):
        if a != b:
            top = expected.top[step]
            return step, top[a] - top[b] if b in top else float("inf")
    if len(expected.tokens) != len(actual.tokens):
        return min(len(expected.tokens), len(actual.tokens)), float("inf")
    return None


def assert_same_or_tied(expected: Sequence[Answer], actual: Sequence[Answer], tie: float, what: str = "") -> int:
    """Every answer is the same up to a near-tie of at most ``tie`` nats; returns how many diverged at one."""
    tied = 0
    for index, (e, a) in enumerate(zip(expected, actual, strict=True)):
        different = divergence(e, a)
        if different is None:
            continue
        step, gap = different
        assert gap <= tie, (
            f"{what} request {index}: token {step} is {a.tokens[step : step + 1]}, expected {e.tokens[step : step + 1]}, "
            f"which was preferred by {gap:.4f} nats: no near-tie"
        )
        tied += 1
    return tied


def assert_close(expected: list[Answer], actual: list[Answer]) -> None:
    """Same tokens up to the rule-3 difference; and where both wrote the same so far, the same probabilities up to it."""
    for e, a in zip(expected, actual, strict=True):
        different = divergence(e, a)
        assert different is None or different[1] <= RULE_3, different
        for step in range(different[0] if different else len(e.tokens)):
            token = e.tokens[step]
            assert math.isclose(e.top[step][token], a.top[step][token], abs_tol=RULE_3)


def speculation_counts(llm: LLM) -> tuple[int, list[int]]:
    """Drafts verified so far, and how many of them were accepted at each position."""
    metrics = {m.name: m for m in llm.get_metrics() if m.name.startswith("vllm:spec_decode")}
    drafts = metrics["vllm:spec_decode_num_drafts"].value
    accepted = metrics["vllm:spec_decode_num_accepted_tokens_per_pos"].values
    return int(drafts), [int(n) for n in accepted]


def preemptions(llm: LLM) -> int:
    """How many requests were preempted so far."""
    return next(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions")


# Drafts by the number of requests in a batch: none from nine on, two from three on, else four.
SCHEDULE = [[1, 2, 4], [3, 8, 2], [9, 16, 0]]


def assert_drafts_by_schedule(llm: LLM, prompts: list[list[int]], expected: Sequence[Answer], max_tokens: int, tie: float):
    """The answers are the expected ones in batches of all, six and two requests, which are drafted for by ``SCHEDULE``."""
    for number, positions in ((len(prompts), 0), (6, 2), (2, 4)):
        before = speculation_counts(llm)
        answers = generate(llm, prompts[-number:], max_tokens)
        after = speculation_counts(llm)
        assert_same_or_tied(expected[-number:], answers, tie, f"{number} requests")
        accepted = [b - a for a, b in zip(before[1], after[1], strict=True)]
        # The batch is smaller while the first prompts are computed.
        assert all(a > 9 if i < positions else a < 5 for i, a in enumerate(accepted)), accepted
