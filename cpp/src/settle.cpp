#include "settle.hpp"

#include <algorithm>
#include <cmath>

#include "channel_math.hpp"
#include "resum.hpp"
#include "sums.hpp"

namespace batchnorm {
namespace {

using kernels::Rows;
using kernels::Runs;
using kernels::Sums;

// The two ways of summing a channel again.
enum class Again { about_shift, compensated };

template <class T>
bool needs(Again again, const Moments& m) {
  return again == Again::about_shift
             ? needs_shift<Arithmetic<T>>(m)
             : mean_below(m, Conditioning<Arithmetic<T>>::kCompensateBelow) && std::isfinite(m.m2);
}
// Any value near the mean will do as a shift; the nearest one makes a constant channel exact.
template <class T>
Arithmetic<T> shift_for(Again again, const Moments& m) {
  return again == Again::about_shift ? static_cast<Arithmetic<T>>(m.mean) : 0;
}

template <class T>
Summing<T> how(Again again, const Arithmetic<T>* shift) {
  return again == Again::about_shift ? Summing<T>{.shift = shift} : Summing<T>{.compensated = true};
}

template <class T>
Sums sum_channel_again(const Plan& plan, const SummedValues<T>& values, std::int64_t c, Again again,
                       Arithmetic<T> shift) {
  Sums total;
  add_pieces(plan.sum_runs.chunks, 1, &total, [&](std::int64_t k, Sums* out) {
    const auto [offset, runs] = plan.sum_runs.chunk(plan.problem, k, {c, c + 1});
    sum_moments(values.operands, offset, runs, c, how<T>(again, &shift), out);
  });
  return total;
}

// Interleaved: a tile is a few neighbouring channels, summed together because their columns share cache lines.
// It lives on the stack of a thread, which may be small.
constexpr std::int64_t kTileColumns = 64;
// Rows between two compensated additions where rows stand side by side; the bound of plan.cpp. Else those of a block.
constexpr std::int64_t kTileRows = 1024;

kernels::ColumnSums empty_sums(double* memory, std::int64_t columns) {
  std::fill_n(memory, 4 * columns, 0.0);
  return column_sums(memory, columns);
}

template <class T>
struct Tile {
  Arithmetic<T> shift[kTileColumns];
  double block_memory[4 * kTileColumns], bundle_memory[4 * kTileColumns], total_memory[4 * kTileColumns];
};

// Sums of `columns` columns from column `first` on, over all rows of the tensor, into the tile's totals. Blocks are
// those of the first sums, and are added as add_blocks() does.
template <class T>
kernels::ColumnSums sum_tile_again(const Plan& plan, const SummedValues<T>& values, std::int64_t first,
                                   std::int64_t columns, Again again, Tile<T>& tile) {
  const Problem& problem = plan.problem;
  const std::int64_t width = problem.channels * problem.inner;
  const std::int64_t block_rows = plan.sum_rows.repeat == 1 ? plan.sum_rows.block_rows : kTileRows;
  const kernels::ColumnSums part = column_sums(tile.block_memory, columns);
  const kernels::ColumnSums bundle = empty_sums(tile.bundle_memory, columns);
  const kernels::ColumnSums total = empty_sums(tile.total_memory, columns);
  for (std::int64_t row = 0, b = 1; row < problem.outer; row += block_rows, ++b) {
    const Rows rows{std::min(block_rows, problem.outer - row), columns, width};
    sum_moments(values.operands, row * width + first, first, rows, how<T>(again, tile.shift), part);
    add_columns(bundle, part, columns);
    if (b % kernels::kBundle != 0 && row + block_rows < problem.outer) continue;
    add_columns(total, bundle, columns);
    empty_sums(tile.bundle_memory, columns);
  }
  return total;
}

template <class T>
void settle_planar(const Plan& plan, const SummedValues<T>& values, std::int64_t c, Again again, Moments& m) {
  if (!needs<T>(again, m)) return;
  const Arithmetic<T> shift = shift_for<T>(again, m);
  const Sums total = sum_channel_again(plan, values, c, again, shift);
  moments_from_sums<Arithmetic<T>, double>(values.count, static_cast<double>(shift), &total).put(&m);
}

// Channels [begin, end) of an interleaved tensor, at most a tile of them.
template <class T>
void settle_tile(const Plan& plan, const SummedValues<T>& values, Range channels, Again again, Moments* out) {
  const auto bad = [again](const Moments& m) { return needs<T>(again, m); };
  if (std::none_of(out + channels.begin, out + channels.end, bad)) return;
  const std::int64_t inner = plan.problem.inner;
  Tile<T> tile;
  for (std::int64_t c = channels.begin; c < channels.end; ++c) {
    std::fill_n(tile.shift + (c - channels.begin) * inner, inner, shift_for<T>(again, out[c]));
  }
  const kernels::ColumnSums columns =
      sum_tile_again(plan, values, channels.begin * inner, (channels.end - channels.begin) * inner, again, tile);
  for (std::int64_t c = channels.begin; c < channels.end; ++c) {
    if (!bad(out[c])) continue;
    const std::int64_t first = (c - channels.begin) * inner;
    Sums total;
    for (std::int64_t e = first; e < first + inner; ++e) add(total, at(columns, e));
    moments_from_sums<Arithmetic<T>, double>(values.count, static_cast<double>(tile.shift[first]), &total).put(&out[c]);
  }
}

// Calls f(value, weight) for the values of channel c that count, in the order of memory.
template <class T>
auto each_value(const Problem& p, const SummedValues<T>& values, std::int64_t c) {
  return [&p, &values, c](const auto& f) {
    const Positions<T>& positions = values.operands.positions;
    for (std::int64_t o = 0; o < p.outer; ++o) {
      for (std::int64_t i = 0; i < p.inner; ++i) {
        const double weight = positions ? static_cast<double>(positions.values[o * p.inner + i]) : 1;
        if (weight != 0) f(static_cast<double>(values.operands.x[(o * p.channels + c) * p.inner + i]), weight);
      }
    }
  };
}

// The channels that sums about 0 are not good enough for, most of which are none.
template <class T>
void sum_again(const Plan& plan, const SummedValues<T>& values, Range channels, Moments* out) {
  const Problem& problem = plan.problem;
  for (const Again again : {Again::about_shift, Again::compensated}) {
    if (plan.planar()) {
      for (std::int64_t c = channels.begin; c < channels.end; ++c) settle_planar(plan, values, c, again, out[c]);
    } else {
      const std::int64_t tile = kTileColumns / problem.inner;
      for (std::int64_t c = channels.begin; c < channels.end; c += tile) {
        settle_tile(plan, values, {c, std::min(c + tile, channels.end)}, again, out);
      }
    }
  }
  for (std::int64_t c = channels.begin; c < channels.end; ++c) {
    settle_value_by_value<Arithmetic<T>>(each_value(problem, values, c), values.count, out[c]);
  }
}

}  // namespace

template <class T>
void settle(const Plan& plan, const SummedValues<T>& values, Range channels, const Sums* totals, Moments* out) {
  bool again = false;
  for_channels<Arithmetic<T>>(channels.end - channels.begin, [&]<class V>(std::int64_t i) {
    const MomentsOf<V> m = moments_from_sums<Arithmetic<T>, V>(values.count, 0, totals + i);
    m.put(out + channels.begin + i);
    // Those that want an exact sum are among those that want a compensated one.
    again |= any(needs_shift<Arithmetic<T>>(m) | mean_below(m, Conditioning<Arithmetic<T>>::kCompensateBelow) |
                 left_range<Arithmetic<T>>(m));
  });
  if (again) sum_again(plan, values, channels, out);
}

template void settle(const Plan&, const SummedValues<Float16>&, Range, const Sums*, Moments*);
template void settle(const Plan&, const SummedValues<BFloat16>&, Range, const Sums*, Moments*);
template void settle(const Plan&, const SummedValues<float>&, Range, const Sums*, Moments*);
template void settle(const Plan&, const SummedValues<double>&, Range, const Sums*, Moments*);

}  // namespace batchnorm
