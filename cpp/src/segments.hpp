// The segments of a call, each of which is a Problem of its own in a place of its own; and parts of their channels.
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
  std::int64_t number, first_row, rows;
  Range channels;
};

// f(Segment, PassOptions) for every segment, or for each part of its channels, of `a_part` of them. What can fail is
// done by the constructor: a task must not fail, and outputs change when no other can any more.
template <class F>
class EachSegment {
 public:
  EachSegment(std::span<const std::int64_t> offsets, const Problem& problem, std::int64_t a_part, int threads,
              const F& f)
      : offsets_(offsets),
        problem_(problem),
        a_part_(a_part),
        parts_(a_part >= problem.channels ? 1 : (problem.channels + a_part - 1) / a_part),
        f_(f),
        threads_(available_threads(threads)) {
    active_implementation();  // throws where BATCHNORM_ISA names none
    shared_ = count() >= kSegmentsAThread * threads_;
    threads_each_ = shared_ ? 1 : threads_;
    const std::size_t bytes = memory_of_one();
    memory_.emplace(bytes <= PassWorkspace::kOnStack ? 0 : bytes, shared_ ? threads_ : 1);
  }

  void run() {
    if (!shared_) return run({0, count()});
    run_tasks(threads_, count(), [this](Range some) { run(some); }, kGrain);
  }

 private:
  [[nodiscard]] std::int64_t count() const { return (static_cast<std::int64_t>(offsets_.size()) - 1) * parts_; }
  [[nodiscard]] Segment segment(std::int64_t k) const {
    const std::int64_t s = k / parts_, first = offsets_[static_cast<std::size_t>(s)], c = (k - s * parts_) * a_part_;
    return {s, first, offsets_[static_cast<std::size_t>(s) + 1] - first, {c, std::min(c + a_part_, problem_.channels)}};
  }

  // What the greediest segment needs. Segments of as many rows need the same, which a table of those seen last spares;
  // the first part of one has as many channels as any.
  [[nodiscard]] std::size_t memory_of_one() const {
    constexpr std::size_t kSeen = 128;
    std::int64_t seen[kSeen];
    std::fill_n(seen, kSeen, -1);
    std::size_t most = 0;
    for (std::int64_t k = 0; k < count(); k += parts_) {
      const Segment one = segment(k);
      std::int64_t& same = seen[static_cast<std::size_t>(one.rows) % kSeen];
      if (one.rows == same) continue;
      same = one.rows;
      f_(one, PassOptions{.threads = threads_each_, .whole_size = problem_.size(), .needed = &most});
    }
    return most;
  }

  void run(Range some) {
    const DefaultFloatingPoint environment(DefaultFloatingPoint::ForManyCalls{});
    const ThreadMemory::Place place(*memory_);
    const PassOptions options{.threads = threads_each_, .whole_size = problem_.size(), .memory = place.begin()};
    for (std::int64_t k = some.begin; k < some.end; ++k) f_(segment(k), options);
  }

  std::span<const std::int64_t> offsets_;
  Problem problem_;
  std::int64_t a_part_, parts_;
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
