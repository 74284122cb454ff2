// A call whose arguments are checked, one after the other, and then run: whole, or segment by segment.
#pragma once

#include <span>
#include <vector>

#include "arguments.hpp"
#include "segments.hpp"

namespace batchnorm {

// Of the CPU, which looks at values too.
template <class T>
class CheckedCall : public Arguments<T> {
 public:
  CheckedCall(const Call<T>& call, const Options& options) : Arguments<T>(call) {
    check::threads(options.threads);
    whole_.options.threads = options.threads;
    if (!call.counted.weights.empty()) sum_weights();
  }

  // ---- values, beside what Arguments checks ----

  // Moments that are read to take gradients: of at least one value, where there are some and all count.
  void reads_counts(const char* name, std::span<const Moments> moments) {
    this->reads_entries(name, moments);
    if (check::all_count(moments)) return;
    check::counts(name, moments);
    if (!call_.counted.weights.empty() || call_.problem.size() == 0) return;
    if (!by_segments()) return check::counts_of_values(name, moments, -1);
    const auto& offsets = call_.groups.offsets;
    const auto channels = static_cast<std::size_t>(call_.problem.channels / call_.groups.width);
    for (std::size_t s = 0; s + 1 < offsets.size(); ++s) {
      if (offsets[s + 1] == offsets[s]) continue;
      check::counts_of_values(name, moments.subspan(s * channels, channels), static_cast<std::int64_t>(s));
    }
  }
  void reads_statistics(const ChannelValues& mean, const ChannelValues& var) {
    this->reads_given(mean, var);
    check::variances(var);
  }

  // ---- what the call adds, by what the function does ----

  // The bits of y: where they begin.
  void follow(const T* y) {
    Arguments<T>::follow();
    if (whole_.tail.bits != nullptr && by_segments()) whole_.tail.first_bit = values_past_line(y);
  }
  void let_through() {
    Arguments<T>::let_through();
    if (whole_.tail.bits != nullptr) whole_.tail.first_bit = call_.tail.bits[0] % kernels::kVectorColumns;
  }
  // Forward-mode: the residual is a tangent.
  void follow_along() {
    this->follow_residual();
    let_through();
  }

  // ---- then ----

  // A variance is wanted of every group; those of segments may be 0, and about 0 or a share of the mean one value has
  // one.
  void check_batch() const {
    if (by_segments() || whole_.is_grouped() || whole_.each_position) return;
    if (call_.counted.weights.empty()) return check::batch_values(call_.problem);
    check::counted_positions(whole_.summary.counted, call_.problem);
  }

  // f(PassCall, its place in tensors, its place in tables), of all or of each segment, or part of one. What can fail
  // has been done when the first begins. `read_twice`: how many tensors are.
  template <class F>
  void run(const F& f, int read_twice = 0) const {
    if (!by_segments() && whole_.is_grouped() && !whole_.each_position) return run_in_memory(f);
    if (!by_segments()) return f(whole_, std::int64_t{0}, std::int64_t{0});
    const Problem& p = call_.problem;
    const auto of_segment = [&](const Segment& segment, const PassOptions& options) {
      const std::int64_t c = segment.channels.begin;
      f(part(segment, options), (segment.first_row * p.channels + c) * p.inner, segment.number * p.channels + c);
    };
    EachSegment each(call_.groups.offsets, p, channels_at_once(read_twice), whole_.options.threads, of_segment);
    whole_.write_head(whole_.tail.first_bit);
    each.run();
  }

 private:
  using W = kernels::WeightOf<T>;

  // Of several passes one after the other: with the memory that any of them needs, asked for before the first writes.
  // The threads that are counted on are those that run, whatever becomes of the limit of the process meanwhile.
  template <class F>
  void run_in_memory(const F& f) const {
    std::size_t needed = 0;
    PassCall<T> all = whole_;
    const int threads = available_threads(whole_.options.threads);
    all.options = {.threads = threads, .needed = &needed};
    f(all, std::int64_t{0}, std::int64_t{0});
    const Workspace::Heap memory = Workspace::allocate(needed);
    all.options = {.threads = threads, .memory = memory.get()};
    f(all, std::int64_t{0}, std::int64_t{0});
  }

  // Groups of channels are summed and then applied while they are in cache, where they lie in one place.
  [[nodiscard]] std::int64_t channels_at_once(int read_twice) const {
    const Problem& p = call_.problem;
    const auto segments = static_cast<std::int64_t>(call_.groups.offsets.size()) - 1;
    if (read_twice == 0 || !whole_.is_grouped() || whole_.strided || segments != p.outer || segments == 0)
      return p.channels;
    for (std::int64_t s = 0; s < segments; ++s) {
      if (call_.groups.offsets[static_cast<std::size_t>(s)] != s) return p.channels;
    }
    return channels_a_part({1, p.channels, p.inner}, whole_.width, segments,
                           read_twice * static_cast<std::int64_t>(sizeof(T)), machine(),
                           available_threads(whole_.options.threads));
  }

  void sum_weights() {
    const std::span<const W> weights = call_.counted.weights;
    if (!by_segments()) {
      whole_.summary = summary_of(0, weights.size());
      whole_.positions.is_mask = whole_.summary.is_mask;
      return;
    }
    const auto offsets = call_.groups.offsets;
    summaries_.reserve(offsets.size() - 1);
    const auto inner = static_cast<std::size_t>(call_.problem.inner);
    for (std::size_t s = 0; s + 1 < offsets.size(); ++s) {
      const std::size_t first = static_cast<std::size_t>(offsets[s]) * inner;
      summaries_.push_back(summary_of(first, static_cast<std::size_t>(offsets[s + 1]) * inner - first));
    }
  }
  [[nodiscard]] WeightSummary summary_of(std::size_t first, std::size_t count) const {
    const std::span<const W> weights = call_.counted.weights.subspan(first, count);
    const WeightSummary summary = summarize(weights, whole_.options.threads);
    const W bad = summary.bad < 0 ? W{} : weights[static_cast<std::size_t>(summary.bad)];
    check::weights(summary.bad < 0 ? -1 : static_cast<std::int64_t>(first) + summary.bad, static_cast<double>(bad),
                   summary.total.hi);
    return summary;
  }

  [[nodiscard]] PassCall<T> part(const Segment& segment, const PassOptions& options) const {
    PassCall<T> part = whole_;
    part.options = options;
    const Problem& p = call_.problem;
    const Range channels = segment.channels;
    const std::int64_t position = segment.first_row * p.inner, at = position * p.channels + channels.begin * p.inner;
    part.problem = {segment.rows, channels.end - channels.begin, p.inner};
    const auto of_part = [&](const ChannelValues& values) {
      return this->part_of(values, segment.number * p.channels + channels.begin, part.problem.channels);
    };
    part.gamma = of_part(call_.gamma), part.beta = of_part(call_.beta), part.alpha = of_part(whole_.alpha);
    if (part.positions) {
      part.summary = summaries_[static_cast<std::size_t>(segment.number)];
      part.positions.values += position;
      part.positions.is_mask = part.summary.is_mask;
    }
    if (part.tail.residual != nullptr) part.tail.residual += at;
    part.tail.first_bit += at;
    part.bits_head = nullptr;
    return part;
  }

  using Arguments<T>::by_segments;
  using Arguments<T>::call_;
  using Arguments<T>::whole_;

  std::vector<WeightSummary> summaries_;
};

}  // namespace batchnorm
