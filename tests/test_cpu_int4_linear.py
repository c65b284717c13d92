"""The CPU's INT4 kernel against the dequantized weight, and which kernel a CPU's draft linears run on."""

import pytest
import torch
import torch.nn.functional as F

from vllm_quantspec.integration.cpu import llvm_scan
from vllm_quantspec.integration.draft import linears
from vllm_quantspec.kernels import cpu_int4_linear as module
from vllm_quantspec.kernels import cpu_threads
from vllm_quantspec.kernels.cpu_int4_linear import DTYPES, MANY_ROWS, cpu_int4_linear, pack, supported
from vllm_quantspec.weights import quantize_weight

llvm_scan.install()  # the kernel has loaded Numba

# What rounding the result once to the dtype costs, and the order of float32 sums.
ERROR = {torch.bfloat16: 2.5e-3, torch.float16: 3e-4, torch.float32: 1e-6}
ROWS = [1, 2, 3, 4, 5, 7, 8, MANY_ROWS - 1, MANY_ROWS, 100]


def problem(in_features, out_features, group, dtype, rows, rotated=False):
    torch.manual_seed(in_features + rows)
    # Weights off zero, so that zero points differ and matter.
    weight = (torch.randn(out_features, in_features) * 0.05 + torch.randn(out_features, 1) * 0.03).to(dtype)
    quantized = quantize_weight(weight, group, scale_dtype=dtype, rotated=rotated)
    packed = pack(quantized.codes, quantized.scales, quantized.zeros, group)
    return torch.randn(rows, in_features).to(dtype), quantized.dequantize(), packed


def assert_right(actual, x, weight, bias=None):
    expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert actual.dtype == x.dtype and actual.shape == expected.shape
    for a, e in zip(actual.double(), expected, strict=True):
        assert (a - e).norm() < ERROR[x.dtype] * e.norm()


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("in_features, out_features, group", [(512, 96, 128), (320, 160, 64), (96, 32, 32)])
def test_is_the_dequantized_weight(in_features, out_features, group, dtype, rows):
    x, weight, packed = problem(in_features, out_features, group, dtype, rows)
    bias = torch.randn(out_features).to(dtype)
    assert_right(cpu_int4_linear(x, *packed), x, weight)
    assert_right(cpu_int4_linear(x, *packed, bias), x, weight, bias)


@pytest.mark.parametrize("rows", [1, 6, MANY_ROWS])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("in_features, out_features, group", [(512, 96, 128), (320, 160, 64), (96, 32, 32)])
def test_rotates_inputs(in_features, out_features, group, dtype, rows):
    x, weight, packed = problem(in_features, out_features, group, dtype, rows, rotated=True)
    assert_right(cpu_int4_linear(x, *packed, None, True), x, weight)


@pytest.mark.parametrize("rows", ROWS)
def test_rows_do_not_mix(rows):
    """One row of NaN leaves the others as they were: a padded batch has rows of anything."""
    x, _, packed = problem(256, 64, 128, torch.float32, rows + 1)
    whole = cpu_int4_linear(x, *packed)
    x[-1] = torch.nan
    out = cpu_int4_linear(x, *packed)
    assert torch.equal(out[:-1], whole[:-1]) and out[-1].isnan().all()


def test_no_rows():
    _, _, packed = problem(256, 64, 128, torch.bfloat16, 1)
    assert cpu_int4_linear(torch.empty(0, 256, dtype=torch.bfloat16), *packed).shape == (0, 64)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("rows", [1, 6, 40])
def test_split_over_threads(threads, rows, monkeypatch):
    x, weight, packed = problem(512, 224, 64, torch.float32, rows)
    monkeypatch.setattr(module, "_PRODUCTS_PER_TASK", 1)
    monkeypatch.setattr(module, "_WRITTEN", 1 << 12)
    monkeypatch.setattr(cpu_threads, "CPUS", cpu_threads.CPUS and set(cpu_threads.CPUS) | {0, 1, 2})
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert_right(cpu_int4_linear(x, *packed), x, weight)


def test_as_an_operator():
    """torch.compile sees one operator, whose shapes it can know without running it, for any number of rows."""
    x, _, packed = problem(256, 64, 128, torch.bfloat16, 3)
    torch.library.opcheck(torch.ops.vllm_quantspec.cpu_int4_linear.default, (x, *packed, torch.randn(64).bfloat16(), True))


def test_refused_inputs():
    x, _, packed = problem(256, 64, 128, torch.bfloat16, 3)
    with pytest.raises(ValueError, match="x is"):
        cpu_int4_linear(x[:, :128], *packed)
    with pytest.raises(ValueError, match="float64"):
        cpu_int4_linear(x.double(), *packed)
    assert supported(256, 64, 128, torch.bfloat16) is None
    for arguments, why in (((256, 40, 128, x.dtype), "40"), ((96, 64, 64, x.dtype), "96"), ((64, 64, 16, x.dtype), "16")):
        assert why in supported(*arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="about the CPU engine")
def test_a_cpu_without_vllms_operator(monkeypatch):
    """vLLM's kernel says that it can, whether its library has the operator or not; we look."""
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    here = hasattr(torch.ops._C, "cpu_gemm_wna16")
    expected = linears.LibraryInt4LinearMethod if here else linears.CpuInt4LinearMethod
    assert type(linears.choose_int4_method(256, 64, torch.bfloat16, 128)[0]) is expected
    monkeypatch.setattr(torch.ops, "_C", object())
    said = []
    monkeypatch.setattr(linears.logger, "info_once", lambda message, *values: said.append(message % values))
    method, reason = linears.choose_int4_method(256, 64, torch.bfloat16, 128)
    assert isinstance(method, linears.CpuInt4LinearMethod), reason
    assert said == ["INT4 draft linears run on this package's CPU kernel."]
    assert linears.choose_int4_method(256, 40, torch.bfloat16, 128)[0] is None
