// What becomes of the results of channels between calls: running statistics, pooled moments, gradients put together.
#pragma once

#include "cuda/finish.cuh"

namespace batchnorm::cuda {

constexpr int kMostBlocksThatLook = 32;  // each of them looks at all moments

// Whether all threads of the block find true what `is_good(c)` says of all channels.
template <class F>
BN_DEVICE bool all_channels(std::int64_t channels, unsigned* bad, const F& is_good) {
  if (threadIdx.x == 0) *bad = 0;
  __syncthreads();
  for (std::int64_t c = threadIdx.x; c < channels; c += blockDim.x) {
    if (!is_good(c)) atomicOr(bad, 1u);
  }
  __syncthreads();
  const bool none = atomicOr(bad, 0u) == 0;
  __syncthreads();
  return none;
}
template <class F>
BN_DEVICE void each_channel(std::int64_t channels, const F& f) {
  for (std::int64_t c = this_thread(); c < channels; c += std::int64_t{gridDim.x} * blockDim.x) f(c);
}

BN_DEVICE bool is_finite(const Moments& m) { return std::isfinite(m.mean) && std::isfinite(m.m2); }

struct Running {
  std::int64_t channels = 0;
  const double *mean = nullptr, *var = nullptr;
  const Moments* batch = nullptr;
  double update_rate = 0;
  int ddof = 0;
  bool only_finite = false;
  double *to_mean = nullptr, *to_var = nullptr;
};
template <class Update>
__global__ void __launch_bounds__(kStepThreads) update_statistics(const __grid_constant__ Update u) {
  BN_SHARED(shared);
  const bool learns = !u.only_finite || all_channels(u.channels, reinterpret_cast<unsigned*>(shared), [&](auto c) {
    const Moments& m = u.batch[c];
    return m.count == 0 || (is_finite(m) && (u.ddof == 0 || m.count >= u.ddof + 1));
  });
  each_channel(u.channels, [&](std::int64_t c) {
    const Moments m = u.batch[c];
    const bool counts = learns && m.count > 0;
    const double mean = u.mean[c], var = u.var[c];
    u.to_mean[c] = counts ? blended(mean, m.mean, u.update_rate) : mean;
    u.to_var[c] = counts ? blended(var, variance_of(m, u.ddof).hi, u.update_rate) : var;
  });
}

struct Pooling {
  std::int64_t channels = 0;
  const Moments *pooled = nullptr, *batch = nullptr;
  int ddof = 0;
  bool only_finite = false;
  Moments* to = nullptr;
  double *mean = nullptr, *var = nullptr;
};
template <class Pool>
__global__ void __launch_bounds__(kStepThreads) pool_moments(const __grid_constant__ Pool p) {
  BN_SHARED(shared);
  const bool learns = !p.only_finite || all_channels(p.channels, reinterpret_cast<unsigned*>(shared), [&](auto c) {
    return is_finite(merge_moments(p.pooled[c], p.batch[c]));
  });
  each_channel(p.channels, [&](std::int64_t c) {
    const Moments both = learns ? merge_moments(p.pooled[c], p.batch[c]) : p.pooled[c];
    // One value has no variance, nor have counts of less than 2: it is 1 there.
    const bool has_none = p.ddof > 0 ? both.count < 2 : both.count <= 1 && both.m2 == 0;
    p.to[c] = both;
    p.mean[c] = both.mean;
    p.var[c] = has_none ? 1 : variance_of(both, p.ddof).hi;
  });
}

// to = the sum over sets of a*x + b*y; a is 1 where it is absent, b*y then 0.
struct Combined {
  std::int64_t channels = 0, sets = 0;
  const double *a = nullptr, *x = nullptr, *b = nullptr, *y = nullptr;
  ChannelOutput to = {};
};
template <class Combination>
__global__ void __launch_bounds__(kStepThreads) combine_sets(const __grid_constant__ Combination k) {
  const std::int64_t c = this_thread();
  if (c >= k.channels) return;
  DoubleDouble total;
  for (std::int64_t s = 0; s < k.sets; ++s) {
    const std::int64_t e = s * k.channels + c;
    double value = k.a == nullptr ? k.x[e] : k.a[e] * k.x[e];
    if (k.b != nullptr) value += k.b[e] * k.y[e];
    if (k.sets == 1) return k.to.set(c, value);  // the sign of a zero too
    const DoubleDouble sum = two_sum(total.hi, value);
    total = {sum.hi, total.lo + sum.lo};
  }
  k.to.set(c, std::isfinite(total.hi) ? total.hi + total.lo : total.hi);
}

}  // namespace batchnorm::cuda
