#include "staged.hpp"

#include <algorithm>
#include <cstdint>

#include "passes.hpp"

namespace batchnorm {
namespace {

using kernels::Affine;
using kernels::AffineColumns;
using kernels::ColumnSums;
using kernels::GradAffine;
using kernels::GradAffineColumns;
using kernels::GradInputs;
using kernels::KernelTable;
using kernels::Rows;
using kernels::Runs;
using kernels::Sums;
using kernels::Tail;

// Values of a tile that is summed: a chunk of a planar channel (plan.hpp). And of one that is applied: with all that is
// held of it (up to five float64 tiles) less than the stack of a small thread.
constexpr std::int64_t kSummed = kChunkValues, kApplied = 2048;
// Columns of a row that are summed at a time: at least four rows then fit a tile.
constexpr std::int64_t kSummedColumns = 1024;
// What repeat_weights may write too much, and what vectors lie before a line.
constexpr std::int64_t kMargin = 4 * kernels::kVectorColumns;

template <class T>
constexpr bool kIsSixteen = sizeof(T) == 2;

// ---- what is read and written ----

// How far ahead values are asked for, into the second-level cache, where a step reads what no kernel has fetched: the
// machine's own prefetchers stop at the end of a page.
constexpr std::int64_t kAheadBytes = 4096;
template <class T>
void fetch_ahead(const T* from, std::int64_t n) {
  const char* begin = reinterpret_cast<const char*>(from) + kAheadBytes;
  for (std::int64_t at = 0; at < n * static_cast<std::int64_t>(sizeof(T)); at += kernels::kStreamBytes) {
    __builtin_prefetch(begin + at, 0, 2);
  }
}

// n values in the type V of a tile, copied.
template <class V, class T>
void read(const KernelTable& table, const T* from, std::int64_t n, V* to) {
  if constexpr (kIsSixteen<T> && sizeof(V) == sizeof(float)) {
    table.of<T>().widen(from, n, to);
  } else {
    for (std::int64_t i = 0; i < n; ++i) to[i] = static_cast<V>(from[i]);
  }
}
// The same, where they lie if they have that type.
template <class V, class T>
const V* in_tile(const KernelTable& table, const T* from, std::int64_t n, V* memory) {
  if constexpr (std::is_same_v<V, T>) {
    return from;
  } else {
    read(table, from, n, memory);
    return memory;
  }
}
template <class T>
void write(const KernelTable& table, const Arithmetic<T>* from, std::int64_t n, T* to) {
  if constexpr (kIsSixteen<T>) {
    table.of<T>().narrow(from, n, to);
  } else if (from != to) {
    std::copy_n(from, n, to);
  }
}
// What kept values become where nothing counts: 0.
template <class V, class T>
void read_counted(const KernelTable& table, const T* from, const V* weights, std::int64_t n, V* to) {
  fetch_ahead(from, n);
  table.of<V>().keep_counted(in_tile(table, from, n, to), weights, n, to);
}

// The weights of `count` runs, one behind the other.
template <class V, class T>
const V* weights_of_runs(const Positions<T>& positions, std::int64_t offset, const Runs& runs, std::int64_t c,
                         V* memory) {
  const auto* w = positions.of_runs(offset, c);
  if constexpr (std::is_same_v<V, typename Positions<T>::W>) {
    if (runs.count == 1) return w;
  }
  V* to = memory;
  for (std::int64_t k = 0; k < runs.count; ++k, w += positions.problem.inner, to += runs.length) {
    std::copy_n(w, runs.length, to);
  }
  return memory;
}

// One per value: of `rows` whole rows of the tensor from the value at `offset` on; or of n columns of a row from
// `column` on. The memory has kMargin more.
template <class V, class T>
const V* weights_of_rows(const KernelTable& table, const Positions<T>& positions, std::int64_t offset,
                         std::int64_t rows, V* memory) {
  using W = typename Positions<T>::W;
  const Problem& p = positions.problem;
  if constexpr (std::is_same_v<V, W>) {
    table.of<V>().repeat_weights(positions.of_row(offset), rows, p.channels, p.inner, memory);
  } else {
    const W* w = positions.of_row(offset);
    for (std::int64_t r = 0; r < rows; ++r, w += p.inner) {
      for (std::int64_t e = 0; e < p.channels * p.inner; ++e) *memory++ = w[e % p.inner];
    }
    memory -= rows * p.channels * p.inner;
  }
  return memory;
}
template <class V, class T>
void weights_of_columns(const Positions<T>& positions, std::int64_t offset, std::int64_t column, std::int64_t n,
                        V* to) {
  const auto* w = positions.of_row(offset - column);
  const std::int64_t inner = positions.problem.inner;
  std::int64_t i = column % inner;
  for (std::int64_t e = 0; e < n; ++e) {
    to[e] = static_cast<V>(w[i]);
    if (++i == inner) i = 0;
  }
}

// ---- sums ----

// Runs of one channel, one behind the other.
Runs gathered(const Runs& runs) { return {.length = runs.length, .count = runs.count, .stride = runs.length}; }

template <class V, class T>
void gather(const KernelTable& table, const T* from, const Runs& runs, V* to) {
  for (std::int64_t k = 0; k < runs.count; ++k) read(table, from + k * runs.stride, runs.length, to + k * runs.length);
}
// The same of the values that count.
template <class V, class T>
void gather_counted(const KernelTable& table, const T* from, const V* weights, const Runs& runs, V* to) {
  for (std::int64_t k = 0; k < runs.count; ++k) {
    const std::int64_t at = k * runs.length;
    read_counted(table, from + k * runs.stride, weights + at, runs.length, to + at);
  }
}

template <class V, class T>
void sum_moments_in(const MomentOperands<T>& in, std::int64_t offset, const Runs& runs, std::int64_t c,
                    const Summing<T>& how, Sums* out) {
  V weights_memory[kSummed], values[kSummed];
  const V shift = how.shift == nullptr ? V(0) : static_cast<V>(*how.shift);
  const V* weights = in.positions ? weights_of_runs(in.positions, offset, runs, c, weights_memory) : nullptr;
  const bool keeps = in.positions.is_mask && how.shift == nullptr && weights != nullptr;
  for (std::int64_t i = 0; i < runs.channels; ++i) {
    const T* x = in.x + offset + i * runs.length;
    if (keeps) {
      gather_counted(in.table, x, weights, runs, values);
    } else {
      gather(in.table, x, runs, values);
    }
    in.table.template of<V>().runs_moments(values, keeps ? nullptr : weights, gathered(runs),
                                           how.shift == nullptr ? nullptr : &shift, out + i);
  }
}

// Rows of a block, some at a time, of the columns [first, first + width).
struct RowsOfTile {
  std::int64_t offset, count, width;  // where the first of them begins
};
template <class F>
void for_row_tiles(std::int64_t offset, const Rows& rows, std::int64_t tile, std::int64_t widest, const F& f) {
  for (std::int64_t c = 0; c < rows.columns; c += widest) {
    const std::int64_t width = std::min(widest, rows.columns - c), most = std::max<std::int64_t>(tile / width, 1);
    for (std::int64_t r = 0; r < rows.count; r += most) {
      f(c, RowsOfTile{offset + r * rows.stride + c, std::min(most, rows.count - r), width});
    }
  }
}
ColumnSums from_column(const ColumnSums& sums, std::int64_t c) {
  return {sums.first + c, sums.first_lo + c, sums.second + c, sums.second_lo + c};
}
// Sums that rows are added to.
void start(const ColumnSums& sums, std::int64_t columns) {
  for (double* each : {sums.first, sums.first_lo, sums.second, sums.second_lo}) std::fill_n(each, columns, 0.0);
}
Rows continued(std::int64_t count, std::int64_t width) {
  return {.count = count, .columns = width, .stride = width, .continues = true};
}

// The weights of a tile of rows, whose columns begin at `column` of the tensor's.
template <class V, class T>
void weights_of_tile(const KernelTable& table, const Positions<T>& positions, const RowsOfTile& tile,
                     std::int64_t stride, std::int64_t column, V* to) {
  const std::int64_t tensor_row = positions.problem.channels * positions.problem.inner;
  if (tile.width == stride && stride % tensor_row == 0) {
    weights_of_rows(table, positions, tile.offset, tile.count * stride / tensor_row, to);
    return;
  }
  for (std::int64_t r = 0; r < tile.count; ++r) {
    weights_of_columns(positions, tile.offset + r * stride, column, tile.width, to + r * tile.width);
  }
}

// f(from, to) for the rows of a tile that count; gives how many there were.
template <class F>
std::int64_t for_counted_rows(const RowsOfTile& tile, std::int64_t stride, bool all, const auto* weight, const F& f) {
  std::int64_t counted = 0;
  for (std::int64_t r = 0; r < tile.count; ++r) {
    if (all || weight[r] != 0) f(tile.offset + r * stride, tile.width * counted++);
  }
  return counted;
}

template <class V, class T>
void sum_moments_in(const MomentOperands<T>& in, std::int64_t offset, std::int64_t column, const Rows& rows,
                    const Summing<T>& how, const ColumnSums& out) {
  V weights[kSummed + kMargin], values[kSummed], shift[kSummedColumns];
  const Positions<T>& positions = in.positions;
  const bool keeps = positions && positions.is_mask && how.shift == nullptr;
  const bool chooses = keeps && positions.are_rows() && rows.stride == positions.problem.channels;
  start(out, rows.columns);
  for_row_tiles(offset, rows, kSummed, kSummedColumns, [&](std::int64_t c, const RowsOfTile& tile) {
    const auto* of_rows = chooses ? positions.of_row(tile.offset) : nullptr;
    const std::int64_t count = for_counted_rows(
        tile, rows.stride, !chooses, of_rows,
        [&](std::int64_t from, std::int64_t to) { read(in.table, in.x + from, tile.width, values + to); });
    const std::int64_t n = count * tile.width;
    if (positions && !chooses) weights_of_tile(in.table, positions, tile, rows.stride, column + c, weights);
    if (keeps && !chooses) in.table.template of<V>().keep_counted(values, weights, n, values);
    if (how.shift != nullptr) std::copy_n(how.shift + c, tile.width, shift);
    in.table.template of<V>().rows_moments(values, positions && !keeps ? weights : nullptr,
                                           continued(count, tile.width), how.shift == nullptr ? nullptr : shift,
                                           from_column(out, c));
  });
}

// dy and x of a channel in tiles, as they count.
template <class V, class T>
void gather_gradient(const GradientOperands<T>& in, std::int64_t at, const V* weights, const Runs& runs, V* dy, V* x) {
  if (weights == nullptr) {
    gather(in.table, in.in.dy + at, runs, dy);
    gather(in.table, in.in.x + at, runs, x);
  } else {
    gather_counted(in.table, in.in.dy + at, weights, runs, dy);
    gather_counted(in.table, in.in.x + at, weights, runs, x);
  }
  if (in.in.bits == nullptr || in.forward_mode) return;
  for (std::int64_t k = 0; k < runs.count; ++k) {
    V* run = dy + k * runs.length;
    in.table.template of<V>().keep_bits(run, in.in.bits, in.in.first_bit + at + k * runs.stride, runs.length, run);
  }
}
template <class V>
void weigh(const V* weights, std::int64_t n, V* values) {
  for (std::int64_t i = 0; i < n; ++i) values[i] *= weights[i];
}

template <class V, class T>
void sum_gradients_in(const GradientOperands<T>& in, std::int64_t offset, const Runs& runs, std::int64_t c,
                      const double* mean, Sums* out) {
  V weights_memory[kSummed], dy[kSummed], x[kSummed];
  const V* weights = in.leaves_out() ? weights_of_runs(in.positions, offset, runs, c, weights_memory) : nullptr;
  for (std::int64_t i = 0; i < runs.channels; ++i) {
    gather_gradient(in, offset + i * runs.length, weights, runs, dy, x);
    if (in.forward_mode && weights != nullptr) weigh(weights, runs.count * runs.length, dy);
    in.table.template of<V>().runs_grad_sums({dy, x}, gathered(runs), mean + i, out + i);
  }
}
template <class V, class T>
void sum_gradients_in(const GradientOperands<T>& in, std::int64_t offset, std::int64_t column, const Rows& rows,
                      const double* mean, const ColumnSums& out) {
  V weights[kSummed + kMargin], dy[kSummed], x[kSummed];
  const Positions<T>& positions = in.positions;
  const bool counts = in.leaves_out(), weighs = counts && in.forward_mode && !positions.is_mask;
  const bool chooses = counts && !weighs && positions.are_rows() && rows.stride == positions.problem.channels;
  start(out, rows.columns);
  for_row_tiles(offset, rows, kSummed, kSummedColumns, [&](std::int64_t c, const RowsOfTile& tile) {
    const auto* of_rows = chooses ? positions.of_row(tile.offset) : nullptr;
    const std::int64_t count =
        for_counted_rows(tile, rows.stride, !chooses, of_rows, [&](std::int64_t from, std::int64_t to) {
          read(in.table, in.in.dy + from, tile.width, dy + to);
          read(in.table, in.in.x + from, tile.width, x + to);
          if (in.in.bits == nullptr || in.forward_mode) return;
          in.table.template of<V>().keep_bits(dy + to, in.in.bits, in.in.first_bit + from, tile.width, dy + to);
        });
    const std::int64_t n = count * tile.width;
    if (counts && !chooses) {
      weights_of_tile(in.table, positions, tile, rows.stride, column + c, weights);
      for (V* each : {dy, x}) in.table.template of<V>().keep_counted(each, weights, n, each);
      if (weighs) weigh(weights, n, dy);
    }
    in.table.template of<V>().rows_grad_sums({dy, x}, continued(count, tile.width), mean + c, from_column(out, c));
  });
}

}  // namespace

template <class T>
void sum_moments(const MomentOperands<T>& in, std::int64_t offset, const Runs& runs, std::int64_t c,
                 const Summing<T>& how, Sums* out) {
  using A = Arithmetic<T>;
  if (how.compensated && sizeof(A) < sizeof(double)) return sum_moments_in<double>(in, offset, runs, c, how, out);
  if (in.positions) return sum_moments_in<A>(in, offset, runs, c, how, out);
  in.table.template of<T>().runs_moments(in.x + offset, nullptr, runs, how.shift, out);
}
template <class T>
void sum_moments(const MomentOperands<T>& in, std::int64_t offset, std::int64_t column, const Rows& rows,
                 const Summing<T>& how, const ColumnSums& out) {
  using A = Arithmetic<T>;
  if (how.compensated && sizeof(A) < sizeof(double)) return sum_moments_in<double>(in, offset, column, rows, how, out);
  if (in.positions) return sum_moments_in<A>(in, offset, column, rows, how, out);
  in.table.template of<T>().rows_moments(in.x + offset, nullptr, rows, how.shift, out);
}

// Where padding is normalized too, all positions depend on the statistics. Products with weights are exact in float64.
template <class T>
bool sums_at_once(const GradientOperands<T>& in) {
  return !in.leaves_out() && (in.in.bits == nullptr || in.forward_mode || !kIsSixteen<T>);
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
  if (sums_at_once(in)) return in.table.template of<T>().runs_grad_sums(at_once(in, offset), runs, mean, out);
  if (in.forward_mode && !in.positions.is_mask) return sum_gradients_in<double>(in, offset, runs, c, mean, out);
  sum_gradients_in<Arithmetic<T>>(in, offset, runs, c, mean, out);
}
template <class T>
void sum_gradients(const GradientOperands<T>& in, std::int64_t offset, std::int64_t column, const Rows& rows,
                   const double* mean, const ColumnSums& out) {
  if (sums_at_once(in)) return in.table.template of<T>().rows_grad_sums(at_once(in, offset), rows, mean, out);
  if (in.forward_mode && !in.positions.is_mask) return sum_gradients_in<double>(in, offset, column, rows, mean, out);
  sum_gradients_in<Arithmetic<T>>(in, offset, column, rows, mean, out);
}

namespace {

// ---- slices: pieces of memory that fit a tile ----

// `size` values at `offset`: of `channels` neighbouring runs, or of one alone (planar); of whole rows, or of some
// columns of one row (interleaved), from `column` on.
struct Slice {
  std::int64_t offset, size, first;  // first: the channel, or column
  Runs runs;
  Rows rows;
};
// f(slice) of the stretches of a planar piece; a slice has channels of one kind, as is_wide(c) tells.
// Slices of a long run end where lines do of an output, whose first value lies past_line values behind one.
template <class IsWide, class F>
void for_slices(std::int64_t offset, const Runs& runs, std::int64_t c, std::int64_t past_line, const IsWide& is_wide,
                const F& f) {
  for (std::int64_t k = 0; k < runs.count; ++k) {
    for (std::int64_t i = 0; i < runs.channels;) {
      std::int64_t some = 1;
      const std::int64_t most = std::min({kApplied / runs.length, kernels::kMostChannels, runs.channels - i});
      while (!is_wide(c + i) && some < most && !is_wide(c + i + some)) {
        ++some;
      }
      const std::int64_t first = offset + k * runs.stride + i * runs.length, size = some * runs.length;
      for (std::int64_t at = 0, n = 0; at < size; at += n) {
        const std::int64_t behind = some > 1 ? 0 : (past_line + first + at) % kernels::kVectorColumns;
        n = std::min(kApplied - behind, size - at);
        f(Slice{first + at, n, c + i, {.length = n / some, .count = 1, .stride = 0, .channels = some}, {}});
      }
      i += some;
    }
  }
}
// Rows side by side that do not fit a tile are taken one by one: their coefficients are the same again and again. Of
// longer ones a slice is some columns of a single row, which lie together.
template <class F>
void for_slices(std::int64_t offset, const Rows& all, std::int64_t tensor_row, const F& f) {
  Rows rows = all;
  if (rows.columns > kApplied && tensor_row < rows.columns) {
    rows = {.count = all.count * (all.columns / tensor_row), .columns = tensor_row, .stride = tensor_row};
  }
  const std::int64_t tile = rows.columns > kApplied ? 1 : kApplied;
  for_row_tiles(offset, rows, tile, kApplied, [&](std::int64_t c, const RowsOfTile& slice) {
    f(Slice{slice.offset,
            slice.count * slice.width,
            c,
            {},
            {.count = slice.count, .columns = slice.width, .stride = slice.width}});
  });
}
template <class A, class T>
const A* weights_of_slice(const KernelTable& table, const Positions<T>& positions, const Slice& slice, A* memory) {
  if (slice.runs.count > 0) {
    const A* w = positions.of_runs(slice.offset, slice.first);
    if (slice.runs.channels == 1) return w;
    table.of<A>().repeat_weights(w, 1, slice.runs.channels, slice.runs.length, memory);
    return memory;
  }
  weights_of_tile(table, positions, {slice.offset, slice.rows.count, slice.rows.columns}, slice.rows.columns,
                  slice.first, memory);
  return memory;
}

// ---- coefficients of a slice ----

template <class A, template <class> class Map>
struct Columns;
template <class A>
struct Columns<A, Affine> {
  static AffineColumns<A> at(const CoefficientTable<A, Affine>& k, std::int64_t c) {
    return {k.narrow_columns(0) + c, k.narrow_columns(1) + c, k.narrow_columns(2) + c};
  }
  static AffineColumns<double> wide_at(const CoefficientTable<A, Affine>& k, std::int64_t c) {
    return {k.wide_columns(0) + c, k.wide_columns(1) + c, k.wide_columns(2) + c};
  }
};
template <class A>
struct Columns<A, GradAffine> {
  static GradAffineColumns<A> at(const CoefficientTable<A, GradAffine>& k, std::int64_t c) {
    return {k.narrow_columns(0) + c, k.narrow_columns(1) + c, k.narrow_columns(2) + c, k.narrow_columns(3) + c,
            k.narrow_columns(4) + c};
  }
  static GradAffineColumns<double> wide_at(const CoefficientTable<A, GradAffine>& k, std::int64_t c) {
    return {k.wide_columns(0) + c, k.wide_columns(1) + c, k.wide_columns(2) + c, k.wide_columns(3) + c,
            k.wide_columns(4) + c};
  }
};

// Whether any value of a slice is to be computed in float64, and which.
template <class Table>
bool any_wide(const Table& k, const Slice& slice) {
  if (!k.any_wide()) return false;
  if (slice.runs.count > 0) return k.is_wide_channel(slice.first);
  for (std::int64_t c = 0; c < slice.rows.columns; ++c) {
    if (k.is_wide_column(slice.first + c)) return true;
  }
  return false;
}
// float32 results, where they are to be, from those in float64.
template <class Table>
void take_wide(const Table& k, const Slice& slice, const double* wide, float* to) {
  if (slice.runs.count > 0) {
    for (std::int64_t i = 0; i < slice.size; ++i) to[i] = static_cast<float>(wide[i]);
    return;
  }
  for (std::int64_t c = 0; c < slice.rows.columns; ++c) {
    if (!k.is_wide_column(slice.first + c)) continue;
    for (std::int64_t at = c; at < slice.size; at += slice.rows.columns) to[at] = static_cast<float>(wide[at]);
  }
}

// ---- forward ----

template <class V>
void map_slice(const KernelTable& table, const V* x, V* y, const Tail<V>& tail, const Slice& slice,
               const Affine<V>* of_channels, const AffineColumns<V>& of_columns, kernels::RowWalk walk) {
  if (slice.runs.count > 0) return table.of<V>().runs_normalize(x, y, tail, slice.runs, of_channels);
  Rows rows = slice.rows;
  rows.walk = walk;
  table.of<V>().rows_normalize(x, y, tail, rows, of_columns);
}

// The tail alone: -0 as the offset leaves every value as it is.
template <class A>
void follow(const KernelTable& table, const A* in, A* out, const Tail<A>& tail, std::int64_t n) {
  const Affine<A> same{A(0), A(1), A(-0.0)};
  table.of<A>().runs_normalize(in, out, tail, {.length = n, .count = 1, .stride = 0}, &same);
}

template <class A, class Table>
void normalize_in_float64(const KernelTable& table, const A* x, A* y, const Slice& slice, const Table& k) {
  if constexpr (sizeof(A) < sizeof(double)) {
    double from[kApplied], to[kApplied];
    std::copy_n(x, slice.size, from);
    const bool planar = slice.runs.count > 0;
    map_slice<double>(table, from, to, {}, slice, planar ? &k.wide(slice.first) : nullptr,
                      planar ? AffineColumns<double>{} : Columns<A, Affine>::wide_at(k, slice.first),
                      kernels::RowWalk::columns);
    take_wide(k, slice, to, y);
  }
}

template <class T, class Table>
void normalize_slice(const NormalizeOperands<T>& in, const Slice& slice, const Table& k) {
  using A = Arithmetic<T>;
  const std::int64_t n = slice.size;
  alignas(64) A x_memory[kApplied], weights_memory[kApplied + kMargin], residual_memory[kApplied];
  alignas(64) A y_memory[kApplied + kMargin];
  fetch_ahead(in.x + slice.offset, n);
  const A* x = in_tile(in.table, in.x + slice.offset, n, x_memory);
  // The bits of vectors that begin at a line are to be whole bytes.
  const std::int64_t bit = in.tail.first_bit + slice.offset;
  A* y = y_memory + bit % kernels::kVectorColumns;
  Tail<A> tail{.relu = in.tail.relu, .bits = in.tail.bits, .first_bit = bit};
  if (in.tail.residual != nullptr) {
    tail.residual = in_tile(in.table, in.tail.residual + slice.offset, n, residual_memory);
  }
  const bool planar = slice.runs.count > 0, wide = any_wide(k, slice);
  const auto walk = !tail.empty() && slice.rows.columns >= kernels::kVectorColumns ? kernels::RowWalk::in_line
                                                                                   : kernels::RowWalk::columns;
  if (!(planar && wide)) {
    map_slice<A>(in.table, x, y, wide ? Tail<A>{} : tail, slice, planar ? k.narrow(slice.first) : nullptr,
                 planar ? AffineColumns<A>{} : Columns<A, Affine>::at(k, slice.first), walk);
  }
  if (wide) {
    normalize_in_float64(in.table, x, y, slice, k);
    if (!tail.empty()) follow(in.table, y, y, tail, n);
  }
  if (in.positions && in.padding != Padding::normalize) {
    const A* weights = weights_of_slice(in.table, in.positions, slice, weights_memory);
    const A* input = in.padding == Padding::keep ? x : nullptr;
    if constexpr (std::is_same_v<A, T>) {
      return in.table.template of<A>().put_counted(y, weights, input, n, in.around_cache, in.y + slice.offset);
    } else {
      in.table.template of<A>().put_counted(y, weights, input, n, false, y);
    }
  }
  write(in.table, y, n, in.y + slice.offset);
}

// ---- backward ----

template <class V>
void map_slice(const KernelTable& table, const GradInputs<V>& in, const V* weights, V* dx, const Slice& slice,
               const GradAffine<V>* of_channels, const GradAffineColumns<V>& of_columns) {
  if (in.x == nullptr) {  // the map of dy alone
    if (slice.runs.count > 0) {
      Affine<V> of_dy[kernels::kMostChannels];
      for (std::int64_t i = 0; i < slice.runs.channels; ++i) {
        of_dy[i] = {of_channels[i].dy_center, of_channels[i].dy_scale, of_channels[i].offset};
      }
      return table.of<V>().runs_normalize(in.dy, dx, {}, slice.runs, of_dy);
    }
    return table.of<V>().rows_normalize(in.dy, dx, {}, slice.rows,
                                        {of_columns.dy_center, of_columns.dy_scale, of_columns.offset});
  }
  if (slice.runs.count > 0) return table.of<V>().runs_grad_input(in, weights, dx, slice.runs, of_channels);
  table.of<V>().rows_grad_input(in, weights, dx, slice.rows, of_columns);
}

template <class A, class Table>
void grad_input_in_float64(const KernelTable& table, const GradInputs<A>& in, const A* weights, A* dx,
                           const Slice& slice, const Table& k) {
  if constexpr (sizeof(A) < sizeof(double)) {
    double dy[kApplied], x[kApplied], w[kApplied], to[kApplied];
    std::copy_n(in.dy, slice.size, dy);
    if (in.x != nullptr) std::copy_n(in.x, slice.size, x);
    if (weights != nullptr) std::copy_n(weights, slice.size, w);
    const bool planar = slice.runs.count > 0;
    map_slice<double>(table, {dy, in.x == nullptr ? nullptr : x}, weights == nullptr ? nullptr : w, to, slice,
                      planar ? &k.wide(slice.first) : nullptr,
                      planar ? GradAffineColumns<double>{} : Columns<A, GradAffine>::wide_at(k, slice.first));
    take_wide(k, slice, to, dx);
  }
}

// The tangent of s becomes that of y.
template <class A, class T>
void follow_along(const GradientOperands<T>& in, std::int64_t at, std::int64_t n, A* dx) {
  A residual_memory[kApplied];
  if (in.residual_dot != nullptr) {
    const A* residual = in_tile(in.table, in.residual_dot + at, n, residual_memory);
    follow(in.table, dx, dx, Tail<A>{.residual = residual}, n);
  }
  if (in.in.bits != nullptr) in.table.template of<A>().keep_bits(dx, in.in.bits, in.in.first_bit + at, n, dx);
}

// dx and dresidual are written last, since either may lie where dy or x does.
template <class T, class Table>
void grad_input_slice(const GradientOperands<T>& in, const Slice& slice, const Table& k) {
  using A = Arithmetic<T>;
  const std::int64_t n = slice.size, at = slice.offset;
  A dy_memory[kApplied], gated[kApplied], x_memory[kApplied], weights_memory[kApplied + kMargin], dx[kApplied];
  const auto& kernels = in.table.template of<A>();
  fetch_ahead(in.in.dy + at, n);
  if (in.in.x != nullptr) fetch_ahead(in.in.x + at, n);
  const A* dy = in_tile(in.table, in.in.dy + at, n, dy_memory);
  const A* x = in.in.x == nullptr ? nullptr : in_tile(in.table, in.in.x + at, n, x_memory);
  const A* weights = in.positions ? weights_of_slice(in.table, in.positions, slice, weights_memory) : nullptr;
  const bool puts = weights != nullptr && in.padding != Padding::normalize;
  const A* let_through = dy;
  if (in.in.bits != nullptr && !in.forward_mode) {
    kernels.keep_bits(dy, in.in.bits, in.in.first_bit + at, n, gated);
    let_through = gated;
  }
  // A mask changes nothing where a position counts; weights and padding that is normalized are in the formula.
  const A* in_formula = x == nullptr || in.forward_mode || (puts && in.positions.is_mask) ? nullptr : weights;
  if (in_formula != nullptr && !puts) {
    kernels.keep_counted(x, weights, n, x_memory);
    x = x_memory;
  }
  const bool planar = slice.runs.count > 0, wide = any_wide(k, slice);
  if (!(planar && wide)) {
    map_slice<A>(in.table, {let_through, x}, in_formula, dx, slice, planar ? k.narrow(slice.first) : nullptr,
                 planar ? GradAffineColumns<A>{} : Columns<A, GradAffine>::at(k, slice.first));
  }
  if (wide) grad_input_in_float64(in.table, {let_through, x}, in_formula, dx, slice, k);
  if (in.forward_mode) follow_along(in, at, n, dx);
  const A* input = in.padding == Padding::keep ? dy : nullptr;
  bool written = false;
  if (puts) {
    A* to = dx;
    if constexpr (std::is_same_v<A, T>) {
      written = in.in.dresidual == nullptr;  // which may lie where dy does, to be read still
      if (written) to = in.dx + at;
    }
    kernels.put_counted(dx, weights, input, n, written && in.around_cache, to);
  }
  if (in.in.dresidual != nullptr && in.in.bits == nullptr) std::copy_n(dy, n, gated);
  if (in.in.dresidual != nullptr && puts) kernels.keep_counted(gated, weights, n, gated);
  if (!written) write(in.table, dx, n, in.dx + at);
  if (in.in.dresidual != nullptr) write(in.table, gated, n, in.in.dresidual + at);
}

}  // namespace

template <class T>
void normalize_staged(const NormalizeOperands<T>& in, std::int64_t offset, const Runs& runs, std::int64_t c,
                      const CoefficientTable<Arithmetic<T>, Affine>& coefficients) {
  for_slices(
      offset, runs, c, values_past_line(in.y),
      [&](std::int64_t channel) { return coefficients.is_wide_channel(channel); },
      [&](const Slice& slice) { normalize_slice(in, slice, coefficients); });
}
template <class T>
void normalize_staged(const NormalizeOperands<T>& in, std::int64_t offset, const Rows& rows,
                      const CoefficientTable<Arithmetic<T>, Affine>& coefficients) {
  for_slices(offset, rows, coefficients.width(), [&](const Slice& slice) { normalize_slice(in, slice, coefficients); });
}
template <class T>
void grad_input_staged(const GradientOperands<T>& in, std::int64_t offset, const Runs& runs, std::int64_t c,
                       const CoefficientTable<Arithmetic<T>, GradAffine>& coefficients) {
  for_slices(
      offset, runs, c, values_past_line(in.dx),
      [&](std::int64_t channel) { return coefficients.is_wide_channel(channel); },
      [&](const Slice& slice) { grad_input_slice(in, slice, coefficients); });
}
template <class T>
void grad_input_staged(const GradientOperands<T>& in, std::int64_t offset, const Rows& rows,
                       const CoefficientTable<Arithmetic<T>, GradAffine>& coefficients) {
  for_slices(offset, rows, coefficients.width(),
             [&](const Slice& slice) { grad_input_slice(in, slice, coefficients); });
}

#define BN_INSTANTIATE(T)                                                                                         \
  template void sum_moments(const MomentOperands<T>&, std::int64_t, const Runs&, std::int64_t, const Summing<T>&, \
                            Sums*);                                                                               \
  template void sum_moments(const MomentOperands<T>&, std::int64_t, std::int64_t, const Rows&, const Summing<T>&, \
                            const ColumnSums&);                                                                   \
  template void sum_gradients(const GradientOperands<T>&, std::int64_t, const Runs&, std::int64_t, const double*, \
                              Sums*);                                                                             \
  template void sum_gradients(const GradientOperands<T>&, std::int64_t, std::int64_t, const Rows&, const double*, \
                              const ColumnSums&);                                                                 \
  template void normalize_staged(const NormalizeOperands<T>&, std::int64_t, const Runs&, std::int64_t,            \
                                 const CoefficientTable<Arithmetic<T>, Affine>&);                                 \
  template void normalize_staged(const NormalizeOperands<T>&, std::int64_t, const Rows&,                          \
                                 const CoefficientTable<Arithmetic<T>, Affine>&);                                 \
  template void grad_input_staged(const GradientOperands<T>&, std::int64_t, const Runs&, std::int64_t,            \
                                  const CoefficientTable<Arithmetic<T>, GradAffine>&);                            \
  template void grad_input_staged(const GradientOperands<T>&, std::int64_t, const Rows&,                          \
                                  const CoefficientTable<Arithmetic<T>, GradAffine>&);
BN_INSTANTIATE(Float16)
BN_INSTANTIATE(BFloat16)
BN_INSTANTIATE(float)
BN_INSTANTIATE(double)
#undef BN_INSTANTIATE

}  // namespace batchnorm
