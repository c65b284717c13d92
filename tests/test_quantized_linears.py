"""The draft's weights are those of the target's linears, also where these round their inputs."""

from types import SimpleNamespace

import pytest
import torch
from linear_tools import E4M3, build, one_rank

from vllm_quantspec.integration.draft.loaded import effective_weight

# Of a static scale s, 1 / s is not an e4m3 number, nor an integer: 1 is 8 % off at the first, clipped at the last.
SCALES = (1 / 9.4, 1 / 117.3, 0.37, 3.1e-4)
IN, OUT = 256, 384


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(OUT, IN, generator=torch.Generator().manual_seed(1)) * 0.05


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.float() - expected).norm() / expected.norm()).item()


class Emulated:
    """A linear method that rounds its inputs as vLLM's kernels for a GPU do, and multiplies exactly."""

    def __init__(self, rounded) -> None:
        self.rounded = rounded

    def apply(self, layer, x, bias=None):
        out = self.rounded(x.float(), layer) @ layer.exact.t()
        return (out if bias is None else out + bias.float()).to(x.dtype)


def static_e4m3(x, layer):
    return (x / layer.input_scale).clamp(-448, 448).to(E4M3).float() * layer.input_scale


def dynamic_e4m3(x, layer):
    scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-10) / 448
    return (x / scale).clamp(-448, 448).to(E4M3).float() * scale


def blocks_e4m3(x, layer):
    return dynamic_e4m3(x.view(len(x), -1, 128), layer).view(x.shape)


def blocks_e4m3_with_powers_of_two(x, layer):
    x = x.view(len(x), -1, 128)
    scale = (x.abs().amax(-1, keepdim=True).clamp_min(1e-4) / 448).log2().ceil().exp2()
    return ((x / scale).to(E4M3).float() * scale).flatten(1)


def static_int8(x, layer):
    shift = layer.input_zero_point
    return ((x / layer.input_scale).round().add(shift).clamp(-128, 127) - shift) * layer.input_scale


def static_nvfp4(x, layer):
    """Blocks of 16 with scales in e4m3, which count in units of a static one."""
    x, unit = x.view(len(x), -1, 16), layer.input_global_scale_inv
    scale = (x.abs().amax(-1, keepdim=True) / 6 * unit).clamp(-448, 448).to(E4M3).float()
    levels = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    wanted = torch.where(scale > 0, x * unit / scale, 0).clamp(-6, 6)
    nearest = levels[(wanted.abs()[..., None] - levels).abs().argmin(-1)] * wanted.sign()
    return (nearest * scale / unit).flatten(1)


def emulated(rounded, weight: torch.Tensor, dtype: torch.dtype = torch.bfloat16, bias=None, **scales) -> torch.nn.Module:
    layer = torch.nn.Module()
    layer.input_size, layer.output_size, layer.params_dtype = IN, OUT, dtype
    layer.quant_method, layer.exact, layer.bias = Emulated(rounded), weight, bias
    layer.weight = torch.nn.Parameter(weight.to(E4M3), requires_grad=False)
    for name, value in scales.items():
        layer.register_parameter(name, torch.nn.Parameter(torch.tensor(value), requires_grad=False))
    return layer


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(
    ("rounded", "names"),
    [
        (static_e4m3, {"input_scale": 1.0}),
        (static_int8, {"input_scale": 1.0, "input_zero_point": 0}),
        (static_int8, {"input_scale": 1.0, "input_zero_point": 101}),
        (static_int8, {"input_scale": 1.0, "input_zero_point": -128}),
        (static_nvfp4, {"input_global_scale_inv": -1.0}),
        (dynamic_e4m3, {}),
        (blocks_e4m3, {}),
        (blocks_e4m3_with_powers_of_two, {}),
    ],
)
def test_inputs_that_are_rounded(rounded, names, scale, dtype, weight):
    scales = {name: scale**value if "scale" in name else value for name, value in names.items()}
    bias = torch.randn(OUT, generator=torch.Generator().manual_seed(2)).to(dtype)
    layer = emulated(rounded, weight, dtype, bias, **scales)
    applied, read_bias = effective_weight(layer, dtype)
    assert applied.dtype == dtype
    assert error(applied, weight) < 4e-3
    assert torch.equal(read_bias, bias)


def test_a_scale_that_no_kernel_reads(weight):
    """Weight-only kernels may leave the scale of the inputs where the checkpoint had it."""
    layer = emulated(lambda x, layer: x, weight, input_scale=0.37)
    assert error(effective_weight(layer, torch.bfloat16)[0], weight) < 4e-3


@pytest.mark.parametrize("scale", SCALES[:3])
@pytest.mark.parametrize(
    ("kind", "zero_point"),
    [
        ("compressed int8 static", 0),
        ("compressed int8 static asymmetric", 90),
        ("compressed int8 static asymmetric", -70),
        ("compressed int8 rows", 0),
    ],
)
def test_vllms_own_linears(kind, zero_point, scale, weight):
    """Those that its CPU engine has; `test_gpu_draft_weights.py` has the others."""
    with one_rank():
        layer, expected = build(kind, weight, scale, zero_point=zero_point)
        applied, _ = effective_weight(layer, torch.bfloat16)
    assert error(applied, expected) < 4e-3


def test_a_plain_weight_is_the_targets_own(weight):
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    layer = SimpleNamespace(
        input_size=IN,
        output_size=OUT,
        weight=torch.nn.Parameter(weight.bfloat16()),
        bias=None,
        quant_method=object.__new__(UnquantizedLinearMethod),
    )
    applied, _ = effective_weight(layer, torch.bfloat16)
    assert applied.data_ptr() == layer.weight.data_ptr()
