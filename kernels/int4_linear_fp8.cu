// y = x W^T on Hopper for 9 to 64 tokens (a launch has blocks of up to 64) and a weight of 4-bit codes in groups, with products of
// e4m3 (FP8) numbers. Compiled by NVRTC.
//
// A byte from 0 to 15 read as e4m3 is that number times 2^-9: its subnormal numbers and the first ones above them lie evenly.
// So a word of 8 codes is a fragment's two registers after a mask and a shift, and nothing has to be scaled before the product.
// Inputs are split in two e4m3 numbers that together have the 8 bits of bfloat16 (int4_linear_fp8.cuh); both are multiplied by
// the same codes into the same sums. A group's sums begin at zero; scales and zero points are applied to them in fp32.
// (The tensor cores keep about 14 bits of such a sum.)
//
// Rows are M and tokens N. Work is divided as in int4_linear_wide.cu: a CTA has a share of the row tiles and of the channels (SPLITS);
// a warp has up to TILES row tiles and a ring of their codes of its own; four warps are a warp group; x comes through a ring
// of the CTA. A few more warps (PRODUCERS) fill that: they convert, a tile of 8 tokens each. With READY, x was converted
// by int4_linear_fp8_inputs.cu; a warp asks for copies, or those that multiply do in turn: a warp more takes registers of four.
//
// The launch overlaps with its predecessor: only codes are read before the wait.
//
// Macros: GROUP_SIZE IS_BF16 WARPS (that multiply) STAGES (of two chunks each, of a warp's codes) TILES TOKEN_TILES PARTS (1: inputs have 4 bits
//         and an exponent) X_STAGES (of x) PRODUCERS (with READY 0 or 1) READY SPLITS TURNS (of warp groups at the tensor cores) DEPTH (sets of a
//         group's sums: products of one are made while another is added up) MIN_CTAS (CTAs that registers allow on a multiprocessor) ROTATED

#define CLUSTER 0
#include "int4_linear_fp8.cuh"
#include "int4_linear_shares.cuh"
#define FACTORS "e4m3.e4m3"
#define BYTES
#include "wgmma.cuh"

constexpr int XS = X_STAGES, NP = PRODUCERS;
constexpr int AHEAD = XS > 2 ? XS - 2 : 1;  // stages of x that are asked for in advance, without a warp for it
constexpr int X_STAGE = 2 * X_BYTES, FACTOR_STAGE = 2 * FACTOR_BYTES, STAGE = T * 2 * UNIT;  // of two chunks
constexpr int FACTORS_AT = XS * X_STAGE, RINGS_AT = FACTORS_AT + XS * FACTOR_STAGE;
constexpr int BARRIERS_AT = RINGS_AT + NW * S * STAGE;
constexpr int TEAMS = NW / 4;
constexpr int STEPS = 2 * T * GROUPS;  // of a stage: a chunk's row tile's group
static_assert((NP + 2 * NT - 1) / (2 * NT) <= XS, "a warp that is a whole ring ahead would take the parity of an earlier round for its own");
static_assert(XS >= 2, "a stage is filled while another is used");
static_assert(NW % 4 == 0, "four warps are a warp group");
static_assert(READY ? NP <= 1 : NP >= 1, "a warp asks for copies, or those that multiply do");
static_assert(!TURNS || TEAMS > 1, "turns are of several warp groups");

struct ToShared {
  u32 x, factors_at;
  int n, lane;
  DEV void word(int part, u32 at, u32 v) const { sts32(x + part * X_PART + n * 1024 + at, v); }
  DEV void factors(int group, float4 v) const { sts128(factors_at + group * FACTORS_OF_GROUP + n * 64 + lane * 16, v); }
};

#if READY
// Ask for the copies of a stage of x.
DEV void ask_for_x(const Params& p, const Range& r, u32 ring, u32 full, int c) {
  const u8* from = ready_at(reinterpret_cast<const u8*>(p.x), p, blockIdx.y, r.chunk_begin / 2 + c);
  const int slot = c % XS;
  arrive_expecting(full + slot * 8, X_STAGE + FACTOR_STAGE);
  copy_bulk(ring + slot * X_STAGE, from, X_STAGE, full + slot * 8);
  copy_bulk(ring + FACTORS_AT + slot * FACTOR_STAGE, from + X_STAGE, FACTOR_STAGE, full + slot * 8);
}
DEV void wait_for_place(u32 empty, int c) {
  if (c >= XS) wait_for(empty + c % XS * 8, (c / XS & 1) ^ 1);
}
// A warp that does nothing else.
DEV void produce(const Params& p, const Range& r, u32 ring, u32 full, u32 empty, int, int lane) {
  if (lane > 0) return;
#pragma unroll 1
  for (int c = 0; c < r.chunks / 2; c++) {
    wait_for_place(empty, c);
    ask_for_x(p, r, ring, full, c);
  }
}
#else
// One of the warps that fill the ring of x: every NP-th tile of tokens, chunk by chunk, with two loads of 2 KB under way.
DEV void produce(const Params& p, const Range& r, u32 ring, u32 full, u32 empty, int producer, int lane) {
#if ROTATED
  const u32 signs = signs_of_lane(lane);
#endif
  const int tiles = r.chunks * NT;
  uint4 x[2][4];
  auto load = [&](uint4(&x)[4], int i) {
    load_tile(x, p, r.token0 + i % NT * 8, r.chunk_begin + i / NT, i < tiles, lane);
  };
  load(x[0], producer), load(x[1], producer + NP);
#pragma unroll 1
  for (int first = producer; first < tiles; first += 2 * NP)
#pragma unroll
    for (int b = 0; b < 2; b++) {
      const int i = first + b * NP, c = i / NT, n = i % NT, slot = c / 2 % XS, round = c / 2 / XS;
      if (i >= tiles) return;
      if (round > 0) wait_for(empty + slot * 8, (round & 1) ^ 1);
#if ROTATED
#pragma unroll
      for (int j = 0; j < 4; j++) rotate(x[b][j], signs);
#endif
      split_tile(x[b], lane,
                 ToShared{ring + slot * X_STAGE + c % 2 * X_BYTES,
                          ring + FACTORS_AT + slot * FACTOR_STAGE + c % 2 * FACTOR_BYTES, n, lane});
      fence_shared();
      __syncwarp();
      if (lane == 0) arrive(full + slot * 8);
      load(x[b], i + 2 * NP);
    }
}
#endif

// Two chunks of a warp's codes; the second is the first again where the weight has no more.
DEV void fetch_stage(Place& from, u32 to, i64 chunks, bool both, int lane) {
#pragma unroll
  for (int i = 0; i < T; i++)
    if (i < from.slots) {
      const u8* const codes = from.codes + i * NW * CODES * chunks;
      const u8* const second = codes + (both ? CODES : 0);
      copy16(to + i * 2 * UNIT + lane * 16, codes), copy16(to + i * 2 * UNIT + lane * 16 + 512, codes + 512);
      copy16(to + i * 2 * UNIT + lane * 16 + CODES, second);
      copy16(to + i * 2 * UNIT + lane * 16 + CODES + 512, second + 512);
      if (lane < 2 * SCALES / 16)
        copy16(to + i * 2 * UNIT + 2 * CODES + lane * 16,
               from.scales + i * NW * SCALES * chunks - (both || lane < SCALES / 16 ? 0 : SCALES));
    }
  from.codes += 2 * CODES, from.scales += 2 * SCALES;
}

// Warp groups ask for a step's products one after another. If all asked at once, the tensor cores would share themselves out, all
// groups would have their sums at the same time, and the tensor cores nothing to do while they are added up.
DEV void take_turn(int team) {
  if (TURNS) wait_among(2 + team, 256);
}
DEV void pass_turn(int team) {
  if (TURNS) arrive_among(2 + (team + 1) % TEAMS, 256);
}

// A fragment of product j: two words, of 4 channels and 4 more, rows g and g + 8.
DEV void expand(u32 (&a)[4], const uint4 (&w)[2], int j) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    nibbles(a[2 * half], a[2 * half + 1], word(w[j / 2], j % 2 * 2 + half));
  }
}

// A group's sums to those of all groups; with READY without the factors, which are the same for all.
DEV void add_group(float (&acc)[NT][4], const float (&part)[NT][4], u32 scales, u32 factors, int lane) {
  const uint2 v = lds64(scales + (lane >> 2) * 8);
  const float magic = IS_BF16 ? 128.f : 64.f, s0 = low_float(v.x), s1 = low_float(v.y);
  const float z0 = magic - high_float(v.x), z1 = magic - high_float(v.y);
  factors += (lane & 3) * 16;
#pragma unroll
  for (int n = 0; n < NT; n++) {
    float f0 = 1.f, f1 = 1.f, x0, x1;
    if (READY) {
      const uint2 u = lds64(factors + n * 64 + 8);
      x0 = __uint_as_float(u.x), x1 = __uint_as_float(u.y);
    } else {
      const uint4 u = lds128(factors + n * 64);
      f0 = __uint_as_float(u.x), f1 = __uint_as_float(u.y), x0 = __uint_as_float(u.z), x1 = __uint_as_float(u.w);
    }
    acc[n][0] = fmaf(s0 * f0, fmaf(z0, x0, part[n][0]), acc[n][0]);
    acc[n][1] = fmaf(s0 * f1, fmaf(z0, x1, part[n][1]), acc[n][1]);
    acc[n][2] = fmaf(s1 * f0, fmaf(z1, x0, part[n][2]), acc[n][2]);
    acc[n][3] = fmaf(s1 * f1, fmaf(z1, x1, part[n][3]), acc[n][3]);
  }
}

extern "C" __global__ void __launch_bounds__(32 * (NW + NP), MIN_CTAS)
int4_linear_fp8(const __grid_constant__ Params p) {
  const int lane = threadIdx.x & 31, warp = __shfl_sync(~0u, threadIdx.x >> 5, 0);  // known to be the same for all lanes
  Range r = range_of(p);
  r.chunk_begin = (p.chunks + 1) / 2 * blockIdx.z / SPLITS * 2;  // two at a time
  r.chunks = (p.chunks + 1) / 2 * (blockIdx.z + 1) / SPLITS * 2 - r.chunk_begin;
  const u32 x_ring = shared_address(smem), full = x_ring + BARRIERS_AT, empty = full + 8 * XS;
  if (threadIdx.x < XS) {
    barrier_init(full + threadIdx.x * 8, READY ? 1 : 2 * NT);
    barrier_init(empty + threadIdx.x * 8, NW);
  }
  __syncthreads();
  if (warp >= NW) {
    wait_for_predecessor();
    return produce(p, r, x_ring, full, empty, warp - NW, lane);
  }

  // This warp's tiles are tile_begin + warp + i * NW.
  const u32 ring = x_ring + RINGS_AT + warp * (S * STAGE);
  const int slots = (r.tiles - warp + NW - 1) / NW, stages = r.chunks / 2, left = p.chunks - r.chunk_begin;
  Place place = place_of(p, r, warp, slots, lane);
#pragma unroll
  for (int c = 0; c < S - 1; c++) {
    if (c < stages) fetch_stage(place, ring + c * STAGE, p.chunks, 2 * c + 1 < left, lane);
    end_batch();
  }
  wait_for_predecessor();
  release_successor();
#if PRODUCERS == 0
  if (threadIdx.x == 0)
#pragma unroll
    for (int c = 0; c < AHEAD; c++)
      if (c < stages) ask_for_x(p, r, x_ring, full, c);
#endif

  // A warp without a tile multiplies what is there, as the four of a group do the same, and stores nothing.
  float acc[T][NT][4], part[DEPTH][NT][4];
#pragma unroll
  for (int i = 0; i < T; i++)
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) acc[i][n][e] = 0.f;
  u32 stage, factors;
  auto codes_at = [&](int of) { return stage + of % T * 2 * UNIT + of / T * CODES + lane * 16; };  // of a chunk's row tile
  auto add = [&](int step) {
    const int of = step / GROUPS, q = step % GROUPS;
    hold<NT>(part[step % DEPTH][0]);
    add_group(acc[of % T], part[step % DEPTH], stage + of % T * 2 * UNIT + 2 * CODES + of / T * SCALES + q * 64,
              factors + of / T * FACTOR_BYTES + q * FACTORS_OF_GROUP, lane);
  };
  if (warp / 4 + 1 == TEAMS) pass_turn(warp / 4);  // to the first
  int slot = 0, x_slot = 0;
  u32 parity = 0;
#pragma unroll 1
  for (int c = 0; c < stages; c++) {
    stage = ring + slot * STAGE, factors = x_ring + FACTORS_AT + x_slot * FACTOR_STAGE;
    const u32 columns = columns_at(x_ring + x_slot * X_STAGE);
#if PRODUCERS == 0
    // The warps take turns. With more than two stages of x, those that are ahead seldom wait here: all are done with the one
    // before the last.
    const int asked = c + AHEAD;
    if (asked % NW == warp && asked < stages && lane == 0) {
      wait_for_place(empty, asked);
      ask_for_x(p, r, x_ring, full, asked);
    }
#endif
    wait_for_batches<S - 2>();
    __syncwarp();  // for the scales, which few lanes copy
    const int next = c + S - 1;
    if (next < stages) fetch_stage(place, ring + (slot == 0 ? S - 1 : slot - 1) * STAGE, p.chunks, 2 * next + 1 < left, lane);
    end_batch();
    u32 a[2 * T][4][4];
    uint4 w[2] = {lds128(codes_at(0)), lds128(codes_at(0) + 512)};
    wait_for(full + x_slot * 8, parity);
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
      const int of = step / GROUPS, q = step % GROUPS;
      if (q == 0) {
#pragma unroll
        for (int j = 0; j < 4; j++) expand(a[of][j], w, j);
        if (of + 1 < 2 * T)
#pragma unroll
          for (int h = 0; h < 2; h++) w[h] = lds128(codes_at(of + 1) + h * 512);
      }
      take_turn(warp / 4);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < PARTS * PER_GROUP; k++) {  // the lower part first: small sums keep their bits
        const int j = q * PER_GROUP + k % PER_GROUP, lower = PARTS - 1 - k / PER_GROUP;
        const u32 from = columns + (of / T * X_BYTES + lower * X_PART + j * 32) / 16;
        if (k == 0) wgmma<NT, 4, false>(part[step % DEPTH][0], a[of][j], from);
        else wgmma<NT>(part[step % DEPTH][0], a[of][j], from);
      }
      wgmma_commit();
      if (step + 1 < STEPS || c + 1 < stages || warp / 4 + 1 < TEAMS) pass_turn(warp / 4);
      if (DEPTH == 2 && step > 0) {
        wgmma_wait<1>();
        add(step - 1);
      }
      if (DEPTH == 1 || step + 1 == STEPS) {  // a set that is under way around the loop would serialize all products (ptxas)
        wgmma_wait<0>();
        add(step);
      }
    }
    // The arrival needs what was loaded. Without that, factors of later chunks were read on an H200 (NOTES).
    const u32 used = empty + x_slot * 8 + (lds32(factors) >> 31);  // the sign of a factor, which has none
    __syncwarp();
    if (lane == 0) arrive(used);
    if (++slot == S) slot = 0;
    if (++x_slot == XS) x_slot = 0, parity ^= 1;
  }
#if READY
  // The factors of the last stage are still there.
#pragma unroll
  for (int n = 0; n < NT; n++) {
    const uint2 u = lds64(factors + n * 64 + (lane & 3) * 16);
#pragma unroll
    for (int i = 0; i < T; i++)
#pragma unroll
      for (int e = 0; e < 4; e++) acc[i][n][e] *= __uint_as_float(e % 2 ? u.y : u.x);
  }
#endif
  finish(p, r, acc, warp, slots, lane);
}
