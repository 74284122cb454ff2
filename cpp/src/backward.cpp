// Backward: grad_sums -> coefficients -> grad_input, or parts of that. Forward-mode is the same map of other
// coefficients, with a tangent in the place of dy.
#include <optional>
#include <vector>

#include "coefficients.hpp"
#include "grouped.hpp"
#include "passes.hpp"
#include "positionwise.hpp"
#include "short_runs.hpp"
#include "small.hpp"
#include "staged.hpp"
#include "traverse.hpp"

namespace batchnorm {
namespace {

using kernels::ColumnSums;
using kernels::GradAffine;
using kernels::GradAffineColumns;
using kernels::GradInputs;
using kernels::Rows;
using kernels::RowWalk;
using kernels::Runs;
using kernels::Sums;

// dx = gamma*rstd*dy from a variance that is constant; without values: dx = dy.
struct ConstantScale {
  ChannelValues var = {}, gamma = {};
  double eps = 0;
};
constexpr ConstantScale kUnchanged;

template <class T>
struct BackwardPass {
  using Value = T;
  using A = Arithmetic<T>;  // what coefficients are in
  using Table = CoefficientTable<A, GradAffine>;

  bool reduces;
  const PassCall<T>& call;
  const T *dy, *x;
  FirstOutputs<T> out = {};
  const Moments* moments = nullptr;  // null where only a constant scale is applied
  GradSums* sums_out = nullptr;
  const GradSums* sums_in = nullptr;           // where it applies but does not reduce
  const Tangents* tangents = nullptr;          // forward-mode: dy is a tangent of x, and dx becomes that of y
  const ConstantScale* given_scale = nullptr;  // of dx, whatever else is computed

  // What follows from these. Without dx, dresidual takes its place, with coefficients that change nothing.
  bool gates_alone = out.dx == nullptr && out.dresidual != nullptr;
  T *dx = gates_alone ? out.dresidual : out.dx, *dresidual = gates_alone ? nullptr : out.dresidual;
  const ConstantScale* constant_scale = gates_alone ? &kUnchanged : given_scale;
  bool applies = dx != nullptr;
  Plan plan = make_plan(call.problem, work(), call.options.threads);
  const kernels::KernelTable& table = *active_implementation().table;
  bool around_cache = plan.around_cache && !is_input(dx);
  bool dresidual_streams = around_cache && dresidual != nullptr && !is_input(dresidual) &&
                           values_past_line(dresidual) == values_past_line(dx);
  GradientOperands<T> operands{.table = table,
                               .in = {dy, x, call.tail.bits, call.tail.first_bit, dresidual, dresidual_streams},
                               .dx = dx,
                               .positions = {call.positions.values, call.positions.is_mask, plan.problem},
                               .padding = padding(),
                               .around_cache = around_cache,
                               .forward_mode = tangents != nullptr,
                               .residual_dot = call.tail.residual};
  bool staged = call.positions || without_kernel();
  const double* column_mean = nullptr;
  std::optional<Table> coefficients = {};

  [[nodiscard]] Work work() const {
    const bool along_residual = tangents != nullptr ? call.tail.residual != nullptr : dresidual != nullptr;
    return call.work(reduces, applies, 2 + (applies ? 1 : 0) + (along_residual ? 1 : 0));
  }
  [[nodiscard]] double mean(std::int64_t c) const { return moments[c].mean; }

  void sum_runs(std::int64_t offset, const Runs& runs, std::int64_t c, Sums* out) const {
    double means[kernels::kMostChannels];
    for (std::int64_t i = 0; i < runs.channels; ++i) means[i] = mean(c + i);
    sum_gradients(operands, offset, runs, c, means, out);
  }
  void sum_rows(std::int64_t offset, std::int64_t column, const Rows& rows, const ColumnSums& out) const {
    sum_gradients(operands, offset, column, rows, column_mean + column, out);
  }

  void finish(Range channels, const Sums* totals) {
    if (applies && constant_scale != nullptr) set_constant_scale(channels);
    if (moments == nullptr) return;
    for (std::int64_t begin = channels.begin; begin < channels.end; begin += kTogether) {
      const Range some{begin, std::min(begin + kTogether, channels.end)};
      const Sums* of_some = totals == nullptr ? nullptr : totals + (begin - channels.begin);
      if (!finish_at_once(some, of_some)) finish_some(some, of_some);
    }
  }

  // Where only dy is scaled, x is not read.
  void apply_runs(std::int64_t offset, const Runs& runs, std::int64_t c) const {
    if (staged || coefficients->any_wide()) return grad_input_staged(applied(), offset, runs, c, *coefficients);
    Runs at_once = runs;
    at_once.around_cache = around_cache;
    table.of<T>().runs_grad_input(inputs(offset), {}, dx + offset, at_once, coefficients->narrow(c));
  }
  void apply_rows(std::int64_t offset, const Rows& rows) const {
    if (coefficients->any_wide()) return grad_input_staged(applied(), offset, rows, *coefficients);
    if (!staged) return apply_all_rows(offset, rows);
    const bool is_masked_alone = call.positions.is_mask && call.padding != Padding::normalize &&
                                 call.tail.bits == nullptr && call.tail.residual == nullptr && dresidual == nullptr &&
                                 constant_scale == nullptr;
    if (!is_masked_alone || around_cache || !operands.positions.are_rows(rows.stride)) {
      return grad_input_staged(applied(), offset, rows, *coefficients);
    }
    apply_where_rows_count(operands.positions, call.padding, dy, dx, offset, rows,
                           [this](std::int64_t at, const Rows& some) { apply_all_rows(at, some); });
  }

 private:
  [[nodiscard]] bool is_input(const T* p) const { return p == dy || p == x; }
  [[nodiscard]] bool without_kernel() const {
    const bool gates = call.tail.bits != nullptr;
    if (tangents != nullptr) return gates || call.tail.residual != nullptr;
    return gates ? sizeof(T) == 2 : dresidual != nullptr || gates_alone;
  }
  // dresidual is 0 where dx is kept.
  [[nodiscard]] Padding padding() const {
    return gates_alone && call.padding == Padding::keep ? Padding::zero : call.padding;
  }
  [[nodiscard]] GradInputs<T> inputs(std::int64_t offset) const {
    GradInputs<T> in = operands.in;
    in.at = offset;
    if (constant_scale != nullptr) in.x = nullptr;
    return in;
  }
  [[nodiscard]] GradientOperands<T> applied() const {
    GradientOperands<T> in = operands;
    if (constant_scale != nullptr) in.in.x = nullptr;
    return in;
  }
  void apply_all_rows(std::int64_t offset, Rows rows) const {
    const Table& k = *coefficients;
    if (around_cache && rows.columns == plan.apply_rows.columns) rows.walk = RowWalk::around_cache;
    GradInputs<T> in = inputs(offset);
    in.streams = in.streams && rows.walk == RowWalk::around_cache;  // those of the rest go by columns
    const GradAffineColumns<A> columns{k.narrow_columns(0), k.narrow_columns(1), k.narrow_columns(2),
                                       k.narrow_columns(3), k.narrow_columns(4)};
    table.of<T>().rows_grad_input(in, {}, dx + offset, rows, columns);
  }

  // At most kTogether channels, of which all are as usual; else false.
  bool finish_at_once(Range channels, const Sums* totals) {
    if constexpr (std::is_same_v<A, float>) {
      const std::int64_t first = channels.begin, n = channels.end - first;
      const bool is_plain = applies && constant_scale == nullptr && tangents == nullptr && !call.positions;
      if (!is_plain || totals == nullptr || n < kWorthTurning) return false;
      SumsTogether sums(totals, n);
      double g[kTogether], of_gamma[kTogether], of_beta[kTogether];
      read_channels(call.gamma, channels, 1, g);
      typename Table::Fields k;
      const kernels::GradAffineOut to{k[0], k[1], k[2], k[3], k[4]};
      if (!table.formulas.grad_input(moments + first, sums.columns, n, call.eps, g, to, of_gamma, of_beta))
        return false;
      for (std::int64_t i = 0; i < n; ++i) {
        out.dgamma.set(first + i, of_gamma[i]);
        out.dbeta.set(first + i, of_beta[i]);
      }
      coefficients->set(channels, k);
      return true;
    }
    return false;
  }
  // At most kTogether channels. First rstd alone: its divisions and roots take so long that they should overlap.
  void finish_some(Range channels, const Sums* totals) {
    double rstd_hi[kTogether], rstd_lo[kTogether];
    const std::int64_t first = channels.begin, count = channels.end - channels.begin;
    for_channels<A>(count, [&]<class V>(std::int64_t i) {
      const auto m = MomentsOf<V>::at(moments + first + i);
      const TwoParts<V> rstd = rstd_for<A>(m, call.eps);
      scatter<V>(m.count == 0 ? V{} : rstd.hi, rstd_hi + i);
      scatter<V>(m.count == 0 ? V{} : rstd.lo, rstd_lo + i);
    });
    const bool weighs = sizeof(A) == sizeof(float) && call.positions && !call.positions.is_mask && tangents == nullptr;
    const WeightSizes sizes{call.summary.total.hi, call.summary.least};
    for_channels<A>(count, [&]<class V>(std::int64_t i) {
      auto m = MomentsOf<V>::at(moments + first + i);
      const GradSumsOf<V> s = sums_of<V>(first + i, totals == nullptr ? nullptr : totals + i);
      const TwoParts<V> rstd{gather<V>(rstd_hi + i), gather<V>(rstd_lo + i)};
      put(first + i, s, dgamma_of<A>(m, s, rstd));
      m.count = m.count == 0 ? all<V>(1) : m.count;  // nothing to divide by, and a rstd of 0
      if (!applies || constant_scale != nullptr) return;
      auto k = coefficients_of<V>(first + i, m, s, rstd);
      if constexpr (sizeof(A) == sizeof(float)) {
        if (weighs) k.is_wide |= weighted_fits(k.wide, rstd.hi, sizes, call.is_shared) == 0;
      }
      coefficients->set(first + i, k);
    });
  }

  void set_constant_scale(Range channels) {
    for (std::int64_t c = channels.begin; c < channels.end; ++c) {
      const TwoParts<double> rstd = rstd_for<A, double>(constant_scale->var.value_or(c, 1), constant_scale->eps);
      const auto k = frozen_backward_coefficients<A>(rstd, constant_scale->gamma.value_or(c, 1));
      const auto without_x = [](const kernels::Affine<double>& of_dy) {
        return GradAffine<double>{of_dy.center, of_dy.scale, 0, 0, of_dy.offset};
      };
      coefficients->set(c, Coefficients<double, GradAffine>{without_x(k.narrow), without_x(k.wide), k.is_wide});
    }
  }

  // Of the channels of a V from c on; `totals` are null for an empty batch, whose sums are 0.
  template <class V>
  [[nodiscard]] GradSumsOf<V> sums_of(std::int64_t c, const Sums* totals) const {
    if (!reduces) return GradSumsOf<V>::at(sums_in + c);
    if (totals == nullptr) return {};
    return {{gather<V>(totals, &Sums::first), gather<V>(totals, &Sums::first_lo)},
            {gather<V>(totals, &Sums::second), gather<V>(totals, &Sums::second_lo)}};
  }
  template <class V>
  [[nodiscard]] Coefficients<V, GradAffine> coefficients_of(std::int64_t c, const MomentsOf<V>& m,
                                                            const GradSumsOf<V>& s, const TwoParts<V>& rstd) const {
    const V scale = read_channels<V>(call.gamma, c, 1);
    if (tangents == nullptr && call.is_shared) {
      return grad_affine<A, V>(m, {}, factor<A>(scale, rstd), s.dy_xmu.hi, s.dy.hi);
    }
    if (tangents == nullptr) return backward_coefficients<A, V>(m, m.count, s, rstd, scale);
    return jvp_coefficients<A, V>(m, s, rstd, scale, read_channels<V>(tangents->gamma, c, 0),
                                  read_channels<V>(tangents->beta, c, 0));
  }
  template <class V>
  void put(std::int64_t c, const GradSumsOf<V>& s, const V& dgamma_c) const {
    const V dbeta_c = dbeta_of(s);
    for (int l = 0; l < kChannelsOf<V>; ++l) {
      if (sums_out != nullptr) {
        sums_out[c + l] = {lane(s.dy.hi, l), lane(s.dy.lo, l), lane(s.dy_xmu.hi, l), lane(s.dy_xmu.lo, l)};
      }
      out.dgamma.set(c + l, lane(dgamma_c, l));
      out.dbeta.set(c + l, lane(dbeta_c, l));
    }
  }
};

}  // namespace

template <class T>
void Backward<T>::grad_sums(const T* dy, const T* x, const Moments* moments, GradSums* out) const {
  if (call.each_position) return Positionwise<T>(call).grad_sums(dy, x, moments, out);
  if (call.is_grouped()) return Grouped<T>(call).grad_sums(dy, x, moments, out);
  if (has_short_runs(call.problem)) return run_short_grad_sums(dy, x, call, moments, out);
  BackwardPass<T> pass{.reduces = true, .call = call, .dy = dy, .x = x, .moments = moments, .sums_out = out};
  run_pass(pass, call.options);
}

template <class T>
void Backward<T>::grad_input(const T* dy, const T* x, const Moments* moments, const GradSums* sums,
                             const FirstOutputs<T>& out) const {
  if (call.each_position) return Positionwise<T>(call).grad_input(dy, x, moments, sums, out);
  if (call.is_grouped()) return Grouped<T>(call).grad_input(dy, x, moments, sums, out);
  if (has_short_runs(call.problem)) return run_short_grad_input(dy, x, call, moments, sums, out);
  BackwardPass<T> pass{
      .reduces = false, .call = call, .dy = dy, .x = x, .out = out, .moments = moments, .sums_in = sums};
  run_pass(pass, call.options);
}

template <class T>
void Backward<T>::batch_norm(const T* dy, const T* x, const Moments* saved, const FirstOutputs<T>& out) const {
  if (call.each_position) return Positionwise<T>(call).batch_norm_backward(dy, x, saved, out);
  if (call.is_grouped()) return Grouped<T>(call).batch_norm_backward(dy, x, saved, out);
  if (has_short_runs(call.problem)) return run_short_backward(dy, x, call, saved, out);
  if (run_small_backward(dy, x, call, saved, out)) return;
  BackwardPass<T> pass{.reduces = true, .call = call, .dy = dy, .x = x, .out = out, .moments = saved};
  run_pass(pass, call.options);
}

// The sums about the means; dx; what is per channel is written last.
template <class T>
void Backward<T>::normalize(const T* dy, const T* x, const GivenStatistics& given, const FirstOutputs<T>& out) const {
  const std::int64_t channels = call.problem.channels;
  std::vector<Moments> moments(out.dgamma.wanted() || out.dbeta.wanted() ? static_cast<std::size_t>(channels) : 0);
  std::vector<GradSums> sums(moments.size());
  for (std::size_t c = 0; c < moments.size(); ++c) moments[c].mean = given.mean[static_cast<std::int64_t>(c)];
  if (!moments.empty()) grad_sums(dy, out.dgamma.wanted() ? x : dy, moments.data(), sums.data());
  if (out.dx != nullptr && out.dresidual == nullptr && call.tail.bits == nullptr && !call.positions) {
    GivenStatistics only_scale = given;
    only_scale.only_scale = true;
    Forward<T>{call}.normalize(dy, only_scale, out.dx);
  } else if (out.dx != nullptr || out.dresidual != nullptr) {
    const ConstantScale scale{given.var, call.gamma, call.eps};
    BackwardPass<T> pass{
        .reduces = false, .call = call, .dy = dy, .x = x, .out = {out.dx, out.dresidual}, .given_scale = &scale};
    run_pass(pass, call.options);
  }
  run_here([&] {
    for (std::size_t at = 0; at < moments.size(); ++at) {
      const auto c = static_cast<std::int64_t>(at);
      const auto m = MomentsOf<double>::at(&moments[at]);
      const auto s = GradSumsOf<double>::at(&sums[at]);
      out.dgamma.set(c, dgamma_of<double>(m, s, rstd_of(DoubleDouble{given.var[c], 0}, call.eps)));
      out.dbeta.set(c, dbeta_of(s));
    }
  });
}

template <class T>
void Backward<T>::tangent_sums(const T* x_dot, const T* x, const Moments* saved, GradSums* out) const {
  const Tangents none;
  BackwardPass<T> pass{
      .reduces = true, .call = call, .dy = x_dot, .x = x, .moments = saved, .sums_out = out, .tangents = &none};
  run_pass(pass, call.options);
}

template <class T>
void Backward<T>::batch_norm_jvp(const T* x_dot, const T* x, const Moments* saved, const GradSums* sums,
                                 const Tangents& tangents, T* y_dot) const {
  if (call.each_position) return Positionwise<T>(call).batch_norm_jvp(x_dot, x, saved, tangents, y_dot);
  if (call.is_grouped()) return Grouped<T>(call).batch_norm_jvp(x_dot, x, saved, tangents, y_dot);
  if (has_short_runs(call.problem) && call.tail.empty() && call.tail.bits == nullptr) {
    return run_short_jvp(x_dot, x, call, saved, sums, tangents, y_dot);
  }
  BackwardPass<T> pass{.reduces = sums == nullptr,
                       .call = call,
                       .dy = x_dot,
                       .x = x,
                       .out = {.dx = y_dot},
                       .moments = saved,
                       .sums_in = sums,
                       .tangents = &tangents};
  run_pass(pass, call.options);
}

// mean' takes the place of mean(x'), and var'/2 that of mean(x'*(x - mean)).
template <class T>
void Backward<T>::normalize_jvp(const T* x_dot, const T* x, const GivenStatistics& given, const Tangents& tangents,
                                T* y_dot) const {
  const auto channels = static_cast<std::size_t>(call.problem.channels);
  std::vector<Moments> moments(channels);
  std::vector<GradSums> sums(channels);
  for (std::size_t at = 0; at < channels; ++at) {
    const auto c = static_cast<std::int64_t>(at);
    moments[at] = {1, given.mean[c], 0, given.var[c], 0};
    sums[at] = {tangents.mean.value_or(c, 0), 0, tangents.var.value_or(c, 0) / 2, 0};
  }
  const bool along_x = tangents.gamma.present() || tangents.var.present();
  BackwardPass<T> pass{.reduces = false,
                       .call = call,
                       .dy = x_dot,
                       .x = along_x ? x : x_dot,
                       .out = {.dx = y_dot},
                       .moments = moments.data(),
                       .sums_in = sums.data(),
                       .tangents = &tangents};
  run_pass(pass, call.options);
}

template struct Backward<Float16>;
template struct Backward<BFloat16>;
template struct Backward<float>;
template struct Backward<double>;

}  // namespace batchnorm
