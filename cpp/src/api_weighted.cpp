// The public functions with weights: check, run, return.
#include "batchnorm/weighted.hpp"
#include "check.hpp"
#include "floating_point.hpp"
#include "weighted.hpp"

namespace batchnorm {
namespace {

// x, and weights of its positions that are summed up and found good.
template <class T>
GivenWeights<T> checked(const Problem& problem, const WeightsFor<T>& weights, std::span<const T> x,
                        const Options& options) {
  check::problem(problem);
  check::threads(options.threads);
  check::size("x", x.size(), problem);
  check::positions("weights", weights.values.size(), problem);
  const WeightSummary summary = summarize(weights.values, options.threads);
  if (summary.bad >= 0) {
    check::bad_weight(summary.bad, static_cast<double>(weights.values[static_cast<std::size_t>(summary.bad)]));
  }
  check::sum_of_weights(summary.total.hi);
  return {weights.values.data(), summary, weights.padding};
}

}  // namespace

template <class T>
void moments(std::span<const T> x, const Problem& problem, const WeightsFor<T>& weights, std::span<Moments> out,
             const Options& options) {
  const DefaultFloatingPoint environment;
  const GivenWeights<T> given = checked(problem, weights, x, options);
  check::channels("out", out.size(), problem);
  check::apart({{"out", out}}, {{"x", x}, {"weights", weights.values}});
  run_weighted_moments(x.data(), problem, given, out.data(), options.threads);
}

template <class T>
void batch_norm(std::span<const T> x, const Problem& problem, const WeightsFor<T>& weights, ChannelValues gamma,
                ChannelValues beta, double eps, std::span<T> y, std::span<Moments> saved, const Options& options) {
  const DefaultFloatingPoint environment;
  const GivenWeights<T> given = checked(problem, weights, x, options);
  check::channels_or_absent("gamma", gamma, problem);
  check::channels_or_absent("beta", beta, problem);
  check::eps(eps);
  check::output("y", y, problem, x, "x");
  check::channels("saved", saved.size(), problem);
  check::counted_positions(given.summary.counted, problem);
  check::apart({{"saved", saved}}, {{"x", x}, {"y", y}});
  for (const check::Memory& output : {check::Memory{"saved", saved}, {"y", y}}) {
    check::apart({output}, {{"weights", weights.values}, {"gamma", gamma}, {"beta", beta}});
  }
  run_weighted_batch_norm(x.data(), problem, given, gamma, beta, eps, y.data(), saved.data(), options.threads);
}

template <class T>
void normalize(std::span<const T> x, const Problem& problem, const WeightsFor<T>& weights, ChannelValues mean,
               ChannelValues var, ChannelValues gamma, ChannelValues beta, double eps, std::span<T> y,
               const Options& options) {
  const DefaultFloatingPoint environment;
  const GivenWeights<T> given = checked(problem, weights, x, options);
  check::padding_differs(weights.padding);
  check::channels_present("mean", mean, problem);
  check::channels_present("var", var, problem);
  check::channels_or_absent("gamma", gamma, problem);
  check::channels_or_absent("beta", beta, problem);
  check::eps(eps);
  check::variances(var);
  check::output("y", y, problem, x, "x");
  check::apart({{"y", y}},
               {{"weights", weights.values}, {"mean", mean}, {"var", var}, {"gamma", gamma}, {"beta", beta}});
  run_weighted_normalize(x.data(), problem, given, {mean, var}, gamma, beta, eps, y.data(), options.threads);
}

template <class T>
void grad_sums(std::span<const T> dy, std::span<const T> x, const Problem& problem, const WeightsFor<T>& weights,
               std::span<const Moments> moments, std::span<GradSums> out, const Options& options) {
  const DefaultFloatingPoint environment;
  const GivenWeights<T> given = checked(problem, weights, x, options);
  check::size("dy", dy.size(), problem);
  check::channels("moments", moments.size(), problem);
  check::counts("moments", moments);
  check::channels("out", out.size(), problem);
  check::apart({{"out", out}}, {{"dy", dy}, {"x", x}, {"weights", weights.values}, {"moments", moments}});
  run_weighted_grad_sums(dy.data(), x.data(), problem, given, moments.data(), out.data(), options.threads);
}

template <class T>
void grad_input(std::span<const T> dy, std::span<const T> x, const Problem& problem, const WeightsFor<T>& weights,
                std::span<const Moments> moments, std::span<const GradSums> sums, ChannelValues gamma, double eps,
                std::span<T> dx, const Options& options) {
  const DefaultFloatingPoint environment;
  const GivenWeights<T> given = checked(problem, weights, x, options);
  check::channels("moments", moments.size(), problem);
  check::counts("moments", moments);
  check::channels("sums", sums.size(), problem);
  check::size("dx", dx.size(), problem);
  check::gradients(dy, x, problem, gamma, eps, dx, {}, {});
  check::apart({{"dx", dx}}, {{"weights", weights.values}, {"moments", moments}, {"sums", sums}});
  run_weighted_grad_input(dy.data(), x.data(), problem, given, moments.data(), sums.data(), gamma, eps, dx.data(),
                          options.threads);
}

template <class T>
void batch_norm_backward(std::span<const T> dy, std::span<const T> x, const Problem& problem,
                         const WeightsFor<T>& weights, std::span<const Moments> saved, ChannelValues gamma, double eps,
                         std::span<T> dx, ChannelOutput dgamma, ChannelOutput dbeta, const Options& options) {
  const DefaultFloatingPoint environment;
  const GivenWeights<T> given = checked(problem, weights, x, options);
  check::channels("saved", saved.size(), problem);
  check::counts("saved", saved);
  check::gradients(dy, x, problem, gamma, eps, dx, dgamma, dbeta);
  check::apart({{"dx", dx}, {"dgamma", dgamma}, {"dbeta", dbeta}}, {{"weights", weights.values}, {"saved", saved}});
  run_weighted_batch_norm_backward(dy.data(), x.data(), problem, given, saved.data(), gamma, eps, data_or_null(dx),
                                   dgamma, dbeta, options.threads);
}

template <class T>
void normalize_backward(std::span<const T> dy, std::span<const T> x, const Problem& problem,
                        const WeightsFor<T>& weights, ChannelValues mean, ChannelValues var, ChannelValues gamma,
                        double eps, std::span<T> dx, ChannelOutput dgamma, ChannelOutput dbeta,
                        const Options& options) {
  const DefaultFloatingPoint environment;
  const GivenWeights<T> given = checked(problem, weights, x, options);
  check::padding_differs(weights.padding);
  check::channels_present("mean", mean, problem);
  check::channels_present("var", var, problem);
  check::variances(var);
  check::gradients(dy, x, problem, gamma, eps, dx, dgamma, dbeta);
  check::apart({{"dx", dx}, {"dgamma", dgamma}, {"dbeta", dbeta}},
               {{"weights", weights.values}, {"mean", mean}, {"var", var}});
  run_weighted_normalize_backward(dy.data(), x.data(), problem, given, {mean, var}, gamma, eps, data_or_null(dx),
                                  dgamma, dbeta, options.threads);
}

#define BN_INSTANTIATE(T)                                                                                              \
  template void moments(std::span<const T>, const Problem&, const WeightsFor<T>&, std::span<Moments>, const Options&); \
  template void batch_norm(std::span<const T>, const Problem&, const WeightsFor<T>&, ChannelValues, ChannelValues,     \
                           double, std::span<T>, std::span<Moments>, const Options&);                                  \
  template void normalize(std::span<const T>, const Problem&, const WeightsFor<T>&, ChannelValues, ChannelValues,      \
                          ChannelValues, ChannelValues, double, std::span<T>, const Options&);                         \
  template void grad_sums(std::span<const T>, std::span<const T>, const Problem&, const WeightsFor<T>&,                \
                          std::span<const Moments>, std::span<GradSums>, const Options&);                              \
  template void grad_input(std::span<const T>, std::span<const T>, const Problem&, const WeightsFor<T>&,               \
                           std::span<const Moments>, std::span<const GradSums>, ChannelValues, double, std::span<T>,   \
                           const Options&);                                                                            \
  template void batch_norm_backward(std::span<const T>, std::span<const T>, const Problem&, const WeightsFor<T>&,      \
                                    std::span<const Moments>, ChannelValues, double, std::span<T>, ChannelOutput,      \
                                    ChannelOutput, const Options&);                                                    \
  template void normalize_backward(std::span<const T>, std::span<const T>, const Problem&, const WeightsFor<T>&,       \
                                   ChannelValues, ChannelValues, ChannelValues, double, std::span<T>, ChannelOutput,   \
                                   ChannelOutput, const Options&);
BN_INSTANTIATE(Float16)
BN_INSTANTIATE(BFloat16)
BN_INSTANTIATE(float)
BN_INSTANTIATE(double)
#undef BN_INSTANTIATE

}  // namespace batchnorm
