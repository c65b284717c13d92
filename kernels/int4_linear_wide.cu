// y = x W^T for 17 tokens or more (tiles of 8; a launch has blocks of up to 64) and a weight of 4-bit codes in groups. Compiled
// by NVRTC.
//
// Output rows are M and tokens N, as in int4_linear.cu, and codes have its order. Here x is more than one warp can hold, and
// reading it is no longer free: a CTA has a share of the row tiles and of the input channels (SPLITS), and its warps share x.
//
// A warp multiplies up to TILES row tiles. Their codes come through a ring in shared memory of its own (cp.async; a lane copies
// what it will read, so no other warp waits). Codes become floats, scaled, in registers: one fragment serves all tokens.
// x comes through a ring of the CTA: a few more warps (PRODUCERS) take one chunk of 128 channels each, rotate it where the weight
// is that of rotated inputs, and store it as rows of 64 channels in the order of the fragments, swizzled for ldmatrix and wgmma
// alike.
//
// WGMMA (Hopper): four warps with a row tile each are a warp group; the tensor cores read x from shared memory once per 64 rows and
// work while the next codes are unpacked. Otherwise mma.m16n8k16, everywhere.
//
// SPLITS: the CTAs of the same rows leave their sums where the others can read them, wait for one another, and each adds up and
// stores its part. With CLUSTER (Hopper) they are one thread block cluster and read each other's shared memory. Otherwise sums go
// through the workspace, and the launch has to be on the GPU as a whole: no more CTAs than fit at once. The order of all sums is
// fixed.
//
// The launch overlaps with its predecessor as in int4_linear.cu: only codes are read before the wait.
//
// Macros: GROUP_SIZE IS_BF16 WARPS (that multiply) STAGES (chunks of a warp's codes) TILES TOKEN_TILES X_STAGES (chunks of x)
//         PRODUCERS SPLITS MIN_CTAS (CTAs that registers allow on a multiprocessor) WGMMA CLUSTER ROTATED

#include "int4_linear_shares.cuh"
#if WGMMA
#include "wgmma.cuh"
#endif

constexpr int XS = X_STAGES, NP = PRODUCERS, STEPS = GROUP_SIZE / 16;  // products of k = 16 per group
constexpr int X_HALF = NT * 1024, X_STAGE = 2 * X_HALF;                    // 64 and 128 channels of all tokens
constexpr int RINGS_AT = XS * X_STAGE, RINGS = NW * S * T * UNIT;
constexpr int SUMS = CLUSTER ? NW * T * NT * 512 : 0;  // in the place of the rings
constexpr int BARRIERS_AT = RINGS_AT + RINGS > SUMS ? RINGS_AT + RINGS : SUMS;
static_assert(NP <= XS, "a warp that is a whole ring ahead would take the parity of an earlier round for its own");
static_assert(!CLUSTER || SPLITS > 1, "a cluster is of several CTAs");
static_assert(NT % 2 == 0, "x is brought two tiles of tokens at a time");
static_assert(XS >= 2, "a stage is filled while another is used");
#if WGMMA
static_assert(NW % 4 == 0, "four warps are a warp group");
#endif

DEV uint4 ldmatrix4(u32 a) {
  uint4 r;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3},[%4];"
               : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w)
               : "r"(a)
               : "memory");
  return r;
}
DEV u32 fma2(u32 a, u32 b, u32 c) {
  u32 r;
#if IS_BF16
  asm("fma.rn.bf16x2 %0,%1,%2,%3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
#else
  asm("fma.rn.f16x2 %0,%1,%2,%3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
#endif
  return r;
}

// ---- x ---------------------------------------------------------------------------------------------------------------
// Two tiles of tokens of a chunk.
struct Step {
  int chunk, n;  // of the CTA's chunks; the first tile
  DEV void advance() {
    n += 2;
    if (n == NT) n = 0, chunk += NP;
  }
};

// Lane 4*g+t has channels 32*j + 8*t + 0..7 of token g, for two tiles of tokens and all j; zeros where there is no such channel.
DEV void load_x(uint4 (&x)[2][4], const Params& p, const Range& r, const Step& step, int lane) {
  const int left = step.chunk < r.chunks ? p.channels - (r.chunk_begin + step.chunk) * 128 : 0;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int token = r.token0 + (step.n + i) * 8 + (lane >> 2);
    const u16* from = p.x + token * p.x_stride + (r.chunk_begin + step.chunk) * 128 + (lane & 3) * 8;
#pragma unroll
    for (int j = 0; j < 4; j++) x[i][j] = ldg128_if(from + j * 32, token < p.tokens && j * 32 < left);
  }
}

// A row is a token's 64 channels; a lane's 8 channels of 32 are the four words t of 16-byte pieces 4 * (j % 2) + 0..3, which are
// the k = 0..7 and 8..15 of products 2*j and 2*j+1.
DEV void store_x(u32 to, const uint4 (&x)[2][4], int lane) {
  const int g = lane >> 2;
  to += g * 128 + (lane & 3) * 4;
#pragma unroll
  for (int i = 0; i < 2; i++)
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
      for (int q = 0; q < 4; q++) sts32(to + j / 2 * X_HALF + i * 1024 + (((j % 2 * 4 + q) ^ g) << 4), word(x[i][j], q));
}

// One of the warps that fill the ring of x. Each takes whole chunks and has two loads of 4 KB under way.
DEV void produce_x(const Params& p, const Range& r, u32 ring, u32 full, u32 empty, int producer, int lane) {
#if ROTATED
  const u32 signs = signs_of_lane(lane);
#endif
  uint4 x[2][2][4];
  Step step = {producer, 0}, ahead = step;
#pragma unroll
  for (int b = 0; b < 2; b++, ahead.advance()) load_x(x[b], p, r, ahead, lane);
#pragma unroll 1
  while (true) {
#pragma unroll
    for (int b = 0; b < 2; b++, step.advance(), ahead.advance()) {
      if (step.chunk >= r.chunks) return;
      const int slot = step.chunk % XS, round = step.chunk / XS;
      if (step.n == 0 && round > 0) wait_for(empty + slot * 8, (round & 1) ^ 1);
#if ROTATED
#pragma unroll
      for (int e = 0; e < 8; e++) rotate(x[b][e / 4][e % 4], signs);
#endif
      store_x(ring + slot * X_STAGE + step.n * 1024, x[b], lane);
      if (step.n == NT - 2) {
#if WGMMA
        fence_shared();
#endif
        arrive(full + slot * 8);
      }
      load_x(x[b], p, r, ahead, lane);
    }
  }
}

// ---- Codes -----------------------------------------------------------------------------------------------------------
// Pairs of the same number, for rows g and g + 8.
struct Scale {
  u32 scale[2], minus_zero[2];
};
DEV Scale scale_of(u32 unit, int product, int lane) {
  const uint2 v = lds64(unit + CODES + product / STEPS * 64 + (lane >> 2) * 8);
  return {{__byte_perm(v.x, 0, 0x1010), __byte_perm(v.y, 0, 0x1010)},
          {__byte_perm(v.x, 0, 0x3232) ^ 0x80008000, __byte_perm(v.y, 0, 0x3232) ^ 0x80008000}};
}
// (code - zero point) * scale of 8 weights; only the last product is rounded.
DEV void scaled(u32 (&a)[4], u32 w, const Scale& by) {
  const u32 one = IS_BF16 ? 0x3f803f80 : 0x3c003c00;
  expand(a, w);
#pragma unroll
  for (int e = 0; e < 4; e++) a[e] = fma2(fma2(a[e], one, by.minus_zero[e & 1]), by.scale[e & 1], 0x80008000);
}

#if CLUSTER
#define IN_CLUSTERS __cluster_dims__(1, 1, SPLITS)
#else
#define IN_CLUSTERS
#endif
extern "C" __global__ void __launch_bounds__(32 * (NW + NP), MIN_CTAS) IN_CLUSTERS
int4_linear_wide(const __grid_constant__ Params p) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const Range r = range_of(p);
  const u32 x_ring = shared_address(smem), full = x_ring + BARRIERS_AT, empty = full + 8 * XS;
  if (threadIdx.x < XS) {
    barrier_init(full + threadIdx.x * 8, 32);
    barrier_init(empty + threadIdx.x * 8, NW);
  }
  __syncthreads();
  if (warp >= NW) {
    wait_for_predecessor();
    return produce_x(p, r, x_ring, full, empty, warp - NW, lane);
  }

  // This warp's tiles are tile_begin + warp + i * NW.
  const u32 ring = x_ring + RINGS_AT + warp * (S * T * UNIT);
  const int slots = (r.tiles - warp + NW - 1) / NW;
  Place place = place_of(p, r, warp, slots, lane);
#pragma unroll
  for (int c = 0; c < S - 1; c++) {
    if (c < r.chunks) fetch(place, ring + c * T * UNIT, p.chunks, lane);
    end_batch();
  }
  wait_for_predecessor();
  release_successor();

  float acc[T][NT][4];
#pragma unroll
  for (int i = 0; i < T; i++)
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) acc[i][n][e] = 0.f;
#if WGMMA
  const int team_slots = (r.tiles - warp / 4 * 4 + NW - 1) / NW;
#endif
  int slot = 0, x_slot = 0;
  u32 parity = 0;
#pragma unroll 1
  for (int c = 0; c < r.chunks; c++) {
    const u32 stage = ring + slot * T * UNIT, x = x_ring + x_slot * X_STAGE;
    const u32 used = empty + (x_slot == 0 ? XS - 1 : x_slot - 1) * 8;  // the chunk before has been there
    wait_for_batches<S - 2>();
    __syncwarp();  // for the scales, which few lanes copy; and all lanes are done with the chunk before
    if (c + S - 1 < r.chunks) fetch(place, ring + (slot == 0 ? S - 1 : slot - 1) * T * UNIT, p.chunks, lane);
    end_batch();
    wait_for(full + x_slot * 8, parity);
#if WGMMA
    if (team_slots <= 0 && lane == 0 && c > 0) arrive(used);
    const u32 columns = columns_at(x);
#pragma unroll
    for (int i = 0; i < T; i++)
      if (i < team_slots) {  // the same for the four warps; one without a tile multiplies what is there and stores nothing
        const uint4 w[2] = {lds128(stage + i * UNIT + lane * 16), lds128(stage + i * UNIT + lane * 16 + 512)};
        Scale by;
#pragma unroll
        for (int h = 0; h < 2; h++) {
          u32 a[4][4];
#pragma unroll
          for (int s = 0; s < 4; s++) {
            if ((4 * h + s) % STEPS == 0) by = scale_of(stage + i * UNIT, 4 * h + s, lane);
            scaled(a[s], word(w[h], s), by);
          }
          wgmma_fence();
#pragma unroll
          for (int s = 0; s < 4; s++) wgmma<NT>(acc[i][0], a[s], columns + (h * X_HALF + s * 32) / 16);
          wgmma_commit();
          wgmma_wait<1>();  // so the fragments before these can be replaced
          if (i == 0 && h == 0 && lane == 0 && c > 0) arrive(used);
        }
      }
#else
    if (lane == 0 && c > 0) arrive(used);
    Scale by[T];
#pragma unroll
    for (int h = 0; h < 2; h++) {
      uint4 w[T];
#pragma unroll
      for (int i = 0; i < T; i++) w[i] = lds128(stage + i * UNIT + h * 512 + lane * 16);
#pragma unroll
      for (int j = 0; j < 2; j++) {
        uint4 b[NT];
#pragma unroll
        for (int n = 0; n < NT; n++)
          b[n] = ldmatrix4(x + h * X_HALF + n * 1024 + (lane & 7) * 128 + (((j * 4 + (lane >> 3)) ^ (lane & 7)) << 4));
#pragma unroll
        for (int i = 0; i < T; i++)
          if (i < slots)
#pragma unroll
            for (int k = 0; k < 2; k++) {
              u32 a[4];
              if ((4 * h + 2 * j + k) % STEPS == 0) by[i] = scale_of(stage + i * UNIT, 4 * h + 2 * j + k, lane);
              scaled(a, word(w[i], j * 2 + k), by[i]);
#pragma unroll
              for (int n = 0; n < NT; n++) mma(acc[i][n], a, word(b[n], 2 * k), word(b[n], 2 * k + 1));
            }
      }
    }
#endif
    if (++slot == S) slot = 0;
    if (++x_slot == XS) x_slot = 0, parity ^= 1;
  }
#if WGMMA
  wgmma_wait<0>();
#pragma unroll
  for (int i = 0; i < T; i++) hold<NT>(acc[i][0]);
#endif
#if CLUSTER
  meet<32 * NW>();
#endif
  finish(p, r, acc, warp, slots, lane);
}
