"""The recent window's own KV cache layers, one beside each attention layer of the target (for both model runners)."""

from __future__ import annotations

from typing import ClassVar

import torch
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionBackend, AttentionCGSupport, AttentionMetadataBuilder, CommonAttentionMetadata
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec, SlidingWindowSpec

from vllm_quantspec.format import PageFormat
from vllm_quantspec.integration.cache.backend import QuantSpecBackend, num_speculative_tokens
from vllm_quantspec.integration.cache.metadata import WINDOW_SUFFIX, WindowMetadata
from vllm_quantspec.integration.cache.sliding import in_page_sized_blocks
from vllm_quantspec.integration.cache.specs import HierarchicalKVSpec, make_specs
from vllm_quantspec.integration.startup.backend_name import NAME


class WindowMetadataBuilder(AttentionMetadataBuilder[WindowMetadata]):
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH
    supports_draft_decode_metadata_update: bool = True

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        # ``kv_cache_spec`` is of one window block, of which a block of vLLM's pool may have several.
        layer = vllm_config.compilation_config.static_forward_context[layer_names[0]]
        self._per_pool_block = layer.spec.block_size // kv_cache_spec.block_size

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> WindowMetadata:
        table = common_attn_metadata.block_table_tensor
        if self._per_pool_block > 1:  # all of the pool's null block are the window's null block
            table.masked_fill_(table < self._per_pool_block, 0)
        return WindowMetadata(table)

    def update_draft_decode_metadata(self, metadata: WindowMetadata) -> None:
        """As above."""


class WindowBackend(QuantSpecBackend):
    """Of the window's own KV cache group: a block table, nothing to compute."""

    @staticmethod
    def get_name() -> str:
        return f"{NAME}_WINDOW"

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec=None) -> list[int]:
        if kv_cache_spec is None:
            return [16, 32, 64, 128]
        return [kv_cache_spec.block_size if kv_cache_spec.tokens_per_state == 1 else kv_cache_spec.tokens_per_state]

    @staticmethod
    def get_builder_cls() -> type[WindowMetadataBuilder]:
        return WindowMetadataBuilder


class RecentWindow(torch.nn.Module, AttentionLayerBase):
    """The exact keys and values of one attention layer: a cache beside the layer's own, without computation.

    ``kv_cache`` as vLLM binds it: uint8 [num_blocks, num_kv_heads, window_block_size, 2 * head_size * itemsize], padded to
    a page's bytes; where a block of vLLM's pool has several, [num_blocks, num_kv_heads, 1, head_bytes], padding included.
    """

    def __init__(self, spec: AttentionSpec) -> None:
        super().__init__()
        self.spec = spec
        self.kv_cache = torch.tensor([])

    def exact(self, fmt: PageFormat) -> torch.Tensor:
        """The cache as [num_blocks, num_kv_heads, window_block_size, 2 * head_size] of ``fmt.dtype``."""
        cache, size, row = self.kv_cache, fmt.window_block_size, 2 * fmt.head_size * fmt.dtype.itemsize
        if cache.shape[2] != size:
            strides = (cache.stride(0), size * row, row, 1)
            cache = cache.as_strided((cache.shape[0], fmt.num_kv_heads, size, row), strides)
        return cache.view(fmt.dtype)

    def get_attn_backend(self) -> type[AttentionBackend]:
        return WindowBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        return self.spec


def add_window_specs(vllm_config: VllmConfig, specs: dict[str, KVCacheSpec]) -> dict[str, KVCacheSpec]:
    """Give each QuantSpec attention layer its page spec, and a window layer beside it; idempotent.

    Layers with a sliding window, which have a backend of vLLM's, get blocks of a page's bytes.

    Args:
        specs: what vLLM's runner found: layer name -> spec.

    Raises:
        ValueError: a page's bytes hold too few tokens of a sliding layer (`in_page_sized_blocks`).
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
        fmt = layer.impl.settings.format
        pages_per_block = vllm_config.cache_config.block_size // fmt.group_size  # more than one beside Mamba layers
        pages, window = make_specs(fmt, num_speculative_tokens(vllm_config), pages_per_block)
        layers.setdefault(name + WINDOW_SUFFIX, RecentWindow(window))
        result[name], result[name + WINDOW_SUFFIX] = pages, window
    pages = next((spec for spec in result.values() if isinstance(spec, HierarchicalKVSpec)), None)
    for name, spec in result.items():
        if pages is not None and isinstance(spec, SlidingWindowSpec):
            result[name] = in_page_sized_blocks(spec, layers[name].get_attn_backend(), pages)
    return result
