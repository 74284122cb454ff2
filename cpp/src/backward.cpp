// The passes of backward over whole tensors; and forward-mode.
#include "backward_pass.hpp"

namespace batchnorm {
namespace {

using kernels::ColumnSums;
using kernels::GradAffine;
using kernels::GradAffineColumns;
using kernels::Rows;
using kernels::Runs;
using kernels::Sums;
using kernels::WideColumns;

template <class T>
struct BackwardCalls {
  using A = Arithmetic<T>;

  const T *dy, *x;
  T* dx;
  const kernels::Kernels<T>& kernels = active_implementation().table->of<T>();

  static void prepare(const Plan&) {}
  static int streams() { return 3; }

  void sum_runs(std::int64_t offset, const Runs& runs, std::int64_t, const double* mean, Sums* out) const {
    kernels.runs_grad_sums(dy + offset, x + offset, runs, mean, out);
  }
  void sum_rows(std::int64_t offset, std::int64_t, const Rows& rows, const double* mean, const ColumnSums& out) const {
    kernels.rows_grad_sums(dy + offset, x + offset, rows, mean, out);
  }

  void apply_runs(const Plan& plan, std::int64_t offset, const Runs& runs, std::int64_t, const GradAffine<A>* k) const {
    const auto apply = goes_around_cache(plan) ? kernels.runs_grad_input_around_cache : kernels.runs_grad_input;
    apply(dy + offset, x + offset, dx + offset, runs, k);
  }
  void apply_runs_wide(std::int64_t offset, const Runs& runs, std::int64_t, const GradAffine<double>& k) const {
    kernels.runs_grad_input_wide(dy + offset, x + offset, dx + offset, runs, k);
  }
  void apply_rows(const Plan& plan, std::int64_t offset, const Rows& rows, const GradAffineColumns<A>& k) const {
    const bool around = goes_around_cache(plan) && rows.columns == plan.apply_rows.columns;
    const auto apply = around ? kernels.rows_grad_input_around_cache : kernels.rows_grad_input;
    apply(dy + offset, x + offset, dx + offset, rows, k);
  }
  void apply_rows_mixed(std::int64_t offset, const Rows& rows, const GradAffineColumns<A>& k,
                        const WideColumns<GradAffineColumns<double>>& wide) const {
    kernels.rows_grad_input_mixed(dy + offset, x + offset, dx + offset, rows, k, wide);
  }

 private:
  [[nodiscard]] bool goes_around_cache(const Plan& plan) const { return plan.around_cache && dx != dy && dx != x; }
};

template <class T>
using Pass = BackwardPass<T, BackwardCalls<T>>;

template <class T>
Pass<T> forward_mode_pass(const T* x_dot, const T* x, const Moments* moments, ChannelValues gamma,
                          const Tangents& tangents, double eps, T* y_dot) {
  Pass<T> pass{.reduces = true, .applies = true, .calls = {x_dot, x, y_dot}, .moments = moments};
  pass.forward_mode = true;
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
  Pass<T> pass{.reduces = true, .applies = false, .calls = {dy, x, nullptr}, .moments = moments};
  pass.sums_out = out;
  run(pass, problem, threads);
}

template <class T>
void run_grad_input(const T* dy, const T* x, const Problem& problem, const Moments* moments, const GradSums* sums,
                    ChannelValues gamma, double eps, T* dx, int threads) {
  Pass<T> pass{.reduces = false, .applies = true, .calls = {dy, x, dx}, .moments = moments};
  pass.sums_in = sums;
  pass.gamma = gamma;
  pass.eps = eps;
  run(pass, problem, threads);
}

template <class T>
void run_batch_norm_backward(const T* dy, const T* x, const Problem& problem, const Moments* saved, ChannelValues gamma,
                             double eps, T* dx, ChannelOutput dgamma, ChannelOutput dbeta, int threads,
                             const PartOf& part) {
  Pass<T> pass{.reduces = true, .applies = dx != nullptr, .calls = {dy, x, dx}, .moments = saved};
  pass.dgamma = dgamma;
  pass.dbeta = dbeta;
  pass.gamma = gamma;
  pass.eps = eps;
  run(pass, problem, threads, part);
}

template <class T>
void run_normalize_backward(const T* dy, const T* x, const Problem& problem, const GivenStatistics& given,
                            ChannelValues gamma, double eps, T* dx, ChannelOutput dgamma, ChannelOutput dbeta,
                            int threads) {
  const auto sum = [&](const Moments* moments, GradSums* sums) {
    run_grad_sums(dy, dgamma.wanted() ? x : dy, problem, moments, sums, threads);
  };
  const auto apply = [&] {
    if (dx == nullptr) return;
    GivenStatistics scale = given;
    scale.only_scale = true;
    run_normalize(dy, problem, scale, gamma, {}, eps, dx, threads);
  };
  gradients_of_constants(given, problem.channels, eps, dgamma, dbeta, sum, apply);
}

template <class T>
void run_batch_norm_jvp(const T* x_dot, const T* x, const Problem& problem, const Moments* saved, const GradSums* sums,
                        ChannelValues gamma, const Tangents& tangents, double eps, T* y_dot, int threads) {
  Pass<T> pass = forward_mode_pass(x_dot, x, saved, gamma, tangents, eps, y_dot);
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
  Pass<T> pass = forward_mode_pass(x_dot, along_x ? x : x_dot, moments.data(), gamma, tangents, eps, y_dot);
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
                                        ChannelOutput, ChannelOutput, int, const PartOf&);                             \
  template void run_normalize_backward(const T*, const T*, const Problem&, const GivenStatistics&, ChannelValues,      \
                                       double, T*, ChannelOutput, ChannelOutput, int);
BN_INSTANTIATE(Float16)
BN_INSTANTIATE(BFloat16)
BN_INSTANTIATE(float)
BN_INSTANTIATE(double)
#undef BN_INSTANTIATE

}  // namespace batchnorm
