// The arguments of a call, checked one after the other: sizes, and that what is written is memory of its own. No value
// of an array is looked at, but offsets: the arrays may be a device's.
#pragma once

#include <span>

#include "batchnorm/call.hpp"
#include "check.hpp"
#include "passes.hpp"

namespace batchnorm {

inline std::int64_t bits_bytes(const Problem& problem) {
  // The head, a bit an element, up to 15 bits before them, and what kernels may read behind.
  return kBitsHead + (problem.size() + 15 + 7) / 8 + 4;
}

template <class T>
class Arguments {
 public:
  explicit Arguments(const Call<T>& call)
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
               .eps = call.eps} {
    check::problem(call.problem);
    check::named(call.groups, call.counted.padding);
    check::width(call.groups.width, call.problem);
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
    if (call.counted.weights.empty()) return;
    check::positions("weights", call.counted.weights.size(), call.problem);
    memories_.reads("weights", std::as_bytes(call.counted.weights));
    whole_.positions = {.values = call.counted.weights.data(), .is_mask = true, .problem = call.problem};
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
  // Statistics that are given are those of one group.
  void reads_given(const ChannelValues& mean, const ChannelValues& var) {
    check::one_group(call_);
    check::given("mean", mean, call_.problem.channels);
    check::given("var", var, call_.problem.channels);
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
  // What is empty is not wanted.
  void writes_gradients(const Gradients<T>& out) {
    if (!out.dx.empty()) writes("dx", out.dx);
    writes("dbeta", out.dbeta);
    writes("dgamma", out.dgamma);
    if (!out.dresidual.empty()) writes("dresidual", out.dresidual);
  }

  // ---- what the call adds, by what the function does ----

  // Forward: what follows is done, and bits are written.
  void follow() {
    follow_residual();
    whole_.tail.relu = call_.tail.relu;
    if (call_.tail.bits.empty()) return;
    memories_.writes("bits", std::as_bytes(call_.tail.bits));
    whole_.bits_head = call_.tail.bits.data();
    whole_.tail.bits = call_.tail.bits.data() + kBitsHead;
  }
  // Backward: bits are read.
  void let_through() {
    if (!call_.tail.relu) return;
    check_bits();
    memories_.reads("bits", std::as_bytes(call_.tail.bits));
    whole_.tail.bits = call_.tail.bits.data() + kBitsHead;
  }

  // ---- then ----

  [[nodiscard]] bool by_segments() const { return !call_.groups.offsets.empty(); }
  [[nodiscard]] std::int64_t segments() const {
    return by_segments() ? static_cast<std::int64_t>(call_.groups.offsets.size()) - 1 : 1;
  }
  // Entries of tables: one per segment and channel.
  [[nodiscard]] std::size_t entries() const {
    return static_cast<std::size_t>(segments()) * static_cast<std::size_t>(call_.problem.channels);
  }
  // Where there are no segments.
  [[nodiscard]] const PassCall<T>& whole() const { return whole_; }
  // `count` entries from `entry` on, of those of each segment and channel; or of channels, which are the same of each
  // segment.
  template <class Values>
  [[nodiscard]] Values part_of(const Values& values, std::int64_t entry, std::int64_t count) const {
    const std::int64_t channels = call_.problem.channels;
    const bool again = entry > 0 && static_cast<std::int64_t>(values.size()) == channels;
    return values.part(static_cast<std::size_t>(again ? entry % channels : entry), static_cast<std::size_t>(count));
  }
  // Of segments dgamma and dbeta are sums, where those of each are not wanted.
  [[nodiscard]] bool is_sum(const ChannelOutput& to) const { return to.wanted() && to.size() != entries(); }

 protected:
  void follow_residual() {
    memories_.reads("residual", std::as_bytes(call_.tail.residual), true);
    whole_.tail.residual = call_.tail.residual.empty() ? nullptr : call_.tail.residual.data();
  }

  const Call<T>& call_;
  PassCall<T> whole_;

 private:
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

  check::Memories memories_;
};

}  // namespace batchnorm
