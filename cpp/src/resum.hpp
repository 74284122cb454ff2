// Statistics of a channel of which no plain sum tells enough: value by value, rare and slow, on the CPU and on GPUs.
// `each` is of its values that count: each(f) calls f(value, weight) in the order of memory.
#pragma once

#include <cmath>
#include <limits>

#include "batchnorm/types.hpp"
#include "channel_math.hpp"
#include "exact_sum.hpp"

namespace batchnorm {

// The sum of values times weights, both scaled by these powers of two.
template <class Each>
BN_BOTH DoubleDouble exact_sum(const Each& each, int of_x, int of_weights) {
  ExactSum sum;
  std::int64_t since_carry = 0;
  each([&](double x, double weight) {
    const DoubleDouble term = two_product(std::ldexp(weight, of_weights), std::ldexp(x, of_x));
    sum.add(term.hi);
    if (term.lo != 0) sum.add(term.lo);
    if (++since_carry == (std::int64_t{1} << 29)) {
      sum.carry();
      since_carry = 0;
    }
  });
  return sum.value();
}

// A mean whose sum has cancelled.
template <class Each>
BN_BOTH void settle_exactly(const Each& each, const DoubleDouble& count, Moments& m) {
  const DoubleDouble mean = exact_sum(each, 0, 0) / count;
  m.mean = mean.hi;
  m.mean_lo = mean.lo;  // m2 is about the old mean, which is off by less than 2^-40 std: no digit of m2
}

// With values and weights scaled by powers of two, so that the largest are near 1: the mean exactly, then sums about
// it. An m2 beyond float64 becomes infinity; that of a channel with a value that is not finite, NaN.
template <class Each>
BN_BOTH void settle_scaled(const Each& each, const DoubleDouble& total, Moments& m) {
  double most_x = 0, most_weight = 0;
  each([&](double x, double weight) {
    most_x = most_x < std::abs(x) || std::isnan(x) ? std::abs(x) : most_x;
    most_weight = std::fmax(most_weight, weight);
  });
  if (!std::isfinite(most_x)) {
    m.m2 = std::numeric_limits<double>::quiet_NaN();
    return;
  }
  const int of_x = most_x > 0 ? std::ilogb(most_x) : 0, of_weights = std::ilogb(most_weight);
  DoubleDouble count;
  each([&](double, double weight) { count = count + DoubleDouble{std::ldexp(weight, -of_weights), 0}; });
  const DoubleDouble mean = exact_sum(each, -of_x, -of_weights) / count;
  const double shift = mean.hi;
  DoubleDouble first, second;
  each([&](double x, double weight) {
    const DoubleDouble d = two_sum(std::ldexp(x, -of_x), -shift);
    const DoubleDouble term = DoubleDouble{std::ldexp(weight, -of_weights), 0} * d;
    first = first + term;
    second = second + term * d;
  });
  const auto scaled = moments_from_sums<double, double>(count, shift, first, second);
  const int of_squares = 2 * of_x + of_weights;
  // The mean of equal values is one of them.
  m = {total.hi, std::ldexp(mean.hi, of_x), scaled.m2 == 0 ? 0 : std::ldexp(mean.lo, of_x),
       std::ldexp(scaled.m2, of_squares), std::ldexp(scaled.m2_lo, of_squares)};
}

// Whether no sum tells enough of a channel whose sums have been taken again where they had to be.
template <class A>
BN_BOTH bool wants_values(const MomentsOf<double>& m) {
  return (mean_below(m, Conditioning<A>::kExactBelow) && std::isfinite(m.m2)) || left_range<A>(m);
}
// Such a channel; others stay as they are.
template <class A, class Each>
BN_BOTH void settle_value_by_value(const Each& each, const DoubleDouble& count, Moments& m) {
  if (mean_below(m, Conditioning<A>::kExactBelow) && std::isfinite(m.m2)) settle_exactly(each, count, m);
  if (left_range<A>(MomentsOf<double>::at(&m))) settle_scaled(each, count, m);
}

}  // namespace batchnorm
