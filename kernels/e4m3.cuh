// Conversions to and from pairs of e4m3 (FP8) numbers, and what goes with them. From compute capability 9.0 on. Macro: IS_BF16
#pragma once

#include "ptx.cuh"

// The lower and the upper 4 bits of each byte. Where it stands: ptxas serializes products of warp groups if it computes their
// factors after the fence.
DEV void nibbles(u32& lower, u32& upper, u32 w) {
  asm volatile("{.reg .b32 t;\n and.b32 %0,%2,0x0f0f0f0f;\n shr.b32 t,%2,4;\n and.b32 %1,t,0x0f0f0f0f;}"
               : "=&r"(lower), "=r"(upper)
               : "r"(w));
}
// Two fp16 numbers to the nearest of e4m3, the low one to the low byte; what is too large becomes the largest.
DEV u16 to_e4m3(u32 pair) {
  u16 r;
  asm("cvt.rn.satfinite.e4m3x2.f16x2 %0,%1;" : "=h"(r) : "r"(pair));
  return r;
}
DEV u32 from_e4m3(u16 pair) {
  u32 r;
  asm("cvt.rn.f16x2.e4m3x2 %0,%1;" : "=r"(r) : "h"(pair));
  return r;
}
DEV u32 to_fp16(float low, float high) {
  u32 r;
  asm("cvt.rn.f16x2.f32 %0,%1,%2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
DEV u32 minus_fp16(u32 a, u32 b) {
  u32 r;
  asm("sub.rn.f16x2 %0,%1,%2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
// Of pairs of the inputs' type: the larger magnitudes (signs mean nothing), and products.
DEV u32 larger(u32 a, u32 b) {
  u32 r;
#if IS_BF16
  asm("max.xorsign.abs.bf16x2 %0,%1,%2;" : "=r"(r) : "r"(a), "r"(b));
#else
  asm("max.xorsign.abs.f16x2 %0,%1,%2;" : "=r"(r) : "r"(a), "r"(b));
#endif
  return r;
}
DEV u32 times(u32 a, u32 b) {
  u32 r;
#if IS_BF16
  asm("mul.rn.bf16x2 %0,%1,%2;" : "=r"(r) : "r"(a), "r"(b));
#else
  asm("mul.rn.f16x2 %0,%1,%2;" : "=r"(r) : "r"(a), "r"(b));
#endif
  return r;
}
// c += sums over 16 fp16 numbers of a column: those of columns 2*t and 2*t + 1, in c[0] and c[1] of lane 4*g + t.
DEV void add_columns(float (&c)[4], u32 b0, u32 b1) {
  const u32 ones = 0x3c003c00;
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%4,%4,%4},{%5,%6},{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(ones), "r"(b0), "r"(b1));
}
