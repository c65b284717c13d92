"""Prefix caching under speculation. A hit starts without an exact copy of its prefix (design rule 3): those tokens are read
in 8 bits even where they are recent. The difference this makes is bounded below; nothing else may differ."""

import pytest
from engine_tools import assert_close, assert_same_or_tied, engine, generate, quantspec

G = 128


@pytest.fixture(scope="module")
def tokens(books_4m, passage):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(books_4m).encode(passage)


@pytest.fixture(scope="module")
def uncached(books_4m, tokens):
    """What the engine answers without prefix caching, with speculation."""
    with engine(books_4m, enable_prefix_caching=False, **quantspec(4)) as llm:
        suffixes = [1, 2, 5, G // 2, G - 1, G, G + 1]
        prompts = [tokens[: 8 * G + n] for n in suffixes]
        return prompts, generate(llm, prompts, 32)


@pytest.fixture(scope="module")
def llm(books_4m, uncached):  # one engine at a time in a process: the other is gone by now
    with engine(books_4m, enable_prefix_caching=True, **quantspec(4)) as llm:
        yield llm


def test_after_the_first_has_finished(llm, uncached, tokens):
    """The first asks for one token: its pages are used in the very next step, when it is gone already."""
    prompts, expected = uncached
    llm.reset_prefix_cache()
    (first,) = generate(llm, [tokens[: 8 * G]], 1)
    assert len(first.tokens) == 1 and first.num_cached_tokens == 0
    for prompt, want in zip(prompts, expected, strict=True):
        (got,) = generate(llm, [prompt], 32)
        assert got.num_cached_tokens >= 8 * G  # more, once an earlier one of these has left a page of its suffix
        assert_close([want], [got])


def test_at_the_same_time(llm, uncached):
    """One computes the shared pages, the others read them in the very step that completes them."""
    prompts, expected = uncached
    llm.reset_prefix_cache()
    got = generate(llm, prompts, 32)
    assert_close(expected, got)
    assert got[0].num_cached_tokens == 0 and all(a.num_cached_tokens >= 8 * G for a in got[1:])
    assert [a.num_cached_tokens for a in generate(llm, prompts, 32)][:1] == [8 * G]


def test_a_prompt_of_whole_pages_recomputes_its_last(llm, tokens):
    llm.reset_prefix_cache()
    prompt = tokens[: 6 * G]
    (first,) = generate(llm, [prompt], 24)
    (again,) = generate(llm, [prompt], 24)
    assert again.num_cached_tokens == 5 * G  # the last token is needed for its logits
    assert_close([first], [again])


def test_generated_tokens_are_reused(llm, tokens):
    """A conversation: the answer, drafts among it, becomes part of the next prompt, and is read from its pages."""
    llm.reset_prefix_cache()
    prompt = tokens[: 2 * G - 7]
    (first,) = generate(llm, [prompt], 2 * G + 30)
    longer = prompt + first.tokens
    (cached,) = generate(llm, [longer], 24)
    assert cached.num_cached_tokens >= 3 * G
    llm.reset_prefix_cache()
    (fresh,) = generate(llm, [longer], 24)
    assert fresh.num_cached_tokens == 0
    assert_close([fresh], [cached])


@pytest.mark.parametrize("answer_tokens", [1, 2, 3, 4, 5, 6, 7, 8, 9])
def test_a_page_that_the_last_step_completed_is_never_offered_unquantized(llm, tokens, answer_tokens):
    """The first request ends while drafts complete a page: whatever is offered afterwards must hold real values."""
    prompt = tokens[3 : 3 + 3 * G - 4]
    llm.reset_prefix_cache()
    (first,) = generate(llm, [prompt], answer_tokens)
    longer = prompt + first.tokens + tokens[:20]
    (cached,) = generate(llm, [longer], 16)
    llm.reset_prefix_cache()
    (fresh,) = generate(llm, [longer], 16)
    assert cached.num_cached_tokens in (2 * G, 3 * G)
    assert_close([fresh], [cached])


def test_speculation_does_not_change_a_cached_answer(books_4m, tokens):
    """Same hits, speculation off and on: same output, not only up to rule 3."""
    prompts = [tokens[: 5 * G + n] for n in (1, 3, G - 1)]
    answers = []
    for arguments in ({"attention_backend": "QUANTSPEC"}, quantspec(4, draft_weights="target")):
        with engine(books_4m, dtype="float32", **arguments) as other:
            generate(other, [tokens[: 5 * G]], 1)
            answers.append(generate(other, prompts, 32))
    assert [a.num_cached_tokens for a in answers[0]] == [a.num_cached_tokens for a in answers[1]] == [5 * G] * 3
    assert_same_or_tied(answers[0], answers[1], 2e-3)
