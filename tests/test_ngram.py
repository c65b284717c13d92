"""vLLM's n-gram drafts on the hierarchical cache (CPU engine): other drafts, the same cache, the same answers.

N-grams propose a number of tokens that varies by request and step, 0 included, and know no draft model.
"""

import pytest
from engine_tools import QUANTSPEC_CACHE, assert_same_or_tied, engine, generate, speculation_counts

G = 128
TIE = 0.125  # see test_lossless.py
NGRAM = {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_min": 2, "prompt_lookup_max": 4}
SIZE = {"max_model_len": 4096, "max_num_seqs": 4, "enable_prefix_caching": False}


@pytest.fixture(scope="module")
def prompts(books_4m, passage) -> list[list[int]]:
    """Passages, each said twice or more: what follows was there before."""
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(books_4m).encode(passage)
    parts = [tokens[i * 300 : i * 300 + n] for i, n in enumerate((20, G - 9, G, 200, 2 * G - 3, 333))]
    return [part * times + part[: len(part) // 2] for part, times in zip(parts, (12, 3, 2, 4, 3, 2), strict=True)]


@pytest.fixture(scope="module")
def expected(books_4m, prompts):
    """The cache with speculation off."""
    with engine(books_4m, **SIZE, **QUANTSPEC_CACHE) as llm:
        return generate(llm, prompts, 2 * G)


@pytest.fixture(scope="module")
def llm(books_4m, expected):
    with engine(books_4m, **SIZE, **QUANTSPEC_CACHE, speculative_config=NGRAM) as llm:
        yield llm


def test_lossless(llm, prompts, expected):
    answers = generate(llm, prompts, 2 * G)
    drafts, accepted = speculation_counts(llm)
    assert_same_or_tied(expected, answers, TIE)
    assert drafts > 50 and accepted[0] > 0.3 * drafts and 0 < accepted[-1] < drafts


def test_alone(llm, prompts, expected):
    assert_same_or_tied(expected[2:4], [generate(llm, [p], 2 * G)[0] for p in prompts[2:4]], TIE)


def test_a_seed_repeats(llm, prompts):
    answers = [generate(llm, [prompts[1]], 40, temperature=0.8, seed=i)[0].tokens for i in (1, 2, 1)]
    assert answers[0] == answers[2] != answers[1]
    assert all(0 <= t < 4096 for t in answers[0])
