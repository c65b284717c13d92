// Inputs of a linear in shared memory, as 16-bit integers with a scale for each token and chunk of 128 channels: two bytes, which
// are two columns of the B operand of mma.m16n8k32. Codes of 4 bits are unpacked to bytes with 3 instructions per word (7 to
// 16-bit floats), and a product holds twice the channels. The largest of 128 numbers keeps 15 bits, where bfloat16 has 8.
// Macros: IS_BF16 WARPS TOKENS (up to 4) PIECES (of 8 channels of a token, that a thread normalizes) MARLIN HAS_ZEROS
#pragma once

#include "barriers.cuh"
#include "grid_barrier.cuh"
#include "int4_codes.cuh"

constexpr int NW = WARPS, THREADS = 32 * NW;  // that multiply
constexpr u32 ALL_LANES = 0xffffffffu;
// 1.5 * 2^23: as a float, its last bits count in ones, so that an integer of 22 bits added to it is a float's mantissa.
constexpr u32 ONES = 0x4b400000u;
constexpr float ONES_FLOAT = 12582912.f, MOST = 127.f * 256;
#if MARLIN
// What is added to zero points by draft_layer_marlin.cuh; where weights have none, it is 8 that is taken away from codes.
constexpr float ZERO_OFFSET = HAS_ZEROS ? 128.f : -8.f;
constexpr int INPUT_BYTES = TOKENS * 256 + 32;  // of a chunk; 16 bytes more for each half, so that stores meet other banks
#else
constexpr float ZERO_OFFSET = IS_BF16 ? 128.f : 64.f;  // that zero points are stored with (MAGIC in int4_linear.py)
constexpr int INPUT_BYTES = TOKENS * 256;              // of a chunk
#endif

// a: bytes of codes, 4 channels a register, rows g and g + 8 in turn; b: bytes of inputs.
DEV void multiply_bytes(u32 (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Where a linear's inputs are. Codes: [chunk][half][token][higher or lower byte][t], 16 bytes that lane 4*g+t of column g
// multiplies: channels 64*half + 8*t + 0 2 1 3, 4 6 5 7 and the same 32 channels on. Scales: [chunk][token], the scale, and
// the sum of the token's channels in the chunk, alone and times ZERO_OFFSET.
// In Marlin's order these 16 bytes are of rows of 16 channels: channels 64*half + 16*i + 2*t + 0 1 8 9, for i from 0 to 3.
struct Inputs {
  u8* codes;
  float4* scales;
};
// Columns 2*n and 2*n+1 are the bytes of token n; in Marlin's order, of token n / 2, and a lane's codes are of two rows of
// outputs: even n are for the first, odd for the second. Columns of tokens that are not there repeat the last one.
DEV u32 column_of_lane(const Inputs& in, int lane) {
  return shared_address(in.codes) + min(lane >> (MARLIN ? 4 : 3), TOKENS - 1) * 128 + (lane >> 2 & 1) * 64 + (lane & 3) * 16;
}

// 8 channels of a token: number `piece` of them. The 16 lanes that have a chunk's call this together.
DEV void store_piece(const Inputs& in, const float (&v)[8], int token, int piece, bool there) {
  float most = 0.f;
#pragma unroll
  for (int e = 0; e < 8; e++) most = fmaxf(most, fabsf(v[e]));
#pragma unroll
  for (int other = 8; other; other /= 2) most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, other));
  const float inverse = MOST / fmaxf(most, 1e-30f);
  u32 x[8], high[2], low[2];
#pragma unroll
  for (int e = 0; e < 8; e++) x[e] = __float_as_uint(fmaf(v[e], inverse, ONES_FLOAT));
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const u32 *const y = x + 4 * i;
    low[i] = __byte_perm(__byte_perm(y[0], y[2], 0x0040), __byte_perm(y[1], y[3], 0x0040), 0x5410);
    // The lower byte is signed.
    high[i] = __byte_perm(__byte_perm(y[0] + 128, y[2] + 128, 0x0051), __byte_perm(y[1] + 128, y[3] + 128, 0x0051), 0x5410);
  }
  constexpr int ONE_EACH = 0x01010101;
  int sum = __dp4a((int)high[0], ONE_EACH, __dp4a((int)high[1], ONE_EACH, 0)) * 256 +
            __dp4a((int)low[0], ONE_EACH, __dp4a((int)low[1], ONE_EACH, 0));
#pragma unroll
  for (int other = 8; other; other /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, other);
#if MARLIN
  // A row's channels are two lanes': the first stores the higher bytes of all, the second the lower ones.
  const bool second = piece & 1;
  u32 first8[2], last8[2];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const u32 other = __shfl_xor_sync(ALL_LANES, second ? high[i] : low[i], 1);
    first8[i] = second ? other : high[i], last8[i] = second ? low[i] : other;
  }
  if (!there) return;
  const int chunk = piece / 16, row = piece % 16 / 2;
  u8* const to = in.codes + chunk * INPUT_BYTES + row / 4 * (INPUT_BYTES / 2) + token * 128 + second * 64 + row % 4 * 4;
#pragma unroll
  for (int t = 0; t < 4; t++)
    *reinterpret_cast<u32*>(to + t * 16) = __byte_perm(first8[t / 2], last8[t / 2], t % 2 ? 0x7531 : 0x6420);
#else
  if (!there) return;
  const int chunk = piece / 16, j = piece / 4 % 4, t = piece % 4;
  u8* const to = in.codes + ((chunk * 2 + j / 2) * TOKENS + token) * 128 + t * 16 + j % 2 * 8;
  *reinterpret_cast<uint2*>(to) = make_uint2(high[0], high[1]);
  *reinterpret_cast<uint2*>(to + 64) = make_uint2(low[0], low[1]);
#endif
  if (piece % 16 == 0) {
    const float scale = most * (1.f / MOST), of_sum = scale * sum;
    in.scales[chunk * TOKENS + token] = make_float4(scale, of_sum, of_sum * ZERO_OFFSET, 0.f);
  }
}

DEV void to_floats(float (&v)[8], const uint4& x) {
#pragma unroll
  for (int e = 0; e < 4; e++) v[2 * e] = low_float(word(x, e)), v[2 * e + 1] = high_float(word(x, e));
}

// The token of a piece; TOKENS beyond the last one's.
DEV int token_of(int at, int pieces) {
  int token = 0;
#pragma unroll
  for (int n = 1; n <= TOKENS; n++) token += at >= n * pieces;
  return token;
}

// Pieces start .. start + N * THREADS of all tokens, N of this thread; a chunk's are in 16 lanes of one warp.
template <int N>
DEV void load_pieces(uint4 (&x)[N], const u16* from, i64 stride, int pieces, int start) {
#pragma unroll
  for (int i = 0; i < N; i++) {
    const int at = start + i * THREADS + threadIdx.x, token = token_of(at, pieces);
    x[i] = make_uint4(0, 0, 0, 0);
    if (token < TOKENS) x[i] = read128(from + token * stride + (at - token * pieces) * 8);
  }
}

// Inputs as they are.
DEV void store_inputs(const Inputs& in, const u16* from, i64 stride, int channels) {
  constexpr int N = TOKENS > 1 ? 8 : 4;
  const int pieces = channels / 8;
  for (int start = 0; start < TOKENS * pieces; start += N * THREADS) {
    uint4 x[N];
    load_pieces(x, from, stride, pieces, start);
#pragma unroll
    for (int i = 0; i < N; i++) {
      if (start + i * THREADS >= TOKENS * pieces) break;
      const int at = start + i * THREADS + threadIdx.x, token = token_of(at, pieces);
      float v[8];
      to_floats(v, x[i]);
      store_piece(in, v, token, at - token * pieces, token < TOKENS);
    }
  }
  meet<THREADS>();
}

// What RMSNorm makes of them. First waits until all CTAs have written them. `squares`: a float of shared memory for each chunk
// of each token.
DEV void store_normalized(const Inputs& in, GridBarrier& all, const u16* from, const u16* weights, float epsilon, int channels,
                          float* squares, int lane) {
  const int pieces = channels / 8, chunks = channels / 128;
  uint4 weight[PIECES], x[PIECES];
#pragma unroll
  for (int i = 0; i < PIECES; i++) weight[i] = read128(weights + (i * THREADS + threadIdx.x) % pieces * 8);
  meet<THREADS>();
  if (threadIdx.x == 0) all.wait();
  meet<THREADS>();
  load_pieces(x, from, channels, pieces, 0);
#pragma unroll
  for (int i = 0; i < PIECES; i++) {
    float v[8], sum = 0.f;
    to_floats(v, x[i]);
#pragma unroll
    for (int e = 0; e < 8; e++) sum = fmaf(v[e], v[e], sum);
#pragma unroll
    for (int other = 8; other; other /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, other);
    const int at = i * THREADS + threadIdx.x;
    if (at % 16 == 0 && at < TOKENS * pieces) squares[at / 16] = sum;
  }
  meet<THREADS>();
  float scale[TOKENS];
#pragma unroll
  for (int n = 0; n < TOKENS; n++) {
    float sum = 0.f;
    for (int i = lane; i < chunks; i += 32) sum += squares[n * chunks + i];
#pragma unroll
    for (int other = 16; other; other /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, other);
    scale[n] = rsqrtf(sum / channels + epsilon);
  }
#pragma unroll
  for (int i = 0; i < PIECES; i++) {
    const int at = i * THREADS + threadIdx.x, token = token_of(at, pieces);
    float v[8], w[8], by = scale[0];
#pragma unroll
    for (int n = 1; n < TOKENS; n++) by = token == n ? scale[n] : by;
    to_floats(v, x[i]), to_floats(w, weight[i]);
#pragma unroll
    for (int e = 0; e < 8; e++) v[e] *= by * w[e];
    store_piece(in, v, token, at - token * pieces, token < TOKENS);
  }
  meet<THREADS>();
}
