// The O(channels) formulas of gradients, as channel_math.hpp has those of moments and of normalize.
//
// Backward, with xhat = (x - mean)*rstd, S = sum(dy), D = sum(dy*(x - mean)):
//     dbeta = S,  dgamma = rstd*D,
//     dx = gamma*rstd*(dy - S/n - xhat*rstd*D/n) = a*(dy - g) + p*(x - mean),
//     a = gamma*rstd,  g = S/n,  p = -a*rstd^2*D/n,
// and with g and mean split as above
//     dx = (dy - T(g))*a + (x - center)*p + offset,  offset = a*(T(g) - g) + p*(center - mean).
// (Where a*dy and a*g are large and nearly equal, subtracting first keeps the digits of their difference.)
//
// Forward-mode, along tangents x', gamma', beta' (dots in the code): the same map, with x' for dy,
//     y' = a*(x' - mean(x')) + p*(x - mean) + beta',  p = gamma'*rstd - a*rstd^2*D'/n,  D' = sum(x'*(x - mean)).
//
// Double backward, with cotangents v of dx and w of dgamma, g = dy, v0 and g0 about their means,
// a = mean(v*xhat), b = mean(g*xhat), c = mean(v0*g0):
//     of dy:     y' along v, w and the cotangent of dbeta (the derivative of y by x is symmetric)
//     of x:      -gamma*rstd^2*(b*v0 + a*g0 + (c - 3*a*b)*xhat) + w*rstd*(g0 - b*xhat)
//     of gamma:  rstd*n*(c - a*b)
#pragma once

#include "channel_math.hpp"

namespace batchnorm {

// dx = scale*dy, for statistics that are constants: a normalize pass over dy. The offset -0 keeps the sign of a zero.
template <class T, class V>
BN_BOTH Coefficients<V, kernels::Affine> frozen_backward_coefficients(const TwoParts<V>& rstd, const V& gamma) {
  Coefficients<V, kernels::Affine> k{};
  const V exact = factor<T>(gamma, rstd);
  k.narrow = {V{}, round_to<T>(exact), -V{}};
  k.wide = {V{}, exact, -V{}};
  if constexpr (sizeof(T) == sizeof(float)) k.is_wide = factor_fits<T>(exact) == 0;
  return k;
}

// D about the true mean, from the sum about its high part.
template <class V>
BN_FORMULA TwoParts<V> centered_dot(const MomentsOf<V>& m, const GradSumsOf<V>& s) {
  const V rest = m.mean_lo * (s.dy.hi + s.dy.lo);
  return two_sum(s.dy_xmu.hi, s.dy_xmu.lo - rest);
}
template <class T, class V>
BN_FORMULA V dgamma_of(const MomentsOf<V>& m, const GradSumsOf<V>& s, const TwoParts<V>& rstd) {
  const TwoParts<V> dot = centered_dot(m, s);
  const V plain = (dot.hi + dot.lo) * rstd.hi;
  if constexpr (sizeof(T) == sizeof(double)) {
    const DoubleDouble d = dot * rstd;
    if (rstd.lo != 0) return std::isfinite(d.lo) ? d.hi + d.lo : dot.hi * rstd.hi;
  }
  return plain;
}
template <class V>
BN_FORMULA V dbeta_of(const GradSumsOf<V>& s) {
  return s.dy.hi + s.dy.lo;
}

// a*(dy - g) + p*(x - mean) + shift. A shift of -0 changes no bit.
template <class T, class V>
BN_FORMULA Coefficients<V, kernels::GradAffine> grad_affine(const MomentsOf<V>& m, const TwoParts<V>& g, const V& a,
                                                            const V& p, const V& shift) {
  Coefficients<V, kernels::GradAffine> k{};
  k.wide = {g.hi, a, m.mean, p, shift - (a * g.lo + p * m.mean_lo)};
  const V g_hi = round_to<T>(g.hi), center = round_to<T>(m.mean), t_a = round_to<T>(a), t_p = round_to<T>(p);
  const V offset = shift + (t_a * ((g_hi - g.hi) - g.lo) + t_p * ((center - m.mean) - m.mean_lo));
  k.narrow = {g_hi, t_a, center, t_p, round_to<T>(offset)};
  if constexpr (sizeof(T) == sizeof(float)) {
    k.is_wide =
        (factor_fits<T>(a) & factor_fits<T>(p) & center_fits(g.hi) & center_fits(m.mean) & offset_fits(offset)) == 0;
  }
  return k;
}

// What is known of the weights of a channel's values: their sum, and the least that is not 0.
struct WeightSizes {
  double total, least;
};
// Whether float32 holds what grad_input makes of its coefficients and a weight, with its digits: below 2^-100 those of
// the mean of dy and of its share along xhat (p/rstd) might be lost, alone or times the least weight. Of channels that
// share statistics the mean of dy is in the offset.
template <class V>
BN_BOTH auto weighted_fits(const kernels::GradAffine<V>& exact, const V& rstd, const WeightSizes& weights,
                           bool is_shared) {
  constexpr double kMost = 0x1p100;
  // What is formed before a weight is applied counts once, too.
  const double least = 0x1p-100 / std::fmin(1, weights.least), total = std::fmax(1, weights.total);
  const V g = absolute(exact.dy_center), ag = absolute(exact.dy_scale) * g, p = absolute(exact.x_scale);
  const auto keeps_digits = ((g == 0) | ((g >= least) & (ag >= least))) & ((p == 0) | (p >= least * rstd));
  const V offset = absolute(exact.offset);
  const auto keeps_offset = (offset == 0) | (offset >= (is_shared ? least : 0));
  const auto keeps_range =
      (g * total <= kMost) & (ag * total <= kMost) & (p * total <= kMost * rstd) & (offset * total <= kMost);
  return keeps_digits & keeps_offset & keeps_range;
}

// mean(dy), as far as tensors of T need it. N: what V can be divided by.
template <class T, class V, class N>
BN_FORMULA TwoParts<V> mean_of(const TwoParts<V>& sum, const N& count) {
  if constexpr (sizeof(T) == sizeof(double)) {
    return sum / DoubleDouble{count, 0};
  } else {
    return {(sum.hi + sum.lo) / count, V{}};
  }
}

template <class T, class V, class N>
BN_FORMULA Coefficients<V, kernels::GradAffine> backward_coefficients(const MomentsOf<V>& m, const N& count,
                                                                      const GradSumsOf<V>& s, const TwoParts<V>& rstd,
                                                                      const V& gamma) {
  const TwoParts<V> dot = centered_dot(m, s);
  // Grouped so that rstd^2 alone is never formed: it may overflow where p does not.
  V p = -(gamma * rstd.hi * rstd.hi) * (rstd.hi * (dot.hi / count));
  if constexpr (sizeof(T) == sizeof(double)) {
    const DoubleDouble n{count, 0}, exact = (DoubleDouble{-gamma, 0} * rstd * rstd) * (rstd * (dot / n));
    if (std::isfinite(exact.lo)) p = exact.hi + exact.lo;
  }
  return grad_affine<T, V>(m, mean_of<T>(s.dy, count), factor<T>(gamma, rstd), p, -V{});
}

// ---- lines -----------------------------------------------------------------------------------------------------

// dx = rstd*h + x_scale*(x - mean) + shift of a line, from the sums of h = gamma*dy, or about 0 (RMS norm).
struct LineTerms {
  double x_scale = 0, shift = 0;
};
template <class A>
BN_BOTH LineTerms line_terms(const MomentsOf<double>& m, const GradSums& of_h, const DoubleDouble& rstd,
                             bool about_zero) {
  if (m.count == 0) return {};
  const auto s = GradSumsOf<double>::at(&of_h);
  const DoubleDouble dot = about_zero ? s.dy_xmu : centered_dot(m, s), n{m.count, 0};
  // By one rstd after the other: rstd^2 alone may overflow where this does not.
  LineTerms terms{-(dot.hi + dot.lo) / m.count * rstd.hi * rstd.hi * rstd.hi,
                  about_zero ? 0 : -(s.dy.hi + s.dy.lo) / m.count * rstd.hi};
  if constexpr (sizeof(A) == sizeof(double)) {
    const DoubleDouble p = dot / n * rstd * rstd * rstd, shift = s.dy / n * rstd;
    if (std::isfinite(p.lo)) terms.x_scale = -(p.hi + p.lo);
    if (std::isfinite(shift.lo) && !about_zero) terms.shift = -(shift.hi + shift.lo);
  } else if (!about_zero) {
    terms.shift -= terms.x_scale * m.mean_lo;  // whose kernels know the high part alone
  }
  return terms;
}

// What is added to x' of a line, so that gamma*rstd times the sum is the tangent of y: x_scale*xhat + shift.
template <class A>
BN_BOTH LineTerms tangent_terms(const MomentsOf<double>& m, const GradSums& of_x_dot, const DoubleDouble& rstd,
                                bool about_zero) {
  if (m.count == 0) return {};
  const auto s = GradSumsOf<double>::at(&of_x_dot);
  const DoubleDouble dot = about_zero ? s.dy_xmu : centered_dot(m, s), n{m.count, 0};
  LineTerms terms{-(dot.hi + dot.lo) / m.count * rstd.hi, about_zero ? 0 : -(s.dy.hi + s.dy.lo) / m.count};
  if constexpr (sizeof(A) == sizeof(double)) {
    const DoubleDouble p = dot / n * rstd, shift = s.dy / n;
    if (std::isfinite(p.lo)) terms.x_scale = -(p.hi + p.lo);
    if (std::isfinite(shift.lo) && !about_zero) terms.shift = -(shift.hi + shift.lo);
  }
  return terms;
}

// The tangent of y of one element, from those of x, gamma and beta and the terms of x'.
struct LineElement {
  double x_dot, x, mean, mean_lo, rstd, rstd_lo, gamma, gamma_dot, beta_dot;
};
BN_BOTH inline double line_tangent(const LineElement& e, const LineTerms& terms) {
  const double xhat = (e.x - e.mean - e.mean_lo) * e.rstd;
  return (e.gamma * e.rstd) * (e.x_dot + (terms.x_scale * xhat + terms.shift)) + (e.gamma_dot * xhat + e.beta_dot);
}
BN_BOTH inline double exact_line_tangent(const LineElement& e, const LineTerms& terms) {
  const auto one = [](double v) { return DoubleDouble{v, 0}; };
  const DoubleDouble rstd{e.rstd, e.rstd_lo}, xhat = (two_sum(e.x, -e.mean) + one(-e.mean_lo)) * rstd;
  const DoubleDouble along = one(e.x_dot) + (one(terms.x_scale) * xhat + one(terms.shift));
  const DoubleDouble all = (one(e.gamma) * rstd) * along + (one(e.gamma_dot) * xhat + one(e.beta_dot));
  return std::isfinite(all.lo) ? all.hi + all.lo : line_tangent(e, terms);
}

// ---- derivatives -----------------------------------------------------------------------------------------------

// `s` are the sums of x' in the place of dy.
template <class T, class V>
BN_BOTH Coefficients<V, kernels::GradAffine> jvp_coefficients(const MomentsOf<V>& m, const GradSumsOf<V>& s,
                                                              const TwoParts<V>& rstd, const V& gamma,
                                                              const V& gamma_dot, const V& beta_dot) {
  const TwoParts<V> dot = centered_dot(m, s);
  V p = gamma_dot * rstd.hi - (gamma * rstd.hi * rstd.hi) * (rstd.hi * (dot.hi / m.count));
  if constexpr (sizeof(T) == sizeof(double)) {
    const DoubleDouble n{m.count, 0}, turned = DoubleDouble{gamma_dot, 0} * rstd;
    const DoubleDouble exact = turned - (DoubleDouble{gamma, 0} * rstd * rstd) * (rstd * (dot / n));
    if (std::isfinite(exact.lo)) p = exact.hi + exact.lo;
  }
  return grad_affine<T, V>(m, mean_of<T>(s.dy, m.count), factor<T>(gamma, rstd), p, beta_dot);
}

// What double backward multiplies v0, g0 and x - mean by, and its dgamma. N: DoubleDouble or double.
template <class N>
struct SecondFactors {
  N v, dy, x, dgamma;
};
// n values a channel; sums of v*(x - mean), dy*(x - mean) and v0*g0; w: the cotangent of dgamma.
template <class N>
BN_BOTH SecondFactors<N> second_factors(N n, N v_xmu, N dy_xmu, N v_dy, N rstd, N gamma, N w) {
  const N a = rstd * (v_xmu / n), b = rstd * (dy_xmu / n), c = v_dy / n, ab = a * b;
  const N scale = gamma * rstd, rest = c - (ab + ab + ab);
  return {N{} - scale * (rstd * b), w * rstd - scale * (rstd * a),
          N{} - (scale * (rstd * rest) + w * (rstd * b)) * rstd, rstd * (v_dy - n * ab)};
}
// In double-double and rounded once; in float64 where that overflows on the way.
BN_BOTH inline SecondFactors<double> second_factors(double n, DoubleDouble v_xmu, DoubleDouble dy_xmu,
                                                    DoubleDouble v_dy, DoubleDouble rstd, double gamma, double w) {
  const SecondFactors<DoubleDouble> exact = second_factors<DoubleDouble>({n}, v_xmu, dy_xmu, v_dy, rstd, {gamma}, {w});
  const SecondFactors<double> plain = second_factors<double>(n, v_xmu.hi, dy_xmu.hi, v_dy.hi, rstd.hi, gamma, w);
  const auto pick = [](const DoubleDouble& e, double p) { return std::isfinite(e.lo) ? e.hi + e.lo : p; };
  return {pick(exact.v, plain.v), pick(exact.dy, plain.dy), pick(exact.x, plain.x), pick(exact.dgamma, plain.dgamma)};
}

}  // namespace batchnorm
