// The running softmax of a warp: sums that are relative to a score `top`, which seldom changes.
#pragma once

#include "decode_attention_fragments.cuh"
#include "decode_attention_layout.cuh"

// A score may be above `top` by ROOM (log2): probabilities stay below 2^ROOM, in fp16 times a value's scale, which has to be
// below 2^(16 - ROOM). Then `top` rises to HEADROOM below it: by so much more low probabilities keep their bits. Raising
// costs a team as much as half a page, and with little room between the two one of 40 rows often has to.
constexpr float NEVER = -1e30f, ROOM = 8.f, HEADROOM = 3.f;

// Lane 4*g+t holds rows 8*nt + 2t + {0, 1}: element [..][0..1] of output channel 16*mt + g, [2..3] of channel 16*mt + 8
// + g.
struct State {
  float acc[NT][OWN_MT][4];  // sum of p * scale * centred code
  float sums[NT][NVG][4];  // [0..1] sum of p * (minimum + 8 * scale), [2..3] (group 0) sum of p
  float top[NT][2];  // p = 2^(score - top)
};

DEV void reset(State& st) {
#pragma unroll
  for (int n = 0; n < NT; n++) {
    st.top[n][0] = st.top[n][1] = NEVER;
#pragma unroll
    for (int i = 0; i < 4; i++) {
#pragma unroll
      for (int m = 0; m < OWN_MT; m++) st.acc[n][m][i] = 0.f;
#pragma unroll
      for (int v = 0; v < NVG; v++) st.sums[n][v][i] = 0.f;
    }
  }
}

DEV float max_of_rows(float x) {
  x = fmaxf(x, __shfl_xor_sync(ALL, x, 4));
  x = fmaxf(x, __shfl_xor_sync(ALL, x, 8));
  return fmaxf(x, __shfl_xor_sync(ALL, x, 16));
}

DEV float sum_of_rows(float x) {
  x += __shfl_xor_sync(ALL, x, 4);
  x += __shfl_xor_sync(ALL, x, 8);
  return x + __shfl_xor_sync(ALL, x, 16);
}

// A row tile's `top`, where its largest score is above it by more than there is room for.
DEV void rescale(State& st, int n, const float (&high)[2]) {
  float factor[2];
#pragma unroll
  for (int e = 0; e < 2; e++) {
    const float top = high[e] > st.top[n][e] + ROOM ? high[e] - HEADROOM : st.top[n][e];
    factor[e] = exp2_fast(st.top[n][e] - top);
    st.top[n][e] = top;
  }
#pragma unroll
  for (int i = 0; i < 4; i++) {
#pragma unroll
    for (int m = 0; m < OWN_MT; m++) st.acc[n][m][i] *= factor[i & 1];
#pragma unroll
    for (int v = 0; v < NVG; v++) st.sums[n][v][i] *= factor[i & 1];
  }
}

// The largest of a lane's scores in each row, if it has any; whether one is above `top` by more than ROOM.
template <int N>
DEV bool above_top(float (&high)[NT][2], const State& st, const float (&s)[NT][N][4], float scale, bool has = true) {
  bool raise = false;
#pragma unroll
  for (int n = 0; n < NT; n++)
#pragma unroll
    for (int e = 0; e < 2; e++) {
      float x = fmaxf(s[n][0][e], s[n][0][e + 2]);
#pragma unroll
      for (int i = 1; i < N; i++) x = fmaxf(x, fmaxf(s[n][i][e], s[n][i][e + 2]));
      high[n][e] = has ? x * scale : NEVER;
      raise |= high[n][e] > st.top[n][e] + ROOM;
    }
  return raise;
}

// Raise `top` where a score exceeds it by more than ROOM: after the first slices hardly ever.
template <int N>
DEV void raise_top(State& st, const float (&s)[NT][N][4], float scale) {
  float high[NT][2];
  if (!__any_sync(ALL, above_top(high, st, s, scale))) return;
#pragma unroll
  for (int n = 0; n < NT; n++) {
    float x[2];
#pragma unroll
    for (int e = 0; e < 2; e++) x[e] = max_of_rows(high[n][e]);
    rescale(st, n, x);
  }
}
