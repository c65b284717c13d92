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
RECURRENT_ALONE = "Mamba layers and no attention"
ALIBI = "ALiBi position biases"
SINKS = "attention sinks"
SOFT_CAP = "a logit soft-cap"
SLIDING = "sliding-window attention in every layer"
SOME_RECURRENT = "models with Mamba or linear-attention layers"
SOME_SLIDING = "models with sliding-window layers beside full ones"
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
# Old configurations of these have no "layer_types": every so many-th layer is full, all others are sliding.
_FULL_EVERY = {"cohere2": 4, "exaone4": 4, "gemma2": 2, "gemma3": 6, "gpt_oss": 2, "olmo3": 4}
ALONE = "use --attention-backend QUANTSPEC alone"


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


def has_recurrent_layers(text: dict[str, Any]) -> bool:
    """Whether some layers of a language model are Mamba, linear-attention or convolution layers."""
    layer_types = text.get("layer_types") or ()
    return any(text.get(key) for key in _RECURRENT_KEYS) or bool(_RECURRENT_LAYERS.intersection(layer_types))


def _full_every(text: dict[str, Any]) -> int | None:
    """Of a configuration that does not list its layers: every so many-th layer is full."""
    pattern = text.get("sliding_window_pattern")
    known = _FULL_EVERY.get(str(text.get("model_type")).removesuffix("_text"))
    return pattern if isinstance(pattern, int) and pattern > 1 else len(pattern) if isinstance(pattern, str) else known


def sliding_layers(text: dict[str, Any]) -> str:
    """Of a language model's layers, ``"none"``, ``"some"`` or ``"all"`` attend to a sliding window alone."""
    if not text.get("sliding_window"):
        return "none"
    if layer_types := text.get("layer_types"):
        number = list(layer_types).count("sliding_attention")
        return "some" if 0 < number < len(layer_types) else "all" if number else "none"
    if not text.get("use_sliding_window", True):
        return "none"
    return "some" if _full_every(text) else "all"


def num_sliding_layers(text: dict[str, Any]) -> int:
    """How many of ``num_hidden_layers``, where some are."""
    if sliding_layers(text) != "some":
        return 0
    layer_types, number = text.get("layer_types"), text["num_hidden_layers"]
    return list(layer_types).count("sliding_attention") if layer_types else number - number // _full_every(text)


def attention_of(text: dict[str, Any], architectures: list[str]) -> Iterator[str]:
    """What an attention layer of this language model has that the cache does not implement.

    Attention sinks are weights, which no configuration key shows: architectures with sinks are known by name.
    """
    layer_types = text.get("layer_types") or ()
    if any(name.startswith(("GptOss", "MiMoV2")) for name in architectures) or text.get("attention_sink"):
        yield SINKS
    if text.get("attn_logit_softcapping"):
        yield SOFT_CAP
    if sliding_layers(text) == "all":
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
    if has_recurrent_layers(text) and not text.get("num_attention_heads"):
        yield RECURRENT_ALONE
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
        return not_drafted_for(STREAMED_INPUT, ALONE)
    text = text_part(config)
    if has_recurrent_layers(text):
        return not_drafted_for(SOME_RECURRENT, ALONE)
    if sliding_layers(text) == "some":
        return not_drafted_for(SOME_SLIDING, ALONE)
    return None
