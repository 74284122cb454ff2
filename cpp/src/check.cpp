#include "check.hpp"

#include <cmath>
#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

namespace batchnorm::check {
namespace {

template <class... Part>
[[noreturn]] void fail(const Part&... part) {
  std::ostringstream message;
  (message << ... << part);
  throw std::invalid_argument(message.str());
}

std::string text(const Problem& p) {
  std::ostringstream s;
  s << "{outer " << p.outer << ", channels " << p.channels << ", inner " << p.inner << "}";
  return s.str();
}

}  // namespace

void problem(const Problem& p) {
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

void size(const char* name, std::size_t got, const Problem& p) {
  if (got != static_cast<std::size_t>(p.size())) fail(name, " must have ", p.size(), " values, got ", got);
}

void size_or_absent(const char* name, std::size_t got, const Problem& p) {
  if (got != 0) size(name, got, p);
}

void channels(const char* name, std::size_t got, const Problem& p) {
  if (got != static_cast<std::size_t>(p.channels)) {
    fail(name, " must have ", p.channels, " values (one per channel), got ", got);
  }
}

void channels_or_absent(const char* name, const ChannelValues& values, const Problem& p) {
  if (values.present()) channels(name, values.size(), p);
}

void channels_present(const char* name, const ChannelValues& values, const Problem& p) {
  if (!values.present()) fail(name, " must have ", p.channels, " values (one per channel), got none");
  channels(name, values.size(), p);
}

void eps(double value) {
  if (!(value >= 0) || !std::isfinite(value)) fail("eps must be finite and >= 0, got ", value);
}

void variances(const ChannelValues& var) {
  for (std::int64_t c = 0; c < static_cast<std::int64_t>(var.size()); ++c) {
    if (var[c] < 0) fail("var must be >= 0 in every channel, got ", var[c], " in channel ", c);
  }
}

bool all_count(std::span<const Moments> moments) {
  bool any_odd = false;  // no branch for each: there may be many channels of few values
  for (const Moments& m : moments) any_odd |= !(m.count > 0) | (m.m2 < 0);
  return !any_odd;
}

void counts(const char* name, std::span<const Moments> moments) {
  for (std::size_t c = 0; c < moments.size(); ++c) {
    if (!(moments[c].count >= 0)) {
      fail(name, " must have count >= 0 in every channel, got ", moments[c].count, " in channel ", c);
    }
    if (moments[c].m2 < 0) {
      fail(name, " must have m2 >= 0 in every channel, got ", moments[c].m2, " in channel ", c);
    }
  }
}

void counts_above(const char* name, std::span<const Moments> moments, int ddof) {
  for (std::size_t c = 0; c < moments.size(); ++c) {
    if (ddof > 0 && moments[c].count > 0 && !(moments[c].count - ddof >= 1)) {
      fail(name, " must have at least ", std::int64_t{ddof} + 1, " values in every channel, got ", moments[c].count,
           " in channel ", c);
    }
  }
}

void batch_values(const Problem& p) {
  if (p.channels > 0 && p.count() == 1) {
    fail("x must have at least 2 values per channel for batch statistics, got 1 in problem ", text(p));
  }
}

void update_rate(double rate) {
  if (!(rate >= 0 && rate <= 1)) fail("update_rate must be in [0, 1], got ", rate);
}

void threads(int threads) {
  if (threads < 0) fail("threads must be >= 0, got ", threads);
}

void ddof(int ddof) {
  if (ddof < 0) fail("ddof must be >= 0, got ", ddof);
}

void item_size(std::size_t bytes) {
  if (bytes != 2 && bytes != 4 && bytes != 8) fail("item_size must be 2, 4 or 8 bytes, got ", bytes);
}

void counts_of_batch(const char* name, std::span<const Moments> moments, const Problem& p) {
  counts(name, moments);
  if (p.count() == 0) return;
  for (std::size_t c = 0; c < moments.size(); ++c) {
    if (moments[c].count == 0) fail(name, " must count the values of x in every channel, got count 0 in channel ", c);
  }
}

void positions(const char* name, std::size_t got, const Problem& p) {
  if (got != static_cast<std::size_t>(p.count())) {
    fail(name, " must have ", p.count(), " values (one per position), got ", got);
  }
}

void bad_weight(std::int64_t position, double weight) {
  fail("weights must be finite and >= 0 at every position, got ", weight, " at position ", position);
}

void sum_of_weights(double sum) {
  if (!std::isfinite(sum)) fail("weights must have a finite sum, got one beyond float64");
}

void counted_positions(std::int64_t counted, const Problem& p) {
  if (p.size() > 0 && counted == 1) {
    fail("weights must be above 0 at 2 positions or more for batch statistics (or at none), got 1");
  }
}

void padding_differs(Padding padding) {
  if (padding == Padding::normalize) {
    fail("padding must be zero or keep where statistics are given, got normalize, which needs no weights");
  }
}

void no_offsets(std::size_t got) {
  if (got != 0) fail("offsets must be empty where mean and var are given, got ", got);
}

void second_order(std::size_t offsets, std::size_t weights, bool relu) {
  if (offsets != 0) fail("offsets must be empty for gradients of gradients, got ", offsets);
  if (weights != 0) fail("weights must be empty for gradients of gradients, got ", weights);
  if (relu) fail("relu must be false for gradients of gradients, got true");
}

void offsets(std::span<const std::int64_t> offsets, const Problem& p) {
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

void entries(const char* name, std::size_t got, std::size_t needed) {
  if (got != needed) fail(name, " must have ", needed, " values (one per segment and channel), got ", got);
}

void counts_of_segments(const char* name, std::span<const Moments> moments, std::span<const std::int64_t> offsets,
                        const Problem& p) {
  const auto channels = static_cast<std::size_t>(p.channels);
  for (std::size_t at = 0; p.inner > 0 && at < moments.size(); ++at) {
    const std::size_t s = at / channels;
    if (moments[at].count == 0 && offsets[s + 1] > offsets[s]) {
      fail(name, " must count the values of x in every channel, got count 0 in channel ", at % channels, " of segment ",
           s);
    }
  }
}

void fail_to_be_apart(const Memory& a, const Memory& b) {
  fail(a.name, " must share no memory with ", b.name, ", got an overlap");
}

void bits(std::size_t got, std::int64_t needed, bool relu) {
  if (!relu) fail("bits must be empty without a ReLU, got ", got, " bytes");
  if (got != static_cast<std::size_t>(needed)) {
    fail("bits must have ", needed, " bytes (relu_mask_bytes of the problem), got ", got);
  }
}

void no_partial_overlap(const char* out_name, const void* out, const char* in_name, const void* in, std::size_t bytes) {
  const auto a = reinterpret_cast<std::uintptr_t>(out), b = reinterpret_cast<std::uintptr_t>(in);
  const std::uintptr_t apart = a > b ? a - b : b - a;
  if (apart != 0 && apart < bytes) {
    fail(out_name, " must be ", in_name, " itself or share no memory with it, got a partial overlap");
  }
}

}  // namespace batchnorm::check
