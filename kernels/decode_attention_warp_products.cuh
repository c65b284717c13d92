// What one warp computes of a slice of 32 tokens, or of 16 exact ones: scores, and sums of values. Part of
// decode_attention.cu, for TEAM == 1.
#pragma once

#include "decode_attention_reads.cuh"
#include "decode_attention_softmax.cuh"

// ---- A slice of a page ----------------------------------------------------------------------------------------------
// What a page's key scales make of the query.
struct Keys {
  u32 scaled[NT][J][4];  // query * key scale, B fragments of two k-steps per 32 channels
  float start[NT][2];  // query . key minimum, less what the codes' bias adds
};

DEV void scale_query(Keys& k, u32 stage, u32 query, int lane) {
  const int t = lane & 3;
  float minima[NT][4], bias[NT][4];
#pragma unroll
  for (int n = 0; n < NT; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) minima[n][i] = bias[n][i] = 0.f;
#pragma unroll
  for (int j = 0; j < J; j++) {
    const uint4 s = lds128(stage + ST_KS + t * (D / 2) + j * 16),
                z = lds128(stage + ST_KS + 2 * D + t * (D / 2) + j * 16);
#pragma unroll
    for (int n = 0; n < NT; n++) {
      const uint4 q = lds128(query + ((n * J + j) * 32 + lane) * 16);
      u32(&x)[4] = k.scaled[n][j];
#pragma unroll
      for (int i = 0; i < 4; i++) x[i] = mul_f16x2(word(q, i), word(s, i));
      mma_f16(minima[n], z.x, z.x, z.y, z.y, q.x, q.y);
      mma_f16(bias[n], K_BIAS, K_BIAS, K_BIAS, K_BIAS, x[0], x[1]);
      mma_f16(minima[n], z.z, z.z, z.w, z.w, q.z, q.w);
      mma_f16(bias[n], K_BIAS, K_BIAS, K_BIAS, K_BIAS, x[2], x[3]);
    }
  }
#pragma unroll
  for (int n = 0; n < NT; n++)
#pragma unroll
    for (int e = 0; e < 2; e++) k.start[n][e] = minima[n][e] * CODE_SCALE - bias[n][e];
}

DEV void attend_slice(State& st, const Keys& k, u32 stage, const Params& p, const Segment& seg, int token,
                      int exact_start, bool mask, int lane) {
  const int g = lane >> 2, t = lane & 3;
  const u32 mine = stage + lane * 16;
  float s[NT][2][4];
#pragma unroll
  for (int n = 0; n < NT; n++)
#pragma unroll
    for (int i = 0; i < 8; i++) s[n][i / 4][i % 4] = k.start[n][i & 1];
#pragma unroll
  for (int j = 0; j < J; j++) {
    const uint4 w = lds128(mine + j * 512), low = PLANES == 2 ? lds128(mine + PLANE + j * 512) : w;
#pragma unroll
    for (int m = 0; m < 2; m++) {
      u32 a[4], b[4];
      expand_k(a, word(w, 2 * m), word(low, 2 * m));
      expand_k(b, word(w, 2 * m + 1), word(low, 2 * m + 1));
#pragma unroll
      for (int n = 0; n < NT; n++) {
        mma_f16(s[n][m], a[0], b[0], a[1], b[1], k.scaled[n][j][0], k.scaled[n][j][1]);
        mma_f16(s[n][m], a[2], b[2], a[3], b[3], k.scaled[n][j][2], k.scaled[n][j][3]);
      }
    }
  }
  if (mask) mask_slice(s, seg, token, exact_start, lane);
  const float scale = p.scale / CODE_SCALE;
  raise_top(st, s, scale);
  u32 prob[NT][4];
#pragma unroll
  for (int n = 0; n < NT; n++)
#pragma unroll
    for (int i = 0; i < 4; i++)
      prob[n][i] = transpose8x8(pack_f16(exp2_fast(fmaf(s[n][i / 2][(i & 1) * 2], scale, -st.top[n][0])),
                                         exp2_fast(fmaf(s[n][i / 2][(i & 1) * 2 + 1], scale, -st.top[n][1]))));
  u32 scaled[NT][4];
#pragma unroll
  for (int mt = 0; mt < MT; mt += 2) {
    const uint4 w = lds128(mine + ST_V + mt * 256), low = PLANES == 2 ? lds128(mine + ST_V + PLANE + mt * 256) : w;
#pragma unroll
    for (int m = 0; m < 2; m++) {
      constexpr int GROUP_TILES = VALUE_GROUP_SIZE / 16;
      const int v = (mt + m) / GROUP_TILES;
      if ((mt + m) % GROUP_TILES == 0) {
        const uint4 vs = lds128(stage + ST_VS + (v * 4 + t) * 16),
                    vz = lds128(stage + ST_VS + 64 * NVG + (v * 4 + t) * 16);
        const u32 one = v == 0 ? 0x3c003c00 : 0;
#pragma unroll
        for (int n = 0; n < NT; n++) {
          float sums[4] = {0.f, 0.f, 0.f, 0.f};
          mma_f16(sums, vz.x, one, vz.y, one, prob[n][0], prob[n][1]);
          mma_f16(sums, vz.z, one, vz.w, one, prob[n][2], prob[n][3]);
#pragma unroll
          for (int i = 0; i < 4; i++) scaled[n][i] = mul_f16x2(prob[n][i], word(vs, i));
          mma_f16(sums, HALF_RANGE, 0, HALF_RANGE, 0, scaled[n][0], scaled[n][1]);
          mma_f16(sums, HALF_RANGE, 0, HALF_RANGE, 0, scaled[n][2], scaled[n][3]);
#pragma unroll
          for (int i = 0; i < 4; i++) st.sums[n][v][i] += sums[i];
        }
      }
      u32 a[4], b[4];
      expand_v(a, word(w, 2 * m), word(low, 2 * m));
      expand_v(b, word(w, 2 * m + 1), word(low, 2 * m + 1));
#pragma unroll
      for (int n = 0; n < NT; n++) {
        mma_f16(st.acc[n][mt + m], a[0], b[0], a[1], b[1], scaled[n][0], scaled[n][1]);
        mma_f16(st.acc[n][mt + m], a[2], b[2], a[3], b[3], scaled[n][2], scaled[n][3]);
      }
    }
  }
}

// ---- 16 exact tokens ------------------------------------------------------------------------------------------------
DEV void attend_window(State& st, const u32 (&query)[NT][MT][2], u32 stage, const Params& p, const Segment& seg,
                       int token, int exact_start, int lane) {
  float s[NT][1][4];
#pragma unroll
  for (int n = 0; n < NT; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) s[n][0][i] = 0.f;
  const u32 key = stage + (lane & 15) * WIN_ROW + (lane >> 4) * 16;
#pragma unroll
  for (int x = 0; x < MT; x++) {
    u32 a[4];
    load_matrices(a, key + x * 32);
#pragma unroll
    for (int n = 0; n < NT; n++) mma_exact(s[n][0], a[0], a[1], a[2], a[3], query[n][x][0], query[n][x][1]);
  }
#pragma unroll
  for (int n = 0; n < NT; n++) mask_window(s[n][0], n, seg, token, exact_start, lane);
  raise_top(st, s, p.scale);
  // Everything that ends up in acc is in units of 1 / CODE_SCALE.
  constexpr float SHIFT = CODE_BITS == 4 ? 0.f : 4.f;
  const u32 unit = pack_exact(1.f / CODE_SCALE, 1.f / CODE_SCALE);
  u32 prob[NT][2];
#pragma unroll
  for (int n = 0; n < NT; n++) {
#pragma unroll
    for (int i = 0; i < 2; i++)
      prob[n][i] = transpose8x8(pack_exact(exp2_fast(fmaf(s[n][0][2 * i], p.scale, SHIFT - st.top[n][0])),
                                           exp2_fast(fmaf(s[n][0][2 * i + 1], p.scale, SHIFT - st.top[n][1]))));
    mma_exact(st.sums[n][0], 0, unit, 0, unit, prob[n][0], prob[n][1]);
  }
  const u32 value = stage + 2 * D + ((lane & 7) + (lane >> 4) * 8) * WIN_ROW + ((lane >> 3) & 1) * 16;
#pragma unroll
  for (int mt = 0; mt < MT; mt++) {
    u32 a[4];
    ldmatrix_trans(a, value + mt * 32);
#pragma unroll
    for (int n = 0; n < NT; n++) mma_exact(st.acc[n][mt], a[0], a[1], a[2], a[3], prob[n][0], prob[n][1]);
  }
}
