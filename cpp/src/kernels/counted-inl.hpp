// Sums over the rows that count: those with a weight that is not 0. Rows with a vector of their own are chosen. Else
// what counts is copied, some values at a time, with 0 in the place of the rest, and the copies are summed as without
// weights.
//
// So the weights are looked at once for all inputs, and the loops that sum are as tight as without: where each vector
// was chosen on its way into the sums, moments of rows of 8 x 10 columns took 4.0 ns for 16 values, now 3.4, and
// grad_sums 6.8, now 5.8 (Zen 3, second-level cache; 1.4 and 3.0 without a mask). Planar runs of 49 to 256 values,
// whose weights are those of many channels, are not copied: that took 1.0 to 1.3 times as long.
#pragma once

#include "kernels/accumulate-inl.hpp"

namespace batchnorm::kernels {
namespace {

// Values of one input that are copied at a time: half of a small first-level cache for two of them.
constexpr std::int64_t kCopied = 4096;
// From the copy of an input to that of the next: the last vector of a row may be written whole.
constexpr std::int64_t kNextCopy = kCopied + kLanes;

// 16 (or n < 16) values of each input where the weight is not 0, else 0.
template <class A, class... Input>
BN_INLINE void copy_counted(std::int64_t n, const Lanes<A>& weights, A* to, const Input*... input) {
  const Lanes<A> zero = broadcast(A(0));
  ((store(to, where(weights, load_upto<A>(input, n, A(0)), zero)), to += kNextCopy), ...);
}
template <int kInputs, class A>
struct Copies {
  A values[kInputs * kNextCopy];
};

// Rows that count, where each row of the tensor has a weight of its own (has_ones): the others add nothing and are not
// visited. What is given is the same, bit for bit.
struct ChosenRows {
  std::int64_t place[kRowsPerVisit], count = 0;

  BN_INLINE void choose(std::int64_t where) { place[count++] = where; }
  BN_INLINE std::int64_t operator()(std::int64_t r) const { return place[r]; }
};
template <class T, class Make, class W, class... Input>
BN_INLINE void sum_chosen_rows(Make make, Rows rows, const ColumnSums& out, const RowWeights<W>& weights,
                               const Input*... input) {
  const RowsAhead ahead = rows_ahead<T>(rows);
  for (std::int64_t r = 0; r < rows.count; r += kRowsPerVisit) {
    const std::int64_t visit = rows.count - r < kRowsPerVisit ? rows.count - r : kRowsPerVisit, at = r * rows.stride;
    for (std::int64_t t = 0; t < weights.repeat; ++t) {
      ChosenRows chosen;
      for (std::int64_t k = 0; k < visit; ++k) {
        if (weights.values[(r + k) * weights.repeat + t] != 0) chosen.choose(k * rows.stride);
      }
      if (chosen.count == 0 && r > 0) continue;
      const std::int64_t end = weights.repeat == 1 ? rows.columns : (t + 1) * weights.channels;
      for (std::int64_t c = t * weights.channels; c < end; c += kLanes) {
        const std::int64_t n = end - c < kLanes ? end - c : kLanes;
        visit_columns(make(c, n), r == 0, chosen.count, chosen, ahead, c, n, out, (input + at + c)...);
      }
    }
  }
}

// Copies of rows, which are near: nothing is fetched.
template <class T>
struct NearRows {
  const T* values;
};
template <class T>
BN_INLINE NearRows<T> columns_of(const NearRows<T>& rows, std::int64_t c) {
  return {rows.values + c};
}
template <class T, class Places>
BN_INLINE const T* row_of(const NearRows<T>& columns, std::int64_t r, const Places& place) {
  return columns.values + place(r);
}
template <class T>
BN_INLINE void fetch_row(const NearRows<T>&, std::int64_t) {}

// `count` rows from r on, of the columns [c, c + width).
struct SomeOfRows {
  std::int64_t r, count, c, width;
};
template <class Weights, class A, class... Input>
BN_NOINLINE void copy_counted_rows(const Weights& weights, const SomeOfRows& some, std::int64_t stride,
                                   std::int64_t ahead, A* to, const Input*... input) {
  for (std::int64_t k = 0; k < some.count; ++k) {
    auto of_row = weights.row(some.r + k, some.c);
    std::int64_t c = 0;
    for (; c + kLanes <= some.width; c += kLanes) {
      (fetch_lanes<Fetch::kFar>(input + c + ahead), ...);
      copy_counted(kLanes, of_row.next(), to + c, (input + c)...);
    }
    if (const std::int64_t n = some.width - c; n > 0) copy_counted(n, of_row.next(), to + c, (input + c)...);
    to += some.width;
    ((input += stride), ...);
  }
}

// f(SomeOfRows, their place in the tensor) for eight rows at a time, and so many of their columns that copies hold
// them.
template <class F>
BN_INLINE void in_parts(const Rows& rows, const F& f) {
  constexpr std::int64_t kWidth = kCopied / kRowsPerVisit;
  for (std::int64_t r = 0; r < rows.count; r += kRowsPerVisit) {
    const std::int64_t count = rows.count - r < kRowsPerVisit ? rows.count - r : kRowsPerVisit;
    for (std::int64_t c = 0; c < rows.columns; c += kWidth) {
      f(SomeOfRows{r, count, c, rows.columns - c < kWidth ? rows.columns - c : kWidth}, r * rows.stride + c);
    }
  }
}
BN_INLINE ColumnSums columns_from(const ColumnSums& sums, std::int64_t c) {
  return {sums.first + c, sums.first_lo + c, sums.second + c, sums.second_lo + c};
}

template <class T, class Make, class Weights, class... Input>
BN_INLINE void sum_copied_rows(Make make, const Rows& rows, const ColumnSums& out, const Weights& weights,
                               const Input*... input) {
  using A = Arithmetic<T>;
  constexpr std::int64_t kAhead = kFarBytes / static_cast<std::int64_t>(sizeof(T));
  const RowsAhead nothing({.count = 0, .columns = 0, .stride = 0}, 0, 1);
  Copies<sizeof...(Input), A> copies;
  const NearRows<A> first{copies.values}, second{copies.values + kNextCopy};
  in_parts(rows, [&](const SomeOfRows& some, std::int64_t at) __attribute__((always_inline)) {
    copy_counted_rows(weights, some, rows.stride, kAhead, copies.values, (input + at)...);
    const auto make_from = [&](std::int64_t c, std::int64_t n) { return make(some.c + c, n); };
    const ColumnSums sums = columns_from(out, some.c);
    if constexpr (sizeof...(Input) == 1) {
      visit_rows(make_from, some.r == 0, some.count, some.width, some.width, nothing, sums, first);
    } else {
      visit_rows(make_from, some.r == 0, some.count, some.width, some.width, nothing, sums, first, second);
    }
  });
}
// make<V>(c, n): the empty pair of the n columns from c on, which adds values of V.
template <class T, class Make, class... Input>
BN_INLINE void sum_counted_rows(Make make, const Rows& rows, const ColumnSums& out, const RowWeights<WeightOf<T>>& w,
                                const Input*... input) {
  using W = WeightOf<T>;
  const auto of = [&]<class V>() {
    return [make](std::int64_t c, std::int64_t n) { return make.template operator()<V>(c, n); };
  };
  if (has_ones(w)) return sum_chosen_rows<T>(of.template operator()<T>(), rows, out, w, input...);
  const auto of_copies = of.template operator()<Arithmetic<T>>();
  if (is_numbered(w)) {
    return sum_copied_rows<T>(of_copies, rows, out, NumberedWeights<W>(w, rows.count, rows.columns), input...);
  }
  W laid_out[kMostLaidOut];
  sum_copied_rows<T>(of_copies, rows, out, SeveralEach<W>{w, laid_out}, input...);
}

}  // namespace
}  // namespace batchnorm::kernels
