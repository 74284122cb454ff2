// The passes with a ReLU behind them, and the definition of their results.
#include <cmath>

#include "require.hpp"
#include "tensors.hpp"

namespace bench {
namespace {

bool is_backward(Pass pass) { return pass == Pass::backward_relu || pass == Pass::backward_add_relu; }
bool is_inference(Pass pass) { return pass == Pass::infer_relu || pass == Pass::infer_add_relu; }
bool has_residual(Pass pass) { return pass >= Pass::train_add_relu; }

// As call.hpp describes it.
bool is_set(const std::vector<std::uint8_t>& mask, std::size_t element) {
  const std::size_t bit = 64 + mask[0] + element;
  return ((mask[bit / 8] >> (bit % 8)) & 1) != 0;
}

}  // namespace

template <class T>
Tensors<T>::WithRelu::WithRelu(const batchnorm::Problem& problem)
    : residual(static_cast<std::size_t>(problem.size())),
      dresidual(static_cast<std::size_t>(problem.size())),
      mask(static_cast<std::size_t>(batchnorm::relu_mask_bytes(problem))),
      moments(static_cast<std::size_t>(problem.channels)) {}

// The mask that backward passes read is that of training with a residual.
template <class T>
void Tensors<T>::prepare_relu() {
  if (with_relu_ != nullptr) return;
  with_relu_ = std::make_unique<WithRelu>(problem_);
  std::size_t n = 0;
  for (T& value : with_relu_->residual.values()) value = static_cast<T>(static_cast<double>(n++ % 1001) / 500 - 1);
  for (T& value : with_relu_->dresidual.values()) value = T(0);
  run_relu(Pass::train_add_relu);
}

template <class T>
void Tensors<T>::run_relu(Pass pass) {
  const std::span<const T> x = x_.values(), dy = dy_.values();
  WithRelu& k = *with_relu_;
  const std::span<const T> residual = has_residual(pass) ? k.residual.values() : std::span<T>{};
  batchnorm::Call<T> call{.problem = problem_, .gamma = gamma_, .beta = beta_, .eps = kEps};
  if (is_backward(pass)) {
    const std::span<T> dresidual = has_residual(pass) ? k.dresidual.values() : std::span<T>{};
    call.tail = {{}, true, k.mask};
    const batchnorm::Gradients<T> gradients{new_if_fresh(dx_).values(), dresidual, dgamma_, dbeta_};
    return batchnorm::batch_norm_backward<T>(dy, x, call, k.moments, gradients, options_);
  }
  const std::span<T> y = new_if_fresh(y_).values();
  if (is_inference(pass)) {
    call.tail = {residual, true, {}};
    return batchnorm::normalize<T>(x, call, running_mean_, running_var_, y, options_);
  }
  call.tail = {residual, true, k.mask};
  batchnorm::batch_norm<T>(x, call, y, k.moments, options_);
}

template <class T>
void Tensors<T>::verify_relu(Pass pass, const char* name) const {
  const WithRelu& k = *with_relu_;
  const auto channels = static_cast<std::size_t>(problem_.channels), inner = static_cast<std::size_t>(problem_.inner);
  const auto channel_of = [&](std::size_t at) { return at / inner % channels; };
  const auto x = x_.values(), dy = dy_.values(), y = y_.values(), dx = dx_.values(), r = k.residual.values();
  const auto dresidual = k.dresidual.values();
  const bool given = is_inference(pass);
  std::vector<double> sum(channels), dot(channels);
  for (std::size_t at = 0; at < x.size(); ++at) {
    const std::size_t c = channel_of(at);
    if (is_backward(pass) && is_set(k.mask, at)) {
      sum[c] += double{dy[at]};
      dot[c] += double{dy[at]} * (double{x[at]} - definition_.mean[c]);
    }
  }
  const auto count = static_cast<double>(problem_.count());
  for (std::size_t at = 0; at < x.size(); ++at) {
    const std::size_t c = channel_of(at);
    const double rstd = 1 / std::sqrt((given ? double{running_var_[c]} : definition_.var[c]) + kEps);
    const double xhat = (double{x[at]} - (given ? double{running_mean_[c]} : definition_.mean[c])) * rstd;
    const double gain = double{gamma_[c]}, shift = std::abs(double{beta_[c]});
    if (!is_backward(pass)) {
      const double total = gain * xhat + double{beta_[c]} + (has_residual(pass) ? double{r[at]} : 0);
      const double allowed = kRounding<T> * (4 * std::abs(gain) * (1 + rstd) + shift + 1);
      require(name, "y", at, double{y[at]}, std::max(total, 0.0), allowed);
      if (!given && std::abs(total) > allowed)
        require(name, "mask", at, is_set(k.mask, at) ? 1 : 0, total > 0 ? 1 : 0, 0);
      continue;
    }
    const double passed_on = is_set(k.mask, at) ? double{dy[at]} : 0, along = xhat * rstd * dot[c] / count;
    if (has_residual(pass)) require(name, "dresidual", at, double{dresidual[at]}, passed_on, 0);
    const double scale = std::abs(gain) * rstd * (4 + std::abs(sum[c]) / count + std::abs(along));
    require(name, "dx", at, double{dx[at]}, gain * rstd * (passed_on - sum[c] / count - along),
            2 * kRounding<T> * scale);
  }
}

#define BENCH_INSTANTIATE(T)                                          \
  template Tensors<T>::WithRelu::WithRelu(const batchnorm::Problem&); \
  template void Tensors<T>::prepare_relu();                           \
  template void Tensors<T>::run_relu(Pass);                           \
  template void Tensors<T>::verify_relu(Pass, const char*) const;
BENCH_INSTANTIATE(batchnorm::Float16)
BENCH_INSTANTIATE(batchnorm::BFloat16)
BENCH_INSTANTIATE(float)
BENCH_INSTANTIATE(double)
#undef BENCH_INSTANTIATE

}  // namespace bench
