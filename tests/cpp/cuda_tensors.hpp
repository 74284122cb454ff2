// What the kernels for GPUs are tried on (cuda_test, cuda_steps_test, cuda_schedules), and how results are compared.
// With BATCHNORM_ON_DEVICE in memory that a GPU reaches, too.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "batchnorm/types.hpp"
#if defined(BATCHNORM_ON_DEVICE)
#include <cuda_runtime_api.h>

#include <new>

#include "cuda/gpu.hpp"
#include "kernels/table.hpp"
#else
#include "cuda/resident.hpp"
#endif

namespace cuda_tensors {

using namespace batchnorm;

#if defined(BATCHNORM_ON_DEVICE)
template <class V>
struct Managed {
  using value_type = V;
  Managed() = default;
  template <class U>
  Managed(const Managed<U>&) {}
  V* allocate(std::size_t count) {
    void* memory = nullptr;
    if (cudaMallocManaged(&memory, count * sizeof(V), cudaMemAttachGlobal) != cudaSuccess) throw std::bad_alloc();
    return static_cast<V*>(memory);
  }
  void deallocate(V* memory, std::size_t) { static_cast<void>(cudaFree(memory)); }
  bool operator==(const Managed&) const { return true; }
};
template <class V>
using Array = std::vector<V, Managed<V>>;
#else
template <class V>
using Array = std::vector<V>;
#endif

struct Tensors {
  Problem problem;
  std::vector<float> x, dy, gamma, beta;
  std::string name;
};
inline Tensors tensors(const Problem& p, const std::string& kind) {
  const auto n = static_cast<std::size_t>(p.size()), channels = static_cast<std::size_t>(p.channels);
  Tensors t{
      p,   std::vector<float>(n), std::vector<float>(n), std::vector<float>(channels), std::vector<float>(channels),
      kind};
  std::mt19937 random(7);
  std::normal_distribution<float> normal;
  for (std::size_t e = 0; e < n; ++e) {
    const float v = normal(random);
    t.dy[e] = normal(random);
    if (kind == "normal") t.x[e] = v;
    if (kind == "far from 0") t.x[e] = 1e6f + v;
    if (kind == "constant") t.x[e] = 3.7f;
    if (kind == "subnormal") t.x[e] = v * 1e-42f;
    if (kind == "large") t.x[e] = v * 1e30f, t.dy[e] *= 1e20f;
    // Pairs that cancel, but for one value that is small against them, or very small.
    if (kind == "cancelled" || kind == "cancelled to nothing") {
      t.x[e] = e % 2 == 0 ? 1 + std::abs(v) : -t.x[e - 1];
      if (e == 1) t.x[e] += kind == "cancelled" ? 1e-6f : 0;
      if (e == 0 && kind != "cancelled") t.x[e] = 1e-25f;
    }
    // At three scales, of which twice the digits of float64 hold two: the sum is 1e-25.
    constexpr float kScales[] = {1e18f, 1, -1e18f, -1, 1e-25f};
    if (kind == "cancelled twice") t.x[e] = e < std::size(kScales) ? kScales[e] : 0;
    if (kind == "with a NaN") t.x[e] = e == n / 2 ? std::numeric_limits<float>::quiet_NaN() : v;
  }
  for (std::size_t c = 0; c < channels; ++c) t.gamma[c] = normal(random), t.beta[c] = normal(random);
  return t;
}
inline constexpr const char* kKinds[] = {"normal",    "far from 0",           "constant",        "subnormal", "large",
                                         "cancelled", "cancelled to nothing", "cancelled twice", "with a NaN"};

// The same of a type.
template <class T>
struct TensorsOf {
  Problem problem;
  Array<T> x, dy;
  Array<float> gamma, beta;
  std::string name;

  explicit TensorsOf(const Tensors& t)
      : problem(t.problem), gamma(t.gamma.begin(), t.gamma.end()), beta(t.beta.begin(), t.beta.end()), name(t.name) {
    for (const float v : t.x) x.push_back(T(v));
    for (const float v : t.dy) dy.push_back(T(v));
  }
};

// NaN of any bits is NaN: the sign of one differs between machines.
template <class Values>
bool same(const Values& a, const Values& b) {
  for (std::size_t i = 0; i < a.size(); ++i) {
    if (std::memcmp(&a[i], &b[i], sizeof a[i]) != 0 && !(std::isnan(a[i]) && std::isnan(b[i]))) return false;
  }
  return true;
}
inline std::vector<double> numbers(const Array<Moments>& moments) {
  std::vector<double> all;
  for (const Moments& m : moments) all.insert(all.end(), {m.count, m.mean, m.mean_lo, m.m2, m.m2_lo});
  return all;
}
// A device that runs `spans` spans at once: clusters of any size, or blocks that meet through memory alone.
constexpr std::int64_t kShared = 227 * 1024;
#if !defined(BATCHNORM_ON_DEVICE)
inline cuda::Device device(bool through_memory, unsigned blocks, unsigned spans) {
  const int n = static_cast<int>(spans);
  cuda::Device d{90, static_cast<int>(blocks * spans), kShared, {n, n, n, n, n}};
  if (through_memory) d.clusters = {};
  return d;
}
template <class Pass>
void run(cuda::Resident plan, const Pass& pass, unsigned threads, std::uint64_t seed) {
  std::vector<kernels::Sums> sums(static_cast<std::size_t>(plan.kept_sums()));
  std::vector<unsigned> counts(plan.spans);
  const unsigned grid = plan.span.blocks * plan.spans;
  if (plan.through_memory) plan.span.sums = sums.data(), plan.span.count = counts.data();
  simt::launch({.grid = grid,
                .block = threads,
                .cluster = plan.through_memory ? grid : plan.span.blocks,
                .shared_bytes = static_cast<std::size_t>(plan.shared_bytes),
                .seed = seed},
               cuda::resident<Pass>, plan.span, pass);
}
#endif

}  // namespace cuda_tensors
