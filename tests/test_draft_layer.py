"""A decoder layer between two attentions in one launch: the operator on the CPU, its launches, the kernel on a GPU."""

import random

import pytest
import torch
import torch.nn.functional as F
from emulated_gpus import GPUS, KIB

from vllm_quantspec.kernels import draft_layer as module
from vllm_quantspec.kernels.device import Device, device_properties
from vllm_quantspec.kernels.draft_layer import MAX_TOKENS, Plan, Shape, draft_layer, launch, plan_of, reference, supported
from vllm_quantspec.kernels.int4_linear import pack

BF16, FP16 = torch.bfloat16, torch.float16
TOLERANCE = {BF16: 8e-3, FP16: 2e-3}
H200 = Device("NVIDIA H200", (9, 0), 132, 227 * KIB, 228 * KIB)
LLAMA_8B, QWEN_7B = Shape(4096, 4096, 14336, 6144), Shape(3584, 3584, 18944, 4608)
LLAMA_70B = Shape(8192, 8192, 28672, 10240)
SMALL = Shape(256, 384, 512, 176)


def random_layer(shape, dtype=BF16, device="cpu", seed=0, bias=True):
    """weights, norm, next_norm, bias, epsilon, next_epsilon; results are about as large as a model's."""
    generator = torch.Generator(device).manual_seed(seed)

    def rand(*size):
        return torch.rand(*size, generator=generator, device=device)

    weights = []
    for channels, rows in (
        (shape.attention, shape.hidden),
        (shape.hidden, 2 * shape.intermediate),
        (shape.intermediate, shape.hidden),
        (shape.hidden, shape.qkv),
    ):
        codes = torch.randint(0, 16, (rows, channels), generator=generator, device=device, dtype=torch.uint8)
        zeros = torch.randint(4, 12, (rows, channels // 128), generator=generator, device=device, dtype=torch.uint8)
        scales = ((0.5 + rand(rows, channels // 128)) * 0.25 / channels**0.5).to(dtype)
        packed = pack(codes, scales, zeros, 128)
        weights += [packed.codes, packed.scales_zeros]
    norms = [(0.5 + rand(shape.hidden)).to(dtype) for _ in range(2)]
    return weights, *norms, (rand(shape.qkv) - 0.5).to(dtype) if bias else None, 1e-5, 1e-6


def random_inputs(shape, tokens, dtype=BF16, device="cpu", seed=1):
    """With outlier channels in the residual, as models have them."""
    generator = torch.Generator(device).manual_seed(seed)
    attention = torch.randn(tokens, shape.attention, generator=generator, device=device)
    residual = torch.randn(tokens, shape.hidden, generator=generator, device=device) + 0.1
    residual[:, 5::97] *= 20
    return attention.to(dtype), residual.to(dtype)


def assert_close(outs, expected, dtype):
    for out, right in zip(outs, expected, strict=True):
        assert out.shape == right.shape and out.dtype == right.dtype and out.isfinite().all()
        for row, other in zip(out.double().cpu(), right.double().cpu(), strict=True):
            assert float((row - other).norm() / other.norm()) < TOLERANCE[dtype]


# --- CPU --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("bias", [False, True])
def test_the_operator_is_the_layer_step_by_step(dtype, bias):
    layer, inputs = random_layer(SMALL, dtype, bias=bias), random_inputs(SMALL, 3, dtype)
    weights, norm, next_norm, of_qkv, epsilon, next_epsilon = layer
    linear = torch.ops.vllm_quantspec.int4_linear
    residual = linear(inputs[0], *weights[:2]) + inputs[1]
    x = F.rms_norm(residual, (SMALL.hidden,), norm, epsilon)
    gate, up = linear(x, *weights[2:4]).chunk(2, dim=-1)
    residual = linear(F.silu(gate) * up, *weights[4:6]) + residual
    x = F.rms_norm(residual, (SMALL.hidden,), next_norm, next_epsilon)
    expected = linear(x, *weights[6:], of_qkv), residual
    tolerance = {BF16: 2e-2, FP16: 3e-3}[dtype]  # these steps round more often
    for out, right in zip(draft_layer(*inputs, *layer), expected, strict=True):
        assert float((out.double() - right.double()).norm() / right.double().norm()) < tolerance


def test_the_operator_can_be_traced():
    for bias in (False, True):
        arguments = (*random_inputs(SMALL, 2), *random_layer(SMALL, bias=bias))
        torch.library.opcheck(torch.ops.vllm_quantspec.draft_layer.default, arguments)


def test_supported_says_why_not():
    assert supported(LLAMA_8B, 128, BF16, (9, 0)) is None and supported(QWEN_7B, 128, FP16) is None
    for arguments, words in (
        ((LLAMA_8B, 128, torch.float32, (9, 0)), "bfloat16 or float16"),
        ((LLAMA_8B, 64, BF16, (9, 0)), "groups of 128"),
        ((LLAMA_8B, 128, BF16, (9, 0), 8), "8 bits"),
        ((LLAMA_8B, 128, BF16, (8, 9)), "compute capability"),
        ((LLAMA_8B._replace(intermediate=14300), 128, BF16, (9, 0)), "14300 .intermediate. is not divisible by 128"),
        ((LLAMA_8B._replace(qkv=6150), 128, BF16, (9, 0)), "6150 .qkv. is not divisible by 16"),
    ):
        with pytest.raises(AssertionError, match=words):
            raise AssertionError(supported(*arguments))


def test_bad_arguments_are_refused():
    (attention, residual), layer = random_inputs(SMALL, 2), random_layer(SMALL)
    weights, norm, *rest = layer
    bias = layer[3]
    for arguments, words in (
        ((attention[0], residual, *layer), r"\[M, in\]"),
        ((attention.float(), residual, *layer), "bfloat16 or float16"),
        ((*random_inputs(SMALL, 5), *layer), "1 to 4 tokens"),
        ((attention[:0], residual[:0], *layer), "1 to 4 tokens"),
        ((attention.half(), residual.half(), *layer), "was packed for"),
        ((attention[:, :128], residual, *layer), "do not follow one another"),
        ((attention, residual[:, :256], *layer), "residual must be"),
        ((attention, residual[:1], *layer), "residual must be"),
        ((attention, residual, weights[:6], norm, *rest), "got 6 tensors"),
        ((attention, residual, [*weights[2:], *weights[:2]], norm, *rest), "do not follow one another"),
        ((attention, residual, [weights[0][:1], *weights[1:]], norm, *rest), "of o are not those of a PackedLinear"),
        ((attention, residual, weights, norm[1:], *rest), "norm must be"),
        ((attention, residual, weights, norm, norm.float(), *rest[1:]), "next_norm must be"),
        ((attention, residual, weights, norm, norm, bias[1:], *rest[2:]), "bias must be"),
    ):
        with pytest.raises(ValueError, match=words):
            draft_layer(*arguments)


@pytest.mark.parametrize("shape", [LLAMA_8B, QWEN_7B, LLAMA_70B, Shape(2048, 2048, 8192, 3072), SMALL])
@pytest.mark.parametrize("tokens", range(1, MAX_TOKENS + 1))
def test_launches_fit_a_hopper_gpu(shape, tokens):
    if shape is LLAMA_70B and tokens > 2:
        return
    plan = plan_of(shape, tokens, H200)
    assert plan.stages >= 3 and plan.shared_bytes(shape) + plan.static_bytes <= H200.shared_memory_per_block
    assert plan.tokens == tokens and plan.pieces * 256 * plan.warps >= tokens * shape.hidden
    assert 8 * tokens * max(plan.hidden_tiles, plan.pairs, plan.qkv_tiles) <= 32 * plan.warps
    assert plan.flight <= plan.stages and plan.threads <= 1024


def test_a_launch_that_does_not_fit_is_refused():
    with pytest.raises(RuntimeError, match="cannot hold a launch for 4 tokens of .*53248"):
        plan_of(Shape(16384, 16384, 53248, 18432), 4, H200)
    with pytest.raises(RuntimeError, match="cannot hold"):
        plan_of(LLAMA_8B, 4, GPUS["rtx4090"])


# --- GPU --------------------------------------------------------------------------------------------------------------


def _has_gpu() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= module.MIN_CAPABILITY


gpu = pytest.mark.skipif(not _has_gpu(), reason="needs a CUDA GPU of compute capability 9.0")


def check(shape, tokens, dtype=BF16, bias=True, plan=None, seed=0):
    layer = random_layer(shape, dtype, "cuda", seed, bias)
    inputs = random_inputs(shape, tokens, dtype, "cuda", seed + 1)
    outs = launch(*inputs, *layer, plan) if plan else draft_layer(*inputs, *layer)
    assert_close(outs, reference(*inputs, *layer), dtype)


@gpu
@pytest.mark.parametrize("tokens", range(1, MAX_TOKENS + 1))
@pytest.mark.parametrize("shape", [LLAMA_8B, QWEN_7B])
def test_kernel_on_models_shapes(shape, tokens):
    check(shape, tokens)


@gpu
@pytest.mark.parametrize("seed", range(16))
def test_kernel_on_random_shapes(seed):
    draw = random.Random(seed)
    shape = Shape(*(128 * draw.randint(1, 40) for _ in range(3)), 16 * draw.randint(1, 400))
    check(shape, draw.randint(1, MAX_TOKENS), draw.choice((BF16, FP16)), draw.random() < 0.5, seed=seed)


@gpu
@pytest.mark.parametrize("seed", range(12))
def test_kernel_with_random_plans(seed):
    """Plans that the launcher would not choose: few CTAs and warps, several passes, two stages."""
    draw = random.Random(seed)
    shape = Shape(*(128 * draw.randint(1, 16) for _ in range(3)), 16 * draw.randint(1, 100))
    tokens, warps = draw.randint(1, MAX_TOKENS), draw.randint(8, 16)
    tiles = (draw.randint(1, min(4, 4 * warps // tokens)) for _ in range(3))
    pieces, stages = -(-tokens * shape.hidden // (256 * warps)), draw.randint(2, 4)
    plan = Plan(warps, stages, draw.randint(1, stages), tokens, *tiles, pieces, draw.randint(1, 132))
    check(shape, tokens, plan=plan, seed=seed)


@gpu
def test_launches_of_all_sizes_follow_one_another():
    """Every launch overlaps with the one that makes its input; they share a counter, with different numbers of CTAs."""
    shape = Shape(512, 512, 1024, 768)
    layers = [random_layer(shape, device="cuda", seed=i) for i in range(4)]
    default = plan_of(shape, 3, device_properties(torch.cuda.current_device()))
    plans = [default._replace(blocks=n) for n in (132, 7, 1, 40)]

    def chain(function):
        x, residual = random_inputs(shape, 3, device="cuda")
        for i in range(12):
            out, residual = function(i, x, residual, layers[i % 4])
            x = out[:, 128:640]
        return out, residual

    expected = chain(lambda i, x, r, layer: reference(x, r, *layer))
    outs = [chain(lambda i, x, r, layer: launch(x, r, *layer, plans[i % 4])) for _ in range(50)]
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for out in outs for a, b in zip(out, outs[0], strict=True))
    for out, right in zip(outs[0], expected, strict=True):
        assert float((out.double() - right.double()).norm() / right.double().norm()) < 5e-2


@gpu
@pytest.mark.parametrize("tokens", [1, 2, 4])
def test_cuda_graph(tokens):
    """Many replays, between other kernels of every kind."""
    layer = random_layer(LLAMA_8B, device="cuda")
    attention, residual = random_inputs(LLAMA_8B, tokens, device="cuda")

    def step():
        x, r = attention + 1, residual
        for _ in range(3):
            out, r = draft_layer(x, r, *layer)
            x = out[:, :4096]
        return out.clone(), r

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = step()
    for seed in range(20):
        for to, value in zip((attention, residual), random_inputs(LLAMA_8B, tokens, device="cuda", seed=seed), strict=True):
            to.copy_(value)
        graph.replay()
        replayed = [t.clone() for t in outs]
        assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(replayed, step(), strict=True))


@gpu
@pytest.mark.parametrize("tokens", range(1, MAX_TOKENS + 1))
@pytest.mark.parametrize("shape", [LLAMA_8B, QWEN_7B, Shape(1920, 3072, 3200, 1040)])
def test_launches_on_the_same_inputs_give_the_same_bits(shape, tokens):
    """A CTA that reads before another has written shows here: launches in between leave other values behind."""
    layer = random_layer(shape, device="cuda")
    first, other = (random_inputs(shape, tokens, device="cuda", seed=seed) for seed in (1, 2))
    expected = [t.clone() for t in draft_layer(*first, *layer)]
    for _ in range(30):
        draft_layer(*other, *layer)
        outs = draft_layer(*first, *layer)
        assert all(torch.equal(a, b) for a, b in zip(outs, expected, strict=True))


@gpu
def test_a_token_does_not_depend_on_its_batch():
    layer, (attention, residual) = random_layer(SMALL, device="cuda"), random_inputs(SMALL, 4, device="cuda")
    whole = draft_layer(attention, residual, *layer)
    for tokens in range(1, 4):
        outs = draft_layer(attention[:tokens], residual[:tokens], *layer)
        assert all(torch.equal(a, b[:tokens]) for a, b in zip(outs, whole, strict=True))


@gpu
def test_rows_may_be_strided():
    layer = random_layer(SMALL, device="cuda")
    attention, residual = random_inputs(SMALL, 3, device="cuda")
    expected = draft_layer(attention, residual, *layer)
    for left in (8, 3):
        beside = torch.full((3, left), torch.nan, device="cuda", dtype=BF16)
        outs = draft_layer(*(torch.cat((beside, t), dim=1)[:, left:] for t in (attention, residual)), *layer)
        assert all(torch.equal(a, b) for a, b in zip(outs, expected, strict=True))


@gpu
def test_a_shape_first_seen_in_a_capture_is_refused():
    layer, inputs = random_layer(SMALL, device="cuda"), random_inputs(SMALL, 2, device="cuda")
    draft_layer(*inputs, *layer)
    module._kernel.cache_clear()
    with pytest.raises(RuntimeError, match="before capturing"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        draft_layer(*inputs, *layer)
    torch.cuda.synchronize()
    draft_layer(*inputs, *layer)


@gpu
def test_ctas_that_cannot_be_on_the_gpu_together_are_refused():
    layer, inputs = random_layer(SMALL, device="cuda"), random_inputs(SMALL, 2, device="cuda")
    plan = plan_of(SMALL, 2, device_properties(torch.cuda.current_device()))
    with pytest.raises(RuntimeError, match="CTAs together"):
        launch(*inputs, *layer, plan._replace(blocks=3 * plan.blocks))
