// aarch64 NEON, which every aarch64 machine has: 16-byte vectors.
#pragma once

#include <arm_neon.h>

#include "kernels/vec/native.hpp"

namespace batchnorm::kernels {
namespace {

using NativeFloat = float32x4_t;
using NativeDouble = float64x2_t;

BN_INLINE NativeDouble widen_load(const float* p) { return vcvt_f64_f32(vld1_f32(p)); }
// Values where the weight is not 0, else 0.
BN_INLINE NativeDouble widen_load_where(const float* p, const float* weights) {
  return NativeDouble{weights[0] != 0 ? static_cast<double>(p[0]) : 0.0,
                      weights[1] != 0 ? static_cast<double>(p[1]) : 0.0};
}
BN_INLINE void narrow_store(float* p, NativeDouble v) { vst1_f32(p, vcvt_f32_f64(v)); }
// a*b + c where a*b is exact, so that fusing changes no bit.
BN_INLINE NativeDouble multiply_add_exact(NativeDouble a, NativeDouble b, NativeDouble c) { return vfmaq_f64(c, a, b); }
// a + b and a - b, for machines that can do more sums at once in another way.
BN_INLINE NativeDouble other_add(NativeDouble a, NativeDouble b) { return a + b; }
BN_INLINE NativeDouble other_subtract(NativeDouble a, NativeDouble b) { return a - b; }
BN_INLINE NativeDouble product_error(NativeDouble a, NativeDouble b, NativeDouble product) {
  return vfmaq_f64(-product, a, b);
}
// There are no stores that go around the caches here: ordinary ones.
BN_INLINE void stream(float* p, NativeFloat v) { __builtin_memcpy(p, &v, sizeof v); }
BN_INLINE void stream(double* p, NativeDouble v) { __builtin_memcpy(p, &v, sizeof v); }
BN_INLINE void finish_streams() {}

}  // namespace
}  // namespace batchnorm::kernels

#include "kernels/vec/parts_by_scalars.hpp"
