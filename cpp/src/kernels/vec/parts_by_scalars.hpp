// The first n values or lanes of a vector, one by one, and lanes by number, for machines without masks. Included by
// their headers, last.
#pragma once

#include "kernels/vec/native.hpp"

namespace batchnorm::kernels {
namespace {

// The first n values at p, the other lanes `fill`; and the first n lanes to p. Nothing beyond n is touched; n may be
// anything: below 1 is none, above the width is all.
template <class V, class T>
BN_INLINE V load_part_by_scalars(const T* p, std::int64_t n, T fill) {
  V v{};
  for (int l = 0; l < static_cast<int>(sizeof(V) / sizeof(v[0])); ++l) v[l] = l < n ? p[l] : fill;
  return v;
}
template <class V, class T>
BN_INLINE void store_part_by_scalars(T* p, std::int64_t n, V v) {
  for (int l = 0; l < static_cast<int>(sizeof(V) / sizeof(v[0])); ++l) {
    if (l < n) p[l] = static_cast<T>(v[l]);
  }
}

// The first n lanes of a, the others of b.
template <class V>
BN_INLINE V first_of(V a, std::int64_t n, V b) {
  V r{};
  for (int l = 0; l < static_cast<int>(sizeof(V) / sizeof(a[0])); ++l) r[l] = l < n ? a[l] : b[l];
  return r;
}

// Lane l: p[number[l]], with numbers below half the number of lanes. Two are sooner loaded than permuted.
template <class T, class Numbers>
BN_INLINE auto load_by_number(const T* p, Numbers number) {
  typedef T Vector __attribute__((vector_size(sizeof(Numbers))));
  if constexpr (sizeof(Numbers) == 2 * sizeof(T)) {
    return Vector{p[number[0]], p[number[1]]};
  } else {
    Vector table;
    __builtin_memcpy(&table, p, sizeof table);
    return lanes_by_number(table, number);
  }
}

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
