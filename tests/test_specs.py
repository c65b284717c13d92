"""The two KV cache specs and their managers, on vLLM's own block pool and coordinator."""

import random
from types import SimpleNamespace

import pytest
import torch
from vllm.utils.math_utils import cdiv
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from vllm_quantspec.format import PageFormat, window_start
from vllm_quantspec.integration.cache.specs import (
    HierarchicalKVManager,
    RecentWindowManager,
    make_specs,
)


@pytest.mark.parametrize("head_size", [64, 96, 128, 256])
@pytest.mark.parametrize("group_size", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bits", [4, 8])
def test_bytes(head_size, group_size, dtype, bits):
    fmt = PageFormat(3, head_size, group_size, dtype, bits)
    pages, window = make_specs(fmt, 4)
    value_groups = head_size // fmt.value_group_size
    codes = 2 * group_size * head_size * bits // 8  # keys and values
    scales = 4 * head_size + 4 * group_size * value_groups  # 16-bit scale and minimum
    assert pages.page_size_bytes == fmt.page_bytes == 3 * (codes + scales)
    assert window.page_size_bytes == pages.page_size_bytes
    exact = window.block_size * 2 * head_size * dtype.itemsize
    assert exact <= fmt.head_bytes < 2 * exact and group_size % window.block_size == 0
    assert not window.prefix_cacheable and pages.prefix_cacheable


def test_managers_are_registered():
    pages, window = make_specs(PageFormat(2, 128, 128, torch.bfloat16), 4)
    assert KVCacheSpecRegistry.get_manager_class(pages) is HierarchicalKVManager
    assert KVCacheSpecRegistry.get_manager_class(window) is RecentWindowManager
    assert pages.merge([pages, pages]) == pages
    with pytest.raises(AssertionError, match="same page format"):
        pages.merge([pages, make_specs(PageFormat(2, 64, 128, torch.bfloat16), 4)[0]])


def window_manager(num_blocks: int, drafts: int, group_size: int = 128) -> RecentWindowManager:
    _, spec = make_specs(PageFormat(2, 64, group_size, torch.bfloat16), drafts)
    pool = BlockPool(num_blocks, enable_caching=True, hash_block_size=group_size)
    return RecentWindowManager(
        kv_cache_spec=spec,
        block_pool=pool,
        enable_caching=True,
        kv_cache_group_id=1,
        scheduler_block_size=group_size,
    )


@pytest.mark.parametrize("seed", range(30))
def test_window_holds_what_the_next_step_reads(seed):
    """A random life of a request: whatever the next step may read or quantize is held, little else is, nothing leaks."""
    rng = random.Random(seed)
    drafts, group = rng.choice([0, 1, 4, 8]), rng.choice([64, 128])
    manager = window_manager(400, drafts, group)
    spec, pool = manager.kv_cache_spec, manager.block_pool
    free = pool.get_num_free_blocks()
    size = spec.block_size
    hit = rng.choice([0, 0, group, 5 * group])
    prompt = hit + rng.randrange(1, 9 * group)
    manager.add_local_computed_blocks("r", [], hit, 0)
    computed = hit
    while computed < prompt + 3 * group:
        if computed < prompt:
            scheduled, num_drafts = min(rng.choice([1, 7, group, 4 * group]), prompt - computed), 0
        else:
            num_drafts = rng.randrange(drafts + 1)
            scheduled = 1 + num_drafts
        manager.remove_skipped_blocks("r", computed)
        main, slots = computed + scheduled, computed + scheduled + drafts
        need = manager.get_num_blocks_to_allocate("r", slots, [], computed, hit, main)
        before = pool.get_num_free_blocks()
        new = manager.allocate_new_blocks("r", slots, main)
        assert before - pool.get_num_free_blocks() == need == sum(not b.is_null for b in new)
        blocks = manager.req_to_blocks["r"]
        assert len(blocks) >= cdiv(slots, size)
        held = [i for i, b in enumerate(blocks) if not b.is_null]
        assert len(held) <= spec.max_blocks_per_request
        # This step: its window, unless the prefix cache gave it; and its own drafts' slots.
        for position in range(max(window_start(computed, group), hit), computed):
            assert not blocks[position // size].is_null
        verified = computed + scheduled - num_drafts
        computed = verified + (rng.randrange(num_drafts + 1) if num_drafts else 0)
        for position in range(max(window_start(computed, group), hit), computed + drafts):
            assert not blocks[position // size].is_null
    manager.remove_skipped_blocks("r", computed)
    held = [b for b in manager.req_to_blocks["r"] if not b.is_null]
    assert len(held) <= cdiv(2 * group + 2 * drafts + 2, size) + 1
    manager.free("r")
    assert pool.get_num_free_blocks() == free
    assert not manager._first_held


def test_a_page_is_offered_only_once_it_is_quantized(monkeypatch):
    pages, _ = make_specs(PageFormat(2, 64, 128, torch.bfloat16), 4)
    offered = []
    monkeypatch.setattr(
        HierarchicalKVManager.__mro__[1], "cache_blocks", lambda self, r, n, *a, **k: offered.append(n), raising=True
    )
    manager = object.__new__(HierarchicalKVManager)
    manager.kv_cache_spec = pages
    request = SimpleNamespace(num_prompt_tokens=300)
    for num_tokens in (100, 300, 302, 400):
        manager.cache_blocks(request, num_tokens, replay_boundaries=())
    assert offered == [100, 300, 300, 396]  # generated tokens wait until they cannot have been this step's drafts
