// float16 and bfloat16: the public conversions against plain definitions, and those of every instruction set against
// the public ones, on every value that could round another way.
#include "batchnorm/float16.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "batchnorm/info.hpp"
#include "data.hpp"
#include "expect.hpp"
#include "tables.hpp"

namespace {

using namespace batchnorm;
using kernels::Affine;
using kernels::Runs;

template <class T>
struct Format;
template <>
struct Format<Float16> {
  static constexpr int kExponentBits = 5, kFractionBits = 10;
};
template <>
struct Format<BFloat16> {
  static constexpr int kExponentBits = 8, kFractionBits = 7;
};

template <class T>
T from_bits(unsigned bits) {
  T value;
  value.bits = static_cast<std::uint16_t>(bits);
  return value;
}

// The value of 16 bits as the standard defines it.
template <class T>
double defined(unsigned bits) {
  constexpr int kFraction = Format<T>::kFractionBits, kBias = (1 << (Format<T>::kExponentBits - 1)) - 1;
  const int exponent = static_cast<int>((bits & 0x7fff) >> kFraction),
            fraction = static_cast<int>(bits) & ((1 << kFraction) - 1);
  const double sign = (bits & 0x8000) != 0 ? -1 : 1;
  if (exponent == 2 * kBias + 1) return fraction != 0 ? std::nan("") : sign * std::numeric_limits<double>::infinity();
  if (exponent == 0) return sign * std::ldexp(fraction, 1 - kBias - kFraction);
  return sign * std::ldexp((1 << kFraction) + fraction, exponent - kBias - kFraction);
}

// Equal bits; NaNs are one.
template <class T>
bool is_same(T a, T b) {
  const auto x = static_cast<float>(a), y = static_cast<float>(b);
  return (std::isnan(x) && std::isnan(y)) || a.bits == b.bits;
}

// Every float32 at which rounding may turn: each value, each midpoint between neighbours, and the float32 next to both.
template <class T>
std::vector<float> turning_points() {
  std::vector<float> points;
  const auto add = [&points](float v) {
    for (const float sign : {1.0f, -1.0f}) {
      points.push_back(sign * v);
      points.push_back(sign * std::nextafter(v, 0.0f));
      points.push_back(sign * std::nextafter(v, std::numeric_limits<float>::infinity()));
    }
  };
  constexpr unsigned kInfinity = 0x8000u - (1u << Format<T>::kFractionBits);
  for (unsigned bits = 0; bits < kInfinity; ++bits) {
    const double low = defined<T>(bits),
                 spacing = defined<T>(bits == 0 ? 1 : bits) - defined<T>(bits == 0 ? 0 : bits - 1);
    add(static_cast<float>(low));
    add(static_cast<float>(bits + 1 < kInfinity ? (low + defined<T>(bits + 1)) / 2 : low + spacing / 2));
  }
  for (const float v : {std::numeric_limits<float>::max(), std::numeric_limits<float>::infinity(),
                        std::numeric_limits<float>::denorm_min(), std::numeric_limits<float>::min()}) {
    add(v);
  }
  for (const std::uint32_t nan : {0x7fc00000u, 0x7f800001u, 0xff812345u, 0xffffffffu, 0x7fffffffu}) {
    points.push_back(std::bit_cast<float>(nan));
  }
  return points;
}

// The nearest of T, ties to even, by search among all values.
template <class T>
T nearest(float v) {
  constexpr unsigned kInfinity = 0x8000u - (1u << Format<T>::kFractionBits);
  const unsigned sign = std::signbit(v) ? 0x8000u : 0u;
  if (std::isnan(v)) return from_bits<T>(kInfinity | 1u);
  const double a = std::abs(static_cast<double>(v));
  unsigned low = 0, high = kInfinity;  // the last value <= a is in [low, high)
  while (high - low > 1) {
    const unsigned middle = (low + high) / 2;
    (defined<T>(middle) <= a ? low : high) = middle;
  }
  if (std::isinf(a)) return from_bits<T>(sign | kInfinity);
  const double spacing =
      low + 1 < kInfinity ? defined<T>(low + 1) - defined<T>(low) : defined<T>(low) - defined<T>(low - 1);
  const double past = a - defined<T>(low);
  const bool up = past > spacing / 2 || (past == spacing / 2 && low % 2 == 1);
  return from_bits<T>(sign | (up ? low + 1 : low));
}

template <class T>
void every_value_widens_exactly() {
  for (unsigned bits = 0; bits < 0x10000; ++bits) {
    const double want = defined<T>(bits), got = static_cast<double>(static_cast<float>(from_bits<T>(bits)));
    EXPECT((std::isnan(want) && std::isnan(got)) || (want == got && std::signbit(want) == std::signbit(got)), bits);
    EXPECT(is_same(T(static_cast<float>(from_bits<T>(bits))), from_bits<T>(bits)), bits);
  }
}
TEST(every_float16_widens_exactly) { every_value_widens_exactly<Float16>(); }
TEST(every_bfloat16_widens_exactly) { every_value_widens_exactly<BFloat16>(); }

template <class T>
void rounds_to_nearest_even() {
  for (const float v : turning_points<T>()) {
    EXPECT(is_same(T(v), nearest<T>(v)), v, " gave ", T(v).bits, ", nearest is ", nearest<T>(v).bits);
    if (std::isnan(v)) {
      EXPECT((T(v).bits >> (Format<T>::kFractionBits - 1) & 1) == 1, "a quiet NaN");
      EXPECT((T(v).bits & 0x8000) == (std::bit_cast<std::uint32_t>(v) >> 16 & 0x8000), "the sign of a NaN");
    }
  }
}
TEST(float16_is_the_nearest_even) { rounds_to_nearest_even<Float16>(); }
TEST(bfloat16_is_the_nearest_even) { rounds_to_nearest_even<BFloat16>(); }

// f of the kernels of every instruction set that runs here, the definition among them.
template <class T, class F>
void for_each_table(F f) {
  for (const Implementation& implementation : tables::runnable()) f(implementation.name, implementation.table->of<T>());
}

// Lengths of runs: whole vectors, every tail, and one value.
constexpr std::int64_t kLengths[] = {64, 1, 2, 3, 4, 5, 7, 8, 9, 11, 15, 16, 17, 31, 33};

// f(at, n) for pieces of that length of n values.
template <class F>
void in_pieces(std::int64_t n, std::int64_t length, F f) {
  for (std::int64_t at = 0; at < n; at += length) f(at, std::min(length, n - at));
}

template <class T>
void kernels_widen_every_value() {
  std::vector<T> x;
  for (unsigned bits = 0; bits < 0x10000; ++bits) x.push_back(from_bits<T>(bits));
  for_each_table<T>([&](const char* isa, const kernels::Kernels<T>& k) {
    for (const std::int64_t length : kLengths) {
      std::vector<T> y(x.size());
      std::vector<float> wide(x.size());
      const Affine<float> identity{0, 1, 0};
      in_pieces(0x10000, length, [&](std::int64_t at, std::int64_t n) {
        k.runs_normalize(x.data() + at, y.data() + at, {}, {n, 1, n}, &identity);
        k.widen(x.data() + at, n, wide.data() + at);
      });
      for (unsigned bits = 0; bits < 0x10000; ++bits) {
        const auto want = static_cast<float>(x[bits]);
        EXPECT(data::same_bits(wide[bits], want), isa, " length ", length, " bits ", bits);
        EXPECT(is_same(y[bits], T(want + 0.0f)), isa, " length ", length, " bits ", bits);  // -0 becomes 0
      }
    }
    for (unsigned bits = 0; bits < 0x10000; bits += 97) {  // sums, of one value
      kernels::Sums sums;
      k.runs_moments(&x[bits], {}, {1, 1, 1}, nullptr, &sums);
      const auto want = static_cast<double>(static_cast<float>(x[bits]));
      EXPECT(sums.first == want || std::isnan(want), isa, " bits ", bits);
    }
  });
}
TEST(kernels_widen_every_float16) { kernels_widen_every_value<Float16>(); }
TEST(kernels_widen_every_bfloat16) { kernels_widen_every_value<BFloat16>(); }

// y = (x - 0)*0 + offset is any float32, rounded.
template <class T>
void kernels_round_to_nearest_even() {
  const std::vector<float> points = turning_points<T>();
  const auto n = static_cast<std::int64_t>(points.size());
  const std::vector<float> zeros(points.size());
  const std::vector<T> x(points.size(), T(0));
  for_each_table<T>([&](const char* isa, const kernels::Kernels<T>& k) {
    std::vector<T> y(points.size()), narrow(points.size());
    k.rows_normalize(x.data(), y.data(), {}, {1, n, n}, {zeros.data(), zeros.data(), points.data()});
    for (const std::int64_t length : kLengths) {
      in_pieces(n, length,
                [&](std::int64_t at, std::int64_t m) { k.narrow(points.data() + at, m, narrow.data() + at); });
      for (std::size_t e = 0; e < points.size(); ++e) {
        const T want(points[e]);
        EXPECT(is_same(narrow[e], want), isa, " ", points[e], " gave ", narrow[e].bits, " not ", want.bits);
      }
    }
    for (std::size_t e = 0; e < points.size(); ++e) {
      const T want(points[e] + 0.0f);  // -0 becomes 0
      EXPECT(is_same(y[e], want), isa, " ", points[e], " gave ", y[e].bits, " not ", want.bits);
    }
  });
}
TEST(kernels_round_to_the_nearest_even_float16) { kernels_round_to_nearest_even<Float16>(); }
TEST(kernels_round_to_the_nearest_even_bfloat16) { kernels_round_to_nearest_even<BFloat16>(); }

// Nothing beyond a run is written, wherever it begins.
template <class T>
void tails_stay_inside() {
  const auto expect = [](const T* y, std::int64_t begin, std::int64_t length, const char* isa) {
    for (int e = 0; e < 128; ++e) {
      const T want = e >= begin && e < begin + length ? T(2 * e) : T(-1);
      EXPECT(is_same(y[e], want), isa, " begin ", begin, " length ", length, " at ", e);
    }
  };
  alignas(64) T x[128];
  float twice[128];
  for (int e = 0; e < 128; ++e) x[e] = T(e), twice[e] = static_cast<float>(2 * e);
  for_each_table<T>([&](const char* isa, const kernels::Kernels<T>& k) {
    for (std::int64_t begin = 0; begin < 33; ++begin) {
      for (std::int64_t length = 1; length < 70; ++length) {
        alignas(64) T y[128];
        for (const bool around_cache : {false, true}) {
          std::fill(std::begin(y), std::end(y), T(-1));
          const Affine<float> double_it{0, 2, 0};
          const Runs runs{.length = length, .count = 1, .stride = length, .around_cache = around_cache};
          k.runs_normalize(x + begin, y + begin, {}, runs, &double_it);
          expect(y, begin, length, isa);
        }
        std::fill(std::begin(y), std::end(y), T(-1));
        k.narrow(twice + begin, length, y + begin);
        expect(y, begin, length, isa);
      }
    }
  });
}
TEST(float16_tails_stay_inside) { tails_stay_inside<Float16>(); }
TEST(bfloat16_tails_stay_inside) { tails_stay_inside<BFloat16>(); }

}  // namespace

int main(int argc, char** argv) { return expect::run_tests(argc > 1 ? argv[1] : nullptr); }
