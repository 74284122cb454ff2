// What the per-ISA vector headers share. Included only by them.
//
// Everything below kernels/ that is compiled once per ISA lives in an anonymous namespace and uses nothing of std::.
// Otherwise the linker would keep one copy of a shared inline function, maybe the AVX-512 one, and an older machine
// would run it.
#pragma once

#include <cstdint>

#define BN_INLINE [[maybe_unused]] inline __attribute__((always_inline))

// For loops that want the registers for themselves.
#define BN_NOINLINE [[maybe_unused]] __attribute__((noinline))

// For what handles the first few lanes, and for weights: a function of its own in the tables that take lanes one by one
// and are not made to be fast, which took 21 instead of 52 s to compile so, and 0.65 instead of 1.15 MB (x86-64-v2). A
// mask is less than a call.
#if defined(BN_TAILS_OUT_OF_LINE)
#define BN_TAIL BN_NOINLINE
#define BN_RARE BN_NOINLINE
#else
#define BN_TAIL BN_INLINE
#define BN_RARE BN_INLINE
#endif

// Before a loop over the native vectors of 16 lanes. Unless it is unrolled early, GCC 12 keeps the vectors on the
// stack: moments of runs of 64 values were 6 times slower with AVX2.
#if defined(__clang__)
#define BN_UNROLL _Pragma("unroll")
#else
#define BN_UNROLL _Pragma("GCC unroll 8")
#endif

namespace batchnorm::kernels {
namespace {

// a*b - product, exactly, without fused multiply-add (Dekker 1971): each factor is split into halves of 26 bits.
// Differs from the fused form only where the error itself underflows or a split overflows (|a| > 2^995).
template <class V>
BN_INLINE V product_error_by_splitting(V a, V b, V product) {
  const double splitter = 134217729.0;  // 2^27 + 1
  const V ca = a * splitter, cb = b * splitter;
  const V a_hi = ca - (ca - a), b_hi = cb - (cb - b);
  const V a_lo = a - a_hi, b_lo = b - b_hi;
  return ((a_hi * b_hi - product) + a_hi * b_lo + a_lo * b_hi) + a_lo * b_lo;
}

// 0, 1, ..., as arguments of a template.
template <unsigned... kNumber>
struct Numbered {};
template <unsigned kLast, unsigned... kNumber>
struct Numbers : Numbers<kLast - 1, kLast - 1, kNumber...> {};
template <unsigned... kNumber>
struct Numbers<0, kNumber...> {
  using Type = Numbered<kNumber...>;
};
template <unsigned kCount>
using NumbersBelow = typename Numbers<kCount>::Type;

// Lane l: table[number[l]], numbers below the number of lanes.
template <class V, class Numbers>
BN_INLINE V lanes_by_number(V table, Numbers number) {
#if defined(__clang__)
  V r;
  for (unsigned l = 0; l < sizeof(V) / sizeof(r[0]); ++l) r[l] = table[number[l]];
  return r;
#else
  return __builtin_shuffle(table, number);
#endif
}

}  // namespace
}  // namespace batchnorm::kernels
