// The positions of a tensor that count, and how much: one weight each, 0 for none.
#pragma once

#include <algorithm>
#include <span>

#include "batchnorm/call.hpp"
#include "double_double.hpp"
#include "kernels/table.hpp"
#include "plan.hpp"

namespace batchnorm {

// What is known of weights before any tensor is looked at.
struct WeightSummary {
  DoubleDouble total;        // their sum
  std::int64_t counted = 0;  // those above 0
  bool is_mask = true;       // whether all are 0 or 1
  double least = 1;          // of those above 0, where not all are 0 or 1
  std::int64_t bad = -1;     // the first that is negative, infinite or NaN; -1: none
};

template <class W>
WeightSummary summarize(std::span<const W> weights, int threads);

// The weights of a tensor, as pieces of it want them; none where all positions count alike.
template <class T>
struct Positions {
  using W = kernels::WeightOf<T>;
  const W* values = nullptr;
  bool is_mask = true;
  Problem problem = {};

  explicit operator bool() const { return values != nullptr; }
  // Of the planar piece at `offset`, whose first channel is c: those of its first run; `inner` further on, of the next.
  [[nodiscard]] const W* of_runs(std::int64_t offset, std::int64_t c) const {
    const std::int64_t inner = problem.inner, slab = problem.channels * inner, o = offset / slab;
    return values + o * inner + (offset - o * slab - c * inner);
  }
  // Of the row of the tensor that begins at `offset`.
  [[nodiscard]] const W* of_row(std::int64_t offset) const {
    return values + offset / (problem.channels * problem.inner) * problem.inner;
  }
  // Whether each row of a block, `stride` values apart, is a position: one weight for all of its columns.
  [[nodiscard]] bool are_rows(std::int64_t stride) const {
    return values != nullptr && problem.inner == 1 && stride == problem.channels;
  }
};

// apply(offset, rows) for the rows that count.
template <class T, class Apply>
void apply_counted_rows(const Positions<T>& positions, std::int64_t offset, const kernels::Rows& all,
                        const Apply& apply) {
  const auto* w = positions.of_row(offset);
  for (std::int64_t r = 0, end = 0; r < all.count; r = end) {
    while (end < all.count && (w[end] != 0) == (w[r] != 0)) ++end;
    kernels::Rows rows = all;
    rows.count = end - r;
    if (w[r] != 0) apply(offset + r * all.stride, rows);
  }
}
// Of rows with a weight each: apply(offset, rows) writes `output` where one counts, which elsewhere is 0 or `input`.
// All rows are applied, some at a time, and those over again that do not count: sooner than a call for every few rows.
// Not where that would write over the input that is kept.
template <class T, class Apply>
void apply_where_rows_count(const Positions<T>& positions, Padding padding, const T* input, T* output,
                            std::int64_t offset, const kernels::Rows& all, const Apply& apply) {
  constexpr std::int64_t kMostRows = 256, kValues = 4096;  // written over while they are in the first-level cache
  if (padding == Padding::keep && input == output) return apply_counted_rows(positions, offset, all, apply);
  const std::int64_t at_once = std::clamp<std::int64_t>(kValues / all.columns, 4, kMostRows);
  for (std::int64_t r = 0; r < all.count; r += at_once, offset += at_once * all.stride) {
    kernels::Rows rows = all;
    rows.count = std::min(at_once, all.count - r);
    apply(offset, rows);
    // Without a branch for each row, which nobody can foresee.
    std::int64_t others[kMostRows], count = 0;
    const auto* w = positions.of_row(offset);
    for (std::int64_t k = 0; k < rows.count; ++k) {
      others[count] = offset + k * rows.stride;
      count += w[k] == 0 ? 1 : 0;
    }
    for (std::int64_t k = 0; k < count; ++k) {
      T* to = output + others[k];
      padding == Padding::zero ? std::fill_n(to, rows.columns, T(0)) : std::copy_n(input + others[k], rows.columns, to);
    }
  }
}

}  // namespace batchnorm
