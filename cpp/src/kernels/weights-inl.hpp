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

// For sums, the weights of a visit as several channels want them: in groups of 16, as masks of float64 (all bits, or
// none where the weight is 0), followed where kArrays is 2 by the weights in float64. Choosing a value is then one
// operation on what is in the first-level cache: masked training of 32 x 512 x 49 values took 1.4 times as long as
// without a mask while each vector was compared anew, 1.2 times so (Zen 3).
constexpr std::int64_t kMostExpanded = 1024;  // values of a run
template <int kArrays, class W>
struct ExpandedRuns {
  const RunWeights<W>& given;
  double* memory;  // kArrays*kMostExpandedMemory
};
constexpr std::int64_t kMostExpandedMemory =
    kMostExpanded + 4 * kLanes;  // a visit of four runs shorter than 256, or one
template <int kArrays>
struct ExpandedVisit {
  std::int64_t first, stride;
  const double* lanes;
};
template <int kArrays>
struct ExpandedLanes {
  const double* lanes;
  [[nodiscard]] BN_INLINE NativeDouble mask(int k) const { return load_vector<double>(lanes, k); }
  [[nodiscard]] BN_INLINE NativeDouble weight(int k) const { return load_vector<double>(lanes + kLanes, k); }
};
template <int kArrays>
BN_INLINE ExpandedLanes<kArrays> operator+(const ExpandedLanes<kArrays>& run, std::int64_t i) {
  return {run.lanes + kArrays * i};
}
template <Fetch kWhere, int kArrays>
BN_INLINE void fetch_lanes(const ExpandedLanes<kArrays>&) {}  // few, and near

template <int kArrays, class W>
BN_NOINLINE void expand_run(const W* weights, std::int64_t length, double* to) {
  for (std::int64_t i = 0; i < length; i += kLanes, to += kArrays * kLanes) {
    const Lanes<double> lanes = load_upto<double>(weights + i, length - i, W(0));
    BN_UNROLL for (int k = 0; k < Lanes<double>::kVectors; ++k) {
      const auto mask = lanes.v[k] != 0;
      __builtin_memcpy(to + k * Lanes<double>::kWidth, &mask, sizeof mask);
    }
    if constexpr (kArrays == 2) store(to + kLanes, lanes);
  }
}
template <int kArrays, class W>
BN_INLINE ExpandedVisit<kArrays> visit_of(const ExpandedRuns<kArrays, W>& runs_of_weights, const Runs& runs,
                                          std::int64_t k, std::int64_t count) {
  const RunWeights<W>& w = runs_of_weights.given;
  const std::int64_t stride = kArrays * ((runs.length + kLanes - 1) / kLanes * kLanes);
  for (std::int64_t v = 0; v < count; ++v) {
    expand_run<kArrays>(w.values + (k + v) * w.stride, runs.length, runs_of_weights.memory + v * stride);
  }
  return {k, stride, runs_of_weights.memory};
}
template <int kArrays>
BN_INLINE ExpandedLanes<kArrays> run_at(const ExpandedVisit<kArrays>& visit, std::int64_t, std::int64_t k) {
  return {visit.lanes + (k - visit.first) * visit.stride};
}
// f(weights) for sums of these runs.
template <int kArrays, class W, class F>
BN_INLINE void with_weights_of_sums(const RunWeights<W>& w, const Runs& runs, const F& f) {
  if (runs.channels == 1 || runs.length > kMostExpanded) return f(w);
  double memory[kArrays * kMostExpandedMemory];
  f(ExpandedRuns<kArrays, W>{w, memory});
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
//
// A row of the tensor has one weight or several (inner > 1), and rows may stand side by side. Three cases: one weight
// for all columns of a vector (has_ones), one weight a row where vectors hold several rows (is_numbered), several.

template <class W>
BN_INLINE bool has_ones(const RowWeights<W>& w) {
  return w.inner == 1 && (w.repeat == 1 || w.channels % kLanes == 0);
}
template <class W>
BN_INLINE bool is_numbered(const RowWeights<W>& w) {
  return w.inner == 1 && !has_ones(w);
}

// Several: rows are laid out, so that the weights of 16 columns are one load. A row of the tensor has its weights over
// and over, at least 16 behind any place of the first; rows side by side have one per column.
constexpr std::int64_t kMostLaidOut = kMostWeightedColumns + kLanes;

// Copies of `count` weights, `times` of them side by side. Each copy may write up to 16 values, which the next
// overwrites.
template <class W>
BN_INLINE void repeat_weights(const W* from, std::int64_t count, std::int64_t times, W* to) {
  const Lanes<W> lanes = load_upto<W>(from, count, W(0));
  for (std::int64_t k = 0; k < times; ++k) store(to + k * count, lanes);
}
template <class W>
BN_INLINE void lay_out_row(const RowWeights<W>& w, std::int64_t r, W* to) {
  const W* from = w.values + r * w.repeat * w.inner;
  // Runs of 16 values or shorter (plan.cpp) take two vectors and what is written too much.
  if (w.repeat == 1) return repeat_weights(from, w.inner, 2 * kLanes / w.inner + 1, to);
  for (std::int64_t t = 0; t < w.repeat; ++t) {
    repeat_weights(from + t * w.inner, w.inner, w.channels, to + t * w.channels * w.inner);
  }
}

// For sums: up to eight rows with one weight or several.
template <class W>
struct WeightedRows {
  static constexpr std::int64_t kMostRows = 8;

  const W* ones;  // or null: of the first row, `repeat` further on those of the next
  std::int64_t repeat, channels, period, first_column, stride;
  W lanes[kMostRows * kMostLaidOut];
};
template <class W>
BN_INLINE WeightedRows<W> rows_of(const RowWeights<W>& w, std::int64_t r, std::int64_t visit, std::int64_t,
                                  std::int64_t) {
  WeightedRows<W> rows;
  rows.first_column = w.first_column;
  rows.repeat = w.repeat;
  rows.channels = w.channels;
  rows.ones = has_ones(w) ? w.values + r * w.repeat : nullptr;
  rows.period = w.repeat == 1 ? w.inner : 0;
  rows.stride = w.repeat == 1 ? 4 * kLanes : w.repeat * w.channels * w.inner + kLanes;
  for (std::int64_t k = 0; rows.ones == nullptr && k < visit; ++k) lay_out_row(w, r + k, rows.lanes + k * rows.stride);
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

// For walks along row r from column c on: next() are the weights of the next 16 columns.
template <class W>
struct OneWeight {
  W value;
  [[nodiscard]] BN_INLINE OneWeight next() const { return *this; }
};
template <class W>
struct OneEach {
  const W* values;
  [[nodiscard]] BN_INLINE OneWeight<W> row(std::int64_t r) const { return {values[r]}; }
};
template <class W>
struct SeveralEach {
  const RowWeights<W>& weights;
  W* lanes;  // kMostLaidOut values; of the last row that was asked for

  struct Row {
    const W* lanes;
    std::int64_t step, period, place;

    BN_INLINE Lanes<W> next() {
      const Lanes<W> r = load_as<W>(lanes + place);
      place += step;
      if (place >= period) place -= period;
      return r;
    }
  };
  [[nodiscard]] BN_INLINE Row row(std::int64_t r, std::int64_t c = 0) const {
    lay_out_row(weights, r, lanes);
    if (weights.repeat > 1) return {lanes, kLanes, kMostLaidOut, c};
    return {lanes, kLanes % weights.inner, weights.inner, (weights.first_column + c) % weights.inner};
  }
};

// Column e of a row gets the weight of its row e / channels. Those of a vector of columns lie within as many weights,
// from which they are permuted; by which numbers is the same for all rows. (When it was found anew for each visit,
// masked training of 65536 rows of 3 channels took 2.5 times as long as without a mask.)
template <class W>
class NumberedWeights {
  using Native = typename Lanes<W>::Native;
  using One = std::conditional_t<sizeof(W) == sizeof(float), std::int32_t, std::int64_t>;
  typedef One Numbers __attribute__((vector_size(sizeof(Native))));
  static constexpr int kWidth = Lanes<W>::kWidth, kVectors = Lanes<W>::kVectors;

 public:
  NumberedWeights(const RowWeights<W>& given, std::int64_t rows, std::int64_t columns)
      : values_(given.values), repeat_(given.repeat), first_copied_(rows - (kLanes + repeat_ - 1) / repeat_) {
    if (first_copied_ < 0) first_copied_ = 0;
    for (std::int64_t k = first_copied_ * repeat_; k < rows * repeat_; ++k) {
      last_[k - first_copied_ * repeat_] = values_[k];
    }
    const auto channels = static_cast<std::int32_t>(given.channels);
    const W per_channel = W(1) / static_cast<W>(channels);
    Native half_past;  // lane l: l + 1/2, so that rounding cannot reach the next whole number
    for (int l = 0; l < kWidth; ++l) half_past[l] = static_cast<W>(l) + W(0.5);
    for (std::int32_t e = 0; e < columns; e += kLanes) {
      Columns& some = columns_[e / kLanes];
      for (std::int32_t k = 0; k < kVectors; ++k) {
        const std::int32_t first = (e + k * kWidth) / channels;
        const Native place = half_past + static_cast<W>(e + k * kWidth - first * channels);
        some.numbers[k] = __builtin_convertvector(place * per_channel, Numbers);
        some.first[k] = first;
      }
    }
  }

  struct Columns {  // 16, of any row
    Numbers numbers[kVectors];
    std::int64_t first[kVectors];
  };
  struct Row {
    const W* weights;
    const Columns* columns;

    BN_INLINE Lanes<W> next() {
      Lanes<W> r;
      BN_UNROLL for (int k = 0; k < kVectors; ++k) {
        r.v[k] = load_by_number(weights + columns->first[k], columns->numbers[k]);
      }
      ++columns;
      return r;
    }
  };
  [[nodiscard]] BN_INLINE Row row(std::int64_t r, std::int64_t c = 0) const {
    return {r < first_copied_ ? values_ + r * repeat_ : last_ + (r - first_copied_) * repeat_, columns_ + c / kLanes};
  }

 private:
  const W* values_;
  std::int64_t repeat_;
  std::int64_t first_copied_;  // since vectors reach behind the weights of a row, where there may be no memory
  W last_[8 * kLanes];         // of at most 32 rows of the tensor side by side (plan.cpp)
  Columns columns_[kMostWeightedColumns / kLanes];
};

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
BN_INLINE Lanes<A> weight_lanes(const Lanes<W>& w, std::int64_t) {
  if constexpr (sizeof(A) == sizeof(W)) {
    return w;
  } else {  // the rare columns in float64
    W some[kLanes];
    store(some, w);
    return load_as<A>(some);
  }
}
template <class A, class W>
BN_INLINE Lanes<A> weight_lanes(const OneWeight<W>& w, std::int64_t) {
  return broadcast(static_cast<A>(w.value));
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

// Values where the weight is not 0, else 0: vector k, of which alone memory is read.
template <class T, class W>
BN_INLINE NativeDouble vector_where(const T* p, const W* weights, int k) {
  return weight_vector<double>(weights, k) != 0 ? load_vector<double>(p, k) : NativeDouble{};
}
// The bits that both have.
BN_INLINE NativeDouble common_bits(NativeDouble a, NativeDouble b) {
  typedef std::int64_t Bits __attribute__((vector_size(sizeof(NativeDouble))));
  return (NativeDouble)((Bits)a & (Bits)b);
}
template <class T, int kArrays>
BN_INLINE NativeDouble vector_where(const T* p, const ExpandedLanes<kArrays>& weights, int k) {
  return common_bits(load_vector<double>(p, k), weights.mask(k));
}
// The same where 16 values are there, all of which may be read.
template <class T, class Weights>
BN_INLINE NativeDouble vector_of_all_where(const T* p, const Weights& weights, int k) {
  return vector_where(p, weights, k);
}
// float32 is chosen before it is widened: moments of runs took 1.9 times as long as without a mask the other way. What
// several vectors of float64 have in common is computed once.
BN_INLINE NativeDouble vector_of_all_where(const float* p, const float* weights, int k) {
  constexpr int kInAPart = Lanes<float>::kWidth / Lanes<double>::kWidth;
  const int part = k / kInAPart * Lanes<float>::kWidth;
  return widen_part(load_whole(weights + part) != 0 ? load_whole(p + part) : NativeFloat{}, k % kInAPart);
}
// Of n < 16.
template <class T, class W>
BN_INLINE NativeDouble vector_of_first_where(const T* p, const W* weights, int k, std::int64_t n) {
  const NativeDouble x = load_vector_of_first<double>(p, k, n, T(0));
  return weight_vector_of_first<double>(weights, k, n) != 0 ? x : NativeDouble{};
}
template <class T, int kArrays>
BN_INLINE NativeDouble vector_of_first_where(const T* p, const ExpandedLanes<kArrays>& weights, int k, std::int64_t n) {
  return common_bits(load_vector_of_first<double>(p, k, n, T(0)), weights.mask(k));
}

}  // namespace
}  // namespace batchnorm::kernels
