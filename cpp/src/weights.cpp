#include "weights.hpp"

#include <algorithm>
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

// The least of the weights that are not 0, and 1.
template <class W>
double least_of(const W* w, std::int64_t n) {
  W least = 1;
  for (std::int64_t i = 0; i < n; ++i) {
    const W some = w[i] > 0 ? w[i] : W(1);
    least = some < least ? some : least;
  }
  return static_cast<double>(least);
}

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
      const kernels::WeightCounts counts = table.weighted<W>().count(w, n);
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
  run_phases(count > 1 ? available_threads(threads) : 1, &phase, 1, &chunks);
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
