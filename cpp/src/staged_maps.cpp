// The maps of staged.hpp: portions of a piece that fit a tile are read, let through, mapped, followed and put.
#include <cstdint>

#include "passes.hpp"
#include "staged.hpp"
#include "tiles.hpp"

namespace batchnorm {
namespace {

using kernels::Affine;
using kernels::AffineColumns;
using kernels::GradAffine;
using kernels::GradAffineColumns;
using kernels::GradInputs;
using kernels::KernelTable;
using kernels::Rows;
using kernels::Runs;
using kernels::Tail;
using kernels::WeightsAlong;

// Values of a portion: with all that is held of it (up to six float64 tiles) less than the stack of a small thread.
constexpr std::int64_t kApplied = 2048;
// Runs from this length on are portions of their own, and need no copy of their weights: under a mask 64 x 3 x 1024
// values were normalized in 1.56 instead of 1.73 times the time without (Zen 5, one thread).
constexpr std::int64_t kAlone = 512;

// ---- portions ----

// `size` values at `offset`: of `channels` neighbouring runs, or of one alone (planar); of whole rows, or of some
// columns of one row (interleaved), from `column` on.
struct Portion {
  std::int64_t offset, size, first;  // first: the channel, or column
  Runs runs;
  Rows rows;
};
// f(portion) of the stretches of a planar piece; a portion has channels of one kind, as is_wide(c) tells.
// Portions of a long run end where lines do of an output, whose first value lies past_line values behind one.
template <class IsWide, class F>
void for_portions(std::int64_t offset, const Runs& runs, std::int64_t c, std::int64_t past_line, const IsWide& is_wide,
                  const F& f) {
  for (std::int64_t k = 0; k < runs.count; ++k) {
    for (std::int64_t i = 0; i < runs.channels;) {
      std::int64_t some = 1;
      const std::int64_t fit = runs.length < kAlone ? kApplied / runs.length : 1;
      const std::int64_t most = std::min({fit, kernels::kMostChannels, runs.channels - i});
      while (!is_wide(c + i) && some < most && !is_wide(c + i + some)) {
        ++some;
      }
      const std::int64_t first = offset + k * runs.stride + i * runs.length, size = some * runs.length;
      for (std::int64_t at = 0, n = 0; at < size; at += n) {
        const std::int64_t behind = some > 1 ? 0 : (past_line + first + at) % kernels::kVectorColumns;
        n = std::min(kApplied - behind, size - at);
        f(Portion{first + at, n, c + i, {.length = n / some, .count = 1, .stride = 0, .channels = some}, {}});
      }
      i += some;
    }
  }
}
// Rows side by side that do not fit a tile are taken one by one: their coefficients are the same again and again. Of
// longer ones a portion is some columns of a single row, which lie together.
template <class F>
void for_portions(std::int64_t offset, const Rows& all, std::int64_t tensor_row, const F& f) {
  Rows rows = all;
  if (rows.columns > kApplied && tensor_row < rows.columns) {
    rows = {.count = all.count * (all.columns / tensor_row), .columns = tensor_row, .stride = tensor_row};
  }
  const std::int64_t tile = rows.columns > kApplied ? 1 : kApplied;
  for_row_tiles(offset, 0, rows, tile, kApplied, [&](const RowsOfTile& some) {
    const Rows portion{.count = some.count, .columns = some.width, .stride = some.width};
    f(Portion{some.offset, some.count * some.width, some.column, {}, portion});
  });
}

// The weights of a portion, where they lie if one run's; the memory has kMargin more than a portion. Of rows one per
// value; of runs once for all channels, and the first ones again.
template <class A, class T>
const A* weights_of(const KernelTable& table, const Positions<T>& positions, const Portion& portion, A* memory) {
  if (portion.runs.count == 0) {
    const RowsOfTile rows{portion.offset, portion.rows.count, portion.rows.columns, portion.first};
    return repeated_weights(table, positions, rows, portion.rows.columns, memory);
  }
  const A* w = positions.of_runs(portion.offset, portion.first);
  if (portion.runs.channels == 1) return w;
  std::copy_n(w, portion.runs.length, memory);
  std::copy_n(w, kernels::kVectorColumns, memory + portion.runs.length);
  return memory;
}
// `tile` where a position counts, else `input` (null: 0), to a tile or a tensor.
template <class A, class T>
void put(const KernelTable& table, const Positions<T>& positions, const Portion& portion, const A* tile, const A* input,
         bool around_cache, A* to) {
  A memory[kApplied + kMargin];
  const A* w = weights_of(table, positions, portion, memory);
  const std::int64_t times = portion.runs.count == 0 ? 1 : portion.runs.channels;
  table.of<A>().put_counted(tile, w, input, portion.size / times, times, around_cache, to);
}

// ---- coefficients of a portion ----

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

// Whether any value of a portion is to be computed in float64, and which.
template <class Table>
bool any_wide(const Table& k, const Portion& portion) {
  if (!k.any_wide()) return false;
  if (portion.runs.count > 0) return k.is_wide_channel(portion.first);
  for (std::int64_t c = 0; c < portion.rows.columns; ++c) {
    if (k.is_wide_column(portion.first + c)) return true;
  }
  return false;
}
// float32 results, where they are to be, from those in float64.
template <class Table>
void take_wide(const Table& k, const Portion& portion, const double* wide, float* to) {
  if (portion.runs.count > 0) {
    for (std::int64_t i = 0; i < portion.size; ++i) to[i] = static_cast<float>(wide[i]);
    return;
  }
  for (std::int64_t c = 0; c < portion.rows.columns; ++c) {
    if (!k.is_wide_column(portion.first + c)) continue;
    for (std::int64_t at = c; at < portion.size; at += portion.rows.columns) to[at] = static_cast<float>(wide[at]);
  }
}

// ---- forward ----

template <class V>
void map_portion(const KernelTable& table, const V* x, V* y, const Tail<V>& tail, const Portion& portion,
                 const Affine<V>* of_channels, const AffineColumns<V>& of_columns, kernels::RowWalk walk) {
  if (portion.runs.count > 0) return table.of<V>().runs_normalize(x, y, tail, portion.runs, of_channels);
  Rows rows = portion.rows;
  rows.walk = walk;
  table.of<V>().rows_normalize(x, y, tail, rows, of_columns);
}

// The bits of vectors that begin at a line are whole bytes.
template <class A>
kernels::RowWalk walk_of(const Tail<A>& tail, const Portion& portion, bool around_cache = false) {
  if (portion.rows.columns < kernels::kVectorColumns) return kernels::RowWalk::columns;
  if (around_cache) return kernels::RowWalk::around_cache;
  return tail.empty() ? kernels::RowWalk::columns : kernels::RowWalk::in_line;
}

template <class A, class Table>
void normalize_in_float64(const KernelTable& table, const A* x, A* y, const Portion& portion, const Table& k) {
  if constexpr (sizeof(A) < sizeof(double)) {
    double from[kApplied], to[kApplied];
    std::copy_n(x, portion.size, from);
    const bool planar = portion.runs.count > 0;
    map_portion<double>(table, from, to, {}, portion, planar ? &k.wide(portion.first) : nullptr,
                        planar ? AffineColumns<double>{} : Columns<A, Affine>::wide_at(k, portion.first),
                        kernels::RowWalk::columns);
    take_wide(k, portion, to, y);
  }
}

// Straight to y, with zeros where nothing counts.
template <class T, class Table>
void normalize_at_once(const NormalizeOperands<T>& in, Portion portion, const Table& k) {
  alignas(64) T memory[kApplied + kMargin];
  const Tail<T> tail{.weights = weights_of(in.table, in.positions, portion, memory)};
  const bool planar = portion.runs.count > 0;
  portion.runs.around_cache = in.around_cache;
  map_portion<T>(
      in.table, in.x + portion.offset, in.y + portion.offset, tail, portion, planar ? k.narrow(portion.first) : nullptr,
      planar ? AffineColumns<T>{} : Columns<T, Affine>::at(k, portion.first), walk_of(tail, portion, in.around_cache));
}

template <class T, class Table>
void normalize_portion(const NormalizeOperands<T>& in, const Portion& portion, const Table& k) {
  using A = Arithmetic<T>;
  const bool planar = portion.runs.count > 0, wide = any_wide(k, portion);
  const bool puts = in.positions && in.padding != Padding::normalize;
  if constexpr (std::is_same_v<A, T>) {
    const bool zeros = puts && in.padding == Padding::zero && in.tail.empty();
    if (zeros && !wide) return normalize_at_once(in, portion, k);
  }
  const std::int64_t n = portion.size;
  alignas(64) A x_memory[kApplied], residual_memory[kApplied];
  alignas(64) A y_memory[kApplied + kMargin];
  fetch_ahead(in.x + portion.offset, n);
  const A* x = in_tile(in.table, in.x + portion.offset, n, x_memory);
  // The bits of vectors that begin at a line are to be whole bytes.
  const std::int64_t bit = in.tail.first_bit + portion.offset;
  A* y = y_memory + bit % kernels::kVectorColumns;
  Tail<A> tail{.relu = in.tail.relu, .bits = in.tail.bits, .first_bit = bit};
  if (in.tail.residual != nullptr) {
    tail.residual = in_tile(in.table, in.tail.residual + portion.offset, n, residual_memory);
  }
  if (!(planar && wide)) {
    map_portion<A>(in.table, x, y, wide ? Tail<A>{} : tail, portion, planar ? k.narrow(portion.first) : nullptr,
                   planar ? AffineColumns<A>{} : Columns<A, Affine>::at(k, portion.first), walk_of(tail, portion));
  }
  if (wide) {
    normalize_in_float64(in.table, x, y, portion, k);
    if (!tail.empty()) follow(in.table, y, y, tail, n);
  }
  const A* input = in.padding == Padding::keep ? x : nullptr;
  if constexpr (std::is_same_v<A, T>) {
    if (puts) return put(in.table, in.positions, portion, y, input, in.around_cache, in.y + portion.offset);
  } else {
    if (puts) put(in.table, in.positions, portion, y, input, false, y);
  }
  write(in.table, y, n, in.y + portion.offset);
}

// ---- backward ----

template <class V>
void map_portion(const KernelTable& table, const GradInputs<V>& in, const WeightsAlong<V>& weights, V* dx,
                 const Portion& portion, const GradAffine<V>* of_channels, const GradAffineColumns<V>& of_columns) {
  if (in.x == nullptr) {  // the map of dy alone
    if (portion.runs.count > 0) {
      Affine<V> of_dy[kernels::kMostChannels];
      for (std::int64_t i = 0; i < portion.runs.channels; ++i) {
        of_dy[i] = {of_channels[i].dy_center, of_channels[i].dy_scale, of_channels[i].offset};
      }
      return table.of<V>().runs_normalize(in.dy, dx, {}, portion.runs, of_dy);
    }
    return table.of<V>().rows_normalize(in.dy, dx, {}, portion.rows,
                                        {of_columns.dy_center, of_columns.dy_scale, of_columns.offset});
  }
  if (portion.runs.count > 0) return table.of<V>().runs_grad_input(in, weights, dx, portion.runs, of_channels);
  table.of<V>().rows_grad_input(in, weights, dx, portion.rows, of_columns);
}

// Of planar portions weights are those of one run.
template <class A, class Table>
void grad_input_in_float64(const KernelTable& table, const GradInputs<A>& in, const A* weights, A* dx,
                           const Portion& portion, const Table& k) {
  if constexpr (sizeof(A) < sizeof(double)) {
    double dy[kApplied], x[kApplied], w[kApplied], to[kApplied];
    std::copy_n(in.dy, portion.size, dy);
    if (in.x != nullptr) std::copy_n(in.x, portion.size, x);
    if (weights != nullptr) std::copy_n(weights, portion.size, w);
    const bool planar = portion.runs.count > 0;
    map_portion<double>(table, {dy, in.x == nullptr ? nullptr : x}, {weights == nullptr ? nullptr : w}, to, portion,
                        planar ? &k.wide(portion.first) : nullptr,
                        planar ? GradAffineColumns<double>{} : Columns<A, GradAffine>::wide_at(k, portion.first));
    take_wide(k, portion, to, dx);
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

// Straight to dx, by weights, and with zeros where they are to be.
template <class T, class Table>
void grad_input_at_once(const GradientOperands<T>& in, Portion portion, const Table& k) {
  alignas(64) T memory[kApplied + kMargin];
  const WeightsAlong<T> weights{weights_of(in.table, in.positions, portion, memory), in.padding == Padding::zero};
  const bool planar = portion.runs.count > 0;
  portion.runs.around_cache = in.around_cache;
  portion.rows.walk = walk_of(Tail<T>{}, portion, in.around_cache);
  GradInputs<T> from = in.in;
  from.at = portion.offset;
  map_portion<T>(in.table, from, weights, in.dx + portion.offset, portion, planar ? k.narrow(portion.first) : nullptr,
                 planar ? GradAffineColumns<T>{} : Columns<T, GradAffine>::at(k, portion.first));
}

// dx and dresidual are written last, since either may lie where dy or x does.
template <class T, class Table>
void grad_input_portion(const GradientOperands<T>& in, const Portion& portion, const Table& k) {
  using A = Arithmetic<T>;
  const bool planar = portion.runs.count > 0, wide = any_wide(k, portion);
  const bool puts = in.positions && in.padding != Padding::normalize;
  if constexpr (std::is_same_v<A, T>) {
    const bool formula = in.in.x != nullptr && !in.forward_mode && in.in.bits == nullptr;
    const bool kernel_writes = formula && in.in.dresidual == nullptr && in.padding != Padding::keep;
    if (in.positions && !wide && kernel_writes) return grad_input_at_once(in, portion, k);
  }
  const std::int64_t n = portion.size, at = portion.offset;
  A dy_memory[kApplied], gated[kApplied], x_memory[kApplied], weights_memory[kApplied + kMargin], dx[kApplied];
  const auto& kernels = in.table.template of<A>();
  fetch_ahead(in.in.dy + at, n);
  if (in.in.x != nullptr) fetch_ahead(in.in.x + at, n);
  const A* dy = in_tile(in.table, in.in.dy + at, n, dy_memory);
  const A* x = in.in.x == nullptr ? nullptr : in_tile(in.table, in.in.x + at, n, x_memory);
  const A* let_through = dy;
  if (in.lets_through()) {
    kernels.keep_bits(dy, in.in.bits, in.in.first_bit + at, n, gated);
    let_through = gated;
  }
  // A mask changes nothing where a position counts; weights and padding that is normalized are in the formula.
  const A* weights = nullptr;
  if (in.positions && x != nullptr && !in.forward_mode && !(puts && in.positions.is_mask)) {
    weights = weights_of(in.table, in.positions, portion, weights_memory);
  }
  if (!(planar && wide)) {
    map_portion<A>(in.table, {let_through, x}, {weights}, dx, portion, planar ? k.narrow(portion.first) : nullptr,
                   planar ? GradAffineColumns<A>{} : Columns<A, GradAffine>::at(k, portion.first));
  }
  if (wide) grad_input_in_float64(in.table, {let_through, x}, weights, dx, portion, k);
  if (in.forward_mode) follow_along(in, at, n, dx);
  const A* input = in.padding == Padding::keep ? dy : nullptr;
  bool written = false;
  if (puts) {
    A* to = dx;
    if constexpr (std::is_same_v<A, T>) {
      written = in.in.dresidual == nullptr;  // which may lie where dy does, to be read still
      if (written) to = in.dx + at;
    }
    put(in.table, in.positions, portion, dx, input, written && in.around_cache, to);
  }
  if (in.in.dresidual != nullptr && in.in.bits == nullptr) std::copy_n(dy, n, gated);
  if (in.in.dresidual != nullptr && puts) put<A, T>(in.table, in.positions, portion, gated, nullptr, false, gated);
  if (!written) write(in.table, dx, n, in.dx + at);
  if (in.in.dresidual != nullptr) write(in.table, gated, n, in.in.dresidual + at);
}

}  // namespace

template <class T>
void normalize_staged(const NormalizeOperands<T>& in, std::int64_t offset, const Runs& runs, std::int64_t c,
                      const CoefficientTable<Arithmetic<T>, Affine>& coefficients) {
  for_portions(
      offset, runs, c, values_past_line(in.y),
      [&](std::int64_t channel) { return coefficients.is_wide_channel(channel); },
      [&](const Portion& portion) { normalize_portion(in, portion, coefficients); });
}
template <class T>
void normalize_staged(const NormalizeOperands<T>& in, std::int64_t offset, const Rows& rows,
                      const CoefficientTable<Arithmetic<T>, Affine>& coefficients) {
  for_portions(offset, rows, coefficients.width(),
               [&](const Portion& portion) { normalize_portion(in, portion, coefficients); });
}
template <class T>
void grad_input_staged(const GradientOperands<T>& in, std::int64_t offset, const Runs& runs, std::int64_t c,
                       const CoefficientTable<Arithmetic<T>, GradAffine>& coefficients) {
  for_portions(
      offset, runs, c, values_past_line(in.dx),
      [&](std::int64_t channel) { return coefficients.is_wide_channel(channel); },
      [&](const Portion& portion) { grad_input_portion(in, portion, coefficients); });
}
template <class T>
void grad_input_staged(const GradientOperands<T>& in, std::int64_t offset, const Rows& rows,
                       const CoefficientTable<Arithmetic<T>, GradAffine>& coefficients) {
  for_portions(offset, rows, coefficients.width(),
               [&](const Portion& portion) { grad_input_portion(in, portion, coefficients); });
}

#define BN_INSTANTIATE(T)                                                                              \
  template void normalize_staged(const NormalizeOperands<T>&, std::int64_t, const Runs&, std::int64_t, \
                                 const CoefficientTable<Arithmetic<T>, Affine>&);                      \
  template void normalize_staged(const NormalizeOperands<T>&, std::int64_t, const Rows&,               \
                                 const CoefficientTable<Arithmetic<T>, Affine>&);                      \
  template void grad_input_staged(const GradientOperands<T>&, std::int64_t, const Runs&, std::int64_t, \
                                  const CoefficientTable<Arithmetic<T>, GradAffine>&);                 \
  template void grad_input_staged(const GradientOperands<T>&, std::int64_t, const Rows&,               \
                                  const CoefficientTable<Arithmetic<T>, GradAffine>&);
BN_INSTANTIATE(Float16)
BN_INSTANTIATE(BFloat16)
BN_INSTANTIATE(float)
BN_INSTANTIATE(double)
#undef BN_INSTANTIATE

}  // namespace batchnorm
