// Pass 1 of forward: sum(w*(x - shift)) and sum(w*(x - shift)^2); w is 1 where there are no weights.
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

  // Of the values that count.
  template <class Weights>
  BN_RARE void add_vector(int k, const T* p, const Weights& w) {
    add_value(k, load_counted(p, w, k));
  }
  template <class Weights>
  BN_RARE void add_part(int k, std::int64_t n, const T* p, const Weights& w) {
    add_value(k, load_counted_of_first(p, w, k, n));
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
      second.low.v[k] = second.low.v[k] + square_error(x, square);
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

// The same with weights. Without a shift, weight times value is exact for float32.
template <class T, class Accumulator, Shift kShift>
struct WeightedMomentTerms {
  Accumulator first, second;
  Lanes<double> shift;

  template <class Weights>
  BN_RARE void add_vector(int k, const T* p, const Weights& w) {
    add_value(k, load_weights(w, k), load_counted(p, w, k));
  }
  template <class Weights>
  BN_RARE void add_part(int k, std::int64_t n, const T* p, const Weights& w) {
    add_value(k, load_weights_of_first(w, k, n), load_counted_of_first(p, w, k, n));
  }

  BN_INLINE void add_value(int k, NativeDouble w, NativeDouble x) {
    if constexpr (Accumulator::kHasLow) {
      add_compensated(k, w, x);
    } else {
      add_plain(k, w, x);
    }
  }
  BN_INLINE void add_plain(int k, NativeDouble w, NativeDouble x) {
    if constexpr (kShift == Shift::none) {
      first.sum.v[k] = multiply_add_exact(w, x, first.sum.v[k]);
      second.add(k, w * x * x);
    } else {
      const NativeDouble d = x - shift.v[k], term = w * d;
      first.add(k, term);
      second.add(k, term * d);
    }
  }
  BN_INLINE void add_compensated(int k, NativeDouble w, NativeDouble x) {
    const NativeDouble d = x - shift.v[k], d_lo = sum_error(x, NativeDouble{} - shift.v[k], d);
    const NativeDouble term = w * d, term_lo = normal_product_error(w, d, term) + w * d_lo;
    const NativeDouble square = term * d;
    first.add(k, term);
    first.low.v[k] = first.low.v[k] + term_lo;
    second.add(k, square);
    second.low.v[k] = second.low.v[k] + (normal_product_error(term, d, square) + (term_lo * d + term * d_lo));
  }
};

// Weighted sums that are compensated have a shift, if of 0.
template <class Accumulator, class F>
BN_INLINE void with_shift(bool without, const F& f) {
  if constexpr (!Accumulator::kHasLow) {
    if (without) return f.template operator()<Shift::none>();
  }
  f.template operator()<Shift::given>();
}

// Where a mask counts without a shift, the values that do are summed as those of a piece without.
template <class T, class Accumulator>
void runs_moments(const T* x, const WeightsOf<WeightOf<T>>& weights, Runs runs, const Arithmetic<T>* shift, Sums* out) {
  using Unshifted = MomentTerms<T, Accumulator, Shift::none>;
  const auto unshifted = [](std::int64_t) { return Unshifted{{}, {}, {}, T(0)}; };
  if constexpr (!kIsSixteen<T>) {
    const RunWeights<T> w{weights.values};
    if (w.values != nullptr && weights.is_mask && shift == nullptr) {
      return sum_runs<Accumulator, T>(unshifted, runs, out, x, w);
    }
    if (w.values != nullptr) {
      return with_shift<Accumulator>(shift == nullptr, [&]<Shift kShift>() {
        const auto make = [about = shift == nullptr ? T(0) : *shift](std::int64_t) {
          return WeightedMomentTerms<T, Accumulator, kShift>{{}, {}, broadcast(static_cast<double>(about))};
        };
        sum_runs<Accumulator, T>(make, runs, out, x, w);
      });
    }
  }
  if (shift == nullptr) return sum_runs<Accumulator, T>(unshifted, runs, out, x);
  using Terms = MomentTerms<T, Accumulator, Shift::given>;
  const auto make = [about = *shift](std::int64_t) {
    return Terms{{}, {}, broadcast(static_cast<double>(about)), about};
  };
  sum_runs<Accumulator, T>(make, runs, out, x);
}

// The missing lanes of a short vector of columns hold 0 - 0.
template <class T, class Accumulator>
void rows_moments(const T* x, const WeightsOf<WeightOf<T>>& weights, Rows rows, const Arithmetic<T>* shift,
                  const ColumnSums& out) {
  using Unshifted = MomentTerms<T, Accumulator, Shift::none>;
  const auto unshifted = [](std::int64_t, std::int64_t) { return Unshifted{{}, {}, {}, T(0)}; };
  const auto shift_of = [shift](std::int64_t c, std::int64_t n) {
    return shift == nullptr ? broadcast(0.0) : load_upto<double>(shift + c, n, T(0));
  };
  if constexpr (!kIsSixteen<T>) {
    if (weights.values != nullptr) {
      return with_weights(weights, [&](const auto& w) {
        if (weights.is_mask && shift == nullptr) return sum_rows<T>(unshifted, rows, out, x, w);
        with_shift<Accumulator>(shift == nullptr, [&]<Shift kShift>() {
          const auto make = [shift_of](std::int64_t c, std::int64_t n) {
            return WeightedMomentTerms<T, Accumulator, kShift>{{}, {}, shift_of(c, n)};
          };
          sum_rows<T>(make, rows, out, x, w);
        });
      });
    }
  }
  if (shift == nullptr) return sum_rows<T>(unshifted, rows, out, x);
  const auto make = [shift_of](std::int64_t c, std::int64_t n) {
    return MomentTerms<T, Accumulator, Shift::given>{{}, {}, shift_of(c, n), T(0)};
  };
  sum_rows<T>(make, rows, out, x);
}

}  // namespace
}  // namespace batchnorm::kernels
