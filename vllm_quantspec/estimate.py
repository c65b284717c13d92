"""What a model needs with and without QuantSpec, and what it gains: arithmetic on a model's config.json.

Memory is counted, speed is modelled: a step reads its bytes at a fraction of the GPU's bandwidth, and each layer costs a
fixed time on top. The constants below reproduce benchmarks/results/end_to_end-8b.json and end_to_end-7b.json (an H200; one
to 16 sequences of 4k to 128k tokens) within 4 %. Of a mixture of experts a step reads those that its tokens choose, in 16
bits, and so does a draft step (in 4 with ``draft_experts: int4``). Three speed-ups measured with the shape of Qwen3-30B-A3B
come out within 1 %; INT4 experts are not measured, and expected to be read as INT4 linears are.

What the engine would refuse is refused here first, with the engine's sentence.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

import torch

from vllm_quantspec import sparse_policy
from vllm_quantspec.checkpoint import four_bits
from vllm_quantspec.config import CACHE_DTYPES, QuantSpecOptions, draft_budget, parse_draft_context
from vllm_quantspec.format import PageFormat, window_blocks_per_request, window_start
from vllm_quantspec.kernels.decode_attention import row_plans
from vllm_quantspec.memory import draft_logits_bytes
from vllm_quantspec.supported import (
    SOME_SLIDING,
    has_recurrent_layers,
    head_size_of,
    num_sliding_layers,
    text_part,
    towers_of,
    undrafted,
    unsupported,
    untried_on_gpu,
)

GIB = 2**30
# A 16-bit scale and zero point per group of weights.
INT4_BITS, INT8_BITS = (bits + 32 / QuantSpecOptions.weight_group_size for bits in (4, 8))
# vLLM's default of --max-num-seqs, from so many GiB of a GPU on and below.
LARGE_GPU_GIB, MAX_NUM_SEQS = 70, (1024, 256)
# Speeds are fractions of the bandwidth of a copy, which also writes; reading alone is faster. Sources, all in
# benchmarks/results: [e] a fit to end_to_end-*.json, or times of single kernels in it; [p] a fit to
# decode_attention_peers.json, which [e] confirms; [i] int4_linear.json.
# The KV cache, by FlashAttention as by QuantSpec's kernel [p, e], and the LM head [e]; the 16-bit linear layers [e].
READ, LINEAR = 1.05, 0.9
# The INT4 linear layers [i], by the most tokens: tensor-core tiles of 8 tokens, another kernel beyond 16. A draft step of
# more tokens than these uses the 16-bit layers.
INT4_LINEAR = ((8, 0.6), (16, 0.45), (32, 0.24))
# The same in 8 bits, where 16 tokens are the most: assumed, not measured.
INT8_LINEAR = ((8, 0.77), (16, 0.6))
# The draft's output layer [i]: INT4, and microseconds, in all and per token, to compute its largest logits again.
INT4_HEAD = ((8, 0.8), (16, 0.57), (32, 0.5))
RESCORE_US, RESCORE_TOKEN_US = 3, 1.3
# Groups of exact tokens that take as long as a request's window does [p]; it holds one to two, read less evenly than pages.
WINDOW_READ_GROUPS = 3
# What each tile of query rows after the first adds: a fraction of the time to read, and microseconds per layer [p].
ROW_TILE, ROW_TILE_US = 0.07, 4
# What a team of warps, which more rows need, takes beyond that [decode_attention-wide.json].
TEAM = 1.2
# Microseconds per layer that do not grow with the context: attention's start and merge, norms, activations, rotary
# embedding, stores and launches [e]. Less for drafts, whose kernels start under the end of those before.
LAYER_US = {"exact": 33.5, "target": 30, "draft": 22.5}
# Microseconds per layer and token of a step [e].
TOKEN_US = 0.2
# Experts are chosen evenly and read like the other 16-bit layers. Tokens of one sequence choose alike: each token of a
# verification after the first counts as this much of a token.
EXPERT_TOKEN = 0.55
# What routing, sorting and two launches cost per layer of experts, in microseconds [e, -qwen3-30b-a3b, batch 1].
EXPERTS_US = {"exact": 20, "target": 20, "draft": 16}
# Fraction of the bandwidth at which INT4 experts are read: that of INT4 linear layers of a few tokens.
INT4_EXPERTS = INT4_LINEAR[0][1]
# Microseconds that adding up over two GPUs costs, twice per layer [e, -8b-tp2].
ALL_REDUCE_US = {"exact": 6, "target": 9, "draft": 9}


@dataclass(frozen=True)
class Experts:
    """The mixture of experts in some of a model's layers; weights are numbers of weights in one layer.

    active: experts that a token chooses, of ``number``.
    expert_weights: of one expert. Every token needs router_weights, of the router and a shared expert's gate, which stay in
    16 bits in a draft, and shared_weights, of shared experts.
    """

    num_layers: int
    number: int
    active: int
    expert_weights: int
    router_weights: int
    shared_weights: int

    @property
    def int4_weights(self) -> int:
        """Those of which the draft has a copy with ``draft_experts: int4``, in all layers."""
        return self.num_layers * (self.number * self.expert_weights + self.shared_weights)

    @property
    def weights(self) -> int:
        """All of them, in all layers."""
        return self.int4_weights + self.num_layers * self.router_weights

    def chosen(self, sequences: int, tokens: int = 1) -> float:
        """Different experts per layer that ``tokens`` tokens of each of ``sequences`` choose, on average."""
        effective = sequences * (1 + EXPERT_TOKEN * (tokens - 1))
        return self.number * (1 - (1 - self.active / self.number) ** effective)

    def int4_weights_read(self, sequences: int) -> float:
        """Weights that a draft step of so many sequences reads in 4 bits, in all layers."""
        return self.num_layers * (self.chosen(sequences) * self.expert_weights + self.shared_weights)

    def weights_read(self, sequences: int, tokens: int = 1) -> float:
        """Weights that a step of the target reads, in all layers."""
        every = self.shared_weights + self.router_weights
        return self.num_layers * (self.chosen(sequences, tokens) * self.expert_weights + every)


@dataclass(frozen=True)
class Model:
    """Sizes of a decoder-only transformer; ``*_weights`` are numbers of weights.

    Of ``num_layers``, ``sliding_layers`` attend to the newest ``sliding_window`` tokens alone, in 16 bits.
    ``linear_weights`` are without experts. Of these and the head the draft has a copy in INT4, of the experts if asked for.
    """

    name: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    linear_weights: int
    head_weights: int
    embedding_weights: int
    vocab_size: int
    dtype: torch.dtype
    experts: Experts | None = None
    sliding_layers: int = 0
    sliding_window: int = 0
    linear_bits: float | None = None
    """Of a weight of linear layers in a 4-bit checkpoint, with its scale and zero point; None: as the dtype."""

    @property
    def layers_in_pool(self) -> tuple[int, int]:
        """Full and sliding layers that vLLM's pool has room for: it splits them into groups of equally many layers."""
        full, sliding = self.num_layers - self.sliding_layers, self.sliding_layers
        if not sliding:
            return full, 0
        least, most = min(full, sliding), max(full, sliding)
        group = most if most < 1.5 * least else least
        return math.ceil(full / group) * group, math.ceil(sliding / group) * group

    @property
    def weights(self) -> int:
        experts = self.experts.weights if self.experts else 0
        return self.linear_weights + self.head_weights + self.embedding_weights + experts

    @property
    def weight_bytes(self) -> float:
        """Of all weights as loaded."""
        fewer = 0 if self.linear_bits is None else self.linear_weights * (self.dtype.itemsize - self.linear_bits / 8)
        return self.weights * self.dtype.itemsize - fewer

    def int4_weights(self, draft_experts: str) -> int:
        """Those of which the draft has a copy in INT4; ``draft_experts`` as of `QuantSpecOptions`."""
        experts = self.experts.int4_weights if self.experts and draft_experts == "int4" else 0
        return self.linear_weights + self.head_weights + experts


def read_config(path: str) -> dict:
    """A parsed config.json (a file, its folder, or a hub id).

    Raises:
        ValueError: one sentence, where there is no configuration.
    """
    file = Path(path).expanduser()
    file = file / "config.json" if file.is_dir() else file
    if file.is_file():
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: not a JSON file ({error}).") from error
    elif file.exists() or path.startswith(("/", ".", "~")) or path.count("/") > 1:
        raise ValueError(f"{path}: no config.json there; give a config.json, its folder, or a hub id such as owner/name.")
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path).to_dict()
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: its configuration cannot be loaded ({str(error).splitlines()[0]}).") from error


def model_from(config: dict, name: str) -> Model:
    """The sizes in a parsed configuration.

    Raises:
        ValueError: one sentence, for a model that the engine refuses, or whose configuration lacks a size.
    """
    refusal = unsupported(config, name)
    if refusal:
        raise ValueError(f"not supported; an engine would stop with this: {refusal}")
    text = text_part(config)
    if has_recurrent_layers(text):
        raise ValueError(f"{name} has Mamba or linear-attention layers, which estimates do not count; there is no estimate.")
    c = SimpleNamespace(**text)
    missing = [
        key
        for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
        if not isinstance(text.get(key), int)
    ]
    if missing:
        raise ValueError(
            f"{name}: the configuration has no {missing[0]}; estimates are for decoder-only transformers which name it."
        )
    experts = experts_of(text, name)
    num_dense = c.num_hidden_layers - (experts.num_layers if experts else 0)
    kv_heads = text.get("num_key_value_heads") or c.num_attention_heads
    head_size = head_size_of(text)
    attention = c.hidden_size * head_size * (2 * c.num_attention_heads + 2 * kv_heads)
    mlp = 3 * c.hidden_size * c.intermediate_size
    vocabulary = c.vocab_size * c.hidden_size
    checkpoint = four_bits(config.get("quantization_config") or text.get("quantization_config"))
    dtype = getattr(torch, str(text.get("dtype") or text.get("torch_dtype") or "bfloat16"), torch.bfloat16)
    return Model(
        name,
        c.num_hidden_layers,
        c.num_attention_heads,
        kv_heads,
        head_size,
        c.num_hidden_layers * attention + num_dense * mlp,
        vocabulary,
        0 if text.get("tie_word_embeddings") else vocabulary,
        c.vocab_size,
        dtype if dtype.itemsize == 2 else torch.bfloat16,
        experts,
        num_sliding_layers(text),
        text.get("sliding_window") or 0,
        None if isinstance(checkpoint, str) else checkpoint.bits(c.hidden_size),
    )


def experts_of(text: dict, name: str) -> Experts | None:
    """The mixture of experts that a language model's configuration describes; None for a dense model.

    Raises:
        ValueError: one sentence, for a description that lacks a size.
    """

    def first(*keys: str):
        return next((text[key] for key in keys if text.get(key)), None)

    number = first("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    if not number:
        return None
    active = first("num_experts_per_tok", "moe_k", "moe_topk", "num_experts_per_token")
    width = first("moe_intermediate_size", "intermediate_size")
    if not all(isinstance(size, int) for size in (number, active, width)):
        what = "experts a token chooses" if not isinstance(active, int) else "width of an expert"
        raise ValueError(f"{name}: the configuration has experts, but not the {what}; there is no estimate.")
    hidden, layers = text["hidden_size"], range(text["num_hidden_layers"])
    dense, every = text.get("mlp_only_layers") or (), first("decoder_sparse_step", "moe_layer_freq") or 1
    sparse = [i for i in layers if i not in dense and (i + 1) % every == 0 and i >= text.get("first_k_dense_replace", 0)]
    gated = text.get("shared_expert_intermediate_size") or 0  # Qwen 2: one shared expert, with a gate of its own
    shared = gated or width * (first("n_shared_experts", "num_shared_experts", "moe_num_shared_experts") or 0)
    router = hidden * (number + (1 if gated else 0))
    return Experts(len(sparse), number, active, 3 * hidden * width, router, 3 * hidden * shared)


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU, and how many tokens fit."""

    weights: float
    int4_weights: float
    draft_logits: float
    kv_bytes_per_token: float
    quantspec_bytes_per_token: float
    window_bytes_per_request: float
    sliding_bytes_per_request: float
    free: float
    free_with_draft: float

    def requests(self, context: int, *, quantspec: bool, draft: bool = True) -> int:
        """Requests of ``context`` tokens that are held at once."""
        if not quantspec:
            return max(0, int(self.free // (self.kv_bytes_per_token * context + self.sliding_bytes_per_request)))
        free = self.free_with_draft if draft else self.free
        windows = self.window_bytes_per_request + self.sliding_bytes_per_request
        return max(0, int(free // (self.quantspec_bytes_per_token * context + windows)))


def memory(
    model: Model,
    gpu_memory: float,
    utilization: float,
    tensor_parallel_size: int,
    group_size: int,
    overhead: float,
    num_speculative_tokens: int = QuantSpecOptions.num_speculative_tokens,
    max_num_seqs: int | None = None,
    page_bits: int = 8,
    draft_experts: str = QuantSpecOptions.draft_experts,
    wide_share: float = 0.0,
    one_copy: bool = False,
) -> Memory:
    """Memory of one of ``tensor_parallel_size`` GPUs with ``gpu_memory`` bytes.

    Args:
        utilization: vLLM's ``--gpu-memory-utilization``.
        overhead: bytes for activations, CUDA graphs and the rest.
        max_num_seqs: vLLM's ``--max-num-seqs``, by default what vLLM chooses for such a GPU.
        page_bits: of a key or value in a page: 8, or 4 with ``--kv-cache-dtype quantspec_int4``.
        draft_experts: as of `QuantSpecOptions`: with ``"int4"`` the draft has a copy of the experts.
        wide_share: of the weights in the draft's linears, those in 8 bits (`share_in_8_bits`).
        one_copy: as of `EngineOptions`: of a 4-bit checkpoint's linears the draft has no copy.

    Raises:
        ValueError: the KV heads do not divide among the GPUs.
    """
    tp = tensor_parallel_size
    if model.num_kv_heads % tp and tp % model.num_kv_heads:
        raise ValueError(f"{model.num_kv_heads} KV heads do not divide among {tp} GPUs; choose another number.")
    fmt = PageFormat(max(1, model.num_kv_heads // tp), model.head_size, group_size, model.dtype, page_bits)
    weights = model.weight_bytes / tp
    int4 = draft_bytes(model, draft_experts, wide_share) / tp
    if one_copy and model.linear_bits:
        int4 -= model.linear_weights * (INT4_BITS + wide_share * (INT8_BITS - INT4_BITS)) / 8 / tp
    free = gpu_memory * utilization - weights - overhead
    max_num_seqs = max_num_seqs or default_max_num_seqs(gpu_memory)
    logits = draft_logits_bytes(max_num_seqs, num_speculative_tokens, model.vocab_size, model.dtype.itemsize)
    window_blocks = window_blocks_per_request(group_size, fmt.window_block_size, num_speculative_tokens)
    full_layers, sliding_layers = model.layers_in_pool
    exact = fmt.num_kv_heads * 2 * model.head_size * model.dtype.itemsize
    return Memory(
        weights,
        int4,
        logits,
        full_layers * exact,
        full_layers * fmt.bytes_per_token(),
        full_layers * window_blocks * fmt.page_bytes,
        sliding_layers * (model.sliding_window + group_size) * exact,
        max(0.0, free),
        max(0.0, free - int4 - logits),
    )


def draft_bytes(model: Model, draft_experts: str, wide_share: float) -> float:
    """Bytes of the draft's own weights, on all GPUs together; arguments as of `memory`."""
    wider = model.linear_weights * wide_share * (INT8_BITS - INT4_BITS)
    return (model.int4_weights(draft_experts) * INT4_BITS + wider) / 8


def share_in_8_bits(weight_bits: float | None) -> float:
    """The share of weights in 8 bits with which they have ``weight_bits`` on average; None: with INT4 weights.

    Raises:
        ValueError: one sentence, for a number of bits that no share has.
    """
    if weight_bits is None:
        return 0.0
    if not INT4_BITS <= weight_bits <= INT8_BITS:
        raise ValueError(
            f"--weight-bits {weight_bits:g} is not between {INT4_BITS:g}, all of the draft's linears in 4 bits, and "
            f"{INT8_BITS:g}, all in 8, with scales and zero points."
        )
    return (weight_bits - INT4_BITS) / (INT8_BITS - INT4_BITS)


def default_max_num_seqs(gpu_memory: float) -> int:
    """vLLM's ``--max-num-seqs`` on a GPU of ``gpu_memory`` bytes (but an A100, of which it runs 256, too)."""
    return MAX_NUM_SEQS[gpu_memory < LARGE_GPU_GIB * GIB]


@dataclass(frozen=True)
class Speed:
    """Milliseconds per token and sequence."""

    exact: float
    cache: float
    draft_step: float
    cycle: float
    tokens_per_cycle: float
    draft_share: float  # of the old tokens, that a draft step reads

    @property
    def quantspec(self) -> float:
        return self.cycle / self.tokens_per_cycle


def expected_tokens(acceptance: float, num_speculative_tokens: int) -> float:
    """Mean tokens of a verification, (1 - a^(n + 1)) / (1 - a): each draft is accepted with a if those before it were."""
    tokens = num_speculative_tokens + 1
    return tokens if acceptance == 1 else (1 - acceptance**tokens) / (1 - acceptance)


def cycle_bytes(
    model: Model, tensor_parallel_size: int, group_size: int, page_bits: int, draft_experts: str, wide_share: float = 0.0
) -> sparse_policy.CycleBytes:
    """What the policy of sparse drafts goes by, of one of so many GPUs. Arguments as of `speed`."""
    tp = tensor_parallel_size
    fmt = PageFormat(max(1, model.num_kv_heads // tp), model.head_size, group_size, model.dtype, page_bits)
    read, in_int4 = model.weights - model.embedding_weights, model.int4_weights(draft_experts)
    return sparse_policy.CycleBytes(
        draft_weight_bytes=(draft_bytes(model, draft_experts, wide_share) + (read - in_int4) * model.dtype.itemsize) / tp,
        target_weight_bytes=read * model.dtype.itemsize / tp,
        draft_kv_bytes=model.num_layers * fmt.bytes_per_token(4),
        target_kv_bytes=model.num_layers * fmt.bytes_per_token(),
    )


def draft_share(
    model: Model,
    context: int,
    batch: int,
    tensor_parallel_size: int,
    group_size: int,
    num_speculative_tokens: int,
    page_bits: int,
    draft_context: str | int | float,
    draft_experts: str,
    wide_share: float = 0.0,
) -> float:
    """The share of the old tokens of ``batch`` requests of ``context`` tokens each that a draft step reads, 0 to 1."""
    budget, old = draft_budget(draft_context, group_size), window_start(context, group_size) // group_size
    if budget is None or not old:
        return 1.0
    least = 0
    if draft_context == "auto":
        least = sparse_policy.min_total_pages(
            **asdict(cycle_bytes(model, tensor_parallel_size, group_size, page_bits, draft_experts, wide_share)),
            num_speculative_tokens=num_speculative_tokens,
            fraction=budget.fraction,
            group_size=group_size,
        )
    chosen = max(budget.pages, math.ceil(budget.fraction * old))
    return 1.0 if old < budget.min_pages or chosen >= old or old * batch < least else chosen / old


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
    draft_context: str | int | float = "all",
    draft_experts: str = QuantSpecOptions.draft_experts,
    wide_share: float = 0.0,
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
    """
    tp, rows = tensor_parallel_size, num_speculative_tokens + 1
    fmt = PageFormat(max(1, model.num_kv_heads // tp), model.head_size, group_size, model.dtype, page_bits)

    def read_ms(num_bytes: float, fraction: float) -> float:
        return num_bytes / (bandwidth * fraction) * 1e3

    def layers_ms(kind: str, num_tokens: int, bytes_per_token: float, query_rows: int = 1) -> float:
        """All but the linear layers; ``query_rows`` are per KV head."""
        cache_bytes, tiles, passes = context * bytes_per_token * (share if kind == "draft" else 1), 1, 1
        if kind != "exact":
            cache_bytes += WINDOW_READ_GROUPS * group_size * exact_bytes
            passes, tiles, team = row_plans(model.head_size, group_size, query_rows)[0]  # every pass reads the cache
            cache_bytes *= TEAM if team > 1 else 1
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

    def experts_ms(tokens: int, kind: str) -> float:
        """Of ``tokens`` tokens per request, in 16 bits."""
        if not model.experts:
            return 0.0
        read = read_ms(model.experts.weights_read(batch, tokens) * model.dtype.itemsize / tp, LINEAR)
        return read + model.experts.num_layers * EXPERTS_US[kind] / 1e3

    def draft_experts_ms() -> float:
        if not model.experts or draft_experts == "target":
            return experts_ms(1, "draft")
        in_int4 = read_ms(model.experts.int4_weights_read(batch) * INT4_BITS / 8 / tp, INT4_EXPERTS)
        routers = model.experts.num_layers * model.experts.router_weights
        fixed = model.experts.num_layers * EXPERTS_US["draft"] / 1e3
        return in_int4 + read_ms(routers * model.dtype.itemsize / tp, LINEAR) + fixed

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
    base = head + linears + experts_ms(1, "exact")
    draft_step = draft_head + draft_linears + draft_experts_ms() + layers_ms("draft", batch, draft, per_head)
    verify = head + linears + experts_ms(rows, "target") + layers_ms("target", batch * rows, target, rows * per_head)
    return Speed(
        exact=base + layers_ms("exact", batch, exact_bytes),
        cache=base + layers_ms("target", batch, target, per_head),
        draft_step=draft_step,
        cycle=num_speculative_tokens * draft_step + verify,
        tokens_per_cycle=expected_tokens(acceptance, num_speculative_tokens),
        draft_share=share,
    )


def report(arguments, file=None) -> None:
    """Print the estimate for the command line's arguments (see ``cli.py``).

    Raises:
        ValueError: one sentence, where there is no estimate; for a model that the engine refuses, with its sentence.
    """
    file = file or sys.stdout
    config = read_config(arguments.model)
    model = model_from(config, arguments.model)
    if arguments.one_copy and model.linear_bits is None:
        reason = four_bits(config.get("quantization_config"))
        raise ValueError(f"--one-copy is for 4-bit checkpoints, but {model.name} {reason}; drop --one-copy.")
    no_drafts = undrafted(config)
    tp, group, context, batch = arguments.tensor_parallel_size, arguments.group_size, arguments.context, arguments.batch
    page_bits = CACHE_DTYPES[arguments.kv_cache_dtype]
    draft_context, draft_experts = parse_draft_context(arguments.draft_context, group), arguments.draft_experts
    wide_share = share_in_8_bits(arguments.weight_bits)
    times = {
        gamma: speed(
            model,
            arguments.bandwidth * 1e12,
            context,
            batch,
            tp,
            group,
            arguments.acceptance,
            gamma,
            page_bits=page_bits,
            draft_context=draft_context,
            draft_experts=draft_experts,
            wide_share=wide_share,
        )
        for gamma in arguments.num_speculative_tokens or range(1, 9)
    }
    best = min(times, key=lambda g: times[g].quantspec)
    seqs = arguments.max_num_seqs or default_max_num_seqs(arguments.gpu_memory * GIB)
    m = memory(
        model,
        arguments.gpu_memory * GIB,
        arguments.gpu_memory_utilization,
        tp,
        group,
        arguments.overhead * GIB,
        best,
        seqs,
        page_bits,
        draft_experts,
        wide_share,
        arguments.one_copy,
    )

    def line(label: str, text: str) -> None:
        print(f"  {label:<34}{text}", file=file)

    print(f"{model.name}: supported, as far as its configuration shows", file=file)
    if no_drafts:
        print(f"but its cache alone; with drafts an engine would stop with this: {no_drafts}", file=file)
    if model.sliding_layers:
        print(f"and on a GPU an engine would stop with this, for now: {untried_on_gpu(SOME_SLIDING)}", file=file)
    print(f"on {tp} GPU{'s' * (tp > 1)} with {arguments.gpu_memory:g} GiB each\n", file=file)
    print("memory, per GPU", file=file)
    line("weights", f"{m.weights / GIB:.2f} GiB{', of the language model alone' if towers_of(config) else ''}")
    if not no_drafts:
        copy = "INT4 copy" if not wide_share else "INT8 copy" if wide_share == 1 else "INT4 and INT8 copy"
        less = " (of the output layer: the rest is one copy)" if arguments.one_copy else " (none with draft_weights=target)"
        line(f"{copy} for drafting", f"{m.int4_weights / GIB:.2f} GiB{less}")
        if wide_share:
            line("", "how fast a GPU reads weights in 8 bits is assumed, not measured")
        if model.experts and draft_experts == "int4":
            part = model.experts.int4_weights * INT4_BITS / 8 / tp
            line("", f"of it {part / GIB:.2f} GiB for the experts")
        line("logits of drafts", f"{m.draft_logits / GIB:.2f} GiB ({seqs} sequences: --max-num-seqs; {best} drafts each)")
    line("KV cache, 16 bits", f"{m.kv_bytes_per_token / 1024:.1f} KiB per token")
    line(f"KV cache, {arguments.kv_cache_dtype}", f"{m.quantspec_bytes_per_token / 1024:.1f} KiB per token")
    line("recent window, QuantSpec", f"{m.window_bytes_per_request / 2**20:.0f} MiB per running request, at most")
    if model.sliding_layers:
        layers = f"{model.sliding_layers} of {model.num_layers} layers, {model.sliding_window} tokens, 16 bits"
        line("sliding windows", f"{m.sliding_bytes_per_request / 2**20:.0f} MiB per running request ({layers})")
    beside = "" if no_drafts else f", {m.free_with_draft / GIB:.1f} GiB beside what drafting takes"
    line("free for the cache", f"{m.free / GIB:.1f} GiB{beside}")
    if m.free_with_draft == 0 and not (no_drafts and m.free):
        print("\nThe model does not fit; use more GPUs or larger ones.", file=file)
        return
    print(f"\nrequests of {context} tokens that fit", file=file)
    line("16 bits", str(m.requests(context, quantspec=False)))
    fit = m.requests(context, quantspec=True, draft=False)
    line("QuantSpec's cache alone", str(fit))
    if not no_drafts:
        fit = m.requests(context, quantspec=True)
        line("QuantSpec", str(fit))
    if fit < batch:
        line("", f"fewer than --batch {batch}: requests will wait or be preempted")
    print(
        f"\ndecoding {batch} x {context} tokens at {arguments.bandwidth:g} TB/s, predicted (ms per token of each request)",
        file=file,
    )
    if model.linear_bits is not None:
        line("", "for linear layers in 16 bits: how fast a GPU reads this checkpoint in 4 is not measured")
    t = times[best]
    line("16 bits, FlashAttention", f"{t.exact:.2f}")
    line("QuantSpec's cache alone", f"{t.cache:.2f}, {t.exact / t.cache:.2f}x")
    if no_drafts:
        return
    line(
        f"QuantSpec, {best} token{'s' * (best > 1)} drafted",
        f"{t.quantspec:.2f}, {t.exact / t.quantspec:.2f}x at {arguments.acceptance:g} accepted per token "
        f"({t.tokens_per_cycle:.2f} tokens per verification)",
    )
    line("one draft step", f"{t.draft_step:.2f}, {t.exact / t.draft_step:.2f}x less than a step in 16 bits")
    if draft_context != "all":
        read = f"{100 * t.draft_share:.1f} % of the older tokens" if t.draft_share < 1 else "all of the older tokens"
        line("a draft step reads", f"{read} (--draft-context {draft_context})")
    if t.draft_share < 1:
        line("", "fewer such drafts are accepted: give what you measured as --acceptance")
    if model.experts:
        step, verification = model.experts.chosen(batch), model.experts.chosen(batch, best + 1)
        bits = 4 if draft_experts == "int4" else 16
        line(
            "experts read",
            f"{step:.0f} of {model.experts.number} per layer by a draft step, in {bits} bits; "
            f"{verification:.0f} by a verification, in 16",
        )
        if draft_experts == "int4":
            line("", "how fast a GPU reads experts in 4 bits is assumed, not measured")
    if t.quantspec > min(t.exact, t.cache):
        cache = f"--kv-cache-dtype {arguments.kv_cache_dtype}" if page_bits == 4 else "--attention-backend QUANTSPEC"
        print(f"\nDrafting does not pay here; the cache alone ({cache}) may.", file=file)
