// Pass 1 of backward: sum(dy) and sum(dy*(x - mean)).
#pragma once

#include "kernels/accumulate-inl.hpp"

namespace batchnorm::kernels {
namespace {

// The differences are taken in float64, so that no digit of x is lost where its mean is large.
template <class T, class Accumulator>
struct GradTerms {
  Accumulator first, second;
  Lanes<double> mean;

  BN_INLINE void add(const T* dy, const T* x, std::int64_t n) { add_lanes(load_upto<double>(dy, n, T(0)), x, n); }
  BN_INLINE void add_lanes(const Lanes<double>& g, const T* x, std::int64_t n) {
    // Missing lanes: 0*(0 - mean).
    const Lanes<double> d = other_subtract(load_upto<double>(x, n, T(0)), mean);
    first.add(g);
    second.other_add(g * d);
  }
};

template <class T, class Accumulator>
void runs_grad_sums(const T* dy, const T* x, Runs runs, const double* mean, Sums* out) {
  using Terms = GradTerms<T, Accumulator>;
  sum_runs<Accumulator, T>([mean](std::int64_t c) { return Terms{{}, {}, broadcast(mean[c])}; }, runs, out, dy, x);
}

template <class T, class Accumulator>
void rows_grad_sums(const T* dy, const T* x, Rows rows, const double* mean, const ColumnSums& out) {
  const auto make = [mean](std::int64_t c, std::int64_t n) {
    return GradTerms<T, Accumulator>{{}, {}, load_upto<double>(mean + c, n, 0.0)};
  };
  sum_rows<T>(make, rows, out, dy, x);
}

}  // namespace
}  // namespace batchnorm::kernels
