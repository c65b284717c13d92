"""The attention backend ``QUANTSPEC``: what vLLM asks of a backend, and the metadata of a step.

In a layer of the target, for all requests of the step at once:
 1. the step's keys and values go to the recent window;
 2. every page whose last token is verified by now is quantized, from exact values (design rule 2);
 3. decode and verification rows read pages and window; prefill rows read pages, window and their own tokens.
A layer of the draft does 1 and 3, and reads the upper 4 bits. The work itself is in ``gpu/attention.py`` and
``cpu/attention.py``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.platforms import current_platform
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout

from vllm_quantspec.config import HEAD_SIZES
from vllm_quantspec.format import GROUP_SIZES, PageFormat
from vllm_quantspec.integration.cache.metadata import WINDOW_SUFFIX, LayerSettings, QuantSpecMetadata
from vllm_quantspec.integration.cache.specs import HierarchicalKVSpec
from vllm_quantspec.integration.startup.backend_name import NAME
from vllm_quantspec.integration.startup.cache_dtype import page_bits

if current_platform.is_cpu():
    from vllm_quantspec.integration.cpu import attention
else:
    from vllm_quantspec.integration.gpu import attention


class QuantSpecMetadataBuilder(AttentionMetadataBuilder[QuantSpecMetadata]):
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH
    # The kernels derive everything from lengths and tables that live in persistent device buffers.
    supports_draft_decode_metadata_update: bool = True

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        # Drafts cannot be told from recomputed tokens by their number alone: the runner writes each request's here.
        self.num_unverified = torch.zeros(vllm_config.scheduler_config.max_num_seqs, dtype=torch.int32, device=device)
        self._layers, self._layer = vllm_config.compilation_config.static_forward_context, layer_names[0]

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> QuantSpecMetadata:
        common = common_attn_metadata
        num_decodes, num_prefills, num_decode_tokens, _ = split_decodes_and_prefills(
            common, decode_threshold=self.reorder_batch_threshold
        )
        max_query_len, prefill = common.max_query_len, None
        if num_prefills:
            starts = common.query_start_loc_cpu
            lengths = starts[1 : num_decodes + 1] - starts[:num_decodes]
            max_query_len = int(lengths.max()) if num_decodes else 0
            prefill = attention.plan_prefill(self.kv_cache_spec, common, num_decodes)
        return QuantSpecMetadata(
            num_actual_tokens=common.num_actual_tokens,
            query_start_loc=common.query_start_loc,
            seq_lens=common.seq_lens,
            num_unverified=self.num_unverified[: common.num_reqs],
            block_table=common.block_table_tensor,
            num_decodes=num_decodes,
            num_decode_tokens=num_decode_tokens,
            max_query_len=max_query_len,
            prefill=prefill,
            page_scores=self._page_scores(),
        )

    def _page_scores(self) -> Any:
        """That of the group's layers, all of which have the same; drafts are set up after layers, and may be before this."""
        layer = self._layers.get(self._layer)
        page_scores = None if layer is None else layer.impl.page_scores
        return None if page_scores is None or page_scores.plain else page_scores

    def update_draft_decode_metadata(self, metadata: QuantSpecMetadata) -> None:
        """Lengths and tables are read on the device when the kernels run: nothing to refresh."""


class QuantSpecBackend(AttentionBackend):
    forward_includes_kv_cache_update: bool = True
    accept_output_buffer: bool = True
    # Of the engine that this process has built last: `customize_spec` is not told which engine asks.
    page_format: ClassVar[PageFormat | None] = None
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.bfloat16, torch.float16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto", "bfloat16", "float16"]

    @staticmethod
    def get_name() -> str:
        return NAME

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec=None) -> list[int]:
        """A page, of which a block of vLLM's pool may have several (`make_specs`)."""
        return [kv_cache_spec.tokens_per_state] if isinstance(kv_cache_spec, HierarchicalKVSpec) else list(GROUP_SIZES)

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """vLLM asks for the bytes of a token, of which it makes blocks that hold a Mamba layer's state."""
        fmt = cls.page_format
        if fmt is None or isinstance(spec, HierarchicalKVSpec):
            return spec
        return replace(spec, dtype=torch.uint8, state_content_bytes=fmt.head_bytes // fmt.group_size)

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return list(HEAD_SIZES)

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return attn_type == AttentionType.DECODER

    @staticmethod
    def get_impl_cls() -> type[QuantSpecImpl]:
        return QuantSpecImpl

    @staticmethod
    def get_builder_cls() -> type[QuantSpecMetadataBuilder]:
        return QuantSpecMetadataBuilder


def num_speculative_tokens(vllm_config: VllmConfig) -> int:
    config = vllm_config.speculative_config
    return config.num_speculative_tokens if config is not None else 0


class QuantSpecImpl(AttentionImpl):
    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
        **unsupported: Any,
    ) -> None:
        refuse_layer(
            head_size,
            alibi_slopes,
            sliding_window,
            logits_soft_cap,
            attn_type,
            kv_sharing_target_layer_name,
            sinks,
            unsupported,
        )
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_kv_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        vllm_config = get_current_vllm_config()
        self.settings = LayerSettings(
            PageFormat(
                num_kv_heads,
                head_size,
                vllm_config.cache_config.block_size,
                vllm_config.model_config.dtype,
                page_bits(vllm_config),
            ),
            num_heads,
            self.scale,
            draft_bits=8 if getattr(vllm_config.speculative_config, "draft_kv", "int4") == "int8" else 4,
            max_unverified=num_speculative_tokens(vllm_config),
            fa_version=attention.flash_attention_version(head_size),
        )
        self.page_scores: Any = None  # of an engine with sparse drafts: set when these are set up
        refuse_unlike(self.settings.format, vllm_config)
        QuantSpecBackend.page_format = self.settings.format
        attention.check_shapes(self.settings)

    def forward(
        self,
        layer: AttentionLayerBase,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: QuantSpecMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of one layer, into ``output``.

        Args:
            query, output: [num_tokens, num_heads, head_size], may be padded past the step's tokens.
            key, value: [num_tokens, num_kv_heads, head_size].
            kv_cache: uint8 [num_blocks, num_kv_heads, 1, head_bytes].
        """
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("quantspec: fused output quantization is not supported.")
        if attn_metadata is None:  # memory profiling
            attention.reserve(self.settings.format, query)
            return output
        owner = layer.kv_sharing_target_layer_name
        context = get_forward_context()
        window_name = (owner or layer.layer_name) + WINDOW_SUFFIX
        num_tokens = attn_metadata.num_actual_tokens
        attention.layer_attention(
            self.settings,
            attn_metadata,
            kv_cache.squeeze(2),
            context.no_compile_layers[window_name].exact(self.settings.format),
            context.attn_metadata[window_name].block_table,
            query[:num_tokens],
            key[:num_tokens],
            value[:num_tokens],
            output[:num_tokens],
            is_draft=owner is not None,
        )
        return output


def refuse_unlike(page_format: PageFormat, vllm_config: VllmConfig) -> None:
    """Pages are blocks of one pool, and one block table serves all layers: their pages must be alike."""
    for layer in vllm_config.compilation_config.static_forward_context.values():
        impl = getattr(layer, "impl", None)
        if not isinstance(impl, QuantSpecImpl):
            continue
        other = impl.settings.format
        if other != page_format:
            raise ValueError(
                f"quantspec: this model has attention layers with {other.num_kv_heads} KV heads of size {other.head_size} "
                f"and others with {page_format.num_kv_heads} of size {page_format.head_size}, but the hierarchical KV cache "
                "needs the same in every layer; run it without quantspec."
            )


def refuse_layer(
    head_size, alibi_slopes, sliding_window, logits_soft_cap, attn_type, kv_sharing_target_layer_name, sinks, unsupported
) -> None:
    """The last line of defence, for what a model's configuration does not show: raised before weights are loaded."""
    for present, what in (
        (head_size not in HEAD_SIZES, f"head size {head_size} (rather than {', '.join(map(str, HEAD_SIZES))})"),
        (alibi_slopes is not None, "ALiBi"),
        (sliding_window is not None, "sliding-window attention"),
        (bool(logits_soft_cap), "a logit soft-cap"),
        (attn_type != AttentionType.DECODER, f"{attn_type} attention"),
        # The draft's layers share the target's caches too, but they are copies: only the target's are made here.
        (kv_sharing_target_layer_name is not None, f"the keys and values of another ({kv_sharing_target_layer_name})"),
        (sinks is not None, "attention sinks"),
        (bool(unsupported), f"attention with {', '.join(unsupported)}"),
    ):
        if present:
            raise ValueError(
                f"quantspec: this model has an attention layer with {what}, which the hierarchical KV cache does not "
                "implement; run it without quantspec."
            )
