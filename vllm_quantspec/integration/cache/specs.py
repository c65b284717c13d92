"""KV cache specs and managers: hierarchical pages and the recent window, both blocks of vLLM's one pool.

A pool block has the bytes of one page, or of several where a Mamba layer's state needs them. A request holds
- one *page* per ``group_size`` tokens: quantized, prefix-cacheable, freed with the request;
- *window blocks* with the exact keys and values of its newest tokens (``window_block_size`` tokens each). Their table is
  indexed by position; entries below the window are vLLM's null block. A request that starts from a prefix-cache hit
  has null entries below it, which is how the attention knows that no exact copy exists (design rule 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

import torch
from vllm.utils.math_utils import cdiv
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, KVCacheSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from vllm_quantspec.format import PageFormat, window_blocks_per_request, window_start

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.kv_cache_utils import KVCacheBlock


@dataclass(frozen=True, kw_only=True)
class HierarchicalKVSpec(FullAttentionSpec):
    """Pages of ``block_size`` tokens, one opaque byte string per KV head (``PageFormat``)."""

    num_speculative_tokens: int

    @classmethod
    def merge(cls, specs: list[HierarchicalKVSpec]) -> HierarchicalKVSpec:
        assert all(spec == specs[0] for spec in specs), "Layers of one KV cache group must have the same page format."
        return specs[0]


@dataclass(frozen=True, kw_only=True)
class RecentWindowSpec(AttentionSpec):
    """Blocks of ``block_size`` exact tokens, padded to the bytes of a page."""

    group_size: int
    num_speculative_tokens: int

    @property
    def prefix_cacheable(self) -> bool:
        return False

    @property
    def uses_slot_mapping(self) -> bool:
        return False

    @property
    def block_table_token_alignment(self) -> int | None:
        return None

    def first_kept(self, num_tokens: int) -> int:
        """Index of the first block that the step after one that ends at ``num_tokens`` may read or quantize.

        All of that step's drafts may be rejected, so it may begin ``num_speculative_tokens`` earlier.
        """
        return window_start(max(num_tokens - self.num_speculative_tokens, 0), self.group_size) // self.block_size

    @cached_property
    def max_blocks_per_request(self) -> int:
        """Most blocks a request holds at once, with or without a step in flight."""
        return window_blocks_per_request(self.group_size, self.block_size, self.num_speculative_tokens)

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        blocks = cdiv(vllm_config.model_config.max_model_len, self.block_size)
        return min(blocks, self.max_blocks_per_request) * self.page_size_bytes

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        return all(isinstance(spec, RecentWindowSpec) for spec in kv_cache_specs.values())


def make_specs(
    page_format: PageFormat, num_speculative_tokens: int, pages_per_block: int = 1
) -> tuple[HierarchicalKVSpec, RecentWindowSpec]:
    """The two specs of one attention layer; both say ``uint8``, so vLLM has no reason to zero new blocks.

    Where vLLM needs larger blocks, for a Mamba layer's state, a block has several pages, or as many window blocks, each
    of a page's bytes: the layer's kernel blocks.
    """
    heads, head_size = page_format.num_kv_heads, page_format.head_size
    common = dict(
        num_kv_heads=heads,
        head_size=head_size,
        dtype=torch.uint8,
        num_head_slots=heads,
        dcp_sharded=False,
        num_speculative_tokens=num_speculative_tokens,
    )
    pages = HierarchicalKVSpec(
        block_size=pages_per_block * page_format.group_size,
        tokens_per_state=page_format.group_size,
        state_content_bytes=page_format.head_bytes,
        **common,
    )
    size = page_format.window_block_size
    if pages_per_block == 1:
        bytes_of = dict(
            state_content_bytes=2 * head_size * page_format.dtype.itemsize, page_size_padded=pages.page_size_bytes
        )
    else:  # a padded block cannot be split, so each window block is one state
        bytes_of = dict(state_content_bytes=page_format.head_bytes, tokens_per_state=size)
    window = RecentWindowSpec(block_size=pages_per_block * size, group_size=page_format.group_size, **bytes_of, **common)
    return pages, window


class HierarchicalKVManager(FullAttentionManager):
    """Full attention's manager, except that a page is offered to other requests only when it is surely quantized."""

    supports_fine_grained_hash_lookup: ClassVar[bool] = False

    def __init__(self, kv_cache_spec: HierarchicalKVSpec, **kwargs) -> None:
        # vLLM has new blocks zeroed where layers of several dtypes share the pool; pages are written whole before they are
        # read, and of a window only what was written is read.
        super().__init__(kv_cache_spec, **{**kwargs, "needs_kv_cache_zeroing": False})

    def cache_blocks(
        self, request, num_tokens: int, retention_interval: int | None = None, *, replay_boundaries: Sequence[int]
    ) -> None:
        # A generated token that was accepted as a draft is quantized in the step after its own (the first that knows
        # it is verified). Under async scheduling vLLM calls this before that step, which a finished request never has.
        drafts = self.kv_cache_spec.num_speculative_tokens
        quantized = max(min(num_tokens, request.num_prompt_tokens), num_tokens - drafts)
        super().cache_blocks(request, quantized, retention_interval, replay_boundaries=replay_boundaries)


class RecentWindowManager(FullAttentionManager):
    """Keeps a request's newest blocks; its block table is indexed by position, with null blocks below the window."""

    supports_fine_grained_hash_lookup: ClassVar[bool] = False

    def __init__(self, kv_cache_spec: RecentWindowSpec, **kwargs) -> None:
        super().__init__(kv_cache_spec, **{**kwargs, "needs_kv_cache_zeroing": False})  # as pages
        # {request id: index of the first block that may still be held}, so that a step frees in constant time.
        self._first_held: dict[str, int] = {}

    def _blocks_to_append(self, num_held: int, num_tokens: int, num_tokens_main_model: int) -> tuple[int, int]:
        """Null blocks and real blocks to append to a table of ``num_held`` entries."""
        missing = max(cdiv(num_tokens, self.block_size) - num_held, 0)
        nulls = min(max(self.kv_cache_spec.first_kept(num_tokens_main_model) - num_held, 0), missing)
        return nulls, missing - nulls

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int:
        num_held = len(self.req_to_blocks.get(request_id, ())) or cdiv(total_computed_tokens, self.block_size)
        if apply_admission_cap:  # the whole prompt, in chunks that are not known yet: reserve the most any chunk needs
            return min(cdiv(num_tokens, self.block_size) - num_held, self.kv_cache_spec.max_blocks_per_request)
        # vLLM has just freed what no step in flight reads (remove_skipped_blocks), and counts the free blocks after this
        # call. What only steps in flight read is free as well: whoever writes to it does so in a later step, which runs
        # after them on the same stream. Else a request would hold another window for every chunk in flight.
        self._free_below(request_id, self.kv_cache_spec.first_kept(total_computed_tokens))
        return self._blocks_to_append(num_held, num_tokens, num_tokens_main_model)[1]

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[KVCacheBlock]:
        blocks = self.req_to_blocks[request_id]
        nulls, reals = self._blocks_to_append(len(blocks), num_tokens, num_tokens_main_model)
        new_blocks = [self._null_block] * nulls + (self.block_pool.get_new_blocks(reals) if reals else [])
        blocks.extend(new_blocks)
        return new_blocks

    def add_local_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Sequence[KVCacheBlock],
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
    ) -> None:
        num_computed = num_local_computed_tokens + num_external_computed_tokens
        self.req_to_blocks[request_id].extend([self._null_block] * cdiv(num_computed, self.block_size))

    def allocate_external_computed_blocks(self, *args, **kwargs) -> None:
        """Tokens that a KV connector loads have no exact copy: their entries are null already."""

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        start = window_start(processed_computed_tokens, self.kv_cache_spec.group_size)
        self._free_below(request_id, start // self.block_size)

    def _free_below(self, request_id: str, index: int) -> None:
        """Free the request's blocks below ``index`` of its table, which get null entries."""
        blocks = self.req_to_blocks.get(request_id)
        if not blocks:
            return
        first, end = self._first_held.get(request_id, 0), min(index, len(blocks))
        if first >= end:
            return
        self._first_held[request_id] = end
        freed = [block for block in reversed(blocks[first:end]) if not block.is_null]
        blocks[first:end] = [self._null_block] * (end - first)
        if freed:
            self.block_pool.free_blocks(freed)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        self._first_held.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)

    def get_num_common_prefix_blocks(self, running_request_id: str) -> int:
        return 0

    def cache_blocks(self, *args, **kwargs) -> None:
        """Windows belong to one request."""

    @classmethod
    def find_longest_cache_hit(cls, *args, kv_cache_group_ids: list[int], **kwargs):
        return tuple([] for _ in kv_cache_group_ids), 0


# At import: a scheduler process meets these classes first when it unpickles the workers' specs.
KVCacheSpecRegistry._ensure_registered()
KVCacheSpecRegistry.register(HierarchicalKVSpec, HierarchicalKVManager, FullAttentionSpec)
KVCacheSpecRegistry.register(RecentWindowSpec, RecentWindowManager, RecentWindowSpec)
