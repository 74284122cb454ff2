// SSE2 to SSE4.2: 16-byte vectors, no fused multiply-add.
#pragma once

#include <immintrin.h>

#define BN_TAILS_OUT_OF_LINE
#include "kernels/vec/native.hpp"

namespace batchnorm::kernels {
namespace {

using NativeFloat = __m128;
using NativeDouble = __m128d;
constexpr int kVectorRegisters = 16;

}  // namespace
}  // namespace batchnorm::kernels

#include "kernels/vec/fused_by_doubles.hpp"
#include "kernels/vec/sixteen_by_integers.hpp"

namespace batchnorm::kernels {
namespace {

// Eight bytes at any address: through memcpy, which is one move.
BN_INLINE NativeDouble widen_load(const float* p) {
  double two;
  __builtin_memcpy(&two, p, sizeof two);
  return _mm_cvtps_pd(_mm_castpd_ps(_mm_set_sd(two)));
}
BN_INLINE void narrow_store(float* p, NativeDouble v) {
  const double two = _mm_cvtsd_f64(_mm_castps_pd(_mm_cvtpd_ps(v)));
  __builtin_memcpy(p, &two, sizeof two);
}
// Bit l: whether lane l is above 0 or NaN.
BN_INLINE unsigned above_zero(NativeFloat v) {
  return static_cast<unsigned>(_mm_movemask_ps(_mm_cmpnle_ps(v, _mm_setzero_ps())));
}
BN_INLINE unsigned above_zero(NativeDouble v) {
  return static_cast<unsigned>(_mm_movemask_pd(_mm_cmpnle_pd(v, _mm_setzero_pd())));
}
// Below 0: 0. The second of two that are equal or not ordered.
BN_INLINE NativeFloat relu(NativeFloat v) { return _mm_max_ps(_mm_setzero_ps(), v); }
BN_INLINE NativeDouble relu(NativeDouble v) { return _mm_max_pd(_mm_setzero_pd(), v); }
// a*b + c where a*b is exact.
BN_INLINE NativeDouble multiply_add_exact(NativeDouble a, NativeDouble b, NativeDouble c) { return a * b + c; }
// a + b and a - b, for machines that can do more sums at once in another way.
BN_INLINE NativeDouble other_add(NativeDouble a, NativeDouble b) { return a + b; }
BN_INLINE NativeDouble other_subtract(NativeDouble a, NativeDouble b) { return a - b; }
BN_INLINE NativeDouble product_error(NativeDouble a, NativeDouble b, NativeDouble product) {
  return product_error_by_splitting(a, b, product);
}
// Stores that go around the caches; p is aligned to a vector.
BN_INLINE void stream(float* p, NativeFloat v) { _mm_stream_ps(p, v); }
BN_INLINE void stream(double* p, NativeDouble v) { _mm_stream_pd(p, v); }
template <class T>
BN_INLINE void stream(T* p, NativeFloat v) {
  long long four;
  narrow_store(reinterpret_cast<T*>(&four), v);
  _mm_stream_si64(reinterpret_cast<long long*>(p), four);
}

}  // namespace
}  // namespace batchnorm::kernels

#include "kernels/vec/parts_by_scalars.hpp"
