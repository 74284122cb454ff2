// Backward: grad_sums -> coefficients -> grad_input, or parts of that; and the gradients of given statistics.
// Forward-mode is the same map of other coefficients, with a tangent in the place of dy.
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
  using A = Arithmetic<T>;  // what coefficients are in
  using Table = CoefficientTable<A, GradAffine>;

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
  bool forward_mode;    // dy is a tangent of x, and dx becomes that of y
  ChannelValues gamma_dot, beta_dot;

  void sum_runs(std::int64_t offset, const Runs& runs, std::int64_t c, Sums* out) const {
    double mean[kernels::kMostChannels];
    for (std::int64_t i = 0; i < runs.channels; ++i) mean[i] = moments[c + i].mean;
    kernels.runs_grad_sums(dy + offset, x + offset, runs, mean, out);
  }
  void sum_rows(std::int64_t offset, std::int64_t column, const Rows& rows, const ColumnSums& out) const {
    kernels.rows_grad_sums(dy + offset, x + offset, rows, column_mean + column, out);
  }
  void add_blocks(const ColumnSums& first, std::int64_t count, std::int64_t stride, std::int64_t columns,
                  const ColumnSums& total) const {
    kernels.add_blocks(first, count, stride, columns, total);
  }

  void finish(Range channels, const Sums* totals) {
    for (std::int64_t begin = channels.begin; begin < channels.end; begin += kTogether) {
      const Range some{begin, std::min(begin + kTogether, channels.end)};
      finish_some(some, totals == nullptr ? nullptr : totals + (begin - channels.begin));
    }
  }
  void lay_out(Range channels) { coefficients->lay_out(channels); }

  void apply_runs(std::int64_t offset, const Runs& runs, std::int64_t c) const {
    const T *from_dy = dy + offset, *from_x = x + offset;
    T* to = dx + offset;
    const auto narrow = goes_around_cache() ? kernels.runs_grad_input_around_cache : kernels.runs_grad_input;
    if (!coefficients->any_wide()) return narrow(from_dy, from_x, to, runs, coefficients->narrow(c));
    for (std::int64_t i = 0; i < runs.channels; ++i) {
      const std::int64_t at = i * runs.length;
      const Runs one{runs.length, runs.count, runs.stride};
      if (coefficients->is_wide(c + i)) {
        kernels.runs_grad_input_wide(from_dy + at, from_x + at, to + at, one, coefficients->wide(c + i));
      } else {
        narrow(from_dy + at, from_x + at, to + at, one, coefficients->narrow(c + i));
      }
    }
  }
  void apply_rows(std::int64_t offset, const Rows& rows) const {
    const T *from_dy = dy + offset, *from_x = x + offset;
    T* to = dx + offset;
    const Table& k = *coefficients;
    const GradAffineColumns<A> narrow{k.narrow_columns(0), k.narrow_columns(1), k.narrow_columns(2),
                                      k.narrow_columns(3), k.narrow_columns(4)};
    if (k.any_wide()) {
      const GradAffineColumns<double> wide{k.wide_columns(0), k.wide_columns(1), k.wide_columns(2), k.wide_columns(3),
                                           k.wide_columns(4)};
      kernels.rows_grad_input_mixed(from_dy, from_x, to, rows, narrow, {k.mask(), wide});
    } else if (goes_around_cache() && rows.columns == plan.apply_rows.columns) {
      kernels.rows_grad_input_around_cache(from_dy, from_x, to, rows, narrow);
    } else {
      kernels.rows_grad_input(from_dy, from_x, to, rows, narrow);
    }
  }

  [[nodiscard]] bool goes_around_cache() const { return plan.around_cache && dx != dy && dx != x; }

 private:
  // At most kTogether channels. First rstd alone: its divisions and roots take so long that they should overlap.
  void finish_some(Range channels, const Sums* totals) {
    double rstd_hi[kTogether], rstd_lo[kTogether];
    const std::int64_t first = channels.begin, count = channels.end - channels.begin;
    for_channels<A>(count, [&]<class V>(std::int64_t i) {
      const auto m = MomentsOf<V>::at(moments + first + i);
      const TwoParts<V> rstd = rstd_for<A>(m, eps);
      scatter<V>(m.count == 0 ? V{} : rstd.hi, rstd_hi + i);
      scatter<V>(m.count == 0 ? V{} : rstd.lo, rstd_lo + i);
    });
    for_channels<A>(count, [&]<class V>(std::int64_t i) {
      const auto m = MomentsOf<V>::at(moments + first + i);
      const GradSumsOf<V> s = sums_of<V>(first + i, totals == nullptr ? nullptr : totals + i);
      const TwoParts<V> rstd{gather<V>(rstd_hi + i), gather<V>(rstd_lo + i)};
      put(first + i, s, dgamma_of<A>(m, s, rstd));
      if (applies) coefficients->set(first + i, coefficients_of<V>(first + i, m, s, rstd));
    });
  }

  // Of the channels of a V from c on; `totals` are null for an empty batch, whose sums are 0.
  template <class V>
  [[nodiscard]] GradSumsOf<V> sums_of(std::int64_t c, const Sums* totals) const {
    if (!reduces) return GradSumsOf<V>::at(sums_in + c);
    if (totals == nullptr) return {};
    return {{gather<V>(totals, &Sums::first), gather<V>(totals, &Sums::first_lo)},
            {gather<V>(totals, &Sums::second), gather<V>(totals, &Sums::second_lo)}};
  }
  template <class V>
  [[nodiscard]] Coefficients<V, GradAffine> coefficients_of(std::int64_t c, const MomentsOf<V>& m,
                                                            const GradSumsOf<V>& s, const TwoParts<V>& rstd) const {
    const V scale = read<V>(gamma, c, 1);
    if (!forward_mode) return backward_coefficients<Arithmetic<T>, V>(m, s, rstd, scale);
    return jvp_coefficients<Arithmetic<T>, V>(m, s, rstd, scale, read<V>(gamma_dot, c, 0), read<V>(beta_dot, c, 0));
  }
  template <class V>
  static V read(const ChannelValues& values, std::int64_t c, double absent) {
    if constexpr (kChannelsOf<V> == 1) {
      return values.value_or(c, absent);
    } else {
      return V{values.value_or(c, absent), values.value_or(c + 1, absent)};
    }
  }
  template <class V>
  void put(std::int64_t c, const GradSumsOf<V>& s, const V& dgamma_c) const {
    const V dbeta_c = dbeta_of(s);
    for (int l = 0; l < kChannelsOf<V>; ++l) {
      if (sums_out != nullptr) {
        sums_out[c + l] = {lane(s.dy.hi, l), lane(s.dy.lo, l), lane(s.dy_xmu.hi, l), lane(s.dy_xmu.lo, l)};
      }
      dgamma.set(c + l, lane(dgamma_c, l));
      dbeta.set(c + l, lane(dbeta_c, l));
    }
  }
};

// Interleaved tensors want the mean of every column.
std::size_t column_mean_bytes(const Plan& plan, bool reduces) {
  return reduces && plan.path == Path::row_blocks ? Workspace::bytes_for<double>(plan.sum_rows.columns) : 0;
}
const double* lay_out_means(const Plan& plan, const Moments* moments, Workspace& workspace) {
  auto* mean = workspace.take<double>(plan.sum_rows.columns);
  const std::int64_t columns = plan.sum_rows.columns, channels = plan.problem.channels;
  if (columns == channels) {  // no division for each
    for (std::int64_t c = 0; c < channels; ++c) mean[c] = moments[c].mean;
  } else {
    for (std::int64_t e = 0; e < columns; ++e) mean[e] = moments[e / plan.problem.inner % channels].mean;
  }
  return mean;
}

template <class T>
void run(BackwardPass<T> pass, const Problem& problem, int threads) {
  using Table = typename BackwardPass<T>::Table;
  const Plan& plan = pass.plan;
  const Work work{pass.reduces, pass.applies, pass.applies ? 3 : 2, sizeof(T)};
  pass.plan = make_plan(problem, work, machine(), is_serial(problem, work) ? 1 : available_threads(threads));
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
          .coefficients = nullptr,
          .forward_mode = false,
          .gamma_dot = {},
          .beta_dot = {}};
}

template <class T>
BackwardPass<T> forward_mode_pass(const T* x_dot, const T* x, const Moments* moments, ChannelValues gamma,
                                  const Tangents& tangents, double eps, T* y_dot) {
  BackwardPass<T> pass = pass_over(x_dot, x, moments);
  pass.applies = pass.forward_mode = true;
  pass.dx = y_dot;
  pass.gamma = gamma;
  pass.gamma_dot = tangents.gamma;
  pass.beta_dot = tangents.beta;
  pass.eps = eps;
  return pass;
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
  run_here([&] {
    for (std::int64_t c = 0; c < static_cast<std::int64_t>(moments.size()); ++c) {
      const auto at = static_cast<std::size_t>(c);
      const auto m = MomentsOf<double>::at(&moments[at]);
      const auto s = GradSumsOf<double>::at(&sums[at]);
      dgamma.set(c, dgamma_of<double>(m, s, rstd_of(DoubleDouble{given.var[c], 0}, eps)));
      dbeta.set(c, dbeta_of(s));
    }
  });
}

template <class T>
void run_batch_norm_jvp(const T* x_dot, const T* x, const Problem& problem, const Moments* saved, const GradSums* sums,
                        ChannelValues gamma, const Tangents& tangents, double eps, T* y_dot, int threads) {
  BackwardPass<T> pass = forward_mode_pass(x_dot, x, saved, gamma, tangents, eps, y_dot);
  pass.reduces = sums == nullptr;
  pass.sums_in = sums;
  run(pass, problem, threads);
}

// mean' takes the place of mean(x'), and var'/2 that of mean(x'*(x - mean)).
template <class T>
void run_normalize_jvp(const T* x_dot, const T* x, const Problem& problem, const GivenStatistics& given,
                       ChannelValues gamma, const Tangents& tangents, double eps, T* y_dot, int threads) {
  const auto channels = static_cast<std::size_t>(problem.channels);
  std::vector<Moments> moments(channels);
  std::vector<GradSums> sums(channels);
  for (std::size_t at = 0; at < channels; ++at) {
    const auto c = static_cast<std::int64_t>(at);
    moments[at] = {1, given.mean[c], 0, given.var[c], 0};
    sums[at] = {tangents.mean.value_or(c, 0), 0, tangents.var.value_or(c, 0) / 2, 0};
  }
  const bool along_x = tangents.gamma.present() || tangents.var.present();
  BackwardPass<T> pass = forward_mode_pass(x_dot, along_x ? x : x_dot, moments.data(), gamma, tangents, eps, y_dot);
  pass.reduces = false;
  pass.sums_in = sums.data();
  run(pass, problem, threads);
}

#define BN_INSTANTIATE(T)                                                                                              \
  template void run_grad_sums(const T*, const T*, const Problem&, const Moments*, GradSums*, int);                     \
  template void run_grad_input(const T*, const T*, const Problem&, const Moments*, const GradSums*, ChannelValues,     \
                               double, T*, int);                                                                       \
  template void run_batch_norm_jvp(const T*, const T*, const Problem&, const Moments*, const GradSums*, ChannelValues, \
                                   const Tangents&, double, T*, int);                                                  \
  template void run_normalize_jvp(const T*, const T*, const Problem&, const GivenStatistics&, ChannelValues,           \
                                  const Tangents&, double, T*, int);                                                   \
  template void run_batch_norm_backward(const T*, const T*, const Problem&, const Moments*, ChannelValues, double, T*, \
                                        ChannelOutput, ChannelOutput, int);                                            \
  template void run_normalize_backward(const T*, const T*, const Problem&, const GivenStatistics&, ChannelValues,      \
                                       double, T*, ChannelOutput, ChannelOutput, int);
BN_INSTANTIATE(Float16)
BN_INSTANTIATE(BFloat16)
BN_INSTANTIATE(float)
BN_INSTANTIATE(double)
#undef BN_INSTANTIATE

}  // namespace batchnorm
