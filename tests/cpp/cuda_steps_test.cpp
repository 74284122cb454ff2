// The kernels for GPUs that hand on through global memory, run on the CPU: every function, half and combination of
// every problem and type has the bits of the library's own. With BATCHNORM_ON_DEVICE the functions on a GPU instead.
#include "cuda_every_function.hpp"

namespace {

using namespace cuda_tensors;

// Holds no channel.
constexpr cuda::Device kTiny{80, 1, 4096, {1, 0, 0, 0, 0}};
// The same, but that lines up to a chunk are held.
constexpr cuda::Device kOfLines{80, 1, 227 * 1024, {0, 0, 0, 0, 0}};

// Sanitizers look at who touches what, ten times as slowly: kinds that take each way of summing, and fewer
// combinations.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr bool kSanitized = true;
constexpr const char* kTriedKinds[] = {"far from 0", "cancelled twice"};
#else
constexpr bool kSanitized = false;
constexpr auto& kTriedKinds = kKinds;
#endif

template <class T>
Call<T> plain(const Inputs<T>& t) {
  return {.problem = t.problem, .gamma = t.gamma, .beta = t.beta, .eps = 1e-5};
}

// Runs: short, uneven, long, of several chunks. Rows: alone and side by side, with some left over, of more blocks than
// a bundle, of pairs of values a channel. Short runs, which are turned. One channel; none, and no values.
const Problem kProblems[] = {{3, 5, 49},   {2, 4, 5000}, {1, 2, 69'632}, {7, 1, 300},   {33, 40, 1}, {300, 3, 1},
                             {1013, 7, 1}, {40, 6, 4},   {200, 20, 9},   {2100, 70, 1}, {1, 90, 16}, {1, 37, 31},
                             {0, 4, 9},    {3, 4, 0},    {2, 6, 17},     {5000, 2, 2}};

template <class T>
void expect_all_same() {
  Stream::current = kTiny;
  for (const Problem& problem : kProblems) {
    for (const char* kind : kTriedKinds) {
      const Inputs<T> t(problem, kind);
      expect_same(t, plain(t), "");
    }
  }
}
TEST(float32_has_the_bits_of_the_library) { expect_all_same<float>(); }
TEST(float64_has_the_bits_of_the_library) { expect_all_same<double>(); }
TEST(float16_has_the_bits_of_the_library) { expect_all_same<Float16>(); }
TEST(bfloat16_has_the_bits_of_the_library) { expect_all_same<BFloat16>(); }

TEST(the_bits_are_those_of_any_schedule) {
  Stream::current = kTiny;
  for (Stream::seed = 1; Stream::seed <= 20; ++Stream::seed) {
    for (const Problem& problem : {Problem{3, 5, 49}, {300, 3, 1}}) {
      const Inputs<float> t(problem, "far from 0");
      Call<float> call = plain(t);
      expect_same(t, call, "");
      call.counted = {t.weights, Padding::zero}, call.tail = {t.residual, true};
      expect_same(t, call, " with weights and a ReLU");
    }
  }
  Stream::seed = 0;
}

// ---- combinations ----

struct NamedGroups {
  const char* name;
  Groups groups;
};
template <class T>
std::vector<NamedGroups> all_groups(const Inputs<T>& t, std::span<const std::int64_t> ragged,
                                    std::span<const std::int64_t> samples) {
  const std::int64_t half = t.problem.channels / 2;
  return {{"", {}},
          {" by segments", {ragged}},
          {" by samples", {samples}},
          {" by groups", {samples, half}},
          {" by strided groups", {samples, half, false, About::mean, {}, true}},
          {" by groups of all", {{}, half}},
          {" about 0", {ragged, 1, false, About::zero}},
          {" about alpha", {ragged, 1, false, About::mean, t.alpha}},
          {" of each position", {{}, t.problem.channels, true}},
          {" of half of each position", {{}, half, true}},
          {" of each position about 0", {{}, t.problem.channels, true, About::zero}}};
}
// All combinations, or a fifth of them, in which each two of groups, weights and what follows meet.
enum class Some { all, fifth };
template <class T>
void expect_combinations_same(const Problem& problem, const char* kind, Some some = Some::fifth) {
  const Inputs<T> t(problem, kind);
  // One row, none, some, and as many again.
  const std::int64_t n = problem.outer, half = (n - 1) / 2;
  const std::vector<std::int64_t> ragged{0, 1, 1, 1 + half, n};
  std::vector<std::int64_t> samples;
  for (std::int64_t s = 0; s <= n; ++s) samples.push_back(s);
  const std::pair<const char*, Counted<T>> counted[] = {{"", {}},
                                                        {", masked with zeros", {t.mask, Padding::zero}},
                                                        {", masked and kept", {t.mask, Padding::keep}},
                                                        {", weighted", {t.weights, Padding::normalize}},
                                                        {", weighted with zeros", {t.weights, Padding::zero}}};
  const std::pair<const char*, Tail<T>> tails[] = {
      {"", {}}, {", ReLU", {{}, true}}, {", residual", {t.residual}}, {", residual and ReLU", {t.residual, true}}};
  std::size_t of_groups = 0;
  for (const auto& [groups, how] : all_groups(t, ragged, samples)) {
    ++of_groups;
    for (std::size_t c = 0; c < std::size(counted); ++c) {
      for (std::size_t w = 0; w < std::size(tails); ++w) {
        if (some == Some::fifth && (of_groups + c + w) % 5 != 0) continue;
        Call<T> call = plain(t);
        call.groups = how, call.counted = counted[c].second, call.tail = tails[w].second;
        expect_same(t, call, expect::text(groups, counted[c].first, tails[w].first));
      }
    }
  }
}
// Planar, rows, short runs, and lines that are held.
TEST(combinations_have_the_bits_of_the_library) {
  Stream::current = kTiny;
  expect_combinations_same<float>({5, 40, 1}, "normal");
  expect_combinations_same<BFloat16>({5, 80, 1}, "normal");
  for (const Problem& problem : {Problem{5, 4, 37}, {7, 6, 1}, {9, 4, 9}}) {
    expect_combinations_same<float>(problem, "normal", kSanitized ? Some::fifth : Some::all);
    if (kSanitized) continue;
    expect_combinations_same<float>(problem, "far from 0");
    expect_combinations_same<float>(problem, "large");
    expect_combinations_same<float>(problem, "cancelled");
    expect_combinations_same<double>(problem, "normal");
    expect_combinations_same<double>(problem, "far from 0");
    expect_combinations_same<double>(problem, "cancelled to nothing");
    expect_combinations_same<BFloat16>(problem, "normal");
    expect_combinations_same<Float16>(problem, "normal");
  }
}

// More of as many rows than a list has, one after another and every other one.
TEST(many_segments_have_the_bits_of_the_library) {
  Stream::current = kTiny;
  const auto of_rows = [](std::int64_t count, const auto& rows) {
    std::vector<std::int64_t> offsets{0};
    for (std::int64_t s = 0; s < count; ++s) offsets.push_back(offsets.back() + rows(s));
    return offsets;
  };
  for (const auto& offsets : {of_rows(303, [](std::int64_t s) { return s < 300 ? 2 : s - 297; }),
                              of_rows(500, [](std::int64_t s) { return s % 2 + 1; })}) {
    for (const std::int64_t inner : {1, 4, 20}) {
      const Inputs<float> t({offsets.back(), 3, inner}, "far from 0");
      Call<float> call = plain(t);
      call.groups = {offsets}, call.counted = {t.weights, Padding::zero}, call.tail = {t.residual, true};
      expect_same(t, call, expect::text(" by ", offsets.size() - 1, " segments"));
    }
  }
}

// Lines of some values, which are turned, of many, of more than a chunk, of one; side by side and by columns; more
// positions than a chunk has.
TEST(lines_have_the_bits_of_the_library) {
  for (const Problem& problem : {Problem{9, 20, 1},
                                 {3, 5000, 1},
                                 {1, 70'000, 1},
                                 {5, 1, 7},
                                 {3, 40, 5},
                                 {700, 6, 1},
                                 {2, 5000, 3},
                                 {0, 4, 2},
                                 {2, 3, 0},
                                 {1, 17, 1},
                                 {21, 200, 1},
                                 {5, 4096, 1}}) {
    for (const char* kind : kTriedKinds) {
      for (const About about : {About::mean, About::zero}) {
        const auto same_lines = [&]<class T>(const Inputs<T>& t) {
          Call<T> call = plain(t);
          call.groups = {{}, problem.channels, true, about};
          expect_same(t, call, about == About::mean ? " of each position" : " of each position about 0");
        };
        Stream::current = kTiny;
        same_lines(Inputs<float>(problem, kind));
        Stream::current = kOfLines;
        same_lines(Inputs<float>(problem, kind));
        same_lines(Inputs<double>(problem, kind));
        same_lines(Inputs<BFloat16>(problem, kind));
      }
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  try {
    cuda_tensors::require_device();
  } catch (const std::runtime_error& error) {
    std::printf("SKIPPED: %s\n", error.what());
    return 0;
  }
  return expect::run_tests(argc > 1 ? argv[1] : nullptr);
}
