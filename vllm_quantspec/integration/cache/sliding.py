"""Sliding-window layers beside hierarchical pages: vLLM's own cache of them, in blocks of the same pool.

vLLM's pool has blocks of one size, the bytes of a page. A block of a sliding layer holds as many exact tokens as fit into
these, like a block of the recent window.
"""

from __future__ import annotations

from dataclasses import replace

from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.kv_cache_interface import SlidingWindowSpec
from vllm.v1.worker.utils import select_common_block_size

from vllm_quantspec.integration.cache.specs import HierarchicalKVSpec


def in_page_sized_blocks(
    spec: SlidingWindowSpec, backend: type[AttentionBackend], pages: HierarchicalKVSpec
) -> SlidingWindowSpec:
    """``spec`` with blocks of a page's bytes: of a power of two of tokens, at most a page's.

    Raises:
        ValueError: a page's bytes hold fewer tokens than ``backend`` reads at a time.
    """
    per_token = spec.unpadded_page_size_bytes // spec.block_size
    tokens = pages.block_size
    while tokens * per_token > pages.page_size_bytes or not _reads(backend, replace(spec, block_size=tokens)):
        tokens //= 2
        if not tokens:
            raise ValueError(
                f"quantspec: a page of this cache has {pages.page_size_bytes} bytes, which hold "
                f"{pages.page_size_bytes // per_token} tokens of a sliding-window layer, fewer than the attention backend "
                f"{backend.get_name()} reads at a time; set --kv-cache-dtype quantspec_int8, --block-size 128 or --dtype "
                "bfloat16, whichever is not set yet, or run this model without quantspec."
            )
    return replace(spec, block_size=tokens, page_size_padded=pages.page_size_bytes)


def _reads(backend: type[AttentionBackend], spec: SlidingWindowSpec) -> bool:
    """Whether the backend reads such blocks whole: padded ones cannot be split for its kernels."""
    try:
        return select_common_block_size(spec.block_size, [backend], [spec]) == spec.block_size
    except ValueError:
        return False
