"""Where a verification step leaves its scores: once per step, on the GPU. Twin: `cpu_page_selection.scored_pages`."""

import torch

from vllm_quantspec.format import PageFormat
from vllm_quantspec.kernels.launch import check_device, check_int32, jit, overlap, power_of_two, tl


def scored_pages(
    fmt: PageFormat,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    begin: torch.Tensor,
    num_scored: torch.Tensor,
    *,
    num_slots: int,
    min_pages: int = 0,
    min_total_pages: int = 0,
    reads_all: torch.Tensor | None = None,
) -> None:
    """Write ``begin`` and ``num_scored`` of the requests of a step; lengths are read on the device.

    Args:
        query_start_loc: int32 [R+1], R <= 1024; seq_lens: int32 [R], lengths that include the step's own tokens.
        begin, num_scored: int32 [R or more], see `cpu_page_selection`; entries beyond R are left as they are.
        num_slots: pages that there is room for.
        min_pages: a request with fewer pages is not scored, and takes no room.
        min_total_pages: none is scored if all requests that would be have fewer together.
        reads_all: int32 [R or more]: a request that has 1 is not scored, and takes no room. None for no such request.

    Raises:
        ValueError: if an argument does not fit the above.
        RuntimeError: where Triton is not installed.
    """
    check_int32(query_start_loc=query_start_loc, seq_lens=seq_lens, begin=begin, num_scored=num_scored)
    requests = seq_lens.shape[0]
    if not 1 <= requests <= 1024 or query_start_loc.shape[0] != requests + 1:
        raise ValueError(f"Need 1 to 1024 requests and one start more, got {requests} and {len(query_start_loc)}.")
    if min(len(begin), len(num_scored)) < requests:
        raise ValueError(f"begin and num_scored have {len(begin)} and {len(num_scored)} entries, for {requests} requests.")
    if reads_all is not None:
        check_int32(reads_all=reads_all)
        if len(reads_all) < requests:
            raise ValueError(f"reads_all has {len(reads_all)} entries, for {requests} requests.")
    check_device(seq_lens)
    padded = max(32, power_of_two(requests))
    _scored_pages[(1,)](
        query_start_loc, seq_lens, begin, num_scored, reads_all, requests, num_slots, min_pages, min_total_pages,
        G=fmt.group_size, RP=padded, num_warps=max(1, padded // 128), **overlap(seq_lens),
    )  # fmt: skip


@jit(
    do_not_specialize=["requests", "num_slots", "min_pages", "min_total_pages"],
    do_not_specialize_on_alignment=["query_start_loc", "seq_lens", "begin", "num_scored", "reads_all"],
)
def _scored_pages(
    query_start_loc,
    seq_lens,
    begin,
    num_scored,
    reads_all,
    requests,
    num_slots,
    min_pages,
    min_total_pages,
    G: tl.constexpr,
    RP: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    r = tl.arange(0, RP)
    there = r < requests
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    start = tl.load(query_start_loc + r, mask=there, other=0)
    queries = tl.load(query_start_loc + r + 1, mask=there, other=0) - start
    first = tl.load(seq_lens + r, mask=there, other=0) - queries
    pages = tl.where((queries > 0) & (first > 0), tl.maximum(first // G - 1, 0), 0)
    pages = tl.where(pages >= min_pages, pages, 0)
    if reads_all is not None:
        pages = tl.where(tl.load(reads_all + r, mask=there, other=0) == 0, pages, 0)
    pages = tl.where(tl.sum(pages, axis=0) >= min_total_pages, pages, 0)
    end = tl.cumsum(pages, axis=0)
    fits = end <= num_slots
    tl.store(begin + r, tl.where(fits, end - pages, 0), mask=there)
    tl.store(num_scored + r, tl.where(fits, pages, 0), mask=there)
