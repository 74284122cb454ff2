// Segments: each is a Problem of its own, in a place of its own.
#include "batchnorm/segments.hpp"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <new>
#include <vector>

#include "check.hpp"
#include "double_double.hpp"
#include "floating_point.hpp"
#include "parallel.hpp"
#include "passes.hpp"
#include "workspace.hpp"

namespace batchnorm {
namespace {

// Segments shared out among threads, where there are enough of them; else each by all threads.
constexpr std::int64_t kSegmentsAThread = 4;
// Segments claimed at a time: claiming one costs about 50 ns, a small segment some microseconds.
constexpr std::int64_t kGrain = 4;

struct Segment {
  std::int64_t first_row, rows;
};

// f(s, Segment, threads, PartOf) for every segment that has rows. What can fail is done by the constructor: a task must
// not fail, and outputs change when no other can any more.
template <class F>
class EachSegment {
 public:
  EachSegment(std::span<const std::int64_t> offsets, const Problem& problem, int threads, const F& f)
      : offsets_(offsets), whole_(problem.size()), f_(f), threads_(available_threads(threads)) {
    active_implementation();  // throws where BATCHNORM_ISA names none
    shared_ = count() >= kSegmentsAThread * threads_;
    threads_each_ = shared_ ? 1 : threads_;
    const std::size_t bytes = memory_of_one();
    if (bytes <= PassWorkspace::kOnStack) return;
    const int at_once = shared_ ? threads_ : 1;
    if (__builtin_mul_overflow(bytes, static_cast<std::size_t>(at_once), &bytes_)) throw std::bad_alloc();
    memory_ = Workspace::allocate(bytes_);
    bytes_ = bytes;
    free_.store(~std::uint64_t{0} >> (64 - at_once), std::memory_order_relaxed);
  }

  void run() {
    if (!shared_) return run({0, count()});
    const Phase phase{count(), kGrain, false,
                      [](void* self, Range range) noexcept { static_cast<EachSegment*>(self)->run(range); }};
    run_phases(threads_, &phase, 1, this);
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
    std::int64_t seen[kSeen] = {};
    std::size_t most = 0;
    for (std::int64_t s = 0; s < count(); ++s) {
      const Segment part = segment(s);
      std::int64_t& same = seen[static_cast<std::size_t>(part.rows) % kSeen];
      if (part.rows == same) continue;  // no rows need nothing
      same = part.rows;
      f_(s, part, threads_each_, PartOf{.size = whole_, .needed = &most});
    }
    return most;
  }

  void run(Range segments) {
    const DefaultFloatingPoint environment(DefaultFloatingPoint::ForManyCalls{});
    const int place = memory_ == nullptr ? 0 : take_place();
    const PartOf part{
        .size = whole_,
        .memory = memory_ == nullptr ? nullptr : memory_.get() + static_cast<std::size_t>(place) * bytes_};
    for (std::int64_t s = segments.begin; s < segments.end; ++s) {
      const Segment one = segment(s);
      if (one.rows > 0) f_(s, one, threads_each_, part);
    }
    if (memory_ != nullptr) free_.fetch_or(std::uint64_t{1} << place, std::memory_order_release);
  }
  // There are as many places as threads, so that one is free.
  int take_place() {
    std::uint64_t free = free_.load(std::memory_order_relaxed);
    while (
        !free_.compare_exchange_weak(free, free & (free - 1), std::memory_order_acquire, std::memory_order_relaxed)) {
    }
    return std::countr_zero(free);
  }

  std::span<const std::int64_t> offsets_;
  std::int64_t whole_;
  const F& f_;
  int threads_, threads_each_ = 1;
  bool shared_ = false;
  std::size_t bytes_ = 0;  // of one place
  Workspace::Heap memory_;
  std::atomic<std::uint64_t> free_{0};  // bits of places
};

Problem problem_of(const Segment& segment, const Problem& p) { return {segment.rows, p.channels, p.inner}; }

void check_segments(const Problem& problem, std::span<const std::int64_t> offsets, const Options& options) {
  check::problem(problem);
  check::threads(options.threads);
  check::offsets(offsets, problem);
}
std::size_t entries(std::span<const std::int64_t> offsets, const Problem& problem) {
  return (offsets.size() - 1) * static_cast<std::size_t>(problem.channels);
}

// Sums over segments of one value per segment and channel, first segment first, errors kept.
class SumsOverSegments {
 public:
  SumsOverSegments(const std::vector<double>& values, std::int64_t channels, ChannelOutput out)
      : values_(values), channels_(channels), out_(out) {}

  void run(int threads) {
    const Phase phase{(channels_ + kTogether - 1) / kTogether, 1, false,
                      [](void* self, Range range) noexcept { static_cast<SumsOverSegments*>(self)->sum(range); }};
    run_phases(available_threads(threads), &phase, 1, this);
  }

 private:
  static constexpr std::int64_t kTogether = 64;

  void sum(Range parts) {
    for (std::int64_t part = parts.begin; part < parts.end; ++part) {
      const std::int64_t first = part * kTogether, n = std::min(kTogether, channels_ - first);
      DoubleDouble total[kTogether];
      for (std::size_t at = static_cast<std::size_t>(first); at < values_.size();
           at += static_cast<std::size_t>(channels_)) {
        for (std::int64_t c = 0; c < n; ++c) {
          const DoubleDouble sum = two_sum(total[c].hi, values_[at + static_cast<std::size_t>(c)]);
          total[c] = {sum.hi, total[c].lo + sum.lo};
        }
      }
      for (std::int64_t c = 0; c < n; ++c) {
        // The error of an infinite sum is none.
        out_.set(first + c, std::isfinite(total[c].hi) ? total[c].hi + total[c].lo : total[c].hi);
      }
    }
  }

  const std::vector<double>& values_;
  std::int64_t channels_;
  ChannelOutput out_;
};

}  // namespace

template <class T>
void segment_moments(std::span<const T> x, const Problem& problem, std::span<const std::int64_t> offsets,
                     std::span<Moments> out, const Options& options) {
  const DefaultFloatingPoint environment;
  check_segments(problem, offsets, options);
  check::size("x", x.size(), problem);
  check::entries("out", out.size(), entries(offsets, problem));
  check::apart({{"out", out}}, {{"x", x}, {"offsets", offsets}});
  const std::int64_t width = problem.channels * problem.inner;
  const auto of_segment = [&](std::int64_t s, const Segment& segment, int threads, const PartOf& part) {
    run_moments(x.data() + segment.first_row * width, problem_of(segment, problem), out.data() + s * problem.channels,
                threads, part);
  };
  EachSegment each(offsets, problem, options.threads, of_segment);
  std::fill(out.begin(), out.end(), Moments{});
  each.run();
}

template <class T>
void segment_batch_norm(std::span<const T> x, const Problem& problem, std::span<const std::int64_t> offsets,
                        ChannelValues gamma, ChannelValues beta, double eps, std::span<T> y, std::span<Moments> saved,
                        const Options& options) {
  const DefaultFloatingPoint environment;
  check_segments(problem, offsets, options);
  check::size("x", x.size(), problem);
  check::channels_or_absent("gamma", gamma, problem);
  check::channels_or_absent("beta", beta, problem);
  check::eps(eps);
  check::size("y", y.size(), problem);
  check::no_partial_overlap("y", y.data(), "x", x.data(), x.size_bytes());
  check::entries("saved", saved.size(), entries(offsets, problem));
  check::apart({{"saved", saved}}, {{"x", x}, {"y", y}});
  for (const check::Memory& output : {check::Memory{"saved", saved}, {"y", y}}) {
    check::apart({output}, {{"offsets", offsets}, {"gamma", gamma}, {"beta", beta}});
  }
  const std::int64_t width = problem.channels * problem.inner;
  const auto of_segment = [&](std::int64_t s, const Segment& segment, int threads, const PartOf& part) {
    const std::int64_t at = segment.first_row * width;
    run_batch_norm(x.data() + at, problem_of(segment, problem), gamma, beta, eps, y.data() + at,
                   saved.data() + s * problem.channels, threads, part);
  };
  EachSegment each(offsets, problem, options.threads, of_segment);
  std::fill(saved.begin(), saved.end(), Moments{});
  each.run();
}

template <class T>
void segment_batch_norm_backward(std::span<const T> dy, std::span<const T> x, const Problem& problem,
                                 std::span<const std::int64_t> offsets, std::span<const Moments> saved,
                                 ChannelValues gamma, double eps, std::span<T> dx, ChannelOutput dgamma,
                                 ChannelOutput dbeta, const Options& options) {
  const DefaultFloatingPoint environment;
  check_segments(problem, offsets, options);
  check::size("dy", dy.size(), problem);
  check::size("x", x.size(), problem);
  check::entries("saved", saved.size(), entries(offsets, problem));
  check::counts("saved", saved);
  check::counts_of_segments("saved", saved, offsets, problem);
  check::gradients(dy, x, problem, gamma, eps, dx, dgamma, dbeta);
  check::apart({{"dx", dx}, {"dgamma", dgamma}, {"dbeta", dbeta}}, {{"offsets", offsets}, {"saved", saved}});
  std::vector<double> of_gamma(dgamma.wanted() ? saved.size() : 0), of_beta(dbeta.wanted() ? saved.size() : 0);
  const auto channels = static_cast<std::size_t>(problem.channels);
  const std::int64_t width = problem.channels * problem.inner;
  const auto of_segment = [&](std::int64_t s, const Segment& segment, int threads, const PartOf& of) {
    const std::size_t first = static_cast<std::size_t>(s) * channels;
    const std::int64_t at = segment.first_row * width;
    const auto part = [&](std::vector<double>& all) {
      return all.empty() ? ChannelOutput{} : ChannelOutput(std::span<double>(all).subspan(first, channels));
    };
    run_batch_norm_backward(dy.data() + at, x.data() + at, problem_of(segment, problem), saved.data() + first, gamma,
                            eps, dx.empty() ? nullptr : dx.data() + at, part(of_gamma), part(of_beta), threads, of);
  };
  EachSegment(offsets, problem, options.threads, of_segment).run();
  if (dgamma.wanted()) SumsOverSegments(of_gamma, problem.channels, dgamma).run(options.threads);
  if (dbeta.wanted()) SumsOverSegments(of_beta, problem.channels, dbeta).run(options.threads);
}

#define BN_INSTANTIATE(T)                                                                                              \
  template void segment_moments(std::span<const T>, const Problem&, std::span<const std::int64_t>, std::span<Moments>, \
                                const Options&);                                                                       \
  template void segment_batch_norm(std::span<const T>, const Problem&, std::span<const std::int64_t>, ChannelValues,   \
                                   ChannelValues, double, std::span<T>, std::span<Moments>, const Options&);           \
  template void segment_batch_norm_backward(std::span<const T>, std::span<const T>, const Problem&,                    \
                                            std::span<const std::int64_t>, std::span<const Moments>, ChannelValues,    \
                                            double, std::span<T>, ChannelOutput, ChannelOutput, const Options&);
BN_INSTANTIATE(Float16)
BN_INSTANTIATE(BFloat16)
BN_INSTANTIATE(float)
BN_INSTANTIATE(double)
#undef BN_INSTANTIATE

}  // namespace batchnorm
