// Backward: grad_sums -> coefficients -> grad_input, or parts of that. Forward-mode is the same map of other
// coefficients, with a tangent in the place of dy.
#include <vector>

#include "pass.hpp"
#include "short_runs.hpp"
#include "small.hpp"

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

template <class T>
struct BackwardPass {
  using A = Arithmetic<T>;  // what coefficients are in
  using Table = CoefficientTable<A, GradAffine>;
  static constexpr std::int64_t kItemSize = sizeof(T);

  bool reduces, applies;
  const Part<T>& call;
  const T *dy, *x;
  T *dx = nullptr, *dresidual = nullptr;
  const Moments* moments = nullptr;  // null where only a constant scale is applied
  GradSums* sums_out = nullptr;
  const GradSums* sums_in = nullptr;  // where it applies but does not reduce
  ChannelOutput dgamma = {}, dbeta = {};
  const Tangents* tangents = nullptr;             // forward-mode: dy is a tangent of x, and dx becomes that of y
  const ConstantScale* constant_scale = nullptr;  // of dx, whatever else is computed
  const double* column_mean = nullptr;            // interleaved and reduces: moments[...].mean, per column
  Plan plan = {};
  Table* coefficients = nullptr;  // where it applies
  const kernels::KernelTable& table = *active_implementation().table;
  // Set by prepare().
  GradientOperands<T> operands{table, {}};
  bool around_cache = false, staged = false;

  void prepare() {
    operands.in = {.dy = dy, .x = x, .bits = call.tail.bits, .first_bit = call.tail.first_bit, .dresidual = dresidual};
    operands.dx = dx;
    operands.positions = call.positions;
    operands.positions.problem = plan.problem;
    operands.padding = call.padding;
    around_cache = plan.around_cache && !is_input(dx);
    operands.around_cache = around_cache;
    operands.in.streams = around_cache && dresidual != nullptr && !is_input(dresidual) &&
                          values_past_line(dresidual) == values_past_line(dx);
    operands.forward_mode = tangents != nullptr;
    operands.residual_dot = call.tail.residual;
    const bool gates = call.tail.bits != nullptr;
    const bool without_kernel = tangents != nullptr ? gates || call.tail.residual != nullptr
                                : gates             ? sizeof(T) == 2
                                                    : dresidual != nullptr;
    staged = call.positions || without_kernel;
  }

  void sum_runs(std::int64_t offset, const Runs& runs, std::int64_t c, Sums* out) const {
    double mean[kernels::kMostChannels];
    for (std::int64_t i = 0; i < runs.channels; ++i) mean[i] = moments[c + i].mean;
    sum_gradients(operands, offset, runs, c, mean, out);
  }
  void sum_rows(std::int64_t offset, std::int64_t column, const Rows& rows, const ColumnSums& out) const {
    sum_gradients(operands, offset, column, rows, column_mean + column, out);
  }
  void add_blocks(const ColumnSums& first, std::int64_t count, std::int64_t stride, std::int64_t columns,
                  const ColumnSums& total) const {
    table.of<T>().add_blocks(first, count, stride, columns, total);
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
  void lay_out(Range channels) { coefficients->lay_out(channels); }

  // Where only dy is scaled, x is not read.
  void apply_runs(std::int64_t offset, const Runs& runs, std::int64_t c) const {
    if (staged || coefficients->any_wide()) return grad_input_staged(applied(), offset, runs, c, *coefficients);
    Runs at_once = runs;
    at_once.around_cache = around_cache;
    table.of<T>().runs_grad_input(inputs(offset), {}, dx + offset, at_once, coefficients->narrow(c));
  }
  void apply_rows(std::int64_t offset, const Rows& rows) const {
    if (coefficients->any_wide()) return grad_input_staged(applied(), offset, rows, *coefficients);
    if (!staged) return apply_counted_rows(offset, rows);
    const bool is_masked_alone = call.positions.is_mask && call.padding != Padding::normalize &&
                                 call.tail.bits == nullptr && call.tail.residual == nullptr && dresidual == nullptr &&
                                 constant_scale == nullptr;
    if (!is_masked_alone || around_cache || !operands.positions.are_rows(rows.stride)) {
      return grad_input_staged(applied(), offset, rows, *coefficients);
    }
    apply_where_rows_count(operands.positions, call.padding, dy, dx, offset, rows,
                           [this](std::int64_t at, const Rows& some) { apply_counted_rows(at, some); });
  }

 private:
  [[nodiscard]] bool is_input(const T* p) const { return p == dy || p == x; }
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
  void apply_counted_rows(std::int64_t offset, Rows rows) const {
    const Table& k = *coefficients;
    if (around_cache && rows.columns == plan.apply_rows.columns) rows.walk = RowWalk::around_cache;
    GradInputs<T> in = inputs(offset);
    in.streams = in.streams && rows.walk == RowWalk::around_cache;  // those of the rest go by columns
    const GradAffineColumns<A> columns{k.narrow_columns(0), k.narrow_columns(1), k.narrow_columns(2),
                                       k.narrow_columns(3), k.narrow_columns(4)};
    table.of<T>().rows_grad_input(in, {}, dx + offset, rows, columns);
  }

  // At most kTogether channels, of which all are as usual; else false.
  bool finish_at_once(Range channels, const Sums* totals) const {
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
        dgamma.set(first + i, of_gamma[i]);
        dbeta.set(first + i, of_beta[i]);
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
        if (weighs) k.is_wide |= weighted_fits(k.wide, rstd.hi, sizes) == 0;
      }
      coefficients->set(first + i, k);
    });
  }

  void set_constant_scale(Range channels) const {
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
      dgamma.set(c + l, lane(dgamma_c, l));
      dbeta.set(c + l, lane(dbeta_c, l));
    }
  }
};

template <class T>
int streams_of(const FirstOutputs<T>& out) {
  return out.dresidual == nullptr ? 3 : 4;
}

// Of a call whose tail has the residual's tangent.
template <class T>
BackwardPass<T> forward_mode(const T* x_dot, const T* x, const Part<T>& call, const Moments* moments,
                             const GradSums* sums, const Tangents& tangents, T* y_dot) {
  BackwardPass<T> pass{.reduces = sums == nullptr, .applies = true, .call = call, .dy = x_dot, .x = x, .dx = y_dot};
  pass.moments = moments;
  pass.sums_in = sums;
  pass.tangents = &tangents;
  return pass;
}

}  // namespace

template <class T>
void run_grad_sums(const T* dy, const T* x, const Part<T>& call, const Moments* moments, GradSums* out, int threads,
                   const PartOf& part) {
  if (has_short_runs(call.problem)) {
    return run_short_grad_sums(dy, x, call, moments, out, threads, part);
  }
  BackwardPass<T> pass{.reduces = true, .applies = false, .call = call, .dy = dy, .x = x};
  pass.moments = moments;
  pass.sums_out = out;
  run(pass, 3, threads, part);
}

template <class T>
void run_grad_input(const T* dy, const T* x, const Part<T>& call, const Moments* moments, const GradSums* sums,
                    const FirstOutputs<T>& out, int threads, const PartOf& part) {
  if (has_short_runs(call.problem)) {
    return run_short_grad_input(dy, x, call, moments, sums, out, threads, part);
  }
  BackwardPass<T> pass{.reduces = false, .applies = true, .call = call, .dy = dy, .x = x, .dx = out.dx};
  pass.dresidual = out.dresidual;
  pass.moments = moments;
  pass.sums_in = sums;
  run(pass, streams_of(out), threads, part);
}

// Without dx, dresidual takes its place, with coefficients that change nothing.
template <class T>
void run_batch_norm_backward(const T* dy, const T* x, const Part<T>& call, const Moments* saved,
                             const FirstOutputs<T>& out, int threads, const PartOf& part) {
  if (has_short_runs(call.problem)) {
    return run_short_backward(dy, x, call, saved, out, threads, part);
  }
  if (run_small_backward(dy, x, call, saved, out, threads, part)) return;
  const ConstantScale unchanged;
  const bool gate_alone = out.dx == nullptr && out.dresidual != nullptr;
  BackwardPass<T> pass{.reduces = true,
                       .applies = out.dx != nullptr || gate_alone,
                       .call = call,
                       .dy = dy,
                       .x = x,
                       .dx = gate_alone ? out.dresidual : out.dx,
                       .dresidual = gate_alone ? nullptr : out.dresidual};
  if (gate_alone) pass.constant_scale = &unchanged;
  pass.moments = saved;
  pass.dgamma = out.dgamma;
  pass.dbeta = out.dbeta;
  run(pass, streams_of(out), threads, part);
}

// The sums about the means; dx; what is per channel is written last.
template <class T>
void run_normalize_backward(const T* dy, const T* x, const Part<T>& call, const GivenStatistics& given,
                            const FirstOutputs<T>& out, int threads) {
  const std::int64_t channels = call.problem.channels;
  std::vector<Moments> moments(out.dgamma.wanted() || out.dbeta.wanted() ? static_cast<std::size_t>(channels) : 0);
  std::vector<GradSums> sums(moments.size());
  for (std::size_t c = 0; c < moments.size(); ++c) moments[c].mean = given.mean[static_cast<std::int64_t>(c)];
  if (!moments.empty()) {
    run_grad_sums(dy, out.dgamma.wanted() ? x : dy, call, moments.data(), sums.data(), threads);
  }
  const bool gate_alone = out.dx == nullptr;
  const ConstantScale scale = gate_alone ? ConstantScale{} : ConstantScale{given.var, call.gamma, call.eps};
  if (out.dx != nullptr && out.dresidual == nullptr && call.tail.bits == nullptr && !call.positions) {
    GivenStatistics only_scale = given;
    only_scale.only_scale = true;
    run_normalize(dy, call, only_scale, out.dx, threads);
  } else if (out.dx != nullptr || out.dresidual != nullptr) {
    BackwardPass<T> pass{.reduces = false,
                         .applies = true,
                         .call = call,
                         .dy = dy,
                         .x = x,
                         .dx = gate_alone ? out.dresidual : out.dx,
                         .dresidual = gate_alone ? nullptr : out.dresidual};
    pass.constant_scale = &scale;
    run(pass, streams_of(out), threads, {});
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
void run_batch_norm_jvp(const T* x_dot, const T* x, const Part<T>& call, const Moments* saved, const GradSums* sums,
                        const Tangents& tangents, T* y_dot, int threads, const PartOf& part) {
  if (has_short_runs(call.problem) && call.tail.empty() && call.tail.bits == nullptr) {
    return run_short_jvp(x_dot, x, call, saved, sums, tangents, y_dot, threads, part);
  }
  BackwardPass<T> pass = forward_mode(x_dot, x, call, saved, sums, tangents, y_dot);
  run(pass, 3, threads, part);
}

// mean' takes the place of mean(x'), and var'/2 that of mean(x'*(x - mean)).
template <class T>
void run_normalize_jvp(const T* x_dot, const T* x, const Part<T>& call, const GivenStatistics& given,
                       const Tangents& tangents, T* y_dot, int threads) {
  const auto channels = static_cast<std::size_t>(call.problem.channels);
  std::vector<Moments> moments(channels);
  std::vector<GradSums> sums(channels);
  for (std::size_t at = 0; at < channels; ++at) {
    const auto c = static_cast<std::int64_t>(at);
    moments[at] = {1, given.mean[c], 0, given.var[c], 0};
    sums[at] = {tangents.mean.value_or(c, 0), 0, tangents.var.value_or(c, 0) / 2, 0};
  }
  const bool along_x = tangents.gamma.present() || tangents.var.present();
  BackwardPass<T> pass = forward_mode(x_dot, along_x ? x : x_dot, call, moments.data(), sums.data(), tangents, y_dot);
  run(pass, 3, threads, {});
}

#define BN_INSTANTIATE(T)                                                                                           \
  template void run_grad_sums(const T*, const T*, const Part<T>&, const Moments*, GradSums*, int, const PartOf&);   \
  template void run_grad_input(const T*, const T*, const Part<T>&, const Moments*, const GradSums*,                 \
                               const FirstOutputs<T>&, int, const PartOf&);                                         \
  template void run_batch_norm_backward(const T*, const T*, const Part<T>&, const Moments*, const FirstOutputs<T>&, \
                                        int, const PartOf&);                                                        \
  template void run_normalize_backward(const T*, const T*, const Part<T>&, const GivenStatistics&,                  \
                                       const FirstOutputs<T>&, int);                                                \
  template void run_batch_norm_jvp(const T*, const T*, const Part<T>&, const Moments*, const GradSums*,             \
                                   const Tangents&, T*, int, const PartOf&);                                        \
  template void run_normalize_jvp(const T*, const T*, const Part<T>&, const GivenStatistics&, const Tangents&, T*, int);
BN_INSTANTIATE(Float16)
BN_INSTANTIATE(BFloat16)
BN_INSTANTIATE(float)
BN_INSTANTIATE(double)
#undef BN_INSTANTIATE

}  // namespace batchnorm
