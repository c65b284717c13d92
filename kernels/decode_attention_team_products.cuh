// A team's part of a segment's pages, with mma.m16n8k16 (every GPU): each warp scores a slice of its own, and sums all
// slices' values. Part of decode_attention.cu, for TEAM > 1 without WGMMA; decode_attention_team.cuh says how a team works.
#pragma once

#include "decode_attention_team_sums.cuh"

constexpr int OWN_J = J / TEAM, STEPS = S / TEAM;
static_assert(J % TEAM == 0 && PER % TEAM == 0 && STEPS >= 2, "a step is of one page");

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

DEV void attend_pages(State& st, const Params& p, const Segment& seg, const Part& part, Pages& r, u32 ring, u32 shared,
                      const Member& me, int lane) {
  const int slice_b = part.slice_b, slice_e = r.slice_e;
  const unsigned char* pool = p.pages + seg.head * p.head_stride;
  const int step_b = slice_b / TEAM, step_e = (slice_e + TEAM - 1) / TEAM;
  int loaded = step_b;
  auto load_next = [&](int half) {
    const int slice = loaded * TEAM + me.index;
    if (loaded < step_e && slice >= slice_b && slice < slice_e) {
      const int of_page = slice & (PER - 1);
      const unsigned char* page = pool + r.ids.next(p, seg, slice / PER, lane) * p.page_stride;
      load_slice(ring + (half * TEAM + me.index) * STAGE, page, of_page, of_page == 0 || slice == slice_b, lane);
    }
    loaded++;
    end_batch();
  };
  team_sync(me);
#if SCORES
  const int scored_at = p.num_scored[seg.request] > 0 ? p.begin[seg.request] : -1;
#endif
#pragma unroll
  for (int i = 0; i < STEPS - 1; i++) load_next(i);
  for (int n = me.index; n < NT; n += TEAM) {
    u32 q[MT][2];
    load_query_tile(q, n, p, seg, lane);
    keep_query_tile(q, n, seg, shared, lane);
  }
  const float scale = p.scale / CODE_SCALE;
  int half = 0;
  for (int step = step_b; step < step_e; step++) {
    const int first = max(step * TEAM, slice_b), last = min(step * TEAM + TEAM, slice_e), slice = step * TEAM + me.index;
    const u32 stages = ring + half * TEAM * STAGE, stage = stages + me.index * STAGE;
    wait_for_batches<STEPS - 2>();
    team_sync(me);
    load_next(half == 0 ? STEPS - 1 : half - 1);
    if (first == slice_b || first % PER == 0) {
      scale_team_query(stages + (first - step * TEAM) * STAGE, shared, me, lane);
      team_sync(me);
    }
    const bool has = slice >= first && slice < last;
    float s[NT][2][4];
    if (has) {
      score_slice(s, stage, shared, lane);
      // Of the list: a smaller one than it has, and read by every row as well.
      const int token = (slice + part.skipped) * 32;
      if (token + 32 > r.low) mask_slice(s, seg, token, r.exact_start, lane);
    }
    raise_team_top(st, s, scale, has, shared, me, lane);
    if (has) leave_probabilities(st, s, stages, shared, scale, me, lane);
    team_sync(me);
    if (last - first == TEAM) {
#pragma unroll
      for (int i = 0; i < TEAM; i++) add_values(st, stages, shared, i, me, lane);
    } else {
      for (int i = first - step * TEAM; i < last - step * TEAM; i++) add_values(st, stages, shared, i, me, lane);
    }
#if SCORES
    const int page = first / PER, page_b = max(slice_b, page * PER), page_e = min(slice_e, page * PER + PER);
    if (last == page_e && page_b < part.plain && scored_at >= 0) {
      const bool whole = page_e == page * PER + PER;
      emit(st, p, seg, scored_at + page, slice_b > page * PER, (slice_b == page * PER) | whole << 1, shared, me, lane);
    }
#endif
    half = half == STEPS - 1 ? 0 : half + 1;
  }
  wait_for_batches<0>();
}
