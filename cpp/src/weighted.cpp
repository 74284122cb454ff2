// The passes with weights: those of forward.cpp and backward.cpp on kernels that look at the weights.
#include "weighted.hpp"

#include <algorithm>
#include <vector>

#include "coefficients.hpp"
#include "settle.hpp"
#include "traverse.hpp"

namespace batchnorm {
namespace {

using kernels::Affine;
using kernels::AffineColumns;
using kernels::AtPadding;
using kernels::ColumnSums;
using kernels::GradAffine;
using kernels::GradAffineColumns;
using kernels::Rows;
using kernels::Runs;
using kernels::Sums;

// Runs shorter than this are stored as usual: both ends of each run are parts of lines.
constexpr std::int64_t kShortestStream = 256;

template <class W>
bool goes_around_cache(const kernels::RowWeights<W>& w, const Rows& rows) {
  return w.inner == 1 && w.repeat == 1 && rows.columns >= kernels::kVectorColumns;
}

template <class T>
struct Kernels {
  const kernels::Kernels<T>& plain = active_implementation().table->of<T>();
  const kernels::WeightedKernels<T>& weighted = active_implementation().table->weighted<T>();
};

template <class T>
class WeightedForward {
 public:
  using Table = CoefficientTable<Arithmetic<T>, Affine>;

  bool reduces, applies;
  Plan plan;
  Kernels<T> kernels;
  const T* x;
  T* y;
  Moments* saved;         // where the pass reduces
  GivenStatistics given;  // where it does not
  ChannelValues gamma, beta;
  double eps;
  AtPadding at_padding;
  const TensorWeights<T>* weights;
  Table* coefficients;  // where it applies

  void sum_runs(std::int64_t offset, const Runs& runs, std::int64_t c, Sums* out) const {
    weights->moments_of(kernels.weighted).runs(x + offset, weights->of_runs(offset, c), runs, out);
  }
  void sum_rows(std::int64_t offset, std::int64_t column, const Rows& rows, const ColumnSums& out) const {
    const auto w = weights->of_rows(offset, column, rows.stride);
    weights->moments_of(kernels.weighted).rows(x + offset, w, rows, out);
  }
  void add_blocks(const ColumnSums& first, std::int64_t count, std::int64_t stride, std::int64_t columns,
                  const ColumnSums& total) const {
    kernels.plain.add_blocks(first, count, stride, columns, total);
  }

  void finish(Range channels, const Sums* totals) {
    if (reduces && weights->total() > 0 && totals != nullptr) {
      settle<T>(plan, {kernels.plain, x, weights->total(), &kernels.weighted, weights}, channels, totals, saved);
    } else if (reduces) {
      std::fill(saved + channels.begin, saved + channels.end, Moments{});
    }
    for (std::int64_t c = channels.begin; applies && c < channels.end; ++c) coefficients->set(c, coefficients_of(c));
  }
  void lay_out(Range channels) { coefficients->lay_out(channels); }

  void apply_runs(std::int64_t offset, const Runs& runs, std::int64_t c) const {
    const T* from = x + offset;
    T* to = y + offset;
    const auto w = weights->of_runs(offset, c);
    const auto& k = kernels.weighted;
    const bool around = plan.around_cache && x != y;
    const bool around_runs = around && runs.length >= kShortestStream;
    const auto narrow = around_runs ? k.runs_normalize_around_cache : k.runs_normalize;
    if (!coefficients->any_wide()) {
      if (at_padding != AtPadding::formula) return narrow(from, to, w, at_padding, runs, coefficients->narrow(c));
      const auto plain = around ? kernels.plain.runs_normalize_around_cache : kernels.plain.runs_normalize;
      return plain(from, to, runs, coefficients->narrow(c));
    }
    for (const std::int64_t end = c + runs.channels; c < end; ++c, from += runs.length, to += runs.length) {
      const Runs one{runs.length, runs.count, runs.stride};
      if (coefficients->is_wide(c)) {
        k.runs_normalize_wide(from, to, w, at_padding, one, coefficients->wide(c));
      } else {
        narrow(from, to, w, at_padding, one, coefficients->narrow(c));
      }
    }
  }
  void apply_rows(std::int64_t offset, const Rows& rows) const {
    const Table& k = *coefficients;
    const AffineColumns<Arithmetic<T>> narrow{k.narrow_columns(0), k.narrow_columns(1), k.narrow_columns(2)};
    const auto w = weights->of_rows(offset, 0, rows.stride);
    if (!k.any_wide() && at_padding == AtPadding::formula) {
      const bool around = plan.around_cache && x != y && rows.columns == plan.apply_rows.columns;
      const auto plain = around ? kernels.plain.rows_normalize_around_cache : kernels.plain.rows_normalize;
      plain(x + offset, y + offset, rows, narrow);
    } else if (k.any_wide()) {
      const AffineColumns<double> wide{k.wide_columns(0), k.wide_columns(1), k.wide_columns(2)};
      kernels.weighted.rows_normalize_mixed(x + offset, y + offset, w, at_padding, rows, narrow, {k.mask(), wide});
    } else {
      const bool around = plan.around_cache && x != y && goes_around_cache(w, rows);
      const auto padded = around ? kernels.weighted.rows_normalize_around_cache : kernels.weighted.rows_normalize;
      padded(x + offset, y + offset, w, at_padding, rows, narrow);
    }
  }

 private:
  [[nodiscard]] Coefficients<double, Affine> coefficients_of(std::int64_t c) const {
    const double g = gamma.value_or(c, 1), b = beta.value_or(c, 0);
    if (!reduces) {
      const DoubleDouble rstd = rstd_for<Arithmetic<T>>(given.var[c], eps);
      return given.only_scale ? frozen_backward_coefficients<Arithmetic<T>>(rstd, g)
                              : forward_coefficients<Arithmetic<T>>(given.mean[c], 0.0, rstd, g, b);
    }
    const auto m = MomentsOf<double>::at(saved + c);
    const DoubleDouble rstd = m.count == 0 ? DoubleDouble{} : rstd_for<Arithmetic<T>>(m, eps);
    return forward_coefficients<Arithmetic<T>>(m.mean, m.mean_lo, rstd, g, b);
  }
};

template <class T>
class WeightedBackward {
 public:
  using Table = CoefficientTable<Arithmetic<T>, GradAffine>;

  bool reduces, applies;
  Plan plan;
  Kernels<T> kernels;
  const T *dy, *x;
  T* dx;
  const Moments* moments;
  const double* column_mean;
  GradSums* sums_out;
  const GradSums* sums_in;
  ChannelOutput dgamma, dbeta;
  ChannelValues gamma;
  double eps;
  bool sums_all;  // y of positions without weight depends on the statistics too
  AtPadding at_padding;
  const TensorWeights<T>* weights;
  Table* coefficients;

  void sum_runs(std::int64_t offset, const Runs& runs, std::int64_t c, Sums* out) const {
    double mean[kernels::kMostChannels];
    for (std::int64_t i = 0; i < runs.channels; ++i) mean[i] = moments[c + i].mean;
    if (sums_all) return kernels.plain.runs_grad_sums(dy + offset, x + offset, runs, mean, out);
    kernels.weighted.runs_grad_sums(dy + offset, x + offset, weights->of_runs(offset, c), runs, mean, out);
  }
  void sum_rows(std::int64_t offset, std::int64_t column, const Rows& rows, const ColumnSums& out) const {
    const double* mean = column_mean + column;
    if (sums_all) return kernels.plain.rows_grad_sums(dy + offset, x + offset, rows, mean, out);
    const auto w = weights->of_rows(offset, column, rows.stride);
    kernels.weighted.rows_grad_sums(dy + offset, x + offset, w, rows, mean, out);
  }
  void add_blocks(const ColumnSums& first, std::int64_t count, std::int64_t stride, std::int64_t columns,
                  const ColumnSums& total) const {
    kernels.plain.add_blocks(first, count, stride, columns, total);
  }

  void finish(Range channels, const Sums* totals) {
    for (std::int64_t c = channels.begin; c < channels.end; ++c) {
      GradSums sums;
      if (!reduces) {
        sums = sums_in[c];
      } else if (totals != nullptr) {
        const Sums& t = totals[c - channels.begin];
        sums = {t.first, t.first_lo, t.second, t.second_lo};
      }
      auto m = MomentsOf<double>::at(moments + c);
      const auto s = GradSumsOf<double>::at(&sums);
      const DoubleDouble rstd = m.count == 0 ? DoubleDouble{} : rstd_for<Arithmetic<T>>(m, eps);
      if (sums_out != nullptr) sums_out[c] = sums;
      dgamma.set(c, dgamma_of<Arithmetic<T>>(m, s, rstd));
      dbeta.set(c, dbeta_of(s));
      if (m.count == 0) m.count = 1;  // nothing to divide by, and a rstd of 0
      if (applies) coefficients->set(c, backward_coefficients<Arithmetic<T>, double>(m, s, rstd, gamma.value_or(c, 1)));
    }
  }
  void lay_out(Range channels) { coefficients->lay_out(channels); }

  void apply_runs(std::int64_t offset, const Runs& runs, std::int64_t c) const {
    const T *from_dy = dy + offset, *from_x = x + offset;
    T* to = dx + offset;
    const auto w = weights->of_runs(offset, c);
    const auto& k = kernels.weighted;
    const bool around = plan.around_cache && dx != dy && dx != x && runs.length >= kShortestStream;
    const auto narrow = around ? k.runs_grad_input_around_cache : k.runs_grad_input;
    if (!coefficients->any_wide()) return narrow(from_dy, from_x, to, w, at_padding, runs, coefficients->narrow(c));
    for (std::int64_t i = 0; i < runs.channels; ++i) {
      const std::int64_t at = i * runs.length;
      const Runs one{runs.length, runs.count, runs.stride};
      if (coefficients->is_wide(c + i)) {
        k.runs_grad_input_wide(from_dy + at, from_x + at, to + at, w, at_padding, one, coefficients->wide(c + i));
      } else {
        narrow(from_dy + at, from_x + at, to + at, w, at_padding, one, coefficients->narrow(c + i));
      }
    }
  }
  void apply_rows(std::int64_t offset, const Rows& rows) const {
    const T *from_dy = dy + offset, *from_x = x + offset;
    T* to = dx + offset;
    const Table& k = *coefficients;
    const GradAffineColumns<Arithmetic<T>> narrow{k.narrow_columns(0), k.narrow_columns(1), k.narrow_columns(2),
                                                  k.narrow_columns(3), k.narrow_columns(4)};
    const auto w = weights->of_rows(offset, 0, rows.stride);
    if (k.any_wide()) {
      const GradAffineColumns<double> wide{k.wide_columns(0), k.wide_columns(1), k.wide_columns(2), k.wide_columns(3),
                                           k.wide_columns(4)};
      kernels.weighted.rows_grad_input_mixed(from_dy, from_x, to, w, at_padding, rows, narrow, {k.mask(), wide});
    } else {
      const bool around = plan.around_cache && dx != dy && dx != x && goes_around_cache(w, rows);
      const auto padded = around ? kernels.weighted.rows_grad_input_around_cache : kernels.weighted.rows_grad_input;
      padded(from_dy, from_x, to, w, at_padding, rows, narrow);
    }
  }
};

// The plan, the memory and the order of one call of a pass.
template <class T, class Pass>
void run(Pass pass, const Problem& problem, int streams, const GivenWeights<T>& given, int threads) {
  using Table = typename Pass::Table;
  const Work work{pass.reduces, pass.applies, streams, sizeof(T)};
  pass.plan = make_plan(problem, work, machine(), is_serial(problem, work) ? 1 : available_threads(threads));
  pass.plan.apply_rows = pass.plan.sum_rows;  // whose rows side by side are no longer than kMostWeightedColumns
  const Plan& plan = pass.plan;
  constexpr bool kBackward = requires { pass.column_mean; };
  const bool wants_means = kBackward && pass.reduces && plan.path == Path::row_blocks;
  Workspace workspace((pass.applies ? Table::bytes(plan) : 0) +
                      (wants_means ? Workspace::bytes_for<double>(plan.sum_rows.columns) : 0) +
                      Traversal<Pass>::bytes(plan, pass.reduces));
  if constexpr (kBackward) {
    if (wants_means) {
      auto* mean = workspace.template take<double>(plan.sum_rows.columns);
      for (std::int64_t e = 0; e < plan.sum_rows.columns; ++e) {
        mean[e] = pass.moments[e / plan.problem.inner % plan.problem.channels].mean;
      }
      pass.column_mean = mean;
    }
  }
  const TensorWeights<T> weights(given.values, given.summary, plan);
  pass.weights = &weights;
  Traversal<Pass> traversal(plan, pass, workspace);
  if (!pass.applies) return traversal.run();
  Table coefficients(plan, workspace);
  pass.coefficients = &coefficients;
  traversal.run();
}

AtPadding at_padding_of(Padding padding) {
  switch (padding) {
    case Padding::zero:
      return AtPadding::zero;
    case Padding::keep:
      return AtPadding::input;
    default:
      return AtPadding::formula;
  }
}

template <class T>
WeightedForward<T> forward_over(const T* x, T* y, Padding padding) {
  return {.reduces = true,
          .applies = y != nullptr,
          .plan = {},
          .kernels = {},
          .x = x,
          .y = y,
          .saved = nullptr,
          .given = {},
          .gamma = {},
          .beta = {},
          .eps = 0,
          .at_padding = at_padding_of(padding),
          .weights = nullptr,
          .coefficients = nullptr};
}

template <class T>
WeightedBackward<T> backward_over(const T* dy, const T* x, T* dx, const Moments* moments, Padding padding) {
  return {.reduces = true,
          .applies = dx != nullptr,
          .plan = {},
          .kernels = {},
          .dy = dy,
          .x = x,
          .dx = dx,
          .moments = moments,
          .column_mean = nullptr,
          .sums_out = nullptr,
          .sums_in = nullptr,
          .dgamma = {},
          .dbeta = {},
          .gamma = {},
          .eps = 0,
          .sums_all = padding == Padding::normalize,
          .at_padding = at_padding_of(padding),
          .weights = nullptr,
          .coefficients = nullptr};
}

}  // namespace

template <class T>
void run_weighted_moments(const T* x, const Problem& problem, const GivenWeights<T>& weights, Moments* out,
                          int threads) {
  WeightedForward<T> pass = forward_over<T>(x, nullptr, weights.padding);
  pass.saved = out;
  run<T>(pass, problem, 1, weights, threads);
}

template <class T>
void run_weighted_batch_norm(const T* x, const Problem& problem, const GivenWeights<T>& weights, ChannelValues gamma,
                             ChannelValues beta, double eps, T* y, Moments* saved, int threads) {
  WeightedForward<T> pass = forward_over(x, y, weights.padding);
  pass.saved = saved;
  pass.gamma = gamma;
  pass.beta = beta;
  pass.eps = eps;
  run<T>(pass, problem, 2, weights, threads);
}

template <class T>
void run_weighted_normalize(const T* x, const Problem& problem, const GivenWeights<T>& weights,
                            const GivenStatistics& given, ChannelValues gamma, ChannelValues beta, double eps, T* y,
                            int threads) {
  WeightedForward<T> pass = forward_over(x, y, weights.padding);
  pass.reduces = false;
  pass.given = given;
  pass.gamma = gamma;
  pass.beta = beta;
  pass.eps = eps;
  run<T>(pass, problem, 2, weights, threads);
}

template <class T>
void run_weighted_grad_sums(const T* dy, const T* x, const Problem& problem, const GivenWeights<T>& weights,
                            const Moments* moments, GradSums* out, int threads) {
  WeightedBackward<T> pass = backward_over<T>(dy, x, nullptr, moments, weights.padding);
  pass.sums_out = out;
  run<T>(pass, problem, 2, weights, threads);
}

template <class T>
void run_weighted_grad_input(const T* dy, const T* x, const Problem& problem, const GivenWeights<T>& weights,
                             const Moments* moments, const GradSums* sums, ChannelValues gamma, double eps, T* dx,
                             int threads) {
  WeightedBackward<T> pass = backward_over(dy, x, dx, moments, weights.padding);
  pass.reduces = false;
  pass.sums_in = sums;
  pass.gamma = gamma;
  pass.eps = eps;
  run<T>(pass, problem, 3, weights, threads);
}

template <class T>
void run_weighted_batch_norm_backward(const T* dy, const T* x, const Problem& problem, const GivenWeights<T>& weights,
                                      const Moments* saved, ChannelValues gamma, double eps, T* dx,
                                      ChannelOutput dgamma, ChannelOutput dbeta, int threads) {
  WeightedBackward<T> pass = backward_over(dy, x, dx, saved, weights.padding);
  pass.dgamma = dgamma;
  pass.dbeta = dbeta;
  pass.gamma = gamma;
  pass.eps = eps;
  run<T>(pass, problem, dx == nullptr ? 2 : 3, weights, threads);
}

template <class T>
void run_weighted_normalize_backward(const T* dy, const T* x, const Problem& problem, const GivenWeights<T>& weights,
                                     const GivenStatistics& given, ChannelValues gamma, double eps, T* dx,
                                     ChannelOutput dgamma, ChannelOutput dbeta, int threads) {
  const auto channels = static_cast<std::size_t>(problem.channels);
  std::vector<Moments> moments(dgamma.wanted() || dbeta.wanted() ? channels : 0);
  std::vector<GradSums> sums(moments.size());
  if (!moments.empty()) {
    for (std::size_t c = 0; c < channels; ++c) moments[c].mean = given.mean[static_cast<std::int64_t>(c)];
    run_weighted_grad_sums(dy, dgamma.wanted() ? x : dy, problem, weights, moments.data(), sums.data(), threads);
  }
  if (dx != nullptr) {
    GivenStatistics scale = given;
    scale.only_scale = true;
    run_weighted_normalize(dy, problem, weights, scale, gamma, {}, eps, dx, threads);
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

#define BN_INSTANTIATE(T)                                                                                           \
  template void run_weighted_moments(const T*, const Problem&, const GivenWeights<T>&, Moments*, int);              \
  template void run_weighted_batch_norm(const T*, const Problem&, const GivenWeights<T>&, ChannelValues,            \
                                        ChannelValues, double, T*, Moments*, int);                                  \
  template void run_weighted_normalize(const T*, const Problem&, const GivenWeights<T>&, const GivenStatistics&,    \
                                       ChannelValues, ChannelValues, double, T*, int);                              \
  template void run_weighted_grad_sums(const T*, const T*, const Problem&, const GivenWeights<T>&, const Moments*,  \
                                       GradSums*, int);                                                             \
  template void run_weighted_grad_input(const T*, const T*, const Problem&, const GivenWeights<T>&, const Moments*, \
                                        const GradSums*, ChannelValues, double, T*, int);                           \
  template void run_weighted_batch_norm_backward(const T*, const T*, const Problem&, const GivenWeights<T>&,        \
                                                 const Moments*, ChannelValues, double, T*, ChannelOutput,          \
                                                 ChannelOutput, int);                                               \
  template void run_weighted_normalize_backward(const T*, const T*, const Problem&, const GivenWeights<T>&,         \
                                                const GivenStatistics&, ChannelValues, double, T*, ChannelOutput,   \
                                                ChannelOutput, int);
BN_INSTANTIATE(Float16)
BN_INSTANTIATE(BFloat16)
BN_INSTANTIATE(float)
BN_INSTANTIATE(double)
#undef BN_INSTANTIATE

}  // namespace batchnorm
