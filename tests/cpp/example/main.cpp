// Normalizes a batch of two samples with three channels of two values each, forward and backward.
#include <batchnorm/batchnorm.hpp>
#include <cmath>
#include <cstdio>
#include <vector>

int main() {
  // NCHW is {N, C, H*W}; NHWC is {N*H*W, C, 1}; (N, C) is {N, C, 1}.
  const batchnorm::Problem problem{.outer = 2, .channels = 3, .inner = 2};
  const std::vector<float> x = {1, 3, 10, 30, -5, -5, 1, 3, 10, 30, -5, -5};
  const std::vector<float> gamma = {1, 1, 1}, beta = {0, 0, 7};

  std::vector<float> y(x.size());
  std::vector<batchnorm::Moments> saved(3);
  batchnorm::batch_norm<float>(x, problem, gamma, beta, 1e-5, y, saved);

  std::vector<float> dx(x.size()), dgamma(3), dbeta(3);
  batchnorm::batch_norm_backward<float>(y, x, problem, saved, gamma, 1e-5, dx, dgamma, dbeta);

  const double expected_mean[] = {2, 20, -5}, expected_var[] = {1, 100, 0};
  for (std::size_t c = 0; c < saved.size(); ++c) {
    std::printf("channel %zu: mean %g, var %g\n", c, saved[c].mean, batchnorm::variance(saved[c]));
    if (saved[c].mean != expected_mean[c] || batchnorm::variance(saved[c]) != expected_var[c]) return 1;
  }
  return std::abs(y[0] + 1) < 1e-4f && y[4] == 7 && dbeta[2] == 28 ? 0 : 1;
}
