"""Prefill on a GPU: a chunk's own tokens exact, by vLLM's FlashAttention; older context dequantized piece by piece.

Dequantizing is cheap beside a chunk's attention (a token's bytes are read and written once, against thousands of query
tokens that attend to it), so the tensor cores work on what FlashAttention likes best, and the pieces bound the memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from vllm.platforms import current_platform
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.ops.merge_attn_states import merge_attn_states
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_quantspec.format import PageFormat
from vllm_quantspec.kernels.gather_context import gather_context

if current_platform.is_cuda():
    from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func

# Dequantized keys and values of one piece of context, of all requests together.
WORKSPACE_BYTES = 256 << 20


@dataclass
class ContextPiece:
    """Tokens ``starts[r] ..`` of each request's context, in rows ``cu_seqlens[r] .. cu_seqlens[r + 1]`` of a buffer.

    Of most requests a piece may hold nothing: FlashAttention gives their rows no weight.
    """

    cu_seqlens: torch.Tensor  # int32 [num_prefills + 1]
    starts: torch.Tensor  # int32 [num_prefills]
    requests: slice  # from the first to the last of which it holds tokens
    max_len: int
    num_tokens: int


@dataclass
class PrefillPlan:
    """A step's prefill rows; shared by all layers."""

    query_start_loc: torch.Tensor  # int32 [num_prefills + 1], from 0
    first: torch.Tensor  # int32 [num_prefills], position of each chunk's first token
    max_query_len: int
    pieces: list[ContextPiece]


def piece_tokens(num_kv_heads: int, head_size: int) -> int:
    """Tokens of context that fit into the workspace at once, all requests together; at least 1024."""
    return max(1024, WORKSPACE_BYTES // (4 * num_kv_heads * head_size))


def split_context(first: np.ndarray, max_tokens: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Cut contexts of ``first`` [n] tokens into pieces of at most ``max_tokens`` in all: [(starts [n], lengths [n])].

    The contexts lie end to end and are cut every ``max_tokens`` tokens, wherever that is: one long context among many
    short ones makes no more pieces than as many tokens of equal contexts.
    """
    ends = np.cumsum(first)
    begins = ends - first
    pieces = []
    for low in range(0, int(ends[-1]), max_tokens):
        starts, stops = (np.clip(at - begins, 0, first) for at in (low, low + max_tokens))
        pieces.append((starts.astype(np.int32), (stops - starts).astype(np.int32)))
    return pieces


def make_piece(cu_seqlens: torch.Tensor, starts: torch.Tensor, lengths: np.ndarray) -> ContextPiece:
    held = np.flatnonzero(lengths)
    requests = slice(int(held[0]), int(held[-1]) + 1)
    return ContextPiece(cu_seqlens, starts, requests, int(lengths.max()), int(lengths.sum()))


def plan_prefill(spec: AttentionSpec, common: CommonAttentionMetadata, num_decodes: int) -> PrefillPlan:
    """Plan the rows of a step after its first ``num_decodes``, from what the host knows of them.

    A prefill row holds no drafts, so its length on the host is exact.
    """
    starts = common.query_start_loc_cpu[num_decodes:].numpy()
    lengths = np.diff(starts)
    first = common.seq_lens_cpu_upper_bound[num_decodes:].numpy() - lengths
    pieces = split_context(first, piece_tokens(spec.num_kv_heads, spec.head_size))
    rows = [starts - starts[0], first]
    for piece_starts, piece_lengths in pieces:
        rows += [np.concatenate(([0], np.cumsum(piece_lengths))), piece_starts]
    packed = async_tensor_h2d(np.concatenate(rows).astype(np.int32), device=common.query_start_loc.device)
    tensors = iter(packed.split([len(row) for row in rows]))
    return PrefillPlan(
        query_start_loc=next(tensors),
        first=next(tensors),
        max_query_len=int(lengths.max()),
        pieces=[make_piece(next(tensors), next(tensors), piece_lengths) for _, piece_lengths in pieces],
    )


def reserve(fmt: PageFormat, query: torch.Tensor) -> None:
    """Allocate, and drop, what `prefill_attention` needs for ``query`` [num_tokens, num_heads, head_size]."""
    workspace = _workspace(fmt, piece_tokens(fmt.num_kv_heads, fmt.head_size), query)
    outputs = [torch.empty_like(query) for _ in range(3)]
    del workspace, outputs


def prefill_attention(
    fmt: PageFormat,
    plan: PrefillPlan,
    pages: torch.Tensor,
    window: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    block_table: torch.Tensor,
    window_table: torch.Tensor,
    softmax_scale: float,
    fa_version: int,
    output: torch.Tensor,
) -> None:
    """Causal attention of each request's chunk to its own tokens and to all before them, into ``output``.

    Args:
        pages, window, block_table, window_table: as in ``reference.prefill_attention``, which this computes; tables have
            a row per prefill request.
        query, output: [num_tokens, num_heads, head_size]; key, value: [num_tokens, num_kv_heads, head_size].
    """

    def flash_attention(keys, values, cu_seqlens, max_len, causal, **kwargs):
        return flash_attn_varlen_func(
            q=query,
            k=keys,
            v=values,
            cu_seqlens_q=plan.query_start_loc,
            max_seqlen_q=plan.max_query_len,
            cu_seqlens_k=cu_seqlens,
            max_seqlen_k=max_len,
            softmax_scale=softmax_scale,
            causal=causal,
            fa_version=fa_version,
            **kwargs,
        )

    if not plan.pieces:
        flash_attention(key, value, plan.query_start_loc, plan.max_query_len, True, out=output)
        return
    merged, merged_lse = flash_attention(
        key, value, plan.query_start_loc, plan.max_query_len, True, return_softmax_lse=True
    )[:2]
    keys, values = _workspace(fmt, max(piece.num_tokens for piece in plan.pieces), query)
    for piece in plan.pieces:
        # The launch has CTAs for the longest context, for each request that it is given.
        requests = piece.requests
        gather_context(
            fmt,
            pages,
            window,
            keys,
            values,
            piece.cu_seqlens[requests.start : requests.stop + 1],
            piece.starts[requests],
            plan.first[requests],
            block_table[requests],
            window_table[requests],
            max_len=piece.max_len,
        )
        part, lse = flash_attention(
            keys[: piece.num_tokens],
            values[: piece.num_tokens],
            piece.cu_seqlens,
            piece.max_len,
            False,
            return_softmax_lse=True,
        )[:2]
        last = piece is plan.pieces[-1]
        target, target_lse = (output, None) if last else (torch.empty_like(merged), torch.empty_like(merged_lse))
        merge_attn_states(target, part, lse, merged, merged_lse, target_lse)
        merged, merged_lse = target, target_lse


def _workspace(fmt: PageFormat, num_tokens: int, query: torch.Tensor) -> torch.Tensor:
    return torch.empty(2, num_tokens, fmt.num_kv_heads, fmt.head_size, dtype=fmt.dtype, device=query.device)
