// What the passes of forward and backward have in common: the run of one call, and how pieces with coefficients outside
// float32's range are taken apart.
//
// Calls say which kernels a pass uses, on which tensors. They give
//   const kernels::Kernels<T>& kernels   for what does not depend on the values that count
//   void prepare(Plan&)                  once, before anything else is called, and before memory is taken
//   void begin()                         if there is anything to write before the passes
//   int streams()                        tensors that a pass which applies goes through
//   and what forward_pass.hpp and backward_pass.hpp ask for.
#pragma once

#include "coefficients.hpp"
#include "passes.hpp"
#include "traverse.hpp"

namespace batchnorm {

// narrow(offset, runs, c) applies the coefficients of the channels from c on; wide(...) those of one channel in
// float64.
template <class Table, class Narrow, class Wide>
void apply_by_width(const Table& coefficients, std::int64_t offset, const kernels::Runs& runs, std::int64_t c,
                    const Narrow& narrow, const Wide& wide) {
  if (!coefficients.any_wide()) return narrow(offset, runs, c);
  for (std::int64_t i = 0; i < runs.channels; ++i) {
    const kernels::Runs one{runs.length, runs.count, runs.stride};
    if (coefficients.is_wide(c + i)) {
      wide(offset + i * runs.length, one, c + i);
    } else {
      narrow(offset + i * runs.length, one, c + i);
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

template <class Pass>
void run(Pass pass, const Problem& problem, int threads, const PartOf& part = {}) {
  using Table = typename Pass::Table;
  const Plan& plan = pass.plan;
  const Work work{pass.reduces, pass.applies, pass.calls.streams() - (pass.applies ? 0 : 1), Pass::kItemSize,
                  part.size};
  pass.plan = make_plan(problem, work, machine(), is_serial(problem, work) ? 1 : available_threads(threads));
  pass.calls.prepare(pass.plan);
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
  if constexpr (requires { pass.calls.begin(); }) pass.calls.begin();
  if (!pass.applies) return traversal.run();
  Table coefficients(plan, workspace);
  pass.coefficients = &coefficients;
  traversal.run();
}

}  // namespace batchnorm
