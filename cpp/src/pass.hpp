// What the passes of forward and backward have in common.
#pragma once

#include "coefficients.hpp"
#include "passes.hpp"
#include "staged.hpp"
#include "traverse.hpp"

namespace batchnorm {

// f(offset, rows, counts) for the rows of a block one below the other, as many at a time as count or do not; of
// positions that are rows.
template <class T, class F>
void for_rows_alike(const Positions<T>& positions, std::int64_t offset, const kernels::Rows& rows, const F& f) {
  const auto* w = positions.of_row(offset);
  for (std::int64_t r = 0, end = 0; r < rows.count; r = end) {
    const bool counts = w[r] != 0;
    while (end < rows.count && (w[end] != 0) == counts) ++end;
    kernels::Rows some = rows;
    some.count = end - r;
    f(offset + r * rows.stride, some, counts);
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
