"""Linears together with the norm or the activation in front of them: `normalized_linear` and `activated_linear`."""

import random

import pytest
import torch
import torch.nn.functional as F
from test_int4_linear import packed_of, random_inputs, random_weight, relative_error

from vllm_quantspec.kernels import fused_linear, int4_linear
from vllm_quantspec.kernels.device import device_properties
from vllm_quantspec.kernels.fused_linear import activated_linear, normalized_linear

BF16, FP16 = torch.bfloat16, torch.float16
EPSILON = 1e-5


def arguments(tokens, rows, channels, dtype=BF16, group=128, bits=4, device="cpu", seed=0):
    """x, residual, norm, weight and bias; x has twice the channels, for either operator."""
    generator = torch.Generator(device).manual_seed(seed)
    packed = packed_of(random_weight(rows, channels, group, dtype, device, bits=bits))
    x, residual = (random_inputs(tokens, n * channels, dtype, device, seed + n) for n in (2, 1))
    norm = (1 + 0.3 * torch.randn(channels, generator=generator, device=device)).to(dtype)
    bias = torch.randn(rows, generator=generator, device=device).to(dtype)
    return x, residual, norm, packed, bias


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("tokens", [1, 5, 70])
def test_on_a_cpu(tokens, dtype):
    x, residual, norm, packed, bias = arguments(tokens, 48, 256, dtype)
    weight = int4_linear.dequantize(packed.codes, packed.scales_zeros)
    weights = packed.codes, packed.scales_zeros
    for original in (None, weight.to(dtype)):
        out, total = normalized_linear(x[:, :256], residual, norm, EPSILON, *weights, bias, original)
        assert torch.equal(total, x[:, :256] + residual)
        inputs = F.rms_norm(total.float(), (256,), norm.float(), EPSILON)
        assert relative_error(out, inputs @ weight.t() + bias.float()) < 1e-2
        gate, up = x.float().chunk(2, -1)
        assert relative_error(activated_linear(x, *weights, original), (F.silu(gate) * up) @ weight.t()) < 1e-2


def test_inputs_of_few_bits():
    x, residual, norm, packed, _ = arguments(20, 32, 128)
    weights = packed.codes, packed.scales_zeros
    exact, rounded = (activated_linear(x, *weights, None, fp8) for fp8 in (False, True))
    assert 1e-3 < relative_error(rounded, exact.float()) < 0.1
    exact, rounded = (normalized_linear(x[:, :128], residual, norm, 0.1, *weights, None, None, fp8)[0] for fp8 in (0, 1))
    assert 1e-3 < relative_error(rounded, exact.float()) < 0.1


def test_what_does_not_fit_is_said():
    x, residual, norm, packed, _ = arguments(3, 32, 256)
    weights = packed.codes, packed.scales_zeros
    with pytest.raises(ValueError, match="the weight has 256 channels"):
        activated_linear(x[:, :256], *weights)
    for other in (residual.half(), residual[:2], residual[:, :128]):
        with pytest.raises(ValueError, match="do not fit"):
            normalized_linear(x[:, :256], other, norm, EPSILON, *weights)
    with pytest.raises(ValueError, match="bias must be"):
        normalized_linear(x[:, :256], residual, norm, EPSILON, *weights, norm[:16])
    with pytest.raises(ValueError, match="packed for"):
        activated_linear(x.half(), *weights)
    assert "not divisible by 128" in fused_linear.supported(192)
    assert "more than 32768" in fused_linear.supported(65536)
    assert fused_linear.supported(28672) is None and fused_linear.pieces_of(28672) == 7


# --- GPU --------------------------------------------------------------------------------------------------------------

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


def check(x, residual, norm, packed, bias, original=None, fp8=False):
    """Both operators against single linears on inputs by PyTorch, which round alike, but for a bit here and there."""
    channels, weights = norm.shape[0], (packed.codes, packed.scales_zeros)
    limit = 3e-2 if fp8 else {BF16: 1e-2, FP16: 4e-3}[x.dtype]

    def linear(inputs, bias):
        if original is not None and len(x) > int4_linear.max_faster_tokens(packed.codes):
            return F.linear(inputs, original, bias)
        return int4_linear.int4_linear(inputs, *weights, bias, fp8_inputs=fp8)

    out, total = normalized_linear(x[:, :channels], residual, norm, EPSILON, *weights, bias, original, fp8)
    inputs, expected = fused_linear.normalized(x[:, :channels], residual, norm, EPSILON)
    assert torch.equal(total, expected)
    for row, right in zip(out, linear(inputs, bias), strict=True):
        assert relative_error(row.cpu(), right.float().cpu()) < limit
    out, expected = activated_linear(x, *weights, original, fp8), linear(fused_linear.activated(x), None)
    for row, right in zip(out, expected, strict=True):
        assert relative_error(row.cpu(), right.float().cpu()) < limit
    return out


@gpu
@pytest.mark.parametrize("seed", range(32))
def test_random_shapes(seed):
    """Every kernel of linears: few tokens, many, in 8 bits, with FP8 products whose inputs are converted by either."""
    draw = random.Random(seed)
    bits, dtype = draw.choice((4, 4, 4, 8)), draw.choice((BF16, BF16, FP16))
    group, channels = draw.choice((32, 64, 128)), 128 * draw.randint(1, draw.choice((8, 48, 112)))
    rows = 16 * draw.randint(1, draw.choice((40, 700)))
    tokens = draw.choice((1, 2, draw.randint(3, 8), draw.randint(9, 16), draw.randint(17, 64), draw.randint(65, 100)))
    given = arguments(tokens, rows, channels, dtype, group, bits, "cuda", seed)
    original = None
    if draw.random() < 0.3:
        original = int4_linear.dequantize(given[3].codes, given[3].scales_zeros).to(dtype)
    check(*given, original, fp8=bits == 4 and draw.random() < 0.3)


@gpu
@pytest.mark.parametrize("tokens", [6, 16, 32, 64])
def test_in_graphs_and_chains(tokens):
    """A layer of Llama-3.1-8B's sizes: launches overlap, through the same workspaces; the same at every replay."""
    hidden, intermediate = 4096, 14336
    sizes = {"qkv": (6144, hidden), "gate_up": (2 * intermediate, hidden), "down": (hidden, intermediate)}
    packed = {name: packed_of(random_weight(*size, 128, device="cuda")) for name, size in sizes.items()}
    weights = {name: (p.codes, p.scales_zeros) for name, p in packed.items()}
    norm = torch.rand(hidden, device="cuda").to(BF16) + 0.5
    static, residual = (random_inputs(tokens, hidden, device="cuda", seed=seed) for seed in (1, 2))

    def chain():
        x, rest = static, residual
        for _ in range(3):
            gate_up, rest = normalized_linear(x, rest, norm, EPSILON, *weights["gate_up"])
            x = activated_linear(gate_up, *weights["down"])
            qkv, rest = normalized_linear(x, rest, norm, EPSILON, *weights["qkv"])
            x = qkv[:, :hidden]  # rows are strided
        return x, rest

    expected = chain()
    properties = device_properties(0)
    if properties.has_wgmma and tokens > 16:  # what is to be tested
        plan = int4_linear.choose_plan(2 * intermediate // 16, hidden // 128, 1, tokens, 0)
        assert plan.ready
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = chain()
    for _ in range(3):
        for tensor in captured:
            tensor.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))
    check(torch.cat([static, static], 1), residual, norm, packed["qkv"], torch.rand(6144, device="cuda").to(BF16))
