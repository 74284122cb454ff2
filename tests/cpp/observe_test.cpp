// Observations of a stream: what moments they leave, what y they give, mistakes.
#include <cmath>
#include <limits>
#include <vector>

#include "batchnorm/batchnorm.hpp"
#include "expect.hpp"

namespace {

using namespace batchnorm;

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

std::vector<double> observation(int step, double offset) {
  std::vector<double> x(5);
  for (std::size_t c = 0; c < 5; ++c) x[c] = offset + std::sin(1.7 * step + static_cast<double>(c * c));
  return x;
}

bool same(const Moments& a, const Moments& b) {
  return a.count == b.count && a.mean == b.mean && a.mean_lo == b.mean_lo && a.m2 == b.m2 && a.m2_lo == b.m2_lo;
}

TEST(a_stream_leaves_the_moments_of_its_table) {
  for (const double offset : {0.0, 1e8}) {
    std::vector<double> rows;
    std::vector<Moments> stream(5), table(5);
    for (int step = 0; step < 300; ++step) {
      const std::vector<double> x = observation(step, offset);
      rows.insert(rows.end(), x.begin(), x.end());
      observe<double>(x, stream, {}, {});
    }
    moments<double>(rows, Call<double>{.problem = {300, 5, 1}}, table);
    for (std::size_t c = 0; c < 5; ++c) {
      EXPECT_EQUAL(stream[c].count, 300.0);
      EXPECT_EQUAL(stream[c].mean, table[c].mean, offset);
      EXPECT_EQUAL(stream[c].m2, table[c].m2, offset);
    }
  }
}

TEST(a_constant_has_a_variance_of_0_and_a_y_of_0) {
  std::vector<Moments> known(1);
  const std::vector<float> x = {0.1f};
  std::vector<float> y(1);
  for (int step = 0; step < 50; ++step) observe<float>(x, known, {}, y, {.keep = 0.9});
  EXPECT_EQUAL(known[0].m2, 0.0);
  EXPECT_EQUAL(y[0], 0.0f);
}

TEST(y_is_what_normalize_gives_by_the_line_and_may_be_x) {
  std::vector<Moments> known(5), line(5);
  for (int step = 0; step < 20; ++step) observe<double>(observation(step, 3), known, {}, {});
  const Observing how{.eps = 1e-3, .clip = 0.75, .learn = false};
  std::vector<double> x = observation(7, 3), wanted(5);
  standardizing(known, how, line);
  normalize<double>(x, Call<double>{.problem = {1, 5, 1}, .eps = 0}, line, wanted);
  observe<double>(x, known, {}, x, how);
  for (std::size_t c = 0; c < 5; ++c) {
    const double clipped = std::min(std::max(wanted[c], -0.75), 0.75);
    EXPECT_EQUAL(x[c], clipped);
  }
}

TEST(a_missing_value_changes_nothing_of_its_channel) {
  std::vector<Moments> known = {{4, 2, 0, 8, 0}, {4, 2, 0, 8, 0}};
  std::vector<double> dof = {3, 3}, y(2);
  observe<double>(std::vector<double>{kNaN, 7}, known, dof, y, {.keep = 0.5, .missing = -1});
  EXPECT(same(known[0], {4, 2, 0, 8, 0}), known[0].count);
  EXPECT_EQUAL(dof[0], 3.0);
  EXPECT_EQUAL(y[0], -1.0);
  EXPECT_EQUAL(known[1].count, 3.0);                                  // 4*0.5 + 1
  EXPECT_EQUAL(known[1].m2, 8 * 0.5 + 25 * 2.0 * 1.0 / 3.0);          // merged
  EXPECT_EQUAL(dof[1], 0.5 * 3.0 * (2.0 / 3.0) + 2.0 * (2.0 / 3.0));  // sum(w) - sum(w^2)/sum(w)
}

TEST(what_does_not_fit_is_refused_before_anything_is_written) {
  const std::vector<Moments> before = {{4, 2, 0, 8, 0}, {4, 2, 0, 8, 0}};
  std::vector<Moments> known = before;
  std::vector<double> y(2, -77), dof(2, 3);
  const std::vector<double> x = {1, 2}, far = {1, kInfinity};
  const auto refused = [&](const char* text, const std::vector<double>& values, const Observing& how) {
    EXPECT_THROWS(std::invalid_argument, text, observe<double>(values, known, dof, y, how));
  };
  refused("x must be finite or NaN, got inf in channel 1", far, {});
  refused("keep must be in [0, 1], got 1.5", x, {.keep = 1.5});
  refused("eps must be finite and >= 0, got -1", x, {.eps = -1});
  refused("clip must be above 0, got 0", x, {.clip = 0});
  refused("moments must have 1 values (one per channel), got 2", {1}, {});
  EXPECT_THROWS(std::invalid_argument, "y must have 2 values (one per channel), got 1",
                observe<double>(x, known, dof, std::span(y).first(1)));
  EXPECT_THROWS(std::invalid_argument, "importance_dof must have 2 values (one per channel), got 1",
                observe<double>(x, known, std::span(dof).first(1), y));
  EXPECT_THROWS(std::invalid_argument, "line must have 2 values (one per channel), got 1",
                standardizing(before, {}, std::span(known).first(1)));
  for (std::size_t c = 0; c < 2; ++c) EXPECT(same(known[c], before[c]) && y[c] == -77 && dof[c] == 3, c);
}

}  // namespace

int main(int argc, char** argv) { return expect::run_tests(argc > 1 ? argv[1] : nullptr); }
