// What kernels on quantized weights share: floats of 16 bits, their products, and codes that become such. Macro: IS_BF16 (or fp16).
#pragma once

#include "ptx.cuh"

DEV float low_float(u32 x) {
#if IS_BF16
  return __uint_as_float(x << 16);
#else
  float r;
  asm("{.reg .b16 l,h;\n mov.b32 {l,h},%1;\n cvt.f32.f16 %0,l;}" : "=f"(r) : "r"(x));
  return r;
#endif
}
DEV float high_float(u32 x) {
#if IS_BF16
  return __uint_as_float(x & 0xffff0000u);
#else
  float r;
  asm("{.reg .b16 l,h;\n mov.b32 {l,h},%1;\n cvt.f32.f16 %0,h;}" : "=f"(r) : "r"(x));
  return r;
#endif
}
DEV void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#if IS_BF16
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
#else
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
#endif
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
DEV u32 pack_16bit(float low, float high) {
  u32 r;
#if IS_BF16
  asm("cvt.rn.bf16x2.f32 %0,%1,%2;" : "=r"(r) : "f"(high), "f"(low));
#else
  asm("cvt.rn.f16x2.f32 %0,%1,%2;" : "=r"(r) : "f"(high), "f"(low));
#endif
  return r;
}
DEV u16 to_16bit(float x) {
  u16 r;
#if IS_BF16
  asm("cvt.rn.bf16.f32 %0,%1;" : "=h"(r) : "f"(x));
#else
  asm("cvt.rn.f16.f32 %0,%1;" : "=h"(r) : "f"(x));
#endif
  return r;
}
// MAGIC + nibbles i and i + 4 of a word, for i = 0..3.
DEV void expand(u32 (&a)[4], u32 w) {
#if IS_BF16
  a[0] = and_or<0x000f000f, 0x43004300>(w);
  a[1] = and_or<0x000f000f, 0x43004300>(w >> 4);
  a[2] = and_or<0x000f000f, 0x43004300>(w >> 8);
  a[3] = and_or<0x000f000f, 0x43004300>(w >> 12);
#else
  a[0] = and_or<0x00f000f0, 0x54005400>(w << 4);
  a[1] = and_or<0x00f000f0, 0x54005400>(w);
  a[2] = and_or<0x00f000f0, 0x54005400>(w >> 4);
  a[3] = and_or<0x00f000f0, 0x54005400>(w >> 8);
#endif
}
// Levels of 8-bit codes (levels.py): bytes 0 and 2 of w0, 1 and 3 of w0, then those of w1.
DEV void expand_bytes(u32 (&a)[4], u32 w0, u32 w1) {
#if IS_BF16
  a[0] = __byte_perm(w0, 0x43434343, 0x4240), a[1] = __byte_perm(w0, 0x43434343, 0x4341);
  a[2] = __byte_perm(w1, 0x43434343, 0x4240), a[3] = __byte_perm(w1, 0x43434343, 0x4341);
#else
  // The same numbers: a bit of the exponent and seven of the mantissa, three bits further up.
  a[0] = and_or<0x07f807f8, 0x58005800>(w0 << 3), a[1] = and_or<0x07f807f8, 0x58005800>(w0 >> 5);
  a[2] = and_or<0x07f807f8, 0x58005800>(w1 << 3), a[3] = and_or<0x07f807f8, 0x58005800>(w1 >> 5);
#endif
}
