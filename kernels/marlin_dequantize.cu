// The 16-bit weight [out, in] of 4-bit codes in the layout of vLLM's Marlin kernel (marlin_linear.py). Compiled by NVRTC.
//
// A CTA has 64 outputs and 64 input channels; a warp of it 16 of these, of which a lane unpacks 16 bytes. They meet in shared
// memory, so that rows are written in runs of 128 bytes.
//
// Macros: GROUP_SIZE (0: a scale per output) HAS_ZEROS IS_BF16

#include "int4_codes.cuh"

constexpr int GROUP = GROUP_SIZE ? GROUP_SIZE : 1 << 30;
constexpr float MIDDLE = (IS_BF16 ? 128 : 64) + 8;  // MAGIC, and the zero point of weights that have none

struct Params {
  const u8* codes;
  const u8* scales;
  const u8* zeros;
  u16* out;
  int strips, units;
};

extern "C" __global__ void __launch_bounds__(128) marlin_dequantize(const __grid_constant__ Params p) {
  __shared__ __align__(16) u16 tile[64][64 + 8];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, q = lane & 3;
  const int unit = blockIdx.x, strip = blockIdx.y, group = (unit * 64 + warp * 16) / GROUP;
  const u8* from = p.codes + ((i64)(unit * 4 + warp) * p.strips + strip) * 512 + lane * 16;
  const uint4 w = *reinterpret_cast<const uint4*>(from);
  uint4 scale;
  u32 z[4];
  if (GROUP_SIZE) scale = *reinterpret_cast<const uint4*>(p.scales + ((i64)group * p.strips + strip) * 128 + g * 16);
  if (HAS_ZEROS) expand(z, *reinterpret_cast<const u32*>(p.zeros + ((i64)group * p.strips + strip) * 32 + g * 4));
#pragma unroll
  for (int j = 0; j < 4; j++) {
    u32 e[4];
    expand(e, word(w, j));
    const u16* single = reinterpret_cast<const u16*>(p.scales) + strip * 64 + (j >> 1) * 32 + (g >> 1) * 8 + (j & 1) * 4 + (g & 1);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const u32 both = GROUP_SIZE ? word(scale, j) : single[0] | (u32)single[2] << 16;
      const float s = half ? high_float(both) : low_float(both);
      const float zero = HAS_ZEROS ? (half ? high_float(z[j]) : low_float(z[j])) : MIDDLE;
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const u32 codes = e[2 * half + i];
        u32* const to = reinterpret_cast<u32*>(&tile[j * 16 + half * 8 + g][warp * 16 + i * 8 + q * 2]);
        *to = pack_16bit((low_float(codes) - zero) * s, (high_float(codes) - zero) * s);
      }
    }
  }
  __syncthreads();
#pragma unroll
  for (int i = threadIdx.x; i < 512; i += 128) {
    u16* const to = p.out + ((i64)(strip * 64 + i / 8) * p.units + unit) * 64 + i % 8 * 8;
    *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(&tile[i / 8][i % 8 * 8]);
  }
}
