"""Rounding of weights to 4 and 8 bits: layout, error bounds, and that searching pays."""

import pytest
import torch

from vllm_quantspec.weights import fit_group_size, quantize_weight


def random_weight(out_features: int, in_features: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0):
    """Normal weights with a few outliers, rows of different sizes, as trained weights have."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=generator) * 0.02
    weight *= 1 + 3 * (torch.rand(out_features, in_features, generator=generator) > 0.995)
    return (weight * torch.rand(out_features, 1, generator=generator).add(0.2)).to(dtype)


def group_errors(weight: torch.Tensor, quantized) -> torch.Tensor:
    error = (quantized.dequantize() - weight.float()).square()
    return error.view(weight.shape[0], -1, quantized.group_size).sum(-1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape, group_size", [((48, 256), 128), ((33, 192), 64), ((70, 96), 32)])
def test_nearest_error_is_half_a_step(shape, group_size, dtype):
    weight = random_weight(*shape, dtype)
    quantized = quantize_weight(weight, group_size, method="nearest")
    assert quantized.codes.dtype == quantized.zeros.dtype == torch.uint8
    assert quantized.scales.dtype == (dtype if dtype.itemsize == 2 else torch.float16)
    assert quantized.scales.shape == quantized.zeros.shape == (shape[0], shape[1] // group_size)
    assert max(quantized.codes.max(), quantized.zeros.max()) <= 15
    steps = quantized.scales.float().repeat_interleave(group_size, 1)
    # A 16-bit scale may be short of the range by 15 * 2^-9 steps.
    assert ((quantized.dequantize() - weight.float()).abs() <= 0.55 * steps).all()


@pytest.mark.parametrize("group_size", [128, 64, 32])
def test_search_is_never_worse_than_nearest(group_size):
    weight = random_weight(96, 512, seed=1)
    nearest = group_errors(weight, quantize_weight(weight, group_size, method="nearest"))
    search = group_errors(weight, quantize_weight(weight, group_size))
    assert (search <= nearest * (1 + 1e-5)).all()
    assert search.sum() < 0.95 * nearest.sum()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rotated", [False, True])
def test_8_bits_lose_a_hundredth_of_what_4_bits_do(dtype, rotated):
    weight = random_weight(96, 512, dtype, seed=7)
    four, eight = (
        (quantize_weight(weight, 128, rotated=rotated, bits=bits).dequantize() - weight.float()).square().mean()
        for bits in (4, 8)
    )
    assert eight < 0.012 * four
    quantized = quantize_weight(weight, 128, bits=8)
    # A step above level 256, and what a 16-bit scale may be short of the range.
    steps = quantized.scales.float().repeat_interleave(128, 1)
    assert ((quantized.dequantize() - weight.float()).abs() <= 3 * steps).all()
    assert (quantized.codes > 200).any() and (quantized.codes < 50).any()
    with pytest.raises(ValueError, match="4 or 8 bits"):
        quantize_weight(weight, bits=6)


@pytest.mark.parametrize("bits", [4, 8])
def test_chunks_of_rows_do_not_matter(bits):
    weight = random_weight(300, 512, seed=2)
    whole = quantize_weight(weight, bits=bits)
    part = quantize_weight(weight[137:211], bits=bits)
    assert torch.equal(whole.codes[137:211], part.codes)
    assert torch.equal(whole.scales[137:211], part.scales)


def test_groups_of_one_sign_and_of_one_value():
    weight = random_weight(8, 256, seed=3)
    weight[0, :128] = weight[0, :128].abs() + 0.5
    weight[1, :128] = -weight[1, :128].abs() - 0.5
    weight[2, 128:] = 0.37
    weight[3, 128:] = 0
    for method in ("nearest", "search"):
        quantized = quantize_weight(weight, method=method)
        error = (quantized.dequantize() - weight.float()).abs()
        assert error.isfinite().all()
        assert error[2, 128:].max() < 0.37 * 2**-7
        assert (error[3, 128:] == 0).all()
        assert (error <= 0.55 * quantized.scales.float().repeat_interleave(128, 1)).all() or method == "search"


@pytest.mark.parametrize("bits", [4, 8])
def test_gptq_lowers_the_error_of_the_outputs(bits):
    weight = random_weight(64, 256, torch.float32, seed=4)
    inputs = torch.randn(1024, 40, generator=torch.Generator().manual_seed(5)) @ torch.randn(
        40, 256, generator=torch.Generator().manual_seed(6)
    )
    moments = inputs.T @ inputs / len(inputs)
    output = inputs @ weight.float().T

    def output_error(**options) -> torch.Tensor:
        return (inputs @ quantize_weight(weight, bits=bits, **options).dequantize().T - output).square().mean()

    before = weight.clone()
    assert output_error(method="gptq", second_moments=moments) < 0.5 * output_error()
    assert torch.equal(weight, before)
    with pytest.raises(ValueError, match="second_moments"):
        quantize_weight(weight, method="gptq")


def test_group_sizes():
    assert [fit_group_size(n) for n in (4096, 320, 96, 100)] == [128, 64, 32, None]
    assert fit_group_size(4096, 64) == 64
    with pytest.raises(ValueError, match="does not divide"):
        quantize_weight(random_weight(4, 192), 128)
    with pytest.raises(ValueError, match="method"):
        quantize_weight(random_weight(4, 128), method="best")
