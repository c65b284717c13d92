"""Kernels for decode attention and the caches that they read, side by side: what decode_attention_peers.py measures.

A *format* is how a token's keys and values are stored: a pool of random ones, and the float32 values that they stand for. A
*method* reads one: given queries and pages of the pool it returns a function that launches its kernel.
"""

from dataclasses import dataclass
from functools import partial

import torch
from decode_attention import DEVICE, random_pool

from vllm_quantspec.format import PageFormat
from vllm_quantspec.kernels import reference

DIM, PAGE, BLOCK = 128, 128, 16  # channels, tokens per page, tokens per block of vLLM's other backends
SCALE = DIM**-0.5


@dataclass(frozen=True)
class Point:
    query_heads: int
    heads: int
    length: int
    requests: int

    @property
    def tokens(self) -> int:
        return self.length * self.requests

    @property
    def name(self) -> str:
        return f"{self.query_heads}/{self.heads} {self.length >> 10}k x{self.requests}"


class Batch:
    """Queries and lengths of one point, and for every launch tables of other pages."""

    def __init__(self, point, query_tokens, pool_size, sets):
        self.point, self.query_tokens, self.sets = point, query_tokens, sets
        requests, length = point.requests, point.length
        pages = -(-length // PAGE)
        order = torch.randperm(pool_size // PAGE, device=DEVICE).int()[: sets * requests * pages]
        self.pages = order.view(sets, requests, pages)
        blocks = torch.arange(PAGE // BLOCK, device=DEVICE, dtype=torch.int32)
        self.blocks = (self.pages[..., None] * (PAGE // BLOCK) + blocks).flatten(2)
        shape = (requests * query_tokens, point.query_heads, DIM)
        self.query = torch.randn(shape, dtype=torch.bfloat16, device=DEVICE)
        self.out = torch.empty_like(self.query)
        self.starts = torch.arange(requests + 1, dtype=torch.int32, device=DEVICE) * query_tokens
        self.seq_lens = torch.full((requests,), length, dtype=torch.int32, device=DEVICE)

    def slots(self):
        """Places in the pool of the first launch's tokens, [requests, length]."""
        within = torch.arange(PAGE, device=DEVICE)
        return (self.pages[0].long()[..., None] * PAGE + within).flatten(1)[:, : self.point.length]


# --- Formats: a pool of random tokens, and what it holds as float32 ---------------------------------------------------


def bf16_pool(heads, tokens):
    return [torch.randn(tokens, heads, DIM, dtype=torch.bfloat16, device=DEVICE) for _ in range(2)]


def fp8_pool(heads, tokens):
    return [x.to(torch.float8_e4m3fn) for x in bf16_pool(heads, tokens)]


def plain_values(pool, slots):
    return [x.view(torch.uint8)[slots].view(x.dtype).float() for x in pool]


def int4_rows_pool(heads, tokens):
    """xformers' rows: an int32 of fp16 scale and minimum, then 16 int32 of eight codes."""
    rows = []
    for _ in range(2):
        row = torch.randint(-(2**31), 2**31, (tokens, heads, 1 + DIM // 8), dtype=torch.int32, device=DEVICE)
        for place, low, high in ((0, 0.2, 0.5), (1, -3, -2)):
            row.view(torch.float16)[..., place] = torch.empty(tokens, heads, device=DEVICE).uniform_(low, high)
        rows.append(row)
    return rows


def int4_rows_values(pool, slots):
    shifts, values = torch.arange(0, 32, 4, device=DEVICE), []
    for row in (x[slots] for x in pool):
        scale, minimum = row.view(torch.float16)[..., :2].float().split(1, dim=-1)
        values.append(((row[..., 1:, None] >> shifts) & 15).flatten(-2) * scale + minimum)
    return values


def per_token_head_pool(heads, tokens):
    """vLLM's blocks: per token and head 64 bytes of keys, their scale (its low bits: the zero point), the same of values."""
    shape = (tokens // BLOCK, BLOCK, heads, DIM + 8)
    cache = torch.randint(0, 256, shape, dtype=torch.uint8, device=DEVICE)
    for place in (DIM // 8, DIM // 4 + 1):
        scales = torch.empty(shape[:-1], device=DEVICE).uniform_(1, 3)
        cache.view(torch.float32)[..., place] = scales
    return [cache]


def per_token_head_values(pool, slots):
    rotation = rotation_matrix()
    rows, values = pool[0][slots // BLOCK, slots % BLOCK], []
    for first in (0, DIM // 2 + 4):
        packed = rows[..., first : first + DIM // 2]
        bits = rows[..., first + DIM // 2 : first + DIM // 2 + 4].contiguous().view(torch.int32)
        codes = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)
        values.append((codes - (bits & 15).float()) * (bits & -16).view(torch.float32) @ rotation.T / DIM)
    return values


def rotation_matrix():
    """vLLM rotates keys, values and queries by this: entries of 1 and -1."""
    from vllm.v1.attention.ops import int4_per_token_head as int4

    eye = torch.eye(DIM, device=DEVICE)
    try:
        return int4.single_rht(eye).sign()
    except (RuntimeError, NotImplementedError, AttributeError):
        # A PyTorch other than the one vLLM was built for may lack the op; vLLM's own Triton transform does the same.
        int4._HADACORE_AVAILABLE = False
        return int4.single_rht(eye).sign()


def quantspec_pool(heads, tokens):
    fmt = PageFormat(heads, DIM, PAGE)
    return list(random_pool(fmt, tokens // PAGE, 128 * 4 * PAGE // fmt.window_block_size))


@dataclass(frozen=True)
class Format:
    bytes_per_token: int  # of one KV head, keys and values
    pool: object
    values: object = None


FORMATS = {
    "bf16": Format(4 * DIM, bf16_pool, plain_values),
    "fp8": Format(2 * DIM, fp8_pool, plain_values),
    "int4-rows": Format(DIM + 8, int4_rows_pool, int4_rows_values),
    "int4-per-token-head": Format(DIM + 8, per_token_head_pool, per_token_head_values),
    "quantspec": Format(PageFormat(1, DIM, PAGE).page_bytes // PAGE, quantspec_pool),
}


# --- Methods: (batch, pool) -> a function that launches with the i-th tables and returns the output -------------------


def flash_attention(batch, pool):
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    keys, values = (x.view(-1, BLOCK, *x.shape[1:]) for x in pool)
    query, scales = batch.query.to(keys.dtype), {}
    if keys.dtype != torch.bfloat16:
        one = torch.ones(1, device=DEVICE).expand(batch.point.requests, batch.point.heads)
        scales = {"q_descale": one, "k_descale": one, "v_descale": one}

    def launch(i):
        flash_attn_varlen_func(
            q=query, k=keys, v=values, out=batch.out, causal=True, softmax_scale=SCALE, fa_version=3,
            cu_seqlens_q=batch.starts, max_seqlen_q=batch.query_tokens, seqused_k=batch.seq_lens,
            max_seqlen_k=batch.point.length, block_table=batch.blocks[i], **scales,
        )  # fmt: skip
        return batch.out

    return launch


def xformers(batch, pool):
    from xformers.ops.fmha.attn_bias import PagedBlockDiagonalCausalWithOffsetPaddedKeysMask as Mask
    from xformers.ops.fmha.common import Inputs
    from xformers.ops.fmha.triton_splitk import FwOp

    point, per_head = batch.point, batch.point.query_heads // batch.point.heads
    query, (keys, values) = batch.query[None], (x[None] for x in pool)
    if per_head > 1:  # the layout in which the kernel handles the query heads of one KV head together
        query = query.unflatten(2, (point.heads, per_head))
        keys, values = (x[:, :, :, None].expand(-1, -1, -1, per_head, -1) for x in (keys, values))
    lengths = [batch.query_tokens] * point.requests, [point.length] * point.requests
    masks = [Mask.from_seqlens(*lengths, table, PAGE, device=query.device) for table in batch.pages]

    def launch(i):
        return FwOp.apply(Inputs(query, keys, values, attn_bias=masks[i], scale=SCALE), needs_gradient=False)[0]

    return launch


def triton(batch, pool):
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention
    from vllm.v1.kv_cache_interface import KVQuantMode

    point, more = batch.point, {"q_descale": None, "k_descale": None, "v_descale": None}
    if len(pool) == 1:
        half, scales = DIM // 2 + 4, pool[0].view(torch.float32)
        query, keys, values = batch.query, pool[0][..., :half], pool[0][..., half:]
        more |= {"k_scale_cache": scales[..., DIM // 8], "v_scale_cache": scales[..., DIM // 4 + 1]}
        more["kv_quant_mode"] = KVQuantMode.INT4_PER_TOKEN_HEAD
    else:
        keys, values = (x.view(-1, BLOCK, *x.shape[1:]) for x in pool)
        query, one = batch.query.to(keys.dtype), torch.ones(1, device=DEVICE)
        more |= {"q_descale": one, "kv_quant_mode": KVQuantMode.FP8_PER_TENSOR}
        more |= {name: one.expand(point.requests, point.heads) for name in ("k_descale", "v_descale")}
    # As the backend does it: up to 128 / KV heads requests share the work of a sequence among 16 programs.
    split_up_to, parts = 128 // point.heads, 16
    sizes = (split_up_to, point.query_heads, parts)
    partial_sums = [torch.empty(s, device=DEVICE) for s in ((*sizes, DIM), sizes, sizes)]

    def launch(i):
        unified_attention(
            q=query, k=keys, v=values, out=batch.out, causal=True, softmax_scale=SCALE, window_size=(-1, -1), softcap=0,
            cu_seqlens_q=batch.starts, max_seqlen_q=batch.query_tokens, seqused_k=batch.seq_lens,
            max_seqlen_k=point.length, block_table=batch.blocks[i], seq_threshold_3D=split_up_to,
            num_par_softmax_segments=parts, softmax_segm_output=partial_sums[0], softmax_segm_max=partial_sums[1],
            softmax_segm_expsum=partial_sums[2], **more,
        )  # fmt: skip
        return batch.out

    return launch


def hierarchical(batch, pool, bits, plain=False):
    from vllm_quantspec.kernels.decode_attention import decode_attention

    point, (pages, window) = batch.point, pool
    fmt = PageFormat(point.heads, DIM, PAGE)
    size = fmt.window_block_size
    last = -(-point.length // size)
    first = max(0, last - 3 * PAGE // size)
    shape = (batch.sets, point.requests, last - first)
    recent = torch.arange(shape[0] * shape[1] * shape[2], device=DEVICE, dtype=torch.int32)
    window_tables = torch.zeros(*shape[:2], last + 4, dtype=torch.int32, device=DEVICE)
    window_tables[..., first:last] = (recent % (len(window) - 1)).view(shape) + 1
    tables = batch.pages + 1

    def launch(i):
        arguments = (fmt, pages, window, batch.query, batch.starts, batch.seq_lens, tables[i], window_tables[i], SCALE, bits)
        if plain:
            return reference.decode_attention(*arguments)
        # FlashAttention's launches do not overlap with one another either.
        return decode_attention(*arguments, max_query_len=batch.query_tokens, out=batch.out, overlap=False)

    return launch


@dataclass(frozen=True)
class Method:
    label: str
    format: str
    prepare: object
    limit: float  # of the output's relative error
    query_tokens: tuple[int, ...] = (1, 5)
    compiles: bool = False  # by Triton, again for most points


METHODS = {
    "fa3": Method("FlashAttention 3, BF16", "bf16", flash_attention, 0.01),
    # Both FP8 kernels round probabilities to FP8 too, which alone is 5 % here.
    "fa3-fp8": Method("FlashAttention 3, FP8", "fp8", flash_attention, 0.15),
    "xformers": Method("xformers triton_splitk, BF16", "bf16", xformers, 0.01, compiles=True),
    "xformers-int4": Method("xformers triton_splitk, int4", "int4-rows", xformers, 0.02, (1,), compiles=True),
    "triton-fp8": Method("vLLM Triton, FP8", "fp8", triton, 0.15, compiles=True),
    "triton-int4": Method("vLLM Triton, int4_per_token_head", "int4-per-token-head", triton, 0.02, (1,), compiles=True),
    "draft": Method("hierarchical, draft (4 bits)", "quantspec", partial(hierarchical, bits=4), 0.01, (1,)),
    "target": Method("hierarchical, target (8 bits)", "quantspec", partial(hierarchical, bits=8), 0.01),
}


# --- Checking --------------------------------------------------------------------------------------------------------


def plain_attention(batch, keys, values):
    """Causal attention over float32 keys and values [requests, length, heads, DIM]."""
    count, heads = batch.query_tokens, batch.point.heads
    query = batch.query.float().view(batch.point.requests, count, heads, -1, DIM)
    scores = torch.einsum("rqhgd,rnhd->rhgqn", query, keys) * SCALE
    last = batch.point.length - count + torch.arange(count, device=keys.device)
    position = torch.arange(batch.point.length, device=keys.device)
    scores.masked_fill_(position > last[:, None], float("-inf"))
    return torch.einsum("rhgqn,rnhd->rqhgd", scores.softmax(-1), values).reshape(batch.query.shape)


def check(method, pool, pool_size, heads, query_tokens):
    """Relative error of the output on a small batch."""
    batch = Batch(Point(*heads, 1000, 3), query_tokens, pool_size, 1)
    chosen = METHODS[method]
    if chosen.format == "quantspec":
        expected = chosen.prepare(batch, pool, plain=True)(0)
    else:
        if chosen.format == "fp8":  # its kernels read an FP8 query
            batch.query = batch.query.to(torch.float8_e4m3fn).to(torch.bfloat16)
        expected = plain_attention(batch, *FORMATS[chosen.format].values(pool, batch.slots()))
    got = chosen.prepare(batch, pool)(0)
    return float((got.reshape(expected.shape).float() - expected).norm() / expected.float().norm())
