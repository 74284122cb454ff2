// The kernels for GPUs, run on the CPU: they have the bits of the library's own, on any number of blocks, whoever runs
// first.
#include <limits>
#include <string>
#include <vector>

#include "batchnorm/batchnorm.hpp"
#include "cuda/resident.hpp"
#include "cuda_tensors.hpp"
#include "expect.hpp"

namespace {

using namespace batchnorm;
using cuda_tensors::kKinds;
using cuda_tensors::numbers;
using cuda_tensors::same;
using cuda_tensors::Tensors;
using cuda_tensors::tensors;

constexpr std::int64_t kShared = 227 * 1024;
constexpr double kEps = 1e-5;

struct Results {
  std::vector<float> y, dx;
  std::vector<double> dgamma, dbeta;
  std::vector<Moments> saved;
};
Results room_for(const Tensors& t) {
  const auto n = t.x.size(), channels = t.gamma.size();
  constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
  return {std::vector<float>(n, kNaN), std::vector<float>(n, kNaN), std::vector<double>(channels, kNaN),
          std::vector<double>(channels, kNaN), std::vector<Moments>(channels)};
}
Results by_library(const Tensors& t) {
  Results r = room_for(t);
  const Call<float> call{.problem = t.problem, .gamma = t.gamma, .beta = t.beta, .eps = kEps};
  batch_norm<float>(t.x, call, r.y, r.saved, {.threads = 1});
  batch_norm_backward<float>(t.dy, t.x, call, r.saved, {r.dx, {}, r.dgamma, r.dbeta}, {.threads = 1});
  return r;
}

struct How {
  unsigned blocks, threads, clusters;
  std::uint64_t seed;
  bool aligned = true, in_place = false;
};
// False where a channel does not fit.
bool by_kernels(const Tensors& t, const How& how, Results& r) {
  const auto forward = cuda::plan_resident<1>(t.problem, kShared, how.blocks, 16, how.aligned);
  const auto backward = cuda::plan_resident<2>(t.problem, kShared, how.blocks, 16, how.aligned);
  if (!forward || !backward) return false;
  const auto launch = [&](const cuda::Resident& plan) {
    return simt::Launch{.grid = plan.blocks * how.clusters,
                        .block = how.threads,
                        .cluster = plan.blocks,
                        .shared_bytes = static_cast<std::size_t>(plan.shared_bytes),
                        .seed = how.seed};
  };
  if (how.in_place) r.y = t.x;
  simt::launch(
      launch(*forward), cuda::resident<cuda::Forward>, forward->span,
      cuda::Forward{how.in_place ? r.y.data() : t.x.data(), r.y.data(), t.gamma, t.beta, kEps, r.saved.data()});
  simt::launch(launch(*backward), cuda::resident<cuda::Backward>, backward->span,
               cuda::Backward{t.dy.data(), t.x.data(), r.dx.data(), r.saved.data(), t.gamma, kEps, r.dgamma, r.dbeta});
  return true;
}

void expect_same(const Tensors& t, const How& how, const Results& wanted) {
  Results got = room_for(t);
  if (!by_kernels(t, how, got)) return;
  const std::string where = expect::text("{", t.problem.outer, ", ", t.problem.channels, ", ", t.problem.inner, "} ",
                                         t.name, ", ", how.blocks, " blocks, seed ", how.seed);
  EXPECT(same(numbers(got.saved), numbers(wanted.saved)), "moments of ", where);
  EXPECT(same(got.y, wanted.y), "y of ", where);
  EXPECT(same(got.dx, wanted.dx), "dx of ", where);
  EXPECT(same(got.dgamma, wanted.dgamma) && same(got.dbeta, wanted.dbeta), "dgamma or dbeta of ", where);
}

// Short, uneven and long runs, one channel, several runs a chunk, several chunks a run, more chunks than a bundle.
const Problem kProblems[] = {{3, 5, 49}, {40, 3, 196}, {2, 4, 5000},   {7, 1, 300},
                             {2, 6, 17}, {1, 6, 33},   {5, 2, 12'544}, {1, 2, 69'632}};

TEST(each_kernel_has_the_bits_of_the_library) {
  for (const Problem& problem : kProblems) {
    for (const char* kind : kKinds) {
      const Tensors t = tensors(problem, kind);
      const Results wanted = by_library(t);
      expect_same(t, {.blocks = 1, .threads = 64, .clusters = 2, .seed = 0}, wanted);
      expect_same(t, {.blocks = 1, .threads = 64, .clusters = 1, .seed = 0, .aligned = false}, wanted);
    }
  }
}

TEST(a_channel_may_be_held_by_any_number_of_blocks) {
  for (const Problem& problem : kProblems) {
    for (const char* kind : {"normal", "far from 0", "cancelled"}) {
      const Tensors t = tensors(problem, kind);
      const Results wanted = by_library(t);
      for (const unsigned blocks : {2u, 4u, 8u, 16u}) {
        expect_same(t, {.blocks = blocks, .threads = 32, .clusters = 1, .seed = 0}, wanted);
      }
    }
  }
}

TEST(the_bits_are_those_of_any_schedule) {
  const Tensors t = tensors({40, 3, 196}, "far from 0");
  const Results wanted = by_library(t);
  for (std::uint64_t seed = 1; seed <= 20; ++seed) {
    expect_same(t, {.blocks = 4, .threads = 64, .clusters = 2, .seed = seed}, wanted);
  }
}

TEST(y_may_be_x) {
  for (const char* kind : {"normal", "cancelled to nothing"}) {
    const Tensors t = tensors({40, 3, 196}, kind);
    const Results wanted = by_library(t);
    for (std::uint64_t seed = 0; seed <= 20; ++seed) {
      expect_same(t, {.blocks = 4, .threads = 64, .clusters = 2, .seed = seed, .in_place = true}, wanted);
    }
  }
}

TEST(what_is_planned_holds_every_chunk_within_the_memory_that_there_is) {
  for (const Problem& problem : {Problem{256, 64, 12'544}, {256, 64, 3136}, {256, 512, 49}, {1, 1, 800'000}}) {
    for (const std::int64_t shared : {std::int64_t{99} * 1024, kShared}) {
      const auto plan = cuda::plan_resident<1>(problem, shared, 1, 16, true);
      if (!plan) continue;
      EXPECT(plan->shared_bytes <= shared, plan->shared_bytes);
      EXPECT(static_cast<std::int64_t>(plan->blocks) * plan->span.chunks_a_block >= plan->span.chunks, plan->blocks);
    }
  }
  EXPECT(!cuda::plan_resident<1>({256, 64, 12'544}, kShared, 1, 16, true), "a channel of 12.8 MB");
  EXPECT(cuda::plan_resident<1>({256, 64, 3136}, kShared, 1, 16, true)->blocks == 16, "a channel of 3.2 MB");
  EXPECT(!cuda::plan_resident<1>({8, 64, 1}, kShared, 1, 16, true), "rows");
  EXPECT(!cuda::plan_resident<1>({1, 64, 17}, kShared, 1, 16, true), "short runs, which are turned");
}

}  // namespace

int main(int argc, char** argv) { return expect::run_tests(argc > 1 ? argv[1] : nullptr); }
