// The weights of a tensor's positions, as pieces of the tensor want them.
#pragma once

#include <span>

#include "batchnorm/weighted.hpp"
#include "kernels/table.hpp"
#include "plan.hpp"
#include "workspace.hpp"

namespace batchnorm {

// What is known of weights before any tensor is looked at.
struct WeightSummary {
  double total = 0;          // their sum, rounded once
  std::int64_t counted = 0;  // those above 0
  bool is_mask = true;       // whether all are 0 or 1
  std::int64_t bad = -1;     // the first that is negative, infinite or NaN; -1: none
};

template <class W>
WeightSummary summarize(std::span<const W> weights, int threads);

template <class T>
class TensorWeights {
 public:
  using W = kernels::WeightOf<T>;

  // Bytes of workspace that the plan takes.
  static std::size_t bytes(const Plan& plan) {
    return has_index(plan) ? Workspace::bytes_for<std::int32_t>(columns(plan)) : 0;
  }
  TensorWeights(const W* values, const WeightSummary& summary, const Plan& plan, Workspace& workspace)
      : values_(values), problem_(plan.problem), summary_(summary) {
    if (!has_index(plan)) return;
    const std::int64_t inner = problem_.inner, width = problem_.channels * inner;
    auto* index = workspace.take<std::int32_t>(columns(plan));
    for (std::int64_t e = 0; e < columns(plan); ++e) {
      index[e] = static_cast<std::int32_t>(e / width * inner + e % inner);
    }
    index_ = index;
  }

  [[nodiscard]] double total() const { return summary_.total; }
  [[nodiscard]] const kernels::WeightedKernels<T>::Moments& moments_of(const kernels::WeightedKernels<T>& k) const {
    return summary_.is_mask ? k.masked : k.weighted;
  }

  // Of the planar piece at `offset`, whose first channel is c.
  [[nodiscard]] kernels::RunWeights<W> of_runs(std::int64_t offset, std::int64_t c) const {
    const std::int64_t inner = problem_.inner, slab = problem_.channels * inner, o = offset / slab;
    return {values_ + o * inner + (offset - o * slab - c * inner), inner};
  }
  // Of the block of rows at `offset`, which begins at `column`.
  [[nodiscard]] kernels::RowWeights<W> of_rows(std::int64_t offset, std::int64_t column, std::int64_t stride) const {
    const std::int64_t inner = problem_.inner, width = problem_.channels * inner;
    const bool one_a_row = inner == 1 && stride == width;
    return {values_ + (offset - column) / width * inner, stride / width * inner, one_a_row ? nullptr : index_ + column};
  }
  [[nodiscard]] double at(std::int64_t position) const { return static_cast<double>(values_[position]); }

 private:
  static std::int64_t columns(const Plan& plan) {
    return plan.sum_rows.columns > plan.apply_rows.columns ? plan.sum_rows.columns : plan.apply_rows.columns;
  }
  static bool has_index(const Plan& plan) {
    return plan.path == Path::row_blocks &&
           (plan.problem.inner > 1 || plan.sum_rows.repeat > 1 || plan.apply_rows.repeat > 1);
  }

  const W* values_;
  Problem problem_;
  WeightSummary summary_;
  const std::int32_t* index_ = nullptr;
};

}  // namespace batchnorm
