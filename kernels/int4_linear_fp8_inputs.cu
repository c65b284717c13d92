// Inputs of int4_linear_fp8.cu (READY), once for all its CTAs. Compiled by NVRTC.
//
// A CTA has a chunk of 128 channels of up to 64 tokens, each of its warps a tile of 8; `out` is where they go: for each block of
// tokens and each chunk X_BYTES of numbers and FACTOR_BYTES of factors (int4_linear_fp8.cuh).
//
// Macros: those of int4_linear_fp8.cuh
#include "int4_linear_fp8.cuh"

struct ToGlobal {
  u8* to;
  int n;
  DEV void word(int part, u32 at, u32 x) const { *reinterpret_cast<u32*>(to + part * X_PART + n * 1024 + at) = x; }
  DEV void factors(int group, float4 x) const {
    reinterpret_cast<float4*>(to + X_BYTES + group * FACTORS_OF_GROUP + n * 64)[threadIdx.x & 3] = x;
  }
};

extern "C" __global__ void __launch_bounds__(32 * TOKEN_TILES) int4_linear_fp8_inputs(const __grid_constant__ Params p) {
  const int lane = threadIdx.x & 31, n = threadIdx.x >> 5, chunk = blockIdx.x;
  wait_for_predecessor();
  release_successor();
  uint4 x[4];
  load_tile(x, p, (blockIdx.y * TOKEN_TILES + n) * 8, chunk, true, lane);
#if ROTATED
  const u32 signs = signs_of_lane(lane);
#pragma unroll
  for (int j = 0; j < 4; j++) rotate(x[j], signs);
#endif
  u8* const to = reinterpret_cast<u8*>(p.out) + (blockIdx.y * (i64)p.chunks + chunk) * (X_BYTES + FACTOR_BYTES);
  split_tile(x, lane, ToGlobal{to, n});
}
