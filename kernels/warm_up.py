"""Compile, when an engine starts, what a prompt launches later: Triton does so on the first call of each variant."""

import torch

from vllm_quantspec.format import PageFormat
from vllm_quantspec.kernels.cache_update import store
from vllm_quantspec.kernels.gather_context import gather_context

# Prompts in one step: few, more, many. `store` has a variant for each.
BATCHES = (1, 16, 64)


def warm_up_prefill(
    fmt: PageFormat,
    pages: torch.Tensor,
    window: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    block_table: torch.Tensor,
    window_block_table: torch.Tensor,
) -> None:
    """Launch `store` and `gather_context` for requests without tokens: nothing is written.

    The variants of `quantize` differ by the number of requests only: capturing CUDA graphs of decode steps compiles each.

    Args:
        pages, window, key, value, block_table, window_block_table: as in `cache_update.quantize`; the variants are those
            for the dtypes and strides of these tensors, so they are to be an engine's own.
    """
    most = max(BATCHES)
    zeros = torch.zeros(most + 1, dtype=torch.int32, device=pages.device)
    table, window_table = (x.new_zeros(most, x.shape[1]) for x in (block_table, window_block_table))
    for n in BATCHES:
        store(fmt, window, key, value, zeros[: n + 1], zeros[:n], window_table[:n], max_query_len=1 << 30)
    out = torch.empty(2, 1, fmt.num_kv_heads, fmt.head_size, dtype=fmt.dtype, device=pages.device)
    gather_context(fmt, pages, window, *out, zeros[:2], zeros[:1], zeros[:1], table[:1], window_table[:1], max_len=1)
