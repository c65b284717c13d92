"""Levels of codes: what 8 bits stand for, and that rounding finds the nearest."""

import pytest
import torch

from vllm_quantspec import levels


def test_8_bit_levels_are_bfloat16_numbers():
    codes = torch.arange(256)
    as_bfloat16 = (0x4300 | codes).to(torch.int16).view(torch.bfloat16).float()
    assert torch.equal(levels.levels(codes.to(torch.uint8), 8), as_bfloat16)
    assert as_bfloat16[0] == levels.lowest(8) and as_bfloat16[-1] - as_bfloat16[0] == levels.span(8)


@pytest.mark.parametrize("bits", levels.BITS)
def test_codes_and_levels_are_each_others_inverse(bits):
    codes = torch.arange(2**bits, dtype=torch.uint8)
    level = levels.levels(codes, bits)
    assert torch.equal(levels.codes(level, bits), codes)
    assert torch.equal(levels.nearest(level.clone(), bits), level)


@pytest.mark.parametrize("bits", levels.BITS)
def test_nearest(bits):
    every = levels.levels(torch.arange(2**bits, dtype=torch.uint8), bits)
    x = torch.rand(20000, generator=torch.Generator().manual_seed(0)) * (levels.span(bits) + 60) + levels.lowest(bits) - 30
    found = levels.nearest(x.clone(), bits)
    assert torch.isin(found, every).all()
    torch.testing.assert_close((found - x).abs(), (every - x[:, None]).abs().amin(1), rtol=0, atol=1e-4)
