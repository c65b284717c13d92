"""Sparse drafts on the CPU engine: the output is that of speculation off whatever they read, and they read less."""

import random

import pytest
import torch
from engine_tools import (
    QUANTSPEC_CACHE,
    abort_one_of_three,
    assert_same_or_tied,
    engine,
    generate,
    preemptions,
    put_errors_into_drafts,
    quantspec,
    speculation_counts,
)
from test_sampling import ALPHA, DISTRIBUTIONS, SEEDS, draw, statistics
from vllm import LLM
from vllm.platforms import current_platform

from vllm_quantspec import sparse_policy
from vllm_quantspec.config import DraftBudget, draft_budget, parse_draft_context
from vllm_quantspec.format import PageFormat
from vllm_quantspec.kernels import cpu_decode

if not current_platform.is_cpu():
    pytest.skip("the CPU engine's sparse drafts", allow_module_level=True)

from vllm_quantspec.integration.cpu.page_scores import PageScores, make_page_scores

G = 128
TIE = 2e-3  # in float32, see test_lossless.py
# Recomputing what was generated before a preemption reads it exact, where decoding had read the older of it in 8 bits.
RECOMPUTED = 0.25
MAX_TOKENS = 32
# Prompts above 1,024 tokens are computed in chunks of as many, whatever else is in the batch; the last ones are short, since
# vLLM computes the prompt of a request that is alone as a whole. More requests than seats.
SIZE = {
    "dtype": "float32",
    "max_model_len": 8192,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 8192,
    "long_prefill_token_threshold": 1024,
}
LENGTHS = [5000, 300, 3000, 1, 1700, 5 * G, 900, 40]
POLICIES = {
    "attention": {"draft_context": 2 * G},
    "a fraction": {"draft_context": "0.25"},
    "window": {"draft_context": 2 * G, "draft_selection": "window"},
    "snapkv": {"draft_context": 2 * G, "draft_selection": "snapkv"},
    "auto": {"draft_context": "auto"},
}
# A pool that holds the prompts of `test_preemption`, and not all of their answers.
BLOCKS, ANSWER = 60, 260
DRAWS = 320


# --- Policy and state, without an engine ------------------------------------------------------------------------------


def test_sparse_drafts_pay_from_a_length_on():
    shape = {"draft_weight_bytes": 4.3e9, "target_weight_bytes": 16e9, "draft_kv_bytes": 34_816, "target_kv_bytes": 67_584}
    more = {"num_speculative_tokens": 4, "fraction": 1 / 16, "group_size": G}

    def gain(pages: int) -> float:
        tokens, drafts = pages * G, more["num_speculative_tokens"]
        cycle = drafts * (shape["draft_weight_bytes"] + shape["draft_kv_bytes"] * tokens)
        cycle += shape["target_weight_bytes"] + shape["target_kv_bytes"] * tokens
        saved = drafts * shape["draft_kv_bytes"] * tokens * (1 - more["fraction"])
        return saved - sparse_policy.LOST_TOKENS * cycle

    pages = sparse_policy.min_total_pages(**shape, **more)
    assert gain(pages) >= 0 > gain(pages - 1)
    assert 8192 < pages * G < 32768  # of a model of 8B parameters
    assert sparse_policy.min_total_pages(**shape, **more | {"fraction": 0.95}) == sparse_policy.NEVER
    heavier = shape | {"draft_weight_bytes": 16e9}
    assert sparse_policy.min_total_pages(**heavier, **more) > pages


def page_scores(selection: str = "attention", pages: int = 2, **more) -> PageScores:
    more = {"max_requests": 3, "max_pages": 40, **more}
    return PageScores(PageFormat(2, 64, 64), 3, DraftBudget(pages, 0.0, 1), selection, **more)


def score(state: PageScores, lengths: list[int], query_lens: list[int]) -> None:
    """A step whose decode rows these are, with random scores."""
    state.start_step(torch.tensor([0, *query_lens]).cumsum(0).int(), torch.tensor(lengths).int())
    for layer in range(3):
        out = state.of_layer(layer)
        if out is not None:
            out.scores.copy_(torch.rand(out.scores.shape))


def choose(state: PageScores, num_rows: list[int], names: str, prompts: tuple[int, ...] = ()):
    table = torch.arange(100, 100 + 40 * len(num_rows), dtype=torch.int32).view(len(num_rows), 40)
    computing = torch.tensor([i in prompts for i in range(len(num_rows))])
    return state.select(torch.tensor(num_rows), table, list(names), computing)


def numbers(selection, r: int) -> torch.Tensor:
    """The pages of request ``r`` that `choose` returned, as numbers of pages, [L, H, count]."""
    begin, count = int(selection.begin[r]), int(selection.count[r])
    return selection.page_list[:, :, begin : begin + count] - 100 - 40 * r


def test_rows_of_rejected_drafts_do_not_count():
    state = page_scores()
    score(state, [64 * 12], [3])
    state._scores.zero_()
    state._scores[:, :, 3, 1], state._scores[:, :, 7, 2] = 1.0, 5.0
    assert (numbers(choose(state, [2], "a"), 0) == torch.tensor([0, 3])).all()
    assert (numbers(choose(state, [3], "a"), 0) == torch.tensor([0, 7])).all()


def test_prompts_and_short_requests_read_everything():
    state = page_scores()
    score(state, [64 * 12, 64 * 3, 64 * 9], [3, 1, 2])  # a fourth request computes its prompt
    selection = choose(state, [1, 1, 2, 1], "abcd")
    assert selection.count.tolist() == [2, 0, 2, 0] and selection.dense_from.tolist() == [10, 0, 7, 0]
    selection = choose(state, [1, 1, 2, 1], "abcd", prompts=(0,))
    assert selection.count.tolist() == [0, 0, 2, 0]
    state.start_step(torch.zeros(1, dtype=torch.int32), torch.zeros(0, dtype=torch.int32))
    assert choose(state, [1, 1], "ab") is None
    few = page_scores(min_total_pages=20)
    score(few, [64 * 12, 64 * 10], [1, 1])
    assert choose(few, [1, 1], "ab") is None
    score(few, [64 * 12, 64 * 13], [1, 1])
    assert choose(few, [1, 1], "ab").count.tolist() == [2, 2]


def test_window_is_the_first_page_and_the_newest_and_needs_no_scores():
    state = page_scores("window", 3)
    score(state, [64 * 12, 64 * 3], [3, 1])
    assert state.of_layer(0) is None
    assert (numbers(choose(state, [1, 1], "ab"), 0) == torch.tensor([0, 8, 9])).all()


def test_snapkv_chooses_once_for_each_request():
    state = page_scores("snapkv")
    score(state, [64 * 12, 64 * 20], [1, 1])
    first = choose(state, [1, 1], "ab")
    a, b = numbers(first, 0), numbers(first, 1)
    score(state, [64 * 24, 64 * 16, 64 * 8], [2, 3, 1])  # the runner has moved them, and there is one more
    later = choose(state, [2, 2, 1], "bac")
    assert (numbers(later, 0) == b).all() and (numbers(later, 1) == a).all()
    assert later.dense_from.tolist() == [18, 10, 6]  # what is newer than the choice is read
    state.start_step(torch.tensor([0, 1]), torch.tensor([64 * 30]))  # `a` computes a prompt again
    for layer in range(3):
        state.of_layer(layer).scores.zero_()[:, 5] = 1
    assert choose(state, [1, 1], "ba").count.tolist() == [2, 0]
    state.forget({"b"})
    score(state, [64 * 30, 64 * 12], [1, 1])
    assert choose(state, [1, 1], "ba").dense_from.tolist() == [28, 10]


def test_snapkv_gives_the_rows_of_requests_that_are_gone_to_others():
    state, seen = page_scores("snapkv"), random.Random(0)
    names = "abcdefghij"
    for _ in range(40):
        batch = "".join(seen.sample(names, 3))
        score(state, [64 * 12] * 3, [1] * 3)
        assert choose(state, [1] * 3, batch).count.tolist() == [2] * 3
        assert len(set(state._snap.row_of.values())) == len(state._snap.row_of) <= 3
        state.forget(set(seen.sample(names, 2)))


def test_the_share_that_is_read():
    state = page_scores()
    score(state, [64 * 12 + 1, 64 * 3], [1, 1])
    selection = choose(state, [1, 1], "ab")
    state.count_reading(selection, torch.tensor([64 * 13, 64 * 3]), 4)
    # Of 12 and 2 pages all but the 8 old ones that were not chosen, and one newer than the choice.
    assert (state.share.read, state.share.old) == (4 * (14 - 9), 4 * 14)


def test_requests_that_would_choose_all_of_their_pages_are_not_scored():
    state = page_scores(pages=4)
    score(state, [64 * 6, 64 * 7, 64 * 3], [1, 1, 1])
    assert [state.of_layer(0).scores.shape[1], *state._num_scored.tolist()] == [5, 0, 5, 0]
    assert choose(state, [1, 1, 1], "abc").count.tolist() == [0, 4, 0]
    few = page_scores(min_total_pages=20)
    score(few, [64 * 12, 64 * 10], [1, 1])
    assert few.of_layer(0) is None
    kept = page_scores("snapkv", min_total_pages=20)
    for lengths, count in (([64 * 12, 64 * 10], [0, 0]), ([64 * 13, 64 * 14], [2, 2]), ([64 * 13, 64 * 2], [2, 0])):
        score(kept, lengths, [1, 1])  # where the second is another request at last
        assert getattr(choose(kept, [1, 1], "ab"), "count", torch.zeros(2)).tolist() == count


# --- Engines ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokens(books_4m, passage):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(books_4m).encode(passage)


@pytest.fixture(scope="module")
def prompts(tokens):
    """From different places of the text, so that the prefix cache does not join them; and what the same begin with."""
    first = [tokens[37 * i : 37 * i + n] for i, n in enumerate(LENGTHS)]
    return first, [prompt + tokens[:n] for prompt, n in zip(first[:4], (3, 30, 9, 200), strict=True)]


@pytest.fixture(scope="module")
def expected(books_4m, prompts):
    """Answers with speculation off: to the prompts and then, from the prefix cache, to the longer ones."""
    with engine(books_4m, **SIZE, **QUANTSPEC_CACHE) as llm:
        answers = [generate(llm, p, MAX_TOKENS) for p in prompts]
    assert all(a.num_cached_tokens == 0 for a in answers[0])
    assert [a.num_cached_tokens // G for a in answers[1]] == [39, 2, 23, 0]
    return answers


@pytest.fixture(scope="module")
def llm(books_4m, expected):
    with engine(books_4m, **SIZE, **quantspec(4, draft_context=2 * G)) as llm:
        yield llm


def page_scores_of(llm: LLM) -> PageScores:
    return llm.collective_rpc(lambda worker: [worker.model_runner])[0][0].drafter.page_scores


def use(llm: LLM, draft_context: str | int, draft_selection: str = "attention") -> None:
    """Give an engine other sparse drafts, made as when it starts, and an empty prefix cache."""
    runner = llm.collective_rpc(lambda worker: [worker.model_runner])[0][0]
    config, drafter = runner.vllm_config.speculative_config, runner.drafter
    config.draft_context, config.draft_selection = parse_draft_context(draft_context, G), draft_selection
    layers = runner.vllm_config.compilation_config.static_forward_context
    drafter.page_scores = make_page_scores(runner.vllm_config, runner.get_model(), drafter.draft, layers)
    assert llm.reset_prefix_cache()


@pytest.fixture
def pages_read(monkeypatch):
    """[pages that draft steps have really read, pages that there were], per layer and KV head."""
    counted, run_decode = [0, 0], cpu_decode.run_decode

    def counting(fmt, plan, pages, window, query, scale, bits, *more):
        if bits == 4:
            is_page = plan.tasks[:, 4] != cpu_decode._WINDOW
            counted[0] += int((plan.tasks[is_page, 3] - plan.tasks[is_page, 2]).sum())
            counted[1] += fmt.num_kv_heads * int((-(-plan.boundary[:, 0] // fmt.group_size)).sum())
        return run_decode(fmt, plan, pages, window, query, scale, bits, *more)

    monkeypatch.setattr(cpu_decode, "run_decode", counting)
    return counted


@pytest.mark.parametrize("policy", POLICIES)
def test_greedy_output_is_that_of_speculation_off(llm, prompts, expected, policy, pages_read, monkeypatch):
    """More requests than seats, prompts in chunks, drafts with errors; then again, from the prefix cache."""
    put_errors_into_drafts(monkeypatch, 0.3, seed=5)
    use(llm, **POLICIES[policy])
    before = speculation_counts(llm)
    tied = assert_same_or_tied(expected[0], generate(llm, prompts[0], MAX_TOKENS), TIE)
    share = page_scores_of(llm).share
    assert 0.02 < share.mean < 0.75
    counted = {m.name: m.value for m in llm.get_metrics() if "quantspec" in m.name}
    assert counted["vllm:quantspec_draft_pages_read"] < 0.75 * counted["vllm:quantspec_draft_pages"]
    cached = generate(llm, prompts[1], MAX_TOKENS)
    assert [a.num_cached_tokens for a in cached] == [a.num_cached_tokens for a in expected[1]]
    tied += assert_same_or_tied(expected[1], cached, TIE, "cached")
    assert tied <= 2
    # What is said to be read is what was read, but for the rows of unfinished prompts.
    assert 0.01 < pages_read[0] / pages_read[1] < 0.9
    after = speculation_counts(llm)
    drafts, accepted = after[0] - before[0], after[1][0] - before[1][0]
    assert 0.3 * drafts < accepted < drafts


@pytest.mark.parametrize("policy", ["attention", "snapkv"])
def test_an_aborted_request_leaves_nothing_behind(llm, tokens, policy):
    """One of three is aborted between steps: the others go on, the pool gets its blocks back, and SnapKV its rows."""
    use(llm, **POLICIES[policy])
    pool = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
    free, lengths = pool.get_num_free_blocks(), (1500, 900, 1300)
    prompts = [tokens[9 * i : 9 * i + n] for i, n in enumerate(lengths)]
    alone = [generate(llm, [p], 30)[0] for p in prompts]
    answers = abort_one_of_three(llm, prompts, 30)
    assert_same_or_tied(alone[::2], answers[::2], RECOMPUTED)  # both from the cache here, and not at first: rule 3
    assert pool.get_num_free_blocks() == free
    generate(llm, [tokens[:20]], 6)  # the next step tells the worker who is gone
    snapshots = page_scores_of(llm)._snap
    assert snapshots is None or len(snapshots.row_of) <= 1


def test_pages_of_64_tokens(books_4m, prompts, monkeypatch):
    """One of them, and the window; that is half as long, too. (From here on tests have engines of their own.)"""
    put_errors_into_drafts(monkeypatch, 0.3, seed=6)
    size = SIZE | {"max_model_len": 4096}
    with engine(books_4m, block_size=64, **size, **QUANTSPEC_CACHE) as llm:
        off = generate(llm, prompts[0][2:5], MAX_TOKENS)
    with engine(books_4m, **size, **quantspec(4, draft_context=64, group_size=64)) as llm:
        assert_same_or_tied(off, generate(llm, prompts[0][2:5], MAX_TOKENS), TIE)
        assert page_scores_of(llm).share.mean < 0.3


def test_preemption(books_4m, tokens):
    """A pool too small for the load: what was chosen for a request that was preempted is not used when it resumes."""
    prompts = [tokens[60 * i : 60 * i + 500 + 130 * i] for i in range(6)]
    size = {"dtype": "float32", "max_model_len": 2048, "max_num_seqs": 6, "enable_prefix_caching": False}
    with engine(books_4m, num_gpu_blocks_override=BLOCKS, **size, **quantspec(4, **POLICIES["snapkv"])) as crowded:
        two = generate(crowded, prompts[4:], ANSWER)  # the last ones are preempted first
        for policy in ("snapkv", "attention"):
            use(crowded, G, policy)
            before = preemptions(crowded)
            together = generate(crowded, prompts, ANSWER)
            assert preemptions(crowded) > before
            assert page_scores_of(crowded).share.mean < 0.7
            assert [len(a.tokens) for a in together] == [ANSWER] * len(prompts)
            assert_same_or_tied(two, together[4:], RECOMPUTED)


def test_draws_have_the_targets_distribution(books_4m, tokens):
    """Drafts that read one page of eight and the window. From a cached prefix with three tokens to compute, which are scored
    like a verification: the very first drafts are sparse."""
    prompt, sampling = tokens[: 10 * G + 3], DISTRIBUTIONS["temperature 0.8"]
    size = {"dtype": "float32", "max_model_len": 2048, "max_num_seqs": 128}
    with engine(books_4m, **size, **QUANTSPEC_CACHE) as llm:
        off = draw(llm, prompt, SEEDS["off"], DRAWS, **sampling)
    with engine(books_4m, **size, **quantspec(3, draft_context=G)) as llm:
        on = draw(llm, prompt, SEEDS["on"], DRAWS, **sampling)
        drafts, accepted = speculation_counts(llm)
        share = page_scores_of(llm).share.mean
    p = statistics(off, on)
    print(f"accepted {[round(a / drafts, 3) for a in accepted]}, {share:.3f} of the cache read: {p}")
    assert min(p.values()) > ALPHA, p
    assert share < 0.5 and 0.2 * drafts < accepted[0] < drafts


def test_a_budget_is_pages_and_a_fraction():
    assert draft_budget("all", 128) is None
    assert draft_budget(1000, 128) == (8, 0.0, 1) and draft_budget(0.125, 64) == (1, 0.125, 1)
    assert draft_budget("auto", 128) == (8, 1 / 16, 32) and draft_budget("auto", 64) == (16, 1 / 16, 64)
