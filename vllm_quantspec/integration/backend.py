"""The attention backend ``QUANTSPEC``: metadata, and the order of work in one layer.

In a layer of the target, for all requests of the step at once:
 1. the step's keys and values go to the recent window;
 2. every page whose last token is verified by now is quantized, from exact values (design rule 2);
 3. decode and verification rows read pages and window; prefill rows read pages, window and their own tokens.
A layer of the draft does 1 and 3, and reads the upper 4 bits.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout, KVCacheSpec

from vllm_quantspec.config import GROUP_SIZES, HEAD_SIZES
from vllm_quantspec.format import PageFormat
from vllm_quantspec.integration import llvm_scan
from vllm_quantspec.integration.backend_name import NAME
from vllm_quantspec.kernels import cpu_decode, reference, step

llvm_scan.install()  # cpu_decode has loaded Numba

WINDOW_SUFFIX = ".window"


@dataclass
class QuantSpecMetadata:
    """One step's batch, decode and verification rows first (the runner reorders).

    ``query_start_loc`` [num_reqs + 1] and ``seq_lens`` [num_reqs] int32 count the step's own tokens;
    ``num_unverified`` [num_reqs] of a request's query tokens, its last ones, are drafts.
    """

    num_actual_tokens: int
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    num_unverified: torch.Tensor
    block_table: torch.Tensor
    num_decodes: int
    num_decode_tokens: int
    plan: step.StepPlan | None = field(default=None, repr=False)
    decode_plan: cpu_decode.DecodePlan | None = field(default=None, repr=False)


@dataclass
class WindowMetadata:
    block_table: torch.Tensor


class QuantSpecMetadataBuilder(AttentionMetadataBuilder[QuantSpecMetadata]):
    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        # Set by the runner before each build; drafts cannot be told from recomputed tokens by their number alone.
        self.num_draft_tokens: torch.Tensor | None = None

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> QuantSpecMetadata:
        num_decodes, _, num_decode_tokens, _ = split_decodes_and_prefills(
            common_attn_metadata, decode_threshold=self.reorder_batch_threshold
        )
        num_reqs = common_attn_metadata.num_reqs
        num_unverified = torch.zeros(num_reqs, dtype=torch.int32)
        if self.num_draft_tokens is not None:  # padded requests have no drafts
            num_unverified[: len(self.num_draft_tokens)] = self.num_draft_tokens[:num_reqs]
        return QuantSpecMetadata(
            num_actual_tokens=common_attn_metadata.num_actual_tokens,
            query_start_loc=common_attn_metadata.query_start_loc,
            seq_lens=common_attn_metadata.seq_lens,
            num_unverified=num_unverified,
            block_table=common_attn_metadata.block_table_tensor,
            num_decodes=num_decodes,
            num_decode_tokens=num_decode_tokens,
        )


class WindowMetadataBuilder(AttentionMetadataBuilder[WindowMetadata]):
    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> WindowMetadata:
        return WindowMetadata(common_attn_metadata.block_table_tensor)


class QuantSpecBackend(AttentionBackend):
    forward_includes_kv_cache_update: bool = True
    accept_output_buffer: bool = True
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.bfloat16, torch.float16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto", "bfloat16", "float16"]

    @staticmethod
    def get_name() -> str:
        return NAME

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec=None) -> list[int]:
        return list(GROUP_SIZES)

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return list(HEAD_SIZES)

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return False

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return attn_type == AttentionType.DECODER

    @staticmethod
    def get_impl_cls() -> type[QuantSpecImpl]:
        return QuantSpecImpl

    @staticmethod
    def get_builder_cls() -> type[QuantSpecMetadataBuilder]:
        return QuantSpecMetadataBuilder


class WindowBackend(QuantSpecBackend):
    """Of the window's own KV cache group: a block table, nothing to compute."""

    @staticmethod
    def get_name() -> str:
        return f"{NAME}_WINDOW"

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec=None) -> list[int]:
        return [kv_cache_spec.block_size] if kv_cache_spec is not None else [16, 32, 64, 128]

    @staticmethod
    def get_builder_cls() -> type[WindowMetadataBuilder]:
        return WindowMetadataBuilder


class RecentWindow(torch.nn.Module, AttentionLayerBase):
    """The exact keys and values of one attention layer: a cache beside the layer's own, without computation.

    ``kv_cache`` as vLLM binds it: uint8 [num_blocks, num_kv_heads, window_block_size, 2 * head_size * itemsize].
    """

    def __init__(self, spec: AttentionSpec) -> None:
        super().__init__()
        self.spec = spec
        self.kv_cache = torch.tensor([])

    def get_attn_backend(self) -> type[AttentionBackend]:
        return WindowBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        return self.spec


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
        refuse_layer(head_size, alibi_slopes, sliding_window, logits_soft_cap, attn_type, sinks, unsupported)
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_kv_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        vllm_config = get_current_vllm_config()
        self.format = PageFormat(
            num_kv_heads, head_size, vllm_config.cache_config.block_size, vllm_config.model_config.dtype
        )
        self.num_speculative_tokens = num_speculative_tokens(vllm_config)
        self.draft_kv = getattr(vllm_config.speculative_config, "draft_kv", "int4")

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
        if attn_metadata is None:  # profiling and warm-up
            return output
        target_name = layer.kv_sharing_target_layer_name
        context = get_forward_context()
        window_name = (target_name or layer.layer_name) + WINDOW_SUFFIX
        window_table = context.attn_metadata[window_name].block_table
        pages = kv_cache.squeeze(2)
        window = context.no_compile_layers[window_name].kv_cache.view(self.format.dtype)

        md = attn_metadata
        num_tokens = md.num_actual_tokens
        query, key, value = query[:num_tokens], key[:num_tokens], value[:num_tokens]
        if md.plan is None:
            md.plan = step.plan_step(
                self.format,
                md.query_start_loc,
                md.seq_lens,
                md.num_unverified,
                md.block_table,
                window_table,
                max_unverified=self.num_speculative_tokens,
                quantize=target_name is None,
            )
        plan = md.plan
        reference.write_window(self.format, window, plan.window_slots, key, value)
        step.quantize_completed(self.format, plan, pages, window, key, value)

        if md.num_decodes:
            reads_upper_only = target_name is not None and self.draft_kv == "int4"
            if md.decode_plan is None:
                md.decode_plan = cpu_decode.plan_decode(
                    self.format,
                    md.query_start_loc[: md.num_decodes + 1],
                    md.seq_lens[: md.num_decodes],
                    md.block_table[: md.num_decodes],
                    window_table[: md.num_decodes],
                    self.num_heads,
                )
            output[: md.num_decode_tokens] = cpu_decode.run_decode(
                self.format,
                md.decode_plan,
                pages,
                window,
                query[: md.num_decode_tokens],
                self.scale,
                "draft" if reads_upper_only else "target",
            )
        for request in range(md.num_decodes, md.seq_lens.shape[0]):
            start, end = md.query_start_loc[request].item(), md.query_start_loc[request + 1].item()
            if start == end:
                continue
            output[start:end] = reference.prefill_attention(
                self.format,
                pages,
                window,
                query[start:end],
                key[start:end],
                value[start:end],
                md.seq_lens[request].item(),
                md.block_table[request],
                window_table[request],
                self.scale,
            )
        return output


def refuse_layer(head_size, alibi_slopes, sliding_window, logits_soft_cap, attn_type, sinks, unsupported) -> None:
    """The last line of defence, for what a model's configuration does not show: raised before weights are loaded."""
    for present, what in (
        (head_size not in HEAD_SIZES, f"head size {head_size} (rather than {', '.join(map(str, HEAD_SIZES))})"),
        (alibi_slopes is not None, "ALiBi"),
        (sliding_window is not None, "sliding-window attention"),
        (bool(logits_soft_cap), "a logit soft-cap"),
        (attn_type != AttentionType.DECODER, f"{attn_type} attention"),
        (sinks is not None, "attention sinks"),
        (bool(unsupported), f"attention with {', '.join(unsupported)}"),
    ):
        if present:
            raise ValueError(
                f"quantspec: this model has an attention layer with {what}, which the hierarchical KV cache does not "
                "implement; run it without quantspec."
            )
