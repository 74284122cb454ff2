// AVX-512 (F, BW, DQ, VL): 64-byte vectors.
#pragma once

#include <immintrin.h>

#include "batchnorm/float16.hpp"
#include "kernels/vec/native.hpp"

namespace batchnorm::kernels {
namespace {

using NativeFloat = __m512;
using NativeDouble = __m256d;
constexpr int kVectorRegisters = 32;

BN_INLINE NativeDouble widen_load(const float* p) { return _mm256_cvtps_pd(_mm_loadu_ps(p)); }
// Lane l: p[number[l]], with numbers below half the number of lanes.
template <class Numbers>
BN_INLINE NativeFloat load_by_number(const float* p, Numbers number) {
  return _mm512_maskz_permutexvar_ps(0xffff, (__m512i)number, _mm512_loadu_ps(p));
}
template <class Numbers>
BN_INLINE NativeDouble load_by_number(const double* p, Numbers number) {
  return _mm256_permutexvar_pd((__m256i)number, _mm256_loadu_pd(p));
}
// Vectors of float64 as wide as those of float32, for what is computed element by element (kernels/lines-inl.hpp).
#define BN_HAS_WIDE_DOUBLES
using WideDouble = __m512d;
BN_INLINE WideDouble wide_load(const float* p) { return _mm512_maskz_cvtps_pd(0xff, _mm256_loadu_ps(p)); }
BN_INLINE WideDouble wide_load(const double* p) { return _mm512_loadu_pd(p); }
BN_INLINE WideDouble wide_vector(const NativeDouble* v) {
  return __builtin_shufflevector(v[0], v[1], 0, 1, 2, 3, 4, 5, 6, 7);
}
BN_INLINE NativeFloat narrowed(WideDouble a, WideDouble b) {
  const __m256 low = _mm512_maskz_cvtpd_ps(0xff, a), high = _mm512_maskz_cvtpd_ps(0xff, b);
  return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}
BN_INLINE void narrow_store(float* p, NativeDouble v) { _mm_storeu_ps(p, _mm256_cvtpd_ps(v)); }
// float16 and bfloat16: by float32, which holds them exactly; to nearest even. Vectors of the compiler and zero masks,
// since GCC 12 takes what the plain intrinsics leave undefined for a mistake.
using SixteenInts = std::uint32_t __attribute__((vector_size(64)));
using ManyShorts = std::uint16_t __attribute__((vector_size(64)));
using ManyBytes = std::uint8_t __attribute__((vector_size(16)));

BN_INLINE NativeFloat float_load(const Float16* p) {
  return _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
BN_INLINE NativeFloat float_load(const BFloat16* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return (NativeFloat)((SixteenInts)_mm512_maskz_cvtepu16_epi32(0xffff, bits) << 16);
}
BN_INLINE NativeDouble widen_load(const Float16* p) {
  return _mm256_cvtps_pd(_mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
// bfloat16 is the upper half of float32: one permutation puts it there.
BN_INLINE NativeDouble widen_load(const BFloat16* p) {
  const ManyBytes upper = {0x80, 0x80, 0, 1, 0x80, 0x80, 2, 3, 0x80, 0x80, 4, 5, 0x80, 0x80, 6, 7};
  const __m128i bits = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return _mm256_cvtps_pd(_mm_castsi128_ps(_mm_shuffle_epi8(bits, (__m128i)upper)));
}
BN_INLINE __m256i narrow(const Float16*, NativeFloat v) {
  return _mm512_maskz_cvtps_ph(0xffff, v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
// To the even one of two that are as near: half a unit less a bit is added, or half a unit where the upper half is odd.
// NaN keeps its upper half and becomes quiet. Six operations instead of the nine that a compiler makes of the formula,
// and two instead of six to widen: training of 32 x 64 x 12544 values took 0.98 of the time of float32 before, now
// 0.74.
BN_INLINE __m256i narrow(const BFloat16*, NativeFloat v) {
  const SixteenInts bits = (SixteenInts)v, half = SixteenInts{} + 0x8000u, quiet = SixteenInts{} + 0x400000u;
  const __mmask16 is_odd = _mm512_test_epi32_mask((__m512i)bits, (__m512i)(SixteenInts{} + 0x10000u));
  const __mmask16 is_nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  __m512i rounded = (__m512i)(bits + 0x7fffu);
  rounded = _mm512_mask_add_epi32(rounded, is_odd, (__m512i)bits, (__m512i)half);
  rounded = _mm512_mask_or_epi32(rounded, is_nan, (__m512i)bits, (__m512i)quiet);
  const auto halves = (ManyShorts)rounded;
  return (__m256i)__builtin_shufflevector(halves, halves, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}
template <class T>
BN_INLINE void narrow_store(T* p, NativeFloat v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(p, v));
}
template <class T>
BN_INLINE void narrow_store(T* p, NativeDouble v) {
  const NativeFloat four = _mm512_zextps128_ps512(_mm256_cvtpd_ps(v));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(narrow(p, four)));
}
// Bit l: whether lane l is above 0 or NaN.
BN_INLINE unsigned above_zero(NativeFloat v) { return _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_NLE_UQ); }
BN_INLINE unsigned above_zero(NativeDouble v) { return _mm256_cmp_pd_mask(v, _mm256_setzero_pd(), _CMP_NLE_UQ); }
// Below 0: 0. The second of two that are equal or not ordered.
BN_INLINE NativeFloat relu(NativeFloat v) { return _mm512_maskz_max_ps(0xffff, _mm512_setzero_ps(), v); }
BN_INLINE NativeDouble relu(NativeDouble v) { return _mm256_max_pd(_mm256_setzero_pd(), v); }
// Values whose bit is set, else 0.
#define BN_HAS_KEPT_LOADS
BN_INLINE NativeFloat load_kept(const float* p, unsigned bits) {
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>(bits), p);
}
BN_INLINE NativeDouble widen_load_kept(const float* p, unsigned bits) {
  return _mm256_maskz_cvtps_pd(static_cast<__mmask8>(bits), _mm_loadu_ps(p));
}
// The values whose weight is not 0, else 0.
#define BN_HAS_COUNTED_LOADS
BN_INLINE NativeDouble widen_load_counted(const float* p, const float* weights) {
  const __mmask8 counts = _mm_cmp_ps_mask(_mm_loadu_ps(weights), _mm_setzero_ps(), _CMP_NEQ_UQ);
  return _mm256_maskz_cvtps_pd(counts, _mm_loadu_ps(p));
}
BN_INLINE NativeDouble widen_load_counted(const float* p, float weight) {
  return _mm256_maskz_cvtps_pd(weight != 0 ? 0xf : 0, _mm_loadu_ps(p));
}
// a*b + c where a*b is exact, so that fusing changes no bit.
BN_INLINE NativeDouble multiply_add_exact(NativeDouble a, NativeDouble b, NativeDouble c) {
  return _mm256_fmadd_pd(a, b, c);
}
// a*b + c, rounded once.
BN_INLINE NativeFloat fused(NativeFloat a, NativeFloat b, NativeFloat c) { return _mm512_fmadd_ps(a, b, c); }
// a + b and a - b on the units that multiply, of which Zen 4 has as many as of those that add (and convert): moments of
// float64 went from 14 to 20 GB/s a core, grad_sums of float32 from 46 to 70. 1*b is exact, so that no bit changes.
BN_INLINE NativeDouble other_add(NativeDouble a, NativeDouble b) { return _mm256_fmadd_pd(_mm256_set1_pd(1.0), b, a); }
BN_INLINE NativeDouble other_subtract(NativeDouble a, NativeDouble b) {
  return _mm256_fnmadd_pd(_mm256_set1_pd(1.0), b, a);
}
BN_INLINE NativeDouble product_error(NativeDouble a, NativeDouble b, NativeDouble product) {
  return _mm256_fmsub_pd(a, b, product);
}
// Stores that go around the caches; p is aligned to a vector.
BN_INLINE void stream(float* p, NativeFloat v) { _mm512_stream_ps(p, v); }
BN_INLINE void stream(double* p, NativeDouble v) { _mm256_stream_pd(p, v); }
template <class T>
BN_INLINE void stream(T* p, NativeFloat v) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow(p, v));
}
// The first n values or lanes only; n may be anything: below 1 is none, above the width is all. Masked-off lanes touch
// no memory.
BN_INLINE unsigned first(std::int64_t n) { return n <= 0 ? 0u : n >= 16 ? 0xffffu : (1u << n) - 1u; }
BN_INLINE NativeFloat first_of(NativeFloat a, std::int64_t n, NativeFloat b) {
  return _mm512_mask_blend_ps(static_cast<__mmask16>(first(n)), b, a);
}
BN_INLINE NativeDouble first_of(NativeDouble a, std::int64_t n, NativeDouble b) {
  return _mm256_mask_blend_pd(static_cast<__mmask8>(first(n)), b, a);
}
BN_INLINE NativeFloat load_part(const float* p, std::int64_t n, float fill) {
  return _mm512_mask_loadu_ps(_mm512_set1_ps(fill), static_cast<__mmask16>(first(n)), p);
}
BN_INLINE NativeDouble load_part(const double* p, std::int64_t n, double fill) {
  return _mm256_mask_loadu_pd(_mm256_set1_pd(fill), static_cast<__mmask8>(first(n)), p);
}
BN_INLINE NativeDouble widen_load_part(const float* p, std::int64_t n, float fill) {
  return _mm256_cvtps_pd(_mm_mask_loadu_ps(_mm_set1_ps(fill), static_cast<__mmask8>(first(n)), p));
}
BN_INLINE void store_part(float* p, std::int64_t n, NativeFloat v) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>(first(n)), v);
}
BN_INLINE void store_part(double* p, std::int64_t n, NativeDouble v) {
  _mm256_mask_storeu_pd(p, static_cast<__mmask8>(first(n)), v);
}
BN_INLINE void narrow_store_part(float* p, std::int64_t n, NativeDouble v) {
  _mm_mask_storeu_ps(p, static_cast<__mmask8>(first(n)), _mm256_cvtpd_ps(v));
}

}  // namespace
}  // namespace batchnorm::kernels
