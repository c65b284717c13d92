"""Models that see: the target reads a prompt's images, and drafts are text that goes on behind these.

With the language model of books-4m drafts are accepted as its are. What a random vision tower says of random pixels is
noise, but noise that the answer depends on.
"""

import pytest
import torch
from engine_tools import QUANTSPEC_CACHE, assert_same_or_tied, engine, quantspec, speculation_counts
from vision_tools import Picture, generate, prompt, without_processor, write_model

TIE = 0.125  # nats, as in test_lossless.py
MAX_TOKENS = 32
ENGINE = {"max_model_len": 2048, "max_num_seqs": 8, "max_num_batched_tokens": 512}
ENGINE |= {"mm_processor_cache_gb": 0, "skip_mm_profiling": True}  # there is no processor
LARGE, SMALL, OTHER = Picture(10, 12, 1), Picture(3, 5, 2), Picture(10, 12, 3)  # seeds 1 and 3: other pixels, as many tokens


@pytest.fixture(scope="module")
def tokens(books_4m, passage) -> list[int]:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(books_4m).encode(passage)


def images(count: int) -> dict:
    return {"limit_mm_per_prompt": {"image": count, "video": 0}}


def two_rounds(architecture: str, tokens: list[int]):
    """Prompts with images and without; then their beginnings again, of which whole pages are cached, with other ends."""
    beginnings = [
        [tokens[:40], LARGE, tokens[40:120], SMALL],  # a picture that ends behind a page, and one after it
        [tokens[200:600]],
        [tokens[:40], OTHER, tokens[40:120], SMALL],
        [SMALL],
    ]
    ends = [tokens[700:705], tokens[800:830], tokens[700:705], tokens[900:1000]]
    again = [tokens[1000:1040], tokens[1100:1103], tokens[1000:1040], tokens[1200:1203]]
    for round_ends in (ends, again):
        yield [prompt(architecture, [*begin, end]) for begin, end in zip(beginnings, round_ends, strict=True)]


@pytest.mark.parametrize("architecture", ["qwen2_5_vl", "mistral3"])  # with M-RoPE, and without
def test_the_answer_is_that_without_drafts(architecture, tokens, tmp_path, monkeypatch):
    without_processor(architecture, monkeypatch)
    model = write_model(architecture, tmp_path)
    first, again = two_rounds(architecture, tokens)
    with engine(model, **ENGINE, **images(2), **QUANTSPEC_CACHE) as llm:
        expected = [generate(llm, prompts, MAX_TOKENS) for prompts in (first, again)]
    one, _, other, _ = expected[0]
    assert one.top[0] != other.top[0]  # the pixels matter
    with engine(model, **ENGINE, **images(2), **quantspec(3)) as llm:
        for prompts, answers in zip((first, again), expected, strict=True):
            actual = generate(llm, prompts, MAX_TOKENS)
            assert_same_or_tied(answers, actual, TIE, architecture)
            cached = [answer.num_cached_tokens for answer in actual]
            assert cached == [answer.num_cached_tokens for answer in answers]
        assert min(cached[:3]) >= 128
        drafts, accepted = speculation_counts(llm)
    assert accepted[0] > 0.85 * drafts and accepted[2] > 0.5 * drafts


@pytest.mark.parametrize("architecture", ["qwen3_vl", "glm4v"])
def test_a_draft_with_the_models_own_weights_is_the_model(architecture, tokens, tmp_path, monkeypatch):
    """So it says the same, if it is asked at the same positions."""
    torch.manual_seed(0)
    without_processor(architecture, monkeypatch)
    model = write_model(architecture, tmp_path)
    prompts, _ = two_rounds(architecture, tokens)
    with engine(model, **ENGINE, **images(2), **quantspec(3, draft_weights="target", draft_kv="int8")) as llm:
        generate(llm, prompts, MAX_TOKENS)
        drafts, accepted = speculation_counts(llm)
    assert accepted[2] > 0.8 * drafts


def test_a_model_that_is_given_no_images(tokens, tmp_path, monkeypatch):
    """Its vision tower is not loaded."""
    without_processor("mistral3", monkeypatch)
    model = write_model("mistral3", tmp_path)
    with engine(model, **ENGINE, **images(0), **quantspec(3)) as llm:
        generate(llm, [prompt("mistral3", [tokens[start : start + 60]]) for start in range(0, 400, 50)], MAX_TOKENS)
        drafts, accepted = speculation_counts(llm)
    assert accepted[0] > 0.8 * drafts
