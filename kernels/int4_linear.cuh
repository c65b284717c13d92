// What the kernels for INT4 linears share: parameters, rotation, results. Macros: IS_BF16 ROTATED
#pragma once

#include "barriers.cuh"
#include "int4_codes.cuh"

struct Params {
  const u16* x;
  const u8* codes;
  const u8* scales;
  const u16* bias;
  u16* out;
  float4* partial;
  int* arrived;
  i64 x_stride;
  int tokens, channels, tiles, chunks;
};

DEV uint4 ldg128(const u16* p) {
  uint4 r;
  asm volatile("ld.global.v4.u32 {%0,%1,%2,%3},[%4];" : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w) : "l"(p));
  return r;
}

DEV uint4 ldg128_if(const u16* p, bool there) {  // or zeros
  uint4 r;
  asm volatile(
      "{.reg .pred p;\n setp.ne.u32 p,%5,0;\n mov.u32 %0,0;\n mov.u32 %1,0;\n mov.u32 %2,0;\n mov.u32 %3,0;\n"
      " @p ld.global.v4.u32 {%0,%1,%2,%3},[%4];}"
      : "=&r"(r.x), "=&r"(r.y), "=&r"(r.z), "=&r"(r.w)
      : "l"(p), "r"((u32)there));
  return r;
}

DEV void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) { mma(c, a[0], a[1], a[2], a[3], b0, b1); }

#if ROTATED
// Rotation of 32 channels, x H / 8 (rotation.py). A quadruple of a lane has the channels 8*t + 0..7 of token g. As an A operand
// (rows 0..7: channels 0..3 of each lane, rows 8..15: channels 4..7 of the same tokens) two products mix 16 channels and leave
// them where they were, since columns of the result lie in lanes as channels do; the sums of both halves are the rest.
// A lane's part of H / 8 as a B operand: channels 2*t and 2*t + 1 of column g.
DEV u32 signs_of_lane(int lane) {
  const int g = lane >> 2, k = (lane & 3) * 2;
  const u32 eighths = IS_BF16 ? 0x3e003e00 : 0x30003000;
  return eighths | (u32)(__popc(g & k) & 1) << 15 | (u32)(__popc(g & (k + 1)) & 1) << 31;
}
DEV void rotate(uint4& x, u32 signs) {
  const u32 a[4] = {x.x, x.z, x.y, x.w};
  float c[4] = {0.f, 0.f, 0.f, 0.f}, d[4] = {0.f, 0.f, 0.f, 0.f};
  mma(c, a, signs, signs);
  mma(d, a, signs, signs ^ 0x80008000);
  x.x = pack_16bit(c[0] + c[2], c[1] + c[3]), x.y = pack_16bit(d[0] + d[2], d[1] + d[3]);
  x.z = pack_16bit(c[0] - c[2], c[1] - c[3]), x.w = pack_16bit(d[0] - d[2], d[1] - d[3]);
}
#endif

DEV void store(const Params& p, float4 v, int tile, int token0, int lane) {
  const int row = tile * 16 + (lane >> 2), token = token0 + (lane & 3) * 2;
  const i64 stride = (i64)p.tiles * 16;
  float b0 = 0.f, b1 = 0.f;
  if (p.bias) b0 = low_float(p.bias[row]), b1 = low_float(p.bias[row + 8]);
  u16* to = p.out + token * stride + row;
  if (token < p.tokens) to[0] = to_16bit(v.x + b0), to[8] = to_16bit(v.z + b1);
  if (token + 1 < p.tokens) to[stride] = to_16bit(v.y + b0), to[stride + 8] = to_16bit(v.w + b1);
}
