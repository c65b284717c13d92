"""A draft that is broken in any way costs speed, never the output: its logits may be NaN, infinite, or far too large."""

import pytest
import torch
from engine_tools import QUANTSPEC_CACHE, assert_same_or_tied, draft_of, engine, generate, quantspec, speculation_counts
from test_sampling import ALPHA, SIZE, draw, statistics

from vllm_quantspec.integration.draft.finite import make_finite, with_finite_logits

G = 128
TIE = 0.125  # see test_lossless.py
DRAWS = 320
GAMMA = 3
BROKEN = {"NaN": float("nan"), "largest": torch.finfo(torch.bfloat16).max}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_logits_become_finite(dtype):
    """Also after a division by the lowest temperature, 0.01; and those of a sane draft stay as they are."""
    sane = (torch.randn(6, 1000, generator=torch.Generator().manual_seed(0)) * 100).to(dtype)
    logits = sane.clone()
    logits[1], logits[2, 7], logits[3, 7] = torch.nan, torch.nan, torch.inf
    logits[4], logits[5] = -torch.inf, torch.finfo(dtype).max
    result = make_finite(logits)
    assert result.data_ptr() == logits.data_ptr()
    assert (result.float() / 0.01).softmax(-1).sum(-1).allclose(torch.ones(6))
    assert (result.float() / 0.01).logsumexp(-1).isfinite().all()
    assert torch.equal(result[0], sane[0]) and torch.equal(result[2, 8:], sane[2, 8:])


def test_every_logit_of_a_draft_is_made_finite():
    class Model(torch.nn.Module):
        def compute_logits(self, hidden_states):
            return None if hidden_states is None else hidden_states * torch.inf

    model = Model()
    with_finite_logits(model)
    assert model.compute_logits(torch.randn(3, 50)).isfinite().all()
    assert model.compute_logits(None) is None


def break_draft(llm, value: float) -> int:
    """Overwrite the scales of every INT4 weight, as if sleep level 2 had discarded them; returns how many there were."""
    counts = []

    def overwrite(worker):
        runner = worker.model_runner
        target = {p.data_ptr() for p in runner.get_model().parameters()}
        own = [p for p in draft_of(llm).model.parameters() if p.data_ptr() not in target and p.dtype.is_floating_point]
        with torch.inference_mode():
            for parameter in own:
                parameter.fill_(value)
        counts.append(len(own))

    llm.collective_rpc(overwrite)
    return counts[0]


@pytest.fixture(scope="module")
def prompts(books_4m, passage):
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(books_4m).encode(passage)
    return [tokens[37 * i : 37 * i + n] for i, n in enumerate((2 * G + 1, 5, G, 3 * G - 2, 700))]


@pytest.fixture(scope="module")
def off(books_4m, prompts):
    with engine(books_4m, **SIZE, **QUANTSPEC_CACHE) as llm:
        return generate(llm, prompts, 40), draw(llm, prompts[0], 0, DRAWS, temperature=0.8)


@pytest.fixture(scope="module")
def llm(books_4m, off):
    # On a GPU the draft of more rows runs on the target's own weights, which are not broken.
    with engine(books_4m, **(SIZE | {"max_num_seqs": 32}), **quantspec(GAMMA)) as llm:
        yield llm


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_draft_changes_nothing(what, llm, prompts, off):
    assert break_draft(llm, BROKEN[what]) >= 21
    llm.reset_prefix_cache()
    before = speculation_counts(llm)
    assert_same_or_tied(off[0], generate(llm, prompts, 40), TIE, what)
    draws = draw(llm, prompts[0], 1_000_000, DRAWS, temperature=0.8)
    after = speculation_counts(llm)
    p = statistics(off[1], draws)
    print(f"{what}: {p}")
    assert min(p.values()) > ALPHA, p
    accepted = [b - a for a, b in zip(before[1], after[1], strict=True)]
    assert after[0] > before[0] and accepted[0] < 0.1 * (after[0] - before[0])
