// The steps on tiles of the kernel contract (kernels/table.hpp), for every table that runs on this machine and the
// reference, against plain loops; with each array at a page whose touch ends the program. Those of 16-bit tensors are
// in float16_test.
#include <cmath>
#include <limits>
#include <vector>

#include "exact_sum.hpp"
#include "kernel_call.hpp"

namespace {

using namespace kernel_call;
using tables::runnable;

constexpr std::int64_t kMost = 128;  // every remainder of several vectors

// What a step writes into an array that holds `before`; no more than the first `n` values, and no other array.
template <class T, class Step>
std::vector<T> written(Array<T>& to, const std::vector<T>& before, std::int64_t n, Place place, Step&& step) {
  T* values = to.place(before, place, 1);
  step(values);
  const std::vector<T> found(values, values + n);
  EXPECT(to.untouched_outside({n, 1, 0}), guarded::name(place), " ", n);
  return found;
}

template <class T>
void expect_counted(const Implementation& implementation, std::int64_t n, std::int64_t times, Place place) {
  static Array<T> of_to, of_tile, of_input, of_weights;
  const Kernels<T>& k = implementation.table->of<T>();
  Generator g(80);
  const std::int64_t total = n * times;
  const auto tile = fill<T>(g, total, Values::not_finite), input = fill<T>(g, total, Values::not_finite);
  std::vector<T> w(static_cast<std::size_t>(n)), kept(tile.size()), put = input;
  for (T& each : w) each = weight<T>(g);
  std::vector<T> repeated = w;  // with those that are read again behind the last
  for (std::size_t e = 0; times > 1 && e < kernels::kVectorColumns; ++e) repeated.push_back(w[e]);
  for (std::size_t e = 0; e < tile.size(); ++e) {
    if (w[e % w.size()] != 0) kept[e] = put[e] = tile[e];
  }
  const T *t = of_tile.place(tile, place, 2), *i = of_input.place(input, place, 3),
          *given = of_weights.place(repeated, place, 4);
  const auto expect = [&](const std::vector<T>& before, const std::vector<T>& wanted, const char* what, auto&& step) {
    EXPECT(data::same_bits(written(of_to, before, total, place, step), wanted), implementation.name, " ", what, ", ",
           times, " x ", n, " values, items of ", sizeof(T), " bytes, ", guarded::name(place));
    EXPECT(of_tile.untouched() && of_input.untouched() && of_weights.untouched(), implementation.name, " ", what);
  };
  const auto blank = canaries<T>(total);
  for (const bool around : {false, true}) {
    expect(blank, put, "put", [&](T* to) { k.put_counted(t, given, i, n, times, around, to); });
    expect(blank, kept, "put on nothing", [&](T* to) { k.put_counted(t, given, nullptr, n, times, around, to); });
  }
  expect(input, put, "put on the input", [&](T* to) { k.put_counted(t, given, to, n, times, false, to); });
  expect(tile, put, "put on the tile", [&](T* to) { k.put_counted(to, given, i, n, times, false, to); });
  expect(tile, kept, "keep in place", [&](T* to) { k.put_counted(to, given, nullptr, n, times, false, to); });
}
TEST(what_counts_is_put_and_the_rest_is_the_input_or_0) {
  for (const Implementation& implementation : runnable()) {
    for (std::int64_t n = 0; n <= kMost; ++n) {
      for (const Place place : guarded::kPlaces) {
        for (const std::int64_t times : {1, 3}) {
          if (times > 1 && n < kernels::kVectorColumns) continue;
          expect_counted<float>(implementation, n, times, place);
          expect_counted<double>(implementation, n, times, place);
        }
      }
    }
  }
}

template <class T>
void expect_kept_bits(const Implementation& implementation, std::int64_t n, Place place) {
  static Array<T> of_to, of_from;
  static Array<std::uint8_t> of_bits;
  const Kernels<T>& k = implementation.table->of<T>();
  Generator g(83);
  const auto from = fill<T>(g, n, Values::not_finite);
  for (std::int64_t first_bit = 0; first_bit < 16; ++first_bit) {
    std::vector<std::uint8_t> bits(static_cast<std::size_t>((first_bit + n + 7) / 8 + 4));
    for (auto& byte : bits) byte = static_cast<std::uint8_t>(g.next());
    std::vector<T> kept = from;
    for (std::size_t e = 0; e < kept.size(); ++e) {
      const std::size_t bit = static_cast<std::size_t>(first_bit) + e;
      if (((bits[bit / 8] >> (bit % 8)) & 1) == 0) kept[e] = 0;
    }
    const T* values = of_from.place(from, place, 2);
    const std::uint8_t* given = of_bits.place(bits, place);
    const auto apart = [&](T* to) { k.keep_bits(values, given, first_bit, n, to); };
    const auto in_place = [&](T* to) { k.keep_bits(to, given, first_bit, n, to); };
    EXPECT(data::same_bits(written(of_to, canaries<T>(n), n, place, apart), kept) &&
               data::same_bits(written(of_to, from, n, place, in_place), kept) && of_from.untouched() &&
               of_bits.untouched(),
           implementation.name, " ", n, " values, items of ", sizeof(T), " bytes, first bit ", first_bit, ", ",
           guarded::name(place));
  }
}
TEST(what_has_a_bit_is_kept) {
  for (const Implementation& implementation : runnable()) {
    for (std::int64_t n = 0; n <= kMost; ++n) {
      for (const Place place : guarded::kPlaces) {
        expect_kept_bits<float>(implementation, n, place);
        expect_kept_bits<double>(implementation, n, place);
      }
    }
  }
}

template <class W>
void expect_repeated_weights(const Implementation& implementation, std::int64_t rows, std::int64_t channels,
                             std::int64_t inner) {
  static Array<W> of_weights, of_to;
  Generator g(81);
  const std::vector<W> w = fill<W>(g, rows * inner);
  std::vector<W> wanted;
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t c = 0; c < channels; ++c) {
      wanted.insert(wanted.end(), w.begin() + r * inner, w.begin() + (r + 1) * inner);
    }
  }
  const auto n = static_cast<std::int64_t>(wanted.size());
  for (const Place place : guarded::kPlaces) {
    const W* given = of_weights.place(w, place, 2);
    auto to = written(of_to, canaries<W>(n + kLanes), n + kLanes, place, [&](W* values) {
      implementation.table->of<W>().repeat_weights(given, rows, channels, inner, values);
    });
    to.resize(wanted.size());
    EXPECT(data::same_bits(to, wanted) && of_weights.untouched(), implementation.name, " ", rows, " x ", channels,
           " x ", inner, ", items of ", sizeof(W), " bytes, ", guarded::name(place));
  }
}
TEST(weights_are_repeated_for_the_channels_of_a_row) {
  for (const Implementation& implementation : runnable()) {
    for (std::int64_t channels = 1; channels <= 40; ++channels) {
      for (std::int64_t inner = 1; inner <= 16; ++inner) {
        for (const std::int64_t rows : {0, 1, 2, 5}) {
          expect_repeated_weights<float>(implementation, rows, channels, inner);
          expect_repeated_weights<double>(implementation, rows, channels, inner);
        }
        for (const std::int64_t rows : {16, 33}) {
          if (inner == 1) expect_repeated_weights<float>(implementation, rows, channels, inner);
        }
      }
    }
  }
}

template <class W>
void expect_counts(const Implementation& implementation, std::int64_t n, bool are_good, Place place) {
  static Array<W> memory;
  Generator g(82);
  constexpr W kBad[] = {-1, std::numeric_limits<W>::infinity(), std::numeric_limits<W>::quiet_NaN(), W(-0.0), 1};
  std::vector<W> w;
  kernels::WeightCounts wanted;
  ExactSum total;
  for (std::int64_t e = 0; e < n; ++e) {
    w.push_back(are_good ? weight<W>(g) : kBad[g.below(5)]);
    wanted.zeros += w.back() == 0;
    wanted.ones += w.back() == 1;
    wanted.good += w.back() >= 0 && std::isfinite(w.back());
    if (w.back() > 0) wanted.least = std::min(wanted.least, static_cast<double>(w.back()));
    if (std::isfinite(w.back())) total.add(w.back());
  }
  const kernels::WeightCounts got = implementation.table->of<W>().count_weights(memory.place(w, place, 1), n);
  const std::string what =
      expect::text(implementation.name, " ", n, " weights, items of ", sizeof(W), " bytes, ", guarded::name(place));
  EXPECT(got.zeros == wanted.zeros && got.ones == wanted.ones && got.good == wanted.good, what);
  EXPECT_EQUAL(got.least, wanted.least);
  EXPECT(memory.untouched(), what);
  const DoubleDouble error = total.value() - two_sum(got.total, got.total_lo);
  EXPECT(!are_good || std::abs(error.hi) <= static_cast<double>(n * n) * 0x1p-100, error.hi, " ", what);
}
TEST(weights_are_counted_and_summed_to_about_100_bits) {
  for (const Implementation& implementation : runnable()) {
    for (std::int64_t n = 0; n <= kMost; ++n) {
      for (const Place place : guarded::kPlaces) {
        for (const bool are_good : {false, true}) {
          expect_counts<float>(implementation, n, are_good, place);
          expect_counts<double>(implementation, n, are_good, place);
        }
      }
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  guarded::describe_call = described;
  guarded::report_faults();
  return expect::run_tests(argc > 1 ? argv[1] : nullptr);
}
