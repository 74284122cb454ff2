// Weights as inputs of the walks: where those of a run or a row are, and as lanes.
#pragma once

#include <type_traits>

#include "kernels/lanes-inl.hpp"
#include "kernels/table.hpp"

namespace batchnorm::kernels {
namespace {

// ---- runs ----

template <class W>
BN_INLINE const W* run_at(const RunWeights<W>& w, std::int64_t, std::int64_t k) {
  return w.values + k * w.stride;
}

// The weights of a stretch, for walks along it: where it holds several channels, over and over, so that 16 of any place
// are one load.
constexpr std::int64_t kLongestRepeated = 1024;
template <class W>
struct StretchWeights {
  const W* values;  // null: repeated
  W repeated[kLongestRepeated + kLanes];
};
template <class W>
BN_INLINE StretchWeights<W> stretch_at(const RunWeights<W>& w, const Runs& runs, std::int64_t k) {
  StretchWeights<W> stretch;
  stretch.values = w.values + k * w.stride;
  if (runs.channels == 1) return stretch;
  std::int64_t i = 0;
  for (; i + kLanes <= runs.length; i += kLanes) store(stretch.repeated + i, load_as<W>(stretch.values + i));
  for (; i < runs.length; ++i) stretch.repeated[i] = stretch.values[i];
  for (; i < runs.length + kLanes; ++i) stretch.repeated[i] = stretch.repeated[i - runs.length];
  stretch.values = nullptr;
  return stretch;
}
template <class W>
struct PlacedWeights {
  const W* lanes;
};
template <class W>
BN_INLINE PlacedWeights<W> value_at(const StretchWeights<W>& w, std::int64_t, std::int64_t place) {
  return {(w.values != nullptr ? w.values : w.repeated) + place};
}
template <class W>
BN_INLINE PlacedWeights<W> operator+(const PlacedWeights<W>& w, std::int64_t) {
  return w;
}
template <Fetch kWhere, class W>
BN_INLINE void fetch_lanes(const PlacedWeights<W>&) {}  // few, and near

// ---- rows ----

// The weights of up to eight rows, so that those of 16 columns are one load. Three forms: where a row of the tensor is
// whole vectors, or all of a row, a single weight for each; where a row is one row of the tensor, its weights over and
// over, at least 16 behind any place; else one per column.
template <class W>
struct WeightedRows {
  static constexpr std::int64_t kMostRows = 8;

  const W* ones;  // or null: of the first row, `repeat` further on those of the next
  std::int64_t repeat, channels;
  std::int64_t period, first_column, stride;
  W lanes[kMostRows * (kMostWeightedColumns + kLanes)];
};

// Copies of `count` weights, `times` of them side by side. Each copy may write up to 16 values, which the next
// overwrites.
template <class W>
BN_INLINE void repeat_weights(const W* from, std::int64_t count, std::int64_t times, W* to) {
  const Lanes<W> lanes = load_upto<W>(from, count, W(0));
  for (std::int64_t k = 0; k < times; ++k) store(to + k * count, lanes);
}
template <class W>
BN_INLINE void fill_weights(W weight, std::int64_t count, W* to) {
  const Lanes<W> lanes = broadcast(weight);
  for (std::int64_t k = 0; k < count; k += kLanes) store(to + k, lanes);
}

// Lanes of `table` by number.
template <class Native, class Ints>
BN_INLINE Native lanes_by_number(const Native& table, const Ints& number) {
#if defined(__clang__)
  Native r;
  for (unsigned l = 0; l < sizeof(Native) / sizeof(r[0]); ++l) r[l] = table[number[l]];
  return r;
#else
  return __builtin_shuffle(table, number);
#endif
}
// Of rows of few channels side by side, each with a weight: place e of a row gets that of its row e / channels. 65536
// rows of 3 channels took 5.1 times as long as without a mask while each weight was stored by itself, 2.7 times so.
template <class W>
BN_INLINE void spread_weights(const RowWeights<W>& w, std::int64_t r, std::int64_t visit, WeightedRows<W>& rows) {
  using Native = typename Lanes<W>::Native;
  using One = std::conditional_t<sizeof(W) == sizeof(float), std::int32_t, std::int64_t>;
  constexpr int kWidth = Lanes<W>::kWidth;
  typedef One Ints __attribute__((vector_size(sizeof(Native))));
  const W per_channel = W(1) / static_cast<W>(w.channels);
  Native half_past;  // lane l: l + 1/2, so that rounding cannot reach the next whole number
  for (int l = 0; l < kWidth; ++l) half_past[l] = static_cast<W>(l) + W(0.5);
  for (std::int64_t c = 0; c < w.repeat * w.channels; c += kWidth) {
    const std::int64_t first = c / w.channels;
    const Native place = half_past + static_cast<W>(c - first * w.channels);
    const Ints number = __builtin_convertvector(place * per_channel, Ints);
    const W* from = w.values + r * w.repeat + first;
    for (std::int64_t k = 0; k < visit; ++k) {
      const W* some_of_row = from + k * w.repeat;
      const bool has_whole = (visit - k) * w.repeat - first >= kWidth;  // all but the last, which may end the tensor
      const Native table = has_whole ? load_whole(some_of_row) : load_part(some_of_row, w.repeat - first, W(0));
      const Native some = lanes_by_number(table, number);
      __builtin_memcpy(rows.lanes + k * rows.stride + c, &some, sizeof some);
    }
  }
}

template <class W>
BN_INLINE bool has_ones(const RowWeights<W>& w) {
  return w.inner == 1 && (w.repeat == 1 || w.channels % kLanes == 0);
}
template <class W>
BN_INLINE WeightedRows<W> rows_of(const RowWeights<W>& w, std::int64_t r, std::int64_t visit, std::int64_t,
                                  std::int64_t) {
  WeightedRows<W> rows;
  const W* values = w.values + r * w.repeat * w.inner;
  rows.first_column = w.first_column;
  rows.repeat = w.repeat;
  rows.channels = w.channels;
  rows.ones = has_ones(w) ? values : nullptr;
  rows.period = w.inner;
  if (rows.ones != nullptr) return rows;
  // A row of 16-value runs or shorter (plan.cpp) takes two vectors and what is written too much.
  rows.stride = w.repeat == 1 ? 4 * kLanes : w.repeat * w.channels * w.inner + kLanes;
  if (w.repeat > 1) rows.period = 0;
  if (w.repeat > 1 && w.inner == 1 && w.channels < kLanes) {
    spread_weights(w, r, visit, rows);
    return rows;
  }
  for (std::int64_t k = 0; k < visit; ++k) {
    W* to = rows.lanes + k * rows.stride;
    if (w.repeat == 1) {
      repeat_weights(values + k * w.inner, w.inner, 2 * kLanes / w.inner + 1, to);
      continue;
    }
    for (std::int64_t t = 0; t < w.repeat; ++t, to += w.channels * w.inner) {
      const W* one = values + (k * w.repeat + t) * w.inner;
      if (w.inner == 1) {
        fill_weights(*one, w.channels, to);
      } else {
        repeat_weights(one, w.inner, w.channels, to);
      }
    }
  }
  return rows;
}

// Of 16 columns: those of row r at lanes + r*stride, or all as one[r*stride].
template <class W>
struct WeightedColumns {
  const W* lanes;
  const W* one;
  std::int64_t stride = 0;
};
template <class W>
BN_INLINE WeightedColumns<W> columns_of(const WeightedRows<W>& rows, std::int64_t c) {
  if (rows.ones != nullptr) {
    return {nullptr, rows.ones + (rows.repeat == 1 ? 0 : c / rows.channels), rows.repeat};
  }
  const auto place = static_cast<std::uint32_t>(rows.first_column + c);  // 32 bits divide sooner
  return {rows.lanes + (rows.period == 0 ? c : place % static_cast<std::uint32_t>(rows.period)), nullptr, rows.stride};
}
template <class W, class Places>
BN_INLINE WeightedColumns<W> row_of(const WeightedColumns<W>& columns, std::int64_t r, const Places&) {
  if (columns.lanes == nullptr) return {nullptr, columns.one + r * columns.stride};
  return {columns.lanes + r * columns.stride, nullptr};
}
template <class W>
BN_INLINE void fetch_row(const WeightedColumns<W>&, std::int64_t) {}  // few, and near

// ---- lanes ----

// The weights of 16 (or n < 16) values; missing lanes may hold anything but for runs, where they have none.
template <class A, class W>
BN_INLINE Lanes<A> weight_lanes(const W* w, std::int64_t n) {
  return load_upto<A>(w, n, W(0));
}
template <class A, class W>
BN_INLINE Lanes<A> weight_lanes(const PlacedWeights<W>& w, std::int64_t n) {
  return load_upto<A>(w.lanes, n, W(0));
}
template <class A, class W>
BN_INLINE Lanes<A> weight_lanes(const WeightedColumns<W>& w, std::int64_t) {
  return w.lanes == nullptr ? broadcast(static_cast<A>(*w.one)) : load_as<A>(w.lanes);
}

template <class A, class W>
BN_INLINE typename Lanes<A>::Native weight_vector(const W* w, int k) {
  return load_vector<A>(w, k);
}
template <class A, class W>
BN_INLINE typename Lanes<A>::Native weight_vector(const WeightedColumns<W>& w, int k) {
  const typename Lanes<A>::Native zero{};
  return w.lanes == nullptr ? static_cast<A>(*w.one) - zero : load_vector<A>(w.lanes, k);
}
// Of n < 16 values.
template <class A, class W>
BN_INLINE typename Lanes<A>::Native weight_vector_of_first(const W* w, int k, std::int64_t n) {
  return load_vector_of_first<A>(w, k, n, W(0));
}
template <class A, class W>
BN_INLINE typename Lanes<A>::Native weight_vector_of_first(const WeightedColumns<W>& w, int k, std::int64_t) {
  return weight_vector<A>(w, k);
}

// a where the weight is not 0, else b.
template <class A>
BN_INLINE Lanes<A> where(const Lanes<A>& weight, const Lanes<A>& a, const Lanes<A>& b) {
  Lanes<A> r;
  BN_UNROLL for (int k = 0; k < Lanes<A>::kVectors; ++k) r.v[k] = weight.v[k] != 0 ? a.v[k] : b.v[k];
  return r;
}

// Values where the weight is not 0, else 0: vector k of 16, or of n < 16.
template <class T, class Weights>
BN_INLINE NativeDouble vector_where(const T* p, const Weights& weights, int k) {
  return weight_vector<double>(weights, k) != 0 ? load_vector<double>(p, k) : NativeDouble{};
}
// Chosen before they are widened: moments of runs took 1.9 times as long as without a mask the other way.
BN_INLINE NativeDouble vector_where(const float* p, const float* weights, int k) {
  const int at = k * Lanes<double>::kWidth;
  return widen_load_where(p + at, weights + at);
}
template <class T, class Weights>
BN_INLINE NativeDouble vector_of_first_where(const T* p, const Weights& weights, int k, std::int64_t n) {
  const NativeDouble x = load_vector_of_first<double>(p, k, n, T(0));
  return weight_vector_of_first<double>(weights, k, n) != 0 ? x : NativeDouble{};
}

}  // namespace
}  // namespace batchnorm::kernels
