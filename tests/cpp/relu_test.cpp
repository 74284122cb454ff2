// The calls with a ReLU: what normalizing, adding, taking the maximum and masking dy one after the other give, bit for
// bit; on the instruction set of BATCHNORM_ISA.
#include <malloc.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <type_traits>
#include <vector>

#include "all_passes.hpp"
#include "batchnorm/batchnorm.hpp"
#include "expect.hpp"

namespace {

using namespace batchnorm;
using all_passes::Batch;
using all_passes::Kind;
using data::Generator;

template <class T>
using Widened = std::conditional_t<sizeof(T) == sizeof(double), double, float>;

// Values behind `place` others, so that lines of memory begin anywhere among them.
template <class T>
class Tensor {
 public:
  Tensor(const std::vector<T>& values, std::size_t place) : memory_(values.size() + place), place_(place) {
    std::copy(values.begin(), values.end(), memory_.begin() + static_cast<std::ptrdiff_t>(place));
  }
  explicit Tensor(std::size_t size, std::size_t place = 0) : memory_(size + place), place_(place) {}
  std::span<T> span() { return std::span<T>(memory_).subspan(place_); }
  std::span<const T> view() const { return std::span<const T>(memory_).subspan(place_); }

 private:
  std::vector<T> memory_;
  std::size_t place_;
};

template <class T>
void expect_same(std::span<const T> got, std::span<const T> wanted, const char* what, const Problem& p) {
  EXPECT_EQUAL(got.size(), wanted.size());
  for (std::size_t i = 0; i < got.size(); ++i) {
    if (data::same_bits(got[i], wanted[i])) continue;
    EXPECT(false, what, " at ", i, " of ", p.outer, " x ", p.channels, " x ", p.inner, ", item size ", sizeof(T),
           ": got ", static_cast<double>(got[i]), ", wanted ", static_cast<double>(wanted[i]));
    return;
  }
}

template <class To, class From>
std::vector<To> converted(std::span<const From> from) {
  std::vector<To> to;
  for (const From& v : from) to.push_back(static_cast<To>(v));
  return to;
}

bool bit_of(std::span<const std::uint8_t> bits, std::size_t element) {
  const std::size_t bit = 64 + bits[0] + element;
  return ((bits[bit / 8] >> (bit % 8)) & 1) != 0;
}

// How a call is made: where tensors begin, how many threads, what is overwritten.
struct How {
  std::size_t place = 0;
  int threads = 1;
  bool with_residual = true, in_place = false, given = false;
};

template <class T>
struct Forward {
  std::vector<T> y;
  std::vector<bool> stays;
};

// The same in steps, in the type that T is computed in.
template <class T>
Forward<T> in_steps(const Batch<T>& b, std::span<const T> residual, const How& how) {
  using A = Widened<T>;
  const std::vector<A> x = converted<A>(std::span<const T>(b.x));
  std::vector<A> y(x.size());
  std::vector<Moments> saved(b.gamma.size());
  if (how.given) {
    normalize<A>(x, b.problem, b.mean, b.var, b.gamma, b.beta, 1e-5, y);
  } else {
    batch_norm<A>(x, b.problem, b.gamma, b.beta, 1e-5, y, saved);
  }
  Forward<T> result;
  for (std::size_t i = 0; i < y.size(); ++i) {
    const A sum = how.with_residual ? y[i] + static_cast<A>(residual[i]) : y[i];
    result.stays.push_back(!(sum <= 0));
    result.y.push_back(static_cast<T>(sum < 0 ? A(0) : sum));
  }
  return result;
}

template <class T>
Call<T> call_of(const Batch<T>& b, std::span<const T> residual, std::span<std::uint8_t> bits) {
  return {.problem = b.problem, .gamma = b.gamma, .beta = b.beta, .tail = {residual, true, bits}};
}

template <class T>
std::vector<std::uint8_t> expect_forward(const Batch<T>& b, const How& how) {
  Generator g(7);
  const Tensor<T> x(b.x, how.place), residual(data::values<T>(g, b.problem.size()), how.place + 3);
  Tensor<T> y(b.x, how.place);
  std::vector<std::uint8_t> bits(static_cast<std::size_t>(relu_mask_bytes(b.problem)), 0xa5);
  std::vector<Moments> saved(b.gamma.size());
  const auto add = how.with_residual ? residual.view() : std::span<const T>();
  const Options options{.threads = how.threads};
  const auto run = [&](std::span<const T> in, std::span<std::uint8_t> bits_out, std::span<T> out) {
    const Call<T> call = call_of(b, add, bits_out);
    how.given ? normalize<T>(in, call, b.mean, b.var, out, options) : batch_norm<T>(in, call, out, saved, options);
  };
  run(how.in_place ? std::span<const T>(y.span()) : x.view(), bits, y.span());
  const Forward<T> wanted = in_steps(b, add, how);
  expect_same<T>(y.view(), wanted.y, "y", b.problem);
  std::size_t wrong = 0;
  for (std::size_t i = 0; i < b.x.size(); ++i) wrong += bit_of(bits, i) != wanted.stays[i] ? 1 : 0;
  EXPECT_EQUAL(wrong, std::size_t{0}, "bits, ", b.problem.outer, " x ", b.problem.channels, " x ", b.problem.inner,
               ", place ", how.place, ", item size ", sizeof(T));

  Tensor<T> without(b.x.size(), how.place);
  run(x.view(), {}, without.span());
  expect_same<T>(without.view(), wanted.y, "y without bits", b.problem);
  return bits;
}

template <class T>
struct Found {
  std::vector<T> dx;
  std::vector<double> dgamma, dbeta;
};
template <class T>
Found<T> plain_gradients(const Batch<T>& b, std::span<const T> dy, const How& how) {
  Found<T> r{std::vector<T>(b.x.size()), std::vector<double>(b.gamma.size()), std::vector<double>(b.gamma.size())};
  std::vector<Moments> saved(b.gamma.size());
  moments<T>(b.x, b.problem, saved);
  if (how.given) {
    normalize_backward<T>(dy, b.x, b.problem, b.mean, b.var, b.gamma, 1e-5, r.dx, r.dgamma, r.dbeta);
  } else {
    batch_norm_backward<T>(dy, b.x, b.problem, saved, b.gamma, 1e-5, r.dx, r.dgamma, r.dbeta);
  }
  return r;
}

template <class T>
void expect_backward(const Batch<T>& b, std::span<std::uint8_t> bits, const How& how) {
  const Tensor<T> x(b.x, how.place), dy(b.dy, how.place + 1);
  std::vector<T> let_through = b.dy;
  for (std::size_t i = 0; i < let_through.size(); ++i) {
    if (!bit_of(bits, i)) let_through[i] = T(0);
  }
  const Found<T> wanted = plain_gradients<T>(b, let_through, how);
  std::vector<Moments> saved(b.gamma.size());
  moments<T>(b.x, b.problem, saved);
  const Call<T> call = call_of<T>(b, {}, bits);
  const Options options{.threads = how.threads};
  for (const bool wants_dx : {true, false}) {
    for (const bool wants_dresidual : {true, false}) {
      Tensor<T> own(b.dy, how.place + 1), dresidual(b.x.size(), how.place + 2);
      const auto g = how.in_place ? std::span<const T>(own.span()) : dy.view();
      Tensor<T> apart(b.x.size(), how.place + 2);
      std::vector<double> dgamma(b.gamma.size()), dbeta(b.gamma.size());
      const Gradients<T> out{.dx = !wants_dx      ? std::span<T>()
                                   : how.in_place ? own.span()
                                                  : apart.span(),
                             .dresidual = wants_dresidual ? dresidual.span() : std::span<T>(),
                             .dgamma = dgamma,
                             .dbeta = dbeta};
      if (how.given) {
        normalize_backward<T>(g, x.view(), call, b.mean, b.var, out, options);
      } else {
        batch_norm_backward<T>(g, x.view(), call, saved, out, options);
      }
      if (wants_dx) expect_same<T>(out.dx, wanted.dx, "dx", b.problem);
      if (wants_dresidual) expect_same<T>(out.dresidual, let_through, "dresidual", b.problem);
      expect_same<double>(dgamma, wanted.dgamma, "dgamma", b.problem);
      expect_same<double>(dbeta, wanted.dbeta, "dbeta", b.problem);
    }
  }
}

template <class T>
void expect_both(const Problem& p, Kind kind, const How& how) {
  const Batch<T> b = all_passes::make_batch<T>(p, kind);
  std::vector<std::uint8_t> bits = expect_forward(b, how);
  expect_backward<T>(b, bits, how);
}
void expect_all_types(const Problem& p, Kind kind, const How& how) {
  expect_both<Float16>(p, kind, how);
  expect_both<BFloat16>(p, kind, how);
  expect_both<float>(p, kind, how);
  expect_both<double>(p, kind, how);
}

// Planar: long runs, short ones, tails, several chunks, one channel. Interleaved: whole vectors and not, side by side,
// rows that are and are not whole bytes of the mask, a rest; short runs.
const Problem kShapes[] = {{4, 7, 49},   {3, 5, 17},  {2, 3, 20'011}, {16, 8, 100}, {1, 1, 50'000}, {5000, 1, 3},
                           {300, 64, 1}, {301, 7, 1}, {5, 130, 1},    {2, 4099, 1}, {4100, 24, 1},  {3, 2, 1},
                           {50, 6, 4},   {33, 3, 16}, {0, 4, 9},      {2, 1, 1},    {17, 257, 1}};

TEST(forward_and_backward_are_the_steps_one_after_the_other) {
  for (const Problem& p : kShapes) {
    for (const Kind kind : all_passes::kKinds) {
      if (p.size() > 10'000 && kind != Kind::ordinary && kind != Kind::wide) continue;
      expect_all_types(p, kind, {});
    }
  }
}

TEST(they_are_from_any_address_on_any_threads_in_place_and_with_given_statistics) {
  for (const Problem& p : kShapes) {
    for (const std::size_t place : {0u, 1u, 4u, 8u, 15u}) {
      for (const int threads : {1, 3}) {
        expect_both<float>(p, Kind::ordinary, {.place = place, .threads = threads});
        expect_both<BFloat16>(p, Kind::wide, {.place = place, .threads = threads, .given = true});
      }
    }
    expect_all_types(p, Kind::ordinary, {.place = 5, .with_residual = false, .in_place = true});
    expect_all_types(p, Kind::wide, {.place = 3, .threads = 2, .in_place = true, .given = true});
    expect_all_types(p, Kind::ordinary, {.with_residual = false, .given = true});
  }
}

// 20 MB and more: stored around the caches. AddressSanitizer, for which that takes minutes, sees one place of three.
TEST(they_are_around_the_caches) {
#ifdef __SANITIZE_ADDRESS__
  constexpr std::size_t kPlaces[] = {5};
#else
  constexpr std::size_t kPlaces[] = {0, 2, 5};
#endif
  for (const Problem& p : {Problem{100, 5, 10'000}, Problem{2, 3, 900'000}, Problem{50'001, 100, 1}}) {
    for (const std::size_t place : kPlaces) {
      expect_both<float>(p, Kind::ordinary, {.place = place, .threads = 2});
      expect_both<float>(p, Kind::wide, {.place = place, .threads = 3, .given = true});
    }
    expect_both<double>(p, Kind::ordinary, {.place = 3, .threads = 2});
    expect_both<Float16>({2 * p.outer, p.channels, p.inner}, Kind::ordinary, {.place = 9, .threads = 2});
  }
}

TEST(zero_and_nan_are_told_apart) {
  const float nan = std::numeric_limits<float>::quiet_NaN(), infinity = std::numeric_limits<float>::infinity();
  const Problem p{1, 1, 6};
  const std::vector<float> x{-0.0f, 0.0f, nan, infinity, -infinity, 1e-45f}, one{1}, zero{0};
  std::vector<float> y(6), dy{1, 2, 3, 4, 5, 6}, dx(6);
  std::vector<std::uint8_t> bits(static_cast<std::size_t>(relu_mask_bytes(p)));
  const Call<float> call{.problem = p, .eps = 0, .tail = {.relu = true, .bits = bits}};
  normalize<float>(x, call, zero, one, y);
  expect_same<float>(y, std::vector<float>{0, 0, nan, infinity, 0, 1e-45f}, "y", p);
  normalize_backward<float>(dy, x, call, zero, one, {.dx = dx});
  expect_same<float>(dx, std::vector<float>{0, 0, 3, 4, 0, 6}, "dx", p);
}

TEST(bits_of_any_content_harm_nothing) {
  const Problem p{3, 5, 40};
  const Batch<float> b = all_passes::make_batch<float>(p, Kind::ordinary);
  std::vector<std::uint8_t> bits(static_cast<std::size_t>(relu_mask_bytes(p)), 0xff);
  std::vector<float> dresidual(b.x.size());
  normalize_backward<float>(b.dy, b.x, call_of<float>(b, {}, bits), b.mean, b.var, {.dresidual = dresidual});
  expect_same<float>(dresidual, b.dy, "dresidual", p);
}

TEST(a_relu_has_one_bit_an_element) {
  for (const std::int64_t n : {0, 1, 8, 1000, 1'000'000}) {
    EXPECT(relu_mask_bytes({1, 1, n}) >= n / 8 && relu_mask_bytes({1, 1, n}) <= n / 8 + 24, n);
  }
}

TEST(arguments_that_do_not_fit_are_named) {
  const Problem p{2, 1, 10};
  std::vector<float> x(20), y(20), r(20), two(40);
  std::vector<Moments> saved(1);
  std::vector<std::uint8_t> bits(static_cast<std::size_t>(relu_mask_bytes(p)));
  const std::vector<double> one{1};
  const auto forward = [&](std::span<const float> residual, std::span<float> to, std::span<std::uint8_t> b,
                           bool relu = true) {
    batch_norm<float>(x, {.problem = p, .tail = {residual, relu, b}}, to, saved);
  };
  EXPECT_THROWS(std::invalid_argument, "residual must have 20 values, got 19",
                forward(std::span(r).subspan(1), y, bits));
  EXPECT_THROWS(std::invalid_argument, "y must be residual itself or share no memory with it, got a partial overlap",
                forward(std::span(two).first(20), std::span(two).subspan(1, 20), bits));
  EXPECT_THROWS(std::invalid_argument, "bits must have 17 bytes (relu_mask_bytes of the problem), got 3",
                forward(r, y, std::span(bits).first(3)));
  EXPECT_THROWS(std::invalid_argument, "bits must be empty without a ReLU, got 17 bytes", forward(r, y, bits, false));
  const std::span<std::uint8_t> bytes_of_y(reinterpret_cast<std::uint8_t*>(y.data()), bits.size());
  EXPECT_THROWS(std::invalid_argument, "y must share no memory with bits, got an overlap", forward(r, y, bytes_of_y));
  const auto backward = [&](std::span<float> dx, std::span<float> dresidual, std::span<std::uint8_t> b) {
    normalize_backward<float>(r, x, {.problem = p, .tail = {.relu = true, .bits = b}}, one, one,
                              {.dx = dx, .dresidual = dresidual});
  };
  EXPECT_THROWS(std::invalid_argument, "bits must have 17 bytes (relu_mask_bytes of the problem), got 3",
                backward(y, {}, std::span(bits).first(3)));
  EXPECT_THROWS(std::invalid_argument, "bits must have 17 bytes (relu_mask_bytes of the problem), got 0",
                backward(y, {}, {}));
  EXPECT_THROWS(std::invalid_argument, "dresidual must share no memory with dx, got an overlap", backward(y, y, bits));
  EXPECT_THROWS(std::invalid_argument, "dx must share no memory with bits, got an overlap",
                backward(y, {}, bytes_of_y));
}

}  // namespace

int main(int argc, char** argv) {
  // Memory is kept: pages that are given back and asked for again take as long as what is tried.
  mallopt(M_MMAP_MAX, 0);
  mallopt(M_TRIM_THRESHOLD, std::numeric_limits<int>::max());
  return expect::run_tests(argc > 1 ? argv[1] : nullptr);
}
