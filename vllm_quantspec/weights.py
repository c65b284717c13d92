"""Asymmetric rounding of linear weights to 4 or 8 bits.

A group of ``group_size`` consecutive input channels of one output row shares a scale ``s`` and a zero point ``z``, which is
one of the codes, and a weight reads back as ``(level(code) - level(z)) * s``. In 4 bits levels are the codes, which is what
every mixed-precision kernel of vLLM takes; those of 8 bits are in levels.py.
Codes are always computed against the scale *as stored* (16 bits), so its rounding costs no accuracy twice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_quantspec import levels, rotation

METHODS = ("search", "nearest", "gptq")
WEIGHT_GROUP_SIZES = (128, 64, 32)
_MAX_CODE = 15


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight of shape [out, in] in 4 or 8 bits.

    codes: uint8 [out, in], 0..15 in 4 bits and 0..255 in 8.
    scales: 16-bit float [out, in / group_size].
    zeros: uint8 [out, in / group_size], codes as well.
    rotated: whether it is the weight of rotated inputs, see `vllm_quantspec.rotation`.
    bits: 4 or 8, see `vllm_quantspec.levels`.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    group_size: int
    rotated: bool = False
    bits: int = 4

    def dequantize(self) -> torch.Tensor:
        """float32 [out, in]: ``(level - zero's level) * scale``, rotated back: the weight of inputs as they are."""
        out_features, in_features = self.codes.shape
        level = levels.levels(self.codes.view(out_features, -1, self.group_size), self.bits)
        weight = (level - levels.levels(self.zeros.unsqueeze(-1), self.bits)) * self.scales.unsqueeze(-1).float()
        weight = weight.view(out_features, in_features)
        return rotation.rotate_weight_back(weight) if self.rotated else weight


def fit_group_size(in_features: int, group_size: int = 128) -> int | None:
    """The largest supported group size that is at most ``group_size`` and divides ``in_features``, or None."""
    return next((g for g in WEIGHT_GROUP_SIZES if g <= group_size and in_features % g == 0), None)


def quantize_weight(
    weight: torch.Tensor,
    group_size: int = 128,
    *,
    method: str = "search",
    scale_dtype: torch.dtype | None = None,
    second_moments: torch.Tensor | None = None,
    rotated: bool = False,
    bits: int = 4,
) -> QuantizedWeight:
    """Round ``weight`` to 4 or 8 bits.

    Args:
        weight: [out, in], any float dtype.
        group_size: input channels that share a scale; must divide ``in``.
        method: ``"nearest"`` spans each group's full range; ``"search"`` also tries narrower ranges, fits the scale to
            the codes by least squares, and keeps what has the smallest squared error; ``"gptq"`` searches too, and lets
            the channels still to be rounded make up for the error of those that are. In 8 bits a narrower range wins
            nothing: ``"search"`` is ``"nearest"`` there, and GPTQ's groups span their full range.
        scale_dtype: dtype of the stored scales, by default the weight's (float16 if that is not a 16-bit dtype).
        second_moments: float32 [in, in], the mean of ``x x^T`` over inputs x of the layer: needed by ``"gptq"`` only.
        rotated: round the weight of rotated inputs (`vllm_quantspec.rotation`). Weight and moments are given as they are.
        bits: of a code, 4 or 8.

    Raises:
        ValueError: an unknown method or number of bits, a group size that does not divide ``in`` (or, rotated, is not
            divisible by 32), or ``"gptq"`` without moments.
    """
    if method not in METHODS:
        raise ValueError(f"Unknown rounding method {method!r}; use one of {METHODS}.")
    if bits not in levels.BITS:
        raise ValueError(f"A weight is rounded to 4 or 8 bits, not {bits}.")
    out_features, in_features = weight.shape
    if group_size <= 0 or in_features % group_size:
        raise ValueError(f"group_size {group_size} does not divide the weight's {in_features} input channels.")
    if rotated and group_size % rotation.SIZE:
        raise ValueError(f"group_size {group_size} is not made of the {rotation.SIZE} channels that are rotated together.")
    if method == "gptq" and (second_moments is None or second_moments.shape != (in_features, in_features)):
        raise ValueError(f"method 'gptq' needs second_moments of shape [{in_features}, {in_features}].")
    if scale_dtype is None:
        scale_dtype = weight.dtype if weight.dtype.itemsize == 2 else torch.float16

    groups = in_features // group_size
    codes = torch.empty(out_features, in_features, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(out_features, groups, dtype=scale_dtype, device=weight.device)
    zeros = torch.empty(out_features, groups, dtype=torch.uint8, device=weight.device)
    if method == "gptq":
        second_moments = second_moments.float()
        second_moments = rotation.rotate_moments(second_moments) if rotated else second_moments
        # All groups that come later make up for a group's error: those with the largest inputs go first.
        order = second_moments.diagonal().view(groups, group_size).sum(-1).argsort(descending=True, stable=True)
        channels = (order[:, None] * group_size + torch.arange(group_size, device=order.device)).flatten()
        second_moments = second_moments[channels][:, channels]
        feedback = _error_feedback(second_moments)

    # GPTQ goes channel by channel, so that its time is that of a chunk, whatever the number of rows.
    rows = max(1, (1 << 28 if method == "gptq" else _chunk_elements(weight)) // in_features)
    for start in range(0, out_features, rows):
        part = slice(start, min(start + rows, out_features))
        x = rotation.rotate_weight(weight[part]) if rotated else weight[part].float()
        x = x.view(-1, groups, group_size)
        if method == "gptq":
            back = order.argsort()
            ordered = _gptq(x[:, order], feedback, second_moments.diagonal(), scale_dtype, bits)
            level, scale, zero = (t[:, back] for t in ordered)
        else:
            scale, zero = _range(x, None, scale_dtype, bits, search=method == "search")
            level = _round(x, scale, zero, bits)
        codes[part] = levels.codes(level.reshape(-1, in_features), bits)
        scales[part] = scale.squeeze(-1).to(scale_dtype)
        zeros[part] = levels.codes(zero.squeeze(-1), bits)
    return QuantizedWeight(codes, scales, zeros, group_size, rotated, bits)


def _chunk_elements(weight: torch.Tensor) -> int:
    """Elements to handle at a time: enough to fill a GPU, and what fits a CPU's caches."""
    if weight.device.type != "cpu":
        return 1 << 25
    # Below 2^15 elements torch runs an operation on one thread, which is faster for a small weight on busy cores.
    return (1 << 15) - 1 if weight.numel() <= 1 << 22 else 1 << 18


def _range(
    x: torch.Tensor, importance: torch.Tensor | None, dtype: torch.dtype, bits: int, search: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and level of zero for each group of ``x``, each [rows, groups, 1]."""
    # Here, because kernels import this module.
    from vllm_quantspec.kernels import search_range

    if not search or bits != 4:
        return search_range.full_range(x, dtype, bits)
    rows, groups, size = x.shape
    if not x.is_cuda or size & (size - 1):
        return search_range.reference(x, importance, dtype)
    found = search_range.search_range(x.view(-1, size) if groups > 1 else x[:, 0], importance, dtype)
    return tuple(t.view(rows, groups, 1) for t in found)


def _round(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int) -> torch.Tensor:
    """The levels nearest to ``x``."""
    if bits == 4:
        return levels.round_whole(x / scale).add_(zero).clamp_(0, _MAX_CODE)
    return levels.nearest((x / scale).add_(zero), bits)


def _error_feedback(second_moments: torch.Tensor) -> torch.Tensor:
    """Upper Cholesky factor of the inverse of the damped moments: row i spreads channel i's error over later ones."""
    moments = second_moments.clone()
    moments.diagonal().add_(0.01 * moments.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moments))
    return torch.linalg.cholesky(inverse, upper=True).contiguous()  # LAPACK's order is by columns


def _gptq(
    x: torch.Tensor, feedback: torch.Tensor, importance: torch.Tensor, dtype: torch.dtype, bits: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Levels [rows, groups, group_size], scales and zeros [rows, groups, 1] of weights x, which are overwritten."""
    # Here, because kernels import this module.
    from vllm_quantspec.kernels import gptq_round

    round_group = gptq_round.round_group if x.is_cuda else gptq_round.reference
    _, groups, size = x.shape
    rest = x.view(len(x), -1)
    rounded, scales, zeros = torch.empty_like(x), x.new_empty(len(x), groups, 1), x.new_empty(len(x), groups, 1)
    for group in range(groups):
        start, end = group * size, (group + 1) * size
        block = x[:, group : group + 1]
        weights = importance[start:end].float().clamp_min(1e-12)
        scale, zero = (t[:, 0] for t in _range(block, weights, dtype, bits))
        rounded[:, group], errors = round_group(rest[:, start:end], feedback[start:end, start:end], scale, zero, bits)
        rest[:, end:].addmm_(errors, feedback[start:end, end:], alpha=-1)
        scales[:, group], zeros[:, group] = scale, zero
    return rounded, scales, zeros
