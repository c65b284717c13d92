"""Memory that drafting takes beside weights and KV cache, in plain numbers. No vLLM import."""

from __future__ import annotations

# The texts that GPTQ rounds by: how many, and their tokens (`integration/draft/calibration.py`).
TEXTS, LENGTH = 64, 256
# Bytes of the moments of linears' inputs that are added up at a time; a single linear's may be more.
MOMENTS = 2 << 30
# Of what is left for the KV cache, the share that an INT4 copy of a mixture's experts may take where nobody asked for it.
EXPERTS_SHARE = 0.5
# And the share that 8 bits may take beyond 4, of a draft's linears, where nobody asked for them.
WIDER_SHARE = 0.1


def experts_fit(copy_bytes: float, left_bytes: float) -> bool:
    """Whether drafts have an INT4 copy of a mixture's experts by default: what drafting gains is not worth a small cache.

    Args:
        copy_bytes: of the copy. left_bytes: for the KV cache, without it; both per GPU.
    """
    return copy_bytes <= EXPERTS_SHARE * left_bytes


def draft_logits_bytes(max_num_seqs: int, num_speculative_tokens: int, vocab_size: int, itemsize: int = 2) -> int:
    """Bytes of the logits that vLLM's model runner V2 keeps of every draft, to verify sampled drafts by; per GPU.

    They are allocated when the engine starts, for ``max_num_seqs`` requests whether or not so many ever run, and each rank
    of tensor parallelism has all of them. There are none with ``draft_sample_method: greedy``, and none on a CPU, where the
    probabilities of a step's own drafts are kept and no others.

    Args:
        vocab_size: of the whole model, as its configuration says.
        itemsize: bytes per logit: those of the output layer's dtype (2, or 4 for a model with a float32 head).
    """
    return max_num_seqs * num_speculative_tokens * vocab_size * itemsize


def gptq_bytes(
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    widest: int,
    largest_weight: int,
    tokens: int,
    texts: int = TEXTS,
    length: int = LENGTH,
    itemsize: int = 2,
) -> int:
    """Most bytes, roughly and at once, that ``weight_rounding: gptq`` takes beside weights and INT4 copy; per GPU.

    Only while the engine loads: all of it is free again before vLLM measures what is left for the KV cache. It is the sum of

    - the texts' keys and values, ``2 * num_layers * texts * length * num_kv_heads * head_size * itemsize``;
    - moments of linears' inputs, `MOMENTS`, or ``4 * widest ** 2`` where a linear has more;
    - one linear at a time: its moments' inverse, ``4 * 4 * widest ** 2``, and its weight in float32 three times over,
      ``12 * largest_weight`` (parts of 2^28 weights are rounded at a time);
    - or, where that is more, a forward pass of ``tokens``: an input in float32, ``4 * tokens * widest``, activations of
      about ``4 * tokens * widest * itemsize``, and one attention layer's scores, ``8 * tokens * num_heads * length``.

    Args:
        num_heads, num_kv_heads, widest, largest_weight: of this rank: heads, the most input channels of a linear, and the
            elements of the largest weight.
        tokens: of a step of the engine, ``max_num_batched_tokens``: no forward pass has more.
        itemsize: bytes of the model's dtype.
    """
    caches = 2 * num_layers * texts * length * num_kv_heads * head_size * itemsize
    moments = max(MOMENTS, 4 * widest**2)
    linear = 16 * widest**2 + 12 * min(largest_weight, 1 << 28)
    tokens = min(tokens, texts * length)
    forward = 4 * tokens * (widest * (1 + itemsize) + 2 * num_heads * length)
    return caches + moments + max(linear, forward)
