"""N-gram drafts on the hierarchical cache (CPU engine) where vLLM's own CPU engine, or a check of ours, was in the way."""

from engine_tools import QUANTSPEC_CACHE, assert_same_or_tied, engine, generate, speculation_counts
from test_ngram import NGRAM, SIZE, prompts  # noqa: F401


def test_a_seed_and_a_prompt_of_several_chunks(books_4m, prompts):  # noqa: F811
    size = SIZE | {"max_num_batched_tokens": 300, "max_num_seqs": 2}
    with engine(books_4m, **size, **QUANTSPEC_CACHE, speculative_config=NGRAM) as llm:
        first, second = (generate(llm, prompts[3:5], 40, temperature=0.8, seed=4) for _ in range(2))
    assert [a.tokens for a in first] == [a.tokens for a in second]


def test_float32(books_4m, prompts):  # noqa: F811
    """No draft weights, no INT4 kernels: the dtype is the model's own affair."""
    arguments = SIZE | QUANTSPEC_CACHE | {"dtype": "float32"}
    with engine(books_4m, **arguments) as llm:
        expected = generate(llm, prompts[:3], 60)
    with engine(books_4m, **arguments, speculative_config=NGRAM) as llm:
        assert_same_or_tied(expected, generate(llm, prompts[:3], 60), 1e-3)
        assert speculation_counts(llm)[1][0] > 0
