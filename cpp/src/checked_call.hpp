// A call whose arguments are checked, one after the other, and then run: whole, or segment by segment.
#pragma once

#include <span>
#include <vector>

#include "batchnorm/call.hpp"
#include "check.hpp"
#include "passes.hpp"
#include "segments.hpp"

namespace batchnorm {

inline std::int64_t bits_bytes(const Problem& problem) {
  // The head, a bit an element, up to 15 bits before them, and what kernels may read behind.
  return kBitsHead + (problem.size() + 15 + 7) / 8 + 4;
}

template <class T>
class CheckedCall {
 public:
  CheckedCall(const Call<T>& call, const Options& options)
      : call_(call),
        whole_{.problem = call.problem,
               .width = call.groups.width,
               .strided = call.groups.strided,
               .each_position = call.groups.each_position,
               .about_zero = call.groups.about == About::zero,
               .alpha = call.groups.alpha,
               .padding = call.counted.padding,
               .gamma = call.gamma,
               .beta = call.beta,
               .eps = call.eps,
               .options = {.threads = options.threads}} {
    check::problem(call.problem);
    check::named(call.groups, call.counted.padding);
    check::width(call.groups.width, call.problem);
    check::threads(options.threads);
    if (by_segments()) check::offsets(call.groups.offsets, call.problem);
    if (by_segments() && call.groups.each_position) check::no_segments(call.groups.offsets.size());
    if (call.groups.alpha.present()) check::alpha(call.groups, call.problem);
    memories_.reads("offsets", std::as_bytes(call.groups.offsets));
    memories_.reads("alpha", call.groups.alpha.bytes());
    reads("gamma", call.gamma);
    reads("beta", call.beta);
    check::eps(call.eps);
    if (!call.tail.residual.empty()) check::size("residual", call.tail.residual.size(), call.problem);
    if (!call.tail.bits.empty()) check_bits();
    if (!call.counted.weights.empty()) sum_weights();
  }

  // ---- arguments of the function: what is read, then what is written ----

  void reads(const char* name, std::span<const T> tensor) {
    check::size(name, tensor.size(), call_.problem);
    memories_.reads(name, std::as_bytes(tensor), true);
  }
  // Per channel, or per segment and channel; or absent.
  void reads(const char* name, const ChannelValues& values) {
    if (values.present()) check_channels(name, values.size());
    memories_.reads(name, values.bytes());
  }
  // One entry per channel, or per segment and channel; moments of each group of channels.
  template <class Entry>
  void reads_entries(const char* name, std::span<const Entry> table) {
    check_entries<Entry>(name, table.size());
    memories_.reads(name, std::as_bytes(table));
  }
  // Moments that are read to take gradients: of at least one value, where there are some and all count.
  void reads_counts(const char* name, std::span<const Moments> moments) {
    reads_entries(name, moments);
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
  // Statistics that are given are those of one group.
  void reads_statistics(const ChannelValues& mean, const ChannelValues& var) {
    check::one_group(call_);
    check::given("mean", mean, call_.problem.channels);
    check::given("var", var, call_.problem.channels);
    check::variances(var);
    memories_.reads("mean", mean.bytes());
    memories_.reads("var", var.bytes());
  }

  // A tensor: one that is read, or apart from all else.
  void writes(const char* name, std::span<T> tensor) {
    check::size(name, tensor.size(), call_.problem);
    memories_.writes(name, std::as_bytes(tensor), true);
  }
  void writes_apart(const char* name, std::span<T> tensor) {
    check::size(name, tensor.size(), call_.problem);
    memories_.writes(name, std::as_bytes(tensor));
  }
  void writes(const char* name, const ChannelOutput& values) {
    if (values.wanted()) check_channels(name, values.size());
    memories_.writes(name, values.bytes());
  }
  template <class Entry>
  void writes_entries(const char* name, std::span<Entry> table) {
    check_entries<Entry>(name, table.size());
    memories_.writes(name, std::as_bytes(table));
  }

  // ---- what the call adds, by what the function does ----

  // Forward: what follows is done, and bits are written.
  void follow(const T* y) {
    follow_residual();
    whole_.tail.relu = call_.tail.relu;
    if (call_.tail.bits.empty()) return;
    memories_.writes("bits", std::as_bytes(call_.tail.bits));
    whole_.bits_head = call_.tail.bits.data();
    whole_.tail.bits = call_.tail.bits.data() + kBitsHead;
    if (by_segments()) whole_.tail.first_bit = values_past_line(y);
  }
  // Backward: bits are read.
  void let_through() {
    if (!call_.tail.relu) return;
    check_bits();
    memories_.reads("bits", std::as_bytes(call_.tail.bits));
    whole_.tail.bits = call_.tail.bits.data() + kBitsHead;
    whole_.tail.first_bit = call_.tail.bits[0] % kernels::kVectorColumns;
  }
  // Forward-mode: the residual is a tangent.
  void follow_along() {
    follow_residual();
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

  // Those of a part, whose entries begin at `entry`.
  template <class Values>
  [[nodiscard]] Values part_of(const Values& values, std::int64_t entry, const Problem& part) const {
    const std::int64_t channels = call_.problem.channels;
    const bool again = entry > 0 && static_cast<std::int64_t>(values.size()) == channels;  // the same of each segment
    const std::int64_t first = again ? entry % channels : entry;
    return values.part(static_cast<std::size_t>(first), static_cast<std::size_t>(part.channels));
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
  // Entries of tables: one per segment and channel.
  [[nodiscard]] std::size_t entries() const {
    const std::size_t segments = by_segments() ? call_.groups.offsets.size() - 1 : 1;
    return segments * static_cast<std::size_t>(call_.problem.channels);
  }
  // Where there are no segments.
  [[nodiscard]] const PassCall<T>& whole() const { return whole_; }

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

  [[nodiscard]] bool by_segments() const { return !call_.groups.offsets.empty(); }
  template <class Entry>
  void check_entries(const char* name, std::size_t got) const {
    if (call_.groups.each_position) {
      return check::lines(name, got, call_.problem.count() * (call_.problem.channels / call_.groups.width));
    }
    const std::int64_t width = std::is_same_v<Entry, Moments> ? call_.groups.width : 1;
    if (!by_segments() && width == 1) return check::channels(name, got, call_.problem.channels);
    check::entries(name, got, entries() / static_cast<std::size_t>(width), width);
  }
  void check_channels(const char* name, std::size_t got) const {
    if (!by_segments() || got != entries()) check::channels(name, got, call_.problem.channels);
  }
  void check_bits() const { check::bits(call_.tail.bits.size(), bits_bytes(call_.problem), call_.tail.relu); }

  void follow_residual() {
    memories_.reads("residual", std::as_bytes(call_.tail.residual), true);
    whole_.tail.residual = call_.tail.residual.empty() ? nullptr : call_.tail.residual.data();
  }

  void sum_weights() {
    const std::span<const W> weights = call_.counted.weights;
    check::positions("weights", weights.size(), call_.problem);
    memories_.reads("weights", std::as_bytes(weights));
    whole_.positions = {.values = weights.data(), .is_mask = true, .problem = call_.problem};
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
      return part_of(values, segment.number * p.channels + channels.begin, part.problem);
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

  const Call<T>& call_;
  check::Memories memories_;
  PassCall<T> whole_;
  std::vector<WeightSummary> summaries_;
};

}  // namespace batchnorm
