"""How the draft's weights are rounded where the user leaves it open (``weight_rounding: auto``): by GPTQ on a GPU, but by
search where GPTQ cannot run or would keep an engine waiting."""

from __future__ import annotations

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

from vllm_quantspec.integration.draft.loaded import local_shape
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
