"""Decode attention on the CPU: `reference.decode_attention`, as loops that LLVM turns into vector instructions (Numba).

The page's byte order (see format.py) serves here too: 512 consecutive bytes are 32 rows x 32 columns of one tile, and the
column of a byte depends on its index modulo 64 only up to the row, so a tile is one elementwise product with a pattern of
64 factors, summed over tiles first and over lanes last. Scales are folded into the query (keys) and the probabilities
(values), minima are one dot product per page; codes are converted to float once for all query rows.

For sparse drafts (see `cpu_page_selection`) a verification leaves the attention mass of old pages, `ScoresOut`, and a draft
reads chosen ones only, `PageSelection`.

Numbers: benchmarks/cpu_attention.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
import torch

from vllm_quantspec.format import PageFormat, window_start
from vllm_quantspec.kernels.cpu_page_selection import PageSelection
from vllm_quantspec.kernels.cpu_threads import split
from vllm_quantspec.kernels.numba_jit import jit
from vllm_quantspec.kernels.step import exact_start

_PAGES_PER_TASK = 16
# Kinds of tasks: the exact window, pages of the block table, pages of a `PageSelection`.
_WINDOW, _PAGES, _CHOSEN = 0, 1, 2
_DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
_LOG2E = 1.4426950408889634
_FIELDS = ("k_upper", "v_upper", "k_scale", "k_min", "v_scale", "v_min", "k_lower", "v_lower")


@jit
def _half_to_float(source, start, count, bits, out):
    """fp16 at ``source[start:]`` (uint16) to float32; every finite value, subnormal ones too."""
    # Slices, here and below: a loop over an index that might be negative is not turned into vector instructions.
    halves = source[start : start + count]
    for i in range(count):
        x = np.uint32(halves[i])
        bits[i] = ((x & np.uint32(0x7FFF)) << np.uint32(13)) | ((x & np.uint32(0x8000)) << np.uint32(16))
    values = bits.view(np.float32)
    for i in range(count):
        out[i] = values[i] * np.float32(5.192296858534828e33)  # 2**112: the difference of the exponents' biases


@jit
def _load_exact(u16, f32, dtype, start, count, bits, out):
    """``count`` exact values at element ``start`` of the pool, to float32."""
    if dtype == 1:
        _half_to_float(u16, start, count, bits, out)
    elif dtype == 0:
        halves = u16[start : start + count]
        for i in range(count):
            bits[i] = np.uint32(halves[i]) << np.uint32(16)
        values = bits.view(np.float32)
        for i in range(count):
            out[i] = values[i]
    else:
        words = f32[start : start + count]
        for i in range(count):
            out[i] = words[i]


@jit
def _exp2(x, count, bits):
    """2**x in place for x <= 0 (float32, error below 2e-7 relative); anything under -126 becomes 0."""
    for i in range(count):
        v = max(x[i], np.float32(-126.0))
        bits[i] = np.uint32((np.int32(np.floor(v + np.float32(0.5))) + np.int32(127)) << np.int32(23))
    whole = bits.view(np.float32)
    for i in range(count):
        v = max(x[i], np.float32(-126.0))
        f = v - np.float32(np.floor(v + np.float32(0.5)))
        p = np.float32(1.5403530393381608e-4)
        p = p * f + np.float32(1.3333558146428443e-3)
        p = p * f + np.float32(9.618129107628477e-3)
        p = p * f + np.float32(5.550410866482158e-2)
        p = p * f + np.float32(2.402265069591007e-1)
        p = p * f + np.float32(6.931471805599453e-1)
        p = p * f + np.float32(1.0)
        x[i] = np.float32(0.0) if x[i] < np.float32(-126.0) else p * whole[i]


@jit
def _unpack(u8, upper, lower, both, even, odd):
    """One tile's codes as float32: its bytes' low nibbles to ``even`` [512], high nibbles to ``odd`` [512]."""
    high = u8[upper : upper + 512]
    if both:
        low = u8[lower : lower + 512]
        for i in range(512):
            u, v = np.int32(high[i]), np.int32(low[i])
            even[i] = np.float32(((u & np.int32(15)) << np.int32(4)) | (v & np.int32(15)))
            odd[i] = np.float32((u & np.int32(240)) | (v >> np.int32(4)))
    else:
        for i in range(512):
            u = np.int32(high[i])
            even[i] = np.float32(u & np.int32(15))
            odd[i] = np.float32(u >> np.int32(4))


@jit
def _add_tile(sums, rows, low, high, tile, even, odd):
    """sums [rows, 512] += codes times their columns' factors ``low``, ``high`` [rows, tiles, 64]."""
    for m in range(rows):
        total, a, b = sums[m], low[m, tile], high[m, tile]
        for g in range(8):
            for i in range(64):
                total[g * 64 + i] += a[i] * even[g * 64 + i] + b[i] * odd[g * 64 + i]


@jit
def _spread(factors, scale, first, stride, rows, tiles, low, high):
    """Factors times scales, as the 64-byte patterns of each tile.

    ``factors`` [rows, 32 * tiles] per column; the scale of column tile*32 + par*16 + b*8 + t*2 + e is at
    ``first + t*stride + (2*tile + par)*4 + b*2 + e`` of ``scale``.
    """
    for m in range(rows):
        for tile in range(tiles):
            for t in range(4):
                for byte in range(4):
                    e, par = byte >> 1, byte & 1
                    column = tile * 32 + par * 16 + t * 2 + e
                    at = first + t * stride + (2 * tile + par) * 4 + e
                    a = factors[m, column] * scale[at]
                    b = factors[m, column + 8] * scale[at + 2]
                    for y in range(4):
                        low[m, tile, t * 16 + y * 4 + byte] = a
                        high[m, tile, t * 16 + y * 4 + byte] = b


@jit
def _dot_minimum(factors, minimum, first, stride, rows, tiles, out):
    """out [rows] += sum over columns of factor * minimum (stored like the scales)."""
    for m in range(rows):
        total = np.float32(0.0)
        for t in range(4):
            for s in range(2 * tiles):
                for b in range(2):
                    for e in range(2):
                        total += factors[m, s * 16 + b * 8 + t * 2 + e] * minimum[first + t * stride + s * 4 + b * 2 + e]
        out[m] += total


@jit
def _fold_lanes(sums, m, out, first, row):
    """Sum one row's 512 lanes over t and byte: out[row, first + y*8 + g] += sums[m, g*64 + t*16 + y*4 + byte].

    ``sums`` is used up.
    """
    lanes = sums[m]
    for g in range(8):
        for k in range(16):
            lanes[g * 64 + k] += lanes[g * 64 + 16 + k] + lanes[g * 64 + 32 + k] + lanes[g * 64 + 48 + k]
        for y in range(4):
            at = g * 64 + y * 4
            out[row, first + y * 8 + g] += (lanes[at] + lanes[at + 1]) + (lanes[at + 2] + lanes[at + 3])


@jit
def _softmax_step(scores, rows, tokens, maximum, total, output, dim, bits, added):
    """scores [rows, tokens] (base 2) to probabilities under the running maximum; rescales what was summed before.

    ``added`` [rows] are the sums of these probabilities.
    """
    for m in range(rows):
        new = maximum[m]
        for i in range(tokens):
            new = max(new, scores[m, i])
        if new > maximum[m]:
            decay = np.float32(2.0) ** (maximum[m] - new) if maximum[m] > np.float32(-1e29) else np.float32(0.0)
            total[m] *= decay
            for i in range(dim):
                output[m, i] *= decay
            maximum[m] = new
        for i in range(tokens):
            scores[m, i] -= new
        _exp2(scores[m], tokens, bits)
        this = np.float32(0.0)
        for i in range(tokens):
            this += scores[m, i]
        added[m] = this
        total[m] += this


@jit
def _load_scales(u16, scale_at, minimum_at, count, both, bits, scale, minimum):
    """Scales and minima (byte offsets into the pool) as the reading's codes take them: 16 * U + L + 8, or U alone."""
    _half_to_float(u16, scale_at // 2, count, bits, scale)
    _half_to_float(u16, minimum_at // 2, count, bits, minimum)
    if both:
        for i in range(count):
            minimum[i] -= scale[i] * np.float32(0.5)
            scale[i] *= np.float32(0.0625)


@jit
def _pages_task(
    u8, u16, ids, block_stride, head_offset, fields, first_page, q, boundary, group, dim, value_group, both,
    maximum, total, output, mass, num_scored,
):  # fmt: skip
    """Pages ``ids`` (the first is number ``first_page`` of its request) of one KV head for ``rows`` query rows.

    ``mass`` [any, rows]: for the first ``num_scored`` of them, log2 of the page's sum of 2^score.
    """
    rows = q.shape[0]
    key_tiles, value_tiles, value_groups = dim // 32, group // 32, dim // value_group
    even, odd = np.empty(512, np.float32), np.empty(512, np.float32)
    bits = np.empty(max(group * value_groups, dim, 512), np.uint32)
    scale, minimum = (
        np.empty(max(group * value_groups, dim), np.float32),
        np.empty(max(group * value_groups, dim), np.float32),
    )
    low, high = (
        np.empty((rows, max(key_tiles, value_tiles), 64), np.float32),
        np.empty((rows, max(key_tiles, value_tiles), 64), np.float32),
    )
    sums, offset = np.empty((rows, 512), np.float32), np.empty(rows, np.float32)
    scores, added = np.empty((rows, group), np.float32), np.empty(rows, np.float32)
    for n in range(ids.shape[0]):
        base = ids[n] * block_stride + head_offset
        # Scores.
        _load_scales(u16, base + fields[2], base + fields[3], dim, both, bits, scale, minimum)
        _spread(q, scale, 0, dim // 4, rows, key_tiles, low, high)
        offset[:] = 0
        _dot_minimum(q, minimum, 0, dim // 4, rows, key_tiles, offset)
        for m in range(rows):
            scores[m, :] = offset[m]
        for quad in range(group // 32):
            sums[:] = 0
            for tile in range(key_tiles):
                at = base + (quad * key_tiles + tile) * 512
                _unpack(u8, at + fields[0], at + fields[6], both, even, odd)
                _add_tile(sums, rows, low, high, tile, even, odd)
            for m in range(rows):
                _fold_lanes(sums, m, scores, quad * 32, m)
        last = (first_page + n + 1) * group
        for m in range(rows):
            if boundary[m] < last:
                for i in range(max(boundary[m] - last + group, 0), group):
                    scores[m, i] = np.float32(-1e30)
        _softmax_step(scores, rows, group, maximum, total, output, dim, bits, added)
        if n < num_scored:
            for m in range(rows):
                mass[n, m] = maximum[m] + np.log2(added[m]) if added[m] > np.float32(0.0) else np.float32(-1e30)
        # Weighted values.
        count = group * value_groups
        _load_scales(u16, base + fields[4], base + fields[5], count, both, bits, scale, minimum)
        spread_group = -1
        for quad in range(key_tiles):
            # A quad of 32 channels may straddle two value groups (head size 96 in groups of 48): one pass for each.
            first_group, last_group = quad * 32 // value_group, (quad * 32 + 31) // value_group
            for vg in range(first_group, last_group + 1):
                if spread_group != vg:
                    _spread(scores, scale, vg * group, group // 4, rows, value_tiles, low, high)
                    offset[:] = 0
                    _dot_minimum(scores, minimum, vg * group, group // 4, rows, value_tiles, offset)
                    spread_group = vg
                sums[:] = 0
                for tile in range(value_tiles):
                    at = base + (tile * key_tiles + quad) * 512
                    _unpack(u8, at + fields[1], at + fields[7], both, even, odd)
                    _add_tile(sums, rows, low, high, tile, even, odd)
                whole = first_group == last_group
                for m in range(rows):
                    if whole:
                        _fold_lanes(sums, m, output, quad * 32, m)
                        for c in range(quad * 32, quad * 32 + 32):
                            output[m, c] += offset[m]
                    else:
                        scratch = np.zeros((1, 32), np.float32)
                        _fold_lanes(sums, m, scratch, 0, 0)
                        for c in range(32):
                            if (quad * 32 + c) // value_group == vg:
                                output[m, quad * 32 + c] += scratch[0, c] + offset[m]


@jit
def _window_task(u16, f32, dtype, table, block_stride, head_offset, size, q, positions, boundary, maximum, total, output):
    """Exact tokens from the first row's boundary to the last row's position; strides in elements."""
    rows, dim = q.shape
    start, end = boundary[0], positions[rows - 1] + 1
    bits, token = np.empty(max(2 * dim, size), np.uint32), np.empty(2 * dim, np.float32)
    scores, added = np.empty((rows, size), np.float32), np.empty(rows, np.float32)
    values = np.empty((size, dim), np.float32)
    first = start
    while first < end:
        count = min(size - first % size, end - first)
        base = table[first // size] * block_stride + head_offset
        for i in range(count):
            _load_exact(u16, f32, dtype, base + (first % size + i) * 2 * dim, 2 * dim, bits, token)
            for m in range(rows):
                dot = np.float32(0.0)
                for c in range(dim):
                    dot += q[m, c] * token[c]
                seen = boundary[m] <= first + i <= positions[m]
                scores[m, i] = dot if seen else np.float32(-1e30)
            for c in range(dim):
                values[i, c] = token[dim + c]
        _softmax_step(scores, rows, count, maximum, total, output, dim, bits, added)
        for m in range(rows):
            for i in range(count):
                p = scores[m, i]
                if p > np.float32(0.0):
                    for c in range(dim):
                        output[m, c] += p * values[i, c]
        first += count


@jit
def _run_tasks(
    begin, end, tasks, u8, u16, exact_u16, exact_f32, dtype, page_strides, window_strides, fields, block_table, window_table,
    q, positions, boundary, row_counts, group, dim, value_group, size, both, maximum, total, output,
    page_list, list_begin, mass, mass_begin, num_scored,
):  # fmt: skip
    """Tasks [begin, end): rows (request, head, first page, last page, kind) of ``tasks``, see `DecodePlan`."""
    for n in range(begin, end):
        r, h, first, last, kind = tasks[n, 0], tasks[n, 1], tasks[n, 2], tasks[n, 3], tasks[n, 4]
        rows = row_counts[r]
        maximum[n, :] = np.float32(-1e30)
        total[n, :] = 0
        output[n, :, :] = 0
        if kind == _WINDOW:
            _window_task(
                exact_u16, exact_f32, dtype, window_table[r], window_strides[0],
                window_strides[2] + h * window_strides[1], size,
                q[r, h, :rows], positions[r], boundary[r, :rows], maximum[n], total[n], output[n],
            )  # fmt: skip
        else:
            # Chosen pages are old as a whole, and the n-th of them is not before page n: no row's boundary is in them.
            ids, scored, slot = block_table[r, first:last], 0, 0
            if kind == _CHOSEN:
                ids = page_list[h, list_begin[r] + first : list_begin[r] + last]
            elif mass.shape[1] > 0:
                scored, slot = min(num_scored[r], last) - first, mass_begin[r] + first
            _pages_task(
                u8, u16, ids, page_strides[0], page_strides[2] + h * page_strides[1], fields,
                first, q[r, h, :rows], boundary[r, :rows], group, dim, value_group, both,
                maximum[n], total[n], output[n], mass[h, slot : slot + max(scored, 0)], scored,
            )  # fmt: skip


@jit
def _merge(tasks, row_counts, maximum, total, output, result, lse):
    """Sum the tasks of each request and head; ``tasks`` are sorted by both. result [R, H, M, D].

    lse [R, H, M]: log2 of each row's whole sum of 2^score.
    """
    n = 0
    dim = output.shape[2]
    while n < tasks.shape[0]:
        r, h, end = tasks[n, 0], tasks[n, 1], n
        while end < tasks.shape[0] and tasks[end, 0] == r and tasks[end, 1] == h:
            end += 1
        for m in range(row_counts[r]):
            highest = np.float32(-1e30)
            for k in range(n, end):
                highest = max(highest, maximum[k, m])
            norm = np.float32(0.0)
            for k in range(n, end):
                weight = np.float32(2.0) ** max(maximum[k, m] - highest, np.float32(-200.0))
                norm += weight * total[k, m]
                for c in range(dim):
                    result[r, h, m, c] += weight * output[k, m, c]
            for c in range(dim):
                result[r, h, m, c] /= norm
            lse[r, h, m] = highest + np.log2(norm)
        n = end


@jit
def _normalise(mass, lse, begin, num_scored, row_counts, per_head, scores):
    """scores [H, C, Q] = the share of each scored page in its rows, ``mass`` [H, C, M] and ``lse`` [R, H, M] being base-2
    logs, summed over the ``per_head`` rows of a query token."""
    for r in range(row_counts.shape[0]):
        for h in range(mass.shape[0]):
            for slot in range(begin[r], begin[r] + num_scored[r]):
                for t in range(row_counts[r] // per_head):
                    share = np.float32(0.0)
                    for m in range(t * per_head, (t + 1) * per_head):
                        share += np.float32(2.0) ** min(
                            max(mass[h, slot, m] - lse[r, h, m], np.float32(-200.0)), np.float32(0.0)
                        )
                    scores[h, slot, t] = share


def _bytes_of(tensor: torch.Tensor) -> np.ndarray:
    """The whole storage of ``tensor`` as uint8, cut to whole float32 words."""
    storage = tensor.untyped_storage()
    flat = torch.empty(0, dtype=torch.uint8).set_(storage)
    return flat[: flat.numel() // 4 * 4].numpy()


class ScoresOut(NamedTuple):
    """Where a launch leaves the attention mass of old pages; see `cpu_page_selection`.

    scores: float32 [H, C, Q], contiguous, of the layer: scores[h, begin[r] + page, query token of the request] is written
        for the pages below num_scored[r].
    begin, num_scored: int32 [R or more]; of `cpu_page_selection.scored_pages`, or fewer.
    """

    scores: torch.Tensor
    begin: torch.Tensor
    num_scored: torch.Tensor


_NOT_SELECTED = PageSelection(torch.zeros(1, 0, dtype=torch.int32), *(torch.zeros(0, dtype=torch.int32) for _ in range(3)))


@dataclass
class DecodePlan:
    """What all layers of a step share; rows are query tokens times query heads per KV head, padded to ``rows``."""

    requests: torch.Tensor  # [T] request of each query token
    offsets: torch.Tensor  # [T] its number within the request
    steps: int  # most query tokens of a request
    row_counts: np.ndarray  # [R]
    positions: np.ndarray  # [R, rows]
    boundary: np.ndarray  # [R, rows] first token that a row reads exact
    tasks: np.ndarray  # [N, 5] request, head, first page, last page + 1, kind; sorted by request and head
    block_table: np.ndarray  # [R, any]
    window_table: np.ndarray  # [R, any]


def plan_decode(
    fmt: PageFormat,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    window_block_table: torch.Tensor,
    num_heads: int,
    count: torch.Tensor | None = None,
    dense_from: torch.Tensor | None = None,
) -> DecodePlan:
    """Plan a step from its metadata; arguments as of `reference.decode_attention`, ``num_heads`` query heads.

    Args:
        count, dense_from: of the `PageSelection` that `run_decode` will have. A request whose ``dense_from`` is more pages
            than it has reads all of them.
    """
    group, per_head = fmt.group_size, num_heads // fmt.num_kv_heads
    starts, lengths = query_start_loc.long(), seq_lens.long()
    query_lens = starts.diff()
    steps = max(1, int(query_lens.max()))
    requests = torch.repeat_interleave(query_lens)
    first = (lengths - query_lens).clamp_min(0)
    positions = torch.minimum(first[:, None] + torch.arange(steps), lengths[:, None] - 1)
    exact = exact_start(fmt, window_block_table, first)
    boundary = torch.maximum(window_start(positions, group), exact[:, None])
    row_counts = (query_lens * per_head).numpy()
    tasks = []
    for r, (rows, quantized) in enumerate(zip(row_counts.tolist(), boundary[:, -1].tolist(), strict=True)):
        if rows:
            num_pages = -(-quantized // group)
            parts = [(0, num_pages, _PAGES)]
            if count is not None and int(dense_from[r]) <= num_pages:
                parts = [(0, int(count[r]), _CHOSEN), (int(dense_from[r]), num_pages, _PAGES)]
            for h in range(fmt.num_kv_heads):
                tasks.append((r, h, 0, 0, _WINDOW))
                for begin, end, kind in parts:
                    cuts = range(begin, end, _PAGES_PER_TASK)
                    tasks += [(r, h, i, min(i + _PAGES_PER_TASK, end), kind) for i in cuts]
    return DecodePlan(
        requests=requests,
        offsets=torch.arange(len(requests)) - starts[requests],
        steps=steps,
        row_counts=row_counts,
        positions=positions.repeat_interleave(per_head, 1).numpy(),
        boundary=boundary.repeat_interleave(per_head, 1).numpy(),
        tasks=np.array(tasks, dtype=np.int64).reshape(-1, 5),
        block_table=block_table.int().contiguous().numpy(),
        window_table=window_block_table.long().numpy(),
    )


def run_decode(
    fmt: PageFormat,
    plan: DecodePlan,
    pages: torch.Tensor,
    window: torch.Tensor,
    query: torch.Tensor,
    softmax_scale: float,
    bits: int,
    scores: ScoresOut | None = None,
    selection: PageSelection | None = None,
) -> torch.Tensor:
    """One layer of a planned step; see `decode_attention`.

    Args:
        scores: leave there what each row's old pages weigh.
        selection: read these pages only, and the window; its ``count`` and ``dense_from`` are those of the plan.
    """
    fmt.check_bits(bits)
    heads, dim, num_reqs, steps = fmt.num_kv_heads, fmt.head_size, len(plan.row_counts), plan.steps
    per_head, num_tokens = query.shape[1] // heads, len(plan.requests)
    rows = steps * per_head
    # Query rows of one request and KV head, in base 2: [R, H, rows, D].
    q = torch.zeros(num_reqs, steps, heads, per_head, dim)
    q[plan.requests, plan.offsets] = query[:num_tokens].view(-1, heads, per_head, dim).float() * (softmax_scale * _LOG2E)
    q = q.permute(0, 2, 1, 3, 4).reshape(num_reqs, heads, rows, dim).numpy()
    u8, exact = _bytes_of(pages), _bytes_of(window)
    maximum, total = np.empty((len(plan.tasks), rows), np.float32), np.empty((len(plan.tasks), rows), np.float32)
    output = np.empty((len(plan.tasks), rows, dim), np.float32)
    page_list, list_begin, *_ = (x.numpy() for x in selection or _NOT_SELECTED)
    # log2 of the scored pages' sums of 2^score.
    mass = np.empty((heads, scores.scores.shape[1], rows) if scores else (heads, 0, rows), np.float32)
    mass_begin, num_scored = (x.numpy() for x in (scores[1:] if scores else _NOT_SELECTED[2:]))
    arguments = (
        plan.tasks,
        u8,
        u8.view(np.uint16),
        exact.view(np.uint16),
        exact.view(np.float32),
        _DTYPES[fmt.dtype],
        (pages.stride(0), pages.stride(1), pages.storage_offset()),
        (window.stride(0), window.stride(1), window.storage_offset()),
        tuple(fmt.field_ranges.get(name, (0,))[0] for name in _FIELDS),
        plan.block_table,
        plan.window_table,
        q,
        plan.positions,
        plan.boundary,
        plan.row_counts,
        fmt.group_size,
        dim,
        fmt.value_group_size,
        fmt.window_block_size,
        bits == 8,
        maximum,
        total,
        output,
        page_list,
        list_begin,
        mass,
        mass_begin,
        num_scored,
    )
    split(_run_tasks, len(plan.tasks), arguments)
    result = np.zeros((num_reqs, heads, rows, dim), np.float32)
    lse = np.empty((num_reqs, heads, rows), np.float32)
    _merge(plan.tasks, plan.row_counts, maximum, total, output, result, lse)
    if scores:
        _normalise(mass, lse, mass_begin, num_scored, plan.row_counts, per_head, scores.scores.numpy())
    of_tokens = torch.from_numpy(result).unflatten(2, (steps, per_head)).transpose(1, 2)
    out = torch.zeros_like(query)
    out[:num_tokens] = of_tokens[plan.requests, plan.offsets].flatten(1, 2).to(query.dtype)
    return out


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
    scores: ScoresOut | None = None,
    selection: PageSelection | None = None,
) -> torch.Tensor:
    """Arguments and result as of `reference.decode_attention`; tensors are on the CPU.

    Args:
        scores, selection: as of `run_decode`.
    """
    chosen = (selection.count, selection.dense_from) if selection else ()
    plan = plan_decode(fmt, query_start_loc, seq_lens, block_table, window_block_table, query.shape[1], *chosen)
    return run_decode(fmt, plan, pages, window, query, softmax_scale, bits, scores, selection)


@cache
def warm_up() -> None:
    """Compile the kernel (some seconds, once per installation: the result is kept on disk) before it is needed."""
    fmt = PageFormat(1, 64, 64, torch.bfloat16)
    blocks = torch.ones(1, 4, dtype=torch.int32)
    window = torch.zeros(2, 1, fmt.window_block_size, 2 * 64, dtype=fmt.dtype)
    pages = torch.zeros(2, 1, fmt.head_bytes, dtype=torch.uint8)
    starts, lengths = torch.tensor([0, 1]), torch.tensor([130])
    zero = torch.zeros(1, dtype=torch.int32)
    scores = ScoresOut(torch.zeros(1, 1, 1), zero, zero)
    for bits in (4, 8):
        tables = (blocks, blocks.repeat(1, 4))
        decode_attention(fmt, pages, window, torch.ones(1, 1, 64), starts, lengths, *tables, 1.0, bits, scores)
