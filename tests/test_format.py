"""The page: byte order against the specification nibble by nibble, offsets, and the error bounds of quantization."""

import pytest
import torch

from vllm_quantspec.format import (
    PageFormat,
    dequantize_keys,
    dequantize_values,
    encode_pages,
    pack_key_codes,
    pack_value_codes,
    permute_scales,
    permute_value_scales,
    quantize_keys,
    quantize_values,
    unpack_key_codes,
    unpack_value_codes,
    unpermute_scales,
    unpermute_value_scales,
    window_start,
)

HEAD_SIZES = [32, 64, 96, 128, 256]
GROUP_SIZES = [64, 128]


def test_window_start():
    starts = {0: 0, 63: 0, 64: 0, 127: 0, 128: 64, 191: 64, 192: 128, 1000: 896}
    assert {position: window_start(position, 64) for position in starts} == starts
    assert [window_start(p, 128) for p in (0, 255, 256, 1000)] == [0, 0, 128, 768]
    positions = torch.tensor([list(starts)], dtype=torch.int32)
    got = window_start(positions, 64)
    assert got.dtype == torch.int32 and got.tolist() == [list(starts.values())]


@pytest.mark.parametrize("wrong", [0, 16, "target"])
def test_wrong_bits_are_refused(wrong):
    with pytest.raises(ValueError, match="bits must be 4 or 8, got"):
        PageFormat(3, 64).bytes_per_token(wrong)
    with pytest.raises(ValueError, match="bits must be 4 or 8, got"):
        PageFormat(3, 64, bits=wrong)
    with pytest.raises(ValueError, match="bits must be 4, as the page has no more, got 8"):
        PageFormat(3, 64, bits=4).check_bits(8)


def random_codes(*shape):
    return torch.randint(0, 16, shape, dtype=torch.uint8)


@pytest.mark.parametrize("group", GROUP_SIZES)
@pytest.mark.parametrize("dim", HEAD_SIZES)
def test_codes_round_trip(dim, group):
    codes = random_codes(3, 2, group, dim)
    for pack, unpack in ((pack_key_codes, unpack_key_codes), (pack_value_codes, unpack_value_codes)):
        packed = pack(codes)
        assert packed.shape == (3, 2, group * dim // 2)
        assert torch.equal(unpack(packed, dim), codes)


@pytest.mark.parametrize("dim, group", [(64, 128), (96, 64)])
def test_byte_order_is_the_specified_one(dim, group):
    """Every stored nibble, written out from the specification."""
    codes = random_codes(group, dim)
    keys, values, x = pack_key_codes(codes).tolist(), pack_value_codes(codes).tolist(), codes.tolist()
    for token_tile in range(group // 32):
        for channel_tile in range(dim // 32):
            for lane in range(32):
                g, t = lane // 4, lane % 4
                for y in range(4):
                    word = ((token_tile * (dim // 32) + channel_tile) * 32 + lane) * 4 + y
                    for nibble in range(8):
                        e, par, b = nibble // 4, nibble // 2 % 2, nibble % 2
                        byte, shift = word * 4 + nibble // 2, 4 * (nibble % 2)
                        row, column = y * 8 + g, par * 16 + b * 8 + t * 2 + e
                        assert keys[byte] >> shift & 15 == x[token_tile * 32 + row][channel_tile * 32 + column]
                        assert values[byte] >> shift & 15 == x[token_tile * 32 + column][channel_tile * 32 + row]


def test_scale_order_is_the_specified_one():
    dim, group, groups = 96, 64, 2
    key_scales, value_scales = torch.randn(dim), torch.randn(group, groups)
    keys, values = permute_scales(key_scales), permute_value_scales(value_scales)
    for t in range(4):
        for h in range(2):
            for e in range(2):
                for s in range(dim // 16):
                    assert keys[((t * (dim // 16) + s) * 2 + h) * 2 + e] == key_scales[s * 16 + h * 8 + t * 2 + e]
                for s in range(group // 16):
                    for vg in range(groups):
                        stored = (((vg * 4 + t) * (group // 16) + s) * 2 + h) * 2 + e
                        assert values[stored] == value_scales[s * 16 + h * 8 + t * 2 + e, vg]
    assert torch.equal(unpermute_scales(keys), key_scales)
    assert torch.equal(unpermute_value_scales(values, group), value_scales)


@pytest.mark.parametrize("group", GROUP_SIZES)
@pytest.mark.parametrize("dim", HEAD_SIZES)
def test_offsets(dim, group):
    fmt = PageFormat(3, dim, group)
    names = ["k_upper", "v_upper", "k_scale", "k_min", "v_scale", "v_min", "k_lower", "v_lower"]
    assert list(fmt.field_ranges) == names
    ends = 0
    for name, (first, end) in fmt.field_ranges.items():
        assert first == ends and first % 16 == 0
        per_value = {"k_scale": dim, "k_min": dim, "v_scale": group * dim // fmt.value_group_size}
        per_value["v_min"] = per_value["v_scale"]
        assert end - first == 2 * per_value[name] if name in per_value else group * dim // 2
        ends = end
    assert fmt.head_bytes == ends and fmt.head_bytes % 16 == 0
    assert fmt.page_bytes == 3 * fmt.head_bytes
    assert fmt.draft_bytes == fmt.field_ranges["k_lower"][0]
    assert fmt.bytes_per_token() == fmt.page_bytes / group
    assert fmt.bytes_per_token(4) == 3 * fmt.draft_bytes / group
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        size = PageFormat(3, dim, group, dtype).window_block_size
        assert group % size == 0 and size * 2 * dim * dtype.itemsize <= fmt.head_bytes
        assert 2 * size * 2 * dim * dtype.itemsize > fmt.head_bytes


@pytest.mark.parametrize("group", GROUP_SIZES)
@pytest.mark.parametrize("dim", HEAD_SIZES)
def test_a_page_of_4_bits_is_what_the_draft_reads_of_one_of_8(dim, group):
    whole, half = PageFormat(3, dim, group), PageFormat(3, dim, group, bits=4)
    assert list(half.field_ranges.items()) == list(whole.field_ranges.items())[:6]
    assert half.head_bytes == half.draft_bytes == whole.draft_bytes
    assert half.bytes_per_token() == half.bytes_per_token(4) == whole.bytes_per_token(4)
    assert group % half.window_block_size == 0 and whole.window_block_size == 2 * half.window_block_size
    keys, values = torch.randn(2, 2, group, 3, dim)
    pages = [encode_pages(fmt, keys, values) for fmt in (half, whole)]
    for name in half.field_ranges:
        same = torch.equal(*(fmt.field(page, name) for fmt, page in zip((half, whole), pages, strict=True)))
        assert same == (name not in KEPT), name


KEPT = ("k_scale", "k_min")  # see `format._keep_spread`


def test_known_sizes():
    assert PageFormat(8, 128, bits=4).bytes_per_token() == 1088
    fmt = PageFormat(8, 128, 128, torch.bfloat16)
    assert (fmt.code_bytes, fmt.head_bytes, fmt.draft_bytes) == (8192, 33792, 17408)
    assert (fmt.window_block_size, fmt.value_group_size) == (64, 128)
    assert fmt.bytes_per_token() == 8 * 264
    assert [PageFormat(1, d, g).value_group_size for d, g in ((64, 128), (96, 64), (256, 128))] == [64, 48, 128]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((0, 64), "num_kv_heads"),
        ((1, 80), "multiple of 32"),
        ((1, 64, 32), "64 or 128"),
        ((1, 64, 128, torch.float64), "bfloat16, float16 or float32"),
    ],
)
def test_unsupported_arguments_say_so(arguments, message):
    with pytest.raises(ValueError, match=message):
        PageFormat(*arguments)


def error_bounds(x, upper, lower, scale, minimum, low, high):
    """Draft within s/2, target within s/16, within s/32 unless the residual's code saturates at 7; plus fp16 rounding.

    The arguments are fp32 and broadcast against x. The residual lies in [-8, 8] steps of s/16, its code in -8..7: the
    topmost half step saturates.
    """
    draft, target = upper * scale + minimum, (16 * upper + lower - 8) * scale / 16 + minimum
    rounding = (minimum - low).abs() + 15 * (scale - (high - low) / 15).abs() + 1e-5 * x.abs()
    assert ((draft - x).abs() <= scale / 2 + rounding).all()
    assert ((target - x).abs() <= scale / 16 + rounding).all()
    fine = (lower < 15) & (lower > 0)
    assert ((target - x).abs() <= scale / 32 + 1e-5 * x.abs())[fine].all()
    assert fine.float().mean() > 0.8


@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_error_bounds(dtype, scale):
    x = torch.randn(4, 128, 96) * scale
    x[..., ::7] += 20 * scale  # outlier channels
    x = x.to(dtype)
    upper, lower, s, z = quantize_keys(x)
    x = x.float()
    low, high = x.aminmax(dim=-2, keepdim=True)
    error_bounds(x, upper.float(), lower.float(), s.float()[..., None, :], z.float()[..., None, :], low, high)

    upper, lower, s, z = (t.float() for t in quantize_values(x, 48))
    parts = [t.unflatten(-1, (2, 48)) for t in (x, upper, lower)]
    low, high = parts[0].aminmax(dim=-1, keepdim=True)
    error_bounds(*parts, s[..., None], z[..., None], low, high)


def test_dequantize_is_the_formula():
    x = torch.randn(2, 64, 96)
    upper, lower, s, z = (t.float() for t in quantize_keys(x))
    assert torch.equal(dequantize_keys(upper, None, s, z), upper * s[:, None] + z[:, None])
    torch.testing.assert_close(dequantize_keys(upper, lower, s, z), (16 * upper + lower - 8) * s[:, None] / 16 + z[:, None])
    upper, lower, s, z = (t.float() for t in quantize_values(x, 48))
    wide_s, wide_z = (t.repeat_interleave(48, dim=-1) for t in (s, z))
    assert torch.equal(dequantize_values(upper, None, s, z), upper * wide_s + wide_z)
    torch.testing.assert_close(dequantize_values(upper, lower, s, z), (16 * upper + lower - 8) * wide_s / 16 + wide_z)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_first_key_of_a_sequence_is_on_a_code(dtype):
    """Read in 4 bits it is itself, up to the minimum's fp16; the others are within half a step, and nothing else changes."""
    torch.manual_seed(0)
    x = torch.randn(6, 128, 64).to(dtype) * torch.rand(64) * 20
    x[:, 0] *= 3
    x[5, :, 3] = 1.5  # a channel without a range
    is_first = torch.tensor([True, False, True, False, True, True])
    upper, lower, scale, minimum = quantize_keys(x, is_first)
    plain = quantize_keys(x)
    assert torch.equal(scale, plain[2])
    for mine, other in zip((upper, lower, minimum), (plain[0], plain[1], plain[3]), strict=True):
        assert torch.equal(mine[~is_first], other[~is_first]) and not torch.equal(mine[is_first], other[is_first])
    error = (dequantize_keys(upper, None, scale, minimum) - x.float()).abs()
    assert (error[is_first][:, 0] <= minimum[is_first].float().abs() * 2**-11 + 1e-6).all()
    assert (error <= 0.5 * scale.float()[:, None] + x.float().abs().amax() * 2**-10).all()
    error = (dequantize_keys(upper, lower, scale, minimum) - x.float()).abs()
    assert (error <= scale.float()[:, None] / 16 + minimum.float().abs()[:, None] * 2**-10).all()


@pytest.mark.parametrize("group", GROUP_SIZES)
def test_pages_of_4_bits_keep_the_spread_of_keys(group):
    """Rounding adds a twelfth of a step squared to a channel's variance, which pages of 8 bits have in their lower codes."""
    torch.manual_seed(0)
    x = torch.randn(64, group, 64) * torch.rand(64) * 5 + torch.randn(64)
    x[..., 3] = 1.5  # a channel without a range
    is_first = torch.arange(64) == 0
    four, eight = (dequantize_keys(u, None, s, z) for u, _, s, z in (quantize_keys(x, is_first, bits) for bits in (4, 8)))
    more = [(read.var(1) / x.var(1))[:, torch.arange(64) != 3].mean() - 1 for read in (four, eight)]
    assert more[1] > 3e-3 and abs(more[0]) < 0.1 * more[1]
    torch.testing.assert_close(four[1:].mean(1), eight[1:].mean(1), rtol=0, atol=1e-2)  # fp16 minima
    first = four[0, 0] - x[0, 0]  # is on a code, up to two roundings of the minimum
    assert (first.abs() <= quantize_keys(x, is_first, 4)[3][0].float().abs() * 2**-10 + 1e-6).all()
    assert (four - x).square().mean() < 1.02 * (eight - x).square().mean()
    assert torch.equal(four[..., 3], x[..., 3])


def test_constant_groups():
    """A group without a range has scale 0: codes 0 and 8, and reads as its (fp16) value."""
    x = torch.randn(2, 64, 64)
    x[..., 5] = 4001.0  # between two fp16 numbers
    upper, lower, s, z = quantize_keys(x)
    assert (s[..., 5] == 0).all() and (upper[..., 5] == 0).all() and (lower[..., 5] == 8).all()
    assert (dequantize_keys(upper, lower, s, z)[..., 5] - 4001).abs().max() <= 1


def test_huge_values_stay_finite():
    x = torch.randn(2, 64, 64) * 1e6
    for upper, lower, s, z in (quantize_keys(x), quantize_keys(x, bits=4), quantize_values(x, 64)):
        assert s.isfinite().all() and z.isfinite().all()
        assert upper.max() <= 15 and lower.max() <= 15
