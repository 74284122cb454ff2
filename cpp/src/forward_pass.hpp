// Forward: moments -> coefficients -> normalize, or parts of that, on kernels that Calls choose. Calls give, beside
// what pass.hpp says,
//   SummedValues<T> summed(const Plan&)   what is summed, for settle(); a count of 0: nothing
//   void sum_runs(offset, Runs, c, Sums*), sum_rows(offset, column, Rows, ColumnSums)
//   void apply_runs(const Plan&, offset, Runs, c, narrow), apply_runs_wide(offset, Runs, c, wide)
//   void apply_rows(const Plan&, offset, Rows, narrow), apply_rows_mixed(offset, Rows, narrow, wide)
#pragma once

#include "pass.hpp"
#include "passes.hpp"
#include "settle.hpp"

namespace batchnorm {

template <class T, class Calls>
class ForwardPass {
 public:
  using A = Arithmetic<T>;  // what coefficients are in
  using Table = CoefficientTable<A, kernels::Affine>;
  static constexpr std::int64_t kItemSize = sizeof(T);

  bool reduces, applies;
  Calls calls;
  Moments* saved = nullptr;    // where the pass reduces
  GivenStatistics given = {};  // where it does not
  ChannelValues gamma = {}, beta = {};
  double eps = 0;
  Plan plan = {};
  Table* coefficients = nullptr;  // where it applies

  void sum_runs(std::int64_t offset, const kernels::Runs& runs, std::int64_t c, kernels::Sums* out) const {
    calls.sum_runs(offset, runs, c, out);
  }
  void sum_rows(std::int64_t offset, std::int64_t column, const kernels::Rows& rows,
                const kernels::ColumnSums& out) const {
    calls.sum_rows(offset, column, rows, out);
  }
  void add_blocks(const kernels::ColumnSums& first, std::int64_t count, std::int64_t stride, std::int64_t columns,
                  const kernels::ColumnSums& total) const {
    calls.kernels.add_blocks(first, count, stride, columns, total);
  }

  void finish(Range channels, const kernels::Sums* totals) {
    if (reduces) {
      const SummedValues<T> values = calls.summed(plan);
      if (totals != nullptr && values.count.hi > 0) {
        settle<T>(plan, values, channels, totals, saved);
      } else {
        std::fill(saved + channels.begin, saved + channels.end, Moments{});
      }
    }
    if (!applies) return;
    for (std::int64_t begin = channels.begin; begin < channels.end; begin += kTogether) {
      set_coefficients({begin, std::min(begin + kTogether, channels.end)});
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
    const kernels::AffineColumns<A> narrow{k.narrow_columns(0), k.narrow_columns(1), k.narrow_columns(2)};
    if (!k.any_wide()) return calls.apply_rows(plan, offset, rows, narrow);
    const kernels::AffineColumns<double> wide{k.wide_columns(0), k.wide_columns(1), k.wide_columns(2)};
    calls.apply_rows_mixed(offset, rows, narrow, {k.mask(), wide});
  }

 private:
  // Of at most kTogether channels.
  void set_coefficients(Range channels) const {
    const std::int64_t first = channels.begin, count = channels.end - channels.begin;
    double g[kTogether], b[kTogether];
    read_channels(gamma, channels, 1, g);
    read_channels(beta, channels, 0, b);
    if (reduces || given.moments != nullptr) {
      const Moments* moments = (reduces ? saved : given.moments) + first;
      return for_channels<A>(count, [&]<class V>(std::int64_t i) {
        forward_coefficients<A, V>(MomentsOf<V>::at(moments + i), eps, gather<V>(g + i), gather<V>(b + i),
                                   [&](const auto& k) { coefficients->set(first + i, k); });
      });
    }
    double mean[kTogether], var[kTogether];
    read_channels(given.mean, channels, 0, mean);
    read_channels(given.var, channels, 0, var);
    for_channels<A>(count, [&]<class V>(std::int64_t i) {
      const TwoParts<V> rstd = rstd_for<A>(gather<V>(var + i), eps);
      const V gamma_i = gather<V>(g + i);
      if (given.only_scale) return coefficients->set(first + i, frozen_backward_coefficients<A>(rstd, gamma_i));
      forward_coefficients<A, V>(gather<V>(mean + i), rstd, gamma_i, gather<V>(b + i),
                                 [&](const auto& k) { coefficients->set(first + i, k); });
    });
  }
};

}  // namespace batchnorm
