// The passes with weights: those of forward.cpp and backward.cpp on kernels that look at the weights.
#include "weighted.hpp"

#include "backward_pass.hpp"
#include "forward_pass.hpp"

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
using kernels::WideColumns;

template <class W>
bool goes_around_cache(const kernels::RowWeights<W>& w, const Rows& rows) {
  return w.inner == 1 && w.repeat == 1 && rows.columns >= kernels::kVectorColumns;
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

// What the calls of forward and backward have in common.
template <class T>
struct WeightedCalls {
  using A = Arithmetic<T>;

  explicit WeightedCalls(const GivenWeights<T>& given)
      : at_padding(at_padding_of(given.padding)), weights(given.values, given.summary) {}

  AtPadding at_padding;
  TensorWeights<T> weights;
  const kernels::Kernels<T>& kernels = active_implementation().table->of<T>();
  const kernels::WeightedKernels<T>& weighted = active_implementation().table->weighted<T>();

  void prepare(Plan& plan) {
    plan.apply_rows = plan.sum_rows;  // whose rows side by side are no longer than kMostWeightedColumns
    weights.belong_to(plan.problem);
  }
};

template <class T>
struct WeightedForwardCalls : WeightedCalls<T> {
  using typename WeightedCalls<T>::A;
  using WeightedCalls<T>::at_padding, WeightedCalls<T>::weights;
  using WeightedCalls<T>::kernels, WeightedCalls<T>::weighted;

  const T* x;
  T* y;

  WeightedForwardCalls(const T* from, T* to, const GivenWeights<T>& given) : WeightedCalls<T>(given), x(from), y(to) {}

  static int streams() { return 2; }
  [[nodiscard]] SummedValues<T> summed(const Plan&) const { return {kernels, x, weights.total(), &weighted, &weights}; }

  void sum_runs(std::int64_t offset, const Runs& runs, std::int64_t c, Sums* out) const {
    weights.moments_of(weighted).runs(x + offset, weights.of_runs(offset, c), runs, out);
  }
  void sum_rows(std::int64_t offset, std::int64_t column, const Rows& rows, const ColumnSums& out) const {
    const auto w = weights.of_rows(offset, column, rows.stride);
    weights.moments_of(weighted).rows(x + offset, w, rows, out);
  }

  // Where the formula holds everywhere, the weights do not matter any more.
  void apply_runs(const Plan& plan, std::int64_t offset, const Runs& runs, std::int64_t c, const Affine<A>* k) const {
    const bool around = plan.around_cache && x != y;
    if (at_padding == AtPadding::formula) {
      const auto apply = around ? kernels.runs_normalize_around_cache : kernels.runs_normalize;
      return apply(x + offset, y + offset, runs, k);
    }
    const auto apply = around ? weighted.runs_normalize_around_cache : weighted.runs_normalize;
    apply(x + offset, y + offset, weights.of_runs(offset, c), at_padding, runs, k);
  }
  void apply_runs_wide(std::int64_t offset, const Runs& runs, std::int64_t c, const Affine<double>& k) const {
    weighted.runs_normalize_wide(x + offset, y + offset, weights.of_runs(offset, c), at_padding, runs, k);
  }
  void apply_rows(const Plan& plan, std::int64_t offset, const Rows& rows, const AffineColumns<A>& k) const {
    const bool around = plan.around_cache && x != y;
    if (at_padding == AtPadding::formula) {
      const bool around_rows = around && rows.columns == plan.apply_rows.columns;
      const auto apply = around_rows ? kernels.rows_normalize_around_cache : kernels.rows_normalize;
      return apply(x + offset, y + offset, rows, k);
    }
    const auto w = weights.of_rows(offset, 0, rows.stride);
    const bool around_rows = around && goes_around_cache(w, rows);
    const auto apply = around_rows ? weighted.rows_normalize_around_cache : weighted.rows_normalize;
    apply(x + offset, y + offset, w, at_padding, rows, k);
  }
  void apply_rows_mixed(std::int64_t offset, const Rows& rows, const AffineColumns<A>& k,
                        const WideColumns<AffineColumns<double>>& wide) const {
    const auto w = weights.of_rows(offset, 0, rows.stride);
    weighted.rows_normalize_mixed(x + offset, y + offset, w, at_padding, rows, k, wide);
  }
};

template <class T>
struct WeightedBackwardCalls : WeightedCalls<T> {
  using typename WeightedCalls<T>::A;
  using WeightedCalls<T>::at_padding, WeightedCalls<T>::weights;
  using WeightedCalls<T>::kernels, WeightedCalls<T>::weighted;

  const T *dy, *x;
  T* dx;
  bool sums_all;  // y of positions without weight depends on the statistics too

  WeightedBackwardCalls(const T* grad, const T* input, T* to, const GivenWeights<T>& given)
      : WeightedCalls<T>(given), dy(grad), x(input), dx(to), sums_all(given.padding == Padding::normalize) {}

  static int streams() { return 3; }

  void sum_runs(std::int64_t offset, const Runs& runs, std::int64_t c, const double* mean, Sums* out) const {
    if (sums_all) return kernels.runs_grad_sums(dy + offset, x + offset, runs, mean, out);
    weighted.runs_grad_sums(dy + offset, x + offset, weights.of_runs(offset, c), runs, mean, out);
  }
  void sum_rows(std::int64_t offset, std::int64_t column, const Rows& rows, const double* mean,
                const ColumnSums& out) const {
    if (sums_all) return kernels.rows_grad_sums(dy + offset, x + offset, rows, mean, out);
    const auto w = weights.of_rows(offset, column, rows.stride);
    weighted.rows_grad_sums(dy + offset, x + offset, w, rows, mean, out);
  }

  void apply_runs(const Plan& plan, std::int64_t offset, const Runs& runs, std::int64_t c,
                  const GradAffine<A>* k) const {
    const auto apply = is_apart(plan) ? weighted.runs_grad_input_around_cache : weighted.runs_grad_input;
    apply(dy + offset, x + offset, dx + offset, weights.of_runs(offset, c), at_padding, runs, k);
  }
  void apply_runs_wide(std::int64_t offset, const Runs& runs, std::int64_t c, const GradAffine<double>& k) const {
    const auto w = weights.of_runs(offset, c);
    weighted.runs_grad_input_wide(dy + offset, x + offset, dx + offset, w, at_padding, runs, k);
  }
  void apply_rows(const Plan& plan, std::int64_t offset, const Rows& rows, const GradAffineColumns<A>& k) const {
    const auto w = weights.of_rows(offset, 0, rows.stride);
    const bool around = is_apart(plan) && goes_around_cache(w, rows);
    const auto apply = around ? weighted.rows_grad_input_around_cache : weighted.rows_grad_input;
    apply(dy + offset, x + offset, dx + offset, w, at_padding, rows, k);
  }
  void apply_rows_mixed(std::int64_t offset, const Rows& rows, const GradAffineColumns<A>& k,
                        const WideColumns<GradAffineColumns<double>>& wide) const {
    const auto w = weights.of_rows(offset, 0, rows.stride);
    weighted.rows_grad_input_mixed(dy + offset, x + offset, dx + offset, w, at_padding, rows, k, wide);
  }

 private:
  [[nodiscard]] bool is_apart(const Plan& plan) const { return plan.around_cache && dx != dy && dx != x; }
};

template <class T>
using Forward = ForwardPass<T, WeightedForwardCalls<T>>;
template <class T>
using Backward = BackwardPass<T, WeightedBackwardCalls<T>>;

}  // namespace

template <class T>
void run_weighted_moments(const T* x, const Problem& problem, const GivenWeights<T>& weights, Moments* out,
                          int threads) {
  run(Forward<T>{.reduces = true, .applies = false, .calls = {x, nullptr, weights}, .saved = out}, problem, threads);
}

template <class T>
void run_weighted_batch_norm(const T* x, const Problem& problem, const GivenWeights<T>& weights, ChannelValues gamma,
                             ChannelValues beta, double eps, T* y, Moments* saved, int threads) {
  Forward<T> pass{.reduces = true, .applies = true, .calls = {x, y, weights}, .saved = saved};
  pass.gamma = gamma;
  pass.beta = beta;
  pass.eps = eps;
  run(pass, problem, threads);
}

template <class T>
void run_weighted_normalize(const T* x, const Problem& problem, const GivenWeights<T>& weights,
                            const GivenStatistics& given, ChannelValues gamma, ChannelValues beta, double eps, T* y,
                            int threads) {
  Forward<T> pass{.reduces = false, .applies = true, .calls = {x, y, weights}, .given = given};
  pass.gamma = gamma;
  pass.beta = beta;
  pass.eps = eps;
  run(pass, problem, threads);
}

template <class T>
void run_weighted_grad_sums(const T* dy, const T* x, const Problem& problem, const GivenWeights<T>& weights,
                            const Moments* moments, GradSums* out, int threads) {
  Backward<T> pass{.reduces = true, .applies = false, .calls = {dy, x, nullptr, weights}, .moments = moments};
  pass.sums_out = out;
  run(pass, problem, threads);
}

template <class T>
void run_weighted_grad_input(const T* dy, const T* x, const Problem& problem, const GivenWeights<T>& weights,
                             const Moments* moments, const GradSums* sums, ChannelValues gamma, double eps, T* dx,
                             int threads) {
  Backward<T> pass{.reduces = false, .applies = true, .calls = {dy, x, dx, weights}, .moments = moments};
  pass.sums_in = sums;
  pass.gamma = gamma;
  pass.eps = eps;
  run(pass, problem, threads);
}

template <class T>
void run_weighted_batch_norm_backward(const T* dy, const T* x, const Problem& problem, const GivenWeights<T>& weights,
                                      const Moments* saved, ChannelValues gamma, double eps, T* dx,
                                      ChannelOutput dgamma, ChannelOutput dbeta, int threads) {
  Backward<T> pass{.reduces = true, .applies = dx != nullptr, .calls = {dy, x, dx, weights}, .moments = saved};
  pass.dgamma = dgamma;
  pass.dbeta = dbeta;
  pass.gamma = gamma;
  pass.eps = eps;
  run(pass, problem, threads);
}

template <class T>
void run_weighted_normalize_backward(const T* dy, const T* x, const Problem& problem, const GivenWeights<T>& weights,
                                     const GivenStatistics& given, ChannelValues gamma, double eps, T* dx,
                                     ChannelOutput dgamma, ChannelOutput dbeta, int threads) {
  const auto sum = [&](const Moments* moments, GradSums* sums) {
    run_weighted_grad_sums(dy, dgamma.wanted() ? x : dy, problem, weights, moments, sums, threads);
  };
  const auto apply = [&] {
    if (dx == nullptr) return;
    GivenStatistics scale = given;
    scale.only_scale = true;
    run_weighted_normalize(dy, problem, weights, scale, gamma, {}, eps, dx, threads);
  };
  gradients_of_constants(given, problem.channels, eps, dgamma, dbeta, sum, apply);
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
