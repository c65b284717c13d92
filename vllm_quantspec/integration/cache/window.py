"""The recent window's own KV cache layers, one beside each attention layer of the target (for both model runners)."""

from __future__ import annotations

from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.v1.kv_cache_interface import KVCacheSpec

from vllm_quantspec.format import PageFormat
from vllm_quantspec.integration.cache.backend import WINDOW_SUFFIX, QuantSpecBackend, RecentWindow, num_speculative_tokens
from vllm_quantspec.integration.cache.specs import make_specs


def add_window_specs(vllm_config: VllmConfig, specs: dict[str, KVCacheSpec]) -> dict[str, KVCacheSpec]:
    """Give each QuantSpec attention layer its page spec, and a window layer beside it; idempotent.

    Args:
        specs: what vLLM's runner found: layer name -> spec.
    """
    layers = vllm_config.compilation_config.static_forward_context
    result: dict[str, KVCacheSpec] = {}
    for name, spec in specs.items():
        layer = layers[name]
        if isinstance(layer, RecentWindow):
            continue  # a second call: added again with its layer
        if not isinstance(layer, Attention) or layer.attn_backend is not QuantSpecBackend:
            result[name] = spec
            continue
        page_format = PageFormat(spec.num_kv_heads, spec.head_size, spec.block_size, layer.kv_cache_torch_dtype)
        pages, window = make_specs(page_format, num_speculative_tokens(vllm_config))
        layers.setdefault(name + WINDOW_SUFFIX, RecentWindow(window))
        result[name], result[name + WINDOW_SUFFIX] = pages, window
    return result
