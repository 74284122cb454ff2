// What kernels need beyond the plain words of CUDA, for both compilers: with nvcc as instructions of the GPU, with any
// other as the machine that runs the same kernels on the CPU (tests/cpp/simt).
//
//   BN_DEVICE      before functions of the GPU; BN_DEVICE_CALL where they are called, as those of one thread are, whose
//                  registers are then not asked for by all
//   BN_UNROLLED    before loops whose turns are to have registers of their own
//   BN_SHARED(p)   unsigned char* p, the block's dynamic shared memory, at a line of 128 bytes
//   cluster_*      blocks that run at once and reach each other's shared memory; where there are none, of one block
//   CopyBarrier    copies to shared memory that arrive on their own, and what waits for them
//   release        and acquire: of what blocks that run at once tell each other through global memory
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#include <cooperative_groups.h>
#include <cuda_runtime.h>
#define BN_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#define BN_DEVICE __device__ __forceinline__
#define BN_DEVICE_CALL __device__ __noinline__
#define BN_UNROLLED _Pragma("unroll")
#else
#include "simt/cuda.hpp"
#define BN_SHARED(name) unsigned char* const name = simt::self().block->shared.get()
#define BN_DEVICE inline
#define BN_DEVICE_CALL inline
#define BN_UNROLLED
#endif

namespace batchnorm::device {

#if !defined(__CUDACC__)

inline constexpr bool kHasClusters = true;
inline unsigned cluster_rank() { return simt::self().block->rank; }
inline unsigned cluster_size() { return static_cast<unsigned>(simt::machine().blocks.size()); }
inline void cluster_sync() { simt::wait_at(*simt::machine().cluster); }
// The same place in the shared memory of another block of the cluster.
template <class T>
T* of_rank(T* p, unsigned rank) {
  const auto at = reinterpret_cast<unsigned char*>(p) - simt::self().block->shared.get();
  return reinterpret_cast<T*>(simt::machine().blocks[rank]->shared.get() + at);
}

using simt::CopyBarrier;
inline void begin(CopyBarrier* b) { b->missing.set(0), b->phase.set(0), b->announced.set(0); }
inline void after_begin() {}
inline void before_copies() {}
inline void announce(CopyBarrier* b, unsigned bytes) { simt::announce(b, bytes); }
inline void copy(void* to, const void* from, unsigned bytes, CopyBarrier* b) { simt::issue(to, from, bytes, b); }
inline void wait(CopyBarrier* b, unsigned phase) { simt::wait_for_copies(b, phase); }

inline void release(unsigned* count) { __atomic_fetch_add(count, 1u, __ATOMIC_RELEASE); }
inline unsigned acquire(const unsigned* count) { return __atomic_load_n(count, __ATOMIC_ACQUIRE); }

#else

using CopyBarrier = std::uint64_t;
BN_DEVICE unsigned shared_address(const void* p) { return static_cast<unsigned>(__cvta_generic_to_shared(p)); }

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
// One block is a cluster. Each thread copies 16 bytes at a time and waits for its own, then meets the others.
inline constexpr bool kHasClusters = false;
BN_DEVICE unsigned cluster_rank() { return 0; }
BN_DEVICE unsigned cluster_size() { return 1; }
BN_DEVICE void cluster_sync() { __syncthreads(); }
template <class T>
BN_DEVICE T* of_rank(T* p, unsigned) {
  return p;
}
BN_DEVICE void begin(CopyBarrier*) {}
BN_DEVICE void after_begin() {}
BN_DEVICE void before_copies() {}
BN_DEVICE void announce(CopyBarrier*, unsigned) {}
BN_DEVICE void copy(void* to, const void* from, unsigned bytes, CopyBarrier*) {
  for (unsigned at = 0; at < bytes; at += 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(static_cast<char*>(to) + at)),
                 "l"(static_cast<const char*>(from) + at)
                 : "memory");
  }
}
BN_DEVICE void wait(CopyBarrier*, unsigned) { asm volatile("cp.async.wait_all;" ::: "memory"); }
#else
inline constexpr bool kHasClusters = true;
BN_DEVICE unsigned cluster_rank() { return cooperative_groups::this_cluster().block_rank(); }
BN_DEVICE unsigned cluster_size() { return cooperative_groups::this_cluster().num_blocks(); }
BN_DEVICE void cluster_sync() { cooperative_groups::this_cluster().sync(); }
template <class T>
BN_DEVICE T* of_rank(T* p, unsigned rank) {
  return cooperative_groups::this_cluster().map_shared_rank(p, rank);
}
// Of one arrival, that of who announces bytes.
BN_DEVICE void begin(CopyBarrier* b) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(b)) : "memory");
}
BN_DEVICE void after_begin() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// What this thread has read or written of shared memory comes before copies that it issues from now on.
BN_DEVICE void before_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
BN_DEVICE void announce(CopyBarrier* b, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(b)), "r"(bytes)
               : "memory");
}
// Whole 16 bytes at such addresses.
BN_DEVICE void copy(void* to, const void* from, unsigned bytes, CopyBarrier* b) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(from), "r"(bytes), "r"(shared_address(b))
               : "memory");
}
// Until phase number `phase`, of which the first is 0, is over.
BN_DEVICE void wait(CopyBarrier* b, unsigned phase) {
  asm volatile(
      "{\n"
      ".reg .pred over;\n"
      "again: mbarrier.try_wait.parity.shared::cta.b64 over, [%0], %1;\n"
      "@!over bra again;\n"
      "}" ::"r"(shared_address(b)),
      "r"(phase & 1)
      : "memory");
}
#endif

// What is written before a release is seen by whoever has acquired the count behind it.
BN_DEVICE void release(unsigned* count) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(count) : "memory");
}
BN_DEVICE unsigned acquire(const unsigned* count) {
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(count) : "memory");
  return value;
}

#endif

// All threads of `blocks` blocks that run at once meet, for the `round`-th time (0 first), through a count in global
// memory that began as 0.
BN_DEVICE void meet(unsigned* count, unsigned blocks, unsigned round) {
  __syncthreads();
  if (threadIdx.x == 0) {
    release(count);
    while (acquire(count) < blocks * (round + 1)) __nanosleep(64);
  }
  __syncthreads();
}

}  // namespace batchnorm::device
