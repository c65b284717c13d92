// Weights in the order of vLLM's Marlin kernel (marlin_linear.py), for draft_layer.cu, up to 2 tokens. A quarter of a strip is a
// row tile: of 16 channels, 128 bytes in lanes 4*(2*c) .. 4*(2*c) + 7, c its number. Its rows are outputs 16*j + 2*c + 0 and 1, for
// word j of a lane, and those 8 further on. A stage has NW chunks of it, 128 bytes for each row of 16 channels: boxes of the
// matrix [in / 16, 8 * out bytes], which the GPU copies at one request. Adjacent row tiles lie side by side.
//
// A lane's word of 8 codes has channels 2*q, 2*q + 1 and the same 8 on, of row r (bits 0-7 and 16-23) and of row r + 8. Masked, it
// is four bytes of both rows in turn. To sort them by rows would be two instructions more per word; instead inputs are spread, with
// zeros for the other row: columns of B are (token, row r or r + 8, byte), and the two rows of A that a lane multiplies are of two
// row tiles, of gate and up for instance. Products are as many as in the packed order.
//
// Macros: of draft_layer.cu
#pragma once

#include "draft_layer_inputs.cuh"

static_assert(TOKENS <= 2, "a product has 8 columns");
DEV constexpr int in_128(int bytes) { return (bytes + 127) / 128 * 128; }  // where boxes may begin
constexpr int CODES = 1024, SCALES = 32, ZEROS = HAS_ZEROS ? 16 : 0;  // of zero points, two row tiles': boxes begin at 16 bytes
constexpr int SCALES_AT = NW * CODES, ZEROS_AT = SCALES_AT + in_128(NW * SCALES), STAGE = ZEROS_AT + in_128(NW * ZEROS);
// Lane 4*g + 2*t + h has row g + 8*h of token t of a row tile.
constexpr int LANE_SUMS = 1, LANES_WITH_SUMS = 2 * TOKENS, BIAS_STEP = 2;

struct Linear {
  TensorMap codes, scales, zeros;  // elements of 4, 2 and 4 bytes
  int tiles, chunks;
};
// What describes the matrices is read before it is needed.
DEV void expect(const Linear& l) {
  prefetch(l.codes), prefetch(l.scales);
  if (HAS_ZEROS) prefetch(l.zeros);
}
struct Place {
  int tile, chunk;
  DEV Place(const Linear&, int tile, int chunk) : tile(tile), chunk(chunk) {}
};
// NW chunks of a row tile from there on, zeros where there are fewer.
DEV void ask_for_stage(const Linear& l, Place from, int, u32 to, u32 done) {
  arrive_expecting(done, NW * (CODES + SCALES + ZEROS));
  copy_box(to, l.codes, from.tile * 32, from.chunk * 8, done);
  copy_box(to + SCALES_AT, l.scales, from.tile * 16, from.chunk, done);
  if (HAS_ZEROS) copy_box(to + ZEROS_AT, l.zeros, from.tile / 2 * 4, from.chunk, done);
}

DEV int token_of_sums(int lane) { return min(lane >> 1 & 1, TOKENS - 1); }
DEV int row_of(int tile, int g) { return (tile >> 2) * 64 + (g >> 1) * 16 + (tile & 3) * 2 + (g & 1); }
// Marlin has biases in an order of 32.
DEV int bias_of(int tile, int g) { return (tile >> 2) * 64 + (g >> 2) * 32 + (tile & 3) * 8 + (g >> 1 & 1) * 4 + (g & 1); }

struct Ring {
  u32 codes, scales, zeros, full, empty;  // addresses of this lane's part of the first stage, and of barriers
  u32 spread[2];                          // how bytes of inputs become two registers of B
  u32 zero_shift;
  Cursor at;
};
DEV Ring ring_of(u32 ring, u32 full, u32 empty, int warp, int lane) {
  const int g = lane >> 2, h = lane & 1;
  const u32 codes = ring + warp * CODES + (g & 1) * 64 + (lane & 3) * 16 + (g >> 1) * 4;
  const u32 scales = ring + SCALES_AT + warp * SCALES + (g & 1) * 16 + (g >> 1) * 4 + h * 2;
  const bool second_row = lane >> 3 & 1;  // of this lane's column
  return {codes,
          scales,
          ring + ZEROS_AT + warp * ZEROS + (g & 1) * 4,
          full,
          empty,
          {second_row ? 0x1404u : 0x4140u, second_row ? 0x3424u : 0x4342u},
          (u32)((g >> 1) * 4 + h * 16 + 16) & 31,
          {0, 0}};
}

// This warp's sums of `count` row tiles from `first` on, or as many pairs of them, a float of each.
template <int T, bool PAIRED>
DEV void multiply(float (&acc)[T][1], Ring& r, int first, int count, int chunks, const Column& in, int warp, int lane) {
  constexpr u32 MASK = 0x0f0f0f0f;
#pragma unroll
  for (int i = 0; i < T; i++) acc[i][0] = 0.f;
#pragma unroll 1
  for (int begin = 0; begin < chunks; begin += NW) {
    const int chunk = min(begin + warp, chunks - 1);
    const uint4 x[2] = {lds128(in.codes + chunk * INPUT_BYTES), lds128(in.codes + chunk * INPUT_BYTES + INPUT_BYTES / 2)};
    const uint4 f = lds128(in.scales + chunk * TOKENS * 16);
    const float scale = __uint_as_float(f.x), sum = __uint_as_float(f.y), offset = __uint_as_float(f.z);
    u32 b[8][2];
#pragma unroll
    for (int j = 0; j < 8; j++)
#pragma unroll
      for (int k = 0; k < 2; k++) b[j][k] = __byte_perm(word(x[j / 4], j % 4), 0, r.spread[k]);
#pragma unroll
    for (int i = 0; i < T; i += 2) {
      if (i >= count) break;
      u32 w[2][8], of_rows[2] = {0, 0}, zeros[2] = {0, 0};
#pragma unroll
      for (int k = 0; k < 2; k++) {
        if (i + k >= T || i + k >= count) {
#pragma unroll
          for (int j = 0; j < 8; j++) w[k][j] = 0;
          continue;
        }
        wait_for(r.full + r.at.slot * 8, r.at.parity);
        const u32 stage = r.at.slot * STAGE;
#pragma unroll
        for (int j = 0; j < 8; j++) w[k][j] = lds32(r.codes + stage + j * 128);
        of_rows[k] = lds16(r.scales + stage);
        if (HAS_ZEROS) zeros[k] = lds32(r.zeros + stage + (first + (PAIRED ? i / 2 : i + k) & 1) * 8);
        __syncwarp();
        if (lane == 0) arrive(r.empty + r.at.slot * 8);
        r.at.step();
      }
      if (begin + warp >= chunks) continue;
      u32 c[4] = {ONES, ONES, ONES, ONES};  // the higher byte's sum, the lower one's; of the second row tile
#pragma unroll
      for (int j = 0; j < 8; j++)
        multiply_bytes(c, w[0][j] & MASK, w[1][j] & MASK, w[0][j] >> 4 & MASK, w[1][j] >> 4 & MASK, b[j][0], b[j][1]);
#pragma unroll
      for (int k = 0; k < 2 && i + k < T; k++) {
        const float high = __uint_as_float(c[2 * k]) - ONES_FLOAT, low = __uint_as_float(c[2 * k + 1]) - ONES_FLOAT;
        float product = fmaf(scale, fmaf(high, 256.f, low), offset);
        if (HAS_ZEROS) {  // its 4 bits are the last of a float's integer part: 128 and the zero point
          const u32 turned = __funnelshift_r(zeros[k], zeros[k], r.zero_shift);
          product = fmaf(-__uint_as_float(and_or<0x000f0000, 0x43000000>(turned)), sum, product);
        }
        acc[i + k][0] = fmaf(low_float(of_rows[k]), product, acc[i + k][0]);
      }
    }
  }
}

DEV void leave_tile(const float (&acc)[1], float2* sums, int first, int g, int q) {
  reinterpret_cast<float*>(sums)[2 * first + g * 2 * TOKENS + q] = acc[0];
}
