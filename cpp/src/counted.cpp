#include "counted.hpp"

#include <algorithm>
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
                                            counts.zeros + counts.ones == n, counts.good == n, counts.least};
    }
  }
};

}  // namespace

template <class W>
WeightSummary summarize(std::span<const W> weights, int threads) {
  const auto count = (static_cast<std::int64_t>(weights.size()) + kChunk - 1) / kChunk;
  Chunks<W> chunks{.weights = weights, .parts = std::vector<typename Chunks<W>::Part>(static_cast<std::size_t>(count))};
  // One chunk is counted here: on a small stack each phase is a thread of its own, and segments are many.
  count > 1 ? run_tasks(available_threads(threads), count, [&](Range range) { chunks.summarize(range); })
            : chunks.summarize({0, count});
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
