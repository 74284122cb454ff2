// The formulas between the passes (channel_math.hpp, gradient_math.hpp, group_math.hpp), by a thread for each entry of
// tables: each segment and channel, or group of channels.
#pragma once

#include "cuda/map.cuh"
#include "group_math.hpp"
#include "resum.hpp"

namespace batchnorm::cuda {

// ---- sums of pieces ----

// Sums of the blocks of a column, as kernels add blocks (kernels/accumulate-inl.hpp): bundles, each begun at 0.
// There are `columns` in each.
BN_DEVICE kernels::Sums sum_of_blocks(std::int64_t blocks, std::int64_t columns, const kernels::Sums* sums,
                                      std::int64_t e) {
  kernels::Sums total, bundle;
  for (std::int64_t b = 0; b < blocks; ++b) {
    batchnorm::add(bundle, sums[b * columns + e]);
    if (b + 1 < blocks && (b + 1) % kernels::kBundle != 0) continue;
    batchnorm::add(total, bundle);
    bundle = {};
  }
  return total;
}
BN_DEVICE kernels::Sums sum_of_column(const Cut& cut, const kernels::Sums* sums, std::int64_t e) {
  return sum_of_blocks(e < cut.width ? cut.rows.blocks : cut.rows.full_blocks, cut.rows.columns, sums, e);
}
// Of rows side by side: half of them to the other half, until there is one. Of column e of a single row.
BN_DEVICE kernels::Sums sum_side_by_side(const Cut& cut, const kernels::Sums* sums, std::int64_t e) {
  constexpr std::int64_t kMostRepeated = 64;  // rows of a column up to 64 values (plan.cpp)
  kernels::Sums of[kMostRepeated];
  std::int64_t rows = cut.rows.repeat;
  for (std::int64_t r = 0; r < rows; ++r) {
    const std::int64_t column = r * cut.width + e;
    of[r] = cut.rows.blocks == 1 ? sums[column] : sum_of_column(cut, sums, column);
  }
  for (; rows > 1; rows -= rows / 2) {
    for (std::int64_t r = 0; r < rows / 2; ++r) batchnorm::add(of[r], of[rows - rows / 2 + r]);
  }
  return of[0];
}
// Of channel c of segment s.
BN_DEVICE kernels::Sums sums_of_channel(const Cut& cut, const kernels::Sums* all, std::int64_t s, std::int64_t c,
                                        bool again) {
  const kernels::Sums* sums = all + s * cut.pieces();
  if (cut.pieces() == 0) return {};
  if (cut.planar) {
    const std::int64_t channels = cut.problem.channels;
    return added_up(cut.runs.chunks, [&](std::int64_t k) -> const kernels::Sums& { return sums[k * channels + c]; });
  }
  kernels::Sums total = again ? kernels::Sums{} : sum_side_by_side(cut, sums, c * cut.inner);
  for (std::int64_t i = again ? 0 : 1; i < cut.inner; ++i) {
    const std::int64_t e = c * cut.inner + i;
    batchnorm::add(total, again ? sum_of_column(cut, sums, e) : sum_side_by_side(cut, sums, e));
  }
  return total;
}

// ---- moments ----

// Called where not all fits into registers otherwise.
BN_DEVICE_CALL kernels::Sums called_sums(const Cut& cut, const kernels::Sums* all, std::int64_t s, std::int64_t c,
                                         bool again) {
  return sums_of_channel(cut, all, s, c, again);
}
// From the first sums, then from those about a shift, then from compensated ones, where a channel wanted them.
template <class T>
__global__ void __launch_bounds__(kStepThreads)
    finish_moments(const __grid_constant__ Cut cut, const kernels::Sums* sums, Weights<Arithmetic<T>> weights,
                   Again taken, Conditioned* conditioned, Moments* saved) {
  using A = Arithmetic<T>;
  if (this_thread() >= cut.entries()) return;
  const Divided place(this_thread(), cut.problem.channels);
  const std::int64_t s = place.quotient, e = cut.entry_of(s) + place.rest;
  const DoubleDouble count = weights.count(cut.segments.number_of(s), cut.problem.count());
  Conditioned& how = conditioned[e];
  if (!(count.hi > 0)) {
    saved[e] = {};
    how = {Again::no, 0};
    return;
  }
  if (taken == Again::no || how.again == taken) {
    const double shift = taken == Again::about_shift ? how.shift : 0;
    const kernels::Sums total = called_sums(cut, sums, s, place.rest, taken != Again::no);
    moments_from_sums<A, double>(count, shift, &total).put(saved + e);
  }
  Moments& m = saved[e];
  how = {Again::no, 0};
  if (taken == Again::no && needs_shift<A>(m)) how = {Again::about_shift, static_cast<double>(static_cast<A>(m.mean))};
  if (taken == Again::about_shift && mean_below(m, Conditioning<A>::kCompensateBelow) && std::isfinite(m.m2)) {
    how.again = Again::compensated;
  }
}
// Of the values of channel c in memory, one after the other: what no sum tells. x and weights are of this problem.
template <class T>
BN_DEVICE void settle_in_memory(const Problem& p, const T* x, const Arithmetic<T>* weights, const DoubleDouble& count,
                                std::int64_t c, Moments& m) {
  const auto each = [&](const auto& f) {
    for (std::int64_t o = 0; o < p.outer; ++o) {
      for (std::int64_t i = 0; i < p.inner; ++i) {
        const double w = weights == nullptr ? 1 : static_cast<double>(weights[o * p.inner + i]);
        if (w != 0) f(widened(x[(o * p.channels + c) * p.inner + i]), w);
      }
    }
  };
  settle_value_by_value<Arithmetic<T>>(each, count, m);
}
// The same of a line, whose values are `apart`.
template <class T>
BN_DEVICE void settle_line(const T* from, std::int64_t width, std::int64_t apart, Moments& m) {
  const auto each = [&](const auto& f) {
    for (std::int64_t j = 0; j < width; ++j) f(widened(from[j * apart]), 1.0);
  };
  settle_value_by_value<Arithmetic<T>>(each, {static_cast<double>(width), 0}, m);
}
// At last, where no sum tells enough: by threads of which nearly all leave at once.
template <class T>
__global__ void __launch_bounds__(kStepThreads)
    settle_moments(const __grid_constant__ Cut cut, const T* x, Weights<Arithmetic<T>> weights, Moments* saved) {
  if (this_thread() >= cut.entries()) return;
  const Divided place(this_thread(), cut.problem.channels);
  const std::int64_t s = place.quotient, c = place.rest, e = cut.entry_of(s) + c;
  if (!(saved[e].count > 0)) return;
  const LinesOf& lines = cut.lines;
  if (lines.width > 0) return settle_line(x + lines.begin(c), lines.width, lines.inner, saved[e]);
  const std::int64_t first = cut.position_of(s);
  settle_in_memory(cut.problem, x + first * cut.problem.channels,
                   weights.values == nullptr ? nullptr : weights.values + first,
                   weights.count(cut.segments.number_of(s), cut.problem.count()), c, saved[e]);
}

// ---- groups of channels (grouped.hpp) ----

// Which channels share statistics, and about what.
struct Sharing {
  std::int64_t channels = 1, width = 1;
  bool strided = false, about_zero = false;
  ChannelValues alpha = {};

  [[nodiscard]] BN_BOTH std::int64_t groups() const { return channels / width; }
  [[nodiscard]] BN_DEVICE std::int64_t step() const { return strided ? groups() : 1; }
  // The entry of the first channel of a group of a segment.
  [[nodiscard]] BN_DEVICE std::int64_t first(const Divided& group) const {
    return group.quotient * channels + (strided ? group.rest : group.rest * width);
  }
  [[nodiscard]] BN_DEVICE double alpha_of(std::int64_t channel) const {
    return about_zero ? 0 : alpha.value_or(channel, 1);
  }
};

template <class A>
BN_DEVICE_CALL Moments called_merged(const Moments* cells, std::int64_t width, std::int64_t step) {
  return merged<A>(cells, width, step);
}
template <class T>
__global__ void __launch_bounds__(kStepThreads)
    merge_groups(const __grid_constant__ Sharing how, std::int64_t segments, const Moments* cells, Moments* out) {
  const std::int64_t g = this_thread();
  if (g >= segments * how.groups()) return;
  out[g] = called_merged<Arithmetic<T>>(cells + how.first(Divided(g, how.groups())), how.width, how.step());
}
// What the channels of a group have of it.
template <class T>
__global__ void __launch_bounds__(kStepThreads)
    share_moments(const __grid_constant__ Sharing how, std::int64_t segments, const Moments* of_groups,
                  Moments* cells) {
  const std::int64_t e = this_thread();
  if (e >= segments * how.channels) return;
  const Divided place(e, how.channels);
  const std::int64_t g = how.strided ? Divided(place.rest, how.groups()).rest : Divided(place.rest, how.width).quotient;
  const double alpha = how.alpha_of(place.rest);
  Moments m = of_groups[place.quotient * how.groups() + g];
  if (alpha != 1 && m.count > 0) m = about(m, alpha);
  cells[e] = m;
}

// ---- coefficients ----

// Values of channels, or of entries where there are more.
BN_DEVICE double value_of(const ChannelValues& values, std::int64_t e, std::int64_t channels, double absent) {
  if (!values.present()) return absent;
  return values[static_cast<std::int64_t>(values.size()) == channels ? Divided(e, channels).rest : e];
}

// What a tensor is normalized by: moments, or where these are null the mean and var that are given.
struct Statistics {
  const Moments* moments = nullptr;
  ChannelValues mean = {}, var = {};
};
// `is_spread`: whether moments are those of the channel's own values.
template <class T>
__global__ void __launch_bounds__(kStepThreads)
    finish_forward(std::int64_t channels, bool is_spread, Statistics of, ChannelValues gamma, ChannelValues beta,
                   double eps, FactorTable<Arithmetic<T>> factors) {
  using A = Arithmetic<T>;
  const std::int64_t e = this_thread();
  if (e >= factors.entries) return;
  const auto to = [&](const Coefficients<double, kernels::Affine>& k) { factors.set(e, k); };
  const double g = value_of(gamma, e, channels, 1), b = value_of(beta, e, channels, 0);
  if (of.moments != nullptr) {
    return forward_coefficients<A, double>(MomentsOf<double>::at(of.moments + e), eps, g, b, is_spread, to);
  }
  forward_coefficients<A, double>(of.mean[e], rstd_for<A, double>(of.var[e], eps), g, b, to);
}

// ---- gradients ----

BN_DEVICE GradSums grad_sums_of(const kernels::Sums& s) { return {s.first, s.first_lo, s.second, s.second_lo}; }

// The gradients of an entry from its sums; what its coefficients are.
template <class T>
BN_DEVICE Coefficients<double, kernels::GradAffine> set_gradients(const GradSums& sums, const Moments& saved,
                                                                  double gamma, double eps, std::int64_t e,
                                                                  const ChannelOutput& dgamma,
                                                                  const ChannelOutput& dbeta) {
  using A = Arithmetic<T>;
  auto m = MomentsOf<double>::at(&saved);
  const auto s = GradSumsOf<double>::at(&sums);
  const DoubleDouble rstd = m.count == 0 ? DoubleDouble{} : rstd_for<A>(m, eps);
  dgamma.set(e, dgamma_of<A>(m, s, rstd));
  dbeta.set(e, dbeta_of(s));
  m.count = m.count == 0 ? 1 : m.count;
  return backward_coefficients<A, double>(m, m.count, s, rstd, gamma);
}
// Of a channel that shares statistics, from its terms (set_terms).
template <class T>
BN_DEVICE Coefficients<double, kernels::GradAffine> shared_coefficients(const GradSums& terms, const Moments& shared,
                                                                        double gamma, double eps) {
  using A = Arithmetic<T>;
  const auto m = MomentsOf<double>::at(&shared);
  const DoubleDouble rstd = m.count == 0 ? DoubleDouble{} : rstd_for<A>(m, eps);
  return grad_affine<A, double>(m, {}, factor<A>(gamma, rstd), terms.sum_dy_xmu, terms.sum_dy);
}
// Whether float32 holds what weights make of coefficients.
template <class T>
BN_DEVICE bool fits_weights(const Coefficients<double, kernels::GradAffine>& k, const Moments& saved, double eps,
                            const Weights<Arithmetic<T>>& weights, std::int64_t segment, bool is_shared) {
  using A = Arithmetic<T>;
  if (sizeof(A) == sizeof(double) || weights.is_mask(segment)) return true;
  const auto m = MomentsOf<double>::at(&saved);
  const double rstd = m.count == 0 ? 0 : rstd_for<A>(m, eps).hi;
  const Weighed& of = weights.weighed[segment];
  return weighted_fits(k.wide, rstd, {of.total.hi, of.least}, is_shared);
}

// The sums of a channel, and what else is wanted of them.
struct GradientOutputs {
  GradSums* sums = nullptr;
  ChannelOutput dgamma = {}, dbeta = {};
};
template <class T>
__global__ void __launch_bounds__(kStepThreads) finish_sums(const __grid_constant__ Cut cut, const kernels::Sums* taken,
                                                            const Moments* saved, double eps, GradientOutputs out) {
  if (this_thread() >= cut.entries()) return;
  const Divided place(this_thread(), cut.problem.channels);
  const std::int64_t e = cut.entry_of(place.quotient) + place.rest;
  const GradSums sums = grad_sums_of(called_sums(cut, taken, place.quotient, place.rest, false));
  if (out.sums != nullptr) out.sums[e] = sums;
  set_gradients<T>(sums, saved[e], 1, eps, e, out.dgamma, out.dbeta);
}
// What the sums of its channels give to each channel of a group.
template <class T>
__global__ void __launch_bounds__(kStepThreads)
    set_terms(const __grid_constant__ Sharing how, std::int64_t segments, const Moments* of_groups,
              const Moments* shared, const GradSums* sums, ChannelValues gamma, double eps, GradSums* terms) {
  using A = Arithmetic<T>;
  const std::int64_t g = this_thread();
  if (g >= segments * how.groups()) return;
  const Divided group(g, how.groups());
  const std::int64_t first = how.first(group), end = first + how.width * how.step();
  const auto m = MomentsOf<double>::at(shared + first);
  SumOfProducts<A> dy, dy_xmu;
  for (std::int64_t e = first; e < end; e += how.step()) {
    const auto s = GradSumsOf<double>::at(sums + e);
    const double factor = value_of(gamma, e, how.channels, 1);
    dy.add(factor, s.dy);
    dy_xmu.add(factor, centered_dot(m, s));
  }
  const double alpha = how.alpha_of(first - group.quotient * how.channels);
  const GradSums all = group_terms<A>(m, dy, dy_xmu, eps, alpha, of_groups[g].mean);
  for (std::int64_t e = first; e < end; e += how.step()) terms[e] = all;
}
// Coefficients of dx from sums, or from terms of channels that share statistics.
template <class T>
__global__ void __launch_bounds__(kStepThreads)
    finish_backward(std::int64_t channels, bool is_shared, const GradSums* sums, const Moments* saved,
                    Weights<Arithmetic<T>> weights, ChannelValues gamma, double eps,
                    FactorTable<Arithmetic<T>> factors) {
  const std::int64_t e = this_thread();
  if (e >= factors.entries) return;
  const double g = value_of(gamma, e, channels, 1);
  auto k = is_shared ? shared_coefficients<T>(sums[e], saved[e], g, eps)
                     : set_gradients<T>(sums[e], saved[e], g, eps, e, {}, {});
  k.is_wide |= !fits_weights<T>(k, saved[e], eps, weights, Divided(e, channels).quotient, is_shared);
  factors.set(e, k);
}

// Where statistics are constants: dx = gamma*rstd*dy. `taken` may be null, where no sums are wanted.
template <class T>
__global__ void __launch_bounds__(kStepThreads)
    finish_constant(const __grid_constant__ Cut cut, const kernels::Sums* taken, ChannelValues mean, ChannelValues var,
                    ChannelValues gamma, double eps, ChannelOutput dgamma, ChannelOutput dbeta,
                    FactorTable<Arithmetic<T>> factors) {
  using A = Arithmetic<T>;
  const std::int64_t c = this_thread();
  if (c >= cut.problem.channels) return;
  if (taken != nullptr) {
    const GradSums sums = grad_sums_of(sums_of_channel(cut, taken, 0, c, false));
    const auto s = GradSumsOf<double>::at(&sums);
    const MomentsOf<double> of_mean{0, mean[c], 0, 0, 0};
    dgamma.set(c, dgamma_of<double>(of_mean, s, rstd_of(DoubleDouble{var[c], 0}, eps)));
    dbeta.set(c, dbeta_of(s));
  }
  const auto k = frozen_backward_coefficients<A>(rstd_for<A, double>(var[c], eps), gamma.value_or(c, 1));
  const auto of_dy = [](const kernels::Affine<double>& a) {
    return kernels::GradAffine<double>{a.center, a.scale, 0, 0, a.offset};
  };
  factors.set(c, Coefficients<double, kernels::GradAffine>{of_dy(k.narrow), of_dy(k.wide), k.is_wide});
}

// To which segment each row belongs, of segments of `rows` rows of `inner` places.
template <class T>
__global__ void __launch_bounds__(kStepThreads)
    number_rows(const __grid_constant__ Cut cut, std::int64_t rows, std::int64_t inner, int* numbers) {
  if (this_thread() >= cut.segments.count * rows) return;
  const Divided place(this_thread(), rows);
  const std::int64_t s = place.quotient;
  numbers[cut.position_of(s) / inner + place.rest] = static_cast<int>(cut.segments.number_of(s));
}

// Gradients of channels from those of their segments, first segment first, errors kept (segments.hpp).
template <class T>
__global__ void __launch_bounds__(kStepThreads)
    sum_segments(std::int64_t channels, std::int64_t segments, const double* values, ChannelOutput out) {
  const std::int64_t c = this_thread();
  if (c >= channels) return;
  DoubleDouble total;
  for (std::int64_t s = 0; s < segments; ++s) {
    const DoubleDouble sum = two_sum(total.hi, values[s * channels + c]);
    total = {sum.hi, total.lo + sum.lo};
  }
  out.set(c, std::isfinite(total.hi) ? total.hi + total.lo : total.hi);
}

}  // namespace batchnorm::cuda
