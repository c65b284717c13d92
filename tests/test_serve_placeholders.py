"""A prompt that is cached but for one token: the scheduler pads its first step with placeholders for drafts (-1)."""

from types import SimpleNamespace

import pytest
import torch
from engine_tools import engine, generate, quantspec
from vllm import SamplingParams
from vllm.v1.sample import rejection_sampler

G = 128


@pytest.fixture(scope="module")
def llm(books_4m):
    with engine(books_4m, max_num_seqs=4, **quantspec(4)) as llm:
        yield llm


@pytest.fixture(scope="module")
def tokens(books_4m, passage):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(books_4m).encode(passage)


def test_the_others_keep_their_draft_probabilities(llm, tokens, monkeypatch):
    """It joins two sampled requests in mid-decoding: every batch with drafts is verified with their probabilities."""
    prompt = tokens[: 2 * G + 1]
    generate(llm, [prompt], 1)
    verified = []  # the drafts of each verification, and whether their probabilities were at hand
    rejection_sample = rejection_sampler.rejection_sample

    def record(draft_token_ids, num_draft_tokens, max_spec_len, cu_num_draft_tokens, draft_probs, *args, **more):
        verified.append((draft_token_ids.tolist(), draft_probs is not None))
        return rejection_sample(
            draft_token_ids, num_draft_tokens, max_spec_len, cu_num_draft_tokens, draft_probs, *args, **more
        )

    monkeypatch.setattr(rejection_sampler, "rejection_sample", record)
    core = llm.llm_engine
    params = SamplingParams(temperature=1.0, max_tokens=40, ignore_eos=True, seed=3)
    for i in range(2):
        core.add_request(f"running-{i}", {"prompt_token_ids": tokens[300 * i : 300 * i + 200]}, params)
    finished = {}
    steps = 0
    while core.has_unfinished_requests():
        for output in core.step():
            if output.finished:
                finished[output.request_id] = output.outputs[0].token_ids
        steps += 1
        if steps == 4:
            core.add_request("cached", {"prompt_token_ids": prompt}, params)
    assert {name: len(ids) for name, ids in finished.items()} == {"running-0": 40, "running-1": 40, "cached": 40}
    assert [drafts.count(-1) for drafts, _ in verified if -1 in drafts] == [4], "the scheduler did not pad"
    assert all(has_probs for drafts, has_probs in verified if drafts)


@pytest.mark.parametrize("has_probs", [True, False])
def test_a_placeholder_is_always_rejected(llm, has_probs):
    """Even where the number before its row would make the CPU's kernel accept it; the target's token is drawn instead."""
    vocab_size, last = 16, 15
    logits = torch.full((3, vocab_size), -30.0)
    logits[0, last] = 30.0  # of the request before: the number that the kernel would read
    logits[1, 2] = logits[2, 3] = 30.0
    probs = torch.zeros(3, vocab_size)
    probs[0, last] = 1.0
    metadata = SimpleNamespace(all_greedy=False, all_random=True, temperature=torch.ones(2), generators={})
    for _ in range(20):
        sampled = rejection_sampler.rejection_sample(
            torch.tensor([last, -1, -1], dtype=torch.int32),
            [1, 2],
            2,
            torch.tensor([1, 3], dtype=torch.int32),
            probs if has_probs else None,
            logits,
            torch.tensor([[5], [6]], dtype=torch.int32),
            metadata,
        )
        assert sampled.tolist() == [[last, 5, -1], [2, -1, -1]]
