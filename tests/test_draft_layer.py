"""A decoder layer between two attentions in one launch: the operator on the CPU, its launches, the kernel on a GPU."""

import random

import pytest
import torch
import torch.nn.functional as F
from emulated_gpus import GPUS, H200

from vllm_quantspec.kernels import draft_layer as module
from vllm_quantspec.kernels import marlin_linear
from vllm_quantspec.kernels.device import device_properties
from vllm_quantspec.kernels.draft_layer import Order, Plan, Shape, draft_layer, launch, plan_of, reference, supported
from vllm_quantspec.kernels.int4_linear import pack

BF16, FP16 = torch.bfloat16, torch.float16
TOLERANCE = {BF16: 8e-3, FP16: 2e-3}
LLAMA_8B, QWEN_7B = Shape(4096, 4096, 14336, 6144), Shape(3584, 3584, 18944, 4608)
LLAMA_70B = Shape(8192, 8192, 28672, 10240)
SMALL = Shape(256, 384, 512, 192)
ORDERS = pytest.mark.parametrize("order", list(Order), ids=lambda order: order.value)
# Every number of tokens in every order.
TOKENS = [(order, tokens) for order in Order for tokens in range(1, order.max_tokens + 1)]
TOKENS = pytest.mark.parametrize("order, tokens", TOKENS, ids=[f"{order.value}-{tokens}" for order, tokens in TOKENS])


def random_layer(shape, dtype=BF16, device="cpu", seed=0, bias=True, order=Order.PACKED):
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
        if order.is_marlin:
            weight = marlin_linear.pack(codes, scales, zeros if order.has_zeros else None)
            weights += [t for t in weight if t is not None]
        else:
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


@ORDERS
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("bias", [False, True])
def test_the_operator_is_the_layer_step_by_step(order, dtype, bias):
    layer, inputs = random_layer(SMALL, dtype, bias=bias, order=order), random_inputs(SMALL, 2, dtype)
    weights, norm, next_norm, of_qkv, epsilon, next_epsilon = layer
    step = len(weights) // 4
    o, gate_up, down, qkv = (weights[i : i + step] for i in range(0, len(weights), step))

    def linear(x, weight, bias=None):
        if not order.is_marlin:
            return torch.ops.vllm_quantspec.int4_linear(x, *weight, bias)
        return marlin_linear.marlin_linear(x, *weight[:2], weight[2] if order.has_zeros else None, bias)

    residual = linear(inputs[0], o) + inputs[1]
    x = F.rms_norm(residual, (SMALL.hidden,), norm, epsilon)
    gate, up = linear(x, gate_up).chunk(2, dim=-1)
    residual = linear(F.silu(gate) * up, down) + residual
    x = F.rms_norm(residual, (SMALL.hidden,), next_norm, next_epsilon)
    expected = linear(x, qkv, of_qkv), residual
    tolerance = {BF16: 2e-2, FP16: 3e-3}[dtype]  # these steps round more often
    for out, right in zip(draft_layer(*inputs, *layer), expected, strict=True):
        assert float((out.double() - right.double()).norm() / right.double().norm()) < tolerance


@ORDERS
def test_the_operator_can_be_traced(order):
    for bias in (False, True):
        arguments = (*random_inputs(SMALL, 2), *random_layer(SMALL, bias=bias, order=order))
        torch.library.opcheck(torch.ops.vllm_quantspec.draft_layer.default, arguments)


def test_a_row_tile_in_marlins_order_is_what_the_kernel_takes_it_for():
    """draft_layer_marlin.cuh: a box of 8 rows of 128 bytes, what of it a lane multiplies, and where its results belong."""
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(0, 16, (128, 256), generator=generator, dtype=torch.uint8)
    scales = torch.arange(1, 257, dtype=torch.float32).view(128, 2)
    zeros = torch.randint(0, 16, (128, 2), generator=generator, dtype=torch.uint8)
    weight, bias = marlin_linear.pack(codes, scales, zeros), marlin_linear.single_order(torch.arange(128))
    for tile in range(8):
        words = weight.codes[8:16, tile * 32 : tile * 32 + 32]  # of the second chunk
        of_rows, of_zeros = weight.scales[1, tile * 16 : tile * 16 + 16], weight.zeros[1, tile * 2 : tile * 2 + 2]
        for lane in range(32):
            g, q = lane // 4, lane % 4
            row = tile // 4 * 64 + g // 2 * 16 + tile % 4 * 2 + g % 2
            word = words[:, g % 2 * 16 + q * 4 + g // 2]
            low, high = word & 0x0F0F0F0F, word >> 4 & 0x0F0F0F0F
            for h in (0, 1):
                assert of_rows[g % 2 * 8 + g // 2 * 2 + h] == scales[row + 8 * h, 1]
                assert of_zeros[g % 2] >> 4 * (g // 2) + 16 * h & 15 == zeros[row + 8 * h, 1]
                place = tile // 4 * 64 + g // 4 * 32 + tile % 4 * 8 + g // 2 % 2 * 4 + g % 2
                assert bias[place + 2 * h] == row + 8 * h
                for i, (part, byte) in enumerate(((low, 0), (low, 2), (high, 0), (high, 2))):
                    channels = 128 + torch.arange(8) * 16 + 2 * q + (0, 1, 8, 9)[i]
                    assert torch.equal(part >> 8 * (byte + h) & 255, codes[row + 8 * h, channels].int())


def test_supported_says_why_not():
    assert supported(LLAMA_8B, 128, BF16, (9, 0)) is None and supported(QWEN_7B, 128, FP16) is None
    assert supported(LLAMA_8B, 128, BF16, (9, 0), order=Order.MARLIN) is None
    for arguments, words in (
        ((LLAMA_8B, 128, torch.float32, (9, 0)), "bfloat16 or float16"),
        ((LLAMA_8B, 64, BF16, (9, 0)), "groups of 128"),
        ((LLAMA_8B, 128, BF16, (9, 0), 8), "8 bits"),
        ((LLAMA_8B, 128, BF16, (8, 9)), "compute capability"),
        ((LLAMA_8B._replace(intermediate=14300), 128, BF16, (9, 0)), "14300 .intermediate. is not divisible by 128"),
        ((LLAMA_8B._replace(qkv=6150), 128, BF16, (9, 0)), "6150 .qkv. is not divisible by 16"),
        ((LLAMA_8B._replace(qkv=6160), 128, BF16, (9, 0), 4, Order.MARLIN), "6160 .qkv. is not divisible by 64"),
        ((LLAMA_8B._replace(attention=128), 128, BF16, (9, 0), 4, Order.MARLIN), "one group"),
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


def test_bad_weights_in_marlins_order_are_refused():
    inputs, layer = random_inputs(SMALL, 2), random_layer(SMALL, order=Order.MARLIN_ZEROS)
    weights, *rest = layer

    def put(i, tensor):
        return [*weights[:i], tensor, *weights[i + 1 :]]

    for arguments, words in (
        ((*random_inputs(SMALL, 3), *layer), "1 to 2 tokens with weights in Marlin's order, not 3"),
        ((*inputs, weights[:11], *rest), "got 11 tensors"),
        ((*inputs, [*weights[3:], *weights[:3]], *rest), "do not follow one another"),
        ((*inputs, put(3, weights[3][:, :-2]), *rest), "of gate_up are not those of a MarlinWeight"),
        ((*inputs, put(4, weights[4][:1]), *rest), "of gate_up are not those of a MarlinWeight"),
        ((*inputs, put(8, weights[8].long()), *rest), "of down are not those of a MarlinWeight"),
        ((*inputs, put(1, weights[1].half()), *rest), "attention is torch.bfloat16 but the scales of o"),
        ((*inputs, put(9, weights[9].t().contiguous().t()), *rest), "of qkv must be contiguous"),
    ):
        with pytest.raises(ValueError, match=words):
            draft_layer(*arguments)


@pytest.mark.parametrize("shape", [LLAMA_8B, QWEN_7B, LLAMA_70B, Shape(2048, 2048, 8192, 3072), SMALL])
@TOKENS
def test_launches_fit_a_hopper_gpu(shape, order, tokens):
    if shape is LLAMA_70B and tokens > 2:
        return
    plan = plan_of(shape, tokens, H200, order=order)
    assert plan.stage_bytes % 128 == 0 or not order.is_marlin  # boxes begin there
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


def check(shape, tokens, dtype=BF16, bias=True, plan=None, seed=0, order=Order.PACKED):
    layer = random_layer(shape, dtype, "cuda", seed, bias, order)
    inputs = random_inputs(shape, tokens, dtype, "cuda", seed + 1)
    outs = launch(*inputs, *layer, plan) if plan else draft_layer(*inputs, *layer)
    assert_close(outs, reference(*inputs, *layer), dtype)


def random_shape(draw, order, most_chunks, most_rows):
    """In Marlin's order of two groups at least, and of strips."""
    chunks, unit = (draw.randint(1 + order.is_marlin, most_chunks) for _ in range(3)), 64 if order.is_marlin else 16
    return Shape(*(128 * n for n in chunks), unit * draw.randint(1, most_rows // unit))


@gpu
@TOKENS
@pytest.mark.parametrize("shape", [LLAMA_8B, QWEN_7B])
def test_kernel_on_models_shapes(shape, order, tokens):
    check(shape, tokens, order=order)


@gpu
@ORDERS
@pytest.mark.parametrize("seed", range(16))
def test_kernel_on_random_shapes(seed, order):
    draw = random.Random(seed)
    shape = random_shape(draw, order, 40, 6400)
    tokens, dtype = draw.randint(1, order.max_tokens), draw.choice((BF16, FP16))
    check(shape, tokens, dtype, draw.random() < 0.5, seed=seed, order=order)


@gpu
@ORDERS
@pytest.mark.parametrize("seed", range(12))
def test_kernel_with_random_plans(seed, order):
    """Plans that the launcher would not choose: few CTAs and warps, several passes, two stages."""
    draw = random.Random(seed)
    shape = random_shape(draw, order, 16, 1600)
    tokens, warps = draw.randint(1, order.max_tokens), draw.randint(8, 16)
    tiles = (draw.randint(1, min(4, 4 * warps // tokens)) for _ in range(3))
    pieces, stages = -(-tokens * shape.hidden // (256 * warps)), draw.randint(2, 4)
    plan = Plan(warps, stages, draw.randint(1, stages), tokens, *tiles, pieces, draw.randint(1, 132), order=order)
    check(shape, tokens, plan=plan, seed=seed, order=order)


@gpu
@ORDERS
def test_launches_of_all_sizes_follow_one_another(order):
    """Every launch overlaps with the one that makes its input; they share a counter, with different numbers of CTAs."""
    shape, tokens = Shape(512, 512, 1024, 768), min(3, order.max_tokens)
    layers = [random_layer(shape, device="cuda", seed=i, order=order) for i in range(4)]
    default = plan_of(shape, tokens, device_properties(torch.cuda.current_device()), order=order)
    plans = [default._replace(blocks=n) for n in (132, 7, 1, 40)]

    def chain(function):
        x, residual = random_inputs(shape, tokens, device="cuda")
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
@pytest.mark.parametrize(
    "order, tokens", [(Order.PACKED, 1), (Order.PACKED, 2), (Order.PACKED, 4), (Order.MARLIN, 1), (Order.MARLIN_ZEROS, 2)]
)
def test_cuda_graph(order, tokens):
    """Many replays, between other kernels of every kind."""
    layer = random_layer(LLAMA_8B, device="cuda", order=order)
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
@TOKENS
@pytest.mark.parametrize("shape", [LLAMA_8B, QWEN_7B, Shape(1920, 3072, 3200, 1088)])
def test_launches_on_the_same_inputs_give_the_same_bits(shape, order, tokens):
    """A CTA that reads before another has written shows here: launches in between leave other values behind."""
    layer = random_layer(shape, device="cuda", order=order)
    first, other = (random_inputs(shape, tokens, device="cuda", seed=seed) for seed in (1, 2))
    expected = [t.clone() for t in draft_layer(*first, *layer)]
    for _ in range(30):
        draft_layer(*other, *layer)
        outs = draft_layer(*first, *layer)
        assert all(torch.equal(a, b) for a, b in zip(outs, expected, strict=True))


@gpu
@ORDERS
def test_a_token_does_not_depend_on_its_batch(order):
    most = order.max_tokens
    layer = random_layer(SMALL, device="cuda", order=order)
    attention, residual = random_inputs(SMALL, most, device="cuda")
    whole = draft_layer(attention, residual, *layer)
    for tokens in range(1, most):
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
