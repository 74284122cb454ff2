// Which blocks hold which chunks of a planar tensor: a pure function of sizes and of the device.
#pragma once

#include <algorithm>
#include <optional>
#include <string>

#include "cuda/gpu.hpp"
#include "cuda/planar.cuh"

namespace batchnorm::cuda {

struct Resident {
  Span span;
  unsigned spans = 0;  // that run at once, each of which holds a channel
  std::int64_t shared_bytes = 0;
  bool through_memory = false;  // whether blocks meet there: span.sums and span.count are then to be set

  [[nodiscard]] std::int64_t kept_sums() const { return through_memory ? std::int64_t{2} * spans * span.chunks : 0; }
};

// In words, the same for the same plan.
inline std::string to_string(const Resident& r) {
  const std::string blocks = std::to_string(r.span.blocks);
  const char* kind = r.through_memory ? " blocks that meet through memory" : "-block cluster";
  return blocks + kind + (r.through_memory ? " hold" : " holds") + " a channel, " + std::to_string(r.spans) +
         " at once, up to " + std::to_string(r.span.chunks_a_block) + " of " + std::to_string(r.span.chunks) +
         " chunks and " + std::to_string(r.shared_bytes) + " bytes a block";
}

// More would leave no memory for values: a block of a cluster has the sums of all chunks of a channel. Through memory,
// as many as an `int` counts.
constexpr std::int64_t kMostChunks = 1 << 16, kMostChunksApart = 1 << 30;

// Spans of the fewest blocks, at least `least_blocks`, whose shared memory holds a channel of kInputs tensors of T: a
// cluster of them, a power of two, or any number through memory; none where that is more than the device runs at once,
// or the tensor is not planar. The chunks are those of the CPU. `aligned`: whether all tensors begin at 16-byte
// addresses.
template <class T, int kInputs>
std::optional<Resident> plan_resident(const Problem& problem, const Device& device, bool aligned,
                                      unsigned least_blocks = 1) {
  const Plan plan = make_plan(problem, {true, true, kInputs + 1, sizeof(T)}, Machine{}, 1);
  const RunCut& cut = plan.sum_runs;
  if (!plan.planar() || has_short_runs(problem) || cut.chunks > kMostChunksApart) return std::nullopt;
  constexpr std::int64_t kVector = 16 / sizeof(T);
  const std::int64_t values = cut.piece_length * cut.runs_per_chunk, channels = plan.problem.channels;
  Resident r;
  r.span.problem = plan.problem, r.span.cut = cut, r.span.chunks = static_cast<int>(cut.chunks);
  r.span.stride = static_cast<int>(values + (16 - values % 32 + 32) % 32);
  r.span.whole_vectors = aligned && plan.problem.inner % kVector == 0 && cut.piece_length % kVector == 0;
  const auto hold_by = [&](unsigned blocks) {
    r.span.blocks = blocks;
    r.span.chunks_a_block = static_cast<int>((cut.chunks + blocks - 1) / blocks);
    r.shared_bytes = Slab<T, kInputs>::bytes(r.span);
    return r.shared_bytes <= device.shared_bytes;
  };
  for (unsigned k = 0; k < device.clusters.size(); ++k) {
    if (1u << k < least_blocks || device.clusters[k] == 0 || cut.chunks > kMostChunks || !hold_by(1u << k)) continue;
    r.spans = static_cast<unsigned>(std::min<std::int64_t>(channels, device.clusters[k]));
    return r;
  }
  kernels::Sums somewhere;
  r.through_memory = true, r.span.sums = &somewhere;  // so that none are in shared memory
  const auto most = static_cast<unsigned>(device.multiprocessors);
  for (unsigned blocks = least_blocks; blocks <= most; ++blocks) {
    if (!hold_by(blocks)) continue;
    r.span.sums = nullptr;
    r.spans = static_cast<unsigned>(std::min<std::int64_t>(channels, most / blocks));
    return r;
  }
  return std::nullopt;
}

// Bytes that training moves through memory, over those of the tensor: where channels are held, of x and y, and of dy, x
// and dx; else what is summed is read once more.
struct Traffic {
  int forward, backward;
};
template <class T>
Traffic traffic(const Problem& problem, const Device& device) {
  return {plan_resident<T, 1>(problem, device, true) ? 2 : 3, plan_resident<T, 2>(problem, device, true) ? 3 : 5};
}

}  // namespace batchnorm::cuda
