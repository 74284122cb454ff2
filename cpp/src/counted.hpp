// The positions of a tensor that count, and how much: one weight each, 0 for none.
#pragma once

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

}  // namespace batchnorm
