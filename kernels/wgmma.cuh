// Products of a warp group (Hopper, sm_90a): 64 rows in A fragments of registers, 8 * NT columns in shared memory.
// Macros: IS_BF16 TOKEN_TILES (2, 4, 6 or 8)
#pragma once

#include "ptx.cuh"

// What was written to shared memory before can be read by products.
DEV void fence_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// Registers written before can be used by products; then products, `commit`, and a wait until only LEFT commits are not done.
DEV void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEV void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT>
DEV void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}

// B's columns as rows of 128 bytes, 16-byte pieces at (piece ^ row % 8), 8 rows after 1024 bytes; they begin at a multiple of
// 1024. The lower half of a descriptor; 2 more for each further product along the channels, of 32 bytes.
DEV u32 columns_at(u32 at) { return 1 << 16 | (at & 0x3ffff) >> 4; }
constexpr u32 COLUMNS_HIGH = 1u << 30 | 1024 >> 4;

#if IS_BF16
#define TYPES "bf16.bf16"
#else
#define TYPES "f16.f16"
#endif
#define PRODUCT(n, sums, a0, a1, a2, a3, b) \
  "{.reg .pred p;\n setp.eq.u32 p,0,0;\n wgmma.mma_async.sync.aligned.m64n" n "k16.f32." TYPES " {" sums "},{%" a0 ",%" a1 ",%" a2 \
  ",%" a3 "},%" b ",p,1,1,0;}"
#define SUMS_16 "%0,%1,%2,%3,%4,%5,%6,%7"
#define SUMS_32 SUMS_16 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define SUMS_48 SUMS_32 ",%16,%17,%18,%19,%20,%21,%22,%23"
#define SUMS_64 SUMS_48 ",%24,%25,%26,%27,%28,%29,%30,%31"
#define FOUR(i) "+f"(c[i][0]), "+f"(c[i][1]), "+f"(c[i][2]), "+f"(c[i][3])
#define INPUTS "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"((u64)COLUMNS_HIGH << 32 | columns)

// c += a b, of the columns of a descriptor. Lane 4*g+t of warp w holds of A and of the sums what it would hold of mma.m16n8k16's, for rows 16*w..16*w+15;
// c[n] are those of columns 8*n..8*n+7. Not there before `wgmma_wait`, and `a` must stay as it is until then.
template <int NT>
DEV void wgmma(float (&c)[NT][4], const u32 (&a)[4], u32 columns) {
  static_assert(NT == 2 || NT == 4 || NT == 6 || NT == 8, "16, 32, 48 or 64 columns");
  if constexpr (NT == 2)
    asm volatile(PRODUCT("16", SUMS_16, "8", "9", "10", "11", "12") : FOUR(0), FOUR(1) : INPUTS : "memory");
  if constexpr (NT == 4)
    asm volatile(PRODUCT("32", SUMS_32, "16", "17", "18", "19", "20")
                 : FOUR(0), FOUR(1), FOUR(2), FOUR(3)
                 : INPUTS
                 : "memory");
  if constexpr (NT == 6)
    asm volatile(PRODUCT("48", SUMS_48, "24", "25", "26", "27", "28")
                 : FOUR(0), FOUR(1), FOUR(2), FOUR(3), FOUR(4), FOUR(5)
                 : INPUTS
                 : "memory");
  if constexpr (NT == 8)
    asm volatile(PRODUCT("64", SUMS_64, "32", "33", "34", "35", "36")
                 : FOUR(0), FOUR(1), FOUR(2), FOUR(3), FOUR(4), FOUR(5), FOUR(6), FOUR(7)
                 : INPUTS
                 : "memory");
}
// Sums that a wait has completed must not be read above it.
template <int NT>
DEV void hold(float (&c)[NT][4]) {
#pragma unroll
  for (int n = 0; n < NT; n++) asm volatile("" : FOUR(n)::"memory");
}
#undef TYPES
#undef PRODUCT
#undef SUMS_16
#undef SUMS_32
#undef SUMS_48
#undef SUMS_64
#undef FOUR
#undef INPUTS
