// The kernels of lines (kernels/lines-inl.hpp): every table against the definition, and against each other bit for bit;
// inside their arrays, wherever these lie.
#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "channel_math.hpp"
#include "data.hpp"
#include "expect.hpp"
#include "guarded.hpp"
#include "kernels/table.hpp"
#include "tables.hpp"

namespace {

using namespace batchnorm;
using guarded::Array;
using guarded::Place;
using kernels::ColumnSums;
using kernels::Lines;
using kernels::Sums;
using tables::is_reference;
using tables::runnable;

constexpr std::int64_t kLanes = kernels::kVectorColumns;

const Implementation& generic() { return implementations().back(); }

enum class Onto { its_own, x, dy };
constexpr const char* kOntoNames[] = {"its own", "x", "dy"};

// What is being called, for messages.
struct Current {
  const char* isa = "";
  std::size_t item_size = 0;
  Place place = Place::ends_at_guard;
  Lines lines{};
  Onto onto = Onto::its_own;
} current;
std::string described() {
  const auto& [isa, item_size, place, l, onto] = current;
  return expect::text(isa, ", items of ", item_size, " bytes, ", guarded::name(place), ", ", l.count, " x ", l.length,
                      ", stride ", l.stride, l.around_cache ? ", around the caches" : "",
                      l.continues ? ", continuing" : "", ", onto ", kOntoNames[static_cast<int>(onto)]);
}

template <class T>
struct Inputs {
  Lines lines;
  std::vector<T> x, dy;
  std::vector<double> mean, mean_lo, rstd, rstd_lo, x_scale, shift, gamma, begun;
  std::vector<T> scale[4], factor, beta;

  void set_scale() {
    for (std::size_t l = 0; l < mean.size(); ++l) {
      if constexpr (sizeof(T) == sizeof(double)) {
        scale[0].push_back(mean[l]), scale[1].push_back(mean_lo[l]);
        scale[2].push_back(rstd[l]), scale[3].push_back(rstd_lo[l]);
      } else {
        const LineFactors f = line_factors(1, mean[l], 0, rstd[l], 1);
        scale[0].push_back(f.center), scale[1].push_back(f.rest);
        scale[2].push_back(f.rstd), scale[3].push_back(f.rstd_lo);
      }
    }
  }
};

template <class T>
Inputs<T> make_inputs(const Lines& lines, std::uint64_t seed) {
  data::Generator g(seed);
  const std::int64_t extent = (lines.count - 1) * lines.stride + lines.length;
  Inputs<T> in{lines, data::values<T>(g, extent), data::values<T>(g, extent), {}, {}, {}, {}, {}, {}, {}, {}, {}, {},
               {}};
  for (std::int64_t l = 0; l < lines.count; ++l) {
    in.mean.push_back(g.value<double>());
    in.mean_lo.push_back(in.mean.back() * 0x1p-54);
    in.rstd.push_back(0.5 + static_cast<double>(g.below(1000)) / 700);
    in.rstd_lo.push_back(in.rstd.back() * 0x1p-55);
    in.x_scale.push_back(g.value<double>() / 3);
    in.shift.push_back(g.value<double>() / 7);
  }
  in.gamma = data::values<double>(g, lines.length + kLanes);
  in.factor.assign(in.gamma.begin(), in.gamma.end());
  in.beta = data::values<T>(g, lines.length + kLanes);
  in.begun = data::values<double>(g, 4 * lines.length);
  in.set_scale();
  return in;
}

template <class T>
struct Outcome {
  std::vector<T> y, dx;
  std::vector<double> sums, columns;  // with low parts

  friend bool operator==(const Outcome& a, const Outcome& b) {
    return data::same_bits(a.y, b.y) && data::same_bits(a.dx, b.dx) && data::same_bits(a.sums, b.sums) &&
           data::same_bits(a.columns, b.columns);
  }
};

template <class T>
struct Arrays {
  Array<T> x, dy, out, scale[4], factor, beta;
  Array<double> mean, mean_lo, rstd, rstd_lo, x_scale, shift, gamma, columns;
  Array<Sums> sums;
};

template <class T>
Outcome<T> call(const Implementation& implementation, const Inputs<T>& in, Place place, Onto onto = Onto::its_own) {
  static Arrays<T> a;
  const Lines& lines = in.lines;
  current = {implementation.name, sizeof(T), place, lines, onto};
  const auto& k = implementation.table->template of<T>();
  const guarded::Strided memory{lines.length, lines.count, lines.stride};
  const auto at = [&](auto& array, const auto& values) { return array.place(values, place); };
  T* x = at(a.x, in.x);
  T* dy = at(a.dy, in.dy);
  const kernels::LineStatistics statistics{at(a.mean, in.mean), at(a.mean_lo, in.mean_lo), at(a.rstd, in.rstd),
                                           at(a.rstd_lo, in.rstd_lo)};
  const kernels::LineTermsOf terms{at(a.x_scale, in.x_scale), at(a.shift, in.shift)};
  const kernels::LineScale<T> scale{at(a.scale[0], in.scale[0]), at(a.scale[1], in.scale[1]),
                                    at(a.scale[2], in.scale[2]), at(a.scale[3], in.scale[3])};
  const double* gamma = at(a.gamma, in.gamma);
  const T *factor = at(a.factor, in.factor), *beta = at(a.beta, in.beta);
  const auto place_of = [&](Onto to) -> Array<T>& { return to == Onto::x ? a.x : to == Onto::dy ? a.dy : a.out; };
  const auto out_of = [&](Onto to) {
    return to == Onto::x ? x : to == Onto::dy ? dy : at(a.out, std::vector<T>(in.x.size(), T(-77)));
  };
  Outcome<T> outcome;

  Sums* sums = at(a.sums, std::vector<Sums>(static_cast<std::size_t>(lines.count)));
  k.lines_grad_sums(dy, x, lines, statistics, gamma, sums);
  for (std::int64_t l = 0; l < lines.count; ++l) {
    for (const double v : {sums[l].first, sums[l].first_lo, sums[l].second, sums[l].second_lo})
      outcome.sums.push_back(v);
  }
  const Onto of_y = onto == Onto::dy ? Onto::its_own : onto;
  k.lines_normalize(x, out_of(of_y), lines, scale, factor, beta);
  outcome.y = place_of(of_y).elements(memory);
  EXPECT(place_of(of_y).untouched_outside(memory), "y, ", described());

  x = at(a.x, in.x);
  double* columns = at(a.columns, in.begun);
  const std::int64_t n = lines.length;
  k.lines_grad_input(dy, x, out_of(onto), lines, statistics, terms, gamma,
                     {columns, columns + n, columns + 2 * n, columns + 3 * n});
  outcome.dx = place_of(onto).elements(memory);
  EXPECT(place_of(onto).untouched_outside(memory), "dx, ", described());
  outcome.columns.assign(columns, columns + 4 * n);
  if (sizeof(T) < sizeof(double)) {  // low parts are no one's
    std::fill_n(outcome.columns.begin() + n, n, 0.0);
    std::fill_n(outcome.columns.begin() + 3 * n, n, 0.0);
  }
  EXPECT(a.gamma.untouched() && a.factor.untouched() && a.beta.untouched() && a.mean.untouched() && a.rstd.untouched(),
         described());
  return outcome;
}

// Two computations of the same in float64: y and dx differ by what float64 rounds, 2^-50 of the sum of absolute terms,
// and then by a rounding to T; sums by a float64 rounding a term.
template <class T>
void expect_near(const Inputs<T>& in, const Outcome<T>& got, const Outcome<T>& wanted) {
  const Lines& lines = in.lines;
  const double u = sizeof(T) == sizeof(double) ? 0x1p-53 : 0x1p-24;
  const auto near = [&](double a, double b, double scale, double rounding, const char* what, std::int64_t where) {
    const double bound = 0x1p-48 * scale + rounding * std::abs(b) + 0x1p-149;
    EXPECT(std::abs(a - b) <= bound, what, " ", a, " ", b, " bound ", bound, " at ", where, " ", described());
  };
  std::vector<double> of_lines(static_cast<std::size_t>(2 * lines.count)),
      of_columns(static_cast<std::size_t>(2 * lines.length));
  for (std::int64_t l = 0; l < lines.count; ++l) {
    for (std::int64_t i = 0; i < lines.length; ++i) {
      const auto at = static_cast<std::size_t>(l * lines.stride + i);
      const auto c = static_cast<std::size_t>(i), r = static_cast<std::size_t>(l);
      const auto e = static_cast<std::size_t>(l * lines.length + i);
      const double x = std::abs(double(in.x[at])) + std::abs(in.mean[r]), dy = std::abs(double(in.dy[at]));
      const double gamma = std::abs(in.gamma[c]), rstd = in.rstd[r];
      near(got.y[e], wanted.y[e], x * rstd * gamma + std::abs(in.beta[c]), 2 * u, "y", i);
      near(got.dx[e], wanted.dx[e], dy * rstd * gamma + std::abs(in.x_scale[r]) * x + std::abs(in.shift[r]), 2 * u,
           "dx", i);
      of_lines[2 * r] += gamma * dy, of_lines[2 * r + 1] += gamma * dy * x;
      of_columns[2 * c] += dy, of_columns[2 * c + 1] += dy * rstd * x;
    }
  }
  for (std::size_t s = 0; s < of_lines.size(); ++s) {
    near(got.sums[2 * s] + got.sums[2 * s + 1], wanted.sums[2 * s] + wanted.sums[2 * s + 1], of_lines[s], 0, "sum",
         static_cast<std::int64_t>(s));
  }
  const auto n = static_cast<std::size_t>(lines.length);
  for (std::size_t c = 0; c < n; ++c) {
    for (const std::size_t k : {std::size_t{0}, std::size_t{1}}) {
      const std::size_t high = 2 * k * n + c, low = high + n;
      const double begun = in.lines.continues ? std::abs(in.begun[high]) + std::abs(in.begun[low]) : 0;
      near(got.columns[high] + got.columns[low], wanted.columns[high] + wanted.columns[low],
           of_columns[2 * c + k] + begun, 0, "column", static_cast<std::int64_t>(c));
    }
  }
}

// f(lines): every remainder of a vector, lines that are visited alone and together, side by side and apart, around the
// caches and not, begun and continued.
template <class F>
void for_each_lines(const F& f) {
  for (std::int64_t r = 0; r < 64; ++r) {
    for (const std::int64_t length : {1 + r, 100 + r, 512 + r, 1024 + 16 * (r % 4)}) {
      if (length > 200 && r % 8 > 3) continue;
      for (const std::int64_t apart : {std::int64_t{0}, std::int64_t{16}}) {
        for (const std::int64_t count : {std::int64_t{1}, std::int64_t{3}, std::int64_t{length > 1000 ? 5 : 9}}) {
          f(Lines{.count = count, .length = length, .stride = length + apart, .continues = r % 2 == 0});
        }
      }
      // Vectors that begin alike in all lines.
      const std::int64_t whole = (length + kLanes - 1) / kLanes * kLanes;
      f(Lines{.count = 5, .length = length, .stride = whole, .ahead = 64, .around_cache = true, .continues = true});
    }
  }
}

template <class T>
void expect_agreement() {
  std::uint64_t seed = 0;
  for_each_lines([&](const Lines& lines) {
    const Inputs<T> in = make_inputs<T>(lines, ++seed);
    const Outcome<T> wanted = call(reference_implementation, in, Place::ends_at_guard);
    const Outcome<T> of_tables = call(generic(), in, Place::ends_at_guard);
    expect_near(in, of_tables, wanted);
    for (const Implementation& implementation : runnable()) {
      const bool is_definition = is_reference(implementation);
      for (const Place place : guarded::kPlaces) {
        EXPECT(call(implementation, in, place) == (is_definition ? wanted : of_tables), described());
      }
      if (lines.around_cache) continue;
      for (const Onto onto : {Onto::x, Onto::dy}) {
        EXPECT(call(implementation, in, Place::ends_at_guard, onto) == (is_definition ? wanted : of_tables),
               described());
      }
    }
  });
}

TEST(lines_of_float_agree_and_stay_inside_their_arrays) { expect_agreement<float>(); }
TEST(lines_of_double_agree_and_stay_inside_their_arrays) { expect_agreement<double>(); }

// gamma times xhat is half way between two float32: beta, 2^-80 of it, says which one is nearer. A float64 does not
// hold their sum.
TEST(float_lines_round_a_product_and_a_sum_once) {
  const float half_way = 1 + 0x1p-12F;
  for (const float beta : {0x1p-80F, -0x1p-80F}) {
    Inputs<float> in = make_inputs<float>({.count = 1, .length = 40, .stride = 40}, 1);
    in.x.assign(40, half_way), in.factor.assign(40 + kLanes, half_way), in.beta.assign(40 + kLanes, beta);
    in.scale[0] = {0}, in.scale[1] = {0}, in.scale[2] = {1}, in.scale[3] = {0};
    for (const Implementation& implementation : runnable()) {
      for (const float y : call(implementation, in, Place::ends_at_guard).y) {
        EXPECT(y == 1 + 0x1p-11F + (beta > 0 ? 0x1p-23F : 0.F), implementation.name, " ", y);
      }
    }
  }
}

// Of double, whose exact value differs from that of float64 arithmetic in many roundings.
TEST(double_lines_keep_what_products_and_sums_round_off) {
  const Lines lines{.count = 1, .length = 1000, .stride = 1000};
  Inputs<double> in = make_inputs<double>(lines, 3);
  in.mean = {1e8}, in.mean_lo = {0x1p-30};
  for (auto& of : in.scale) of.clear();
  in.set_scale();
  for (double& x : in.x) x += 1e8;
  for (const Implementation& implementation : runnable()) {
    const Outcome<double> got = call(implementation, in, Place::ends_at_guard);
    for (std::size_t i = 0; i < in.x.size(); ++i) {
      const long double xhat = ((static_cast<long double>(in.x[i]) - in.mean[0]) - in.mean_lo[0]) *
                               (static_cast<long double>(in.rstd[0]) + in.rstd_lo[0]);
      const long double y = xhat * in.gamma[i] + in.beta[i];
      const long double bound = 0x1p-53L * std::abs(y) + 0x1p-62L * (std::abs(xhat * in.gamma[i]) + std::abs(y));
      EXPECT(std::abs(static_cast<long double>(got.y[i]) - y) <= bound, implementation.name, " ", got.y[i]);
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  guarded::describe_call = described;
  guarded::report_faults();
  return expect::run_tests(argc > 1 ? argv[1] : nullptr);
}
