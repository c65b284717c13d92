"""Which models the hierarchical KV cache and its drafts take, by a model's configuration; the sentences for all others.

No vLLM import: `vllm-quantspec estimate` asks before vLLM is installed. The engine asks the same (`startup/checks.py`), and
believes vLLM's own reading of a model where vLLM has one: that of an architecture says more than its configuration.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vllm_quantspec.config import HEAD_SIZES

MLA = "multi-head latent attention (MLA)"
ENCODER = "an encoder and a decoder"
RECURRENT = "Mamba or linear-attention layers"
ALIBI = "ALiBi position biases"
SINKS = "attention sinks"
SOFT_CAP = "a logit soft-cap"
SLIDING = "sliding-window attention"
CHUNKED = "chunked local attention"
STREAMED_INPUT = "audio that arrives while the model answers"

# Architectures whose generated tokens carry audio as well.
STREAMED = {"Qwen3ASRRealtimeGeneration", "VoxtralRealtimeGeneration"}
# Model types whose tokens of one image attend to each other in both directions.
_WITHIN_IMAGES = {"bagel", "gemma3", "molmo2", "moondream3", "paligemma"}

# Keys of configurations that only models with Mamba, linear-attention or convolution layers have.
_RECURRENT_KEYS = (
    "attn_layer_period",
    "conv_L_cache",
    "hybrid_override_pattern",
    "layers_block_type",
    "linear_attn_config",
    "linear_conv_kernel_dim",
    "mamba_d_conv",
    "mamba_d_state",
    "ssm_cfg",
    "ssm_state_size",
    "state_size",
)
_RECURRENT_LAYERS = {"linear_attention", "mamba", "mamba2", "conv", "recurrent", "linear"}


def not_implemented(model: str, what: str) -> str:
    """The sentence for a model whose attention the cache does not implement."""
    return (
        f"quantspec: {model} has {what}, which the hierarchical KV cache does not implement; run it without quantspec."
    )


def wrong_head_size(model: str, head_size: int) -> str:
    """The sentence for a model with heads of an unknown size."""
    return (
        f"quantspec: {model} has heads of size {head_size}, but the hierarchical KV cache has "
        f"{', '.join(map(str, HEAD_SIZES))}; run it without quantspec."
    )


def attends_within_images(model: str) -> str:
    """The sentence for a model whose tokens of an image attend to later ones of it, while it may be given images."""
    return (
        f"quantspec: {model} attends in both directions within an image, which the hierarchical KV cache does not have; "
        "give it text alone (--limit-mm-per-prompt with 0 for its media), or run it without quantspec."
    )


def not_drafted_for(what: str, remedy: str) -> str:
    """The sentence for what the cache takes and speculation does not."""
    return f"quantspec: speculation does not support {what} yet; {remedy}."


def text_part(config: dict[str, Any]) -> dict[str, Any]:
    """The language model's part of a configuration, the whole of it for models of text alone."""
    return config.get("text_config") or config


def towers_of(config: dict[str, Any]) -> list[str]:
    """Of ``vision`` and ``audio`` those that a model has a tower for."""
    return [kind for kind in ("vision", "audio") if config.get(f"{kind}_config")]


def attention_of(text: dict[str, Any], architectures: list[str]) -> Iterator[str]:
    """What an attention layer of this language model has that the cache does not implement.

    Attention sinks are weights, which no configuration key shows: architectures with sinks are known by name.
    """
    layer_types = text.get("layer_types") or ()
    if any(name.startswith(("GptOss", "MiMoV2")) for name in architectures) or text.get("attention_sink"):
        yield SINKS
    if text.get("attn_logit_softcapping"):
        yield SOFT_CAP
    if "sliding_attention" in layer_types or text.get("sliding_window") and text.get("use_sliding_window", True):
        yield SLIDING
    if "chunked_attention" in layer_types:
        yield CHUNKED


def _kinds_of(config: dict[str, Any], text: dict[str, Any], architectures: list[str]) -> Iterator[str]:
    """What vLLM itself says of an architecture, guessed from the configuration."""
    attention = text.get("attn_config")
    if text.get("kv_lora_rank"):
        yield MLA
    if config.get("is_encoder_decoder"):
        yield ENCODER
    if any(text.get(key) for key in _RECURRENT_KEYS) or _RECURRENT_LAYERS.intersection(text.get("layer_types") or ()):
        yield RECURRENT
    if (
        text.get("alibi")
        or "BloomForCausalLM" in architectures
        or text.get("position_encoding_type") == "alibi"
        or isinstance(attention, dict)
        and attention.get("alibi")
    ):
        yield ALIBI


def head_size_of(text: dict[str, Any]) -> int | None:
    """Channels of an attention head; None where the configuration does not say."""
    if isinstance(text.get("head_dim"), int):
        return text["head_dim"]
    heads, hidden = text.get("num_attention_heads"), text.get("hidden_size")
    return hidden // heads if isinstance(heads, int) and isinstance(hidden, int) and heads else None


def unsupported(config: dict[str, Any], model: str) -> str | None:
    """The sentence with which an engine stops that is asked for this cache; None if it starts, as far as this shows.

    Args:
        config: a parsed config.json.
        model: what the user calls the model.
    """
    text, architectures = text_part(config), config.get("architectures") or []
    for what in (*_kinds_of(config, text, architectures), *attention_of(text, architectures)):
        return not_implemented(model, what)
    if config.get("is_mm_prefix_lm", config.get("model_type") in _WITHIN_IMAGES):
        return attends_within_images(model)
    head_size = head_size_of(text)
    if head_size is not None and head_size not in HEAD_SIZES:
        return wrong_head_size(model, head_size)
    return None


def undrafted(config: dict[str, Any]) -> str | None:
    """As ``unsupported``, for a model whose cache is supported: the sentence that stops its speculation, or None."""
    if STREAMED.intersection(config.get("architectures") or ()):
        return not_drafted_for(STREAMED_INPUT, "use --attention-backend QUANTSPEC alone")
    return None
