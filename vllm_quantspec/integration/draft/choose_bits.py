"""Which of the draft's linears get 8 bits (``draft_weights: mixed`` and ``auto``): what they lose, and what that is worth.

The speed that decides where no ``weight_bits`` is given is that of one request of half the model's length, on an H200: the
cost model of `vllm_quantspec.estimate` has no other GPU's fixed times. One request is where weights cost most, so that 8
bits that pay there pay with more requests, too, as long as drafts use their own weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn
from vllm.config import VllmConfig
from vllm.logger import init_logger

from vllm_quantspec import estimate, precision
from vllm_quantspec.config import MIXED_BITS
from vllm_quantspec.integration.draft.losses import measure_losses
from vllm_quantspec.integration.draft.own_linear import OwnLinear
from vllm_quantspec.integration.draft.stored import KeptLosses
from vllm_quantspec.integration.startup.cache_dtype import page_bits

logger = init_logger("vllm.quantspec.choose_bits")

# Of the copy of an H200, bytes per second.
_BANDWIDTH = 4.26e12


def choose_bits(
    vllm_config: VllmConfig,
    model: nn.Module,
    linears: Sequence[OwnLinear],
    draft_weights: str,
    weight_bits: float | None,
    kept: KeptLosses,
    prepare: Callable[[], None],
) -> precision.Choice:
    """The choice among ``linears``, all of which have methods of 4 and of 8 bits; the same on every rank.

    Args:
        draft_weights: ``"mixed"``, or ``"auto"``, with which it may be that all stay in 4 bits.
        weight_bits: the most bits per weight of these linears on average, scales and zero points counted; None: as many as
            the cost model finds fastest.
        kept: losses that an earlier start has measured.
        prepare: gives the draft's linears their weights in 4 bits, where losses have to be measured.
    """
    losses = kept.load()
    if losses is None:
        logger.info("Choosing bits: measuring what each of %d linears of the draft loses in 4 bits", len(linears))
        prepare()
        losses = measure_losses(vllm_config, model, linears)
        kept.save(losses)
    candidates = [
        precision.Linear(
            x.name, x.num_weights, x.methods[4].bits_per_weight, x.methods[8].bits_per_weight, max(losses[x.name], 0.0)
        )
        for x in linears
    ]
    if weight_bits is not None:
        choice = precision.within(candidates, weight_bits)
    else:
        choice = _fastest(vllm_config, candidates, some=draft_weights == "mixed")
    logger.info(
        "%d of %d linears of the draft in 8 bits, %.2f bits per weight on average; expected acceptance %.3f, with 4 bits "
        "alone %.3f",
        len(choice.wide),
        len(candidates),
        choice.bits,
        choice.acceptance,
        precision.within(candidates, 0).acceptance,
    )
    return choice


def _fastest(vllm_config: VllmConfig, candidates: Sequence[precision.Linear], some: bool) -> precision.Choice:
    config, parallel = vllm_config.speculative_config, vllm_config.parallel_config
    text = vllm_config.model_config.hf_text_config.to_dict()
    try:
        model = estimate.model_from(text | {"architectures": vllm_config.model_config.architectures}, "this model")
    except ValueError as error:
        bits = MIXED_BITS if some else 0
        logger.info("Choosing bits: %.2f on average, as there is no estimate of speed here: %s", bits, error)
        return precision.within(candidates, bits)

    def ms_per_token(choice: precision.Choice) -> float:
        return estimate.speed(
            model,
            _BANDWIDTH,
            vllm_config.model_config.max_model_len // 2,
            1,
            parallel.tensor_parallel_size,
            config.group_size,
            choice.acceptance,
            config.num_speculative_tokens,
            quantize_lm_head=config.quantize_lm_head,
            page_bits=page_bits(vllm_config),
            draft_context=config.draft_context,
            draft_experts=config.draft_experts,
            wide_share=choice.share,
        ).quantspec

    return precision.fastest(candidates, ms_per_token, some)
