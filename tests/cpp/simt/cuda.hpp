// The words of CUDA that kernels use, as the machine of simt/machine.hpp means them. Dynamic shared memory alone:
// blocks of a cluster live at once, so that a static variable would be shared by all of them.
#pragma once

#include "simt/machine.hpp"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

#define threadIdx (simt::self().index)
#define blockIdx (simt::self().block->index)
#define blockDim (simt::machine().block)
#define gridDim (simt::machine().grid)

inline void __syncthreads() { simt::wait_at(simt::self().block->barrier); }
inline void __syncwarp() { simt::wait_at(simt::warp().sync); }
inline void __nanosleep(unsigned) { simt::yield(); }

template <class T>
T __shfl_xor_sync(unsigned mask, T value, unsigned distance) {
  return simt::exchange(mask, value, (threadIdx.x % simt::kWarp) ^ distance, 1);
}
template <class T>
T __shfl_sync(unsigned mask, T value, unsigned from) {
  return simt::exchange(mask, value, from, 2);
}
inline unsigned __ballot_sync(unsigned mask, bool value) {
  unsigned set = 0;
  simt::exchange_all(mask, value, 3, [&](const auto& of_lane) {
    for (unsigned lane = 0; lane < simt::kWarp; ++lane) set |= (of_lane(lane) ? 1u : 0u) << lane;
  });
  return set;
}
template <class T>
T atomicAdd(T* to, T value) {
  static_assert(std::is_integral_v<T>, "a sum of floating-point numbers would depend on their order");
  return __atomic_fetch_add(to, value, __ATOMIC_RELAXED);
}
template <class T>
T atomicOr(T* to, T value) {
  return __atomic_fetch_or(to, value, __ATOMIC_RELAXED);
}
