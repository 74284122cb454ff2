// The O(channels) formulas between the passes, in float64 or better. No loop over elements of a tensor is here.
//
// Forward (Ioffe & Szegedy 2015, algorithm 1), n values a channel, var biased:
//     mean = sum(x)/n,  var = m2/n,  rstd = 1/sqrt(var + eps),  y = (x - mean)*rstd*gamma + beta.
// With center = T(mean) and scale = T(gamma*rstd) that is
//     y = (x - center)*scale + offset,  offset = beta + (center - mean)*scale,
// where x - center loses no digit of x, however large mean/std is, and offset carries what center lost of the mean.
// (The form x*scale + (beta - mean*scale) would lose log2(mean/std) bits.)
//
// Backward, with xhat = (x - mean)*rstd, S = sum(dy), D = sum(dy*(x - mean)):
//     dbeta = S,  dgamma = rstd*D,
//     dx = gamma*rstd*(dy - S/n - xhat*rstd*D/n) = a*(dy - g) + p*(x - mean),
//     a = gamma*rstd,  g = S/n,  p = -a*rstd^2*D/n,
// and with g and mean split as above
//     dx = (dy - T(g))*a + (x - center)*p + offset,  offset = a*(T(g) - g) + p*(center - mean).
// (Where a*dy and a*g are large and nearly equal, subtracting first keeps the digits of their difference.)
#pragma once

#include <cmath>
#include <limits>

#include "batchnorm/types.hpp"
#include "double_double.hpp"
#include "kernels/table.hpp"

namespace batchnorm {

// ---- moments ---------------------------------------------------------------------------------------------------

// Moments from sum(x - shift) and sum((x - shift)^2) over `count` values of T.
template <class T>
Moments moments_from_sums(std::int64_t count, T shift, const kernels::Sums& sums) {
  if (count == 0) return {};
  const auto n = static_cast<double>(count);
  if constexpr (sizeof(T) == sizeof(float)) {
    // Plain float64 is enough: the conditioning checks below keep the cancellation in m2 under 15 bits of 53.
    const double first = sums.first + sums.first_lo, second = sums.second + sums.second_lo;
    const double below = first / n;  // mean - shift
    const DoubleDouble mean = two_sum(static_cast<double>(shift), below);
    const double m2 = second - first * below;
    return {n, mean.hi, mean.lo, m2 < 0 ? 0 : m2, 0};
  } else {
    const DoubleDouble first = two_sum(sums.first, sums.first_lo), second = two_sum(sums.second, sums.second_lo);
    const DoubleDouble below = first / DoubleDouble{n, 0};
    const DoubleDouble mean = DoubleDouble{shift, 0} + below;
    const DoubleDouble m2 = second - first * below;
    if (m2.hi < 0) return {n, mean.hi, mean.lo, 0, 0};
    return {n, mean.hi, mean.lo, m2.hi, m2.lo};
  }
}

// What sums about 0 are good for. A lane adds fewer than 2^11 values of a chunk (plan.cpp) before its sum is added to
// the others with the error kept.
template <class T>
struct Conditioning;
template <>
struct Conditioning<float> {
  // m2 = second - first^2/n cancels mean^2/var-fold: 2^11 roundings * 2^-53 * 2^14 = 2^-28 of m2 at most.
  static constexpr double kShiftAbove = 0x1p14;
  // The mean's error is at most 2^11 * 2^-53 * rms: within 2^-24 of a mean above 2^-18 rms.
  static constexpr double kCompensateBelow = 0x1p-36;
  // Compensated: 2^11 * 2^-106 * rms: within 2^-24 of a mean above 2^-71 rms.
  static constexpr double kExactBelow = 0x1p-142;
};
template <>
struct Conditioning<double> {
  // Compensated sums: 2^11 * 2^-106 * 2^34 = 2^-61 of m2 at most.
  static constexpr double kShiftAbove = 0x1p34;
  // 2^11 * 2^-106 * rms: within 2^-53 of a mean above 2^-42 rms. There is nothing between compensated and exact.
  static constexpr double kCompensateBelow = 0x1p-84;
  static constexpr double kExactBelow = 0x1p-84;
};

// True where mean^2 is so far above var that m2 about 0 has too few digits. False for NaN.
template <class T>
bool needs_shift(const Moments& m) {
  return m.mean * m.mean * m.count > Conditioning<T>::kShiftAbove * m.m2;
}
// True where the mean is so far below the values that its sum has cancelled. False for NaN and where all values are 0.
inline bool mean_below(const Moments& m, double ratio_squared) {
  return m.mean * m.mean * m.count < ratio_squared * m.m2;
}

// Chan, Golub, LeVeque 1979: delta = mean_b - mean_a, n = n_a + n_b, mean = mean_a + delta*n_b/n,
// m2 = m2_a + m2_b + delta^2*n_a*n_b/n. In double-double, so that merging many small parts adds no error of its own.
inline Moments merge_moments(const Moments& a, const Moments& b) {
  if (a.count == 0) return b;
  if (b.count == 0) return a;
  const double n = a.count + b.count;
  const DoubleDouble mean_a{a.mean, a.mean_lo}, delta = DoubleDouble{b.mean, b.mean_lo} - mean_a;
  const DoubleDouble share = DoubleDouble{b.count, 0} / DoubleDouble{n, 0};
  const DoubleDouble mean = mean_a + delta * share;
  const DoubleDouble m2 =
      DoubleDouble{a.m2, a.m2_lo} + DoubleDouble{b.m2, b.m2_lo} + delta * delta * share * DoubleDouble{a.count, 0};
  return {n, mean.hi, mean.lo, m2.hi, m2.lo};
}

// m2/(count - ddof) to about 100 bits; NaN where count <= ddof.
inline DoubleDouble variance_of(const Moments& m, int ddof) {
  const double freedom = m.count - static_cast<double>(ddof);
  if (!(freedom > 0)) return {std::numeric_limits<double>::quiet_NaN(), 0};
  if (!std::isfinite(m.m2)) return {m.m2, 0};
  return DoubleDouble{m.m2, m.m2_lo} / DoubleDouble{freedom, 0};
}

// 1/sqrt(var + eps) to about 100 bits; 0 where var + eps is 0, so that a channel without spread gives exactly beta.
inline DoubleDouble rstd_of(DoubleDouble var, double eps) {
  if (!std::isfinite(var.hi)) return {1 / std::sqrt(var.hi), 0};  // infinity gives 0, NaN itself
  const DoubleDouble v = var + DoubleDouble{eps, 0};
  if (v.hi == 0) return {0, 0};
  const double r = 1 / std::sqrt(v.hi);
  const DoubleDouble square = two_product(r, r);
  // One Newton step from there: r*(1 + e/2), e = 1 - r^2*v.
  const double e = std::fma(-square.hi, v.hi, 1.0) - (square.lo * v.hi + square.hi * v.lo);
  const DoubleDouble refined = fast_two_sum(r, r * (e / 2));
  // r*r overflows where v is near the smallest float64.
  return std::isfinite(refined.hi) ? refined : DoubleDouble{r, 0};
}
inline DoubleDouble rstd_of(const Moments& m, double eps) { return rstd_of(variance_of(m, 0), eps); }

// The same as far as tensors of T need it: float64 is enough for float32, whose coefficients are rounded to 24 bits.
template <class T>
DoubleDouble rstd_for(double var, double eps) {
  if constexpr (sizeof(T) == sizeof(double)) {
    return rstd_of(DoubleDouble{var, 0}, eps);
  } else {
    const double v = var + eps;
    return {v == 0 ? 0 : 1 / std::sqrt(v), 0};
  }
}
template <class T>
DoubleDouble rstd_for(const Moments& m, double eps) {
  if constexpr (sizeof(T) == sizeof(double)) {
    return rstd_of(m, eps);
  } else {
    return rstd_for<T>(m.m2 / m.count, eps);  // NaN for no values
  }
}

// ---- coefficients ----------------------------------------------------------------------------------------------

// The coefficients of one channel for element passes in T, and for those in float64 where float32 cannot hold them.
template <class T, template <class> class Map>
struct Coefficients {
  Map<T> narrow;
  Map<double> wide;
  bool is_wide;
};
template <class T>
using ForwardCoefficients = Coefficients<T, kernels::Affine>;
template <class T>
using BackwardCoefficients = Coefficients<T, kernels::GradAffine>;

// A factor that T holds with all its digits.
template <class T>
int factor_fits(double exact) {
  const double a = std::abs(static_cast<double>(static_cast<T>(exact)));
  // Not && and ||: branches here cost more than what they skip.
  return static_cast<int>(exact == 0) | (static_cast<int>(a >= static_cast<double>(std::numeric_limits<T>::min())) &
                                         static_cast<int>(a <= static_cast<double>(std::numeric_limits<T>::max())));
}
// A center that a finite float32 minus it cannot overflow: below half a spacing (2^103) of the largest float32.
inline int center_fits(double center) { return std::abs(center) < 0x1p102; }
// An offset that cannot bring an overflowed product back into range, nor overflow with it.
inline int offset_fits(double offset) { return std::abs(offset) < 0x1p100; }

// The split mean makes the low part of a mean count, so the factors must be right to the last bit too: for float64
// tensors they are formed in double-double and rounded once.
template <class T>
double factor(double gamma, DoubleDouble rstd) {
  if constexpr (sizeof(T) == sizeof(float)) return gamma * rstd.hi;
  const DoubleDouble f = DoubleDouble{gamma, 0} * rstd;
  return std::isfinite(f.lo) ? f.hi + f.lo : gamma * rstd.hi;
}

template <class T>
ForwardCoefficients<T> forward_coefficients(double mean, double mean_lo, DoubleDouble rstd, double gamma, double beta) {
  ForwardCoefficients<T> k;
  const double scale = factor<T>(gamma, rstd);
  k.wide = {mean, scale, beta - mean_lo * scale};
  const T center = static_cast<T>(mean), t_scale = static_cast<T>(scale);
  const double offset = beta + ((static_cast<double>(center) - mean) - mean_lo) * static_cast<double>(t_scale);
  k.narrow = {center, t_scale, static_cast<T>(offset)};
  k.is_wide = sizeof(T) == sizeof(float) && !(factor_fits<T>(scale) & center_fits(mean) & offset_fits(offset));
  return k;
}

// dx = scale*dy, for statistics that are constants: a normalize pass over dy. The offset -0 keeps the sign of a zero.
template <class T>
ForwardCoefficients<T> frozen_backward_coefficients(DoubleDouble rstd, double gamma) {
  const double scale = factor<T>(gamma, rstd);
  return {
      {T(0), static_cast<T>(scale), T(-0.0)}, {0.0, scale, -0.0}, sizeof(T) == sizeof(float) && !factor_fits<T>(scale)};
}

// D about the true mean, from the sum about its high part.
inline DoubleDouble centered_dot(const Moments& m, const GradSums& s) {
  const double rest = m.mean_lo * (s.sum_dy + s.sum_dy_lo);
  return two_sum(s.sum_dy_xmu, s.sum_dy_xmu_lo - rest);
}
inline double dgamma_of(const Moments& m, const GradSums& s, DoubleDouble rstd) {
  const DoubleDouble dot = centered_dot(m, s);
  if (rstd.lo == 0) return (dot.hi + dot.lo) * rstd.hi;
  const DoubleDouble d = dot * rstd;
  return std::isfinite(d.lo) ? d.hi + d.lo : dot.hi * rstd.hi;
}
inline double dbeta_of(const GradSums& s) { return s.sum_dy + s.sum_dy_lo; }

template <class T>
BackwardCoefficients<T> backward_coefficients(const Moments& m, const GradSums& s, DoubleDouble rstd, double gamma) {
  BackwardCoefficients<T> k;
  const DoubleDouble n{m.count, 0}, dot = centered_dot(m, s);
  const DoubleDouble g = sizeof(T) == sizeof(double) ? DoubleDouble{s.sum_dy, s.sum_dy_lo} / n
                                                     : DoubleDouble{(s.sum_dy + s.sum_dy_lo) / m.count, 0};
  const double a = factor<T>(gamma, rstd);
  // Grouped so that rstd^2 alone is never formed: it may overflow where p does not.
  double p = -(gamma * rstd.hi * rstd.hi) * (rstd.hi * (dot.hi / m.count));
  if constexpr (sizeof(T) == sizeof(double)) {
    const DoubleDouble exact = (DoubleDouble{-gamma, 0} * rstd * rstd) * (rstd * (dot / n));
    if (std::isfinite(exact.lo)) p = exact.hi + exact.lo;
  }
  k.wide = {g.hi, a, m.mean, p, -(a * g.lo + p * m.mean_lo)};
  const T g_hi = static_cast<T>(g.hi), center = static_cast<T>(m.mean), t_a = static_cast<T>(a),
          t_p = static_cast<T>(p);
  const double offset = static_cast<double>(t_a) * ((static_cast<double>(g_hi) - g.hi) - g.lo) +
                        static_cast<double>(t_p) * ((static_cast<double>(center) - m.mean) - m.mean_lo);
  k.narrow = {g_hi, t_a, center, t_p, static_cast<T>(offset)};
  k.is_wide = sizeof(T) == sizeof(float) &&
              !(factor_fits<T>(a) & factor_fits<T>(p) & center_fits(g.hi) & center_fits(m.mean) & offset_fits(offset));
  return k;
}

}  // namespace batchnorm
