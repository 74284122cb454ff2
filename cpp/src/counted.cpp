#include "counted.hpp"

#include <algorithm>
#include <bit>
#include <cstdint>
#include <limits>
#include <vector>

#include "dispatch.hpp"
#include "double_double.hpp"
#include "parallel.hpp"

namespace batchnorm {
namespace {

// Weights that one task counts. Two tasks are shared out already: inference under a mask of 65536 weights took 0.93 of
// the time, training with as many weights 0.82, when four chunks were.
constexpr std::int64_t kChunk = 16 * 1024;

// The least of the weights that are not 0, and 1; for float32, whose range it matters to. As integers, which compilers
// compare by vectors: those of floats that are not negative are in the same order, and 0 becomes the largest.
double least_of(const float* w, std::int64_t n) {
  constexpr std::uint32_t kSign = 0x8000'0000u;
  std::int32_t least = std::numeric_limits<std::int32_t>::max();
  for (std::int64_t i = 0; i < n; ++i) {
    least = std::min(least, static_cast<std::int32_t>((std::bit_cast<std::uint32_t>(w[i]) - 1) ^ kSign));
  }
  const auto found = std::bit_cast<float>((static_cast<std::uint32_t>(least) ^ kSign) + 1);
  return found > 0 && found < 1 ? static_cast<double>(found) : 1;
}
double least_of(const double*, std::int64_t) { return 1; }

template <class W>
struct Chunks {
  struct Part {
    DoubleDouble total;
    std::int64_t counted = 0;
    bool is_mask = true, good = true;
    double least = 1;
  };
  std::span<const W> weights;
  std::vector<Part> parts;
  const kernels::KernelTable& table = *active_implementation().table;  // which may throw, as a task may not

  void summarize(Range chunks) {
    for (std::int64_t k = chunks.begin; k < chunks.end; ++k) {
      const W* w = weights.data() + k * kChunk;
      const std::int64_t n = std::min(kChunk, static_cast<std::int64_t>(weights.size()) - k * kChunk);
      const kernels::WeightCounts counts = table.of<W>().count_weights(w, n);
      parts[static_cast<std::size_t>(k)] = {two_sum(counts.total, counts.total_lo), n - counts.zeros,
                                            counts.zeros + counts.ones == n, counts.good == n,
                                            counts.zeros + counts.ones == n ? 1 : least_of(w, n)};
    }
  }
};

}  // namespace

template <class W>
WeightSummary summarize(std::span<const W> weights, int threads) {
  const auto count = (static_cast<std::int64_t>(weights.size()) + kChunk - 1) / kChunk;
  Chunks<W> chunks{.weights = weights, .parts = std::vector<typename Chunks<W>::Part>(static_cast<std::size_t>(count))};
  const Phase phase{count, 1, false,
                    [](void* self, Range range) noexcept { static_cast<Chunks<W>*>(self)->summarize(range); }};
  // One chunk is counted here: on a small stack each phase is a thread of its own, and segments are many.
  count > 1 ? run_phases(available_threads(threads), &phase, 1, &chunks) : chunks.summarize({0, count});
  WeightSummary result;
  for (const auto& part : chunks.parts) {
    result.total = result.total + part.total;
    result.counted += part.counted;
    result.is_mask &= part.is_mask;
    result.least = std::min(result.least, part.least);
    if (!part.good && result.bad < 0) {
      const auto is_bad = [](W w) { return !(w >= 0 && w <= std::numeric_limits<W>::max()); };
      result.bad = std::find_if(weights.begin(), weights.end(), is_bad) - weights.begin();
    }
  }
  return result;
}

template WeightSummary summarize(std::span<const float>, int);
template WeightSummary summarize(std::span<const double>, int);

}  // namespace batchnorm
