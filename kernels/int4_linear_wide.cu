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

#include "int4_linear.cuh"
#if WGMMA
#include "wgmma.cuh"
#endif

constexpr int NW = WARPS, T = TILES, NT = TOKEN_TILES, S = STAGES, XS = X_STAGES, NP = PRODUCERS;
constexpr int GROUPS = 128 / GROUP_SIZE, STEPS = GROUP_SIZE / 16;  // per chunk; products of k = 16 per group
constexpr int CODES = 1024, SCALES = 64 * GROUPS, UNIT = CODES + SCALES;  // bytes of one tile's chunk
constexpr int X_HALF = NT * 1024, X_STAGE = 2 * X_HALF;                    // 64 and 128 channels of all tokens
constexpr int RINGS_AT = XS * X_STAGE, RINGS = NW * S * T * UNIT;
constexpr int SUMS = CLUSTER ? NW * T * NT * 512 : 0;  // in the place of the rings
constexpr int BARRIERS_AT = RINGS_AT + RINGS > SUMS ? RINGS_AT + RINGS : SUMS;
static_assert(NP <= XS, "a warp that is a whole ring ahead would take the parity of an earlier round for its own");
static_assert(!CLUSTER || SPLITS > 1, "a cluster is of several CTAs");
static_assert(NT % 2 == 0, "x is brought two tiles of tokens at a time");
static_assert(S >= 2 && XS >= 2, "a stage is filled while another is used");
#if WGMMA
static_assert(NW % 4 == 0, "four warps are a warp group");
#endif

extern __shared__ __align__(1024) u8 smem[];

DEV void wait_for_consumers() { asm volatile("bar.sync 1,%0;" ::"n"(32 * NW) : "memory"); }
DEV void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LEFT>
DEV void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}
DEV void sts32(u32 a, u32 x) { asm volatile("st.shared.u32 [%0],%1;" ::"r"(a), "r"(x) : "memory"); }
DEV uint4 ldmatrix4(u32 a) {
  uint4 r;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3},[%4];"
               : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w)
               : "r"(a)
               : "memory");
  return r;
}
DEV uint4 ldg128_if(const u16* p, bool there) {  // or zeros
  uint4 r;
  asm volatile(
      "{.reg .pred p;\n setp.ne.u32 p,%5,0;\n mov.u32 %0,0;\n mov.u32 %1,0;\n mov.u32 %2,0;\n mov.u32 %3,0;\n"
      " @p ld.global.v4.u32 {%0,%1,%2,%3},[%4];}"
      : "=&r"(r.x), "=&r"(r.y), "=&r"(r.z), "=&r"(r.w)
      : "l"(p), "r"((u32)there));
  return r;
}
#if CLUSTER
DEV void sts128(u32 a, float4 v) {
  asm volatile("st.shared.v4.f32 [%0],{%1,%2,%3,%4};" ::"r"(a), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w) : "memory");
}
// From the shared memory of a CTA of the cluster, at what is `a` in one's own.
DEV float4 lds128_of(int cta, u32 a) {
  float4 r;
  asm volatile("{.reg .u32 at;\n mapa.shared::cluster.u32 at,%4,%5;\n ld.shared::cluster.v4.f32 {%0,%1,%2,%3},[at];}"
               : "=f"(r.x), "=f"(r.y), "=f"(r.z), "=f"(r.w)
               : "r"(a), "r"(cta)
               : "memory");
  return r;
}
// All threads of the cluster that have not returned; what they wrote is there.
DEV void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;\n barrier.cluster.wait.acquire;" ::: "memory");
}
// The same, without a wait for what they wrote.
DEV void cluster_meet() {
  asm volatile("barrier.cluster.arrive.relaxed;\n barrier.cluster.wait.acquire;" ::: "memory");
}
#endif
DEV int load_acquire(const int* p) {
  int r;
  asm volatile("ld.acquire.gpu.global.s32 %0,[%1];" : "=r"(r) : "l"(p) : "memory");
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

struct Range {
  int tile_begin, tiles, chunk_begin, chunks, token0;
};

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
// A warp's place in the weight: the next chunk of its first row tile. Its others lie NW tiles apart.
struct Place {
  const u8 *codes, *scales;
  int slots;  // row tiles that it has
};
DEV void fetch(Place& from, u32 to, i64 chunks, int lane) {
#pragma unroll
  for (int i = 0; i < T; i++)
    if (i < from.slots) {
      const u8* codes = from.codes + i * NW * CODES * chunks;
      copy16(to + i * UNIT + lane * 16, codes);
      copy16(to + i * UNIT + lane * 16 + 512, codes + 512);
      if (lane < SCALES / 16) copy16(to + i * UNIT + CODES + lane * 16, from.scales + i * NW * SCALES * chunks);
    }
  from.codes += CODES, from.scales += SCALES;
}

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

// ---- Sums of several CTAs --------------------------------------------------------------------------------------------
// A lane's sums of row tile `tile` of the CTA and tokens 8*n..8*n+7, of CTA `split`. With CLUSTER all warps are done with the
// rings before sums take their place.
#if CLUSTER
DEV u32 sums_at(int tile, int n, int lane) { return ((tile * NT + n) * 32 + lane) * 16; }
DEV void leave(const Params&, const Range&, int tile, int n, int lane, float4 v) {
  sts128(shared_address(smem) + sums_at(tile, n, lane), v);
}
DEV float4 left_by(const Params&, const Range&, int split, int tile, int n, int lane) {
  return lds128_of(split, shared_address(smem) + sums_at(tile, n, lane));
}
#else
DEV float4* sums_at(const Params& p, const Range& r, int split, int tile, int n, int lane) {
  return p.partial + ((split * gridDim.y + blockIdx.y) * NT + n) * (i64)p.tiles * 32 + (r.tile_begin + tile) * 32 + lane;
}
DEV void leave(const Params& p, const Range& r, int tile, int n, int lane, float4 v) {
  *sums_at(p, r, blockIdx.z, tile, n, lane) = v;
}
DEV float4 left_by(const Params& p, const Range& r, int split, int tile, int n, int lane) {
  return __ldcg(sums_at(p, r, split, tile, n, lane));
}
DEV int* arrived_of(const Params& p) { return p.arrived + blockIdx.y * gridDim.x + blockIdx.x; }
#endif

// Until all CTAs of these rows have left their sums.
DEV void wait_for_splits(const Params& p, int thread) {
#if CLUSTER
  cluster_sync();
#else
  wait_for_consumers();
  if (thread == 0) {
    __threadfence();
    atomicAdd(arrived_of(p), 1);
    while (load_acquire(arrived_of(p)) < SPLITS) {
    }
  }
  wait_for_consumers();
#endif
}
// Until what this CTA has left may go: when all have read it. The workspace stays; its counter is zero for the next launch.
DEV void leave_splits(const Params& p, int thread) {
#if CLUSTER
  cluster_meet();
#else
  wait_for_consumers();
  if (thread == 0 && atomicAdd(arrived_of(p), 1) == 2 * SPLITS - 1) *arrived_of(p) = 0;
#endif
}

// Add up this CTA's part of the sums, two at a time, for their loads to be under way together.
DEV void merge_splits(const Params& p, const Range& r, int thread) {
  const int all = r.tiles * NT, begin = all * blockIdx.z / SPLITS, end = all * (blockIdx.z + 1) / SPLITS, lane = thread & 31;
  for (int at = begin + thread / 32; at < end; at += 2 * NW) {
    float4 v[2][SPLITS];
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
      for (int z = 0; z < SPLITS; z++)
        if (at + i * NW < end) v[i][z] = left_by(p, r, z, (at + i * NW) / NT, (at + i * NW) % NT, lane);
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int n = (at + i * NW) % NT, tile = r.tile_begin + (at + i * NW) / NT;
      if (at + i * NW >= end || r.token0 + n * 8 + (lane & 3) * 2 >= p.tokens) continue;
#pragma unroll
      for (int z = 1; z < SPLITS; z++)
        v[i][0].x += v[i][z].x, v[i][0].y += v[i][z].y, v[i][0].z += v[i][z].z, v[i][0].w += v[i][z].w;
      store(p, v[i][0], tile, r.token0 + n * 8, lane);
    }
  }
}

#if CLUSTER
#define IN_CLUSTERS __cluster_dims__(1, 1, SPLITS)
#else
#define IN_CLUSTERS
#endif
extern "C" __global__ void __launch_bounds__(32 * (NW + NP), MIN_CTAS) IN_CLUSTERS
int4_linear_wide(const __grid_constant__ Params p) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  Range r;
  r.tile_begin = (u32)(p.tiles * blockIdx.x) / gridDim.x;
  r.tiles = (int)((u32)(p.tiles * (blockIdx.x + 1)) / gridDim.x) - r.tile_begin;
  r.chunk_begin = p.chunks * blockIdx.z / SPLITS;
  r.chunks = p.chunks * (blockIdx.z + 1) / SPLITS - r.chunk_begin;
  r.token0 = blockIdx.y * 8 * NT;
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
  const i64 first = (i64)(r.tile_begin + warp) * p.chunks + r.chunk_begin;
  const int slots = (r.tiles - warp + NW - 1) / NW;
  Place place = {p.codes + first * CODES + lane * 16, p.scales + first * SCALES + lane * 16, slots};
#pragma unroll
  for (int c = 0; c < S - 1; c++) {
    if (c < r.chunks) fetch(place, ring + c * T * UNIT, p.chunks, lane);
    commit_copies();
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
    wait_for_copies<S - 2>();
    __syncwarp();  // for the scales, which few lanes copy; and all lanes are done with the chunk before
    if (c + S - 1 < r.chunks) fetch(place, ring + (slot == 0 ? S - 1 : slot - 1) * T * UNIT, p.chunks, lane);
    commit_copies();
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
  wait_for_consumers();
#endif
#pragma unroll
  for (int i = 0; i < T; i++)
    if (i < slots)
#pragma unroll
      for (int n = 0; n < NT; n++) {
        if (r.token0 + n * 8 + (lane & 3) * 2 >= p.tokens) continue;
        const float4 v = make_float4(acc[i][n][0], acc[i][n][1], acc[i][n][2], acc[i][n][3]);
        const int tile = warp + i * NW;
        if (SPLITS == 1) store(p, v, r.tile_begin + tile, r.token0 + n * 8, lane);
        else leave(p, r, tile, n, lane, v);
      }
  if (SPLITS > 1) {
    wait_for_splits(p, threadIdx.x);
    merge_splits(p, r, threadIdx.x);
    leave_splits(p, threadIdx.x);
  }
}
