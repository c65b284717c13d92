"""Requests come, wait, are preempted, stop and are aborted: each gets its own tokens, nothing lost, nothing extra."""

import pytest
from engine_tools import (
    Answer,
    abort_one_of_three,
    assert_same_or_tied,
    divergence,
    engine,
    generate,
    preemptions,
    quantspec,
    speculation_counts,
)
from vllm import LLM, SamplingParams

from vllm_quantspec.format import window_blocks_per_request

G = 128
TIE = 0.125  # see test_lossless.py
# Recomputing a preempted request's generated tokens as one prefill reads them exact, where decoding had read the older of
# them in 8 bits: keys and values of later layers move by that error.
RECOMPUTED = 0.25


@pytest.fixture(scope="module")
def tokens(books_4m, passage):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(books_4m).encode(passage)


@pytest.fixture(scope="module")
def llm(books_4m):
    with engine(books_4m, max_num_seqs=4, enable_prefix_caching=False, **quantspec(4)) as llm:
        yield llm


def free_blocks(llm: LLM) -> int:
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    return scheduler.kv_cache_manager.block_pool.get_num_free_blocks()


def test_more_requests_than_seats_of_very_different_length(llm, tokens):
    free = free_blocks(llm)
    lengths = [1, 900, 17, 2 * G, 3 * G + 5, 40, 1800, G, 5, 700, 2, 64]
    prompts = [tokens[11 * i : 11 * i + n] for i, n in enumerate(lengths)]
    max_tokens = [1, 5, 60, 2, 33, 1, 12, 100, 7, 3, 150, 20]
    together = generate(llm, prompts, max_tokens)
    alone = [generate(llm, [p], n)[0] for p, n in zip(prompts, max_tokens, strict=True)]
    assert [len(a.tokens) for a in together] == max_tokens
    assert {a.finish_reason for a in together} == {"length"}
    assert_same_or_tied(alone, together, TIE)
    assert free_blocks(llm) == free


@pytest.mark.parametrize("max_tokens", range(1, 12))
def test_max_tokens_inside_a_draft(llm, tokens, max_tokens):
    prompt = tokens[100:500]
    (long,) = generate(llm, [prompt], 16)
    (short,) = generate(llm, [prompt], max_tokens)
    assert len(short.tokens) == max_tokens and short.finish_reason == "length"
    assert_same_or_tied([Answer(long.tokens[:max_tokens], None, long.top)], [short], TIE)


def test_end_of_sequence_and_stop_token_inside_a_draft(llm, tokens):
    """Make each of the generated tokens the one to stop at: the answer ends there, and with it."""
    prompt = tokens[200:420]
    (free,) = generate(llm, [prompt], 14)
    for position, token in enumerate(free.tokens):
        expected = free.tokens[: free.tokens.index(token) + 1]
        (got,) = generate(llm, [prompt], 14, stop_token_ids=[token])
        if divergence(Answer(expected, None, free.top), got) is None:
            assert got.finish_reason == "stop", position
        else:
            assert_same_or_tied([Answer(expected, None, free.top)], [got], TIE)


def test_stop_string_inside_a_draft(llm, tokens):
    prompt = {"prompt_token_ids": tokens[200:420]}
    greedy = {"temperature": 0.0, "max_tokens": 24, "ignore_eos": True}
    text = llm.generate([prompt], SamplingParams(**greedy), use_tqdm=False)[0].outputs[0].text
    stop = text[len(text) // 2 :].split()[0]
    stopped = llm.generate([prompt], SamplingParams(**greedy, stop=[stop]), use_tqdm=False)[0].outputs[0]
    assert stopped.finish_reason == "stop" and stopped.stop_reason == stop
    assert text.startswith(stopped.text) and stop not in stopped.text


def test_abort_in_mid_draft(llm, tokens):
    """One of three requests is aborted between steps: the other two go on, and the pool gets its blocks back."""
    free = free_blocks(llm)
    prompts = [tokens[9 * i : 9 * i + 200 + 50 * i] for i in range(3)]
    expected = [generate(llm, [p], 40)[0] for p in prompts]
    answers = abort_one_of_three(llm, prompts, 40)
    assert_same_or_tied(expected[::2], answers[::2], TIE)
    assert free_blocks(llm) == free


def test_up_to_the_models_length(llm, tokens):
    """The last tokens that fit: no draft may write past the model's length."""
    limit = llm.llm_engine.model_config.max_model_len
    prompts = [tokens[: limit - 9], tokens[50 : 50 + limit - 40], tokens[:30]]
    answers = generate(llm, prompts, [100, 100, 20])
    assert [len(a.tokens) for a in answers] == [9, 40, 20]
    assert [a.finish_reason for a in answers] == ["length"] * 3


def test_a_seed_and_a_prompt_of_several_chunks(books_4m, tokens):
    """What sampling draws after a chunk that is not the last is taken back: chunks do not change a seed's answer."""
    answers = []
    for chunk in (2048, 300):
        size = {"max_num_batched_tokens": chunk, "enable_prefix_caching": False}
        with engine(books_4m, max_num_seqs=2, **size, **quantspec(3)) as other:
            answers += [[generate(other, [tokens[:1000]], 4, temperature=1.0, seed=i)[0].tokens[:2] for i in range(24)]]
    # Chunks read the older context in 8 bits: a random draw may fall on the other side of a probability that moved by that.
    # The second token has two chances of it. Draws that are not taken back give other tokens nearly always.
    same_first, same_both = (sum(a[:n] == b[:n] for a, b in zip(*answers, strict=True)) for n in (1, 2))
    assert same_first >= 21 and same_both >= 18
    assert len({tuple(a) for a in answers[0]}) >= 12


@pytest.mark.parametrize("arguments", [{"attention_backend": "QUANTSPEC"}, quantspec(4)], ids=["cache", "speculation"])
def test_preemption(books_4m, tokens, arguments):
    """A pool too small for the load: requests are preempted, recompute, and finish with the output of those that are not."""
    prompts = [tokens[60 * i : 60 * i + 500 + 130 * i] for i in range(6)]
    size = {"max_model_len": 2048, "max_num_seqs": 6, "enable_prefix_caching": False}
    with engine(books_4m, num_gpu_blocks_override=60, **size, **arguments) as crowded:
        halves = generate(crowded, prompts[:3], 260) + generate(crowded, prompts[3:], 260)
        assert preemptions(crowded) == 0
        free = free_blocks(crowded)
        together = generate(crowded, prompts, 260)
        assert preemptions(crowded) > 0
        assert free_blocks(crowded) == free
        if arguments.get("speculative_config"):
            drafts, accepted = speculation_counts(crowded)
            assert accepted[0] > 0.5 * drafts
    assert [len(a.tokens) for a in together] == [260] * 6
    assert_same_or_tied(halves, together, RECOMPUTED)


@pytest.mark.parametrize("drafts", [0, 4])
def test_a_prompt_near_the_limit_in_a_pool_for_one_request(books_4m, tokens, drafts):
    """The least pool that vLLM accepts for this length: the prompt fits, is not preempted, and its blocks come back."""
    size = {"max_model_len": 3000, "max_num_seqs": 2, "max_num_batched_tokens": 777, "enable_prefix_caching": False}
    arguments = quantspec(drafts) if drafts else {"attention_backend": "QUANTSPEC"}
    blocks = -(-3000 // G) + window_blocks_per_request(G, 64, drafts) + 1  # pages, windows, and vLLM's null block
    with engine(books_4m, num_gpu_blocks_override=blocks, **size, **arguments) as llm:
        free = free_blocks(llm)
        (answer,) = generate(llm, [tokens[:2980]], 20)
        assert len(answer.tokens) == 20 and free_blocks(llm) == free
        assert preemptions(llm) == 0
