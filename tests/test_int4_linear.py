"""Linears in 4 and 8 bits: packing and the operator on the CPU, the CUDA kernel against the reference on a GPU."""

import random

import pytest
import torch

from vllm_quantspec import levels
from vllm_quantspec.kernels import int4_linear as module
from vllm_quantspec.kernels.device import device_properties
from vllm_quantspec.kernels.int4_linear import PackedLinear, int4_linear, pack, reference, supported, unpack
from vllm_quantspec.kernels.int4_linear_wide import TOKEN_TILES, WidePlan
from vllm_quantspec.rotation import rotate_inputs
from vllm_quantspec.weights import QuantizedWeight, quantize_weight

BF16, FP16 = torch.bfloat16, torch.float16
TOLERANCE = {BF16: 6e-3, FP16: 1.5e-3}  # a row may be 16 numbers, rounded to 8 bits
SCALED_TOLERANCE = {BF16: 9e-3, FP16: 2e-3}  # so is each weight, with more than 16 tokens


def random_weight(out_features, in_features, group_size, dtype=BF16, device="cpu", seed=0, bits=4) -> QuantizedWeight:
    """Every code and zero point appears; scales differ by row and group."""
    generator = torch.Generator(device).manual_seed(seed)
    codes = torch.randint(0, 2**bits, (out_features, in_features), generator=generator, device=device, dtype=torch.uint8)
    groups = (out_features, in_features // group_size)
    zeros = torch.randint(0, 2**bits, groups, generator=generator, device=device, dtype=torch.uint8)
    scales = (0.002 + 0.02 * torch.rand(groups, generator=generator, device=device)).to(dtype)
    return QuantizedWeight(codes, scales, zeros, group_size, bits=bits)


def random_inputs(tokens, channels, dtype=BF16, device="cpu", seed=1) -> torch.Tensor:
    """Never zero, not centred, with outlier channels as models have them."""
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(tokens, channels, generator=generator, device=device) + 0.1
    x[:, 5::97] *= 50
    return x.to(dtype)


def packed_of(weight: QuantizedWeight) -> PackedLinear:
    return pack(weight.codes, weight.scales, weight.zeros, weight.group_size, weight.bits)


def relative_error(out, expected) -> float:
    return float((out.double() - expected.double()).norm() / expected.double().norm())


# --- CPU --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(("shape", "group"), [((48, 384), 128), ((16, 192), 64), ((32, 96), 32), ((16, 32), 32)])
@pytest.mark.parametrize("bits", levels.BITS)
def test_unpack_inverts_pack(shape, group, dtype, bits):
    weight = random_weight(*shape, group, dtype, bits=bits)
    packed = packed_of(weight)
    codes, scales, zeros = unpack(packed)
    assert torch.equal(codes, weight.codes) and torch.equal(scales, weight.scales) and torch.equal(zeros, weight.zeros)
    assert (packed.out_features, packed.in_features, packed.group_size, packed.bits) == (*shape, group, bits)


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_bytes_of_a_lane_are_fragments_in_8_bits(dtype):
    """What the CUDA kernel makes of a lane's words, done here: registers of the A operand of m16n8k16."""
    weight = random_weight(32, 256, 128, dtype, bits=8)
    level = levels.levels(weight.codes, 8)
    packed = packed_of(weight).codes.view(2, 2, 4, 32, 2, 2, 4)  # tile, chunk, quarter, lane, product, word, byte
    as_bits = packed.int()
    if dtype == BF16:  # __byte_perm with 0x43
        floats = (0x4300 | as_bits).to(torch.int16).view(BF16).float()
    else:  # three bits further up
        floats = (0x5800 | as_bits << 3).to(torch.int16).view(FP16).float()
    for tile, chunk, s, lane, p, i in torch.randint(0, 1 << 30, (400, 6)).tolist():
        tile, chunk, s, lane, p, i = tile % 2, chunk % 2, s % 8, lane % 32, p % 4, i % 2
        g, t = lane // 4, lane % 4
        row, channel = tile * 16 + g + 8 * (p % 2), chunk * 128 + 32 * (s // 2) + 8 * t + 4 * (s % 2) + 2 * (p // 2) + i
        assert floats[tile, chunk, s // 2, lane, s % 2, p // 2, 2 * i + p % 2] == level[row, channel]


@pytest.mark.parametrize("bits", levels.BITS)
def test_large_weights_are_packed_in_pieces(monkeypatch, bits):
    weight = random_weight(16 * 7, 384, 64, bits=bits)
    whole = packed_of(weight)
    monkeypatch.setattr(module, "MAX_PACKED_AT_ONCE", 2 * 16 * 384)
    pieces = packed_of(weight)
    assert torch.equal(pieces.codes, whole.codes) and torch.equal(pieces.scales_zeros, whole.scales_zeros)


def test_packed_weights_take_at_most_30_percent_of_bf16():
    assert packed_of(random_weight(256, 1024, 128)).num_bytes <= 0.3 * 256 * 1024 * 2
    assert packed_of(random_weight(256, 1024, 128, bits=8)).num_bytes <= 0.52 * 256 * 1024 * 2


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("bits", levels.BITS)
def test_cpu_operator_multiplies_by_the_dequantized_weight(group, dtype, rotated, bits):
    original = torch.randn(64, 384, generator=torch.Generator().manual_seed(2)) * 0.05
    weight = quantize_weight(original, group, scale_dtype=dtype, rotated=rotated, bits=bits)
    packed, x = packed_of(weight), random_inputs(7, 384, dtype)
    bias = torch.linspace(-1, 1, 64).to(dtype)
    expected = x.float() @ weight.dequantize().t() + bias.float()
    out = int4_linear(x, packed.codes, packed.scales_zeros, bias, rotated)
    assert out.dtype == dtype and out.shape == (7, 64)
    for row, right in zip(out, expected, strict=True):
        assert relative_error(row, right) < TOLERANCE[dtype]


def test_operator_can_be_traced():
    x = random_inputs(3, 256)
    for bias, rotated, bits in ((None, False, 4), (torch.ones(32, dtype=BF16), True, 4), (None, True, 8)):
        packed = packed_of(random_weight(32, 256, 128, bits=bits))
        arguments = (x, packed.codes, packed.scales_zeros, bias, rotated)
        torch.library.opcheck(torch.ops.vllm_quantspec.int4_linear.default, arguments)


def test_every_shape_that_engines_ask_for_is_supported():
    for channels, rows, group in [(4096, 3072, 128), (7168, 4096, 128), (512, 48, 128), (256, 512, 64), (96, 16, 32)]:
        assert supported(channels, rows, group, BF16, (8, 0)) is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((4096, 4096, 128, torch.float32, (9, 0)), "bfloat16 or float16"),
        ((4096, 4096, 48, BF16, (9, 0)), "groups of"),
        ((4000, 4096, 128, BF16, (9, 0)), "not divisible by the group size"),
        ((4096, 4100, 128, BF16, (9, 0)), "not divisible by 16"),
        ((4096, 4096, 128, BF16, (7, 5)), "compute capability"),
    ],
)
def test_supported_says_why_not(arguments, words):
    assert words in supported(*arguments)


def test_bad_arguments_are_refused():
    weight = random_weight(32, 256, 128)
    packed, x = packed_of(weight), random_inputs(2, 256)
    codes, scales_zeros = packed.codes, packed.scales_zeros
    with pytest.raises(ValueError, match="packed for"):
        int4_linear(x.half(), codes, scales_zeros)
    with pytest.raises(ValueError, match="channels"):
        int4_linear(x[:, :128], codes, scales_zeros)
    with pytest.raises(ValueError, match=r"\[M, in\]"):
        int4_linear(x[0], codes, scales_zeros)
    with pytest.raises(ValueError, match="bias"):
        int4_linear(x, codes, scales_zeros, torch.ones(31, dtype=BF16))
    with pytest.raises(ValueError, match="PackedLinear"):
        int4_linear(x, codes[:1], scales_zeros)
    with pytest.raises(ValueError, match="PackedLinear"):
        int4_linear(x, codes[..., :512].contiguous(), scales_zeros)
    with pytest.raises(ValueError, match="4 or 8"):
        pack(weight.codes, weight.scales, weight.zeros, 128, 6)
    with pytest.raises(ValueError, match="uint8"):
        pack(weight.codes.int(), weight.scales, weight.zeros, 128)
    with pytest.raises(ValueError, match="zeros"):
        pack(weight.codes, weight.scales, weight.zeros[:, :1], 128)
    with pytest.raises(ValueError, match="divisible by 16"):
        pack(weight.codes[:8], weight.scales[:8], weight.zeros[:8], 128)


# --- GPU --------------------------------------------------------------------------------------------------------------

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def check(out_features, in_features, group, tokens, dtype=BF16, bias=False, x=None, rotated=False, plan=None, bits=4):
    """``plan`` instead of the one that the launcher would choose."""
    weight = random_weight(out_features, in_features, group, dtype, "cuda", bits=bits)
    packed = packed_of(weight)
    x = random_inputs(tokens, in_features, dtype, "cuda") if x is None else x
    bias = torch.randn(out_features, device="cuda").to(dtype) if bias else None
    on_cpu = (None if t is None else t.cpu() for t in (x, packed.codes, packed.scales_zeros, bias))
    expected = reference(*on_cpu, rotated)
    out = torch.empty(tokens, out_features, dtype=dtype, device="cuda").fill_(float("nan"))  # what a reused block may hold
    if plan is None:
        del out
        out = int4_linear(x, packed.codes, packed.scales_zeros, bias, rotated)
    else:
        module.launch(x, packed.codes, packed.scales_zeros, bias, out, plan, rotated)
    torch.cuda.synchronize()
    assert out.shape == expected.shape and out.isfinite().all()
    tolerance = TOLERANCE if tokens <= module.MAX_NARROW else SCALED_TOLERANCE
    for row, right in zip(out.cpu(), expected, strict=True):
        assert relative_error(row, right) < tolerance[dtype]


@gpu
@pytest.mark.parametrize("tokens", [*range(1, 10), 16, 17, 24, 33, 40, 48, 64, 65, 100, 256])
@pytest.mark.parametrize("bits", levels.BITS)
def test_kernel_any_number_of_tokens(tokens, bits):
    check(544, 1408, 128, tokens, bits=bits)


@gpu
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("tokens", [1, 5, 16, 65])
@pytest.mark.parametrize("bits", levels.BITS)
def test_kernel_groups_and_dtypes(group, dtype, tokens, bits):
    check(272, 640, group, tokens, dtype, bias=True, bits=bits)


@gpu
@pytest.mark.parametrize("seed", range(24))
def test_more_than_8_tokens_in_random_shapes(seed):
    """Shapes, tokens, groups and dtypes at random, with the plan that the launcher chooses."""
    draw = random.Random(seed)
    group = draw.choice((32, 64, 128))
    rows, channels = 16 * draw.randint(1, 200), group * draw.randint(1, 4096 // group)
    check(rows, channels, group, draw.randint(9, 64), draw.choice((BF16, FP16)), draw.random() < 0.5, rotated=seed % 3 == 0)


def plans_at_random(seed: int, tiles: int, chunks: int, tokens: int, wgmma: bool) -> WidePlan:
    """A plan that the launcher might not choose: few stages, CTAs of which some have a tile more, idle warps."""
    draw = random.Random(seed)
    warps, per_warp, splits = draw.choice((4, 8, 12)), draw.choice((1, 2)), draw.randint(1, min(4, chunks))
    blocks = min(tiles, -(-tiles // (warps * per_warp)) + draw.randint(0, 2))
    token_tiles = next(n for n in TOKEN_TILES if 8 * n >= min(tokens, 64))
    stages, x_stages = draw.randint(2, 5), draw.randint(2, 3)
    producers = draw.randint(1, x_stages)
    cluster = wgmma and splits > 1 and draw.random() < 0.7
    return WidePlan(warps, stages, per_warp, token_tiles, splits, blocks, x_stages, producers, wgmma=wgmma, cluster=cluster)


@gpu
@pytest.mark.parametrize("wgmma", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_more_than_8_tokens_with_random_plans(seed, wgmma):
    device = device_properties(torch.cuda.current_device())
    if wgmma and not device.has_wgmma:
        pytest.skip("needs a Hopper GPU")
    draw = random.Random(100 + seed)
    group, tokens = draw.choice((32, 64, 128)), draw.randint(9, 70)
    rows, channels = 16 * draw.randint(1, 40), group * draw.randint(1, 2048 // group)
    plan = plans_at_random(seed, rows // 16, -(-channels // 128), tokens, wgmma)
    if plan.shared_bytes(group) > device.shared_memory_per_block:
        pytest.skip("needs more shared memory per block")
    check(rows, channels, group, tokens, draw.choice((BF16, FP16)), True, rotated=seed % 2 == 0, plan=plan)


@gpu
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("tokens", [1, 5, 8, 16, 17, 32, 65])
@pytest.mark.parametrize("bits", levels.BITS)
def test_kernel_rotates_its_inputs(group, dtype, tokens, bits):
    """Also where the last chunk of channels is not a whole one, and where CTAs split the channels."""
    check(272, 640, group, tokens, dtype, bias=True, rotated=True, bits=bits)
    check(48, 576 if group < 128 else 384, group, tokens, dtype, rotated=True, bits=bits)
    check(16, 4096, group, tokens, dtype, rotated=True, bits=bits)


@gpu
@pytest.mark.parametrize("tokens", [1, 16, 40])
def test_rotated_inputs_are_those_of_the_reference(tokens):
    """The weight is 1 on its diagonal and 0 elsewhere, so that the result is what the kernel multiplies by."""
    channels = 256
    codes = torch.full((channels, channels), 8, dtype=torch.uint8, device="cuda")
    codes.fill_diagonal_(9)
    groups = torch.ones(channels, channels // 32, device="cuda")
    packed = pack(codes, groups.bfloat16(), (8 * groups).to(torch.uint8), 32)
    x = torch.randn(tokens, channels, generator=torch.Generator().manual_seed(7)).bfloat16()
    out = int4_linear(x.cuda(), packed.codes, packed.scales_zeros, None, True)
    # What remains of zero points times sums is an error of fp32 sums.
    torch.testing.assert_close(out.cpu(), rotate_inputs(x).bfloat16(), rtol=2**-7, atol=4e-3)


@gpu
@pytest.mark.parametrize(
    ("channels", "rows", "group"),
    [(4096, 6144, 128), (4096, 3072, 128), (14336, 4096, 128), (7168, 4096, 128), (512, 256, 128), (256, 512, 64),
     (96, 16, 32), (32, 48, 32), (160, 4112, 32), (4096, 16, 128), (128, 16, 128), (1024, 40016, 128), (256, 40016, 64)],
)  # fmt: skip
@pytest.mark.parametrize("tokens", [1, 8, 17, 64])
@pytest.mark.parametrize("bits", levels.BITS)
def test_kernel_shapes(channels, rows, group, tokens, bits):
    check(rows, channels, group, tokens, bits=bits)


@gpu
@pytest.mark.parametrize("tokens", [6, 30])
@pytest.mark.parametrize("offset", [0, 3])
def test_kernel_strided_rows(offset, tokens):
    wide = random_inputs(tokens, 1024 + 8 + 5, BF16, "cuda")
    check(64, 1024, 128, tokens, x=wide[:, offset : offset + 1024])
    aligned = random_inputs(tokens, 1024 + 64, BF16, "cuda")
    check(64, 1024, 128, tokens, x=aligned[:, 32 : 32 + 1024])


@gpu
@pytest.mark.parametrize("tokens", [4, 20])
@pytest.mark.parametrize("bits", levels.BITS)
def test_kernel_survives_large_sums_and_outliers(tokens, bits):
    x = random_inputs(tokens, 4096, BF16, "cuda") * 4 + 3
    x[:, 100] = 3000
    check(256, 4096, 128, tokens, x=x, bits=bits)


@gpu
@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("bits", levels.BITS)
def test_kernel_is_deterministic_and_a_token_does_not_depend_on_its_batch(rotated, bits):
    packed = packed_of(random_weight(3072, 4096, 128, device="cuda", bits=bits))
    x = random_inputs(64, 4096, device="cuda")
    whole = int4_linear(x[:8], packed.codes, packed.scales_zeros, None, rotated)
    for tokens in (1, 3, 8, 16, 33, 64):
        out = int4_linear(x[:tokens], packed.codes, packed.scales_zeros, None, rotated)
        assert torch.equal(out, int4_linear(x[:tokens], packed.codes, packed.scales_zeros, None, rotated))
        assert tokens > 8 or torch.equal(out, whole[:tokens])
        other = x[:tokens].clone()
        other[1:] *= 2
        assert torch.equal(out[0], int4_linear(other, packed.codes, packed.scales_zeros, None, rotated)[0])


@gpu
@pytest.mark.parametrize("tokens", [4, 12, 60])
def test_launches_of_different_shapes_follow_one_another(tokens):
    """A chain in which every launch overlaps with the one that makes its input, through the same workspace."""
    shapes = [(1024, 512), (512, 4096), (4096, 256), (256, 1024)]
    bits = (4, 8, 4, 8)
    weights = [
        packed_of(random_weight(n, k, 128, device="cuda", seed=i, bits=bits[i])) for i, (k, n) in enumerate(shapes)
    ]

    def chain(x, function):
        for p in weights:
            x = function(x, p)
            x = x / x.float().square().mean(-1, keepdim=True).sqrt().to(x.dtype) if p.out_features == 4096 else x
        return x

    def kernel(x, p):
        return int4_linear(x, p.codes, p.scales_zeros)

    def slow(x, p):
        return reference(x, p.codes.cpu(), p.scales_zeros.cpu())

    x = random_inputs(tokens, 1024, device="cuda")
    expected = chain(x.cpu(), slow)
    outs = [chain(x, kernel) for _ in range(50)]
    torch.cuda.synchronize()
    assert all(torch.equal(out, outs[0]) for out in outs)
    assert relative_error(outs[0].cpu(), expected) < 3e-2


@gpu
@pytest.mark.parametrize("tokens", [1, 16, 100])
def test_cuda_graph(tokens):
    """Replays read what x holds then; the launch before the operator is of every kind, a join of streams included."""
    sizes = ((1024, 4), (256, 8))
    packed = [packed_of(random_weight(n, 1024, 128, device="cuda", seed=n, bits=bits)) for n, bits in sizes]
    x = random_inputs(tokens, 1024, device="cuda")
    static, other = x.clone(), torch.zeros(4096, device="cuda")

    def step():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            other.mul_(2)
        y = static + 1
        torch.cuda.current_stream().wait_stream(side)
        y = int4_linear(y, packed[0].codes, packed[0].scales_zeros)
        copied = torch.empty_like(y)
        copied.copy_(y)
        return int4_linear(int4_linear(copied, packed[0].codes, packed[0].scales_zeros), packed[1].codes,
                           packed[1].scales_zeros)  # fmt: skip

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for seed in range(3):
        static.copy_(random_inputs(tokens, 1024, device="cuda", seed=seed))
        graph.replay()
        replayed = out.clone()
        assert replayed.isfinite().all() and torch.equal(replayed, step())


@gpu
def test_a_shape_first_seen_in_a_capture_is_refused(monkeypatch):
    packed = packed_of(random_weight(16, 128, 128, device="cuda"))
    x = random_inputs(1, 128, device="cuda")
    int4_linear(x, packed.codes, packed.scales_zeros)
    module._kernel.cache_clear()
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="before capturing"), torch.cuda.graph(graph):
        int4_linear(x, packed.codes, packed.scales_zeros)
    torch.cuda.synchronize()
    int4_linear(x, packed.codes, packed.scales_zeros)


@gpu
def test_compiled_model_calls_the_operator():
    packed = packed_of(random_weight(256, 512, 128, device="cuda"))
    x = random_inputs(3, 512, device="cuda")

    def model(x):
        return torch.relu(int4_linear(x, packed.codes, packed.scales_zeros))

    assert torch.equal(torch.compile(model, fullgraph=True)(x), model(x))
