// The kernels for GPUs that hold channels in shared memory, run on the CPU: they have the bits of the library's own, on
// any number of blocks, whoever runs first.
#include <limits>
#include <string>
#include <vector>

#include "batchnorm/batchnorm.hpp"
#include "cuda_tensors.hpp"
#include "expect.hpp"

namespace {

using namespace batchnorm;
using cuda_tensors::Array;
using cuda_tensors::kKinds;
using cuda_tensors::kShared;
using cuda_tensors::numbers;
using cuda_tensors::same;
using cuda_tensors::TensorsOf;

constexpr double kEps = 1e-5;

template <class T>
struct Results {
  Array<T> y, dx;
  std::vector<double> dgamma, dbeta;
  Array<Moments> saved;

  explicit Results(const TensorsOf<T>& t)
      : y(t.x.size(), T(kNaN)), dx(y), dgamma(t.gamma.size(), kNaN), dbeta(dgamma), saved(t.gamma.size()) {}

 private:
  static constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
};
template <class T>
Results<T> by_library(const TensorsOf<T>& t) {
  Results<T> r(t);
  const Call<T> call{.problem = t.problem, .gamma = t.gamma, .beta = t.beta, .eps = kEps};
  batch_norm<T>(t.x, call, r.y, r.saved, {.threads = 1});
  batch_norm_backward<T>(t.dy, t.x, call, r.saved, {r.dx, {}, r.dgamma, r.dbeta}, {.threads = 1});
  return r;
}

struct How {
  unsigned blocks, threads, spans;
  std::uint64_t seed;
  bool through_memory = false, aligned = true, in_place = false;
};
// False where a channel does not fit.
template <class T>
bool by_kernels(const TensorsOf<T>& t, const How& how, Results<T>& r) {
  const cuda::Device device = cuda_tensors::device(how.through_memory, how.blocks, how.spans);
  const auto forward = cuda::plan_resident<T, 1>(t.problem, device, how.aligned, how.blocks);
  const auto backward = cuda::plan_resident<T, 2>(t.problem, device, how.aligned, how.blocks);
  if (!forward || !backward) return false;
  if (how.in_place) r.y = t.x;
  const T* x = how.in_place ? r.y.data() : t.x.data();
  const cuda::HeldForward<T> to_y{x, r.y.data(), t.gamma, t.beta, kEps, r.saved.data()};
  cuda_tensors::run(*forward, to_y, how.threads, how.seed);
  const cuda::HeldBackward<T> to_dx{t.dy.data(), t.x.data(), r.dx.data(), r.saved.data(),
                                    t.gamma,     kEps,       r.dgamma,    r.dbeta};
  cuda_tensors::run(*backward, to_dx, how.threads, how.seed);
  return true;
}
template <class T>
bool expect_same(const TensorsOf<T>& t, const How& how, const Results<T>& wanted) {
  Results<T> got(t);
  if (!by_kernels(t, how, got)) return false;
  const std::string where = expect::text("{", t.problem.outer, ", ", t.problem.channels, ", ", t.problem.inner, "} ",
                                         t.name, ", items of ", sizeof(T), " bytes, ", how.blocks, " blocks",
                                         how.through_memory ? " through memory" : "", ", seed ", how.seed);
  EXPECT(same(numbers(got.saved), numbers(wanted.saved)), "moments of ", where);
  EXPECT(same(got.y, wanted.y), "y of ", where);
  EXPECT(same(got.dx, wanted.dx), "dx of ", where);
  EXPECT(same(got.dgamma, wanted.dgamma) && same(got.dbeta, wanted.dbeta), "dgamma or dbeta of ", where);
  return true;
}

// Short, uneven and long runs, one channel, several runs a chunk, several chunks a run, more chunks than a bundle.
const Problem kProblems[] = {{3, 5, 49}, {40, 3, 196}, {2, 4, 5000},   {7, 1, 300},
                             {2, 6, 17}, {1, 6, 33},   {5, 2, 12'544}, {1, 2, 69'632}};

template <class T>
void expect_all_same() {
  int held = 0;
  for (const Problem& problem : kProblems) {
    for (const char* kind : kKinds) {
      const TensorsOf<T> t(cuda_tensors::tensors(problem, kind));
      const Results<T> wanted = by_library(t);
      held += expect_same(t, {.blocks = 1, .threads = 64, .spans = 2, .seed = 0}, wanted) ? 1 : 0;
      expect_same(t, {.blocks = 1, .threads = 64, .spans = 1, .seed = 0, .aligned = false}, wanted);
    }
  }
  EXPECT(held > 40, held);
}
TEST(float32_has_the_bits_of_the_library) { expect_all_same<float>(); }
TEST(float64_has_the_bits_of_the_library) { expect_all_same<double>(); }
TEST(float16_has_the_bits_of_the_library) { expect_all_same<Float16>(); }
TEST(bfloat16_has_the_bits_of_the_library) { expect_all_same<BFloat16>(); }

TEST(a_channel_may_be_held_by_any_number_of_blocks) {
  for (const Problem& problem : kProblems) {
    for (const char* kind : {"normal", "far from 0", "cancelled"}) {
      const TensorsOf<float> t(cuda_tensors::tensors(problem, kind));
      const Results<float> wanted = by_library(t);
      for (const unsigned blocks : {2u, 4u, 8u, 16u}) {
        EXPECT(expect_same(t, {.blocks = blocks, .threads = 32, .spans = 1, .seed = 0}, wanted), blocks);
      }
      for (const unsigned blocks : {1u, 3u, 20u}) {
        const How how{.blocks = blocks, .threads = 32, .spans = 2, .seed = 0, .through_memory = true};
        EXPECT(expect_same(t, how, wanted) || blocks == 1, blocks);
      }
    }
  }
}

TEST(the_bits_are_those_of_any_schedule) {
  const TensorsOf<float> t(cuda_tensors::tensors({40, 3, 196}, "far from 0"));
  const Results<float> wanted = by_library(t);
  for (std::uint64_t seed = 1; seed <= 20; ++seed) {
    expect_same(t, {.blocks = 4, .threads = 64, .spans = 2, .seed = seed}, wanted);
    expect_same(t, {.blocks = 3, .threads = 64, .spans = 2, .seed = seed, .through_memory = true}, wanted);
  }
}

TEST(y_may_be_x) {
  for (const char* kind : {"normal", "cancelled to nothing"}) {
    const TensorsOf<float> t(cuda_tensors::tensors({40, 3, 196}, kind));
    const Results<float> wanted = by_library(t);
    for (const bool through_memory : {false, true}) {
      for (std::uint64_t seed = 0; seed <= 20; ++seed) {
        expect_same(
            t,
            {.blocks = 4, .threads = 64, .spans = 2, .seed = seed, .through_memory = through_memory, .in_place = true},
            wanted);
      }
    }
  }
}

// ---- plans ----

// What one H200 told; the most clusters that run at once are what its 132 multiprocessors may hold, and were not asked.
constexpr cuda::Device kH200{90, 132, kShared, {132, 66, 33, 16, 8}};
constexpr cuda::Device kA100{80, 108, 163 * 1024, {108, 0, 0, 0, 0}};
constexpr cuda::Device kSmall{120, 84, 99 * 1024, {84, 42, 21, 10, 5}};

TEST(what_is_planned_holds_every_chunk_within_the_device) {
  for (const Problem& problem : {Problem{256, 64, 12'544}, {256, 64, 3136}, {256, 512, 49}, {1, 1, 800'000}}) {
    for (const cuda::Device& device : {kH200, kA100, kSmall}) {
      const auto plan = cuda::plan_resident<float, 1>(problem, device, true);
      if (!plan) continue;
      const cuda::Span& span = plan->span;
      EXPECT(plan->shared_bytes <= device.shared_bytes, plan->shared_bytes);
      EXPECT(static_cast<int>(span.blocks) * span.chunks_a_block >= span.chunks, span.blocks);
      EXPECT(static_cast<int>(span.blocks * plan->spans) <= device.multiprocessors, span.blocks, " ", plan->spans);
      EXPECT(plan->through_memory || device.capability >= 90 || span.blocks == 1, span.blocks);
    }
  }
  const auto fits = [](const Problem& p, const cuda::Device& d) { return cuda::traffic<float>(p, d).backward == 3; };
  EXPECT(!fits({8, 64, 1}, kH200), "rows");
  EXPECT(!fits({1, 64, 17}, kH200), "short runs, which are turned");
  EXPECT(!fits({256, 64, 12'544}, kA100), "two slabs of 12.8 MB in 17 MB");
}

// Each value of a channel is read once, of every layer of ResNet-50 at batch 256 in the order of channels first.
TEST(an_H200_holds_each_layer_of_ResNet_50) {
  struct Layer {
    std::int64_t inner, channels;
  };
  for (const Layer& layer : {Layer{112 * 112, 64},
                             {56 * 56, 64},
                             {56 * 56, 256},
                             {28 * 28, 128},
                             {28 * 28, 512},
                             {14 * 14, 256},
                             {14 * 14, 1024},
                             {7 * 7, 512},
                             {7 * 7, 2048}}) {
    const Problem problem{256, layer.channels, layer.inner};
    EXPECT(cuda::traffic<float>(problem, kH200).forward == 2, layer.inner);
    EXPECT(cuda::traffic<float>(problem, kH200).backward == 3, layer.inner);
    EXPECT(cuda::traffic<BFloat16>(problem, kH200).forward == 2, layer.inner);
    EXPECT(cuda::traffic<BFloat16>(problem, kH200).backward == 3, layer.inner);
  }
}

}  // namespace

int main(int argc, char** argv) { return expect::run_tests(argc > 1 ? argv[1] : nullptr); }
