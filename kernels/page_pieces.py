"""A piece of a page's head from exact values to bytes, in a Triton kernel: what `format.encode_pages` computes.

A page is cut into 32 channels of keys and 32 tokens of values at a time: what a row or a column of tiles holds.
"""

from vllm_quantspec.kernels.launch import jit, tl


@jit
def _scale_and_minimum(low, high):
    scale = tl.minimum(tl.div_rn(high - low, 15.0), 65504.0).to(tl.float16)
    minimum = tl.minimum(tl.maximum(low, -65504.0), 65504.0).to(tl.float16)
    return scale, minimum


@jit
def _divide(x, divisor, reciprocal):
    """x / divisor, correctly rounded as long as `reciprocal` is (Markstein), without a division per element."""
    quotient = x * reciprocal
    return tl.fma(tl.fma(-quotient, divisor, x), reciprocal, quotient)


@jit
def _on_a_code(x, scale, minimum):
    """The minimum moved by up to half a step, so that `x` fp32, one per scale, is on a code: see `format.quantize_keys`."""
    MAGIC: tl.constexpr = 12582912.0  # as in `_codes`
    s, z = scale.to(tl.float32), minimum.to(tl.float32)
    divisor = tl.where(s == 0, 1.0, s)
    residual = tl.minimum(tl.maximum(x - z, 0.0), s * 15.0)
    code = (_divide(residual, divisor, tl.div_rn(1.0, divisor)) + MAGIC) - MAGIC
    return tl.minimum(tl.maximum(x - code * s, -65504.0), 65504.0).to(tl.float16)


@jit
def _codes(x, scale, minimum):
    """16 * upper + lower code as uint8, of x fp32 and the stored scale and minimum, which are broadcast to it."""
    MAGIC: tl.constexpr = 12582912.0  # 1.5 * 2^23: adding it rounds to an integer, ties to even, which is in the low bits
    s, z = scale.to(tl.float32), minimum.to(tl.float32)
    divisor = tl.where(s == 0, 1.0, s)
    reciprocal = tl.div_rn(1.0, divisor)
    # These limits have the codes of whatever lies outside, and need no clamping of `upper`, nor of `lower` below. With a
    # scale of 0 the residual is 0, and so are both codes.
    residual = tl.minimum(tl.maximum(x - z, s * -0.5), s * 15.46875)
    upper = (_divide(residual, divisor, reciprocal) + MAGIC) - MAGIC
    lower = _divide(residual - upper * s, divisor * 0.0625, reciprocal * 16.0)
    lower = tl.minimum(lower, 7.0) + (MAGIC + 8.0)
    return tl.fma(upper, 16.0, lower).to(tl.int32, bitcast=True).to(tl.uint8)


@jit
def _keep_spread(codes, scale, minimum, is_first, G: tl.constexpr):
    """Scale and minimum by which the upper of `codes` [G, channels] have the keys' variance: see `format._keep_spread`."""
    upper = (codes >> 4).to(tl.float32)
    total = tl.sum(upper, axis=0)
    spread = G * tl.sum(upper * upper, axis=0) - total * total
    more = tl.where(spread == 0, 0.0, tl.div_rn(G * G / 24.0, tl.where(spread == 0, 1.0, spread)))
    s = scale.to(tl.float32)
    kept = (s * (1.0 - tl.minimum(more, 0.03125))).to(tl.float16)
    center = total * (1.0 / G)
    if is_first:
        center = tl.sum(tl.where(tl.arange(0, G)[:, None] == 0, upper, 0.0), axis=0)
    moved = minimum.to(tl.float32) + (s - kept.to(tl.float32)) * center
    return kept, tl.minimum(moved, 65504.0).to(tl.float16)


@jit
def _pack(codes):
    """16 * upper + lower [..., 2], the last dim for the nibbles, -> flat bytes of upper and of lower codes."""
    even, odd = tl.split(codes)
    upper = (even >> 4) | (odd & 0xF0)
    lower = (even & 15) | (odd << 4)
    return tl.ravel(upper), tl.ravel(lower)


@jit
def quantize_keys(
    x, out, piece, is_first, D: tl.constexpr, G: tl.constexpr, DRAFT_BYTES: tl.constexpr, PAGE_BITS: tl.constexpr
):
    """Quantize 32 channels x [G, 32] of a page's head at `out`: column `piece` of the tiles. `is_first`: of a sequence."""
    scale, minimum = _scale_and_minimum(tl.min(x, axis=0), tl.max(x, axis=0))
    if is_first:
        sink = tl.sum(tl.where(tl.arange(0, G)[:, None] == 0, x, 0.0), axis=0)
        minimum = _on_a_code(sink, scale, minimum)
    codes = _codes(x, scale[None, :], minimum[None, :])
    if PAGE_BITS == 4:
        scale, minimum = _keep_spread(codes, scale, minimum, is_first, G)

    column = tl.arange(0, 32)  # par, b, t, e
    at = (column // 2) % 4 * (D // 4) + (piece * 2 + column // 16) * 4 + (column // 8) % 2 * 2 + column % 2
    scales = (out + G * D).to(tl.pointer_type(tl.float16)) + at
    tl.store(scales, scale)
    tl.store(scales + D, minimum)

    # (tq, y, g, par, b, t, e) -> (tq, g, t, y, e, par, b)
    upper, lower = _pack(tl.permute(tl.reshape(codes, (G // 32, 4, 8, 2, 2, 4, 2)), (0, 2, 5, 1, 6, 3, 4)))
    byte = tl.arange(0, G * 16)
    at = out + byte // 512 * (D * 16) + piece * 512 + byte % 512
    tl.store(at, upper)
    if PAGE_BITS == 8:
        tl.store(at + DRAFT_BYTES, lower)


@jit
def quantize_values(
    x,
    out,
    piece,
    D: tl.constexpr,
    DP: tl.constexpr,
    G: tl.constexpr,
    VG: tl.constexpr,
    DRAFT_BYTES: tl.constexpr,
    PAGE_BITS: tl.constexpr,
):
    """Quantize 32 tokens x [32, DP] of a page's head at `out`: column `piece` of the tiles. Channels from D on are 0."""
    token = tl.arange(0, 32)  # par, b, t, e
    at = (token // 2) % 4 * (G // 4) + (piece * 2 + token // 16) * 4 + (token // 8) % 2 * 2 + token % 2
    scales = (out + G * D + 4 * D).to(tl.pointer_type(tl.float16)) + at
    if VG == DP:
        scale, minimum = _scale_and_minimum(tl.min(x, axis=1), tl.max(x, axis=1))
        tl.store(scales, scale)
        tl.store(scales + G, minimum)
        codes = _codes(x, scale[:, None], minimum[:, None])
    else:
        group = tl.arange(0, DP)[None, :] // VG
        scale_of = tl.zeros((32, DP), tl.float16)
        minimum_of = tl.zeros((32, DP), tl.float16)
        for i in tl.static_range(D // VG):
            own = group == i
            low = tl.min(tl.where(own, x, float("inf")), axis=1)
            high = tl.max(tl.where(own, x, float("-inf")), axis=1)
            scale, minimum = _scale_and_minimum(low, high)
            tl.store(scales + i * G, scale)
            tl.store(scales + (D // VG + i) * G, minimum)
            scale_of = tl.where(own, scale[:, None], scale_of)
            minimum_of = tl.where(own, minimum[:, None], minimum_of)
        codes = _codes(x, scale_of, minimum_of)

    # (par, b, t, e, dq, y, g) -> (dq, g, t, y, e, par, b)
    upper, lower = _pack(tl.permute(tl.reshape(codes, (2, 2, 4, 2, DP // 32, 4, 8)), (4, 6, 2, 5, 3, 0, 1)))
    byte = tl.arange(0, DP * 16)
    at = out + G * D // 2 + piece * (D * 16) + byte
    mask = byte < D * 16
    tl.store(at, upper, mask=mask)
    if PAGE_BITS == 8:
        tl.store(at + DRAFT_BYTES, lower, mask=mask)
