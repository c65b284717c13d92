"""Every launch fits the shared memory of the GPUs that people have; on a Hopper GPU the plans are the measured ones."""

import pytest
import torch
from emulated_gpus import GPUS, KIB

from vllm_quantspec.config import HEAD_SIZES, MAX_SPECULATIVE_TOKENS
from vllm_quantspec.format import GROUP_SIZES, PageFormat
from vllm_quantspec.kernels import decode_attention, int4_linear
from vllm_quantspec.kernels.device import Device
from vllm_quantspec.weights import WEIGHT_GROUP_SIZES

H200 = Device("NVIDIA H200", (9, 0), 132, 227 * KIB, 228 * KIB)
SMALL = Device("a GPU with little shared memory", (8, 0), 40, 16 * KIB, 32 * KIB)


@pytest.fixture
def on(monkeypatch):
    def put(device: Device) -> None:
        for module in (decode_attention, int4_linear):
            monkeypatch.setattr(module, "device_properties", lambda index: device)
        int4_linear.choose_plan.cache_clear()

    yield put
    int4_linear.choose_plan.cache_clear()


@pytest.mark.parametrize("name", GPUS)
@pytest.mark.parametrize("group", WEIGHT_GROUP_SIZES)
def test_int4_linears_fit(name, group, on):
    on(GPUS[name])
    for out_features, in_features in ((4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096), (48, 512), (1024, 128)):
        for tokens in (1, 5, 8, 9, 16, 17, 32, 33, 64, 300):
            tiles, chunks = out_features // int4_linear.ROWS, -(-in_features // int4_linear.CHUNK)
            plan = int4_linear.choose_plan(tiles, chunks, int4_linear.CHUNK // group, tokens, 0)
            static = 1024
            assert plan.stages >= 2
            assert plan.shared_bytes(group) + static <= GPUS[name].shared_memory_per_block, (out_features, tokens)


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
    plan = int4_linear.choose_plan(28672 // 16, 32, 1, 64, 0)
    assert (plan.tiles, plan.token_tiles, plan.wide, plan.stages) == (2, 8, True, 6)
    plan = int4_linear.choose_plan(4096 // 16, 112, 1, 1, 0)
    assert (plan.tiles, plan.splits, plan.blocks, plan.wide) == (2, 1, 132, False)
    assert decode_attention._configuration(PageFormat(8, 128), 4, 1, H200) == (8, 3)
