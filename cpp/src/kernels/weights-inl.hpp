// Weights as inputs of the walks over sums: which of a vector's values count, and how much. Included before these,
// which find the overloads by it.
#pragma once

#include "kernels/lanes-inl.hpp"
#include "kernels/table.hpp"

namespace batchnorm::kernels {
namespace {

// One for each value of a stretch's runs, the same for all channels.
template <class W>
struct RunWeights {
  const W* values;
};
// One for each value of a row, and for all columns of one.
template <class W>
struct ValueWeights {
  const W* values;
  std::int64_t stride;
};
template <class W>
struct RowWeight {
  const W* value;
};

template <class W>
BN_INLINE RunWeights<W> run_of(const RunWeights<W>& w, const Runs& runs, std::int64_t k, std::int64_t) {
  return {w.values + k * runs.length};
}
template <class W>
BN_INLINE RunWeights<W> operator+(const RunWeights<W>& w, std::int64_t n) {
  return {w.values + n};
}
template <class W>
BN_INLINE ValueWeights<W> row_of(const ValueWeights<W>& w, std::int64_t r, std::int64_t) {
  return {w.values + r * w.stride, w.stride};
}
template <class W>
BN_INLINE ValueWeights<W> operator+(const ValueWeights<W>& w, std::int64_t columns) {
  return {w.values + columns, w.stride};
}
template <class W>
BN_INLINE RowWeight<W> row_of(const RowWeight<W>& w, std::int64_t r, std::int64_t) {
  return {w.value + r};
}
template <class W>
BN_INLINE RowWeight<W> operator+(const RowWeight<W>& w, std::int64_t) {
  return w;
}

// They are fetched by nobody: few beside the values.
template <class W>
BN_INLINE void fetch_at(const RunWeights<W>&, std::int64_t) {}
template <class W>
BN_INLINE void fetch_at(const ValueWeights<W>&, std::int64_t) {}
template <class W>
BN_INLINE void fetch_at(const RowWeight<W>&, std::int64_t) {}

// Those of vector k of 16 values, and of the first n of these alone, the others 0.
template <template <class> class Weights, class W>
BN_INLINE NativeDouble load_weights(const Weights<W>& w, int k) {
  return load_vector<double>(w.values, k);
}
template <template <class> class Weights, class W>
BN_INLINE NativeDouble load_weights_of_first(const Weights<W>& w, int k, std::int64_t n) {
  return load_vector_of_first<double>(w.values, k, n, W(0));
}
template <class W>
BN_INLINE NativeDouble load_weights(const RowWeight<W>& w, int) {
  return static_cast<double>(*w.value) - NativeDouble{};
}
template <class W>
BN_INLINE NativeDouble load_weights_of_first(const RowWeight<W>& w, int k, std::int64_t) {
  return load_weights(w, k);
}

// The values whose weight is not 0, else 0.
template <class Weights, class T>
BN_INLINE NativeDouble load_counted(const T* p, const Weights& w, int k) {
  return load_weights(w, k) != 0 ? load_vector<double>(p, k) : NativeDouble{};
}
template <class Weights, class T>
BN_INLINE NativeDouble load_counted_of_first(const T* p, const Weights& w, int k, std::int64_t n) {
  return load_weights_of_first(w, k, n) != 0 ? load_vector_of_first<double>(p, k, n, T(0)) : NativeDouble{};
}
#ifdef BN_HAS_COUNTED_LOADS
// Compared and chosen before they are widened.
template <template <class> class Weights>
BN_INLINE NativeDouble load_counted(const float* p, const Weights<float>& w, int k) {
  const int at = k * Lanes<double>::kWidth;
  return widen_load_counted(p + at, w.values + at);
}
BN_INLINE NativeDouble load_counted(const float* p, const RowWeight<float>& w, int k) {
  return widen_load_counted(p + k * Lanes<double>::kWidth, *w.value);
}
#endif

// f(weights), as the kind they are.
template <class W, class F>
BN_INLINE void with_weights(const WeightsOf<W>& weights, const F& f) {
  if (weights.stride == 0) return f(RowWeight<W>{weights.values});
  f(ValueWeights<W>{weights.values, weights.stride});
}

}  // namespace
}  // namespace batchnorm::kernels
