// Normalizes a batch of two samples with three channels of two values each, and prints the statistics.
#include <batchnorm/batchnorm.hpp>
#include <cmath>
#include <cstdio>
#include <vector>

int main() {
  const batchnorm::Problem problem{.outer = 2, .channels = 3, .inner = 2};
  const std::vector<float> x = {1, 3, 10, 30, -5, -5, 1, 3, 10, 30, -5, -5};
  std::vector<float> y(x.size());
  std::vector<batchnorm::Moments> saved(3);
  batchnorm::batch_norm<float>(x, problem, {}, {}, 1e-5, y, saved);

  const double expected_mean[] = {2, 20, -5}, expected_var[] = {1, 100, 0};
  for (std::size_t c = 0; c < saved.size(); ++c) {
    std::printf("channel %zu: mean %g, var %g\n", c, saved[c].mean, batchnorm::variance(saved[c]));
    if (saved[c].mean != expected_mean[c] || batchnorm::variance(saved[c]) != expected_var[c]) return 1;
  }
  return std::abs(y[0] + 1) < 1e-4f && y[4] == 0 ? 0 : 1;
}
