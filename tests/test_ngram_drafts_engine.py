"""``ngram: auto`` in the CPU engine: the output stays the target's, whoever drafts what in each step."""

import pickle
import random
import re
from collections import Counter

import pytest
from engine_tools import QUANTSPEC_CACHE, assert_same_or_tied, engine, generate, quantspec, speculation_counts
from test_draft_length_engine import ALPHA, DRAWS, SEEDS, TIE, draw, scheduler_of, statistics
from vllm import SamplingParams
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request

from vllm_quantspec.config import NGRAM_NUMBERS
from vllm_quantspec.draft_length import DraftLength, Drafts, Plan
from vllm_quantspec.integration.draft import ngram_count
from vllm_quantspec.integration.draft.ngram_plan import plan_of
from vllm_quantspec.integration.draft.scheduler import AsyncDraftLengthScheduler, step_seconds

G = 128
MAX_TOKENS = 90
SIZE = {"dtype": "float32", "max_num_seqs": 16, "max_model_len": 2048}
TEMPERATURE = 0.8


@pytest.fixture(scope="module", autouse=True)
def times():
    """The cost model's stand: what a busy machine takes would decide who drafts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DraftLength, "observe_time", lambda self, *step: None)
        yield


@pytest.fixture(scope="module")
def tokens(books_4m, passage):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(books_4m).encode(passage)


@pytest.fixture(scope="module")
def prompts(tokens):
    """Some that repeat themselves, beside some that do not."""
    plain = [tokens[37 * i : 37 * i + n] for i, n in enumerate([1, G - 1, 2 * G + 30, 500])]
    parts = [tokens[300 * i : 300 * i + n] for i, n in enumerate([25, G - 9, 2 * G])]
    return plain + [part * times + part[: len(part) // 2] for part, times in zip(parts, (12, 4, 3), strict=True)]


@pytest.fixture(scope="module")
def repeated(tokens):
    """A prompt that is said twice, for draws: which token comes next is open, but n-grams always have a draft.

    All but its last token is cached by the second draw.
    """
    return tokens[:137] + tokens[:120]


@pytest.fixture(scope="module")
def off(books_4m, prompts, repeated):
    """Speculation off: greedy answers, and draws."""
    with engine(books_4m, **SIZE, **QUANTSPEC_CACHE) as llm:
        return generate(llm, prompts, MAX_TOKENS), draw(llm, repeated, SEEDS["off"], DRAWS, temperature=TEMPERATURE)


@pytest.fixture(scope="module")
def llm(books_4m, off):
    with engine(books_4m, **SIZE, **quantspec("auto", ngram="auto", prompt_lookup_min=2)) as llm:
        yield llm


def answers(llm, prompts):
    """Greedy answers; what the prefix cache has of the prompts would be read in 8 bits (rule 3)."""
    assert llm.reset_prefix_cache()
    return generate(llm, prompts, MAX_TOKENS)


def draft_anyhow(monkeypatch, seed: int) -> Counter:
    """Every step's plan is drawn at random, and which requests draft by n-grams; returns the count of each, as it grows."""
    rng, chosen = random.Random(seed), Counter()

    def choose(self, requests, context, with_prompts=False):
        drafts = rng.choice(self.choices)
        some = frozenset(request for request in requests if rng.random() < 0.5)
        chosen[drafts] += 1
        return Plan(drafts, frozenset() if drafts.by_ngrams else some)

    monkeypatch.setattr(DraftLength, "choose", choose)
    return chosen


def test_greedy_is_that_of_speculation_off(llm, prompts, off):
    before, count = speculation_counts(llm), scheduler_of(llm)._ngram_count
    assert_same_or_tied(off[0], answers(llm, prompts), TIE)
    after = speculation_counts(llm)
    assert after[0] > before[0] and len(after[1]) == NGRAM_NUMBERS[-1]
    assert count.drafted > 50 and count.accepted > 0.3 * count.drafted
    watch = scheduler_of(llm).ngrams
    assert len(watch._followed) <= len(prompts)


def test_a_text_that_repeats_itself_takes_n_grams(llm, prompts, off):
    """Also where it is alone in the engine."""
    count = scheduler_of(llm)._ngram_count
    before = count.accepted
    (answer,) = answers(llm, prompts[4:5])
    assert_same_or_tied(off[0][4:5], [answer], TIE)
    assert count.accepted - before > 10


def test_greedy_with_another_plan_in_every_step(llm, prompts, off, monkeypatch):
    chosen = draft_anyhow(monkeypatch, 1)
    assert_same_or_tied(off[0], answers(llm, prompts), TIE)
    for prompt, expected in zip(prompts[2:6], off[0][2:6], strict=True):
        assert_same_or_tied([expected], answers(llm, [prompt]), TIE)
    assert set(chosen) == set(scheduler_of(llm).draft_length.choices)


def test_draws_with_another_plan_in_every_step(llm, repeated, off, monkeypatch):
    chosen, count = draft_anyhow(monkeypatch, 7), scheduler_of(llm)._ngram_count
    before = count.drafted, count.accepted
    draws = draw(llm, repeated, SEEDS["on"], DRAWS, temperature=TEMPERATURE)
    p = statistics(off[1], draws)
    assert min(p.values()) > ALPHA, p
    drafted, accepted = count.drafted - before[0], count.accepted - before[1]
    assert drafted > 200 and 0 < accepted < drafted and len(chosen) > 5


def test_draws_by_n_grams_alone(llm, repeated, off, monkeypatch):
    monkeypatch.setattr(DraftLength, "choose", lambda *args, **kwargs: Plan(Drafts(4, by_ngrams=True)))
    draws = draw(llm, repeated, SEEDS["on"] + DRAWS, DRAWS, temperature=TEMPERATURE)
    p = statistics(off[1], draws)
    assert min(p.values()) > ALPHA, p


def test_draws_of_a_batch_with_both(llm, repeated, off, monkeypatch):
    """Four drafts each: of every other request by n-grams, of the rest by the model."""

    def choose(self, requests, context, with_prompts=False):
        return Plan(Drafts(4), frozenset(requests[::2]))

    monkeypatch.setattr(DraftLength, "choose", choose)
    draws = draw(llm, repeated, SEEDS["on"] + 2 * DRAWS, DRAWS, temperature=TEMPERATURE)
    p = statistics(off[1], draws)
    assert min(p.values()) > ALPHA, p


def test_the_log_says_what_came_from_n_grams(llm, prompts, monkeypatch):
    lines: list[str] = []
    monkeypatch.setattr(ngram_count.logger, "info", lambda text, *args: lines.append(text % args))
    scheduler = scheduler_of(llm)
    scheduler._log(scheduler._logged_at)
    lines.clear()
    generate(llm, prompts[4:6], 30)
    scheduler._log(scheduler._logged_at)
    for line in lines:  # more than one where the machine is slow
        assert re.match(r"N-grams: \d+ drafts, \d+ of them accepted; expected of the first: 0\.\d\d after", line), line
    assert lines


def test_the_cost_model_prices_steps_without_the_model_s_drafts(llm):
    predict, policy = step_seconds(llm.llm_engine.vllm_config), scheduler_of(llm).draft_length
    seconds = dict(zip(policy.choices, predict(4, 1000.0), strict=True))
    for number in (4, 8):
        assert seconds[Drafts(0)] < seconds[Drafts(number, by_ngrams=True)] < seconds[Drafts(number)]


def test_async_scheduling_of_a_text_that_copies(llm, tokens):
    """The scheduler of GPU engines, without a device: two steps are on their way when drafts are decided on."""
    core, now = llm.llm_engine.engine_core.engine_core, scheduler_of(llm)
    scheduler = AsyncDraftLengthScheduler(
        vllm_config=now.vllm_config,
        kv_cache_config=now.kv_cache_config,
        structured_output_manager=core.structured_output_manager,
        block_size=now.block_size,
        hash_block_size=now.hash_block_size,
        log_stats=True,
    )
    document, params = tokens[:400], SamplingParams(max_tokens=300, ignore_eos=True)
    prompt = document + document[:20]
    scheduler.add_request(Request("a", prompt, params, None, block_hasher=core.request_block_hasher))
    follow, followed = scheduler.ngrams.follow, []
    scheduler.ngrams.follow = lambda *args: followed.append(args) or follow(*args)
    in_flight, answer, plans = [], [], []
    while scheduler.has_requests() and len(plans) < 400:
        output = scheduler.schedule()
        if output.num_scheduled_tokens:
            output = pickle.loads(pickle.dumps(step := output))  # as a worker of another process gets it
            assert plan_of(output) == plan_of(step) == scheduler._plan
            assert output.num_spec_tokens_to_schedule == plan_of(output).drafts.number
            plans.append(plan_of(output))
            in_flight.append(step)
        if len(in_flight) < 2 and output.num_scheduled_tokens or not in_flight:
            continue
        done = in_flight.pop(0)
        number = len(done.scheduled_spec_decode_tokens.get("a", ()))
        # Whoever drafts is right, up to an end of the batch's own: the answer copies the document.
        sampled = document[20 + len(answer) :][: 1 + number]
        known = scheduler.ngrams.length("a")
        for outputs in scheduler.update_from_output(done, ModelRunnerOutput(["a"], {"a": 0}, [sampled])).values():
            for one in outputs.outputs:
                answer += one.new_token_ids
        assert known in (0, len(prompt) + len(answer) - len(sampled)) or len(answer) == 300
    assert answer == document[20:320] and len(followed) == 1
    late = [plan.drafts for plan in plans[10:]]
    assert sum(drafts.by_ngrams for drafts in late) > len(late) / 2, late
    assert not scheduler._steps


def test_greedy_with_sparse_drafts_and_tails_of_prompts(books_4m, prompts, off, monkeypatch):
    """All that is chosen while running at once: pages that drafts read, numbers of drafts, who drafts; prompts in chunks."""
    chosen = draft_anyhow(monkeypatch, 5)
    options = quantspec("auto", ngram="auto", prompt_lookup_max=4, draft_context=G, draft_experts="target")
    with engine(books_4m, **SIZE | {"max_num_batched_tokens": 200, "enable_prefix_caching": False}, **options) as llm:
        assert_same_or_tied(off[0], generate(llm, prompts, MAX_TOKENS), TIE)
        assert scheduler_of(llm)._ngram_count.accepted > 20 and len(chosen) > 5
