// The O(channels) formulas between the passes, in float64 or better: of moments and of normalize; gradient_math.hpp has
// the others. No loop over elements of a tensor is here.
//
// Forward (Ioffe & Szegedy 2015, algorithm 1), n values a channel, var biased:
//     mean = sum(x)/n,  var = m2/n,  rstd = 1/sqrt(var + eps),  y = (x - mean)*rstd*gamma + beta.
// With center = T(mean) and scale = T(gamma*rstd) that is
//     y = (x - center)*scale + offset,  offset = beta + (center - mean)*scale,
// where x - center loses no digit of x, however large mean/std is, and offset carries what center lost of the mean.
// (The form x*scale + (beta - mean*scale) would lose log2(mean/std) bits.)
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

  BN_FORMULA static GradSumsOf at(const GradSums* s) {
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
BN_BOTH MomentsOf<V> moments_from_sums(const DoubleDouble& count, double shift, const kernels::Sums* s) {
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
BN_BOTH inline Moments merge_moments(const Moments& a, const Moments& b) {
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
BN_BOTH inline DoubleDouble variance_of(const Moments& m, int ddof) {
  const double freedom = m.count - static_cast<double>(ddof);
  if (!(ddof == 0 ? freedom > 0 : freedom >= 1)) return {std::numeric_limits<double>::quiet_NaN(), 0};
  if (!std::isfinite(m.m2)) return {m.m2, 0};
  return DoubleDouble{m.m2, m.m2_lo} / DoubleDouble{freedom, 0};
}

// A running statistic after one more batch. The ends are exact: (1 - 0)*running + 0*value would lose a running value to
// value = infinity.
BN_BOTH inline double blended(double running, double value, double update_rate) {
  if (update_rate == 0) return running;
  return update_rate == 1 ? value : (1 - update_rate) * running + update_rate * value;
}

// 1/sqrt(var + eps) to about 100 bits; 0 where var + eps is 0, so that a channel without spread gives exactly beta.
BN_BOTH inline DoubleDouble rstd_of(DoubleDouble var, double eps) {
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
BN_BOTH inline DoubleDouble rstd_of(const Moments& m, double eps) { return rstd_of(variance_of(m, 0), eps); }

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

// About 0 instead of the mean: of the mean square m2/n + mean^2.
template <class T>
BN_BOTH DoubleDouble rstd_about_zero(const MomentsOf<double>& m, double eps) {
  if constexpr (sizeof(T) == sizeof(double)) {
    const DoubleDouble mean{m.mean, m.mean_lo};
    const DoubleDouble square = variance_of(Moments{m.count, m.mean, m.mean_lo, m.m2, m.m2_lo}, 0) + mean * mean;
    if (std::isfinite(square.lo)) return rstd_of(square, eps);
  }
  return rstd_for<T, double>(m.m2 / m.count + m.mean * m.mean, eps);
}

// The rstd of y: 0, so that y = beta, where nothing counted, and where a channel without spread has a rstd whose
// product with gamma is beyond float64.
template <class T, class V>
BN_BOTH TwoParts<V> forward_rstd(const MomentsOf<V>& m, double eps, const V& gamma) {
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
BN_BOTH V room_for_rounding(const V& fold, const V& beta, const V& spread) {
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
BN_BOTH inline Coefficients<double, kernels::Affine> folded_coefficients(double mean, double mean_lo, double scale,
                                                                         double beta, double spread) {
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
BN_BOTH [[gnu::always_inline]] inline Coefficients<V, kernels::Affine> rounded_coefficients(
    const V& mean, const V& mean_lo, const V& rstd, const V& gamma, const V& beta, const IsWide& is_wide) {
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
BN_BOTH [[gnu::noinline, gnu::cold]] Coefficients<V, kernels::Affine> decided_coefficients(
    const V& mean, const V& mean_lo, const V& rstd, const V& gamma, const V& beta, const V& spread) {
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
BN_BOTH [[gnu::always_inline]] inline Coefficients<V, kernels::Affine> quick_coefficients(const V& mean,
                                                                                          const V& mean_lo,
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
BN_BOTH [[gnu::always_inline]] inline void forward_coefficients(const V& mean, const TwoParts<V>& rstd, const V& gamma,
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
BN_BOTH V spread_of_y(const MomentsOf<V>& m, const V& rstd, const V& gamma) {
  return absolute(gamma) * ((m.m2 / m.count) * rstd * rstd);
}
template <class V>
BN_BOTH [[gnu::noinline, gnu::cold]] Coefficients<V, kernels::Affine> decided_coefficients(const MomentsOf<V>& m,
                                                                                           double eps, const V& gamma,
                                                                                           const V& beta,
                                                                                           bool is_spread) {
  const V rstd = forward_rstd<float>(m, eps, gamma).hi;
  const V spread = is_spread ? spread_of_y<float>(m, rstd, gamma) : V{};
  return decided_coefficients(m.mean, m.mean_lo, rstd, gamma, beta, spread);
}
// `is_spread`: whether the moments are those of the channel's own values.
template <class T, class V, class To>
BN_BOTH [[gnu::always_inline]] inline void forward_coefficients(const MomentsOf<V>& m, double eps, const V& gamma,
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

// ---- lines -----------------------------------------------------------------------------------------------------

// What a line of float32 is normalized by, along which gamma moves (kernels/table.hpp): fields as LineScale. With
// d = x - center, xhat = d*rstd + rest: u for d, or for `rest` where d is exact, since no value is nearer to the mean
// than the center; u for xhat; y is rounded once. So y is right to 2u of |y - beta| beside its rounding, and 3u where
// gamma is rounded to float32; where xhat itself is below float32's normal range, to |gamma|*2^-150.
struct LineFactors {
  float center, rest, rstd, rstd_lo;
  bool is_wide;  // whether it is to be done in float64
};
// Float32 holds factors up to 2^100 with their low parts, differences below 2^103 (center_fits), and an xhat that is
// not subnormal all along: only an eps far above the variance makes it so. `square`: sum of (x - mean)^2.
BN_BOTH inline LineFactors line_factors(double count, double mean, double mean_lo, double rstd, double square) {
  const auto center = static_cast<float>(mean), factor = static_cast<float>(rstd);
  const bool fits = rstd == 0 || (rstd >= 0x1p-100 && rstd <= 0x1p100);
  const bool is_spread = square == 0 || square * rstd * rstd >= 0x1p-160 * count;
  return {center, static_cast<float>(((center - mean) - mean_lo) * rstd), factor, static_cast<float>(rstd - factor),
          !(fits && is_spread && center_fits(mean))};
}

}  // namespace batchnorm
