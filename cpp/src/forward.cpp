// Forward: moments -> coefficients -> normalize, or parts of that.
#include <optional>

#include "coefficients.hpp"
#include "grouped.hpp"
#include "passes.hpp"
#include "positionwise.hpp"
#include "settle.hpp"
#include "short_runs.hpp"
#include "small.hpp"
#include "staged.hpp"
#include "traverse.hpp"

namespace batchnorm {
namespace {

using kernels::Affine;
using kernels::AffineColumns;
using kernels::ColumnSums;
using kernels::Rows;
using kernels::RowWalk;
using kernels::Runs;
using kernels::Sums;

template <class T>
struct ForwardPass {
  using Value = T;
  using A = Arithmetic<T>;  // what coefficients are in
  using Table = CoefficientTable<A, Affine>;

  bool reduces, applies;
  const PassCall<T>& call;
  const T* x;
  T* y = nullptr;
  Moments* saved = nullptr;    // where the pass reduces
  GivenStatistics given = {};  // where it does not

  // What follows from these.
  Plan plan = make_plan(call.problem, work(), call.options.threads);
  const kernels::KernelTable& table = *active_implementation().table;
  Positions<T> positions{call.positions.values, call.positions.is_mask, plan.problem};
  MomentOperands<T> summed{table, x, positions};
  bool around_cache = plan.around_cache && y != x && y != call.tail.residual;
  NormalizeOperands<T> applied{table, x, y, positions, call.padding, call.tail, around_cache};
  bool staged = (call.positions && call.padding != Padding::normalize) || (sizeof(T) == 2 && !call.tail.empty());
  RowWalk walk = around_cache ? RowWalk::around_cache : RowWalk::columns;
  std::optional<Table> coefficients = {};

  [[nodiscard]] Work work() const {
    return call.work(reduces, applies, (call.tail.residual == nullptr ? 1 : 2) + (applies ? 1 : 0));
  }
  void begin() {
    if (call.tail.bits != nullptr) place_bits();
    call.write_head(applied.tail.first_bit);
  }
  // The bits of a vector are whole bytes where they begin like the lines of y, and the vectors are lines of y; or where
  // rows are whole bytes.
  void place_bits() {
    const bool by_columns = plan.path == Path::row_blocks && !around_cache && !staged &&
                            plan.apply_rows.columns % 8 == 0 && call.bits_head != nullptr;
    if (call.bits_head != nullptr) applied.tail.first_bit = by_columns ? 0 : values_past_line(y);
    if (!by_columns && !around_cache) walk = RowWalk::in_line;
  }

  void sum_runs(std::int64_t offset, const Runs& runs, std::int64_t c, Sums* out) const {
    sum_moments(summed, offset, runs, c, {}, out);
  }
  void sum_rows(std::int64_t offset, std::int64_t column, const Rows& rows, const ColumnSums& out) const {
    sum_moments(summed, offset, column, rows, {}, out);
  }

  void finish(Range channels, const Sums* totals) {
    for (std::int64_t begin = channels.begin; begin < channels.end; begin += kTogether) {
      const Range some{begin, std::min(begin + kTogether, channels.end)};
      const Sums* of_some = totals == nullptr ? nullptr : totals + (begin - channels.begin);
      if (!finish_at_once(some, of_some)) finish_some(some, of_some);
    }
  }

  void apply_runs(std::int64_t offset, const Runs& runs, std::int64_t c) const {
    if (staged || coefficients->any_wide()) return normalize_staged(applied, offset, runs, c, *coefficients);
    Runs at_once = runs;
    at_once.around_cache = around_cache;
    table.of<T>().runs_normalize(x + offset, y + offset, tail(offset), at_once, coefficients->narrow(c));
  }
  void apply_rows(std::int64_t offset, const Rows& rows) const {
    if (coefficients->any_wide()) return normalize_staged(applied, offset, rows, *coefficients);
    if (!staged) return apply_all_rows(offset, rows);
    if (sizeof(T) == 2 || around_cache || !applied.positions.are_rows(rows.stride)) {
      return normalize_staged(applied, offset, rows, *coefficients);
    }
    apply_where_rows_count(applied.positions, call.padding, x, y, offset, rows,
                           [this](std::int64_t at, const Rows& some) { apply_all_rows(at, some); });
  }

 private:
  [[nodiscard]] kernels::Tail<T> tail(std::int64_t offset) const {
    kernels::Tail<T> at = applied.tail;
    at.at = offset;
    return at;
  }
  void apply_all_rows(std::int64_t offset, Rows rows) const {
    const Table& k = *coefficients;
    if (rows.columns == plan.apply_rows.columns && rows.columns >= kernels::kVectorColumns) rows.walk = walk;
    const AffineColumns<A> columns{k.narrow_columns(0), k.narrow_columns(1), k.narrow_columns(2)};
    table.of<T>().rows_normalize(x + offset, y + offset, tail(offset), rows, columns);
  }

  // At most kTogether channels, of which all are as usual; else false.
  bool finish_at_once(Range channels, const Sums* totals) {
    if constexpr (std::is_same_v<A, float>) {
      const std::int64_t first = channels.begin, n = channels.end - first;
      if (!reduces || totals == nullptr || call.positions || n < kWorthTurning) return false;
      SumsTogether sums(totals, n);
      const auto count = static_cast<double>(call.problem.count());
      if (!table.formulas.moments(sums.columns, n, count, saved + first)) return false;
      if (!applies) return true;
      double g[kTogether], b[kTogether];
      read_channels(call.gamma, channels, 1, g);
      read_channels(call.beta, channels, 0, b);
      typename Table::Fields k;
      if (!table.formulas.normalize(saved + first, n, call.eps, g, b, {k[0], k[1], k[2]})) return false;
      coefficients->set(channels, k);
      return true;
    }
    return false;
  }
  void finish_some(Range channels, const Sums* totals) {
    if (reduces) {
      const DoubleDouble count = call.count();
      if (totals != nullptr && count.hi > 0) {
        settle<T>(plan, {summed, count}, channels, totals, saved);
      } else {
        std::fill(saved + channels.begin, saved + channels.end, Moments{});
      }
    }
    if (applies) set_coefficients(channels);
  }

  // Of at most kTogether channels.
  void set_coefficients(Range channels) {
    const std::int64_t first = channels.begin, count = channels.end - channels.begin;
    double g[kTogether], b[kTogether];
    read_channels(call.gamma, channels, 1, g);
    read_channels(call.beta, channels, 0, b);
    if (reduces || given.moments != nullptr) {
      const Moments* moments = (reduces ? saved : given.moments) + first;
      return for_channels<A>(count, [&]<class V>(std::int64_t i) {
        forward_coefficients<A, V>(MomentsOf<V>::at(moments + i), call.eps, gather<V>(g + i), gather<V>(b + i),
                                   !call.is_shared, [&](const auto& k) { coefficients->set(first + i, k); });
      });
    }
    double mean[kTogether], var[kTogether];
    read_channels(given.mean, channels, 0, mean);
    read_channels(given.var, channels, 0, var);
    for_channels<A>(count, [&]<class V>(std::int64_t i) {
      const TwoParts<V> rstd = rstd_for<A>(gather<V>(var + i), call.eps);
      const V gamma_i = gather<V>(g + i);
      if (given.only_scale) return coefficients->set(first + i, frozen_backward_coefficients<A>(rstd, gamma_i));
      forward_coefficients<A, V>(gather<V>(mean + i), rstd, gamma_i, gather<V>(b + i),
                                 [&](const auto& k) { coefficients->set(first + i, k); });
    });
  }
};

// Whether short runs were turned: normalize(call without a tail) does it, and what follows goes over y, 8 times as
// quick as all of it by columns (2 x 2 values). Not over y of 16 bits, which is rounded, nor where it is the residual.
template <class T, class Normalize>
bool normalize_short_runs(const PassCall<T>& call, T* y, const Normalize& normalize) {
  const bool follows = !call.tail.empty();
  if (!has_short_runs(call.problem)) return false;
  if (follows && (sizeof(T) == 2 || call.positions || y == call.tail.residual)) return false;
  PassCall<T> alone = call;
  alone.tail = {};
  normalize(alone);
  if (!follows) return true;
  constexpr double kMean[] = {0}, kVar[] = {1};
  const PassCall<T> rest{
      .problem = {1, 1, call.problem.size()}, .tail = call.tail, .bits_head = call.bits_head, .options = call.options};
  Forward<T>{rest}.normalize(y, {std::span(kMean), std::span(kVar), nullptr, true}, y);
  return true;
}

}  // namespace

template <class T>
void Forward<T>::moments(const T* x, Moments* out) const {
  if (call.each_position) return Positionwise<T>(call).moments(x, out);
  if (call.is_grouped()) return Grouped<T>(call).moments(x, out);
  if (has_short_runs(call.problem)) return run_short_moments(x, call, out);
  if (run_small_moments(x, call, out)) return;
  ForwardPass<T> pass{.reduces = true, .applies = false, .call = call, .x = x, .saved = out};
  run_pass(pass, call.options);
}

template <class T>
void Forward<T>::batch_norm(const T* x, T* y, Moments* saved) const {
  if (call.each_position) return Positionwise<T>(call).batch_norm(x, y, saved);
  if (call.is_grouped()) return Grouped<T>(call).batch_norm(x, y, saved);
  const auto turned = [&](const PassCall<T>& alone) { run_short_batch_norm(x, alone, y, saved); };
  if (normalize_short_runs(call, y, turned)) return;
  if (has_short_runs(call.problem)) {
    moments(x, saved);
    return normalize(x, {{}, {}, saved}, y);
  }
  if (call.tail.empty() && run_small_batch_norm(x, call, y, saved)) return;
  ForwardPass<T> pass{.reduces = true, .applies = true, .call = call, .x = x, .y = y, .saved = saved};
  run_pass(pass, call.options);
}

template <class T>
void Forward<T>::normalize(const T* x, const GivenStatistics& given, T* y) const {
  if (call.each_position) return Positionwise<T>(call).normalize(x, given.moments, y);
  if (call.is_grouped()) return Grouped<T>(call).normalize(x, given.moments, y);
  const auto turned = [&](const PassCall<T>& alone) { run_short_normalize(x, alone, given, y); };
  if (normalize_short_runs(call, y, turned)) return;
  ForwardPass<T> pass{.reduces = false, .applies = true, .call = call, .x = x, .y = y, .given = given};
  run_pass(pass, call.options);
}

template struct Forward<Float16>;
template struct Forward<BFloat16>;
template struct Forward<float>;
template struct Forward<double>;

}  // namespace batchnorm
