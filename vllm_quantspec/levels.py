"""What a weight's code stands for, in 4 and in 8 bits: a weight reads back as ``(level(code) - level(zero)) * scale``.

4 bits: the level is the code, 0..15. 8 bits: the code is the last byte of a bfloat16 from 128 to 510, whose first byte is
always 0x43: ``128 + code`` below code 128 and ``2 * code`` from it on. A kernel then needs one instruction to make two
bfloat16 numbers of two codes, where evenly spaced levels need several (bfloat16 has no more than 128 evenly spaced numbers
of one exponent). Steps are 1 below 256 and 2 above: with a symmetric range, whose zero is level 319, the squared error is
about 1.5 times that of 256 even steps, and 170 times less than that of 16.

Zero points are codes as well, so that they are exact in every 16-bit dtype, and so is a weight of zero.
"""

from __future__ import annotations

import torch

BITS = (4, 8)
_LOWEST, _HIGHEST = {4: 0, 8: 128}, {4: 15, 8: 510}
# Where 8-bit steps become twice as wide.
_WIDER = 256
ROUNDER = 1.5 * 2**23


def span(bits: int) -> int:
    """The highest level less the lowest one."""
    return _HIGHEST[bits] - _LOWEST[bits]


def lowest(bits: int) -> int:
    return _LOWEST[bits]


def levels(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """float32 levels of uint8 codes."""
    codes = codes.float()
    return codes if bits == 4 else torch.maximum(codes + 128, 2 * codes)


def codes(levels: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 codes of levels (any float dtype)."""
    return (levels if bits == 4 else torch.where(levels < _WIDER, levels - 128, levels / 2)).to(torch.uint8)


def nearest(x: torch.Tensor, bits: int) -> torch.Tensor:
    """The level nearest to each ``x``, float32 below 2^22; x is overwritten."""
    if bits == 8:
        # One step of 2 above: x is halved before it becomes a whole number, and doubled again.
        step = 1 + (x >= _WIDER).float()
        x = round_whole(x.div_(step)).mul_(step)
    else:
        x = round_whole(x)
    return x.clamp_(_LOWEST[bits], _HIGHEST[bits])


def round_whole(x: torch.Tensor) -> torch.Tensor:
    """``x`` (float32, below 2^22) rounded to integers in place; Tensor.round_ wakes every thread for a few elements."""
    return x.add_(ROUNDER).sub_(ROUNDER)
