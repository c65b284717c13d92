"""Linears on weights in Marlin's order: the layout against vLLM's, the kernel against its reference."""

import math

import pytest
import torch
import torch.nn.functional as F
from vllm.model_executor.layers.quantization.utils import marlin_utils, marlin_utils_test
from vllm.model_executor.layers.quantization.utils.quant_utils import pack_rows

from vllm_quantspec.kernels import marlin_linear as module
from vllm_quantspec.kernels.marlin_dequantize import marlin_dequantize
from vllm_quantspec.kernels.marlin_linear import (
    Kind,
    MarlinWeight,
    dequantize,
    kind_of,
    marlin_linear,
    pack,
    reference,
    repack,
    single_order,
)

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
on_a_gpu = pytest.mark.skipif(not CUDA, reason="needs an NVIDIA GPU")

DTYPES = [torch.bfloat16, torch.float16]
GROUPS = [-1, 32, 64, 128]
# Outputs and input channels: one strip and unit, odd numbers of both, parts that warps share evenly or not.
SMALL = [(64, 64), (192, 128), (320, 1088), (128, 2304)]
LARGE = [(4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336)]


def random_weight(shape, group, has_zeros, dtype, device=DEVICE):
    """Packed, and dequantized float32 [out, in]."""
    out_features, in_features = shape
    groups = 1 if group == -1 else in_features // group
    generator = torch.Generator(device).manual_seed(out_features + in_features + group)
    codes = torch.randint(0, 16, shape, dtype=torch.uint8, device=device, generator=generator)
    scales = torch.rand(out_features, groups, device=device, generator=generator).add_(0.3).mul_(0.2 * in_features**-0.5)
    scales = scales.to(dtype)
    zeros = torch.randint(0, 16, scales.shape, dtype=torch.uint8, device=device, generator=generator) if has_zeros else None
    middle = torch.full_like(scales, 8) if zeros is None else zeros
    levels = codes.unflatten(1, (groups, -1)).float() - middle.float().unsqueeze(-1)
    return pack(codes, scales, zeros), (levels * scales.float().unsqueeze(-1)).flatten(1)


def random_x(tokens, channels, dtype, device=DEVICE, seed=0):
    generator = torch.Generator(device).manual_seed(100 * tokens + seed)
    return torch.randn(tokens, channels + 8, device=device, generator=generator).to(dtype)[:, :channels]


def fits(shape, group):
    return group == -1 or shape[1] % group == 0


# --- Layout and reference ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_zeros", [False, True])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("shape", SMALL[:3])
def test_packed_weights_read_back(shape, group, has_zeros, dtype):
    if not fits(shape, group):
        return
    packed, plain = random_weight(shape, group, has_zeros, dtype)
    assert torch.equal(dequantize(packed), plain)
    assert torch.equal(marlin_dequantize(packed), plain.to(dtype))


@pytest.mark.parametrize("group", GROUPS)
def test_the_layout_is_that_of_vllm(group):
    out_features, in_features = 192, 256
    generator = torch.Generator().manual_seed(1)
    groups = 1 if group == -1 else in_features // group
    codes = torch.randint(0, 16, (out_features, in_features), dtype=torch.uint8, generator=generator)
    zeros = torch.randint(0, 16, (out_features, groups), dtype=torch.uint8, generator=generator)
    scales = torch.randn(out_features, groups, generator=generator).bfloat16()
    bias = torch.randn(out_features, generator=generator)
    packed = pack(codes, scales, zeros)
    order = marlin_utils_test.get_weight_perm(4)
    theirs = marlin_utils_test.marlin_weights(codes.t().int(), in_features, out_features, 4, order)
    assert torch.equal(packed.codes, theirs)
    assert torch.equal(packed.scales, marlin_utils.marlin_permute_scales(scales.t(), in_features, out_features, group))
    assert torch.equal(packed.zeros, marlin_utils.marlin_zero_points(zeros.t().int().clone(), groups, out_features, 4))
    assert torch.equal(single_order(bias), marlin_utils.marlin_permute_bias(bias))
    assert torch.equal(single_order(single_order(bias)), bias)
    assert torch.equal(repack(pack_rows(codes.t().int(), 4, in_features, out_features)), theirs)


def test_a_large_weight_is_repacked_piece_by_piece(monkeypatch):
    codes = torch.randint(0, 16, (128, 640), dtype=torch.uint8)
    words = pack_rows(codes.t().int(), 4, 640, 128)
    whole = repack(words)
    monkeypatch.setattr(module, "_AT_ONCE", 5000)
    assert torch.equal(repack(words), whole)


def test_the_reference_is_the_dequantized_weight():
    for group, has_zeros in ((-1, False), (-1, True), (64, False), (32, True)):
        packed, plain = random_weight(SMALL[1], group, has_zeros, torch.float16, "cpu")
        x = random_x(5, SMALL[1][1], torch.float16, "cpu")
        bias = torch.randn(SMALL[1][0]).half()
        expected = (x.float() @ plain.t() + bias.float()).half()
        torch.testing.assert_close(reference(x, *packed, single_order(bias)), expected, rtol=2e-3, atol=2e-3)


def test_it_is_an_operator_to_compilers():
    packed, _ = random_weight(SMALL[1], 64, True, torch.bfloat16)
    torch.library.opcheck(torch.ops.vllm_quantspec.marlin_linear, (random_x(3, SMALL[1][1], torch.bfloat16), *packed, None))


def test_what_does_not_fit_is_refused():
    packed, _ = random_weight((192, 128), 64, True, torch.bfloat16, "cpu")
    x = random_x(2, 128, torch.bfloat16, "cpu")
    for arguments, what in (
        ((x.float(), *packed), "x must be torch.bfloat16"),
        ((x[:, :64], *packed), "x has 64 channels, the weight 128"),
        ((x, packed.codes[:, :128], *packed[1:]), "not those of a MarlinWeight"),
        ((x, *packed[:2], packed.zeros[:1]), "zeros must be int32"),
        ((x, *packed, torch.zeros(3)), "bias must be"),
        ((x, packed.codes, packed.scales.repeat(4, 1), None), "Groups of 16"),
        ((x, packed.codes.t().contiguous().t(), *packed[1:]), "must be contiguous"),
    ):
        with pytest.raises(ValueError, match=what):
            marlin_linear(*arguments)
    assert "multiple of 64 x 64" in module.supported(96, 64, 32, torch.float16)
    assert "bfloat16 or float16" in module.supported(64, 64, 32, torch.float32)
    assert "compute capability 8.0" in module.supported(64, 64, 32, torch.float16, (7, 5))
    assert module.supported(4096, 6144, 128, torch.float16, (9, 0)) is None
    with pytest.raises(ValueError, match="not those of one weight"):
        pack(torch.zeros(64, 64, dtype=torch.uint8), torch.ones(64, 3))


# --- The kernel -------------------------------------------------------------------------------------------------------


def check(packed, dtype, all_tokens=(1, 2, 5, 8, 9, 16, 17, 32, 70), bias=None, plan=None):
    for tokens in all_tokens:
        x = random_x(tokens, packed.in_features, dtype)
        expected = reference(x, *packed, bias).float()
        out = torch.empty(tokens, packed.out_features, dtype=dtype, device=DEVICE)
        out = marlin_linear(x, *packed, bias) if plan is None else module.launch(x, packed, bias, out, plan)
        error = ((out.float() - expected).norm(dim=-1) / expected.norm(dim=-1)).max().item()
        print(f"{tuple(packed.scales.shape)} {dtype} {tokens} tokens: {error:.2g}")
        assert out.dtype == dtype and out.isfinite().all()
        assert error < (0.006 if dtype == torch.bfloat16 else 0.001), (tokens, error)


@on_a_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_zeros", [False, True])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("shape", SMALL)
def test_kernel_computes_what_the_reference_does(shape, group, has_zeros, dtype):
    if fits(shape, group):
        packed, _ = random_weight(shape, group, has_zeros, dtype)
        check(packed, dtype, bias=torch.randn(shape[0], device=DEVICE).to(dtype) if has_zeros else None)


@on_a_gpu
@pytest.mark.parametrize("group", [-1, 128])
@pytest.mark.parametrize("shape", LARGE)
def test_large_linears(shape, group):
    packed, plain = random_weight(shape, group, group == 128, torch.bfloat16)
    check(packed, torch.bfloat16, all_tokens=(1, 8, 16, 32))
    assert torch.equal(marlin_dequantize(packed), plain.bfloat16())


@on_a_gpu
@pytest.mark.parametrize("warps", [1, 4, 8])
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("slots", [2, 3, 0])
@pytest.mark.parametrize("token_tiles", [1, 2, 4])
def test_other_plans(warps, splits, slots, token_tiles):
    packed, _ = random_weight((320, 1280), 64, True, torch.float16)
    rounds = math.ceil(math.ceil(20 / splits) / warps)
    if not slots and rounds * token_tiles > 8:
        return
    plan = module.Plan(warps, 2, token_tiles, splits, 3, slots or rounds, not slots, 1)
    check(packed, torch.float16, all_tokens=(1, 6, 11, 40), plan=plan)


@on_a_gpu
@pytest.mark.parametrize("shape", [SMALL[2], LARGE[0], LARGE[3]])
def test_a_token_is_the_same_among_others(shape):
    packed, _ = random_weight(shape, 64, True, torch.bfloat16)
    x = random_x(70, shape[1], torch.bfloat16)
    together = marlin_linear(x, *packed)
    for tokens in (1, 7, 8, 9, 16, 17, 32, 33):
        assert torch.equal(marlin_linear(x[:tokens], *packed), together[:tokens]), tokens
    for i in (3, 40, 69):
        assert torch.equal(marlin_linear(x[i : i + 1], *packed)[0], together[i])
    for _ in range(20):
        assert torch.equal(marlin_linear(x, *packed), together)
    assert marlin_linear(x[:0], *packed).shape == (0, shape[0])


@on_a_gpu
def test_rows_at_odd_addresses():
    packed, _ = random_weight(SMALL[2], 32, False, torch.bfloat16)
    x = random_x(4, SMALL[2][1], torch.bfloat16)
    odd = torch.zeros(4, SMALL[2][1] + 3, dtype=x.dtype, device=DEVICE)[:, 1 : SMALL[2][1] + 1]
    assert torch.equal(marlin_linear(odd.copy_(x), *packed), marlin_linear(x, *packed))


@on_a_gpu
@pytest.mark.parametrize("tokens", [1, 12, 32])
def test_graphs_of_launches_in_a_row(tokens):
    """Layers follow one another in a CUDA graph, each reading what the last one wrote, through one workspace."""
    shapes = [(4096, 1024), (1024, 4096), (2048, 1024), (1024, 2048)]
    layers = [random_weight(shape, 128, bool(i % 2), torch.bfloat16)[0] for i, shape in enumerate(shapes)]
    x = random_x(tokens, 1024, torch.bfloat16).contiguous()

    def run():
        y = x
        for packed in layers * 3:
            y = marlin_linear(y, *packed)
            y = F.rms_norm(y, y.shape[1:]) if packed.out_features == 1024 else y
        return y

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for seed in range(5):
        x.copy_(random_x(tokens, 1024, torch.bfloat16, seed=seed))
        graph.replay()
        assert torch.equal(out, run()) and out.isfinite().all() and out.norm() > 0


@on_a_gpu
def test_a_shape_first_seen_in_a_capture_is_refused():
    packed, _ = random_weight((64, 3136), -1, True, torch.float16)
    x = random_x(1, 3136, torch.float16).contiguous()
    with pytest.raises(RuntimeError, match="before capturing"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        marlin_linear(x, *packed)


def test_the_kind_of_a_weight():
    packed, _ = random_weight((64, 128), 128, False, torch.float16, "cpu")
    assert kind_of(packed) == Kind(0, False, False)  # one group is a scale per output, as vLLM lays it out
    packed, _ = random_weight((64, 128), 64, True, torch.bfloat16, "cpu")
    assert kind_of(packed) == Kind(64, True, True) and isinstance(packed, MarlinWeight)
