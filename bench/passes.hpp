// What is measured: the calls a user makes, and the four passes that they are made of.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace bench {

enum class Pass {
  train,
  infer,
  backward,
  moments,
  normalize,
  grad_sums,
  grad_input,
  // Over parts of the tensor.
  train_masked,
  infer_masked,
  backward_masked,
  train_weighted,
  backward_weighted,
  train_segments,
  backward_segments,
};
constexpr bool is_counted(Pass pass) { return pass >= Pass::train_masked; }

// What a pass is held against: one stream in and one out, or two in and one out.
enum class Yardstick { copy, stream };

struct PassFacts {
  Pass pass;
  const char* name;
  int tensors;  // that must be read or written at least once; what is per channel is not counted
  Yardstick yardstick;
  std::int64_t values_needed;  // in each channel: the gradient through the statistics of one value is that of nothing
  bool by_name = false;        // measured only where it is asked for
};

inline constexpr std::array kPasses = {
    PassFacts{Pass::train, "train", 2, Yardstick::copy, 2},              // x -> y
    PassFacts{Pass::infer, "infer", 2, Yardstick::copy, 1},              // x -> y
    PassFacts{Pass::backward, "backward", 3, Yardstick::stream, 2},      // dy, x -> dx
    PassFacts{Pass::moments, "moments", 1, Yardstick::copy, 1},          // x
    PassFacts{Pass::normalize, "normalize", 2, Yardstick::copy, 1},      // x -> y
    PassFacts{Pass::grad_sums, "grad_sums", 2, Yardstick::stream, 2},    // dy, x
    PassFacts{Pass::grad_input, "grad_input", 3, Yardstick::stream, 2},  // dy, x -> dx
    PassFacts{Pass::train_masked, "train_masked", 2, Yardstick::copy, 2, true},
    PassFacts{Pass::infer_masked, "infer_masked", 2, Yardstick::copy, 2, true},
    PassFacts{Pass::backward_masked, "backward_masked", 3, Yardstick::stream, 2, true},
    PassFacts{Pass::train_weighted, "train_weighted", 2, Yardstick::copy, 2, true},
    PassFacts{Pass::backward_weighted, "backward_weighted", 3, Yardstick::stream, 2, true},
    PassFacts{Pass::train_segments, "train_segments", 2, Yardstick::copy, 2, true},
    PassFacts{Pass::backward_segments, "backward_segments", 3, Yardstick::stream, 2, true},
};

constexpr const PassFacts& facts_of(Pass pass) { return kPasses[static_cast<std::size_t>(pass)]; }
constexpr const char* name_of(Pass pass) { return facts_of(pass).name; }
// What a pass writes: y or dx, if a tensor at all.
constexpr bool writes_dx(Pass pass) { return facts_of(pass).tensors == 3; }
constexpr bool writes_y(Pass pass) {
  return facts_of(pass).tensors == 2 && facts_of(pass).yardstick == Yardstick::copy;
}

}  // namespace bench
