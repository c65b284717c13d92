// A barrier of all CTAs of a launch, which must all be on the GPU together, and reads of what other CTAs have written in it.
#pragma once

#include "ptx.cuh"

// From L2: the L1 cache may hold what was there before.
DEV uint4 read128(const u16* p) {
  uint4 r;
  asm volatile("ld.global.cg.v4.u32 {%0,%1,%2,%3},[%4];"
               : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w)
               : "l"(p)
               : "memory");
  return r;
}
DEV u32 read16(const u16* p) {
  u16 r;
  asm volatile("ld.global.cg.u16 %0,[%1];" : "=h"(r) : "l"(p) : "memory");
  return r;
}
DEV void add_and_release(u32* p, u32 n) {
  asm volatile("red.release.gpu.global.add.u32 [%0],%1;" ::"l"(p), "r"(n) : "memory");
}
DEV u32 acquire(const u32* p) {
  u32 r;
  asm volatile("ld.acquire.gpu.global.u32 %0,[%1];" : "=r"(r) : "l"(p) : "memory");
  return r;
}

// Used by one thread of each CTA. The highest bit of the counter changes with the last arrival, and the others are then as
// before: nothing is ever set back, and launches of other sizes may use it next.
struct GridBarrier {
  static constexpr u32 TURN = 0x80000000u;
  u32* arrived;
  u32 turn;
  // When no launch before this one is still at the barrier: the bit cannot change before this CTA arrives.
  DEV void begin(u32* counter) { arrived = counter, turn = acquire(counter) & TURN; }
  // Between two barriers of the CTA.
  DEV void wait() {
    add_and_release(arrived, blockIdx.x == 0 ? TURN - (gridDim.x - 1) : 1);
    turn ^= TURN;
    while ((acquire(arrived) & TURN) != turn) {
    }
  }
};
