// The public functions for GPUs, on the machine that runs kernels on the CPU: bits of the library's own, whatever the
// device holds; memory is given back; what is wrong is refused before anything is launched.
#include <stdexcept>
#include <string>
#include <vector>

#include "batchnorm/batchnorm.hpp"
#include "cuda/api.cu"
#include "cuda_tensors.hpp"
#include "expect.hpp"

namespace {

using namespace batchnorm;
using cuda::Stream;
using cuda_tensors::kShared;
using cuda_tensors::numbers;
using cuda_tensors::same;
using cuda_tensors::TensorsOf;

constexpr double kEps = 1e-5;
constexpr cuda::Device kLarge{90, 20, kShared, {20, 10, 5, 2, 1}}, kWithoutClusters{80, 20, kShared, {20, 0, 0, 0, 0}},
    kTiny{80, 1, 4096, {1, 0, 0, 0, 0}};

template <class T>
struct Results {
  std::vector<Moments> moments, saved;
  std::vector<GradSums> sums;
  std::vector<T> y, from_moments, inferred, dx, from_sums, constant_dx;
  std::vector<float> dgamma, dbeta, constant_dgamma, constant_dbeta;

  explicit Results(const TensorsOf<T>& t)
      : moments(t.gamma.size()),
        saved(moments),
        sums(t.gamma.size()),
        y(t.x),
        from_moments(t.x),
        inferred(t.x),
        dx(t.x),
        from_sums(t.x),
        constant_dx(t.x),
        dgamma(t.gamma.size()),
        dbeta(dgamma),
        constant_dgamma(dgamma),
        constant_dbeta(dgamma) {}
};
// All functions, of `Api`: the library's own or those for GPUs.
template <class Api, class T>
Results<T> all(const TensorsOf<T>& t) {
  Results<T> r(t);
  const std::span<const T> x = t.x, dy = t.dy;
  const std::vector<double> mean(t.gamma.size(), 0.25), var(t.gamma.size(), 2);
  const std::span<const Moments> saved = r.saved;
  const Problem& p = t.problem;
  Api::moments(x, p, r.moments);
  Api::batch_norm(x, p, t.gamma, t.beta, kEps, std::span<T>(r.y), r.saved);
  Api::normalize(x, p, saved, t.gamma, t.beta, kEps, std::span<T>(r.from_moments));
  Api::normalize(x, p, mean, var, t.gamma, t.beta, kEps, std::span<T>(r.inferred));
  Api::batch_norm_backward(dy, x, p, saved, t.gamma, kEps, std::span<T>(r.dx), r.dgamma, r.dbeta);
  Api::grad_sums(dy, x, p, saved, r.sums);
  Api::grad_input(dy, x, p, saved, std::span<const GradSums>(r.sums), t.gamma, kEps, std::span<T>(r.from_sums));
  Api::normalize_backward(dy, x, p, mean, var, t.gamma, kEps, std::span<T>(r.constant_dx), r.constant_dgamma,
                          r.constant_dbeta);
  return r;
}
#define BN_FORWARDS(space, name)                               \
  template <class T, class... Args>                            \
  static void name(std::span<const T> first, Args&&... args) { \
    space::name<T>(first, std::forward<Args>(args)...);        \
  }
#define BN_API(Name, space)                 \
  struct Name {                             \
    BN_FORWARDS(space, moments)             \
    BN_FORWARDS(space, batch_norm)          \
    BN_FORWARDS(space, normalize)           \
    BN_FORWARDS(space, batch_norm_backward) \
    BN_FORWARDS(space, grad_sums)           \
    BN_FORWARDS(space, grad_input)          \
    BN_FORWARDS(space, normalize_backward)  \
  };
BN_API(OnCpu, ::batchnorm)
BN_API(OnDevice, ::batchnorm::cuda)

template <class T>
void expect_same(const Problem& problem, const char* kind, const cuda::Device& device) {
  Stream::current = device;
  const TensorsOf<T> t(cuda_tensors::tensors(problem, kind));
  const Results<T> got = all<OnDevice>(t), wanted = all<OnCpu>(t);
  const std::string where =
      expect::text("{", problem.outer, ", ", problem.channels, ", ", problem.inner, "} ", kind, ", items of ",
                   sizeof(T), " bytes, ", device.multiprocessors, " multiprocessors");
  EXPECT(same(numbers(got.moments), numbers(wanted.moments)), "moments of ", where);
  EXPECT(same(numbers(got.saved), numbers(wanted.saved)), "saved of ", where);
  EXPECT(same(got.y, wanted.y) && same(got.from_moments, wanted.from_moments), "y of ", where);
  EXPECT(same(got.inferred, wanted.inferred), "normalize of ", where);
  EXPECT(same(got.dx, wanted.dx) && same(got.from_sums, wanted.from_sums), "dx of ", where);
  EXPECT(same(got.dgamma, wanted.dgamma) && same(got.dbeta, wanted.dbeta), "dgamma or dbeta of ", where);
  EXPECT(same(got.constant_dx, wanted.constant_dx), "dx of constants of ", where);
  EXPECT(same(got.constant_dgamma, wanted.constant_dgamma), "dgamma of constants of ", where);
  EXPECT(same(got.constant_dbeta, wanted.constant_dbeta), "dbeta of constants of ", where);
  EXPECT(Stream::blocks_in_use == 0, Stream::blocks_in_use, " blocks of memory in use after ", where);
}

TEST(each_function_has_the_bits_of_the_library_on_any_device) {
  for (const cuda::Device& device : {kLarge, kWithoutClusters, kTiny}) {
    for (const Problem& problem : {Problem{40, 3, 196}, {1, 2, 69'632}, {300, 3, 1}, {1, 37, 31}, {0, 4, 9}}) {
      for (const char* kind : {"normal", "far from 0", "cancelled to nothing"}) {
        expect_same<float>(problem, kind, device);
        expect_same<double>(problem, kind, device);
        expect_same<BFloat16>(problem, kind, device);
        expect_same<Float16>(problem, kind, device);
      }
    }
  }
}

TEST(channels_are_held_where_the_device_can) {
  const TensorsOf<float> t(cuda_tensors::tensors({40, 3, 196}, "normal"));
  for (const auto& [device, held] : {std::pair{kLarge, 2}, {kWithoutClusters, 2}, {kTiny, 0}}) {
    Stream::current = device;
    Stream::held = 0;
    all<OnDevice>(t);
    EXPECT(Stream::held == held, Stream::held);
  }
}

template <class F>
void expect_refused(const std::string& message, const F& f) {
  Stream::held = 0;
  try {
    f();
    EXPECT(false, "accepted: ", message);
  } catch (const std::invalid_argument& error) {
    EXPECT(error.what() == message, error.what());
  }
  EXPECT(Stream::held == 0 && Stream::blocks_in_use == 0, "launched before: ", message);
}
TEST(what_is_wrong_is_refused_by_name) {
  Stream::current = kLarge;
  const TensorsOf<float> t(cuda_tensors::tensors({2, 3, 4}, "normal"));
  std::vector<float> y(24);
  std::vector<Moments> saved(3);
  const std::span<const float> x = t.x;
  const auto norm = [&](std::span<const float> from, ChannelValues gamma, double eps, std::span<float> to,
                        std::span<Moments> moments) {
    cuda::batch_norm<float>(from, t.problem, gamma, {}, eps, to, moments);
  };
  expect_refused("x must have 24 values, got 23", [&] { norm(x.first(23), {}, kEps, y, saved); });
  expect_refused("gamma must have 3 values (one per channel), got 24", [&] { norm(x, t.x, kEps, y, saved); });
  expect_refused("eps must be finite and >= 0, got -1", [&] { norm(x, {}, -1, y, saved); });
  expect_refused("y must have 24 values, got 20", [&] { norm(x, {}, kEps, std::span(y).first(20), saved); });
  expect_refused("saved must have 3 values (one per channel), got 2",
                 [&] { norm(x, {}, kEps, y, std::span(saved).first(2)); });
  expect_refused("y must be x itself or share no memory with it, got a partial overlap", [&] {
    cuda::batch_norm<float>(std::span<const float>(y).first(20), {1, 5, 4}, {}, {}, kEps, std::span(y).subspan(4),
                            std::span(saved));
  });
  expect_refused("mean must have 3 values (one per channel), got none",
                 [&] { cuda::normalize<float>(x, t.problem, ChannelValues{}, t.gamma, {}, {}, kEps, y); });
  expect_refused(
      "problem must have fewer than 2^32 channels and pieces (chunks, or columns of blocks of rows), got {outer 2, "
      "channels 536870912, inner 16}",
      [&] { cuda::moments<float>(x, {2, 1 << 29, 16}, saved); });
}

}  // namespace

int main(int argc, char** argv) { return expect::run_tests(argc > 1 ? argv[1] : nullptr); }
