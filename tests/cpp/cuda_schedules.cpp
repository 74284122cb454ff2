// Whether the kernels for GPUs give the same bits whoever runs first: exit code 0, else 1. cuda_mistakes.cmake builds
// it with mistakes in them, each of which has to be found. With an argument, so many schedules instead of 20.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "cuda/resident.hpp"

namespace {

using namespace batchnorm;

struct Results {
  std::vector<float> y, dx;
  std::vector<double> dgamma, dbeta;
  std::vector<Moments> saved;
};

// Far from 0, so that sums are taken twice. Of threads enough for two chunks of four at a time.
Results run(const Problem& problem, bool aligned, std::uint64_t seed) {
  const auto n = static_cast<std::size_t>(problem.size()), channels = static_cast<std::size_t>(problem.channels);
  std::vector<float> x(n), dy(n);
  std::mt19937 random(1);
  std::normal_distribution<float> normal(1e5f);
  for (std::size_t e = 0; e < n; ++e) x[e] = normal(random), dy[e] = normal(random) - 1e5f;
  const float kNaN = std::numeric_limits<float>::quiet_NaN();
  Results r{std::vector<float>(n, kNaN), std::vector<float>(n, kNaN), std::vector<double>(channels),
            std::vector<double>(channels), std::vector<Moments>(channels)};
  const auto forward = cuda::plan_resident<1>(problem, 227 * 1024, 4, 16, aligned);
  const auto backward = cuda::plan_resident<2>(problem, 227 * 1024, 4, 16, aligned);
  if (!forward || !backward) std::abort();
  const auto launch = [&](const cuda::Resident& plan) {
    return simt::Launch{.grid = plan.blocks,
                        .block = 64,
                        .cluster = plan.blocks,
                        .shared_bytes = static_cast<std::size_t>(plan.shared_bytes),
                        .seed = seed};
  };
  simt::launch(launch(*forward), cuda::resident<cuda::Forward>, forward->span,
               cuda::Forward{x.data(), r.y.data(), {}, {}, 1e-5, r.saved.data()});
  simt::launch(launch(*backward), cuda::resident<cuda::Backward>, backward->span,
               cuda::Backward{dy.data(), x.data(), r.dx.data(), r.saved.data(), {}, 1e-5, r.dgamma, r.dbeta});
  return r;
}

template <class V>
bool same(const std::vector<V>& a, const std::vector<V>& b) {
  return std::memcmp(a.data(), b.data(), a.size() * sizeof(V)) == 0;
}

}  // namespace

int main(int argc, char** argv) {
  const int schedules = argc > 1 ? std::atoi(argv[1]) : 20;
  int others = 0, all = 0;
  for (const bool aligned : {true, false}) {
    const Problem problem{80, 3, 196};
    const Results wanted = run(problem, aligned, 0);
    for (int k = 1; k <= schedules; ++k, ++all) {
      const Results got = run(problem, aligned, static_cast<std::uint64_t>(k) * 7919);
      others += !(same(got.y, wanted.y) && same(got.dx, wanted.dx) && same(got.saved, wanted.saved) &&
                  same(got.dgamma, wanted.dgamma) && same(got.dbeta, wanted.dbeta));
    }
  }
  std::printf("%d of %d schedules differ\n", others, all);
  return others == 0 ? 0 : 1;
}
