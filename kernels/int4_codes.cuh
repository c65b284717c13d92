// What kernels on INT4 weights share: floats of 16 bits, and codes that become such. Macro: IS_BF16 (or fp16).
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
DEV u32 pack_16bit(float low, float high) {
  u32 r;
#if IS_BF16
  asm("cvt.rn.bf16x2.f32 %0,%1,%2;" : "=r"(r) : "f"(high), "f"(low));
#else
  asm("cvt.rn.f16x2.f32 %0,%1,%2;" : "=r"(r) : "f"(high), "f"(low));
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
