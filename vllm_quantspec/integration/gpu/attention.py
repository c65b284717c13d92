"""One layer's attention on an NVIDIA GPU: every step is a kernel of ours or vLLM's FlashAttention.

Decode and verification rows, the first of a step, are captured in CUDA graphs: all shapes and host numbers of their
launches are fixed then, everything else is read on the device.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import torch
from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

from vllm_quantspec.integration.gpu.prefill import plan_prefill, prefill_attention, reserve
from vllm_quantspec.kernels import cache_update, decode_attention
from vllm_quantspec.kernels.warm_up import warm_up_prefill

if TYPE_CHECKING:
    from vllm_quantspec.format import PageFormat
    from vllm_quantspec.integration.cache.metadata import LayerSettings, QuantSpecMetadata
    from vllm_quantspec.integration.gpu.sparse_drafts import SparseDrafts


# What a platform provides.
__all__ = ["check_shapes", "flash_attention_version", "layer_attention", "plan_prefill", "reserve"]

_warmed_up: set[PageFormat] = set()
_thread: int | None = None  # the one whose engines launch kernels


def flash_attention_version(head_size: int) -> int:
    """Version of FlashAttention for this head size.

    Raises:
        ValueError: FlashAttention, which prefill needs, cannot run here.
    """
    version = get_flash_attn_version(head_size=head_size)
    if version is None:
        raise ValueError(
            "quantspec: prefill uses vLLM's FlashAttention, which is not available here; install a vLLM built for this "
            "GPU, or run without quantspec."
        )
    return version


def check_shapes(settings: LayerSettings) -> None:
    """Refuse now what the first step would trip over.

    Raises:
        ValueError: decode attention does not fit this GPU, or a second engine of this process runs in another thread: each
            thread of vLLM's has a stream of its own, and launches share scratch memory, so they must follow one another.
    """
    global _thread
    _thread = _thread or threading.get_ident()
    if _thread != threading.get_ident():
        raise ValueError(
            "quantspec: engines in two threads of one process would share its kernels' scratch memory; start the second "
            "engine in a process of its own."
        )
    for max_query_len, bits in ((1, settings.draft_bits), (settings.max_unverified + 1, settings.format.bits)):
        try:
            decode_attention.check_shapes(
                settings.format, settings.num_heads, max_query_len, bits, torch.cuda.current_device()
            )
        except RuntimeError as error:
            raise ValueError(f"quantspec: {error}; run without quantspec on this GPU.") from error


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
    fmt, n = settings.format, md.num_decodes
    sparse: SparseDrafts | None = md.page_scores
    num_reqs = md.seq_lens.shape[0]
    groups = [(slice(0, n), slice(0, n + 1), md.max_query_len)] if n else []
    if md.prefill is not None:
        groups.append((slice(n, num_reqs), slice(n, num_reqs + 1), md.prefill.max_query_len))
        if fmt not in _warmed_up:  # vLLM's own warm-up has short prompts, one at a time
            _warmed_up.add(fmt)
            warm_up_prefill(fmt, pages, window, key, value, md.block_table, window_table)
    for rows, bounds, max_query_len in groups:
        starts, seq_lens, table = md.query_start_loc[bounds], md.seq_lens[rows], window_table[rows]
        cache_update.store(fmt, window, key, value, starts, seq_lens, table, max_query_len=max_query_len)
        if not is_draft:
            cache_update.quantize(
                fmt,
                pages,
                window,
                key,
                value,
                starts,
                seq_lens,
                md.num_unverified[rows],
                md.block_table[rows],
                table,
                max_query_len=max_query_len,
                max_unverified=settings.max_unverified,
            )
    if n:
        options = {}
        if sparse is not None and is_draft:
            options = {"selection": sparse.selection(settings.layer)}
        elif sparse is not None and sparse.scores_out is not None:
            if settings.layer == 0:
                sparse.prepare(md)
            options = {"scores": sparse.scores_out}
        decode_attention.decode_attention(
            fmt,
            pages,
            window,
            query[: md.num_decode_tokens],
            md.query_start_loc[: n + 1],
            md.seq_lens[:n],
            md.block_table[:n],
            window_table[:n],
            settings.scale,
            settings.draft_bits if is_draft else fmt.bits,
            max_query_len=md.max_query_len,
            out=output[: md.num_decode_tokens],
            pages_may_change=not is_draft,  # by `quantize`, just before
            **options,
        )
        if "scores" in options:
            sparse.reduce(md, settings.layer)
    if md.prefill is not None:
        first = md.num_decode_tokens
        prefill_attention(
            fmt,
            md.prefill,
            pages,
            window,
            query[first:],
            key[first:],
            value[first:],
            md.block_table[n:],
            window_table[n:],
            settings.scale,
            settings.fa_version,
            output[first:],
        )
