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

  BN_INLINE void add(const T* p, std::int64_t n) { add(load_upto<double>(p, n, fill)); }
  BN_INLINE void add(const Lanes<double>& x) {
    if constexpr (Accumulator::kHasLow) {
      add_compensated(x);
    } else {
      add_plain(x);
    }
  }
  BN_INLINE void add_plain(const Lanes<double>& x) {
    if constexpr (kShift == Shift::none) {
      first.add(x);
      second.sum = multiply_add_exact(x, x, second.sum);
    } else {
      const Lanes<double> d = x - shift;  // may round where x and shift are far apart, so d*d need not be exact
      first.add(d);
      second.add(d * d);
    }
  }
  BN_INLINE void add_compensated(const Lanes<double>& x) {
    if constexpr (kShift == Shift::none) {
      const Lanes<double> square = x * x;
      first.add(x);
      second.add(square);
      if constexpr (sizeof(T) == sizeof(double)) second.low = second.low + square_error(x, square);
    } else {
      const Lanes<double> d = x - shift;
      const Lanes<double> d_lo = sum_error(x, broadcast(0.0) - shift, d);
      const Lanes<double> square = d * d;
      first.add(d);
      first.low = first.low + d_lo;
      second.add(square);
      second.low = second.low + (square_error(d, square) + (d + d) * d_lo);
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
