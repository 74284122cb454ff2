// All argument checks of the C++ API and their messages: argument, what was needed, what came. `name` is the argument's
// name in the public API.
#pragma once

#include <cassert>
#include <cmath>
#include <cstdint>
#include <span>
#include <sstream>
#include <stdexcept>
#include <string>

#include "batchnorm/call.hpp"
#include "batchnorm/types.hpp"

namespace batchnorm::check {

template <class... Words>
[[noreturn, gnu::cold]] inline void fail(const Words&... words) {
  std::ostringstream message;
  (message << ... << words);
  throw std::invalid_argument(message.str());
}

inline std::string text(const Problem& p) {
  std::ostringstream s;
  s << "{outer " << p.outer << ", channels " << p.channels << ", inner " << p.inner << "}";
  return s.str();
}

// ---- plain values ------------------------------------------------------------------------------------------------

// Sizes >= 0 whose product fits std::int64_t.
inline void problem(const Problem& p) {
  if (p.outer < 0 || p.channels < 0 || p.inner < 0) fail("problem must have sizes >= 0, got ", text(p));
  // Any order of the products must fit, so zeros do not excuse the others.
  const auto at_least_one = [](std::int64_t n) { return n > 0 ? n : 1; };
  std::int64_t product = 0;
  if (__builtin_mul_overflow(at_least_one(p.outer), at_least_one(p.channels), &product) ||
      __builtin_mul_overflow(product, at_least_one(p.inner), &product) ||
      (p.size() > INT64_MAX / static_cast<std::int64_t>(sizeof(double)))) {
    fail("problem must have fewer than 2^60 values, got ", text(p));
  }
}
inline void eps(double value) {
  if (!(value >= 0) || !std::isfinite(value)) fail("eps must be finite and >= 0, got ", value);
}
inline void threads(int threads) {
  if (threads < 0) fail("threads must be >= 0, got ", threads);
}
inline void update_rate(double rate) {
  if (!(rate >= 0 && rate <= 1)) fail("update_rate must be in [0, 1], got ", rate);
}
inline void ddof(int ddof) {
  if (ddof < 0) fail("ddof must be >= 0, got ", ddof);
}
// Bytes of a value of a tensor.
inline void item_size(std::size_t bytes) {
  if (bytes != 2 && bytes != 4 && bytes != 8) fail("item_size must be 2, 4 or 8 bytes, got ", bytes);
}

// ---- lengths -----------------------------------------------------------------------------------------------------

inline void size(const char* name, std::size_t got, const Problem& p) {
  if (got != static_cast<std::size_t>(p.size())) fail(name, " must have ", p.size(), " values, got ", got);
}
inline void channels(const char* name, std::size_t got, std::int64_t channels) {
  if (got != static_cast<std::size_t>(channels)) {
    fail(name, " must have ", channels, " values (one per channel), got ", got);
  }
}
inline void entries(const char* name, std::size_t got, std::size_t needed, std::int64_t width = 1) {
  if (got == needed) return;
  fail(name, " must have ", needed, " values (one per segment and ",
       width == 1 ? "channel" : "group of " + std::to_string(width) + " channels", "), got ", got);
}
inline void lines(const char* name, std::size_t got, std::int64_t needed) {
  if (got == static_cast<std::size_t>(needed)) return;
  fail(name, " must have ", needed, " values (one per position and group of channels), got ", got);
}
inline void positions(const char* name, std::size_t got, const Problem& p) {
  if (got != static_cast<std::size_t>(p.count())) {
    fail(name, " must have ", p.count(), " values (one per position), got ", got);
  }
}
// Of a ReLU, which there is.
inline void bits(std::size_t got, std::int64_t needed, bool relu) {
  if (!relu) fail("bits must be empty without a ReLU, got ", got, " bytes");
  if (got != static_cast<std::size_t>(needed)) {
    fail("bits must have ", needed, " bytes (relu_mask_bytes of the problem), got ", got);
  }
}

// Channels that share statistics.
inline void width(std::int64_t width, const Problem& p) {
  if (width < 1 || p.channels % width != 0) {
    fail("width must divide the channels, ", p.channels, ", got ", width);
  }
}

// Values of an enumeration, which a cast can make of any number.
inline void named(const Groups& groups, Padding padding) {
  if (groups.about != About::mean && groups.about != About::zero) {
    fail("about must be mean or zero, got ", static_cast<int>(groups.about));
  }
  if (groups.strided && groups.each_position) fail("strided must be false beside each_position, got true");
  if (padding != Padding::zero && padding != Padding::keep && padding != Padding::normalize) {
    fail("padding must be zero, keep or normalize, got ", static_cast<int>(padding));
  }
}

// What the mean is times: of each channel by itself.
inline void alpha(const Groups& groups, const Problem& p) {
  channels("alpha", groups.alpha.size(), p.channels);
  if (groups.width != 1) fail("width must be 1 beside alpha, got ", groups.width);
  if (groups.each_position) fail("each_position must be false beside alpha, got true");
  if (groups.about != About::mean) fail("about must be mean beside alpha, got zero");
}

// ---- segments ----------------------------------------------------------------------------------------------------

// From 0 to problem.outer, never falling.
inline void offsets(std::span<const std::int64_t> offsets, const Problem& p) {
  if (offsets.empty() || offsets.front() != 0 || offsets.back() != p.outer) {
    fail("offsets must begin with 0 and end with ", p.outer, ", the outer size, got ",
         offsets.empty() ? "none" : std::to_string(offsets.front()) + " and " + std::to_string(offsets.back()));
  }
  for (std::size_t s = 1; s < offsets.size(); ++s) {
    if (offsets[s] < offsets[s - 1]) {
      fail("offsets must never fall, got ", offsets[s], " after ", offsets[s - 1], " at ", s);
    }
  }
}

inline void no_segments(std::size_t offsets) {
  fail("offsets must be empty where each position has statistics of its own, got ", offsets);
}

// ---- statistics --------------------------------------------------------------------------------------------------

// Of one group, given: a value a channel, and no negative variance. NaN passes: it stays in its channel.
inline void given(const char* name, const ChannelValues& values, std::int64_t count) {
  if (!values.present()) fail(name, " must have ", count, " values (one per channel), got none");
  channels(name, values.size(), count);
}
inline void variances(const ChannelValues& var) {
  for (std::int64_t c = 0; c < static_cast<std::int64_t>(var.size()); ++c) {
    if (var[c] < 0) fail("var must be >= 0 in every channel, got ", var[c], " in channel ", c);
  }
}
inline bool all_count(std::span<const Moments> moments) {
  bool any_odd = false;  // no branch for each: there may be many channels of few values
  for (const Moments& m : moments) any_odd |= !(m.count > 0) | (m.m2 < 0);
  return !any_odd;
}
inline void counts(const char* name, std::span<const Moments> moments) {
  for (std::size_t c = 0; c < moments.size(); ++c) {
    if (!(moments[c].count >= 0)) {
      fail(name, " must have count >= 0 in every channel, got ", moments[c].count, " in channel ", c);
    }
    if (moments[c].m2 < 0) {
      fail(name, " must have m2 >= 0 in every channel, got ", moments[c].m2, " in channel ", c);
    }
  }
}
// No values at all in a channel, or more than `ddof`.
inline void counts_above(const char* name, std::span<const Moments> moments, int ddof) {
  for (std::size_t c = 0; c < moments.size(); ++c) {
    if (ddof > 0 && moments[c].count > 0 && !(moments[c].count - ddof >= 1)) {
      fail(name, " must have at least ", std::int64_t{ddof} + 1, " values in every channel, got ", moments[c].count,
           " in channel ", c);
    }
  }
}
// Moments of segment `s` of a call, or of all of it (s < 0), which has values: over at least one in every channel.
inline void counts_of_values(const char* name, std::span<const Moments> moments, std::int64_t s) {
  for (std::size_t c = 0; c < moments.size(); ++c) {
    if (moments[c].count != 0) continue;
    fail(name, " must count the values of x in every channel, got count 0 in channel ", c,
         s < 0 ? "" : " of segment " + std::to_string(s));
  }
}

// A batch that has a variance: no values at all, or at least 2 a channel.
inline void batch_values(const Problem& p) {
  if (p.channels > 0 && p.count() == 1) {
    fail("x must have at least 2 values per channel for batch statistics, got 1 in problem ", text(p));
  }
}
// The same where `counted` positions have a weight.
inline void counted_positions(std::int64_t counted, const Problem& p) {
  if (p.size() > 0 && counted == 1) {
    fail("weights must be above 0 at 2 positions or more for batch statistics (or at none), got 1");
  }
}

// ---- weights -----------------------------------------------------------------------------------------------------

// The first that is negative, infinite or NaN, or -1; and the sum, within float64.
inline void weights(std::int64_t position, double bad, double sum) {
  if (position >= 0) {
    fail("weights must be finite and >= 0 at every position, got ", bad, " at position ", position);
  }
  if (!std::isfinite(sum)) fail("weights must have a finite sum, got one beyond float64");
}

// ---- combinations ------------------------------------------------------------------------------------------------

// Given statistics are those of all, and a weight of 0 says nothing but that the output is something else.
template <class T>
inline void one_group(const Call<T>& call) {
  const std::size_t offsets = call.groups.offsets.size();
  if (offsets != 0) fail("offsets must be empty where mean and var are given, got ", offsets);
  if (call.groups.width != 1) fail("width must be 1 where mean and var are given, got ", call.groups.width);
  if (call.groups.each_position) fail("each_position must be false where mean and var are given, got true");
  if (call.groups.about != About::mean) fail("about must be mean where mean and var are given, got zero");
  if (call.groups.alpha.present()) fail("alpha must be empty where mean and var are given");
  if (!call.counted.weights.empty() && call.counted.padding == Padding::normalize) {
    fail("padding must be zero or keep where statistics are given, got normalize, which needs no weights");
  }
}
// Gradients of gradients are of one group, where all counts and no ReLU follows.
template <class T>
inline void second_order(const Call<T>& call) {
  const std::size_t offsets = call.groups.offsets.size(), weights = call.counted.weights.size();
  if (offsets != 0) fail("offsets must be empty for gradients of gradients, got ", offsets);
  if (call.groups.width != 1) fail("width must be 1 for gradients of gradients, got ", call.groups.width);
  if (call.groups.each_position) fail("each_position must be false for gradients of gradients, got true");
  if (call.groups.about != About::mean) fail("about must be mean for gradients of gradients, got zero");
  if (call.groups.alpha.present()) fail("alpha must be empty for gradients of gradients");
  if (weights != 0) fail("weights must be empty for gradients of gradients, got ", weights);
  if (call.tail.relu) fail("relu must be false for gradients of gradients, got true");
}

// ---- memory ------------------------------------------------------------------------------------------------------

// The memory of the arguments of a call, told one after the other. What is written shares none with any other: outputs
// per channel are written while tensors and what is per channel are still read, and the other way round. Only a tensor
// may be written to one that is read, exactly to it.
class Memories {
 public:
  // What is empty is absent.
  void reads(const char* name, std::span<const std::byte> memory, bool is_tensor = false) {
    if (!memory.empty()) add(name, memory, is_tensor);
  }
  void writes(const char* name, std::span<const std::byte> memory, bool is_tensor = false) {
    if (!memory.empty()) add_apart(name, memory, is_tensor);
  }

 private:
  struct Memory {
    const char* name;
    std::uintptr_t begin, end;
    bool may_be_written;
  };
  static std::uintptr_t begin_of(std::span<const std::byte> memory) {
    return reinterpret_cast<std::uintptr_t>(memory.data());
  }

  void add(const char* name, std::span<const std::byte> memory, bool may_be_written) {
    assert(count_ < kMost);
    told_[count_++] = {name, begin_of(memory), begin_of(memory) + memory.size(), may_be_written};
  }
  void add_apart(const char* name, std::span<const std::byte> memory, bool is_tensor) {
    const std::uintptr_t begin = begin_of(memory), end = begin + memory.size();
    for (int k = 0; k < count_; ++k) {
      const Memory& other = told_[k];
      if ((begin >= other.end) | (other.begin >= end)) continue;
      if (!is_tensor || !other.may_be_written) {
        fail(name, " must share no memory with ", other.name, ", got an overlap");
      }
      if (begin == other.begin) continue;  // as many values
      fail(name, " must be ", other.name, " itself or share no memory with it, got a partial overlap");
    }
    add(name, memory, false);
  }

  static constexpr int kMost = 16;
  Memory told_[kMost];  // NOLINT: as many as are told
  int count_ = 0;
};

}  // namespace batchnorm::check
