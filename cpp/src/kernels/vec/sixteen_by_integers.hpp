// float16 and bfloat16 for machines that do not convert them: integer arithmetic on the bits of float32. Included by
// the headers of 16-byte vectors.
#pragma once

#include "batchnorm/float16.hpp"
#include "kernels/vec/native.hpp"

namespace batchnorm::kernels {
namespace {

// Signed, since comparing is cheap then; no lane compared has its sign set.
using FourInts = std::int32_t __attribute__((vector_size(16)));
using FourFloats = float __attribute__((vector_size(16)));
using FourShorts = std::uint16_t __attribute__((vector_size(8)));

// a where the mask is set, else b.
BN_INLINE FourInts where(FourInts mask, FourInts a, FourInts b) { return (mask & a) | (~mask & b); }

BN_INLINE FourInts load_four(const void* p) {
  FourShorts bits;
  __builtin_memcpy(&bits, p, sizeof bits);
  return __builtin_convertvector(bits, FourInts);
}
BN_INLINE void store_four(void* p, FourInts v) {
  const FourShorts bits = __builtin_convertvector(v, FourShorts);
  __builtin_memcpy(p, &bits, sizeof bits);
}

// Functions of their own: inlined wherever a value is loaded or stored, they were 7 of 8 MB of code and four minutes of
// compiling.
BN_NOINLINE FourFloats widen_four(const Float16* p) {
  const FourInts bits = load_four(p), rest = bits & 0x7fff, sign = (bits & 0x8000) << 16;
  const FourInts normal = (rest << 13) + 0x38000000;
  // 2^-1 + fraction*2^-24, less 2^-1.
  const FourInts subnormal = (FourInts)((FourFloats)(rest | 0x3f000000) - 0.5f);
  const FourInts special = (rest << 13) | 0x7f800000 | ((rest > 0x7c00) & 0x00400000);
  return (FourFloats)(where(rest < 0x0400, subnormal, where(rest >= 0x7c00, special, normal)) | sign);
}
BN_NOINLINE void narrow_four(Float16* p, FourFloats v) {
  const FourInts bits = (FourInts)v, rest = bits & 0x7fffffff, sign = (bits >> 16) & 0x8000;
  const FourInts normal = (rest - 0x38000000 + 0x0fff + ((rest >> 13) & 1)) >> 13;
  // The addition rounds to a multiple of 2^-24, the spacing of float32 from 2^-1 on and of float16's subnormals.
  const FourInts subnormal = (FourInts)((FourFloats)rest + 0.5f) - 0x3f000000;
  const FourInts special = ((rest > 0x7f800000) & (((rest >> 13) & 0x03ff) | 0x0200)) | 0x7c00;
  store_four(p, where(rest < 0x38800000, subnormal, where(rest >= 0x47800000, special, normal)) | sign);
}

BN_INLINE FourFloats widen_four(const BFloat16* p) { return (FourFloats)(load_four(p) << 16); }
BN_NOINLINE void narrow_four(BFloat16* p, FourFloats v) {
  using FourUnsigned = std::uint32_t __attribute__((vector_size(16)));  // the carry may reach the sign
  const FourUnsigned bits = (FourUnsigned)v, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const FourInts nan = (FourInts)((bits >> 16) | 0x0040);
  store_four(p, where(((FourInts)v & 0x7fffffff) > 0x7f800000, nan, (FourInts)rounded));
}

template <class T>
BN_INLINE NativeFloat float_load(const T* p) {
  return (NativeFloat)widen_four(p);
}
template <class T>
BN_NOINLINE NativeDouble widen_load_sixteen(const T* p) {
  T four[4] = {p[0], p[1], p[0], p[1]};
  const FourFloats v = widen_four(four);
  return NativeDouble{static_cast<double>(v[0]), static_cast<double>(v[1])};
}
BN_INLINE NativeDouble widen_load(const Float16* p) { return widen_load_sixteen(p); }
BN_INLINE NativeDouble widen_load(const BFloat16* p) { return widen_load_sixteen(p); }
BN_INLINE void narrow_store(Float16* p, NativeFloat v) { narrow_four(p, (FourFloats)v); }
BN_INLINE void narrow_store(BFloat16* p, NativeFloat v) { narrow_four(p, (FourFloats)v); }
template <class T>
BN_NOINLINE void narrow_store_sixteen(T* p, NativeDouble v) {
  T four[4];
  narrow_four(four, FourFloats{static_cast<float>(v[0]), static_cast<float>(v[1])});
  p[0] = four[0];
  p[1] = four[1];
}
BN_INLINE void narrow_store(Float16* p, NativeDouble v) { narrow_store_sixteen(p, v); }
BN_INLINE void narrow_store(BFloat16* p, NativeDouble v) { narrow_store_sixteen(p, v); }

}  // namespace
}  // namespace batchnorm::kernels
