"""Rounding the draft's weights by GPTQ, and where: with ``weight_rounding: auto`` on a GPU, but by search where GPTQ cannot
run or would keep an engine waiting."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_tp_group
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.platforms import current_platform

from vllm_quantspec.integration.draft.calibration import calibrate
from vllm_quantspec.integration.draft.loaded import local_shape
from vllm_quantspec.integration.draft.own_linear import OwnLinear
from vllm_quantspec.integration.draft.stored import Stored
from vllm_quantspec.memory import gptq_bytes

logger = init_logger("vllm.quantspec.rounding")

# Weights of a GPU's share of a model that GPTQ rounds without being asked to: a minute or two (benchmarks/gptq_start.py).
MOST_WEIGHTS = 1 << 34
# Bytes per weight, at most: in groups of 32, and where some or all may get 8 bits.
INT4_BYTES, INT8_BYTES = 5 / 8, 9 / 8


def settle_rounding(vllm_config: VllmConfig, target_model: nn.Module) -> str:
    """``"gptq"`` or ``"search"``, the same on all ranks; the log says why it is not GPTQ on a GPU.

    Args:
        target_model: the loaded model of this rank.
    """
    reason = _why_not_gptq(vllm_config, target_model)
    group = get_tp_group()
    if group.world_size > 1:
        reasons = [None] * group.world_size
        torch.distributed.all_gather_object(reasons, reason, group=group.cpu_group)
        reason = next((other for other in reasons if other is not None), None)
    if reason is None:
        return "gptq"
    if not current_platform.is_cpu():
        logger.info("Draft weights are rounded by search, not by GPTQ: %s", reason)
    return "search"


def round_by_gptq(
    vllm_config: VllmConfig, target_model: nn.Module, linears: Sequence[OwnLinear], stored: Stored, asked: bool
) -> bool:
    """Put the weights of ``linears`` as GPTQ rounds them, or has rounded them at an earlier start; False if it fails.

    Args:
        stored: where they are kept for the next start.
        asked: whether the user asked for GPTQ: otherwise those that are left after a failure are rounded by search.
    """
    device = next(target_model.parameters()).device
    if (kept := stored.load(device)) is not None:
        logger.info("Draft weights as GPTQ rounded them at an earlier start: %s", stored.path)
        for linear in linears:
            linear.put(dataclasses.replace(kept(linear.name), rotated=linear.method.rotated))
        return True
    logger.info(
        "Rounding draft weights by GPTQ, on texts that the model writes for it; takes up to about %.1f GiB "
        "beside the weights until it is done",
        gptq_needs(vllm_config, [local_shape(linear.layer) for linear in linears]) / 2**30,
    )
    left = {linear.layer: linear for linear in linears}
    try:
        with stored.writer() as writer:
            _calibrate(vllm_config, target_model, left, writer)
        return True
    except Exception as error:
        # Other ranks may be waiting for this one within a forward pass: they end with it.
        if asked or get_tp_group().world_size > 1:
            raise
        logger.warning(
            "GPTQ cannot round the draft weights of this model, so they are rounded by search: %s: %s",
            type(error).__name__,
            " ".join(str(error).split()),
        )
    if device.type == "cuda":  # what the failed attempt held is free by now
        torch.cuda.empty_cache()
    for linear in left.values():
        linear.put(linear.rounded())
    return False


def _calibrate(vllm_config: VllmConfig, target_model: nn.Module, left: dict[nn.Module, OwnLinear], writer) -> None:
    """Round the linears ``left`` and write them for the next start; each is taken out as soon as it is done."""

    def take(linear: OwnLinear, moments: torch.Tensor | None) -> None:
        weight = linear.rounded(moments)
        writer.put(linear.name, weight)
        linear.put(weight)
        del left[linear.layer]

    calibrate(vllm_config, target_model, {x.layer: functools.partial(take, x) for x in left.values()})
    for linear in list(left.values()):
        take(linear, None)  # it was not called: the output layer, say, which is never called as a module


def gptq_needs(vllm_config: VllmConfig, shapes: Sequence[tuple[int, int]]) -> int:
    """Bytes that GPTQ takes at most beside weights and rounded copy, for linears of (in, out) ``shapes`` on this rank."""
    layers = [x for x in vllm_config.compilation_config.static_forward_context.values() if isinstance(x, Attention)]
    owners = {layer.kv_sharing_target_layer_name or layer.layer_name for layer in layers}
    return gptq_bytes(
        num_layers=len(owners),
        num_heads=layers[0].num_heads,
        num_kv_heads=layers[0].num_kv_heads,
        head_size=layers[0].head_size,
        widest=max(in_features for in_features, _ in shapes),
        largest_weight=max(map(math.prod, shapes)),
        tokens=vllm_config.scheduler_config.max_num_batched_tokens,
        itemsize=vllm_config.model_config.dtype.itemsize,
    )


def _why_not_gptq(vllm_config: VllmConfig, target_model: nn.Module) -> str | None:
    """A reason for users, or None."""
    if current_platform.is_cpu():
        return "it takes minutes on a CPU"
    if vllm_config.load_config.load_format == "dummy":
        return "a model of random weights has no texts to write"
    if vllm_config.lora_config is not None:
        return "it watches the inputs of linears, which LoRA wraps"
    if vllm_config.parallel_config.data_parallel_size > 1:
        return "data-parallel ranks do not write texts together"
    if vllm_config.model_config.is_multimodal_model:
        return "it goes by texts alone, and this model sees more"
    if vllm_config.model_config.quantization is not None:
        return "the checkpoint is quantized itself"
    modules = list(target_model.modules())
    shapes = [local_shape(module) for module in modules if isinstance(module, LinearBase | ParallelLMHead)]
    weights = sum(map(math.prod, shapes))
    if not weights:
        return "the model has no linears"
    if weights > MOST_WEIGHTS:
        return f"{weights / 1e9:.0f} billion weights per GPU take minutes; weight_rounding 'gptq' asks for it"
    config = vllm_config.speculative_config
    copy = weights * (INT4_BYTES if config.draft_weights == "int4" else INT8_BYTES)
    if config.draft_experts == "int4":  # their copy is made before
        experts = (module.routed_experts for module in modules if isinstance(module, MoERunner))
        copy += INT4_BYTES * sum(p.numel() for layer in experts for p in layer.parameters(recurse=False))
    needed, free = gptq_needs(vllm_config, shapes) + int(copy), torch.cuda.mem_get_info()[0]
    if needed > free:
        return f"it would take {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB of the GPU are free"
    return None
