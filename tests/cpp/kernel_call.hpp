// One call of a kernel (kernels/table.hpp): pieces and their data, the arguments that a kernel may have, and what a
// table gives, with each array at a page whose touch ends the program, and everything looked at that must not change.
#pragma once

#include <array>
#include <cmath>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "data.hpp"
#include "dispatch.hpp"
#include "expect.hpp"
#include "guarded.hpp"
#include "kernels/table.hpp"
#include "tables.hpp"

namespace kernel_call {

using namespace batchnorm;
using data::Generator;
using guarded::Array;
using guarded::Place;
using guarded::Strided;
using kernels::Affine;
using kernels::ColumnSums;
using kernels::GradAffine;
using kernels::GradInputs;
using kernels::Kernels;
using kernels::Rows;
using kernels::RowWalk;
using kernels::Runs;
using kernels::SecondAffine;
using kernels::Sums;
using kernels::Tail;

constexpr std::int64_t kLanes = kernels::kVectorColumns;

template <class T>
constexpr bool kIsNarrow = sizeof(T) == 2;

// ---- calls and their words ---------------------------------------------------------------------------------------

// `count` stretches, `stride` apart, of `channels` times `length` values. The columns of rows are channels of length 1.
struct Piece {
  std::int64_t channels, length, count, stride;
  bool is_rows;

  [[nodiscard]] Strided memory(std::int64_t lead = 0) const { return {channels * length, count, stride, lead}; }
  [[nodiscard]] std::size_t channel_of(std::int64_t element) const {
    return static_cast<std::size_t>(element % (channels * length) / length);
  }
  [[nodiscard]] bool can_walk_in_line() const { return is_rows && stride == channels && channels >= kLanes; }
};
inline Piece runs_of(std::int64_t length, std::int64_t count, std::int64_t stride, std::int64_t channels = 1) {
  return {channels, length, count, stride, false};
}
inline Piece rows_of(std::int64_t columns, std::int64_t count, std::int64_t stride) {
  return {columns, 1, count, stride, true};
}

enum class Pass { moments, grad_sums, normalize, grad_input, second_grad };
constexpr const char* kPassNames[] = {"moments", "grad_sums", "normalize", "grad_input", "second_grad"};

// The array that something is written to; `third` is the residual, or v of second_grad.
enum class Onto { nothing, its_own, x, dy, third };
constexpr const char* kOntoNames[] = {"nothing", "its own", "x", "dy", "third"};

// The weights of a piece: one a value that lies like x; one a value of a run, for all channels; one a row. `mask`: all
// that are not 0 are taken to be 1. `zeros`: of what is written.
enum class Weighing { none, values, mask, rows, mask_of_rows, zeros };
constexpr const char* kWeighingNames[] = {
    "", " weights", " mask", " weights of rows", " mask of rows", " weights and zeros"};

// A kernel and the arguments that it may have or not.
struct How {
  Pass pass;
  bool shift = false;
  Weighing weights = Weighing::none;
  bool residual = false, relu = false, bits = false, without_x = false;
  Onto output = Onto::its_own, dresidual = Onto::nothing;
  RowWalk walk = RowWalk::columns;  // around_cache: of runs too

  [[nodiscard]] bool weighs() const { return weights != Weighing::none; }
  [[nodiscard]] bool weights_of_rows() const { return weights == Weighing::rows || weights == Weighing::mask_of_rows; }
  [[nodiscard]] bool masks() const { return weights == Weighing::mask || weights == Weighing::mask_of_rows; }
  [[nodiscard]] bool sums() const { return pass == Pass::moments || pass == Pass::grad_sums; }
};

// What is being called, for messages.
struct Current {
  const char* isa = "";
  std::size_t item_size = 0;
  How how{Pass::moments};
  Place place = Place::ends_at_guard;
  Piece piece{};
};
inline Current current;

inline std::string described() {
  const auto& [isa, item_size, how, place, p] = current;
  const auto flag = [](bool is_set, const char* name) { return is_set ? name : ""; };
  constexpr const char* kWalks[] = {"", " in line", " around cache"};
  return expect::text(isa, " ", p.is_rows ? "rows_" : "runs_", kPassNames[static_cast<int>(how.pass)], ", items of ",
                      item_size, " bytes", kWalks[static_cast<int>(how.walk)], flag(how.shift, " shift"),
                      kWeighingNames[static_cast<int>(how.weights)], flag(how.residual, " residual"),
                      flag(how.relu, " relu"), flag(how.bits, " bits"), flag(how.without_x, " without x"), ", onto ",
                      kOntoNames[static_cast<int>(how.output)], ", dresidual onto ",
                      kOntoNames[static_cast<int>(how.dresidual)], ", ", guarded::name(place), ", ", p.count, " x ",
                      p.channels, " x ", p.length, ", stride ", p.stride);
}

// ---- data --------------------------------------------------------------------------------------------------------

enum class Values { ordinary, extreme, not_finite };

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
T value(Generator& g, Values kind) {
  if constexpr (kIsNarrow<T>) {
    return static_cast<T>(value<float>(g, kind));
  } else {
    return kind == Values::ordinary ? ordinary<T>(g) : kind == Values::extreme ? extreme<T>(g) : not_finite<T>(g);
  }
}
template <class T>
std::vector<T> fill(Generator& g, std::int64_t count, Values kind = Values::ordinary) {
  std::vector<T> v(static_cast<std::size_t>(count));
  for (T& e : v) e = value<T>(g, kind);
  return v;
}
template <class T>
std::vector<T> canaries(std::int64_t count) {
  std::vector<T> v(static_cast<std::size_t>(count));
  if (!v.empty()) std::memset(v.data(), guarded::kCanary, v.size() * sizeof(T));
  return v;
}
// f(element) at the elements of a piece, canaries (which are NaN) between them.
template <class T, class F>
std::vector<T> spread(const Strided& memory, F&& f) {
  std::vector<T> v = canaries<T>(memory.extent());
  memory.for_each([&](std::int64_t at, std::int64_t e) { v.data()[at] = f(e); });
  return v;
}
template <class W>
W weight(Generator& g) {
  constexpr W kWeights[] = {0, 1, W(0.375), 2, W(0.1)};
  return kWeights[g.below(5)];
}

// A piece with its data and coefficients.
template <class T>
struct Inputs {
  using A = Arithmetic<T>;
  Piece piece;
  std::int64_t lead = 0, first_bit = 0, ahead = 0;
  std::vector<T> x{}, dy{}, third{};  // behind `lead` canaries
  std::vector<A> weights{};           // where x is; the same for all channels of runs
  std::vector<bool> passes{};         // through the ReLU: the elements
  std::vector<A> shift{};
  std::vector<double> mean{};
  std::array<std::vector<A>, 7> fields{};  // of the coefficients

  [[nodiscard]] Strided memory() const { return piece.memory(lead); }
  // Of an element, which is at `at`; that of a row is its first.
  [[nodiscard]] double weight(const How& how, std::int64_t at, std::int64_t element) const {
    if (how.weights == Weighing::none) return 1;
    if (how.weights_of_rows()) at = lead + element / piece.channels * piece.stride;
    const double w = weights[static_cast<std::size_t>(at)];
    return how.masks() && w != 0 ? 1 : w;
  }
};

template <class T>
Inputs<T> make_inputs(const Piece& piece, Values kind, std::uint64_t seed) {
  using A = Arithmetic<T>;
  Generator g(seed);
  Inputs<T> in{.piece = piece,
               .lead = g.below(4) == 0 ? 64 : 0,  // a line of memory, so that tensors lie alike
               .first_bit = g.below(8),
               .ahead = g.below(2) * 1'000'000};
  const auto tensor = [&] { return spread<T>(in.memory(), [&](std::int64_t) { return value<T>(g, kind); }); };
  in.x = tensor();
  in.dy = tensor();
  in.third = tensor();
  in.weights = spread<A>(in.memory(), [&](std::int64_t) { return weight<A>(g); });
  in.memory().for_each([&](std::int64_t at, std::int64_t e) {
    if (!piece.is_rows)
      in.weights.data()[at] = in.weights.data()[at - e % (piece.channels * piece.length) / piece.length * piece.length];
  });
  for (std::int64_t e = 0; e < in.memory().elements(); ++e) in.passes.push_back(g.below(2) == 0);
  const Values of_channels = kind == Values::extreme ? kind : Values::ordinary;
  in.shift = fill<A>(g, piece.channels, of_channels);
  in.mean = fill<double>(g, piece.channels);
  for (auto& field : in.fields) field = fill<A>(g, piece.channels, of_channels);
  return in;
}

// ---- one call ----------------------------------------------------------------------------------------------------

template <class T>
struct Outcome {
  std::vector<double> sums;  // first, first_lo, second, second_lo of all channels; without low parts where none is kept
  std::vector<T> values{}, dresidual{};
  std::vector<bool> bits{};

  bool operator==(const Outcome& other) const {
    return data::same_bits(sums, other.sums) && data::same_bits(values, other.values) &&
           data::same_bits(dresidual, other.dresidual) && bits == other.bits;
  }
};

template <class T>
struct Memory {
  using A = Arithmetic<T>;
  Array<T> x, dy, third, out, dresidual;
  Array<A> weights, shift;
  std::array<Array<A>, 7> fields;
  Array<double> mean;
  std::array<Array<double>, 4> column_sums;
  Array<Sums> sums;
  Array<Affine<A>> affine;
  Array<GradAffine<A>> grad_affine;
  Array<SecondAffine> second_affine;
  Array<std::uint8_t> bits;

  Array<T>& array(Onto onto) { return onto == Onto::x ? x : onto == Onto::dy ? dy : onto == Onto::third ? third : out; }
  [[nodiscard]] bool untouched() const {
    for (const auto& field : fields) {
      if (!field.untouched()) return false;
    }
    return x.untouched() && dy.untouched() && third.untouched() && out.untouched() && dresidual.untouched() &&
           weights.untouched() && shift.untouched() && mean.untouched() && affine.untouched() &&
           grad_affine.untouched() && second_affine.untouched() && bits.untouched();
  }
};

template <class T>
class Call {
 public:
  using A = Arithmetic<T>;

  Call(const Implementation& implementation, const How& the_how, const Inputs<T>& inputs, Place the_place)
      : k(implementation.table->of<T>()),
        is_definition(tables::is_reference(implementation)),
        how(the_how),
        in(inputs),
        place(the_place) {
    current = {implementation.name, sizeof(T), how, place, in.piece};
  }

  Outcome<T> run() {
    place_tensors();
    if (how.sums()) {
      in.piece.is_rows ? sum_rows() : sum_runs();
    } else {
      place_coefficients();
      how.pass == Pass::normalize ? normalize() : how.pass == Pass::grad_input ? grad_input() : second_grad();
      outcome.values = taken_from(m.array(how.output));
    }
    EXPECT(m.untouched(), described());
    return outcome;
  }

 private:
  void place_tensors() {
    const std::vector<T> none, blank = canaries<T>(in.memory().extent());
    x = m.x.place(how.without_x ? none : in.x, place, 1);
    dy = m.dy.place(how.pass == Pass::moments || how.pass == Pass::normalize ? none : in.dy, place, 2);
    third = m.third.place(how.residual || how.pass == Pass::second_grad ? in.third : none, place, 3);
    out = m.out.place(how.output == Onto::its_own ? blank : none, place, 5);
    dresidual = m.dresidual.place(how.dresidual == Onto::its_own ? blank : none, place, 5);
    if (how.weighs()) place_weights();
  }
  // Those of sums lie side by side.
  void place_weights() {
    const Piece& p = in.piece;
    if (!how.sums() && p.is_rows) {
      weights = m.weights.place(in.weights, place, 4) + in.lead;
      return;
    }
    const std::int64_t width = p.channels * p.length, each = how.weights_of_rows() ? 1 : p.is_rows ? width : p.length;
    std::vector<A> all(static_cast<std::size_t>(p.count * each));
    in.memory().for_each([&](std::int64_t at, std::int64_t e) {
      all[static_cast<std::size_t>(e / width * each + e % width % each)] = static_cast<A>(in.weight(how, at, e));
    });
    for (std::size_t l = 0; !how.sums() && p.channels > 1 && l < kLanes; ++l) all.push_back(all[l]);
    weights = m.weights.place(all, place, 4);
  }
  [[nodiscard]] kernels::WeightsOf<A> weights_of() const {
    return {weights, how.masks(), in.piece.is_rows && !how.weights_of_rows() ? in.piece.channels : 0};
  }
  // Those in line are repeated behind the last.
  void place_coefficients() {
    for (std::size_t e = 0; e < f.size(); ++e) {
      std::vector<A> field = in.fields[e];
      for (std::size_t l = 0; how.walk != RowWalk::columns && in.piece.is_rows && l < kLanes; ++l) {
        field.push_back(field[l]);
      }
      f[e] = m.fields[e].place(field, place, e + 1);
    }
  }
  // One a channel, of the fields from the first on.
  template <class Coefficients, std::size_t... kField>
  const Coefficients* coefficients(Array<Coefficients>& array, std::index_sequence<kField...>) {
    std::vector<Coefficients> each;
    for (std::size_t c = 0; c < in.mean.size(); ++c) each.push_back({in.fields[kField][c]...});
    return array.place(each, place, 1);
  }
  // What was written to an array, which has what was there before again.
  std::vector<T> taken_from(Array<T>& array) {
    std::vector<T> values = array.elements(in.memory());
    EXPECT(array.untouched_outside(in.memory()), described());
    return values;
  }
  T* output() {
    T* array = how.output == Onto::x ? x : how.output == Onto::dy ? dy : how.output == Onto::third ? third : out;
    return array + in.lead;
  }

  [[nodiscard]] Runs runs() const {
    const Piece& p = in.piece;
    return {p.length, p.count, p.stride, p.channels, in.ahead, how.walk == RowWalk::around_cache};
  }
  [[nodiscard]] Rows rows() const {
    const Piece& p = in.piece;
    return {p.count, p.channels, p.stride, in.ahead, how.walk};
  }

  // ---- sums ----

  void sum_runs() {
    constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
    Sums* sums = m.sums.place(std::vector<Sums>(in.mean.size(), Sums{kNaN, kNaN, kNaN, kNaN}), place, 5);
    if (how.pass == Pass::moments) {
      k.runs_moments(x + in.lead, weights_of(), runs(), shift(), sums);
    } else {
      k.runs_grad_sums(grad_inputs(), weights_of(), runs(), m.mean.place(in.mean, place, 4), sums);
    }
    for (double Sums::* field : {&Sums::first, &Sums::first_lo, &Sums::second, &Sums::second_lo}) {
      const bool is_low = field == &Sums::first_lo || field == &Sums::second_lo;
      for (std::size_t c = 0; c < in.mean.size(); ++c) {
        if (!is_low || kKeepsLow) {
          outcome.sums.push_back(sums[c].*field);
        } else {
          EXPECT(sums[c].*field == 0, described());
        }
      }
    }
    EXPECT(m.sums.untouched_outside({in.piece.channels, 1, 0}), described());
  }
  // Plain sums leave the low arrays alone; only the reference writes zeros there.
  void sum_rows() {
    double* field[4];
    for (std::size_t e = 0; e < 4; ++e) {
      field[e] = m.column_sums[e].place(canaries<double>(in.piece.channels), place, 5 + e);
    }
    const ColumnSums sums{field[0], field[1], field[2], field[3]};
    if (how.pass == Pass::moments) {
      k.rows_moments(x + in.lead, weights_of(), rows(), shift(), sums);
    } else {
      k.rows_grad_sums(grad_inputs(), weights_of(), rows(), m.mean.place(in.mean, place, 4), sums);
    }
    for (std::size_t e = 0; e < 4; ++e) {
      const std::vector<double> column = m.column_sums[e].all();
      if (e % 2 == 0 || kKeepsLow) {
        outcome.sums.insert(outcome.sums.end(), column.begin(), column.end());
      } else if (!is_definition) {
        EXPECT(m.column_sums[e].untouched(), "low part ", e, " of plain sums: ", described());
      }
      EXPECT(m.column_sums[e].untouched_outside({in.piece.channels, 1, 0}), described());
    }
  }
  const A* shift() { return how.shift ? m.shift.place(in.shift, place, 3) : nullptr; }

  // ---- elements ----

  // So that bits of the lines of p are whole bytes; `lead` is some lines.
  static std::int64_t bit_of_lines(const T* p) {
    const auto past_line = static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(p) % kernels::kStreamBytes);
    return past_line / static_cast<std::int64_t>(sizeof(T)) % 8;
  }
  void normalize() {
    T* y = output();
    const bool in_lines = !in.piece.is_rows || how.walk != RowWalk::columns;
    const std::int64_t first_bit = in_lines ? bit_of_lines(y) : in.first_bit;
    const std::vector<std::uint8_t> before(static_cast<std::size_t>((first_bit + in.memory().extent() + 7) / 8), 0x5a);
    std::uint8_t* bits = how.bits ? m.bits.place(before, place) : nullptr;
    const Tail<T> tail{how.residual ? third : nullptr, how.relu, bits, first_bit, in.lead, weights};
    if (in.piece.is_rows) {
      k.rows_normalize(x + in.lead, y, tail, rows(), {f[0], f[1], f[2]});
    } else {
      k.runs_normalize(x + in.lead, y, tail, runs(), coefficients(m.affine, std::make_index_sequence<3>()));
    }
    if (how.bits) take_bits(bits, first_bit, before);
  }
  // Bits that are not of the piece are as before.
  void take_bits(std::uint8_t* bits, std::int64_t first_bit, const std::vector<std::uint8_t>& before) {
    in.memory().for_each([&](std::int64_t at, std::int64_t) {
      const auto bit = static_cast<std::size_t>(first_bit + at);
      const auto which = static_cast<std::uint8_t>(1u << (bit % 8));
      std::uint8_t& byte = bits[bit / 8];
      outcome.bits.push_back((byte & which) != 0);
      byte = static_cast<std::uint8_t>((byte & ~which) | (before[bit / 8] & which));
    });
  }

  // Up to 4 bytes behind a bit may be read.
  GradInputs<T> grad_inputs() {
    const std::uint8_t* bits = nullptr;
    if (how.bits) {
      std::vector<std::uint8_t> all(static_cast<std::size_t>((in.first_bit + in.memory().extent() + 7) / 8 + 4));
      in.memory().for_each([&](std::int64_t at, std::int64_t e) {
        const auto bit = static_cast<std::size_t>(in.first_bit + at);
        if (in.passes[static_cast<std::size_t>(e)]) all[bit / 8] |= static_cast<std::uint8_t>(1u << (bit % 8));
      });
      bits = m.bits.place(all, place);
    }
    return {dy, how.without_x ? nullptr : x, bits, in.first_bit, nullptr, true, in.lead};
  }
  void grad_input() {
    GradInputs<T> inputs = grad_inputs();
    const bool has_own = how.dresidual == Onto::its_own;
    if (how.dresidual != Onto::nothing) inputs.dresidual = has_own ? dresidual : how.dresidual == Onto::x ? x : dy;
    const kernels::WeightsAlong<A> along{weights, how.weights == Weighing::zeros};
    if (in.piece.is_rows) {
      k.rows_grad_input(inputs, along, output(), rows(), {f[0], f[1], f[2], f[3], f[4]});
    } else {
      k.runs_grad_input(inputs, along, output(), runs(), coefficients(m.grad_affine, std::make_index_sequence<5>()));
    }
    if (how.dresidual != Onto::nothing) outcome.dresidual = taken_from(has_own ? m.dresidual : m.array(how.dresidual));
  }
  void second_grad() {
    if constexpr (std::is_same_v<T, double>) {
      const T *v = third + in.lead, *of_dy = dy + in.lead, *of_x = x + in.lead;
      if (in.piece.is_rows) {
        k.rows_second_grad(v, of_dy, of_x, output(), rows(), {f[0], f[1], f[2], f[3], f[4], f[5], f[6]});
      } else {
        k.runs_second_grad(v, of_dy, of_x, output(), runs(),
                           coefficients(m.second_affine, std::make_index_sequence<7>()));
      }
    }
  }

  static Memory<T>& memory() {
    static Memory<T> all;
    return all;
  }
  static constexpr bool kKeepsLow = sizeof(T) == sizeof(double);

  Memory<T>& m = memory();
  const Kernels<T>& k;
  bool is_definition;
  const How& how;
  const Inputs<T>& in;
  Place place;
  T *x = nullptr, *dy = nullptr, *third = nullptr, *out = nullptr, *dresidual = nullptr;
  const A* weights = nullptr;
  std::array<const A*, 7> f{};
  Outcome<T> outcome;
};

template <class T>
Outcome<T> call(const Implementation& implementation, const How& how, const Inputs<T>& in,
                Place place = Place::ends_at_guard) {
  return Call<T>(implementation, how, in, place).run();
}

}  // namespace kernel_call
