"""What the draft's own weights take."""

from __future__ import annotations

from vllm_quantspec.config import QuantSpecOptions
from vllm_quantspec.estimate.sizes import Model

# A 16-bit scale and zero point per group of weights.
INT4_BITS, INT8_BITS = (bits + 32 / QuantSpecOptions.weight_group_size for bits in (4, 8))


def draft_bytes(model: Model, draft_experts: str, wide_share: float) -> float:
    """Bytes of the draft's own weights, on all GPUs together; arguments as of `memory`."""
    wider = model.linear_weights * wide_share * (INT8_BITS - INT4_BITS)
    return (model.int4_weights(draft_experts) * INT4_BITS + wider) / 8


def int4_experts_bytes(model: Model) -> float:
    """Of a mixture: bytes of its INT4 experts, on all GPUs together."""
    return model.experts.int4_weights * INT4_BITS / 8


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
