// Pass 1 of backward: sum(dy) and sum(dy*(x - mean)), with dy as it is let through the bits of a ReLU, or of the
// values that count.
#pragma once

#include "kernels/accumulate-inl.hpp"

namespace batchnorm::kernels {
namespace {

// The differences are taken in float64, so that no digit of x is lost where its mean is large.
template <class T, class Accumulator>
struct GradTerms {
  Accumulator first, second;
  Lanes<double> mean;

  BN_INLINE void add_vector(int k, const T* dy, const T* x) {
    add_value(k, load_vector<double>(dy, k), load_vector<double>(x, k));
  }
  // Where values are missing: 0*(0 - mean).
  BN_INLINE void add_part(int k, std::int64_t n, const T* dy, const T* x) {
    add_value(k, load_vector_of_first<double>(dy, k, n, T(0)), load_vector_of_first<double>(x, k, n, T(0)));
  }
  // Of the values that count.
  template <class Weights>
  BN_RARE void add_vector(int k, const T* dy, const T* x, const Weights& w) {
    add_value(k, load_counted(dy, w, k), load_counted(x, w, k));
  }
  template <class Weights>
  BN_RARE void add_part(int k, std::int64_t n, const T* dy, const T* x, const Weights& w) {
    add_value(k, load_counted_of_first(dy, w, k, n), load_counted_of_first(x, w, k, n));
  }
  BN_INLINE void add_vector(int k, const SummedInputs<T>& in) {
    add_value(k, load_kept_vector<double>(in.dy, in.bits(), k), load_vector<double>(in.x, k));
  }
  BN_INLINE void add_part(int k, std::int64_t n, const SummedInputs<T>& in) {
    add_value(k, load_kept_vector_of_first<double>(in.dy, in.bits(), k, n),
              load_vector_of_first<double>(in.x, k, n, T(0)));
  }

  BN_INLINE void add_value(int k, NativeDouble dy, NativeDouble x) {
    first.add(k, dy);
    second.other_add(k, dy * other_subtract(x, mean.v[k]));
  }
};

template <class T, class Accumulator>
void runs_grad_sums(const GradInputs<T>& in, const WeightsOf<WeightOf<T>>& weights, Runs runs, const double* mean,
                    Sums* out) {
  const auto make = [mean](std::int64_t c) { return GradTerms<T, Accumulator>{{}, {}, broadcast(mean[c])}; };
  if constexpr (!kIsSixteen<T>) {
    if (in.bits != nullptr) return sum_runs<Accumulator, T>(make, runs, out, SummedInputs<T>(in));
    if (weights.values != nullptr) {
      return sum_runs<Accumulator, T>(make, runs, out, in.dy + in.at, in.x + in.at, RunWeights<T>{weights.values});
    }
  }
  sum_runs<Accumulator, T>(make, runs, out, in.dy + in.at, in.x + in.at);
}

template <class T, class Accumulator>
void rows_grad_sums(const GradInputs<T>& in, const WeightsOf<WeightOf<T>>& weights, Rows rows, const double* mean,
                    const ColumnSums& out) {
  const auto make = [mean](std::int64_t c, std::int64_t n) {
    return GradTerms<T, Accumulator>{{}, {}, load_upto<double>(mean + c, n, 0.0)};
  };
  if constexpr (!kIsSixteen<T>) {
    if (in.bits != nullptr) return sum_rows<T>(make, rows, out, SummedInputs<T>(in));
    if (weights.values != nullptr) {
      return with_weights(weights,
                          [&](const auto& w) { sum_rows<T>(make, rows, out, in.dy + in.at, in.x + in.at, w); });
    }
  }
  sum_rows<T>(make, rows, out, in.dy + in.at, in.x + in.at);
}

}  // namespace
}  // namespace batchnorm::kernels
