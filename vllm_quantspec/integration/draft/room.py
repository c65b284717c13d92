"""What the KV cache will find of a GPU's memory, while the draft is built."""

from __future__ import annotations

import torch
from vllm.config import VllmConfig


def left_for_cache(vllm_config: VllmConfig) -> float:
    """Bytes of this rank's GPU, beside what is allocated already; what a step needs is still in it."""
    cache, (free, total) = vllm_config.cache_config, torch.cuda.mem_get_info()
    free += torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    if cache.kv_cache_memory_bytes is not None:
        return free - cache.kv_cache_memory_bytes
    return free - (1 - cache.gpu_memory_utilization) * total
