"""The cache in 4 bits (``--kv-cache-dtype quantspec_int4``): lossless under speculation, shared, preempted; how far it is
from the one in 8 bits."""

import pytest
from engine_tools import (
    QUANTSPEC_CACHE,
    RULE_3,
    Answer,
    assert_same_or_tied,
    divergence,
    engine,
    generate,
    preemptions,
    put_errors_into_drafts,
    quantspec,
    speculation_counts,
)

G = 128
LENGTHS = [1, 63, G - 1, 2 * G, 2 * G + 1, 3 * G - 3, 1000, 2048, 3000]
MAX_TOKENS = 40
TIE = {"bfloat16": 0.125, "float32": 2e-3}  # see test_lossless.py
INT4 = {"kv_cache_dtype": "quantspec_int4"}
# What 4 bits of the older tokens may move a log-probability of this model's likely tokens, in nats.
READ_IN_4_BITS = 1.0


@pytest.fixture(scope="module")
def tokens(books_4m, passage):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(books_4m).encode(passage)


@pytest.fixture(scope="module")
def prompts(tokens):
    return [tokens[37 * i : 37 * i + n] for i, n in enumerate(LENGTHS)]


@pytest.fixture(scope="module")
def expected(books_4m, prompts):
    """Answers of the cache in 4 bits, speculation off, by dtype; and of the one in 8 bits."""
    answers = {}
    for name, arguments in {
        "bfloat16": INT4,
        "float32": {**INT4, "dtype": "float32"},
        "float32 in groups of 64": {**INT4, "dtype": "float32", "block_size": 64},
        "in 8 bits": {**QUANTSPEC_CACHE, "dtype": "float32"},
    }.items():
        with engine(books_4m, enable_prefix_caching=False, **arguments) as llm:
            answers[name] = generate(llm, prompts, MAX_TOKENS)
    return answers


def steps_in_common(a: Answer, b: Answer) -> int:
    different = divergence(a, b)
    return different[0] if different else len(a.tokens)


def test_it_is_near_the_cache_in_8_bits(expected):
    """While both wrote the same, their likeliest tokens' log-probabilities are near; and they are not the same cache."""
    differences = []
    for four, eight in zip(expected["float32"], expected["in 8 bits"], strict=True):
        for step in range(steps_in_common(eight, four)):
            likely = [t for t, logprob in eight.top[step].items() if logprob > -2 and t in four.top[step]]
            differences += [abs(eight.top[step][t] - four.top[step][t]) for t in likely]
    assert len(differences) > 200
    assert 1e-3 < sum(differences) / len(differences) < 0.1 and max(differences) < READ_IN_4_BITS
    for four, eight in list(zip(expected["float32"], expected["in 8 bits"], strict=True))[:3]:  # shorter than a window
        assert four.tokens == eight.tokens


def test_speculation_is_lossless(books_4m, prompts, expected):
    with engine(books_4m, **INT4, **quantspec(4)) as llm:
        answers = generate(llm, prompts, MAX_TOKENS)
        drafts, accepted = speculation_counts(llm)
    tied = assert_same_or_tied(expected["bfloat16"], answers, TIE["bfloat16"])
    assert tied <= len(prompts) // 3 and 0.6 * drafts < accepted[0] < drafts


@pytest.mark.parametrize("group_size", [64, 128])
def test_speculation_is_lossless_in_float32(group_size, books_4m, prompts, expected, monkeypatch):
    """Without ties to hide behind, and with drafts that are often wrong."""
    put_errors_into_drafts(monkeypatch, 0.7, seed=group_size)
    options = quantspec(4, draft_weights="target", group_size=group_size)
    with engine(books_4m, dtype="float32", **INT4, **options) as llm:
        answers = generate(llm, prompts, MAX_TOKENS)
        drafts, accepted = speculation_counts(llm)
    want = expected["float32" if group_size == 128 else "float32 in groups of 64"]
    assert assert_same_or_tied(want, answers, TIE["float32"]) <= 1
    assert 0.1 * drafts < accepted[-1] < 0.9 * drafts


@pytest.fixture(scope="module")
def llm(books_4m, expected):
    with engine(books_4m, max_num_seqs=4, max_num_batched_tokens=512, **INT4, **quantspec(4)) as llm:
        yield llm


def test_chunks_of_a_prompt(llm, prompts, expected):
    """Chunks read what came before from pages of 4 bits, where one pass had it exact."""
    llm.reset_prefix_cache()
    answers = generate(llm, prompts, MAX_TOKENS)
    for want, got in zip(expected["bfloat16"][:6], answers, strict=False):  # of one chunk
        different = divergence(want, got)
        assert different is None or different[1] <= TIE["bfloat16"]
    for want, got in zip(expected["bfloat16"][6:], answers[6:], strict=True):
        different = divergence(want, got)
        assert different is None or different[1] <= READ_IN_4_BITS


def test_a_shared_prefix(llm, tokens):
    """The first computes the pages, the others read them in the step that completes them, and in later ones."""
    llm.reset_prefix_cache()
    prompts = [tokens[: 8 * G + n] for n in (1, 5, G // 2, G + 1)]
    together = generate(llm, prompts, 24)
    again = generate(llm, prompts, 24)
    assert all(a.num_cached_tokens >= 8 * G for a in (*together[1:], *again))
    assert_same_or_tied(again[1:], together[1:], RULE_3)
    assert [a.tokens for a in generate(llm, prompts, 24)] == [a.tokens for a in again]


def test_preemption(books_4m, tokens, expected):
    """A pool that holds the prompts and half of the answers: requests are preempted and start again, and none is lost."""
    prompts = [tokens[60 * i : 60 * i + 90 + 10 * i] for i in range(6)]
    size = {"max_model_len": 1024, "max_num_seqs": 6, "num_gpu_blocks_override": 40}
    with engine(books_4m, enable_prefix_caching=False, **size, **INT4, **quantspec(4)) as llm:
        halves = generate(llm, prompts[:3], 170) + generate(llm, prompts[3:], 170)
        assert preemptions(llm) == 0
        together = generate(llm, prompts, 170)
        assert preemptions(llm) >= 3 and [len(a.tokens) for a in together] == [170] * 6
    for want, got in zip(halves, together, strict=True):  # what was recomputed as a prompt is read exactly
        different = divergence(want, got)
        assert different is None or different[1] <= READ_IN_4_BITS
