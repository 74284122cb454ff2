// Forward: moments -> coefficients -> normalize, or parts of that.
#include "pass.hpp"
#include "settle.hpp"
#include "short_runs.hpp"
#include "small.hpp"

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
  using A = Arithmetic<T>;  // what coefficients are in
  using Table = CoefficientTable<A, Affine>;
  static constexpr std::int64_t kItemSize = sizeof(T);

  bool reduces, applies;
  const Part<T>& call;
  const T* x;
  T* y = nullptr;
  Moments* saved = nullptr;    // where the pass reduces
  GivenStatistics given = {};  // where it does not
  Plan plan = {};
  Table* coefficients = nullptr;  // where it applies
  const kernels::KernelTable& table = *active_implementation().table;
  // Set by prepare().
  MomentOperands<T> summed{table, x, {}};
  NormalizeOperands<T> applied{table, x, y, {}, {}, {}, false};
  bool around_cache = false, staged = false;
  RowWalk walk = RowWalk::columns;

  void prepare() {
    summed.x = x;
    summed.positions = call.positions;
    summed.positions.problem = plan.problem;
    applied.x = x;
    applied.y = y;
    applied.positions = summed.positions;
    applied.padding = call.padding;
    applied.tail = call.tail;
    around_cache = plan.around_cache && y != x && y != call.tail.residual;
    applied.around_cache = around_cache;
    staged = (call.positions && call.padding != Padding::normalize) || (sizeof(T) == 2 && !call.tail.empty());
    walk = around_cache ? RowWalk::around_cache : RowWalk::columns;
    if (call.tail.bits != nullptr) place_bits();
  }
  // The bits of a vector are whole bytes where they begin like the lines of y, and the vectors are lines of y; or where
  // rows are whole bytes.
  void place_bits() {
    const bool by_columns = plan.path == Path::row_blocks && !around_cache && !staged &&
                            plan.apply_rows.columns % 8 == 0 && call.bits_head != nullptr;
    if (call.bits_head != nullptr) applied.tail.first_bit = by_columns ? 0 : values_past_line(y);
    if (!by_columns && !around_cache) walk = RowWalk::in_line;
  }
  void begin() const {
    if (call.bits_head == nullptr) return;
    std::fill_n(call.bits_head, kBitsHead, std::uint8_t{0});
    *call.bits_head = static_cast<std::uint8_t>(applied.tail.first_bit);
  }

  void sum_runs(std::int64_t offset, const Runs& runs, std::int64_t c, Sums* out) const {
    sum_moments(summed, offset, runs, c, {}, out);
  }
  void sum_rows(std::int64_t offset, std::int64_t column, const Rows& rows, const ColumnSums& out) const {
    sum_moments(summed, offset, column, rows, {}, out);
  }
  void add_blocks(const ColumnSums& first, std::int64_t count, std::int64_t stride, std::int64_t columns,
                  const ColumnSums& total) const {
    table.of<T>().add_blocks(first, count, stride, columns, total);
  }

  void finish(Range channels, const Sums* totals) {
    for (std::int64_t begin = channels.begin; begin < channels.end; begin += kTogether) {
      const Range some{begin, std::min(begin + kTogether, channels.end)};
      const Sums* of_some = totals == nullptr ? nullptr : totals + (begin - channels.begin);
      if (!finish_at_once(some, of_some)) finish_some(some, of_some);
    }
  }
  void lay_out(Range channels) { coefficients->lay_out(channels); }

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

  // At most kTogether channels, of which all are as usual; else false.
  bool finish_at_once(Range channels, const Sums* totals) const {
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
  void finish_some(Range channels, const Sums* totals) const {
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
  void set_coefficients(Range channels) const {
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

template <class T>
int streams_of(const Part<T>& call) {
  return call.tail.residual == nullptr ? 2 : 3;
}

// Whether short runs were turned: normalize(Part without a tail) does it, and what follows goes over y, 8 times as
// quick as all of it by columns (2 x 2 values). Not over y of 16 bits, which is rounded, nor where it is the residual.
template <class T, class Normalize>
bool normalize_short_runs(const Part<T>& call, T* y, int threads, const PartOf& part, const Normalize& normalize) {
  const bool follows = !call.tail.empty();
  if (!has_short_runs(call.problem)) return false;
  if (follows && (sizeof(T) == 2 || call.positions || y == call.tail.residual)) return false;
  Part<T> alone = call;
  alone.tail = {};
  normalize(alone);
  if (!follows) return true;
  constexpr double kMean[] = {0}, kVar[] = {1};
  const Part<T> rest{.problem = {1, 1, call.problem.size()}, .tail = call.tail, .bits_head = call.bits_head};
  run_normalize(y, rest, {std::span(kMean), std::span(kVar), nullptr, true}, y, threads, part);
  return true;
}

}  // namespace

template <class T>
void run_moments(const T* x, const Part<T>& call, Moments* out, int threads, const PartOf& part) {
  if (has_short_runs(call.problem)) return run_short_moments(x, call, out, threads, part);
  if (run_small_moments(x, call, out, threads, part)) return;
  ForwardPass<T> pass{.reduces = true, .applies = false, .call = call, .x = x, .saved = out};
  run(pass, 2, threads, part);
}

template <class T>
void run_batch_norm(const T* x, const Part<T>& call, T* y, Moments* saved, int threads, const PartOf& part) {
  const auto turned = [&](const Part<T>& alone) { run_short_batch_norm(x, alone, y, saved, threads, part); };
  if (normalize_short_runs(call, y, threads, part, turned)) return;
  if (has_short_runs(call.problem)) {
    run_moments(x, call, saved, threads, part);
    return run_normalize(x, call, {{}, {}, saved}, y, threads, part);
  }
  if (call.tail.empty() && run_small_batch_norm(x, call, y, saved, threads, part)) return;
  ForwardPass<T> pass{.reduces = true, .applies = true, .call = call, .x = x, .y = y, .saved = saved};
  run(pass, streams_of(call), threads, part);
}

template <class T>
void run_normalize(const T* x, const Part<T>& call, const GivenStatistics& given, T* y, int threads,
                   const PartOf& part) {
  const auto turned = [&](const Part<T>& alone) { run_short_normalize(x, alone, given, y, threads, part); };
  if (normalize_short_runs(call, y, threads, part, turned)) return;
  ForwardPass<T> pass{.reduces = false, .applies = true, .call = call, .x = x, .y = y, .given = given};
  run(pass, streams_of(call), threads, part);
}

#define BN_INSTANTIATE(T)                                                                   \
  template void run_moments(const T*, const Part<T>&, Moments*, int, const PartOf&);        \
  template void run_batch_norm(const T*, const Part<T>&, T*, Moments*, int, const PartOf&); \
  template void run_normalize(const T*, const Part<T>&, const GivenStatistics&, T*, int, const PartOf&);
BN_INSTANTIATE(Float16)
BN_INSTANTIATE(BFloat16)
BN_INSTANTIATE(float)
BN_INSTANTIATE(double)
#undef BN_INSTANTIATE

}  // namespace batchnorm
