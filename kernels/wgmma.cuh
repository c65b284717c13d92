// Products of a warp group (Hopper, sm_90a): 64 rows in A fragments of registers, 8 * NT columns in shared memory.
// Macros: IS_BF16, or FACTORS (types of both factors, as wgmma calls them; of 16 bits, or with BYTES of 8)
#pragma once

#include "ptx.cuh"

// What was written to shared memory before can be read by products.
DEV void fence_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// Registers written before can be used by products; then products, `commit`, and a wait until only LEFT commits are not
// done.
DEV void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEV void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT>
DEV void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}

// B's columns as rows of 128 bytes, 16-byte pieces at (piece ^ row % 8), 8 rows after 1024 bytes; they begin at a multiple
// of 1024. The lower half of a descriptor; 2 more for each further product along the channels, of 32 bytes.
DEV u32 columns_at(u32 at) { return 1 << 16 | (at & 0x3ffff) >> 4; }
constexpr u32 COLUMNS_HIGH = 1u << 30 | 1024 >> 4;

#ifndef FACTORS
#if IS_BF16
#define FACTORS "bf16.bf16"
#else
#define FACTORS "f16.f16"
#endif
#endif
#ifdef BYTES  // a register has four of them; B is as it lies in memory
#define CHANNELS "k32"
#define SIGNS ",1,1"
#else
#define CHANNELS "k16"
#define SIGNS ",1,1,0"
#endif
#define PRODUCT(n, sums, a0, a1, a2, a3, b, add) \
  "{.reg .pred p;\n setp.ne.u32 p,%" add ",0;\n wgmma.mma_async.sync.aligned.m64n" n CHANNELS ".f32." FACTORS " {" sums \
  "},{%" a0 ",%" a1 ",%" a2 ",%" a3 "},%" b ",p" SIGNS ";}"
#define SUMS_16 "%0,%1,%2,%3,%4,%5,%6,%7"
#define SUMS_24 SUMS_16 ",%8,%9,%10,%11"
#define SUMS_32 SUMS_24 ",%12,%13,%14,%15"
#define SUMS_40 SUMS_32 ",%16,%17,%18,%19"
#define SUMS_48 SUMS_40 ",%20,%21,%22,%23"
#define SUMS_56 SUMS_48 ",%24,%25,%26,%27"
#define SUMS_64 SUMS_56 ",%28,%29,%30,%31"
#define FOUR(i) "+f"(c[i * STRIDE]), "+f"(c[i * STRIDE + 1]), "+f"(c[i * STRIDE + 2]), "+f"(c[i * STRIDE + 3])
#define INPUTS "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"((u64)COLUMNS_HIGH << 32 | columns), "n"((int)ADD)

// c += a b, of the columns of a descriptor; without ADD c = a b. Lane 4*g+t of warp w holds of A and of the sums what it
// would hold of mma.m16n8k16's, for rows 16*w..16*w+15; the four sums from c[n * STRIDE] on are those of columns
// 8*n..8*n+7. Not there before `wgmma_wait`, and `a` must stay as it is until then.
template <int NT, int STRIDE = 4, bool ADD = true>
DEV void wgmma(float* c, const u32 (&a)[4], u32 columns) {
  static_assert(2 <= NT && NT <= 8, "16 to 64 columns");
  if constexpr (NT == 2)
    asm volatile(PRODUCT("16", SUMS_16, "8", "9", "10", "11", "12", "13")
                 : FOUR(0), FOUR(1)
                 : INPUTS
                 : "memory");
  if constexpr (NT == 3)
    asm volatile(PRODUCT("24", SUMS_24, "12", "13", "14", "15", "16", "17")
                 : FOUR(0), FOUR(1), FOUR(2)
                 : INPUTS
                 : "memory");
  if constexpr (NT == 4)
    asm volatile(PRODUCT("32", SUMS_32, "16", "17", "18", "19", "20", "21")
                 : FOUR(0), FOUR(1), FOUR(2), FOUR(3)
                 : INPUTS
                 : "memory");
  if constexpr (NT == 5)
    asm volatile(PRODUCT("40", SUMS_40, "20", "21", "22", "23", "24", "25")
                 : FOUR(0), FOUR(1), FOUR(2), FOUR(3), FOUR(4)
                 : INPUTS
                 : "memory");
  if constexpr (NT == 6)
    asm volatile(PRODUCT("48", SUMS_48, "24", "25", "26", "27", "28", "29")
                 : FOUR(0), FOUR(1), FOUR(2), FOUR(3), FOUR(4), FOUR(5)
                 : INPUTS
                 : "memory");
  if constexpr (NT == 7)
    asm volatile(PRODUCT("56", SUMS_56, "28", "29", "30", "31", "32", "33")
                 : FOUR(0), FOUR(1), FOUR(2), FOUR(3), FOUR(4), FOUR(5), FOUR(6)
                 : INPUTS
                 : "memory");
  if constexpr (NT == 8)
    asm volatile(PRODUCT("64", SUMS_64, "32", "33", "34", "35", "36", "37")
                 : FOUR(0), FOUR(1), FOUR(2), FOUR(3), FOUR(4), FOUR(5), FOUR(6), FOUR(7)
                 : INPUTS
                 : "memory");
}
// Sums that a wait has completed must not be read above it.
template <int NT, int STRIDE = 4>
DEV void hold(float* c) {
#pragma unroll
  for (int n = 0; n < NT; n++) asm volatile("" : FOUR(n)::"memory");
}
#undef PRODUCT
#undef SUMS_16
#undef SUMS_24
#undef SUMS_32
#undef SUMS_40
#undef SUMS_48
#undef SUMS_56
#undef SUMS_64
#undef FOUR
#undef INPUTS
#undef CHANNELS
#undef SIGNS
