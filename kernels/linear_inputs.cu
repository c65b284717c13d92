// What lies between two linears of a decoder layer, as the inputs of the second one. Compiled by NVRTC.
//
// ACTIVATED: silu(gate) * up of a token's [gate, up]; else RMSNorm of the sum of x and the residual, and that sum itself. The result
// is rounded to 16 bits. With FP8 it then becomes what int4_linear_fp8.cu reads, as int4_linear_fp8_inputs.cu does it of inputs
// that are there already.
//
// A CTA computes a whole token in registers, PIECES of 8 channels a thread. With FP8 each of a token's CTAs does so, for its
// largest number is their scale, and stores 16 pairs of chunks of it, one a warp.
//
// Macros: IS_BF16 ACTIVATED FP8 PIECES, with FP8 those of int4_linear_fp8.cuh
#if FP8
#include "int4_linear_fp8.cuh"
#else
#include "int4_linear.cuh"
#endif

constexpr int WARPS = 16, THREADS = 32 * WARPS;

struct Inputs {
  Params p;
  const u16* residual;
  const u16* norm;
  u16* sum;
  i64 residual_stride;
  float epsilon;
};

DEV void stg128(u16* p, const uint4& x) {
  asm volatile("st.global.v4.u32 [%0],{%1,%2,%3,%4};" ::"l"(p), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
}

struct Eight {
  float v[8];
  DEV Eight(const uint4& x) {
#pragma unroll
    for (int i = 0; i < 4; i++) v[2 * i] = low_float(word(x, i)), v[2 * i + 1] = high_float(word(x, i));
  }
  DEV uint4 packed() const {
    return make_uint4(pack_16bit(v[0], v[1]), pack_16bit(v[2], v[3]), pack_16bit(v[4], v[5]), pack_16bit(v[6], v[7]));
  }
};

DEV uint4 activated(const uint4& of_gate, const uint4& of_up) {
  Eight gate(of_gate), up(of_up);
#pragma unroll
  for (int i = 0; i < 8; i++) gate.v[i] = gate.v[i] / (1.f + __expf(-gate.v[i])) * up.v[i];
  return gate.packed();
}

// Of x and the residual; adds to `squares` those of what it returns.
DEV uint4 sum_of(const uint4& x, const uint4& residual, float& squares) {
  Eight sum(x), other(residual);
#pragma unroll
  for (int i = 0; i < 8; i++) sum.v[i] += other.v[i];
  const uint4 packed = sum.packed();
  const Eight rounded(packed);
#pragma unroll
  for (int i = 0; i < 8; i++) squares = fmaf(rounded.v[i], rounded.v[i], squares);
  return packed;
}

DEV uint4 scaled(const uint4& x, float scale, const uint4& norm) {
  Eight v(x), weight(norm);
#pragma unroll
  for (int i = 0; i < 8; i++) v.v[i] *= scale * weight.v[i];
  return v.packed();
}

extern "C" __global__ void __launch_bounds__(THREADS) linear_inputs(const __grid_constant__ Inputs in) {
  __shared__ u32 of_warps[2][WARPS];
  const Params& p = in.p;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
#if FP8
  const int of_block = blockIdx.x % (8 * TOKEN_TILES), n = of_block >> 3, g = of_block & 7;
  const int token = blockIdx.y * 8 * TOKEN_TILES + of_block, part = blockIdx.x / (8 * TOKEN_TILES);
#else
  const int token = blockIdx.x, part = 0;
#endif
  auto channel = [&](int i) { return (i * THREADS + (int)threadIdx.x) * 8; };
  uint4 v[PIECES], w[PIECES];
#if !ACTIVATED
  // A weight: it may be read before the kernel in front has ended.
#pragma unroll
  for (int i = 0; i < PIECES; i++) w[i] = ldg128_if(in.norm + channel(i), channel(i) < p.channels);
#endif
  wait_for_predecessor();
  release_successor();
  if (token >= p.tokens) return;
  const u16* const from = p.x + token * p.x_stride;
#pragma unroll
  for (int i = 0; i < PIECES; i++) v[i] = ldg128_if(from + channel(i), channel(i) < p.channels);
#if ACTIVATED
#pragma unroll
  for (int i = 0; i < PIECES; i++) w[i] = ldg128_if(from + p.channels + channel(i), channel(i) < p.channels);
#pragma unroll
  for (int i = 0; i < PIECES; i++) v[i] = activated(v[i], w[i]);
#else
  uint4 residual[PIECES];
#pragma unroll
  for (int i = 0; i < PIECES; i++)
    residual[i] = ldg128_if(in.residual + token * in.residual_stride + channel(i), channel(i) < p.channels);
  float squares = 0.f;
#pragma unroll
  for (int i = 0; i < PIECES; i++) {
    v[i] = sum_of(v[i], residual[i], squares);
    if (part == 0 && channel(i) < p.channels) stg128(in.sum + token * (i64)p.channels + channel(i), v[i]);
  }
#pragma unroll
  for (int other = 1; other < 32; other *= 2) squares += __shfl_xor_sync(~0u, squares, other);
  if (lane == 0) of_warps[0][warp] = __float_as_uint(squares);
  __syncthreads();
  squares = __uint_as_float(of_warps[0][lane % WARPS]);
#pragma unroll
  for (int other = 1; other < WARPS; other *= 2) squares += __shfl_xor_sync(~0u, squares, other);
  const float scale = rsqrtf(squares / p.channels + in.epsilon);
#pragma unroll
  for (int i = 0; i < PIECES; i++) v[i] = scaled(v[i], scale, w[i]);
#endif
#if !FP8
#pragma unroll
  for (int i = 0; i < PIECES; i++)
    if (channel(i) < p.channels) stg128(p.out + token * (i64)p.channels + channel(i), v[i]);
#else
  u32 top = 0;
  uint4 own = v[0];
#pragma unroll
  for (int i = 0; i < PIECES; i++) {
    top = larger(top, larger_word(v[i]));
    if (i == part) own = v[i];
  }
#pragma unroll
  for (int other = 1; other < 32; other *= 2) top = larger(top, __shfl_xor_sync(~0u, top, other));
  if (lane == 0) of_warps[1][warp] = top;
  __syncthreads();
  const int pair = part * WARPS + warp;
  if (pair >= (p.chunks + 1) / 2) return;
  top = of_warps[1][lane % WARPS];
#pragma unroll
  for (int other = 1; other < WARPS; other *= 2) top = larger(top, __shfl_xor_sync(~0u, top, other));
  store_ready(p, own, larger(top, top >> 16), blockIdx.y, pair, n, g, lane);
#endif
}
