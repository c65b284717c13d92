"""A Hadamard rotation of a linear's input channels, in blocks of 32: ``x W^T = (x R) (W R^-T)^T``.

An input channel that is much larger than its neighbours, or such a weight, sets the scale of its whole group. Rotated,
both are spread over their block, and 4 bits lose less, at the same bytes. R is ``H / 8``; H is Sylvester's matrix of 32 rows
(entries 1 and -1, ``H H = 32``): powers of two, so that nothing is rounded but sums. Weights are rotated when they are
quantized, by ``H / 4``; inputs by every kernel that reads such a weight. Larger blocks won nothing (benchmarks/NOTES.md,
"Rotated weights").
"""

from __future__ import annotations

from functools import cache

import torch

SIZE = 32
_INPUTS, _WEIGHTS = 1 / 8, 1 / 4


@cache
def _hadamard(device: torch.device) -> torch.Tensor:
    """float32 [32, 32], entries 1 and -1: Sylvester's, so that it is its own transpose."""
    matrix = torch.ones(1, 1)
    while len(matrix) < SIZE:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix.to(device)


def _rotate(x: torch.Tensor, factor: float) -> torch.Tensor:
    blocks = x.float().unflatten(-1, (-1, SIZE))
    return (blocks @ (_hadamard(x.device) * factor)).flatten(-2)


def rotate_inputs(x: torch.Tensor) -> torch.Tensor:
    """float32 ``x R`` of inputs ``x`` [..., in], any float dtype; ``in`` is divisible by 32."""
    return _rotate(x, _INPUTS)


def rotate_weight(weight: torch.Tensor) -> torch.Tensor:
    """float32 ``W R^-T`` of ``weight`` [..., in]: what rotated inputs are multiplied by."""
    return _rotate(weight, _WEIGHTS)


def rotate_weight_back(weight: torch.Tensor) -> torch.Tensor:
    """The inverse of `rotate_weight`, float32."""
    return _rotate(weight, _INPUTS)


def rotate_moments(moments: torch.Tensor) -> torch.Tensor:
    """The mean of ``x^T x`` over rotated inputs, float32 [in, in], from that over inputs."""
    return rotate_inputs(rotate_inputs(moments).t().contiguous()).t().contiguous()
