"""The CUDA kernels compile for the GPUs that have them, in the variants that engines launch. NVRTC needs no GPU for it."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from emulated_gpus import GPUS, H200

from vllm_quantspec.format import PageFormat
from vllm_quantspec.kernels import (
    decode_attention,
    device,
    draft_layer,
    fused_linear,
    int4_experts,
    int4_linear,
    marlin_dequantize,
    marlin_linear,
    nvrtc,
)
from vllm_quantspec.kernels.device import Device
from vllm_quantspec.kernels.draft_layer import Order
from vllm_quantspec.kernels.marlin_linear import Kind


def has_nvrtc() -> bool:
    try:
        nvrtc.call("nvrtcVersion")
    except Exception:  # without the bindings or without the library, whose loader raises what it likes
        return False
    return True


pytestmark = pytest.mark.skipif(not has_nvrtc(), reason="needs NVRTC: pip install cuda-bindings nvidia-cuda-nvrtc")

A100 = replace(GPUS["a100"], from_ptx=False)


@pytest.fixture
def on(monkeypatch):
    """Take every GPU for this one, and compile kernels where they would be loaded; the sources that were, in order."""
    compiled, before = [], device._emulated

    def load(source, macros, index, *, features="", **launch):
        assert nvrtc.compile_source(source, tuple(macros.items()), device.device_properties(index).architecture + features)
        compiled.append(source.name)

    def put(gpu: Device | None) -> list[str]:
        device.emulate(gpu)
        for module in (int4_experts, int4_linear, marlin_linear):
            module.choose_plan.cache_clear()
        return compiled

    monkeypatch.setattr(nvrtc, "load", load)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    yield put
    put(before)


# bits read of each code, query heads per KV head, query tokens, whether pages may change, scores and lists
READINGS = {
    "draft": (4, 4, 1, False, (False, True)),
    "target": (8, 4, 5, True, (False, False)),
    "target that scores": (8, 4, 5, True, (True, False)),
    "wide groups that score": (8, 8, 5, True, (True, False)),
    "wide groups": (8, 8, 5, True, (False, False)),
    "wide groups of 4 bits": (4, 8, 5, True, (False, False)),
}


@pytest.mark.parametrize("gpu", [H200, A100], ids=lambda gpu: gpu.name)
@pytest.mark.parametrize("reading", READINGS)
def test_attention(reading, gpu, on):
    compiled = on(gpu)
    bits, group, tokens, pages_may_change, sparse = READINGS[reading]
    fmt = PageFormat(8, 128)
    plans = decode_attention.row_plans(128, 128, group * tokens, gpu.has_wgmma)
    for plan in plans[:2]:
        shape = decode_attention._shape(fmt, bits, plan, gpu)
        decode_attention._kernel.__wrapped__(fmt, bits, group, plan, shape, 0, pages_may_change, sparse, True)
    assert len(compiled) == len(plans[:2])


@pytest.mark.parametrize("head_size", [64, 96, 256])
def test_attention_of_other_heads(head_size, on):
    compiled = on(A100)
    fmt = PageFormat(2, head_size)
    for bits, tokens in ((4, 1), (8, 9)):
        plan, shape = decode_attention._configuration(fmt, bits, 4 * tokens, A100)
        decode_attention._kernel.__wrapped__(fmt, bits, 4, plan, shape, 0, bits == 8, (False, False), True)
    assert len(compiled) == 2


@pytest.mark.parametrize("gpu", [H200, A100], ids=lambda gpu: gpu.name)
@pytest.mark.parametrize(
    ("tokens", "bits", "rotated"), [(1, 4, False), (5, 4, True), (5, 8, False), (16, 4, False), (40, 4, False)]
)
def test_linears(tokens, bits, rotated, gpu, on):
    compiled = on(gpu)
    for parts in (False, True) if tokens > 8 else (False,):
        plan = int4_linear.choose_plan(256, 32, 1, tokens, 0, bits, fp8_inputs=parts)
        int4_linear._kernel.__wrapped__(plan, 128, True, 0, rotated)
        if getattr(plan, "ready", False):
            int4_linear._inputs_kernel.__wrapped__(plan, 128, True, 0, rotated)
    assert ("int4_linear_fp8.cu" in compiled) == (tokens > 8 and gpu is H200)


@pytest.mark.parametrize("is_activated", [False, True])
@pytest.mark.parametrize("tokens", [5, 40])
def test_linears_with_what_is_before_them(tokens, is_activated, on):
    on(H200)
    plan = int4_linear.choose_plan(256, 32, 1, tokens, 0)
    kernel = partial(fused_linear._kernel.__wrapped__, is_activated, fused_linear.pieces_of(4096), True, 0)
    kernel()
    if tokens > 8:
        kernel(tuple(plan.input_macros(128, True).items()), plan.overlap)


@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize("order", Order)
def test_layers(order, tokens):
    plan = draft_layer.plan_of(draft_layer.Shape(4096, 4096, 14336, 6144), tokens, H200, order=order)
    assert nvrtc.compile_source(draft_layer.SOURCE, tuple(plan.macros(True).items()), H200.architecture)


@pytest.mark.parametrize("gpu", [H200, A100], ids=lambda gpu: gpu.name)
@pytest.mark.parametrize("kind", [Kind(128, False, True), Kind(32, True, False), Kind(0, True, True)])
def test_linears_in_marlins_order(kind, gpu, on):
    compiled = on(gpu)
    for tokens in (1, 16, 32):
        marlin_linear._kernel.__wrapped__(marlin_linear.choose_plan(64, 224, kind, tokens, 0), kind, 0)
    marlin_dequantize._kernel.__wrapped__(kind, 0)
    assert compiled == 3 * ["marlin_linear.cu"] + ["marlin_dequantize.cu"]


@pytest.mark.parametrize("gpu", [H200, A100], ids=lambda gpu: gpu.name)
@pytest.mark.parametrize(("in_features", "out_features", "group", "in_splits"), [(2048, 1536, 128, 0), (768, 2048, 32, 2)])
def test_experts(in_features, out_features, group, in_splits, gpu, on):
    on(gpu)
    plan = int4_experts.choose_plan(in_features, out_features, group, 128, 8, 1, in_splits > 0, 0)
    macros = int4_experts.macros_of(plan, in_features, out_features, group, 8, True, "gelu", in_splits)
    assert nvrtc.compile_source(int4_experts.SOURCE, tuple(macros.items()), gpu.architecture)


@pytest.mark.parametrize("name", GPUS)
def test_ptx_for_older_gpus(name, on):
    """As `--emulate-gpu` makes it."""
    compiled = on(GPUS[name])
    plan = int4_linear.choose_plan(256, 32, 1, 5, 0)
    int4_linear._kernel.__wrapped__(plan, 128, True, 0)
    assert compiled == ["int4_linear.cu"]
