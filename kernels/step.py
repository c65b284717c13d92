"""What one forward pass stores: where each token's exact keys and values go, and which pages are complete by now.

A page is quantized in the forward pass in which its last token is verified (a token is verified when it was sampled by
the target, or accepted; the step's drafts are not). Acceptance is known one step late, so the pass of a step that starts
at ``p0`` also looks back over the ``max_unverified`` tokens before ``p0``: such a page may be written twice, from the same
exact values, to the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_quantspec.format import PageFormat, encode_pages, window_start

# --- The window -------------------------------------------------------------------------------------------------------


def window_slots(
    fmt: PageFormat, window_block_table: torch.Tensor, row_of_token: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """Slots int64 [T] of tokens at `positions` [T] of requests `row_of_token` [T]; -1 where the table has no block."""
    size, width = fmt.window_block_size, window_block_table.shape[1]
    entry = positions // size
    block = window_block_table[row_of_token, entry.clamp(0, width - 1)].long()
    there = (block > 0) & (entry < width) & (positions >= 0)
    return torch.where(there, block * size + positions % size, -1)


def exact_start(fmt: PageFormat, window_block_table: torch.Tensor, first_positions: torch.Tensor) -> torch.Tensor:
    """First position [R] from which on each request's window holds every token up to its `first_positions` [R].

    At least window_start(first position); later only after a prefix-cache hit, whose tokens have no window blocks.
    """
    size, width = fmt.window_block_size, window_block_table.shape[1]
    start = window_start(first_positions, fmt.group_size)
    entries = start[:, None] // size + torch.arange(2 * fmt.group_size // size, device=start.device)
    blocks = window_block_table.gather(1, entries.clamp(max=width - 1).long())
    missing = ((blocks <= 0) | (entries >= width)) & (entries * size < first_positions[:, None])
    after_missing = torch.where(missing, (entries + 1) * size, 0).amax(dim=1)
    return torch.minimum(torch.maximum(start, after_missing), first_positions)


def write_window(fmt: PageFormat, window: torch.Tensor, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    """Store key and value [T, H, D] at `slots` int64 [T] = window block id * W + offset; slots below W are skipped."""
    size = fmt.window_block_size
    block, offset = slots.clamp(min=0) // size, slots.clamp(min=0) % size
    new = torch.cat((key, value), dim=-1).to(window.dtype)
    # A skipped token rewrites what its slot of the null block holds: no boolean index, so no host synchronisation.
    new = torch.where((slots >= size)[:, None, None], new, window[block, :, offset])
    window[block, :, offset] = new


# --- The step ---------------------------------------------------------------------------------------------------------


@dataclass
class StepPlan:
    """Shared by all layers of a step.

    ``window_slots`` [num_tokens] int64: slot of each token in the window pool, -1 where no exact copy is kept.
    ``page_ids`` [n] int64: pages to quantize, of which ``is_first`` [n] bool begin a sequence; ``token_index``
    [n, group_size]: each of their tokens in the step's own keys and values, or -1 for an earlier token, which is at
    ``slots`` [n, group_size] in the window pool.
    """

    window_slots: torch.Tensor
    page_ids: torch.Tensor
    is_first: torch.Tensor
    token_index: torch.Tensor
    slots: torch.Tensor


def plan_step(
    fmt: PageFormat,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    num_unverified: torch.Tensor,
    block_table: torch.Tensor,
    window_block_table: torch.Tensor,
    *,
    max_unverified: int,
    quantize: bool = True,
) -> StepPlan:
    """Plan a step from its metadata.

    Args:
        query_start_loc: [num_reqs + 1] int; seq_lens: [num_reqs] int, the step's tokens included.
        num_unverified: [num_reqs] int, how many of a request's last query tokens are drafts.
        block_table: [num_reqs, >= pages] int; window_block_table: [num_reqs, >= window blocks] int, 0 = no block.
        max_unverified: the most drafts a step may hold (``num_speculative_tokens``).
        quantize: false for the draft's passes, which store into the window only (design rule 4).
    """
    group = fmt.group_size
    starts, seq_lens = query_start_loc.long(), seq_lens.long()
    query_lens = starts[1:] - starts[:-1]
    first = seq_lens - query_lens
    num_reqs = seq_lens.shape[0]
    request = torch.repeat_interleave(torch.arange(num_reqs, device=seq_lens.device), query_lens)
    offset = torch.arange(request.shape[0], device=request.device) - starts[request]
    token_slots = window_slots(fmt, window_block_table, request, first[request] + offset)

    empty = torch.zeros(0, dtype=torch.long, device=seq_lens.device)
    nothing = StepPlan(token_slots, empty, empty.bool(), empty.view(0, group), empty.view(0, group))
    if not quantize:
        return nothing

    exact = exact_start(fmt, window_block_table, first)
    low = torch.maximum((first - max_unverified).clamp_min(0) // group, -(-exact // group))
    high = (seq_lens - num_unverified.to(seq_lens)) // group
    counts = torch.where(query_lens > 0, (high - low).clamp_min(0), 0)
    owner = torch.repeat_interleave(torch.arange(num_reqs, device=seq_lens.device), counts)
    if owner.numel() == 0:
        return nothing
    page = torch.arange(owner.shape[0], device=owner.device) - (counts.cumsum(0) - counts)[owner] + low[owner]
    position = page[:, None] * group + torch.arange(group, device=page.device)
    token_index = position - first[owner, None] + starts[owner, None]
    token_index = torch.where(position >= first[owner, None], token_index, -1)
    slots = window_slots(fmt, window_block_table, owner.repeat_interleave(group), position.flatten()).view_as(
        position
    )
    return StepPlan(token_slots, block_table[owner, page].long(), page == 0, token_index, slots)


def quantize_completed(
    fmt: PageFormat,
    plan: StepPlan,
    pages: torch.Tensor,
    window: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
) -> None:
    """Quantize the step's completed pages of one layer from exact values, in place.

    Args:
        pages: uint8 [num_blocks, num_kv_heads, head_bytes]; window: [num_blocks, num_kv_heads, window_block_size,
            2 * head_size]; key, value: [num_tokens, num_kv_heads, head_size], the step's own.
    """
    if plan.page_ids.numel() == 0:
        return
    fresh = plan.token_index >= 0
    index = plan.token_index.clamp_min(0)
    keys, values = key[index], value[index]  # [n, group_size, num_kv_heads, head_size]
    if not bool(fresh.all()):
        slot = plan.slots.clamp_min(0)
        block, row = slot // fmt.window_block_size, slot % fmt.window_block_size
        old = window[block, :, row]
        mask = fresh[..., None, None]
        keys = torch.where(mask, keys, old[..., : fmt.head_size])
        values = torch.where(mask, values, old[..., fmt.head_size :])
    pages[plan.page_ids] = encode_pages(fmt, keys, values, plan.is_first)
