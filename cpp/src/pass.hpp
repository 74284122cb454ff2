// What the passes of forward and backward have in common.
#pragma once

#include "coefficients.hpp"
#include "passes.hpp"
#include "staged.hpp"
#include "traverse.hpp"

namespace batchnorm {

// Whether positions are rows of the kernels, one weight each.
template <class T>
bool has_weight_a_row(const Positions<T>& positions, const kernels::Rows& rows) {
  return positions && positions.are_rows() && rows.stride == positions.problem.channels;
}

// Of rows with a weight each: apply(offset, rows) writes `output` where one counts, which elsewhere is 0 or `input`.
// All rows are applied, and those over again that do not count: sooner than a call for every few rows. Not where that
// would write over the input that is kept.
template <class T, class Apply>
void apply_where_rows_count(const Positions<T>& positions, Padding padding, const T* input, T* output,
                            std::int64_t offset, const kernels::Rows& rows, const Apply& apply) {
  const auto* w = positions.of_row(offset);
  const bool is_kept = padding == Padding::keep && input == output;
  if (!is_kept) apply(offset, rows);
  for (std::int64_t r = 0, end = 0; r < rows.count; r = end) {
    const bool counts = w[r] != 0;
    while (end < rows.count && (w[end] != 0) == counts) ++end;
    const std::int64_t at = offset + r * rows.stride, n = (end - r) * rows.columns;
    if (counts && is_kept) {
      kernels::Rows some = rows;
      some.count = end - r;
      apply(at, some);
    } else if (!counts && padding == Padding::zero) {
      std::fill_n(output + at, n, T(0));
    } else if (!counts && !is_kept) {
      std::copy_n(input + at, n, output + at);
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
