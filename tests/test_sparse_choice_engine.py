"""``draft_context: auto`` in the CPU engine: what is read follows what is accepted, and the output stays."""

import random
from collections import defaultdict

import pytest
from engine_tools import QUANTSPEC_CACHE, assert_same_or_tied, engine, generate, quantspec
from vllm import SamplingParams
from vllm.platforms import current_platform
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request

from vllm_quantspec.config import AUTO_NUMBERS
from vllm_quantspec.draft_length import DraftLength, Drafts, Plan
from vllm_quantspec.integration.draft import sparse_scheduler
from vllm_quantspec.integration.draft.scheduler import DraftLengthScheduler
from vllm_quantspec.integration.draft.sparse import reading_all
from vllm_quantspec.integration.draft.sparse_scheduler import (
    AsyncSparseDraftLengthScheduler,
    AsyncSparseScheduler,
    SparseDraftLengthScheduler,
    SparseScheduler,
)
from vllm_quantspec.sparse_choice import SparseChoice

if not current_platform.is_cpu():
    pytest.skip("the CPU engine's sparse drafts", allow_module_level=True)

from vllm_quantspec.integration.cpu.page_scores import PageScores
from vllm_quantspec.integration.cpu.proposer import QuantSpecProposer

TIE = 2e-3  # in float32, see test_lossless.py
MAX_TOKENS = 120
SIZE = {
    "dtype": "float32",
    "max_model_len": 8192,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 8192,
    "long_prefill_token_threshold": 1024,
}
LENGTHS = [5000, 5200, 300]


@pytest.fixture(scope="module")
def tokens(books_4m, passage):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(books_4m).encode(passage)


@pytest.fixture(scope="module")
def prompts(tokens):
    return [tokens[37 * i : 37 * i + n] for i, n in enumerate(LENGTHS)]


@pytest.fixture(scope="module")
def expected(books_4m, prompts):
    with engine(books_4m, **SIZE, **QUANTSPEC_CACHE) as llm:
        return generate(llm, prompts, MAX_TOKENS)


@pytest.fixture(scope="module")
def llm(books_4m, expected):
    with engine(books_4m, **SIZE, **quantspec(4)) as llm:
        assert type(scheduler_of(llm)) is SparseScheduler
        yield llm


def scheduler_of(llm):
    return llm.llm_engine.engine_core.engine_core.scheduler


def answers(llm, prompts):
    """Greedy answers; what the prefix cache has of the prompts would be read in 8 bits (rule 3)."""
    assert llm.reset_prefix_cache()
    return generate(llm, prompts, MAX_TOKENS)


@pytest.fixture
def kinds(monkeypatch):
    """{request: [whether its drafts were sparse, of each cycle]}, as the worker has them; and the pages that it chose."""
    seen, select = defaultdict(list), PageScores.select

    def select_and_tell(self, num_rows, block_table, requests, computing_prompt):
        selection = select(self, num_rows, block_table, requests, computing_prompt)
        counts = selection.count.tolist() if selection else [0] * len(requests)
        for name, count, computing in zip(requests, counts, computing_prompt.tolist(), strict=True):
            if not computing:
                seen[name].append(count > 0)
        return selection

    monkeypatch.setattr(PageScores, "select", select_and_tell)
    return seen


def spoil_sparse_drafts(monkeypatch, kinds, of) -> None:
    """The first draft of a sparse cycle is a wrong token, of those requests of which ``of``(place in the batch) says so."""
    propose, rng = QuantSpecProposer.propose, random.Random(5)

    def propose_spoiled(self, *args, **kwargs):
        drafts = propose(self, *args, **kwargs)
        for row, name in zip(drafts, self.runner.input_batch.req_ids, strict=False):
            if drafts.shape[1] and kinds[name] and kinds[name][-1] and of(sorted(kinds).index(name)):
                row[0] = (row[0] + rng.randrange(1, 3000)) % 4000
        return drafts

    monkeypatch.setattr(QuantSpecProposer, "propose", propose_spoiled)


def in_order(kinds) -> list[list[bool]]:
    """Names of requests end with their number and a random suffix: in the order in which they came."""
    return [kinds[name] for name in sorted(kinds, key=lambda name: int(name.split("-")[0]))]


def test_sparse_drafts_stay_while_they_are_accepted(llm, prompts, expected, kinds):
    assert_same_or_tied(expected, answers(llm, prompts), TIE)
    first, second, short = in_order(kinds)
    assert not any(short) and not first[0] and not second[0]  # the cycle after the prompt
    assert sum(first) > 0.8 * len(first) and sum(second) > 0.8 * len(second)


def test_a_request_whose_sparse_drafts_are_rejected_reads_everything(llm, prompts, expected, kinds, monkeypatch):
    """The first one of three; the second keeps its sparse drafts, and all answers stay what they were."""
    monkeypatch.setattr(scheduler_of(llm), "sparse_choice", sparse_scheduler.make_choice(llm.llm_engine.vllm_config))
    spoil_sparse_drafts(monkeypatch, kinds, of=lambda place: place == 0)
    assert_same_or_tied(expected, answers(llm, prompts), TIE)
    first, second, short = in_order(kinds)
    assert not any(short)
    assert sum(first[:12]) >= 2 and sum(first[len(first) // 2 :]) <= 0.2 * len(first), first
    assert sum(second) > 0.7 * len(second), second
    choice = scheduler_of(llm).sparse_choice
    assert len(choice._rows) <= len(prompts)  # of requests that are over nothing is left but of the last step


def test_the_log_says_how_many_read_everything(llm, prompts, kinds, monkeypatch):
    lines: list[str] = []
    monkeypatch.setattr(sparse_scheduler.logger, "info", lambda text, *args: lines.append(text % args))
    monkeypatch.setattr(SparseChoice, "choose", lambda self, names, *args: (set(names), set()))
    scheduler = scheduler_of(llm)
    scheduler._drafted = scheduler._kept_whole = 0
    generate(llm, prompts[2:], 8)
    scheduler._say(scheduler._said_at)
    scheduler._say(scheduler._said_at)  # nothing since
    assert lines == ["Of requests long enough for sparse drafts 100 % read everything, as accepted drafts say"]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("cls", [AsyncSparseScheduler, AsyncSparseDraftLengthScheduler])
def test_async_scheduling(llm, tokens, cls, seed):
    """The scheduler of GPU engines, without a device: outcomes are counted for the kind that the drafts were of."""
    core, now = llm.llm_engine.engine_core.engine_core, scheduler_of(llm)
    scheduler = cls(
        vllm_config=now.vllm_config,
        kv_cache_config=now.kv_cache_config,
        structured_output_manager=core.structured_output_manager,
        block_size=now.block_size,
        hash_block_size=now.hash_block_size,
        log_stats=True,
    )
    rng, chosen, numbers = random.Random(seed), [], []

    def choose(requests, tokens, scored, number):
        numbers.append(number)
        whole = {name for name in requests if rng.random() < 0.4}
        chosen.append((whole, set(requests) - whole))
        return chosen[-1]

    observed = []
    scheduler.sparse_choice.choose = choose
    scheduler.sparse_choice.observe = lambda *args: observed.extend(zip(*args, strict=True))
    if isinstance(scheduler, DraftLengthScheduler):  # by measured times otherwise
        scheduler.draft_length.choose = lambda *args: Plan(Drafts(rng.choice((0, 1, 4))))
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    for name, length in (("a", 20), ("b", 33)):
        scheduler.add_request(Request(name, tokens[:length], params, None, block_hasher=core.request_block_hasher))
    in_flight, expected, steps = [], [], 0
    while scheduler.has_requests() and steps < 200:
        steps += 1
        output = scheduler.schedule()
        if output.num_scheduled_tokens:
            assert reading_all(output) == chosen[-1][0]
            in_flight.append((output, chosen[-2][1] if len(chosen) > 1 else set()))
            assert numbers[-1] == output.num_spec_tokens_to_schedule
        if len(in_flight) < 2 and output.num_scheduled_tokens or not in_flight:
            continue
        done, sparse = in_flight.pop(0)
        names, sampled = list(done.num_scheduled_tokens), []
        for name in names:
            number = len(done.scheduled_spec_decode_tokens.get(name, ()))
            accepted = rng.randint(0, number)
            sampled.append([5] * (1 + accepted))
            if number and name in scheduler.requests:
                expected.append((name, name in sparse, number, accepted))
        scheduler.update_from_output(done, ModelRunnerOutput(names, {n: i for i, n in enumerate(names)}, sampled))
    assert observed == expected and {row[1] for row in observed} == {False, True}
    assert not scheduler._verified


def test_a_model_that_the_cost_model_does_not_know(llm, tokens, monkeypatch):
    def refuse(*args):
        raise ValueError("no such sizes")

    lines: list[str] = []
    monkeypatch.setattr(sparse_scheduler.logger, "info", lambda text, *args: lines.append(text % args))
    monkeypatch.setattr(sparse_scheduler.estimate, "model_from", refuse)
    assert sparse_scheduler.make_choice(llm.llm_engine.vllm_config) is None
    assert lines == ["Sparse drafts are chosen by length and batch alone, whatever is accepted of them: no such sizes"]
    monkeypatch.setattr(scheduler_of(llm), "sparse_choice", None)
    assert len(generate(llm, [tokens[:40]], 8)[0].tokens) == 8


@pytest.mark.parametrize("ngram", ["off", "auto"])
def test_any_choice_and_any_number_keep_the_output(books_4m, prompts, expected, kinds, ngram, monkeypatch):
    """Random ones in every cycle, and n-grams of some: the workers do as they are told, in the order of their own batch."""
    rng, told = random.Random(2), defaultdict(list)

    def choose(self, requests, tokens, scored, number):
        whole = {name for name in requests if rng.random() < 0.5}
        for name in requests:
            told[name].append(name in whole)
        return whole, set(requests) - whole

    def plan(self, requests, *more):
        some = frozenset(name for name in requests if ngram == "auto" and rng.random() < 0.3)
        return Plan(Drafts(rng.choice(AUTO_NUMBERS)), some)

    monkeypatch.setattr(SparseChoice, "choose", choose)
    monkeypatch.setattr(DraftLength, "choose", plan)
    with engine(books_4m, **SIZE, **quantspec("auto", ngram=ngram)) as llm:
        assert type(scheduler_of(llm)) is SparseDraftLengthScheduler
        assert_same_or_tied(expected, generate(llm, prompts, MAX_TOKENS), TIE)
    first, second, short = in_order(kinds)
    assert not any(short)
    for request in (first, second):
        assert 0.2 * len(request) < sum(request) < 0.8 * len(request)
    for name in kinds:
        assert not any(sparse and whole for sparse, whole in zip(kinds[name], told[name], strict=True))
