// A mixture's experts in INT4 for a few tokens, on weights in the layout of vLLM's Marlin kernel. Compiled by NVRTC, twice:
// for gate and up, and for down (DOWN), which begins with the activation and ends with the sum over a token's experts.
//
// That layout (int4_experts.py) is the order of the A fragments of mma.m16n8k16: of 16 channels and 64 outputs ("a strip")
// lane 4*g + q holds the 16 bytes of four row tiles, rows g and g + 8, channels 2*q, 2*q + 1, 2*q + 8 and 2*q + 9. Codes
// become floats by being ORed into the mantissa of MAGIC; a group's scale, its zero point and MAGIC are applied to its sum.
//
// The N = 8 columns of a product are "pairs" of a token and one of its experts. A CTA belongs to a pair; it looks for the pairs
// with the same expert, and ends unless it is the first of up to 8 of them (the 9th leads the next lot). So an expert's bytes
// are read once for 8 tokens, and no launch sorts tokens before.
//
// Of its input channels a CTA has a part (SPLITS) that does not depend on the number of tokens, in fp32 sums that are always
// added up in the same order: a token's result is the same whatever the others. Its warps share the channels in units. A warp
// has the codes of a unit in flight, by cp.async to shared memory, where they cost no registers; a lane copies what it multiplies
// itself, so that nobody waits for others. Two rows at a time are multiplied, and those of the next unit asked for in their place.
//
// Launches overlap (programmatic dependent launch), as int4_linear.cu's: the weights of down come before the wait. What they are
// chosen by was written before the predecessor, which waited for that and released this launch afterwards.
//
// Macros: DOWN GROUP_SIZE IS_BF16 WARPS UNIT (channels) IN_FEATURES OUT_FEATURES SPLITS IN_SPLITS (those of the launch before)
//         CHOSEN (experts per token) ACTIVATION (0: silu, 1: gelu, 2: gelu_tanh) MIN_CTAS (that registers allow)

#include "int4_codes.cuh"

constexpr int THREADS = 32 * WARPS, UNITS = IN_FEATURES / UNIT, MOST = (UNITS + SPLITS - 1) / SPLITS * UNIT;
constexpr int ROWS = UNIT / 16, GROUPS = UNIT / GROUP_SIZE, STEPS = GROUP_SIZE / 16;
constexpr u32 ROW_BYTES = OUT_FEATURES * 8;        // of 16 channels
constexpr int X_ROW = (MOST + 8) * 2;              // bytes; the padding avoids bank conflicts
constexpr int LOT = 8;                             // pairs
constexpr int BATCHES = ROWS / 2;                  // of two rows, that arrive together
constexpr int SUMS_AT = LOT * X_ROW, RING_AT = SUMS_AT + WARPS * 2048;
static_assert(IN_FEATURES % UNIT == 0 && UNIT % GROUP_SIZE == 0 && OUT_FEATURES % 64 == 0, "whole units and strips");

extern __shared__ __align__(128) u8 smem[];  // x [LOT][X_ROW], sums float4 [WARPS][4][32], codes [WARPS][ROWS][32 * 16]

struct Params {
  const u16* x;              // [tokens, IN_FEATURES], of gate and up
  const float* gate_up;      // [IN_SPLITS][pairs][2 * IN_FEATURES], of down
  const int* ids;            // [pairs], id_stride words apart
  const float* topk_weights; // [pairs]
  const u8* codes;
  const u8* scales;
  const u8* zeros;
  float* sums;               // [SPLITS][pairs][OUT_FEATURES]
  int* arrived;              // [tokens][CTAs along the outputs], of down
  u16* out;                  // [tokens, OUT_FEATURES], of down
  i64 x_stride;
  int pairs, id_stride, strips;  // strips of a CTA
};

// ---- Loads and products ----------------------------------------------------------------------------------------------
DEV void copy_codes(u32 to, const u8* from, int there) {
  asm volatile("{.reg .pred t;\n setp.ne.s32 t,%2,0;\n @t cp.async.cg.shared.global.L2::128B [%0],[%1],16;}" ::"r"(to), "l"(from),
               "r"(there)
               : "memory");
}
DEV void wait_for_batch() { asm volatile("cp.async.wait_group %0;" ::"n"(BATCHES - 1) : "memory"); }
DEV void load_scales(uint4& r, const u8* p, int there) {
  asm volatile("{.reg .pred t;\n setp.ne.s32 t,%5,0;\n @t ld.global.nc.v4.u32 {%0,%1,%2,%3},[%4];}"
               : "+r"(r.x), "+r"(r.y), "+r"(r.z), "+r"(r.w)
               : "l"(p), "r"(there));
}
DEV void load_zeros(u32& r, const u8* p, int there) {
  asm volatile("{.reg .pred t;\n setp.ne.s32 t,%2,0;\n @t ld.global.nc.u32 %0,[%1];}" : "+r"(r) : "l"(p), "r"(there));
}
#if DOWN
DEV float activated(float x) {
  // 1 + tanh(u) = 2 sigmoid(2 u)
  if (ACTIVATION == 1) return 0.5f * x * (1.f + erff(x * 0.7071067811865476f));
  const float u = ACTIVATION == 0 ? x : 1.5957691216057308f * (x + 0.044715f * x * x * x);
  return x / (1.f + __expf(-u));
}
#endif

// ---- Which pairs -----------------------------------------------------------------------------------------------------
// The pairs of a lot that `pair` leads, in their order, and how many they are: 0 if another leads. For a warp.
DEV int find_lot(const Params& p, int pair, int expert, int* lot, int lane) {
  constexpr int AT_ONCE = 4;
  int before = 0, count = 0;
  for (int base = 0; base < p.pairs; base += 32 * AT_ONCE) {
    int id[AT_ONCE];
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
      const int at = base + 32 * i + lane;
      id[i] = at < p.pairs ? p.ids[(i64)at * p.id_stride] : -1;
    }
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
      const int at = base + 32 * i + lane;
      const bool same = at < p.pairs && id[i] == expert;
      before += __popc(__ballot_sync(0xffffffffu, same && at < pair));
      const u32 later = __ballot_sync(0xffffffffu, same && at >= pair);
      const int place = count + __popc(later & ((1u << lane) - 1));
      if (same && at >= pair && place < LOT) lot[place] = at;
      count += __popc(later);
    }
  }
  __syncwarp();
  return before % LOT ? 0 : min(count, LOT);
}

// ---- Inputs of the lot, channels `begin` to `end`, to shared memory ----------------------------------------------------
DEV void fill_x(const Params& p, const int* lot, int count, int begin, int end) {
#if DOWN
  const u32 quads = (UNITS % SPLITS ? end - begin : MOST) / 4;
  for (u32 at = threadIdx.x; at < count * quads; at += THREADS) {
    const int slot = at / quads, k = at % quads * 4;
    const float* from = p.gate_up + (i64)lot[slot] * (2 * IN_FEATURES) + begin + k;
    float4 gate = make_float4(0.f, 0.f, 0.f, 0.f), up = gate;
#pragma unroll
    for (int z = 0; z < IN_SPLITS; z++) {
      const float* part = from + (i64)z * p.pairs * (2 * IN_FEATURES);
      const float4 a = __ldcg(reinterpret_cast<const float4*>(part));
      const float4 b = __ldcg(reinterpret_cast<const float4*>(part + IN_FEATURES));
      gate.x += a.x, gate.y += a.y, gate.z += a.z, gate.w += a.w;
      up.x += b.x, up.y += b.y, up.z += b.z, up.w += b.w;
    }
    const uint2 v = make_uint2(pack_16bit(activated(gate.x) * up.x, activated(gate.y) * up.y),
                               pack_16bit(activated(gate.z) * up.z, activated(gate.w) * up.w));
    *reinterpret_cast<uint2*>(smem + slot * X_ROW + k * 2) = v;
  }
#else
  const u32 eights = (UNITS % SPLITS ? end - begin : MOST) / 8;
  for (u32 at = threadIdx.x; at < count * eights; at += THREADS) {
    const int slot = at / eights, k = at % eights * 8;
    const u16* from = p.x + lot[slot] / CHOSEN * p.x_stride + begin + k;
    *reinterpret_cast<uint4*>(smem + slot * X_ROW + k * 2) = *reinterpret_cast<const uint4*>(from);
  }
#endif
}

#if DOWN
// The last CTA to arrive of those of a token's experts adds up what they left, always in the same order.
DEV void add_experts(const Params& p, const int* lot, int count, int block, int first, int outputs) {
  __shared__ int last[LOT];
  __syncthreads();
  if (threadIdx.x < count) {
    __threadfence();  // of what all threads have written, since the barrier
    int* arrived = p.arrived + (i64)(lot[threadIdx.x] / CHOSEN) * gridDim.x + block;
    last[threadIdx.x] = atomicAdd(arrived, 1) == CHOSEN * SPLITS - 1;
    if (last[threadIdx.x]) *arrived = 0;  // for the next launch
    __threadfence();
  }
  __syncthreads();
  for (u32 at = threadIdx.x; at < (u32)(count * outputs); at += THREADS) {
    const int slot = at / (u32)outputs, output = first + at % (u32)outputs;
    if (!last[slot]) continue;
    const int token = lot[slot] / CHOSEN;
    float sum = 0.f;
#pragma unroll 8
    for (int k = 0; k < CHOSEN; k++) {
      const i64 pair = (i64)token * CHOSEN + k;
      float v = 0.f;
#pragma unroll
      for (int z = 0; z < SPLITS; z++) v += __ldcg(p.sums + (z * (i64)p.pairs + pair) * OUT_FEATURES + output);
      sum = fmaf(p.topk_weights[pair], v, sum);
    }
    p.out[(i64)token * OUT_FEATURES + output] = (u16)pack_16bit(sum, 0.f);
  }
}
#endif

extern "C" __global__ void __launch_bounds__(THREADS, MIN_CTAS) int4_experts(const __grid_constant__ Params p) {
  __shared__ int lots[WARPS][LOT];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, q = lane & 3, split = blockIdx.z;
  int pair = blockIdx.y, block = blockIdx.x;
  if (p.pairs > LOT * CHOSEN) {  // several lots of an expert: side by side, so that one reads what the others brought to L2
    const int id = blockIdx.y * gridDim.x + blockIdx.x;
    pair = id % p.pairs, block = id / p.pairs;
  }
#if !DOWN
  wait_for_predecessor();
  release_successor();
#endif
  int* const lot = lots[warp];
  const int expert = p.ids[(i64)pair * p.id_stride];
  const int count = find_lot(p, pair, expert, lot, lane);
  if (count == 0) return;

  const int begin = UNITS * split / SPLITS, end = UNITS * (split + 1) / SPLITS, first = begin + warp;
  const int strip_begin = block * p.strips, strip_end = min(strip_begin + p.strips, OUT_FEATURES / 64);
  const u8* const codes = p.codes + (i64)expert * (IN_FEATURES / 16) * ROW_BYTES + lane * 16;
  const u8* const scales = p.scales + (i64)expert * (IN_FEATURES / GROUP_SIZE) * (OUT_FEATURES * 2) + (lane >> 2) * 16;
  const u8* const zeros = p.zeros + (i64)expert * (IN_FEATURES / GROUP_SIZE) * (OUT_FEATURES / 2) + (lane >> 2) * 4;
  const u32 shared = shared_address(smem), ring = shared + RING_AT + warp * (ROWS * 512) + lane * 16;
  uint4 scale[GROUPS];
  u32 zero[GROUPS];
  {
    const int there = first < end;
    const u8* from = codes + first * ROWS * ROW_BYTES + strip_begin * 512;
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      copy_codes(ring + r * 512, from + r * ROW_BYTES, there);
      if (r % 2) end_batch();
    }
#pragma unroll
    for (int i = 0; i < GROUPS; i++) {
      load_scales(scale[i], scales + (first * GROUPS + i) * (OUT_FEATURES * 2) + strip_begin * 128, there);
      load_zeros(zero[i], zeros + (first * GROUPS + i) * (OUT_FEATURES / 2) + strip_begin * 32, there);
    }
  }
#if DOWN
  wait_for_predecessor();
  release_successor();
#endif
  fill_x(p, lot, count, begin * UNIT, end * UNIT);
  __syncthreads();

  const u32 x_at = shared + (lane & 7) * X_ROW + (lane >> 3) * 16;
  float4* const sums = reinterpret_cast<float4*>(smem + SUMS_AT);
#pragma unroll 1
  for (int strip = strip_begin; strip < strip_end; strip++) {
    float acc[4][4];
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) acc[j][e] = 0.f;
#pragma unroll 1
    for (int unit = first; unit < end; unit += WARPS) {
      const bool same_strip = unit + WARPS < end;
      const int there = same_strip || strip + 1 < strip_end;
      const int next_unit = same_strip ? unit + WARPS : first, next_strip = same_strip ? strip : strip + 1;
      const u8* const next = codes + next_unit * ROWS * ROW_BYTES + next_strip * 512;
      const u32 x_unit = x_at + (unit - begin) * (UNIT * 2);
#pragma unroll
      for (int i = 0; i < GROUPS; i++) {
        float part[4][4], sum_x[4];  // sum_x: [0..1] of the columns 2*q and 2*q + 1
#pragma unroll
        for (int e = 0; e < 4; e++) {
          sum_x[e] = 0.f;
#pragma unroll
          for (int j = 0; j < 4; j++) part[j][e] = 0.f;
        }
        const u32 one = IS_BF16 ? 0x3f803f80 : 0x3c003c00;
#pragma unroll
        for (int r = i * STEPS; r < (i + 1) * STEPS; r += 2) {
          wait_for_batch();
          const uint4 w[2] = {lds128(ring + r * 512), lds128(ring + r * 512 + 512)};
          u32 b[4];
          load_matrices(b, x_unit + r * 32);  // B fragments of 32 channels: two each for two products
#pragma unroll
          for (int h = 0; h < 2; h++) {
            mma(sum_x, one, one, one, one, b[2 * h], b[2 * h + 1]);
#pragma unroll
            for (int j = 0; j < 4; j++) {
              u32 e[4];
              expand(e, word(w[h], j));
              mma(part[j], e[0], e[2], e[1], e[3], b[2 * h], b[2 * h + 1]);
            }
          }
          copy_codes(ring + r * 512, next + r * ROW_BYTES, there);
          copy_codes(ring + r * 512 + 512, next + (r + 1) * ROW_BYTES, there);
          end_batch();
        }
        u32 z[4];
        expand(z, zero[i]);
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const u32 s = word(scale[i], j);
#pragma unroll
          for (int e = 0; e < 4; e++) {
            const float s_e = e < 2 ? low_float(s) : high_float(s), z_e = e < 2 ? low_float(z[j]) : high_float(z[j]);
            acc[j][e] = fmaf(s_e, fmaf(-z_e, sum_x[e & 1], part[j][e]), acc[j][e]);
          }
        }
        load_scales(scale[i], scales + (next_unit * GROUPS + i) * (OUT_FEATURES * 2) + next_strip * 128, there);
        load_zeros(zero[i], zeros + (next_unit * GROUPS + i) * (OUT_FEATURES / 2) + next_strip * 32, there);
      }
    }
    // The warps' sums, always in the same order.
    if (strip > strip_begin) __syncthreads();
    if (2 * q < count)
#pragma unroll
      for (int j = 0; j < 4; j++)
        sums[warp * 128 + j * 32 + lane] = make_float4(acc[j][0], acc[j][1], acc[j][2], acc[j][3]);
    __syncthreads();
    for (int at = threadIdx.x; at < 128; at += THREADS) {
      if (2 * q >= count) continue;
      float4 v = sums[at];
#pragma unroll
      for (int i = 1; i < WARPS; i++) {
        const float4 u = sums[i * 128 + at];
        v.x += u.x, v.y += u.y, v.z += u.z, v.w += u.w;
      }
      float* const to = p.sums + (i64)split * p.pairs * OUT_FEATURES + strip * 64 + at / 32 * 16 + (lane >> 2);
      float* const even = to + (i64)lot[2 * q] * OUT_FEATURES;
      even[0] = v.x, even[8] = v.z;
      if (2 * q + 1 < count) {
        float* const odd = to + (i64)lot[2 * q + 1] * OUT_FEATURES;
        odd[0] = v.y, odd[8] = v.w;
      }
    }
  }
#if DOWN
  add_experts(p, lot, count, block, strip_begin * 64, (strip_end - strip_begin) * 64);
#endif
}
