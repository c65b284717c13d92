"""The cost model: what decoding takes.

A step reads its bytes at a fraction of the GPU's bandwidth, and layers and linears cost a fixed time on top: small models
wait for launches, not for bytes. The constants below reproduce benchmarks/results/end_to_end-8b.json and end_to_end-7b.json
(an H200; one to 16 sequences of 4k to 128k tokens) within 4 %. Of a mixture of experts a step reads those that its tokens
choose, in 16 bits, and so does a draft step (in 4 with ``draft_experts: int4``, as fast as INT4 linears). The steps of
end_to_end-qwen3-30b-a3b.json with one sequence come out within 3 %; its eight sequences choose the same experts, as random
weights do, and read fewer than this model expects.
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm_quantspec.config import QuantSpecOptions
from vllm_quantspec.estimate.draft_weights import INT4_BITS, INT8_BITS
from vllm_quantspec.estimate.sizes import Model
from vllm_quantspec.estimate.sparse_drafts import draft_share
from vllm_quantspec.format import PageFormat
from vllm_quantspec.kernels.decode_attention import row_plans

# Speeds are fractions of the bandwidth of a copy, which also writes; reading alone is faster. Sources, all in
# benchmarks/results: [e] a fit to end_to_end-*.json, or times of single kernels in it; [p] a fit to
# decode_attention_peers.json, which [e] confirms; [i] int4_linear.json.
# The KV cache, by FlashAttention as by QuantSpec's kernel [p, e], and the LM head [e]; the 16-bit linear layers [e].
READ, LINEAR = 1.05, 0.97
# Microseconds that a linear takes beside that, in any precision, and linears of a layer (of attention alone, where there are
# experts) [i: launches of 9 to 279 MB; e: shapes from 7B to 70B want the same].
LINEAR_US, LINEARS, ATTENTION_LINEARS = 2.2, 4, 2
# The INT4 linear layers [i], by the most tokens: tensor-core tiles of 8 tokens, another kernel beyond 16. A draft step of
# more tokens than these uses the 16-bit layers.
INT4_LINEAR = ((8, 0.75), (16, 0.53), (32, 0.43), (64, 0.28))
# The same in 8 bits, where 16 tokens are the most: by what an H100 takes compared with INT4 and with 16 bits, which say 0.84
# and 0.97 [int4_linear-int8.json]; beyond 8 tokens assumed.
INT8_LINEAR = ((8, 0.88), (16, 0.67))
# Where all between two attentions is one launch, without a time per linear: by the most sequences [draft_layer.json]. Three
# are padded to four where there are CUDA graphs.
JOINED = ((1, 0.78), (2, 0.66))
# The draft's output layer [i]: INT4, and microseconds, in all and per token, to compute its largest logits again.
INT4_HEAD = ((8, 0.8), (16, 0.57), (32, 0.5))
RESCORE_US, RESCORE_TOKEN_US = 3, 1.3
# Groups of exact tokens that take as long as a request's window does [p]; it holds one to two, read less evenly than pages.
WINDOW_READ_GROUPS = 3
# What each tile of query rows after the first adds: a fraction of the time to read, and microseconds per layer [p].
ROW_TILE, ROW_TILE_US = 0.07, 4
# What more tiles than one warp has registers for take beyond that: on a Hopper GPU, read by a warp group
# [decode_attention-wide.json].
WIDE_TILES, WIDE = 3, 1.2
# Microseconds per layer that do not grow with the context: attention's start and merge, norms, activations, rotary
# embedding, stores and launches [e]. Less for drafts, whose kernels start under the end of those before.
LAYER_US = {"exact": 33.5, "target": 30, "draft": 22.5, "joined": 15.5}
# Microseconds per layer and token of a step [e].
TOKEN_US = 0.2
# Experts are read like other layers, launches among it: in 16 bits, and in INT4, of a few tokens. What routing and sorting
# cost per layer of experts, in microseconds [e, -qwen3-30b-a3b, batch 1].
EXPERTS, INT4_EXPERTS = 0.9, 0.6
EXPERTS_US = {"exact": 15.5, "target": 15.5, "draft": 11.5}
# Microseconds that adding up over two GPUs costs, twice per layer [e, -8b-tp2].
ALL_REDUCE_US = {"exact": 4, "target": 7, "draft": 7}


@dataclass(frozen=True)
class Speed:
    """Milliseconds per token and sequence."""

    exact: float
    cache: float
    draft_step: float
    cycle: float
    tokens_per_cycle: float
    draft_share: float  # of the old tokens, that a draft step reads
    acceptance: float  # as of `speed`

    @property
    def quantspec(self) -> float:
        return self.cycle / self.tokens_per_cycle


def expected_tokens(acceptance: float, num_speculative_tokens: int) -> float:
    """Mean tokens of a verification, (1 - a^(n + 1)) / (1 - a): each draft is accepted with a if those before it were."""
    tokens = num_speculative_tokens + 1
    return tokens if acceptance == 1 else (1 - acceptance**tokens) / (1 - acceptance)


def needed_acceptance(cycle: float, num_speculative_tokens: int, ms_per_token: float) -> float | None:
    """The acceptance with which cycles of so many milliseconds take ``ms_per_token`` per token; None: with none they do."""
    wanted = cycle / ms_per_token
    if wanted > num_speculative_tokens + 1:
        return None
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if expected_tokens(middle, num_speculative_tokens) < wanted else (low, middle)
    return high


def speed(
    model: Model,
    bandwidth: float,
    context: int,
    batch: int,
    tensor_parallel_size: int,
    group_size: int,
    acceptance: float,
    num_speculative_tokens: int,
    *,
    quantize_lm_head: bool = True,
    page_bits: int = 8,
    draft_context: str | int | float = QuantSpecOptions.draft_context,
    draft_experts: str = QuantSpecOptions.draft_experts,
    wide_share: float = 0.0,
    join_layers: bool = True,
) -> Speed:
    """Decode times by the cost model: bytes over bandwidth plus fixed costs.

    Arithmetic is not in it: linear layers of some hundred tokens (in a verification, requests times drafts and one), where
    they are no longer bound by reading, take longer than it says. Communication is what two H200s of one machine need.

    Args:
        bandwidth: bytes per second that a copy on this GPU reads and writes (an H200: 4.26e12).
        page_bits: as of `memory`; the constants are fitted to measurements with 8.
        acceptance: probability that a draft is accepted, given that those before it were.
        draft_context: as of `QuantSpecOptions`, parsed. Drafts that read less are accepted less often: that is the caller's
            to say. What it takes to choose the pages is not in the model.
        draft_experts: as of `QuantSpecOptions`; with ``"int4"`` an engine may still keep the target's, and says so.
        wide_share: as of `memory`.
        join_layers: as of `QuantSpecOptions`.
    """
    tp, rows = tensor_parallel_size, num_speculative_tokens + 1
    fmt = PageFormat(max(1, model.num_kv_heads // tp), model.head_size, group_size, model.dtype, page_bits)

    def read_ms(num_bytes: float, fraction: float) -> float:
        return num_bytes / (bandwidth * fraction) * 1e3

    def layers_ms(kind: str, num_tokens: int, bytes_per_token: float, query_rows: int = 1) -> float:
        """All but the linear layers; ``query_rows`` are per KV head."""
        cache_bytes, tiles, passes = context * bytes_per_token * (share if kind in ("draft", "joined") else 1), 1, 1
        if kind != "exact":
            cache_bytes += WINDOW_READ_GROUPS * group_size * exact_bytes
            plan = row_plans(model.head_size, group_size, query_rows, wgmma=True)[0]
            passes, tiles = plan.passes, plan.tiles  # every pass reads the cache
            cache_bytes *= WIDE if tiles > WIDE_TILES else 1
        read = read_ms(batch * cache_bytes, READ) * (1 + ROW_TILE * (tiles - 1)) + ROW_TILE_US * (tiles - 1) / 1e3
        rest = TOKEN_US * num_tokens + (2 * ALL_REDUCE_US[kind] if tp > 1 else 0)
        full = (model.num_layers - model.sliding_layers) * (passes * read + (LAYER_US[kind] + rest) / 1e3)
        newest = read_ms(batch * min(context, model.sliding_window) * exact_bytes, READ)
        return full + model.sliding_layers * (newest + (LAYER_US["exact"] + rest) / 1e3)

    share = draft_share(
        model, context, batch, tp, group_size, num_speculative_tokens, page_bits, draft_context, draft_experts, wide_share
    )
    exact_bytes = fmt.num_kv_heads * 2 * model.head_size * model.dtype.itemsize
    target, draft = fmt.bytes_per_token(), fmt.bytes_per_token(4)
    per_head = max(1, model.num_heads // tp // fmt.num_kv_heads)
    head = read_ms(model.head_weights * model.dtype.itemsize / tp, READ)
    linears = read_ms(model.linear_weights * model.dtype.itemsize / tp, LINEAR)
    layers_of_experts = model.experts.num_layers if model.experts else 0
    launches = LINEARS * (model.num_layers - layers_of_experts) + ATTENTION_LINEARS * layers_of_experts
    fixed = launches * LINEAR_US / 1e3

    def experts_ms(tokens: int, kind: str) -> float:
        """Of ``tokens`` tokens per request, in 16 bits."""
        if not model.experts:
            return 0.0
        read = read_ms(model.experts.weights_read(batch, tokens) * model.dtype.itemsize / tp, EXPERTS)
        return read + model.experts.num_layers * EXPERTS_US[kind] / 1e3

    def draft_experts_ms() -> float:
        if not model.experts or draft_experts == "target":
            return experts_ms(1, "draft")
        in_int4 = read_ms(model.experts.int4_weights_read(batch) * INT4_BITS / 8 / tp, INT4_EXPERTS)
        routers = model.experts.num_layers * model.experts.router_weights
        sorting = model.experts.num_layers * EXPERTS_US["draft"] / 1e3
        return in_int4 + read_ms(routers * model.dtype.itemsize / tp, EXPERTS) + sorting

    def own_ms(weights: float, fractions, bits: float = INT4_BITS) -> float | None:
        """None where the draft uses the 16-bit weights."""
        return next((read_ms(weights * bits / 8 / tp, f) for most, f in fractions if batch <= most), None)

    def draft_linears_ms(share: float, fractions, bits: float) -> float:
        own = own_ms(model.linear_weights * share, fractions, bits)
        return share * linears if own is None else own

    draft_linears = draft_linears_ms(1 - wide_share, INT4_LINEAR, INT4_BITS)
    draft_linears += draft_linears_ms(wide_share, INT8_LINEAR, INT8_BITS)
    int4_head = own_ms(model.head_weights, INT4_HEAD) if quantize_lm_head else None
    draft_head = int4_head + (RESCORE_US + RESCORE_TOKEN_US * batch) / 1e3 if int4_head else head
    base = head + fixed + linears + experts_ms(1, "exact")
    joined = None
    if join_layers and model.can_join_layers and tp == 1 and not wide_share:
        joined = own_ms(model.linear_weights, JOINED)
    if joined is not None:
        draft_step = draft_head + joined + layers_ms("joined", batch, draft, per_head)
    else:
        draft_step = draft_head + fixed + draft_linears + draft_experts_ms() + layers_ms("draft", batch, draft, per_head)
    verify = head + fixed + linears + experts_ms(rows, "target") + layers_ms("target", batch * rows, target, rows * per_head)
    return Speed(
        exact=base + layers_ms("exact", batch, exact_bytes),
        cache=base + layers_ms("target", batch, target, per_head),
        draft_step=draft_step,
        cycle=num_speculative_tokens * draft_step + verify,
        tokens_per_cycle=expected_tokens(acceptance, num_speculative_tokens),
        draft_share=share,
        acceptance=acceptance,
    )
