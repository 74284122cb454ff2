// aarch64 NEON, which every aarch64 machine has: 16-byte vectors.
#pragma once

#include <arm_neon.h>

#include "kernels/vec/native.hpp"

namespace batchnorm::kernels {
namespace {

using NativeFloat = float32x4_t;
using NativeDouble = float64x2_t;

BN_INLINE NativeDouble widen_load(const float* p) { return vcvt_f64_f32(vld1_f32(p)); }
BN_INLINE void narrow_store(float* p, NativeDouble v) { vst1_f32(p, vcvt_f32_f64(v)); }
// a*b + c where a*b is exact, so that fusing changes no bit.
BN_INLINE NativeDouble multiply_add_exact(NativeDouble a, NativeDouble b, NativeDouble c) { return vfmaq_f64(c, a, b); }
BN_INLINE NativeDouble product_error(NativeDouble a, NativeDouble b, NativeDouble product) {
  return vfmaq_f64(-product, a, b);
}
// There are no stores that go around the caches here: ordinary ones.
BN_INLINE void stream(float* p, NativeFloat v) { __builtin_memcpy(p, &v, sizeof v); }
BN_INLINE void stream(double* p, NativeDouble v) { __builtin_memcpy(p, &v, sizeof v); }
BN_INLINE void finish_streams() {}
// The first n values or lanes only, see native.hpp.
BN_INLINE NativeFloat load_part(const float* p, std::int64_t n, float fill) {
  return load_part_by_scalars<NativeFloat>(p, n, fill);
}
BN_INLINE NativeDouble load_part(const double* p, std::int64_t n, double fill) {
  return load_part_by_scalars<NativeDouble>(p, n, fill);
}
BN_INLINE NativeDouble widen_load_part(const float* p, std::int64_t n, float fill) {
  return load_part_by_scalars<NativeDouble>(p, n, fill);
}
BN_INLINE void store_part(float* p, std::int64_t n, NativeFloat v) { store_part_by_scalars(p, n, v); }
BN_INLINE void store_part(double* p, std::int64_t n, NativeDouble v) { store_part_by_scalars(p, n, v); }
BN_INLINE void narrow_store_part(float* p, std::int64_t n, NativeDouble v) { store_part_by_scalars(p, n, v); }

}  // namespace
}  // namespace batchnorm::kernels
