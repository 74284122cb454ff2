#include "tensors.hpp"

namespace bench {
namespace {

// Sums of four uniform parts of 16 random bits (SplitMix64): mean 0, variance 1, within 3.5, and faster than memory.
class NearlyNormal {
 public:
  double operator()() {
    std::uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    z ^= z >> 31;
    const auto sum = static_cast<double>((z & 0xffff) + (z >> 16 & 0xffff) + (z >> 32 & 0xffff) + (z >> 48));
    constexpr double kMean = 2 * 65535.0, kDeviation = 65536 / 1.7320508075688772;
    return (sum - kMean) / kDeviation;
  }

 private:
  std::uint64_t state_ = 1;
};

}  // namespace

template <class T>
Tensors<T>::Tensors(const batchnorm::Problem& problem, std::int64_t samples, int threads, Out out)
    : problem_(problem),
      samples_(samples),
      options_{threads},
      out_(out),
      x_(static_cast<std::size_t>(problem.size())),
      y_(x_.values().size()),
      dy_(x_.values().size()),
      dx_(x_.values().size()),
      gamma_(static_cast<std::size_t>(problem.channels)),
      beta_(gamma_),
      running_mean_(gamma_),
      running_var_(gamma_),
      dgamma_(gamma_),
      dbeta_(gamma_),
      moments_(gamma_.size()),
      sums_(gamma_.size()) {
  fill();
  run(Pass::moments);
  run(Pass::grad_sums);
  definition_ = define();
}

template <class T>
void Tensors<T>::fill() {
  NearlyNormal normal;
  for (T& value : x_.values()) value = static_cast<T>(0.5 + normal());
  for (T& value : dy_.values()) value = static_cast<T>(normal());
  for (T& value : y_.values()) value = T(0);
  for (T& value : dx_.values()) value = T(0);
  for (std::size_t c = 0; c < gamma_.size(); ++c) {
    gamma_[c] = static_cast<PerChannel>(1 + 0.1 * normal());
    beta_[c] = static_cast<PerChannel>(normal());
    running_mean_[c] = static_cast<PerChannel>(0.5 + 0.1 * normal());
    running_var_[c] = static_cast<PerChannel>(1 + 0.1 * normal());
  }
}

template <class T>
Buffer<T>& Tensors<T>::new_if_fresh(Buffer<T>& output) {
  if (out_ == Out::fresh) output.renew();
  return output;
}

template <class T>
void Tensors<T>::run(Pass pass) {
  const std::span<const T> x = x_.values(), dy = dy_.values();
  const std::span<const batchnorm::Moments> moments = moments_;
  const std::span<const batchnorm::GradSums> sums = sums_;
  const auto y = [this] { return new_if_fresh(y_).values(); };
  const auto dx = [this] { return new_if_fresh(dx_).values(); };
  switch (pass) {
    case Pass::train:
      return batchnorm::batch_norm<T>(x, problem_, gamma_, beta_, kEps, y(), moments_, options_);
    case Pass::infer:
      return batchnorm::normalize<T>(x, problem_, running_mean_, running_var_, gamma_, beta_, kEps, y(), options_);
    case Pass::backward:
      return batchnorm::batch_norm_backward<T>(dy, x, problem_, moments, gamma_, kEps, dx(), dgamma_, dbeta_, options_);
    case Pass::moments:
      return batchnorm::moments<T>(x, problem_, moments_, options_);
    case Pass::normalize:
      return batchnorm::normalize<T>(x, problem_, moments, gamma_, beta_, kEps, y(), options_);
    case Pass::grad_sums:
      return batchnorm::grad_sums<T>(dy, x, problem_, moments, sums_, options_);
    case Pass::grad_input:
      return batchnorm::grad_input<T>(dy, x, problem_, moments, sums, gamma_, kEps, dx(), options_);
    default:
      return is_relu(pass) ? run_relu(pass) : run_counted(pass);
  }
}

template <class T>
void Tensors<T>::move(Yardstick kind, Team& team, int threads, Stores stores) {
  if (kind == Yardstick::copy) return copy(team, threads, stores, new_if_fresh(y_).bytes(), x_.bytes());
  combine(team, threads, stores, new_if_fresh(dx_).bytes(), dy_.bytes(), x_.bytes());
}

template class Tensors<batchnorm::Float16>;
template class Tensors<batchnorm::BFloat16>;
template class Tensors<float>;
template class Tensors<double>;

}  // namespace bench
