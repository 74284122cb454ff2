// The kernel contract (kernels/table.hpp), for every table that runs on this machine and the reference.
#include <array>
#include <cfloat>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "data.hpp"
#include "dispatch.hpp"
#include "exact_sum.hpp"
#include "expect.hpp"
#include "guarded.hpp"
#include "kernels/table.hpp"
#include "machine.hpp"
#include "plan.hpp"

namespace {

using namespace batchnorm;
using data::Generator;
using guarded::Place;
using guarded::Strided;
using kernels::Kernels;
using kernels::Rows;
using kernels::Runs;
using kernels::Sums;

enum class Pass {
  moments,
  moments_about,
  moments_compensated,
  grad_sums,
  normalize,
  normalize_wide,  // rows: the mixed form
  normalize_around_cache,
  grad_input,
  grad_input_wide,
  grad_input_around_cache,
};
constexpr const char* kPassNames[] = {
    "moments",        "moments_about",          "moments_compensated", "grad_sums",       "normalize",
    "normalize_wide", "normalize_around_cache", "grad_input",          "grad_input_wide", "grad_input_around_cache"};
constexpr Pass kSums[] = {Pass::moments, Pass::moments_about, Pass::moments_compensated, Pass::grad_sums};
constexpr Pass kNormalize[] = {Pass::normalize, Pass::normalize_wide, Pass::normalize_around_cache};
constexpr Pass kGradInput[] = {Pass::grad_input, Pass::grad_input_wide, Pass::grad_input_around_cache};

bool reads_dy(Pass pass) { return pass >= Pass::grad_input; }
bool goes_around_cache(Pass pass) {
  return pass == Pass::normalize_around_cache || pass == Pass::grad_input_around_cache;
}

// Which array the output is written to.
enum class Output { its_own, x, dy };
constexpr const char* kOutputNames[] = {"out of place", "onto x", "onto dy"};

enum class Values { ordinary, extreme, not_finite };

// A piece with its data and coefficients: one column for runs, `piece.length` columns for rows.
template <class T>
struct Inputs {
  Strided piece;
  bool is_rows;
  std::vector<T> x, dy, shift;
  std::vector<double> mean;
  std::array<std::vector<T>, 5> narrow;
  std::array<std::vector<double>, 5> wide;
  std::vector<std::uint16_t> mask;

  [[nodiscard]] std::int64_t columns() const { return is_rows ? piece.length : 1; }
  [[nodiscard]] std::size_t column_of(std::int64_t element) const {
    return is_rows ? static_cast<std::size_t>(element % piece.length) : 0;
  }
  [[nodiscard]] bool is_wide(std::size_t column) const {
    return !is_rows || ((mask[column / 16] >> (column % 16)) & 1);
  }
};

template <class T>
struct Outcome {
  std::vector<double> sums;  // first, first_lo, second, second_lo of all columns; without low parts where none is kept
  std::vector<T> values;
};

// What is being called, for messages.
struct Call {
  const char* isa = "";
  const char* type = "";
  Pass pass = Pass::moments;
  Output output = Output::its_own;
  Place place = Place::ends_at_guard;
  Strided piece{};
  bool is_rows = false;
} current;

std::string described() {
  return expect::text(current.isa, " ", current.type, " ", current.is_rows ? "rows_" : "runs_",
                      kPassNames[static_cast<int>(current.pass)], " ", kOutputNames[static_cast<int>(current.output)],
                      ", ", guarded::name(current.place), ", ", current.piece.count, " x ", current.piece.length,
                      " values, stride ", current.piece.stride);
}

// ---- data ------------------------------------------------------------------------------------------------------

// Of different sizes, so that differences and their squares round, even in float64.
template <class T>
T ordinary(Generator& g) {
  return g.value<T>() * static_cast<T>(std::ldexp(1.0, g.below(41) - 20));
}

// Sums of a thousand of these and of their squares stay finite.
template <class T>
T extreme(Generator& g) {
  constexpr T kHuge = sizeof(T) == sizeof(float) ? std::numeric_limits<T>::max() : T(0x1p500);
  constexpr T kTiny = std::numeric_limits<T>::denorm_min();
  switch (g.below(8)) {
    case 0:
      return kHuge;
    case 1:
      return -kHuge;
    case 2:
      return std::numeric_limits<T>::min();
    case 3:
      return kTiny;
    case 4:
      return -kTiny * static_cast<T>(g.below(1000));
    case 5:
      return T(0) * g.value<T>();  // 0 or -0
    default:
      return g.value<T>();
  }
}

template <class T>
T not_finite(Generator& g) {
  switch (g.below(20)) {
    case 0:
      return std::numeric_limits<T>::quiet_NaN();
    case 1:
      return std::numeric_limits<T>::infinity();
    case 2:
      return -std::numeric_limits<T>::infinity();
    case 3:
      return std::numeric_limits<T>::max() * T(0x1p-12);  // squares overflow in float64, sums do not
    default:
      return g.value<T>();
  }
}

template <class T>
std::vector<T> fill(Generator& g, std::int64_t count, Values kind) {
  std::vector<T> v(static_cast<std::size_t>(count));
  for (T& e : v) {
    e = kind == Values::ordinary ? ordinary<T>(g) : kind == Values::extreme ? extreme<T>(g) : not_finite<T>(g);
  }
  return v;
}

// A tensor piece: data at its elements, canaries (which are NaN) between them.
template <class T>
std::vector<T> fill(Generator& g, const Strided& piece, Values kind) {
  std::vector<T> v(static_cast<std::size_t>(piece.extent()));
  if (!v.empty()) std::memset(v.data(), guarded::kCanary, v.size() * sizeof(T));
  const std::vector<T> elements = fill<T>(g, piece.elements(), kind);
  piece.for_each([&](std::int64_t at, std::int64_t e) { v.data()[at] = elements.data()[e]; });
  return v;
}

template <class T>
Inputs<T> make_inputs(const Strided& piece, bool is_rows, Values kind, std::uint64_t seed) {
  Generator g(seed);
  Inputs<T> in{piece, is_rows, fill<T>(g, piece, kind), fill<T>(g, piece, kind), {}, {}, {}, {}, {}};
  const std::int64_t columns = in.columns();
  in.shift = fill<T>(g, columns, kind == Values::extreme ? kind : Values::ordinary);
  in.mean = fill<double>(g, columns, Values::ordinary);
  for (auto& field : in.narrow) field = fill<T>(g, columns, kind == Values::extreme ? kind : Values::ordinary);
  for (auto& field : in.wide) {
    field = fill<double>(g, columns, Values::ordinary);
    if (kind == Values::extreme) {
      for (double& k : field) k *= std::ldexp(1.0, 40 * (g.below(7) - 3));
    }
  }
  in.mask.resize(static_cast<std::size_t>((columns + 15) / 16));
  // None, all, or some of the columns; bits beyond the last column mean nothing.
  const int some = g.below(4);
  for (auto& m : in.mask) m = static_cast<std::uint16_t>(some == 0 ? 0 : some == 1 ? 0xffff : g.next());
  return in;
}

// ---- calls -----------------------------------------------------------------------------------------------------

template <class T>
struct Memory {
  guarded::Array<T> x, dy, out, shift;
  std::array<guarded::Array<T>, 5> narrow;
  std::array<guarded::Array<double>, 5> wide;
  guarded::Array<double> mean;
  guarded::Array<std::uint16_t> mask;
  std::array<guarded::Array<double>, 4> column_sums;
  guarded::Array<Sums> sums;
};
template <class T>
Memory<T>& memory() {
  static Memory<T> m;
  return m;
}

template <class T>
std::vector<T> canaries(std::size_t count) {
  return std::vector<T>(count, std::numeric_limits<T>::quiet_NaN());
}

template <class T>
std::vector<double> call_runs_sums(const Kernels<T>& k, const Inputs<T>& in, const T* dy, const T* x,
                                   bool low_is_kept) {
  guarded::Array<Sums>& memory = ::memory<T>().sums;
  constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
  Sums* sums = memory.place({Sums{kNaN, kNaN, kNaN, kNaN}}, current.place, 5);
  const Runs runs{in.piece.length, in.piece.count, in.piece.stride};
  switch (current.pass) {
    case Pass::moments:
      k.runs_moments(x, runs, sums);
      break;
    case Pass::moments_about:
      k.runs_moments_about(x, runs, in.shift[0], sums);
      break;
    case Pass::moments_compensated:
      k.runs_moments_compensated(x, runs, sums);
      break;
    default:
      k.runs_grad_sums(dy, x, runs, in.mean.data(), sums);
  }
  const Sums found = *sums;
  EXPECT(memory.untouched_outside({1, 1, 1}), described());
  if (low_is_kept) return {found.first, found.first_lo, found.second, found.second_lo};
  EXPECT(found.first_lo == 0 && found.second_lo == 0, described());
  return {found.first, found.second};
}

// Plain sums leave the low arrays alone; only the reference writes zeros there.
template <class T>
std::vector<double> call_rows_sums(const Kernels<T>& k, const Inputs<T>& in, const T* dy, const T* x,
                                   bool low_is_kept) {
  Memory<T>& m = memory<T>();
  const Rows rows{in.piece.count, in.piece.length, in.piece.stride};
  double* field[4];
  for (std::size_t f = 0; f < 4; ++f) {
    field[f] = m.column_sums[f].place(canaries<double>(in.mean.size()), current.place, 5 + f);
  }
  const kernels::ColumnSums sums{field[0], field[1], field[2], field[3]};
  switch (current.pass) {
    case Pass::moments:
      k.rows_moments(x, rows, sums);
      break;
    case Pass::moments_about:
      k.rows_moments_about(x, rows, m.shift.place(in.shift, current.place, 3), sums);
      break;
    case Pass::moments_compensated:
      k.rows_moments_compensated(x, rows, sums);
      break;
    default:
      k.rows_grad_sums(dy, x, rows, m.mean.place(in.mean, current.place, 4), sums);
  }
  std::vector<double> found;
  const bool is_reference = &k == &reference_implementation.table->of<T>();
  for (std::size_t f = 0; f < 4; ++f) {
    const bool is_low = f % 2 == 1;
    if (!is_low || low_is_kept) {
      const std::vector<double> column = m.column_sums[f].all();
      found.insert(found.end(), column.begin(), column.end());
    } else if (!is_reference) {
      EXPECT(m.column_sums[f].untouched(), "low part ", f, " of plain sums: ", described());
    }
    EXPECT(m.column_sums[f].untouched_outside({rows.columns, 1, rows.columns}), described());
  }
  return found;
}

template <class T>
Outcome<T> call_sums(const Kernels<T>& k, const Inputs<T>& in, bool low_is_kept) {
  Memory<T>& m = memory<T>();
  const T* x = m.x.place(in.x, current.place, 1);
  const T* dy = m.dy.place(current.pass == Pass::grad_sums ? in.dy : std::vector<T>{}, current.place, 2);
  m.shift.place(in.shift, current.place, 3);
  m.mean.place(in.mean, current.place, 4);
  const auto call_kernel = in.is_rows ? call_rows_sums<T> : call_runs_sums<T>;
  const Outcome<T> outcome{call_kernel(k, in, dy, x, low_is_kept), {}};
  EXPECT(m.x.untouched() && m.dy.untouched() && m.shift.untouched() && m.mean.untouched(), described());
  return outcome;
}

// Rows that may be stored around the caches: side by side, of a vector at least.
bool can_go_around_cache(const Strided& rows) {
  return rows.stride == rows.length && rows.length >= kernels::kVectorColumns;
}
template <class T>
std::vector<T> with_first_repeated(std::vector<T> columns) {
  for (std::size_t e = 0; e < kernels::kVectorColumns; ++e) columns.push_back(columns[e]);
  return columns;
}

template <class T>
Outcome<T> call_elements(const Kernels<T>& k, const Inputs<T>& in) {
  Memory<T>& m = memory<T>();
  const Place place = current.place;
  const bool has_dy = reads_dy(current.pass);
  const bool is_wide = current.pass == Pass::normalize_wide || current.pass == Pass::grad_input_wide;
  const std::vector<T> none;
  T* x = m.x.place(in.x, place, 1);
  T* dy = m.dy.place(has_dy ? in.dy : none, place, 2);
  T* out = m.out.place(current.output == Output::its_own ? canaries<T>(in.x.size()) : none, place, 3);
  if (current.output == Output::x) out = x;
  if (current.output == Output::dy) out = dy;
  const bool around = goes_around_cache(current.pass) && (!in.is_rows || can_go_around_cache(in.piece));
  const std::size_t fields = has_dy ? 5 : 3;
  const T* n[5];
  const double* w[5];
  for (std::size_t f = 0; f < fields; ++f) {
    n[f] = m.narrow[f].place(around && in.is_rows ? with_first_repeated(in.narrow[f]) : in.narrow[f], place, f + 4);
    w[f] = m.wide[f].place(in.wide[f], place, f + 5);
  }
  const std::uint16_t* mask = m.mask.place(in.mask, place, 6);
  const Runs runs{in.piece.length, in.piece.count, in.piece.stride};
  const Rows rows{in.piece.count, in.piece.length, in.piece.stride};
  const kernels::Affine<T> affine{*n[0], *n[1], *n[2]};
  const kernels::GradAffine<T> grad_affine =
      has_dy ? kernels::GradAffine<T>{*n[0], *n[1], *n[2], *n[3], *n[4]} : kernels::GradAffine<T>{};
  if (!in.is_rows && !has_dy) {
    const auto narrow = around ? k.runs_normalize_around_cache : k.runs_normalize;
    is_wide ? k.runs_normalize_wide(x, out, runs, {*w[0], *w[1], *w[2]}) : narrow(x, out, runs, &affine);
  } else if (!in.is_rows) {
    const auto narrow = around ? k.runs_grad_input_around_cache : k.runs_grad_input;
    is_wide ? k.runs_grad_input_wide(dy, x, out, runs, {*w[0], *w[1], *w[2], *w[3], *w[4]})
            : narrow(dy, x, out, runs, &grad_affine);
  } else if (!has_dy) {
    const auto narrow = around ? k.rows_normalize_around_cache : k.rows_normalize;
    is_wide ? k.rows_normalize_mixed(x, out, rows, {n[0], n[1], n[2]}, {mask, {w[0], w[1], w[2]}})
            : narrow(x, out, rows, {n[0], n[1], n[2]});
  } else {
    const auto narrow = around ? k.rows_grad_input_around_cache : k.rows_grad_input;
    is_wide ? k.rows_grad_input_mixed(dy, x, out, rows, {n[0], n[1], n[2], n[3], n[4]},
                                      {mask, {w[0], w[1], w[2], w[3], w[4]}})
            : narrow(dy, x, out, rows, {n[0], n[1], n[2], n[3], n[4]});
  }
  guarded::Array<T>& written = current.output == Output::its_own ? m.out : current.output == Output::x ? m.x : m.dy;
  Outcome<T> outcome{{}, written.elements(in.piece)};
  EXPECT(written.untouched_outside(in.piece), described());
  EXPECT(m.x.untouched() && m.dy.untouched() && m.out.untouched() && m.mask.untouched(), described());
  for (std::size_t f = 0; f < fields; ++f) EXPECT(m.narrow[f].untouched() && m.wide[f].untouched(), described());
  return outcome;
}

bool is_sums(Pass pass) { return pass <= Pass::grad_sums; }

template <class T>
Outcome<T> call(const Implementation& implementation, Pass pass, Output output, const Inputs<T>& in, Place place) {
  current = {implementation.name, sizeof(T) == sizeof(float) ? "float" : "double", pass, output, place, in.piece,
             in.is_rows};
  const Kernels<T>& k = implementation.table->of<T>();
  if (!is_sums(pass)) return call_elements(k, in);
  return call_sums(k, in, sizeof(T) == sizeof(double) || pass == Pass::moments_compensated);
}

// ---- bounds ----------------------------------------------------------------------------------------------------

// The two terms that one element adds to the sums of a pass.
template <class T>
std::array<double, 2> terms(const Inputs<T>& in, Pass pass, std::int64_t at, std::int64_t element) {
  const std::size_t column = in.column_of(element);
  const auto x = static_cast<double>(in.x.data()[at]);
  if (pass == Pass::grad_sums) {
    const auto dy = static_cast<double>(in.dy.data()[at]);
    return {dy, dy * (x - in.mean[column])};
  }
  const double d = pass == Pass::moments_about ? x - static_cast<double>(in.shift[column]) : x;
  return {d, d * d};
}

// got and reference are two sums of n terms, each term rounded on its way there (a difference and a product: at most
// 3 roundings), in any order: each differs from the exact sum by at most (n + 2)*2^-53*sum(|term|) to first order.
// Products (and the partial products of their errors) may underflow, each losing half of 2^-1074. Where a term is
// infinite or NaN, both are the same infinity or both NaN.
template <class T>
void expect_sums_near(const Inputs<T>& in, Pass pass, const Outcome<T>& got, const Outcome<T>& reference) {
  const auto columns = static_cast<std::size_t>(in.columns());
  std::vector<double> magnitude(2 * columns, 0.0);
  in.piece.for_each([&](std::int64_t at, std::int64_t e) {
    const std::array<double, 2> term = terms(in, pass, at, e);
    for (std::size_t s = 0; s < 2; ++s) magnitude[s * columns + in.column_of(e)] += std::abs(term[s]);
  });
  const auto n = static_cast<double>(in.is_rows ? in.piece.count : in.piece.elements());
  const std::size_t stride = got.sums.size() / 2;  // with or without low parts
  for (std::size_t s = 0; s < 2; ++s) {
    for (std::size_t c = 0; c < columns; ++c) {
      const double high = got.sums[s * stride + c], low = stride == columns ? 0 : got.sums[s * stride + columns + c];
      const double want = reference.sums[s * (reference.sums.size() / 2) + c];
      if (!std::isfinite(magnitude[s * columns + c])) {
        EXPECT(data::same_bits(high, want), high, " ", want, " column ", c, " ", described());
      } else {
        const double bound = 2 * (n + 3) * 0x1p-53 * magnitude[s * columns + c] + 8 * n * 0x1p-1074;
        EXPECT(std::abs(high + low - want) <= bound, high + low, " ", want, " bound ", bound, " column ", c, " ",
               described());
      }
    }
  }
}

// What an element pass computes in T is p = (x - center)*scale, maybe a second such product, and offset, added. Each
// product has two roundings and each of at most two additions one, relative to what is added: 4u*sum(|part|), to which
// the reference adds its one rounding of the result: 5u. A float32 product may lose half of 2^-149 to underflow: 2^-149
// for two of them, and as much for the reference. What is computed in float64 is the reference, bit for bit.
template <class T>
void expect_elements_near(const Inputs<T>& in, Pass pass, const Outcome<T>& got, const Outcome<T>& reference) {
  const bool may_be_wide = pass == Pass::normalize_wide || pass == Pass::grad_input_wide;
  const bool has_dy = reads_dy(pass);
  in.piece.for_each([&](std::int64_t at, std::int64_t e) {
    const T y = got.values.data()[e], want = reference.values.data()[e];
    const std::size_t c = in.column_of(e);
    if (sizeof(T) == sizeof(double) || (may_be_wide && in.is_wide(c))) {
      EXPECT(data::same_bits(y, want), y, " ", want, " column ", c, " element ", e, " ", described());
      return;
    }
    double magnitude = std::abs(static_cast<double>(in.narrow[has_dy ? 4 : 2][c]));
    bool finite = true;
    const auto add_part = [&](T value, std::size_t field) {
      finite = finite && std::isfinite(value);
      if (!std::isfinite(value)) return;
      const double d = static_cast<double>(value) - static_cast<double>(in.narrow[field][c]);
      const double product = d * static_cast<double>(in.narrow[field + 1][c]);
      magnitude += std::abs(product) + (std::abs(d) > FLT_MAX / 2 ? std::abs(d) : 0);
    };
    if (has_dy) add_part(in.dy.data()[at], 0);
    add_part(in.x.data()[at], has_dy ? 2 : 0);
    if (magnitude > FLT_MAX / 2) return;  // an intermediate result may overflow, which is what wide is for
    if (!finite) {
      EXPECT(data::same_bits(y, want), y, " ", want, " column ", c, " element ", e, " ", described());
    } else {
      const double bound = 5 * 0x1p-24 * magnitude + 2 * 0x1p-149;
      EXPECT(std::abs(static_cast<double>(y) - static_cast<double>(want)) <= bound, y, " ", want, " bound ", bound,
             " column ", c, " element ", e, " ", described());
    }
  });
}

// ---- what is tried ---------------------------------------------------------------------------------------------

std::vector<Implementation> runnable() {
  std::vector<Implementation> list{reference_implementation};
  for (const Implementation& implementation : implementations()) {
    if (machine_runs(implementation.name)) list.push_back(implementation);
  }
  return list;
}
const Implementation& generic() { return implementations().back(); }

// All implementations at all places agree: among the tables bit for bit, with the reference within the bound.
template <class T>
void expect_agreement(Pass pass, Output output, const Inputs<T>& in) {
  const Outcome<T> expected = call(generic(), pass, output, in, Place::ends_at_guard);
  const Outcome<T> reference = call(reference_implementation, pass, output, in, Place::ends_at_guard);
  if (is_sums(pass)) {
    expect_sums_near(in, pass, expected, reference);
  } else {
    expect_elements_near(in, pass, expected, reference);
  }
  for (const Implementation& implementation : runnable()) {
    const Outcome<T>& same = implementation.table == reference_implementation.table ? reference : expected;
    for (const Place place : guarded::kPlaces) {
      const Outcome<T> got = call(implementation, pass, output, in, place);
      EXPECT(data::same_bits(got.sums, same.sums) && data::same_bits(got.values, same.values), described());
    }
  }
}

// f(piece): every tail length, of one run and of several, side by side and apart.
template <class F>
void for_each_runs(F&& f) {
  for (std::int64_t length = 0; length <= 2 * kernels::kVectorColumns + 1; ++length) {
    for (const Strided& piece : {Strided{length, 1, length}, Strided{length, 1, length + 5}, Strided{length, 2, length},
                                 Strided{length, 3, length + 1}, Strided{length, 7, length + 16}}) {
      f(piece);
    }
  }
}
// f(piece): every number of columns and of rows, side by side and apart in turn.
template <class F>
void for_each_rows(F&& f) {
  for (std::int64_t columns = 1; columns <= 50; ++columns) {
    for (std::int64_t count = 1; count <= 20; ++count) f(Strided{columns, count, columns + (columns + count) % 4});
  }
}

// f(inputs) for runs with every kind of values, then for rows with one kind after the other.
template <class T, class F>
void for_each_input(F&& f) {
  std::uint64_t seed = 1;
  for_each_runs([&](const Strided& piece) {
    for (const Values kind : {Values::ordinary, Values::extreme, Values::not_finite}) {
      f(make_inputs<T>(piece, false, kind, seed++));
    }
  });
  for_each_rows([&](const Strided& piece) {
    const auto kind = static_cast<Values>(seed % 3);
    f(make_inputs<T>(piece, true, kind, seed++));
  });
}

template <class T>
bool exists(Pass pass, const Inputs<T>& in) {
  const bool is_mixed = in.is_rows && (pass == Pass::normalize_wide || pass == Pass::grad_input_wide);
  return !is_mixed || sizeof(T) == sizeof(float);
}

template <class T>
void try_sums() {
  for_each_input<T>([](const Inputs<T>& in) {
    for (const Pass pass : kSums) expect_agreement(pass, Output::its_own, in);
  });
}
template <class T>
void try_normalize() {
  for_each_input<T>([](const Inputs<T>& in) {
    for (const Pass pass : kNormalize) {
      if (!exists(pass, in)) continue;
      for (const Output output : {Output::its_own, Output::x}) expect_agreement(pass, output, in);
    }
  });
}
template <class T>
void try_grad_input() {
  for_each_input<T>([](const Inputs<T>& in) {
    for (const Pass pass : kGradInput) {
      if (!exists(pass, in)) continue;
      for (const Output output : {Output::its_own, Output::x, Output::dy}) expect_agreement(pass, output, in);
    }
  });
}

TEST(every_table_has_every_kernel) {
  for (const Implementation& implementation : runnable()) {
    const auto complete = [](const auto& k) {
      return k.runs_moments && k.rows_moments && k.runs_moments_about && k.rows_moments_about &&
             k.runs_moments_compensated && k.rows_moments_compensated && k.runs_normalize && k.runs_normalize_wide &&
             k.rows_normalize && k.runs_grad_sums && k.rows_grad_sums && k.runs_grad_input && k.runs_grad_input_wide &&
             k.rows_grad_input && k.runs_normalize_around_cache && k.rows_normalize_around_cache &&
             k.runs_grad_input_around_cache && k.rows_grad_input_around_cache && k.add_blocks;
    };
    EXPECT(complete(implementation.table->of<float>()) && complete(implementation.table->of<double>()),
           implementation.name);
    EXPECT(implementation.table->of<float>().rows_normalize_mixed &&
               implementation.table->of<float>().rows_grad_input_mixed,
           implementation.name);
  }
}

TEST(generic_is_the_last_of_the_list) { EXPECT_EQUAL(std::string(generic().name), "generic"); }

TEST(sums_of_float_agree_and_stay_inside_their_arrays) { try_sums<float>(); }
TEST(sums_of_double_agree_and_stay_inside_their_arrays) { try_sums<double>(); }
TEST(normalize_of_float_agrees_and_stays_inside_its_arrays) { try_normalize<float>(); }
TEST(normalize_of_double_agrees_and_stays_inside_its_arrays) { try_normalize<double>(); }
TEST(grad_input_of_float_agrees_and_stays_inside_its_arrays) { try_grad_input<float>(); }
TEST(grad_input_of_double_agrees_and_stays_inside_its_arrays) { try_grad_input<double>(); }

// The order of the contract, written down once more: value j of a run goes to lane j % 16, lanes live on from run to
// run, and fold as (l, l+8), (l, l+4), (l, l+2), (l, l+1).
TEST(plain_sums_of_runs_are_taken_in_the_lane_order_of_the_contract) {
  for_each_runs([](const Strided& piece) {
    const Inputs<float> in = make_inputs<float>(piece, false, Values::ordinary, 7);
    for (const Pass pass : {Pass::moments, Pass::moments_about, Pass::grad_sums}) {
      double lane[2][16] = {};
      piece.for_each([&](std::int64_t at, std::int64_t e) {
        const std::array<double, 2> term = terms(in, pass, at, e);
        for (std::size_t s = 0; s < 2; ++s) lane[s][(e % piece.length) % 16] += term[s];
      });
      for (auto& l : lane) {
        for (int half = 8; half > 0; half /= 2) {
          for (int k = 0; k < half; ++k) l[k] += l[k + half];
        }
      }
      const Outcome<float> got = call(generic(), pass, Output::its_own, in, Place::ends_at_guard);
      EXPECT(data::same_bits(got.sums, {lane[0][0], lane[1][0]}), described());
    }
  });
}

// A column has one lane and its rows come in order, which is how the reference sums.
TEST(plain_sums_of_rows_are_the_reference_bit_for_bit) {
  for_each_rows([](const Strided& piece) {
    const Inputs<float> in = make_inputs<float>(piece, true, Values::ordinary, 8);
    for (const Pass pass : {Pass::moments, Pass::moments_about, Pass::grad_sums}) {
      const Outcome<float> got = call(generic(), pass, Output::its_own, in, Place::ends_at_guard);
      const Outcome<float> want = call(reference_implementation, pass, Output::its_own, in, Place::ends_at_guard);
      EXPECT(data::same_bits(got.sums, want.sums), described());
    }
  });
}

// |error| <= 2^-53*|sum| + n^2*2^-106*sum(|term|) for a compensated sum of n terms (Ogita, Rump, Oishi 2005, prop.
// 4.5; the low part is kept apart here, so the first term is 2^-106*|sum|). Twice n^2 covers the errors of products.
template <class T>
void expect_compensated(bool is_rows) {
  const std::int64_t length = is_rows ? 3 : 203, count = is_rows ? 151 : 2;
  Inputs<T> in = make_inputs<T>({length, count, length}, is_rows, Values::ordinary, 9);
  // Large values that cancel, and small ones that remain.
  Generator g(10);
  for (std::size_t e = 0; e < in.x.size(); ++e) in.x[e] *= static_cast<T>(std::ldexp(1.0, 3 * g.below(10)));
  for (const std::int64_t c : {std::int64_t{0}, in.columns() - 1}) {
    ExactSum first, second, magnitude;
    in.piece.for_each([&](std::int64_t at, std::int64_t e) {
      if (static_cast<std::int64_t>(in.column_of(e)) != c) return;
      const auto x = static_cast<double>(in.x.data()[at]);
      const DoubleDouble square = two_product(x, x);
      first.add(x);
      magnitude.add(std::abs(x));
      second.add(square.hi);
      second.add(square.lo);
    });
    const DoubleDouble exact[2] = {first.value(), second.value()};
    const double sizes[2] = {magnitude.value().hi, exact[1].hi};
    const auto n = static_cast<double>(in.is_rows ? count : length * count);
    for (const Implementation& implementation : implementations()) {
      if (!machine_runs(implementation.name)) continue;
      const Outcome<T> got = call(implementation, Pass::moments_compensated, Output::its_own, in, Place::unaligned);
      const auto columns = static_cast<std::size_t>(in.columns());
      for (std::size_t s = 0; s < 2; ++s) {
        const double* high = got.sums.data() + 2 * s * columns + c;
        const DoubleDouble error = exact[s] - two_sum(high[0], high[columns]);
        EXPECT(std::abs(error.hi) <= 2 * n * n * 0x1p-106 * sizes[s], error.hi, " of ", exact[s].hi, " ", described());
      }
    }
  }
}
TEST(compensated_sums_keep_about_100_bits) {
  for (const bool is_rows : {false, true}) {
    expect_compensated<float>(is_rows);
    expect_compensated<double>(is_rows);
  }
}

TEST(no_values_sum_to_zero) {
  for (const Strided& piece : {Strided{0, 1, 0}, Strided{0, 5, 3}, Strided{4, 0, 4}}) {
    const Inputs<float> in = make_inputs<float>(piece, false, Values::ordinary, 11);
    for (const Pass pass : kSums) {
      for (const Implementation& implementation : runnable()) {
        const Outcome<float> got = call(implementation, pass, Output::its_own, in, Place::ends_at_guard);
        for (const double sum : got.sums) EXPECT(sum == 0, described());
      }
    }
  }
}

// Squares below 2^-969 have errors that float64 cannot hold, so fused and split products see different ones.
TEST(float64_squares_near_underflow_give_the_same_bits_on_every_table) {
  for (int exponent = -560; exponent <= -470; exponent += 3) {
    Inputs<double> in = make_inputs<double>({19, 3, 20}, false, Values::ordinary, 12);
    for (double& x : in.x) x *= std::ldexp(1.0, exponent);
    in.shift[0] = 0;
    for (const Pass pass : {Pass::moments, Pass::moments_about}) expect_agreement(pass, Output::its_own, in);
  }
}

// Channels of a piece, their runs side by side, against each of them alone.
template <class T>
struct SeveralChannels {
  std::vector<T> x, dy, out, alone;
  std::vector<double> mean;
  std::vector<kernels::Affine<T>> affine;
  std::vector<kernels::GradAffine<T>> grad_affine;
};

template <class T>
SeveralChannels<T> several_channels(Runs runs, std::uint64_t seed) {
  Generator g(seed);
  const auto size = static_cast<std::size_t>(runs.count * runs.stride);
  SeveralChannels<T> s{
      std::vector<T>(size), std::vector<T>(size), std::vector<T>(size), std::vector<T>(size), {}, {}, {}};
  for (T& e : s.x) e = ordinary<T>(g);
  for (T& e : s.dy) e = ordinary<T>(g);
  for (std::int64_t c = 0; c < runs.channels; ++c) {
    s.mean.push_back(g.value<double>());
    s.affine.push_back({g.value<T>(), g.value<T>(), g.value<T>()});
    s.grad_affine.push_back({g.value<T>(), g.value<T>(), g.value<T>(), g.value<T>(), g.value<T>()});
  }
  return s;
}

template <class T>
void expect_each_channel_as_alone(const char* isa, const Kernels<T>& k, Runs runs, SeveralChannels<T> s) {
  Sums together[2][kernels::kMostChannels];
  k.runs_moments(s.x.data(), runs, together[0]);
  k.runs_grad_sums(s.dy.data(), s.x.data(), runs, s.mean.data(), together[1]);
  const auto same = [](const Sums& a, const Sums& b) { return std::memcmp(&a, &b, sizeof a) == 0; };
  const std::string what = expect::text(isa, " ", sizeof(T) == 4 ? "float " : "double ", runs.count, " x ",
                                        runs.channels, " x ", runs.length, ", stride ", runs.stride);
  const Runs one{runs.length, runs.count, runs.stride};
  for (std::int64_t c = 0; c < runs.channels; ++c) {
    const auto at = static_cast<std::size_t>(c);
    const T *x = s.x.data() + c * runs.length, *dy = s.dy.data() + c * runs.length;
    Sums alone[2];
    k.runs_moments(x, one, &alone[0]);
    k.runs_grad_sums(dy, x, one, &s.mean[at], &alone[1]);
    EXPECT(same(alone[0], together[0][c]) && same(alone[1], together[1][c]), what, " channel ", c);
  }
  const auto expect_same_output = [&](auto apply_together, auto apply_alone, const char* name) {
    s.out.assign(s.out.size(), T(7));
    s.alone.assign(s.out.size(), T(7));
    apply_together();
    for (std::int64_t c = 0; c < runs.channels; ++c) apply_alone(c, c * runs.length);
    EXPECT(data::same_bits(s.out, s.alone), what, " ", name);
  };
  for (const auto normalize : {k.runs_normalize, k.runs_normalize_around_cache}) {
    expect_same_output([&] { normalize(s.x.data(), s.out.data(), runs, s.affine.data()); },
                       [&](std::int64_t c, std::int64_t at) {
                         normalize(s.x.data() + at, s.alone.data() + at, one, s.affine.data() + c);
                       },
                       "normalize");
  }
  for (const auto grad_input : {k.runs_grad_input, k.runs_grad_input_around_cache}) {
    expect_same_output([&] { grad_input(s.dy.data(), s.x.data(), s.out.data(), runs, s.grad_affine.data()); },
                       [&](std::int64_t c, std::int64_t at) {
                         grad_input(s.dy.data() + at, s.x.data() + at, s.alone.data() + at, one,
                                    s.grad_affine.data() + c);
                       },
                       "grad_input");
  }
}

TEST(channels_of_one_piece_get_the_bits_that_each_gets_alone) {
  std::uint64_t seed = 20;
  for (const std::int64_t channels : {1, 2, 3, 7, 32}) {
    for (std::int64_t length = 16; length <= 50; ++length) {
      for (const std::int64_t count : {1, 3}) {
        const Runs runs{length, count, channels * length + (length % 3) * 5, channels, length % 2 == 0 ? 0 : 1'000'000};
        for (const Implementation& implementation : runnable()) {
          expect_each_channel_as_alone<float>(implementation.name, implementation.table->of<float>(), runs,
                                              several_channels<float>(runs, ++seed));
          expect_each_channel_as_alone<double>(implementation.name, implementation.table->of<double>(), runs,
                                               several_channels<double>(runs, ++seed));
        }
      }
    }
  }
}

TEST(sums_of_blocks_add_up_with_the_error_of_each_addition_kept) {
  Generator g(30);
  for (const std::int64_t columns : {1, 5, 16, 17, 40}) {
    constexpr std::int64_t kBlocks = 9;
    const std::int64_t stride = 4 * columns + 3;
    std::vector<double> parts(static_cast<std::size_t>(kBlocks * stride));
    for (double& p : parts) p = ordinary<double>(g);
    const auto sums_at = [&](double* p) {
      return kernels::ColumnSums{p, p + columns, p + 2 * columns, p + 3 * columns};
    };
    for (const bool low_is_kept : {false, true}) {
      std::vector<std::vector<double>> totals;
      for (const Implementation& implementation : runnable()) {
        const bool is_reference = implementation.table == reference_implementation.table;
        if (is_reference && low_is_kept) continue;  // it keeps no low parts
        std::vector<double>& total = totals.emplace_back(static_cast<std::size_t>(4 * columns));
        const auto add_blocks =
            low_is_kept ? implementation.table->of<double>().add_blocks : implementation.table->of<float>().add_blocks;
        add_blocks(sums_at(parts.data()), kBlocks, stride, columns, sums_at(total.data()));
        EXPECT(data::same_bits(total, totals.front()), implementation.name, " ", columns, " columns");
      }
      for (std::int64_t e = 0; e < 2 * columns; ++e) {
        const std::int64_t at = e / columns * 2 * columns + e % columns;  // among first and second
        ExactSum exact;
        for (std::int64_t b = 0; b < kBlocks; ++b) {
          exact.add(parts.data()[b * stride + at]);
          if (low_is_kept) exact.add(parts.data()[b * stride + at + columns]);
        }
        const DoubleDouble error = exact.value() - two_sum(totals[0].data()[at], totals[0].data()[at + columns]);
        // Low parts are added plainly: 9 roundings of sums of at most 2^22.
        EXPECT(std::abs(error.hi) <= 2 * kBlocks * 0x1p-53 * (low_is_kept ? 0x1p22 : 0x1p-30), error.hi);
      }
    }
  }
}

// Coefficients of `count` channels or columns, one array a field.
using SecondFields = std::array<std::vector<double>, 7>;

// What second_grad writes of a piece, onto nothing (0), v (1), dy (2) or x (3).
template <class T>
std::vector<T> call_second_grad(const Implementation& implementation, const Strided& piece, std::int64_t channels,
                                const std::array<std::vector<T>, 3>& in, const SecondFields& k, int onto, Place place) {
  static std::array<guarded::Array<T>, 4> tensors;
  static std::array<guarded::Array<double>, 7> fields;
  const Kernels<T>& kernels = implementation.table->of<T>();
  T* out = tensors[0].place(std::vector<T>(in[0].size()), place, 1);
  T* from[3];
  const double* f[7];
  for (std::size_t t = 0; t < 3; ++t) from[t] = tensors[t + 1].place(in[t], place, t + 2);
  for (std::size_t e = 0; e < 7; ++e) f[e] = fields[e].place(k[e], place, e + 1);
  if (onto > 0) out = from[onto - 1];
  if (channels == 0) {
    const kernels::SecondAffineColumns columns{f[0], f[1], f[2], f[3], f[4], f[5], f[6]};
    kernels.rows_second_grad(from[0], from[1], from[2], out, {piece.count, piece.length, piece.stride}, columns);
  } else {
    std::vector<kernels::SecondAffine> each;
    for (std::size_t c = 0; c < k[0].size(); ++c) {
      each.push_back({f[0][c], f[1][c], f[2][c], f[3][c], f[4][c], f[5][c], f[6][c]});
    }
    const Runs runs{piece.length / channels, piece.count, piece.stride, channels};
    kernels.runs_second_grad(from[0], from[1], from[2], out, runs, each.data());
  }
  auto& written = tensors[static_cast<std::size_t>(onto)];
  const std::vector<T> found = written.elements(piece);
  EXPECT(written.untouched_outside(piece), implementation.name, " ", piece.length, " x ", piece.count);
  for (const auto& t : tensors) EXPECT(t.untouched(), implementation.name, " ", piece.length, " x ", piece.count);
  return found;
}

template <class T>
void expect_second_grad_of_the_reference(const Strided& piece, std::int64_t channels, std::uint64_t seed) {
  Generator g(seed);
  const Values kind = seed % 5 == 0 ? Values::extreme : Values::ordinary;
  std::array<std::vector<T>, 3> in;
  for (auto& tensor : in) tensor = fill<T>(g, piece, kind);
  SecondFields k;
  for (auto& field : k) field = fill<double>(g, channels == 0 ? piece.length : channels, Values::ordinary);
  const auto expected = call_second_grad<T>(reference_implementation, piece, channels, in, k, 0, Place::ends_at_guard);
  for (const Implementation& implementation : runnable()) {
    for (const Place place : {Place::ends_at_guard, Place::starts_at_guard, Place::unaligned}) {
      for (const int onto : {0, 1, 2, 3}) {
        EXPECT(data::same_bits(call_second_grad<T>(implementation, piece, channels, in, k, onto, place), expected),
               implementation.name, " ", piece.length, " x ", piece.count, ", channels ", channels, ", onto ", onto);
      }
    }
  }
}

// One element after the other in float64, so that there is nothing for them to differ in.
TEST(second_grad_has_the_bits_of_the_reference) {
  std::uint64_t seed = 40;
  for (std::int64_t length = 1; length <= 50; ++length) {
    for (const std::int64_t channels : {0, 1, 3}) {
      const std::int64_t wide = channels == 3 ? 3 * (length + 16) : length;  // runs side by side fill a vector
      for (const std::int64_t count : {1, 5}) {
        expect_second_grad_of_the_reference<float>({wide, count, wide + length % 3}, channels, ++seed);
        expect_second_grad_of_the_reference<double>({wide, count, wide + length % 3}, channels, ++seed);
      }
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  guarded::describe_call = described;
  guarded::report_faults();
  return expect::run_tests(argc > 1 ? argv[1] : nullptr);
}
