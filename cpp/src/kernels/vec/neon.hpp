// aarch64 NEON, which every aarch64 machine has: 16-byte vectors.
#pragma once

#include <arm_neon.h>

#include "batchnorm/float16.hpp"
#include "kernels/vec/native.hpp"

namespace batchnorm::kernels {
namespace {

using NativeFloat = float32x4_t;
using NativeDouble = float64x2_t;
constexpr int kVectorRegisters = 32;

BN_INLINE NativeDouble widen_load(const float* p) { return vcvt_f64_f32(vld1_f32(p)); }
BN_INLINE void narrow_store(float* p, NativeDouble v) { vst1_f32(p, vcvt_f32_f64(v)); }
// float16 and bfloat16: by float32, which holds them exactly; to nearest even. Not through float16_t, which Float16 may
// not be read as.
BN_INLINE uint16x4_t bits_of_4(const void* p) {
  uint16x4_t bits;
  __builtin_memcpy(&bits, p, sizeof bits);
  return bits;
}
BN_INLINE NativeFloat float_of(const Float16*, uint16x4_t bits) { return vcvt_f32_f16(vreinterpret_f16_u16(bits)); }
BN_INLINE NativeFloat float_of(const BFloat16*, uint16x4_t bits) {
  return vreinterpretq_f32_u32(vshll_n_u16(bits, 16));
}
template <class T>
BN_INLINE NativeFloat float_load(const T* p) {
  return float_of(p, bits_of_4(p));
}
template <class T>
BN_INLINE NativeDouble widen_load(const T* p) {
  std::uint32_t two;
  __builtin_memcpy(&two, p, sizeof two);
  return vcvt_f64_f32(vget_low_f32(float_of(p, vreinterpret_u16_u32(vdup_n_u32(two)))));
}
BN_INLINE uint16x4_t narrow(const Float16*, NativeFloat v) { return vreinterpret_u16_f16(vcvt_f16_f32(v)); }
BN_INLINE uint16x4_t narrow(const BFloat16*, NativeFloat v) {
  const uint32x4_t bits = vreinterpretq_u32_f32(v), high = vshrq_n_u32(bits, 16);
  const uint32x4_t up = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), vandq_u32(high, vdupq_n_u32(1)));
  const uint32x4_t nan = vorrq_u32(high, vdupq_n_u32(0x40));
  return vmovn_u32(vbslq_u32(vceqq_f32(v, v), vshrq_n_u32(up, 16), nan));
}
template <class T>
BN_INLINE void narrow_store(T* p, NativeFloat v) {
  const uint16x4_t bits = narrow(p, v);
  __builtin_memcpy(p, &bits, sizeof bits);
}
template <class T>
BN_INLINE void narrow_store(T* p, NativeDouble v) {
  const std::uint32_t two = vget_lane_u32(vreinterpret_u32_u16(narrow(p, vcvt_high_f32_f64(vcvt_f32_f64(v), v))), 0);
  __builtin_memcpy(p, &two, sizeof two);
}
// Bit l: whether lane l is above 0 or NaN.
BN_INLINE unsigned above_zero(NativeFloat v) {
  const uint32x4_t bits = {1, 2, 4, 8};
  return vaddvq_u32(vbicq_u32(bits, vcleq_f32(v, vdupq_n_f32(0))));
}
BN_INLINE unsigned above_zero(NativeDouble v) {
  const uint64x2_t bits = {1, 2};
  return static_cast<unsigned>(vaddvq_u64(vbicq_u64(bits, vcleq_f64(v, vdupq_n_f64(0)))));
}
// Not vmax, which turns -0 into 0.
BN_INLINE NativeFloat relu(NativeFloat v) { return v < 0 ? NativeFloat{} : v; }
BN_INLINE NativeDouble relu(NativeDouble v) { return v < 0 ? NativeDouble{} : v; }
// a*b + c where a*b is exact, so that fusing changes no bit.
BN_INLINE NativeDouble multiply_add_exact(NativeDouble a, NativeDouble b, NativeDouble c) { return vfmaq_f64(c, a, b); }
// a*b + c, rounded once.
BN_INLINE NativeFloat fused(NativeFloat a, NativeFloat b, NativeFloat c) { return vfmaq_f32(c, a, b); }
// a + b and a - b, for machines that can do more sums at once in another way.
BN_INLINE NativeDouble other_add(NativeDouble a, NativeDouble b) { return a + b; }
BN_INLINE NativeDouble other_subtract(NativeDouble a, NativeDouble b) { return a - b; }
BN_INLINE NativeDouble product_error(NativeDouble a, NativeDouble b, NativeDouble product) {
  return vfmaq_f64(-product, a, b);
}
// There are no stores that go around the caches here: ordinary ones.
BN_INLINE void stream(float* p, NativeFloat v) { __builtin_memcpy(p, &v, sizeof v); }
BN_INLINE void stream(double* p, NativeDouble v) { __builtin_memcpy(p, &v, sizeof v); }
template <class T>
BN_INLINE void stream(T* p, NativeFloat v) {
  narrow_store(p, v);
}

}  // namespace
}  // namespace batchnorm::kernels

#include "kernels/vec/parts_by_scalars.hpp"
