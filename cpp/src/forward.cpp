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
  using A = Arithmetic<T>;  // what coefficients are in
  using Table = CoefficientTable<A, Affine>;

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
    if (reduces && totals != nullptr) {
      settle<T>(plan, {kernels, x, static_cast<double>(plan.problem.count())}, channels, totals, saved);
    }
    if (reduces && totals == nullptr) std::fill(saved + channels.begin, saved + channels.end, Moments{});  // no values
    if (!applies) return;
    for (std::int64_t begin = channels.begin; begin < channels.end; begin += kTogether) {
      set_coefficients({begin, std::min(begin + kTogether, channels.end)});
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
    const AffineColumns<A> narrow{k.narrow_columns(0), k.narrow_columns(1), k.narrow_columns(2)};
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
  // Of at most kTogether channels.
  void set_coefficients(Range channels) const {
    const std::int64_t first = channels.begin, count = channels.end - channels.begin;
    double g[kTogether], b[kTogether];
    read_channels(gamma, channels, 1, g);
    read_channels(beta, channels, 0, b);
    if (reduces || given.moments != nullptr) {
      const Moments* moments = (reduces ? saved : given.moments) + first;
      return for_channels<A>(count, [&]<class V>(std::int64_t i) {
        const auto m = MomentsOf<V>::at(moments + i);
        coefficients->set(first + i, forward_coefficients<A, V>(m.mean, m.mean_lo, rstd_for<A>(m, eps),
                                                                gather<V>(g + i), gather<V>(b + i)));
      });
    }
    double mean[kTogether], var[kTogether];
    read_channels(given.mean, channels, 0, mean);
    read_channels(given.var, channels, 0, var);
    for_channels<A>(count, [&]<class V>(std::int64_t i) {
      const TwoParts<V> rstd = rstd_for<A>(gather<V>(var + i), eps);
      const V gamma_i = gather<V>(g + i);
      coefficients->set(first + i, given.only_scale ? frozen_backward_coefficients<A>(rstd, gamma_i)
                                                    : forward_coefficients<A, V>(gather<V>(mean + i), V{}, rstd,
                                                                                 gamma_i, gather<V>(b + i)));
    });
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
BN_INSTANTIATE(Float16)
BN_INSTANTIATE(BFloat16)
BN_INSTANTIATE(float)
BN_INSTANTIATE(double)
#undef BN_INSTANTIATE

}  // namespace batchnorm
