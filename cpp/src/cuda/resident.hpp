// Which blocks hold which chunks of a planar tensor: a pure function of sizes.
#pragma once

#include <optional>

#include "cuda/planar.cuh"

namespace batchnorm::cuda {

struct Resident {
  Span span;
  unsigned blocks = 0;  // of a cluster, which holds a channel
  std::int64_t shared_bytes = 0;
};

// More would leave no memory for values: each block has the sums of all chunks of a channel.
constexpr std::int64_t kMostChunks = 1 << 16;

// The fewest blocks, a power of two up to `most_blocks`, at least `least_blocks`, whose shared memory of up to
// `shared_bytes` each holds a channel of kInputs tensors; none where it does not fit, or the tensor is not planar. The
// chunks are those of the CPU. `aligned`: whether all tensors begin at 16-byte addresses.
template <int kInputs>
std::optional<Resident> plan_resident(const Problem& problem, std::int64_t shared_bytes, unsigned least_blocks,
                                      unsigned most_blocks, bool aligned) {
  const Plan plan = make_plan(problem, {true, true, kInputs + 1, sizeof(float)}, Machine{}, 1);
  if (!plan.planar() || has_short_runs(problem) || plan.sum_runs.chunks > kMostChunks) return std::nullopt;
  const RunCut& cut = plan.sum_runs;
  const std::int64_t values = cut.piece_length * cut.runs_per_chunk;
  Resident r;
  r.span.problem = plan.problem, r.span.cut = cut, r.span.chunks = static_cast<int>(cut.chunks);
  r.span.stride = static_cast<int>(values + (16 - values % 32 + 32) % 32);
  r.span.whole_vectors = aligned && plan.problem.inner % 4 == 0 && cut.piece_length % 4 == 0;
  for (r.blocks = least_blocks; r.blocks <= most_blocks; r.blocks *= 2) {
    r.span.chunks_a_block = static_cast<int>((cut.chunks + r.blocks - 1) / r.blocks);
    r.shared_bytes = Slab<kInputs>::bytes(r.span);
    if (r.shared_bytes <= shared_bytes) return r;
  }
  return std::nullopt;
}

}  // namespace batchnorm::cuda
