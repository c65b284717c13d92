"""The rotation of input channels: exact, its own inverse, local to a block, and that it pays."""

import pytest
import torch

from vllm_quantspec import rotation
from vllm_quantspec.weights import quantize_weight


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_products_stay_what_they_are(dtype):
    x, weight = random(7, 96).to(dtype), random(20, 96, seed=1).to(dtype)
    rotated = rotation.rotate_inputs(x) @ rotation.rotate_weight(weight).t()
    torch.testing.assert_close(rotated, x.float() @ weight.float().t(), rtol=1e-5, atol=1e-5)
    back = rotation.rotate_weight_back(rotation.rotate_weight(weight))
    torch.testing.assert_close(back, weight.float(), rtol=1e-5, atol=1e-6)


def test_a_block_is_mixed_by_itself_with_powers_of_two():
    x = torch.zeros(1, 96)
    x[0, 40] = 3.0
    out = rotation.rotate_inputs(x)
    assert (out[0, 32:64].abs() == 3 / 8).all() and (out[0, :32] == 0).all() and (out[0, 64:] == 0).all()
    signs = rotation.rotate_inputs(torch.eye(32)) * 8
    expected = [[-1.0 if (i & j).bit_count() % 2 else 1.0 for j in range(32)] for i in range(32)]
    assert torch.equal(signs, torch.tensor(expected))


def test_moments_are_those_of_rotated_inputs():
    x = random(200, 64, seed=2)
    rotated = rotation.rotate_inputs(x)
    torch.testing.assert_close(rotation.rotate_moments(x.t() @ x), rotated.t() @ rotated, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("method", ["search", "gptq"])
def test_lowers_the_error_of_the_outputs_where_channels_differ(method):
    """A few channels' inputs and weights are large, as those of trained models are."""
    size = 1 + 9 * (torch.rand(256, generator=torch.Generator().manual_seed(3)) > 0.95)
    weight, x = random(64, 256, seed=4) * 0.02 * size, random(1024, 256, seed=5) * size
    moments = x.t() @ x / len(x)

    def error(rotated: bool) -> torch.Tensor:
        quantized = quantize_weight(weight, 128, method=method, second_moments=moments, rotated=rotated)
        assert quantized.rotated == rotated
        return (x @ (quantized.dequantize() - weight).t()).square().mean()

    assert error(True) < 0.8 * error(False)


def test_groups_hold_whole_blocks():
    with pytest.raises(ValueError, match="32 channels"):
        quantize_weight(random(4, 96), 48, rotated=True)
