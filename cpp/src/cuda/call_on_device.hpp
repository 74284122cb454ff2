// A call on a device: its arguments checked, then its passes launched, with memory for them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "arguments.hpp"
#include "batchnorm/cuda.hpp"
#include "cuda/lines_on_device.hpp"
#include "cuda/passes_on_device.hpp"
#include "cuda/stream.hpp"

namespace batchnorm::cuda {

// Memory of the device, given back in the stream's order.
class Lent {
 public:
  Lent(Stream& stream, std::size_t bytes) : stream_(stream), memory_(bytes == 0 ? nullptr : stream.allocate(bytes)) {}
  ~Lent() {
    if (memory_ != nullptr) stream_.free(memory_);
  }
  Lent(const Lent&) = delete;
  Lent& operator=(const Lent&) = delete;
  [[nodiscard]] std::byte* get() const { return memory_; }

 private:
  Stream& stream_;
  std::byte* memory_;
};

// The segments of a call: those of as many rows, one after another, are cut together where there are many or these are
// all; else from a list of all such, wherever they are.
template <class T>
CutSegments cut_segments(const Call<T>& call) {
  const Problem& p = call.problem;
  const auto offsets = call.groups.offsets;
  CutSegments all;
  if (offsets.empty()) {
    all.cuts.push_back(make_cut(p));
    return all;
  }
  all.count = static_cast<std::int64_t>(offsets.size()) - 1;
  const auto rows = [&](std::int64_t s) {
    return offsets[static_cast<std::size_t>(s) + 1] - offsets[static_cast<std::size_t>(s)];
  };
  const auto position = [&](std::int64_t s) { return offsets[static_cast<std::size_t>(s)] * p.inner; };
  std::map<std::int64_t, std::vector<std::int64_t>> listed;  // by rows
  for (std::int64_t s = 0, end = 0; s < all.count; s = end) {
    while (end < all.count && rows(end) == rows(s)) ++end;
    if (end - s >= kMostListed || end - s == all.count) {
      const Segments these{.count = end - s, .number = s, .first = position(s)};
      all.cuts.push_back(make_cut({rows(s), p.channels, p.inner}, these));
    } else {
      for (std::int64_t k = s; k < end; ++k) listed[rows(s)].push_back(k);
    }
  }
  for (const auto& [of_rows, numbers] : listed) {
    for (std::size_t first = 0; first < numbers.size(); first += kMostListed) {
      Segments these{.count = 0, .listed = true};
      for (std::size_t k = first; k < std::min(first + kMostListed, numbers.size()); ++k) {
        these.numbers[these.count] = static_cast<int>(numbers[k]);
        these.positions[these.count++] = position(numbers[k]);
      }
      all.cuts.push_back(make_cut({of_rows, p.channels, p.inner}, these));
    }
  }
  return all;
}

// The arguments of a call, and how it is run.
template <class T>
class CallOnDevice : public Arguments<T> {
 public:
  CallOnDevice(const Call<T>& call, const Options& options) : Arguments<T>(call), options_(options) {
    // By 32 bits (visit.cuh).
    std::int64_t most = call.problem.channels * this->segments();
    if (call.groups.each_position) {
      const Cut cut = make_line_cut(call.problem, call.groups.width);
      most = std::max({most_pieces(cut), cut.entries(), call.problem.channels * LinePasses<T, Stream>::chunks(whole_)});
    } else {
      segments_ = cut_segments(call);
      most = std::max(most, segments_.most(most_pieces));
      if (!segments_.are_alike()) most = std::max(most, call.problem.outer);  // each is told its segment
    }
    if (most > UINT32_MAX) {
      check::fail(
          "problem must have fewer than 2^32 channels and pieces (chunks, or columns of blocks of rows), and rows in "
          "segments of other lengths, got ",
          check::text(call.problem));
    }
  }

  // One value has no variance; those of segments have one of 0 (batchnorm.hpp).
  void check_batch() const {
    if (!this->by_segments() && !whole_.is_grouped() && !whole_.each_position && !whole_.positions) {
      check::batch_values(call_.problem);
    }
  }

  // f(Passes), or f(LinePasses) of positions that have statistics of their own.
  template <class F>
  void run(const F& f) const {
    if (!whole_.each_position) return run_channels(f);
    if (call_.problem.channels == 0) return;
    Stream stream(options_.stream);
    const Lent memory(stream, LinePasses<T, Stream>::bytes(whole_));
    clear_head(stream);
    LinePasses<T, Stream> passes(stream, whole_, Stream::device(), memory.get());
    f(passes);
  }
  template <class F>
  void run_channels(const F& f) const {
    if (call_.problem.channels == 0) return;
    Stream stream(options_.stream);
    const Lent memory(stream, Passes<T, Stream>::bytes(whole_, segments_));
    clear_head(stream);
    Passes<T, Stream> passes(stream, whole_, segments_, memory.get());
    f(passes);
  }
  // Forward reads x, backward dy and x: with kInputs tensors held, or as they are read once more.
  template <int kInputs>
  [[nodiscard]] Planned planned() const {
    const auto plan = plan_held<kInputs>(true);
    const int held_lines = kInputs == 1 && whole_.each_position ? lines_held() : 0;
    const auto n = static_cast<double>(call_.problem.size());
    const double of_tensor = n * sizeof(T), of_bits = call_.tail.relu ? n / 8 : 0;
    const double of_weights = whole_.positions ? static_cast<double>(call_.problem.count()) * sizeof(Arithmetic<T>) : 0;
    const int times = plan || held_lines > 0 ? 1 : 2;  // that inputs are read
    const bool reads_bits = kInputs == 2, has_residual = !call_.tail.residual.empty();
    const double tensors = kInputs * times + 1 + (has_residual ? 1 : 0);
    return {plan ? to_string(*plan) : in_words(held_lines),
            tensors * of_tensor + of_bits * (reads_bits ? times : 1) + of_weights * times};
  }
  // Whether a Pass that holds channels (planar.cuh) was launched: they fit into the device.
  template <class Pass>
  [[nodiscard]] bool run_held(Pass pass, bool aligned) const {
    auto plan = plan_held<Pass::kInputs>(aligned);
    if (!plan) return false;
    Stream stream(options_.stream);
    pass.channels = call_.problem.channels;
    if (whole_.bits_head != nullptr) stream.zero(whole_.bits_head, call_.tail.bits.size());
    const auto sums = Workspace::bytes_for<kernels::Sums>(plan->kept_sums());
    const auto counts = plan->through_memory ? Workspace::bytes_for<unsigned>(plan->spans) : 0;
    const Lent memory(stream, sums + counts);
    if (plan->through_memory) {
      Workspace workspace(memory.get());
      plan->span.sums = workspace.take<kernels::Sums>(plan->kept_sums());
      plan->span.count = workspace.take<unsigned>(plan->spans);
      stream.zero(plan->span.count, counts);
    }
    stream.launch_held(*plan, pass);
    return true;
  }

  // Sums over segments of what `f(dgamma, dbeta)` gives of each, where they are wanted.
  template <class F>
  void with_parameters(const Gradients<T>& out, const F& f) const {
    const bool sums_gamma = this->is_sum(out.dgamma), sums_beta = this->is_sum(out.dbeta);
    const auto entries = static_cast<std::int64_t>(this->entries());
    Stream stream(options_.stream);
    const std::size_t of_one = Workspace::bytes_for<double>(entries);
    const Lent memory(stream, (sums_gamma ? of_one : 0) + (sums_beta ? of_one : 0));
    Workspace workspace(memory.get());
    const auto of_each = [&](bool sums, const ChannelOutput& to) -> ChannelOutput {
      return sums ? std::span(workspace.take<double>(entries), this->entries()) : to;
    };
    const ChannelOutput dgamma = of_each(sums_gamma, out.dgamma), dbeta = of_each(sums_beta, out.dbeta);
    f(dgamma, dbeta);
    if (sums_gamma) sum_over_segments(stream, dgamma, out.dgamma);
    if (sums_beta) sum_over_segments(stream, dbeta, out.dbeta);
  }

 private:
  using Arguments<T>::call_;
  using Arguments<T>::whole_;

  template <int kInputs>
  [[nodiscard]] std::optional<Resident> plan_held(bool aligned) const {
    const std::optional<Problem> channels = held_channels();
    if (!channels) return std::nullopt;
    return plan_resident<T, kInputs>(*channels, Stream::device(), aligned);
  }
  // By a block.
  [[nodiscard]] int lines_held() const { return LinePasses<T, Stream>::held(whole_, Stream::device()).lines; }
  // Where channels are not held.
  [[nodiscard]] std::string in_words(int held_lines) const {
    const std::int64_t lines = whole_.each_position ? make_line_cut(call_.problem, call_.groups.width).entries() : 0;
    if (held_lines > 0) {
      return "blocks hold " + std::to_string(held_lines) + " lines each, of " + std::to_string(lines);
    }
    if (whole_.each_position) return "sums of " + std::to_string(lines) + " lines through memory, then each value";
    std::int64_t pieces = 0;
    for (const Cut& cut : segments_.cuts) pieces += cut.segments.count * cut.pieces();
    const std::size_t launches = segments_.cuts.size();
    return "sums of " + std::to_string(pieces) + " pieces through memory" +
           (launches == 1 ? "" : ", by " + std::to_string(launches) + " launches") + ", then each value";
  }
  // The problem whose channels are what shares statistics, if there is one: of samples each, that of all of them.
  [[nodiscard]] std::optional<Problem> held_channels() const {
    const Problem& p = call_.problem;
    if (whole_.is_grouped() || whole_.each_position || whole_.positions || p.size() == 0) return std::nullopt;
    if (!this->by_segments()) return p;
    const auto offsets = call_.groups.offsets;
    for (std::size_t s = 0; s < offsets.size(); ++s) {
      if (offsets[s] != static_cast<std::int64_t>(s)) return std::nullopt;
    }
    // The chunks are those of a sample.
    const Problem all{1, this->segments() * p.channels, p.inner};
    const RunCut of_one = make_cut({1, p.channels, p.inner}).runs, of_all = make_cut(all).runs;
    const bool are_same = of_one.piece_length == of_all.piece_length && of_one.chunks == of_all.chunks;
    return are_same && make_cut({1, p.channels, p.inner}).planar ? std::optional(all) : std::nullopt;
  }
  // The first bit is that of the first byte.
  void clear_head(Stream& stream) const {
    if (whole_.bits_head != nullptr) stream.zero(whole_.bits_head, kBitsHead);
  }

  void sum_over_segments(Stream& stream, const ChannelOutput& of_each, const ChannelOutput& out) const {
    const std::int64_t channels = call_.problem.channels;
    if (channels == 0) return;
    const auto* values = reinterpret_cast<const double*>(of_each.bytes().data());
    stream.launch(sum_segments<T>, static_cast<unsigned>((channels + kStepThreads - 1) / kStepThreads), kStepThreads,
                  std::int64_t{0}, channels, this->segments(), values, out);
  }

  Options options_;
  CutSegments segments_;
};

}  // namespace batchnorm::cuda
