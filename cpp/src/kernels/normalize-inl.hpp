// Pass 2 of forward: y = (x - center)*scale + offset.
#pragma once

#include "kernels/apply-inl.hpp"

namespace batchnorm::kernels {
namespace {

template <class T, class A>
struct NormalizeMap {
  Lanes<A> center, scale, offset;

  BN_INLINE Lanes<A> operator()(const T* x, std::int64_t n) const {
    return (load_upto<A>(x, n, T(0)) - center) * scale + offset;
  }
};

template <class T, class A>
BN_INLINE NormalizeMap<T, A> normalize_map(const AffineColumns<A>& k, std::int64_t c, std::int64_t n) {
  return {load_upto<A>(k.center + c, n, A(0)), load_upto<A>(k.scale + c, n, A(0)), load_upto<A>(k.offset + c, n, A(0))};
}

template <class T, class A>
BN_INLINE NormalizeMap<T, A> normalize_map(const Affine<A>& k) {
  return {broadcast(k.center), broadcast(k.scale), broadcast(k.offset)};
}

template <class T, class A>
BN_INLINE NormalizeMap<T, A> join(std::int64_t n, const NormalizeMap<T, A>& a, const NormalizeMap<T, A>& b) {
  return {join(n, a.center, b.center), join(n, a.scale, b.scale), join(n, a.offset, b.offset)};
}

template <class T, Stores kStores>
void runs_normalize(const T* x, T* y, Runs runs, const Affine<Arithmetic<T>>* k) {
  apply_runs<kStores>([k](std::int64_t c) { return normalize_map<T>(k[c]); }, runs, y, x);
}

template <class T>
void runs_normalize_wide(const T* x, T* y, Runs runs, const Affine<double>& k) {
  apply_runs<Stores::ordinary>([&k](std::int64_t) { return normalize_map<T>(k); }, runs, y, x);
}

template <class T>
void rows_normalize_around_cache(const T* x, T* y, Rows rows, const AffineColumns<Arithmetic<T>>& k) {
  apply_rows_in_line<Stores::around_cache>([&k](std::int64_t c, std::int64_t n) { return normalize_map<T>(k, c, n); },
                                           rows, y, x);
}

template <class T>
void rows_normalize(const T* x, T* y, Rows rows, const AffineColumns<Arithmetic<T>>& k) {
  apply_rows([&k](std::int64_t c, std::int64_t n) { return normalize_map<T>(k, c, n); }, rows, y, x);
}

template <class T>
void rows_normalize_mixed(const T* x, T* y, Rows rows, const AffineColumns<float>& k,
                          const WideColumns<AffineColumns<double>>& wide) {
  const auto make = [&k, &wide](std::int64_t c, std::int64_t n) {
    return Mixed<NormalizeMap<T, float>, NormalizeMap<T, double>>{
        normalize_map<T>(k, c, n), normalize_map<T>(wide.coefficients, c, n), wide.mask[c / kLanes]};
  };
  apply_rows(make, rows, y, x);
}

}  // namespace
}  // namespace batchnorm::kernels
