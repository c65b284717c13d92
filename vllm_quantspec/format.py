"""The quantized page: which bytes lie where, and the arithmetic that fills and reads them.

A *page* is one block of vLLM's KV cache pool: the keys and values of G consecutive tokens of one layer, quantized to 8
bits that are stored as two 4-bit halves, or to the upper half alone. Each KV head's bytes are contiguous; what the draft
reads is one contiguous range, and all that a page of 4 bits has:

    page   | head 0 | head 1 | ... | head H-1 |
              |
              +-> | k_upper | v_upper | k_scale | k_min | v_scale | v_min | k_lower | v_lower |
                  |<------------------- draft reads ------------------->|
                  |<------------------------------ target reads ------------------------------>|

    k_upper, v_upper, k_lower, v_lower   G*D/2 bytes each, two 4-bit codes per byte
    k_scale, k_min                       fp16, one per channel
    v_scale, v_min                       fp16, one per token and group of `value_group_size` channels

Codes lie in the order of the B operand of the tensor core instruction mma.m16n8k16, so that lane = 4*g + t of a warp
(g in 0..7, t in 0..3) loads its own codes, 16 bytes at a time, and multiplies without moving them between lanes. The
unit is a tile of 32 rows x 32 columns: 512 bytes, 32 lanes x 4 little-endian 32-bit words. The *columns* are what the
product sums over: channels of keys, tokens of values.

    tile   | lane 0: word y=0 | y=1 | y=2 | y=3 | lane 1: y=0 | ... | lane 31: y=3 |     row    = y*8 + g

    word   | bits 0-3 | 4-7 | 8-11 | 12-15 | 16-19 | 20-23 | 24-27 | 28-31 |
      e    |    0     |  0  |  0   |   0   |   1   |   1   |   1   |   1   |             column = par*16 + b*8 + t*2 + e
      par  |    0     |  0  |  1   |   1   |   0   |   0   |   1   |   1   |
      b    |    0     |  1  |  0   |   1   |   0   |   1   |   0   |   1   |

    keys   rows = tokens,   columns = channels; tiles stored [G/32 row tiles][D/32 column tiles]
    values rows = channels, columns = tokens;   tiles stored [G/32 column tiles][D/32 row tiles]

Scales and minima of columns are stored so that lane t finds its own in one run: column = s*16 + h*8 + t*2 + e at
[t][s][h][e], once for keys, once per value group for values.
"""

from dataclasses import dataclass
from functools import cached_property

import torch

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
GROUP_SIZES = (64, 128)
PAGE_BITS = (4, 8)
# By how much `_keep_spread` narrows a step at most. Codes from 0 to 15 never ask for more: only ranges below fp16's do.
MOST_SPREAD = 1 / 32


def window_start(position: int | torch.Tensor, group_size: int) -> int | torch.Tensor:
    """The first position that a query at ``position`` reads exact, from the window; it reads older ones from pages.

    The start of the group before the query's own: between G and 2 * G - 1 tokens before the query, or 0. For an int or an
    integer tensor of any shape.
    """
    start = (position // group_size - 1) * group_size
    return start.clamp(min=0) if isinstance(start, torch.Tensor) else max(start, 0)


@dataclass(frozen=True)
class PageFormat:
    """Sizes and byte offsets of a page and of a window block, for one layer.

    Args:
        num_kv_heads: KV heads of this layer on this worker, H.
        head_size: channels per head, D; a multiple of 32.
        group_size: tokens per page, G; 64 or 128.
        dtype: dtype of the exact keys and values in window blocks (bfloat16, float16 or float32).
        bits: that a page stores of each code: 8, or 4, the upper ones.

    Raises:
        ValueError: if one of the arguments is not supported.
    """

    num_kv_heads: int
    head_size: int
    group_size: int = 128
    dtype: torch.dtype = torch.bfloat16
    bits: int = 8

    def __post_init__(self):
        if self.num_kv_heads < 1:
            raise ValueError(f"num_kv_heads must be at least 1, got {self.num_kv_heads}.")
        if self.head_size < 32 or self.head_size % 32:
            raise ValueError(f"head_size must be a positive multiple of 32, got {self.head_size}.")
        if self.group_size not in GROUP_SIZES:
            raise ValueError(f"group_size must be 64 or 128, got {self.group_size}.")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be bfloat16, float16 or float32, got {self.dtype}.")
        if self.bits not in PAGE_BITS:
            raise ValueError(f"bits must be 4 or 8, got {self.bits!r}.")

    def check_bits(self, bits: int) -> None:
        """A page is read with 4 bits of each code, the upper ones, or with all 8 where it has them.

        Raises:
            ValueError: anything else.
        """
        if bits not in PAGE_BITS or bits > self.bits:
            raise ValueError(f"bits must be {'4 or 8' if self.bits == 8 else '4, as the page has no more'}, got {bits!r}.")

    @cached_property
    def value_group_size(self) -> int:
        """Channels that share one value scale: the largest divisor of D that is at most G and a multiple of 16."""
        return next(n for n in range(self.group_size, 0, -16) if self.head_size % n == 0)

    @cached_property
    def num_value_groups(self) -> int:
        return self.head_size // self.value_group_size

    @cached_property
    def code_bytes(self) -> int:
        """Bytes of one of {keys, values} x {upper, lower} of one head."""
        return self.group_size * self.head_size // 2

    @cached_property
    def field_ranges(self) -> dict[str, tuple[int, int]]:
        """Field name -> (first byte, end byte) inside one head's bytes, in stored order."""
        key_scales, value_scales = 2 * self.head_size, 2 * self.group_size * self.num_value_groups
        sizes = {
            "k_upper": self.code_bytes,
            "v_upper": self.code_bytes,
            "k_scale": key_scales,
            "k_min": key_scales,
            "v_scale": value_scales,
            "v_min": value_scales,
        }
        if self.bits == 8:
            sizes |= {"k_lower": self.code_bytes, "v_lower": self.code_bytes}
        ranges, offset = {}, 0
        for name, size in sizes.items():
            ranges[name] = (offset, offset + size)
            offset += size
        return ranges

    @cached_property
    def draft_bytes(self) -> int:
        """Bytes of one head that the draft reads, from the first on."""
        return self.field_ranges["v_min"][1]

    @cached_property
    def head_bytes(self) -> int:
        return self.field_ranges["v_lower"][1] if self.bits == 8 else self.draft_bytes

    @cached_property
    def page_bytes(self) -> int:
        return self.num_kv_heads * self.head_bytes

    @cached_property
    def window_block_size(self) -> int:
        """Tokens of exact K/V that fit into one page's bytes: a power of two, at most G."""
        tokens = self.head_bytes // (2 * self.head_size * self.dtype.itemsize)
        return 1 << (tokens.bit_length() - 1)

    def bytes_per_token(self, bits: int | None = None) -> float:
        """Bytes of cache that one token of this layer occupies, or those that a reading with ``bits`` bits needs."""
        if bits is not None:
            self.check_bits(bits)
        return self.num_kv_heads * (self.draft_bytes if bits == 4 else self.head_bytes) / self.group_size

    def field(self, head_bytes: torch.Tensor, name: str) -> torch.Tensor:
        """A view of one field of `head_bytes` (uint8 [..., bytes]): codes as uint8, scales and minima as fp16."""
        first, end = self.field_ranges[name]
        view = head_bytes[..., first:end]
        return view.view(torch.float16) if name.endswith(("_scale", "_min")) else view


def window_blocks_per_request(group_size: int, window_block_size: int, num_speculative_tokens: int) -> int:
    """Most window blocks that a request holds at once, each of ``window_block_size`` tokens.

    A step needs the window before its first token and leaves the window that ends with its last. These overlap or touch
    unless the step computes more than a window of a prompt, so twice the longest window is the bound. The longest begins
    at a page and ends ``2 * group_size - 1`` tokens later, plus as many drafts as the step before may lose (its true end
    is not known yet while it is in flight), plus as many slots for the next drafts.
    """
    longest = 2 * group_size - 1 + 2 * num_speculative_tokens
    return 2 * -(-longest // window_block_size)


# --- Quantization: x [..., G, D] -> upper, lower (codes, uint8 [..., G, D], 0..15), scale, minimum (fp16) -------------


def quantize_keys(
    k: torch.Tensor, is_first: torch.Tensor | None = None, bits: int = 8
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize keys [..., G, D] per channel over the G tokens; scale and minimum are fp16 [..., D].

    Of pages that begin a sequence (``is_first``, bool [...]; None: of no page) the minimum is moved by up to half a step, so
    that the first token's key, an attention sink, is read as it is. The others are read within half a step as before.

    For pages of 4 ``bits`` scale and minimum are then those with which the upper codes have the keys' mean and variance.
    """
    upper, lower, scale, minimum = _quantize(k, dim=-2, is_first=is_first)
    if bits == 4:
        scale, minimum = _keep_spread(upper, scale, minimum, is_first)
    return upper, lower, scale.squeeze(-2), minimum.squeeze(-2)


def _keep_spread(
    upper: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor, is_first: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and minimum fp16 [..., 1, D] by which codes [..., G, D] have no more variance than what they stand for.

    Rounding adds a twelfth of a step squared, and so to the spread of scores, whose exponentials then sum to more: pages
    would draw more attention than they should. What stays is the mean; where a sequence begins, its first key.
    """
    codes = upper.float()
    n, total = codes.shape[-2], codes.sum(-2, keepdim=True)
    # Sums of integers and products that fp32 has exactly: a kernel has the same bytes, in whatever order it adds.
    spread = n * codes.square().sum(-2, keepdim=True) - total * total
    more = torch.where(spread == 0, 0.0, torch.full_like(spread, n * n / 24) / spread).clamp(max=MOST_SPREAD)
    s = scale.float()
    kept = (s * (1 - more)).half()
    center = total / n
    if is_first is not None:
        center = torch.where(is_first[..., None, None], codes[..., :1, :], center)
    limit = torch.finfo(torch.float16).max
    return kept, (minimum.float() + (s - kept.float()) * center).clamp(max=limit).half()


def quantize_values(v: torch.Tensor, value_group_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize values [..., G, D] per token over `value_group_size` channels; scale, minimum: fp16 [..., G, groups]."""
    upper, lower, scale, minimum = _quantize(v.unflatten(-1, (-1, value_group_size)), dim=-1)
    return upper.flatten(-2), lower.flatten(-2), scale.squeeze(-1), minimum.squeeze(-1)


def _quantize(
    x: torch.Tensor, dim: int, is_first: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    x = x.float()
    low, high = x.aminmax(dim=dim, keepdim=True)
    limit = torch.finfo(torch.float16).max
    scale = ((high - low) / 15).clamp(max=limit).half()
    minimum = low.clamp(-limit, limit).half()
    # The codes are computed against what is stored: the residual then absorbs the rounding of scale and minimum too.
    s, z = scale.float(), minimum.float()
    flat = s == 0
    divisor = torch.where(flat, 1.0, s)
    if is_first is not None:
        sink = x.narrow(dim, 0, 1)
        code = ((sink - z) / divisor).round_().clamp_(0, 15)
        moved = (sink - code * s).clamp(-limit, limit).half()
        minimum = torch.where(is_first[..., None, None], moved, minimum)
        z = minimum.float()
    residual = x - z
    upper = (residual / divisor).round_().clamp_(0, 15).masked_fill_(flat, 0)
    lower = ((residual - upper * s) / (divisor / 16)).round_().clamp_(-8, 7).masked_fill_(flat, 0)
    return upper.to(torch.uint8), (lower + 8).to(torch.uint8), scale, minimum


def dequantize_keys(
    upper: torch.Tensor, lower: torch.Tensor | None, scale: torch.Tensor, minimum: torch.Tensor
) -> torch.Tensor:
    """Keys fp32 [..., G, D]: read with 4 bits where `lower` is None, else with 8."""
    return _dequantize(upper, lower, scale.unsqueeze(-2), minimum.unsqueeze(-2))


def dequantize_values(
    upper: torch.Tensor, lower: torch.Tensor | None, scale: torch.Tensor, minimum: torch.Tensor
) -> torch.Tensor:
    """Values fp32 [..., G, D]: read with 4 bits where `lower` is None, else with 8."""
    groups = scale.shape[-1]
    split = [None if c is None else c.unflatten(-1, (groups, -1)) for c in (upper, lower)]
    return _dequantize(*split, scale.unsqueeze(-1), minimum.unsqueeze(-1)).flatten(-2)


def _dequantize(upper, lower, scale, minimum) -> torch.Tensor:
    s, z = scale.float(), minimum.float()
    if lower is None:
        return upper.float() * s + z
    return (upper.float() * 16 + (lower.float() - 8)) * (s / 16) + z


# --- Byte order -------------------------------------------------------------------------------------------------------

# Dimensions of one tile's row and column indices, and of its bytes, as in the module's picture.
_ROW = (4, 8)  # y, g
_COLUMN = (2, 2, 4, 2)  # par, b, t, e
_TILE_BYTES = (8, 4, 4, 2, 2)  # g, t, y, e, par; b is the nibble


def pack_key_codes(codes: torch.Tensor) -> torch.Tensor:
    """Codes uint8 [..., G, D] (0..15) -> bytes uint8 [..., G*D/2] in stored order."""
    group_size, head_size = codes.shape[-2:]
    x = codes.reshape(-1, group_size // 32, *_ROW, head_size // 32, *_COLUMN)
    # (n, tq, y, g, j, par, b, t, e) -> (n, tq, j, g, t, y, e, par, b)
    return _pack_nibbles(x.permute(0, 1, 4, 3, 7, 2, 8, 5, 6), codes.shape[:-2])


def pack_value_codes(codes: torch.Tensor) -> torch.Tensor:
    """Codes uint8 [..., G, D] (0..15) -> bytes uint8 [..., G*D/2] in stored order."""
    group_size, head_size = codes.shape[-2:]
    x = codes.reshape(-1, group_size // 32, *_COLUMN, head_size // 32, *_ROW)
    # (n, jp, par, b, t, e, dq, y, g) -> (n, jp, dq, g, t, y, e, par, b)
    return _pack_nibbles(x.permute(0, 1, 6, 8, 4, 7, 5, 2, 3), codes.shape[:-2])


def _pack_nibbles(x: torch.Tensor, lead: torch.Size) -> torch.Tensor:
    return (x[..., 0] | (x[..., 1] << 4)).reshape(*lead, -1)


def unpack_key_codes(packed: torch.Tensor, head_size: int) -> torch.Tensor:
    """Bytes uint8 [..., G*D/2] -> codes uint8 [..., G, D]; the inverse of `pack_key_codes`."""
    group_size = packed.shape[-1] * 2 // head_size
    x = _unpack_nibbles(packed, (group_size // 32, head_size // 32))
    # (n, tq, j, g, t, y, e, par, b) -> (n, tq, y, g, j, par, b, t, e)
    return x.permute(0, 1, 5, 3, 2, 7, 8, 4, 6).reshape(*packed.shape[:-1], group_size, head_size)


def unpack_value_codes(packed: torch.Tensor, head_size: int) -> torch.Tensor:
    """Bytes uint8 [..., G*D/2] -> codes uint8 [..., G, D]; the inverse of `pack_value_codes`."""
    group_size = packed.shape[-1] * 2 // head_size
    x = _unpack_nibbles(packed, (group_size // 32, head_size // 32))
    # (n, jp, dq, g, t, y, e, par, b) -> (n, jp, par, b, t, e, dq, y, g)
    return x.permute(0, 1, 7, 8, 4, 6, 2, 5, 3).reshape(*packed.shape[:-1], group_size, head_size)


def _unpack_nibbles(packed: torch.Tensor, tiles: tuple[int, int]) -> torch.Tensor:
    x = packed.reshape(-1, *tiles, *_TILE_BYTES)
    return torch.stack((x & 15, x >> 4), dim=-1)


def permute_scales(scales: torch.Tensor) -> torch.Tensor:
    """Reorder the last dim (a multiple of 16), one scale or minimum per column, to stored order [t][s][h][e]."""
    return scales.unflatten(-1, (-1, 2, 4, 2)).movedim(-2, -4).flatten(-4)


def unpermute_scales(stored: torch.Tensor) -> torch.Tensor:
    """The inverse of `permute_scales`."""
    return stored.unflatten(-1, (4, -1, 2, 2)).movedim(-4, -2).flatten(-4)


def permute_value_scales(scales: torch.Tensor) -> torch.Tensor:
    """Value scales [..., G, groups] -> stored order [..., groups*G]."""
    return permute_scales(scales.transpose(-1, -2)).flatten(-2)


def unpermute_value_scales(stored: torch.Tensor, group_size: int) -> torch.Tensor:
    """The inverse of `permute_value_scales`: [..., groups*G] -> [..., G, groups]."""
    return unpermute_scales(stored.unflatten(-1, (-1, group_size))).transpose(-1, -2)


# --- Whole pages ------------------------------------------------------------------------------------------------------


def encode_pages(
    fmt: PageFormat, keys: torch.Tensor, values: torch.Tensor, is_first: torch.Tensor | None = None
) -> torch.Tensor:
    """Exact keys and values [n, G, H, D] -> the bytes of their pages, uint8 [n, H, head_bytes].

    ``is_first``: bool [n], pages that begin a sequence (see `quantize_keys`); None: none does.
    """
    is_first = None if is_first is None else is_first[:, None].expand(-1, keys.shape[2])
    k_upper, k_lower, k_scale, k_min = quantize_keys(keys.transpose(1, 2), is_first, fmt.bits)
    v_upper, v_lower, v_scale, v_min = quantize_values(values.transpose(1, 2), fmt.value_group_size)
    fields = {
        "k_upper": pack_key_codes(k_upper),
        "v_upper": pack_value_codes(v_upper),
        "k_scale": permute_scales(k_scale),
        "k_min": permute_scales(k_min),
        "v_scale": permute_value_scales(v_scale),
        "v_min": permute_value_scales(v_min),
        "k_lower": pack_key_codes(k_lower),
        "v_lower": pack_value_codes(v_lower),
    }
    return torch.cat([fields[name].contiguous().view(torch.uint8) for name in fmt.field_ranges], dim=-1)
