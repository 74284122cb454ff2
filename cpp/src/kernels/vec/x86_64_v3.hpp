// AVX2 and FMA: 32-byte vectors.
#pragma once

#include <immintrin.h>

#include "kernels/vec/native.hpp"

namespace batchnorm::kernels {
namespace {

using NativeFloat = __m256;
using NativeDouble = __m256d;

BN_INLINE NativeDouble widen_load(const float* p) { return _mm256_cvtps_pd(_mm_loadu_ps(p)); }
BN_INLINE void narrow_store(float* p, NativeDouble v) { _mm_storeu_ps(p, _mm256_cvtpd_ps(v)); }
// a*b + c where a*b is exact, so that fusing changes no bit.
BN_INLINE NativeDouble multiply_add_exact(NativeDouble a, NativeDouble b, NativeDouble c) {
  return _mm256_fmadd_pd(a, b, c);
}
BN_INLINE NativeDouble product_error(NativeDouble a, NativeDouble b, NativeDouble product) {
  return _mm256_fmsub_pd(a, b, product);
}
// Stores that go around the caches; p is aligned to a vector.
BN_INLINE void stream(float* p, NativeFloat v) { _mm256_stream_ps(p, v); }
BN_INLINE void stream(double* p, NativeDouble v) { _mm256_stream_pd(p, v); }
BN_INLINE void finish_streams() { _mm_sfence(); }

}  // namespace
}  // namespace batchnorm::kernels
