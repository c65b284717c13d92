// What a team of warps computes in a step: each warp scores of a slice of its own, and sums of all slices' values. Part
// of decode_attention.cu, for TEAM > 1; decode_attention_team.cuh says how a team works.
#pragma once

#include "decode_attention_reads.cuh"
#include "decode_attention_softmax.cuh"

constexpr int OWN_J = J / TEAM, STEPS = S / TEAM;
static_assert(NW % TEAM == 0 && J % TEAM == 0 && PER % TEAM == 0 && S % TEAM == 0 && STEPS >= 2, "a step is of one page");
static_assert(TEAM * 256 * NT <= QUERY, "probabilities of exact tokens lie where the scaled query was");

DEV void team_sync(const Member& me) { asm volatile("bar.sync %0,%1;" ::"r"(1 + me.team), "n"(32 * TEAM) : "memory"); }
DEV bool team_any(const Member& me, bool x) {
  u32 r;
  asm volatile("{.reg .pred p,q;\n setp.ne.u32 p,%1,0;\n bar.red.or.pred q,%2,%3,p;\n selp.u32 %0,1,0,q;}"
               : "=r"(r)
               : "r"((u32)x), "r"(1 + me.team), "n"(32 * TEAM)
               : "memory");
  return r;
}
DEV u32 fma_f16x2(u32 a, u32 b, u32 c) {
  u32 r;
  asm("fma.rn.f16x2 %0,%1,%2,%3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
}
DEV float2 lds_float2(u32 a) {
  float2 r;
  asm volatile("ld.shared.v2.f32 {%0,%1},[%2];" : "=f"(r.x), "=f"(r.y) : "r"(a));
  return r;
}
DEV void sts_float2(u32 a, float x, float y) {
  asm volatile("st.shared.v2.f32 [%0],{%1,%2};" ::"r"(a), "f"(x), "f"(y) : "memory");
}
DEV void sts64(u32 a, u32 x, u32 y) { asm volatile("st.shared.v2.u32 [%0],{%1,%2};" ::"r"(a), "r"(x), "r"(y) : "memory"); }

// One `top` for the team, which nobody raises alone. `has`: this warp has scores. Ends with all warps in step.
template <int N>
DEV void raise_team_top(State& st, const float (&s)[NT][N][4], float scale, bool has, u32 shared, const Member& me,
                        int lane) {
  float high[NT][2];
  if (!team_any(me, above_top(high, st, s, scale, has))) return;
  const u32 mine = shared + TEAM_HIGH + (lane & 3) * 8;
#pragma unroll
  for (int n = 0; n < NT; n++) {
    const float x = max_of_rows(high[n][0]), y = max_of_rows(high[n][1]);
    if (lane < 4) sts_float2(mine + (me.index * ROWS + n * 8) * 4, x, y);
  }
  team_sync(me);
#pragma unroll
  for (int n = 0; n < NT; n++) {
    float x[2] = {NEVER, NEVER};
#pragma unroll
    for (int w = 0; w < TEAM; w++) {
      const float2 y = lds_float2(mine + (w * ROWS + n * 8) * 4);
      x[0] = fmaxf(x[0], y.x), x[1] = fmaxf(x[1], y.y);
    }
    rescale(st, n, x);
  }
}

// ---- A slice of a page ----------------------------------------------------------------------------------------------
// The query times a page's key scales, and its products with the minima: each warp for its share of the channels.
DEV void scale_team_query(u32 stage, u32 shared, const Member& me, int lane) {
  const int t = lane & 3;
  float minima[NT][4], bias[NT][4];
#pragma unroll
  for (int n = 0; n < NT; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) minima[n][i] = bias[n][i] = 0.f;
#pragma unroll
  for (int i = 0; i < OWN_J; i++) {
    const int j = me.index * OWN_J + i;
    const uint4 s = lds128(stage + ST_KS + t * (D / 2) + j * 16), z = lds128(stage + ST_KS + 2 * D + t * (D / 2) + j * 16);
#pragma unroll
    for (int n = 0; n < NT; n++) {
      const u32 at = shared + ((n * J + j) * 32 + lane) * 16;
      const uint4 q = lds128(at);
      const uint4 x = make_uint4(mul_f16x2(q.x, s.x), mul_f16x2(q.y, s.y), mul_f16x2(q.z, s.z), mul_f16x2(q.w, s.w));
      sts128(at + TEAM_SCALED, x);
      mma_f16(minima[n], z.x, z.x, z.y, z.y, q.x, q.y);
      mma_f16(bias[n], K_BIAS, K_BIAS, K_BIAS, K_BIAS, x.x, x.y);
      mma_f16(minima[n], z.z, z.z, z.w, z.w, q.z, q.w);
      mma_f16(bias[n], K_BIAS, K_BIAS, K_BIAS, K_BIAS, x.z, x.w);
    }
  }
  if (lane < 4)
#pragma unroll
    for (int n = 0; n < NT; n++)
      sts_float2(shared + TEAM_START + (me.index * ROWS + n * 8 + 2 * t) * 4, minima[n][0] * CODE_SCALE - bias[n][0],
                 minima[n][1] * CODE_SCALE - bias[n][1]);
}

// A slice's keys times all rows of the query.
DEV void score_slice(float (&s)[NT][2][4], u32 stage, u32 shared, int lane) {
  const u32 mine = stage + lane * 16, scaled = shared + TEAM_SCALED + lane * 16;
#pragma unroll
  for (int n = 0; n < NT; n++) {
    float2 start = make_float2(0.f, 0.f);
#pragma unroll
    for (int w = 0; w < TEAM; w++) {
      const float2 x = lds_float2(shared + TEAM_START + (w * ROWS + n * 8 + 2 * (lane & 3)) * 4);
      start.x += x.x, start.y += x.y;
    }
#pragma unroll
    for (int i = 0; i < 8; i++) s[n][i / 4][i % 4] = i & 1 ? start.y : start.x;
  }
#pragma unroll
  for (int j = 0; j < J; j++) {
    const uint4 w = lds128(mine + j * 512), low = PLANES == 2 ? lds128(mine + PLANE + j * 512) : w;
    u32 a[2][4], b[2][4];
#pragma unroll
    for (int m = 0; m < 2; m++) {
      expand_k(a[m], word(w, 2 * m), word(low, 2 * m));
      expand_k(b[m], word(w, 2 * m + 1), word(low, 2 * m + 1));
    }
#pragma unroll
    for (int n = 0; n < NT; n++) {
      const uint4 q = lds128(scaled + (n * J + j) * 512);
#pragma unroll
      for (int m = 0; m < 2; m++) mma_f16(s[n][m], a[m][0], b[m][0], a[m][1], b[m][1], q.x, q.y);
#pragma unroll
      for (int m = 0; m < 2; m++) mma_f16(s[n][m], a[m][2], b[m][2], a[m][3], b[m][3], q.z, q.w);
    }
  }
}

// Where a step's probabilities of a slice lie: over its keys' codes, which are done with, if those are enough.
DEV u32 probabilities(u32 stages, u32 shared, int slice, int group, int n) {
  return (PROB_IN_RING ? stages + slice * STAGE : shared + TEAM_PROB + slice * NVG * NT * 512) + (group * NT + n) * 512;
}

// Scores to probabilities, times the value scales of each group, for the team; their sums stay here.
DEV void leave_probabilities(State& st, const float (&s)[NT][2][4], u32 stages, u32 shared, float scale, const Member& me,
                             int lane) {
  const int t = lane & 3;
  const u32 stage = stages + me.index * STAGE;
  u32 prob[NT][4];
#pragma unroll
  for (int n = 0; n < NT; n++)
#pragma unroll
    for (int i = 0; i < 4; i++)
      prob[n][i] = transpose8x8(pack_f16(exp2_fast(fmaf(s[n][i / 2][(i & 1) * 2], scale, -st.top[n][0])),
                                         exp2_fast(fmaf(s[n][i / 2][(i & 1) * 2 + 1], scale, -st.top[n][1]))));
#pragma unroll
  for (int v = 0; v < NVG; v++) {
    const uint4 vs = lds128(stage + ST_VS + (v * 4 + t) * 16), low = lds128(stage + ST_VS + 64 * NVG + (v * 4 + t) * 16);
    u32 vz[4];  // a code of 0 after centring
#pragma unroll
    for (int i = 0; i < 4; i++) vz[i] = fma_f16x2(HALF_RANGE, word(vs, i), word(low, i));
    const u32 one = v == 0 ? 0x3c003c00 : 0;
#pragma unroll
    for (int n = 0; n < NT; n++) {
      float sums[4] = {0.f, 0.f, 0.f, 0.f};
      u32 scaled[4];
      mma_f16(sums, vz[0], one, vz[1], one, prob[n][0], prob[n][1]);
      mma_f16(sums, vz[2], one, vz[3], one, prob[n][2], prob[n][3]);
#pragma unroll
      for (int i = 0; i < 4; i++) scaled[i] = mul_f16x2(prob[n][i], word(vs, i));
      sts128(probabilities(stages, shared, me.index, v, n) + lane * 16,
             make_uint4(scaled[0], scaled[1], scaled[2], scaled[3]));
#pragma unroll
      for (int i = 0; i < 4; i++) st.sums[n][v][i] += sums[i];
    }
  }
}

// A slice's values, those of this warp's channels.
DEV void add_values(State& st, u32 stages, u32 shared, int slice, const Member& me, int lane) {
#pragma unroll
  for (int i = 0; i < OWN_J; i++) {
    const int j = me.index * OWN_J + i;
    const u32 mine = stages + slice * STAGE + ST_V + j * 512 + lane * 16;
    const uint4 w = lds128(mine), low = PLANES == 2 ? lds128(mine + PLANE) : w;
    u32 a[2][4], b[2][4];
#pragma unroll
    for (int m = 0; m < 2; m++) {
      expand_v(a[m], word(w, 2 * m), word(low, 2 * m));
      expand_v(b[m], word(w, 2 * m + 1), word(low, 2 * m + 1));
    }
    const u32 from = probabilities(stages, shared, slice, j * 32 / VALUE_GROUP_SIZE, 0) + lane * 16;
    static_assert(VALUE_GROUP_SIZE % 32 == 0, "32 channels are of one group");
#pragma unroll
    for (int n = 0; n < NT; n++) {
      const uint4 q = lds128(from + n * 512);
#pragma unroll
      for (int m = 0; m < 2; m++) mma_f16(st.acc[n][2 * i + m], a[m][0], b[m][0], a[m][1], b[m][1], q.x, q.y);
#pragma unroll
      for (int m = 0; m < 2; m++) mma_f16(st.acc[n][2 * i + m], a[m][2], b[m][2], a[m][3], b[m][3], q.z, q.w);
    }
  }
}

// ---- 16 exact tokens of each warp -----------------------------------------------------------------------------------
DEV void score_window(float (&s)[NT][1][4], u32 stage, const Params& p, const Segment& seg, int token, int exact_start,
                      int lane) {
  const u32 key = stage + (lane & 15) * WIN_ROW + (lane >> 4) * 16;
  u32 a[MT][4];
#pragma unroll
  for (int x = 0; x < MT; x++) load_matrices(a[x], key + x * 32);
#pragma unroll
  for (int n = 0; n < NT; n++) {
    u32 q[MT][2];
    load_query_tile(q, n, p, seg, lane);
#pragma unroll
    for (int i = 0; i < 4; i++) s[n][0][i] = 0.f;
#pragma unroll
    for (int x = 0; x < MT; x++) mma_exact(s[n][0], a[x][0], a[x][1], a[x][2], a[x][3], q[x][0], q[x][1]);
    mask_window(s[n][0], n, seg, token, exact_start, lane);
  }
}

DEV u32 exact_probabilities(u32 shared, int tile, int n) { return shared + TEAM_SCALED + (tile * NT + n) * 256; }

DEV void leave_exact_probabilities(State& st, const float (&s)[NT][1][4], u32 shared, float scale, const Member& me,
                                   int lane) {
  constexpr float SHIFT = CODE_BITS == 4 ? 0.f : 4.f;  // everything that ends up in acc is in units of 1 / CODE_SCALE
  const u32 unit = pack_exact(1.f / CODE_SCALE, 1.f / CODE_SCALE);
#pragma unroll
  for (int n = 0; n < NT; n++) {
    u32 prob[2];
#pragma unroll
    for (int i = 0; i < 2; i++)
      prob[i] = transpose8x8(pack_exact(exp2_fast(fmaf(s[n][0][2 * i], scale, SHIFT - st.top[n][0])),
                                        exp2_fast(fmaf(s[n][0][2 * i + 1], scale, SHIFT - st.top[n][1]))));
    mma_exact(st.sums[n][0], 0, unit, 0, unit, prob[0], prob[1]);
    sts64(exact_probabilities(shared, me.index, n) + lane * 8, prob[0], prob[1]);
  }
}

DEV void add_exact_values(State& st, u32 stage, u32 shared, int tile, const Member& me, int lane) {
  const u32 value =
      stage + 2 * D + me.index * OWN_MT * 32 + ((lane & 7) + (lane >> 4) * 8) * WIN_ROW + ((lane >> 3) & 1) * 16;
  u32 a[OWN_MT][4];
#pragma unroll
  for (int mt = 0; mt < OWN_MT; mt++) ldmatrix_trans(a[mt], value + mt * 32);
#pragma unroll
  for (int n = 0; n < NT; n++) {
    const uint2 q = lds64(exact_probabilities(shared, tile, n) + lane * 8);
#pragma unroll
    for (int mt = 0; mt < OWN_MT; mt++) mma_exact(st.acc[n][mt], a[mt][0], a[mt][1], a[mt][2], a[mt][3], q.x, q.y);
  }
}
