// The public functions: check, run, return.
#include "batchnorm/batchnorm.hpp"
#include "channel_math.hpp"
#include "check.hpp"
#include "floating_point.hpp"
#include "parallel.hpp"
#include "passes.hpp"

namespace batchnorm {
namespace {

void check_common(const Problem& problem, const Options& options) {
  check::problem(problem);
  check::threads(options.threads);
}

template <class T>
void check_backward(std::span<const T> dy, std::span<const T> x, const Problem& problem, const Options& options) {
  check_common(problem, options);
  check::size("dy", dy.size(), problem);
  check::size("x", x.size(), problem);
}

template <class T>
void check_jvp(std::span<const T> x_dot, std::span<const T> x, const Problem& problem, ChannelValues gamma,
               const Tangents& tangents, double eps, std::span<T> y_dot) {
  check::channels_or_absent("gamma", gamma, problem);
  check::channels_or_absent("gamma_dot", tangents.gamma, problem);
  check::channels_or_absent("beta_dot", tangents.beta, problem);
  check::channels_or_absent("mean_dot", tangents.mean, problem);
  check::channels_or_absent("var_dot", tangents.var, problem);
  check::eps(eps);
  check::output("y_dot", y_dot, problem, x_dot, "x_dot");
  check::no_partial_overlap("y_dot", y_dot.data(), "x", x.data(), x.size_bytes());
  check::apart({{"y_dot", y_dot}}, {{"gamma", gamma},
                                    {"gamma_dot", tangents.gamma},
                                    {"beta_dot", tangents.beta},
                                    {"mean_dot", tangents.mean},
                                    {"var_dot", tangents.var}});
}

// Sizes and overlaps of the tensors. ddy is written before dx is computed from v, dy and x.
template <class T>
void check_second_tensors(std::span<const T> v, std::span<const T> dy, std::span<const T> x, const Problem& problem,
                          std::span<T> ddy, std::span<T> dx) {
  check::size("v", v.size(), problem);
  for (const auto& [name, in] : {std::pair{"v", v}, {"dy", dy}, {"x", x}}) {
    if (!ddy.empty()) check::output("ddy", ddy, problem, in, name);
    if (!dx.empty()) check::output("dx", dx, problem, in, name);
    if (!ddy.empty() && !dx.empty()) check::apart({{"ddy", ddy}}, {{name, in}});
  }
  if (!ddy.empty() && !dx.empty()) check::apart({{"ddy", ddy}}, {{"dx", dx}});
}

template <class T>
void check_double_backward(std::span<const T> v, std::span<const T> dy, std::span<const T> x, const Problem& problem,
                           ChannelValues gamma, const Cotangents& w, double eps, std::span<T> ddy, std::span<T> dx,
                           ChannelOutput dgamma) {
  check::channels_or_absent("gamma", gamma, problem);
  check::channels_or_absent("v_dgamma", w.dgamma, problem);
  check::channels_or_absent("v_dbeta", w.dbeta, problem);
  check::eps(eps);
  check_second_tensors(v, dy, x, problem, ddy, dx);
  if (dgamma.wanted()) check::channels("dgamma", dgamma.size(), problem);
  check::apart({{"dgamma", dgamma}}, {{"v", v}, {"dy", dy}, {"x", x}, {"ddy", ddy}, {"dx", dx}});
  for (const check::Memory& output : {check::Memory{"ddy", ddy}, {"dx", dx}, {"dgamma", dgamma}}) {
    check::apart({output}, {{"gamma", gamma}, {"v_dgamma", w.dgamma}, {"v_dbeta", w.dbeta}});
  }
}

template <class F>
auto in_default_environment(F f) {
  decltype(f()) result{};
  run_here([&] { result = f(); });
  return result;
}

}  // namespace

template <class T>
void moments(std::span<const T> x, const Problem& problem, std::span<Moments> out, const Options& options) {
  const DefaultFloatingPoint environment;
  check_common(problem, options);
  check::size("x", x.size(), problem);
  check::channels("out", out.size(), problem);
  check::apart({{"out", out}}, {{"x", x}});
  run_moments(x.data(), problem, out.data(), options.threads);
}

Moments merge(const Moments& a, const Moments& b) {
  return in_default_environment([&] { return merge_moments(a, b); });
}

double variance(const Moments& moments, int ddof) {
  // Of nothing nothing is known: normalizing by infinity gives beta, as batch_norm() does there.
  if (moments.count == 0 && ddof == 0) return std::numeric_limits<double>::infinity();
  return in_default_environment([&] { return variance_of(moments, ddof).hi; });
}

double rstd(const Moments& moments, double eps) {
  if (moments.count == 0) return 0;
  return in_default_environment([&] { return rstd_of(moments, eps).hi; });
}

void update_running(std::span<double> running_mean, std::span<double> running_var, std::span<const Moments> batch,
                    double update_rate, int ddof) {
  const DefaultFloatingPoint environment;
  const Problem channels{1, static_cast<std::int64_t>(batch.size()), 1};
  check::channels("running_mean", running_mean.size(), channels);
  check::channels("running_var", running_var.size(), channels);
  check::apart({{"running_mean", running_mean}, {"running_var", running_var}}, {{"batch", batch}});
  check::counts("batch", batch);
  check::update_rate(update_rate);
  check::ddof(ddof);
  check::counts_above("batch", batch, ddof);
  const auto blend = [update_rate](double& running, double value) {
    // The ends are exact: (1 - 0)*running + 0*value would lose a running value to value = infinity.
    if (update_rate == 0) return;
    running = update_rate == 1 ? value : (1 - update_rate) * running + update_rate * value;
  };
  run_here([&] {
    for (std::size_t c = 0; c < batch.size(); ++c) {
      if (batch[c].count == 0) continue;
      blend(running_mean[c], batch[c].mean);
      blend(running_var[c], variance_of(batch[c], ddof).hi);
    }
  });
}

template <class T>
void batch_norm(std::span<const T> x, const Problem& problem, ChannelValues gamma, ChannelValues beta, double eps,
                std::span<T> y, std::span<Moments> saved, const Options& options) {
  const DefaultFloatingPoint environment;
  check_common(problem, options);
  check::size("x", x.size(), problem);
  check::channels_or_absent("gamma", gamma, problem);
  check::channels_or_absent("beta", beta, problem);
  check::eps(eps);
  check::output("y", y, problem, x, "x");
  check::channels("saved", saved.size(), problem);
  check::batch_values(problem);
  check::apart({{"saved", saved}}, {{"x", x}, {"y", y}, {"gamma", gamma}, {"beta", beta}});
  check::apart({{"y", y}}, {{"gamma", gamma}, {"beta", beta}});
  run_batch_norm(x.data(), problem, gamma, beta, eps, y.data(), saved.data(), options.threads);
}

template <class T>
void normalize(std::span<const T> x, const Problem& problem, ChannelValues mean, ChannelValues var, ChannelValues gamma,
               ChannelValues beta, double eps, std::span<T> y, const Options& options) {
  const DefaultFloatingPoint environment;
  check_common(problem, options);
  check::size("x", x.size(), problem);
  check::channels_present("mean", mean, problem);
  check::channels_present("var", var, problem);
  check::channels_or_absent("gamma", gamma, problem);
  check::channels_or_absent("beta", beta, problem);
  check::eps(eps);
  check::variances(var);
  check::output("y", y, problem, x, "x");
  check::apart({{"y", y}}, {{"mean", mean}, {"var", var}, {"gamma", gamma}, {"beta", beta}});
  run_normalize(x.data(), problem, {mean, var}, gamma, beta, eps, y.data(), options.threads);
}

template <class T>
void normalize(std::span<const T> x, const Problem& problem, std::span<const Moments> moments, ChannelValues gamma,
               ChannelValues beta, double eps, std::span<T> y, const Options& options) {
  const DefaultFloatingPoint environment;
  check_common(problem, options);
  check::size("x", x.size(), problem);
  check::channels("moments", moments.size(), problem);
  check::counts("moments", moments);
  check::channels_or_absent("gamma", gamma, problem);
  check::channels_or_absent("beta", beta, problem);
  check::eps(eps);
  check::output("y", y, problem, x, "x");
  check::apart({{"y", y}}, {{"moments", moments}, {"gamma", gamma}, {"beta", beta}});
  run_normalize(x.data(), problem, {{}, {}, moments.data()}, gamma, beta, eps, y.data(), options.threads);
}

template <class T>
void grad_sums(std::span<const T> dy, std::span<const T> x, const Problem& problem, std::span<const Moments> moments,
               std::span<GradSums> out, const Options& options) {
  const DefaultFloatingPoint environment;
  check_backward(dy, x, problem, options);
  check::channels("moments", moments.size(), problem);
  check::counts("moments", moments);
  check::channels("out", out.size(), problem);
  check::apart({{"out", out}}, {{"dy", dy}, {"x", x}, {"moments", moments}});
  run_grad_sums(dy.data(), x.data(), problem, moments.data(), out.data(), options.threads);
}

template <class T>
void grad_input(std::span<const T> dy, std::span<const T> x, const Problem& problem, std::span<const Moments> moments,
                std::span<const GradSums> sums, ChannelValues gamma, double eps, std::span<T> dx,
                const Options& options) {
  const DefaultFloatingPoint environment;
  check_backward(dy, x, problem, options);
  check::channels("moments", moments.size(), problem);
  check::counts_of_batch("moments", moments, problem);
  check::channels("sums", sums.size(), problem);
  check::size("dx", dx.size(), problem);
  check::gradients(dy, x, problem, gamma, eps, dx, {}, {});
  check::apart({{"dx", dx}}, {{"moments", moments}, {"sums", sums}});
  run_grad_input(dy.data(), x.data(), problem, moments.data(), sums.data(), gamma, eps, dx.data(), options.threads);
}

template <class T>
void batch_norm_backward(std::span<const T> dy, std::span<const T> x, const Problem& problem,
                         std::span<const Moments> saved, ChannelValues gamma, double eps, std::span<T> dx,
                         ChannelOutput dgamma, ChannelOutput dbeta, const Options& options) {
  const DefaultFloatingPoint environment;
  check_backward(dy, x, problem, options);
  check::channels("saved", saved.size(), problem);
  check::counts_of_batch("saved", saved, problem);
  check::gradients(dy, x, problem, gamma, eps, dx, dgamma, dbeta);
  check::apart({{"dx", dx}, {"dgamma", dgamma}, {"dbeta", dbeta}}, {{"saved", saved}});
  run_batch_norm_backward(dy.data(), x.data(), problem, saved.data(), gamma, eps, data_or_null(dx), dgamma, dbeta,
                          options.threads);
}

template <class T>
void normalize_backward(std::span<const T> dy, std::span<const T> x, const Problem& problem, ChannelValues mean,
                        ChannelValues var, ChannelValues gamma, double eps, std::span<T> dx, ChannelOutput dgamma,
                        ChannelOutput dbeta, const Options& options) {
  const DefaultFloatingPoint environment;
  check_backward(dy, x, problem, options);
  check::channels_present("mean", mean, problem);
  check::channels_present("var", var, problem);
  check::variances(var);
  check::gradients(dy, x, problem, gamma, eps, dx, dgamma, dbeta);
  check::apart({{"dx", dx}, {"dgamma", dgamma}, {"dbeta", dbeta}}, {{"mean", mean}, {"var", var}});
  run_normalize_backward(dy.data(), x.data(), problem, {mean, var}, gamma, eps, data_or_null(dx), dgamma, dbeta,
                         options.threads);
}

template <class T>
void batch_norm_jvp(std::span<const T> x_dot, std::span<const T> x, const Problem& problem,
                    std::span<const Moments> saved, ChannelValues gamma, ChannelValues gamma_dot,
                    ChannelValues beta_dot, double eps, std::span<T> y_dot, const Options& options) {
  const DefaultFloatingPoint environment;
  const Tangents tangents{gamma_dot, beta_dot, {}, {}};
  check_common(problem, options);
  check::size("x_dot", x_dot.size(), problem);
  check::size("x", x.size(), problem);
  check::channels("saved", saved.size(), problem);
  check::counts_of_batch("saved", saved, problem);
  check_jvp(x_dot, x, problem, gamma, tangents, eps, y_dot);
  check::apart({{"y_dot", y_dot}}, {{"saved", saved}});
  run_batch_norm_jvp<T>(x_dot.data(), x.data(), problem, saved.data(), nullptr, gamma, tangents, eps, y_dot.data(),
                        options.threads);
}

template <class T>
void normalize_jvp(std::span<const T> x_dot, std::span<const T> x, const Problem& problem, ChannelValues mean,
                   ChannelValues var, ChannelValues gamma, ChannelValues mean_dot, ChannelValues var_dot,
                   ChannelValues gamma_dot, ChannelValues beta_dot, double eps, std::span<T> y_dot,
                   const Options& options) {
  const DefaultFloatingPoint environment;
  const Tangents tangents{gamma_dot, beta_dot, mean_dot, var_dot};
  check_common(problem, options);
  check::size("x_dot", x_dot.size(), problem);
  check::size("x", x.size(), problem);
  check::channels_present("mean", mean, problem);
  check::channels_present("var", var, problem);
  check::variances(var);
  check_jvp(x_dot, x, problem, gamma, tangents, eps, y_dot);
  check::apart({{"y_dot", y_dot}}, {{"mean", mean}, {"var", var}});
  run_normalize_jvp<T>(x_dot.data(), x.data(), problem, {mean, var}, gamma, tangents, eps, y_dot.data(),
                       options.threads);
}

template <class T>
void batch_norm_double_backward(std::span<const T> v, std::span<const T> dy, std::span<const T> x,
                                const Problem& problem, std::span<const Moments> saved, ChannelValues gamma,
                                ChannelValues v_dgamma, ChannelValues v_dbeta, double eps, std::span<T> ddy,
                                std::span<T> dx, ChannelOutput dgamma, const Options& options) {
  const DefaultFloatingPoint environment;
  const Cotangents w{v_dgamma, v_dbeta};
  check_backward(dy, x, problem, options);
  check::channels("saved", saved.size(), problem);
  check::counts_of_batch("saved", saved, problem);
  check_double_backward(v, dy, x, problem, gamma, w, eps, ddy, dx, dgamma);
  for (const check::Memory& output : {check::Memory{"ddy", ddy}, {"dx", dx}, {"dgamma", dgamma}}) {
    check::apart({output}, {{"saved", saved}});
  }
  run_batch_norm_double_backward<T>(v.data(), dy.data(), x.data(), problem, saved.data(), gamma, w, eps,
                                    {data_or_null(ddy), data_or_null(dx), dgamma}, options.threads);
}

template <class T>
void normalize_double_backward(std::span<const T> v, std::span<const T> dy, std::span<const T> x,
                               const Problem& problem, ChannelValues mean, ChannelValues var, ChannelValues gamma,
                               ChannelValues v_dgamma, ChannelValues v_dbeta, double eps, std::span<T> ddy,
                               std::span<T> dx, ChannelOutput dgamma, const Options& options) {
  const DefaultFloatingPoint environment;
  const Cotangents w{v_dgamma, v_dbeta};
  check_backward(dy, x, problem, options);
  check::channels_present("mean", mean, problem);
  check::channels_present("var", var, problem);
  check::variances(var);
  check_double_backward(v, dy, x, problem, gamma, w, eps, ddy, dx, dgamma);
  for (const check::Memory& output : {check::Memory{"ddy", ddy}, {"dx", dx}, {"dgamma", dgamma}}) {
    check::apart({output}, {{"mean", mean}, {"var", var}});
  }
  run_normalize_double_backward<T>(v.data(), dy.data(), x.data(), problem, {mean, var}, gamma, w, eps,
                                   {data_or_null(ddy), data_or_null(dx), dgamma}, options.threads);
}

#define BN_INSTANTIATE(T)                                                                                              \
  template void moments(std::span<const T>, const Problem&, std::span<Moments>, const Options&);                       \
  template void batch_norm(std::span<const T>, const Problem&, ChannelValues, ChannelValues, double, std::span<T>,     \
                           std::span<Moments>, const Options&);                                                        \
  template void normalize(std::span<const T>, const Problem&, ChannelValues, ChannelValues, ChannelValues,             \
                          ChannelValues, double, std::span<T>, const Options&);                                        \
  template void normalize(std::span<const T>, const Problem&, std::span<const Moments>, ChannelValues, ChannelValues,  \
                          double, std::span<T>, const Options&);                                                       \
  template void grad_sums(std::span<const T>, std::span<const T>, const Problem&, std::span<const Moments>,            \
                          std::span<GradSums>, const Options&);                                                        \
  template void grad_input(std::span<const T>, std::span<const T>, const Problem&, std::span<const Moments>,           \
                           std::span<const GradSums>, ChannelValues, double, std::span<T>, const Options&);            \
  template void batch_norm_backward(std::span<const T>, std::span<const T>, const Problem&, std::span<const Moments>,  \
                                    ChannelValues, double, std::span<T>, ChannelOutput, ChannelOutput,                 \
                                    const Options&);                                                                   \
  template void normalize_backward(std::span<const T>, std::span<const T>, const Problem&, ChannelValues,              \
                                   ChannelValues, ChannelValues, double, std::span<T>, ChannelOutput, ChannelOutput,   \
                                   const Options&);                                                                    \
  template void batch_norm_jvp(std::span<const T>, std::span<const T>, const Problem&, std::span<const Moments>,       \
                               ChannelValues, ChannelValues, ChannelValues, double, std::span<T>, const Options&);     \
  template void normalize_jvp(std::span<const T>, std::span<const T>, const Problem&, ChannelValues, ChannelValues,    \
                              ChannelValues, ChannelValues, ChannelValues, ChannelValues, ChannelValues, double,       \
                              std::span<T>, const Options&);                                                           \
  template void batch_norm_double_backward(std::span<const T>, std::span<const T>, std::span<const T>, const Problem&, \
                                           std::span<const Moments>, ChannelValues, ChannelValues, ChannelValues,      \
                                           double, std::span<T>, std::span<T>, ChannelOutput, const Options&);         \
  template void normalize_double_backward(std::span<const T>, std::span<const T>, std::span<const T>, const Problem&,  \
                                          ChannelValues, ChannelValues, ChannelValues, ChannelValues, ChannelValues,   \
                                          double, std::span<T>, std::span<T>, ChannelOutput, const Options&);
BN_INSTANTIATE(Float16)
BN_INSTANTIATE(BFloat16)
BN_INSTANTIATE(float)
BN_INSTANTIATE(double)
#undef BN_INSTANTIATE

}  // namespace batchnorm
