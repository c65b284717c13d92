// Inputs of int4_linear_fp8.cu (READY), once for all its CTAs. Compiled by NVRTC.
//
// A CTA has a chunk of 128 channels of up to 64 tokens, each of its warps a tile of 8; `out` is where they go. The number of chunks
// is even: one more than the weight has is zeros.
//
// Macros: those of int4_linear_fp8.cuh
#include "int4_linear_fp8.cuh"

struct ToGlobal {
  u8 *x, *factors_at;
  int n;
  DEV void word(int part, u32 at, u32 v) const { *reinterpret_cast<u32*>(x + part * X_PART + n * 1024 + at) = v; }
  DEV void factors(int group, float4 v) const {
    reinterpret_cast<float4*>(factors_at + group * FACTORS_OF_GROUP + n * 64)[threadIdx.x & 3] = v;
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
  u8* const to = ready_at(reinterpret_cast<u8*>(p.out), p, blockIdx.y, chunk / 2);
  split_tile(x, lane, ToGlobal{to + chunk % 2 * X_BYTES, to + 2 * X_BYTES + chunk % 2 * FACTOR_BYTES, n});
}
