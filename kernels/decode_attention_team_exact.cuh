// What a team of warps computes in a step of exact tokens: each warp scores of 16 tokens of its own, and sums of all their
// values. Part of decode_attention.cu, for TEAM > 1.
#pragma once

#include "decode_attention_team_sync.cuh"

static_assert(TEAM * 256 * NT <= QUERY, "probabilities of exact tokens lie where others have room");
static_assert(D % 32 == 0, "a lane has 8 of 32 channels");

// Products of 32 channels take them in an order in which a lane has 8 that are adjacent: 8*t to 8*t + 7, of keys and query.
DEV void score_window(float (&s)[NT][1][4], u32 stage, const Params& p, const Segment& seg, int token, int exact_start,
                      int lane) {
  const int g = lane >> 2, t = lane & 3;
  uint4 keys[MT / 2][2];  // of tokens g and g + 8
#pragma unroll
  for (int x = 0; x < MT / 2; x++)
#pragma unroll
    for (int h = 0; h < 2; h++) keys[x][h] = lds128(stage + (g + h * 8) * WIN_ROW + x * 64 + t * 16);
#pragma unroll
  for (int n = 0; n < NT; n++) {
    const int row = min(n * 8 + g, seg.rows - 1);
    const uint4* from = (const uint4*)(p.query + row_offset(p, seg, row, p.query_stride)) + t;
    uint4 q[MT / 2];
#pragma unroll
    for (int x = 0; x < MT / 2; x++) q[x] = __ldg(from + x * 4);
#pragma unroll
    for (int i = 0; i < 4; i++) s[n][0][i] = 0.f;
#pragma unroll
    for (int x = 0; x < MT / 2; x++) {
      const uint4 &low = keys[x][0], &high = keys[x][1];
      mma_exact(s[n][0], low.x, high.x, low.y, high.y, q[x].x, q[x].y);
      mma_exact(s[n][0], low.z, high.z, low.w, high.w, q[x].z, q[x].w);
    }
    mask_window(s[n][0], n, seg, token, exact_start, lane);
  }
}

DEV u32 exact_probabilities(u32 shared, int tile, int n) { return shared + TEAM_EXACT + (tile * NT + n) * 256; }

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
