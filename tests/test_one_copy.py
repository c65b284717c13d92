"""A 4-bit checkpoint's weights exist once: in Marlin's order, shared by the draft, asked for and refused by an option."""

from types import SimpleNamespace

import pytest
import torch
from four_bit_tools import FORMATS, Format, name_of
from linear_tools import one_rank
from vllm.config import get_current_vllm_config
from vllm.model_executor.kernels.linear import MarlinLinearKernel, MPLinearLayerConfig
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.quantization import auto_awq, auto_gptq, get_quantization_config
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import compressed_tensors_wNa16
from vllm.platforms import current_platform
from vllm.scalar_type import scalar_types
from vllm.utils.torch_utils import set_default_torch_dtype

from vllm_quantspec.checkpoint import FourBits, four_bits
from vllm_quantspec.config import EngineOptions, engine_options
from vllm_quantspec.integration.draft import one_copy
from vllm_quantspec.integration.draft.loaded import effective_weight
from vllm_quantspec.integration.gpu import marlin_linears
from vllm_quantspec.integration.startup import one_copy as startup
from vllm_quantspec.integration.startup.one_copy import check_unused, read_one_copy
from vllm_quantspec.kernels import marlin_linear

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
OUT, IN = 192, 256


@pytest.fixture
def marlin(monkeypatch):
    """vLLM chooses Marlin, whose kernel does not run on a CPU, with our methods in its place."""
    for module in (auto_awq, auto_gptq, compressed_tensors_wNa16):
        monkeypatch.setattr(module, "choose_mp_linear_kernel", lambda config: MarlinLinearKernel)
    for name, make in (
        ("process_weights_after_loading", marlin_linears._in_tensor_operations),
        ("apply_weights", marlin_linears._for_few_tokens),
    ):
        monkeypatch.setattr(MarlinLinearKernel, name, make(getattr(MarlinLinearKernel, name)))


def build(form: Format, dtype: torch.dtype, *, bias: bool = False, option: bool = True):
    """A linear of vLLM's with random weights of that format, loaded and processed, and its weight."""
    name = {"awq": "auto_awq", "gptq": "auto_gptq", "auto-round": "inc"}.get(form.method, form.method)
    config = get_quantization_config(name).from_config(form.quantization_config)
    config.packed_modules_mapping = {}
    current = get_current_vllm_config()
    current.model_config = SimpleNamespace(dtype=dtype)
    current.additional_config = {"quantspec": {"one_copy": option}}
    tensors, weight = form.tensors(OUT, IN, dtype, torch.Generator().manual_seed(form.group_size + 2))
    with torch.device(DEVICE), set_default_torch_dtype(dtype):
        layer = ReplicatedLinear(
            IN, OUT, bias=bias, params_dtype=dtype, quant_config=config, prefix="model.layers.0.up_proj"
        )
        for name, parameter in layer.named_parameters():
            value = torch.randn(OUT) if name == "bias" else tensors[name]
            assert parameter.shape == value.shape, name
            parameter.data.copy_(value)
        plain_bias = layer.bias.detach().clone() if bias else None
        layer.quant_method.process_weights_after_loading(layer)
    return layer, weight.to(DEVICE), plain_bias


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMATS, ids=name_of)
def test_a_linear_computes_what_its_file_says(form, dtype, marlin):
    """At few tokens and at many; its one copy is what the draft reads, too."""
    with one_rank():
        layer, weight, bias = build(form, dtype, bias=True)
        assert one_copy.is_shared(layer)
        read = [getattr(layer, name) for name in one_copy.weights_of(layer)]
        assert len(read) == 2 + form.has_zeros
        applied = marlin_linear.dequantize(marlin_linear.MarlinWeight(*read, *[None] * (3 - len(read))))
        assert torch.equal(applied.to(dtype), weight.to(dtype))
        packed = [p for name, p in layer.named_parameters() if name != "bias" and p.numel() > 2]
        groups = 1 if form.group_size == -1 else IN // form.group_size
        expected_bytes = OUT * IN // 2 + OUT * groups * 2 + (OUT * groups // 2 if form.has_zeros else 0)
        assert sum(p.nbytes for p in packed) == expected_bytes
        for tokens in (1, 5, marlin_linears.MAX_TOKENS_ALONE + 40):
            x = torch.randn(tokens, IN, device=DEVICE).to(dtype)
            expected = x.float() @ weight.t() + bias.float()
            out, _ = layer(x)
            assert out.dtype == dtype and (out.float() - expected).norm() < 6e-3 * expected.norm()
        applied, read_bias = effective_weight(layer, dtype)
        assert torch.equal(applied, weight.to(dtype)) and torch.equal(read_bias, bias)


def test_an_engine_without_the_option_keeps_vllms_methods(marlin, monkeypatch):
    calls = []
    monkeypatch.setattr(
        MarlinLinearKernel,
        "process_weights_after_loading",
        marlin_linears._in_tensor_operations(lambda self, layer: calls.append(layer)),
    )
    with one_rank():
        layer, *_ = build(Format("gptq", 64), torch.bfloat16, option=False)
        assert calls == [layer] and (current_platform.is_cpu() or not one_copy.is_shared(layer))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"weight_type": scalar_types.uint8b128}, "not in 4 bits"),
        ({"act_type": torch.float8_e4m3fn}, "not in 16 bits"),
        ({"zero_points": True}, "zero points"),
        ({"partition_weight_shape": (256, 96)}, "multiple of 64 x 64"),
        ({"group_size": 16}, "Groups of 16"),
        ({}, None),
    ],
)
def test_what_stays_with_vllm(changes, why):
    config = MPLinearLayerConfig((IN, OUT), (IN, OUT), scalar_types.uint4b8, torch.bfloat16, 64, False)
    for name, value in changes.items():
        setattr(config, name, value)
    reason = marlin_linears.kept_by_vllm(config)
    assert reason is None if why is None else why in reason


def test_the_draft_shares_what_is_marked():
    layer, other = SimpleNamespace(), SimpleNamespace()
    one_copy.mark(layer, ("qweight", "scales"))
    assert one_copy.is_shared(layer) and not one_copy.is_shared(other)
    assert one_copy.weights_of(layer) == ("qweight", "scales") and not one_copy.weights_of(other)


# --- What a checkpoint says -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMATS, ids=name_of)
def test_formats_are_known_by_their_configuration(form):
    assert four_bits(form.quantization_config) == FourBits(form.group_size, form.has_zeros)


def test_bits_in_memory():
    assert FourBits(128, False).bits(4096) == 4.125
    assert FourBits(32, True).bits(4096) == 4.625
    assert FourBits(-1, False).bits(4096) == 4 + 16 / 4096


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (None, "is not quantized"),
        ({"quant_method": "fp8"}, "is quantized by fp8"),
        ({"bits": 8}, "integer weights of 8 bits"),
        ({"desc_act": True}, "act-order"),
        ({"sym": False}, "asymmetric GPTQ weights"),
        ({"group_size": 256}, "groups of 256"),
    ],
)
def test_other_checkpoints_have_a_reason(changes, why):
    settings = None if changes is None else Format("gptq", 128).quantization_config | changes
    assert why in four_bits(settings)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"num_bits": 8}, "integer weights of 8 bits"),
        ({"type": "float"}, "float weights of 4 bits"),
        ({"strategy": "tensor"}, "per tensor"),
        ({"actorder": "group"}, "act-order"),
    ],
)
def test_other_compressed_tensors_have_a_reason(changes, why):
    settings = Format("compressed-tensors", 128).quantization_config
    settings["config_groups"]["all"]["weights"].update(changes)
    assert why in four_bits(settings)
    settings = Format("compressed-tensors", 128).quantization_config
    settings["config_groups"]["all"]["input_activations"] = {"num_bits": 8}
    assert "activations" in four_bits(settings)


# --- The option -------------------------------------------------------------------------------------------------------


def test_options_of_the_engine():
    assert engine_options({}) == engine_options(object()) == EngineOptions(one_copy=False)
    assert engine_options({"quantspec": {"one_copy": True}}).one_copy
    for given, what in (
        ({"one_copies": True}, "unknown option 'one_copies'"),
        ({"one_copy": "yes"}, "true or false"),
        ("one_copy", "must be a dictionary"),
    ):
        with pytest.raises(ValueError, match=what):
            engine_options({"quantspec": given})
    with pytest.raises(ValueError, match="this engine does not use it"):
        check_unused({"quantspec": {"one_copy": True}})
    check_unused({"quantspec": {"one_copy": False}})


def config_like(quantization, backend="auto", per_quant=None):
    return SimpleNamespace(
        additional_config={"quantspec": {"one_copy": True}},
        model_config=SimpleNamespace(model="MODEL", hf_config=SimpleNamespace(quantization_config=quantization)),
        kernel_config=SimpleNamespace(linear_backend=backend, linear_backend_per_quant=per_quant),
    )


def test_vllm_is_told_to_choose_marlin(monkeypatch):
    monkeypatch.setattr(startup, "current_platform", SimpleNamespace(is_cuda=lambda: True))
    config = config_like(FORMATS[0].quantization_config, per_quant={"nvfp4_w4a16": "humming"})
    read_one_copy(config)
    assert config.kernel_config.linear_backend_per_quant == {"nvfp4_w4a16": "humming", "mixed_precision": "marlin"}
    config.additional_config, config.kernel_config.linear_backend_per_quant = {}, None
    read_one_copy(config)
    assert config.kernel_config.linear_backend_per_quant is None


@pytest.mark.parametrize(
    ("config", "environment", "what"),
    [
        (config_like({"quant_method": "fp8"}), {}, "is for 4-bit checkpoints, but MODEL is quantized by fp8"),
        (config_like(FORMATS[0].quantization_config, "machete"), {}, "the linear backend is machete; drop --linear-backend"),
        (
            config_like(FORMATS[0].quantization_config),
            {"VLLM_DISABLED_KERNELS": "MarlinLinearKernel"},
            "VLLM_DISABLED_KERNELS names; take it out",
        ),
        (
            config_like(FORMATS[0].quantization_config),
            {"VLLM_MARLIN_INPUT_DTYPE": "int8"},
            "VLLM_MARLIN_INPUT_DTYPE is int8",
        ),
        (config_like(FORMATS[0].quantization_config), {"VLLM_BATCH_INVARIANT": "1"}, "VLLM_BATCH_INVARIANT excludes"),
    ],
)
def test_what_cannot_be_one_copy_is_refused(config, environment, what, monkeypatch):
    monkeypatch.setattr(startup, "current_platform", SimpleNamespace(is_cuda=lambda: True))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=what):
        read_one_copy(config)


def test_a_vllm_with_another_marlin_is_refused(monkeypatch):
    def missing(name):
        raise ImportError("cannot import name 'unpack_cols'")

    monkeypatch.setattr(startup, "current_platform", SimpleNamespace(is_cuda=lambda: True))
    monkeypatch.setattr(startup, "import_module", missing)
    with pytest.raises(ValueError, match="which this vLLM does not have as expected .*unpack_cols.*; drop one_copy"):
        read_one_copy(config_like(FORMATS[0].quantization_config))


@pytest.mark.skipif(not current_platform.is_cpu(), reason="of the CPU engine")
def test_a_cpu_engine_says_that_it_needs_no_option():
    with pytest.raises(ValueError, match="kernels of a GPU"):
        read_one_copy(config_like(FORMATS[0].quantization_config))


def test_many_tokens_where_marlin_runs(monkeypatch):
    """vLLM's kernel gets the same tensors."""
    packed, _ = marlin_linear.pack(torch.randint(0, 16, (OUT, IN), dtype=torch.uint8), torch.ones(OUT, 4).bfloat16()), None
    seen = {}
    monkeypatch.setattr(marlin_linears, "apply_gptq_marlin_linear", lambda **given: seen.update(given))
    marlin_linears.one_copy_linear(torch.randn(marlin_linears.MAX_TOKENS + 1, IN).bfloat16(), *packed, None, True)
    assert seen["weight"] is packed.codes and seen["weight_scale"] is packed.scales and seen["weight_zp"].numel() == 0
    assert seen["wtype"] == scalar_types.uint4b8
    assert (seen["output_size_per_partition"], seen["input_size_per_partition"]) == (OUT, IN)
    seen.clear()
    x = torch.randn(marlin_linears.MAX_TOKENS_MARLIN + 1, IN).bfloat16()
    out = marlin_linears.one_copy_linear(x, *packed, None, True)  # a prompt's tokens
    assert not seen
    torch.testing.assert_close(out, x @ marlin_linear.dequantize(packed).bfloat16().t(), rtol=0.02, atol=0.05)
