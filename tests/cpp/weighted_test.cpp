// The kernels with weights and the calls made of them: what has a weight of 1 is as without weights, bit for bit; what
// has none is not looked at; around the caches or through them; on every table.
#include "batchnorm/weighted.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "batchnorm/batchnorm.hpp"
#include "batchnorm/segments.hpp"
#include "data.hpp"
#include "dispatch.hpp"
#include "expect.hpp"
#include "guarded.hpp"
#include "kernels/table.hpp"
#include "machine.hpp"

namespace {

using namespace batchnorm;
using data::Generator;
using kernels::AtPadding;
using kernels::Rows;
using kernels::RowWeights;
using kernels::Runs;
using kernels::RunWeights;
using kernels::Sums;

enum class Kind { mask, weights };

// `place` values in front of it, so that lines of memory begin anywhere.
template <class T>
struct Tensor {
  std::vector<T> memory;
  std::size_t place;

  Tensor(std::int64_t size, std::size_t at) : memory(static_cast<std::size_t>(size) + at), place(at) {}
  T* data() { return memory.data() + place; }
  [[nodiscard]] const T* data() const { return memory.data() + place; }
  [[nodiscard]] bool same_bits(const Tensor& other) const {
    return std::memcmp(data(), other.data(), (memory.size() - place) * sizeof(T)) == 0;
  }
};

template <class T>
struct Data {
  std::int64_t size, positions;
  Tensor<T> x, dy, y;
  std::vector<kernels::WeightOf<T>> w;

  Data(std::int64_t n, std::int64_t of_positions, std::size_t place, Kind kind, int seed)
      : size(n),
        positions(of_positions),
        x(n, place),
        dy(n, place),
        y(n, place),
        w(static_cast<std::size_t>(of_positions)) {
    Generator g(static_cast<std::uint64_t>(seed));
    for (std::int64_t i = 0; i < n; ++i) {
      x.data()[i] = g.value<T>();
      dy.data()[i] = g.value<T>();
    }
    for (auto& weight : w) {
      const int draw = g.below(4);
      weight = static_cast<kernels::WeightOf<T>>(draw == 0 ? 0 : kind == Kind::mask ? 1 : 0.375 * draw);
    }
  }
};

template <class T>
std::vector<kernels::Affine<T>> affine(std::int64_t channels) {
  std::vector<kernels::Affine<T>> k;
  for (std::int64_t c = 0; c < channels; ++c) {
    k.push_back({T(0.25) * static_cast<T>(c % 7), T(1.5) + static_cast<T>(c % 3), T(-0.75) * static_cast<T>(c % 5)});
  }
  return k;
}
template <class T>
std::vector<kernels::GradAffine<T>> grad_affine(std::int64_t channels) {
  std::vector<kernels::GradAffine<T>> k;
  for (std::int64_t c = 0; c < channels; ++c) {
    const T t = static_cast<T>(c % 7);
    k.push_back({T(0.25) * t, T(1.5) - t, T(0.5) * t, T(0.1) * t, T(-0.75) + t});
  }
  return k;
}

// What an output must be where there is no weight.
template <class T>
T padded(AtPadding at_padding, T input, T formula) {
  return at_padding == AtPadding::zero ? T(0) : at_padding == AtPadding::input ? input : formula;
}

template <class T>
bool same(T a, T b) {
  return std::memcmp(&a, &b, sizeof a) == 0;
}

// What is written at padding, and whether kernels are told that weights are those of a mask.
constexpr struct {
  AtPadding at_padding;
  bool is_mask;
} kMaskings[] = {{AtPadding::zero, false}, {AtPadding::zero, true},     {AtPadding::input, false},
                 {AtPadding::input, true}, {AtPadding::formula, false}, {AtPadding::formula, true}};

// normalize and grad_input of runs under a mask, against the plain kernels of the same table.
template <class T>
void expect_masked_runs(const Implementation& i, const Runs& runs, std::size_t place) {
  const auto& plain = i.table->of<T>();
  const auto& k = i.table->weighted<T>();
  const std::int64_t size = runs.count * runs.stride;
  Data<T> d(size, runs.count * runs.length, place, Kind::mask, 1);
  const auto forward = affine<T>(runs.channels);
  const auto backward = grad_affine<T>(runs.channels);
  Tensor<T> y(size, place), dx(size, place), around(size, place);
  plain.runs_normalize(d.x.data(), y.data(), runs, forward.data());
  plain.runs_grad_input(d.dy.data(), d.x.data(), dx.data(), runs, backward.data());
  for (const auto& [at_padding, is_mask] : kMaskings) {
    const RunWeights<kernels::WeightOf<T>> w{d.w.data(), runs.length, is_mask};
    k.runs_normalize(d.x.data(), d.y.data(), w, at_padding, runs, forward.data());
    k.runs_normalize_around_cache(d.x.data(), around.data(), w, at_padding, runs, forward.data());
    EXPECT(d.y.same_bits(around), i.name);
    bool as_said = true;
    const auto each = [&](const auto& f) {
      for (std::int64_t at = 0; at < size; ++at) {
        const std::int64_t in_stretch = at % runs.stride, c = in_stretch / runs.length;
        if (c >= runs.channels) continue;
        const auto weight = d.w[static_cast<std::size_t>(at / runs.stride * runs.length + in_stretch % runs.length)];
        as_said &= f(at, static_cast<std::size_t>(c), weight != 0);
      }
    };
    each([&](std::int64_t at, std::size_t, bool counts) {
      const T whole = y.data()[at];
      return same(d.y.data()[at], counts ? whole : padded(at_padding, d.x.data()[at], whole));
    });
    EXPECT(as_said, i.name);
    k.runs_grad_input(d.dy.data(), d.x.data(), d.y.data(), w, at_padding, runs, backward.data());
    k.runs_grad_input_around_cache(d.dy.data(), d.x.data(), around.data(), w, at_padding, runs, backward.data());
    EXPECT(d.y.same_bits(around), i.name);
    each([&](std::int64_t at, std::size_t c, bool counts) {
      const T dy = d.dy.data()[at];
      return same(d.y.data()[at], counts ? dx.data()[at] : padded(at_padding, dy, dy * backward[c].dy_scale));
    });
    EXPECT(as_said, i.name);
  }
}

TEST(runs_under_a_mask_are_the_plain_ones_where_it_is_true) {
  for (const Implementation& i : implementations()) {
    if (!machine_runs(i.name)) continue;
    for (const std::size_t place : {0u, 1u, 13u}) {
      for (const Runs& runs :
           {Runs{17, 3, 17, 1}, Runs{49, 4, 49 * 5, 5}, Runs{256, 2, 600, 2}, Runs{2049, 1, 2049, 1}}) {
        expect_masked_runs<float>(i, runs, place);
        expect_masked_runs<double>(i, runs, place);
      }
    }
  }
}

// Sums of whatever kind, against float64 loops; the masked ones and the weighted ones of 0 and 1 have the same bits.
template <class T>
void expect_sums(const Implementation& i, const Runs& runs, Kind kind) {
  const auto& k = i.table->weighted<T>();
  const auto& reference = reference_implementation.table->weighted<T>();
  Data<T> d(runs.count * runs.stride, runs.count * runs.length, 3, kind, 2);
  const RunWeights<kernels::WeightOf<T>> w{d.w.data(), runs.length};
  const auto channels = static_cast<std::size_t>(runs.channels);
  std::vector<Sums> got(channels), expected(channels), other(channels);
  const auto near = [&](double a, double b) { return std::abs(a - b) <= 1e-10 * (std::abs(b) + 100); };
  const auto expect_near = [&] {
    for (std::size_t c = 0; c < channels; ++c) {
      EXPECT(near(got[c].first + got[c].first_lo, expected[c].first) &&
                 near(got[c].second + got[c].second_lo, expected[c].second),
             i.name);
    }
  };
  k.weighted.runs(d.x.data(), w, runs, got.data());
  reference.weighted.runs(d.x.data(), w, runs, expected.data());
  expect_near();
  if (kind == Kind::mask) {
    k.masked.runs(d.x.data(), w, runs, other.data());
    EXPECT(std::memcmp(got.data(), other.data(), channels * sizeof(Sums)) == 0, i.name);
  }
  k.weighted.runs_compensated(d.x.data(), w, runs, got.data());
  expect_near();
  std::vector<double> mean(channels, 0.3);
  k.runs_grad_sums(d.dy.data(), d.x.data(), w, runs, mean.data(), got.data());
  reference.runs_grad_sums(d.dy.data(), d.x.data(), w, runs, mean.data(), expected.data());
  expect_near();
}

TEST(weighted_sums_of_runs_are_those_of_the_definition) {
  for (const Implementation& i : implementations()) {
    if (!machine_runs(i.name)) continue;
    for (const Kind kind : {Kind::mask, Kind::weights}) {
      for (const Runs& runs : {Runs{17, 3, 17, 1}, Runs{49, 9, 49 * 5, 5}, Runs{1000, 2, 2000, 2}}) {
        expect_sums<float>(i, runs, kind);
        expect_sums<double>(i, runs, kind);
      }
      // One run and several with every remainder, shorter and longer than what is laid out for several channels.
      for (std::int64_t r = 0; r < kernels::kVectorColumns; ++r) {
        for (const Runs& runs :
             {Runs{32 + r, 3, 32 + r, 1}, Runs{32 + r, 2, 96 + 3 * r, 3}, Runs{1040 + r, 1, 2080 + 2 * r, 2}}) {
          expect_sums<float>(i, runs, kind);
          expect_sums<double>(i, runs, kind);
        }
      }
    }
  }
}

struct RowCase {
  std::int64_t count, channels, inner, repeat;
};

// All passes of rows, against the definition; the masked ones against the plain ones.
template <class T>
void expect_rows(const Implementation& i, const RowCase& r, std::size_t place) {
  using W = kernels::WeightOf<T>;
  const std::int64_t columns = r.channels * r.inner * r.repeat, size = r.count * columns;
  const Rows rows{r.count, columns, columns};
  Data<T> d(size, r.count * r.repeat * r.inner, place, Kind::mask, 3);
  const auto& plain = i.table->of<T>();
  const auto& k = i.table->weighted<T>();
  std::vector<T> fields[5];
  for (int f = 0; f < 5; ++f) {
    for (std::int64_t e = 0; e < columns + kernels::kVectorColumns; ++e) {
      fields[f].push_back(T(0.25) * static_cast<T>((e % (r.channels * r.inner) + f) % 7) - T(f));
    }
  }
  const kernels::AffineColumns<T> forward{fields[0].data(), fields[1].data(), fields[2].data()};
  const kernels::GradAffineColumns<T> backward{fields[0].data(), fields[1].data(), fields[2].data(), fields[3].data(),
                                               fields[4].data()};
  Tensor<T> y(size, place), dx(size, place), around(size, place);
  plain.rows_normalize(d.x.data(), y.data(), rows, forward);
  plain.rows_grad_input(d.dy.data(), d.x.data(), dx.data(), rows, backward);
  const bool can_go_around = r.inner == 1 && r.repeat == 1 && columns >= kernels::kVectorColumns;
  for (const auto& [at_padding, is_mask] : kMaskings) {
    const RowWeights<W> w{d.w.data(), r.channels, r.inner, r.repeat, 0, is_mask};
    bool as_said = true;
    k.rows_normalize(d.x.data(), d.y.data(), w, at_padding, rows, forward);
    const auto weight_of = [&](std::int64_t at) {
      const std::int64_t row = at / columns, e = at % columns;
      return d.w[static_cast<std::size_t>((row * r.repeat + e / (r.channels * r.inner)) * r.inner + e % r.inner)];
    };
    for (std::int64_t at = 0; at < size; ++at) {
      const T whole = y.data()[at];
      as_said &= same(d.y.data()[at], weight_of(at) != 0 ? whole : padded(at_padding, d.x.data()[at], whole));
    }
    EXPECT(as_said, i.name);
    if (can_go_around) {
      k.rows_normalize_around_cache(d.x.data(), around.data(), w, at_padding, rows, forward);
      EXPECT(d.y.same_bits(around), i.name);
    }
    k.rows_grad_input(d.dy.data(), d.x.data(), d.y.data(), w, at_padding, rows, backward);
    for (std::int64_t at = 0; at < size; ++at) {
      const T dy = d.dy.data()[at], formula = dy * fields[1][static_cast<std::size_t>(at % columns)];
      as_said &= same(d.y.data()[at], weight_of(at) != 0 ? dx.data()[at] : padded(at_padding, dy, formula));
    }
    EXPECT(as_said, i.name);
    if (can_go_around) {
      k.rows_grad_input_around_cache(d.dy.data(), d.x.data(), around.data(), w, at_padding, rows, backward);
      EXPECT(d.y.same_bits(around), i.name);
    }
  }
  const auto n = static_cast<std::size_t>(columns);
  std::vector<double> got(4 * n), expected(4 * n);
  const auto sums_in = [n](std::vector<double>& m) {
    return kernels::ColumnSums{m.data(), m.data() + n, m.data() + 2 * n, m.data() + 3 * n};
  };
  const auto expect_near = [&] {
    for (std::size_t e = 0; e < n; ++e) {
      for (const std::size_t field : {e, 2 * n + e}) {
        const double sum = got[field] + got[field + n];
        EXPECT(std::abs(sum - expected[field]) <= 1e-10 * (std::abs(expected[field]) + 100), i.name);
      }
    }
  };
  const auto& reference = reference_implementation.table->weighted<T>();
  for (const Kind kind : {Kind::mask, Kind::weights}) {
    Data<T> values(size, r.count * r.repeat * r.inner, place, kind, 4);
    const RowWeights<W> weights{values.w.data(), r.channels, r.inner, r.repeat, 0};
    std::fill(got.begin(), got.end(), 0);
    (kind == Kind::mask ? k.masked : k.weighted).rows(values.x.data(), weights, rows, sums_in(got));
    reference.weighted.rows(values.x.data(), weights, rows, sums_in(expected));
    expect_near();
    const std::vector<double> mean(n, 0.3);
    k.rows_grad_sums(values.dy.data(), values.x.data(), weights, rows, mean.data(), sums_in(got));
    reference.rows_grad_sums(values.dy.data(), values.x.data(), weights, rows, mean.data(), sums_in(expected));
    expect_near();
  }
}

TEST(rows_with_weights_are_the_plain_ones_or_those_of_the_definition) {
  for (const Implementation& i : implementations()) {
    if (!machine_runs(i.name)) continue;
    for (const std::size_t place : {0u, 5u}) {
      for (const RowCase& r : {RowCase{11, 16, 1, 1}, RowCase{11, 37, 1, 1}, RowCase{9, 300, 1, 1},
                               RowCase{13, 3, 1, 32}, RowCase{5, 63, 1, 16}, RowCase{9, 7, 9, 1}, RowCase{9, 20, 5, 1},
                               RowCase{4, 2, 3, 16}, RowCase{11, 32, 1, 2}, RowCase{9, 16, 1, 4}}) {
        expect_rows<float>(i, r, place);
        expect_rows<double>(i, r, place);
      }
    }
  }
}

// Weights that end at a page whose touch ends the program.
template <class T>
void expect_no_touch_behind_weights(const Implementation& i, const RowCase& r) {
  using W = kernels::WeightOf<T>;
  const std::int64_t columns = r.channels * r.inner * r.repeat, size = r.count * columns;
  const Rows rows{r.count, columns, columns};
  Data<T> d(size, r.count * r.repeat * r.inner, 0, Kind::mask, 5);
  static guarded::Array<W> memory;
  const W* values = memory.place(d.w, guarded::Place::ends_at_guard);
  const RowWeights<W> w{values, r.channels, r.inner, r.repeat, 0, true};
  const auto n = static_cast<std::size_t>(columns);
  std::vector<double> sums(4 * n), mean(n);
  const kernels::ColumnSums out{sums.data(), sums.data() + n, sums.data() + 2 * n, sums.data() + 3 * n};
  const std::vector<T> ones(n + kernels::kVectorColumns, T(1));
  const T* k = ones.data();
  const auto& kernels = i.table->weighted<T>();
  for (const auto* moments : {&kernels.masked, &kernels.weighted}) {
    moments->rows(d.x.data(), w, rows, out);
    moments->rows_about(d.x.data(), w, rows, k, out);
    moments->rows_compensated(d.x.data(), w, rows, out);
  }
  kernels.rows_grad_sums(d.dy.data(), d.x.data(), w, rows, mean.data(), out);
  kernels.rows_normalize(d.x.data(), d.y.data(), w, AtPadding::zero, rows, {k, k, k});
  kernels.rows_grad_input(d.dy.data(), d.x.data(), d.y.data(), w, AtPadding::input, rows, {k, k, k, k, k});
  EXPECT(memory.untouched(), i.name);
}

TEST(weights_of_rows_are_read_no_further_than_they_go) {
  for (const Implementation& i : implementations()) {
    if (!machine_runs(i.name)) continue;
    for (const std::int64_t count : {1, 2, 3, 8, 9, 21}) {
      for (const RowCase& r : {RowCase{count, 37, 1, 1}, RowCase{count, 2, 1, 32}, RowCase{count, 3, 1, 32},
                               RowCase{count, 63, 1, 16}, RowCase{count, 40, 1, 2}, RowCase{count, 7, 9, 1},
                               RowCase{count, 2, 3, 16}, RowCase{count, 5, 1, 3}, RowCase{count, 16, 1, 4}}) {
        expect_no_touch_behind_weights<float>(i, r);
        expect_no_touch_behind_weights<double>(i, r);
      }
    }
  }
}

// A tensor large enough for stores around the caches, whatever the machine: 160 MB.
void expect_large(const Problem& p) {
  const auto size = static_cast<std::size_t>(p.size()), channels = static_cast<std::size_t>(p.channels);
  std::vector<float> x(size), y(size), masked(size), weights(static_cast<std::size_t>(p.count()), 1);
  for (std::size_t at = 0; at < size; ++at)
    x[at] = static_cast<float>(static_cast<int>(at * 2654435761u >> 16)) * 1e-4f;
  std::vector<Moments> saved(channels), of_mask(channels);
  const std::vector<float> gamma(channels, 1.5f), beta(channels, 0.5f);
  batch_norm<float>(x, p, gamma, beta, 1e-5, y, saved);
  batch_norm<float>(x, p, {weights, Padding::zero}, gamma, beta, 1e-5, masked, of_mask);
  EXPECT(std::memcmp(y.data(), masked.data(), size * sizeof(float)) == 0, p.inner);
  EXPECT(std::memcmp(saved.data(), of_mask.data(), channels * sizeof(Moments)) == 0, p.inner);
  std::vector<float> dx(size), masked_dx(size), dgamma(channels), dbeta(channels);
  batch_norm_backward<float>(y, x, p, saved, gamma, 1e-5, dx, dgamma, dbeta);
  batch_norm_backward<float>(y, x, p, {weights, Padding::zero}, of_mask, gamma, 1e-5, masked_dx, dgamma, dbeta);
  EXPECT(std::memcmp(dx.data(), masked_dx.data(), size * sizeof(float)) == 0, p.inner);
}

TEST(large_tensors_under_a_mask_of_ones_are_the_plain_ones) {
  expect_large({40'000'000 / 60, 60, 1});
  expect_large({10, 40, 100'000});
}

template <class T>
void expect_halves_without_anything_counted() {
  const Problem p{2, 3, 5};
  const std::vector<T> x(30, T(7)), gamma(3, T(2)), beta = {T(1), T(-4), T(0.5)};
  const std::vector<kernels::WeightOf<T>> none(10, 0);
  std::vector<T> whole(30), half(30);
  std::vector<Moments> saved(3), moments_of(3);
  batch_norm<T>(x, p, {none, Padding::normalize}, gamma, beta, 1e-5, whole, saved);
  moments<T>(x, p, {none, Padding::normalize}, moments_of);
  normalize<T>(x, p, moments_of, gamma, beta, 1e-5, half);
  EXPECT(half == whole, "");
  for (std::size_t e = 0; e < 30; ++e) EXPECT_EQUAL(whole[e], beta[e / 5 % 3]);
}
TEST(where_nothing_counts_both_halves_and_the_whole_give_beta) {
  expect_halves_without_anything_counted<float>();
  expect_halves_without_anything_counted<double>();
}

TEST(mistakes_are_told_and_nothing_is_written) {
  const Problem p{4, 3, 5};
  std::vector<float> x(60), y(60, 9), w(20, 1);
  std::vector<Moments> saved(3);
  const auto told = [&](std::vector<float> weights, Padding padding = Padding::zero) {
    return expect::thrown_by<std::invalid_argument>(
        [&] { batch_norm<float>(x, p, {weights, padding}, {}, {}, 1e-5, y, saved); });
  };
  EXPECT_EQUAL(told({1, 2}), std::string("weights must have 20 values (one per position), got 2"));
  w[7] = -1;
  EXPECT_EQUAL(told(w), std::string("weights must be finite and >= 0 at every position, got -1 at position 7"));
  w[7] = std::numeric_limits<float>::infinity();
  EXPECT_EQUAL(told(w), std::string("weights must be finite and >= 0 at every position, got inf at position 7"));
  std::vector<float> one(20, 0);
  one[3] = 2;
  EXPECT_EQUAL(told(one),
               std::string("weights must be above 0 at 2 positions or more for batch statistics (or at none), "
                           "got 1"));
  const std::vector<float> ones(20, 1), mean(3), var(3, 1);
  EXPECT_EQUAL(expect::thrown_by<std::invalid_argument>(
                   [&] { normalize<float>(x, p, {ones, Padding::normalize}, mean, var, {}, {}, 1e-5, y); }),
               std::string("padding must be zero or keep where statistics are given, got normalize, which needs no "
                           "weights"));
  const auto of_segments = [&](std::vector<std::int64_t> offsets, std::size_t entries) {
    std::vector<Moments> out(entries);
    return expect::thrown_by<std::invalid_argument>(
        [&] { segment_batch_norm<float>(x, p, offsets, {}, {}, 1e-5, y, out); });
  };
  EXPECT_EQUAL(of_segments({0, 3}, 3),
               std::string("offsets must begin with 0 and end with 4, the outer size, got 0 and 3"));
  EXPECT_EQUAL(of_segments({}, 0), std::string("offsets must begin with 0 and end with 4, the outer size, got none"));
  EXPECT_EQUAL(of_segments({0, 3, 2, 4}, 9), std::string("offsets must never fall, got 2 after 3 at 2"));
  EXPECT_EQUAL(of_segments({0, 4}, 4), std::string("saved must have 3 values (one per segment and channel), got 4"));
  EXPECT(y == std::vector<float>(60, 9), "");
}

}  // namespace

int main(int argc, char** argv) { return expect::run_tests(argc > 1 ? argv[1] : nullptr); }
