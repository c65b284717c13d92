// What becomes of a warp's sums: output, or a share of a segment, to be merged with those of its CTA and of other CTAs.
// Macros: SCORES QUERY_GROUP PASSES
#pragma once

#include "decode_attention_reads.cuh"
#include "decode_attention_softmax.cuh"

// ---- What a warp leaves ---------------------------------------------------------------------------------------------
// Of the tile `mt` of those that a warp sums, which begin at `first`.
DEV float output_of(const State& st, int n, int mt, int first, int i) {
  float sum = st.sums[n][TEAM == 1 ? mt * 16 / VALUE_GROUP_SIZE : 0][i & 1];
  if (TEAM > 1)
#pragma unroll
    for (int v = 1; v < NVG; v++)
      if ((first + mt) * 16 / VALUE_GROUP_SIZE == v) sum = st.sums[n][v][i & 1];
  return st.acc[n][mt][i] * (1.f / CODE_SCALE) + sum;
}
DEV u16 to_exact(float x) { return (u16)pack_exact(x, 0.f); }

// A warp leaves a segment that it did not do alone in two places: its last one in its ring, one before in the
// workspace. Where a CTA has few of them (teams of warps), they leave what other CTAs have a share of where those find it.
constexpr int SHARES = TEAMS <= 2 ? TEAMS : 1;  // of a CTA, in such a segment
__shared__ float2 row_state[2][TEAMS][ROWS];  // (top, sum); [1] last, [0] before
__shared__ int part_of[2][TEAMS], team_begin[TEAMS + 1];  // first units: of the segment left there, of each team
__shared__ float weight_of[TEAMS][ROWS];

#if SCORES
DEV void store_lse(const Params& p, const Segment& s, int row, float top, float sum) {
  p.lse[row_offset(p, s, row, (i64)p.num_heads * QUERY_GROUP * D) / D] = __log2f(sum) + top;
}
#endif

// A share of a segment: [ROWS][D] sums, then [ROWS] (top, sum). Slot 1 for a segment that begins inside the CTA's range.
DEV float* share_at(const Params& p, int cta, int slot, int share) {
  return p.partial + (i64)((cta * 2 + slot) * SHARES + share) * ROWS * (D + 2);
}
DEV float2* states_of(float* share) { return (float2*)(share + ROWS * D); }

// `share`: where other CTAs find it, or null.
DEV void store_part(const State& st, const Params& p, const Segment& seg, bool whole, bool last, unsigned char* own,
                    float* spill, float* share, const Member& me, int lane) {
  float* const to = share ? share : last ? (float*)own : spill;
  const int row_size = share ? D : D + 4;
  const int g = lane >> 2, t = lane & 3, first = me.index * OWN_MT, channel = g + first * 16;
#pragma unroll
  for (int n = 0; n < NT; n++)
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const int row = n * 8 + 2 * t + e;
      const float sum = st.sums[n][0][2 + e], inverse = sum > 0.f ? 1.f / sum : 0.f;
      if (row >= seg.rows) continue;
      if (whole) {
        u16* o = p.out + row_offset(p, seg, row, p.out_stride) + channel;
#pragma unroll
        for (int mt = 0; mt < OWN_MT; mt++) {
          o[mt * 16] = to_exact(output_of(st, n, mt, first, e) * inverse);
          o[mt * 16 + 8] = to_exact(output_of(st, n, mt, first, e + 2) * inverse);
        }
#if SCORES
        if (g == 0 && me.index == 0) store_lse(p, seg, row, st.top[n][e], sum);
#endif
      } else {
        float* o = to + row * row_size + channel;
#pragma unroll
        for (int mt = 0; mt < OWN_MT; mt++) {
          o[mt * 16] = output_of(st, n, mt, first, e);
          o[mt * 16 + 8] = output_of(st, n, mt, first, e + 2);
        }
        if (g == 0 && me.index == 0)
          (share ? states_of(share) : row_state[last][me.team])[row] = make_float2(st.top[n][e], sum);
      }
    }
}

// ---- Merging the teams of a CTA -------------------------------------------------------------------------------------
DEV float warp_max(float x) {
#pragma unroll
  for (int d = 16; d; d /= 2) x = fmaxf(x, __shfl_xor_sync(ALL, x, d));
  return x;
}
DEV float warp_sum(float x) {
#pragma unroll
  for (int d = 16; d; d /= 2) x += __shfl_xor_sync(ALL, x, d);
  return x;
}
DEV void add_weighted(float4& o, float weight, float4 v) {
  o.x += weight * v.x, o.y += weight * v.y, o.z += weight * v.z, o.w += weight * v.w;
}
DEV void store_row(const Params& p, const Segment& seg, int row, int d, float4 o) {
  *(uint2*)(p.out + row_offset(p, seg, row, p.out_stride) + d) = make_uint2(pack_exact(o.x, o.y), pack_exact(o.z, o.w));
}

// Merge the teams' shares of a segment, into the output or into this CTA's share.
DEV void merge_teams(const Params& p, const Segment& seg, bool inside, float* partial, int warp, int lane) {
  bool last = false, before = false;
  if (lane < TEAMS) last = part_of[1][lane] == seg.begin, before = part_of[0][lane] == seg.begin;
  const bool any_before = __any_sync(ALL, before);
  for (int row = warp; row < seg.rows; row += NW) {
    const float2 state = last || before ? row_state[last][lane][row] : make_float2(NEVER, 0.f);
    const float top = warp_max(state.x), weight = last || before ? exp2_fast(state.x - top) : 0.f;
    const float sum = warp_sum(weight * state.y);
    if (lane < TEAMS) weight_of[lane][row] = inside ? (sum > 0.f ? weight / sum : 0.f) : weight;
    if (!inside && lane == 0) states_of(partial)[row] = make_float2(top, sum);
#if SCORES
    if (inside && lane == 0) store_lse(p, seg, row, top, sum);
#endif
  }
  __syncthreads();
  for (int x = threadIdx.x; x < seg.rows * (D / 4); x += THREADS) {
    const int row = x / (D / 4), d = x % (D / 4) * 4;
    float4 o = make_float4(0.f, 0.f, 0.f, 0.f), part[TEAMS];
    float weight[TEAMS];
#pragma unroll
    for (int w = 0; w < TEAMS; w++) {
      weight[w] = weight_of[w][row];
      part[w] = ((const float4*)(smem + w * TEAM_BYTES))[(row * (D + 4) + d) / 4];
    }
    if (any_before)
#pragma unroll
      for (int w = 0; w < TEAMS; w++)
        if (part_of[0][w] == seg.begin)
          part[w] = ((const float4*)(p.spill + (i64)(blockIdx.x * TEAMS + w) * ROWS * (D + 4)))[(row * (D + 4) + d) / 4];
#pragma unroll
    for (int w = 0; w < TEAMS; w++)
      if (weight[w] != 0.f) add_weighted(o, weight[w], part[w]);
    if (inside) store_row(p, seg, row, d, o);
    else *(float4*)(partial + row * D + d) = o;
  }
}

// Of the teams that had nothing of a segment which other CTAs have a share of.
DEV void leave_nothing(const Params& p, const Segment& seg, int slot) {
#pragma unroll
  for (int w = 0; w < TEAMS; w++)
    if (part_of[0][w] != seg.begin && part_of[1][w] != seg.begin)
      for (int row = threadIdx.x; row < seg.rows; row += THREADS)
        states_of(share_at(p, blockIdx.x, slot, w))[row] = make_float2(NEVER, 0.f);
}

// ---- Merging CTAs ---------------------------------------------------------------------------------------------------
// CTAs that share a segment count themselves in; the last to have seen all of them sets the counters back for the next
// launch.
DEV int* counters_of(const Params& p, const Segment& seg) {
  return p.arrived + 2 * ((seg.request * p.num_heads + seg.head) * PASSES + seg.tile);
}
DEV int load_acquire(const int* x) {
  int r;
  asm volatile("ld.acquire.gpu.global.s32 %0,[%1];" : "=r"(r) : "l"(x) : "memory");
  return r;
}

// Merge this CTA's part of the output of a segment that `count` CTAs share.
DEV void merge_ctas(const Params& p, const Segment& seg, int per_cta, int all_units) {
  constexpr int AHEAD = 6;
  float4* const sums = (float4*)smem;  // the rings are done with
  float2* const states = (float2*)(smem + 16 * THREADS);
  const int first = seg.begin / per_cta, count = (seg.end - 1) / per_cta - first + 1,
            first_slot = seg.begin > first * per_cta, shares = count * SHARES;
  // A CTA merges only the last segment that it has a share of: the others need not wait for one that does two.
  const int mergers = count - (seg.end % per_cta != 0 && seg.end != all_units);
  if (threadIdx.x == 0) {
    int* counters = counters_of(p, seg);
    while (load_acquire(counters) < count) {
    }
    if (atomicAdd(counters + 1, 1) == mergers - 1) counters[0] = counters[1] = 0;
  }
  __syncthreads();
  const int total = seg.rows * (D / 4), mine = (total + mergers - 1) / mergers,
            begin = ((int)blockIdx.x - first) * mine;
  const int elements = min(mine, total - begin);
  if (elements <= 0) return;
  // Threads that one element has: each takes every ways-th share.
  const int ways = max(1, THREADS / elements), way = threadIdx.x / elements;
  for (int base = 0; base < elements; base += THREADS) {
    const int element = base + (ways == 1 ? threadIdx.x : threadIdx.x - way * elements);
    const bool busy = ways == 1 ? element < elements : way < ways;
    const int at = begin + element, row = at / (D / 4);
    float4 o = make_float4(0.f, 0.f, 0.f, 0.f);
    float top = NEVER, sum = 0.f;
    if (busy)
      for (int c0 = ways == 1 ? 0 : way; c0 < shares; c0 += AHEAD * ways) {
        float4 part[AHEAD];
        float2 state[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
          const int c = c0 + i * ways;
          float* const from = share_at(p, first + c / SHARES, c < SHARES ? first_slot : 0, c % SHARES);
          state[i] = c < shares ? __ldcg(states_of(from) + row) : make_float2(NEVER, 0.f);
          part[i] = c < shares ? __ldcg((const float4*)from + at) : make_float4(0.f, 0.f, 0.f, 0.f);
        }
        float high = top;
#pragma unroll
        for (int i = 0; i < AHEAD; i++) high = fmaxf(high, state[i].x);
        const float factor = exp2_fast(top - high);
        o.x *= factor, o.y *= factor, o.z *= factor, o.w *= factor, sum *= factor, top = high;
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
          if (state[i].x == NEVER) continue;  // nothing was written there
          const float weight = exp2_fast(state[i].x - high);
          sum += weight * state[i].y;
          add_weighted(o, weight, part[i]);
        }
      }
    if (ways > 1) {
      sums[threadIdx.x] = o, states[threadIdx.x] = make_float2(top, sum);
      __syncthreads();
      if (way == 0) {
        for (int w = 1; w < ways; w++) {
          const float2 state = states[w * elements + threadIdx.x];
          const float high = fmaxf(top, state.x), a = exp2_fast(top - high), b = exp2_fast(state.x - high);
          o.x *= a, o.y *= a, o.z *= a, o.w *= a, sum = sum * a + state.y * b, top = high;
          add_weighted(o, b, sums[w * elements + threadIdx.x]);
        }
      }
    }
    if (busy && way == 0 || busy && ways == 1) {
      const float inverse = sum > 0.f ? 1.f / sum : 0.f;
      store_row(p, seg, row, at % (D / 4) * 4, make_float4(o.x * inverse, o.y * inverse, o.z * inverse, o.w * inverse));
#if SCORES
      if (at % (D / 4) == 0) store_lse(p, seg, row, top, sum);
#endif
    }
  }
}
