// The sums of staged.hpp: what the kernels do not sum where it lies is read into a tile.
#include <cstdint>

#include "staged.hpp"
#include "tiles.hpp"

namespace batchnorm {
namespace {

using kernels::ColumnSums;
using kernels::GradInputs;
using kernels::KernelTable;
using kernels::Rows;
using kernels::Runs;
using kernels::Sums;
using kernels::WeightsOf;

// Values of a tile: a chunk of a planar channel (plan.hpp). And columns of a row that are summed at a time: at least
// four rows then fit.
constexpr std::int64_t kSummed = kChunkValues, kSummedColumns = 1024;

// ---- weights ----

// Those of a planar piece: the runs of a channel are whole, or one alone.
template <class T>
WeightsOf<kernels::WeightOf<T>> weights_of(const Positions<T>& positions, std::int64_t offset, std::int64_t c) {
  if (!positions) return {};
  return {positions.of_runs(offset, c), positions.is_mask};
}
template <class V, class T>
WeightsOf<V> weights_in(const Positions<T>& positions, std::int64_t offset, const Runs& runs, std::int64_t c,
                        V* memory) {
  if (!positions) return {};
  return {weights_in_tile(positions.of_runs(offset, c), runs.count * runs.length, memory), positions.is_mask};
}
template <class V, class T>
WeightsOf<V> weights_in(const KernelTable& table, const Positions<T>& positions, const RowsOfTile& tile,
                        std::int64_t stride, V* memory) {
  if (!positions) return {};
  if (positions.are_rows(stride)) {
    return {weights_in_tile(positions.of_row(tile.offset), tile.count, memory), positions.is_mask};
  }
  return {repeated_weights(table, positions, tile, stride, memory), positions.is_mask, tile.width};
}

// ---- values ----

// Runs of one channel, one behind the other.
Runs gathered(const Runs& runs) { return {.length = runs.length, .count = runs.count, .stride = runs.length}; }

template <class V, class T>
void gather(const KernelTable& table, const T* from, const Runs& runs, V* to) {
  for (std::int64_t k = 0; k < runs.count; ++k, from += runs.stride, to += runs.length) {
    fetch_ahead(from, runs.length);
    read(table, from, runs.length, to);
  }
}
// The rows of a tile, from the first value on.
template <class V, class T>
void gather(const KernelTable& table, const T* from, const RowsOfTile& tile, std::int64_t stride, V* to) {
  for (std::int64_t r = 0; r < tile.count; ++r, from += stride, to += tile.width) {
    fetch_ahead(from, tile.width);
    read(table, from, tile.width, to);
  }
}

ColumnSums from_column(const ColumnSums& sums, std::int64_t c) {
  return {sums.first + c, sums.first_lo + c, sums.second + c, sums.second_lo + c};
}
// Sums that the rows of tiles are added to.
void start(const ColumnSums& sums, std::int64_t columns) {
  for (double* each : {sums.first, sums.first_lo, sums.second, sums.second_lo}) std::fill_n(each, columns, 0.0);
}
Rows continued(const RowsOfTile& tile, std::int64_t stride) {
  return {.count = tile.count, .columns = tile.width, .stride = stride, .continues = true};
}

// ---- moments ----

template <class V, class T>
void sum_moments_in(const MomentOperands<T>& in, std::int64_t offset, const Runs& runs, std::int64_t c,
                    const Summing<T>& how, Sums* out) {
  V weights_memory[kSummed], values[kSummed];
  const WeightsOf<V> weights = weights_in(in.positions, offset, runs, c, weights_memory);
  const V shift = how.shift == nullptr ? V(0) : static_cast<V>(*how.shift);
  for (std::int64_t i = 0; i < runs.channels; ++i) {
    gather(in.table, in.x + offset + i * runs.length, runs, values);
    in.table.template of<V>().runs_moments(values, weights, gathered(runs), how.shift == nullptr ? nullptr : &shift,
                                           out + i);
  }
}
template <class V, class T>
void sum_moments_in(const MomentOperands<T>& in, std::int64_t offset, std::int64_t column, const Rows& rows,
                    const Summing<T>& how, const ColumnSums& out) {
  V weights_memory[kSummed + kMargin], values[kSummed], shift[kSummedColumns];
  start(out, rows.columns);
  for_row_tiles(offset, column, rows, kSummed, kSummedColumns, [&](const RowsOfTile& tile) {
    const WeightsOf<V> weights = weights_in(in.table, in.positions, tile, rows.stride, weights_memory);
    const std::int64_t c = tile.column - column;
    if (how.shift != nullptr) std::copy_n(how.shift + c, tile.width, shift);
    const V* x = values;
    std::int64_t stride = tile.width;
    if constexpr (std::is_same_v<V, T>) {
      x = in.x + tile.offset, stride = rows.stride;
    } else {
      gather(in.table, in.x + tile.offset, tile, rows.stride, values);
    }
    in.table.template of<V>().rows_moments(x, weights, continued(tile, stride), how.shift == nullptr ? nullptr : shift,
                                           from_column(out, c));
  });
}

// ---- gradients ----

template <class V>
void weigh(const V* weights, std::int64_t n, V* values) {
  for (std::int64_t i = 0; i < n; ++i) values[i] *= weights[i];
}
// The dy of a tile as the bits of a ReLU let it through: of `count` stretches of n values, `stride` apart in the tensor
// from `at` on.
template <class V, class T>
void let_through(const GradientOperands<T>& in, std::int64_t at, std::int64_t n, std::int64_t count,
                 std::int64_t stride, V* dy) {
  if (!in.lets_through()) return;
  for (std::int64_t k = 0; k < count; ++k, at += stride, dy += n) {
    in.table.template of<V>().keep_bits(dy, in.in.bits, in.in.first_bit + at, n, dy);
  }
}

template <class V, class T>
void sum_gradients_in(const GradientOperands<T>& in, std::int64_t offset, const Runs& runs, std::int64_t c,
                      const double* mean, Sums* out) {
  V weights_memory[kSummed], dy[kSummed], x[kSummed];
  const WeightsOf<V> weights = weights_in(in.summed_positions(), offset, runs, c, weights_memory);
  for (std::int64_t i = 0; i < runs.channels; ++i) {
    const std::int64_t at = offset + i * runs.length;
    gather(in.table, in.in.dy + at, runs, dy);
    gather(in.table, in.in.x + at, runs, x);
    let_through(in, at, runs.length, runs.count, runs.stride, dy);
    if (in.weighs()) weigh(weights.values, runs.count * runs.length, dy);
    in.table.template of<V>().runs_grad_sums({dy, x}, weights, gathered(runs), mean + i, out + i);
  }
}
template <class V, class T>
void sum_gradients_in(const GradientOperands<T>& in, std::int64_t offset, std::int64_t column, const Rows& rows,
                      const double* mean, const ColumnSums& out) {
  V weights_memory[kSummed + kMargin], dy_memory[kSummed], x_memory[kSummed];
  const Positions<T>& positions = in.summed_positions();
  start(out, rows.columns);
  for_row_tiles(offset, column, rows, kSummed, kSummedColumns, [&](const RowsOfTile& tile) {
    const V *dy = dy_memory, *x = x_memory;
    std::int64_t stride = tile.width;
    WeightsOf<V> weights;
    if (in.weighs()) {
      const V* each = repeated_weights(in.table, positions, tile, rows.stride, weights_memory);
      weights = {each, positions.is_mask, tile.width};
    } else {
      weights = weights_in(in.table, positions, tile, rows.stride, weights_memory);
    }
    bool in_place = false;
    if constexpr (std::is_same_v<V, T>) {
      in_place = !in.lets_through() && !in.weighs();
      if (in_place) dy = in.in.dy + tile.offset, x = in.in.x + tile.offset, stride = rows.stride;
    }
    if (!in_place) {
      gather(in.table, in.in.dy + tile.offset, tile, rows.stride, dy_memory);
      gather(in.table, in.in.x + tile.offset, tile, rows.stride, x_memory);
      let_through(in, tile.offset, tile.width, tile.count, rows.stride, dy_memory);
      if (in.weighs()) weigh(weights.values, tile.count * tile.width, dy_memory);
    }
    const std::int64_t c = tile.column - column;
    in.table.template of<V>().rows_grad_sums({dy, x}, weights, continued(tile, stride), mean + c, from_column(out, c));
  });
}

}  // namespace

template <class T>
void sum_moments(const MomentOperands<T>& in, std::int64_t offset, const Runs& runs, std::int64_t c,
                 const Summing<T>& how, Sums* out) {
  using A = Arithmetic<T>;
  if (how.compensated && sizeof(A) < sizeof(double)) return sum_moments_in<double>(in, offset, runs, c, how, out);
  if (kIsSixteen<T> && in.positions) return sum_moments_in<A>(in, offset, runs, c, how, out);
  in.table.template of<T>().runs_moments(in.x + offset, weights_of(in.positions, offset, c), runs, how.shift, out);
}
template <class T>
void sum_moments(const MomentOperands<T>& in, std::int64_t offset, std::int64_t column, const Rows& rows,
                 const Summing<T>& how, const ColumnSums& out) {
  using A = Arithmetic<T>;
  if (how.compensated && sizeof(A) < sizeof(double)) return sum_moments_in<double>(in, offset, column, rows, how, out);
  if (!in.positions) return in.table.template of<T>().rows_moments(in.x + offset, {}, rows, how.shift, out);
  if (kIsSixteen<T> || !in.positions.are_rows(rows.stride)) {
    return sum_moments_in<A>(in, offset, column, rows, how, out);
  }
  in.table.template of<T>().rows_moments(in.x + offset, {in.positions.of_row(offset), in.positions.is_mask}, rows,
                                         how.shift, out);
}

// Whether the kernels sum the gradients where they lie, rows perhaps in tiles; with the bits of a ReLU, of all.
template <class T>
bool sums_at_once(const GradientOperands<T>& in) {
  if (in.weighs()) return false;
  if (!in.lets_through()) return !kIsSixteen<T> || !in.summed_positions();
  return !kIsSixteen<T> && !in.summed_positions();
}
template <class T>
GradInputs<T> at_once(const GradientOperands<T>& in, std::int64_t offset) {
  GradInputs<T> from = in.in;
  from.at += offset;
  if (in.forward_mode) from.bits = nullptr;
  return from;
}
template <class T>
void sum_gradients(const GradientOperands<T>& in, std::int64_t offset, const Runs& runs, std::int64_t c,
                   const double* mean, Sums* out) {
  if (sums_at_once(in)) {
    return in.table.template of<T>().runs_grad_sums(at_once(in, offset), weights_of(in.summed_positions(), offset, c),
                                                    runs, mean, out);
  }
  // Products with weights are exact in float64.
  if (in.weighs()) return sum_gradients_in<double>(in, offset, runs, c, mean, out);
  sum_gradients_in<Arithmetic<T>>(in, offset, runs, c, mean, out);
}
template <class T>
void sum_gradients(const GradientOperands<T>& in, std::int64_t offset, std::int64_t column, const Rows& rows,
                   const double* mean, const ColumnSums& out) {
  const Positions<T>& positions = in.summed_positions();
  if (sums_at_once(in) && (!positions || positions.are_rows(rows.stride))) {
    const auto* weights = positions ? positions.of_row(offset) : nullptr;
    return in.table.template of<T>().rows_grad_sums(at_once(in, offset), {weights, positions.is_mask}, rows, mean, out);
  }
  if (in.weighs()) return sum_gradients_in<double>(in, offset, column, rows, mean, out);
  sum_gradients_in<Arithmetic<T>>(in, offset, column, rows, mean, out);
}

#define BN_INSTANTIATE(T)                                                                                         \
  template void sum_moments(const MomentOperands<T>&, std::int64_t, const Runs&, std::int64_t, const Summing<T>&, \
                            Sums*);                                                                               \
  template void sum_moments(const MomentOperands<T>&, std::int64_t, std::int64_t, const Rows&, const Summing<T>&, \
                            const ColumnSums&);                                                                   \
  template void sum_gradients(const GradientOperands<T>&, std::int64_t, const Runs&, std::int64_t, const double*, \
                              Sums*);                                                                             \
  template void sum_gradients(const GradientOperands<T>&, std::int64_t, std::int64_t, const Rows&, const double*, \
                              const ColumnSums&);
BN_INSTANTIATE(Float16)
BN_INSTANTIATE(BFloat16)
BN_INSTANTIATE(float)
BN_INSTANTIATE(double)
#undef BN_INSTANTIATE

}  // namespace batchnorm
