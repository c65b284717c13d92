// Weights in the order of int4_linear.py, for draft_layer.cu: a row tile's chunk is 1024 bytes of codes and 64 of scales and zero
// points, and chunks of a row tile lie one behind the other. A word has 4 channels of row g and, shifted, of row g + 8.
#pragma once

#include "draft_layer_inputs.cuh"

constexpr int CODES = 1024, SCALES = 64, STAGE = NW * (CODES + SCALES);
// Lane 4*g + t has rows g and g + 8 of token t of a row tile.
constexpr int LANE_SUMS = 2, LANES_WITH_SUMS = TOKENS, BIAS_STEP = 8;

struct Linear {
  const u8* codes;
  const u8* scales;
  int tiles, chunks;
};
DEV void expect(const Linear&) {}
struct Place {
  i64 unit;
  DEV Place(const Linear& l, int tile, int chunk) : unit((i64)tile * l.chunks + chunk) {}
};
// The n chunks of a row tile from there on.
DEV void ask_for_stage(const Linear& l, Place from, int n, u32 to, u32 done) {
  arrive_expecting(done, n * (CODES + SCALES));
  copy_bulk(to, l.codes + from.unit * CODES, n * CODES, done);
  copy_bulk(to + NW * CODES, l.scales + from.unit * SCALES, n * SCALES, done);
}

DEV int token_of_sums(int lane) { return min(lane & 3, TOKENS - 1); }
DEV int row_of(int tile, int g) { return tile * 16 + g; }
DEV int bias_of(int tile, int g) { return row_of(tile, g); }

struct Ring {
  u32 codes, scales, full, empty;  // addresses of this lane's part of the first stage, and of barriers
  Cursor at;
};
DEV Ring ring_of(u32 ring, u32 full, u32 empty, int warp, int lane) {
  return {ring + warp * CODES + lane * 16, ring + NW * CODES + warp * SCALES + (lane >> 2) * 8, full, empty, {0, 0}};
}

// This warp's sums of `count` row tiles: rows g and g + 8 of token t of lane 4*g+t.
template <int T, bool PAIRED>
DEV void multiply(float (&acc)[T][2], Ring& r, int, int count, int chunks, const Column& in, int warp, int lane) {
#pragma unroll
  for (int i = 0; i < T; i++) acc[i][0] = acc[i][1] = 0.f;
#pragma unroll 1
  for (int begin = 0; begin < chunks; begin += NW) {
    const int chunk = min(begin + warp, chunks - 1);
    const uint4 x[2] = {lds128(in.codes + chunk * INPUT_BYTES), lds128(in.codes + chunk * INPUT_BYTES + INPUT_BYTES / 2)};
    const uint4 f = lds128(in.scales + chunk * TOKENS * 16);
    const float scale = __uint_as_float(f.x), sum = __uint_as_float(f.y), offset = __uint_as_float(f.z);
#pragma unroll
    for (int i = 0; i < T; i++) {
      if (i >= count) break;
      wait_for(r.full + r.at.slot * 8, r.at.parity);
      const u32 stage = r.at.slot * STAGE;
      const uint4 w[2] = {lds128(r.codes + stage), lds128(r.codes + stage + 512)};
      const uint2 of_rows = lds64(r.scales + stage);
      __syncwarp();
      if (lane == 0) arrive(r.empty + r.at.slot * 8);
      r.at.step();
      if (begin + warp >= chunks) continue;
      u32 c[4] = {ONES, ONES, ONES, ONES};  // the higher byte's sum, the lower one's; of row g + 8
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const u32 v0 = word(w[j / 2], j % 2 * 2), v1 = word(w[j / 2], j % 2 * 2 + 1), mask = 0x0f0f0f0f;
        multiply_bytes(c, v0 & mask, v0 >> 4 & mask, v1 & mask, v1 >> 4 & mask, word(x[j / 2], j % 2 * 2),
                       word(x[j / 2], j % 2 * 2 + 1));
      }
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const u32 pair = h ? of_rows.y : of_rows.x;
        const float high = __uint_as_float(c[2 * h]) - ONES_FLOAT, low = __uint_as_float(c[2 * h + 1]) - ONES_FLOAT;
        const float product = fmaf(scale, fmaf(high, 256.f, low), offset);
        acc[i][h] = fmaf(low_float(pair), fmaf(-high_float(pair), sum, product), acc[i][h]);
      }
    }
  }
}

DEV void leave_tile(const float (&acc)[2], float2* sums, int first, int g, int t) {
  sums[first + g * TOKENS + t] = make_float2(acc[0], acc[1]);
}
