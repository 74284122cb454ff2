// Segments: each is a Problem of its own, in a place of its own.
#include "batchnorm/segments.hpp"

#include <algorithm>
#include <atomic>
#include <new>
#include <vector>

#include "check.hpp"
#include "double_double.hpp"
#include "floating_point.hpp"
#include "parallel.hpp"
#include "passes.hpp"

namespace batchnorm {
namespace {

// Segments shared out among threads, where there are enough of them; else each by all threads.
constexpr std::int64_t kSegmentsAThread = 4;
// Segments claimed at a time: claiming one costs about 50 ns, a small segment some microseconds.
constexpr std::int64_t kGrain = 4;

struct Segment {
  std::int64_t first_row, rows;
};

// f(s, Segment, threads) for every segment that has rows. A task must not throw, so that memory that is not there is
// told afterwards.
template <class F>
void for_segments(std::span<const std::int64_t> offsets, int threads, const F& f) {
  struct Context {
    std::span<const std::int64_t> offsets;
    const F& f;
    int threads_each;
    std::atomic<bool> out_of_memory{false};

    void run(Range segments) {
      const DefaultFloatingPoint environment(DefaultFloatingPoint::ForManyCalls{});
      try {
        for (std::int64_t s = segments.begin; s < segments.end; ++s) {
          const std::int64_t first = offsets[static_cast<std::size_t>(s)];
          const std::int64_t rows = offsets[static_cast<std::size_t>(s) + 1] - first;
          if (rows > 0) f(s, Segment{first, rows}, threads_each);
        }
      } catch (const std::bad_alloc&) {
        out_of_memory = true;
      }
    }
  };
  const auto count = static_cast<std::int64_t>(offsets.size()) - 1;
  const int available = available_threads(threads);
  const bool shared = count >= kSegmentsAThread * available;
  Context context{offsets, f, shared ? 1 : available};
  if (shared) {
    const Phase phase{count, kGrain, false, [](void* self, Range range) { static_cast<Context*>(self)->run(range); }};
    run_phases(available, &phase, 1, &context);
  } else {
    context.run({0, count});
  }
  if (context.out_of_memory) throw std::bad_alloc();
}

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
                      [](void* self, Range range) { static_cast<SumsOverSegments*>(self)->sum(range); }};
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
      for (std::int64_t c = 0; c < n; ++c) out_.set(first + c, total[c].hi + total[c].lo);
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
  std::fill(out.begin(), out.end(), Moments{});
  const std::int64_t width = problem.channels * problem.inner;
  for_segments(offsets, options.threads, [&](std::int64_t s, const Segment& segment, int threads) {
    run_moments(x.data() + segment.first_row * width, problem_of(segment, problem), out.data() + s * problem.channels,
                threads);
  });
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
  std::fill(saved.begin(), saved.end(), Moments{});
  const std::int64_t width = problem.channels * problem.inner;
  for_segments(offsets, options.threads, [&](std::int64_t s, const Segment& segment, int threads) {
    const std::int64_t at = segment.first_row * width;
    run_batch_norm(x.data() + at, problem_of(segment, problem), gamma, beta, eps, y.data() + at,
                   saved.data() + s * problem.channels, threads, problem.size());
  });
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
  check::channels_or_absent("gamma", gamma, problem);
  check::eps(eps);
  if (!dx.empty()) {
    check::size("dx", dx.size(), problem);
    check::no_partial_overlap("dx", dx.data(), "dy", dy.data(), dy.size_bytes());
    check::no_partial_overlap("dx", dx.data(), "x", x.data(), x.size_bytes());
  }
  if (dgamma.wanted()) check::channels("dgamma", dgamma.size(), problem);
  if (dbeta.wanted()) check::channels("dbeta", dbeta.size(), problem);
  std::vector<double> of_gamma(dgamma.wanted() ? saved.size() : 0), of_beta(dbeta.wanted() ? saved.size() : 0);
  const auto channels = static_cast<std::size_t>(problem.channels);
  const std::int64_t width = problem.channels * problem.inner;
  for_segments(offsets, options.threads, [&](std::int64_t s, const Segment& segment, int threads) {
    const std::size_t first = static_cast<std::size_t>(s) * channels;
    const std::int64_t at = segment.first_row * width;
    const auto part = [&](std::vector<double>& all) {
      return all.empty() ? ChannelOutput{} : ChannelOutput(std::span<double>(all).subspan(first, channels));
    };
    run_batch_norm_backward(dy.data() + at, x.data() + at, problem_of(segment, problem), saved.data() + first, gamma,
                            eps, dx.empty() ? nullptr : dx.data() + at, part(of_gamma), part(of_beta), threads,
                            problem.size());
  });
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
