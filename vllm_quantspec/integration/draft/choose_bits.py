"""Which of the draft's linears get 8 bits (``draft_weights: mixed`` and ``auto``): what they lose, and what that is worth.

The speed that decides where no ``weight_bits`` is given is that of one request of half the model's length, on an H200: the
cost model of `vllm_quantspec.estimate` has no other GPU's fixed times, and on a CPU drafts gain no time at all, so that an
engine there does as one on a GPU would. One request is where weights cost most, so that 8 bits that pay there pay with more
requests, too, as long as drafts use their own weights; around the best choice little is lost (benchmarks/NOTES.md, "Mixed
precision").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from vllm import envs
from vllm.config import VllmConfig
from vllm.distributed import get_tp_group
from vllm.logger import init_logger
from vllm.platforms import current_platform

from vllm_quantspec import estimate, precision
from vllm_quantspec.config import AUTO_NUMBERS, MIXED_BITS
from vllm_quantspec.integration.draft.losses import measure_losses
from vllm_quantspec.integration.draft.one_copy import is_shared
from vllm_quantspec.integration.draft.own_linear import OwnLinear
from vllm_quantspec.integration.draft.room import left_for_cache
from vllm_quantspec.integration.draft.stored import KeptLosses
from vllm_quantspec.integration.startup.cache_dtype import page_bits
from vllm_quantspec.kernels import draft_layer
from vllm_quantspec.memory import WIDER_SHARE

logger = init_logger("vllm.quantspec.choose_bits")

# Of the copy of an H200, bytes per second.
_BANDWIDTH = 4.26e12


def choose_bits(
    vllm_config: VllmConfig,
    model: nn.Module,
    linears: Sequence[OwnLinear],
    draft_weights: str,
    weight_bits: float | None,
    rounding: str,
    kept: KeptLosses,
) -> precision.Choice:
    """The choice among ``linears``, which have weights in 4 bits and methods of 4 and 8; the same on every rank.

    Args:
        draft_weights: ``"mixed"``, or ``"auto"``, with which it may be that all stay in 4 bits.
        weight_bits: the most bits per weight of these linears on average, scales and zero points counted; None: as many as
            the cost model finds fastest.
        rounding: how the weights in 4 bits were rounded: ``"gptq"`` or another.
        kept: losses that an earlier start has measured.
    """
    losses = kept.load()
    if losses is None:
        logger.info("Choosing bits: measuring what each of %d linears of the draft loses in 4 bits", len(linears))
        losses = measure_losses(vllm_config, model, linears)
        kept.save(losses)
    loss_in_8 = precision.WIDE_LOSS["gptq" if rounding == "gptq" else "search"]
    candidates = [
        precision.Linear(
            x.name, x.num_weights, x.methods[4].bits_per_weight, x.methods[8].bits_per_weight, loss, loss_in_8 * loss
        )
        for x, loss in ((x, max(losses[x.name], 0.0)) for x in linears)
    ]
    if weight_bits is not None:
        choice, why = precision.within(candidates, weight_bits), f"within weight_bits {weight_bits:g}"
    else:
        choice, why = fastest_bits(vllm_config, candidates, draft_weights == "mixed", _can_join_layers(linears, model))
    logger.info(
        "%d of %d linears of the draft in 8 bits, %.2f bits per weight on average, %s; expected acceptance %.3f, with 4 "
        "bits alone %.3f",
        len(choice.wide),
        len(candidates),
        choice.bits,
        why,
        choice.acceptance,
        precision.within(candidates, 0).acceptance,
    )
    return choice


def _can_join_layers(linears: Sequence[OwnLinear], model: nn.Module) -> bool:
    """Whether a draft all in 4 bits may have one launch per layer, as far as this GPU and its linears say.

    It may not where some linears of ``model``, the target, are one copy: these are in another order.
    """
    capability = current_platform.get_device_capability()
    if envs.VLLM_BATCH_INVARIANT or (capability is not None and tuple(capability) < draft_layer.MIN_CAPABILITY):
        return False
    if any(map(is_shared, model.modules())):
        return False
    return all(x.methods[4].group_size == draft_layer.CHUNK and not x.methods[4].rotated for x in linears)


def fastest_bits(
    vllm_config: VllmConfig, candidates: Sequence[precision.Linear], some: bool, can_join_layers: bool = True
) -> tuple[precision.Choice, str]:
    """The choice by the cost model, with one linear in 8 bits at least if ``some``; and why, for the log.

    ``can_join_layers``: whether all in 4 bits could have one launch per layer, where the model's sizes allow one.
    """
    text = vllm_config.model_config.hf_text_config.to_dict()
    try:
        model = estimate.model_from(text | {"architectures": vllm_config.model_config.architectures}, "this model")
    except ValueError as error:
        why = f"as there is no estimate of speed here ({error})"
        return precision.within(candidates, MIXED_BITS if some else 0), why
    load = Load(vllm_config, model, can_join_layers=can_join_layers)
    most_bytes = float("inf") if some else _most_bytes(vllm_config)
    choice = precision.fastest(candidates, load.ms_per_token, some, most_bytes)
    narrow, wide = precision.within(candidates, 0), precision.within(candidates, 8.5)
    why = (
        f"as the cost model expects of a request of {load.context} tokens on an H200: {load.ms_per_token(choice):.3g} ms "
        f"per token, all in 4 bits {load.ms_per_token(narrow):.3g}, all in 8 {load.ms_per_token(wide):.3g}"
    )
    return choice, why


@dataclass(frozen=True)
class Load:
    """What the engine is expected to have to do."""

    vllm_config: VllmConfig
    model: estimate.Model
    batch: int = 1
    can_join_layers: bool = True

    @property
    def context(self) -> int:
        return self.vllm_config.model_config.max_model_len // 2

    def ms_per_token(self, choice: precision.Choice) -> float:
        config = self.vllm_config.speculative_config
        numbers = AUTO_NUMBERS[1:] if config.chooses_number else [config.num_speculative_tokens]
        return min(self._ms_per_token(choice, number) for number in numbers)

    def _ms_per_token(self, choice: precision.Choice, number: int) -> float:
        config = self.vllm_config.speculative_config

        def speed(acceptance: float) -> estimate.Speed:
            return estimate.speed(
                self.model,
                _BANDWIDTH,
                self.context,
                self.batch,
                self.vllm_config.parallel_config.tensor_parallel_size,
                config.group_size,
                acceptance,
                number,
                quantize_lm_head=config.quantize_lm_head,
                page_bits=page_bits(self.vllm_config),
                draft_context=config.draft_context,
                draft_experts=config.draft_experts,
                wide_share=choice.share,
                join_layers=config.join_layers and self.can_join_layers,
            )

        found = speed(choice.acceptance)
        return found.quantspec if found.draft_share == 1 else speed(choice.sparse_acceptance).quantspec


def _most_bytes(vllm_config: VllmConfig) -> float:
    """That 8 bits may take of the KV cache's memory, the same on every rank; on a CPU the cache has a memory of its own."""
    if current_platform.is_cpu():
        return float("inf")
    group, most = get_tp_group(), WIDER_SHARE * left_for_cache(vllm_config)
    return group.broadcast_object(most, src=0) if group.world_size > 1 else most
