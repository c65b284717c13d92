"""Every launch fits the shared memory of the GPUs that people have; on a Hopper GPU the plans are the measured ones."""

import math
from dataclasses import replace

import pytest
import torch
from emulated_gpus import GPUS, H200, KIB

from vllm_quantspec.config import HEAD_SIZES, MAX_SPECULATIVE_TOKENS
from vllm_quantspec.format import GROUP_SIZES, PageFormat
from vllm_quantspec.kernels import decode_attention, int4_experts, int4_linear, int4_linear_wide, marlin_linear
from vllm_quantspec.kernels.decode_attention import RowPlan
from vllm_quantspec.kernels.device import Device
from vllm_quantspec.levels import BITS
from vllm_quantspec.weights import WEIGHT_GROUP_SIZES

SMALL = Device("a GPU with little shared memory", (8, 0), 40, 16 * KIB, 32 * KIB)


@pytest.fixture
def on(monkeypatch):
    def put(device: Device) -> None:
        for module in (decode_attention, int4_experts, int4_linear, marlin_linear):
            monkeypatch.setattr(module, "device_properties", lambda index: device)
        forget()

    def forget() -> None:
        for module in (int4_experts, int4_linear, marlin_linear):
            module.choose_plan.cache_clear()

    yield put
    forget()


@pytest.mark.parametrize("name", GPUS)
@pytest.mark.parametrize("group", WEIGHT_GROUP_SIZES)
@pytest.mark.parametrize("bits", BITS)
def test_linears_fit(name, group, bits, on):
    on(GPUS[name])
    for out_features, in_features in ((4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096), (48, 512), (1024, 128)):
        for tokens in (1, 5, 8, 9, 16, 17, 32, 33, 64, 300):
            tiles, chunks = out_features // int4_linear.ROWS, -(-in_features // int4_linear.CHUNK)
            plan = int4_linear.choose_plan(tiles, chunks, int4_linear.CHUNK // group, tokens, 0, bits)
            static = 1024
            assert plan.stages >= 2 and getattr(plan, "bits", 4) == bits
            assert bits == 4 or isinstance(plan, int4_linear.Plan)  # the other kernel reads codes of 4 bits alone
            assert plan.shared_bytes(group) + static <= GPUS[name].shared_memory_per_block, (out_features, tokens)


@pytest.mark.parametrize("gpu", [*GPUS.values(), H200], ids=lambda gpu: gpu.name)
@pytest.mark.parametrize("group", WEIGHT_GROUP_SIZES)
def test_int4_linears_of_many_tokens_cover_the_weight(gpu, group, on):
    """Every row tile has a warp, and CTAs that wait for one another are on the GPU together."""
    on(gpu)
    for tiles, chunks in ((256, 32), (384, 32), (1792, 32), (256, 112), (8016, 32), (3, 4), (1, 1), (64, 1), (2501, 2)):
        for tokens in (17, 32, 33, 48, 64, 65, 300, 8192):
            plan = int4_linear.choose_plan(tiles, chunks, int4_linear.CHUNK // group, tokens, 0)
            token_blocks = -(-tokens // (8 * plan.token_tiles))
            assert plan.blocks * plan.warps * plan.tiles >= tiles >= plan.blocks
            assert -(-tiles // plan.blocks) <= plan.warps * plan.tiles  # of the CTA with the most
            if isinstance(plan, int4_linear.Fp8Plan):  # test_int4_linear_fp8.py has the rest
                assert gpu is H200 and tokens <= int4_linear.MAX_FP8
                continue
            assert 1 <= plan.splits <= chunks and plan.producers <= plan.x_stages
            assert plan.splits == 1 or plan.blocks * plan.splits * token_blocks <= gpu.num_multiprocessors
            assert not plan.cluster and plan.splits <= 8
            assert plan.wgmma == (gpu is H200) and plan.token_tiles in int4_linear_wide.TOKEN_TILES


@pytest.mark.parametrize("name", [*GPUS, None])
@pytest.mark.parametrize("group", (0, *marlin_linear.GROUP_SIZES))
@pytest.mark.parametrize("has_zeros", [False, True])
def test_linears_in_marlins_order_fit_and_add_up_alike_for_any_number_of_tokens(name, group, has_zeros, on):
    gpu = GPUS.get(name, H200)
    on(gpu)
    kind = marlin_linear.Kind(group, has_zeros, True)
    for out_features, in_features in ((4096, 4096), (28672, 4096), (4096, 14336), (8192, 28672), (64, 512), (1024, 64)):
        strips, units = out_features // marlin_linear.STRIP, in_features // marlin_linear.UNIT
        plans = [marlin_linear.choose_plan(strips, units, kind, tokens, 0) for tokens in (1, 8, 9, 16, 17, 32, 300)]
        for plan in plans:
            static, rounds = 1024, math.ceil(math.ceil(units / plan.splits) / plan.warps)
            assert plan.shared_bytes(kind) + static <= gpu.shared_memory_per_block, (out_features, plan)
            assert (plan.shared_bytes(kind) + static) * plan.min_ctas <= gpu.shared_memory_per_multiprocessor
            assert plan.stages >= 2 and 1 <= plan.blocks <= strips and plan.splits <= units
            assert plan.x_slots >= (rounds if plan.resident else 2)
            assert (plan.warps, plan.splits) == (plans[0].warps, plans[0].splits)


def test_linears_in_marlins_order_are_spread_over_a_hopper_gpu(on):
    """The busiest multiprocessor has little more than its share of the bytes of any linear of the 8B shape."""
    on(H200)
    kind = marlin_linear.Kind(128, False, True)
    for out_features, in_features in ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)):
        strips, units = out_features // marlin_linear.STRIP, in_features // marlin_linear.UNIT
        plan = marlin_linear.choose_plan(strips, units, kind, 1, 0)
        on_one = -(-plan.blocks * plan.splits // 132)
        busiest = on_one * -(-strips // plan.blocks) * -(-units // plan.splits)
        assert busiest < 1.06 * strips * units / 132


# Experts, hidden size, width, experts per token.
MIXTURES = [(128, 2048, 768, 8), (60, 2048, 1408, 4), (8, 4096, 14336, 2), (256, 7168, 2048, 8), (4, 64, 320, 2)]


@pytest.mark.parametrize("name", GPUS)
@pytest.mark.parametrize("shape", MIXTURES)
def test_int4_experts_fit_and_add_up_alike_for_any_number_of_tokens(name, shape, on):
    on(GPUS[name])
    number, hidden, width, chosen = shape
    for group in int4_experts.GROUP_SIZES:
        for in_features, out_features, down in ((hidden, 2 * width, False), (width, hidden, True)):
            if in_features % group:
                continue
            plans = [
                int4_experts.choose_plan(in_features, out_features, group, number, chosen, tokens, down, 0)
                for tokens in (1, 2, 8, 9, 32, 64)
            ]
            unit, (warps, splits, min_ctas, _) = int4_experts.unit_of(in_features), plans[0]
            assert in_features % unit == 0 and unit % group == 0 and 1 <= splits <= in_features // unit
            assert -(-in_features // unit // splits) * unit <= int4_experts.MAX_CHANNELS
            assert 1 <= warps <= 8 and 1 <= min_ctas <= 16
            static = 1024
            for plan in plans:
                assert plan.shared_bytes(in_features) + static <= GPUS[name].shared_memory_per_block
                assert plan[:3] == plans[0][:3] and plan.strips >= 1


@pytest.mark.parametrize("name", GPUS)
@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize("group", GROUP_SIZES)
def test_attention_fits(name, head_size, group, on):
    on(GPUS[name])
    for heads_per_group in (1, 4, 7, 8, 16):
        fmt = PageFormat(2, head_size, group, torch.float16)
        decode_attention.check_shapes(fmt, 2 * heads_per_group, 1, 4, 0)
        decode_attention.check_shapes(fmt, 2 * heads_per_group, MAX_SPECULATIVE_TOKENS + 1, 8, 0)


def test_what_does_not_fit_is_named(on):
    on(SMALL)
    with pytest.raises(RuntimeError, match="heads of size 256 in groups of 128 needs .* KiB .* has 16"):
        decode_attention.check_shapes(PageFormat(2, 256, 128), 16, 5, 8, 0)


def test_plans_on_a_hopper_gpu_are_those_that_were_measured(on):
    on(H200)
    plan = int4_linear.choose_plan(4096 // 16, 112, 1, 1, 0)
    assert isinstance(plan, int4_linear.Plan) and (plan.tiles, plan.splits, plan.blocks) == (2, 1, 132)
    assert decode_attention._configuration(PageFormat(8, 128), 4, 8, H200) == (RowPlan(1, 1), (8, 3))
    assert decode_attention._configuration(PageFormat(8, 128), 8, 16, H200) == (RowPlan(1, 2), (8, 2))
    assert decode_attention._configuration(PageFormat(8, 128), 8, 20, H200) == (RowPlan(1, 3, 4, wgmma=True), (8, 8))
    assert decode_attention._configuration(PageFormat(8, 128), 8, 40, H200) == (RowPlan(1, 5, 4, wgmma=True), (8, 8))
    assert decode_attention._configuration(PageFormat(8, 128), 8, 72, H200)[0] == RowPlan(2, 5, 4, wgmma=True)
    assert decode_attention._configuration(PageFormat(8, 256), 8, 40, H200)[0] == RowPlan(1, 5, 4)


def test_warp_groups_multiply_on_hopper_only():
    others = [replace(H200, capability=(8, 9)), replace(H200, capability=(12, 0)), replace(H200, from_ptx=True)]
    for gpu in (H200, *others):
        plan, _ = decode_attention._configuration(PageFormat(8, 128), 8, 40, gpu)
        assert plan == RowPlan(1, 5, 4, wgmma=gpu is H200)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", range(17, 90))
def test_two_teams_fit_on_a_hopper_gpu(rows, bits):
    fmt = PageFormat(8, 128, bits=bits)
    plan, (warps, stages) = decode_attention._configuration(fmt, bits, rows, H200)
    assert plan.wgmma and (warps, plan.team) == (8, 4) and stages // plan.team in (2, 3)
    needed = 2 * decode_attention._bytes_per_team(fmt, bits, plan, stages)
    assert needed % 1024 == 0 and needed + 6144 + 1024 * (plan.tiles > 5) <= H200.shared_memory_per_block


@pytest.mark.parametrize("wgmma", [False, True])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_row_plans(head_size, group_size, wgmma):
    """Every row is in one pass, none is empty; a team's plan is there where it saves passes."""
    for rows in range(1, 300):
        *teams, alone = decode_attention.row_plans(head_size, group_size, rows, wgmma)
        assert alone.team == 1
        for plan in (*teams, alone):
            assert (plan.passes - 1) * plan.tiles * 8 < rows <= plan.rows
            assert decode_attention.raw_rows(head_size, group_size, rows) >= plan.rows
        for plan in teams:
            assert plan.passes < alone.passes or (plan.wgmma and plan.passes == alone.passes)
            assert head_size // 32 % plan.team == group_size // 32 % plan.team == 0
            assert not plan.wgmma or (wgmma and plan.team == 4)
    assert decode_attention.row_plans(128, 128, 64) == [RowPlan(1, 8, 4), RowPlan(3, 3)]


def test_a_gpu_with_less_shared_memory_takes_more_passes(on):
    assert decode_attention._configuration(PageFormat(8, 128), 8, 40, GPUS["rtx4090"])[0] == RowPlan(2, 3)


def test_int4_linears_of_many_tokens_use_all_of_a_hopper_gpu(on):
    """Llama-3.1-8B: rows are spread evenly, and CTAs share the channels where rows are few."""
    on(H200)
    for tiles, chunks in ((384, 32), (256, 32), (1792, 32), (256, 112)):
        for tokens in (17, 32, 64):
            plan = int4_linear.choose_plan(tiles, chunks, 1, tokens, 0, bf16=False)
            busiest = -(-tiles // plan.blocks) * -(-chunks // plan.splits)
            assert busiest * 132 < 1.06 * tiles * chunks and plan.stages >= 4


def test_experts_of_one_token_are_spread_over_a_hopper_gpu(on):
    """Qwen3-30B-A3B: the busiest multiprocessor has little more than its share of the CTAs."""
    on(H200)
    for (in_features, out_features), down, splits in (((2048, 1536), False, 2), ((768, 2048), True, 1)):
        plan = int4_experts.choose_plan(in_features, out_features, 128, 128, 8, 1, down, 0)
        ctas = 8 * out_features // int4_experts.STRIP * plan.splits
        assert (plan.splits, plan.strips) == (splits, 1)
        assert -(-ctas // 132) * 132 < 1.05 * ctas
        assert plan.warps * plan.splits * int4_experts.unit_of(in_features) == in_features  # all of it is in flight
