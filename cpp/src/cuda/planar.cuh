// Planar tensors of float32 whose channels fit into the shared memory of the blocks that share them: each value is read
// once, summed where it lies, and applied. The blocks of a cluster hold a channel, chunk after chunk, and bring the
// next one when it is done.
#pragma once

#include "cuda/sums.cuh"
#include "gradient_math.hpp"
#include "plan.hpp"
#include "resum.hpp"

namespace batchnorm::cuda {

// How channels are cut and held. A chunk in shared memory has `stride` values, 16 modulo 32 apart from the next: so the
// two chunks of a warp lie in other banks.
struct Span {
  Problem problem;
  RunCut cut;
  int chunks = 0, chunks_a_block = 0, stride = 0;
  bool whole_vectors = false;  // whether runs are whole vectors of 16 bytes at such addresses, in each tensor
};

// A chunk: its runs in the tensor.
struct Piece {
  std::int64_t at;
  int runs, length;

  [[nodiscard]] BN_DEVICE int values() const { return runs * length; }
};
BN_DEVICE Piece piece_of(const Span& span, std::int64_t channel, int k) {
  const RunCut& cut = span.cut;
  const std::int64_t o = k / cut.pieces_per_run * cut.runs_per_chunk, i = k % cut.pieces_per_run * cut.piece_length;
  const std::int64_t runs = span.problem.outer - o, values = span.problem.inner - i;
  return {(o * span.problem.channels + channel) * span.problem.inner + i,
          static_cast<int>(runs < cut.runs_per_chunk ? runs : cut.runs_per_chunk),
          static_cast<int>(values < cut.piece_length ? values : cut.piece_length)};
}

// A block of 227 KB holds 13 chunks of 4096 values, whose lanes are 208 threads; with more, less registers are left to
// each than finishing takes.
constexpr int kMostThreads = 256;

// What a block has in shared memory, one behind the other.
template <int kInputs>
struct Slab {
  device::CopyBarrier* arrived;  // one a chunk
  kernels::Sums* sums;           // of all chunks of the channel, by the parity of how often they were summed
  double* told;                  // by the thread that finishes to all: what comes next, a shift, whether coefficients
                                 // are wide, and these from 3 on
  float* values;                 // the chunks of one input, then those of the next

  static constexpr int kTold = 16;
  BN_DEVICE Slab(unsigned char* memory, const Span& span) {
    told = reinterpret_cast<double*>(memory);
    sums = reinterpret_cast<kernels::Sums*>(told + kTold);
    arrived = reinterpret_cast<device::CopyBarrier*>(sums + 2 * span.chunks);
    values = reinterpret_cast<float*>(memory + head_bytes(span));
  }
  static constexpr std::int64_t head_bytes(const Span& span) {
    const auto sums = static_cast<std::int64_t>(2 * sizeof(kernels::Sums)) * span.chunks;
    const auto barriers = static_cast<std::int64_t>(sizeof(device::CopyBarrier)) * span.chunks_a_block;
    return (kTold * std::int64_t{sizeof(double)} + sums + barriers + 127) / 128 * 128;
  }
  static constexpr std::int64_t bytes(const Span& span) {
    return head_bytes(span) + std::int64_t{sizeof(float)} * kInputs * span.stride * span.chunks_a_block;
  }
  [[nodiscard]] BN_DEVICE float* chunk(const Span& span, int q, int input = 0) const {
    return values + (input * span.chunks_a_block + q) * span.stride;
  }
};

// The chunks of a block.
struct Mine {
  int first, count;

  BN_DEVICE explicit Mine(const Span& span) : first(static_cast<int>(device::cluster_rank()) * span.chunks_a_block) {
    const int left = span.chunks - first;
    count = left < 0 ? 0 : left < span.chunks_a_block ? left : span.chunks_a_block;
  }
};

// ---- loading ----

template <class Pass>
BN_DEVICE void load(const Span& span, const Slab<Pass::kInputs>& slab, const Pass& pass, std::int64_t channel,
                    const Mine& mine) {
  const std::int64_t apart = span.problem.channels * span.problem.inner;
  if (!span.whole_vectors) {
    for (int q = 0; q < mine.count; ++q) {
      const Piece piece = piece_of(span, channel, mine.first + q);
      for (int e = static_cast<int>(threadIdx.x); e < piece.values(); e += static_cast<int>(blockDim.x)) {
        const std::int64_t from = piece.at + e / piece.length * apart + e % piece.length;
        for (int i = 0; i < Pass::kInputs; ++i) slab.chunk(span, q, i)[e] = pass.input(i)[from];
      }
    }
    return;
  }
  // Copies that arrive on their own are issued by one thread; without them the threads share the runs.
  if (device::kHasClusters && threadIdx.x != 0) return;
  const int first = device::kHasClusters ? 0 : static_cast<int>(threadIdx.x);
  const int step = device::kHasClusters ? 1 : static_cast<int>(blockDim.x);
  device::before_copies();
  for (int q = 0; q < mine.count; ++q) {
    const Piece piece = piece_of(span, channel, mine.first + q);
    const auto bytes = static_cast<unsigned>(sizeof(float)) * static_cast<unsigned>(piece.length);
    device::announce(slab.arrived + q, static_cast<unsigned>(Pass::kInputs * piece.runs) * bytes);
    for (int r = first; r < piece.runs; r += step) {
      for (int i = 0; i < Pass::kInputs; ++i) {
        device::copy(slab.chunk(span, q, i) + r * piece.length, pass.input(i) + piece.at + r * apart, bytes,
                     slab.arrived + q);
      }
    }
  }
}

// ---- summing ----

// Terms of a value in shared memory; of two of them, dy and, `apart` values behind, x.
template <class Terms>
struct OfValue {
  Terms terms;

  BN_DEVICE void add(const float* x) { terms.add(*x); }
};
struct OfPair {
  int apart;
  GradientTerms<Plain> terms;

  BN_DEVICE void add(const float* dy) { terms.add(dy[0], dy[apart]); }
};

// The sums of this block's chunks, to every block of the cluster. make() gives one of these.
template <int kInputs, class Make>
BN_DEVICE void sum_chunks(const Span& span, const Slab<kInputs>& slab, const Mine& mine, std::int64_t channel,
                          int awaited, kernels::Sums* to, const Make& make) {
  const int lane = static_cast<int>(threadIdx.x) % kLanes, side_by_side = static_cast<int>(blockDim.x) / kLanes;
  // Whole warps go round together, since their lanes fold together.
  for (int q0 = 0; q0 < mine.count; q0 += side_by_side) {
    const int q = q0 + static_cast<int>(threadIdx.x) / kLanes;
    auto values = make();
    if (q < mine.count) {
      if (awaited >= 0) device::wait(slab.arrived + q, static_cast<unsigned>(awaited));
      const Piece piece = piece_of(span, channel, mine.first + q);
      const float* run = slab.chunk(span, q);
      for (int r = 0; r < piece.runs; ++r, run += piece.length) {
        for (int j = lane; j < piece.length; j += kLanes) values.add(run + j);
      }
    }
    const kernels::Sums sums = folded(values.terms);
    if (q < mine.count && lane < static_cast<int>(device::cluster_size())) {
      device::of_rank(to, static_cast<unsigned>(lane))[mine.first + q] = sums;
    }
  }
}

// ---- applying ----

struct alignas(16) Vector {
  float of[4];
};
// f(q, e) gives the output of value e of chunk q.
template <class F>
BN_DEVICE void store(const Span& span, const Mine& mine, std::int64_t channel, float* to, const F& f) {
  const std::int64_t apart = span.problem.channels * span.problem.inner;
  const int step = span.whole_vectors ? 4 : 1;
  for (int q = 0; q < mine.count; ++q) {
    const Piece piece = piece_of(span, channel, mine.first + q);
    for (int e = step * static_cast<int>(threadIdx.x); e < piece.values(); e += step * static_cast<int>(blockDim.x)) {
      float* const at = to + piece.at + e / piece.length * apart + e % piece.length;
      if (span.whole_vectors) {
        *reinterpret_cast<Vector*>(at) = {{f(q, e), f(q, e + 1), f(q, e + 2), f(q, e + 3)}};
      } else {
        *at = f(q, e);
      }
    }
  }
}

// What is to be done with the sums, or next: told in slab.told[0] by the thread that finishes.
enum Next { kApply, kAboutShift, kCompensate };
constexpr int kReadMemory = 15;  // in slab.told: whether who finished has read the channel in global memory

// ---- forward ----

struct Forward {
  static constexpr int kInputs = 1;
  const float* x;
  float* y;
  ChannelValues gamma, beta;
  double eps;
  Moments* saved;

  [[nodiscard]] BN_DEVICE const float* input(int) const { return x; }

  // sum(make) with what is summed next.
  template <class Sum>
  BN_DEVICE void with_terms(const Span&, const double* told, std::int64_t, Next next, const Sum& sum) const {
    if (next == kApply) sum([] { return OfValue<AboutZero>{}; });
    if (next == kAboutShift) sum([told] { return OfValue<AboutShift>{{told[1], {}, {}}}; });
    if (next == kCompensate) sum([] { return OfValue<CompensatedAboutZero>{}; });
  }
  // By one thread of each block, all of which find the same; `done` is what the sums were taken for.
  BN_DEVICE_CALL void finish(const Span& span, double* told, std::int64_t channel, const kernels::Sums& total,
                             Next done) const {
    using Limits = Conditioning<float>;
    const double count = static_cast<double>(span.problem.count()), shift = done == kAboutShift ? told[1] : 0;
    auto m = moments_from_sums<float, double>({count, 0}, shift, {total.first, total.first_lo},
                                              {total.second, total.second_lo});
    if (done == kApply && needs_shift<float>(m)) {
      told[1] = static_cast<float>(m.mean);
      told[0] = kAboutShift;
      return;
    }
    if (done != kCompensate && mean_below(m, Limits::kCompensateBelow) && std::isfinite(m.m2)) {
      told[0] = kCompensate;
      return;
    }
    told[0] = kApply;
    const bool exactly = mean_below(m, Limits::kExactBelow) && std::isfinite(m.m2);
    if (exactly) settle_in_memory(span, channel, m);
    told[kReadMemory] = exactly ? 1 : 0;
    if (device::cluster_rank() == 0) m.put(saved + channel);
    forward_coefficients<float, double>(m, eps, gamma.value_or(channel, 1), beta.value_or(channel, 0), true,
                                        [told](const Coefficients<double, kernels::Affine>& k) {
                                          told[2] = k.is_wide ? 1 : 0;
                                          const auto& of = k.is_wide ? k.wide : k.narrow;
                                          told[3] = of.center, told[4] = of.scale, told[5] = of.offset;
                                        });
  }
  // Of all values in memory, one after the other: a mean that nothing else tells, once in a blue moon.
  BN_DEVICE_CALL void settle_in_memory(const Span& span, std::int64_t channel, MomentsOf<double>& of) const {
    const Problem& p = span.problem;
    const auto each = [&](const auto& f) {
      for (std::int64_t o = 0; o < p.outer; ++o) {
        for (std::int64_t i = 0; i < p.inner; ++i) f(double{x[(o * p.channels + channel) * p.inner + i]}, 1.0);
      }
    };
    Moments m;
    of.put(&m);
    settle_exactly(each, {m.count, 0}, m);
    of = MomentsOf<double>::at(&m);
  }
  BN_DEVICE void apply(const Span& span, const Slab<1>& slab, const Mine& mine, std::int64_t channel) const {
    const double* k = slab.told + 3;
    if (slab.told[2] != 0) {
      return store(span, mine, channel, y,
                   [&](int q, int e) { return static_cast<float>((slab.chunk(span, q)[e] - k[0]) * k[1] + k[2]); });
    }
    const auto center = static_cast<float>(k[0]), scale = static_cast<float>(k[1]), offset = static_cast<float>(k[2]);
    store(span, mine, channel, y, [&](int q, int e) { return (slab.chunk(span, q)[e] - center) * scale + offset; });
  }
};

// ---- backward ----

struct Backward {
  static constexpr int kInputs = 2;
  const float *dy, *x;
  float* dx;
  const Moments* saved;
  ChannelValues gamma;
  double eps;
  ChannelOutput dgamma, dbeta;

  [[nodiscard]] BN_DEVICE const float* input(int i) const { return i == 0 ? dy : x; }

  template <class Sum>
  BN_DEVICE void with_terms(const Span& span, const double*, std::int64_t channel, Next, const Sum& sum) const {
    const double mean = saved[channel].mean;
    sum([&] { return OfPair{span.stride * span.chunks_a_block, {mean, {}, {}}}; });
  }
  BN_DEVICE_CALL void finish(const Span&, double* told, std::int64_t channel, const kernels::Sums& total, Next) const {
    auto m = MomentsOf<double>::at(saved + channel);
    const GradSumsOf<double> s{{total.first, total.first_lo}, {total.second, total.second_lo}};
    const DoubleDouble rstd = m.count == 0 ? DoubleDouble{} : rstd_for<float>(m, eps);
    if (device::cluster_rank() == 0) {
      dgamma.set(channel, dgamma_of<float>(m, s, rstd));
      dbeta.set(channel, dbeta_of(s));
    }
    m.count = m.count == 0 ? 1 : m.count;
    const auto k = backward_coefficients<float, double>(m, m.count, s, rstd, gamma.value_or(channel, 1));
    told[0] = kApply, told[2] = k.is_wide ? 1 : 0, told[kReadMemory] = 0;
    const auto& of = k.is_wide ? k.wide : k.narrow;
    told[3] = of.dy_center, told[4] = of.dy_scale, told[5] = of.x_center, told[6] = of.x_scale, told[7] = of.offset;
  }
  BN_DEVICE void apply(const Span& span, const Slab<2>& slab, const Mine& mine, std::int64_t channel) const {
    if (slab.told[2] != 0) return apply_as<double>(span, slab, mine, channel);
    apply_as<float>(span, slab, mine, channel);
  }

 private:
  template <class A>
  BN_DEVICE void apply_as(const Span& span, const Slab<2>& slab, const Mine& mine, std::int64_t channel) const {
    const double* k = slab.told + 3;
    const auto dy_center = static_cast<A>(k[0]), dy_scale = static_cast<A>(k[1]), x_center = static_cast<A>(k[2]),
               x_scale = static_cast<A>(k[3]), offset = static_cast<A>(k[4]);
    store(span, mine, channel, dx, [&](int q, int e) {
      const A g = slab.chunk(span, q)[e], v = slab.chunk(span, q, 1)[e];
      return static_cast<float>((g - dy_center) * dy_scale + (v - x_center) * x_scale + offset);
    });
  }
};

// ---- the kernel ----

template <class Pass>
__global__ void __launch_bounds__(kMostThreads, 1)
    resident(const __grid_constant__ Span span, const __grid_constant__ Pass pass) {
  BN_SHARED(memory);
  const Slab<Pass::kInputs> slab(memory, span);
  const Mine mine(span);
  const std::int64_t clusters = gridDim.x / device::cluster_size();
  if (threadIdx.x == 0) {
    for (int q = 0; q < span.chunks_a_block; ++q) device::begin(slab.arrived + q);
    device::after_begin();
  }
  device::cluster_sync();  // all blocks have begun: their memory may be written to

  int loaded = 0, summed = 0;
  for (std::int64_t channel = blockIdx.x / device::cluster_size(); channel < span.problem.channels;
       channel += clusters, ++loaded) {
    load(span, slab, pass, channel, mine);
    if (!device::kHasClusters) device::wait(slab.arrived, 0);
    if (!device::kHasClusters || !span.whole_vectors) __syncthreads();
    for (Next next = kApply;; next = static_cast<Next>(static_cast<int>(slab.told[0]))) {
      kernels::Sums* const sums = slab.sums + summed++ % 2 * span.chunks;
      const int awaited = next == kApply && device::kHasClusters && span.whole_vectors ? loaded : -1;
      pass.with_terms(span, slab.told, channel, next,
                      [&](const auto& make) { sum_chunks(span, slab, mine, channel, awaited, sums, make); });
      device::cluster_sync();  // all sums are there
      if (threadIdx.x == 0)
        pass.finish(span, slab.told, channel, added_up(span.chunks, [sums](std::int64_t k) { return sums[k]; }), next);
      __syncthreads();  // all know what is next
      if (slab.told[0] == static_cast<double>(kApply)) break;
    }
    if (slab.told[kReadMemory] != 0) device::cluster_sync();  // who reads x has done so before it may be written over
    pass.apply(span, slab, mine, channel);
    __syncthreads();  // the slab, and what was told, are free
  }
  device::cluster_sync();  // nobody writes to the memory of a block that has ended
}

}  // namespace batchnorm::cuda
