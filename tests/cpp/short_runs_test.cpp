// Short runs (short_runs.hpp): channels of one run each. They are rows that were turned, whatever their tile, and the
// formulas that take many channels at once give each what it gets alone.
#include "short_runs.hpp"

#include <cmath>
#include <string>
#include <vector>

#include "all_passes.hpp"
#include "expect.hpp"
#include "gradient_math.hpp"
#include "guarded.hpp"
#include "plan.hpp"
#include "tables.hpp"

namespace {

using namespace batchnorm;
using all_passes::Batch;
using all_passes::Kind;
using guarded::Place;

std::string text(const Problem& p) { return expect::text("{", p.outer, ", ", p.channels, ", ", p.inner, "}"); }

// to[j*rows + i] = from[i*columns + j]
template <class V>
std::vector<V> turned(const std::vector<V>& from, std::int64_t rows, std::int64_t columns) {
  std::vector<V> to(from.size());
  for (std::int64_t i = 0; i < rows; ++i) {
    for (std::int64_t j = 0; j < columns; ++j) to.data()[j * rows + i] = from.data()[i * columns + j];
  }
  return to;
}

// The same batch with each run as a column: as many of them as do not stand side by side.
template <class T>
Batch<T> as_rows(const Batch<T>& runs) {
  const Problem& p = runs.problem;
  Batch<T> rows = runs;
  rows.problem = {p.inner, p.channels, 1};
  rows.x = turned(runs.x, p.channels, p.inner);
  rows.dy = turned(runs.dy, p.channels, p.inner);
  return rows;
}
// What tensors hold, as runs.
template <class T>
void turn_tensors(all_passes::Results<T>& r, const Problem& p) {
  for (std::vector<T>* tensor :
       {&r.y, &r.y_from_moments, &r.y_given, &r.dx, &r.dx_from_sums, &r.dx_frozen, &r.y_dot, &r.y_dot_frozen}) {
    *tensor = turned(*tensor, p.inner, p.channels);
  }
}

template <class T>
void expect_runs_to_be_rows(const Problem& p, Kind kind) {
  const Batch<T> runs = all_passes::make_batch<T>(p, kind);
  for (const int threads : {1, 3}) {
    auto found = all_passes::run(runs, {.threads = threads}, 1e-5);
    auto expected = all_passes::run(as_rows(runs), {.threads = 1}, 1e-5);
    turn_tensors(expected, p);
    const auto told = [&](const char* what) {
      return expect::text(what, " of ", text(p), ", ", all_passes::kKindNames[static_cast<int>(kind)], ", items of ",
                          sizeof(T), " bytes, threads ", threads);
    };
    using all_passes::bits_of;
    EXPECT(bits_of(found.moments, found.saved) == bits_of(expected.moments, expected.saved), told("moments"));
    EXPECT(bits_of(found.y, found.y_from_moments, found.y_given) ==
               bits_of(expected.y, expected.y_from_moments, expected.y_given),
           told("y"));
    EXPECT(bits_of(found.sums, found.dgamma, found.dbeta) == bits_of(expected.sums, expected.dgamma, expected.dbeta),
           told("sums"));
    EXPECT(bits_of(found.dx, found.dx_from_sums, found.dx_frozen) ==
               bits_of(expected.dx, expected.dx_from_sums, expected.dx_frozen),
           told("dx"));
    EXPECT(bits_of(found.y_dot) == bits_of(expected.y_dot), told("y_dot"));
  }
}

template <class F>
void for_each_type(F&& f) {
  f.template operator()<float>();
  f.template operator()<double>();
  f.template operator()<Float16>();
  f.template operator()<BFloat16>();
}

TEST(short_runs_have_the_bits_of_rows_that_are_turned) {
  for (const Kind kind : all_passes::kKinds) {
    for (const Problem& p : {Problem{1, 300, 4}, {1, 70, 31}, {1, 530, 2}, {1, 257, 9}, {1, 130, 16}}) {
      EXPECT(has_short_runs(p), text(p));
      for_each_type([&]<class T>() { expect_runs_to_be_rows<T>(p, kind); });
    }
  }
}

// As segments, which one thread works on each, they are small; together, by several threads, they are not.
TEST(small_problems_have_the_bits_of_passes_over_rows) {
  for (const Problem& p : {Problem{200, 64, 1}, {65, 256, 1}, {64, 100, 1}, {3, 129, 1}}) {
    for (const Kind kind : all_passes::kKinds) {
      for_each_type([&]<class T>() {
        const Batch<T> b = all_passes::make_batch<T>(p, kind);
        const auto alone = all_passes::run(b, {.threads = 1}, 1e-5, all_passes::Order::first);
        // Those that are turned are never small, and are no other rows where none stand side by side.
        const PassCall<T> as_rows{
            .problem = p, .gamma = b.gamma, .beta = b.beta, .eps = 1e-5, .options = {.threads = 1, .is_turned = true}};
        std::vector<T> y(b.x.size()), dx(b.x.size());
        std::vector<Moments> saved(b.gamma.size());
        std::vector<double> dgamma(b.gamma.size()), dbeta(b.gamma.size());
        Forward<T>{as_rows}.batch_norm(b.x.data(), y.data(), saved.data());
        Backward<T>{as_rows}.batch_norm(b.dy.data(), b.x.data(), saved.data(),
                                        {.dx = dx.data(), .dgamma = std::span(dgamma), .dbeta = std::span(dbeta)});
        using all_passes::bits_of;
        EXPECT(
            bits_of(alone.saved, alone.y, alone.dx, alone.dgamma, alone.dbeta) == bits_of(saved, y, dx, dgamma, dbeta),
            text(p), " ", all_passes::kKindNames[static_cast<int>(kind)], ", items of ", sizeof(T), " bytes");
        EXPECT(bits_of(alone.moments) == bits_of(saved), text(p));
      });
    }
  }
}

TEST(the_bits_of_a_run_do_not_depend_on_its_neighbours) {
  const Problem many{1, 700, 7};
  const Batch<float> all = all_passes::make_batch<float>(many, Kind::huge_mean);
  const auto whole = all_passes::run(all, {.threads = 2}, 1e-5, all_passes::Order::first);
  for (const std::int64_t first : {0, 255, 256, 698}) {
    const Problem two{1, 2, many.inner};
    std::vector<Moments> alone(2);
    const auto* begin = all.x.data() + first * many.inner;
    moments<float>(std::vector<float>(begin, begin + two.size()), two, alone);
    for (std::int64_t c = 0; c < 2; ++c) {
      EXPECT(all_passes::bits_of(std::vector{alone.data()[c]}) ==
                 all_passes::bits_of(std::vector{whole.moments.data()[first + c]}),
             "run ", first + c);
    }
  }
}

TEST(gamma_and_beta_of_fewer_channels_repeat) {
  constexpr std::int64_t kPeriod = 150;
  const Batch<float> b = all_passes::make_batch<float>({1, 3 * kPeriod, 5}, Kind::ordinary);
  const auto run = [&](const std::vector<double>& gamma, const std::vector<double>& beta) {
    std::vector<float> y(b.x.size());
    std::vector<Moments> saved(b.gamma.size());
    const PassCall<float> call{
        .problem = b.problem, .gamma = gamma, .beta = beta, .eps = 1e-5, .options = {.threads = 2}};
    run_short_batch_norm(b.x.data(), call, y.data(), saved.data());
    std::vector<float> dx(b.x.size());
    run_short_backward(b.dy.data(), b.x.data(), call, saved.data(), {.dx = dx.data()});
    return all_passes::bits_of(y, saved, dx);
  };
  const auto times = [](const std::vector<double>& v, std::int64_t count) {
    std::vector<double> repeated;
    for (std::int64_t k = 0; k < count; ++k) repeated.insert(repeated.end(), v.begin(), v.begin() + kPeriod);
    return repeated;
  };
  EXPECT(run(times(b.gamma, 1), times(b.beta, 1)) == run(times(b.gamma, 3), times(b.beta, 3)));
}

// ---- the formulas of the kernels -------------------------------------------------------------------------------

struct Channels {
  std::vector<double> first, second, gamma, beta, low;
};
// Every fifth is not as usual, if wanted: a mean far above its std.
Channels channels(std::int64_t n, bool usual, double count = 8) {
  data::Generator g(static_cast<std::uint64_t>(n));
  Channels c;
  for (std::int64_t i = 0; i < n; ++i) {
    const double mean = !usual && i % 5 == 4 ? 1e6 : 1 + g.value<double>();
    c.first.push_back(count * mean);
    c.second.push_back(count * (mean * mean + 1) + 8 + g.value<double>());
    c.gamma.push_back(g.value<double>());
    c.beta.push_back(g.value<double>());
    c.low.push_back(g.value<double>() * 0x1p-60);
  }
  return c;
}
kernels::ColumnSums columns(std::vector<double>& first, std::vector<double>& second, std::vector<double>& low) {
  return {first.data(), low.data(), second.data(), low.data()};
}

constexpr double kEps = 1e-5;

// Quotients are those of a division, whatever is counted.
void expect_formulas_of_one_channel(const Implementation& implementation, std::int64_t n, double count) {
  const kernels::Formulas& formulas = implementation.table->formulas;
  Channels in = channels(n, true, count);
  const auto size = static_cast<std::size_t>(n);
  std::vector<Moments> found(size), expected(size);
  std::vector<float> k[8];
  for (auto& field : k) field.resize(size);
  std::vector<double> dgamma(size), dbeta(size);
  EXPECT(formulas.moments(columns(in.first, in.second, in.low), n, count, found.data()), implementation.name, " ", n);
  EXPECT(formulas.normalize(found.data(), n, kEps, in.gamma.data(), in.beta.data(),
                            {k[0].data(), k[1].data(), k[2].data()}),
         implementation.name, " ", n);
  EXPECT(formulas.grad_input(found.data(), columns(in.beta, in.gamma, in.low), n, kEps, in.gamma.data(),
                             {k[3].data(), k[4].data(), k[5].data(), k[6].data(), k[7].data()}, dgamma.data(),
                             dbeta.data()),
         implementation.name, " ", n);
  for (std::size_t c = 0; c < size; ++c) {
    const auto m = moments_from_sums<float, double>({count, 0}, 0, {in.first[c], in.low[c]}, {in.second[c], in.low[c]});
    m.put(&expected[c]);
    const auto rstd = rstd_for<float>(m, kEps);
    const auto affine = quick_coefficients(m.mean, m.mean_lo, rstd.hi, in.gamma[c], in.beta[c]).narrow;
    const GradSumsOf<double> sums{{in.beta[c], in.low[c]}, {in.gamma[c], in.low[c]}};
    const auto grad = backward_coefficients<float, double>(m, m.count, sums, rstd, in.gamma[c]).narrow;
    const double alone[] = {affine.center, affine.scale,  affine.offset, grad.dy_center,
                            grad.dy_scale, grad.x_center, grad.x_scale,  grad.offset};
    for (std::size_t f = 0; f < 8; ++f) {
      EXPECT(data::same_bits(k[f][c], static_cast<float>(alone[f])), implementation.name, " field ", f, " of ", c,
             " of ", n);
    }
    EXPECT(data::same_bits(dgamma[c], dgamma_of<float>(m, sums, rstd)), implementation.name, " ", c, " of ", n);
    EXPECT(data::same_bits(dbeta[c], dbeta_of(sums)), implementation.name, " ", c, " of ", n);
  }
  EXPECT(all_passes::bits_of(found) == all_passes::bits_of(expected), implementation.name, " ", n);
}
TEST(formulas_for_many_channels_give_each_the_bits_it_gets_alone) {
  for (const Implementation& implementation : tables::runnable()) {
    if (tables::is_reference(implementation)) continue;
    for (std::int64_t n = 1; n <= 21; ++n) expect_formulas_of_one_channel(implementation, n, 8);
    for (double count = 2; count < 0x1p31; count = 3 * count + 1) {
      expect_formulas_of_one_channel(implementation, 199, count);
    }
  }
}
TEST(channels_that_do_not_count_the_same_integer_are_told) {
  for (const Implementation& implementation : tables::runnable()) {
    Channels in = channels(21, true);
    std::vector<double> dgamma(21), dbeta(21);
    std::vector<float> k[5];
    for (auto& field : k) field.resize(21);
    const auto are_usual = [&](double first, double others) {
      std::vector<Moments> m(21, {others, 1, 0, 8, 0});
      m[0].count = first;
      const kernels::Formulas& formulas = implementation.table->formulas;
      const double* gamma = in.gamma.data();
      const bool forward =
          formulas.normalize(m.data(), 21, kEps, gamma, in.beta.data(), {k[0].data(), k[1].data(), k[2].data()});
      const bool backward = formulas.grad_input(m.data(), columns(in.beta, in.gamma, in.low), 21, kEps, gamma,
                                                {k[0].data(), k[1].data(), k[2].data(), k[3].data(), k[4].data()},
                                                dgamma.data(), dbeta.data());
      EXPECT(forward == backward, implementation.name, " ", first, " ", others);
      return forward;
    };
    EXPECT(are_usual(8, 8) != tables::is_reference(implementation), implementation.name);
    for (const double count : {0.0, 0.5, 7.5, 0x1p31, 0x1p60, HUGE_VAL}) {
      EXPECT(!are_usual(count, count), implementation.name, " ", count);
    }
    EXPECT(!are_usual(8, 9), implementation.name);
  }
}

TEST(a_channel_that_is_not_as_usual_is_told) {
  for (const Implementation& implementation : tables::runnable()) {
    for (std::int64_t n = 5; n <= 13; ++n) {
      Channels in = channels(n, false);
      std::vector<Moments> out(static_cast<std::size_t>(n));
      EXPECT(!implementation.table->formulas.moments(columns(in.first, in.second, in.low), n, 8, out.data()),
             implementation.name, " ", n);
    }
  }
}

guarded::Array<double>& array(int number) {
  static guarded::Array<double> arrays[7];
  return arrays[number];
}
TEST(formulas_touch_no_byte_outside_of_their_arrays) {
  static guarded::Array<Moments> moments;
  static guarded::Array<float> fields[5];
  for (const Implementation& implementation : tables::runnable()) {
    const kernels::Formulas& formulas = implementation.table->formulas;
    for (std::int64_t n = 1; n <= 21; ++n) {
      for (const Place place : {Place::ends_at_guard, Place::starts_at_guard}) {
        const Channels in = channels(n, true);
        const auto size = static_cast<std::size_t>(n);
        double* first = array(0).place(in.first, place);
        double* second = array(1).place(in.second, place);
        double* low = array(6).place(in.low, place);
        const kernels::ColumnSums sums{first, low, second, low};
        Moments* m = moments.place(std::vector<Moments>(size, {8, 1, 0, 8, 0}), place);
        float* k[5];
        for (int f = 0; f < 5; ++f) k[f] = fields[f].place(std::vector<float>(size), place);
        const double* gamma = array(2).place(in.gamma, place);
        const double* beta = array(3).place(in.beta, place);
        double* dgamma = array(4).place(in.gamma, place);
        double* dbeta = array(5).place(in.gamma, place);
        formulas.normalize(m, n, kEps, gamma, beta, {k[0], k[1], k[2]});
        formulas.grad_input(m, sums, n, kEps, gamma, {k[0], k[1], k[2], k[3], k[4]}, dgamma, dbeta);
        formulas.moments(sums, n, 8, m);
        const guarded::Strided all{n, 1, n};
        bool untouched =
            moments.untouched_outside(all) && array(4).untouched_outside(all) && array(5).untouched_outside(all);
        for (int a = 0; a < 4; ++a) untouched = untouched && array(a).untouched();
        for (auto& field : fields) untouched = untouched && field.untouched_outside(all);
        EXPECT(untouched, implementation.name, " ", n, ", ", guarded::name(place));
      }
    }
  }
}

// ---- memory ----------------------------------------------------------------------------------------------------

// The most that any pass over a tile may need.
template <class A>
std::size_t needed(const Problem& tile) {
  std::size_t bytes = 0;
  const PassCall<A> asks{.problem = tile, .options = {.threads = 1, .is_turned = true, .needed = &bytes}};
  Forward<A>{asks}.batch_norm(nullptr, nullptr, nullptr);
  Backward<A>{asks}.batch_norm(nullptr, nullptr, nullptr, {.dx = reinterpret_cast<A*>(64)});
  return bytes;
}
TEST(what_a_tile_needs_is_on_the_stack) {
  for (std::int64_t length = 2; has_short_runs({1, 1000, length}); ++length) {
    const Problem p{1, 1000, length};
    EXPECT(runs_of_tile(p, 4) * length * 4 <= kTurnedBytes && runs_of_tile(p, 8) * length * 8 <= kTurnedBytes, length);
    EXPECT(needed<float>({length, runs_of_tile(p, 4), 1}) <= kTileWorkBytes, length);
    EXPECT(needed<double>({length, runs_of_tile(p, 8), 1}) <= kTileWorkBytes, length);
  }
}

}  // namespace

int main(int argc, char** argv) {
  guarded::describe_call = [] { return std::string("a formula"); };
  guarded::report_faults();
  return expect::run_tests(argc > 1 ? argv[1] : nullptr);
}
