// The segments of a call, each of which is a Problem of its own in a place of its own.
#pragma once

#include <algorithm>
#include <cmath>
#include <optional>
#include <span>
#include <vector>

#include "double_double.hpp"
#include "floating_point.hpp"
#include "parallel.hpp"
#include "passes.hpp"
#include "workspace.hpp"

namespace batchnorm {

// Segments shared out among threads, where there are enough of them; else each by all threads.
constexpr std::int64_t kSegmentsAThread = 4;
// Segments claimed at a time: claiming one costs about 50 ns, a small segment some microseconds.
constexpr std::int64_t kGrain = 4;

struct Segment {
  std::int64_t first_row, rows;
};

// f(s, Segment, PassOptions) for every segment. What can fail is done by the constructor: a task must not fail, and
// outputs change when no other can any more.
template <class F>
class EachSegment {
 public:
  EachSegment(std::span<const std::int64_t> offsets, const Problem& problem, int threads, const F& f)
      : offsets_(offsets), whole_(problem.size()), f_(f), threads_(available_threads(threads)) {
    active_implementation();  // throws where BATCHNORM_ISA names none
    shared_ = count() >= kSegmentsAThread * threads_;
    threads_each_ = shared_ ? 1 : threads_;
    const std::size_t bytes = memory_of_one();
    memory_.emplace(bytes <= PassWorkspace::kOnStack ? 0 : bytes, shared_ ? threads_ : 1);
  }

  void run() {
    if (!shared_) return run({0, count()});
    run_tasks(threads_, count(), [this](Range segments) { run(segments); }, kGrain);
  }

 private:
  [[nodiscard]] std::int64_t count() const { return static_cast<std::int64_t>(offsets_.size()) - 1; }
  [[nodiscard]] Segment segment(std::int64_t s) const {
    const std::int64_t first = offsets_[static_cast<std::size_t>(s)];
    return {first, offsets_[static_cast<std::size_t>(s) + 1] - first};
  }

  // What the greediest segment needs. Segments of as many rows need the same, which a table of those seen last spares.
  [[nodiscard]] std::size_t memory_of_one() const {
    constexpr std::size_t kSeen = 128;
    std::int64_t seen[kSeen];
    std::fill_n(seen, kSeen, -1);
    std::size_t most = 0;
    for (std::int64_t s = 0; s < count(); ++s) {
      const Segment one = segment(s);
      std::int64_t& same = seen[static_cast<std::size_t>(one.rows) % kSeen];
      if (one.rows == same) continue;
      same = one.rows;
      f_(s, one, PassOptions{.threads = threads_each_, .whole_size = whole_, .needed = &most});
    }
    return most;
  }

  void run(Range segments) {
    const DefaultFloatingPoint environment(DefaultFloatingPoint::ForManyCalls{});
    const ThreadMemory::Place place(*memory_);
    const PassOptions options{.threads = threads_each_, .whole_size = whole_, .memory = place.begin()};
    for (std::int64_t s = segments.begin; s < segments.end; ++s) f_(s, segment(s), options);
  }

  std::span<const std::int64_t> offsets_;
  std::int64_t whole_;
  const F& f_;
  int threads_, threads_each_ = 1;
  bool shared_ = false;
  std::optional<ThreadMemory> memory_;
};

// Sums over segments of one value per segment and channel, first segment first, errors kept.
inline void sum_over_segments(const std::vector<double>& values, std::int64_t channels, int threads,
                              const ChannelOutput& out) {
  constexpr std::int64_t kTogether = 64;
  const auto sum = [&](Range parts) {
    for (std::int64_t part = parts.begin; part < parts.end; ++part) {
      const std::int64_t first = part * kTogether, n = std::min(kTogether, channels - first);
      DoubleDouble total[kTogether];
      for (auto at = static_cast<std::size_t>(first); at < values.size(); at += static_cast<std::size_t>(channels)) {
        for (std::int64_t c = 0; c < n; ++c) {
          const DoubleDouble sum = two_sum(total[c].hi, values[at + static_cast<std::size_t>(c)]);
          total[c] = {sum.hi, total[c].lo + sum.lo};
        }
      }
      for (std::int64_t c = 0; c < n; ++c) {
        // The error of an infinite sum is none.
        out.set(first + c, std::isfinite(total[c].hi) ? total[c].hi + total[c].lo : total[c].hi);
      }
    }
  };
  run_tasks(available_threads(threads), (channels + kTogether - 1) / kTogether, sum);
}

}  // namespace batchnorm
