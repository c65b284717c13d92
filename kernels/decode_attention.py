"""Decode attention over quantized pages and the exact window: the fast CUDA kernel, compiled when first used.

NVRTC comes with CUDA PyTorch (through ``cuda.bindings``), so no toolchain is needed. The kernel's idea is in
``decode_attention.cu``; ``reference.decode_attention`` computes the same in plain PyTorch.
"""

import ctypes
import math
from functools import cache
from pathlib import Path

import torch

from vllm_quantspec.format import PageFormat
from vllm_quantspec.kernels import nvrtc
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
        + [("min_units", ctypes.c_int), ("scale", ctypes.c_float)]
    )


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
        warps_and_stages: overrides the launch configuration, for tuning.
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
    tiles, passes = row_tiles(fmt.head_size, max_query_len * per_head)
    device = query.device.index
    with torch.cuda.device(device):
        may_change = bits == 8 if pages_may_change is None else pages_may_change
        kernel, warps, sizes = _kernel(fmt, bits, per_head, tiles, passes, device, may_change, warps_and_stages, overlap)
        requests = seq_lens.shape[0]
        partial, spill, arrived = _workspace.tensors(device, *sizes, 2 * requests * fmt.num_kv_heads * passes)
        params = _Params(
            *(x.data_ptr() for x in (query, pages, window, query_start_loc, seq_lens, block_table, window_block_table)),
            *(x.data_ptr() for x in (out, partial, spill, arrived)),
            *(query.stride(0), out.stride(0), pages.stride(0), pages.stride(1)),
            *(window.stride(i) * window.element_size() for i in (0, 1)),
            *(block_table.stride(0), window_block_table.stride(0), requests, fmt.num_kv_heads),
            warps,
            softmax_scale * math.log2(math.e),
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


# --- Compiling --------------------------------------------------------------------------------------------------------


def _bytes_per_warp(fmt: PageFormat, bits: int, tiles: int, stages: int) -> int:
    """Shared memory of one warp: as in the kernel, its ring and its query fragments."""
    dim, planes = fmt.head_size, bits // 4
    stage = planes * 32 * dim + 128 * fmt.num_value_groups + 4 * dim
    return max(stages * stage, 32 * (4 * dim + 16), 32 * tiles * (dim + 4)) + 16 * dim * tiles


def row_tiles(head_size: int, rows: int) -> tuple[int, int]:
    """Tiles of 8 query rows in one pass over the cache, as many as registers allow, and the number of passes."""
    tiles = -(-rows // 8)
    passes = -(-tiles // max(1, min(5, 384 // head_size)))
    return -(-tiles // passes), passes


def _static_bytes(warps: int, tiles: int) -> int:
    """An upper bound of the kernel's static shared memory, for a GPU's limit."""
    return 5632 + warps * (768 + 160 * tiles)


def _configuration(fmt: PageFormat, bits: int, tiles: int, device: Device) -> tuple[int, int]:
    """Warps per CTA (one CTA per multiprocessor), as many as registers allow, and the ring stages that fit."""
    for warps in (8, 4, 2, 1):
        for stages in (3, 2):
            needed = warps * _bytes_per_warp(fmt, bits, tiles, stages) + _static_bytes(warps, tiles)
            if needed <= device.shared_memory_per_block:
                return warps, stages
    raise RuntimeError(
        f"attention with heads of size {fmt.head_size} in groups of {fmt.group_size} needs {-(-needed // 1024)} KiB of "
        f"shared memory per block, but {device.name} has {device.shared_memory_per_block // 1024}"
    )


def check_shapes(fmt: PageFormat, num_heads: int, max_query_len: int, bits: int, device: int) -> None:
    """Whether steps of up to ``max_query_len`` tokens per request can be launched on CUDA device ``device``.

    Raises:
        RuntimeError: what is missing, as the begin of a sentence.
    """
    for query_len in range(1, max_query_len + 1):
        tiles, _ = row_tiles(fmt.head_size, query_len * num_heads // fmt.num_kv_heads)
        _configuration(fmt, bits, tiles, device_properties(device))


@cache
def _kernel(
    fmt: PageFormat,
    bits: int,
    query_group: int,
    tiles: int,
    passes: int,
    device: int,
    pages_may_change: bool,
    warps_and_stages: tuple[int, int] | None,
    overlap: bool,
) -> tuple[nvrtc.Kernel, int, tuple[int, int]]:
    """The kernel, warps per CTA, floats of partial and of spilled outputs."""
    properties = device_properties(device)
    if properties.capability < MIN_CAPABILITY:
        raise RuntimeError(f"decode_attention needs compute capability 8.0 or newer, {properties.name} has less.")
    warps, stages = warps_and_stages or _configuration(fmt, bits, tiles, properties)
    macros = {
        "HEAD_SIZE": fmt.head_size,
        "GROUP_SIZE": fmt.group_size,
        "VALUE_GROUP_SIZE": fmt.value_group_size,
        "WINDOW_BLOCK": fmt.window_block_size,
        "CODE_BITS": bits,
        "QUERY_GROUP": query_group,
        "ROW_TILES": tiles,
        "PASSES": passes,
        "WARPS": warps,
        "STAGES": stages,
        "IS_BF16": int(fmt.dtype == torch.bfloat16),
        "PAGES_MAY_CHANGE": int(pages_may_change),
    }
    shared_bytes = warps * _bytes_per_warp(fmt, bits, tiles, stages)
    grid, rows = properties.num_multiprocessors, 8 * tiles
    kernel = nvrtc.load(
        SOURCE, macros, device, grid=(grid, 1), threads=32 * warps, shared_bytes=shared_bytes, overlap=overlap
    )
    sizes = grid * 2 * rows * (fmt.head_size + 2), grid * warps * rows * (fmt.head_size + 4)
    return kernel, warps, sizes


_workspace = Workspace("decode_attention", (torch.float32, 0), (torch.float32, 0), (torch.int32, 1 << 14))
