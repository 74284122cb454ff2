// What is measured: the calls a user makes, and the four passes that they are made of.
#pragma once

#include <array>
#include <cstdint>

namespace bench {

enum class Pass { train, infer, backward, moments, normalize, grad_sums, grad_input };

// What a pass is held against: one stream in and one out, or two in and one out.
enum class Yardstick { copy, stream };

struct PassFacts {
  Pass pass;
  const char* name;
  int tensors;  // that must be read or written at least once; what is per channel is not counted
  Yardstick yardstick;
  std::int64_t values_needed;  // in each channel: the gradient through the statistics of one value is that of nothing
};

inline constexpr std::array kPasses = {
    PassFacts{Pass::train, "train", 2, Yardstick::copy, 2},              // x -> y
    PassFacts{Pass::infer, "infer", 2, Yardstick::copy, 1},              // x -> y
    PassFacts{Pass::backward, "backward", 3, Yardstick::stream, 2},      // dy, x -> dx
    PassFacts{Pass::moments, "moments", 1, Yardstick::copy, 1},          // x
    PassFacts{Pass::normalize, "normalize", 2, Yardstick::copy, 1},      // x -> y
    PassFacts{Pass::grad_sums, "grad_sums", 2, Yardstick::stream, 2},    // dy, x
    PassFacts{Pass::grad_input, "grad_input", 3, Yardstick::stream, 2},  // dy, x -> dx
};

}  // namespace bench
