"""Build the draft model as the engine's options say, and say in the log what it is. What it is made of: `draft.model`."""

from __future__ import annotations

import time

import torch
from torch import nn
from vllm.compilation import backends
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.platforms import current_platform

from vllm_quantspec.config import DRAFT_ACTIVATIONS, DRAFT_WEIGHTS
from vllm_quantspec.integration.draft.model import Builder, DraftModel
from vllm_quantspec.integration.draft.rounding import settle_rounding
from vllm_quantspec.memory import draft_logits_bytes

logger = init_logger("vllm.quantspec.draft_model")


def build_configured_draft(vllm_config: VllmConfig, target_model: nn.Module) -> DraftModel:
    """``build_draft_model`` with the options of the engine's ``QuantSpecConfig``."""
    config = vllm_config.speculative_config
    if config.draft_sample_method == "probabilistic" and not current_platform.is_cpu():
        log_draft_logits(vllm_config)
    rounding = config.weight_rounding
    if rounding == "auto":
        rounding = "search" if config.draft_weights == "target" else settle_rounding(vllm_config, target_model)
    weights, weights_asked = config.draft_weights, "draft_weights" in config.asked_for
    if not weights_asked and rounding == "gptq" and config.weight_rounding == "auto":
        weights = "auto"  # what is lost is measured on texts, too: where these can be written, it costs little more
    with backends.set_model_tag("quantspec_draft"):
        draft = build_draft_model(
            vllm_config,
            target_model,
            draft_weights=weights,
            weights_asked=weights_asked,
            draft_experts=config.draft_experts,
            experts_asked="draft_experts" in config.asked_for,
            weight_group_size=config.weight_group_size,
            quantize_lm_head=config.quantize_lm_head,
            weight_rounding=rounding,
            gptq_asked=config.weight_rounding == "gptq",
            weight_rotation=config.weight_rotation,
            weight_bits=config.weight_bits,
            join_layers=config.join_layers,
            fuse_layers=config.fuse_layers,
            draft_activations=config.draft_activations,
        )
    # Where the scheduler is in this process, its cost model goes by these.
    if not draft.experts:
        config.draft_experts = "target"
    config.wide_share, config.join_layers = draft.wide_share, draft.joined is not None
    return draft


def build_draft_model(
    vllm_config: VllmConfig,
    target_model: nn.Module,
    *,
    draft_weights: str = "int4",
    weights_asked: bool = True,
    draft_experts: str = "int4",
    experts_asked: bool = True,
    weight_group_size: int = 128,
    quantize_lm_head: bool = True,
    weight_rounding: str = "search",
    gptq_asked: bool = True,
    weight_rotation: str = "none",
    weight_bits: float | None = None,
    join_layers: bool = True,
    fuse_layers: bool = False,
    draft_activations: str = "model",
) -> DraftModel:
    """Build the draft model out of ``target_model``, whose weights are loaded and processed.

    The new attention layers are registered in ``vllm_config``'s static forward context under ``draft_model.<name>``.

    Args:
        vllm_config: the target's; the draft shares its compilation config.
        target_model: the loaded model of this rank.
        draft_weights: ``"int4"``; ``"int8"`` for all linears but the output layer in 8 bits; ``"mixed"`` or ``"auto"`` for
            those that lose most in 4, see `choose_bits`; or ``"target"`` to share every linear.
        weights_asked: whether the user asked for that: otherwise a model for which GPTQ or the choice fails has 4 bits.
        draft_experts: of a mixture: ``"target"`` to share its experts, or ``"int4"`` for INT4 ones, see `draft.experts`.
        experts_asked: whether the user asked for that: otherwise INT4 experts must leave room for the KV cache, and a
            mixture that has none is no matter of a warning.
        weight_group_size: input channels per INT4 scale: 128, 64 or 32. A linear whose input is not divisible by it
            takes the next smaller group.
        quantize_lm_head: also run the output projection in INT4, see `draft.head`.
        weight_rounding: ``"search"``, ``"nearest"`` or ``"gptq"``, see `vllm_quantspec.weights.quantize_weight`; GPTQ
            goes by the inputs that the linears have while the model writes texts of its own, see `calibration`.
        gptq_asked: whether the user asked for that: otherwise a model for which it fails has weights rounded by search.
        weight_rotation: ``"hadamard"`` for weights of rotated inputs, see `vllm_quantspec.rotation`, or ``"none"``.
        weight_bits: of ``"mixed"``: the most bits per weight on average; None: as the cost model finds fastest.
        join_layers: for few tokens, compute what lies between two attentions in one launch where that can be had.
        fuse_layers: for more tokens, launch norms and activations with the linears behind them where that can be had.
        draft_activations: ``"fp8"`` for inputs of INT4 linears as e4m3 numbers, or ``"model"``.

    Raises:
        ValueError: an unknown option, or a layer whose cache cannot be shared (MLA, Mamba, linear attention).
    """
    if draft_weights not in DRAFT_WEIGHTS:
        raise ValueError(f"draft_weights must be {' or '.join(map(repr, DRAFT_WEIGHTS))}, not {draft_weights!r}.")
    if draft_experts not in ("target", "int4"):
        raise ValueError(f"draft_experts must be 'target' or 'int4', not {draft_experts!r}.")
    if weight_group_size not in (128, 64, 32):
        raise ValueError(f"weight_group_size must be 128, 64 or 32, not {weight_group_size}.")
    started = time.perf_counter()
    if weight_rotation not in ("hadamard", "none"):
        raise ValueError(f"weight_rotation must be 'none' or 'hadamard', not {weight_rotation!r}.")
    if draft_activations not in DRAFT_ACTIVATIONS:
        raise ValueError(f"draft_activations must be 'model' or 'fp8', not {draft_activations!r}.")
    builder = Builder(
        vllm_config,
        target_model,
        draft_weights,
        weights_asked,
        draft_experts,
        experts_asked,
        weight_group_size,
        quantize_lm_head,
        weight_rounding,
        gptq_asked,
        weight_rotation == "hadamard",
        weight_bits,
        join_layers,
        fuse_layers,
        draft_activations == "fp8",
    )
    with torch.no_grad():
        draft = builder.build(target_model)
    if not draft.attention_layers:
        raise ValueError("The target model has no attention layer with a KV cache, so there is nothing to draft with.")
    if draft_weights != "target":
        if not draft.quantized and not draft.one_copy:
            name, reason = next(iter(draft.shared.items()), ("the model", "it has no linear layers"))
            raise ValueError(
                f"quantspec: no linear layer of this model can run in {'INT8' if draft_weights == 'int8' else 'INT4'} here "
                f"({name}: {reason}); set draft_weights to 'target' in the speculative config."
            )
        widths = sorted({linear.bits for linear in builder.own}) or [4]
        logger.info(
            "INT%s draft weights: %.2f GiB (%.0f%% of the target's), %d linears%s%s, took %.1f s",
            " and INT".join(map(str, widths)),
            draft.int4_bytes / 2**30,
            100 * draft.int4_bytes / max(draft.target_bytes, 1),
            len(draft.quantized),
            f" and the experts of {len(draft.experts)} layers" if draft.experts else "",
            f"; {len(draft.one_copy)} linears read the target's own 4 bits" if draft.one_copy else "",
            time.perf_counter() - started,
        )
        for name, reason in draft.shared.items():
            logger.debug("%s stays in the target's precision: %s", name, reason)
        if draft_experts == "int4":
            log_experts(builder, experts_asked)
    return draft


def log_experts(builder: Builder, asked: bool) -> None:
    """On what a mixture's INT4 experts run, and why others are the target's: a warning where the user ``asked`` for them."""
    for runs_on in dict.fromkeys(method.runs_on for method in builder.own_experts.values()):
        logger.info("INT4 draft experts run on %s.", runs_on)
    for reason in dict.fromkeys(builder.kept_experts.values()):
        if asked:
            logger.warning("quantspec: the draft reads the target's experts as they are: %s", reason)
        else:
            logger.info("The draft reads the target's experts: %s", reason)
    if asked and not builder.draft.experts and not builder.kept_experts:
        logger.warning("quantspec: draft_experts 'int4' has no effect: this model has no mixture of experts")


def log_draft_logits(vllm_config: VllmConfig) -> None:
    """Say what vLLM's model runner V2 has allocated to verify sampled drafts by: nothing else does."""
    model, num_seqs = vllm_config.model_config, vllm_config.scheduler_config.max_num_seqs
    num_drafts = vllm_config.speculative_config.num_speculative_tokens
    num_bytes = draft_logits_bytes(num_seqs, num_drafts, model.get_vocab_size(), model.head_dtype.itemsize)
    logger.info(
        "Draft logits: %.2f GiB, for %d drafts of %d sequences; a smaller --max-num-seqs makes them less, and with "
        "draft_sample_method 'greedy' there are none",
        num_bytes / 2**30,
        num_drafts,
        num_seqs,
    )
