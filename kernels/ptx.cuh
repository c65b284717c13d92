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
DEV void copy16(u32 to, const void* from) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0],[%1],16;" ::"r"(to), "l"(from) : "memory");
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
