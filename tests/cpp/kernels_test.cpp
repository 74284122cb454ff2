// The passes of the kernel contract (kernels/table.hpp), for every table that runs on this machine and the reference:
// each is called on every remainder of a vector and of a line, with each array that it is given at a page whose touch
// ends the program, and must give the bits of the generic table and those of the steps that it is made of.
#include <algorithm>
#include <array>
#include <cfloat>
#include <cmath>
#include <limits>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "exact_sum.hpp"
#include "kernel_call.hpp"

namespace {

using namespace kernel_call;
using tables::is_reference;
using tables::runnable;

constexpr std::int64_t kRemainders = 64;

const Implementation& generic() { return implementations().back(); }

// What is tried at every place. AddressSanitizer is not told of the pages and canaries around arrays, which find the
// same without it, and the generic table is compiled without: it sees one call of each other table, at each place in
// turn.
#ifdef __SANITIZE_ADDRESS__
std::vector<Implementation> sanitized() {
  std::vector<Implementation> list = runnable();
  std::erase_if(list, [](const Implementation& implementation) { return implementation.table == generic().table; });
  return list;
}
std::vector<Place> places() {
  static std::size_t calls = 0;
  return {guarded::kPlaces[calls++ % std::size(guarded::kPlaces)]};
}
#else
std::vector<Implementation> sanitized() { return runnable(); }
std::span<const Place> places() { return guarded::kPlaces; }
#endif

// ---- what a call must give ---------------------------------------------------------------------------------------

template <class To, class From>
std::vector<To> converted(const std::vector<From>& from) {
  std::vector<To> to;
  for (const From& v : from) to.push_back(static_cast<To>(v));
  return to;
}

// 16-bit tensors are computed in float32, and rounded once.
template <class T>
Outcome<T> by_float32(const Implementation& implementation, const How& how, const Inputs<T>& in) {
  const Inputs<float> wide{.piece = in.piece,
                           .lead = in.lead,
                           .x = converted<float>(in.x),
                           .dy = converted<float>(in.dy),
                           .shift = in.shift,
                           .mean = in.mean,
                           .fields = in.fields};
  const Outcome<float> outcome = call(implementation, how, wide);
  return {.sums = outcome.sums, .values = converted<T>(outcome.values)};
}

// dy of an element, as the ReLU lets it through.
template <class T>
T let_through(const Inputs<T>& in, const How& how, std::int64_t at, std::int64_t element) {
  return how.bits && !in.passes[static_cast<std::size_t>(element)] ? T(0) : in.dy.data()[at];
}

// The kernel without a tail or a ReLU, and these as loops.
template <class T>
Outcome<T> by_steps(const Implementation& implementation, const How& how, const Inputs<T>& in) {
  How plain = how;
  plain.residual = plain.relu = false;
  plain.bits = how.without_x;  // which there is with bits alone: all of them let through
  plain.output = Onto::its_own;
  plain.dresidual = Onto::nothing;
  plain.walk = RowWalk::columns;
  Inputs<T> gated = in;
  Outcome<T> wanted;
  in.memory().for_each([&](std::int64_t at, std::int64_t e) {
    gated.dy.data()[at] = let_through(in, how, at, e);
    if (how.dresidual != Onto::nothing) wanted.dresidual.push_back(gated.dy.data()[at]);
  });
  gated.passes.assign(in.passes.size(), true);
  Outcome<T> outcome = call(implementation, plain, gated);
  in.memory().for_each([&](std::int64_t at, std::int64_t e) {
    if (how.pass != Pass::normalize) return;
    T& y = outcome.values.data()[e];
    if (how.residual) y += in.third.data()[at];
    if (how.bits) wanted.bits.push_back(!(y <= 0));
    if (how.relu && y < 0) y = 0;
  });
  wanted.sums = outcome.sums;
  wanted.values = outcome.values;
  return wanted;
}

// The two terms that one element adds to the sums of a pass.
template <class T>
std::array<double, 2> terms(const Inputs<T>& in, const How& how, std::int64_t at, std::int64_t element) {
  const std::size_t c = in.piece.channel_of(element);
  const double x = in.x.data()[at], w = in.weight(how, at, element);
  if (w == 0) return {0, 0};
  if (how.pass == Pass::grad_sums) {
    const double dy = let_through(in, how, at, element);
    return {dy, dy * (x - in.mean[c])};
  }
  const double d = how.shift ? x - in.shift[c] : x;
  return {w * d, w * d * d};
}

// got and reference are two sums of n terms, each term rounded on its way there (a difference, twice, and two
// products: at most 4 roundings), in any order: each differs from the exact sum by at most (n + 3)*2^-53*sum(|term|) to
// first order. Products (and the partial products of their errors) may underflow, each losing half of 2^-1074. Where a
// term is infinite or NaN, both are the same infinity or both NaN.
template <class T>
void expect_sums_near(const Inputs<T>& in, const How& how, const Outcome<T>& got, const Outcome<T>& reference) {
  const auto channels = static_cast<std::size_t>(in.piece.channels);
  std::vector<double> magnitude(2 * channels, 0.0);
  in.memory().for_each([&](std::int64_t at, std::int64_t e) {
    const std::array<double, 2> term = terms(in, how, at, e);
    for (std::size_t s = 0; s < 2; ++s) magnitude[s * channels + in.piece.channel_of(e)] += std::abs(term[s]);
  });
  const auto n = static_cast<double>(in.piece.count * in.piece.length);
  const std::size_t stride = got.sums.size() / 2;  // with or without low parts
  for (std::size_t s = 0; s < 2; ++s) {
    for (std::size_t c = 0; c < channels; ++c) {
      const double high = got.sums[s * stride + c], low = stride == channels ? 0 : got.sums[s * stride + channels + c];
      const double want = reference.sums[s * stride + c];
      if (!std::isfinite(magnitude[s * channels + c])) {
        EXPECT(data::same_bits(high, want), high, " ", want, " channel ", c, " ", described());
      } else {
        const double bound = 2 * (n + 4) * 0x1p-53 * magnitude[s * channels + c] + 8 * n * 0x1p-1074;
        EXPECT(std::abs(high + low - want) <= bound, high + low, " ", want, " bound ", bound, " channel ", c, " ",
               described());
      }
    }
  }
}

// What an element pass computes in float32 is p = (x - w*center)*scale, maybe a second such product, times w, and
// w*offset, added. Each product has at most two roundings (of the difference or of w*center, and its own), one more
// with its weight, and each of at most two additions one, relative to what is added: 5u*sum(|part|), to which the
// reference adds its one rounding of the result: 6u; 5u without weights. A product may lose half of 2^-149 to
// underflow: 2^-149 for two of them, and as much for the reference.
template <class T>
void expect_elements_near(const Inputs<T>& in, const How& how, const Outcome<T>& got, const Outcome<T>& reference) {
  const bool has_dy = how.pass == Pass::grad_input;
  in.memory().for_each([&](std::int64_t at, std::int64_t e) {
    const T y = got.values.data()[e], want = reference.values.data()[e];
    const std::size_t c = in.piece.channel_of(e);
    const double w = in.weight(how, at, e);
    double magnitude = std::abs(w * in.fields[has_dy ? 4 : 2][c]);
    bool finite = true;
    const auto add_part = [&](double value, std::size_t field, double of_center, double of_product) {
      finite = finite && std::isfinite(value);
      if (!std::isfinite(value)) return;
      const double center = of_center * in.fields[field][c], scale = in.fields[field + 1][c];
      const double product = (value - center) * scale;
      magnitude += std::abs(of_product * product) + (how.weighs() ? std::abs(center * scale) : 0);
      for (const double step : {value - center, product}) {
        if (std::abs(step) > FLT_MAX / 2) magnitude += std::abs(step);
      }
    };
    if (has_dy) add_part(let_through(in, how, at, e), 0, w, 1);
    if (!how.without_x) add_part(in.x.data()[at], has_dy ? 2 : 0, 1, w);
    if (magnitude > FLT_MAX / 2) return;  // an intermediate result may overflow: such channels are done in float64
    const double bound = finite ? (how.weighs() ? 6 : 5) * 0x1p-24 * magnitude + 2 * 0x1p-149 : 0;
    EXPECT(finite ? std::abs(double{y} - double{want}) <= bound : data::same_bits(y, want), y, " ", want, " bound ",
           bound, " channel ", c, " element ", e, " ", described());
  });
}

// All implementations at all places agree: among the tables bit for bit, with the reference within the bound. What is
// computed in float64 is the reference, bit for bit.
template <class T>
void expect_agreement(const How& how, const Inputs<T>& in) {
  const auto wanted_of = [&](const Implementation& implementation) {
    if constexpr (kIsNarrow<T>) {
      return by_float32(implementation, how, in);
    } else {
      return by_steps(implementation, how, in);
    }
  };
  const Outcome<T> of_tables = wanted_of(generic()), of_reference = wanted_of(reference_implementation);
  if constexpr (!kIsNarrow<T>) {
    const bool is_sums = how.pass == Pass::moments || how.pass == Pass::grad_sums;
    if (is_sums) {
      expect_sums_near(in, how, of_tables, of_reference);
    } else if (sizeof(T) == sizeof(double)) {
      EXPECT(of_tables == of_reference, described());
    } else if (!how.residual && !how.relu) {
      expect_elements_near(in, how, of_tables, of_reference);
    }
  }
  for (const Implementation& implementation : sanitized()) {
    for (const Place place : places()) {
      const Outcome<T> got = call(implementation, how, in, place);
      EXPECT(got == (is_reference(implementation) ? of_reference : of_tables), described());
    }
  }
}

// ---- what is tried -----------------------------------------------------------------------------------------------

// The kernels of a type for a piece, with all that they may be given.
template <class T>
std::vector<How> ways_to_sum(const Piece& p) {
  std::vector<How> ways{{Pass::moments}, {Pass::grad_sums}};
  const bool may_be_about = p.is_rows || p.channels == 1;
  if (may_be_about) ways.push_back({.pass = Pass::moments, .shift = true});
  if (kIsNarrow<T>) return ways;
  ways.push_back({.pass = Pass::grad_sums, .bits = true});
  std::vector<Weighing> weighings{Weighing::values, Weighing::mask};
  if (p.is_rows) weighings.insert(weighings.end(), {Weighing::rows, Weighing::mask_of_rows});
  for (const Weighing weights : weighings) {
    ways.push_back({.pass = Pass::grad_sums, .weights = weights});
    ways.push_back({.pass = Pass::moments, .weights = weights});
    if (may_be_about) ways.push_back({.pass = Pass::moments, .shift = true, .weights = weights});
  }
  return ways;
}

std::vector<RowWalk> walks_of(const Piece& p) {
  std::vector<RowWalk> walks{RowWalk::columns};
  if (p.can_walk_in_line()) walks.push_back(RowWalk::in_line);
  if (p.can_walk_in_line() || !p.is_rows) walks.push_back(RowWalk::around_cache);
  return walks;
}

template <class T>
std::vector<How> ways_to_normalize(const Piece& p) {
  std::vector<How> ways;
  for (const RowWalk walk : walks_of(p)) {
    const bool may_have_weights = !kIsNarrow<T> && (p.is_rows || p.count == 1);
    for (const Onto output : {Onto::its_own, Onto::x}) {
      if (!may_have_weights || (output == Onto::x && walk == RowWalk::around_cache)) continue;
      ways.push_back({.pass = Pass::normalize, .weights = Weighing::mask, .output = output, .walk = walk});
    }
    for (const int tail : {0, 1, 2, 3, 4, 5}) {
      const How how{
          .pass = Pass::normalize, .residual = tail % 2 == 1, .relu = tail / 2 > 0, .bits = tail / 2 > 1, .walk = walk};
      if (kIsNarrow<T> && tail > 0) continue;
      for (const Onto output : {Onto::its_own, Onto::x, Onto::third}) {
        if (output == Onto::third && !how.residual) continue;
        if (output != Onto::its_own && walk == RowWalk::around_cache) continue;
        ways.push_back(how);
        ways.back().output = output;
      }
    }
  }
  return ways;
}

template <class T>
std::vector<How> ways_to_grad_input(const Piece& p) {
  std::vector<How> ways;
  const auto add = [&](How how) {
    for (const bool without_x : {false, true}) {
      for (const Onto output : {Onto::its_own, Onto::x, Onto::dy}) {
        const auto is_input = [](Onto onto) { return onto == Onto::x || onto == Onto::dy; };
        const bool needs_x = output == Onto::x || how.dresidual == Onto::x;
        if ((without_x && (needs_x || !how.bits)) || (is_input(output) && output == how.dresidual)) continue;
        if (how.walk == RowWalk::around_cache && (is_input(output) || is_input(how.dresidual))) continue;
        how.output = output;
        how.without_x = without_x;
        ways.push_back(how);
      }
    }
  };
  for (const RowWalk walk : walks_of(p)) {
    add({.pass = Pass::grad_input, .walk = walk});
    if (kIsNarrow<T>) continue;
    for (const Onto dresidual : {Onto::nothing, Onto::its_own, Onto::x, Onto::dy}) {
      add({.pass = Pass::grad_input, .bits = true, .dresidual = dresidual, .walk = walk});
    }
    if (!p.is_rows && p.count != 1) continue;
    for (const Weighing weights : {Weighing::values, Weighing::zeros}) {
      add({.pass = Pass::grad_input, .weights = weights, .walk = walk});
    }
  }
  return ways;
}

std::vector<How> ways_to_second_grad() {
  std::vector<How> ways;
  for (const Onto output : {Onto::its_own, Onto::x, Onto::dy, Onto::third}) {
    ways.push_back({.pass = Pass::second_grad, .output = output});
  }
  return ways;
}

// f(piece): every remainder of a vector and of a line, of one run and of several, apart, and of channels side by side.
template <class F>
void for_each_runs(F&& f) {
  for (std::int64_t r = 0; r < kRemainders; ++r) {
    const std::int64_t length = kLanes + r;
    for (const Piece& piece :
         {runs_of(r, 1, r), runs_of(r, 2, r), runs_of(r, 3, r + 1), runs_of(r, 7, r + 16), runs_of(64 + r, 2, 70 + r),
          runs_of(length, 5, 3 * length, 3), runs_of(length, 1, 2 * length, 2), runs_of(1000 + r, 1, 1000 + r)}) {
      f(piece);
    }
  }
}
// f(piece): every number of columns, of few rows and many, side by side and apart; and long rows.
template <class F>
void for_each_rows(F&& f) {
  for (std::int64_t columns = 1; columns <= kRemainders; ++columns) {
    for (const std::int64_t count : {1, 3, 9, 20}) {
      for (const std::int64_t apart : {0, 3}) f(rows_of(columns, count, columns + apart));
    }
    f(rows_of(512 + columns, 2, 512 + columns));
  }
}

// All pieces, each with one kind of values after the other. Weights are not tried on extreme values: what a product
// with them loses to underflow may be multiplied by a large coefficient.
template <class T, class Ways>
void try_all(Ways&& ways_of) {
  std::uint64_t seed = 0;
  const auto try_piece = [&](const Piece& piece) {
    const auto kind = static_cast<Values>(++seed % 3);
    const Inputs<T> in = make_inputs<T>(piece, kind, seed);
    for (const How& how : ways_of(piece)) {
      if (how.pass == Pass::grad_input && how.weighs() && kind == Values::extreme) continue;
      expect_agreement(how, in);
    }
  };
  for_each_runs(try_piece);
  for_each_rows(try_piece);
}

template <class F>
void for_each_type(F&& f) {
  f.template operator()<float>();
  f.template operator()<double>();
  f.template operator()<Float16>();
  f.template operator()<BFloat16>();
}

TEST(sums_agree_and_stay_inside_their_arrays) {
  for_each_type([]<class T>() { try_all<T>(ways_to_sum<T>); });
}
TEST(normalize_agrees_and_stays_inside_its_arrays) {
  for_each_type([]<class T>() { try_all<T>(ways_to_normalize<T>); });
}
TEST(grad_input_agrees_and_stays_inside_its_arrays) {
  for_each_type([]<class T>() { try_all<T>(ways_to_grad_input<T>); });
}
TEST(second_grad_agrees_and_stays_inside_its_arrays) {
  try_all<double>([](const Piece&) { return ways_to_second_grad(); });
}

TEST(every_table_has_every_kernel) {
  for (const Implementation& implementation : runnable()) {
    for_each_type([&]<class T>() {
      const Kernels<T>& k = implementation.table->of<T>();
      EXPECT(k.runs_moments && k.rows_moments && k.runs_normalize && k.rows_normalize && k.runs_grad_sums &&
                 k.rows_grad_sums && k.runs_grad_input && k.rows_grad_input && k.add_blocks,
             implementation.name, " ", sizeof(T));
      const bool has_steps = k.lines_normalize && k.lines_grad_sums && k.lines_grad_input && k.keep_bits &&
                             k.put_counted && k.repeat_weights && k.count_weights;
      EXPECT(kIsNarrow<T> ? k.widen && k.narrow : has_steps, implementation.name, " ", sizeof(T));
      EXPECT(sizeof(T) < sizeof(double) || (k.runs_second_grad && k.rows_second_grad), implementation.name);
    });
  }
}

TEST(generic_is_the_last_of_the_list) { EXPECT_EQUAL(std::string(generic().name), "generic"); }

// ---- sums --------------------------------------------------------------------------------------------------------

// The order of the contract, written down once more: value j of a run goes to lane j % 16, lanes live on from run to
// run, and fold as (l, l+8), (l, l+4), (l, l+2), (l, l+1). A column has one lane and its rows come in order.
TEST(plain_sums_are_taken_in_the_lane_order_of_the_contract) {
  const auto try_piece = [](const Piece& piece) {
    const Inputs<float> in = make_inputs<float>(piece, Values::ordinary, 7);
    for (const How& how : ways_to_sum<float>(piece)) {
      std::vector<double> sums;
      for (std::size_t s = 0; s < 2; ++s) {
        for (std::int64_t c = 0; c < piece.channels; ++c) {
          double lane[kLanes] = {};
          in.memory().for_each([&](std::int64_t at, std::int64_t e) {
            if (in.piece.channel_of(e) != static_cast<std::size_t>(c)) return;
            lane[e % piece.length % kLanes] += terms(in, how, at, e)[s];
          });
          for (std::int64_t half = kLanes / 2; half > 0; half /= 2) {
            for (std::int64_t l = 0; l < half; ++l) lane[l] += lane[l + half];
          }
          sums.push_back(lane[0]);
        }
      }
      EXPECT(data::same_bits(call(generic(), how, in).sums, sums), described());
    }
  };
  for_each_runs(try_piece);
  for (std::int64_t columns = 1; columns <= kRemainders; ++columns) try_piece(rows_of(columns, 7, columns + 1));
}

// |error| <= 2^-53*|sum| + n^2*2^-106*sum(|term|) for a compensated sum of n terms (Ogita, Rump, Oishi 2005, prop.
// 4.5; the low part is kept apart here, so the first term is 2^-106*|sum|). Twice n^2 covers the errors of products.
TEST(compensated_sums_keep_about_100_bits) {
  for (const Piece& piece : {runs_of(203, 2, 203), rows_of(3, 151, 3)}) {
    Inputs<double> in = make_inputs<double>(piece, Values::ordinary, 9);
    // Large values that cancel, and small ones that remain.
    Generator g(10);
    for (double& x : in.x) x *= std::ldexp(1.0, 3 * g.below(10));
    for (const How& how : {How{Pass::moments}, How{.pass = Pass::moments, .weights = Weighing::values}}) {
      // The terms are w*x, exactly the sum of two float64, and that times x.
      ExactSum sums[2], magnitudes[2];
      in.memory().for_each([&](std::int64_t at, std::int64_t e) {
        if (in.piece.channel_of(e) != 0) return;
        const double x = in.x.data()[at];
        const DoubleDouble factor = two_product(in.weight(how, at, e), x);
        const double of_term[2] = {1, x};
        for (std::size_t s = 0; s < 2; ++s) {
          for (const double part : {factor.hi, factor.lo}) {
            const DoubleDouble product = two_product(part, of_term[s]);
            sums[s].add(product.hi);
            sums[s].add(product.lo);
          }
          magnitudes[s].add(std::abs(factor.hi * of_term[s]));
        }
      });
      const DoubleDouble exact[2] = {sums[0].value(), sums[1].value()};
      const double sizes[2] = {magnitudes[0].value().hi, magnitudes[1].value().hi};
      const auto n = static_cast<double>(piece.count * piece.length);
      const auto channels = static_cast<std::size_t>(piece.channels);
      for (const Implementation& implementation : runnable()) {
        const Outcome<double> got = call(implementation, how, in, Place::unaligned);
        for (std::size_t s = 0; s < 2; ++s) {
          const double* high = got.sums.data() + 2 * s * channels;
          const DoubleDouble error = exact[s] - two_sum(high[0], high[channels]);
          EXPECT(std::abs(error.hi) <= 2 * n * n * 0x1p-106 * sizes[s], error.hi, " ", described());
        }
      }
    }
  }
}

TEST(no_values_sum_to_zero) {
  for (const Piece& piece : {runs_of(0, 1, 0), runs_of(0, 5, 3), runs_of(4, 0, 4)}) {
    const Inputs<float> in = make_inputs<float>(piece, Values::ordinary, 11);
    for (const How& how : ways_to_sum<float>(piece)) {
      for (const Implementation& implementation : runnable()) {
        for (const double sum : call(implementation, how, in).sums) EXPECT(sum == 0, described());
      }
    }
  }
}

// Squares below 2^-969 have errors that float64 cannot hold, so fused and split products see different ones.
TEST(float64_squares_near_underflow_give_the_same_bits_on_every_table) {
  for (int exponent = -560; exponent <= -470; exponent += 3) {
    Inputs<double> in = make_inputs<double>(runs_of(19, 3, 20), Values::ordinary, 12);
    for (double& x : in.x) x *= std::ldexp(1.0, exponent);
    in.shift[0] = 0;
    for (const How& how : ways_to_sum<double>(in.piece)) expect_agreement(how, in);
  }
}

// Whatever is where the weight is 0.
template <class T>
void expect_no_look_where_nothing_counts(const Piece& piece) {
  const Inputs<T> in = make_inputs<T>(piece, Values::ordinary, 13);
  std::vector<How> ways = ways_to_sum<T>(piece);
  for (const How& how : ways_to_normalize<T>(piece)) ways.push_back(how);
  for (const How& how : ways_to_grad_input<T>(piece)) ways.push_back(how);
  for (const How& how : ways) {
    if (!how.weighs()) continue;
    for (const T junk : {std::numeric_limits<T>::quiet_NaN(), std::numeric_limits<T>::infinity(), T(0)}) {
      Inputs<T> other = in;
      in.memory().for_each([&](std::int64_t at, std::int64_t e) {
        if (in.weight(how, at, e) != 0) return;
        other.x.data()[at] = junk;
        if (how.pass != Pass::grad_input || how.weights == Weighing::zeros) other.dy.data()[at] = junk;
      });
      for (const Implementation& implementation : runnable()) {
        const Outcome<T> wanted = call(implementation, how, in);
        EXPECT(call(implementation, how, other) == wanted, described());
      }
    }
  }
}
TEST(nothing_is_looked_at_where_the_weight_is_0) {
  for (std::int64_t r = 0; r < kRemainders; ++r) {
    for (const Piece& piece : {runs_of(r, 3, r + 2), runs_of(16 + r, 1, 16 + r, 1), rows_of(r + 1, 5, r + 1)}) {
      expect_no_look_where_nothing_counts<float>(piece);
      expect_no_look_where_nothing_counts<double>(piece);
    }
  }
}

template <class T>
void expect_ones_to_be_no_weights(const Piece& piece) {
  Inputs<T> in = make_inputs<T>(piece, Values::ordinary, 14);
  for (auto& w : in.weights) w = 1;
  std::vector<How> ways = ways_to_sum<T>(piece);
  for (const How& how : ways_to_grad_input<T>(piece)) ways.push_back(how);
  for (const How& how : ways) {
    if (!how.weighs()) continue;
    How plain = how;
    plain.weights = Weighing::none;
    for (const Implementation& implementation : runnable()) {
      const Outcome<T> wanted = call(implementation, plain, in);
      EXPECT(call(implementation, how, in) == wanted, described());
    }
  }
}
TEST(weights_of_1_give_the_bits_of_none) {
  for (std::int64_t r = 0; r < kRemainders; ++r) {
    for (const Piece& piece : {runs_of(r, 1, r), runs_of(16 + r, 1, 48 + 3 * r, 3), rows_of(r + 1, 5, r + 3)}) {
      expect_ones_to_be_no_weights<float>(piece);
      expect_ones_to_be_no_weights<double>(piece);
    }
  }
}

// One of several channels.
template <class T>
Inputs<T> channel_of(const Inputs<T>& in, std::int64_t c) {
  const Piece& p = in.piece;
  Inputs<T> one = make_inputs<T>(runs_of(p.length, p.count, p.stride), Values::ordinary, 1);
  const auto at = static_cast<std::size_t>(c);
  one.memory().for_each([&](std::int64_t to, std::int64_t e) {
    const std::int64_t from = in.lead + to - one.lead + c * p.length;
    const std::int64_t element = e / p.length * p.length * p.channels + c * p.length + e % p.length;
    one.x.data()[to] = in.x.data()[from];
    one.dy.data()[to] = in.dy.data()[from];
    one.third.data()[to] = in.third.data()[from];
    one.weights.data()[to] = in.weights.data()[from];
    one.passes[static_cast<std::size_t>(e)] = in.passes[static_cast<std::size_t>(element)];
  });
  one.shift = {in.shift[at]};
  one.mean = {in.mean[at]};
  for (std::size_t f = 0; f < one.fields.size(); ++f) one.fields[f] = {in.fields[f][at]};
  return one;
}

template <class T>
void expect_each_channel_as_alone(const Piece& piece, std::uint64_t seed) {
  const Inputs<T> in = make_inputs<T>(piece, Values::ordinary, seed);
  const auto channels = static_cast<std::size_t>(piece.channels);
  std::vector<How> ways = ways_to_sum<T>(piece);
  for (const How& how : ways_to_normalize<T>(piece)) ways.push_back(how);
  for (const How& how : ways_to_grad_input<T>(piece)) ways.push_back(how);
  for (const How& how : ways) {
    const Outcome<T> whole = call(generic(), how, in);
    for (std::size_t c = 0; c < channels; ++c) {
      Outcome<T> part;
      for (std::size_t s = c; s < whole.sums.size(); s += channels) part.sums.push_back(whole.sums[s]);
      for (std::size_t e = 0; e < in.passes.size(); ++e) {
        if (piece.channel_of(static_cast<std::int64_t>(e)) != c) continue;
        if (!whole.values.empty()) part.values.push_back(whole.values[e]);
        if (!whole.dresidual.empty()) part.dresidual.push_back(whole.dresidual[e]);
        if (!whole.bits.empty()) part.bits.push_back(whole.bits[e]);
      }
      EXPECT(call(generic(), how, channel_of(in, static_cast<std::int64_t>(c))) == part, described());
    }
  }
}
// That all tables are as the generic one is tried above. Sanitizers, without which that one is compiled, see a few.
#ifdef __SANITIZE_ADDRESS__
constexpr std::int64_t kNumbersOfChannels[] = {1, 3};
#else
constexpr std::int64_t kNumbersOfChannels[] = {1, 2, 3, 7, 32};
#endif
TEST(channels_of_one_piece_get_the_bits_that_each_gets_alone) {
  std::uint64_t seed = 20;
  for (const std::int64_t channels : kNumbersOfChannels) {
    for (std::int64_t length = 16; length <= 50; ++length) {
      for (const std::int64_t count : {1, 3}) {
        const Piece piece = runs_of(length, count, channels * length + (length % 3) * 5, channels);
        expect_each_channel_as_alone<float>(piece, ++seed);
        expect_each_channel_as_alone<double>(piece, ++seed);
      }
    }
  }
}

// ---- sums that go on ---------------------------------------------------------------------------------------------

// Four arrays of one entry a column, one behind the other.
ColumnSums sums_in(std::vector<double>& all) {
  double* p = all.data();
  const std::size_t n = all.size() / 4;
  return {p, p + n, p + 2 * n, p + 3 * n};
}

template <class T>
void expect_to_continue(const Implementation& implementation, const How& how, const Inputs<T>& in) {
  const Kernels<T>& k = implementation.table->of<T>();
  const auto columns = static_cast<std::size_t>(in.piece.channels);
  std::vector<std::uint8_t> bits(static_cast<std::size_t>(in.memory().extent() + 4), 0x5a);
  // One a row, or a value: behind one another.
  const std::int64_t each = how.weights_of_rows() ? 1 : in.piece.channels;
  std::vector<Arithmetic<T>> weights(static_cast<std::size_t>(in.piece.count * each));
  in.memory().for_each([&](std::int64_t at, std::int64_t e) {
    weights[static_cast<std::size_t>(e / in.piece.channels * each + e % each)] =
        static_cast<Arithmetic<T>>(in.weight(how, at, e));
  });
  const auto weights_from = [&](std::int64_t row) -> kernels::WeightsOf<Arithmetic<T>> {
    if (!how.weighs()) return {};
    return {weights.data() + row * each, how.masks(), each == 1 && how.weights_of_rows() ? 0 : each};
  };
  const auto add_rows = [&](std::int64_t first, std::int64_t count, bool continues, std::vector<double>& sums) {
    const std::int64_t at = in.lead + first * in.piece.stride;
    const Rows rows{.count = count, .columns = in.piece.channels, .stride = in.piece.stride, .continues = continues};
    if (how.pass == Pass::moments) {
      k.rows_moments(in.x.data() + at, weights_from(first), rows, how.shift ? in.shift.data() : nullptr, sums_in(sums));
    } else {
      const GradInputs<T> inputs{
          .dy = in.dy.data(), .x = in.x.data(), .bits = how.bits ? bits.data() : nullptr, .at = at};
      k.rows_grad_sums(inputs, weights_from(first), rows, in.mean.data(), sums_in(sums));
    }
  };
  std::vector<double> whole(4 * columns);
  add_rows(0, in.piece.count, false, whole);
  for (const std::int64_t step : {1, 2, 7, 9}) {
    std::vector<double> parts(4 * columns, std::numeric_limits<double>::quiet_NaN());
    for (std::int64_t first = 0; first < in.piece.count; first += step) {
      add_rows(first, std::min(step, in.piece.count - first), first > 0, parts);
    }
    for (std::size_t s = 0; s < 4; ++s) {
      if (s % 2 == 1 && sizeof(T) < sizeof(double)) continue;
      for (std::size_t e = s * columns; e < (s + 1) * columns; ++e) {
        EXPECT(data::same_bits(parts[e], whole[e]), implementation.name, " ", kPassNames[static_cast<int>(how.pass)],
               ", items of ", sizeof(T), " bytes, ", in.piece.count, " rows of ", columns, ", ", step, " at a time");
      }
    }
  }
}
TEST(sums_that_continue_have_the_bits_of_one_call_on_all_rows) {
  std::uint64_t seed = 60;
  for (std::int64_t columns = 1; columns <= kRemainders; ++columns) {
    for (const std::int64_t count : {1, 8, 19}) {
      for_each_type([&]<class T>() {
        const auto in = make_inputs<T>(rows_of(columns, count, columns + columns % 3), Values::ordinary, ++seed);
        for (const How& how : ways_to_sum<T>(in.piece)) {
          for (const Implementation& implementation : runnable()) expect_to_continue(implementation, how, in);
        }
      });
    }
  }
}

// The sums of blocks behind each other in memory, and their totals, at guard pages.
template <class T>
std::vector<double> added_blocks(const Implementation& implementation, const std::vector<double>& blocks,
                                 std::int64_t count, std::int64_t columns, Place place) {
  static Array<double> from[4], to[4];
  double *f[4], *t[4];
  const std::int64_t stride = columns + 3;
  for (std::size_t e = 0; e < 4; ++e) {
    const auto first = blocks.begin() + static_cast<std::ptrdiff_t>(e) * count * stride;
    f[e] = from[e].place({first, first + (count - 1) * stride + columns}, place, e + 1);
    t[e] = to[e].place(canaries<double>(columns), place, e + 2);
  }
  implementation.table->of<T>().add_blocks({f[0], f[1], f[2], f[3]}, count, stride, columns, {t[0], t[1], t[2], t[3]});
  std::vector<double> totals;
  for (std::size_t e = 0; e < 4; ++e) {
    totals.insert(totals.end(), t[e], t[e] + columns);
    EXPECT(from[e].untouched() && to[e].untouched_outside({columns, 1, 0}), implementation.name, " ", columns);
  }
  return totals;
}
template <class T>
void expect_blocks_to_add_up(std::int64_t columns) {
  constexpr std::int64_t kBlocks = 9;
  constexpr bool kHasLow = sizeof(T) == sizeof(double);
  Generator g(30);
  const std::int64_t stride = columns + 3;
  const std::vector<double> blocks = fill<double>(g, 4 * kBlocks * stride);
  const std::vector<double> totals = added_blocks<T>(generic(), blocks, kBlocks, columns, Place::ends_at_guard);
  for (const Implementation& implementation : runnable()) {
    for (const Place place : guarded::kPlaces) {
      EXPECT(data::same_bits(added_blocks<T>(implementation, blocks, kBlocks, columns, place), totals) ||
                 (kHasLow && is_reference(implementation)),  // adds low parts in another order
             implementation.name, " ", columns, " columns");
    }
  }
  for (std::int64_t s : {0, 2}) {
    for (std::int64_t c = 0; c < columns; ++c) {
      ExactSum exact;
      for (std::int64_t b = 0; b < kBlocks; ++b) {
        exact.add(blocks.data()[(s * kBlocks + b) * stride + c]);
        if (kHasLow) exact.add(blocks.data()[((s + 1) * kBlocks + b) * stride + c]);
      }
      const double* total = totals.data() + s * columns + c;
      const DoubleDouble error = exact.value() - two_sum(total[0], total[columns]);
      // Low parts are added plainly: 9 roundings of sums of at most 2^22.
      EXPECT(std::abs(error.hi) <= 2 * kBlocks * 0x1p-53 * (kHasLow ? 0x1p22 : 0x1p-30), error.hi);
    }
  }
}
TEST(sums_of_blocks_add_up_with_the_error_of_each_addition_kept) {
  for (std::int64_t columns = 1; columns <= kRemainders; ++columns) {
    for_each_type([&]<class T>() { expect_blocks_to_add_up<T>(columns); });
  }
}

// ---- tails -------------------------------------------------------------------------------------------------------

TEST(a_tail_keeps_nan_and_negative_zero) {
  const float nan = std::numeric_limits<float>::quiet_NaN(), infinity = std::numeric_limits<float>::infinity();
  const float specials[] = {-0.0f, 0.0f, nan, infinity, -infinity, 1e-45f, -1e-45f};
  const float wanted[] = {-0.0f, 0.0f, nan, infinity, 0.0f, 1e-45f, 0.0f};
  Inputs<float> in = make_inputs<float>(runs_of(37, 2, 40), Values::ordinary, 70);
  in.fields = {{{0}, {1}, {-0.0f}}};  // y = x
  in.x = spread<float>(in.memory(), [&](std::int64_t e) { return specials[e % 7]; });
  in.third = spread<float>(in.memory(), [](std::int64_t) { return -0.0f; });
  for (const Implementation& implementation : runnable()) {
    for (const bool residual : {false, true}) {
      const Outcome<float> got =
          call(implementation, {.pass = Pass::normalize, .residual = residual, .relu = true, .bits = true}, in);
      for (std::size_t e = 0; e < got.values.size(); ++e) {
        EXPECT(data::same_bits(got.values[e], wanted[e % 7]) && got.bits[e] == !(wanted[e % 7] <= 0), e, described());
      }
    }
  }
}

// Two pieces of a tensor, which share the byte of the bits where the one ends and the other begins. Each thread turns
// its own bits over and over, and finds them as it left them.
template <class T>
void expect_threads_to_share_bytes(const Implementation& implementation, bool is_rows) {
  const Kernels<T>& k = implementation.table->of<T>();
  constexpr std::int64_t kColumns = 40, kCut = 21, kRows = 3, kRepeats = 3000;
  const std::int64_t count = is_rows ? kRows : 1;
  alignas(kernels::kStreamBytes) static T y[kRows * kColumns];
  static std::uint8_t bits[kRows * kColumns / 8];
  const std::vector<T> zero(kColumns, T(0)), one(kColumns, T(1));
  std::array<bool, 2> as_left{true, true};
  const auto work = [&](std::size_t which, std::int64_t from, std::int64_t n) {
    for (int repeat = 0; repeat < kRepeats; ++repeat) {
      const std::vector<T> x(static_cast<std::size_t>((count - 1) * kColumns + n), T(repeat % 2 == 0 ? 1 : -1));
      const Tail<T> tail{nullptr, true, bits, 0, from};
      const Affine<T> same{0, 1, 0};
      if (is_rows) {
        k.rows_normalize(x.data(), y + from, tail, {count, n, kColumns}, {zero.data(), one.data(), zero.data()});
      } else {
        k.runs_normalize(x.data(), y + from, tail, {n, 1, n}, &same);
      }
      for (const std::int64_t bit : {from, from + n - 1, (count - 1) * kColumns + from}) {
        const int byte = __atomic_load_n(bits + bit / 8, __ATOMIC_RELAXED);
        as_left[which] = as_left[which] && ((byte >> (bit % 8)) & 1) == (repeat % 2 == 0);
      }
    }
  };
  std::thread other(work, 0, 0, kCut);
  work(1, kCut, kColumns - kCut);
  other.join();
  EXPECT(as_left[0] && as_left[1], implementation.name, is_rows ? " rows" : " runs", ", items of ", sizeof(T),
         " bytes");
}
TEST(pieces_at_work_at_the_same_time_may_share_a_byte_of_bits) {
  for (const Implementation& implementation : runnable()) {
    for (const bool is_rows : {false, true}) {
      expect_threads_to_share_bytes<float>(implementation, is_rows);
      expect_threads_to_share_bytes<double>(implementation, is_rows);
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  guarded::describe_call = described;
  guarded::report_faults();
  return expect::run_tests(argc > 1 ? argv[1] : nullptr);
}
