"""The CPU's kernel for 8-bit weights against the dequantized weight."""

import pytest
import torch
import torch.nn.functional as F

from vllm_quantspec.integration.cpu import llvm_scan
from vllm_quantspec.kernels.cpu_int4_linear import DTYPES, MANY_ROWS
from vllm_quantspec.kernels.cpu_int8_linear import cpu_int8_linear, pack
from vllm_quantspec.weights import QuantizedWeight

llvm_scan.install()  # the kernel has loaded Numba

# What rounding the result once to the dtype costs, and the order of float32 sums.
ERROR = {torch.bfloat16: 3.5e-3, torch.float16: 4e-4, torch.float32: 2e-6}
SHAPES = [(512, 96, 128), (320, 160, 64), (96, 32, 32)]


def problem(in_features, out_features, group, dtype, rows, rotated=False):
    """Every code and every zero point appears."""
    generator = torch.Generator().manual_seed(in_features + rows)
    groups = out_features, in_features // group
    shapes = (out_features, in_features), groups
    codes, zeros = (torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8) for shape in shapes)
    scales = (torch.rand(groups, generator=generator) * 1e-3 + 1e-4).to(dtype)
    quantized = QuantizedWeight(codes, scales, zeros, group, rotated, 8)
    x = torch.randn(rows, in_features, generator=generator).to(dtype)
    return x, quantized.dequantize(), pack(codes, scales, zeros)


def assert_right(actual, x, weight, bias=None):
    expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert actual.dtype == x.dtype and actual.shape == expected.shape
    for a, e in zip(actual.double(), expected, strict=True):
        assert (a - e).norm() < ERROR[x.dtype] * e.norm()


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 7, 8, MANY_ROWS - 1, MANY_ROWS, 100])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_is_the_dequantized_weight(shape, dtype, rows):
    x, weight, packed = problem(*shape, dtype, rows)
    bias = torch.randn(shape[1]).to(dtype)
    assert_right(cpu_int8_linear(x, *packed), x, weight)
    assert_right(cpu_int8_linear(x, *packed, bias), x, weight, bias)


@pytest.mark.parametrize("rows", [1, 6, MANY_ROWS])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_rotates_inputs(shape, dtype, rows):
    x, weight, packed = problem(*shape, dtype, rows, rotated=True)
    assert_right(cpu_int8_linear(x, *packed, None, True), x, weight)


@pytest.mark.parametrize("rows", [1, 3, 8, MANY_ROWS])
def test_rows_do_not_mix(rows):
    x, _, packed = problem(256, 64, 128, torch.float32, rows + 1)
    whole = cpu_int8_linear(x, *packed)
    x[-1] = torch.nan
    out = cpu_int8_linear(x, *packed)
    assert torch.equal(out[:-1], whole[:-1]) and out[-1].isnan().all()


def test_no_rows():
    _, _, packed = problem(256, 64, 128, torch.bfloat16, 1)
    assert cpu_int8_linear(torch.empty(0, 256, dtype=torch.bfloat16), *packed).shape == (0, 64)


def test_as_an_operator():
    x, _, packed = problem(256, 64, 128, torch.bfloat16, 3)
    torch.library.opcheck(torch.ops.vllm_quantspec.cpu_int8_linear.default, (x, *packed, torch.randn(64).bfloat16(), True))


def test_refused_inputs():
    x, _, packed = problem(256, 64, 128, torch.bfloat16, 3)
    with pytest.raises(ValueError, match="x is"):
        cpu_int8_linear(x[:, :128], *packed)
    with pytest.raises(ValueError, match="float64"):
        cpu_int8_linear(x.double(), *packed)
