// Barriers in shared memory, by which warps that fill a ring of stages and warps that empty it wait for each other.
#pragma once

#include "ptx.cuh"

DEV void barrier_init(u32 a, int count) { asm volatile("mbarrier.init.shared.b64 [%0],%1;" ::"r"(a), "r"(count)); }
DEV void barrier_end(u32 a) { asm volatile("mbarrier.inval.shared.b64 [%0];" ::"r"(a) : "memory"); }
DEV void arrive(u32 a) {
  asm volatile("{.reg .b64 t;\n mbarrier.arrive.shared.b64 t,[%0];}" ::"r"(a) : "memory");
}
DEV void wait_for(u32 a, u32 parity) {
  u32 done;
  do {
#if __CUDA_ARCH__ >= 900
    asm volatile("{.reg .pred p;\n mbarrier.try_wait.parity.shared.b64 p,[%1],%2;\n selp.u32 %0,1,0,p;}"
#else
    asm volatile("{.reg .pred p;\n mbarrier.test_wait.parity.shared.b64 p,[%1],%2;\n selp.u32 %0,1,0,p;}"
#endif
                 : "=r"(done)
                 : "r"(a), "r"(parity)
                 : "memory");
  } while (!done);
}
// A stage is full when the copies of all lanes are there.
DEV void arrive_copied(u32 full) { asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(full) : "memory"); }
#if __CUDA_ARCH__ >= 900
// Barriers initialized before are there for copies.
DEV void fence_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// An arrival, and so many bytes that are still to be copied.
DEV void arrive_expecting(u32 a, u32 bytes) {
  asm volatile("{.reg .b64 t;\n mbarrier.arrive.expect_tx.shared.b64 t,[%0],%1;}" ::"r"(a), "r"(bytes) : "memory");
}
// A multiple of 16 bytes; the barrier counts them when they are there.
DEV void copy_bulk(u32 to, const void* from, u32 bytes, u32 barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0],[%1],%2,[%3];" ::"r"(to), "l"(from),
               "r"(bytes), "r"(barrier)
               : "memory");
}
// A matrix in memory and the size of the boxes that are copied of it, as the driver encodes them (nvrtc.py).
struct __align__(64) TensorMap {
  u64 words[16];
};
// The box that begins at column x of row y, counted in elements: all of it, zeros where the matrix has ended.
DEV void copy_box(u32 to, const TensorMap& map, int x, int y, u32 barrier) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0],[%1,{%2,%3}],[%4];" ::"r"(to),
               "l"(&map), "r"(x), "r"(y), "r"(barrier)
               : "memory");
}
DEV void prefetch(const TensorMap& map) { asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory"); }
#endif
// Until as many threads have come here: those that multiply, without those that fill the ring.
template <int THREADS>
DEV void meet() {
  asm volatile("bar.sync 1,%0;" ::"n"(THREADS) : "memory");
}
// The same at a barrier of one's own; and to be one of them without a wait.
DEV void wait_among(int barrier, int threads) { asm volatile("bar.sync %0,%1;" ::"r"(barrier), "r"(threads) : "memory"); }
DEV void arrive_among(int barrier, int threads) { asm volatile("bar.arrive %0,%1;" ::"r"(barrier), "r"(threads) : "memory"); }
// Of CTAs that have left parts of a sum in the workspace, the last to arrive, in all of its THREADS threads; it sets the
// counter back for the next launch.
template <int THREADS, int CTAS>
DEV bool is_last_to_arrive(int* arrived, int thread) {
  __shared__ bool last;
  __threadfence();
  meet<THREADS>();
  if (thread == 0) {
    last = atomicAdd(arrived, 1) == CTAS - 1;
    if (last) *arrived = 0;
  }
  meet<THREADS>();
  if (!last) return false;
  __threadfence();
  return true;
}
