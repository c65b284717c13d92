"""Rotary positions of drafted tokens, in models that give a token several of them (M-RoPE).

Qwen-VL and GLM-V number the tokens of an image by time, height and width, so that text behind it goes on from the largest
of these numbers and not from the number of tokens. A generated token is text: all its numbers are alike, its plain position
plus the request's *delta*, which vLLM works out from the prompt. The rotary embedding alone sees them; lengths, pages,
slots and seeds go by plain positions.
"""

from __future__ import annotations

import torch
from vllm.config import ModelConfig


class RotaryPositions:
    """Called with plain positions int64 [n]: the rotary ones, int64 [num_dims, n], in a buffer that stays where it is.

    Args:
        num_dims: how many positions a token has, 3 or more.
        max_tokens: the most tokens of a draft step.
    """

    def __init__(self, num_dims: int, max_tokens: int, device: torch.device) -> None:
        self.deltas = torch.zeros(max_tokens, dtype=torch.int64, device=device)
        # A column that is never used: torch.compile must see rows apart from each other, as in vLLM's own buffer.
        self._positions = torch.zeros(num_dims, max_tokens + 1, dtype=torch.int64, device=device)

    def set_deltas(self, deltas: torch.Tensor) -> None:
        """From now on row i is of a request with ``deltas[i]``, an integer [num_requests]; rows behind them have 0."""
        self.deltas.zero_()
        self.deltas[: len(deltas)] = deltas

    def __call__(self, positions: torch.Tensor) -> torch.Tensor:
        rotary = self._positions[:, : len(positions)]
        return torch.add(positions.expand_as(rotary), self.deltas[: len(positions)], out=rotary)


def make_rotary_positions(model_config: ModelConfig, max_tokens: int, device: torch.device) -> RotaryPositions | None:
    """None for a model whose rotary embedding, if it has one, takes plain positions."""
    if not model_config.uses_mrope:
        return None
    return RotaryPositions(model_config.mrope_num_dims, max_tokens, device)
