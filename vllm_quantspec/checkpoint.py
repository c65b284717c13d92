"""How a checkpoint's linears are quantized, by its ``quantization_config``: those in 4 bits that kernels here read. No vLLM.

Formats: AWQ, GPTQ, compressed-tensors ("pack-quantized") and AutoRound in either of the first two's layouts; 4-bit integers
in groups of 32, 64 or 128 input channels or with a scale per output, with zero points or around 8, and 16-bit activations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

GROUP_SIZES = (32, 64, 128, -1)


@dataclass(frozen=True)
class FourBits:
    """A checkpoint's 4-bit linears: input channels per scale (-1: a scale per output), and whether there are zero points."""

    group_size: int
    has_zeros: bool

    def bits(self, in_features: int) -> float:
        """Of a weight in memory, with its share of a 16-bit scale and of a zero point in 4 bits."""
        return 4 + (16 + 4 * self.has_zeros) / (in_features if self.group_size == -1 else self.group_size)


def four_bits(quantization: dict[str, Any] | None) -> FourBits | str:
    """What a configuration's ``quantization_config`` says, or why its linears cannot be read as they are.

    The reason is the end of a sentence that begins with the checkpoint's name.
    """
    if not quantization:
        return "is not quantized"
    method = str(quantization.get("quant_method", "")).lower().replace("_", "-")
    if method == "compressed-tensors":
        return _compressed(quantization)
    if method in ("gptq", "gptq-marlin", "auto-gptq"):
        found = FourBits(quantization.get("group_size", 0), False)
        symmetric = quantization.get("sym", True)
        if quantization.get("desc_act") and found.group_size != -1:
            return "is in GPTQ's format with act-order (desc_act), whose groups are of channels that do not lie together"
        bits, style = quantization.get("bits"), "integer" if symmetric else "asymmetric GPTQ"
    elif method in ("awq", "awq-marlin", "auto-awq"):
        group = quantization.get("q_group_size", quantization.get("group_size", 0))
        found = FourBits(group, bool(quantization.get("zero_point", True)))
        bits, style = quantization.get("w_bit", quantization.get("bits")), "integer"
    elif method in ("auto-round", "inc", "intel/auto-round"):
        found = FourBits(quantization.get("group_size", 0), not quantization.get("sym", True))
        bits, style = quantization.get("bits"), quantization.get("data_type", "int").replace("int", "integer")
    else:
        return (
            f"is quantized by {method or 'no named method'}, not by AWQ, GPTQ, compressed-tensors or AutoRound in 4 bits"
        )
    return _checked(found, bits, style)


def _compressed(quantization: dict[str, Any]) -> FourBits | str:
    kinds = set()
    for group in (quantization.get("config_groups") or {}).values():
        weights = group.get("weights") or {}
        if group.get("input_activations"):
            return "has quantized activations, too"
        if weights.get("actorder") in ("group", "dynamic"):
            return "has act-order, whose groups are of channels that do not lie together"
        if weights.get("strategy") not in ("group", "channel"):
            return f"has weights quantized per {weights.get('strategy')}"
        size = weights.get("group_size") if weights.get("strategy") == "group" else -1
        found = _checked(
            FourBits(size, not weights.get("symmetric", True)),
            weights.get("num_bits"),
            "integer" if weights.get("type", "int") == "int" else weights["type"],
        )
        if isinstance(found, str):
            return found
        kinds.add(found)
    if len(kinds) != 1:
        return f"has {len(kinds)} kinds of quantized weights in compressed-tensors, not one"
    return kinds.pop()


def _checked(found: FourBits, bits: Any, style: str) -> FourBits | str:
    if bits != 4 or style != "integer":
        return f"has {style} weights of {bits} bits, not integers of 4"
    if found.group_size not in GROUP_SIZES:
        return f"has groups of {found.group_size} input channels, not of 32, 64 or 128, nor one per output"
    return found
