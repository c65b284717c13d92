"""What a GPU has to hold, and how many requests fit."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_quantspec.config import QuantSpecOptions
from vllm_quantspec.estimate.draft_weights import INT4_BITS, INT8_BITS, draft_bytes, int4_experts_bytes
from vllm_quantspec.estimate.sizes import Model
from vllm_quantspec.format import PageFormat, window_blocks_per_request
from vllm_quantspec.memory import draft_logits_bytes, experts_fit

GIB = 2**30
# vLLM's default of --max-num-seqs, from so many GiB of a GPU on and below.
LARGE_GPU_GIB, MAX_NUM_SEQS = 70, (1024, 256)


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


def why_no_int4_experts(model: Model, quantized: bool, free: float, tensor_parallel_size: int) -> str | None:
    """Why an engine that names no ``draft_experts`` drafts on the target's; None if it has INT4 ones, or is no mixture's.

    Args:
        quantized: whether the checkpoint is. free: bytes for the cache on a GPU, without drafting.
    """
    if model.experts is None:
        return None
    if quantized:
        return "they are quantized already"
    copy = int4_experts_bytes(model) / tensor_parallel_size
    if experts_fit(copy, free):
        return None
    return f"a copy of {copy / GIB:.1f} GiB would take more than half of what is left for the cache"


def default_max_num_seqs(gpu_memory: float) -> int:
    """vLLM's ``--max-num-seqs`` on a GPU of ``gpu_memory`` bytes (but an A100, of which it runs 256, too)."""
    return MAX_NUM_SEQS[gpu_memory < LARGE_GPU_GIB * GIB]
