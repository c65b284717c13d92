"""Sampling parameters under speculation: what is drawn has the distribution that it has with speculation off."""

import json
import math
import re
from collections import Counter
from collections.abc import Hashable, Sequence

import pytest
import torch
from engine_tools import (
    QUANTSPEC_CACHE,
    Answer,
    assert_same_or_tied,
    engine,
    generate,
    quantspec,
    speculation_counts,
)
from vllm import LLM, SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import StructuredOutputsParams

G = 128
TIE = 0.125  # see test_lossless.py
ALPHA = 1e-3
DRAWS = 480
# The first token comes from the prefill; the second to fourth are drafts that were accepted, or drawn in their place.
TOKENS = 4
# Different seeds for the two samples: the test below is one of independent samples.
SEEDS = {"off": 0, "on": 1_000_000}
SIZE = {"max_model_len": 2048, "max_num_seqs": 128}
TRUNCATED = {"temperature": 1.0, "top_k": 12, "top_p": 0.9}
# In float32 like it: which tokens min_p keeps depends on rounding as well.
BIASED = {
    "temperature": 0.9,
    "min_p": 0.05,
    "top_p": 0.95,
    "repetition_penalty": 1.2,
    "logit_bias": {token: 1.5 for token in range(5, 4000, 7)},
}
DISTRIBUTIONS = {
    "temperature 0.8": {"temperature": 0.8},
    "penalties": {"temperature": 0.8, "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.2},
}


# --- Two samples, one distribution? -----------------------------------------------------------------------------------


def p_value(a: Sequence[Hashable], b: Sequence[Hashable], at_least: int = 10) -> float:
    """Of Pearson's two-sample chi-square test; categories seen fewer than ``at_least`` times in all are one."""
    counts_a, counts_b = Counter(a), Counter(b)
    rare = {c for c in counts_a | counts_b if counts_a[c] + counts_b[c] < at_least}
    table = [(counts_a[c], counts_b[c]) for c in (counts_a | counts_b).keys() - rare]
    table.append((sum(counts_a[c] for c in rare), sum(counts_b[c] for c in rare)))
    ratio = math.sqrt(len(b) / len(a))
    statistic = sum((x * ratio - y / ratio) ** 2 / (x + y) for x, y in table if x + y)
    freedom = sum(x + y > 0 for x, y in table) - 1
    half = torch.tensor([freedom, statistic], dtype=torch.float64) / 2
    return torch.special.gammaincc(half[0], half[1]).item()


def statistics(a: list[tuple[int, ...]], b: list[tuple[int, ...]]) -> dict[str, float]:
    """p-values: tokens after the first, one by one, then pairs and whole draws hashed to bins."""
    views = {f"token {i + 1}": (lambda draw, i=i: draw[i]) for i in range(1, TOKENS)}
    views["tokens 2 and 3"] = lambda draw: (draw[1] * 31 + draw[2]) % 61
    views["tokens 3 and 4"] = lambda draw: (draw[2] * 31 + draw[3]) % 61
    views["all"] = lambda draw: (((draw[0] * 31 + draw[1]) * 31 + draw[2]) * 31 + draw[3]) % 127
    return {name: p_value([view(x) for x in a], [view(x) for x in b]) for name, view in views.items()}


def draw(llm: LLM, prompt: list[int], first_seed: int, count: int = DRAWS, **sampling) -> list[tuple[int, ...]]:
    """The first tokens of ``count`` continuations, each with its own seed, all from the same cached prefix."""
    generate(llm, [prompt], 1)
    params = [
        SamplingParams(max_tokens=TOKENS, ignore_eos=True, seed=first_seed + i, detokenize=False, **sampling)
        for i in range(count)
    ]
    outputs = llm.generate([{"prompt_token_ids": prompt}] * count, params, use_tqdm=False)
    return [tuple(output.outputs[0].token_ids) for output in outputs]


@pytest.fixture(scope="module")
def tokens(books_4m, passage):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(books_4m).encode(passage)


@pytest.fixture(scope="module")
def prefix(tokens):
    return tokens[: 2 * G + 10]  # two pages from the prefix cache, ten tokens to compute: cheap to draw from


GREEDY = {
    "repetition_penalty": {"repetition_penalty": 1.4},
    "presence_penalty": {"presence_penalty": 1.5},
    "frequency_penalty": {"frequency_penalty": 0.8},
    "top_k, top_p": {"top_k": 3, "top_p": 0.5},  # without effect at temperature 0
    "min_p, top_k": {"min_p": 0.9, "top_k": 3},  # the same
    "logit_bias": {"logit_bias": {token: 2.0 for token in range(0, 4096, 5)}, "repetition_penalty": 1.2},
    "min_tokens": {"min_tokens": 30, "ignore_eos": False},
    "allowed_token_ids": {"allowed_token_ids": list(range(0, 4096, 3))},
    "bad_words": {"bad_words": ["the", "and", "a", "was"]},
}


@pytest.fixture(scope="module")
def off(books_4m, prefix, tokens):
    """Everything that is asked of the engine with speculation off: its draws, and its greedy answers."""
    with engine(books_4m, **SIZE, logprobs_mode="processed_logprobs", **QUANTSPEC_CACHE) as llm:
        draws = {name: draw(llm, prefix, SEEDS["off"], **s) for name, s in DISTRIBUTIONS.items()}
        hotter = {t: draw(llm, prefix, SEEDS["on"], temperature=t) for t in (0.8, 1.3)}
        prompts = [tokens[7:400], tokens[: G + 3], tokens[900:907]]
        greedy = {name: generate(llm, prompts, 40, **s) for name, s in GREEDY.items()}
        plain = generate(llm, prompts, 40)
    return {"draws": draws, "hotter": hotter, "prompts": prompts, "greedy": greedy, "plain": plain}


@pytest.fixture(scope="module")
def greedy_drafts(books_4m, prefix, off):  # one engine at a time in a process
    """Draws of the engine whose drafts are the draft model's likeliest tokens, and their acceptance."""
    with engine(books_4m, **SIZE, **quantspec(TOKENS - 1, draft_sample_method="greedy")) as llm:
        draws = {name: draw(llm, prefix, SEEDS["on"], **s) for name, s in DISTRIBUTIONS.items()}
        return draws, speculation_counts(llm)


@pytest.fixture(scope="module")
def truncated(books_4m, prefix, off, greedy_drafts):
    """{drafts: (draws with top_k and top_p, draws with min_p and logit_bias)}, in float32.

    What they keep changes with a token's rank: in 16 bits many logits are equal or nearly so, and then rounding, which
    depends on the shape of the batch, decides which tokens have a share at all.
    """
    draws, prompt = {}, prefix[: 2 * G + 1]  # all but its last token cached: the first token comes from a decode row, too
    for name, arguments in {
        "off": QUANTSPEC_CACHE,
        "greedy": quantspec(TOKENS - 1, draft_weights="target", draft_sample_method="greedy"),
        "probabilistic": quantspec(TOKENS - 1, draft_weights="target"),
    }.items():
        with engine(books_4m, dtype="float32", **SIZE, **arguments) as llm:
            seed = SEEDS["off" if name == "off" else "on"]
            draws[name] = [draw(llm, prompt, seed, **TRUNCATED), draw(llm, prompt, seed, DRAWS // 2, **BIASED)]
            if name != "off":
                count, accepted = speculation_counts(llm)
                assert 0.2 * count < accepted[0] < 0.9 * count
    return draws


@pytest.fixture(scope="module")
def llm(books_4m, off, greedy_drafts, truncated):
    """The engine with speculation, as it is by default: drafts are sampled."""
    options = {
        "logprobs_mode": "processed_logprobs",
        # A model this small would fill its JSON with blanks.
        "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
    }
    with engine(books_4m, **SIZE, **options, **quantspec(TOKENS - 1)) as llm:
        yield llm


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("drafts", ["greedy", "probabilistic"])
def test_draws_have_the_targets_distribution(name, drafts, off, greedy_drafts, request, prefix):
    if drafts == "greedy":
        draws, (count, accepted) = greedy_drafts[0][name], greedy_drafts[1]
    else:
        llm = request.getfixturevalue("llm")
        before = speculation_counts(llm)
        draws = draw(llm, prefix, SEEDS["on"], **DISTRIBUTIONS[name])
        after = speculation_counts(llm)
        count, accepted = after[0] - before[0], [a - b for a, b in zip(after[1], before[1], strict=True)]
    p = statistics(off["draws"][name], draws)
    print(f"{name}, {drafts} drafts, accepted {[round(a / count, 3) for a in accepted]}: {p}")
    assert min(p.values()) > ALPHA, p
    # Some of the drafts are accepted and some are not, or the test shows little. Drafts know the temperature only.
    assert 0.2 * count < accepted[0] < count
    if drafts == "probabilistic" and name == "temperature 0.8":
        assert accepted[0] > 0.7 * count


@pytest.mark.parametrize("index, what", [(0, "top_k and top_p"), (1, "min_p and logit_bias")])
@pytest.mark.parametrize("drafts", ["greedy", "probabilistic"])
def test_draws_with_parameters_that_exclude_tokens(drafts, index, what, truncated):
    p = statistics(truncated["off"][index], truncated[drafts][index])
    print(f"{what}, {drafts} drafts: {p}")
    assert min(p.values()) > ALPHA, p


def test_the_statistic_sees_min_p_and_logit_bias(truncated):
    """Drafts know neither: were they accepted as without, the draws would differ as these do."""
    p = statistics(truncated["off"][1], truncated["probabilistic"][0])
    assert min(p.values()) < ALPHA, p


def test_the_statistic_rejects_another_temperature_and_accepts_the_same(off):
    expected, others = off["draws"]["temperature 0.8"], off["hotter"]
    assert min(statistics(expected, others[0.8]).values()) > ALPHA
    p = statistics(expected, others[1.3])
    print(f"temperature 1.3 against 0.8: {p}")
    assert max(p.values()) < ALPHA, p
    # Token 2 of one draw with token 3 of another: each has the right distribution, the pair has not.
    mixed = [(a[0], a[1], b[2], b[3]) for a, b in zip(expected, expected[1:] + expected[:1], strict=True)]
    p = statistics(mixed, others[0.8])
    assert p["token 3"] > ALPHA > p["tokens 2 and 3"], p


# --- Greedy, with parameters that change the target's logits ----------------------------------------------------------


@pytest.mark.parametrize("name", GREEDY)
def test_greedy_with_parameters_is_that_of_speculation_off(name, llm, off):
    before = speculation_counts(llm)
    answers = generate(llm, off["prompts"], 40, **GREEDY[name])
    after = speculation_counts(llm)
    assert_same_or_tied(off["greedy"][name], answers, TIE, name)
    if "top_k" not in name and name != "min_tokens":
        assert [a.tokens for a in answers] != [a.tokens for a in off["plain"]]
    assert after[1][0] > before[1][0]


def test_greedy_requests_in_a_batch_with_sampled_ones(llm, off):
    prompts = off["prompts"]
    params = [
        SamplingParams(temperature=t, max_tokens=40, ignore_eos=True, logprobs=5, seed=i)
        for i, t in enumerate([0.0, 0.8, 0.0, 1.5, 0.0])
    ]
    batch = [prompts[0], prompts[0], prompts[1], prompts[1], prompts[2]]
    outputs = llm.generate([{"prompt_token_ids": p} for p in batch], params, use_tqdm=False)
    answers = [
        Answer(list(c.token_ids), c.finish_reason, [{t: lp.logprob for t, lp in s.items()} for s in c.logprobs])
        for c in (o.outputs[0] for o in outputs)
    ]
    assert_same_or_tied(off["plain"], answers[::2], TIE)
    assert answers[1].tokens != answers[0].tokens and answers[3].tokens != answers[2].tokens


# --- Sampled ----------------------------------------------------------------------------------------------------------


def test_top_k_and_top_p_hold_at_every_position(llm, tokens):
    """Log-probabilities are those after top_k and top_p: what they exclude has -inf, and is never drawn."""
    prompts = [tokens[50 * i : 50 * i + 60] for i in range(24)]
    k_answers = generate(llm, prompts, 24, temperature=1.0, top_k=3, seed=1)
    p_answers = generate(llm, prompts, 24, temperature=1.0, top_p=0.4, seed=1)
    for answer in k_answers + p_answers:
        for token, top in zip(answer.tokens, answer.top, strict=True):
            assert top[token] > -math.inf
    for answer in k_answers:
        for top in answer.top:
            kept = [lp for lp in top.values() if lp > -math.inf]
            assert sum(lp > min(kept) for lp in kept) < 3  # the third may have equals
    assert any(len({a.tokens[i] for a in k_answers}) > 3 for i in range(24))
    (one,) = generate(llm, prompts[:1], 24)
    (top_1,) = generate(llm, prompts[:1], 24, temperature=1.0, top_k=1, seed=5)
    assert_same_or_tied([one], [top_1], TIE)


def test_a_seed_gives_the_same_tokens_again(llm, tokens):
    """Alone, so that the batch has no say in the rounding, and from the same cached prefix; another seed gives others."""
    prompt = tokens[30:230]
    generate(llm, [prompt], 1)
    runs = [generate(llm, [prompt], 40, temperature=0.8, seed=s)[0].tokens for s in (11, 11, 12)]
    generate(llm, [prompt], 5, temperature=0.8)  # no seed: draws from the engine's own generator
    runs.append(generate(llm, [prompt], 40, temperature=0.8, seed=11)[0].tokens)
    assert runs[0] == runs[1] == runs[3]
    assert runs[0] != runs[2]


def test_several_completions_of_one_prompt(llm, tokens):
    params = SamplingParams(n=3, temperature=1.0, max_tokens=30, ignore_eos=True, seed=3)
    (output,) = llm.generate([{"prompt_token_ids": tokens[:200]}], params, use_tqdm=False)
    completions = [tuple(c.token_ids) for c in output.outputs]
    assert [len(c) for c in completions] == [30] * 3
    assert len(set(completions)) == 3
    assert [c.index for c in output.outputs] == [0, 1, 2]


# --- Structured outputs -----------------------------------------------------------------------------------------------

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


CHOICES = ["the carriage", "the castle", "a wolf"]
REGEX = r"[a-z]{3,8} and [a-z]{3,8}, [0-9]{4}"
STRUCTURES = {
    "choice": {"choice": CHOICES},
    "regex": {"regex": REGEX},
    "json": {"json": SCHEMA},
}


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("kind", STRUCTURES)
def test_structured_outputs(llm, tokens, kind, temperature):
    """Drafts know nothing of the grammar: what breaks it must be rejected, inside a draft as at its end."""
    params = [
        SamplingParams(
            temperature=temperature,
            max_tokens=100,
            seed=i,
            structured_outputs=StructuredOutputsParams(**STRUCTURES[kind]),
        )
        for i in range(4)
    ]
    prompts = [{"prompt_token_ids": tokens[60 * i : 60 * i + 150]} for i in range(4)]
    # A request without a grammar in the same batch is not touched by the others'.
    free = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)
    *outputs, plain = llm.generate([*prompts, prompts[0]], [*params, free], use_tqdm=False)
    for output in outputs:
        text = output.outputs[0].text
        assert output.outputs[0].finish_reason == "stop", text
        if kind == "choice":
            assert text in CHOICES
        elif kind == "regex":
            assert re.fullmatch(REGEX, text), text
        else:
            value = json.loads(text)
            assert value.keys() == {"name", "age"} and 0 <= value["age"] <= 99 and len(value["name"]) <= 12
    (alone,) = generate(llm, [prompts[0]["prompt_token_ids"]], 30)
    assert_same_or_tied([alone], [Answer(list(plain.outputs[0].token_ids), None, [])], TIE)


# --- Refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -7}, {"repetition_penalty": 0.0}])
def test_bad_parameters_are_refused_before_they_reach_the_engine(bad):
    with pytest.raises(VLLMValidationError, match=next(iter(bad))):
        SamplingParams(**bad)
