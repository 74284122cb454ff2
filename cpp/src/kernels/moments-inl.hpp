// Pass 1 of forward: sum(x - shift) and sum((x - shift)^2).
#pragma once

#include "kernels/accumulate-inl.hpp"

namespace batchnorm::kernels {
namespace {

enum class Shift { none, given };

// The pair of sums over values of T. `shift` is one value of T for runs, one per column for rows.
template <class T, class Accumulator, Shift kShift>
struct MomentTerms {
  Accumulator first, second;
  Lanes<double> shift;
  Arithmetic<T> fill;  // what the missing lanes of a short vector load: they must add nothing

  BN_INLINE void add_vector(int k, const T* p) { add_value(k, load_vector<double>(p, k)); }
  BN_INLINE void add_part(int k, std::int64_t n, const T* p) {
    add_value(k, load_vector_of_first<double>(p, k, n, fill));
  }

  BN_INLINE void add_value(int k, NativeDouble x) {
    if constexpr (Accumulator::kHasLow) {
      add_compensated(k, x);
    } else {
      add_plain(k, x);
    }
  }
  BN_INLINE void add_plain(int k, NativeDouble x) {
    if constexpr (kShift == Shift::none) {
      first.add(k, x);
      second.sum.v[k] = multiply_add_exact(x, x, second.sum.v[k]);
    } else {
      const NativeDouble d = x - shift.v[k];  // may round where x and shift are far apart, so d*d need not be exact
      first.add(k, d);
      second.add(k, d * d);
    }
  }
  BN_INLINE void add_compensated(int k, NativeDouble x) {
    if constexpr (kShift == Shift::none) {
      const NativeDouble square = x * x;
      first.add(k, x);
      second.add(k, square);
      if constexpr (sizeof(T) == sizeof(double)) second.low.v[k] = second.low.v[k] + square_error(x, square);
    } else {
      const NativeDouble d = x - shift.v[k];
      const NativeDouble d_lo = sum_error(x, NativeDouble{} - shift.v[k], d);
      const NativeDouble square = d * d;
      first.add(k, d);
      first.low.v[k] = first.low.v[k] + d_lo;
      second.add(k, square);
      second.low.v[k] = second.low.v[k] + (square_error(d, square) + (d + d) * d_lo);
    }
  }
};

template <class T, class Accumulator>
void runs_moments(const T* x, Runs runs, Sums* out) {
  using Terms = MomentTerms<T, Accumulator, Shift::none>;
  sum_runs<Accumulator, T>([](std::int64_t) { return Terms{{}, {}, {}, T(0)}; }, runs, out, x);
}

template <class T, class Accumulator>
void runs_moments_about(const T* x, Runs runs, Arithmetic<T> shift, Sums* out) {
  using Terms = MomentTerms<T, Accumulator, Shift::given>;
  const auto make = [shift](std::int64_t) { return Terms{{}, {}, broadcast(static_cast<double>(shift)), shift}; };
  sum_runs<Accumulator, T>(make, runs, out, x);
}

template <class T, class Accumulator>
void rows_moments(const T* x, Rows rows, const ColumnSums& out) {
  const auto make = [](std::int64_t, std::int64_t) {
    return MomentTerms<T, Accumulator, Shift::none>{{}, {}, broadcast(0.0), T(0)};
  };
  sum_rows<T>(make, rows, out, x);
}

// The missing lanes of a short vector of columns hold 0 - 0.
template <class T, class Accumulator>
void rows_moments_about(const T* x, Rows rows, const Arithmetic<T>* shift, const ColumnSums& out) {
  const auto make = [shift](std::int64_t c, std::int64_t n) {
    return MomentTerms<T, Accumulator, Shift::given>{{}, {}, load_upto<double>(shift + c, n, T(0)), T(0)};
  };
  sum_rows<T>(make, rows, out, x);
}

}  // namespace
}  // namespace batchnorm::kernels
