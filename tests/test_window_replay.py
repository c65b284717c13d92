"""How many window blocks a request holds under vLLM's own schedulers, with and without a step in flight.

No model runs: the scheduler is told which drafts were accepted, and what it holds after each step is counted.
"""

import random
from collections import deque
from functools import cache

import pytest
import torch
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.math_utils import cdiv
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from vllm_quantspec.format import PageFormat, window_start
from vllm_quantspec.integration.cache.specs import RecentWindowManager, make_specs
from vllm_quantspec.integration.startup.register import register

MAX_MODEL_LEN = 20000
FORMATS = [(64, torch.bfloat16), (128, torch.bfloat16), (128, torch.float32), (256, torch.float16)]


@cache
def vllm_config(model: str, drafts: int, group_size: int):
    register()
    if drafts:
        options = {"method": "quantspec", "num_speculative_tokens": drafts, "group_size": group_size}
        arguments = {"speculative_config": options}
    else:
        arguments = {"attention_backend": "QUANTSPEC", "block_size": group_size}
    arguments |= {"max_model_len": MAX_MODEL_LEN, "max_num_batched_tokens": MAX_MODEL_LEN, "max_num_seqs": 4}
    arguments["enable_prefix_caching"] = False
    return EngineArgs(model=model, skip_tokenizer_init=True, **arguments).create_engine_config()


class Replay:
    """One request's life under a scheduler; ``in_flight`` steps are not processed yet when the next is scheduled."""

    def __init__(self, config, group_size: int, drafts: int, head_size: int, dtype: torch.dtype, in_flight: int, pool: int):
        pages, self.window = make_specs(PageFormat(2, head_size, group_size, dtype), drafts)
        groups = [KVCacheGroupSpec(["layer"], pages), KVCacheGroupSpec(["layer.window"], self.window)]
        if not pool:  # sized for one request of the longest length, as --max-model-len auto sizes it
            needed = sum(spec.max_memory_usage_bytes(config) for spec in (pages, self.window))
            pool = needed // pages.page_size_bytes + 1  # and the null block
        config.cache_config.num_gpu_blocks = pool
        scheduler = AsyncScheduler if in_flight else Scheduler
        self.scheduler = scheduler(
            config, KVCacheConfig(pool, [], groups), StructuredOutputManager(config), block_size=group_size
        )
        self.drafts, self.in_flight = drafts, in_flight
        managers = self.scheduler.kv_cache_manager.coordinator.single_type_managers
        (self.manager,) = (m for m in managers if isinstance(m, RecentWindowManager))
        self.most_held = self.preemptions = self.verified = 0

    def run(self, prompt: int, answer: int, chunk, rng: random.Random) -> int:
        """Run a request to its end, with chunks of ``chunk()`` tokens; returns the number of tokens generated."""
        params = SamplingParams(max_tokens=answer, ignore_eos=True)
        params.update_from_generation_config({}, None)
        request = Request("r", list(range(prompt)), params, None)
        self.scheduler.add_request(request)
        waiting: deque = deque()
        for _ in range(10 * (prompt + answer)):
            if not self.scheduler.has_unfinished_requests() and not waiting:
                return request.num_output_tokens
            self.scheduler.max_num_scheduled_tokens = chunk()
            step = self.scheduler.schedule()
            self.preemptions = max(self.preemptions, request.num_preemptions)
            assert self.preemptions < 5, "preempts itself for ever"
            held = [not block.is_null for block in self.manager.req_to_blocks.get("r", ())]
            self.most_held = max(self.most_held, sum(held))
            if step.total_num_scheduled_tokens:
                waiting.append((step, held, not request.is_prefill_chunk))
            if waiting and (len(waiting) > self.in_flight or not step.total_num_scheduled_tokens):
                self._process(*waiting.popleft(), rng)
        raise AssertionError("never ends")

    def _process(self, step, held: list[bool], samples: bool, rng: random.Random) -> None:
        """End a step; only now is it known where it began, and it must have held the window before that."""
        if step.scheduled_cached_reqs.resumed_req_ids or step.scheduled_new_reqs:
            self.verified = 0
        end = self.verified + step.total_num_scheduled_tokens
        low = window_start(self.verified, self.window.group_size) // self.window.block_size
        written = end if step.total_num_scheduled_tokens <= 1 + self.drafts else self.verified
        assert all(held[low : cdiv(written, self.window.block_size)]) and len(held) * self.window.block_size >= end
        drafted = len(step.scheduled_spec_decode_tokens.get("r", ()))
        sampled = [7] * (1 + rng.choice((0, drafted, rng.randint(0, drafted)))) if samples else []
        self.verified = end - drafted + max(len(sampled) - 1, 0)
        self.scheduler.update_from_output(step, ModelRunnerOutput(["r"], {"r": 0}, sampled_token_ids=[sampled]))
        if self.drafts and not self.in_flight:
            self.scheduler.update_draft_token_ids(DraftTokenIds(["r"], [[5] * self.drafts]))


@pytest.mark.parametrize("in_flight", [0, 1])
@pytest.mark.parametrize("group_size", [64, 128])
@pytest.mark.parametrize("drafts", range(9))
def test_blocks_held(drafts, group_size, in_flight, books_4m):
    """Never more than are reserved; and as many, for chunks that begin and end at the worst positions of a page."""
    config, rng = vllm_config(books_4m, drafts, group_size), random.Random(drafts)
    for head_size, dtype in FORMATS:
        held = {}
        for name in (2000, 8123, 777, 2048, "any", "worst"):
            replay = Replay(config, group_size, drafts, head_size, dtype, in_flight, pool=2000)
            # A window is longest where the tokens that the next step may begin at end a page but for one: a step that is
            # in flight may still lose its drafts, one that is processed cannot.
            first = 6 * group_size - 1 + (drafts if in_flight else 0)
            chunks = iter([first, 6 * group_size - 1 + drafts + 5 * group_size - first])
            chunk = {
                "any": lambda: rng.choice((1, 5, 100, 300, 777, 1500, 4000)),
                "worst": lambda chunks=chunks: next(chunks, 5 * group_size),
            }.get(name, lambda name=name: name)
            answer = 3 * group_size if name == "any" else 20
            assert replay.run(13000 + rng.randrange(group_size), answer, chunk, rng) == answer
            held[name] = replay.most_held
        assert max(held.values()) <= replay.window.max_blocks_per_request, held
        assert held["worst"] >= replay.window.max_blocks_per_request - (not in_flight), held


@pytest.mark.parametrize("in_flight", [0, 1])
@pytest.mark.parametrize(("group_size", "drafts"), [(128, 4), (128, 0), (64, 8)])
def test_a_prompt_near_the_limit_in_a_pool_for_one_request(group_size, drafts, in_flight, books_4m):
    config, rng = vllm_config(books_4m, drafts, group_size), random.Random(1)
    for chunk in (777, 2000, 2048, 8123):
        replay = Replay(config, group_size, drafts, 128, torch.bfloat16, in_flight, pool=0)
        assert replay.run(MAX_MODEL_LEN - 20, 20, lambda chunk=chunk: chunk, rng) == 20
        assert replay.preemptions == 0


def test_the_pool_for_one_request_is_its_pages_and_its_windows(books_4m):
    config = vllm_config(books_4m, 4, 128)
    replay = Replay(config, 128, 4, 128, torch.bfloat16, 0, pool=0)
    pool = replay.scheduler.kv_cache_manager.block_pool.num_gpu_blocks
    assert pool == cdiv(MAX_MODEL_LEN, 128) + replay.window.max_blocks_per_request + 1
