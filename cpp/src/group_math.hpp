// The formulas between the cells of a group, one of each of its channels, and the group (grouped.hpp), on the CPU and
// on GPUs.
#pragma once

#include <cmath>

#include "gradient_math.hpp"

namespace batchnorm {

// The moments about alpha times the mean: m2 is the sum of the squares of what is left.
BN_BOTH inline Moments about(const Moments& m, double alpha) {
  const DoubleDouble mean{m.mean, m.mean_lo}, center = mean * DoubleDouble{alpha, 0}, apart = mean - center;
  const DoubleDouble squares = DoubleDouble{m.m2, m.m2_lo} + apart * apart * DoubleDouble{m.count, 0};
  if (std::isfinite(squares.lo)) return {m.count, center.hi, center.lo, squares.hi, squares.lo};
  const double far = m.mean - alpha * m.mean;
  return {m.count, alpha * m.mean, 0, m.m2 + far * far * m.count, 0};
}

// Cells of a group have the same count. Of float32 and narrower, float64 is enough between the sums of cells, but for
// the mean, whose low part says where float64 values lie: merged one after another in two parts, cells of 14 x 14
// values took a third of the time of training.
template <class A>
BN_BOTH Moments merged(const Moments* cells, std::int64_t width, std::int64_t step) {
  Moments all;
  const std::int64_t end = width * step;
  if constexpr (sizeof(A) == sizeof(double)) {
    for (std::int64_t c = 0; c < end; c += step) all = merge_moments(all, cells[c]);
    return all;
  }
  const double count = cells[0].count;
  if (count == 0) return all;
  DoubleDouble sum{};
  for (std::int64_t c = 0; c < end; c += step) {
    const DoubleDouble next = two_sum(sum.hi, cells[c].mean);
    sum = {next.hi, sum.lo + next.lo + cells[c].mean_lo};
  }
  const DoubleDouble mean = two_sum(sum.hi, sum.lo) / DoubleDouble{static_cast<double>(width), 0};
  double within = 0, between = 0;
  for (std::int64_t c = 0; c < end; c += step) {
    const double apart = (cells[c].mean - mean.hi) + (cells[c].mean_lo - mean.lo);
    within += cells[c].m2;
    between += apart * apart;
  }
  return {count * static_cast<double>(width), mean.hi, mean.lo, within + count * between, 0};
}

// A sum of products. Of float64 tensors in two parts, and in one where two leave the range on the way.
template <class A>
struct SumOfProducts {
  DoubleDouble exact;
  double plain = 0;

  BN_BOTH void add(double factor, const DoubleDouble& value) {
    plain += factor * (value.hi + value.lo);
    if constexpr (sizeof(A) == sizeof(double)) exact = exact + DoubleDouble{factor, 0} * value;
  }
  // times the powers of rstd, one after the other: rstd^2 alone may overflow where this does not.
  [[nodiscard]] BN_BOTH double mean(double n, const DoubleDouble& rstd, int powers) const {
    double value = plain / n;
    for (int k = 0; k < powers; ++k) value *= rstd.hi;
    if constexpr (sizeof(A) == sizeof(double)) {
      DoubleDouble wide = exact / DoubleDouble{n, 0};
      for (int k = 0; k < powers; ++k) wide = wide * rstd;
      if (std::isfinite(wide.lo)) return wide.hi + wide.lo;
    }
    return value;
  }
};

// What of the gradients of cells is added to dx of a group of moments m, which are about alpha times its mean: the
// shift, and the factor of x - mean.
template <class A>
BN_BOTH GradSums group_terms(const MomentsOf<double>& m, const SumOfProducts<A>& dy, const SumOfProducts<A>& dy_xmu,
                             double eps, double alpha, double mean) {
  GradSums terms;
  if (!(m.count > 0)) return terms;
  const DoubleDouble rstd = rstd_for<A>(m, eps);
  terms.sum_dy_xmu = -dy_xmu.mean(m.count, rstd, 3);
  // The mean of what dx is without it, times alpha: that of x - alpha*mean is (1 - alpha)*mean.
  const double apart = (1 - alpha) * mean;
  terms.sum_dy = -dy.mean(m.count, rstd, 1);
  if (alpha != 1) terms.sum_dy = alpha * (terms.sum_dy - terms.sum_dy_xmu * apart);
  return terms;
}

}  // namespace batchnorm
