"""With speculation on, greedy output is that of the same cache with speculation off (design rule 1)."""

import pytest
import torch
from conftest import shared_path
from engine_tools import (
    LONG_DTYPE,
    QUANTSPEC_CACHE,
    SCHEDULE,
    assert_drafts_by_schedule,
    assert_same_or_tied,
    divergence,
    engine,
    generate,
    put_errors_into_drafts,
    quantspec,
    speculation_counts,
)

G = 128
LENGTHS = [1, 2, 63, G - 1, G, G + 1, 2 * G - 1, 2 * G, 2 * G + 1, 3 * G - 3, 3 * G + 1, 4 * G, 1000, 2048, 3000]
MAX_TOKENS = 40
# Logits are rounded to the model's dtype: two that differ by less than one rounding step (2**-8 of about 16, the size of
# these models' largest logits) are ordered by the shape of the batch, with speculation as without.
TIE = {"bfloat16": 0.125, "float32": 2e-3}


def prompts_of(tokens: list[int], lengths=LENGTHS) -> list[list[int]]:
    """Each from another place of the text, so that the prefix cache does not join them."""
    return [tokens[37 * i : 37 * i + n] for i, n in enumerate(lengths)]


@pytest.fixture(scope="module")
def prompts(books_4m, passage):
    from transformers import AutoTokenizer

    return prompts_of(AutoTokenizer.from_pretrained(books_4m).encode(passage))


@pytest.fixture(scope="module")
def expected(books_4m, prompts):
    """{dtype: answers with speculation off}, and how far the same engine is from itself on another batch.

    Of float32 in groups of 64, too.
    """
    answers = {}
    for dtype in ("bfloat16", "float32"):
        with engine(books_4m, dtype=dtype, enable_prefix_caching=False, **QUANTSPEC_CACHE) as llm:
            answers[dtype] = generate(llm, prompts, MAX_TOKENS)
            alone = [generate(llm, [p], MAX_TOKENS)[0] for p in prompts[:9]]
            assert_same_or_tied(answers[dtype], alone + answers[dtype][9:], TIE[dtype], "alone, off")
    with engine(books_4m, dtype="float32", block_size=64, **QUANTSPEC_CACHE) as llm:
        answers["float32 in groups of 64"] = generate(llm, prompts, MAX_TOKENS)
    return answers


@pytest.mark.parametrize("num_speculative_tokens", [1, 2, 5, 8])  # any mixture of numbers: test_draft_length_engine.py
def test_bfloat16(num_speculative_tokens, books_4m, prompts, expected):
    with engine(books_4m, **quantspec(num_speculative_tokens)) as llm:
        answers = generate(llm, prompts, MAX_TOKENS)
        drafts, accepted = speculation_counts(llm)
    tied = assert_same_or_tied(expected["bfloat16"], answers, TIE["bfloat16"], f"γ={num_speculative_tokens}")
    assert tied <= len(prompts) // 3
    assert len(accepted) == num_speculative_tokens and drafts > len(prompts)
    assert accepted[0] > 0.6 * drafts
    assert all(a >= b for a, b in zip(accepted, accepted[1:], strict=False))
    assert accepted[0] < drafts  # some were rejected, or the test shows little


@pytest.mark.parametrize("num_speculative_tokens, group_size", [(1, 128), (4, 64), (8, 128)])
def test_float32_with_a_draft_that_is_often_wrong(
    num_speculative_tokens, group_size, books_4m, prompts, expected, monkeypatch
):
    """In float32 there are no ties to hide behind; wrong drafts are put in by hand, so every kind of rejection occurs."""
    put_errors_into_drafts(monkeypatch, 0.7, seed=num_speculative_tokens)
    options = {"draft_weights": "target", "group_size": group_size}
    want = expected["float32" if group_size == 128 else "float32 in groups of 64"]
    with engine(books_4m, dtype="float32", **quantspec(num_speculative_tokens, **options)) as llm:
        answers = generate(llm, prompts, MAX_TOKENS)
        drafts, accepted = speculation_counts(llm)
    tied = assert_same_or_tied(want, answers, TIE["float32"], f"γ={num_speculative_tokens}")
    assert tied <= 1
    assert 0.1 * drafts < accepted[-1] < 0.9 * drafts


def test_compiled_engine(books_4m, prompts, expected):
    """torch.compile on, as `vllm serve` has it: target and draft are graphs of their own."""
    with engine(books_4m, enforce_eager=False, **quantspec(4)) as llm:
        answers = generate(llm, prompts, MAX_TOKENS)
        drafts, accepted = speculation_counts(llm)
    # The compiled target rounds elsewhere: compare where it is sure of itself.
    for e, a in zip(expected["bfloat16"], answers, strict=True):
        different = divergence(e, a)
        assert different is None or different[1] <= 2 * TIE["bfloat16"]
    assert accepted[0] > 0.6 * drafts


@pytest.mark.parametrize(
    "options",
    [
        {"draft_kv": "int8"},
        {"draft_weights": "target"},
        {"quantize_lm_head": False, "weight_rounding": "gptq", "weight_rotation": "hadamard", "draft_weights": "auto"},
        {"draft_weights": "mixed", "weight_bits": 6.0, "weight_rotation": "hadamard", "draft_activations": "fp8"},
        {"draft_weights": "int8"},
    ],
)
def test_options_change_the_draft_only(options, books_4m, prompts, expected):
    with engine(books_4m, **quantspec(4, **options)) as llm:
        answers = generate(llm, prompts, MAX_TOKENS)
        drafts, accepted = speculation_counts(llm)
    assert_same_or_tied(expected["bfloat16"], answers, TIE["bfloat16"], str(options))
    assert accepted[0] > (0.9 if options.get("draft_weights") == "target" else 0.6) * drafts


def test_int4_weights_in_float32(books_4m, prompts, expected):
    """On this package's kernel: vLLM's takes 16 bits only."""
    with engine(books_4m, dtype="float32", **quantspec(4)) as llm:
        answers = generate(llm, prompts, MAX_TOKENS)
        drafts, accepted = speculation_counts(llm)
    assert assert_same_or_tied(expected["float32"], answers, TIE["float32"]) <= 1
    assert 0.6 * drafts < accepted[0] < drafts


def test_fewer_drafts_for_larger_batches(books_4m, prompts, expected):
    options = quantspec(4, num_speculative_tokens_per_batch_size=SCHEDULE)
    with engine(books_4m, max_num_seqs=16, enable_prefix_caching=False, **options) as llm:
        assert_drafts_by_schedule(llm, prompts, expected["bfloat16"], MAX_TOKENS, TIE["bfloat16"])


def test_novels_on_books_30m(books_30m):
    """A larger model, head size 128: lengths around multiples of the group, and 5k tokens of a novel."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(books_30m)
    lengths = [1, G + 1, 2 * G - 1, 3 * G - 2, 1500]
    prompts = []
    for name, of_name in (("dracula", [*lengths, 5000]), ("emma", lengths[:1]), ("martin-eden", lengths[3:])):
        tokens = tokenizer.encode(shared_path(f"data/books/{name}.txt").read_text("utf-8"))[5000:]
        prompts += prompts_of(tokens, of_name)
    size = {"max_model_len": 6 * 1024, "max_num_seqs": 8, "dtype": LONG_DTYPE}
    with engine(books_30m, **size, **QUANTSPEC_CACHE) as llm:
        want = generate(llm, prompts, 32)
    with engine(books_30m, **size, **quantspec(5)) as llm:
        got = generate(llm, prompts, 32)
        drafts, accepted = speculation_counts(llm)
    assert_same_or_tied(want, got, TIE[LONG_DTYPE])
    assert drafts and accepted[0] > 0.7 * drafts and torch.tensor(accepted).sum() > 0
