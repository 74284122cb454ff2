// The passes over parts of a tensor: masks, weights, segments, groups and positions, and the definition of their
// results.
#include <algorithm>
#include <cmath>

#include "require.hpp"
#include "tensors.hpp"

namespace bench {
namespace {

bool is_masked(Pass pass) {
  return pass == Pass::train_masked || pass == Pass::infer_masked || pass == Pass::backward_masked;
}
bool is_graph(Pass pass) { return pass == Pass::train_graphs || pass == Pass::backward_graphs; }
bool is_segmented(Pass pass) {
  return pass == Pass::train_segments || pass == Pass::backward_segments || is_graph(pass);
}
bool is_grouped(Pass pass) { return pass == Pass::train_groups || pass == Pass::backward_groups; }
bool is_about_zero(Pass pass) { return pass == Pass::train_rms || pass == Pass::backward_rms; }
bool is_line(Pass pass) { return pass == Pass::train_lines || pass == Pass::backward_lines || is_about_zero(pass); }
// Whether all counts, and something else than the batch shares statistics.
bool is_shared(Pass pass) { return is_segmented(pass) || is_grouped(pass) || is_line(pass); }
bool is_backward(Pass pass) {
  return pass == Pass::backward_lines || pass == Pass::backward_rms || pass == Pass::backward_groups ||
         pass == Pass::backward_masked || pass == Pass::backward_weighted || pass == Pass::backward_segments ||
         pass == Pass::backward_graphs;
}

// Bits in no order that anybody could foresee.
std::size_t scrambled(std::size_t n) { return (n + 1) * 0x9e3779b97f4a7c15u >> 40; }

}  // namespace

// Three of four positions count; weights from 0.25 to 2; segments of 1 to 127 rows; alpha from 0 to 1; 32 groups of a
// sample, or one.
template <class T>
void Tensors<T>::count_parts() {
  counted_ = std::make_unique<Counted>();
  Counted& k = *counted_;
  const auto positions = static_cast<std::size_t>(problem_.count()), channels = gamma_.size();
  for (std::size_t p = 0; p < positions; ++p) {
    k.mask.push_back(p > 1 && scrambled(p) % 4 == 0 ? 0 : 1);
    k.weights.push_back(k.mask[p] * static_cast<PerChannel>(1 + scrambled(p + positions) % 8) / 4);
  }
  for (std::size_t s = 0; k.offsets.back() < problem_.outer; ++s) {
    const std::int64_t rows = 1 + static_cast<std::int64_t>(scrambled(s) % 127);
    k.offsets.push_back(std::min(k.offsets.back() + rows, problem_.outer));
  }
  for (std::size_t c = 0; c < channels; ++c) k.alpha.push_back(static_cast<PerChannel>(scrambled(c) % 5) / 4);
  k.moments.resize(channels);
  k.of_segments.resize(channels * (k.offsets.size() - 1));
  constexpr std::int64_t kGroups = 32;
  const std::int64_t rows = problem_.outer / samples_;
  for (std::int64_t n = 1; n <= samples_; ++n) k.samples.push_back(n * rows);
  k.width = problem_.channels % kGroups == 0 ? problem_.channels / kGroups : problem_.channels;
  k.of_groups.resize(static_cast<std::size_t>(samples_ * (problem_.channels / k.width)));
  k.of_lines.resize(positions);
}

template <class T>
batchnorm::Groups Tensors<T>::groups_of(Pass pass) const {
  if (is_graph(pass)) return {.offsets = counted_->offsets, .alpha = counted_->alpha};
  if (is_segmented(pass)) return {counted_->offsets};
  if (is_grouped(pass)) return {counted_->samples, counted_->width};
  if (is_line(pass)) {
    return {.width = problem_.channels,
            .each_position = true,
            .about = is_about_zero(pass) ? batchnorm::About::zero : batchnorm::About::mean};
  }
  return {};
}

template <class T>
void Tensors<T>::run_counted(Pass pass) {
  const std::span<const T> x = x_.values(), dy = dy_.values();
  Counted& k = *counted_;
  batchnorm::Call<T> call{.problem = problem_, .gamma = gamma_, .beta = beta_, .eps = kEps};
  call.groups = groups_of(pass);
  if (is_shared(pass)) {
    // all of it counts
  } else if (is_masked(pass)) {
    call.counted = {k.mask, batchnorm::Padding::zero};
  } else {
    call.counted = {k.weights, batchnorm::Padding::normalize};
  }
  const std::span<batchnorm::Moments> moments = is_segmented(pass) ? k.of_segments
                                                : is_grouped(pass) ? k.of_groups
                                                : is_line(pass)    ? k.of_lines
                                                                   : k.moments;
  if (is_backward(pass)) {
    const batchnorm::Gradients<T> gradients{.dx = new_if_fresh(dx_).values(), .dgamma = dgamma_, .dbeta = dbeta_};
    return batchnorm::batch_norm_backward<T>(dy, x, call, moments, gradients, options_);
  }
  const std::span<T> y = new_if_fresh(y_).values();
  if (pass == Pass::infer_masked) {
    return batchnorm::normalize<T>(x, call, running_mean_, running_var_, y, options_);
  }
  batchnorm::batch_norm<T>(x, call, y, moments, options_);
}

// What backward passes need, as forward ones leave it.
template <class T>
void Tensors<T>::prepare_counted(Pass pass) {
  if (counted_ == nullptr) count_parts();
  Counted& k = *counted_;
  const std::span<const T> x = x_.values();
  const auto& weights = is_masked(pass) ? k.mask : k.weights;
  batchnorm::moments<T>(x, batchnorm::Call<T>{.problem = problem_, .counted = {weights}}, k.moments, options_);
  const batchnorm::Call<T> of_groups{.problem = problem_, .groups = groups_of(pass)};
  if (is_segmented(pass)) batchnorm::moments<T>(x, of_groups, k.of_segments, options_);
  if (is_grouped(pass)) batchnorm::moments<T>(x, of_groups, k.of_groups, options_);
  if (is_line(pass)) batchnorm::moments<T>(x, of_groups, k.of_lines, options_);
}

// A value belongs to the group of its segment and channel, or some channels, and has a weight there.
template <class T>
void Tensors<T>::verify_counted(Pass pass, const char* name) const {
  const Counted& k = *counted_;
  const auto channels = static_cast<std::size_t>(problem_.channels), inner = static_cast<std::size_t>(problem_.inner);
  const auto outer = static_cast<std::size_t>(problem_.outer);
  const T *x = x_.values().data(), *dy = dy_.values().data(), *y = y_.values().data(), *dx = dx_.values().data();
  const batchnorm::Groups how = groups_of(pass);
  const auto width = static_cast<std::size_t>(how.width), groups_a_segment = channels / width;
  const auto each = [&](const auto& f) {  // f(group, channel, weight, place)
    std::size_t segment = 0, at = 0;
    for (std::size_t o = 0; o < outer; ++o) {
      while (!how.offsets.empty() && how.offsets[segment + 1] <= static_cast<std::int64_t>(o)) ++segment;
      for (std::size_t c = 0; c < channels; ++c) {
        for (std::size_t i = 0; i < inner; ++i) {
          const std::size_t position = o * inner + i;
          const double w = is_shared(pass) ? 1 : double{is_masked(pass) ? k.mask[position] : k.weights[position]};
          f((how.each_position ? position : segment) * groups_a_segment + c / width, c, w, at++);
        }
      }
    }
  };
  const std::size_t segments = how.offsets.empty() ? 1 : how.offsets.size() - 1;
  const std::size_t groups = groups_a_segment * (how.each_position ? outer * inner : segments);
  std::vector<double> total(groups), mean(groups), var(groups), sum(groups), dot(groups);
  const auto used = [&](double w) { return w != 0 || !is_masked(pass); };
  each([&](std::size_t g, std::size_t, double w, std::size_t at) { total[g] += w, mean[g] += w * double{x[at]}; });
  for (std::size_t g = 0; g < groups; ++g) mean[g] = is_about_zero(pass) ? 0 : mean[g] / total[g];
  // Of graph norm mean[g] becomes alpha times the mean, and what is left of the mean in x - mean[g].
  std::vector<double> left(groups);
  for (std::size_t g = 0; g < groups && is_graph(pass); ++g) {
    const double alpha = double{k.alpha[g % channels]};
    left[g] = (1 - alpha) * mean[g], mean[g] *= alpha;
  }
  each([&](std::size_t g, std::size_t c, double w, std::size_t at) {
    const double xmu = double{x[at]} - mean[g], of_dy = double{gamma_[c]} * double{dy[at]};
    var[g] += w * xmu * xmu / total[g];
    if (used(w)) sum[g] += of_dy, dot[g] += of_dy * xmu;
  });
  each([&](std::size_t g, std::size_t c, double w, std::size_t at) {
    const bool given = pass == Pass::infer_masked;
    const double rstd = 1 / std::sqrt((given ? double{running_var_[c]} : var[g]) + kEps), gain = double{gamma_[c]};
    const double xhat = (double{x[at]} - (given ? double{running_mean_[c]} : mean[g])) * rstd;
    if (!is_backward(pass)) {
      const double expected = used(w) ? gain * xhat + double{beta_[c]} : 0, shift = std::abs(double{beta_[c]});
      return require(name, "y", at, double{y[at]}, expected, kRounding<T> * (4 * std::abs(gain) * (1 + rstd) + shift));
    }
    const double share = w / total[g], along = share * xhat * rstd * dot[g];
    const double alpha = is_about_zero(pass) ? 0 : is_graph(pass) ? double{k.alpha[c]} : 1;
    const double through_mean = alpha * share * (sum[g] - rstd * rstd * dot[g] * left[g]);
    const double expected = used(w) ? rstd * (gain * double{dy[at]} - through_mean - along) : 0;
    const double parts = share * (std::abs(sum[g]) + std::abs(rstd * rstd * dot[g] * left[g])) + std::abs(along);
    const double scale = rstd * (4 * std::abs(gain) + parts);
    require(name, "dx", at, double{dx[at]}, expected, 2 * kRounding<T> * scale);
  });
}

#define BENCH_INSTANTIATE(T)                                    \
  template void Tensors<T>::run_counted(Pass);                  \
  template void Tensors<T>::prepare_counted(Pass);              \
  template void Tensors<T>::count_parts();                      \
  template batchnorm::Groups Tensors<T>::groups_of(Pass) const; \
  template void Tensors<T>::verify_counted(Pass, const char*) const;
BENCH_INSTANTIATE(batchnorm::Float16)
BENCH_INSTANTIATE(batchnorm::BFloat16)
BENCH_INSTANTIATE(float)
BENCH_INSTANTIATE(double)
#undef BENCH_INSTANTIATE

}  // namespace bench
