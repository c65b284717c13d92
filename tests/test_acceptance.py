"""Acceptance of the self-draft on text that the model has not seen. The whole measurement: benchmarks/acceptance.py."""

import pytest
from conftest import shared_path
from engine_tools import LONG_DTYPE, engine, quantspec, speculation_counts
from vllm import SamplingParams

NOVELS = ["dracula", "emma", "martin-eden"]
DRAFTED = 4
TOKENS = 128
FIRST, MEAN = 0.92, 0.80


def excerpts(tokens: list[int], context: int, number: int) -> list[list[int]]:
    last = len(tokens) - context
    return [tokens[start : start + context] for start in (last * (2 * i + 1) // (2 * number) for i in range(number))]


@pytest.fixture(scope="module")
def novels(books_30m):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(books_30m)
    return [tokenizer.encode(shared_path(f"data/books/{n}.txt").read_text(encoding="utf-8")) for n in NOVELS]


@pytest.fixture(scope="module")
def llm(books_30m):
    with engine(books_30m, max_model_len=9 * 1024, max_num_seqs=6, dtype=LONG_DTYPE, **quantspec(DRAFTED)) as llm:
        yield llm


@pytest.mark.parametrize("context, number", [(4096, 1), (8192, 1)])
def test_acceptance(context, number, llm, novels):
    """Over excerpts of all three novels together: greedy, default options."""
    before = speculation_counts(llm)
    params = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": p} for tokens in novels for p in excerpts(tokens, context, number)]
    llm.generate(prompts, params, use_tqdm=False)
    after = speculation_counts(llm)
    drafts = after[0] - before[0]
    accepted = [(b - a) / drafts for a, b in zip(before[1], after[1], strict=True)]
    mean = sum(accepted) / DRAFTED
    print(f"{context} tokens, {drafts} drafts: {[round(a, 3) for a in accepted]}, mean {mean:.3f}")
    assert drafts >= len(prompts) * TOKENS / (DRAFTED + 1) - len(prompts)
    assert accepted[0] >= FIRST and mean >= MEAN
    assert accepted[-1] < 1  # some were rejected: the draft is not the target
