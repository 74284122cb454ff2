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
  train_graphs,  // graph norm: segments about alpha times their mean
  backward_graphs,
  train_groups,
  backward_groups,
  // Of each position by itself: layer and RMS norm over the channels.
  train_lines,
  backward_lines,
  train_rms,
  backward_rms,
  // With a ReLU behind, or the addition of a residual and a ReLU.
  train_relu,
  infer_relu,
  backward_relu,
  train_add_relu,
  infer_add_relu,
  backward_add_relu,
};
constexpr bool is_counted(Pass pass) { return pass >= Pass::train_masked && pass < Pass::train_relu; }
constexpr bool is_relu(Pass pass) { return pass >= Pass::train_relu; }

// What a pass is held against, whatever it reads and writes besides: one stream in and one out, or two in and one out.
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
    PassFacts{Pass::train_graphs, "train_graphs", 2, Yardstick::copy, 2, true},
    PassFacts{Pass::backward_graphs, "backward_graphs", 3, Yardstick::stream, 2, true},
    PassFacts{Pass::train_groups, "train_groups", 2, Yardstick::copy, 2, true},
    PassFacts{Pass::backward_groups, "backward_groups", 3, Yardstick::stream, 2, true},
    PassFacts{Pass::train_lines, "train_lines", 2, Yardstick::copy, 1, true},
    PassFacts{Pass::backward_lines, "backward_lines", 3, Yardstick::stream, 1, true},
    PassFacts{Pass::train_rms, "train_rms", 2, Yardstick::copy, 1, true},
    PassFacts{Pass::backward_rms, "backward_rms", 3, Yardstick::stream, 1, true},
    PassFacts{Pass::train_relu, "train_relu", 2, Yardstick::copy, 2, true},            // x -> y, mask
    PassFacts{Pass::infer_relu, "infer_relu", 2, Yardstick::copy, 1, true},            // x -> y
    PassFacts{Pass::backward_relu, "backward_relu", 3, Yardstick::stream, 2, true},    // dy, x, mask -> dx
    PassFacts{Pass::train_add_relu, "train_add_relu", 3, Yardstick::stream, 2, true},  // x, residual -> y, mask
    PassFacts{Pass::infer_add_relu, "infer_add_relu", 3, Yardstick::stream, 1, true},  // x, residual -> y
    PassFacts{Pass::backward_add_relu, "backward_add_relu", 4, Yardstick::stream, 2,
              true},  // dy, x, mask -> dx, dresidual
};

constexpr const PassFacts& facts_of(Pass pass) { return kPasses[static_cast<std::size_t>(pass)]; }
constexpr const char* name_of(Pass pass) { return facts_of(pass).name; }
// What a pass writes: y or dx, if a tensor at all.
constexpr bool writes_y(Pass pass) {
  return pass == Pass::train_add_relu || pass == Pass::infer_add_relu ||
         (facts_of(pass).tensors == 2 && facts_of(pass).yardstick == Yardstick::copy);
}
constexpr bool writes_dx(Pass pass) { return facts_of(pass).tensors >= 3 && !writes_y(pass); }

}  // namespace bench
