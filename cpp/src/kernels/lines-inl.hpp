// Lines: groups whose gamma and beta move along them, each with statistics of its own (layer and RMS norm). Sums and
// gradients are computed in float64 and rounded once. Float32 is normalized in float32, by products and sums that are
// rounded once together: rstd, and what the center leaves of the mean, come in two parts, so that only what the mean
// takes away and xhat are rounded, once each.
#pragma once

#include "kernels/accumulate-inl.hpp"
#include "kernels/apply-inl.hpp"

namespace batchnorm::kernels {
namespace {

// ---- lanes of float64 ----

template <class V, unsigned... kLane>
BN_INLINE auto side_by_side(V a, V b, Numbered<kLane...>) {
  return __builtin_shufflevector(a, b, kLane...);
}
#ifndef BN_HAS_WIDE_DOUBLES
using WideDouble = NativeDouble;
BN_INLINE WideDouble wide_load(const float* p) { return widen_load(p); }
BN_INLINE WideDouble wide_load(const double* p) { return load_whole(p); }
BN_INLINE WideDouble wide_vector(const NativeDouble* v) { return *v; }

// A vector of float32, of as many of float64 as that takes: two on all machines that have no wider ones.
static_assert(sizeof(NativeFloat) == sizeof(NativeDouble));
BN_INLINE NativeFloat narrowed(WideDouble a, WideDouble b) {
  typedef float Half __attribute__((vector_size(sizeof(NativeDouble) / 2)));
  return (NativeFloat)side_by_side(__builtin_convertvector(a, Half), __builtin_convertvector(b, Half),
                                   NumbersBelow<sizeof(NativeFloat) / sizeof(float)>{});
}
#endif

// What 16 values of T are computed in: of float32 in the widest vectors there are, which changes no bit where lanes are
// columns or elements. With AVX-512 the passes of 512 x 768 values took 0.8 of the time that they take in NativeDouble.
template <class T>
struct LineVector {
  using Type = WideDouble;
};
template <>
struct LineVector<double> {
  using Type = NativeDouble;
};
template <class T>
struct LineLanes {
  using V = typename LineVector<T>::Type;
  static constexpr int kWidth = static_cast<int>(sizeof(V) / sizeof(double)), kVectors = kLanes / kWidth;
  V v[kVectors];
};

BN_INLINE LineLanes<float> line_lanes(const Lanes<double>& a, const float*) {
  constexpr int kParts = LineLanes<float>::kWidth / Lanes<double>::kWidth;
  LineLanes<float> r;
  BN_UNROLL for (int k = 0; k < LineLanes<float>::kVectors; ++k) r.v[k] = wide_vector(a.v + k * kParts);
  return r;
}
BN_INLINE LineLanes<double> line_lanes(const Lanes<double>& a, const double*) {
  LineLanes<double> r;
  BN_UNROLL for (int k = 0; k < Lanes<double>::kVectors; ++k) r.v[k] = a.v[k];
  return r;
}
// 16 values at p, or the n there are, the others 0.
template <class T, class From>
BN_INLINE LineLanes<T> load_line_lanes(const From* p, std::int64_t n) {
  constexpr const T* kType = nullptr;
  if (n < kLanes) return line_lanes(load_first<double>(p, n, From(0)), kType);
  if constexpr (sizeof(T) == sizeof(double)) {
    return line_lanes(load_as<double>(p), kType);
  } else {
    LineLanes<T> r;
    BN_UNROLL for (int k = 0; k < LineLanes<T>::kVectors; ++k) r.v[k] = wide_load(p + k * LineLanes<T>::kWidth);
    return r;
  }
}

BN_INLINE Lanes<float> rounded(const LineLanes<float>& a) {
  Lanes<float> r;
  BN_UNROLL for (int k = 0; k < Lanes<float>::kVectors; ++k) r.v[k] = narrowed(a.v[2 * k], a.v[2 * k + 1]);
  return r;
}
BN_INLINE Lanes<double> rounded(const LineLanes<double>& a) {
  Lanes<double> r;
  BN_UNROLL for (int k = 0; k < Lanes<double>::kVectors; ++k) r.v[k] = a.v[k];
  return r;
}
template <class V, class A>
BN_INLINE V all_lanes(A value) {
  return value - V{};
}

// ---- what is kept of products and sums in float64 tensors ----

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

template <class T>
struct OfLine {
  using V = typename LineLanes<T>::V;
  V mean, mean_lo, rstd, rstd_lo;

  BN_INLINE OfLine(const LineStatistics& s, std::int64_t l)
      : mean(all_lanes<V>(s.mean[l])),
        mean_lo(all_lanes<V>(s.mean_lo[l])),
        rstd(all_lanes<V>(s.rstd[l])),
        rstd_lo(all_lanes<V>(s.rstd_lo[l])) {}
};

// ---- normalize: y = xhat*gamma + beta ----

template <class T>
struct ScaleOfLine {
  using Native = typename Lanes<T>::Native;
  Native center, rest, rstd, rstd_lo;

  BN_INLINE ScaleOfLine(const LineScale<T>& s, std::int64_t l)
      : center(all_lanes<Native>(s.center[l])),
        rest(all_lanes<Native>(s.rest[l])),
        rstd(all_lanes<Native>(s.rstd[l])),
        rstd_lo(all_lanes<Native>(s.rstd_lo[l])) {}
};
BN_INLINE NativeFloat normalized(const ScaleOfLine<float>& of, NativeFloat x, NativeFloat gamma, NativeFloat beta) {
  const NativeFloat d = x - of.center;
  return fused(fused(d, of.rstd, fused(d, of.rstd_lo, of.rest)), gamma, beta);
}
BN_RARE NativeDouble normalized(const ScaleOfLine<double>& of, NativeDouble x, NativeDouble gamma, NativeDouble beta) {
  const Exact xhat = times(less(x, of.center, of.rest), of.rstd, of.rstd_lo);
  return rounded(plus(times(xhat, gamma), beta));
}
template <class T>
BN_INLINE Lanes<T> normalized(const ScaleOfLine<T>& of, const Lanes<T>& x, const Lanes<T>& gamma,
                              const Lanes<T>& beta) {
  Lanes<T> y;
  BN_UNROLL for (int k = 0; k < Lanes<T>::kVectors; ++k) y.v[k] = normalized(of, x.v[k], gamma.v[k], beta.v[k]);
  return y;
}

// From here on vectors begin at lines of memory; where stores are ordinary that is worth a part of a vector at both
// ends of a line that is long.
constexpr std::int64_t kLongLine = 512;
template <Stores kStores, class T>
BN_INLINE std::int64_t first_vector(const T* y, std::int64_t length) {
  if (kStores == Stores::ordinary && length < kLongLine) return 0;
  const std::int64_t at = values_to_line(y);
  return at < length ? at : length;
}

// kLines lines, of which vectors begin alike where there are several. gamma and beta may be read up to 16 values from
// the last one on.
template <Stores kStores, int kLines, class T>
BN_INLINE void normalize_lines(const ScaleOfLine<T>* of, const Lines& lines, const T* x, T* y, const T* gamma,
                               const T* beta) {
  const auto part = [&](std::int64_t at, std::int64_t n) {
    const Lanes<T> g = load(gamma + at), b = load(beta + at);
    for (int l = 0; l < kLines; ++l) {
      const std::int64_t p = l * lines.stride + at;
      store_first(y + p, n, normalized(of[l], load_first<T>(x + p, n, T(0)), g, b));
    }
  };
  std::int64_t at = first_vector<kStores>(y, lines.length);
  if (at > 0) part(0, at);
  for (; at + kLanes <= lines.length; at += kLanes) {
    const Lanes<T> g = load(gamma + at), b = load(beta + at);
    BN_UNROLL for (int l = 0; l < kLines; ++l) {
      const std::int64_t p = l * lines.stride + at;
      put<kStores>(y + p, normalized(of[l], load(x + p), g, b), lines.ahead, x + p);
    }
  }
  if (at < lines.length) part(at, lines.length - at);
}

// Lines that are visited together, so that gamma and beta are loaded once for them, where they do not stay in the
// first-level cache: 8 bytes for each value of a line.
constexpr int kLinesAVisit = 4;
constexpr std::int64_t kVisitedTogether = 1024;
template <Stores kStores, class T>
BN_INLINE void lines_normalize(const T* x, T* y, const Lines& lines, const LineScale<T>& scale, const T* gamma,
                               const T* beta) {
  std::int64_t l = 0;
  if (kStores == Stores::ordinary && sizeof(T) < sizeof(double) && lines.length >= kVisitedTogether &&
      lines.stride % kLanes == 0) {
    for (; l + kLinesAVisit <= lines.count; l += kLinesAVisit) {
      const ScaleOfLine<T> of[kLinesAVisit] = {{scale, l}, {scale, l + 1}, {scale, l + 2}, {scale, l + 3}};
      const std::int64_t at = l * lines.stride;
      normalize_lines<kStores, kLinesAVisit>(of, lines, x + at, y + at, gamma, beta);
    }
  }
  for (; l < lines.count; ++l) {
    const ScaleOfLine<T> one(scale, l);
    normalize_lines<kStores, 1>(&one, lines, x + l * lines.stride, y + l * lines.stride, gamma, beta);
  }
}
template <class T>
void lines_normalize(const T* x, T* y, const Lines& lines, const LineScale<T>& scale, const T* gamma, const T* beta) {
  if (lines.around_cache) return lines_normalize<Stores::around_cache>(x, y, lines, scale, gamma, beta);
  lines_normalize<Stores::ordinary>(x, y, lines, scale, gamma, beta);
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
// Vectors of float32 that are whole, in the widest vectors there are: the lanes are the same.
template <class T, class Accumulator>
BN_INLINE std::int64_t sum_whole(LineTerms<T, Accumulator>& pair, std::int64_t length, const InStretch& in, const T* dy,
                                 const T* x, const double* gamma) {
  if constexpr (Accumulator::kHasLow) {
    return 0;
  } else {
    using L = LineLanes<T>;
    const std::int64_t whole = length / kLanes * kLanes;
    const auto mean = all_lanes<typename L::V>(pair.mean[0]);
    L first{}, second{};
    for (std::int64_t i = 0; i < whole; i += kLanes) {
      const std::int64_t ahead = i + in.ahead + (i + in.ahead < in.left ? 0 : in.jump);
      fetch_at(dy, ahead);
      fetch_at(x, ahead);
      const auto g = load_line_lanes<T>(gamma + i, kLanes), d = load_line_lanes<T>(dy + i, kLanes);
      const auto v = load_line_lanes<T>(x + i, kLanes);
      BN_UNROLL for (int k = 0; k < L::kVectors; ++k) {
        const auto h = g.v[k] * d.v[k];
        first.v[k] = first.v[k] + h;
        second.v[k] = second.v[k] + h * (v.v[k] - mean);
      }
    }
    __builtin_memcpy(&pair.first.sum, &first, sizeof first);
    __builtin_memcpy(&pair.second.sum, &second, sizeof second);
    return whole;
  }
}
template <class T, class Accumulator>
void lines_grad_sums(const T* dy, const T* x, const Lines& lines, const LineStatistics& statistics, const double* gamma,
                     Sums* out) {
  constexpr std::int64_t kAhead = kAheadBytes / static_cast<std::int64_t>(2 * sizeof(T));
  const InStretch in{lines.length, lines.stride - lines.length, lines.length < kAhead ? lines.length : kAhead};
  for (std::int64_t l = 0; l < lines.count; ++l, dy += lines.stride, x += lines.stride) {
    LineTerms<T, Accumulator> pair{{}, {}, all_lanes<NativeDouble>(statistics.mean[l])};
    const std::int64_t done = sum_whole(pair, lines.length, in, dy, x, gamma);
    if (done < lines.length) {
      sum_run<Accumulator>(pair, lines.length - done, in, dy + done, x + done, AlongLine{gamma + done});
    }
    fold(pair.first, &out[l].first, &out[l].first_lo);
    fold(pair.second, &out[l].second, &out[l].second_lo);
  }
}

// ---- grad_input: dx = gamma*rstd*dy + x_scale*(x - mean) + shift; by columns sum(dy), sum(dy*xhat) ----

// The sums of 16 columns: of float32 float64 alone.
template <class T>
struct LineColumns {
  LineLanes<T> first, second, gamma;

  BN_INLINE void restore(const ColumnSums& sums, std::int64_t n) {
    first = load_line_lanes<T>(sums.first, n);
    second = load_line_lanes<T>(sums.second, n);
  }
  BN_INLINE void keep(const ColumnSums& sums, std::int64_t n) const {
    store_columns(sums.first, n, first);
    store_columns(sums.second, n, second);
  }
  template <class V>
  BN_INLINE V add(int k, const OfLine<T>& of, V x_scale, V shift, V dy, V x) {
    const V xmu = x - of.mean, scaled = dy * of.rstd;
    first.v[k] = first.v[k] + dy;
    second.v[k] = second.v[k] + scaled * xmu;
    return scaled * gamma.v[k] + (x_scale * xmu + shift);
  }
  BN_INLINE static void store_columns(double* p, std::int64_t n, const LineLanes<T>& a) {
    if (n >= kLanes) {
      BN_UNROLL for (int k = 0; k < LineLanes<T>::kVectors; ++k) {
        __builtin_memcpy(p + k * LineLanes<T>::kWidth, &a.v[k], sizeof a.v[k]);
      }
    } else {
      double some[kLanes];
      __builtin_memcpy(some, &a, sizeof some);
      for (std::int64_t i = 0; i < n; ++i) p[i] = some[i];
    }
  }
};
template <>
struct LineColumns<double> {
  Compensated first, second;
  LineLanes<double> gamma;

  BN_INLINE void restore(const ColumnSums& sums, std::int64_t n) {
    kernels::restore(first, sums.first, sums.first_lo, n);
    kernels::restore(second, sums.second, sums.second_lo, n);
  }
  BN_INLINE void keep(const ColumnSums& sums, std::int64_t n) const {
    kernels::keep(first, sums.first, sums.first_lo, n);
    kernels::keep(second, sums.second, sums.second_lo, n);
  }
  BN_RARE NativeDouble add(int k, const OfLine<double>& of, NativeDouble x_scale, NativeDouble shift, NativeDouble dy,
                           NativeDouble x) {
    // Neither xhat nor gamma*rstd leaves float64 where the result does not, as dy*rstd may.
    const Exact xmu = less(x, of.mean, of.mean_lo), xhat = times(xmu, of.rstd, of.rstd_lo);
    const Exact factor = times({gamma.v[k], NativeDouble{}}, of.rstd, of.rstd_lo);
    const NativeDouble term = dy * xhat.hi;
    first.add(k, dy);
    second.add(k, term);
    second.low.v[k] = second.low.v[k] + finite_or_zero(normal_product_error(dy, xhat.hi, term) + dy * xhat.lo);
    return rounded(plus(plus(times(factor, dy), times(xmu, x_scale)), shift));
  }
};

// Some rows of the n <= 16 columns from c on: their sums stay in registers.
template <Stores kStores, class T>
BN_INLINE void lines_down(const T* dy, const T* x, T* dx, const Lines& lines, const LineStatistics& statistics,
                          const LineTermsOf& terms, const double* gamma, std::int64_t n, const ColumnSums& sums) {
  using V = typename LineLanes<T>::V;
  LineColumns<T> columns{{}, {}, load_line_lanes<T>(gamma, kLanes)};
  if (lines.continues) columns.restore(sums, n);
  for (std::int64_t l = 0; l < lines.count; ++l) {
    const std::int64_t at = l * lines.stride;
    const OfLine<T> of(statistics, l);
    const V x_scale = all_lanes<V>(terms.x_scale[l]), shift = all_lanes<V>(terms.shift[l]);
    const auto g = load_line_lanes<T>(dy + at, n), v = load_line_lanes<T>(x + at, n);
    LineLanes<T> out;
    BN_UNROLL for (int k = 0; k < LineLanes<T>::kVectors; ++k) {
      out.v[k] = columns.add(k, of, x_scale, shift, g.v[k], v.v[k]);
    }
    if (dx == nullptr) continue;
    if (n < kLanes) {
      store_first(dx + at, n, rounded(out));
    } else {
      put<kStores>(dx + at, rounded(out), lines.ahead, dy + at, x + at);
    }
  }
  columns.keep(sums, n);
}
BN_INLINE ColumnSums from_column(const ColumnSums& sums, std::int64_t c) {
  return {sums.first + c, sums.first_lo + c, sums.second + c, sums.second_lo + c};
}
template <Stores kStores, class T>
BN_INLINE void lines_by_columns(const T* dy, const T* x, T* dx, const Lines& lines, const LineStatistics& statistics,
                                const LineTermsOf& terms, const double* gamma, const ColumnSums& sums) {
  const auto down = [&](std::int64_t c, std::int64_t n) {
    lines_down<kStores>(dy + c, x + c, dx == nullptr ? nullptr : dx + c, lines, statistics, terms, gamma + c, n,
                        from_column(sums, c));
  };
  // A part of a vector at both ends costs as much as a whole one.
  std::int64_t c = dx == nullptr || kStores == Stores::ordinary ? 0 : first_vector<kStores>(dx, lines.length);
  if (c > 0) down(0, c);
  for (; c + kLanes <= lines.length; c += kLanes) down(c, kLanes);
  if (c < lines.length) down(c, lines.length - c);
}
// Lines that are gone down together: with three streams each, all of a block took 1.1 to 1.25 times as long (8192 x 256
// to 1024 and 32 x 4096 values, Sapphire Rapids), four as long as eight. Around the caches, lines that lie a multiple
// of a page apart get into each other's way: with eight backward of 8192 x 1024 to 8192 values took 1.5 to 1.8 times as
// long as with two (Zen 3).
constexpr std::int64_t kLinesDown = 8, kPagesDown = 2, kPageBytes = 4096;
template <Stores kStores, class T>
BN_INLINE void lines_by_visits(const T* dy, const T* x, T* dx, const Lines& lines, const LineStatistics& statistics,
                               const LineTermsOf& terms, const double* gamma, const ColumnSums& sums) {
  const bool are_pages = lines.stride * static_cast<std::int64_t>(sizeof(T)) % kPageBytes == 0;
  const std::int64_t most = kStores == Stores::around_cache && are_pages ? kPagesDown : kLinesDown;
  Lines visit = lines;
  for (std::int64_t l = 0; l == 0 || l < lines.count; l += most, visit.continues = true) {
    const std::int64_t at = l * lines.stride;
    visit.count = lines.count - l < most ? lines.count - l : most;
    lines_by_columns<kStores, T>(
        dy + at, x + at, dx == nullptr ? nullptr : dx + at, visit,
        {statistics.mean + l, statistics.mean_lo + l, statistics.rstd + l, statistics.rstd_lo + l},
        {terms.x_scale + l, terms.shift + l}, gamma, sums);
  }
}
template <class T>
void lines_grad_input(const T* dy, const T* x, T* dx, const Lines& lines, const LineStatistics& statistics,
                      const LineTermsOf& terms, const double* gamma, const ColumnSums& sums) {
  if (lines.around_cache) {
    return lines_by_visits<Stores::around_cache, T>(dy, x, dx, lines, statistics, terms, gamma, sums);
  }
  lines_by_visits<Stores::ordinary, T>(dy, x, dx, lines, statistics, terms, gamma, sums);
}

}  // namespace
}  // namespace batchnorm::kernels
