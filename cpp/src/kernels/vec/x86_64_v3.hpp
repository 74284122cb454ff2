// AVX2 and FMA: 32-byte vectors.
#pragma once

#include <immintrin.h>

#include "batchnorm/float16.hpp"
#include "kernels/vec/native.hpp"

namespace batchnorm::kernels {
namespace {

using NativeFloat = __m256;
using NativeDouble = __m256d;
constexpr int kVectorRegisters = 16;

BN_INLINE NativeDouble widen_load(const float* p) { return _mm256_cvtps_pd(_mm_loadu_ps(p)); }
// Lane l: p[number[l]], with numbers below half the number of lanes (AVX2 permutes four values twice as often as
// eight).
template <class Numbers>
BN_INLINE NativeFloat load_by_number(const float* p, Numbers number) {
  const __m128 some = _mm_loadu_ps(p);
  return _mm256_permutevar_ps(_mm256_insertf128_ps(_mm256_castps128_ps256(some), some, 1), (__m256i)number);
}
template <class Numbers>
BN_INLINE NativeDouble load_by_number(const double* p, Numbers number) {
  return lanes_by_number(_mm256_loadu_pd(p), number);
}
BN_INLINE void narrow_store(float* p, NativeDouble v) { _mm_storeu_ps(p, _mm256_cvtpd_ps(v)); }
// float16 and bfloat16: by float32, which holds them exactly; to nearest even.
BN_INLINE NativeFloat float_load(const Float16* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
// bfloat16 is the upper half of float32: one permutation puts it there.
BN_INLINE NativeFloat float_load(const BFloat16* p) {
  const __m256i twice = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const __m256i upper = _mm256_setr_epi8(-1, -1, 0, 1, -1, -1, 2, 3, -1, -1, 4, 5, -1, -1, 6, 7,  //
                                         -1, -1, 8, 9, -1, -1, 10, 11, -1, -1, 12, 13, -1, -1, 14, 15);
  return _mm256_castsi256_ps(_mm256_shuffle_epi8(twice, upper));
}
BN_INLINE NativeDouble widen_load(const Float16* p) {
  return _mm256_cvtps_pd(_mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
BN_INLINE NativeDouble widen_load(const BFloat16* p) {
  const __m128i bits = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  const __m128i upper = _mm_setr_epi8(-1, -1, 0, 1, -1, -1, 2, 3, -1, -1, 4, 5, -1, -1, 6, 7);
  return _mm256_cvtps_pd(_mm_castsi128_ps(_mm_shuffle_epi8(bits, upper)));
}
BN_INLINE __m128i narrow(const Float16*, NativeFloat v) {
  return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
BN_INLINE __m128i narrow(const BFloat16*, NativeFloat v) {
  const __m256i bits = _mm256_castps_si256(v), high = _mm256_srli_epi32(bits, 16);
  const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
  const __m256i up = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i nan = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i halves = _mm256_blendv_epi8(_mm256_srli_epi32(up, 16), nan, is_nan);
  return _mm_packus_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
}
template <class T>
BN_INLINE void narrow_store(T* p, NativeFloat v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(p, v));
}
template <class T>
BN_INLINE void narrow_store(T* p, NativeDouble v) {
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), narrow(p, _mm256_zextps128_ps256(_mm256_cvtpd_ps(v))));
}
// Bit l: whether lane l is above 0 or NaN.
BN_INLINE unsigned above_zero(NativeFloat v) {
  return static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(v, _mm256_setzero_ps(), _CMP_NLE_UQ)));
}
BN_INLINE unsigned above_zero(NativeDouble v) {
  return static_cast<unsigned>(_mm256_movemask_pd(_mm256_cmp_pd(v, _mm256_setzero_pd(), _CMP_NLE_UQ)));
}
// Lanes whose bit is set, else 0: by masks from a table, since integer units and loads have little to do in the loops
// that ask for it. Backward through a ReLU took 1.34 to 1.44 times the time without (0.3 MB, Zen 3) with bits compared
// in vectors, 1.3 so; for eight float32 at once, two loads a mask, it was slower.
struct MasksOfFour {
  alignas(32) std::int64_t of[16][4];
};
constexpr MasksOfFour masks_of_four() {
  MasksOfFour masks{};
  for (unsigned bits = 0; bits < 16; ++bits) {
    for (unsigned l = 0; l < 4; ++l) masks.of[bits][l] = (bits >> l & 1u) != 0 ? -1 : 0;
  }
  return masks;
}
constexpr MasksOfFour kMasksOfFour = masks_of_four();
#define BN_HAS_KEEP_FOUR
BN_INLINE NativeDouble keep_four(NativeDouble v, unsigned bits) {
  return _mm256_and_pd(v, _mm256_load_pd(reinterpret_cast<const double*>(kMasksOfFour.of[bits & 15u])));
}
// Below 0: 0. The second of two that are equal or not ordered.
BN_INLINE NativeFloat relu(NativeFloat v) { return _mm256_max_ps(_mm256_setzero_ps(), v); }
BN_INLINE NativeDouble relu(NativeDouble v) { return _mm256_max_pd(_mm256_setzero_pd(), v); }
// The values whose weight is not 0, else 0.
#define BN_HAS_COUNTED_LOADS
BN_INLINE NativeDouble widen_load_counted(const float* p, const float* weights) {
  const __m128 counts = _mm_cmpneq_ps(_mm_loadu_ps(weights), _mm_setzero_ps());
  return _mm256_cvtps_pd(_mm_and_ps(counts, _mm_loadu_ps(p)));
}
BN_INLINE NativeDouble widen_load_counted(const float* p, float weight) {
  const __m128 counts = _mm_cmpneq_ps(_mm_set1_ps(weight), _mm_setzero_ps());
  return _mm256_cvtps_pd(_mm_and_ps(counts, _mm_loadu_ps(p)));
}
// a*b + c where a*b is exact, so that fusing changes no bit.
BN_INLINE NativeDouble multiply_add_exact(NativeDouble a, NativeDouble b, NativeDouble c) {
  return _mm256_fmadd_pd(a, b, c);
}
// a*b + c, rounded once.
BN_INLINE NativeFloat fused(NativeFloat a, NativeFloat b, NativeFloat c) { return _mm256_fmadd_ps(a, b, c); }
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
BN_INLINE void stream(float* p, NativeFloat v) { _mm256_stream_ps(p, v); }
BN_INLINE void stream(double* p, NativeDouble v) { _mm256_stream_pd(p, v); }
template <class T>
BN_INLINE void stream(T* p, NativeFloat v) {
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), narrow(p, v));
}
// The first n values or lanes only; n may be anything: below 1 is none, above the width is all. Masked-off lanes touch
// no memory.
BN_INLINE __m256i first_8(std::int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
BN_INLINE __m256i first_4(std::int64_t n) {
  return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
}
BN_INLINE __m128i first_4_narrow(std::int64_t n) {
  return _mm_cmpgt_epi32(_mm_set1_epi32(static_cast<int>(n)), _mm_setr_epi32(0, 1, 2, 3));
}
BN_INLINE NativeFloat first_of(NativeFloat a, std::int64_t n, NativeFloat b) {
  return _mm256_blendv_ps(b, a, _mm256_castsi256_ps(first_8(n)));
}
BN_INLINE NativeDouble first_of(NativeDouble a, std::int64_t n, NativeDouble b) {
  return _mm256_blendv_pd(b, a, _mm256_castsi256_pd(first_4(n)));
}
BN_INLINE NativeFloat load_part(const float* p, std::int64_t n, float fill) {
  const __m256i m = first_8(n);
  return _mm256_blendv_ps(_mm256_set1_ps(fill), _mm256_maskload_ps(p, m), _mm256_castsi256_ps(m));
}
BN_INLINE NativeDouble load_part(const double* p, std::int64_t n, double fill) {
  const __m256i m = first_4(n);
  return _mm256_blendv_pd(_mm256_set1_pd(fill), _mm256_maskload_pd(p, m), _mm256_castsi256_pd(m));
}
BN_INLINE NativeDouble widen_load_part(const float* p, std::int64_t n, float fill) {
  const __m128i m = first_4_narrow(n);
  return _mm256_cvtps_pd(_mm_blendv_ps(_mm_set1_ps(fill), _mm_maskload_ps(p, m), _mm_castsi128_ps(m)));
}
BN_INLINE void store_part(float* p, std::int64_t n, NativeFloat v) { _mm256_maskstore_ps(p, first_8(n), v); }
BN_INLINE void store_part(double* p, std::int64_t n, NativeDouble v) { _mm256_maskstore_pd(p, first_4(n), v); }
BN_INLINE void narrow_store_part(float* p, std::int64_t n, NativeDouble v) {
  _mm_maskstore_ps(p, first_4_narrow(n), _mm256_cvtpd_ps(v));
}

}  // namespace
}  // namespace batchnorm::kernels
