// The public C++ API: what its header promises and Python does not reach.
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <span>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "all_passes.hpp"
#include "batchnorm/batchnorm.hpp"
#include "data.hpp"
#include "double_double.hpp"
#include "expect.hpp"
#include "float_environment.hpp"

namespace {

using namespace batchnorm;
using all_passes::Batch;
using all_passes::bits_of;
using all_passes::Kind;
using all_passes::make_batch;
using data::same_bits;

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

std::string text(const Problem& p) { return expect::text("{", p.outer, ", ", p.channels, ", ", p.inner, "}"); }

// One shape for each way of visiting a tensor, with values in tails.
const std::vector<Problem>& shapes() {
  static const std::vector<Problem> list = {{4, 7, 49},   {40, 3, 700}, {1, 1, 40'000}, {301, 7, 1}, {900, 64, 1},
                                            {2, 1030, 1}, {50, 6, 4},   {33, 3, 16},    {9, 2, 17}};
  return list;
}

// ThreadSanitizer looks at who reads what another thread wrote. Values decide how a channel is finished, not who does
// it: two kinds, which have ordinary channels too, take every way there is (summed again; applied in float64).
#ifdef __SANITIZE_THREAD__
constexpr Kind kKinds[] = {Kind::cancelling, Kind::wide};
#else
constexpr auto& kKinds = all_passes::kKinds;
#endif

// f(batch, name) for every shape and kind of values.
template <class T, class F>
void for_each_batch(F&& f) {
  for (const Problem& p : shapes()) {
    for (const Kind kind : kKinds) {
      f(make_batch<T>(p, kind), expect::text(text(p), " ", all_passes::kKindNames[static_cast<int>(kind)]));
    }
  }
}

// ---- arguments -------------------------------------------------------------------------------------------------

// Valid arguments of every function, for a test to spoil one of them; outputs hold what no function writes.
template <class T>
struct Arguments {
  Problem problem{2, 3, 4};
  std::vector<T> x = std::vector<T>(24, T(1)), dy = x, y = std::vector<T>(24, T(-77)), dx = y;
  std::vector<T> gamma = std::vector<T>(3, T(2)), beta = gamma, mean = gamma, var = gamma;
  std::vector<Moments> moments = std::vector<Moments>(3, Moments{8, 1, 0, 2, 0}), saved = moments;
  std::vector<GradSums> sums = std::vector<GradSums>(3), sums_out = sums;
  std::vector<double> dgamma = std::vector<double>(3, -77), dbeta = dgamma, running_mean = dgamma, running_var = dgamma;
  double eps = 1e-5, update_rate = 0.1;
  int ddof = 1;
  Options options;

  [[nodiscard]] std::span<const T> in() const { return x; }
  [[nodiscard]] std::span<const T> din() const { return dy; }
  [[nodiscard]] ChannelValues values(const std::vector<T>& v) const { return std::span<const T>(v); }
  [[nodiscard]] std::span<const Moments> known() const { return moments; }

  void call_moments() { batchnorm::moments<T>(in(), problem, saved, options); }
  void call_batch_norm() { batch_norm<T>(in(), problem, values(gamma), values(beta), eps, y, saved, options); }
  void call_normalize() {
    normalize<T>(in(), problem, values(mean), values(var), values(gamma), values(beta), eps, y, options);
  }
  void call_normalize_moments() { normalize<T>(in(), problem, known(), values(gamma), values(beta), eps, y, options); }
  void call_grad_sums() { batchnorm::grad_sums<T>(din(), in(), problem, known(), sums_out, options); }
  void call_grad_input() { grad_input<T>(din(), in(), problem, known(), sums, values(gamma), eps, dx, options); }
  void call_batch_norm_backward() {
    batch_norm_backward<T>(din(), in(), problem, known(), values(gamma), eps, dx, std::span(dgamma), std::span(dbeta),
                           options);
  }
  void call_normalize_backward() {
    normalize_backward<T>(din(), in(), problem, values(mean), values(var), values(gamma), eps, dx, std::span(dgamma),
                          std::span(dbeta), options);
  }
  void call_update_running() { batchnorm::update_running(running_mean, running_var, moments, update_rate, ddof); }

  [[nodiscard]] all_passes::Bits outputs() const {
    return bits_of(y, dx, saved, sums_out, dgamma, dbeta, running_mean, running_var);
  }
};

bool has_three_parts(const std::string& message) {
  return message.find(" must ") != std::string::npos && message.find(", got ") != std::string::npos;
}

template <class T>
using Method = void (Arguments<T>::*)();

// The methods throw this text once `spoil` has been at the arguments, and write nothing.
template <class T, class Spoil>
void refuses(const std::string& message, const std::vector<Method<T>>& methods, Spoil&& spoil) {
  for (std::size_t k = 0; k < methods.size(); ++k) {
    Arguments<T> a;
    spoil(a);
    const all_passes::Bits before = a.outputs();
    const std::string got = expect::thrown_by<std::invalid_argument>([&] { (a.*methods[k])(); });
    EXPECT_EQUAL(got, message, "call ", k);
    EXPECT(has_three_parts(got), got);
    EXPECT(a.outputs() == before, "written in spite of: ", message, ", call ", k);
  }
}

template <class T>
struct Calls {
  using A = Arguments<T>;
  using List = std::vector<Method<T>>;
  static inline const List kBackward = {&A::call_grad_sums, &A::call_grad_input, &A::call_batch_norm_backward,
                                        &A::call_normalize_backward};
  static inline const List kForward = {&A::call_batch_norm, &A::call_normalize, &A::call_normalize_moments};
  static inline const List kGivenMoments = {&A::call_normalize_moments, &A::call_grad_sums, &A::call_grad_input};
  static inline const List kGivenVar = {&A::call_normalize, &A::call_normalize_backward};
  static inline const List kWithGamma = {&A::call_batch_norm,          &A::call_normalize,
                                         &A::call_normalize_moments,   &A::call_grad_input,
                                         &A::call_batch_norm_backward, &A::call_normalize_backward};
  static inline const List kGradients = {&A::call_grad_input, &A::call_batch_norm_backward,
                                         &A::call_normalize_backward};
  static List all() {
    List list = {&A::call_moments};
    list.insert(list.end(), kForward.begin(), kForward.end());
    list.insert(list.end(), kBackward.begin(), kBackward.end());
    return list;
  }
};

template <class T>
void expect_sizes_refused() {
  using A = Arguments<T>;
  using C = Calls<T>;
  refuses<T>("problem must have sizes >= 0, got {outer -1, channels 3, inner 4}", C::all(),
             [](A& a) { a.problem.outer = -1; });
  refuses<T>("problem must have sizes >= 0, got {outer 2, channels 3, inner -4}", C::all(),
             [](A& a) { a.problem.inner = -4; });
  refuses<T>("problem must have fewer than 2^60 values, got {outer 2147483648, channels 2147483648, inner 4}", C::all(),
             [](A& a) { a.problem = {std::int64_t{1} << 31, std::int64_t{1} << 31, 4}; });
  refuses<T>("problem must have fewer than 2^60 values, got {outer 0, channels 1099511627776, inner 1099511627776}",
             C::all(), [](A& a) { a.problem = {0, std::int64_t{1} << 40, std::int64_t{1} << 40}; });
  refuses<T>("threads must be >= 0, got -2", C::all(), [](A& a) { a.options.threads = -2; });
  refuses<T>("x must have 24 values, got 23", C::all(), [](A& a) { a.x.pop_back(); });
  refuses<T>("dy must have 24 values, got 25", C::kBackward, [](A& a) { a.dy.push_back(0); });
  refuses<T>("y must have 24 values, got 0", C::kForward, [](A& a) { a.y.clear(); });
  refuses<T>("dx must have 24 values, got 23", C::kGradients, [](A& a) { a.dx.pop_back(); });
  refuses<T>("dx must have 24 values, got 0", {&A::call_grad_input}, [](A& a) { a.dx.clear(); });
}
TEST(wrong_sizes_of_tensors_are_refused) {
  expect_sizes_refused<float>();
  expect_sizes_refused<double>();
}

template <class T>
void expect_channels_refused() {
  using A = Arguments<T>;
  using C = Calls<T>;
  const std::string wanted = " must have 3 values (one per channel), got ";
  refuses<T>("gamma" + wanted + "4", C::kWithGamma, [](A& a) { a.gamma.push_back(0); });
  refuses<T>("gamma" + wanted + "0", C::kWithGamma, [](A& a) { a.gamma.clear(); });
  refuses<T>("beta" + wanted + "2", C::kForward, [](A& a) { a.beta.pop_back(); });
  refuses<T>("mean" + wanted + "1", C::kGivenVar, [](A& a) { a.mean.resize(1); });
  refuses<T>("var" + wanted + "2", C::kGivenVar, [](A& a) { a.var.pop_back(); });
  refuses<T>("moments" + wanted + "2", C::kGivenMoments, [](A& a) { a.moments.pop_back(); });
  refuses<T>("saved" + wanted + "2", {&A::call_batch_norm_backward}, [](A& a) { a.moments.pop_back(); });
  refuses<T>("saved" + wanted + "2", {&A::call_batch_norm}, [](A& a) { a.saved.pop_back(); });
  refuses<T>("out" + wanted + "2", {&A::call_moments}, [](A& a) { a.saved.pop_back(); });
  refuses<T>("out" + wanted + "4", {&A::call_grad_sums}, [](A& a) { a.sums_out.push_back({}); });
  refuses<T>("sums" + wanted + "2", {&A::call_grad_input}, [](A& a) { a.sums.pop_back(); });
  refuses<T>("dgamma" + wanted + "2", {&A::call_batch_norm_backward, &A::call_normalize_backward},
             [](A& a) { a.dgamma.pop_back(); });
  refuses<T>("dbeta" + wanted + "0", {&A::call_batch_norm_backward, &A::call_normalize_backward},
             [](A& a) { a.dbeta.clear(); });
  refuses<T>("running_mean" + wanted + "2", {&A::call_update_running}, [](A& a) { a.running_mean.pop_back(); });
  refuses<T>("running_var" + wanted + "4", {&A::call_update_running}, [](A& a) { a.running_var.push_back(0); });
}
TEST(wrong_numbers_of_channel_values_are_refused) {
  expect_channels_refused<float>();
  expect_channels_refused<double>();
}

TEST(absent_statistics_are_refused) {
  Arguments<float> a;
  const std::span<const float> given(a.mean);
  EXPECT_THROWS(std::invalid_argument, "mean must have 3 values (one per channel), got none",
                normalize<float>(a.in(), a.problem, {}, given, {}, {}, 0, a.y));
  EXPECT_THROWS(std::invalid_argument, "var must have 3 values (one per channel), got none",
                normalize<float>(a.in(), a.problem, given, {}, {}, {}, 0, a.y));
  EXPECT_THROWS(std::invalid_argument, "var must have 3 values (one per channel), got none",
                normalize_backward<float>(a.din(), a.in(), a.problem, given, {}, {}, 0, a.dx, {}, {}));
}

template <class T>
void expect_values_refused() {
  using A = Arguments<T>;
  using C = Calls<T>;
  for (const auto& [eps, name] : {std::pair{-1e-5, "-1e-05"}, {kInfinity, "inf"}, {kNaN, "nan"}}) {
    refuses<T>(expect::text("eps must be finite and >= 0, got ", name), C::kWithGamma, [&](A& a) { a.eps = eps; });
  }
  refuses<T>("var must be >= 0 in every channel, got -0.5 in channel 1", C::kGivenVar,
             [](A& a) { a.var[1] = T(-0.5); });
  refuses<T>("moments must have count >= 0 in every channel, got -1 in channel 2", C::kGivenMoments,
             [](A& a) { a.moments[2].count = -1; });
  refuses<T>("moments must have count >= 0 in every channel, got nan in channel 0", C::kGivenMoments,
             [](A& a) { a.moments[0].count = kNaN; });
  refuses<T>("moments must have m2 >= 0 in every channel, got -2 in channel 1", C::kGivenMoments,
             [](A& a) { a.moments[1].m2 = -2; });
  refuses<T>("saved must have m2 >= 0 in every channel, got -2 in channel 1", {&A::call_batch_norm_backward},
             [](A& a) { a.moments[1].m2 = -2; });
  refuses<T>("batch must have count >= 0 in every channel, got -1 in channel 2", {&A::call_update_running},
             [](A& a) { a.moments[2].count = -1; });
  for (const auto& [rate, name] : {std::pair{-0.1, "-0.1"}, {1.5, "1.5"}, {kNaN, "nan"}}) {
    refuses<T>(expect::text("update_rate must be in [0, 1], got ", name), {&A::call_update_running},
               [&](A& a) { a.update_rate = rate; });
  }
  refuses<T>(
      "x must have at least 2 values per channel for batch statistics, got 1 in problem {outer 1, channels 24, inner "
      "1}",
      {&A::call_batch_norm}, [](A& a) {
        a.problem = {1, 24, 1};
        a.gamma.resize(24);
        a.beta.resize(24);
        a.saved.resize(24);
      });
}
TEST(wrong_values_are_refused) {
  expect_values_refused<float>();
  expect_values_refused<double>();
}

TEST(too_few_values_for_ddof_are_refused_before_any_channel_changes) {
  Arguments<double> a;
  a.moments[2].count = 1;  // the last one
  const all_passes::Bits before = a.outputs();
  const std::string got = expect::thrown_by<std::invalid_argument>([&] { a.call_update_running(); });
  EXPECT(got.find("batch must have ") == 0 && has_three_parts(got), got);
  EXPECT(a.outputs() == before);
}

template <class T>
void expect_overlap_refused() {
  std::vector<T> memory(48, T(1));
  const Problem p{2, 3, 4};
  const Arguments<T> a;
  const std::span<T> first(memory.data(), 24), second(memory.data() + 24, 24);
  std::vector<Moments> saved(3);
  const std::string said = " itself or share no memory with it, got a partial overlap";
  for (const std::ptrdiff_t apart : {1, 23}) {
    const std::span<T> shifted(memory.data() + apart, 24);
    EXPECT_THROWS(std::invalid_argument, "y must be x" + said, batch_norm<T>(first, p, {}, {}, 0, shifted, saved));
    EXPECT_THROWS(std::invalid_argument, "y must be x" + said, batch_norm<T>(shifted, p, {}, {}, 0, first, saved));
    EXPECT_THROWS(std::invalid_argument, "y must be x" + said,
                  normalize<T>(first, p, a.values(a.mean), a.values(a.var), {}, {}, 0, shifted));
    EXPECT_THROWS(std::invalid_argument, "y must be x" + said, normalize<T>(first, p, a.known(), {}, {}, 0, shifted));
    EXPECT_THROWS(std::invalid_argument, "dx must be dy" + said,
                  grad_input<T>(shifted, a.in(), p, a.known(), a.sums, {}, 0, first));
    EXPECT_THROWS(std::invalid_argument, "dx must be x" + said,
                  grad_input<T>(a.in(), shifted, p, a.known(), a.sums, {}, 0, first));
    EXPECT_THROWS(std::invalid_argument, "dx must be x" + said,
                  batch_norm_backward<T>(first, shifted, p, a.known(), {}, 0, first, {}, {}));
    EXPECT_THROWS(std::invalid_argument, "dx must be dy" + said,
                  normalize_backward<T>(shifted, a.in(), p, a.values(a.mean), a.values(a.var), {}, 0, first, {}, {}));
  }
  EXPECT(memory == std::vector<T>(48, T(1)), "written in spite of the overlap");
  EXPECT_THROWS(std::invalid_argument, "", batch_norm<T>(first, p, {}, {}, 0, second, saved));  // neighbours
}
TEST(partial_overlap_is_refused_and_neighbours_are_not) {
  expect_overlap_refused<float>();
  expect_overlap_refused<double>();
}

TEST(settings_and_explanations_refuse_negative_numbers) {
  EXPECT_THROWS(std::invalid_argument, "threads must be >= 0, got -1", set_num_threads(-1));
  EXPECT_THROWS(std::invalid_argument, "threads must be >= 0, got -1", (void)explain({1, 1, 1}, 4, {.threads = -1}));
  EXPECT_THROWS(std::invalid_argument, "problem must have sizes >= 0, got {outer 1, channels -1, inner 1}",
                (void)explain({1, -1, 1}, 4));
}

TEST(more_than_2_to_the_31_values_are_counted_in_64_bits) {
  constexpr Problem p{std::int64_t{1} << 20, 64, 1 << 10};
  static_assert(p.size() == std::int64_t{1} << 36 && p.count() == std::int64_t{1} << 30);
  EXPECT_THROWS(std::invalid_argument, "x must have 68719476736 values, got 1", {
    float x = 0;
    Moments m[64];
    moments<float>(std::span<const float>(&x, 1), p, m);
  });
  EXPECT(explain(p, 4).find("outer 1048576") != std::string::npos, explain(p, 4));
}

// ---- results ---------------------------------------------------------------------------------------------------

template <class T>
void expect_halves_equal_the_whole() {
  for_each_batch<T>([](const Batch<T>& b, const std::string& name) {
    for (const int threads : {1, 3}) {
      const auto r = all_passes::run(b, {.threads = threads});
      EXPECT(bits_of(r.moments) == bits_of(r.saved), name);
      EXPECT(bits_of(r.y) == bits_of(r.y_from_moments), name);
      EXPECT(bits_of(r.dx) == bits_of(r.dx_from_sums), name);
    }
  });
}
TEST(the_halves_give_the_bits_of_the_whole) {
  expect_halves_equal_the_whole<float>();
  expect_halves_equal_the_whole<double>();
}

template <class T>
void expect_in_place_equal() {
  for_each_batch<T>([](const Batch<T>& b, const std::string& name) {
    const auto expected = all_passes::run(b, {.threads = 1});
    const std::span<const double> gamma(b.gamma), beta(b.beta), mean(b.mean), var(b.var);
    const std::span<const Moments> saved(expected.saved);
    const auto equal = [&](const std::vector<T>& got, const std::vector<T>& want, const char* call) {
      EXPECT(same_bits(got, want), call, " in place, ", name);
    };
    for (const int threads : {1, 3}) {
      const Options options{threads};
      std::vector<T> v = b.x;
      std::vector<Moments> m(b.gamma.size());
      batch_norm<T>(v, b.problem, gamma, beta, 1e-5, v, m, options);
      equal(v, expected.y, "batch_norm");
      EXPECT(bits_of(m) == bits_of(expected.saved), name);
      v = b.x;
      normalize<T>(v, b.problem, mean, var, gamma, beta, 1e-5, v, options);
      equal(v, expected.y_given, "normalize");
      v = b.dy;
      batch_norm_backward<T>(v, b.x, b.problem, saved, gamma, 1e-5, v, {}, {}, options);
      equal(v, expected.dx, "batch_norm_backward onto dy");
      v = b.x;
      std::vector<double> dgamma(b.gamma.size());
      batch_norm_backward<T>(b.dy, v, b.problem, saved, gamma, 1e-5, v, std::span(dgamma), {}, options);
      equal(v, expected.dx, "batch_norm_backward onto x");
      EXPECT(same_bits(dgamma, expected.dgamma), name);
      for (const bool onto_dy : {true, false}) {
        v = onto_dy ? b.dy : b.x;
        const std::span<const T> dy = onto_dy ? v : b.dy, x = onto_dy ? b.x : v;
        normalize_backward<T>(dy, x, b.problem, mean, var, gamma, 1e-5, v, std::span(dgamma), {}, options);
        equal(v, expected.dx_frozen, "normalize_backward");
        EXPECT(same_bits(dgamma, expected.dgamma_frozen), name);
      }
    }
  });
}
TEST(in_place_gives_the_same_bits) {
  expect_in_place_equal<float>();
  expect_in_place_equal<double>();
}

template <class T>
void expect_unaligned_equal() {
  for_each_batch<T>([](const Batch<T>& b, const std::string& name) {
    const auto expected = all_passes::run(b, {.threads = 1});
    const std::size_t n = b.x.size();
    std::vector<T> x(n + 1), y(n + 3);
    std::copy(b.x.begin(), b.x.end(), x.begin() + 1);
    std::vector<Moments> m(b.gamma.size());
    batch_norm<T>(std::span<const T>(x).subspan(1), b.problem, std::span<const double>(b.gamma),
                  std::span<const double>(b.beta), 1e-5, std::span(y).subspan(3), m);
    EXPECT(same_bits(std::vector<T>(y.begin() + 3, y.end()), expected.y), name);
    EXPECT(y[0] == 0 && y[1] == 0 && y[2] == 0, name);
  });
}
TEST(addresses_do_not_change_bits) {
  expect_unaligned_equal<float>();
  expect_unaligned_equal<double>();
}

template <class T>
void expect_threads_equal() {
  for_each_batch<T>([](const Batch<T>& b, const std::string& name) {
    const auto expected = bits_of(all_passes::run(b, {.threads = 1}));
    for (const int threads : {0, 2, 5, 1000}) {
      EXPECT(bits_of(all_passes::run(b, {.threads = threads})) == expected, threads, " threads, ", name);
    }
  });
}
TEST(threads_do_not_change_bits) {
  expect_threads_equal<float>();
  expect_threads_equal<double>();
}

TEST(an_empty_batch_gives_moments_of_count_0_and_gradients_of_0) {
  for (const Problem& p : {Problem{0, 3, 4}, Problem{5, 3, 0}, Problem{0, 3, 1}, Problem{0, 1, 7}}) {
    const auto channels = static_cast<std::size_t>(p.channels);
    const std::span<const float> none;
    std::vector<Moments> found(channels, Moments{5, 5, 5, 5, 5});
    std::vector<GradSums> sums(channels, GradSums{5, 5, 5, 5});
    std::vector<double> dgamma(channels, 5), dbeta(channels, 5);
    batch_norm<float>(none, p, {}, {}, 0, {}, found);
    EXPECT(bits_of(found) == bits_of(std::vector<Moments>(channels)), text(p));
    found.assign(channels, Moments{5, 5, 5, 5, 5});
    moments<float>(none, p, found);
    EXPECT(bits_of(found) == bits_of(std::vector<Moments>(channels)), text(p));
    grad_sums<float>(none, none, p, found, sums);
    EXPECT(bits_of(sums) == bits_of(std::vector<GradSums>(channels)), text(p));
    grad_input<float>(none, none, p, found, sums, {}, 0, {});
    batch_norm_backward<float>(none, none, p, found, {}, 0, {}, std::span(dgamma), std::span(dbeta));
    EXPECT(dgamma == std::vector<double>(channels) && dbeta == dgamma, text(p));
    dgamma.assign(channels, 5);
    const std::vector<double> one(channels, 1);
    normalize<float>(none, p, std::span(one), std::span(one), {}, {}, 0, {});
    normalize_backward<float>(none, none, p, std::span(one), std::span(one), {}, 0, {}, std::span(dgamma), {});
    EXPECT(dgamma == std::vector<double>(channels), text(p));
  }
}

TEST(no_channels_are_no_work) {
  for (const Problem& p : {Problem{5, 0, 4}, Problem{0, 0, 0}}) {
    const auto r = all_passes::run(make_batch<double>(p, Kind::ordinary), {});
    EXPECT(bits_of(r).empty());
  }
}

TEST(one_value_a_channel_has_moments_and_a_normalization_by_given_ones) {
  const std::vector<float> x = {3, -4, 0.1f}, dy = {1, 2, 3};
  const Problem p{1, 3, 1};
  std::vector<Moments> m(3);
  moments<float>(x, p, m);
  std::vector<float> y(3), dx(3, 5);
  normalize<float>(x, p, std::span<const Moments>(m), {}, {}, 0, y);
  batch_norm_backward<float>(dy, x, p, m, {}, 1e-5, dx, {}, {});
  for (std::size_t c = 0; c < 3; ++c) {
    EXPECT(m[c].count == 1 && m[c].mean == static_cast<double>(x[c]) && m[c].m2 == 0, m[c].mean);
    EXPECT_EQUAL(y[c], 0.0f);
    EXPECT_EQUAL(dx[c], 0.0f);
  }
}

template <class T>
void expect_gamma_types_equal() {
  const Batch<T> b = make_batch<T>({9, 5, 20}, Kind::ordinary);
  std::vector<float> gamma32(b.gamma.begin(), b.gamma.end()), beta32(b.beta.begin(), b.beta.end());
  const std::vector<double> gamma64(gamma32.begin(), gamma32.end()), beta64(beta32.begin(), beta32.end());
  std::vector<T> from32(b.x.size()), from64(b.x.size()), finer(b.x.size());
  std::vector<Moments> m(5);
  using Floats = std::span<const float>;
  using Doubles = std::span<const double>;
  batch_norm<T>(b.x, b.problem, Floats(gamma32), Floats(beta32), 1e-5, from32, m);
  batch_norm<T>(b.x, b.problem, Doubles(gamma64), Doubles(beta64), 1e-5, from64, m);
  batch_norm<T>(b.x, b.problem, Doubles(b.gamma), Doubles(b.beta), 1e-5, finer, m);
  EXPECT(same_bits(from32, from64));
  EXPECT(!same_bits(from32, finer), "the digits of a double gamma must count");
}
TEST(gamma_counts_with_the_digits_of_its_own_type) {
  expect_gamma_types_equal<float>();
  expect_gamma_types_equal<double>();
}

template <class T>
void expect_dgamma_types_equal() {
  const Batch<T> b = make_batch<T>({9, 5, 20}, Kind::ordinary);
  const auto r = all_passes::run(b, {});
  std::vector<float> dgamma(5), dbeta(5), frozen(5);
  const std::span<const double> gamma(b.gamma);
  batch_norm_backward<T>(b.dy, b.x, b.problem, r.saved, gamma, 1e-5, {}, std::span(dgamma), std::span(dbeta));
  normalize_backward<T>(b.dy, b.x, b.problem, std::span<const double>(b.mean), std::span<const double>(b.var), gamma,
                        1e-5, {}, std::span(frozen), {});
  for (std::size_t c = 0; c < 5; ++c) {
    EXPECT_EQUAL(dgamma[c], static_cast<float>(r.dgamma[c]));
    EXPECT_EQUAL(dbeta[c], static_cast<float>(r.dbeta[c]));
    EXPECT_EQUAL(frozen[c], static_cast<float>(r.dgamma_frozen[c]));
  }
}
TEST(gradients_of_parameters_as_float_are_the_rounded_ones_as_double) {
  expect_dgamma_types_equal<float>();
  expect_dgamma_types_equal<double>();
}

TEST(gradients_do_not_depend_on_which_of_them_are_wanted) {
  for_each_batch<float>([](const Batch<float>& b, const std::string& name) {
    const auto expected = all_passes::run(b, {});
    const std::span<const double> gamma(b.gamma), mean(b.mean), var(b.var);
    std::vector<float> dx(b.x.size());
    std::vector<double> d(b.gamma.size());
    batch_norm_backward<float>(b.dy, b.x, b.problem, expected.saved, gamma, 1e-5, dx, {}, {});
    EXPECT(same_bits(dx, expected.dx), name);
    batch_norm_backward<float>(b.dy, b.x, b.problem, expected.saved, gamma, 1e-5, {}, std::span(d), {});
    EXPECT(same_bits(d, expected.dgamma), name);
    batch_norm_backward<float>(b.dy, b.x, b.problem, expected.saved, gamma, 1e-5, {}, {}, std::span(d));
    EXPECT(same_bits(d, expected.dbeta), name);
    normalize_backward<float>(b.dy, b.x, b.problem, mean, var, gamma, 1e-5, dx, {}, {});
    EXPECT(same_bits(dx, expected.dx_frozen), name);
    normalize_backward<float>(b.dy, b.x, b.problem, mean, var, gamma, 1e-5, {}, {}, std::span(d));
    EXPECT(same_bits(d, expected.dbeta_frozen), name);
  });
}

template <class T>
void expect_channels_apart() {
  for (const Problem& p : shapes()) {
    if (p.channels < 4) continue;
    Batch<T> clean = make_batch<T>(p, Kind::ordinary), bad = clean;
    const auto at = static_cast<std::size_t>(p.inner);  // outer 0, channel 1, inner 0
    bad.x[at] = std::numeric_limits<T>::quiet_NaN();
    bad.dy[2 * at] = std::numeric_limits<T>::infinity();  // channel 2
    const auto a = all_passes::run(clean, {}), b = all_passes::run(bad, {});
    for (std::size_t e = 0; e < clean.x.size(); ++e) {
      const std::size_t c = e / at % static_cast<std::size_t>(p.channels);
      if (c != 1) EXPECT(same_bits(a.y[e], b.y[e]), text(p), " value ", e);
      if (c != 1 && c != 2) EXPECT(same_bits(a.dx[e], b.dx[e]), text(p), " value ", e);
      if (c == 1) EXPECT(std::isnan(b.y[e]) && std::isnan(b.dx[e]), text(p), " value ", e);
    }
  }
}
TEST(a_nan_or_infinity_stays_in_its_channel) {
  expect_channels_apart<float>();
  expect_channels_apart<double>();
}

// ---- moments ---------------------------------------------------------------------------------------------------

// In double-double, so that the tests do not lose what they look for.
double relative_difference(double a, double a_lo, double b, double b_lo) {
  const DoubleDouble d = DoubleDouble{a, a_lo} - DoubleDouble{b, b_lo};
  return std::abs(d.hi) / std::max(std::abs(a), 1e-300);
}

// A handful of operations in double-double, each within 2^-100; m2 of doubles is compensated to 2^-62 at worst
// (channel_math.hpp), for these well conditioned values to 2^-90.
TEST(merged_parts_are_the_whole) {
  const Problem whole{30, 4, 11};
  const Batch<double> b = make_batch<double>(whole, Kind::ordinary);
  std::vector<Moments> all(4), merged(4), part(4);
  moments<double>(b.x, whole, all);
  std::size_t from = 0;
  for (const std::int64_t outer : {1, 9, 0, 20}) {
    const Problem p{outer, 4, 11};
    const auto n = static_cast<std::size_t>(p.size());
    moments<double>(std::span<const double>(b.x).subspan(from, n), p, part);
    from += n;
    for (std::size_t c = 0; c < 4; ++c) merged[c] = merge(merged[c], part[c]);
  }
  for (std::size_t c = 0; c < 4; ++c) {
    EXPECT_EQUAL(merged[c].count, 330.0);
    EXPECT(relative_difference(all[c].mean, all[c].mean_lo, merged[c].mean, merged[c].mean_lo) < 0x1p-90, c);
    EXPECT(relative_difference(all[c].m2, all[c].m2_lo, merged[c].m2, merged[c].m2_lo) < 0x1p-90, c);
  }
}

TEST(merging_with_nothing_changes_no_bit) {
  const Moments some{7, 0.1, 1e-20, -0.0, 3e-18}, nothing;
  EXPECT(bits_of(std::vector{merge(some, nothing), merge(nothing, some)}) == bits_of(std::vector{some, some}));
  EXPECT(bits_of(std::vector{merge(nothing, nothing)}) == bits_of(std::vector{nothing}));
}

TEST(variance_divides_by_count_minus_ddof_and_is_nan_without_freedom) {
  const Moments m{4, 10, 0, 6, 0};
  EXPECT_EQUAL(variance(m), 1.5);
  EXPECT_EQUAL(variance(m, 1), 2.0);
  EXPECT(std::isnan(variance(m, 4)) && std::isnan(variance(m, 5)) && std::isnan(variance(Moments{}, 1)));
  EXPECT(std::isnan(variance({.count = 1 + 1e-15, .m2 = 1}, 1)) && variance({.count = 0.5, .m2 = 1}) == 2);
  EXPECT(std::isinf(variance(Moments{})) && rstd(Moments{}, 0) == 0 && rstd(Moments{}, 1) == 0);
}

TEST(rstd_is_0_where_nothing_can_be_divided_by) {
  const Moments constant{4, 10, 0, 0, 0}, quarter{4, 10, 0, 1, 0};
  EXPECT_EQUAL(rstd(constant, 0), 0.0);
  EXPECT_EQUAL(rstd(quarter, 0), 2.0);
  EXPECT_EQUAL(rstd(constant, 0.0625), 4.0);
}

TEST(an_infinite_variance_has_an_rstd_of_0) {
  EXPECT_EQUAL(rstd(Moments{4, 0, 0, kInfinity, 0}, 1e-5), 0.0);
  const std::vector<float> x = {1, 2}, beta = {5};
  const std::vector<double> mean = {0}, var = {kInfinity};
  std::vector<float> y(2);
  normalize<float>(x, {2, 1, 1}, std::span(mean), std::span(var), {}, std::span(beta), 1e-5, y);
  EXPECT(y == std::vector<float>(2, 5), y[0], " ", y[1]);
}

TEST(update_rate_0_leaves_the_bits_and_1_stores_the_batch) {
  const std::vector<Moments> batch = {{4, 0.1, 0, 6, 0}, {4, kInfinity, 0, kNaN, 0}};
  const std::vector<double> mean = {-0.0, 3}, var = {5e-324, 0.3};
  std::vector<double> running_mean = mean, running_var = var;
  update_running(running_mean, running_var, batch, 0, 1);
  EXPECT(bits_of(running_mean, running_var) == bits_of(mean, var));
  update_running(running_mean, running_var, batch, 1, 1);
  EXPECT(bits_of(running_mean, running_var) ==
         bits_of(std::vector<double>{0.1, kInfinity}, std::vector<double>{2, kNaN}));
}

TEST(running_statistics_blend_with_the_variance_of_ddof) {
  const std::vector<Moments> batch = {{4, 8, 0, 6, 0}, {}};
  for (const int ddof : {0, 1}) {
    std::vector<double> mean = {4, 7}, var = {1, 9};
    update_running(mean, var, batch, 0.25, ddof);
    EXPECT_EQUAL(mean[0], 5.0);
    EXPECT_EQUAL(var[0], 0.75 + 0.25 * (ddof == 0 ? 1.5 : 2.0));
    EXPECT(mean[1] == 7 && var[1] == 9, "a channel of count 0 is left alone");
  }
}

// ---- the caller's thread ---------------------------------------------------------------------------------------

// Values from subnormal to large, so that flushing or another rounding would show.
template <class T>
void expect_environment_kept() {
#ifdef __SANITIZE_THREAD__
  constexpr Kind kOfEnvironments[] = {Kind::ordinary};
#else
  constexpr Kind kOfEnvironments[] = {Kind::ordinary, Kind::wide, Kind::cancelling};
#endif
  for (const Kind kind : kOfEnvironments) {
    for (const Problem& p : {Problem{6, 5, 40}, Problem{500, 9, 1}, Problem{4, 3, 9000}}) {
      const Batch<T> b = make_batch<T>(p, kind);
      const auto expected = bits_of(all_passes::run(b, {.threads = 1}));
      for (const auto& environment : float_environment::kAll) {
        for (const int threads : {1, 3}) {
          all_passes::Results<T> r;
          const std::uint64_t left = float_environment::after_running_in(
              environment.value, [&] { r = all_passes::run(b, {.threads = threads}); });
          EXPECT_EQUAL(left, environment.value, environment.name, ", ", text(p), ", threads ", threads);
          EXPECT(bits_of(r) == expected, environment.name, ", ", text(p), ", threads ", threads);
        }
      }
    }
  }
}
TEST(the_callers_floating_point_environment_neither_matters_nor_changes) {
  expect_environment_kept<float>();
  expect_environment_kept<double>();
}

TEST(values_that_are_not_finite_raise_no_flag_in_the_caller) {
  Batch<float> b = make_batch<float>({6, 5, 40}, Kind::not_finite);
  b.var[3] = kNaN;
  b.mean[2] = kInfinity;
  const std::uint64_t left =
      float_environment::after_running_in(float_environment::kDefault, [&] { all_passes::run(b, {.threads = 1}); });
  EXPECT_EQUAL(left, float_environment::kDefault);
}

TEST(merge_variance_and_rstd_keep_to_their_own_environment_too) {
  const Moments a{3, 0.1, 1e-19, 0.7, 1e-18}, b{4, -1e-3, 1e-21, 1e-7, 1e-25}, tiny{3, 0, 0, 3e-320, 0};
  const auto compute = [&](double* out) {
    const Moments m = merge(a, b), t = merge(tiny, tiny);
    const double found[] = {m.mean,      m.mean_lo,      m.m2,           m.m2_lo,    t.m2,
                            variance(m), variance(m, 1), variance(tiny), rstd(m, 0), rstd(tiny, 0)};
    std::memcpy(out, found, sizeof found);
  };
  std::vector<double> expected(10), got(10);
  compute(expected.data());
  for (const auto& environment : float_environment::kAll) {
    const std::uint64_t left = float_environment::after_running_in(environment.value, [&] { compute(got.data()); });
    EXPECT_EQUAL(left, environment.value, environment.name);
    for (std::size_t k = 0; k < got.size(); ++k)
      EXPECT(same_bits(got[k], expected[k]), environment.name, ", value ", k);
  }
}

TEST(a_negative_subnormal_variance_is_refused_whatever_the_caller_flushes) {
  for (const auto& environment : float_environment::kAll) {
    Arguments<float> a;
    a.var[1] = -std::numeric_limits<float>::denorm_min();
    bool refused = false;
    float_environment::after_running_in(environment.value, [&] {
      try {
        a.call_normalize();
      } catch (const std::invalid_argument&) {
        refused = true;
      }
    });
    EXPECT(refused, environment.name);
  }
}

TEST(calls_from_several_threads_at_once_give_the_right_bits) {
  const std::vector<Batch<float>> batches = {
      make_batch<float>({4, 3, 9000}, Kind::ordinary, 1), make_batch<float>({900, 64, 1}, Kind::wide, 2),
      make_batch<float>({50, 6, 40}, Kind::huge_mean, 3), make_batch<float>({3000, 7, 1}, Kind::cancelling, 4)};
  std::vector<all_passes::Bits> expected;
  for (const auto& b : batches) expected.push_back(bits_of(all_passes::run(b, {.threads = 1})));
  std::vector<int> wrong(batches.size(), 0);
  std::vector<std::thread> callers;
  for (std::size_t k = 0; k < batches.size(); ++k) {
    callers.emplace_back([&, k] {
      for (int round = 0; round < 10; ++round) {
        if (bits_of(all_passes::run(batches[k], {.threads = 1 + round % 3})) != expected[k]) ++wrong[k];
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  for (std::size_t k = 0; k < wrong.size(); ++k) EXPECT_EQUAL(wrong[k], 0, "caller ", k);
}

#ifndef __SANITIZE_THREAD__  // which knows no threads of a forked child
TEST(a_child_forked_after_threads_were_used_computes_the_same) {
  const Batch<float> b = make_batch<float>({900, 64, 1}, Kind::ordinary);
  const auto expected = bits_of(all_passes::run(b, {.threads = 3}));
  const pid_t child = fork();
  if (child == 0) {
    alarm(20);  // ends a child that waits for threads it does not have
    _exit(bits_of(all_passes::run(b, {.threads = 3})) == expected ? 0 : 1);
  }
  int status = -1;
  waitpid(child, &status, 0);
  EXPECT(WIFEXITED(status) && WEXITSTATUS(status) == 0, "status ", status);
}
#endif

TEST(the_thread_setting_limits_calls_that_name_no_number) {
  const int before = get_num_threads();
  EXPECT(before >= 1, before);
  set_num_threads(1);
  EXPECT_EQUAL(get_num_threads(), 1);
  set_num_threads(0);
  EXPECT_EQUAL(get_num_threads(), before);
}

// Calls of several passes ask for memory before the first: for as many threads as then run (AddressSanitizer tells).
// ThreadSanitizer takes seconds for each.
#ifdef __SANITIZE_THREAD__
constexpr int kCallsMeanwhile = 2;
#else
constexpr int kCallsMeanwhile = 20;
#endif
TEST(a_limit_that_changes_meanwhile_leaves_a_call_its_memory_and_its_bits) {
  const Problem p{64, 1, 65536};
  data::Generator generator(3);
  const std::vector<float> x = data::values<float>(generator, p.size());
  const auto run = [&] {
    std::vector<float> y(x.size());
    std::vector<Moments> saved(1);
    batch_norm<float>(x, {.problem = p, .groups = {.about = About::zero}, .eps = 1e-5}, y, saved, {});
    return y;
  };
  const std::vector<float> expected = run();
  std::atomic<bool> ends = false;
  std::thread other([&ends] {
    for (int threads = 1; !ends; threads = 9 - threads) set_num_threads(threads), std::this_thread::yield();
  });
  bool same = true;
  for (int k = 0; k < kCallsMeanwhile; ++k) same = same && run() == expected;
  ends = true;
  other.join();
  set_num_threads(0);
  EXPECT(same, "bits");
}

TEST(instruction_sets_in_use_are_available_and_available_ones_are_built) {
  const std::vector<std::string> built = built_isas(), available = available_isas();
  const auto has = [](const std::vector<std::string>& list, const std::string& name) {
    return std::find(list.begin(), list.end(), name) != list.end();
  };
  for (const std::string& name : available) EXPECT(has(built, name), name);
  EXPECT(has(available, active_isa()) || active_isa() == "reference", active_isa());
}

TEST(the_build_tells_its_version) { EXPECT_EQUAL(build_info().version, BATCHNORM_VERSION); }

}  // namespace

int main(int argc, char** argv) { return expect::run_tests(argc > 1 ? argv[1] : nullptr); }
