// Inputs of INT4 linears as e4m3 numbers, for products with codes that are e4m3 numbers (int4_linear_fp8.cu says why).
//
// A token's chunk of 128 channels has one power of two as its scale, or with READY all chunks of a token have the same: multiplied by
// it, the largest number is from 128 to 256, and x = (upper + lower) / scale with both of e4m3. Of bfloat16's 8 bits the upper
// part has 4 and the lower the rest, down to 2^-18 of the largest number. With PARTS = 1 there is no lower part.
//
// A tile of 8 tokens is 8 rows of 128 bytes, one row a token, swizzled for wgmma. Product j has 32 of the channels, in the order of
// the codes' bytes: byte 4*t + b of the first 16 is channel 32*j + 8*t + (0, 2, 1, 3)[b], and 4 more in the second 16.
//
// Beside it lies for each group of the weight, and for tokens 2*t and 2*t + 1: {factor, factor, sum, sum}. A group's product, minus
// zero point times sum, times factor, is that of numbers. Both contain the 2^-9 that a code of 1 is as e4m3.
//
// Macros: those of int4_linear.cuh, GROUP_SIZE TOKEN_TILES PARTS
#pragma once

#include "e4m3.cuh"
#include "int4_linear.cuh"

// Bytes of a chunk of all tokens: numbers of one part and of all, and factors.
constexpr int X_PART = TOKEN_TILES * 1024, X_BYTES = PARTS * X_PART, FACTORS_OF_GROUP = TOKEN_TILES * 64;
constexpr int FACTOR_BYTES = 128 / GROUP_SIZE * FACTORS_OF_GROUP;

// Of a block of tokens, where the numbers of two chunks lie, and behind them their factors, once they are in memory.
template <class Byte>
DEV Byte* ready_at(Byte* all, const Params& p, int block, int pair) {
  return all + (block * (i64)((p.chunks + 1) / 2) + pair) * (2 * (X_BYTES + FACTOR_BYTES));
}

// Lane 4*g+t has channels 32*j + 8*t + 0..7 of a chunk of token token0 + g; zeros where there is no such channel.
DEV void load_tile(uint4 (&x)[4], const Params& p, int token0, int chunk, bool there, int lane) {
  const int token = token0 + (lane >> 2), left = there && token < p.tokens ? p.channels - chunk * 128 : 0;
  const u16* from = p.x + token * p.x_stride + chunk * 128 + (lane & 3) * 8;
#pragma unroll
  for (int j = 0; j < 4; j++) x[j] = ldg128_if(from + j * 32, j * 32 < left);
}

// What multiplies a token's inputs, as two of their type, and what undoes it, times 2^9.
struct Scaling {
  u32 by;
  float undo;
};
DEV u32 larger_word(const uint4& x) { return larger(larger(x.x, x.y), larger(x.z, x.w)); }
// `top`: the largest magnitude, in the lower half.
DEV Scaling scaling_of(u32 top) {
  const int exponent = __float_as_uint(low_float(top & 0x7fff)) >> 23;
#if IS_BF16
  const u32 e = min(max(exponent, 8), 252), by = (261 - e) << 7;
#else
  const u32 e = max(exponent, 119), by = (149 - e) << 10;  // fp16 has no larger power of two than 2^15
#endif
  return {by * 0x10001, __uint_as_float((e + 2) << 23)};
}

// Lane 4*g+t's eight channels of product j, of a token that is row g of its tile, to where `put` brings them: `put.word(part, at, x)`,
// at an offset in the tile. In `pairs` are the numbers that were put, as fp16: [half][even or odd channels].
template <class Put>
DEV void split_eight(u32 (&pairs)[2][2], const uint4& x, u32 by, int g, int j, int t, const Put& put) {
#pragma unroll
  for (int half = 0; half < 2; half++) {  // four channels: 0 and 2, 1 and 3
    const u32 w0 = times(word(x, 2 * half), by), w1 = times(word(x, 2 * half + 1), by);
#if IS_BF16
    u32 even = to_fp16(low_float(w0), low_float(w1)), odd = to_fp16(high_float(w0), high_float(w1));
#else
    u32 even = __byte_perm(w0, w1, 0x5410), odd = __byte_perm(w0, w1, 0x7632);
#endif
    const u32 at = g * 128 + (((2 * j + half) ^ g) << 4) + t * 4;
    const u16 upper_even = to_e4m3(even), upper_odd = to_e4m3(odd);
    put.word(0, at, upper_even | (u32)upper_odd << 16);
    if (PARTS == 2) {
      const u32 rest_even = minus_fp16(even, from_e4m3(upper_even)), rest_odd = minus_fp16(odd, from_e4m3(upper_odd));
      const u16 lower_even = to_e4m3(rest_even), lower_odd = to_e4m3(rest_odd);
      put.word(1, at, lower_even | (u32)lower_odd << 16);
      if (!IS_BF16) {  // what both parts lack must not be in the sum
        even = minus_fp16(even, minus_fp16(rest_even, from_e4m3(lower_even)));
        odd = minus_fp16(odd, minus_fp16(rest_odd, from_e4m3(lower_odd)));
      }
    } else {
      even = from_e4m3(upper_even), odd = from_e4m3(upper_odd);
    }
    pairs[half][0] = even, pairs[half][1] = odd;
  }
}

// A tile's numbers and factors, those by lanes 0 to 3: `put.factors(group, x)`.
template <class Put>
DEV void split_tile(const uint4 (&x)[4], int lane, const Put& put) {
  const int g = lane >> 2, t = lane & 3;
  u32 top = larger_word(x[0]);
#pragma unroll
  for (int j = 1; j < 4; j++) top = larger(top, larger_word(x[j]));
  top = larger(top, top >> 16);
#pragma unroll
  for (int other = 1; other <= 2; other *= 2) top = larger(top, __shfl_xor_sync(~0u, top, other));
  const Scaling scaling = scaling_of(top);
  const float first = __shfl_sync(~0u, scaling.undo, 8 * t), second = __shfl_sync(~0u, scaling.undo, 8 * t + 4);
  float sum[4];
#pragma unroll
  for (int j = 0; j < 4; j++) {
    if (j * 32 % GROUP_SIZE == 0)
#pragma unroll
      for (int e = 0; e < 4; e++) sum[e] = 0.f;
    u32 pairs[2][2];
    split_eight(pairs, x[j], scaling.by, g, j, t, put);
#pragma unroll
    for (int half = 0; half < 2; half++) add_columns(sum, pairs[half][0], pairs[half][1]);
    if ((j + 1) * 32 % GROUP_SIZE == 0 && g == 0)
      put.factors(j * 32 / GROUP_SIZE, make_float4(first, second, sum[0] * 0x1p-9f, sum[1] * 0x1p-9f));
  }
}

// ---- Inputs that a launch of its own converts ------------------------------------------------------------------------
constexpr int PER_GROUP = GROUP_SIZE / 32;  // products of k = 32 of a group and part

struct ToGlobal {
  u8* x;
  DEV void word(int part, u32 at, u32 v) const { *reinterpret_cast<u32*>(x + part * X_PART + at) = v; }
};

// A pair of chunks of a token, number g of tile n of a block of tokens: eight channels a lane. `top` is the token's largest
// magnitude. Written to where `p.out` says.
DEV void store_ready(const Params& p, const uint4& own, u32 top, int block, int pair, int n, int g, int lane) {
  const Scaling scaling = scaling_of(top);
  u8* const to = ready_at(reinterpret_cast<u8*>(p.out), p, block, pair);
  u32 pairs[2][2];
  split_eight(pairs, own, scaling.by, g, lane % 16 / 4, lane % 4, ToGlobal{to + lane / 16 * X_BYTES + n * 1024});
  float sum[4] = {0.f, 0.f, 0.f, 0.f};  // of 32 channels each: what lanes 8*t..8*t+3 have, and the next four lanes
#pragma unroll
  for (int half = 0; half < 2; half++) add_columns(sum, pairs[half][0], pairs[half][1]);
  if (PER_GROUP >= 2) sum[0] += sum[1];
  if (PER_GROUP == 4) sum[0] += __shfl_xor_sync(~0u, sum[0], 1);
#pragma unroll
  for (int e = 0; e < (PER_GROUP == 1 ? 2 : 1); e++) {
    const int of_pair = 2 * lane + e;
    if (of_pair >= 8 || of_pair % PER_GROUP != 0) continue;
    u8* const factors = to + 2 * X_BYTES + of_pair / 4 * FACTOR_BYTES + of_pair % 4 / PER_GROUP * FACTORS_OF_GROUP;
    float* const of_token = reinterpret_cast<float*>(factors + n * 64 + g / 2 * 16) + g % 2;
    of_token[0] = scaling.undo, of_token[2] = sum[e] * 0x1p-9f;
  }
}
