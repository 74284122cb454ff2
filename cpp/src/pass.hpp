// What the passes of forward and backward have in common.
#pragma once

#include "coefficients.hpp"
#include "passes.hpp"
#include "staged.hpp"
#include "traverse.hpp"

namespace batchnorm {

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

// Interleaved tensors want the mean of every column, where gradients are summed.
inline const double* lay_out_means(const Plan& plan, const Moments* moments, Workspace& workspace) {
  auto* mean = workspace.take<double>(plan.sum_rows.columns);
  const std::int64_t columns = plan.sum_rows.columns, channels = plan.problem.channels;
  if (columns == channels) {  // no division for each
    for (std::int64_t c = 0; c < channels; ++c) mean[c] = moments[c].mean;
  } else {
    for (std::int64_t e = 0; e < columns; ++e) mean[e] = moments[e / plan.problem.inner % channels].mean;
  }
  return mean;
}

// A pass gives, beside what traverse.hpp asks for, prepare(), once it has its plan.
template <class Pass>
void run(Pass& pass, int streams, int threads, const PartOf& part) {
  using Table = typename Pass::Table;
  const Problem& problem = pass.call.problem;
  const Work work{pass.reduces,    pass.applies, streams - (pass.applies ? 0 : 1),
                  Pass::kItemSize, part.size,    part.is_turned};
  pass.plan = make_plan(problem, work, machine(), is_serial(problem, work) ? 1 : available_threads(threads));
  const Plan& plan = pass.plan;
  pass.prepare();
  constexpr bool kBackward = requires { pass.column_mean; };
  const bool wants_means = kBackward && pass.reduces && plan.path == Path::row_blocks;
  const std::size_t bytes = (pass.applies ? Table::bytes(plan) : 0) +
                            (wants_means ? Workspace::bytes_for<double>(plan.sum_rows.columns) : 0) +
                            Traversal<Pass>::bytes(plan, pass.reduces);
  if (part.needed != nullptr) {
    *part.needed = std::max(*part.needed, bytes);
    return;
  }
  PassWorkspace workspace(bytes, part.memory);
  if constexpr (kBackward) {
    if (wants_means) pass.column_mean = lay_out_means(plan, pass.moments, workspace);
  }
  Traversal<Pass> traversal(plan, pass, workspace);
  if constexpr (requires { pass.begin(); }) pass.begin();
  if (!pass.applies) return traversal.run();
  Table coefficients(plan, workspace);
  pass.coefficients = &coefficients;
  traversal.run();
}

}  // namespace batchnorm
