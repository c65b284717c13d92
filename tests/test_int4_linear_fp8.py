"""INT4 linears with FP8 products: inputs as e4m3 numbers and plans on the CPU, the kernel itself on a Hopper GPU."""

import random
from dataclasses import replace

import pytest
import torch
from emulated_gpus import H200
from test_int4_linear import BF16, FP16, packed_of, random_inputs, random_weight, relative_error

from vllm_quantspec.kernels import int4_linear as module
from vllm_quantspec.kernels.device import device_properties
from vllm_quantspec.kernels.int4_linear_fp8 import TOKEN_TILES, Fp8Plan, choose_fp8_plan, split
from vllm_quantspec.kernels.int4_linear_wide import WidePlan
from vllm_quantspec.weights import WEIGHT_GROUP_SIZES

E4M3 = torch.float8_e4m3fn
SHAPES = ((384, 32), (256, 32), (1792, 32), (256, 112), (8016, 32), (1, 1), (3, 5), (64, 1), (2501, 2))

# --- CPU --------------------------------------------------------------------------------------------------------------


def test_codes_are_e4m3_numbers():
    codes = torch.arange(16, dtype=torch.uint8)
    assert torch.equal(codes.view(E4M3).float() * 2**9, codes.float())


def test_bytes_of_a_lane_are_fragments_in_fp8():
    """What the kernel makes of a lane's words, done here: registers of m64n8k32's A operand, in the order of B's bytes."""
    weight = random_weight(32, 256, 128)
    words = packed_of(weight).codes.view(2, 2, 2, 32, 4, 4).int()  # tile, chunk, half, lane, word, byte
    for tile, chunk, j, lane, register, byte in torch.randint(0, 1 << 30, (400, 6)).tolist():
        tile, chunk, j, lane, register, byte = tile % 2, chunk % 2, j % 4, lane % 32, register % 4, byte % 4
        of = words[tile, chunk, j // 2, lane, j % 2 * 2 + register // 2, byte]
        code = int(of) >> 4 if register % 2 else int(of) & 15
        g, t = lane // 4, lane % 4
        row, channel = tile * 16 + g + 8 * (register % 2), 32 * j + 8 * t + 4 * (register // 2) + (0, 2, 1, 3)[byte]
        assert code == weight.codes[row, chunk * 128 + channel]


@pytest.mark.parametrize("channels", [128, 96, 1000])
def test_two_parts_hold_what_bfloat16_does(channels):
    x = random_inputs(16, channels) * torch.logspace(-12, 12, 16, 2).bfloat16().unsqueeze(1)
    for begin in range(0, channels, 128):
        part, of = split(x, 2)[:, begin : begin + 128], x[:, begin : begin + 128].float()
        assert ((part - of).abs().amax(1) <= 2**-17 * of.abs().amax(1)).all()
    assert torch.equal(split(torch.zeros(2, channels, dtype=BF16)), torch.zeros(2, channels))


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(("parts", "tolerance"), [(1, 0.04), (2, 3e-3)])
def test_parts_are_numbers_of_e4m3(parts, tolerance, dtype):
    x = random_inputs(5, 384, dtype)
    assert relative_error(split(x, parts), x) < tolerance
    one = split(x, 1)
    # A power of two apart from e4m3 numbers: 4 bits each.
    mantissa, _ = torch.frexp(one)
    assert torch.equal(mantissa * 16, (mantissa * 16).round())


@pytest.mark.parametrize("rotated", [False, True])
def test_reference_of_parts(rotated):
    packed, x = packed_of(random_weight(48, 256, 128)), random_inputs(9, 256)
    exact = module.reference(x, packed.codes, packed.scales_zeros, rotated=rotated)
    one, two = (module.reference(x, packed.codes, packed.scales_zeros, None, rotated, parts) for parts in (1, 2))
    assert relative_error(two, exact) < 2e-3 < relative_error(one, exact) < 0.1


@pytest.mark.parametrize("tokens", [8, 9, 64, 65])
@pytest.mark.parametrize("rotated", [False, True])
def test_the_operator_may_round_its_inputs(tokens, rotated):
    """Of 9 to 64 tokens it does, of others not, and in 8 bits never."""
    packed, x = packed_of(random_weight(48, 256, 128)), random_inputs(tokens, 256)
    arguments = x, packed.codes, packed.scales_zeros, None, rotated
    out = module.int4_linear(*arguments, True)
    assert torch.equal(out, module.reference(*arguments, 1 if 9 <= tokens <= 64 else None))
    torch.library.opcheck(torch.ops.vllm_quantspec.int4_linear.default, (*arguments, True))
    wide = packed_of(random_weight(48, 256, 128, bits=8))
    arguments = x, wide.codes, wide.scales_zeros, None, rotated
    assert torch.equal(module.int4_linear(*arguments, True), module.int4_linear(*arguments))


def check_plan(plan: Fp8Plan, tiles: int, chunks: int, group: int) -> None:
    assert -(-tiles // plan.blocks) <= plan.warps * plan.tiles and 1 <= plan.blocks <= tiles
    assert (plan.shared_bytes(group) + 1024) * plan.min_ctas <= H200.shared_memory_per_multiprocessor
    assert plan.shared_bytes(group) <= H200.shared_memory_per_block and plan.stages >= 2 and plan.x_stages >= 2
    assert 1 <= plan.splits <= -(-chunks // 2)  # no CTA without channels
    assert plan.is_resident(1, H200)
    assert plan.warps % 4 == 0 and -(-plan.producers // (2 * plan.token_tiles)) <= plan.x_stages
    assert plan.producers in (0, 1) if plan.ready else plan.producers > 0
    if plan.ready and plan.splits == 1 and plan.stages > 2:  # no CTA more than is meant finds room
        assert (plan.shared_bytes(group) + 1024) * (plan.min_ctas + 1) > H200.shared_memory_per_multiprocessor


@pytest.mark.parametrize("group", WEIGHT_GROUP_SIZES)
@pytest.mark.parametrize("parts", [1, 2])
def test_plans_cover_the_weight_and_fit(group, parts):
    draw = random.Random(0)
    shapes = [*SHAPES, *((draw.randint(1, 3000), draw.randint(1, 200)) for _ in range(200))]
    for tiles, chunks in shapes:
        for tokens in (9, 16, 17, 33, 48, 64):
            plan = choose_fp8_plan(tiles, chunks, 128 // group, tokens, H200, parts)
            assert 8 * plan.token_tiles >= tokens and plan.token_tiles in TOKEN_TILES and plan.parts == parts
            check_plan(plan, tiles, chunks, group)


def test_a_launch_that_would_wait_for_ever_is_known():
    plan = choose_fp8_plan(256, 32, 1, 16, H200)
    assert plan.splits > 1 and plan.is_resident(1, H200) and not plan.is_resident(3, H200)
    assert plan._replace(splits=1).is_resident(3, H200)


def test_plans_use_all_of_a_hopper_gpu():
    """Linears of Llama-3.1-8B and Qwen2.5-7B: a multiprocessor has little more than an even share, idle warps counted."""
    for tiles, chunks in (*SHAPES[:5], (2368, 28), (224, 148)):
        for tokens in (16, 32, 48, 64):
            plan = choose_fp8_plan(tiles, chunks, 1, tokens, H200)
            even = tiles * -(-chunks // 2) / H200.num_multiprocessors
            assert plan.work(chunks, H200) < 1.4 * even, (tiles, chunks, plan)


@pytest.fixture
def choose(monkeypatch):
    """`choose_plan` for a weight on a GPU, an H200 unless another is named."""

    def chosen(tiles, chunks, tokens, gpu=H200, **options):
        monkeypatch.setattr(module, "device_properties", lambda index: gpu)
        module.choose_plan.cache_clear()
        return module.choose_plan(tiles, chunks, 1, tokens, 0, **options)

    yield chosen
    module.choose_plan.cache_clear()


def test_when_it_is_chosen(choose):
    def kind(tokens, **options):
        return type(choose(384, 32, tokens, **options))

    assert kind(8) is module.Plan and kind(65) is WidePlan
    for tokens in (9, 16, 17, 48, 64):
        assert kind(tokens) is Fp8Plan and choose(384, 32, tokens).parts == 2
    assert kind(16, bf16=False) is module.Plan and kind(32, bf16=False) is WidePlan
    assert kind(16, bits=8) is module.Plan
    for capability in ((8, 9), (10, 0), (12, 0)):
        assert kind(32, gpu=replace(H200, capability=capability)) is WidePlan
    # A small weight takes as long with the others, which are more exact.
    assert type(choose(256, 32, 16)) is Fp8Plan and type(choose(256, 32, 32)) is WidePlan
    assert type(choose(256, 16, 16)) is module.Plan


def test_inputs_of_one_part_are_chosen_where_they_were_asked_for(choose):
    for tiles, chunks in SHAPES:
        for bf16 in (False, True):
            for tokens in (9, 16, 32, 64):
                assert choose(tiles, chunks, tokens, bf16=bf16, fp8_inputs=True).parts == 1
    assert type(choose(256, 32, 8, fp8_inputs=True)) is type(choose(256, 32, 16, bits=8, fp8_inputs=True)) is module.Plan
    assert type(choose(256, 32, 65, fp8_inputs=True)) is WidePlan


def test_plans_are_those_measured():
    """Llama-3.1-8B: warps, row tiles of a warp, splits, CTAs along the rows, and whether x is converted by a launch."""
    shapes = {"qkv": (384, 32), "o": (256, 32), "gate_up": (1792, 32), "down": (256, 112), "lm_head": (8016, 32)}
    measured = {
        16: ((8, 3, 8, 16, 0), (8, 2, 8, 16, 0), (8, 1, 1, 264, 1), (8, 2, 8, 16, 0), (8, 2, 1, 528, 1)),
        32: ((8, 1, 4, 48, 1), (8, 1, 8, 32, 1), (8, 1, 1, 264, 1), (12, 1, 6, 22, 1), (16, 1, 1, 528, 1)),
        64: ((12, 1, 4, 32, 1), (4, 1, 4, 64, 1), (16, 1, 1, 132, 1), (4, 1, 4, 64, 1), (16, 1, 1, 528, 1)),
    }
    for tokens, plans in measured.items():
        for shape, expected in zip(shapes.values(), plans, strict=True):
            plan = choose_fp8_plan(*shape, 1, tokens, H200)
            assert (plan.warps, plan.tiles, plan.splits, plan.blocks, plan.ready) == expected


# --- GPU --------------------------------------------------------------------------------------------------------------

hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)


def check(rows, channels, group, tokens, dtype=BF16, rotated=False, plan=None, parts=2):
    if plan is None:
        plan = choose_fp8_plan(rows // 16, -(-channels // 128), 128 // group, tokens, device_properties(0), parts)
    packed = packed_of(random_weight(rows, channels, group, dtype, "cuda"))
    x, bias = random_inputs(tokens, channels, dtype, "cuda"), torch.randn(rows, device="cuda").to(dtype)
    arguments = (x, packed.codes, packed.scales_zeros, bias)
    expected = module.reference(*(t.cpu() for t in arguments), rotated, plan.parts)
    outs = [torch.full((tokens, rows), float("nan"), dtype=dtype, device="cuda") for _ in range(3)]
    for out in outs:
        module.launch(*arguments, out, plan, rotated)
    torch.cuda.synchronize()
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])
    for row, right in zip(outs[0].cpu(), expected, strict=True):
        assert relative_error(row, right) < {BF16: 6e-3, FP16: 2e-3}[dtype]


@hopper
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("seed", range(24))
def test_random_shapes_with_chosen_plans(seed, parts):
    draw = random.Random(seed)
    group = draw.choice((32, 64, 128))
    rows, channels = 16 * draw.randint(1, 200), group * draw.randint(1, 8192 // group)
    check(rows, channels, group, draw.randint(9, 64), rotated=seed % 3 == 0, parts=parts)


@hopper
@pytest.mark.parametrize("ready", [False, True])
@pytest.mark.parametrize("seed", range(16))
def test_random_plans(seed, ready):
    """Few stages, CTAs of which some have a tile more, warp groups without a tile, whole blocks of tokens more."""
    draw = random.Random(100 + seed)
    group, tokens, dtype = draw.choice((32, 64, 128)), draw.randint(9, 70), draw.choice((BF16, FP16))
    tiles, channels = draw.randint(1, 40), group * draw.randint(1, 2048 // group)
    warps, per_warp = draw.choice((4, 8, 16)), draw.choice((1, 2))
    token_tiles = next(n for n in TOKEN_TILES if 8 * n >= min(tokens, 64))
    splits = draw.randint(1, min(4, -(-channels // 256)))
    blocks = min(tiles, -(-tiles // (warps * per_warp)) + draw.randint(0, 2))
    plan = Fp8Plan(
        warps, 2, per_warp, token_tiles, splits, blocks, draw.randint(2, 3), draw.randint(*((0, 1) if ready else (1, 4))),
        ready, draw.random() < 0.7, draw.choice((1, 2)), 1, draw.choice((1, 2)),
    )  # fmt: skip
    if plan.shared_bytes(group) > device_properties(0).shared_memory_per_block:
        pytest.skip("needs more shared memory per block")
    check(16 * tiles, channels, group, tokens, dtype, seed % 2 == 0, plan)


@hopper
@pytest.mark.parametrize("tokens", [16, 48, 64])
def test_warp_groups_that_run_ahead(tokens):
    """Groups without a tile do not wait for codes, and the ring of x is used many times: factors were once read late."""
    token_tiles = next(n for n in TOKEN_TILES if 8 * n >= tokens)
    for warps, splits, blocks, min_ctas in ((16, 2, 66, 1), (8, 4, 66, 2), (16, 4, 33, 1)):
        for turns in (False, True):
            plan = Fp8Plan(warps, 2, 1, token_tiles, splits, blocks, 2, 1, True, turns, 1, min_ctas)
            check(4096, 4096, 128, tokens, plan=plan)


@hopper
@pytest.mark.parametrize("tokens", [12, 60])
@pytest.mark.parametrize("fp8_inputs", [False, True])
def test_the_operator_chooses_it_in_graphs_and_chains(tokens, fp8_inputs):
    """Every launch overlaps with the one that makes its input, through the same workspaces."""
    shapes = (1024, 2048), (2048, 16384), (16384, 1024)
    weights = [packed_of(random_weight(n, k, 128, device="cuda")) for k, n in shapes]
    static = random_inputs(tokens, 1024, device="cuda")

    def chain(x):
        for w in weights:
            codes, scales_zeros = w.codes.to(x.device), w.scales_zeros.to(x.device)
            x = module.int4_linear(x, codes, scales_zeros, None, False, fp8_inputs)
            x = x / x.float().square().mean(-1, keepdim=True).sqrt().to(x.dtype)
        return x

    expected = chain(static)
    # Three linears one after another, and with inputs of few bits each rounds what the one before got a little different.
    assert relative_error(expected.cpu(), chain(static.cpu())) < (0.1 if fp8_inputs else 3e-2)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain(static)
    for _ in range(20):
        graph.replay()
        assert torch.equal(out, expected)
