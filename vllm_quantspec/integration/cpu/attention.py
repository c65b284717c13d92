"""One layer's attention on vLLM's CPU engine: a compiled decode kernel, PyTorch for the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vllm_quantspec.integration.cpu import llvm_scan
from vllm_quantspec.kernels import cpu_decode, cpu_prefill, step

if TYPE_CHECKING:
    from vllm.v1.attention.backend import CommonAttentionMetadata
    from vllm.v1.kv_cache_interface import AttentionSpec

    from vllm_quantspec.format import PageFormat
    from vllm_quantspec.integration.cache.metadata import LayerSettings, QuantSpecMetadata

llvm_scan.install()  # cpu_decode has loaded Numba


def flash_attention_version(head_size: int) -> None:
    """FlashAttention is not used here."""


def check_shapes(settings: LayerSettings) -> None:
    """Every shape can be run."""


def reserve(fmt: PageFormat, query: torch.Tensor) -> None:
    """The CPU engine does not measure memory."""


def plan_prefill(spec: AttentionSpec, common: CommonAttentionMetadata, num_decodes: int) -> None:
    """Prefill rows need no plan here."""


def layer_attention(
    settings: LayerSettings,
    md: QuantSpecMetadata,
    pages: torch.Tensor,
    window: torch.Tensor,
    window_table: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    *,
    is_draft: bool,
) -> None:
    """Store, quantize, attend; see ``QuantSpecImpl.forward`` for the shapes."""
    fmt = settings.format
    scores = None
    if md.page_scores is not None and not is_draft:
        if "scored" not in md.shared:
            md.page_scores.start_step(md.query_start_loc[: md.num_decodes + 1], md.seq_lens[: md.num_decodes])
            md.shared["scored"] = True
        scores = md.page_scores.of_layer(settings.layer)
    selection = md.selection.of_layer(settings.layer) if md.selection is not None else None
    plan = md.shared.get("plan")
    if plan is None:
        plan = md.shared["plan"] = step.plan_step(
            fmt,
            md.query_start_loc,
            md.seq_lens,
            md.num_unverified,
            md.block_table,
            window_table,
            max_unverified=settings.max_unverified,
            quantize=not is_draft,
        )
    step.write_window(fmt, window, plan.window_slots, key, value)
    step.quantize_completed(fmt, plan, pages, window, key, value)

    if md.num_decodes:
        decode_plan = md.shared.get("decode_plan")
        if decode_plan is None:
            decode_plan = md.shared["decode_plan"] = cpu_decode.plan_decode(
                fmt,
                md.query_start_loc[: md.num_decodes + 1],
                md.seq_lens[: md.num_decodes],
                md.block_table[: md.num_decodes],
                window_table[: md.num_decodes],
                settings.num_heads,
                *((selection.count, selection.dense_from) if selection else ()),
            )
        output[: md.num_decode_tokens] = cpu_decode.run_decode(
            fmt,
            decode_plan,
            pages,
            window,
            query[: md.num_decode_tokens],
            settings.scale,
            settings.draft_bits if is_draft else fmt.bits,
            scores,
            selection,
        )
    for request in range(md.num_decodes, md.seq_lens.shape[0]):
        start, end = md.query_start_loc[request].item(), md.query_start_loc[request + 1].item()
        if start == end:
            continue
        output[start:end] = cpu_prefill.prefill_attention(
            fmt,
            pages,
            window,
            query[start:end],
            key[start:end],
            value[start:end],
            md.seq_lens[request].item(),
            md.block_table[request],
            window_table[request],
            settings.scale,
        )
