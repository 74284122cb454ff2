// What any machine gives: 16-byte vectors that the compiler lowers to what it has.
#pragma once

#define BN_TAILS_OUT_OF_LINE
#include "kernels/vec/native.hpp"

namespace batchnorm::kernels {
namespace {

using NativeFloat = float __attribute__((vector_size(16)));
using NativeDouble = double __attribute__((vector_size(16)));
constexpr int kVectorRegisters = 16;

}  // namespace
}  // namespace batchnorm::kernels

#include "kernels/vec/fused_by_doubles.hpp"
#include "kernels/vec/sixteen_by_integers.hpp"

namespace batchnorm::kernels {
namespace {

BN_INLINE NativeDouble widen_load(const float* p) {
  return NativeDouble{static_cast<double>(p[0]), static_cast<double>(p[1])};
}
BN_INLINE void narrow_store(float* p, NativeDouble v) {
  p[0] = static_cast<float>(v[0]);
  p[1] = static_cast<float>(v[1]);
}
// Bit l: whether lane l is above 0 or NaN.
BN_INLINE unsigned above_zero(NativeFloat v) {
  return (v[0] <= 0 ? 0u : 1u) | (v[1] <= 0 ? 0u : 2u) | (v[2] <= 0 ? 0u : 4u) | (v[3] <= 0 ? 0u : 8u);
}
BN_INLINE unsigned above_zero(NativeDouble v) { return (v[0] <= 0 ? 0u : 1u) | (v[1] <= 0 ? 0u : 2u); }
BN_INLINE NativeFloat relu(NativeFloat v) { return v < 0 ? NativeFloat{} : v; }
BN_INLINE NativeDouble relu(NativeDouble v) { return v < 0 ? NativeDouble{} : v; }
// a*b + c where a*b is exact.
BN_INLINE NativeDouble multiply_add_exact(NativeDouble a, NativeDouble b, NativeDouble c) { return a * b + c; }
// a + b and a - b, for machines that can do more sums at once in another way.
BN_INLINE NativeDouble other_add(NativeDouble a, NativeDouble b) { return a + b; }
BN_INLINE NativeDouble other_subtract(NativeDouble a, NativeDouble b) { return a - b; }
BN_INLINE NativeDouble product_error(NativeDouble a, NativeDouble b, NativeDouble product) {
  return product_error_by_splitting(a, b, product);
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
