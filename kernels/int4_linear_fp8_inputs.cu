// Inputs of int4_linear_fp8.cu (READY), once for all its CTAs. Compiled by NVRTC.
//
// A CTA reads a token, whose largest number is its scale, and converts 16 pairs of chunks of it, one a warp. The scale is the same for
// all chunks, so the kernel applies it once, to the token's result. (e4m3 numbers have exponents of their own: only what is below
// 2^-14 of a token's largest number loses bits by it.) `out` is where the numbers go. Their number of chunks is even: one more
// than the weight has is zeros.
//
// Macros: those of int4_linear_fp8.cuh
#include "int4_linear_fp8.cuh"

constexpr int WARPS = 16, THREADS = 32 * WARPS;
constexpr int PIECES = 8;  // of eight channels each, that a thread reads at a time

extern "C" __global__ void __launch_bounds__(THREADS) int4_linear_fp8_inputs(const __grid_constant__ Params p) {
  __shared__ u32 tops[WARPS];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int of_block = blockIdx.x % (8 * TOKEN_TILES), n = of_block >> 3, g = of_block & 7;
  const int token = blockIdx.y * 8 * TOKEN_TILES + of_block, pair = blockIdx.x / (8 * TOKEN_TILES) * WARPS + warp;
#if ROTATED
  const u32 signs = signs_of_lane(lane);
#endif
  wait_for_predecessor();
  release_successor();
  if (token >= p.tokens) return;
  const u16* const from = p.x + token * p.x_stride;
  auto load = [&](int piece) { return ldg128_if(from + piece * 8, piece * 8 < p.channels); };
  uint4 own = load(pair * 32 + lane);
#if ROTATED
  rotate(own, signs);
#endif
  u32 top = 0;
#pragma unroll 1
  for (int first = threadIdx.x; (first - lane) * 8 < p.channels; first += PIECES * THREADS) {
    uint4 x[PIECES];
#pragma unroll
    for (int i = 0; i < PIECES; i++) x[i] = load(first + i * THREADS);
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
#if ROTATED
      rotate(x[i], signs);
#endif
      top = larger(top, larger_word(x[i]));
    }
  }
#pragma unroll
  for (int other = 1; other < 32; other *= 2) top = larger(top, __shfl_xor_sync(~0u, top, other));
  if (lane == 0) tops[warp] = top;
  __syncthreads();
  if (pair >= (p.chunks + 1) / 2) return;
  top = tops[lane % WARPS];
#pragma unroll
  for (int other = 1; other < WARPS; other *= 2) top = larger(top, __shfl_xor_sync(~0u, top, other));
  store_ready(p, own, larger(top, top >> 16), blockIdx.y, pair, n, g, lane);
}
