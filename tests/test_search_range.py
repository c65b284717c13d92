"""The search for a group's scale and zero point: the kernel against plain PyTorch, on a GPU or in the interpreter."""

import pytest
import torch
from interpreter import DEVICE, INTERPRETED, RUNS, run_in_the_interpreter, runs

from vllm_quantspec.kernels.search_range import MAX_CODE, reference, search_range

pytest.importorskip("triton")


@pytest.mark.skipif(RUNS, reason="the tests run in this process")
def test_in_the_interpreter():
    run_in_the_interpreter(__file__)


def error_of(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
    codes = ((x / scale).round() + zero).clamp(0, MAX_CODE)
    error = ((codes - zero) * scale - x) ** 2
    return (error if importance is None else error * importance).sum(-1)


# (groups, their size): in the interpreter each number and each size once.
CASES = [(1, 64), (41, 128), (150, 32)] if INTERPRETED else [(n, size) for n in (1, 41, 150) for size in (32, 64, 128)]


@runs
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("n, size", CASES)
def test_is_the_reference(n, size, weighed, dtype):
    generator = torch.Generator().manual_seed(n + size)
    # Groups with outliers, some of one sign; in the middle of a wider weight.
    wide = torch.randn(n, 3 * size, generator=generator) * torch.rand(n, 3 * size, generator=generator) ** 4
    wide[::3] = wide[::3].abs()
    x = wide.to(DEVICE)[:, size : 2 * size]
    importance = (torch.rand(size, generator=generator) + 0.01).to(DEVICE) if weighed else None
    before = x.clone()
    scale, zero = search_range(x, importance, dtype)
    right_scale, right_zero = reference(x, importance, dtype)
    assert torch.equal(x, before) and scale.shape == zero.shape == (n, 1)
    assert torch.equal(scale, scale.to(dtype).float())
    assert torch.isin(zero, torch.arange(MAX_CODE + 1.0, device=x.device)).all()
    # The order of sums decides between ranges whose errors are as good as equal, and moves a fitted scale by one rounding.
    same = torch.isclose(scale, right_scale, rtol=0.01) & (zero == right_zero)
    assert same.float().mean() >= 0.95
    error, right = error_of(x, scale, zero, importance), error_of(x, right_scale, right_zero, importance)
    torch.testing.assert_close(error, right, rtol=5e-3, atol=1e-7)


@runs
def test_channels_of_zero():
    scale, zero = search_range(torch.zeros(5, 32, device=DEVICE), None, torch.bfloat16)
    assert (scale > 0).all() and (zero == 0).all()


@runs
def test_no_groups():
    scale, zero = search_range(torch.zeros(0, 64, device=DEVICE), None, torch.bfloat16)
    assert scale.shape == zero.shape == (0, 1)


@runs
def test_arguments_that_do_not_fit():
    x = torch.randn(4, 32, device=DEVICE)
    with pytest.raises(ValueError, match="2\\^n channels"):
        search_range(x[:, :24], None, torch.bfloat16)
    with pytest.raises(ValueError, match="2\\^n channels"):
        search_range(x.double(), None, torch.bfloat16)
    with pytest.raises(ValueError, match="for 32 channels"):
        search_range(x, torch.ones(16, device=DEVICE), torch.bfloat16)
