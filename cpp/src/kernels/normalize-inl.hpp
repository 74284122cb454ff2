// Pass 2 of forward: y = (x - center)*scale + offset, and its tail: a residual added, ReLU and its bits; or
// zeros.
#pragma once

#include "kernels/apply-inl.hpp"

namespace batchnorm::kernels {
namespace {

template <class T>
struct NormalizeMap {
  using A = Arithmetic<T>;
  Lanes<A> center, scale, offset;

  BN_INLINE Lanes<A> operator()(const T* x, std::int64_t n) const {
    return (load_upto<A>(x, n, T(0)) - center) * scale + offset;
  }
};
template <class T>
BN_INLINE NormalizeMap<T> normalize_map(const AffineColumns<Arithmetic<T>>& k, std::int64_t c, std::int64_t n) {
  using A = Arithmetic<T>;
  return {load_upto<A>(k.center + c, n, A(0)), load_upto<A>(k.scale + c, n, A(0)), load_upto<A>(k.offset + c, n, A(0))};
}
template <class T>
BN_INLINE NormalizeMap<T> normalize_map(const Affine<Arithmetic<T>>& k) {
  return {broadcast(k.center), broadcast(k.scale), broadcast(k.offset)};
}
template <class T>
BN_INLINE NormalizeMap<T> join(std::int64_t n, const NormalizeMap<T>& a, const NormalizeMap<T>& b) {
  return {join(n, a.center, b.center), join(n, a.scale, b.scale), join(n, a.offset, b.offset)};
}

// With a residual alone.
template <class T>
struct AddMap {
  NormalizeMap<T> map;

  BN_INLINE Lanes<T> operator()(const T* x, const T* residual, std::int64_t n) const {
    return map(x, n) + load_upto<T>(residual, n, T(0));
  }
};
template <class T>
BN_INLINE AddMap<T> join(std::int64_t n, const AddMap<T>& a, const AddMap<T>& b) {
  return {join(n, a.map, b.map)};
}

template <class T>
struct ReluMap {
  NormalizeMap<T> map;

  template <class Moving>
  BN_INLINE Lanes<T> operator()(const T* x, const Moving& tail, std::int64_t n) const {
    Lanes<T> sum = map(x, n);
    if constexpr (Moving::has_residual()) sum = sum + load_upto<T>(tail.residual, n, T(0));
    if constexpr (Moving::has_bits()) put_bits<Moving::kWhere>(tail.mask, tail.bit, above_zero(sum), n);
    return relu(sum);
  }
};
template <class T>
BN_INLINE ReluMap<T> join(std::int64_t n, const ReluMap<T>& a, const ReluMap<T>& b) {
  return {join(n, a.map, b.map)};
}

// 0 where the weight is; that of value i of a run lies `begin` values before that of the piece's value.
template <class T>
struct CountedMap {
  NormalizeMap<T> map;
  std::int64_t begin;

  BN_RARE Lanes<T> operator()(const T* x, const T* weights, std::int64_t n) const {
    return where_counted(load_upto<T>(weights - begin, n, T(0)), map(x, n), broadcast(T(0)));
  }
};
// The weights of a run are followed by the first ones again.
template <class T>
BN_INLINE CountedMap<T> join(std::int64_t n, const CountedMap<T>& a, const CountedMap<T>& b) {
  return {join(n, a.map, b.map), a.begin};
}

template <class T>
void runs_normalize(const T* x, T* y, const Tail<T>& tail, Runs runs, const Affine<Arithmetic<T>>* k) {
  if constexpr (!kIsSixteen<T>) {
    if (tail.relu) {
      const auto make = [k](std::int64_t c) { return ReluMap<T>{normalize_map<T>(k[c])}; };
      return with_parts<Bits::whole_bytes>(tail, [&](const auto& parts) { apply_runs(make, runs, y, x, parts); });
    }
    if (tail.residual != nullptr) {
      const auto make = [k](std::int64_t c) { return AddMap<T>{normalize_map<T>(k[c])}; };
      return apply_runs(make, runs, y, x, tail.residual + tail.at);
    }
    if (tail.weights != nullptr) {
      const auto make = [k, &runs](std::int64_t c) { return CountedMap<T>{normalize_map<T>(k[c]), c * runs.length}; };
      return apply_runs(make, runs, y, x, tail.weights);
    }
  }
  apply_runs([k](std::int64_t c) { return normalize_map<T>(k[c]); }, runs, y, x);
}

template <class T>
void rows_normalize(const T* x, T* y, const Tail<T>& tail, Rows rows, const AffineColumns<Arithmetic<T>>& k) {
  if constexpr (!kIsSixteen<T>) {
    if (tail.relu) {
      const auto make = [&k](std::int64_t c, std::int64_t n) { return ReluMap<T>{normalize_map<T>(k, c, n)}; };
      if (rows.walk == RowWalk::columns) {
        return with_parts<Bits::anywhere>(tail,
                                          [&](const auto& parts) { apply_rows_by_columns(make, rows, y, x, parts); });
      }
      return with_parts<Bits::whole_bytes>(tail, [&](const auto& parts) { apply_rows_along(make, rows, y, x, parts); });
    }
    if (tail.residual != nullptr) {
      const auto make = [&k](std::int64_t c, std::int64_t n) { return AddMap<T>{normalize_map<T>(k, c, n)}; };
      return apply_rows(make, rows, y, x, tail.residual + tail.at);
    }
    if (tail.weights != nullptr) {
      const auto make = [&k](std::int64_t c, std::int64_t n) { return CountedMap<T>{normalize_map<T>(k, c, n), 0}; };
      return apply_rows(make, rows, y, x, tail.weights);
    }
  }
  apply_rows([&k](std::int64_t c, std::int64_t n) { return normalize_map<T>(k, c, n); }, rows, y, x);
}

}  // namespace
}  // namespace batchnorm::kernels
