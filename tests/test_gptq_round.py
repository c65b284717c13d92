"""GPTQ's innermost loop: the kernel against plain PyTorch, on a GPU or else in Triton's interpreter."""

import pytest
import torch
from interpreter import DEVICE, RUNS, run_in_the_interpreter, runs

from vllm_quantspec import levels
from vllm_quantspec.kernels.gptq_round import reference, round_group

pytest.importorskip("triton")


@pytest.mark.skipif(RUNS, reason="the tests run in this process")
def test_in_the_interpreter():
    run_in_the_interpreter(__file__)


def problem(rows: int, size: int, bits: int = 4):
    """A group in the middle of a wider weight, as GPTQ hands it over."""
    generator = torch.Generator().manual_seed(rows + size)
    wide = torch.randn(rows, 3 * size, generator=generator)
    inputs = torch.randn(8 * size, 3 * size, generator=generator) @ torch.randn(3 * size, 3 * size, generator=generator)
    moments = inputs.t() @ inputs / len(inputs)
    feedback = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(moments)), upper=True).contiguous()
    here = slice(size, 2 * size)
    low, high = wide[:, here].amin(1, keepdim=True), wide[:, here].amax(1, keepdim=True)
    scale = (high - low) / levels.span(bits)
    zero = levels.nearest(levels.lowest(bits) - low / scale, bits)
    arguments = wide.to(DEVICE)[:, here], feedback.to(DEVICE)[here, here], scale, zero
    return tuple(t.to(DEVICE) for t in arguments)


@runs
@pytest.mark.parametrize("rows", [1, 16, 41])
@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("bits", levels.BITS)
def test_is_the_reference(rows, size, bits):
    x, feedback, scale, zero = problem(rows, size, bits)
    before = x.clone()
    rounded, errors = round_group(x, feedback, scale, zero, bits)
    expected, right = reference(x, feedback, scale, zero, bits)
    assert torch.equal(x, before)
    assert torch.isin(rounded, levels.levels(torch.arange(2**bits, dtype=torch.uint8, device=x.device), bits)).all()
    # The order of sums may tip a level at a tie, and with it those that come after it in its row: more often among more.
    same = (rounded == expected).all(1)
    assert same.float().mean() >= (0.9 if rows > 1 and bits == 4 else 0.7 if rows > 1 else bits == 4)
    torch.testing.assert_close(errors[same], right[same], rtol=1e-3, atol=1e-4)


@runs
def test_no_rows():
    x, feedback, scale, zero = problem(2, 32)
    codes, errors = round_group(x[:0], feedback, scale[:0], zero[:0])
    assert codes.shape == errors.shape == (0, 32)


@runs
def test_arguments_that_do_not_fit():
    x, feedback, scale, zero = problem(4, 32)
    with pytest.raises(ValueError, match="do not fit"):
        round_group(x, feedback, scale[:2], zero)
    with pytest.raises(ValueError, match="do not fit"):
        round_group(x.double(), feedback, scale, zero)
    with pytest.raises(ValueError, match="power of two"):
        round_group(x[:, :24], feedback[:24, :24], scale, zero)
