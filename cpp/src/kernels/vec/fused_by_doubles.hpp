// a*b + c of float32, rounded once, for machines that do not do it: in float64, where the product is exact and the sum
// is rounded to odd (Boldo, Melquiond 2008), so that rounding it again to float32 is as if it were the only time.
// Included by the headers of 16-byte vectors.
#pragma once

#include "kernels/vec/native.hpp"

namespace batchnorm::kernels {
namespace {

BN_INLINE float fused_value(float a, float b, float c) {
  const double product = static_cast<double>(a) * static_cast<double>(b), term = static_cast<double>(c);
  double sum = product + term;
  const double of_term = sum - product, error = (product - (sum - of_term)) + (term - of_term);
  std::int64_t bits;
  __builtin_memcpy(&bits, &sum, sizeof bits);
  if ((error > 0 || error < 0) && bits % 2 == 0) {  // not where a sum is infinite, whose error is NaN
    bits += (error > 0) == (sum > 0) ? 1 : -1;
    __builtin_memcpy(&sum, &bits, sizeof sum);
  }
  return static_cast<float>(sum);
}
BN_NOINLINE NativeFloat fused(NativeFloat a, NativeFloat b, NativeFloat c) {
  return NativeFloat{fused_value(a[0], b[0], c[0]), fused_value(a[1], b[1], c[1]), fused_value(a[2], b[2], c[2]),
                     fused_value(a[3], b[3], c[3])};
}

}  // namespace
}  // namespace batchnorm::kernels
