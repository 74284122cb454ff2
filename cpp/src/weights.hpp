// The weights of a tensor's positions, as pieces of the tensor want them.
#pragma once

#include <span>

#include "batchnorm/weighted.hpp"
#include "channel_math.hpp"
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

template <class T>
class TensorWeights {
 public:
  using W = kernels::WeightOf<T>;

  TensorWeights(const W* values, const WeightSummary& summary) : values_(values), summary_(summary) {}
  // Before all that follows: the tensor, as the plan sees it.
  void belong_to(const Problem& problem) { problem_ = problem; }

  [[nodiscard]] DoubleDouble total() const { return summary_.total; }
  [[nodiscard]] WeightSizes sizes() const { return {summary_.total.hi, summary_.least}; }
  [[nodiscard]] bool is_mask() const { return summary_.is_mask; }
  [[nodiscard]] const kernels::WeightedKernels<T>::Moments& moments_of(const kernels::WeightedKernels<T>& k) const {
    return summary_.is_mask ? k.masked : k.weighted;
  }

  // Of the planar piece at `offset`, whose first channel is c.
  [[nodiscard]] kernels::RunWeights<W> of_runs(std::int64_t offset, std::int64_t c) const {
    const std::int64_t inner = problem_.inner, slab = problem_.channels * inner, o = offset / slab;
    return {values_ + o * inner + (offset - o * slab - c * inner), inner, summary_.is_mask};
  }
  // Of the block of rows at `offset`, which begins at `column`.
  [[nodiscard]] kernels::RowWeights<W> of_rows(std::int64_t offset, std::int64_t column, std::int64_t stride) const {
    const std::int64_t inner = problem_.inner, width = problem_.channels * inner;
    return {values_ + (offset - column) / width * inner,
            problem_.channels,
            inner,
            stride / width,
            column,
            summary_.is_mask};
  }
  [[nodiscard]] double at(std::int64_t position) const { return static_cast<double>(values_[position]); }

 private:
  const W* values_;
  Problem problem_{};
  WeightSummary summary_;
};

}  // namespace batchnorm
