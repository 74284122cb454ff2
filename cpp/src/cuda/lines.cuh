// Lines: the channels of a position, `width` at a time, share statistics (positionwise.hpp), along which gamma and beta
// move. Moments are taken by visit.cuh; gradients are summed by 16 threads a line, then by one of each channel that
// goes down the positions of a chunk and writes dx on its way.
#pragma once

#include "cuda/finish.cuh"

namespace batchnorm::cuda {

// ---- what is kept of products and sums in float64 tensors (kernels/lines-inl.hpp) ----

namespace exact {
BN_DEVICE DoubleDouble less(double x, double y, double y_lo) {
  const DoubleDouble d = two_sum(x, -y);
  return {d.hi, d.lo - y_lo};
}
BN_DEVICE DoubleDouble times(const DoubleDouble& a, double b, double b_lo) {
  const double p = a.hi * b;
  return {p, normal_product_error(a.hi, b, p) + (a.lo * b + a.hi * b_lo)};
}
BN_DEVICE DoubleDouble times(const DoubleDouble& a, double b) {
  const double p = a.hi * b;
  return {p, normal_product_error(a.hi, b, p) + a.lo * b};
}
BN_DEVICE DoubleDouble plus(const DoubleDouble& a, const DoubleDouble& b) {
  const DoubleDouble s = two_sum(a.hi, b.hi);
  return {s.hi, s.lo + (a.lo + b.lo)};
}
BN_DEVICE double finite_or_zero(double v) { return std::isfinite(v) ? v : 0; }
BN_DEVICE double rounded(const DoubleDouble& a) { return a.hi + finite_or_zero(a.lo); }
}  // namespace exact

// ---- statistics ----

// How lines are normalized, and what they are.
struct LineCall {
  LinesOf lines;
  std::int64_t count = 0;  // of lines
  double eps = 0;
  bool about_zero = false;
  ChannelValues gamma = {}, beta = {};
};
// Of lines, one entry each: mean and rstd, of float64 tensors in two parts; of others also LineFactors.
struct LineTable {
  double *mean = nullptr, *mean_lo = nullptr, *rstd = nullptr, *rstd_lo = nullptr;
  LineFactors* factors = nullptr;
  LineTerms* terms = nullptr;
};
struct LineStatistics {
  double mean = 0, mean_lo = 0;
  DoubleDouble rstd;
};
template <class A>
BN_DEVICE LineStatistics statistics_of(const MomentsOf<double>& m, double eps, bool about_zero) {
  LineStatistics s;
  if (m.count > 0) s.rstd = about_zero ? rstd_about_zero<A>(m, eps) : rstd_for<A>(m, eps);
  if (m.count > 0 && !about_zero) s.mean = m.mean, s.mean_lo = m.mean_lo;
  return s;
}

// Of float32 and narrower; `wide`: gamma or beta are.
BN_DEVICE LineFactors factors_of(const MomentsOf<double>& m, const LineStatistics& s, bool about_zero, bool wide) {
  const double square = about_zero ? m.m2 + m.count * (m.mean * m.mean) : m.m2;
  LineFactors factors = line_factors(m.count, s.mean, s.mean_lo, s.rstd.hi, square);
  factors.is_wide |= wide;
  return factors;
}

// Whether float32 does not hold a gamma or beta, as one warp finds (fit_into_float, position_rows.cpp).
template <class T>
__global__ void find_wide(const __grid_constant__ LineCall call, int* found) {
  bool wide = false;
  const auto any = [&](const ChannelValues& values, const auto& fits) {
    for (std::int64_t c = threadIdx.x; values.present() && c < call.lines.channels; c += blockDim.x) {
      const double v = values[c];
      wide = wide || (static_cast<double>(static_cast<float>(v)) != v && !fits(v));
    }
  };
  any(call.gamma, [](double v) { return factor_fits<float>(v) != 0; });
  any(call.beta, [](double v) { return std::abs(v) <= std::numeric_limits<float>::max(); });
  const unsigned all = __ballot_sync(~0u, wide);
  if (threadIdx.x == 0) *found = all != 0 ? 1 : 0;
}
template <class T>
__global__ void __launch_bounds__(kStepThreads)
    finish_lines(const __grid_constant__ LineCall call, const Moments* moments, const int* wide, LineTable to) {
  const std::int64_t l = this_thread();
  if (l >= call.count) return;
  const auto m = MomentsOf<double>::at(moments + l);
  const LineStatistics s = statistics_of<Arithmetic<T>>(m, call.eps, call.about_zero);
  to.mean[l] = s.mean, to.mean_lo[l] = s.mean_lo, to.rstd[l] = s.rstd.hi, to.rstd_lo[l] = s.rstd.lo;
  if (sizeof(T) < sizeof(double)) to.factors[l] = factors_of(m, s, call.about_zero, *wide != 0);
}
// Those that do not count have no moments.
template <class T>
__global__ void __launch_bounds__(kStepThreads)
    leave_out(const __grid_constant__ LineCall call, const Arithmetic<T>* weights, Moments* moments) {
  const std::int64_t l = this_thread();
  if (l < call.count && weights[call.lines.position(l)] == 0) moments[l] = {};
}

// ---- normalize ----

template <class T>
struct OfLine {
  using A = Arithmetic<T>;
  struct Known {
    std::int64_t line = -1;
    LineFactors factors = {};
    LineStatistics of;
  };
  LineCall call;
  LineTable table;

  // Of a line whose moments these are.
  BN_DEVICE static Known known_of(const MomentsOf<double>& m, const LineCall& call, bool wide) {
    Known known;
    known.of = statistics_of<A>(m, call.eps, call.about_zero);
    if constexpr (sizeof(A) < sizeof(double)) known.factors = factors_of(m, known.of, call.about_zero, wide);
    return known;
  }
  BN_DEVICE void know(Known& known, const Elements& elements, const Place& place) const {
    const std::int64_t line =
        elements.position(place) * call.lines.groups + Divided(place.c, call.lines.width).quotient;
    if (line == known.line) return;
    known.line = line;
    if constexpr (sizeof(A) < sizeof(double)) known.factors = table.factors[line];
    if (sizeof(A) < sizeof(double) && !known.factors.is_wide) return;
    known.of = {table.mean[line], table.mean_lo[line], {table.rstd[line], table.rstd_lo[line]}};
  }
  [[nodiscard]] BN_DEVICE A at(const Known& known, A x, std::int64_t c) const {
    const double gamma = call.gamma.value_or(c, 1), beta = call.beta.value_or(c, 0);
    const LineStatistics& of = known.of;
    if constexpr (sizeof(A) == sizeof(double)) {
      const DoubleDouble xhat = exact::times(exact::less(x, of.mean, of.mean_lo), of.rstd.hi, of.rstd.lo);
      return exact::rounded(exact::plus(exact::times(xhat, gamma), {beta, 0}));
    } else {
      const LineFactors& k = known.factors;
      if (k.is_wide) return static_cast<A>(((static_cast<double>(x) - of.mean) * of.rstd.hi) * gamma + beta);
      const A d = x - k.center, xhat = std::fma(d, k.rstd, std::fma(d, k.rstd_lo, k.rest));
      return std::fma(xhat, static_cast<A>(gamma), static_cast<A>(beta));
    }
  }
};

// ---- gradients ----

// dy and x, dy as a ReLU lets it through; where a position does not count, its padding is dy as it is.
template <class T>
struct LineInputs {
  const T *dy, *x;
  Gate gate;
  Padded<Arithmetic<T>> padded;
};

// Sums of h = gamma*dy and h*(x - mean) of each line, by 16 threads.
template <class T>
__global__ void __launch_bounds__(kStepThreads)
    sum_lines(const __grid_constant__ LineCall call, const __grid_constant__ LineInputs<T> in, LineTable table,
              GradSums* out) {
  const std::int64_t index = this_thread(), line = index / kLanes;
  const bool is_there = line < call.count, is_padded = is_there && in.padded.at(call.lines.position(line));
  TermsOfGradients<T> terms{is_there ? table.mean[line] : 0, {}, {}};
  if (is_there && !is_padded) {
    const std::int64_t begin = call.lines.begin(line), c = Divided(line, call.lines.groups).rest * call.lines.width;
    for (std::int64_t j = index % kLanes; j < call.lines.width; j += kLanes) {
      const std::int64_t at = begin + j * call.lines.inner;
      const double dy = in.gate.lets_through(at) ? widened(in.dy[at]) : 0;
      terms.add(call.gamma.value_or(c + j, 1) * dy, widened(in.x[at]));
    }
  }
  const kernels::Sums sums = folded(terms);
  if (is_there && index % kLanes == 0) out[line] = grad_sums_of(sums);
}
template <class T>
__global__ void __launch_bounds__(kStepThreads)
    finish_line_terms(const __grid_constant__ LineCall call, const Moments* moments, const GradSums* sums,
                      LineTable to) {
  const std::int64_t l = this_thread();
  if (l >= call.count) return;
  const DoubleDouble rstd{to.rstd[l], to.rstd_lo[l]};
  to.terms[l] = line_terms<Arithmetic<T>>(MomentsOf<double>::at(moments + l), sums[l], rstd, call.about_zero);
}

// The sums of a column: sum(dy), sum(dy*xhat); of float64 tensors compensated.
template <class T>
struct ColumnTerms {
  using Accumulator = std::conditional_t<sizeof(T) == sizeof(double), Compensated, Plain>;
  Accumulator first, second;

  // What dx is, too.
  BN_DEVICE double add(const LineStatistics& of, const LineTerms& terms, double gamma, double dy, double x) {
    if constexpr (sizeof(T) == sizeof(double)) {
      const DoubleDouble xmu = exact::less(x, of.mean, of.mean_lo), xhat = exact::times(xmu, of.rstd.hi, of.rstd.lo);
      const DoubleDouble factor = exact::times({gamma, 0}, of.rstd.hi, of.rstd.lo);
      const double term = dy * xhat.hi;
      first.add(dy), second.add(term);
      second.rest += exact::finite_or_zero(normal_product_error(dy, xhat.hi, term) + dy * xhat.lo);
      const DoubleDouble from_x = exact::times(xmu, terms.x_scale);
      return exact::rounded(exact::plus(exact::plus(exact::times(factor, dy), from_x), {terms.shift, 0}));
    } else {
      const double xmu = x - of.mean, scaled = dy * of.rstd.hi;
      first.add(dy), second.add(scaled * xmu);
      return scaled * gamma + (terms.x_scale * xmu + terms.shift);
    }
  }
};
// Positions of a chunk that are read before any of them is written.
constexpr int kDown = 4;

// A thread goes down a chunk of `positions` with one channel: dx, dresidual, and the sums of its column.
template <class T>
__global__ void __launch_bounds__(kStepThreads)
    go_down_lines(const __grid_constant__ LineCall call, const __grid_constant__ LineInputs<T> in,
                  std::int64_t positions, std::int64_t chunk_of, LineTable table, T* dx, T* dresidual,
                  kernels::Sums* out) {
  using A = Arithmetic<T>;
  const LinesOf& lines = call.lines;
  const Divided place(this_thread(), lines.channels);
  const std::int64_t first = place.quotient * chunk_of, c = place.rest;
  if (first >= positions) return;
  const std::int64_t end = first + chunk_of < positions ? first + chunk_of : positions;
  const Divided of_group(c, lines.width);
  const double gamma = call.gamma.value_or(c, 1);
  ColumnTerms<T> terms;
  for (std::int64_t p = first; p < end; p += kDown) {
    T dy[kDown], x[kDown];
    std::int64_t at[kDown];
    BN_UNROLLED for (int k = 0; k < kDown; ++k) {
      if (p + k >= end) continue;
      const std::int64_t line = (p + k) * lines.groups + of_group.quotient;
      at[k] = lines.begin(line) + of_group.rest * lines.inner;
      dy[k] = in.dy[at[k]], x[k] = in.x[at[k]];
    }
    BN_UNROLLED for (int k = 0; k < kDown; ++k) {
      if (p + k >= end) continue;
      const std::int64_t line = (p + k) * lines.groups + of_group.quotient;
      const T through = in.gate.lets_through(at[k]) ? dy[k] : T(0);
      T to = in.padded.padding == Padding::zero ? T(0) : dy[k], to_residual = T(0);
      if (!in.padded.at(p + k)) {
        const LineStatistics of{table.mean[line], table.mean_lo[line], {table.rstd[line], table.rstd_lo[line]}};
        to = static_cast<T>(static_cast<A>(terms.add(of, table.terms[line], gamma, widened(through), widened(x[k]))));
        to_residual = through;
      }
      if (dx != nullptr) dx[at[k]] = to;
      if (dresidual != nullptr) dresidual[at[k]] = to_residual;
    }
  }
  out[place.quotient * lines.channels + c] = sums_of(terms);
}
// dbeta and dgamma, by a thread each: the chunks of a column, as kernels add blocks.
template <class T>
__global__ void __launch_bounds__(kStepThreads)
    finish_columns(std::int64_t channels, std::int64_t chunks, const kernels::Sums* sums, ChannelOutput dgamma,
                   ChannelOutput dbeta) {
  const std::int64_t c = this_thread();
  if (c >= channels) return;
  const kernels::Sums total = chunks == 1 ? sums[c] : sum_of_blocks(chunks, channels, sums, c);
  const auto value = [](double sum, double low) { return std::isfinite(low) ? sum + low : sum; };
  dbeta.set(c, value(total.first, total.first_lo));
  dgamma.set(c, value(total.second, total.second_lo));
}

}  // namespace batchnorm::cuda
