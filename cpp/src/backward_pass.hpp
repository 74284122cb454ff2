// Backward: grad_sums -> coefficients -> grad_input, or parts of that, on kernels that Calls choose. Calls give, beside
// what pass.hpp says,
//   void sum_runs(offset, Runs, c, mean, Sums*), sum_rows(offset, column, Rows, mean, ColumnSums)
//   void apply_runs(const Plan&, offset, Runs, c, narrow), apply_runs_wide(offset, Runs, c, wide)
//   void apply_rows(const Plan&, offset, Rows, narrow), apply_rows_mixed(offset, Rows, narrow, wide)
// Forward-mode is the same map of other coefficients, with a tangent in the place of dy.
#pragma once

#include <vector>

#include "pass.hpp"
#include "passes.hpp"

namespace batchnorm {

// dx = gamma*rstd*dy from a variance that is constant; without values: dx = dy.
struct ConstantScale {
  ChannelValues var = {}, gamma = {};
  double eps = 0;
};

template <class T, class Calls>
class BackwardPass {
 public:
  using A = Arithmetic<T>;  // what coefficients are in
  using Table = CoefficientTable<A, kernels::GradAffine>;
  static constexpr std::int64_t kItemSize = sizeof(T);

  bool reduces, applies;
  Calls calls;
  const Moments* moments;  // null where only a constant scale is applied
  GradSums* sums_out = nullptr;
  const GradSums* sums_in = nullptr;  // where it applies but does not reduce
  ChannelOutput dgamma = {}, dbeta = {};
  ChannelValues gamma = {};
  double eps = 0;
  bool forward_mode = false;  // dy is a tangent of x, and dx becomes that of y
  ChannelValues gamma_dot = {}, beta_dot = {};
  const ConstantScale* constant_scale = nullptr;  // of dx, whatever else is computed
  const double* column_mean = nullptr;            // interleaved and reduces: moments[...].mean, per column
  Plan plan = {};
  Table* coefficients = nullptr;  // where it applies

  void sum_runs(std::int64_t offset, const kernels::Runs& runs, std::int64_t c, kernels::Sums* out) const {
    double mean[kernels::kMostChannels];
    for (std::int64_t i = 0; i < runs.channels; ++i) mean[i] = moments[c + i].mean;
    calls.sum_runs(offset, runs, c, mean, out);
  }
  void sum_rows(std::int64_t offset, std::int64_t column, const kernels::Rows& rows,
                const kernels::ColumnSums& out) const {
    calls.sum_rows(offset, column, rows, column_mean + column, out);
  }
  void add_blocks(const kernels::ColumnSums& first, std::int64_t count, std::int64_t stride, std::int64_t columns,
                  const kernels::ColumnSums& total) const {
    calls.kernels.add_blocks(first, count, stride, columns, total);
  }

  void finish(Range channels, const kernels::Sums* totals) {
    if (applies && constant_scale != nullptr) set_constant_scale(channels);
    if (moments == nullptr) return;
    for (std::int64_t begin = channels.begin; begin < channels.end; begin += kTogether) {
      const Range some{begin, std::min(begin + kTogether, channels.end)};
      finish_some(some, totals == nullptr ? nullptr : totals + (begin - channels.begin));
    }
  }
  void lay_out(Range channels) { coefficients->lay_out(channels); }

  void apply_runs(std::int64_t offset, const kernels::Runs& runs, std::int64_t c) const {
    apply_by_width(
        *coefficients, offset, runs, c,
        [this](std::int64_t at, const kernels::Runs& some, std::int64_t first) {
          calls.apply_runs(plan, at, some, first, coefficients->narrow(first));
        },
        [this](std::int64_t at, const kernels::Runs& one, std::int64_t channel) {
          calls.apply_runs_wide(at, one, channel, coefficients->wide(channel));
        });
  }
  void apply_rows(std::int64_t offset, const kernels::Rows& rows) const {
    const Table& k = *coefficients;
    const kernels::GradAffineColumns<A> narrow{k.narrow_columns(0), k.narrow_columns(1), k.narrow_columns(2),
                                               k.narrow_columns(3), k.narrow_columns(4)};
    if (!k.any_wide()) return calls.apply_rows(plan, offset, rows, narrow);
    const kernels::GradAffineColumns<double> wide{k.wide_columns(0), k.wide_columns(1), k.wide_columns(2),
                                                  k.wide_columns(3), k.wide_columns(4)};
    calls.apply_rows_mixed(offset, rows, narrow, {k.mask(), wide});
  }

 private:
  // At most kTogether channels. First rstd alone: its divisions and roots take so long that they should overlap.
  void finish_some(Range channels, const kernels::Sums* totals) {
    double rstd_hi[kTogether], rstd_lo[kTogether];
    const std::int64_t first = channels.begin, count = channels.end - channels.begin;
    for_channels<A>(count, [&]<class V>(std::int64_t i) {
      const auto m = MomentsOf<V>::at(moments + first + i);
      const TwoParts<V> rstd = rstd_for<A>(m, eps);
      scatter<V>(m.count == 0 ? V{} : rstd.hi, rstd_hi + i);
      scatter<V>(m.count == 0 ? V{} : rstd.lo, rstd_lo + i);
    });
    for_channels<A>(count, [&]<class V>(std::int64_t i) {
      auto m = MomentsOf<V>::at(moments + first + i);
      const GradSumsOf<V> s = sums_of<V>(first + i, totals == nullptr ? nullptr : totals + i);
      const TwoParts<V> rstd{gather<V>(rstd_hi + i), gather<V>(rstd_lo + i)};
      put(first + i, s, dgamma_of<A>(m, s, rstd));
      m.count = m.count == 0 ? all<V>(1) : m.count;  // nothing to divide by, and a rstd of 0
      if (!applies || constant_scale != nullptr) return;
      auto k = coefficients_of<V>(first + i, m, s, rstd);
      if constexpr (sizeof(A) == sizeof(float) && requires { calls.weights; }) {
        if (!calls.weights.is_mask()) k.is_wide |= weighted_fits(k.wide, rstd.hi, calls.weights.sizes()) == 0;
      }
      coefficients->set(first + i, k);
    });
  }

  void set_constant_scale(Range channels) const {
    for (std::int64_t c = channels.begin; c < channels.end; ++c) {
      const TwoParts<double> rstd = rstd_for<A, double>(constant_scale->var.value_or(c, 1), constant_scale->eps);
      const auto k = frozen_backward_coefficients<A>(rstd, constant_scale->gamma.value_or(c, 1));
      const auto without_x = [](const kernels::Affine<double>& of_dy) {
        return kernels::GradAffine<double>{of_dy.center, of_dy.scale, 0, 0, of_dy.offset};
      };
      coefficients->set(c,
                        Coefficients<double, kernels::GradAffine>{without_x(k.narrow), without_x(k.wide), k.is_wide});
    }
  }

  // Of the channels of a V from c on; `totals` are null for an empty batch, whose sums are 0.
  template <class V>
  [[nodiscard]] GradSumsOf<V> sums_of(std::int64_t c, const kernels::Sums* totals) const {
    using kernels::Sums;
    if (!reduces) return GradSumsOf<V>::at(sums_in + c);
    if (totals == nullptr) return {};
    return {{gather<V>(totals, &Sums::first), gather<V>(totals, &Sums::first_lo)},
            {gather<V>(totals, &Sums::second), gather<V>(totals, &Sums::second_lo)}};
  }
  template <class V>
  [[nodiscard]] Coefficients<V, kernels::GradAffine> coefficients_of(std::int64_t c, const MomentsOf<V>& m,
                                                                     const GradSumsOf<V>& s,
                                                                     const TwoParts<V>& rstd) const {
    const V scale = read_channels<V>(gamma, c, 1);
    if (!forward_mode) return backward_coefficients<A, V>(m, s, rstd, scale);
    return jvp_coefficients<A, V>(m, s, rstd, scale, read_channels<V>(gamma_dot, c, 0),
                                  read_channels<V>(beta_dot, c, 0));
  }
  template <class V>
  void put(std::int64_t c, const GradSumsOf<V>& s, const V& dgamma_c) const {
    const V dbeta_c = dbeta_of(s);
    for (int l = 0; l < kChannelsOf<V>; ++l) {
      if (sums_out != nullptr) {
        sums_out[c + l] = {lane(s.dy.hi, l), lane(s.dy.lo, l), lane(s.dy_xmu.hi, l), lane(s.dy_xmu.lo, l)};
      }
      dgamma.set(c + l, lane(dgamma_c, l));
      dbeta.set(c + l, lane(dbeta_c, l));
    }
  }
};

// Gradients of statistics that are constants. sum(moments, sums) takes the sums about the means of moments, apply()
// writes dx; what is per channel is written last.
template <class Sum, class Apply>
void gradients_of_constants(const GivenStatistics& given, std::int64_t channels, double eps, ChannelOutput dgamma,
                            ChannelOutput dbeta, const Sum& sum, const Apply& apply) {
  std::vector<Moments> moments(dgamma.wanted() || dbeta.wanted() ? static_cast<std::size_t>(channels) : 0);
  std::vector<GradSums> sums(moments.size());
  for (std::size_t c = 0; c < moments.size(); ++c) moments[c].mean = given.mean[static_cast<std::int64_t>(c)];
  if (!moments.empty()) sum(moments.data(), sums.data());
  apply();
  run_here([&] {
    for (std::size_t at = 0; at < moments.size(); ++at) {
      const auto c = static_cast<std::int64_t>(at);
      const auto m = MomentsOf<double>::at(&moments[at]);
      const auto s = GradSumsOf<double>::at(&sums[at]);
      dgamma.set(c, dgamma_of<double>(m, s, rstd_of(DoubleDouble{given.var[c], 0}, eps)));
      dbeta.set(c, dbeta_of(s));
    }
  });
}

}  // namespace batchnorm
