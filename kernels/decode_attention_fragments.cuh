// Operands of tensor core products, in registers: 16-bit floats, instructions on them, and codes of pages that become such.
// Macros: CODE_BITS IS_BF16
#pragma once

#include "ptx.cuh"

DEV void sts128(u32 a, uint4 v) {
  asm volatile("st.shared.v4.u32 [%0],{%1,%2,%3,%4};" ::"r"(a), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
DEV void mma_f16(float* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
DEV void mma_exact(float* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#if IS_BF16
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#else
  mma_f16(c, a0, a1, a2, a3, b0, b1);
#endif
}
DEV void ldmatrix_trans(u32* r, u32 a) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3},[%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(a));
}
DEV u32 transpose8x8(u32 x) {
  u32 r;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0,%1;" : "=r"(r) : "r"(x));
  return r;
}
DEV u32 pack_f16(float low, float high) {
  u32 r;
  asm("cvt.rn.f16x2.f32 %0,%1,%2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
DEV u32 pack_bf16(float low, float high) {
  u32 r;
  asm("cvt.rn.bf16x2.f32 %0,%1,%2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
DEV u32 mul_f16x2(u32 a, u32 b) {
  u32 r;
  asm("mul.rn.f16x2 %0,%1,%2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
DEV u32 add_f16x2(u32 a, u32 b) {
  u32 r;
  asm("add.rn.f16x2 %0,%1,%2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
DEV u32 fma_f16x2(u32 a, u32 b, u32 c) {
  u32 r;
  asm("fma.rn.f16x2 %0,%1,%2,%3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
}
DEV float exp2_fast(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0,%1;" : "=f"(r) : "f"(x));
  return r;
}
DEV u32 pack_exact(float low, float high) { return IS_BF16 ? pack_bf16(low, high) : pack_f16(low, high); }
DEV u32 exact_to_f16(u32 x) {
  return IS_BF16 ? pack_f16(__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u)) : x;
}

// ---- Codes to fp16 --------------------------------------------------------------------------------------------------
constexpr float CODE_SCALE = CODE_BITS == 4 ? 1.f : 16.f;  // codes are in units of scale / CODE_SCALE

// x[par * 2 + b] is the pair e = 0, 1 of the word's codes as fp16. Bits ORed into the mantissa of 1024 (bits 0-3) or 64
// (bits 4-7) cost no conversion but add that constant. Keys keep a constant, K_BIAS: their sums start from 0 at every
// slice. Values are centred (half the codes' range is subtracted, and added to the minimum): sums over a long context
// stay small, so that the tensor core's truncation of fp32 sums does not drift.
#if CODE_BITS == 4
DEV void expand_raw(u32 (&x)[4], u32 w, u32) {
  const u32 v = w >> 8;
  x[0] = and_or<0x000f000f, 0x64006400>(w);
  x[1] = and_or<0x00f000f0, 0x54005400>(w);
  x[2] = and_or<0x000f000f, 0x64006400>(v);
  x[3] = and_or<0x00f000f0, 0x54005400>(v);
}
constexpr u32 K_BIAS = 0x54005400, TO_K_BIAS = 0xe380e380;  // 64, -960
constexpr u32 CENTRE0 = 0xe408e408, CENTRE1 = 0xd480d480;  // -1032, -72
DEV void expand_k(u32 (&x)[4], u32 w, u32) {
  expand_raw(x, w, 0);
  x[0] = add_f16x2(x[0], TO_K_BIAS), x[2] = add_f16x2(x[2], TO_K_BIAS);
}
#else
DEV void expand_raw(u32 (&x)[4], u32 w, u32 lower) {
  const u32 b0 = ((w << 4) & 0xf0f0f0f0) | (lower & 0x0f0f0f0f), b1 = (w & 0xf0f0f0f0) | ((lower >> 4) & 0x0f0f0f0f);
  x[0] = __byte_perm(b0, 0x64646464, 0x4240);
  x[1] = __byte_perm(b1, 0x64646464, 0x4240);
  x[2] = __byte_perm(b0, 0x64646464, 0x4341);
  x[3] = __byte_perm(b1, 0x64646464, 0x4341);
}
constexpr u32 K_BIAS = 0x64086408;  // 1024 + 8, since lower codes are stored + 8
constexpr u32 CENTRE0 = 0xe488e488, CENTRE1 = CENTRE0;  // -(1024 + 8 + 128)
DEV void expand_k(u32 (&x)[4], u32 w, u32 lower) { expand_raw(x, w, lower); }
#endif
constexpr u32 HALF_RANGE = 0x48004800;  // 8 scales: what centring took off
DEV void expand_v(u32 (&x)[4], u32 w, u32 lower) {
  expand_raw(x, w, lower);
  x[0] = add_f16x2(x[0], CENTRE0), x[2] = add_f16x2(x[2], CENTRE0);
  x[1] = add_f16x2(x[1], CENTRE1), x[3] = add_f16x2(x[3], CENTRE1);
}
