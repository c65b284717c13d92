"""The kernel that puts n-gram drafts in the place of a model's, against its reference; and the distribution it leaves."""

import pytest
import torch
from interpreter import DEVICE, INTERPRETED, RUNS, run_in_the_interpreter, runs

from vllm_quantspec.kernels.ngram_drafts import reference, write_ngram_drafts

pytest.importorskip("triton")

# Requests with n-grams, requests, slots, drafts there are, of which so many are drafted, vocabulary.
SHAPES = [(3, 5, 8, 12, 12, 5000), (1, 1, 1, 12, 4, 300), (4, 4, 9, 8, 8, 4096), (2, 6, 7, 12, 1, 1)]
if DEVICE == "cuda" and not INTERPRETED:
    SHAPES += [(16, 16, 16, 12, 12, 128256), (64, 256, 256, 12, 8, 151936)]


@pytest.mark.skipif(RUNS, reason="the tests run in this process")
def test_in_the_interpreter():
    run_in_the_interpreter(__file__)


def inputs(shape, dtype, seed=0):
    """Rows and slots at random, each once; half the n-grams found."""
    requests, rows, slots, width, number, vocabulary = shape
    generator = torch.Generator("cpu").manual_seed(seed + vocabulary)
    drafts = torch.randint(vocabulary, (requests, width), generator=generator)
    found = torch.rand(requests, generator=generator) < 0.5
    chosen_rows = torch.randperm(rows, generator=generator)[:requests]
    chosen_slots = torch.randperm(slots, generator=generator)[:requests]
    tokens = torch.randint(vocabulary, (rows, width), generator=generator)
    logits = torch.randn(slots, width, vocabulary, generator=generator).to(dtype)
    return [x.to(DEVICE) for x in (drafts, found, chosen_rows, chosen_slots, tokens, logits)], number


@runs
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("which", ["found", "all", "tokens alone"])
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_writes_what_the_reference_does(shape, which, dtype):
    (drafts, found, rows, slots, tokens, logits), number = inputs(shape, dtype)
    found = None if which == "all" else found
    given = tokens.clone(), None if which == "tokens alone" else logits.clone()
    expected = tokens.clone(), None if which == "tokens alone" else logits.clone()
    write_ngram_drafts(drafts, found, rows, slots, number, *given)
    reference(drafts, found, rows, slots, number, *expected)
    for a, b in zip(given, expected, strict=True):
        assert a is None and b is None or torch.equal(a, b)


@pytest.mark.parametrize("temperature", [0.01, 0.7, 1.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_distribution_is_one_at_the_draft(dtype, temperature):
    (drafts, _, rows, slots, tokens, logits), number = inputs(SHAPES[0], dtype)
    reference(drafts, None, rows, slots, number, tokens, logits)
    probs = (logits[slots, :number].float() / temperature).softmax(-1)
    assert (probs.gather(2, drafts[:, :number, None]) == 1).all()
    assert probs.sum(-1).eq(1).all() and probs.isfinite().all()


def test_what_does_not_fit_is_one_sentence():
    (drafts, found, rows, slots, tokens, logits), _ = inputs(SHAPES[1], torch.float32)
    for arguments, says in (
        ((drafts, found, rows, slots, 13, tokens, logits), "room for 12 drafts"),
        ((drafts.int(), found, rows, slots, 4, tokens, logits), "drafts must be int64"),
        ((drafts, found.int(), rows, slots, 4, tokens, logits), "found must be bool"),
        ((drafts, found, rows[:0], slots, 4, tokens, logits), "an entry for each of the 1 requests"),
        ((drafts, found, rows, slots, 4, tokens, logits[0]), "draft_logits must be"),
    ):
        with pytest.raises(ValueError, match=says):
            write_ngram_drafts(*arguments)
