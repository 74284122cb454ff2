// The kernels for GPUs that hand on through global memory, run on the CPU: every pass and half of every problem and
// type has the bits of the library's own.
#include <string>
#include <vector>

#include "batchnorm/batchnorm.hpp"
#include "cuda/passes.hpp"
#include "cuda_tensors.hpp"
#include "expect.hpp"

namespace {

using namespace batchnorm;
using cuda_tensors::same;
using cuda_tensors::TensorsOf;

constexpr double kEps = 1e-5;

struct Machine {
  std::uint64_t seed;

  template <class Kernel, class... Args>
  void launch(Kernel kernel, unsigned grid, unsigned block, const Args&... args) {
    const simt::Launch how{.grid = grid, .block = block, .cluster = 1, .shared_bytes = 64, .seed = seed};
    simt::launch(how, kernel, args...);
  }
};

template <class T>
struct Results {
  std::vector<Moments> saved;
  std::vector<T> y, inferred, dx, from_sums, constant_dx;
  std::vector<GradSums> sums;
  std::vector<double> dgamma, dbeta, constant_dgamma, constant_dbeta, mean, var;

  explicit Results(const TensorsOf<T>& t)
      : saved(t.gamma.size()),
        y(t.x),
        inferred(t.x),
        dx(t.x),
        from_sums(t.x),
        constant_dx(t.x),
        sums(t.gamma.size()),
        dgamma(t.gamma.size()),
        dbeta(dgamma),
        constant_dgamma(dgamma),
        constant_dbeta(dgamma),
        mean(t.gamma.size(), 0.25),
        var(t.gamma.size(), 2) {}
};
template <class T>
Results<T> by_library(const TensorsOf<T>& t) {
  Results<T> r(t);
  const Call<T> call{.problem = t.problem, .gamma = t.gamma, .beta = t.beta, .eps = kEps};
  const std::span<const T> x = t.x, dy = t.dy;
  const std::span<const Moments> saved = r.saved;
  batch_norm<T>(x, call, r.y, r.saved, {.threads = 1});
  normalize<T>(x, call, r.mean, r.var, r.inferred, {.threads = 1});
  batch_norm_backward<T>(dy, x, call, saved, {r.dx, {}, r.dgamma, r.dbeta}, {.threads = 1});
  grad_sums<T>(dy, x, call, saved, r.sums, {.threads = 1});
  grad_input<T>(dy, x, call, saved, std::span<const GradSums>(r.sums), r.from_sums, {}, {.threads = 1});
  normalize_backward<T>(dy, x, call, r.mean, r.var, {r.constant_dx, {}, r.constant_dgamma, r.constant_dbeta},
                        {.threads = 1});
  return r;
}
template <class T>
Results<T> by_kernels(const TensorsOf<T>& t, std::uint64_t seed) {
  using Passes = cuda::Passes<T, Machine>;
  Results<T> r(t);
  Machine machine{seed};
  std::vector<std::byte> memory(Passes::bytes(t.problem));
  Passes passes(machine, t.problem, memory.data());
  passes.batch_norm(t.x.data(), t.gamma, t.beta, kEps, r.y.data(), r.saved.data());
  passes.normalize(t.x.data(), {nullptr, r.mean, r.var}, t.gamma, t.beta, kEps, r.inferred.data());
  passes.backward(t.dy.data(), t.x.data(), r.saved.data(), t.gamma, kEps, r.dx.data(), r.dgamma, r.dbeta);
  passes.grad_sums(t.dy.data(), t.x.data(), r.saved.data(), r.sums.data());
  passes.grad_input(t.dy.data(), t.x.data(), r.saved.data(), r.sums.data(), t.gamma, kEps, r.from_sums.data());
  passes.normalize_backward(t.dy.data(), t.x.data(), r.mean, r.var, t.gamma, kEps, r.constant_dx.data(),
                            r.constant_dgamma, r.constant_dbeta);
  return r;
}

std::vector<double> numbers(const std::vector<GradSums>& sums) {
  std::vector<double> all;
  for (const GradSums& s : sums) all.insert(all.end(), {s.sum_dy, s.sum_dy_lo, s.sum_dy_xmu, s.sum_dy_xmu_lo});
  return all;
}
template <class T>
void expect_same(const Problem& problem, const char* kind, std::uint64_t seed = 0) {
  const TensorsOf<T> t(cuda_tensors::tensors(problem, kind));
  const Results<T> got = by_kernels(t, seed), wanted = by_library(t);
  const std::string where = expect::text("{", problem.outer, ", ", problem.channels, ", ", problem.inner, "} ", kind,
                                         ", items of ", sizeof(T), " bytes, seed ", seed);
  EXPECT(same(cuda_tensors::numbers(got.saved), cuda_tensors::numbers(wanted.saved)), "moments of ", where);
  EXPECT(same(got.y, wanted.y), "y of ", where);
  EXPECT(same(got.inferred, wanted.inferred), "normalize of ", where);
  EXPECT(same(got.dx, wanted.dx), "dx of ", where);
  EXPECT(same(got.dgamma, wanted.dgamma) && same(got.dbeta, wanted.dbeta), "dgamma or dbeta of ", where);
  EXPECT(same(numbers(got.sums), numbers(wanted.sums)), "sums of ", where);
  EXPECT(same(got.from_sums, wanted.from_sums), "grad_input of ", where);
  EXPECT(same(got.constant_dx, wanted.constant_dx), "dx of constants of ", where);
  EXPECT(same(got.constant_dgamma, wanted.constant_dgamma) && same(got.constant_dbeta, wanted.constant_dbeta),
         "dgamma or dbeta of constants of ", where);
}

// Runs: short, uneven, long, of several chunks. Rows: alone and side by side, with some left over, of more blocks than
// a bundle, of pairs of values a channel. Short runs, which are turned. One channel; none, and no values.
const Problem kProblems[] = {{3, 5, 49},   {2, 4, 5000}, {1, 2, 69'632}, {7, 1, 300},   {33, 40, 1}, {300, 3, 1},
                             {1013, 7, 1}, {40, 6, 4},   {200, 20, 9},   {2100, 70, 1}, {1, 90, 16}, {1, 37, 31},
                             {0, 4, 9},    {3, 4, 0},    {2, 6, 17},     {5000, 2, 2}};

template <class T>
void expect_all_same() {
  for (const Problem& problem : kProblems) {
    for (const char* kind : cuda_tensors::kKinds) expect_same<T>(problem, kind);
  }
}
TEST(float32_has_the_bits_of_the_library) { expect_all_same<float>(); }
TEST(float64_has_the_bits_of_the_library) { expect_all_same<double>(); }
TEST(float16_has_the_bits_of_the_library) { expect_all_same<Float16>(); }
TEST(bfloat16_has_the_bits_of_the_library) { expect_all_same<BFloat16>(); }

TEST(the_bits_are_those_of_any_schedule) {
  for (std::uint64_t seed = 1; seed <= 20; ++seed) {
    expect_same<float>({3, 5, 49}, "far from 0", seed);
    expect_same<float>({300, 3, 1}, "far from 0", seed);
  }
}

}  // namespace

int main(int argc, char** argv) { return expect::run_tests(argc > 1 ? argv[1] : nullptr); }
