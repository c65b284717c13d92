"""Decode attention over quantized pages and the exact window: the fast CUDA kernel, compiled when first used.

NVRTC comes with CUDA PyTorch (through ``cuda.bindings``), so no toolchain is needed. The kernel's idea is in
``decode_attention.cu``; ``reference.decode_attention`` computes the same in plain PyTorch.
"""

import ctypes
import math
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from vllm_quantspec.format import PageFormat
from vllm_quantspec.kernels import nvrtc
from vllm_quantspec.kernels.cpu_page_selection import PageSelection
from vllm_quantspec.kernels.device import MIN_CAPABILITY, Device, device_properties
from vllm_quantspec.kernels.workspace import Workspace

SOURCE = Path(__file__).with_suffix(".cu")
MAX_REQUESTS = 1024


class _Params(ctypes.Structure):
    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("query", "pages", "window", "query_start_loc", "seq_lens", "block_table")]
        + [(name, ctypes.c_void_p) for name in ("window_block_table", "out", "partial", "spill", "arrived")]
        + [(name, ctypes.c_int64) for name in ("query_stride", "out_stride", "page_stride", "head_stride")]
        + [(name, ctypes.c_int64) for name in ("window_stride", "window_head_stride")]
        + [(name, ctypes.c_int) for name in ("block_table_stride", "window_table_stride", "num_requests", "num_heads")]
        + [("min_units", ctypes.c_int), ("scale", ctypes.c_float), ("raw_rows", ctypes.c_int)]
        + [(name, ctypes.c_void_p) for name in ("raw", "flags", "lse", "begin", "num_scored")]
        + [(name, ctypes.c_void_p) for name in ("page_list", "list_begin", "list_count", "dense_from")]
        + [("list_stride", ctypes.c_int64)]
    )


class ScoresOut(NamedTuple):
    """Where a launch leaves the attention mass of old pages; `reduce_scores` makes scores of it.

    raw: float32 [C, H, 2, M, 2], contiguous, M at least `raw_rows` and a multiple of 8. Of the up to two parts that a page
        is read in, and of each row, the sum of 2^(score - top) over all that the part's reader has read of the request when
        it is done with the page, and top. Row = query token of the request * (Hq / H) + head of the group.
    flags: uint8 [C, H, M / 8], contiguous, of 8 rows each: 1 if part 0's reader began with this page, so that the sum is the
        page's own; else the page before, its last part, has what is to be subtracted. 2 if part 0 is the whole page.
        Part 1's reader always begins with its page.
    lse: float32 [T or more, Hq], contiguous: log2 of each row's sum of 2^score, over everything that it reads.
    begin, num_scored: int32 [R or more], of `scored_pages`: which requests' pages are scored, and where they are written.
    """

    raw: torch.Tensor
    flags: torch.Tensor
    lse: torch.Tensor
    begin: torch.Tensor
    num_scored: torch.Tensor


class RowPlan(NamedTuple):
    """Who has the query rows of a request and KV head.

    passes: over the cache.
    tiles: of 8 rows, in one pass.
    team: warps that share a slice of the cache, and hold the sums of a part of its channels each; or one that does it all.
    wgmma: a team of four multiplies as a warp group (Hopper).
    """

    passes: int
    tiles: int
    team: int = 1
    wgmma: bool = False

    @property
    def rows(self) -> int:
        """Of all passes, padded."""
        return 8 * self.tiles * self.passes


def raw_rows(head_size: int, group_size: int, query_rows: int) -> int:
    """Rows that a launch on any GPU may write of a KV head and request with ``query_rows``: padded to the kernel's tiles."""
    return max(plan.rows for wgmma in (False, True) for plan in row_plans(head_size, group_size, query_rows, wgmma))


def decode_attention(
    fmt: PageFormat,
    pages: torch.Tensor,
    window: torch.Tensor,
    query: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    window_block_table: torch.Tensor,
    softmax_scale: float,
    bits: int,
    *,
    max_query_len: int,
    out: torch.Tensor | None = None,
    pages_may_change: bool | None = None,
    scores: ScoresOut | None = None,
    selection: PageSelection | None = None,
    plan: RowPlan | None = None,
    warps_and_stages: tuple[int, int] | None = None,
    overlap: bool = True,
) -> torch.Tensor:
    """Causal attention of a few query tokens per request; the step's own keys and values are in the window already.

    Lengths, positions and tables are read on the device: a captured CUDA graph replays with any that fit the
    shapes. Run once with the same shapes before capturing.

    The launch may begin under the end of the kernel launched before it. That kernel may write the window, as
    ``cache_update.store`` does, and pages if ``pages_may_change``, as ``quantize`` does, but no query, length or table.

    Args:
        pages: uint8 [num_blocks, H, head_bytes], 16-byte aligned; the strides of blocks and heads are free.
        window: fmt.dtype [num_blocks, H, W, 2*D], likewise.
        query: [T, Hq, D] in fmt.dtype (bfloat16 or float16), the tokens of all requests one after another.
        query_start_loc: int32 [R+1], R <= 1024.
        seq_lens: int32 [R], lengths that include the step's own tokens.
        block_table: int32 [R, any], page ids; entry = position // G.
        window_block_table: int32 [R, any], window block ids; entry = position // W.
        bits: of each code that are read: 4 reads the upper codes of pages, 8 both.
        max_query_len: no request has more query tokens than this.
        out: [T, Hq, D] like query; rows outside query_start_loc are left as they are.
        pages_may_change: whether the kernel launched before may write pages; by default as it is on pages of 8 bits: where
            all of them are read.
        scores: leave there what each row's old pages weigh, those below window_start of a request's first row.
        selection: read these pages only, and the window. A request whose ``dense_from`` does not fit its length reads all.
        plan, warps_and_stages: override the launch configuration, for tuning.
        overlap: False for a launch that begins when the one before has ended, whatever that one writes.

    Returns:
        [T, Hq, D] in the query's dtype.

    Raises:
        ValueError: if an argument does not fit the above.
        RuntimeError: on a GPU older than compute capability 8.0, or where these shapes are first seen during a capture.
    """
    out = torch.empty_like(query) if out is None else out
    per_head = _check(
        fmt, pages, window, query, query_start_loc, seq_lens, block_table, window_block_table, bits, max_query_len, out
    )
    device = query.device.index
    with torch.cuda.device(device):
        plan, shape = _launch_plan(fmt, bits, max_query_len * per_head, device, plan, warps_and_stages)
        _check_sparse(fmt, scores, selection, query, seq_lens.shape[0], plan.rows)
        may_change = bits == 8 if pages_may_change is None else pages_may_change
        sparse = scores is not None, selection is not None
        kernel, teams, sizes = _kernel(fmt, bits, per_head, plan, shape, device, may_change, sparse, overlap)
        requests = seq_lens.shape[0]
        partial, spill, arrived = _workspace.tensors(device, *sizes, 2 * requests * fmt.num_kv_heads * plan.passes)
        params = _Params(
            *(x.data_ptr() for x in (query, pages, window, query_start_loc, seq_lens, block_table, window_block_table)),
            *(x.data_ptr() for x in (out, partial, spill, arrived)),
            *(query.stride(0), out.stride(0), pages.stride(0), pages.stride(1)),
            *(window.stride(i) * window.element_size() for i in (0, 1)),
            *(block_table.stride(0), window_block_table.stride(0), requests, fmt.num_kv_heads),
            teams * (fmt.group_size // 32 if scores else 1),
            softmax_scale * math.log2(math.e),
            scores.raw.shape[3] if scores else 0,
            *((x.data_ptr() for x in scores) if scores else 5 * [None]),
            *((x.data_ptr() for x in selection) if selection else 4 * [None]),
            selection.page_list.stride(0) if selection else 0,
        )
        nvrtc.launch(kernel, params)
    return out


def _check(
    fmt, pages, window, query, query_start_loc, seq_lens, block_table, window_block_table, bits, max_query_len, out
) -> int:
    fmt.check_bits(bits)
    if fmt.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"decode_attention reads bfloat16 or float16 windows, got {fmt.dtype}.")
    heads, dim, requests = fmt.num_kv_heads, fmt.head_size, seq_lens.shape[0]
    shapes = {
        "pages": (pages, torch.uint8, (heads, fmt.head_bytes)),
        "window": (window, fmt.dtype, (heads, fmt.window_block_size, 2 * dim)),
        "query": (query, fmt.dtype, (query.shape[1], dim)),
        "out": (out, fmt.dtype, (query.shape[1], dim)),
    }
    for name, (x, dtype, inner) in shapes.items():
        if x.dtype != dtype or tuple(x.shape[1:]) != inner:
            raise ValueError(f"{name} must be {dtype} with shape [any, *{inner}], got {x.dtype} {list(x.shape)}.")
        steps = [s * x.element_size() for s in x.stride()[:2]]
        dense = x.stride(-1) == 1 and (name in ("pages", "window") or x.stride(1) == dim)
        if name == "window":
            dense &= x.stride(2) == 2 * dim
        if not dense or any(v % 16 for v in (x.data_ptr(), *steps)):
            raise ValueError(f"{name} must be 16-byte aligned with contiguous rows, got strides {x.stride()}.")
    for name, x in (
        ("query_start_loc", query_start_loc),
        ("seq_lens", seq_lens),
        ("block_table", block_table),
        ("window_block_table", window_block_table),
    ):
        if x.dtype != torch.int32 or x.stride(-1) != 1:
            raise ValueError(f"{name} must be int32 with contiguous rows, got {x.dtype} with strides {x.stride()}.")
    if query.shape[1] % heads:
        raise ValueError(f"{query.shape[1]} query heads do not divide among {heads} KV heads.")
    if not 1 <= requests <= MAX_REQUESTS or query_start_loc.shape[0] != requests + 1:
        raise ValueError(f"Need 1 to {MAX_REQUESTS} requests and one start more, got {requests} and {len(query_start_loc)}.")
    if max_query_len < 1:
        raise ValueError(f"max_query_len must be at least 1, got {max_query_len}.")
    return query.shape[1] // heads


def _check_sparse(fmt, scores, selection, query, requests: int, rows: int) -> None:
    shapes = {}
    if scores is not None:
        slots, raw_rows = scores.raw.shape[0], scores.raw.shape[-2]
        shapes["raw"] = scores.raw, torch.float32, (slots, fmt.num_kv_heads, 2, rows, 2)
        shapes["flags"] = scores.flags, torch.uint8, (slots, fmt.num_kv_heads, raw_rows // 8)
        shapes["lse"] = scores.lse, torch.float32, query.shape[:2]
        shapes |= {name: (getattr(scores, name), torch.int32, (requests,)) for name in ("begin", "num_scored")}
        exact = (*scores.raw.shape[1:3], raw_rows % 8, *scores.flags.shape, scores.lse.shape[1])
        if exact != (fmt.num_kv_heads, 2, 0, slots, fmt.num_kv_heads, raw_rows // 8, query.shape[1]):
            raise ValueError(
                f"raw {list(scores.raw.shape)}, flags {list(scores.flags.shape)} and lse {list(scores.lse.shape)} do not "
                f"fit each other, {fmt.num_kv_heads} KV heads and {query.shape[1]} query heads."
            )
    if selection is not None:
        shapes["page_list"] = selection.page_list, torch.int32, (fmt.num_kv_heads, 1)
        shapes |= {name: (getattr(selection, name), torch.int32, (requests,)) for name in ("begin", "count", "dense_from")}
    for name, (x, dtype, least) in shapes.items():
        fits = x.dim() == len(least) and all(a >= b for a, b in zip(x.shape, least, strict=True))
        dense = x.is_contiguous() or (name == "page_list" and x.stride(1) == 1)
        if x.dtype != dtype or not fits or not dense:
            raise ValueError(
                f"{name} must be contiguous {dtype} of at least {list(least)}, got {x.dtype} {list(x.shape)} with strides "
                f"{x.stride()}."
            )


# --- Compiling --------------------------------------------------------------------------------------------------------


# Row tiles that registers allow, by the channels whose output a warp sums.
TEAM_TILES = {32: 8, 64: 5, 128: 3}


# What a pass of a team takes without wgmma, in passes of one warp's three tiles.
TEAM_PASS = 1.6
# From as many query rows on, and up to as many tiles in a pass, a warp group is the fastest where it takes heads and groups.
WGMMA_ROWS, WGMMA_TILES = 17, 8


def row_plans(head_size: int, group_size: int, rows: int, wgmma: bool = False) -> list[RowPlan]:
    """Ways to read for ``rows`` query rows per KV head, the fastest first; the last is one warp's.

    ``wgmma``: those of a GPU that has it.
    """
    tiles = -(-rows // 8)

    def plan(most: int, team: int, wgmma: bool = False) -> RowPlan:
        passes = -(-tiles // most)
        return RowPlan(passes, -(-tiles // passes), team, wgmma)

    alone = plan(max(1, min(5, 384 // head_size)), 1)
    team = next((n for n in (4, 2) if head_size // 32 % n == 0 and group_size // 32 % n == 0), 1)
    plans = []
    if wgmma and takes_wgmma(head_size, group_size) and rows >= WGMMA_ROWS:
        plans.append(plan(WGMMA_TILES, 4, wgmma=True))
    if team > 1 and head_size // team in TEAM_TILES:
        most = plan(TEAM_TILES[head_size // team], team)
        if TEAM_PASS * most.passes < alone.passes:
            plans.append(most)
    return plans + [alone]


def takes_wgmma(head_size: int, group_size: int) -> bool:
    """A page is a step of four warps' slices, and has one scale per token; two teams fit into shared memory."""
    return head_size == group_size == 128


def _bytes_per_team(fmt: PageFormat, bits: int, plan: RowPlan, stages: int) -> int:
    """Shared memory of one team: as in the kernel, its ring, its query fragments and what its warps tell each other."""
    dim, planes, tiles, team = fmt.head_size, bits // 4, plan.tiles, plan.team
    query, groups = 16 * dim * tiles, fmt.num_value_groups
    least = max(2 * team * 16 * (4 * dim + 16), 32 * tiles * (dim + 4))
    if plan.wgmma:
        pages = stages * planes * 32 * dim + 4 * (4 * dim + 4 * groups * fmt.group_size)
        probabilities = (2 if tiles <= 6 else 1) * 64 * tiles * 8 * team
        beside = query + probabilities + 32 * tiles * team + 16 * (stages // team)
        return sum(-(-x // 1024) * 1024 for x in (max(pages, least), beside))
    stage = planes * 32 * dim + 128 * groups + 4 * dim
    ring, probabilities = max(stages * stage, least), 512 * tiles * groups
    if team == 1:
        return ring + query
    return ring + 2 * query + 64 * tiles * team + (0 if probabilities <= planes * 16 * dim else team * probabilities)


def _static_bytes(plan: RowPlan, warps: int) -> int:
    """An upper bound of the kernel's static shared memory, for a GPU's limit."""
    teams = warps // plan.team
    needed = 5632 + teams * (768 + 160 * plan.tiles) + 768 * (warps - teams)
    return needed if not plan.wgmma else -(-(5632 + teams * (64 + 160 * plan.tiles)) // 1024) * 1024


def _shape(fmt: PageFormat, bits: int, plan: RowPlan, device: Device) -> tuple[int, int] | None:
    """Warps per CTA (one CTA per multiprocessor), as many as registers allow, and the ring stages that fit; or None."""
    for warps in (8, 4, 2, 1):
        for steps in (3, 2):
            needed = warps // plan.team * _bytes_per_team(fmt, bits, plan, steps * plan.team) + _static_bytes(plan, warps)
            if warps % plan.team == 0 and needed <= device.shared_memory_per_block:
                return warps, steps * plan.team
    return None


def _configuration(fmt: PageFormat, bits: int, rows: int, device: Device) -> tuple[RowPlan, tuple[int, int]]:
    """The plan of ``rows`` query rows per KV head with its warps and stages: a team's, where as many warps fit as without.

    Raises:
        RuntimeError: if none fits.
    """
    plans = row_plans(fmt.head_size, fmt.group_size, rows, device.has_wgmma)
    shapes = [(plan, shape) for plan in plans if (shape := _shape(fmt, bits, plan, device))]
    if shapes:
        most = max(warps for _, (warps, _) in shapes)
        return next((plan, shape) for plan, shape in shapes if shape[0] == most)
    needed = _bytes_per_team(fmt, bits, plans[-1], 2) + _static_bytes(plans[-1], 1)
    raise RuntimeError(
        f"attention with heads of size {fmt.head_size} in groups of {fmt.group_size} needs {-(-needed // 1024)} KiB of "
        f"shared memory per block, but {device.name} has {device.shared_memory_per_block // 1024}"
    )


@cache
def _launch_plan(
    fmt: PageFormat, bits: int, rows: int, device: int, plan: RowPlan | None, warps_and_stages: tuple[int, int] | None
) -> tuple[RowPlan, tuple[int, int]]:
    properties = device_properties(device)
    if plan is None and warps_and_stages is None:
        return _configuration(fmt, bits, rows, properties)
    plan = plan or row_plans(fmt.head_size, fmt.group_size, rows, properties.has_wgmma)[0]
    return plan, warps_and_stages or _shape(fmt, bits, plan, properties)


def check_shapes(fmt: PageFormat, num_heads: int, max_query_len: int, bits: int, device: int) -> None:
    """Whether steps of up to ``max_query_len`` tokens per request can be launched on CUDA device ``device``.

    Raises:
        RuntimeError: what is missing, as the begin of a sentence.
    """
    for query_len in range(1, max_query_len + 1):
        _configuration(fmt, bits, query_len * num_heads // fmt.num_kv_heads, device_properties(device))


@cache
def _kernel(
    fmt: PageFormat,
    bits: int,
    query_group: int,
    plan: RowPlan,
    warps_and_stages: tuple[int, int],
    device: int,
    pages_may_change: bool,
    sparse: tuple[bool, bool],
    overlap: bool,
) -> tuple[nvrtc.Kernel, int, tuple[int, int]]:
    """The kernel, teams per CTA, floats of partial and of spilled outputs."""
    properties = device_properties(device)
    if properties.capability < MIN_CAPABILITY:
        raise RuntimeError(f"decode_attention needs compute capability 8.0 or newer, {properties.name} has less.")
    warps, stages = warps_and_stages
    macros = {
        "HEAD_SIZE": fmt.head_size,
        "GROUP_SIZE": fmt.group_size,
        "VALUE_GROUP_SIZE": fmt.value_group_size,
        "WINDOW_BLOCK": fmt.window_block_size,
        "CODE_BITS": bits,
        "QUERY_GROUP": query_group,
        "PASSES": plan.passes,
        "ROW_TILES": plan.tiles,
        "TEAM": plan.team,
        "WGMMA": int(plan.wgmma),
        "WARPS": warps,
        "STAGES": stages,
        "IS_BF16": int(fmt.dtype == torch.bfloat16),
        "PAGES_MAY_CHANGE": int(pages_may_change),
        "SCORES": int(sparse[0]),
        "LISTS": int(sparse[1]),
    }
    teams = warps // plan.team
    shared_bytes = teams * _bytes_per_team(fmt, bits, plan, stages)
    grid, rows = properties.num_multiprocessors, 8 * plan.tiles
    kernel = nvrtc.load(
        SOURCE,
        macros,
        device,
        grid=(grid, 1),
        threads=32 * warps,
        shared_bytes=shared_bytes,
        overlap=overlap,
        features="a" if plan.wgmma else "",
    )
    shares = teams if teams <= 2 else 1  # of a CTA, in a segment that others have a share of, too
    sizes = grid * 2 * shares * rows * (fmt.head_size + 2), grid * teams * rows * (fmt.head_size + 4)
    return kernel, teams, sizes


_workspace = Workspace("decode_attention", (torch.float32, 0), (torch.float32, 0), (torch.int32, 1 << 14))
