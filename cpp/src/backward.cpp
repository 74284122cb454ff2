// Backward: grad_sums -> coefficients -> grad_input, or parts of that; and the gradients of given statistics.
#include <vector>

#include "coefficients.hpp"
#include "passes.hpp"
#include "traverse.hpp"

namespace batchnorm {
namespace {

using kernels::ColumnSums;
using kernels::GradAffine;
using kernels::GradAffineColumns;
using kernels::Rows;
using kernels::Runs;
using kernels::Sums;

template <class T>
class BackwardPass {
 public:
  using Table = CoefficientTable<T, GradAffine>;

  bool reduces, applies;
  Plan plan;
  const kernels::Kernels<T>& kernels;
  const T *dy, *x;
  T* dx;  // where the pass applies
  const Moments* moments;
  const double* column_mean;  // interleaved and reduces: moments[...].mean, per column
  GradSums* sums_out;         // may be null
  const GradSums* sums_in;    // where it applies but does not reduce
  ChannelOutput dgamma, dbeta;
  ChannelValues gamma;
  double eps;
  Table* coefficients;  // where it applies

  void sum_runs(std::int64_t offset, Runs runs, std::int64_t c, Sums& out) const {
    kernels.runs_grad_sums(dy + offset, x + offset, runs, moments[c].mean, &out);
  }
  void sum_rows(std::int64_t offset, Rows rows, const ColumnSums& out) const {
    kernels.rows_grad_sums(dy + offset, x + offset, rows, column_mean, out);
  }

  void finish(Range channels, const Sums* totals) {
    for (std::int64_t c = channels.begin; c < channels.end; ++c) {
      GradSums s;
      if (!reduces) {
        s = sums_in[c];
      } else if (totals != nullptr) {  // else an empty batch, whose sums are 0
        const Sums& t = totals[c - channels.begin];
        s = {t.first, t.first_lo, t.second, t.second_lo};
      }
      const bool empty = moments[c].count == 0;
      const DoubleDouble r = empty ? DoubleDouble{} : rstd_of(moments[c], eps);
      if (sums_out != nullptr) sums_out[c] = s;
      dgamma.set(c, dgamma_of(moments[c], s, r));
      dbeta.set(c, dbeta_of(s));
      if (applies) (*coefficients)[c] = backward_coefficients<T>(moments[c], s, r, gamma.value_or(c, 1));
    }
  }
  void lay_out(const Team& team) { coefficients->lay_out(team); }

  void apply_runs(std::int64_t offset, Runs runs, std::int64_t c) const {
    const BackwardCoefficients<T>& k = (*coefficients)[c];
    if (k.is_wide) {
      kernels.runs_grad_input_wide(dy + offset, x + offset, dx + offset, runs, k.wide);
    } else if (plan.around_cache && dx != dy && dx != x) {
      kernels.runs_grad_input_around_cache(dy + offset, x + offset, dx + offset, runs, k.narrow);
    } else {
      kernels.runs_grad_input(dy + offset, x + offset, dx + offset, runs, k.narrow);
    }
  }
  void apply_rows(std::int64_t offset, Rows rows) const {
    const Table& k = *coefficients;
    const GradAffineColumns<T> narrow{k.narrow(0), k.narrow(1), k.narrow(2), k.narrow(3), k.narrow(4)};
    if (k.any_wide()) {
      kernels.rows_grad_input_mixed(dy + offset, x + offset, dx + offset, rows, narrow,
                                    {k.mask(), {k.wide(0), k.wide(1), k.wide(2), k.wide(3), k.wide(4)}});
    } else if (plan.around_cache && dx != dy && dx != x && rows.columns == plan.columns && is_line_aligned(dx)) {
      kernels.rows_grad_input_around_cache(dy + offset, x + offset, dx + offset, rows, narrow);
    } else {
      kernels.rows_grad_input(dy + offset, x + offset, dx + offset, rows, narrow);
    }
  }
};

// Interleaved tensors want the mean of every column.
std::size_t column_mean_bytes(const Plan& plan, bool reduces) {
  return reduces && !plan.planar() ? Workspace::bytes_for<double>(plan.columns) : 0;
}
const double* lay_out_means(const Plan& plan, const Moments* moments, Workspace& workspace) {
  auto* mean = workspace.take<double>(plan.columns);
  for (std::int64_t e = 0; e < plan.columns; ++e) {
    mean[e] = moments[(e / plan.problem.inner) % plan.problem.channels].mean;
  }
  return mean;
}

template <class T>
void run(BackwardPass<T> pass, const Problem& problem, int threads) {
  using Table = typename BackwardPass<T>::Table;
  const Plan& plan = pass.plan;
  pass.plan = make_plan(problem, {pass.reduces, pass.applies, pass.applies ? 3 : 2, sizeof(T)}, machine(),
                        available_threads(threads));
  Workspace workspace((pass.applies ? Table::bytes(plan) : 0) + column_mean_bytes(plan, pass.reduces) +
                      Traversal<BackwardPass<T>>::bytes(plan, pass.reduces));
  if (column_mean_bytes(plan, pass.reduces) > 0) pass.column_mean = lay_out_means(plan, pass.moments, workspace);
  Traversal<BackwardPass<T>> traversal(plan, pass, workspace);
  if (!pass.applies) return traversal.run();
  Table coefficients(plan, workspace);
  pass.coefficients = &coefficients;
  traversal.run();
}

template <class T>
BackwardPass<T> pass_over(const T* dy, const T* x, const Moments* moments) {
  return {.reduces = true,
          .applies = false,
          .plan = {},
          .kernels = active_implementation().table->of<T>(),
          .dy = dy,
          .x = x,
          .dx = nullptr,
          .moments = moments,
          .column_mean = nullptr,
          .sums_out = nullptr,
          .sums_in = nullptr,
          .dgamma = {},
          .dbeta = {},
          .gamma = {},
          .eps = 0,
          .coefficients = nullptr};
}

}  // namespace

template <class T>
void run_grad_sums(const T* dy, const T* x, const Problem& problem, const Moments* moments, GradSums* out,
                   int threads) {
  BackwardPass<T> pass = pass_over(dy, x, moments);
  pass.sums_out = out;
  run(pass, problem, threads);
}

template <class T>
void run_grad_input(const T* dy, const T* x, const Problem& problem, const Moments* moments, const GradSums* sums,
                    ChannelValues gamma, double eps, T* dx, int threads) {
  BackwardPass<T> pass = pass_over(dy, x, moments);
  pass.reduces = false;
  pass.applies = true;
  pass.dx = dx;
  pass.sums_in = sums;
  pass.gamma = gamma;
  pass.eps = eps;
  run(pass, problem, threads);
}

template <class T>
void run_batch_norm_backward(const T* dy, const T* x, const Problem& problem, const Moments* saved, ChannelValues gamma,
                             double eps, T* dx, ChannelOutput dgamma, ChannelOutput dbeta, int threads) {
  BackwardPass<T> pass = pass_over(dy, x, saved);
  pass.applies = dx != nullptr;
  pass.dx = dx;
  pass.dgamma = dgamma;
  pass.dbeta = dbeta;
  pass.gamma = gamma;
  pass.eps = eps;
  run(pass, problem, threads);
}

template <class T>
void run_normalize_backward(const T* dy, const T* x, const Problem& problem, const GivenStatistics& given,
                            ChannelValues gamma, double eps, T* dx, ChannelOutput dgamma, ChannelOutput dbeta,
                            int threads) {
  const auto channels = static_cast<std::size_t>(problem.channels);
  std::vector<Moments> moments(dgamma.wanted() || dbeta.wanted() ? channels : 0);
  std::vector<GradSums> sums(moments.size());
  if (!moments.empty()) {
    for (std::size_t c = 0; c < channels; ++c) moments[c].mean = given.mean[static_cast<std::int64_t>(c)];
    run_grad_sums(dy, dgamma.wanted() ? x : dy, problem, moments.data(), sums.data(), threads);
  }
  if (dx != nullptr) {
    GivenStatistics scale = given;
    scale.only_scale = true;
    run_normalize(dy, problem, scale, gamma, {}, eps, dx, threads);
  }
  parallel(1, [&](const Team&) {
    for (std::int64_t c = 0; c < static_cast<std::int64_t>(moments.size()); ++c) {
      const auto at = static_cast<std::size_t>(c);
      dgamma.set(c, dgamma_of(moments[at], sums[at], rstd_of(DoubleDouble{given.var[c], 0}, eps)));
      dbeta.set(c, dbeta_of(sums[at]));
    }
  });
}

#define BN_INSTANTIATE(T)                                                                                              \
  template void run_grad_sums(const T*, const T*, const Problem&, const Moments*, GradSums*, int);                     \
  template void run_grad_input(const T*, const T*, const Problem&, const Moments*, const GradSums*, ChannelValues,     \
                               double, T*, int);                                                                       \
  template void run_batch_norm_backward(const T*, const T*, const Problem&, const Moments*, ChannelValues, double, T*, \
                                        ChannelOutput, ChannelOutput, int);                                            \
  template void run_normalize_backward(const T*, const T*, const Problem&, const GivenStatistics&, ChannelValues,      \
                                       double, T*, ChannelOutput, ChannelOutput, int);
BN_INSTANTIATE(float)
BN_INSTANTIATE(double)
#undef BN_INSTANTIATE

}  // namespace batchnorm
