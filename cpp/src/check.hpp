// All argument checks of the C++ API and their messages: argument, what was needed, what came.
#pragma once

#include <initializer_list>
#include <span>

#include "batchnorm/call.hpp"
#include "batchnorm/types.hpp"

namespace batchnorm::check {

// Sizes >= 0 whose product fits std::int64_t.
void problem(const Problem& problem);
// Lengths. `name` is the argument's name in the public API.
void size(const char* name, std::size_t got, const Problem& problem);
void channels(const char* name, std::size_t got, const Problem& problem);
void channels_or_absent(const char* name, const ChannelValues& values, const Problem& problem);
void channels_present(const char* name, const ChannelValues& values, const Problem& problem);
void size_or_absent(const char* name, std::size_t got, const Problem& problem);
// Finite and >= 0.
void eps(double eps);
// No negative variance. NaN passes: it stays in its channel.
void variances(const ChannelValues& var);
void counts(const char* name, std::span<const Moments> moments);
// Whether every channel has values, and an m2 that may be: then all checks of counts pass.
bool all_count(std::span<const Moments> moments);
// No values at all in a channel, or more than `ddof`.
void counts_above(const char* name, std::span<const Moments> moments, int ddof);
// A batch that has a variance: no values at all, or at least 2 a channel.
void batch_values(const Problem& problem);
void update_rate(double rate);
void threads(int threads);
void ddof(int ddof);
// Bytes of a value of a tensor.
void item_size(std::size_t bytes);
// Moments over at least one value in every channel, where there are gradients to be taken.
void counts_of_batch(const char* name, std::span<const Moments> moments, const Problem& problem);
// One weight per position.
void positions(const char* name, std::size_t got, const Problem& problem);
// Throws: the weight of that position is negative, infinite or NaN.
[[noreturn]] void bad_weight(std::int64_t position, double weight);
// Within float64.
void sum_of_weights(double sum);
// A batch that has a variance: no position has a weight, or at least 2.
void counted_positions(std::int64_t counted, const Problem& problem);
// With given statistics a weight of 0 says nothing but that the output is something else.
void padding_differs(Padding padding);
// Given statistics are those of all.
void no_offsets(std::size_t got);
// Gradients of gradients are of one group, where all counts and no ReLU follows.
void second_order(std::size_t offsets, std::size_t weights, bool relu);
// From 0 to problem.outer, never falling.
void offsets(std::span<const std::int64_t> offsets, const Problem& problem);
// One entry per segment and channel.
void entries(const char* name, std::size_t got, std::size_t needed);
// Moments over at least one value in every channel of a segment that has rows.
void counts_of_segments(const char* name, std::span<const Moments> moments, std::span<const std::int64_t> offsets,
                        const Problem& problem);
// `out` is exactly `in`, or does not touch it.
void no_partial_overlap(const char* out_name, const void* out, const char* in_name, const void* in, std::size_t bytes);
// The memory of an argument, of any type and size; nothing where it is absent.
struct Memory {
  const char* name;
  const std::byte* begin;
  std::size_t size;

  template <class T>
  Memory(const char* of, std::span<T> values)
      : name(of), begin(reinterpret_cast<const std::byte*>(values.data())), size(values.size_bytes()) {}
  Memory(const char* of, const ChannelValues& values) : Memory(of, values.bytes()) {}
  Memory(const char* of, const ChannelOutput& values) : Memory(of, values.bytes()) {}
};
// What is written shares no memory with anything else that is, nor with the others. Outputs per channel are written
// while tensors and what is per channel are still read, and the other way round; only a tensor may be written to one
// that is read (output(), no_partial_overlap()).
// Inlined, so that a call knows how many there are: grad_input of 2 x 8 x 4 x 4 values took 1.03 times as long without.
[[noreturn]] void fail_to_be_apart(const Memory& a, const Memory& b);
[[gnu::always_inline]] inline void apart(const Memory& a, const Memory& b) {
  const auto first = reinterpret_cast<std::uintptr_t>(a.begin), second = reinterpret_cast<std::uintptr_t>(b.begin);
  // Both ends behind both beginnings; what is absent begins at 0 and has no size.
  if ((first < second + b.size) & (second < first + a.size) & (a.size != 0) & (b.size != 0)) fail_to_be_apart(a, b);
}
[[gnu::always_inline]] inline void apart(std::initializer_list<Memory> written, std::initializer_list<Memory> others) {
  for (const Memory* a = written.begin(); a != written.end(); ++a) {
    for (const Memory* b = a + 1; b != written.end(); ++b) apart(*a, *b);
    for (const Memory& b : others) apart(*a, b);
  }
}
// Of a ReLU, which there is.
void bits(std::size_t got, std::int64_t needed, bool relu);

// A tensor that is written: of the problem's size, exactly `in` or apart from it.
template <class T>
void output(const char* name, std::span<T> out, const Problem& problem, std::span<const T> in, const char* in_name) {
  size(name, out.size(), problem);
  no_partial_overlap(name, out.data(), in_name, in.data(), in.size_bytes());
}
}  // namespace batchnorm::check
