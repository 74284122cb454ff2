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
//
// Forward-mode, along tangents x', gamma', beta' (dots in the code): the same map, with x' for dy,
//     y' = a*(x' - mean(x')) + p*(x - mean) + beta',  p = gamma'*rstd - a*rstd^2*D'/n,  D' = sum(x'*(x - mean)).
//
// Double backward, with cotangents v of dx and w of dgamma, g = dy, v0 and g0 about their means,
// a = mean(v*xhat), b = mean(g*xhat), c = mean(v0*g0):
//     of dy:     y' along v, w and the cotangent of dbeta (the derivative of y by x is symmetric)
//     of x:      -gamma*rstd^2*(b*v0 + a*g0 + (c - 3*a*b)*xhat) + w*rstd*(g0 - b*xhat)
//     of gamma:  rstd*n*(c - a*b)
//
// The formulas are written for V = double, one channel, or V = Pair, two of them: where a tensor has few values a
// channel, half of a call is spent here. Double-double ones, for float64 tensors, are for V = double alone.
#pragma once

#include <cmath>
#include <limits>

#include "batchnorm/types.hpp"
#include "double_double.hpp"
#include "kernels/table.hpp"
#include "pair.hpp"

namespace batchnorm {

// ---- moments ---------------------------------------------------------------------------------------------------

// Moments and GradSums of the channels of a V.
template <class V>
struct MomentsOf {
  V count, mean, mean_lo, m2, m2_lo;

  BN_FORMULA static MomentsOf at(const Moments* m) {
    if constexpr (kChannelsOf<V> < 4) {
      return {gather<V>(m, &Moments::count), gather<V>(m, &Moments::mean), gather<V>(m, &Moments::mean_lo),
              gather<V>(m, &Moments::m2), gather<V>(m, &Moments::m2_lo)};
    } else {
      MomentsOf k{};
      k.count = gather<V>(m, &Moments::count);
      gather_fours(m, &Moments::mean, k.mean, k.mean_lo, k.m2, k.m2_lo);
      return k;
    }
  }
  BN_FORMULA void put(Moments* m) const {
    for (int l = 0; l < kChannelsOf<V>; ++l) m[l].count = lane(count, l);
    if constexpr (kChannelsOf<V> < 4) {
      for (int l = 0; l < kChannelsOf<V>; ++l) {
        m[l].mean = lane(mean, l), m[l].mean_lo = lane(mean_lo, l), m[l].m2 = lane(m2, l), m[l].m2_lo = lane(m2_lo, l);
      }
    } else {
      scatter_fours(mean, mean_lo, m2, m2_lo, m, &Moments::mean);
    }
  }
};
template <class V>
struct GradSumsOf {
  TwoParts<V> dy, dy_xmu;

  static GradSumsOf at(const GradSums* s) {
    return {{gather<V>(s, &GradSums::sum_dy), gather<V>(s, &GradSums::sum_dy_lo)},
            {gather<V>(s, &GradSums::sum_dy_xmu), gather<V>(s, &GradSums::sum_dy_xmu_lo)}};
  }
};

// Of float32 and narrower, `below`: mean - shift. Plain float64 is enough: the conditioning checks below keep the
// cancellation in m2 under 15 bits of 53.
template <class V>
BN_FORMULA MomentsOf<V> moments_from_mean(double count, double shift, const V& sum, const V& below,
                                          const TwoParts<V>& second) {
  const TwoParts<V> mean = two_sum(all<V>(shift), below);
  const V m2 = (second.hi + second.lo) - sum * below;
  return {all<V>(count), mean.hi, mean.lo, m2 < 0 ? V{} : m2, V{}};
}
// Moments from sum(x - shift) and sum((x - shift)^2), high and low parts, over `count` values of T. A count that is a
// sum of weights needs its low part: what it lacks, m2 lacks (mean/std)^2 times.
template <class T, class V>
BN_FORMULA MomentsOf<V> moments_from_sums(const DoubleDouble& count, double shift, const TwoParts<V>& first,
                                          const TwoParts<V>& second) {
  if constexpr (sizeof(T) == sizeof(float)) {
    const V sum = first.hi + first.lo;
    return moments_from_mean(count.hi, shift, sum, sum / count.hi, second);
  } else {
    const DoubleDouble sum = two_sum(first.hi, first.lo), below = sum / count;
    const DoubleDouble mean = DoubleDouble{shift, 0} + below;
    const DoubleDouble m2 = two_sum(second.hi, second.lo) - sum * below;
    if (m2.hi < 0) return {count.hi, mean.hi, mean.lo, 0, 0};
    if (!std::isfinite(m2.hi))
      return {count.hi, mean.hi, mean.lo, second.hi, 0};  // infinity or NaN, as it left float64
    return {count.hi, mean.hi, mean.lo, m2.hi, m2.lo};
  }
}
template <class T, class V>
MomentsOf<V> moments_from_sums(const DoubleDouble& count, double shift, const kernels::Sums* s) {
  using kernels::Sums;
  return moments_from_sums<T, V>(count, shift, {gather<V>(s, &Sums::first), gather<V>(s, &Sums::first_lo)},
                                 {gather<V>(s, &Sums::second), gather<V>(s, &Sums::second_lo)});
}

// What sums about 0 are good for. A lane adds at most 2^10 values of a piece (plan.cpp) before its sum is added to
// the others with the error kept.
template <class T>
struct Conditioning;
template <>
struct Conditioning<float> {
  // m2 = second - first^2/n cancels mean^2/var-fold: 2^10 roundings * 2^-53 * 2^14 = 2^-29 of m2 at most.
  static constexpr double kShiftAbove = 0x1p14;
  // The mean's error is at most 2^10 * 2^-53 * rms: within 2^-25 of a mean above 2^-18 rms.
  static constexpr double kCompensateBelow = 0x1p-36;
  // Compensated: 2^10 * 2^-106 * rms: within 2^-25 of a mean above 2^-71 rms.
  static constexpr double kExactBelow = 0x1p-142;
};
template <>
struct Conditioning<double> {
  // Compensated sums: 2^10 * 2^-106 * 2^34 = 2^-62 of m2 at most.
  static constexpr double kShiftAbove = 0x1p34;
  // 2^10 * 2^-106 * rms: within 2^-54 of a mean above 2^-42 rms. There is nothing between compensated and exact.
  static constexpr double kCompensateBelow = 0x1p-84;
  static constexpr double kExactBelow = 0x1p-84;
};

// True where mean^2 is so far above var that m2 about 0 has too few digits. False for NaN. M: Moments or MomentsOf.
template <class T, class M>
BN_FORMULA auto needs_shift(const M& m) {
  return m.mean * m.mean * m.count > Conditioning<T>::kShiftAbove * m.m2;
}
// True where the mean is so far below the values that its sum has cancelled. False for NaN and where all values are 0.
template <class M>
BN_FORMULA auto mean_below(const M& m, double ratio_squared) {
  return m.mean * m.mean * m.count < ratio_squared * m.m2;
}

// True where a sum of float64 values left float64, although the mean and m2 need not have (or where one of the values
// is infinite), or where products with weights are too small to keep their digits. False for NaN. float32's cannot:
// squares of its values and their products with weights stay below 2^400.
template <class T, class V>
BN_FORMULA auto left_range(const MomentsOf<V>& m) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return decltype(V{} < V{}){};
  } else {
    return m.m2 > std::numeric_limits<double>::max() || m.count < 0x1p-900;
  }
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
  if (std::isfinite(m2.lo)) return {n, mean.hi, mean.lo, m2.hi, m2.lo};
  // Something left float64 on the way, or is not finite. An m2 beyond float64 is infinity, not NaN.
  const double share_b = b.count / n, apart = b.mean - a.mean;
  const double far_mean = std::isfinite(mean.lo) ? mean.hi : a.mean * (a.count / n) + b.mean * share_b;
  return {n, far_mean, 0, a.m2 + b.m2 + apart * share_b * a.count * apart, 0};
}

// m2/(count - ddof) to about 100 bits; NaN where count - ddof is below 1, which is what the least of counts leaves, so
// that no rounding of a sum of weights decides about a variance.
inline DoubleDouble variance_of(const Moments& m, int ddof) {
  const double freedom = m.count - static_cast<double>(ddof);
  if (!(ddof == 0 ? freedom > 0 : freedom >= 1)) return {std::numeric_limits<double>::quiet_NaN(), 0};
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
template <class T, class V>
BN_FORMULA TwoParts<V> rstd_for(V var, double eps) {
  if constexpr (sizeof(T) == sizeof(double)) {
    return rstd_of(DoubleDouble{var, 0}, eps);
  } else {
    const V v = var + eps;
    return {v == 0 ? V{} : 1 / square_root(v), V{}};
  }
}
template <class T, class V>
BN_FORMULA TwoParts<V> rstd_for(const MomentsOf<V>& m, double eps) {
  if constexpr (sizeof(T) == sizeof(double)) {
    return rstd_of(Moments{m.count, m.mean, m.mean_lo, m.m2, m.m2_lo}, eps);
  } else {
    return rstd_for<T, V>(m.m2 / m.count, eps);  // NaN for no values
  }
}

// The rstd of y: 0, so that y = beta, where nothing counted, and where a channel without spread has a rstd whose
// product with gamma is beyond float64.
template <class T, class V>
TwoParts<V> forward_rstd(const MomentsOf<V>& m, double eps, const V& gamma) {
  const TwoParts<V> rstd = rstd_for<T>(m, eps);
  const auto is_beta =
      (m.count == 0) | ((m.m2 == 0) & (absolute(gamma * rstd.hi) > std::numeric_limits<double>::max()));
  return {is_beta ? V{} : rstd.hi, is_beta ? V{} : rstd.lo};
}

// ---- coefficients ----------------------------------------------------------------------------------------------

// The coefficients of the channels of a V, for element passes in T, whose values `narrow` holds, and for those in
// float64 where float32 cannot hold them.
template <class V, template <class> class Map>
struct Coefficients {
  Map<V> narrow, wide;
  decltype(V{} < V{}) is_wide;  // never for float64
};

// A factor that T holds with all its digits.
template <class T, class V>
BN_FORMULA auto factor_fits(const V& exact) {
  constexpr double kLeast = std::numeric_limits<T>::min(), kMost = std::numeric_limits<T>::max();
  const V a = absolute(round_to<T>(exact));
  // Not && and ||: branches here cost more than what they skip.
  return (exact == 0) | ((a >= kLeast) & (a <= kMost));
}
// A center that a finite float32 minus it cannot overflow: below half a spacing (2^103) of the largest float32.
template <class V>
BN_FORMULA auto center_fits(const V& center) {
  return absolute(center) < 0x1p102;
}
// An offset that cannot bring an overflowed product back into range, nor overflow with it.
template <class V>
BN_FORMULA auto offset_fits(const V& offset) {
  return absolute(offset) < 0x1p100;
}

// The split mean makes the low part of a mean count, so the factors must be right to the last bit too: for float64
// tensors they are formed in double-double and rounded once.
template <class T, class V>
BN_FORMULA V factor(const V& gamma, const TwoParts<V>& rstd) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return gamma * rstd.hi;
  } else {
    const DoubleDouble f = DoubleDouble{gamma, 0} * rstd;
    return std::isfinite(f.lo) ? f.hi + f.lo : gamma * rstd.hi;
  }
}

// The contract's room for the rounding error of an offset, beta + fold: for y of distance t from beta, of which D is
// the largest, half an ulp of max(|y|, |beta|) and 3u*(D - t). The fold may bring the offset to a binade where numbers
// are further apart. Two things are known:
// - No value is nearer to the mean than the center, the nearest of all of T: |y| is at least |fold| - |beta|.
// - |y| is at least t - |beta|, whose half ulp is more than u/2 of it: the sum of both is least at t = D.
template <class V>
BN_FORMULA V least_y(const V& fold, const V& beta) {
  const V size = absolute(beta), apart = absolute(fold) - size;
  return size > apart ? size : apart;
}
// `spread`: D is at least that. Without it, one in ten channels with a beta near 1e-7 had no room (normals of mean 0).
template <class T, class V>
V room_for_rounding(const V& fold, const V& beta, const V& spread) {
  using Limits = std::numeric_limits<T>;
  constexpr double kSmallest = Limits::min(), kU = Limits::epsilon() / 2;
  const V least = power_of_two_below(least_y(fold, beta));  // 0 for subnormals
  const V half_ulp = kU * (least > kSmallest ? least : all<V>(kSmallest));
  const V at_largest = kU / 2 * (spread - absolute(beta));
  return at_largest > half_ulp ? at_largest : half_ulp;
}
// Whether the offset is in no higher binade than each y or beta, which is so nearly always.
template <class V>
BN_FORMULA auto is_in_binade(const V& rounded, const V& fold, const V& beta) {
  return power_of_two_below(rounded) <= power_of_two_below(least_y(fold, beta));
}

// Of float64 tensors: about the mean, or about its neighbour on the other side, which folds the other way.
inline Coefficients<double, kernels::Affine> folded_coefficients(double mean, double mean_lo, double scale, double beta,
                                                                 double spread) {
  Coefficients<double, kernels::Affine> k{};
  const double fold = (0 - mean_lo) * scale;
  const DoubleDouble offset = two_sum(beta, fold);
  k.narrow = {scale == 0 ? 0 : mean, scale, offset.hi};  // x less a large mean might be infinity
  if (!is_in_binade(offset.hi, fold, beta) && std::abs(offset.lo) > room_for_rounding<double>(fold, beta, spread)) {
    const double center = std::nextafter(mean, mean_lo < 0 ? -HUGE_VAL : HUGE_VAL);
    k.narrow = {center, scale, beta + ((center - mean) - mean_lo) * scale};
  }
  return k;
}

// Of tensors of float32, to be applied in float64 where is_wide(coefficients, exact offset, fold) holds.
template <class V, class IsWide>
[[gnu::always_inline]] inline Coefficients<V, kernels::Affine> rounded_coefficients(const V& mean, const V& mean_lo,
                                                                                    const V& rstd, const V& gamma,
                                                                                    const V& beta,
                                                                                    const IsWide& is_wide) {
  Coefficients<V, kernels::Affine> k{};
  const V exact = gamma * rstd, scale = round_to<float>(exact), center = round_to<float>(mean);
  const V fold = ((center - mean) - mean_lo) * scale, offset = beta + fold;
  k.narrow = {center, scale, round_to<float>(offset)};
  k.wide = {mean, exact, beta - mean_lo * exact};
  k.is_wide = is_wide(k, offset, fold);
  return k;
}
// Where float32 does not hold them, or there is no room for the rounding error of an offset in a higher binade than
// some y or beta. `spread`: some y is at least so far from beta. A function of its own, since hardly a channel needs
// it: training of 32 x 512 values took 1.2 times as long with all of it for every channel.
template <class V>
[[gnu::noinline, gnu::cold]] Coefficients<V, kernels::Affine> decided_coefficients(const V& mean, const V& mean_lo,
                                                                                   const V& rstd, const V& gamma,
                                                                                   const V& beta, const V& spread) {
  return rounded_coefficients(mean, mean_lo, rstd, gamma, beta, [&](const auto& k, const V& offset, const V& fold) {
    const auto has_room = is_in_binade(k.narrow.offset, fold, beta) |
                          (absolute(k.narrow.offset - offset) <= room_for_rounding<float>(fold, beta, spread));
    return (factor_fits<float>(k.wide.scale) & center_fits(mean) & offset_fits(offset) & has_room) == 0;
  });
}

// Whether a factor may be none that float32 holds with its digits, or one of some values, whose sizes add up to `size`,
// may be none that fits: all that does fit is far below. In few comparisons, which took half of all formulas.
template <class V>
BN_FORMULA auto may_be_small(const V& exact) {
  return (exact != 0) & (absolute(round_to<float>(exact)) < static_cast<double>(std::numeric_limits<float>::min()));
}
template <class V>
BN_FORMULA auto may_be_large(const V& size) {
  return (size < 0x1p99) == 0;  // NaN too
}
// Where is_wide holds for a channel, it is for decided_coefficients() to say whether it is.
template <class V>
[[gnu::always_inline]] inline Coefficients<V, kernels::Affine> quick_coefficients(const V& mean, const V& mean_lo,
                                                                                  const V& rstd, const V& gamma,
                                                                                  const V& beta) {
  return rounded_coefficients(mean, mean_lo, rstd, gamma, beta,
                              [&](const auto& k, const V& offset, const V& fold) __attribute__((always_inline)) {
                                return may_be_large(absolute(mean) + absolute(k.wide.scale) + absolute(offset)) |
                                       may_be_small(k.wide.scale) | (is_in_binade(k.narrow.offset, fold, beta) == 0);
                              });
}
// The same for those of grad_input.
template <class V>
BN_FORMULA auto may_be_wide(const Coefficients<V, kernels::GradAffine>& k) {
  return may_be_large(absolute(k.wide.dy_center) + absolute(k.wide.dy_scale) + absolute(k.wide.x_center) +
                      absolute(k.wide.x_scale) + absolute(k.narrow.offset)) |
         may_be_small(k.wide.dy_scale) | may_be_small(k.wide.x_scale);
}

// Gives the coefficients for given statistics to `to`, which is called in two places: where most of them pass by, it
// sees them in registers.
template <class T, class V, class To>
[[gnu::always_inline]] inline void forward_coefficients(const V& mean, const TwoParts<V>& rstd, const V& gamma,
                                                        const V& beta, const To& to) {
  if constexpr (sizeof(T) == sizeof(double)) {
    to(folded_coefficients(mean, 0, factor<T>(gamma, rstd), beta, 0));
  } else {
    const auto quick = quick_coefficients(mean, V{}, rstd.hi, gamma, beta);
    if (any(quick.is_wide)) return to(decided_coefficients(mean, V{}, rstd.hi, gamma, beta, V{}));
    to(quick);
  }
}

// The same for the statistics of the values themselves: xhat has a mean square of var*rstd^2, which is at most its own
// root.
template <class T, class V>
V spread_of_y(const MomentsOf<V>& m, const V& rstd, const V& gamma) {
  return absolute(gamma) * ((m.m2 / m.count) * rstd * rstd);
}
template <class V>
[[gnu::noinline, gnu::cold]] Coefficients<V, kernels::Affine> decided_coefficients(const MomentsOf<V>& m, double eps,
                                                                                   const V& gamma, const V& beta,
                                                                                   bool is_spread) {
  const V rstd = forward_rstd<float>(m, eps, gamma).hi;
  const V spread = is_spread ? spread_of_y<float>(m, rstd, gamma) : V{};
  return decided_coefficients(m.mean, m.mean_lo, rstd, gamma, beta, spread);
}
// `is_spread`: whether the moments are those of the channel's own values.
template <class T, class V, class To>
[[gnu::always_inline]] inline void forward_coefficients(const MomentsOf<V>& m, double eps, const V& gamma,
                                                        const V& beta, bool is_spread, const To& to) {
  if constexpr (sizeof(T) == sizeof(double)) {
    const TwoParts<V> rstd = forward_rstd<T>(m, eps, gamma);
    const V spread = is_spread ? spread_of_y<T>(m, rstd.hi, gamma) : V{};
    to(folded_coefficients(m.mean, m.mean_lo, factor<T>(gamma, rstd), beta, spread));
  } else {
    // Where rstd is no number, or too large, they are wide here.
    const auto quick = quick_coefficients(m.mean, m.mean_lo, rstd_for<T>(m, eps).hi, gamma, beta);
    if (any(quick.is_wide)) return to(decided_coefficients(m, eps, gamma, beta, is_spread));
    to(quick);
  }
}

// dx = scale*dy, for statistics that are constants: a normalize pass over dy. The offset -0 keeps the sign of a zero.
template <class T, class V>
Coefficients<V, kernels::Affine> frozen_backward_coefficients(const TwoParts<V>& rstd, const V& gamma) {
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
auto weighted_fits(const kernels::GradAffine<V>& exact, const V& rstd, const WeightSizes& weights, bool is_shared) {
  constexpr double kMost = 0x1p100;
  const double least = 0x1p-100 / std::fmin(1, weights.least), total = weights.total;
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

// ---- derivatives -----------------------------------------------------------------------------------------------

// `s` are the sums of x' in the place of dy.
template <class T, class V>
Coefficients<V, kernels::GradAffine> jvp_coefficients(const MomentsOf<V>& m, const GradSumsOf<V>& s,
                                                      const TwoParts<V>& rstd, const V& gamma, const V& gamma_dot,
                                                      const V& beta_dot) {
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
SecondFactors<N> second_factors(N n, N v_xmu, N dy_xmu, N v_dy, N rstd, N gamma, N w) {
  const N a = rstd * (v_xmu / n), b = rstd * (dy_xmu / n), c = v_dy / n, ab = a * b;
  const N scale = gamma * rstd, rest = c - (ab + ab + ab);
  return {N{} - scale * (rstd * b), w * rstd - scale * (rstd * a),
          N{} - (scale * (rstd * rest) + w * (rstd * b)) * rstd, rstd * (v_dy - n * ab)};
}
// In double-double and rounded once; in float64 where that overflows on the way.
inline SecondFactors<double> second_factors(double n, DoubleDouble v_xmu, DoubleDouble dy_xmu, DoubleDouble v_dy,
                                            DoubleDouble rstd, double gamma, double w) {
  const SecondFactors<DoubleDouble> exact = second_factors<DoubleDouble>({n}, v_xmu, dy_xmu, v_dy, rstd, {gamma}, {w});
  const SecondFactors<double> plain = second_factors<double>(n, v_xmu.hi, dy_xmu.hi, v_dy.hi, rstd.hi, gamma, w);
  const auto pick = [](const DoubleDouble& e, double p) { return std::isfinite(e.lo) ? e.hi + e.lo : p; };
  return {pick(exact.v, plain.v), pick(exact.dy, plain.dy), pick(exact.x, plain.x), pick(exact.dgamma, plain.dgamma)};
}

}  // namespace batchnorm
