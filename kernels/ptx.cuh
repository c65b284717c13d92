// What the CUDA kernels share: short names of types, and instructions that CUDA has no intrinsic for.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;
typedef unsigned long long u64;

#define DEV __device__ __forceinline__
DEV u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
DEV uint4 lds128(u32 a) {
  uint4 r;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3},[%4];" : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w) : "r"(a));
  return r;
}
DEV u32 lds32(u32 a) {
  u32 r;
  asm volatile("ld.shared.u32 %0,[%1];" : "=r"(r) : "r"(a));
  return r;
}
DEV u32 lds16(u32 a) {
  u16 r;
  asm volatile("ld.shared.u16 %0,[%1];" : "=h"(r) : "r"(a));
  return r;
}
DEV uint2 lds64(u32 a) {
  uint2 r;
  asm volatile("ld.shared.v2.u32 {%0,%1},[%2];" : "=r"(r.x), "=r"(r.y) : "r"(a));
  return r;
}
DEV void sts32(u32 a, u32 x) { asm volatile("st.shared.u32 [%0],%1;" ::"r"(a), "r"(x) : "memory"); }
DEV void sts128(u32 a, float4 v) {
  asm volatile("st.shared.v4.f32 [%0],{%1,%2,%3,%4};" ::"r"(a), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w) : "memory");
}
DEV void copy16(u32 to, const void* from) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0],[%1],16;" ::"r"(to), "l"(from) : "memory");
}
// 16 bytes, or zeros where they are not there.
DEV void copy16_or_zero(u32 to, const void* from, bool there) {
  asm volatile("cp.async.cg.shared.global [%0],[%1],16,%2;" ::"r"(to), "l"(from), "r"(there ? 16 : 0) : "memory");
}
// What a thread has asked for since the last batch is one.
DEV void end_batch() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until all but the newest LEFT batches of this thread are there.
template <int LEFT>
DEV void wait_for_batches() {
  asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}
// Four matrices of 8 x 8 values of 16 bits; lane 8*i + r has the address of row r of matrix i.
DEV void load_matrices(u32 (&r)[4], u32 a) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3},[%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(a)
               : "memory");
}
// Word i of v; i is known when compiling.
DEV u32 word(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }
// (w & MASK) | BITS
template <u32 MASK, u32 BITS>
DEV u32 and_or(u32 w) {
  u32 r;
  asm("lop3.b32 %0,%1,%2,%3,0xea;" : "=r"(r) : "r"(w), "n"(MASK), "n"(BITS));
  return r;
}

// ---- Programmatic dependent launch: nothing where the GPU does not have it -------------------------------------------
DEV void wait_for_predecessor() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
DEV void release_successor() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
