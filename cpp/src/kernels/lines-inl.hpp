// Lines: groups whose gamma and beta move along them, each with statistics of its own (layer and RMS norm). All three
// passes are computed in float64 and rounded once.
#pragma once

#include "kernels/accumulate-inl.hpp"
#include "kernels/apply-inl.hpp"

namespace batchnorm::kernels {
namespace {

// ---- float64 to float32 ----

template <unsigned kBytes>
struct FloatsIn {
  typedef float Type __attribute__((vector_size(kBytes)));
};
// Two vectors as one, the lanes of a first.
template <class V, unsigned... kLane>
BN_INLINE auto side_by_side(V a, V b, Numbered<kLane...>) -> typename FloatsIn<2 * sizeof(V)>::Type {
  return __builtin_shufflevector(a, b, kLane...);
}

// A vector of float32, of as many of float64 as that takes.
template <int kVectors>
BN_INLINE auto narrowed(const NativeDouble* v) {
  if constexpr (kVectors == 1) {
    return __builtin_convertvector(*v, FloatsIn<sizeof(NativeDouble) / 2>::Type);
  } else {
    const auto low = narrowed<kVectors / 2>(v), high = narrowed<kVectors / 2>(v + kVectors / 2);
    return side_by_side(low, high, NumbersBelow<2 * sizeof(low) / sizeof(float)>{});
  }
}
BN_INLINE Lanes<float> rounded(const Lanes<double>& a, const float*) {
  constexpr int kParts = Lanes<double>::kVectors / Lanes<float>::kVectors;
  Lanes<float> r;
  BN_UNROLL for (int k = 0; k < Lanes<float>::kVectors; ++k) {
    r.v[k] = (NativeFloat)narrowed<kParts>(a.v + k * kParts);
  }
  return r;
}
BN_INLINE Lanes<double> rounded(const Lanes<double>& a, const double*) { return a; }

// ---- what is kept of products and sums in float64 tensors ----

BN_INLINE NativeDouble all_lanes(double value) { return value - NativeDouble{}; }
// What is left out where it is none: of infinity, and of a sum beyond float64.
BN_INLINE NativeDouble finite_or_zero(NativeDouble v) { return v - v == 0 ? v : NativeDouble{}; }

// hi + lo, about.
struct Exact {
  NativeDouble hi, lo;
};
BN_INLINE Exact less(NativeDouble x, NativeDouble y, NativeDouble y_lo) {
  const NativeDouble d = x - y;
  return {d, sum_error(x, NativeDouble{} - y, d) - y_lo};
}
BN_INLINE Exact times(const Exact& a, NativeDouble b, NativeDouble b_lo) {
  const NativeDouble p = a.hi * b;
  return {p, normal_product_error(a.hi, b, p) + (a.lo * b + a.hi * b_lo)};
}
BN_INLINE Exact times(const Exact& a, NativeDouble b) {
  const NativeDouble p = a.hi * b;
  return {p, normal_product_error(a.hi, b, p) + a.lo * b};
}
BN_INLINE Exact plus(const Exact& a, NativeDouble b) {
  const NativeDouble s = a.hi + b;
  return {s, sum_error(a.hi, b, s) + a.lo};
}
BN_INLINE Exact plus(const Exact& a, const Exact& b) {
  const NativeDouble s = a.hi + b.hi;
  return {s, sum_error(a.hi, b.hi, s) + (a.lo + b.lo)};
}
BN_INLINE NativeDouble rounded(const Exact& a) { return a.hi + finite_or_zero(a.lo); }

// ---- the statistics of a line ----

struct OfLine {
  NativeDouble mean, mean_lo, rstd, rstd_lo;

  BN_INLINE OfLine(const LineStatistics& s, std::int64_t l)
      : mean(all_lanes(s.mean[l])),
        mean_lo(all_lanes(s.mean_lo[l])),
        rstd(all_lanes(s.rstd[l])),
        rstd_lo(all_lanes(s.rstd_lo[l])) {}
};

// ---- normalize: y = ((x - mean)*rstd)*gamma + beta ----

template <class T>
BN_INLINE NativeDouble normalized(const OfLine& of, NativeDouble x, NativeDouble gamma, NativeDouble beta) {
  if constexpr (sizeof(T) == sizeof(double)) {
    const Exact xhat = times(less(x, of.mean, of.mean_lo), of.rstd, of.rstd_lo);
    return rounded(plus(times(xhat, gamma), beta));
  } else {
    return ((x - of.mean) * of.rstd) * gamma + beta;
  }
}
template <class T>
struct LineMap {
  OfLine of;

  BN_INLINE Lanes<T> operator()(const T* x, const double* gamma, const double* beta, std::int64_t n) const {
    const auto v = load_upto<double>(x, n, T(0));
    const auto g = load_upto<double>(gamma, n, 0.0), b = load_upto<double>(beta, n, 0.0);
    Lanes<double> y;
    BN_UNROLL for (int k = 0; k < Lanes<double>::kVectors; ++k) y.v[k] = normalized<T>(of, v.v[k], g.v[k], b.v[k]);
    return rounded(y, x);
  }
};

template <Stores kStores, class T>
BN_INLINE void normalize_line(const LineMap<T>& map, const Lines& lines, const T* x, T* y, const double* gamma,
                              const double* beta) {
  std::int64_t at = values_to_line(y);
  if (at > lines.length) at = lines.length;
  if (at > 0) store_first(y, at, map(x, gamma, beta, at));
  for (; at + kLanes <= lines.length; at += kLanes) {
    put<kStores>(y + at, map(x + at, gamma + at, beta + at, kLanes), lines.ahead, x + at);
  }
  if (const std::int64_t n = lines.length - at; n > 0) store_first(y + at, n, map(x + at, gamma + at, beta + at, n));
}
template <class T>
void lines_normalize(const T* x, T* y, const Lines& lines, const LineStatistics& statistics, const double* gamma,
                     const double* beta) {
  for (std::int64_t l = 0; l < lines.count; ++l, x += lines.stride, y += lines.stride) {
    const LineMap<T> map{OfLine(statistics, l)};
    if (lines.around_cache) {
      normalize_line<Stores::around_cache>(map, lines, x, y, gamma, beta);
    } else {
      normalize_line<Stores::ordinary>(map, lines, x, y, gamma, beta);
    }
  }
}

// ---- grad_sums: sum(gamma*dy), sum(gamma*dy*(x - mean)) ----

// Gamma, which is near: nothing of it is fetched.
struct AlongLine {
  const double* gamma;
};
BN_INLINE AlongLine operator+(const AlongLine& a, std::int64_t n) { return {a.gamma + n}; }
BN_INLINE void fetch_at(const AlongLine&, std::int64_t) {}

template <class T, class Accumulator>
struct LineTerms {
  Accumulator first, second;
  NativeDouble mean;

  BN_INLINE void add_vector(int k, const T* dy, const T* x, const AlongLine& along) {
    add_value(k, load_vector<double>(dy, k), load_vector<double>(x, k), load_vector<double>(along.gamma, k));
  }
  BN_INLINE void add_part(int k, std::int64_t n, const T* dy, const T* x, const AlongLine& along) {
    add_value(k, load_vector_of_first<double>(dy, k, n, T(0)), load_vector_of_first<double>(x, k, n, T(0)),
              load_vector_of_first<double>(along.gamma, k, n, 0.0));
  }
  BN_INLINE void add_value(int k, NativeDouble dy, NativeDouble x, NativeDouble gamma) {
    const NativeDouble h = gamma * dy;
    first.add(k, h);
    second.other_add(k, h * other_subtract(x, mean));
  }
};
template <class T, class Accumulator>
void lines_grad_sums(const T* dy, const T* x, const Lines& lines, const LineStatistics& statistics, const double* gamma,
                     Sums* out) {
  constexpr std::int64_t kAhead = kAheadBytes / static_cast<std::int64_t>(2 * sizeof(T));
  const InStretch in{lines.length, lines.stride - lines.length, lines.length < kAhead ? lines.length : kAhead};
  for (std::int64_t l = 0; l < lines.count; ++l, dy += lines.stride, x += lines.stride) {
    LineTerms<T, Accumulator> pair{{}, {}, all_lanes(statistics.mean[l])};
    sum_run<Accumulator>(pair, lines.length, in, dy, x, AlongLine{gamma});
    fold(pair.first, &out[l].first, &out[l].first_lo);
    fold(pair.second, &out[l].second, &out[l].second_lo);
  }
}

// ---- grad_input: dx = gamma*rstd*dy + x_scale*(x - mean) + shift; by columns sum(dy), sum(dy*xhat) ----

template <class T, class Accumulator>
struct LineColumns {
  Accumulator first, second;
  Lanes<double> gamma;

  // Of the 16 (or n < 16) columns at dy and x; the lanes of missing ones hold zeros.
  BN_INLINE Lanes<double> operator()(const OfLine& of, NativeDouble x_scale, NativeDouble shift, const Lanes<double>& dy,
                                     const Lanes<double>& x) {
    Lanes<double> dx;
    BN_UNROLL for (int k = 0; k < Lanes<double>::kVectors; ++k) {
      dx.v[k] = of_vector(k, of, x_scale, shift, dy.v[k], x.v[k]);
    }
    return dx;
  }
  BN_INLINE NativeDouble of_vector(int k, const OfLine& of, NativeDouble x_scale, NativeDouble shift, NativeDouble dy,
                                   NativeDouble x) {
    first.add(k, dy);
    if constexpr (sizeof(T) == sizeof(double)) {
      const Exact xmu = less(x, of.mean, of.mean_lo), scaled = times({dy, NativeDouble{}}, of.rstd, of.rstd_lo);
      const NativeDouble term = scaled.hi * xmu.hi;
      second.add(k, term);
      second.low.v[k] = second.low.v[k] + finite_or_zero(normal_product_error(scaled.hi, xmu.hi, term) +
                                                         (scaled.hi * xmu.lo + scaled.lo * xmu.hi));
      return rounded(plus(plus(times(scaled, gamma.v[k]), times(xmu, x_scale)), shift));
    } else {
      const NativeDouble xmu = x - of.mean, scaled = dy * of.rstd;
      second.other_add(k, scaled * xmu);
      return scaled * gamma.v[k] + (x_scale * xmu + shift);
    }
  }
};

// Some rows of the n <= 16 columns from c on: their sums stay in registers.
template <Stores kStores, class Accumulator, class T>
BN_INLINE void lines_down(const T* dy, const T* x, T* dx, const Lines& lines, const LineStatistics& statistics,
                          const LineTermsOf& terms, const double* gamma, std::int64_t n, const ColumnSums& sums) {
  LineColumns<T, Accumulator> columns{{}, {}, load_upto<double>(gamma, n, 0.0)};
  if (lines.continues) {
    restore(columns.first, sums.first, sums.first_lo, n);
    restore(columns.second, sums.second, sums.second_lo, n);
  }
  for (std::int64_t l = 0; l < lines.count; ++l) {
    const std::int64_t at = l * lines.stride;
    const Lanes<double> out =
        columns(OfLine(statistics, l), all_lanes(terms.x_scale[l]), all_lanes(terms.shift[l]),
                load_upto<double>(dy + at, n, T(0)), load_upto<double>(x + at, n, T(0)));
    if (dx == nullptr) continue;
    if (n < kLanes) {
      store_first(dx + at, n, rounded(out, x));
    } else {
      put<kStores>(dx + at, rounded(out, x), lines.ahead, dy + at, x + at);
    }
  }
  keep(columns.first, sums.first, sums.first_lo, n);
  keep(columns.second, sums.second, sums.second_lo, n);
}
BN_INLINE ColumnSums from_column(const ColumnSums& sums, std::int64_t c) {
  return {sums.first + c, sums.first_lo + c, sums.second + c, sums.second_lo + c};
}
template <Stores kStores, class T, class Accumulator>
BN_INLINE void lines_by_columns(const T* dy, const T* x, T* dx, const Lines& lines, const LineStatistics& statistics,
                                const LineTermsOf& terms, const double* gamma, const ColumnSums& sums) {
  const auto down = [&](std::int64_t c, std::int64_t n) {
    lines_down<kStores, Accumulator>(dy + c, x + c, dx == nullptr ? nullptr : dx + c, lines, statistics, terms,
                                     gamma + c, n, from_column(sums, c));
  };
  std::int64_t c = dx == nullptr ? 0 : values_to_line(dx);
  if (c > lines.length) c = lines.length;
  if (c > 0) down(0, c);
  for (; c + kLanes <= lines.length; c += kLanes) down(c, kLanes);
  if (c < lines.length) down(c, lines.length - c);
}
template <class T, class Accumulator>
void lines_grad_input(const T* dy, const T* x, T* dx, const Lines& lines, const LineStatistics& statistics,
                      const LineTermsOf& terms, const double* gamma, const ColumnSums& sums) {
  if (lines.around_cache) {
    return lines_by_columns<Stores::around_cache, T, Accumulator>(dy, x, dx, lines, statistics, terms, gamma, sums);
  }
  lines_by_columns<Stores::ordinary, T, Accumulator>(dy, x, dx, lines, statistics, terms, gamma, sums);
}

}  // namespace
}  // namespace batchnorm::kernels
