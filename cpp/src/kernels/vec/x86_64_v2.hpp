// SSE2 to SSE4.2: 16-byte vectors, no fused multiply-add.
#pragma once

#include <immintrin.h>

#include "kernels/vec/native.hpp"

namespace batchnorm::kernels {
namespace {

using NativeFloat = __m128;
using NativeDouble = __m128d;

BN_INLINE NativeDouble widen_load(const float* p) {
  return _mm_cvtps_pd(_mm_castpd_ps(_mm_load_sd(reinterpret_cast<const double*>(p))));
}
BN_INLINE void narrow_store(float* p, NativeDouble v) {
  _mm_store_sd(reinterpret_cast<double*>(p), _mm_castps_pd(_mm_cvtpd_ps(v)));
}
// a*b + c where a*b is exact.
BN_INLINE NativeDouble multiply_add_exact(NativeDouble a, NativeDouble b, NativeDouble c) { return a * b + c; }
BN_INLINE NativeDouble product_error(NativeDouble a, NativeDouble b, NativeDouble product) {
  return product_error_by_splitting(a, b, product);
}

}  // namespace
}  // namespace batchnorm::kernels
