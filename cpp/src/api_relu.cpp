// The public functions with a ReLU: check, run, return.
#include "batchnorm/relu.hpp"
#include "check.hpp"
#include "floating_point.hpp"
#include "relu.hpp"

namespace batchnorm {
namespace {

std::int64_t mask_bytes(const Problem& problem) {
  // The head, a bit an element, up to 15 bits before them, and what kernels may read behind.
  return kReluMaskHead + (problem.size() + 15 + 7) / 8 + 4;
}

template <class T>
void check_forward(std::span<const T> x, const Problem& problem, std::span<const T> residual, ChannelValues gamma,
                   ChannelValues beta, double eps, std::span<T> y, std::span<std::uint8_t> mask,
                   const Options& options) {
  check::problem(problem);
  check::threads(options.threads);
  check::size("x", x.size(), problem);
  check::channels_or_absent("gamma", gamma, problem);
  check::channels_or_absent("beta", beta, problem);
  check::eps(eps);
  check::output("y", y, problem, x, "x");
  if (!residual.empty()) {
    check::size("residual", residual.size(), problem);
    check::no_partial_overlap("y", y.data(), "residual", residual.data(), residual.size_bytes());
  }
  check::apart({{"y", y}}, {{"gamma", gamma}, {"beta", beta}});
  if (mask.empty()) return;
  check::mask_bytes(mask.size(), mask_bytes(problem));
  check::apart({{"mask", mask}}, {{"x", x}, {"y", y}, {"residual", residual}, {"gamma", gamma}, {"beta", beta}});
}

template <class T>
void check_backward(std::span<const T> dy, std::span<const T> x, const Problem& problem,
                    std::span<const std::uint8_t> mask, ChannelValues gamma, double eps, std::span<T> dx,
                    std::span<T> dresidual, ChannelOutput dgamma, ChannelOutput dbeta, const Options& options) {
  check::problem(problem);
  check::threads(options.threads);
  check::size("x", x.size(), problem);
  check::gradients(dy, x, problem, gamma, eps, dx, dgamma, dbeta);
  check::mask_bytes(mask.size(), mask_bytes(problem));
  check::apart({{"dx", dx}, {"dgamma", dgamma}, {"dbeta", dbeta}}, {{"mask", mask}});
  if (dresidual.empty()) return;
  check::output("dresidual", dresidual, problem, dy, "dy");
  check::no_partial_overlap("dresidual", dresidual.data(), "x", x.data(), x.size_bytes());
  check::apart({{"dresidual", dresidual}},
               {{"mask", mask}, {"dx", dx}, {"dgamma", dgamma}, {"dbeta", dbeta}, {"gamma", gamma}});
}

}  // namespace

std::int64_t relu_mask_bytes(const Problem& problem) {
  check::problem(problem);
  return mask_bytes(problem);
}

template <class T>
void batch_norm_relu(std::span<const T> x, const Problem& problem, std::span<const T> residual, ChannelValues gamma,
                     ChannelValues beta, double eps, std::span<T> y, std::span<std::uint8_t> mask,
                     std::span<Moments> saved, const Options& options) {
  const DefaultFloatingPoint environment;
  check_forward(x, problem, residual, gamma, beta, eps, y, mask, options);
  check::channels("saved", saved.size(), problem);
  check::batch_values(problem);
  check::apart({{"saved", saved}},
               {{"x", x}, {"residual", residual}, {"y", y}, {"mask", mask}, {"gamma", gamma}, {"beta", beta}});
  const ReluInto<T> into{data_or_null(residual), y.data(), data_or_null(mask)};
  run_batch_norm_relu(x.data(), problem, gamma, beta, eps, into, saved.data(), options.threads);
}

template <class T>
void normalize_relu(std::span<const T> x, const Problem& problem, std::span<const T> residual, ChannelValues mean,
                    ChannelValues var, ChannelValues gamma, ChannelValues beta, double eps, std::span<T> y,
                    std::span<std::uint8_t> mask, const Options& options) {
  const DefaultFloatingPoint environment;
  check_forward(x, problem, residual, gamma, beta, eps, y, mask, options);
  check::channels_present("mean", mean, problem);
  check::channels_present("var", var, problem);
  check::variances(var);
  check::apart({{"y", y}, {"mask", mask}}, {{"mean", mean}, {"var", var}});
  const ReluInto<T> into{data_or_null(residual), y.data(), data_or_null(mask)};
  run_normalize_relu(x.data(), problem, {mean, var}, gamma, beta, eps, into, options.threads);
}

template <class T>
void batch_norm_relu_backward(std::span<const T> dy, std::span<const T> x, const Problem& problem,
                              std::span<const std::uint8_t> mask, std::span<const Moments> saved, ChannelValues gamma,
                              double eps, std::span<T> dx, std::span<T> dresidual, ChannelOutput dgamma,
                              ChannelOutput dbeta, const Options& options) {
  const DefaultFloatingPoint environment;
  check_backward(dy, x, problem, mask, gamma, eps, dx, dresidual, dgamma, dbeta, options);
  check::channels("saved", saved.size(), problem);
  check::counts_of_batch("saved", saved, problem);
  check::apart({{"dx", dx}, {"dresidual", dresidual}, {"dgamma", dgamma}, {"dbeta", dbeta}}, {{"saved", saved}});
  const ReluGradients<T> out{data_or_null(dx), data_or_null(dresidual), dgamma, dbeta};
  run_batch_norm_relu_backward(dy.data(), x.data(), problem, mask.data(), saved.data(), gamma, eps, out,
                               options.threads);
}

template <class T>
void normalize_relu_backward(std::span<const T> dy, std::span<const T> x, const Problem& problem,
                             std::span<const std::uint8_t> mask, ChannelValues mean, ChannelValues var,
                             ChannelValues gamma, double eps, std::span<T> dx, std::span<T> dresidual,
                             ChannelOutput dgamma, ChannelOutput dbeta, const Options& options) {
  const DefaultFloatingPoint environment;
  check_backward(dy, x, problem, mask, gamma, eps, dx, dresidual, dgamma, dbeta, options);
  check::channels_present("mean", mean, problem);
  check::channels_present("var", var, problem);
  check::variances(var);
  check::apart({{"dx", dx}, {"dresidual", dresidual}, {"dgamma", dgamma}, {"dbeta", dbeta}},
               {{"mean", mean}, {"var", var}});
  const ReluGradients<T> out{data_or_null(dx), data_or_null(dresidual), dgamma, dbeta};
  run_normalize_relu_backward(dy.data(), x.data(), problem, mask.data(), {mean, var}, gamma, eps, out, options.threads);
}

#define BN_INSTANTIATE(T)                                                                                              \
  template void batch_norm_relu(std::span<const T>, const Problem&, std::span<const T>, ChannelValues, ChannelValues,  \
                                double, std::span<T>, std::span<std::uint8_t>, std::span<Moments>, const Options&);    \
  template void normalize_relu(std::span<const T>, const Problem&, std::span<const T>, ChannelValues, ChannelValues,   \
                               ChannelValues, ChannelValues, double, std::span<T>, std::span<std::uint8_t>,            \
                               const Options&);                                                                        \
  template void batch_norm_relu_backward(                                                                              \
      std::span<const T>, std::span<const T>, const Problem&, std::span<const std::uint8_t>, std::span<const Moments>, \
      ChannelValues, double, std::span<T>, std::span<T>, ChannelOutput, ChannelOutput, const Options&);                \
  template void normalize_relu_backward(                                                                               \
      std::span<const T>, std::span<const T>, const Problem&, std::span<const std::uint8_t>, ChannelValues,            \
      ChannelValues, ChannelValues, double, std::span<T>, std::span<T>, ChannelOutput, ChannelOutput, const Options&);
BN_INSTANTIATE(Float16)
BN_INSTANTIATE(BFloat16)
BN_INSTANTIATE(float)
BN_INSTANTIATE(double)
#undef BN_INSTANTIATE

}  // namespace batchnorm
