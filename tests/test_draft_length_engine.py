"""``num_speculative_tokens: auto`` in the CPU engine: the output stays the target's, whatever number each step drafts."""

import random
import re
from collections import Counter

import pytest
from engine_tools import QUANTSPEC_CACHE, assert_same_or_tied, engine, generate, quantspec, speculation_counts
from test_sampling import ALPHA, SEEDS, draw, statistics
from vllm import SamplingParams
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request

from vllm_quantspec.config import AUTO_NUMBERS
from vllm_quantspec.draft_length import DraftLength, Drafts, Plan
from vllm_quantspec.integration.draft import scheduler as scheduler_module
from vllm_quantspec.integration.draft.scheduler import AsyncDraftLengthScheduler, step_seconds

G = 128
MAX_TOKENS = 60
TIE = 2e-3  # float32, see test_lossless.py
SIZE = {"dtype": "float32", "max_num_seqs": 16, "max_model_len": 2048}
DRAWS = 240


@pytest.fixture(scope="module")
def tokens(books_4m, passage):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(books_4m).encode(passage)


@pytest.fixture(scope="module")
def prompts(tokens):
    return [tokens[37 * i : 37 * i + n] for i, n in enumerate([1, G - 1, 2 * G, 2 * G + 30, 3 * G - 3, 700, 5, 90])]


@pytest.fixture(scope="module")
def off(books_4m, prompts, tokens):
    """Speculation off: greedy answers, and draws."""
    with engine(books_4m, **SIZE, **QUANTSPEC_CACHE) as llm:
        return generate(llm, prompts, MAX_TOKENS), draw(llm, tokens[: 2 * G + 1], SEEDS["off"], DRAWS, temperature=0.8)


@pytest.fixture(scope="module")
def llm(books_4m, off):
    with engine(books_4m, **SIZE, **quantspec("auto")) as llm:
        yield llm


def answers(llm, prompts):
    """Greedy answers; what the prefix cache has of the prompts would be read in 8 bits (rule 3)."""
    assert llm.reset_prefix_cache()
    return generate(llm, prompts, MAX_TOKENS)


def scheduler_of(llm):
    return llm.llm_engine.engine_core.engine_core.scheduler


def draft_any_number(monkeypatch, seed: int) -> Counter:
    """Every step drafts a number drawn at random; returns the count of each, as it grows."""
    rng, chosen = random.Random(seed), Counter()

    def choose(self, requests, context, with_prompts=False):
        number = rng.choice(AUTO_NUMBERS)
        chosen[number] += 1
        return Plan(Drafts(number))

    monkeypatch.setattr(DraftLength, "choose", choose)
    return chosen


def test_greedy_is_that_of_speculation_off(llm, prompts, off):
    before = speculation_counts(llm)
    assert_same_or_tied(off[0], answers(llm, prompts), TIE)
    after = speculation_counts(llm)
    assert after[0] > before[0] and len(after[1]) == AUTO_NUMBERS[-1]
    policy = scheduler_of(llm).draft_length
    # What it has learned: every request is over but those of the last step; both halves of its arithmetic have data.
    assert len(policy.acceptance._rows) <= len(prompts)
    assert policy.acceptance.mean_rates()[0] > 0.6 and policy.times.seen(len(prompts))


def test_greedy_with_another_number_of_drafts_in_every_step(llm, prompts, off, monkeypatch):
    chosen = draft_any_number(monkeypatch, 1)
    assert_same_or_tied(off[0], answers(llm, prompts), TIE)
    for prompt, expected in zip(prompts[3:6], off[0][3:6], strict=True):
        assert_same_or_tied([expected], answers(llm, [prompt]), TIE)
    assert set(chosen) == set(AUTO_NUMBERS)


def test_draws_with_another_number_of_drafts_in_every_step(llm, tokens, off, monkeypatch):
    chosen = draft_any_number(monkeypatch, 7)
    draws = draw(llm, tokens[: 2 * G + 1], SEEDS["on"], DRAWS, temperature=0.8)
    p = statistics(off[1], draws)
    assert min(p.values()) > ALPHA, p
    assert set(chosen) == set(AUTO_NUMBERS)


def test_the_log_says_what_is_chosen(llm, prompts, monkeypatch):
    lines: list[str] = []
    monkeypatch.setattr(scheduler_module.logger, "info", lambda text, *args: lines.append(text % args))
    scheduler = scheduler_of(llm)
    scheduler._chosen.clear()
    generate(llm, prompts[:2], 8)
    scheduler._log(scheduler._logged_at)
    (line,) = lines
    assert re.match(r"Number of drafts: [\d, in%]* of \d+ steps; accepted if .* by position: 0\.\d\d ", line), line
    scheduler._log(scheduler._logged_at)  # nothing since
    assert len(lines) == 1


def test_the_cost_model_knows_this_model(llm):
    predict = step_seconds(llm.llm_engine.vllm_config)
    for batch, context in ((1, 100.0), (16, 2000.0)):
        seconds = predict(batch, context)
        assert len(seconds) == len(AUTO_NUMBERS) and all(a < b for a, b in zip(seconds, seconds[1:], strict=False))
        assert seconds[0] > 0
    assert predict(1, 1000.0) == predict(1, 1010.0) != predict(1, 1500.0)  # rounded


def test_async_scheduling(llm, tokens):
    """The scheduler of GPU engines, without a device: a step is scheduled before the one before it has come back."""
    core, now = llm.llm_engine.engine_core.engine_core, scheduler_of(llm)
    scheduler = AsyncDraftLengthScheduler(
        vllm_config=now.vllm_config,
        kv_cache_config=now.kv_cache_config,
        structured_output_manager=core.structured_output_manager,
        block_size=now.block_size,
        hash_block_size=now.hash_block_size,
        log_stats=True,
    )
    rng, wanted = random.Random(3), []

    def choose(requests, context, with_prompts=False):
        wanted.append(rng.choice(AUTO_NUMBERS))
        return Plan(Drafts(wanted[-1]))

    observed = []
    scheduler.draft_length.choose = choose
    scheduler.draft_length.observe_acceptance = lambda *args: observed.append(args)
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    for name, length in (("a", 20), ("b", 33)):
        scheduler.add_request(Request(name, tokens[:length], params, None, block_hasher=core.request_block_hasher))
    in_flight, expected, produced, steps = [], [], Counter(), 0
    while scheduler.has_requests() and steps < 200:
        steps += 1
        output = scheduler.schedule()
        if output.num_scheduled_tokens:
            assert output.num_spec_tokens_to_schedule == wanted[-1]
            in_flight.append(output)
            if len(wanted) > 1:
                drafts = {name: len(ids) for name, ids in output.scheduled_spec_decode_tokens.items()}
                assert drafts == dict.fromkeys(output.num_scheduled_tokens, wanted[-2]) or not wanted[-2] and not drafts
        if len(in_flight) < 2 and output.num_scheduled_tokens or not in_flight:
            continue
        done = in_flight.pop(0)
        names = list(done.num_scheduled_tokens)
        sampled, accepted = [], []
        for name in names:
            number = len(done.scheduled_spec_decode_tokens.get(name, ()))
            accepted.append(rng.randint(0, number))
            sampled.append([5] * (1 + accepted[-1]))
            if number and name in scheduler.requests:
                expected.append((name, number, accepted[-1]))
        result = ModelRunnerOutput(names, {name: i for i, name in enumerate(names)}, sampled)
        for outputs in scheduler.update_from_output(done, result).values():
            for one in outputs.outputs:
                produced[one.request_id] += len(one.new_token_ids)
    assert produced == {"a": 40, "b": 40} and set(wanted) == set(AUTO_NUMBERS)
    assert [row for args in observed for row in zip(*args, strict=True)] == expected
    assert not scheduler._steps
