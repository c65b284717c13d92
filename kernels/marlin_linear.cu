// y = x W^T for a few tokens x and a 4-bit weight W in the layout of vLLM's Marlin kernel. Compiled by NVRTC.
//
// That layout (marlin_linear.py) is the order of the A fragments of mma.m16n8k16: of 16 channels and 64 outputs ("a strip") lane
// 4*g + q holds the 16 bytes of four row tiles, rows g and g + 8, channels 2*q, 2*q + 1, 2*q + 8 and 2*q + 9. Codes become floats
// by being ORed into the mantissa of MAGIC; a group's scale, its zero point and MAGIC are applied to its sum, in fp32.
//
// A CTA has a run of strips and a part (SPLITS) of the input channels. Its warps share the channels in units of 64, and one more
// warp brings the codes to a ring in shared memory, so that the bytes in flight cost no registers. Tokens are few and their values
// lie there too, where ldmatrix gives the order that codes have: a warp copies those of its own units, once if there is room
// (RESIDENT), else again for each strip, some units ahead. Nobody else reads them, so no barrier is needed.
// The warps' sums meet in shared memory, those of the parts in the L2 cache, where the last CTA to arrive adds them up. All are
// added in one order, which does not depend on the number of tokens.
//
// Launches overlap as int4_linear.cu's: the ring is filled before the wait, everything that another kernel may have written or may
// still read is touched after it.
//
// Macros: GROUP_SIZE (0: a scale per output) HAS_ZEROS IS_BF16 WARPS STAGES TOKEN_TILES (of 8 tokens) SPLITS X_SLOTS RESIDENT
//         MIN_CTAS (that registers allow)

#include "barriers.cuh"
#include "int4_codes.cuh"

constexpr int NW = WARPS, S = STAGES, NT = TOKEN_TILES;
constexpr int TILES = NT > 2 ? 2 : 4;  // row tiles multiplied at once: their sums take registers
constexpr float MIDDLE = (IS_BF16 ? 128 : 64) + 8;  // MAGIC, and the zero point of weights that have none
constexpr int UNIT = 64, CODES = UNIT * 32;  // channels, and their bytes in a strip
constexpr int GROUP = GROUP_SIZE ? GROUP_SIZE : 1 << 30;
constexpr int SPAN = GROUP < UNIT ? GROUP : UNIT, GROUPS = UNIT / SPAN, STEPS = SPAN / 16;  // of a unit
constexpr int SCALES = GROUP_SIZE ? GROUPS * 128 : 0, ZEROS = HAS_ZEROS ? GROUPS * 32 : 0;
constexpr int SCALES_AT = NW * CODES, ZEROS_AT = SCALES_AT + NW * SCALES, STAGE = ZEROS_AT + NW * ZEROS;
constexpr int X_ROW = UNIT * 2 + 16, X_SLOT = 8 * NT * X_ROW;  // the padding avoids bank conflicts
constexpr int X_AT = S * STAGE, SUMS_AT = X_AT + NW * X_SLOTS * X_SLOT;

extern __shared__ __align__(128) u8 smem[];  // ring [S][STAGE], x [NW][X_SLOTS][X_SLOT], sums float4 [NW][NT][4][32]

struct Params {
  const u16* x;
  const u8* codes;
  const u8* scales;
  const u8* zeros;
  const u16* bias;
  u16* out;
  float4* partial;
  int* arrived;
  i64 x_stride;
  int tokens, strips, units;
};
struct Range {
  int strip_begin, strip_end, begin, end;  // begin, end: units
};

// The warp that fills the ring, in the order of consumption: strips, and of each the units of all warps.
DEV void produce(const Params& p, const Range& r, u32 ring, u32 full, u32 empty, int lane) {
  const i64 row_bytes = (i64)p.strips * 512;  // of 16 channels
  int slot = 0, round = 0;
#pragma unroll 1
  for (int strip = r.strip_begin; strip < r.strip_end; strip++) {
#pragma unroll 1
    for (int unit = r.begin; unit < r.end; unit += NW) {
      const int n = min(NW, r.end - unit);
      if (round > 0) wait_for(empty + slot * 8, (round & 1) ^ 1);
      const u32 to = ring + slot * STAGE;
      const u8* from = p.codes + unit * 4 * row_bytes + strip * 512 + lane * 16;
#pragma unroll
      for (int w = 0; w < NW; w++)
        if (w < n)
#pragma unroll
          for (int row = 0; row < 4; row++, from += row_bytes) copy16(to + w * CODES + row * 512 + lane * 16, from);
      if (GROUP_SIZE)
        for (int i = lane; i < n * GROUPS * 8; i += 32) {
          const int group = (unit * UNIT + i / 8 * SPAN) / GROUP;
          copy16(to + SCALES_AT + i * 16, p.scales + (i64)group * p.strips * 128 + strip * 128 + i % 8 * 16);
        }
      if (HAS_ZEROS)
        for (int i = lane; i < n * GROUPS * 2; i += 32) {
          const int group = (unit * UNIT + i / 2 * SPAN) / GROUP;
          copy16(to + ZEROS_AT + i * 16, p.zeros + (i64)group * p.strips * 32 + strip * 32 + i % 2 * 16);
        }
      arrive_copied(full + slot * 8);
      if (++slot == S) slot = 0, round++;
    }
  }
}

// A unit of the tokens from token0 on, by a warp; tokens that are not there are zeros.
DEV void fill_x(const Params& p, u32 to, int unit, int token0, int lane) {
#pragma unroll
  for (int i = 0; i < 2 * NT; i++) {
    const int row = i * 4 + lane / 8;
    const bool there = token0 + row < p.tokens;
    const u16* from = there ? p.x + (token0 + row) * p.x_stride + unit * UNIT + lane % 8 * 8 : p.x;
    copy16_or_zero(to + row * X_ROW + lane % 8 * 16, from, there);
  }
}

// v: outputs g and g + 8 of row tile j of a strip, of the tokens 2*q and 2*q + 1 behind token0.
DEV void store(const Params& p, float4 v, int strip, int j, int token0, int lane) {
  const int g = lane >> 2, token = token0 + (lane & 3) * 2, output = strip * 64 + j * 16 + g;
  const i64 stride = (i64)p.strips * 64;
  // Marlin keeps biases, and scales where there is one per output, in this order of 32.
  const int place = strip * 64 + (j >> 1) * 32 + (g >> 1) * 8 + (j & 1) * 4 + (g & 1);
  if (!GROUP_SIZE) {
    const u16* scales = reinterpret_cast<const u16*>(p.scales);
    const float s0 = low_float(scales[place]), s1 = low_float(scales[place + 2]);
    v.x *= s0, v.y *= s0, v.z *= s1, v.w *= s1;
  }
  float b0 = 0.f, b1 = 0.f;
  if (p.bias) b0 = low_float(p.bias[place]), b1 = low_float(p.bias[place + 2]);
  u16* to = p.out + token * stride + output;
  if (token < p.tokens) to[0] = to_16bit(v.x + b0), to[8] = to_16bit(v.z + b1);
  if (token + 1 < p.tokens) to[stride] = to_16bit(v.y + b0), to[stride + 8] = to_16bit(v.w + b1);
}

DEV float4* partial_of(const Params& p, int split, int n, int at) {
  return p.partial + ((split * gridDim.y + blockIdx.y) * NT + n) * (i64)p.strips * 128 + at;
}

// The last CTA to arrive adds up what the parts have left in the workspace, always in the same order.
DEV void add_parts(const Params& p, const Range& r, int token0, int thread) {
  if (!is_last_to_arrive<32 * NW, SPLITS>(p.arrived + blockIdx.y * gridDim.x + blockIdx.x, thread)) return;
  for (int n = 0; n < NT; n++)
    for (int at = r.strip_begin * 128 + thread; at < r.strip_end * 128; at += 32 * NW) {
      if (token0 + n * 8 + (thread & 3) * 2 >= p.tokens) continue;
      float4 v = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
      for (int z = 0; z < SPLITS; z++) {
        const float4 u = __ldcg(partial_of(p, z, n, at));
        v.x += u.x, v.y += u.y, v.z += u.z, v.w += u.w;
      }
      store(p, v, at / 128, at / 32 % 4, token0 + n * 8, thread & 31);
    }
}

extern "C" __global__ void __launch_bounds__(32 * NW + 32, MIN_CTAS) marlin_linear(const __grid_constant__ Params p) {
  __shared__ __align__(8) unsigned long long barriers[2 * S];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  Range r;
  r.strip_begin = (u32)(p.strips * blockIdx.x) / gridDim.x, r.strip_end = (u32)(p.strips * (blockIdx.x + 1)) / gridDim.x;
  r.begin = p.units * blockIdx.z / SPLITS, r.end = p.units * (blockIdx.z + 1) / SPLITS;
  const u32 shared = shared_address(smem), full = shared_address(barriers), empty = full + 8 * S;
  if (threadIdx.x < S) {
    barrier_init(full + threadIdx.x * 8, 32);
    barrier_init(empty + threadIdx.x * 8, NW);
  }
  __syncthreads();
  if (warp == NW) return produce(p, r, shared, full, empty, lane);
  wait_for_predecessor();
  release_successor();

  const int token0 = blockIdx.y * 8 * NT, first = r.begin + warp, rounds = (r.end - r.begin + NW - 1) / NW;
  const u32 x_at = shared + X_AT + warp * X_SLOTS * X_SLOT;
  const u32 x_row = (lane & 7) * X_ROW + (lane >> 3) * 16;
  float4* const sums = reinterpret_cast<float4*>(smem + SUMS_AT);
#if RESIDENT
  for (int c = 0; c < rounds; c++)
    if (first + c * NW < r.end) fill_x(p, x_at + c * X_SLOT, first + c * NW, token0, lane);
  end_batch();
  wait_for_batches<0>();
  __syncwarp();
#else
  // Of the sequence of all units, in the order in which they are multiplied: the next to ask for, its slot, and how many are left.
  int next = 0, next_slot = 0, left = rounds * (r.strip_end - r.strip_begin);
  auto ask = [&] {
    if (left > 0 && first + next * NW < r.end) fill_x(p, x_at + next_slot * X_SLOT, first + next * NW, token0, lane);
    end_batch();
    left--;
    if (++next == rounds) next = 0;
    if (++next_slot == X_SLOTS) next_slot = 0;
  };
  for (int i = 0; i < X_SLOTS - 1; i++) ask();
  int x_slot = 0;
#endif
  int slot = 0;
  u32 parity = 0;

#pragma unroll 1
  for (int strip = r.strip_begin; strip < r.strip_end; strip++) {
    float acc[NT][4][4];
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
      for (int e = 0; e < 16; e++) acc[n][e / 4][e % 4] = 0.f;
#pragma unroll 1
    for (int c = 0; c < rounds; c++) {
#if RESIDENT
      const u32 x_unit = x_at + c * X_SLOT + x_row;
#else
      __syncwarp();  // all lanes have read what is written over now
      ask();
      wait_for_batches<X_SLOTS - 1>();
      __syncwarp();
      const u32 x_unit = x_at + x_slot * X_SLOT + x_row;
      if (++x_slot == X_SLOTS) x_slot = 0;
#endif
      wait_for(full + slot * 8, parity);
      const u32 stage = shared + slot * STAGE;
      uint4 w[4], scale[GROUPS];
      u32 zero[GROUPS];
#pragma unroll
      for (int i = 0; i < 4; i++) w[i] = lds128(stage + warp * CODES + i * 512 + lane * 16);
#pragma unroll
      for (int i = 0; i < GROUPS; i++) {
        if (GROUP_SIZE) scale[i] = lds128(stage + SCALES_AT + (warp * GROUPS + i) * 128 + (lane >> 2) * 16);
        if (HAS_ZEROS) zero[i] = lds32(stage + ZEROS_AT + (warp * GROUPS + i) * 32 + (lane >> 2) * 4);
      }
      __syncwarp();
      if (lane == 0) arrive(empty + slot * 8);
      if (++slot == S) slot = 0, parity ^= 1;
      if (first + c * NW >= r.end) continue;
#pragma unroll
      for (int i = 0; i < GROUPS; i++) {
        float sum_x[NT][4];  // [0..1] of the tokens 2*q and 2*q + 1
        const u32 one = IS_BF16 ? 0x3f803f80 : 0x3c003c00;
        u32 z[4];
        if (HAS_ZEROS) expand(z, zero[i]);
#pragma unroll
        for (int first_tile = 0; first_tile < 4; first_tile += TILES) {
          float part[NT][TILES][4];
#pragma unroll
          for (int n = 0; n < NT; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
              if (first_tile == 0) sum_x[n][e] = 0.f;
#pragma unroll
              for (int j = 0; j < TILES; j++) part[n][j][e] = 0.f;
            }
#pragma unroll
          for (int s = i * STEPS; s < (i + 1) * STEPS; s += 2) {
            u32 b[NT][4];
#pragma unroll
            for (int n = 0; n < NT; n++) load_matrices(b[n], x_unit + n * 8 * X_ROW + s * 32);
#pragma unroll
            for (int h = 0; h < 2; h++) {
              if (first_tile == 0)
#pragma unroll
                for (int n = 0; n < NT; n++) mma(sum_x[n], one, one, one, one, b[n][2 * h], b[n][2 * h + 1]);
#pragma unroll
              for (int j = 0; j < TILES; j++) {
                u32 e[4];
                expand(e, word(w[s + h], first_tile + j));
#pragma unroll
                for (int n = 0; n < NT; n++) mma(part[n][j], e[0], e[2], e[1], e[3], b[n][2 * h], b[n][2 * h + 1]);
              }
            }
          }
#pragma unroll
          for (int j = 0; j < TILES; j++) {
            const int tile = first_tile + j;
            const float z0 = HAS_ZEROS ? low_float(z[tile]) : MIDDLE, z1 = HAS_ZEROS ? high_float(z[tile]) : MIDDLE;
            const u32 s = GROUP_SIZE ? word(scale[i], tile) : 0;
#pragma unroll
            for (int n = 0; n < NT; n++)
#pragma unroll
              for (int e = 0; e < 4; e++) {
                const float sum = fmaf(e < 2 ? -z0 : -z1, sum_x[n][e & 1], part[n][j][e]);
                float& to = acc[n][tile][e];
                to = GROUP_SIZE ? fmaf(e < 2 ? low_float(s) : high_float(s), sum, to) : to + sum;
              }
          }
        }
      }
    }
    // The warps' sums, always in the same order.
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
      for (int j = 0; j < 4; j++)
        sums[((warp * NT + n) * 4 + j) * 32 + lane] = make_float4(acc[n][j][0], acc[n][j][1], acc[n][j][2], acc[n][j][3]);
    meet<32 * NW>();
    for (int at = threadIdx.x; at < NT * 128; at += 32 * NW) {
      const int n = at / 128;
      if (token0 + n * 8 + (lane & 3) * 2 >= p.tokens) continue;
      float4 v = sums[at];
#pragma unroll
      for (int i = 1; i < NW; i++) {
        const float4 u = sums[i * NT * 128 + at];
        v.x += u.x, v.y += u.y, v.z += u.z, v.w += u.w;
      }
      if (SPLITS == 1) store(p, v, strip, at / 32 % 4, token0 + n * 8, lane);
      else *partial_of(p, blockIdx.z, n, strip * 128 + at % 128) = v;
    }
    if (strip + 1 < r.strip_end) meet<32 * NW>();
  }
  if (SPLITS > 1) add_parts(p, r, token0, threadIdx.x);
}
