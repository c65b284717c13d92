"""Compile, when an engine starts, what a prompt launches later: Triton does so on the first call of each variant."""

import torch

from vllm_quantspec.format import PageFormat
from vllm_quantspec.kernels.cache_update import quantize, store
from vllm_quantspec.kernels.gather_context import gather_context

# Requests of a step: few, more, many. `store` and `quantize` have variants for some of them.
BATCHES = (1, 16, 64, 256)


def warm_up_prefill(
    fmt: PageFormat,
    pages: torch.Tensor,
    window: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    block_table: torch.Tensor,
    window_block_table: torch.Tensor,
) -> None:
    """Launch `store`, `quantize` and `gather_context` for requests without tokens: nothing is written.

    Args:
        pages, window, key, value, block_table, window_block_table: as in `cache_update.quantize`; the variants are those
            for the dtypes and strides of these tensors, so they are to be an engine's own.
    """
    most = max(BATCHES)
    zeros = torch.zeros(most + 1, dtype=torch.int32, device=pages.device)
    table, window_table = (x.new_zeros(1, x.shape[1]).expand(most, -1) for x in (block_table, window_block_table))
    for n in BATCHES:
        step = (window, key, value, zeros[: n + 1], zeros[:n])
        lengths = {"max_query_len": 8 * fmt.group_size}  # the most that `store` looks at, and more
        store(fmt, *step, window_table[:n], **lengths)
        quantize(fmt, pages, *step, zeros[:n], table[:n], window_table[:n], **lengths, max_unverified=0)
    out = torch.empty(2, 1, fmt.num_kv_heads, fmt.head_size, dtype=fmt.dtype, device=pages.device)
    gather_context(fmt, pages, window, *out, zeros[:2], zeros[:1], zeros[:1], table[:1], window_table[:1], max_len=1)
