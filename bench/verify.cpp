// Tensors<T>::verify(): the definition of every result, in plain float64 loops in the order of memory.
#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "require.hpp"
#include "tensors.hpp"

namespace bench {
namespace {

// Added to a result to spoil it: more than rounding may do.
template <class T>
constexpr double kSpoils = sizeof(T) == 2 ? 0.5 : 0.001;

// f(channel, place) for every value.
template <class F>
void each_value(const batchnorm::Problem& problem, F f) {
  std::size_t at = 0;
  for (std::int64_t o = 0; o < problem.outer; ++o) {
    for (std::int64_t c = 0; c < problem.channels; ++c) {
      for (std::int64_t i = 0; i < problem.inner; ++i) f(static_cast<std::size_t>(c), at++);
    }
  }
}

double rstd_of(double var) { return 1 / std::sqrt(var + kEps); }

}  // namespace

template <class T>
typename Tensors<T>::Definition Tensors<T>::define() const {
  const auto channels = static_cast<std::size_t>(problem_.channels);
  const auto count = static_cast<double>(problem_.count());
  const T *x = x_.values().data(), *dy = dy_.values().data();
  Definition d;
  for (auto* part : {&d.mean, &d.var, &d.sum_dy, &d.sum_dy_xmu}) part->assign(channels, 0);
  each_value(problem_, [&](std::size_t c, std::size_t at) { d.mean[c] += double{x[at]}; });
  for (double& mean : d.mean) mean /= count;
  each_value(problem_, [&](std::size_t c, std::size_t at) {
    const double xmu = double{x[at]} - d.mean[c];
    d.var[c] += xmu * xmu;
    d.sum_dy[c] += double{dy[at]};
    d.sum_dy_xmu[c] += double{dy[at]} * xmu;
  });
  for (double& var : d.var) var /= count;
  return d;
}

template <class T>
void Tensors<T>::verify(Pass pass, bool spoil) {
  if (is_counted(pass)) prepare_counted(pass);
  if (is_relu(pass)) prepare_relu();
  forget_results(pass);
  run(pass);
  if (spoil) spoil_one_value(pass);
  switch (pass) {
    case Pass::train:
      verify_moments();
      return verify_y("train", definition_.mean, definition_.var);
    case Pass::infer:
      return verify_y("infer", {running_mean_.begin(), running_mean_.end()},
                      {running_var_.begin(), running_var_.end()});
    case Pass::backward:
      verify_channel_gradients();
      return verify_dx("backward");
    case Pass::moments:
      return verify_moments();
    case Pass::normalize:
      return verify_y("normalize", definition_.mean, definition_.var);
    case Pass::grad_sums:
      return verify_grad_sums();
    case Pass::grad_input:
      return verify_dx("grad_input");
    default:
      return is_relu(pass) ? verify_relu(pass, name_of(pass)) : verify_counted(pass, name_of(pass));
  }
}

// Before a pass runs: what another pass left must not stand for what this one failed to write.
template <class T>
void Tensors<T>::forget_results(Pass pass) {
  const auto forget = []<class Values>(Values&& values) {
    using Value = std::remove_reference_t<decltype(values[0])>;
    std::fill(values.begin(), values.end(), static_cast<Value>(std::numeric_limits<float>::quiet_NaN()));
  };
  if (writes_y(pass)) forget(y_.values());
  if (writes_dx(pass)) forget(dx_.values());
  if (pass == Pass::train || pass == Pass::moments) moments_.assign(moments_.size(), {});
  if (pass == Pass::grad_sums) sums_.assign(sums_.size(), {});
  if (pass == Pass::backward) {
    forget(dgamma_);
    forget(dbeta_);
  }
}

template <class T>
void Tensors<T>::spoil_one_value(Pass pass) {
  const std::size_t at = x_.values().size() / 2, c = gamma_.size() / 2;
  const auto spoil = [](T& value) { value = static_cast<T>(double{value} + kSpoils<T>); };
  if (writes_y(pass)) spoil(y_.values()[at]);
  if (writes_dx(pass)) spoil(dx_.values()[at]);
  if (pass == Pass::moments) moments_[c].mean += kSpoils<T>;
  if (pass == Pass::grad_sums) sums_[c].sum_dy += kSpoils<T> * static_cast<double>(problem_.count());
}

template <class T>
void Tensors<T>::verify(Yardstick kind, Team& team, int threads, Stores stores) {
  forget_results(kind == Yardstick::copy ? Pass::normalize : Pass::grad_input);
  move(kind, team, threads, stores);
  const auto x = std::as_bytes(x_.values()), dy = std::as_bytes(dy_.values());
  const auto moved = std::as_bytes(kind == Yardstick::copy ? y_.values() : dx_.values());
  for (std::size_t at = 0; at < moved.size(); ++at) {
    if (moved[at] != (kind == Yardstick::copy ? x[at] : x[at] ^ dy[at])) {
      throw std::runtime_error("the yardstick did not move byte " + std::to_string(at));
    }
  }
}

template <class T>
void Tensors<T>::verify_y(const char* pass, const std::vector<double>& mean, const std::vector<double>& var) const {
  std::vector<double> rstd(var.size());
  std::transform(var.begin(), var.end(), rstd.begin(), rstd_of);
  const T *x = x_.values().data(), *y = y_.values().data();
  each_value(problem_, [&](std::size_t c, std::size_t at) {
    const double g = double{gamma_[c]}, b = double{beta_[c]};
    const double scale = 4 * std::abs(g) + std::abs(b);
    require(pass, "y", at, double{y[at]}, g * (double{x[at]} - mean[c]) * rstd[c] + b, kRounding<T> * scale);
  });
}

template <class T>
void Tensors<T>::verify_dx(const char* pass) const {
  const auto count = static_cast<double>(problem_.count());
  const auto& d = definition_;
  std::vector<double> rstd(d.var.size()), mean_dy(rstd), dot(rstd);
  for (std::size_t c = 0; c < rstd.size(); ++c) {
    rstd[c] = rstd_of(d.var[c]);
    mean_dy[c] = d.sum_dy[c] / count;
    dot[c] = d.sum_dy_xmu[c] * rstd[c] / count;
  }
  const T *x = x_.values().data(), *dy = dy_.values().data(), *dx = dx_.values().data();
  each_value(problem_, [&](std::size_t c, std::size_t at) {
    const double xhat_dot = (double{x[at]} - d.mean[c]) * rstd[c] * dot[c], factor = double{gamma_[c]} * rstd[c];
    const double scale = std::abs(factor) * (4 + std::abs(mean_dy[c]) + std::abs(xhat_dot));
    require(pass, "dx", at, double{dx[at]}, factor * (double{dy[at]} - mean_dy[c] - xhat_dot), kRounding<T> * scale);
  });
}

template <class T>
void Tensors<T>::verify_moments() const {
  const auto count = static_cast<double>(problem_.count());
  for (std::size_t c = 0; c < moments_.size(); ++c) {
    require("moments", "count", c, moments_[c].count, count, 0);
    require("moments", "mean", c, moments_[c].mean, definition_.mean[c], kRounding<T>);
    require("moments", "m2", c, moments_[c].m2, definition_.var[c] * count, kRounding<T> * count);
  }
}

template <class T>
void Tensors<T>::verify_grad_sums() const {
  const double tolerance = kRounding<T> * static_cast<double>(problem_.count());
  for (std::size_t c = 0; c < sums_.size(); ++c) {
    require("grad_sums", "sum_dy", c, sums_[c].sum_dy, definition_.sum_dy[c], tolerance);
    require("grad_sums", "sum_dy_xmu", c, sums_[c].sum_dy_xmu, definition_.sum_dy_xmu[c], tolerance);
  }
}

template <class T>
void Tensors<T>::verify_channel_gradients() const {
  const double tolerance = 4 * kRounding<T> * static_cast<double>(problem_.count());
  for (std::size_t c = 0; c < dgamma_.size(); ++c) {
    const double dgamma = definition_.sum_dy_xmu[c] * rstd_of(definition_.var[c]);
    require("backward", "dgamma", c, double{dgamma_[c]}, dgamma, tolerance);
    require("backward", "dbeta", c, double{dbeta_[c]}, definition_.sum_dy[c], tolerance);
  }
}

template class Tensors<batchnorm::Float16>;
template class Tensors<batchnorm::BFloat16>;
template class Tensors<float>;
template class Tensors<double>;

}  // namespace bench
