// A team's sums of probabilities, which each warp has of its own tokens. Part of decode_attention.cu, for TEAM > 1.
#pragma once

#include "decode_attention_team_sync.cuh"

// Sums of the whole team, through its ring, which is done with before and after.
DEV void add_sums(State& st, u32 ring, const Member& me, int lane) {
  team_sync(me);
#pragma unroll
  for (int n = 0; n < NT; n++)
#pragma unroll
    for (int v = 0; v < NVG; v++) {
      const float* x = st.sums[n][v];
      sts128(ring + (((me.index * NT + n) * NVG + v) * 32 + lane) * 16,
             make_uint4(__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]), __float_as_uint(x[3])));
    }
  team_sync(me);
#pragma unroll
  for (int n = 0; n < NT; n++)
#pragma unroll
    for (int v = 0; v < NVG; v++) {
      float sum[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
      for (int w = 0; w < TEAM; w++) {
        const uint4 x = lds128(ring + (((w * NT + n) * NVG + v) * 32 + lane) * 16);
#pragma unroll
        for (int i = 0; i < 4; i++) sum[i] += __uint_as_float(word(x, i));
      }
#pragma unroll
      for (int i = 0; i < 4; i++) st.sums[n][v][i] = sum[i];
    }
  team_sync(me);
}

#if SCORES
// As of one warp (decode_attention_warp.cuh); the team's sums meet where its largest scores do.
DEV void emit(const State& st, const Params& p, const Segment& seg, int slot, int part, int flags, u32 shared,
              const Member& me, int lane) {
  const u32 mine = shared + TEAM_HIGH + (lane & 3) * 8;
  team_sync(me);
#pragma unroll
  for (int n = 0; n < NT; n++) {
    float x = st.sums[n][0][2], y = st.sums[n][0][3];
#if WGMMA
    x = sum_of_rows(x), y = sum_of_rows(y);  // lanes have sums of their own
#endif
    if (lane < 4) sts_float2(mine + (me.index * ROWS + n * 8) * 4, x, y);
  }
  team_sync(me);
  const i64 at = (i64)slot * p.num_heads + seg.head;
  float2* to = p.raw + (at * 2 + part) * p.raw_rows + seg.tile * ROWS;
#pragma unroll
  for (int n = 0; n < NT; n++) {
    if (n % TEAM != me.index || lane >= 4) continue;
    float x = 0.f, y = 0.f;
#pragma unroll
    for (int w = 0; w < TEAM; w++) {
      const float2 sum = lds_float2(mine + (w * ROWS + n * 8) * 4);
      x += sum.x, y += sum.y;
    }
    *(float4*)(to + n * 8 + 2 * lane) = make_float4(x, st.top[n][0], y, st.top[n][1]);
  }
  if (me.index == 0 && lane < NT && part == 0) p.raw_flags[at * (p.raw_rows / 8) + seg.tile * NT + lane] = flags;
}
#endif
