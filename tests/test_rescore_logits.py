"""The kernel that makes a draft's largest logits exact, against its reference; and what that is good for."""

import pytest
import torch
from interpreter import DEVICE, INTERPRETED, RUNS, run_in_the_interpreter, runs

from vllm_quantspec.kernels import rescore_logits as module
from vllm_quantspec.kernels.rescore_logits import RUN, reference, rescore_logits
from vllm_quantspec.weights import quantize_weight

pytest.importorskip("triton")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.skipif(RUNS, reason="the tests run in this process")
def test_in_the_interpreter():
    run_in_the_interpreter(__file__)


@pytest.fixture
def groups(monkeypatch) -> int:
    if INTERPRETED:  # each costs milliseconds
        monkeypatch.setattr(module, "GROUPS", 20)
        monkeypatch.setattr(module, "MAX_CHANNELS", 256)
    return module.GROUPS


def head(tokens, vocabulary, channels, dtype=BF16, device=DEVICE):
    """Hidden states, an output layer's weight, and logits with an error like that of 4 bits; rows lie apart."""
    generator = torch.Generator(device).manual_seed(tokens + vocabulary)
    x = torch.randn(tokens, channels + 8, generator=generator, device=device)[:, :channels].to(dtype)
    weight = torch.randn(vocabulary, channels, generator=generator, device=device).mul_(channels**-0.5).to(dtype)
    logits = torch.empty(tokens, vocabulary + 16, dtype=dtype, device=device)[:, :vocabulary]
    error = 0.1 * torch.randn(tokens, vocabulary, generator=generator, device=device)
    return logits.copy_(x.float() @ weight.t().float() + error), x, weight


# A vocabulary of whole groups, one with ragged ones, fewer runs than groups, one run, one id; several chunks of channels.
SHAPES = [(3, 8192, 64), (2, 5000, 96), (1, 300, 64), (2, 17, 32), (1, 1, 32), (1, 9000, 640)]
if DEVICE == "cuda" and not INTERPRETED:
    SHAPES += [(1, 128256, 4096), (16, 128256, 4096), (5, 32000, 5120), (33, 152064, 3584)]


@runs
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize(("tokens", "vocabulary", "channels"), SHAPES)
def test_kernel_computes_what_the_reference_does(tokens, vocabulary, channels, dtype, groups):
    logits, x, weight = head(tokens, vocabulary, channels, dtype)
    bias = torch.randn(vocabulary, device=DEVICE).to(dtype) if vocabulary % 2 else None
    expected = reference(logits.clone(), x, weight, bias)
    given = torch.empty_strided(logits.shape, logits.stride(), dtype=dtype, device=DEVICE).copy_(logits)
    result = rescore_logits(given, x, weight, bias)
    assert result is given
    changed = (result != logits).sum(1)
    groups = min(groups, -(-vocabulary // RUN))
    assert changed.max() <= 2 * groups
    assert changed.min() >= min(groups, vocabulary) // 2  # some are the same by chance
    # Sums in another order; and the interpreter cuts float32 off where a GPU rounds.
    torch.testing.assert_close(result, expected, atol=0.03 if dtype == BF16 else 0.004, rtol=0.008)


@runs
def test_equal_logits(groups):
    """The smaller ids of a group are the ones computed again."""
    _, x, weight = head(2, 4 * groups * RUN, 32, FP32)
    logits = torch.full((2, len(weight)), 7.0, device=DEVICE)
    result = rescore_logits(logits.clone(), x, weight)
    ids = torch.arange(len(weight), device=DEVICE)
    again = (ids < groups * RUN) & (ids % RUN < 2)
    torch.testing.assert_close(result, torch.where(again, x @ weight.t(), 7.0), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(reference(logits, x, weight), result, atol=1e-4, rtol=1e-4)


@runs
@pytest.mark.parametrize("vocabulary", [1000, 7000, 32000, 128256] if DEVICE == "cuda" else [1000])
def test_nan(vocabulary, groups):
    """A token whose hidden state is NaN keeps to its own logits and to the weight's rows; the others do not notice."""
    logits, x, weight = head(3, vocabulary, 256)
    expected = rescore_logits(logits.clone(), x, weight)
    x[1], logits[1] = torch.nan, torch.nan
    result = rescore_logits(logits.clone(), x, weight)
    assert torch.equal(result[[0, 2]], expected[[0, 2]]) and result[1].isnan().all()


@runs
def test_no_token():
    _, x, weight = head(1, 100, 32)
    logits = x.new_empty(0, 100)
    assert rescore_logits(logits, x[:0], weight) is logits


@runs
@pytest.mark.skipif(DEVICE != "cuda" or INTERPRETED, reason="needs a CUDA GPU")
def test_in_a_graph():
    logits, x, weight = head(4, 32000, 512)
    expected = rescore_logits(logits.clone(), x, weight)
    out, graph = logits.clone(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rescore_logits(out, x, weight)
    out.copy_(logits)
    graph.replay()
    assert torch.equal(out, expected)


def test_the_best_token_is_the_exact_one():
    """Where INT4 logits often have another one; and the distribution is nearly that of the exact logits."""
    _, x, weight = head(400, 8192, 128, FP32, "cpu")
    exact, logits = 4 * x @ weight.t(), 4 * x @ quantize_weight(weight, 32).dequantize().t()
    result = reference(logits.clone(), 4 * x, weight)
    assert (logits.argmax(-1) == exact.argmax(-1)).float().mean() < 0.9
    assert (result.argmax(-1) == exact.argmax(-1)).float().mean() > 0.99

    def overlap(other):
        return torch.minimum(exact.softmax(-1), other.softmax(-1)).sum(-1).mean()

    assert 1 - overlap(result) < 0.5 * (1 - overlap(logits))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(2, 99)}, "are not those of x"),
        ({"x": torch.zeros(2, 33)}, "are not those of x"),
        ({"weight": torch.zeros(32, 100).t()}, "weight must be a floating point matrix"),
        ({"logits": torch.zeros(2, 100, dtype=torch.int32)}, "logits must be a floating point matrix"),
        ({"bias": torch.zeros(99)}, "bias must be contiguous"),
    ],
)
def test_arguments_that_do_not_fit(change, message):
    arguments = {"logits": torch.zeros(2, 100), "x": torch.zeros(2, 32), "weight": torch.zeros(100, 32)} | change
    for function in (reference, rescore_logits):
        with pytest.raises(ValueError, match=message):
            function(**arguments)
