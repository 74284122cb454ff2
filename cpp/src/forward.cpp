// Forward: moments -> coefficients -> normalize, or parts of that.
#include <optional>

#include "coefficients.hpp"
#include "lines.hpp"
#include "passes.hpp"
#include "settle.hpp"
#include "slices.hpp"
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
    if (reduces) {
      const DoubleDouble count = call.count();
      if (totals != nullptr && count.hi > 0) {
        settle<T>(plan, {summed, count}, channels, totals, saved);
      } else {
        std::fill(saved + channels.begin, saved + channels.end, Moments{});
      }
    }
    if (!applies) return;
    for (std::int64_t begin = channels.begin; begin < channels.end; begin += kTogether) {
      set_coefficients({begin, std::min(begin + kTogether, channels.end)});
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
    if (!staged) return apply_counted_rows(offset, rows);
    if (sizeof(T) == 2 || around_cache || !applied.positions.are_rows(rows.stride)) {
      return normalize_staged(applied, offset, rows, *coefficients);
    }
    apply_where_rows_count(applied.positions, call.padding, x, y, offset, rows,
                           [this](std::int64_t at, const Rows& some) { apply_counted_rows(at, some); });
  }

 private:
  [[nodiscard]] kernels::Tail<T> tail(std::int64_t offset) const {
    kernels::Tail<T> at = applied.tail;
    at.at = offset;
    return at;
  }
  void apply_counted_rows(std::int64_t offset, Rows rows) const {
    const Table& k = *coefficients;
    if (rows.columns == plan.apply_rows.columns && rows.columns >= kernels::kVectorColumns) rows.walk = walk;
    const AffineColumns<A> columns{k.narrow_columns(0), k.narrow_columns(1), k.narrow_columns(2)};
    table.of<T>().rows_normalize(x + offset, y + offset, tail(offset), rows, columns);
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
                                   [&](const auto& k) { coefficients->set(first + i, k); });
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

}  // namespace

template <class T>
void Forward<T>::moments(const T* x, Moments* out) const {
  if (is_lines(call.problem)) return run_lines_moments(x, call, out);
  if (run_slice_moments(x, call, out)) return;
  ForwardPass<T> pass{.reduces = true, .applies = false, .call = call, .x = x, .saved = out};
  run_pass(pass, call.options);
}

template <class T>
void Forward<T>::batch_norm(const T* x, T* y, Moments* saved) const {
  if (is_lines(call.problem)) {
    if (call.tail.empty()) return run_lines_batch_norm(x, call, y, saved);
    moments(x, saved);
    return normalize(x, {{}, {}, saved}, y);
  }
  if (call.tail.empty() && run_slice_batch_norm(x, call, y, saved)) return;
  ForwardPass<T> pass{.reduces = true, .applies = true, .call = call, .x = x, .y = y, .saved = saved};
  run_pass(pass, call.options);
}

template <class T>
void Forward<T>::normalize(const T* x, const GivenStatistics& given, T* y) const {
  if (is_lines(call.problem) && call.tail.empty()) return run_lines_normalize(x, call, given, y);
  ForwardPass<T> pass{.reduces = false, .applies = true, .call = call, .x = x, .y = y, .given = given};
  run_pass(pass, call.options);
}

template struct Forward<Float16>;
template struct Forward<BFloat16>;
template struct Forward<float>;
template struct Forward<double>;

}  // namespace batchnorm
