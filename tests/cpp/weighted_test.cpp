// Calls with weights: under a mask of ones large tensors are the plain ones; where nothing counts; mistakes.
#include <cstring>
#include <limits>
#include <vector>

#include "batchnorm/batchnorm.hpp"
#include "expect.hpp"

namespace {

using namespace batchnorm;

// A tensor large enough for stores around the caches, whatever the machine: 160 MB.
void expect_large(const Problem& p) {
  const auto size = static_cast<std::size_t>(p.size()), channels = static_cast<std::size_t>(p.channels);
  std::vector<float> x(size), y(size), masked(size), weights(static_cast<std::size_t>(p.count()), 1);
  for (std::size_t at = 0; at < size; ++at)
    x[at] = static_cast<float>(static_cast<int>(at * 2654435761u >> 16)) * 1e-4f;
  std::vector<Moments> saved(channels), of_mask(channels);
  const std::vector<float> gamma(channels, 1.5f), beta(channels, 0.5f);
  batch_norm<float>(x, p, gamma, beta, 1e-5, y, saved);
  const Call<float> call{.problem = p, .counted = {weights, Padding::zero}, .gamma = gamma, .beta = beta};
  batch_norm<float>(x, call, masked, of_mask);
  EXPECT(std::memcmp(y.data(), masked.data(), size * sizeof(float)) == 0, p.inner);
  EXPECT(std::memcmp(saved.data(), of_mask.data(), channels * sizeof(Moments)) == 0, p.inner);
  std::vector<float> dx(size), masked_dx(size), dgamma(channels), dbeta(channels);
  batch_norm_backward<float>(y, x, p, saved, gamma, 1e-5, dx, dgamma, dbeta);
  batch_norm_backward<float>(y, x, call, of_mask, {.dx = masked_dx, .dgamma = dgamma, .dbeta = dbeta});
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
  const std::vector<T> none(10, 0);
  std::vector<T> whole(30), half(30);
  std::vector<Moments> saved(3), moments_of(3);
  const Call<T> call{.problem = p, .counted = {none, Padding::normalize}, .gamma = gamma, .beta = beta};
  batch_norm<T>(x, call, whole, saved);
  moments<T>(x, call, moments_of);
  normalize<T>(x, p, moments_of, gamma, beta, 1e-5, half);
  EXPECT(half == whole, "");
  normalize<T>(x, call, std::span<const Moments>(moments_of), half);
  EXPECT(half == whole, "with the weights");
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
  const auto told = [&](const std::vector<float>& weights) {
    return expect::thrown_by<std::invalid_argument>(
        [&] { batch_norm<float>(x, {.problem = p, .counted = {weights, Padding::zero}}, y, saved); });
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
  EXPECT_THROWS(std::invalid_argument,
                "padding must be zero or keep where statistics are given, got normalize, which needs no weights",
                normalize<float>(x, {.problem = p, .counted = {ones, Padding::normalize}}, mean, var, y));
  const auto by_segments = [&](std::vector<std::int64_t> offsets, std::size_t entries) {
    std::vector<Moments> out(entries);
    return expect::thrown_by<std::invalid_argument>(
        [&] { batch_norm<float>(x, {.problem = p, .groups = {offsets}}, y, out); });
  };
  EXPECT_EQUAL(by_segments({0, 3}, 3),
               std::string("offsets must begin with 0 and end with 4, the outer size, got 0 and 3"));
  EXPECT_EQUAL(by_segments({0, 3, 2, 4}, 9), std::string("offsets must never fall, got 2 after 3 at 2"));
  EXPECT_EQUAL(by_segments({0, 4}, 4), std::string("saved must have 3 values (one per segment and channel), got 4"));
  const std::vector<std::int64_t> offsets{0, 1, 4};
  EXPECT_THROWS(std::invalid_argument, "offsets must be empty where mean and var are given, got 3",
                normalize<float>(x, {.problem = p, .groups = {offsets}}, mean, var, y));
  EXPECT_THROWS(
      std::invalid_argument, "offsets must be empty where mean and var are given, got 3",
      normalize_backward<float>(x, x, {.problem = p, .groups = {offsets}}, mean, var, Gradients<float>{.dx = y}));
  EXPECT(y == std::vector<float>(60, 9), "");
}

TEST(gradients_of_gradients_refuse_what_they_would_ignore) {
  const Problem p{4, 3, 5};
  std::vector<float> x(60), ddy(60, 9), w(20, 1);
  std::vector<Moments> saved(3, Moments{20, 0, 0, 1, 0});
  const std::vector<float> mean(3), var(3, 1);
  const std::vector<std::int64_t> offsets{0, 4};
  const auto told = [&](const Call<float>& call) {
    const std::string by_moments = expect::thrown_by<std::invalid_argument>(
        [&] { batch_norm_double_backward<float>(x, x, x, call, saved, {}, {}, ddy, {}, {}); });
    EXPECT_THROWS(std::invalid_argument, by_moments,
                  normalize_double_backward<float>(x, x, x, call, mean, var, {}, {}, ddy, {}, {}));
    return by_moments;
  };
  EXPECT_EQUAL(told({.problem = p, .groups = {offsets}}),
               std::string("offsets must be empty for gradients of gradients, got 2"));
  EXPECT_EQUAL(told({.problem = p, .counted = {.weights = w}}),
               std::string("weights must be empty for gradients of gradients, got 20"));
  EXPECT_EQUAL(told({.problem = p, .tail = {.relu = true}}),
               std::string("relu must be false for gradients of gradients, got true"));
  EXPECT(ddy == std::vector<float>(60, 9), "");
}

TEST(what_no_enumeration_names_is_refused) {
  const std::vector<float> x(8);
  std::vector<float> y(8, -77);
  std::vector<Moments> saved(2);
  Call<float> about{.problem = {4, 2, 1}}, padding = about;
  about.groups.about = static_cast<About>(7);
  padding.counted.padding = static_cast<Padding>(-1);
  EXPECT_THROWS(std::invalid_argument, "about must be mean or zero, got 7", batch_norm<float>(x, about, y, saved));
  EXPECT_THROWS(std::invalid_argument, "padding must be zero, keep or normalize, got -1",
                batch_norm<float>(x, padding, y, saved));
  EXPECT(y == std::vector<float>(8, -77), y[0]);
}

TEST(strided_channels_of_a_position_are_refused) {
  const std::vector<float> x(8);
  std::vector<float> y(8, -77);
  std::vector<Moments> saved(4);
  Call<float> call{.problem = {4, 2, 1}};
  call.groups.width = 2, call.groups.each_position = true, call.groups.strided = true;
  EXPECT_THROWS(std::invalid_argument, "strided must be false beside each_position, got true",
                batch_norm<float>(x, call, y, saved));
  EXPECT(y == std::vector<float>(8, -77), y[0]);
}

}  // namespace

int main(int argc, char** argv) { return expect::run_tests(argc > 1 ? argv[1] : nullptr); }
