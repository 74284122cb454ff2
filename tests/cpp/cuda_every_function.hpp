// All public functions that GPUs have, of one Call, by the library's own and by those for GPUs on the machine that runs
// kernels on the CPU, or with BATCHNORM_ON_DEVICE on a GPU; and whether both give the same bits.
#pragma once

#include <string>
#include <vector>

#include "batchnorm/batchnorm.hpp"
#include "batchnorm/cuda.hpp"
#include "cuda_tensors.hpp"
#include "expect.hpp"
#if !defined(BATCHNORM_ON_DEVICE)
#include "cuda/api.cu"
#endif

namespace cuda_tensors {

#if defined(BATCHNORM_ON_DEVICE)
// The device is the one that there is.
struct Stream {
  inline static cuda::Device current = {};
  inline static int held = 0, blocks_in_use = 0;
  inline static std::uint64_t seed = 0;
};
// Says what is missing.
inline void require_device() { static_cast<void>(cuda::plan_batch_norm<float>({.problem = {2, 1, 1}})); }
inline void wait() {
  const cudaError_t status = cudaDeviceSynchronize();
  if (status != cudaSuccess) throw std::runtime_error(cudaGetErrorString(status));
}
#else
using cuda::Stream;
inline void require_device() {}
inline void wait() {}
#endif

// Tensors, and what else a Call may have.
template <class T>
struct Inputs : TensorsOf<T> {
  using W = kernels::WeightOf<T>;
  Array<T> residual;
  Array<W> mask, weights;
  Array<float> alpha;
  Array<double> mean, var;

  Inputs(const Problem& problem, const char* kind) : TensorsOf<T>(tensors(problem, kind)) {
    std::mt19937 random(11);
    std::normal_distribution<float> normal;
    for (std::size_t e = 0; e < this->x.size(); ++e) residual.push_back(T(normal(random)));
    for (std::int64_t k = 0; k < problem.count(); ++k) {
      mask.push_back(static_cast<W>(random() % 3 != 0));
      weights.push_back(random() % 4 == 0 ? W(0) : static_cast<W>(std::abs(normal(random))));
    }
    for (std::size_t c = 0; c < this->gamma.size(); ++c) {
      alpha.push_back(normal(random)), mean.push_back(0.25), var.push_back(2);
    }
  }
};

template <class T>
struct EveryResult {
  Array<Moments> moments, saved;
  Array<GradSums> sums;
  Array<T> y, from_moments, inferred, dx, dresidual, from_sums, residual_from_sums, constant_dx;
  Array<float> dgamma, dbeta, constant_dgamma, constant_dbeta;
  Array<std::uint8_t> bits;
};

// In the functions of `space`.
#define BN_FUNCTIONS(space)                                                                                       \
  template <class T>                                                                                              \
  EveryResult<T> every_function(const Inputs<T>& t, Call<T> call) {                                               \
    const std::size_t n = t.x.size(), channels = t.gamma.size(), segments = call.groups.offsets.size();           \
    const std::size_t entries = (segments == 0 ? 1 : segments - 1) * channels;                                    \
    const std::size_t lines = static_cast<std::size_t>(call.problem.count()) * channels;                          \
    const bool each = call.groups.each_position,                                                                  \
               is_given = segments == 0 && !each && call.groups.width == 1 && call.groups.about == About::mean && \
                          !call.groups.alpha.present() &&                                                         \
                          (call.counted.weights.empty() || call.counted.padding != Padding::normalize);           \
    EveryResult<T> r;                                                                                             \
    for (auto* v : {&r.moments, &r.saved}) {                                                                      \
      v->resize((each ? lines : entries) / static_cast<std::size_t>(call.groups.width));                          \
    }                                                                                                             \
    r.sums.resize(each ? r.saved.size() : entries);                                                               \
    for (auto* v : {&r.y, &r.from_moments, &r.inferred, &r.dx, &r.dresidual, &r.from_sums, &r.residual_from_sums, \
                    &r.constant_dx}) {                                                                            \
      v->resize(n);                                                                                               \
    }                                                                                                             \
    for (auto* v : {&r.dgamma, &r.dbeta, &r.constant_dgamma, &r.constant_dbeta}) v->resize(channels);             \
    if (call.tail.relu) {                                                                                         \
      r.bits.resize(static_cast<std::size_t>(relu_mask_bytes(call.problem)), 0xA5);                               \
      call.tail.bits = r.bits;                                                                                    \
    }                                                                                                             \
    const std::span<const T> x = t.x, dy = t.dy;                                                                  \
    const std::span<const Moments> saved = r.saved;                                                               \
    const std::span<const GradSums> sums = r.sums;                                                                \
    space::moments<T>(x, call, r.moments);                                                                        \
    space::batch_norm<T>(x, call, r.y, r.saved);                                                                  \
    space::normalize<T>(x, call, saved, r.from_moments);                                                          \
    space::batch_norm_backward<T>(dy, x, call, saved, {r.dx, r.dresidual, r.dgamma, r.dbeta});                    \
    space::grad_sums<T>(dy, x, call, saved, r.sums);                                                              \
    space::grad_input<T>(dy, x, call, saved, sums, r.from_sums, r.residual_from_sums);                            \
    if (is_given) {                                                                                               \
      space::normalize<T>(x, call, t.mean, t.var, r.inferred);                                                    \
      space::normalize_backward<T>(dy, x, call, t.mean, t.var,                                                    \
                                   {r.constant_dx, {}, r.constant_dgamma, r.constant_dbeta});                     \
    }                                                                                                             \
    wait();                                                                                                       \
    return r;                                                                                                     \
  }
namespace on_cpu {
BN_FUNCTIONS(batchnorm)
}
namespace on_device {
BN_FUNCTIONS(batchnorm::cuda)
}
#undef BN_FUNCTIONS

inline std::vector<double> numbers(const Array<GradSums>& sums) {
  std::vector<double> all;
  for (const GradSums& s : sums) all.insert(all.end(), {s.sum_dy, s.sum_dy_lo, s.sum_dy_xmu, s.sum_dy_xmu_lo});
  return all;
}
inline bool is_set(const Array<std::uint8_t>& bits, std::size_t at) {
  const std::size_t bit = bits[0] % 16 + at;
  return ((bits[8 + bit / 8] >> (bit % 8)) & 1) != 0;
}

template <class T>
void expect_same(const Inputs<T>& t, const Call<T>& call, const std::string& name) {
  const EveryResult<T> got = on_device::every_function(t, call), wanted = on_cpu::every_function(t, call);
  const Problem& p = call.problem;
  const std::string where =
      expect::text("{", p.outer, ", ", p.channels, ", ", p.inner, "} ", t.name, name, ", items of ", sizeof(T),
                   " bytes, ", Stream::current.multiprocessors, " multiprocessors, seed ", Stream::seed);
  EXPECT(same(numbers(got.moments), numbers(wanted.moments)), "moments of ", where);
  EXPECT(same(numbers(got.saved), numbers(wanted.saved)), "saved of ", where);
  EXPECT(same(got.y, wanted.y), "y of ", where);
  EXPECT(same(got.from_moments, wanted.from_moments), "normalize of moments of ", where);
  EXPECT(same(got.inferred, wanted.inferred), "normalize of ", where);
  EXPECT(same(got.dx, wanted.dx), "dx of ", where);
  EXPECT(same(got.dresidual, wanted.dresidual), "dresidual of ", where);
  EXPECT(same(got.dgamma, wanted.dgamma) && same(got.dbeta, wanted.dbeta), "dgamma or dbeta of ", where);
  EXPECT(same(numbers(got.sums), numbers(wanted.sums)), "sums of ", where);
  EXPECT(same(got.from_sums, wanted.from_sums), "grad_input of ", where);
  EXPECT(same(got.residual_from_sums, wanted.residual_from_sums), "dresidual of grad_input of ", where);
  EXPECT(same(got.constant_dx, wanted.constant_dx), "dx of constants of ", where);
  EXPECT(same(got.constant_dgamma, wanted.constant_dgamma), "dgamma of constants of ", where);
  EXPECT(same(got.constant_dbeta, wanted.constant_dbeta), "dbeta of constants of ", where);
  // Bits of positions that do not count say nothing.
  const auto says = [&](std::size_t e) {
    if (call.counted.weights.empty() || call.counted.padding == Padding::normalize) return true;
    const auto at = static_cast<std::int64_t>(e), o = at / (p.channels * p.inner);
    return call.counted.weights[static_cast<std::size_t>(o * p.inner + at % p.inner)] != 0;
  };
  std::size_t others = 0;
  for (std::size_t e = 0; e < (got.bits.empty() ? 0 : t.x.size()); ++e) {
    others += says(e) && is_set(got.bits, e) != is_set(wanted.bits, e) ? 1 : 0;
  }
  EXPECT(others == 0, others, " bits of ", where);
  EXPECT(Stream::blocks_in_use == 0, Stream::blocks_in_use, " blocks of memory in use after ", where);
}

}  // namespace cuda_tensors
