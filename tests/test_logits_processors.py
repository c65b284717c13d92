"""`min_p` and `logit_bias` in the rows of drafts: what vLLM's processors do to one row, done to each of a request's."""

import pytest
import torch

from vllm_quantspec.integration.cpu.logits_processors import add_biases, drop_below_min_p

COUNTS = [3, 0, 2, 4, 1]
VOCAB = 211


def rows_of(request: int) -> slice:
    return slice(sum(COUNTS[:request]), sum(COUNTS[: request + 1]))


@pytest.mark.parametrize("seed", range(3))
def test_biases_of_each_request_reach_its_rows_alone(seed):
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(sum(COUNTS), VOCAB, generator=rng) * 4
    biases = {0: {7: 2.5, 200: -100.0}, 1: {3: 9.0}, 3: {0: -1.25}, 17: {1: 1.0}}  # 1 has no drafts, 17 is no row's
    expected = logits.clone()
    for request in (0, 3):
        for token, bias in biases[request].items():
            expected[rows_of(request), token] += bias
    add_biases(logits, biases, COUNTS)
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("seed", range(3))
def test_min_p_keeps_what_vllms_processor_keeps_after_the_temperature(seed):
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(sum(COUNTS), VOCAB, generator=rng) * 4
    logits[:, 5] = -torch.inf  # excluded before, by another parameter
    min_p = torch.tensor([0.1, 0.5, 0.0, 0.02, 1.0])
    temperature = torch.tensor([0.7, 1.0, 0.8, 1.6, 1.0])
    before = logits.clone()
    drop_below_min_p(logits, min_p, temperature, COUNTS)
    for request in range(len(COUNTS)):
        old, new = before[rows_of(request)], logits[rows_of(request)]
        if min_p[request] == 0:
            assert torch.equal(old, new)
            continue
        probs = (old / temperature[request]).softmax(-1)
        keep = probs >= min_p[request] * probs.amax(-1, keepdim=True) * (1 - 1e-5)
        assert torch.equal(new > -torch.inf, keep) and torch.equal(new[keep], old[keep])
        assert (keep.sum(-1) >= 1).all()


def test_without_drafts_there_is_nothing_to_do():
    logits = torch.empty(0, VOCAB)
    add_biases(logits, {0: {3: 1.0}}, [0, 0])
    assert len(logits) == 0
