// Arithmetic on unevaluated sums of two float64, about 106 bits: for the few values a channel has, never for elements.
// Dekker 1971; Knuth, The Art of Computer Programming 2, 4.2.2. Needs round-to-nearest and no contraction.
#pragma once

#include <cmath>

// Before functions that GPUs compute too.
#if defined(__CUDACC__)
#define BN_BOTH __host__ __device__
#else
#define BN_BOTH
#endif
// How the functions of a formula are declared: whoever compiles for one instruction set has them inlined everywhere, so
// that no other takes them from there.
#ifndef BN_FORMULA
#define BN_FORMULA BN_BOTH inline
#endif

namespace batchnorm {

// V is double, or Pair (pair.hpp): one such number in each of its lanes.
template <class V>
struct TwoParts {
  V hi{}, lo{};
};
using DoubleDouble = TwoParts<double>;

// a + b exactly.
template <class V>
BN_FORMULA TwoParts<V> two_sum(V a, V b) {
  const V s = a + b, b_part = s - a;
  return {s, (a - (s - b_part)) + (b - b_part)};
}
// a + b exactly where |a| >= |b|, or a is 0.
BN_BOTH inline DoubleDouble fast_two_sum(double a, double b) {
  const double s = a + b;
  return {s, b - (s - a)};
}
// a * b exactly, unless it over- or underflows.
BN_BOTH inline DoubleDouble two_product(double a, double b) {
  const double p = a * b;
  return {p, std::fma(a, b, -p)};
}

BN_BOTH inline DoubleDouble operator+(DoubleDouble a, DoubleDouble b) {
  const DoubleDouble s = two_sum(a.hi, b.hi);
  return fast_two_sum(s.hi, s.lo + (a.lo + b.lo));
}
BN_BOTH inline DoubleDouble operator-(DoubleDouble a, DoubleDouble b) { return a + DoubleDouble{-b.hi, -b.lo}; }
BN_BOTH inline DoubleDouble operator*(DoubleDouble a, DoubleDouble b) {
  const DoubleDouble p = two_product(a.hi, b.hi);
  return fast_two_sum(p.hi, p.lo + (a.hi * b.lo + a.lo * b.hi));
}
BN_BOTH inline DoubleDouble operator/(DoubleDouble a, DoubleDouble b) {
  const double q = a.hi / b.hi;
  const DoubleDouble rest = a - b * DoubleDouble{q, 0};
  return fast_two_sum(q, rest.hi / b.hi);
}

}  // namespace batchnorm
