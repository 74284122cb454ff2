// Forward: moments -> coefficients -> normalize, or parts of that.
#include "coefficients.hpp"
#include "passes.hpp"
#include "settle.hpp"
#include "traverse.hpp"

namespace batchnorm {
namespace {

using kernels::Affine;
using kernels::AffineColumns;
using kernels::ColumnSums;
using kernels::Rows;
using kernels::Runs;
using kernels::Sums;

template <class T>
class ForwardPass {
 public:
  using Table = CoefficientTable<T, Affine>;

  bool reduces, applies;
  Plan plan;
  const kernels::Kernels<T>& kernels;
  const T* x;
  T* y;
  Moments* saved;         // where the pass reduces
  GivenStatistics given;  // where it does not
  ChannelValues gamma, beta;
  double eps;
  Table* coefficients;  // where it applies

  void sum_runs(std::int64_t offset, const Runs& runs, std::int64_t, Sums* out) const {
    kernels.runs_moments(x + offset, runs, out);
  }
  void sum_rows(std::int64_t offset, std::int64_t, const Rows& rows, const ColumnSums& out) const {
    kernels.rows_moments(x + offset, rows, out);
  }
  void add_blocks(const ColumnSums& first, std::int64_t count, std::int64_t stride, std::int64_t columns,
                  const ColumnSums& total) const {
    kernels.add_blocks(first, count, stride, columns, total);
  }

  void finish(Range channels, const Sums* totals) {
    if (reduces && totals != nullptr) settle(plan, kernels, x, channels, totals, saved);
    for (std::int64_t c = channels.begin; c < channels.end; ++c) {
      if (reduces && totals == nullptr) saved[c] = Moments{};  // an empty batch
      if (applies) coefficients->set(c, coefficients_of(c));
    }
  }
  void lay_out(Range channels) { coefficients->lay_out(channels); }

  void apply_runs(std::int64_t offset, const Runs& runs, std::int64_t c) const {
    const T* from = x + offset;
    T* to = y + offset;
    const auto narrow = plan.around_cache && x != y ? kernels.runs_normalize_around_cache : kernels.runs_normalize;
    if (!coefficients->any_wide()) return narrow(from, to, runs, coefficients->narrow(c));
    for (const std::int64_t end = c + runs.channels; c < end; ++c, from += runs.length, to += runs.length) {
      const Runs one{runs.length, runs.count, runs.stride};
      if (coefficients->is_wide(c)) {
        kernels.runs_normalize_wide(from, to, one, coefficients->wide(c));
      } else {
        narrow(from, to, one, coefficients->narrow(c));
      }
    }
  }
  void apply_rows(std::int64_t offset, const Rows& rows) const {
    const Table& k = *coefficients;
    const AffineColumns<T> narrow{k.narrow_columns(0), k.narrow_columns(1), k.narrow_columns(2)};
    if (k.any_wide()) {
      const AffineColumns<double> wide{k.wide_columns(0), k.wide_columns(1), k.wide_columns(2)};
      kernels.rows_normalize_mixed(x + offset, y + offset, rows, narrow, {k.mask(), wide});
    } else if (plan.around_cache && x != y && rows.columns == plan.apply_rows.columns) {
      kernels.rows_normalize_around_cache(x + offset, y + offset, rows, narrow);
    } else {
      kernels.rows_normalize(x + offset, y + offset, rows, narrow);
    }
  }

 private:
  [[nodiscard]] ForwardCoefficients<T> coefficients_of(std::int64_t c) const {
    const double g = gamma.value_or(c, 1), b = beta.value_or(c, 0);
    if (reduces) return forward_coefficients<T>(saved[c].mean, saved[c].mean_lo, rstd_for<T>(saved[c], eps), g, b);
    if (given.moments != nullptr) {
      const Moments& m = given.moments[c];
      return forward_coefficients<T>(m.mean, m.mean_lo, rstd_for<T>(m, eps), g, b);
    }
    const DoubleDouble rstd = rstd_for<T>(given.var[c], eps);
    if (given.only_scale) return frozen_backward_coefficients<T>(rstd, g);
    return forward_coefficients<T>(given.mean[c], 0, rstd, g, b);
  }
};

// Moments alone; callers add what else they want.
template <class T>
ForwardPass<T> pass_over(const T* x) {
  return {.reduces = true,
          .applies = false,
          .plan = {},
          .kernels = active_implementation().table->of<T>(),
          .x = x,
          .y = nullptr,
          .saved = nullptr,
          .given = {},
          .gamma = {},
          .beta = {},
          .eps = 0,
          .coefficients = nullptr};
}

template <class T>
void run(ForwardPass<T> pass, const Problem& problem, int threads) {
  using Table = typename ForwardPass<T>::Table;
  const Work work{pass.reduces, pass.applies, pass.applies ? 2 : 1, sizeof(T)};
  pass.plan = make_plan(problem, work, machine(), is_serial(problem, work) ? 1 : available_threads(threads));
  Workspace workspace((pass.applies ? Table::bytes(pass.plan) : 0) +
                      Traversal<ForwardPass<T>>::bytes(pass.plan, pass.reduces));
  Traversal<ForwardPass<T>> traversal(pass.plan, pass, workspace);
  if (!pass.applies) return traversal.run();
  Table coefficients(pass.plan, workspace);
  pass.coefficients = &coefficients;
  traversal.run();
}

}  // namespace

template <class T>
void run_moments(const T* x, const Problem& problem, Moments* out, int threads) {
  ForwardPass<T> pass = pass_over(x);
  pass.saved = out;
  run(pass, problem, threads);
}

template <class T>
void run_batch_norm(const T* x, const Problem& problem, ChannelValues gamma, ChannelValues beta, double eps, T* y,
                    Moments* saved, int threads) {
  ForwardPass<T> pass = pass_over(x);
  pass.applies = true;
  pass.y = y;
  pass.saved = saved;
  pass.gamma = gamma;
  pass.beta = beta;
  pass.eps = eps;
  run(pass, problem, threads);
}

template <class T>
void run_normalize(const T* x, const Problem& problem, const GivenStatistics& given, ChannelValues gamma,
                   ChannelValues beta, double eps, T* y, int threads) {
  ForwardPass<T> pass = pass_over(x);
  pass.reduces = false;
  pass.applies = true;
  pass.y = y;
  pass.given = given;
  pass.gamma = gamma;
  pass.beta = beta;
  pass.eps = eps;
  run(pass, problem, threads);
}

#define BN_INSTANTIATE(T)                                                                                             \
  template void run_moments(const T*, const Problem&, Moments*, int);                                                 \
  template void run_batch_norm(const T*, const Problem&, ChannelValues, ChannelValues, double, T*, Moments*, int);    \
  template void run_normalize(const T*, const Problem&, const GivenStatistics&, ChannelValues, ChannelValues, double, \
                              T*, int);
BN_INSTANTIATE(float)
BN_INSTANTIATE(double)
#undef BN_INSTANTIATE

}  // namespace batchnorm
