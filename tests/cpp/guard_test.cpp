// Every kernel of a table (kernels/table.hpp) and the calls made of them, with each array that they are given between
// two pages whose touch ends the program: the array ends at the one or begins at the other. On the instruction set of
// BATCHNORM_ISA.
#include <algorithm>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "batchnorm/batchnorm.hpp"
#include "batchnorm/relu.hpp"
#include "batchnorm/segments.hpp"
#include "batchnorm/weighted.hpp"
#include "data.hpp"
#include "dispatch.hpp"
#include "expect.hpp"
#include "guarded.hpp"
#include "kernels/table.hpp"

namespace {

using namespace batchnorm;
using guarded::Array;
using guarded::Place;
using guarded::Strided;
using kernels::Affine;
using kernels::AtPadding;
using kernels::ColumnSums;
using kernels::GradAffine;
using kernels::KernelsOf;
using kernels::Rows;
using kernels::RowWeights;
using kernels::Runs;
using kernels::RunWeights;
using kernels::Sums;
using kernels::WeightOf;

constexpr std::int64_t kLanes = kernels::kVectorColumns;
constexpr std::int64_t kRemainders = 64;
constexpr AtPadding kPaddings[] = {AtPadding::zero, AtPadding::input, AtPadding::formula};

// What is being called, for messages.
struct Call {
  const char* kernel = "";
  std::size_t item_size = 0;
  Place place = Place::ends_at_guard;
  Runs runs{};
  Rows rows{};
  std::int64_t channels = 0, inner = 0, repeat = 0, first_column = 0;  // of the weights of rows
  Problem problem{};
} current;

std::string described() {
  const Call& c = current;
  const std::string what = expect::text(active_implementation().name, " ", c.kernel, ", items of ", c.item_size,
                                        " bytes, ", guarded::name(c.place), ", ");
  if (c.problem.channels > 0) {
    return expect::text(what, c.problem.outer, " x ", c.problem.channels, " x ", c.problem.inner);
  }
  if (c.rows.columns == 0) {
    return expect::text(what, c.runs.count, " x ", c.runs.channels, " runs of ", c.runs.length, ", stride ",
                        c.runs.stride);
  }
  return expect::text(what, c.rows.count, " rows of ", c.rows.columns, ", stride ", c.rows.stride, ", weights of ",
                      c.channels, " x ", c.inner, ", repeat ", c.repeat, ", from column ", c.first_column);
}

// ---- arrays ----------------------------------------------------------------------------------------------------

// `count` of the same few thousand values, from the `from`-th on.
template <class T>
std::vector<T> values(std::int64_t count, std::int64_t from = 0) {
  constexpr std::int64_t kMost = 6000;
  static const std::vector<T> all = [] {
    data::Generator g(1);
    return data::values<T>(g, kMost);
  }();
  return std::vector<T>(all.begin() + from, all.begin() + from + count);
}
template <class W>
std::vector<W> weights(std::int64_t count, bool is_mask) {
  data::Generator g(2);
  std::vector<W> w(static_cast<std::size_t>(count));
  for (W& e : w) e = static_cast<W>(is_mask ? g.below(4) > 0 : g.below(4) * 0.375);
  return w;
}
template <class Coefficients>
std::vector<Coefficients> each_of(std::int64_t channels, const Coefficients& one) {
  return std::vector<Coefficients>(static_cast<std::size_t>(channels), one);
}

template <class T>
struct Room {
  using A = Arithmetic<T>;
  Array<T> x, dy, v, residual, out, dresidual;
  Array<WeightOf<T>> weights;
  Array<std::uint8_t> mask;
  Array<double> mean;
  Array<A> shift;
  Array<Sums> sums;
  Array<double> column_sums[4], blocks[4];
  Array<Affine<A>> affine;
  Array<GradAffine<A>> grad_affine;
  Array<Affine<double>> affine_wide;
  Array<GradAffine<double>> grad_affine_wide;
  Array<kernels::SecondAffine> second;
  Array<A> narrow[5], in_line[5];
  Array<double> wide[7];
  Array<std::uint16_t> is_wide;
};
template <class T>
Room<T>& room() {
  static Room<T> r;
  return r;
}

// The tensors of a piece, and what a call leaves of them.
template <class T>
struct Tensors {
  Room<T>& m = room<T>();
  Strided piece;
  const T *x, *dy, *v, *residual;

  explicit Tensors(const Strided& of_piece) : piece(of_piece) {
    const Place place = current.place;
    const std::int64_t n = piece.extent();
    x = m.x.place(values<T>(n), place);
    dy = m.dy.place(values<T>(n, 100), place, 2);
    v = m.v.place(values<T>(n, 200), place, 3);
    residual = m.residual.place(values<T>(n, 300), place, 4);
    m.out.place(values<T>(n, 400), place, 5);
    m.dresidual.place(values<T>(n, 400), place, 5);
    current.item_size = sizeof(T);
  }
  ~Tensors() {
    current.kernel = "one of all kernels";
    EXPECT(m.x.untouched() && m.dy.untouched() && m.v.untouched() && m.residual.untouched(), described());
  }
  Tensors(const Tensors&) = delete;
  Tensors& operator=(const Tensors&) = delete;

  // f(out).
  template <class F>
  void writes(const char* kernel, F&& f) {
    current.kernel = kernel;
    f(m.out.place(values<T>(piece.extent(), 400), current.place, 5));
    EXPECT(m.out.untouched_outside(piece), described());
  }
  // f(sums of the channels).
  template <class F>
  void sums(const char* kernel, std::int64_t channels, F&& f) {
    current.kernel = kernel;
    f(m.sums.place(std::vector<Sums>(static_cast<std::size_t>(channels)), current.place, 6));
    EXPECT(m.sums.untouched_outside({channels, 1, channels}), described());
  }
  template <class F>
  void column_sums(const char* kernel, F&& f) {
    current.kernel = kernel;
    double* field[4];
    for (std::size_t e = 0; e < 4; ++e) field[e] = m.column_sums[e].place(values<double>(piece.length), current.place);
    f(ColumnSums{field[0], field[1], field[2], field[3]});
    for (auto& sum : m.column_sums) EXPECT(sum.untouched_outside({piece.length, 1, piece.length}), described());
  }

  // f(tail, out), with and without a residual and a mask.
  template <class F>
  void relu_writes(const char* kernel, std::int64_t first_bit, F&& f) {
    for (const bool has_mask : {true, false}) {
      const std::vector<std::uint8_t> before(static_cast<std::size_t>((first_bit + piece.extent() + 7) / 8), 0x5a);
      std::uint8_t* mask = m.mask.place(before, current.place);
      for (const T* add : {residual, static_cast<const T*>(nullptr)}) {
        writes(kernel, [&](T* out) { f(kernels::ReluTail<T>{add, has_mask ? mask : nullptr, first_bit}, out); });
      }
      // Bits that are not of the piece.
      std::vector<std::uint8_t> after = m.mask.all();
      piece.for_each([&](std::int64_t at, std::int64_t) {
        const auto bit = static_cast<std::size_t>(first_bit + at);
        const auto which = static_cast<std::uint8_t>(1u << (bit % 8));
        after[bit / 8] = static_cast<std::uint8_t>((after[bit / 8] & ~which) | (before[bit / 8] & which));
      });
      const auto bytes = static_cast<std::int64_t>(before.size());
      EXPECT(after == before && m.mask.untouched_outside({bytes, 1, bytes}), described());
    }
  }
  // The mask that backward reads: up to 4 bytes behind a bit.
  const std::uint8_t* mask_to_read(std::int64_t first_bit) {
    const auto bytes = static_cast<std::size_t>((first_bit + piece.extent() + 7) / 8 + 4);
    return m.mask.place(std::vector<std::uint8_t>(bytes, 0x5a), current.place);
  }
  // f(inputs, out), with and without x and dresidual.
  template <class F>
  void relu_gradients(const char* kernel, const std::uint8_t* mask, std::int64_t first_bit, bool streams, F&& f) {
    for (const T* from : {x, static_cast<const T*>(nullptr)}) {
      for (const bool has_dresidual : {true, false}) {
        T* dresidual = m.dresidual.place(values<T>(piece.extent(), 400), current.place, 5);
        const kernels::ReluInputs<T> in{dy, from, mask, first_bit, has_dresidual ? dresidual : nullptr, streams};
        writes(kernel, [&](T* out) { f(in, out); });
        EXPECT(m.dresidual.untouched_outside(piece), described());
      }
    }
    EXPECT(m.mask.untouched(), described());
  }
};

// So that bits of the lines of p are whole bytes.
template <class T>
std::int64_t bit_of_lines(const T* p) {
  const auto past_line = static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(p) % kernels::kStreamBytes);
  return past_line / static_cast<std::int64_t>(sizeof(T)) % 8;
}

// ---- runs ------------------------------------------------------------------------------------------------------

template <class T>
void try_plain_runs(const KernelsOf<T>& all, const Runs& runs, Tensors<T>& t) {
  using A = Arithmetic<T>;
  const auto& k = all.plain;
  const T *x = t.x, *dy = t.dy;
  const std::int64_t channels = runs.channels;
  const double* mean = t.m.mean.place(values<double>(channels), current.place);
  const auto* affine = t.m.affine.place(each_of(channels, Affine<A>{1, 2, 3}), current.place);
  const auto* grad = t.m.grad_affine.place(each_of(channels, GradAffine<A>{1, 2, 3, 4, 5}), current.place);
  const auto* second = t.m.second.place(each_of(channels, kernels::SecondAffine{1, 2, 3, 4, 5, 6, 7}), current.place);
  t.sums("runs_moments", channels, [&](Sums* s) { k.runs_moments(x, runs, s); });
  t.sums("runs_moments_compensated", channels, [&](Sums* s) { k.runs_moments_compensated(x, runs, s); });
  t.sums("runs_grad_sums", channels, [&](Sums* s) { k.runs_grad_sums(dy, x, runs, mean, s); });
  t.writes("runs_normalize", [&](T* y) { k.runs_normalize(x, y, runs, affine); });
  t.writes("runs_normalize_around_cache", [&](T* y) { k.runs_normalize_around_cache(x, y, runs, affine); });
  t.writes("runs_grad_input", [&](T* dx) { k.runs_grad_input(dy, x, dx, runs, grad); });
  t.writes("runs_grad_input_around_cache", [&](T* dx) { k.runs_grad_input_around_cache(dy, x, dx, runs, grad); });
  t.writes("runs_second_grad", [&](T* dx) { k.runs_second_grad(t.v, dy, x, dx, runs, second); });
  if (channels > 1) return;
  const auto& wide = *t.m.affine_wide.place({{1, 2, 3}}, current.place);
  const auto& grad_wide = *t.m.grad_affine_wide.place({{1, 2, 3, 4, 5}}, current.place);
  t.sums("runs_moments_about", 1, [&](Sums* s) { k.runs_moments_about(x, runs, A(1), s); });
  t.writes("runs_normalize_wide", [&](T* y) { k.runs_normalize_wide(x, y, runs, wide); });
  t.writes("runs_grad_input_wide", [&](T* dx) { k.runs_grad_input_wide(dy, x, dx, runs, grad_wide); });
}

template <class T>
void try_weighted_runs(const KernelsOf<T>& all, const Runs& runs, bool is_mask, Tensors<T>& t) {
  using A = Arithmetic<T>;
  using W = WeightOf<T>;
  const auto& k = all.weighted;
  const T *x = t.x, *dy = t.dy;
  const std::int64_t channels = runs.channels;
  const RunWeights<W> w{t.m.weights.place(weights<W>(runs.count * runs.length, is_mask), current.place, 7), runs.length,
                        is_mask};
  const double* mean = t.m.mean.place(values<double>(channels), current.place);
  const auto* affine = t.m.affine.place(each_of(channels, Affine<A>{1, 2, 3}), current.place);
  const auto* grad = t.m.grad_affine.place(each_of(channels, GradAffine<A>{1, 2, 3, 4, 5}), current.place);
  const auto& wide = *t.m.affine_wide.place({{1, 2, 3}}, current.place);
  const auto& grad_wide = *t.m.grad_affine_wide.place({{1, 2, 3, 4, 5}}, current.place);
  const auto& moments = is_mask ? k.masked : k.weighted;
  t.sums("weighted runs", channels, [&](Sums* s) { moments.runs(x, w, runs, s); });
  t.sums("weighted runs_compensated", channels, [&](Sums* s) { moments.runs_compensated(x, w, runs, s); });
  t.sums("weighted runs_grad_sums", channels, [&](Sums* s) { k.runs_grad_sums(dy, x, w, runs, mean, s); });
  if (channels == 1) t.sums("weighted runs_about", 1, [&](Sums* s) { moments.runs_about(x, w, runs, A(1), s); });
  for (const AtPadding at : kPaddings) {
    t.writes("weighted runs_normalize", [&](T* y) { k.runs_normalize(x, y, w, at, runs, affine); });
    t.writes("weighted runs_normalize_around_cache",
             [&](T* y) { k.runs_normalize_around_cache(x, y, w, at, runs, affine); });
    t.writes("weighted runs_grad_input", [&](T* dx) { k.runs_grad_input(dy, x, dx, w, at, runs, grad); });
    t.writes("weighted runs_grad_input_around_cache",
             [&](T* dx) { k.runs_grad_input_around_cache(dy, x, dx, w, at, runs, grad); });
    if (channels > 1) continue;
    t.writes("weighted runs_normalize_wide", [&](T* y) { k.runs_normalize_wide(x, y, w, at, runs, wide); });
    t.writes("weighted runs_grad_input_wide",
             [&](T* dx) { k.runs_grad_input_wide(dy, x, dx, w, at, runs, grad_wide); });
  }
  EXPECT(t.m.weights.untouched(), described());
}

template <class T>
void try_relu_runs(const KernelsOf<T>& all, const Runs& runs, Tensors<T>& t) {
  using A = Arithmetic<T>;
  using Tail = kernels::ReluTail<T>;
  using In = kernels::ReluInputs<T>;
  const auto& k = all.relu;
  const std::int64_t channels = runs.channels, lines = bit_of_lines(t.m.out.data());
  const double* mean = t.m.mean.place(values<double>(channels), current.place);
  const auto* affine = t.m.affine.place(each_of(channels, Affine<A>{1, 2, 3}), current.place);
  const auto* grad = t.m.grad_affine.place(each_of(channels, GradAffine<A>{1, 2, 3, 4, 5}), current.place);
  const auto& wide = *t.m.affine_wide.place({{1, 2, 3}}, current.place);
  const auto& grad_wide = *t.m.grad_affine_wide.place({{1, 2, 3, 4, 5}}, current.place);
  t.relu_writes("relu runs_normalize", lines,
                [&](const Tail& tail, T* y) { k.runs_normalize(t.x, y, tail, runs, affine); });
  t.relu_writes("relu runs_normalize_around_cache", lines,
                [&](const Tail& tail, T* y) { k.runs_normalize_around_cache(t.x, y, tail, runs, affine); });
  const std::uint8_t* mask = t.mask_to_read(lines);
  t.sums("relu runs_grad_sums", channels,
         [&](Sums* s) { k.runs_grad_sums(In{t.dy, t.x, mask, lines}, runs, mean, s); });
  t.relu_gradients("relu runs_grad_input", mask, lines, false,
                   [&](const In& in, T* dx) { k.runs_grad_input(in, dx, runs, grad); });
  t.relu_gradients("relu runs_grad_input_around_cache", mask, lines, true,
                   [&](const In& in, T* dx) { k.runs_grad_input_around_cache(in, dx, runs, grad); });
  if (channels > 1) return;
  t.relu_gradients("relu runs_grad_input_wide", mask, lines, false,
                   [&](const In& in, T* dx) { k.runs_grad_input_wide(in, dx, runs, grad_wide); });
  t.relu_writes("relu runs_normalize_wide", lines,
                [&](const Tail& tail, T* y) { k.runs_normalize_wide(t.x, y, tail, runs, wide); });
}

template <class T>
void try_runs(Runs runs) {
  const KernelsOf<T>& all = active_implementation().table->all<T>();
  for (const Place place : {Place::ends_at_guard, Place::starts_at_guard}) {
    current = {.place = place, .runs = runs};
    Tensors<T> t({runs.channels * runs.length, runs.count, runs.stride});
    try_plain_runs(all, runs, t);
    for (const bool is_mask : {false, true}) try_weighted_runs(all, runs, is_mask, t);
    try_relu_runs(all, runs, t);
  }
}

// Every remainder of a vector and of a line: of single runs and several, of channels side by side, and of runs just
// shorter and longer than those whose weights kernels lay out (1024).
template <class T>
void try_all_runs() {
  for (std::int64_t r = 0; r < kRemainders; ++r) {
    try_runs<T>({.length = r, .count = 1, .stride = r});
    try_runs<T>({.length = 64 + r, .count = 2, .stride = 70 + r, .ahead = 1'000'000});
    const std::int64_t length = kLanes + r;
    try_runs<T>({.length = length, .count = 5, .stride = 3 * length, .channels = 3});
    for (const std::int64_t beyond : {961, 1040}) {
      try_runs<T>({.length = beyond + r, .count = 1, .stride = 2 * (beyond + r), .channels = 2});
    }
  }
}

// ---- rows ------------------------------------------------------------------------------------------------------

// Coefficients of `columns`, at the ends of their arrays.
template <class T>
struct ColumnCoefficients {
  using A = Arithmetic<T>;
  const A *n[5], *l[5];  // l: for kernels that walk in line
  const double* w[7];
  const std::uint16_t* is_wide;
  const double* mean;
  const A* shift;

  ColumnCoefficients(Room<T>& m, std::int64_t columns) {
    for (std::size_t f = 0; f < 5; ++f) {
      n[f] = m.narrow[f].place(values<A>(columns), current.place);
      l[f] = m.in_line[f].place(values<A>(columns + kLanes), current.place);
    }
    for (std::size_t f = 0; f < 7; ++f) w[f] = m.wide[f].place(values<double>(columns), current.place);
    const auto groups = static_cast<std::size_t>((columns + kLanes - 1) / kLanes);
    is_wide = m.is_wide.place(std::vector<std::uint16_t>(groups, 0x5a5a), current.place);
    mean = m.mean.place(values<double>(columns), current.place);
    shift = m.shift.place(values<A>(columns), current.place);
  }
  [[nodiscard]] kernels::AffineColumns<A> affine() const { return {n[0], n[1], n[2]}; }
  [[nodiscard]] kernels::AffineColumns<A> affine_in_line() const { return {l[0], l[1], l[2]}; }
  [[nodiscard]] kernels::WideColumns<kernels::AffineColumns<double>> affine_wide() const {
    return {is_wide, {w[0], w[1], w[2]}};
  }
  [[nodiscard]] kernels::GradAffineColumns<A> grad() const { return {n[0], n[1], n[2], n[3], n[4]}; }
  [[nodiscard]] kernels::GradAffineColumns<A> grad_in_line() const { return {l[0], l[1], l[2], l[3], l[4]}; }
  [[nodiscard]] kernels::WideColumns<kernels::GradAffineColumns<double>> grad_wide() const {
    return {is_wide, {w[0], w[1], w[2], w[3], w[4]}};
  }
};

bool can_walk_in_line(const Rows& rows) { return rows.stride == rows.columns && rows.columns >= kLanes; }

template <class T>
void try_plain_rows(const KernelsOf<T>& all, const Rows& rows, const ColumnCoefficients<T>& c, Tensors<T>& t) {
  const auto& k = all.plain;
  const T *x = t.x, *dy = t.dy;
  t.column_sums("rows_moments", [&](const ColumnSums& s) { k.rows_moments(x, rows, s); });
  t.column_sums("rows_moments_about", [&](const ColumnSums& s) { k.rows_moments_about(x, rows, c.shift, s); });
  t.column_sums("rows_moments_compensated", [&](const ColumnSums& s) { k.rows_moments_compensated(x, rows, s); });
  t.column_sums("rows_grad_sums", [&](const ColumnSums& s) { k.rows_grad_sums(dy, x, rows, c.mean, s); });
  t.writes("rows_normalize", [&](T* y) { k.rows_normalize(x, y, rows, c.affine()); });
  t.writes("rows_grad_input", [&](T* dx) { k.rows_grad_input(dy, x, dx, rows, c.grad()); });
  const kernels::SecondAffineColumns second{c.w[0], c.w[1], c.w[2], c.w[3], c.w[4], c.w[5], c.w[6]};
  t.writes("rows_second_grad", [&](T* dx) { k.rows_second_grad(t.v, dy, x, dx, rows, second); });
  if constexpr (sizeof(T) < sizeof(double)) {
    t.writes("rows_normalize_mixed", [&](T* y) { k.rows_normalize_mixed(x, y, rows, c.affine(), c.affine_wide()); });
    t.writes("rows_grad_input_mixed",
             [&](T* dx) { k.rows_grad_input_mixed(dy, x, dx, rows, c.grad(), c.grad_wide()); });
  }
  if (!can_walk_in_line(rows)) return;
  t.writes("rows_normalize_around_cache", [&](T* y) { k.rows_normalize_around_cache(x, y, rows, c.affine_in_line()); });
  t.writes("rows_grad_input_around_cache",
           [&](T* dx) { k.rows_grad_input_around_cache(dy, x, dx, rows, c.grad_in_line()); });
}

template <class T>
void try_relu_rows(const KernelsOf<T>& all, const Rows& rows, const ColumnCoefficients<T>& c, Tensors<T>& t) {
  using Tail = kernels::ReluTail<T>;
  using In = kernels::ReluInputs<T>;
  const auto& k = all.relu;
  for (const std::int64_t first_bit : {0, 5}) {
    t.relu_writes("relu rows_normalize", first_bit,
                  [&](const Tail& tail, T* y) { k.rows_normalize(t.x, y, tail, rows, c.affine()); });
    const std::uint8_t* mask = t.mask_to_read(first_bit);
    t.column_sums("relu rows_grad_sums",
                  [&](const ColumnSums& s) { k.rows_grad_sums(In{t.dy, t.x, mask, first_bit}, rows, c.mean, s); });
    t.relu_gradients("relu rows_grad_input", mask, first_bit, false,
                     [&](const In& in, T* dx) { k.rows_grad_input(in, dx, rows, c.grad()); });
    if constexpr (sizeof(T) < sizeof(double)) {
      t.relu_gradients("relu rows_grad_input_mixed", mask, first_bit, false,
                       [&](const In& in, T* dx) { k.rows_grad_input_mixed(in, dx, rows, c.grad(), c.grad_wide()); });
      t.relu_writes("relu rows_normalize_mixed", first_bit, [&](const Tail& tail, T* y) {
        k.rows_normalize_mixed(t.x, y, tail, rows, c.affine(), c.affine_wide());
      });
    }
  }
  if (!can_walk_in_line(rows)) return;
  const std::int64_t lines = bit_of_lines(t.m.out.data());
  t.relu_writes("relu rows_normalize_in_line", lines,
                [&](const Tail& tail, T* y) { k.rows_normalize_in_line(t.x, y, tail, rows, c.affine_in_line()); });
  t.relu_writes("relu rows_normalize_around_cache", lines,
                [&](const Tail& tail, T* y) { k.rows_normalize_around_cache(t.x, y, tail, rows, c.affine_in_line()); });
  t.relu_gradients("relu rows_grad_input_around_cache", t.mask_to_read(lines), lines, true,
                   [&](const In& in, T* dx) { k.rows_grad_input_around_cache(in, dx, rows, c.grad_in_line()); });
}

template <class T>
void try_rows(const Rows& rows) {
  const KernelsOf<T>& all = active_implementation().table->all<T>();
  for (const Place place : {Place::ends_at_guard, Place::starts_at_guard}) {
    current = {.place = place, .rows = rows};
    Tensors<T> t({rows.columns, rows.count, rows.stride});
    const ColumnCoefficients<T> c(t.m, rows.columns);
    try_plain_rows(all, rows, c, t);
    try_relu_rows(all, rows, c, t);
  }
}

template <class T>
void try_rows_with_weights(const Rows& rows, const RowWeights<WeightOf<T>>& w, const ColumnCoefficients<T>& c,
                           Tensors<T>& t) {
  const auto& k = active_implementation().table->weighted<T>();
  const T *x = t.x, *dy = t.dy;
  const auto& moments = w.is_mask ? k.masked : k.weighted;
  t.column_sums("weighted rows", [&](const ColumnSums& s) { moments.rows(x, w, rows, s); });
  t.column_sums("weighted rows_about", [&](const ColumnSums& s) { moments.rows_about(x, w, rows, c.shift, s); });
  t.column_sums("weighted rows_compensated", [&](const ColumnSums& s) { moments.rows_compensated(x, w, rows, s); });
  t.column_sums("weighted rows_grad_sums", [&](const ColumnSums& s) { k.rows_grad_sums(dy, x, w, rows, c.mean, s); });
  for (const AtPadding at : kPaddings) {
    t.writes("weighted rows_normalize", [&](T* y) { k.rows_normalize(x, y, w, at, rows, c.affine()); });
    t.writes("weighted rows_grad_input", [&](T* dx) { k.rows_grad_input(dy, x, dx, w, at, rows, c.grad()); });
    if constexpr (sizeof(T) < sizeof(double)) {
      t.writes("weighted rows_normalize_mixed",
               [&](T* y) { k.rows_normalize_mixed(x, y, w, at, rows, c.affine(), c.affine_wide()); });
      t.writes("weighted rows_grad_input_mixed",
               [&](T* dx) { k.rows_grad_input_mixed(dy, x, dx, w, at, rows, c.grad(), c.grad_wide()); });
    }
    if (!can_walk_in_line(rows) || w.inner > 1 || w.repeat > 1) continue;
    t.writes("weighted rows_normalize_around_cache",
             [&](T* y) { k.rows_normalize_around_cache(x, y, w, at, rows, c.affine_in_line()); });
    t.writes("weighted rows_grad_input_around_cache",
             [&](T* dx) { k.rows_grad_input_around_cache(dy, x, dx, w, at, rows, c.grad_in_line()); });
  }
  EXPECT(t.m.weights.untouched(), described());
}

// Weights of `inner` places a row of the tensor, `repeat` of which are a row; a piece from `first_column` on.
struct WeightShape {
  std::int64_t inner, repeat, first_column;
};
template <class T>
void try_weighted_rows(const Rows& rows, const WeightShape& shape) {
  using W = WeightOf<T>;
  const auto [inner, repeat, first_column] = shape;
  const std::int64_t channels = (first_column + rows.columns + inner * repeat - 1) / (inner * repeat);
  for (const Place place : {Place::ends_at_guard, Place::starts_at_guard}) {
    current = {.place = place,
               .rows = rows,
               .channels = channels,
               .inner = inner,
               .repeat = repeat,
               .first_column = first_column};
    Tensors<T> t({rows.columns, rows.count, rows.stride});
    const ColumnCoefficients<T> c(t.m, rows.columns);
    for (const bool is_mask : {false, true}) {
      const W* w = t.m.weights.place(weights<W>(rows.count * repeat * inner, is_mask), place, 7);
      try_rows_with_weights<T>(rows, {w, channels, inner, repeat, first_column, is_mask}, c, t);
    }
  }
}

// Every remainder, side by side and apart, of fewer rows than a visit of a kernel and of more; and of rows that are
// copied in parts (512 columns).
template <class T>
void try_all_rows() {
  for (std::int64_t columns = 1; columns <= kRemainders; ++columns) {
    for (const std::int64_t count : {1, 3, 9}) {
      for (const std::int64_t apart : {0, 5}) {
        const Rows rows{.count = count, .columns = columns, .stride = columns + apart, .ahead = apart * 10'000};
        try_rows<T>(rows);
        for (const WeightShape& shape : {WeightShape{1, 1, 0}, {2, 1, 0}, {7, 1, 16}, {16, 1, 48}}) {
          try_weighted_rows<T>(rows, shape);
        }
      }
    }
    const Rows wide{.count = 2, .columns = 512 + columns, .stride = 512 + columns};
    try_rows<T>(wide);
    for (const WeightShape& shape : {WeightShape{1, 1, 0}, {9, 1, 0}}) try_weighted_rows<T>(wide, shape);
  }
}

// Rows of the tensor side by side: weights are permuted, laid out, or the same for whole vectors.
template <class T>
void try_all_repeated_rows() {
  for (const std::int64_t channels : {2, 3, 5, 7, 11, 16, 19, 32}) {
    for (const std::int64_t repeat : {2, 3, 5, 16, 32}) {
      for (const std::int64_t inner : {1, 3}) {
        const std::int64_t columns = channels * repeat * inner;
        if (columns > kernels::kMostWeightedColumns) continue;
        for (const std::int64_t count : {1, 2, 9}) {
          if (count * columns > 5000) continue;
          try_weighted_rows<T>({.count = count, .columns = columns, .stride = columns}, {inner, repeat, 0});
        }
      }
    }
  }
}

// ---- the rest --------------------------------------------------------------------------------------------------

template <class T>
void try_all_counts() {
  using W = WeightOf<T>;
  Room<T>& m = room<T>();
  for (std::int64_t n = 0; n <= 2 * kRemainders; ++n) {
    for (const bool is_mask : {false, true}) {
      for (const Place place : {Place::ends_at_guard, Place::starts_at_guard}) {
        current = {.kernel = "count", .item_size = sizeof(W), .place = place, .runs = {n, 1, n}};
        const W* w = m.weights.place(weights<W>(n, is_mask), place);
        EXPECT_EQUAL(active_implementation().table->weighted<T>().count(w, n).good, n, described());
      }
    }
  }
}

template <class T>
void try_all_blocks() {
  Room<T>& m = room<T>();
  const auto add_blocks = active_implementation().table->of<T>().add_blocks;
  constexpr std::int64_t kBlocks = 3;
  for (std::int64_t columns = 1; columns <= kRemainders; ++columns) {
    for (const Place place : {Place::ends_at_guard, Place::starts_at_guard}) {
      const std::int64_t stride = columns + 3;
      current = {.kernel = "add_blocks", .item_size = sizeof(T), .place = place, .rows = {kBlocks, columns, stride}};
      double *block[4], *total[4];
      for (std::size_t f = 0; f < 4; ++f) {
        block[f] = m.blocks[f].place(values<double>((kBlocks - 1) * stride + columns), place);
        total[f] = m.column_sums[f].place(values<double>(columns), place);
      }
      add_blocks({block[0], block[1], block[2], block[3]}, kBlocks, stride, columns,
                 {total[0], total[1], total[2], total[3]});
      for (std::size_t f = 0; f < 4; ++f) {
        EXPECT(m.blocks[f].untouched() && m.column_sums[f].untouched_outside({columns, 1, columns}), described());
      }
    }
  }
}

template <class F>
void for_each_type(F&& f) {
  f.template operator()<float>();
  f.template operator()<double>();
  f.template operator()<Float16>();
  f.template operator()<BFloat16>();
}

TEST(kernels_of_runs_touch_no_byte_outside_of_their_arrays) {
  for_each_type([]<class T>() { try_all_runs<T>(); });
}
TEST(kernels_of_rows_touch_no_byte_outside_of_their_arrays) {
  for_each_type([]<class T>() { try_all_rows<T>(); });
}
TEST(kernels_of_rows_side_by_side_touch_no_byte_outside_of_their_arrays) {
  for_each_type([]<class T>() { try_all_repeated_rows<T>(); });
}
TEST(counts_of_weights_and_sums_of_blocks_touch_no_byte_outside_of_their_arrays) {
  for_each_type([]<class T>() {
    try_all_counts<T>();
    try_all_blocks<T>();
  });
}

// ---- calls -----------------------------------------------------------------------------------------------------

template <class T>
struct CallArrays {
  Array<T> x, dy, residual, y, dx, dresidual;
  Array<WeightOf<T>> weights;
  Array<std::uint8_t> mask;
  Array<Moments> saved;
  Array<GradSums> sums;
  Array<double> gamma, beta, mean, var, dgamma, dbeta;
  Array<std::int64_t> offsets;
};

template <class T>
class Calls {
 public:
  explicit Calls(const Problem& problem) : p(problem) {
    const std::int64_t n = p.size();
    const auto values_at = [](auto& array, auto content) {
      const std::size_t size = content.size();
      return std::span(array.place(content, current.place), size);
    };
    x = values_at(a.x, values<T>(n));
    dy = values_at(a.dy, values<T>(n, 100));
    residual = values_at(a.residual, values<T>(n, 200));
    y = values_at(a.y, values<T>(n));
    dx = values_at(a.dx, values<T>(n));
    dresidual = values_at(a.dresidual, values<T>(n));
    mask = values_at(a.mask, std::vector<std::uint8_t>(static_cast<std::size_t>(relu_mask_bytes(p))));
    gamma = values_at(a.gamma, values<double>(p.channels));
    beta = values_at(a.beta, values<double>(p.channels));
    mean = values_at(a.mean, values<double>(p.channels));
    var = values_at(a.var, each_of(p.channels, 2.0));
    dgamma = values_at(a.dgamma, values<double>(p.channels));
    dbeta = values_at(a.dbeta, values<double>(p.channels));
    saved = values_at(a.saved, each_of(p.channels, Moments{}));
    sums = values_at(a.sums, each_of(p.channels, GradSums{}));
    current.item_size = sizeof(T);
  }

  void plain() {
    current.kernel = "calls without weights";
    batch_norm<T>(x, p, gamma, beta, 1e-5, y, saved);
    batch_norm_backward<T>(dy, x, p, saved, gamma, 1e-5, dx, dgamma, dbeta);
    grad_sums<T>(dy, x, p, saved, sums);
    grad_input<T>(dy, x, p, saved, sums, gamma, 1e-5, dx);
    normalize<T>(x, p, mean, var, gamma, beta, 1e-5, y);
    normalize_backward<T>(dy, x, p, mean, var, gamma, 1e-5, dx, dgamma, dbeta);
    batch_norm_jvp<T>(residual, x, p, saved, gamma, mean, beta, 1e-5, y);
    batch_norm_double_backward<T>(residual, dy, x, p, saved, gamma, mean, beta, 1e-5, y, dx, dgamma);
    expect_inside();
  }
  void weighted(bool is_mask) {
    current.kernel = is_mask ? "calls with a mask" : "calls with weights";
    const auto w = weights<WeightOf<T>>(p.count(), is_mask);
    for (const Padding padding : {Padding::zero, Padding::keep, Padding::normalize}) {
      const WeightsFor<T> given{std::span(a.weights.place(w, current.place), w.size()), padding};
      batch_norm<T>(x, p, given, gamma, beta, 1e-5, y, saved);
      batch_norm_backward<T>(dy, x, p, given, saved, gamma, 1e-5, dx, dgamma, dbeta);
      grad_sums<T>(dy, x, p, given, saved, sums);
      grad_input<T>(dy, x, p, given, saved, sums, gamma, 1e-5, dx);
      if (padding != Padding::normalize) normalize<T>(x, p, given, mean, var, gamma, beta, 1e-5, y);
      EXPECT(a.weights.untouched(), described());
    }
    expect_inside();
  }
  void relu() {
    current.kernel = "calls with a ReLU";
    batch_norm_relu<T>(x, p, residual, gamma, beta, 1e-5, y, mask, saved);
    batch_norm_relu_backward<T>(dy, x, p, mask, saved, gamma, 1e-5, dx, dresidual, dgamma, dbeta);
    normalize_relu<T>(x, p, residual, mean, var, gamma, beta, 1e-5, y, mask);
    normalize_relu_backward<T>(dy, x, p, mask, mean, var, gamma, 1e-5, dx, dresidual, dgamma, dbeta);
    const auto bytes = static_cast<std::int64_t>(mask.size());
    EXPECT(a.mask.untouched_outside({bytes, 1, bytes}), described());
    expect_inside();
  }
  void segments() {
    current.kernel = "calls with segments";
    const std::vector<std::int64_t> ends{0, p.outer};
    const std::span<const std::int64_t> offsets(a.offsets.place(ends, current.place), 2);
    segment_batch_norm<T>(x, p, offsets, gamma, beta, 1e-5, y, saved);
    segment_batch_norm_backward<T>(dy, x, p, offsets, saved, gamma, 1e-5, dx, dgamma, dbeta);
    EXPECT(a.offsets.untouched(), described());
    expect_inside();
  }

 private:
  static CallArrays<T>& arrays() {
    static CallArrays<T> all;
    return all;
  }
  void expect_inside() {
    const std::int64_t n = p.size(), c = p.channels;
    EXPECT(a.x.untouched() && a.dy.untouched() && a.residual.untouched(), described());
    EXPECT(a.gamma.untouched() && a.beta.untouched() && a.mean.untouched() && a.var.untouched(), described());
    for (auto* written : {&a.y, &a.dx, &a.dresidual}) EXPECT(written->untouched_outside({n, 1, n}), described());
    for (auto* written : {&a.dgamma, &a.dbeta}) EXPECT(written->untouched_outside({c, 1, c}), described());
    EXPECT(a.saved.untouched_outside({c, 1, c}) && a.sums.untouched_outside({c, 1, c}), described());
  }

  CallArrays<T>& a = arrays();
  Problem p;
  std::span<const T> x, dy, residual;
  std::span<T> y, dx, dresidual;
  std::span<std::uint8_t> mask;
  std::span<const double> gamma, beta, mean, var;
  std::span<double> dgamma, dbeta;
  std::span<Moments> saved;
  std::span<GradSums> sums;
};

template <class T>
void try_calls(const Problem& p) {
  for (const Place place : {Place::ends_at_guard, Place::starts_at_guard}) {
    current = {.place = place, .problem = p};
    Calls<T> calls(p);
    calls.plain();
    for (const bool is_mask : {false, true}) calls.weighted(is_mask);
    calls.relu();
    calls.segments();
  }
}

// Planar and interleaved, of one channel and several.
template <class T>
void try_all_calls() {
  for (std::int64_t r = 1; r <= kRemainders; ++r) {
    for (const Problem& p :
         {Problem{1, 2, 1040 + r}, {4, 1, r}, {5, 3, 30 + r}, {12, r, 1}, {6, r, 5}, {50, 3, r % 4}}) {
      if (p.size() > 0) try_calls<T>(p);
    }
  }
}

TEST(calls_touch_no_byte_outside_of_their_arrays) {
  for_each_type([]<class T>() { try_all_calls<T>(); });
}

}  // namespace

int main(int argc, char** argv) {
  guarded::describe_call = described;
  guarded::report_faults();
  return expect::run_tests(argc > 1 ? argv[1] : nullptr);
}
