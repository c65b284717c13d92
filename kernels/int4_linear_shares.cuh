// What the kernels for many tokens share, whose CTAs have shares of the row tiles and of the input channels: a warp's ring of codes,
// and sums of several CTAs. Macros: those of int4_linear.cuh, GROUP_SIZE WARPS STAGES TILES TOKEN_TILES SPLITS CLUSTER
#pragma once

#include "int4_linear.cuh"

constexpr int NW = WARPS, T = TILES, NT = TOKEN_TILES, S = STAGES, GROUPS = 128 / GROUP_SIZE;  // groups of a chunk
constexpr int CODES = 1024, SCALES = 64 * GROUPS, UNIT = CODES + SCALES;                         // bytes of one tile's chunk
static_assert(S >= 2, "a stage is filled while another is used");

extern __shared__ __align__(1024) u8 smem[];

#if CLUSTER
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
struct Range {
  int tile_begin, tiles, chunk_begin, chunks, token0;
};
DEV Range range_of(const Params& p) {
  Range r;
  r.tile_begin = (u32)(p.tiles * blockIdx.x) / gridDim.x;
  r.tiles = (int)((u32)(p.tiles * (blockIdx.x + 1)) / gridDim.x) - r.tile_begin;
  r.chunk_begin = p.chunks * blockIdx.z / SPLITS;
  r.chunks = p.chunks * (blockIdx.z + 1) / SPLITS - r.chunk_begin;
  r.token0 = blockIdx.y * 8 * NT;
  return r;
}

// ---- Codes -----------------------------------------------------------------------------------------------------------
// A warp's place in the weight: the next chunk of its first row tile. Its others lie NW tiles apart.
struct Place {
  const u8 *codes, *scales;
  int slots;  // row tiles that it has
};
DEV Place place_of(const Params& p, const Range& r, int warp, int slots, int lane) {
  const i64 first = (i64)(r.tile_begin + warp) * p.chunks + r.chunk_begin;
  return {p.codes + first * CODES + lane * 16, p.scales + first * SCALES + lane * 16, slots};
}
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
  meet<32 * NW>();
  if (thread == 0) {
    __threadfence();
    atomicAdd(arrived_of(p), 1);
    while (load_acquire(arrived_of(p)) < SPLITS) {
    }
  }
  meet<32 * NW>();
#endif
}
// Until what this CTA has left may go: when all have read it. The workspace stays; its counter is zero for the next launch.
DEV void leave_splits(const Params& p, int thread) {
#if CLUSTER
  cluster_meet();
#else
  meet<32 * NW>();
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

// Store a warp's sums, of its row tiles warp + i * NW; where CTAs share the channels, once theirs are added.
DEV void finish(const Params& p, const Range& r, const float (&acc)[T][NT][4], int warp, int slots, int lane) {
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
