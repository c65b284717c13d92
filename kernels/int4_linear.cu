// y = x W^T for a few tokens x and a weight W of 4-bit or 8-bit codes in groups. Compiled by NVRTC.
//
// Output rows are the M = 16 of mma.m16n8k16 and tokens its N = 8, so that the bytes of the weight are read once and in
// the order of the A fragments (see int4_linear.py): a lane's 16 bytes are what it multiplies. Codes become floats by
// being ORed into the mantissa of MAGIC; a group's scale, its zero point and MAGIC are applied to its sum, in fp32. 8-bit codes
// are the last bytes of bfloat16 numbers (levels.py), so that one permutation of bytes makes two of them.
//
// The warps of a CTA split the input channels in chunks of 128: what they need of one row tile at a time is one run of
// memory. One more warp brings those runs to a ring in shared memory, so that the bytes in flight cost no registers and
// the others only multiply; their sums meet in shared memory. (cp.async, since it runs everywhere and a bulk copy was no
// faster.) Only where there are too few row tiles for all multiprocessors, CTAs split the chunks as well (SPLITS) and the
// last one to arrive adds up.
//
// The launch overlaps with its predecessor (programmatic dependent launch): the ring is filled before the wait, everything
// that another kernel may have written or may still read is touched after it. The successor is released after the wait, so
// that a kernel that runs ahead finds all but its direct predecessor complete (torch.compile's kernels count on that).
//
// Macros: GROUP_SIZE IS_BF16 WARPS STAGES TILES (row tiles per pass) BATCH (tiles of a stage) TOKEN_TILES (of 8 tokens)
//         SPLITS MIN_CTAS (CTAs that registers allow on a multiprocessor)
//         ROTATED (the weight is that of rotated inputs: x is rotated in registers) CODE_BITS (4 or 8)

#include "int4_linear.cuh"

constexpr int NW = WARPS, S = STAGES, T = TILES, B = BATCH, NT = TOKEN_TILES, CHAINS = B * NT > 2 ? 1 : 2;
constexpr int GROUPS = 128 / GROUP_SIZE, STEPS = GROUP_SIZE / 16;  // per chunk; products of k = 16 per group
constexpr int CODES = 256 * CODE_BITS, SCALES = 64 * GROUPS;  // bytes of one tile's chunk
constexpr int QUADS = CODES / 512;                             // words of a lane, in quadruples
constexpr int STAGE = B * NW * (CODES + SCALES), RING = S * STAGE;
static_assert(T % B == 0, "a pass is made of whole batches");

extern __shared__ __align__(128) u8 smem[];

DEV void wait_for_consumers() { asm volatile("bar.sync 1,%0;" ::"n"(32 * NW) : "memory"); }

// One run of memory to shared memory; MOST is what it mostly is.
template <int MOST>
DEV void copy(u32 to, const u8* from, int bytes, int lane) {
  to += lane * 16, from += lane * 16;
  if (bytes == MOST) {
#pragma unroll
    for (int i = 0; i < MOST; i += 512)
      if (MOST - i >= 512 || lane * 16 < MOST - i) copy16(to + i, from + i);
  } else {
    for (int i = 0; i < bytes - lane * 16; i += 512) copy16(to + i, from + i);
  }
}
struct Range {
  int tile_begin, tile_end, chunk_begin, chunk_end;
};

// The warp that fills the ring, in the order of consumption: pass, NW chunks, batch of tiles.
DEV void produce(const Params& p, const Range& r, u32 ring, u32 full, u32 empty, int lane) {
  int slot = 0, round = 0;
  for (int tile0 = r.tile_begin; tile0 < r.tile_end; tile0 += T) {
    const int tiles = min(T, r.tile_end - tile0);
    for (int chunk = r.chunk_begin; chunk < r.chunk_end; chunk += NW) {
      const int n = min(NW, r.chunk_end - chunk);
      for (int tile = 0; tile < tiles; tile += B) {
        const int there = min(B, tiles - tile);
        if (round > 0) wait_for(empty + slot * 8, (round & 1) ^ 1);
        const u32 to = ring + slot * STAGE, done = full + slot * 8;
#pragma unroll
        for (int i = 0; i < B; i++)
          if (i < there) {
            const i64 unit = (i64)(tile0 + tile + i) * p.chunks + chunk;
            copy<NW * CODES>(to + i * NW * CODES, p.codes + unit * CODES, n * CODES, lane);
            copy<NW * SCALES>(to + B * NW * CODES + i * NW * SCALES, p.scales + unit * SCALES, n * SCALES, lane);
          }
        arrive_copied(done);
        if (++slot == S) slot = 0, round++;
      }
    }
  }
}

// B fragments of one chunk: lane 4*g+t holds channels 32*j + 8*t + 0..7 of token g in word quadruple j. Tokens that are
// not there repeat the last one and are never stored; channels that are not there have a scale of zero.
DEV void load_x(uint4 (&x)[NT][4], const Params& p, const u16* const (&rows)[NT], int chunk) {
  const int left = p.channels - chunk * 128;
#pragma unroll
  for (int n = 0; n < NT; n++)
#pragma unroll
    for (int j = 0; j < 4; j++) x[n][j] = ldg128(rows[n] + chunk * 128 + (j * 32 < left ? j * 32 : 0));
}

DEV float4* partial_of(const Params& p, int split, int n, int at) {
  return p.partial + ((split * gridDim.y + blockIdx.y) * NT + n) * (i64)p.tiles * 32 + at;
}

// The last CTA to arrive adds up what the splits have left in the workspace, always in the same order.
DEV void merge_splits(const Params& p, int tile_begin, int tile_end, int token0, int thread) {
  if (!is_last_to_arrive<32 * NW, SPLITS>(p.arrived + blockIdx.y * gridDim.x + blockIdx.x, thread)) return;
  for (int n = 0; n < NT; n++)
    for (int at = tile_begin * 32 + thread; at < tile_end * 32; at += 32 * NW) {
      if (token0 + n * 8 + (thread & 3) * 2 >= p.tokens) continue;
      float4 v = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
      for (int z = 0; z < SPLITS; z++) {
        const float4 u = __ldcg(partial_of(p, z, n, at));
        v.x += u.x, v.y += u.y, v.z += u.z, v.w += u.w;
      }
      store(p, v, at / 32, token0 + n * 8, thread & 31);
    }
}

extern "C" __global__ void __launch_bounds__(32 * NW + 32, MIN_CTAS) int4_linear(const __grid_constant__ Params p) {
  __shared__ __align__(8) unsigned long long barriers[2 * S];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  Range r;
  r.tile_begin = (u32)(p.tiles * blockIdx.x) / gridDim.x, r.tile_end = (u32)(p.tiles * (blockIdx.x + 1)) / gridDim.x;
  r.chunk_begin = p.chunks * blockIdx.z / SPLITS, r.chunk_end = p.chunks * (blockIdx.z + 1) / SPLITS;
  const u32 ring = shared_address(smem), full = shared_address(barriers), empty = full + 8 * S;
  if (threadIdx.x < S) {
    barrier_init(full + threadIdx.x * 8, 32);
    barrier_init(empty + threadIdx.x * 8, NW);
  }
  __syncthreads();
  if (warp == NW) return produce(p, r, ring, full, empty, lane);
  wait_for_predecessor();
  release_successor();

  const int tile_begin = r.tile_begin, tile_end = r.tile_end, token0 = blockIdx.y * 8 * NT;
  const int first = r.chunk_begin + warp, num_chunks = (r.chunk_end - r.chunk_begin + NW - 1) / NW;
  float4* const sums = reinterpret_cast<float4*>(smem + RING);  // [NW][NT][T][32]
  const u32 codes_at = ring + warp * CODES + lane * 16;
  const u32 scale_at = ring + B * NW * CODES + warp * SCALES + (lane >> 2) * 8;
  uint4 x[NT][4], next_x[NT][4];
  const u16* rows[NT];
#pragma unroll
  for (int n = 0; n < NT; n++)
    rows[n] = p.x + min(token0 + n * 8 + (lane >> 2), p.tokens - 1) * p.x_stride + (lane & 3) * 8;
  load_x(next_x, p, rows, min(first, p.chunks - 1));
#if ROTATED
  const u32 signs = signs_of_lane(lane);
#endif
  int slot = 0;
  u32 parity = 0;

#pragma unroll 1
  for (int tile0 = tile_begin; tile0 < tile_end; tile0 += T) {
    const int tiles = min(T, tile_end - tile0);
    float acc[T][NT][4];
#pragma unroll
    for (int i = 0; i < T; i++)
#pragma unroll
      for (int n = 0; n < NT; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) acc[i][n][e] = 0.f;
#pragma unroll 1
    for (int c = 0; c < num_chunks; c++) {
#pragma unroll
      for (int n = 0; n < NT; n++)
#pragma unroll
        for (int j = 0; j < 4; j++) x[n][j] = next_x[n][j];
      // A load that the last chunk does not need makes a launch up to 8 % longer; with more tokens branches cost more.
      if (NT > 1) load_x(next_x, p, rows, min(c + 1 < num_chunks ? first + (c + 1) * NW : first, p.chunks - 1));
      else if (c + 1 < num_chunks) load_x(next_x, p, rows, min(first + (c + 1) * NW, p.chunks - 1));
      else if (tile0 + T < tile_end) load_x(next_x, p, rows, min(first, p.chunks - 1));
#if ROTATED
#pragma unroll
      for (int n = 0; n < NT; n++)
#pragma unroll
        for (int j = 0; j < 4; j++) rotate(x[n][j], signs);
#endif
      float sum_x[GROUPS][NT][4];  // [0..1] the sums of the channels of tokens 2*t, 2*t + 1
      const u32 one = IS_BF16 ? 0x3f803f80 : 0x3c003c00;
      const u32 ones[4] = {one, one, one, one};
#pragma unroll
      for (int first_tile = 0; first_tile < T; first_tile += B) {
        if (first_tile >= tiles) break;
        wait_for(full + slot * 8, parity);
        uint4 w[B][QUADS];
        uint2 scale[B][GROUPS];
#pragma unroll
        for (int i = 0; i < B; i++) {
          const u32 at = slot * STAGE + i * NW * CODES;
#pragma unroll
          for (int h = 0; h < QUADS; h++) w[i][h] = lds128(codes_at + at + h * 512);
#pragma unroll
          for (int q = 0; q < GROUPS; q++) scale[i][q] = lds64(scale_at + slot * STAGE + i * NW * SCALES + q * 64);
        }
        __syncwarp();
        if (lane == 0) arrive(empty + slot * 8);
        if (++slot == S) slot = 0, parity ^= 1;
        if (first + c * NW >= r.chunk_end) continue;
#pragma unroll
        for (int q = 0; q < GROUPS; q++) {
          if (first_tile == 0)
#pragma unroll
            for (int n = 0; n < NT; n++)
#pragma unroll
              for (int e = 0; e < 4; e++) sum_x[q][n][e] = 0.f;
          float part[B][NT][CHAINS][4];  // a product waits for its predecessor
#pragma unroll
          for (int i = 0; i < B; i++)
#pragma unroll
            for (int n = 0; n < NT; n++)
#pragma unroll
              for (int e = 0; e < 4 * CHAINS; e++) part[i][n][e / 4][e % 4] = 0.f;
#pragma unroll
          for (int s = q * STEPS; s < (q + 1) * STEPS; s++) {
            // Among other products: a chain of these alone would hold up the warp.
            if (first_tile == 0)
#pragma unroll
              for (int n = 0; n < NT; n++)
                mma(sum_x[q][n], ones, word(x[n][s / 2], (s & 1) * 2), word(x[n][s / 2], (s & 1) * 2 + 1));
#pragma unroll
            for (int i = 0; i < B; i++) {
              u32 a[4];
#if CODE_BITS == 4
              expand(a, word(w[i][s / 4], s % 4));
#else
              expand_bytes(a, word(w[i][s / 2], s % 2 * 2), word(w[i][s / 2], s % 2 * 2 + 1));
#endif
#pragma unroll
              for (int n = 0; n < NT; n++)
                mma(part[i][n][s % CHAINS], a, word(x[n][s / 2], (s & 1) * 2), word(x[n][s / 2], (s & 1) * 2 + 1));
            }
          }
#pragma unroll
          for (int i = 0; i < B; i++) {
            const float s0 = low_float(scale[i][q].x), z0 = high_float(scale[i][q].x);
            const float s1 = low_float(scale[i][q].y), z1 = high_float(scale[i][q].y);
#pragma unroll
            for (int n = 0; n < NT; n++)
#pragma unroll
              for (int e = 0; e < 4; e++) {
                float sum = part[i][n][0][e];
                if (CHAINS == 2) sum += part[i][n][CHAINS - 1][e];
                float& to = acc[first_tile + i][n][e];
                to = fmaf(e < 2 ? s0 : s1, fmaf(e < 2 ? -z0 : -z1, sum_x[q][n][e & 1], sum), to);
              }
          }
        }
      }
    }
    // The warps' sums, always in the same order.
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
      for (int i = 0; i < T; i++)
        if (i < tiles)
          sums[((warp * NT + n) * T + i) * 32 + lane] = make_float4(acc[i][n][0], acc[i][n][1], acc[i][n][2], acc[i][n][3]);
    wait_for_consumers();
    for (int at = threadIdx.x; at < NT * T * 32; at += 32 * NW) {
      const int n = at / (T * 32), i = at / 32 % T, token = token0 + n * 8 + (lane & 3) * 2;
      if (i >= tiles || token >= p.tokens) continue;
      float4 v = sums[at];
#pragma unroll
      for (int w = 1; w < NW; w++) {
        const float4 u = sums[w * NT * T * 32 + at];
        v.x += u.x, v.y += u.y, v.z += u.z, v.w += u.w;
      }
      if (SPLITS == 1) store(p, v, tile0 + i, token0 + n * 8, lane);
      else *partial_of(p, blockIdx.z, n, (tile0 + i) * 32 + lane) = v;
    }
    if (tile0 + T < tile_end) wait_for_consumers();
  }

  if (SPLITS > 1) merge_splits(p, tile_begin, tile_end, token0, warp * 32 + lane);
}
