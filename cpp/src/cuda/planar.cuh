// Planar tensors whose channels fit into the shared memory of the blocks that share them: each value is read once,
// summed where it lies, and applied. The blocks of a span hold a channel, chunk after chunk, and bring the next one
// when it is done. They are a cluster; where that is too small, or there are none, they run at once and meet through
// memory.
#pragma once

#include "cuda/finish.cuh"

namespace batchnorm::cuda {

// How channels are cut and held. A chunk in shared memory has `stride` values, of float32 16 modulo 32 apart from the
// next: so the two chunks of a warp lie in other banks.
struct Span {
  Problem problem;
  RunCut cut;
  int chunks = 0, chunks_a_block = 0, stride = 0;
  bool whole_vectors = false;  // whether runs are whole vectors of 16 bytes at such addresses, in each tensor
  unsigned blocks = 1;         // that hold a channel
  // Where they meet through memory, else null: sums of all chunks of a channel twice, and a count that began as 0, of
  // each span.
  kernels::Sums* sums = nullptr;
  unsigned* count = nullptr;
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
template <class T, int kInputs>
struct Slab {
  device::CopyBarrier* arrived;  // one a chunk
  kernels::Sums* sums;  // of a cluster: of all chunks of the channel, by the parity of how often they were summed
  double* told;         // by the thread that finishes to all: what comes next, a shift, whether coefficients
                        // are wide, and these from 3 on
  T* values;            // the chunks of one input, then those of the next

  static constexpr int kTold = 16;
  BN_DEVICE Slab(unsigned char* memory, const Span& span) {
    told = reinterpret_cast<double*>(memory);
    sums = reinterpret_cast<kernels::Sums*>(told + kTold);
    arrived = reinterpret_cast<device::CopyBarrier*>(sums + kept_sums(span));
    values = reinterpret_cast<T*>(memory + head_bytes(span));
  }
  static constexpr std::int64_t kept_sums(const Span& span) { return span.sums != nullptr ? 0 : 2 * span.chunks; }
  static constexpr std::int64_t head_bytes(const Span& span) {
    const auto sums = static_cast<std::int64_t>(sizeof(kernels::Sums)) * kept_sums(span);
    const auto barriers = static_cast<std::int64_t>(sizeof(device::CopyBarrier)) * span.chunks_a_block;
    return (kTold * std::int64_t{sizeof(double)} + sums + barriers + 127) / 128 * 128;
  }
  static constexpr std::int64_t bytes(const Span& span) {
    return head_bytes(span) + std::int64_t{sizeof(T)} * kInputs * span.stride * span.chunks_a_block;
  }
  [[nodiscard]] BN_DEVICE T* chunk(const Span& span, int q, int input = 0) const {
    return values + (input * span.chunks_a_block + q) * span.stride;
  }
};

// The chunks of a block, and how it meets the others of its span.
struct Mine {
  unsigned rank, index;  // in the span, and of it
  int first, count;

  BN_DEVICE explicit Mine(const Span& span)
      : rank(blockIdx.x % span.blocks),
        index(blockIdx.x / span.blocks),
        first(static_cast<int>(rank) * span.chunks_a_block) {
    const int left = span.chunks - first;
    count = left < 0 ? 0 : left < span.chunks_a_block ? left : span.chunks_a_block;
  }
  // All threads of the span: what any of them has written of sums is seen by all.
  BN_DEVICE void meet(const Span& span) {
    if (span.sums == nullptr) return device::cluster_sync();
    device::meet(span.count + index, span.blocks, rounds_++);
  }
  // The sums of all chunks, of this parity.
  template <class S>
  [[nodiscard]] BN_DEVICE kernels::Sums* sums(const Span& span, const S& slab, int parity) const {
    if (span.sums == nullptr) return slab.sums + parity * span.chunks;
    return span.sums + (std::int64_t{2} * index + parity) * span.chunks;
  }
  // Tells the sums of one of them to all blocks: by the lanes of its threads.
  BN_DEVICE void tell(const Span& span, kernels::Sums* all, int chunk, int lane, const kernels::Sums& sums) const {
    if (span.sums != nullptr) {
      if (lane == 0) all[chunk] = sums;
    } else if (lane < static_cast<int>(span.blocks)) {
      device::of_rank(all, static_cast<unsigned>(lane))[chunk] = sums;
    }
  }

 private:
  unsigned rounds_ = 0;
};

// ---- loading ----

template <class Pass>
BN_DEVICE void load(const Span& span, const Slab<typename Pass::Value, Pass::kInputs>& slab, const Pass& pass,
                    std::int64_t channel, const Mine& mine) {
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
    const auto bytes = static_cast<unsigned>(sizeof(typename Pass::Value)) * static_cast<unsigned>(piece.length);
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

// Terms of a value in shared memory, which is number `at` of the tensor; of two of them, dy and, `apart` values behind,
// x.
template <class Terms>
struct OfValue {
  Terms terms;

  template <class T>
  BN_DEVICE void add(T* x, std::int64_t) {
    terms.add(widened(*x));
  }
};
template <class Terms>
struct OfPair {
  int apart;
  Gate gate;  // what it does not let through is 0 from here on
  Terms terms;

  template <class T>
  BN_DEVICE void add(T* dy, std::int64_t at) {
    if (!gate.lets_through(at)) *dy = T(0);
    terms.add(widened(dy[0]), widened(dy[apart]));
  }
};

// The sums of this block's chunks, to every block of the span. make() gives one of these.
template <class T, int kInputs, class Make>
BN_DEVICE void sum_chunks(const Span& span, const Slab<T, kInputs>& slab, const Mine& mine, std::int64_t channel,
                          int awaited, kernels::Sums* to, const Make& make) {
  const int lane = static_cast<int>(threadIdx.x) % kLanes, side_by_side = static_cast<int>(blockDim.x) / kLanes;
  // Whole warps go round together, since their lanes fold together.
  for (int q0 = 0; q0 < mine.count; q0 += side_by_side) {
    const int q = q0 + static_cast<int>(threadIdx.x) / kLanes;
    auto values = make();
    if (q < mine.count) {
      if (awaited >= 0) device::wait(slab.arrived + q, static_cast<unsigned>(awaited));
      const Piece piece = piece_of(span, channel, mine.first + q);
      T* run = slab.chunk(span, q);
      std::int64_t at = piece.at;
      for (int r = 0; r < piece.runs; ++r, run += piece.length, at += span.problem.channels * span.problem.inner) {
        for (int j = lane; j < piece.length; j += kLanes) values.add(run + j, at + j);
      }
    }
    const kernels::Sums sums = folded(values.terms);
    if (q < mine.count) mine.tell(span, to, mine.first + q, lane, sums);
  }
}

// ---- applying ----

template <class T>
struct alignas(16) Vector {
  T of[16 / sizeof(T)];
};
// Bits of some neighbouring values, the first of which is number `at`, all in one byte: all began as 0.
BN_DEVICE void set_bits(std::uint8_t* bits, std::int64_t at, unsigned set) {
  const auto address = reinterpret_cast<std::uintptr_t>(bits + at / 8);
  auto* word = reinterpret_cast<unsigned*>(address & ~std::uintptr_t{3});
  if (set != 0) atomicOr(word, set << (8 * (address % 4) + static_cast<unsigned>(at % 8)));
}
// f(q, e, at, bit) gives the output of value e of chunk q, number `at` of the tensor, and its bit, which goes to `bits`
// where that is not null.
template <class T, class F>
BN_DEVICE void store(const Span& span, const Mine& mine, std::int64_t channel, T* to, std::uint8_t* bits, const F& f) {
  constexpr int kVector = 16 / sizeof(T);
  const std::int64_t apart = span.problem.channels * span.problem.inner;
  const int step = span.whole_vectors ? kVector : 1;
  for (int q = 0; q < mine.count; ++q) {
    const Piece piece = piece_of(span, channel, mine.first + q);
    for (int e = step * static_cast<int>(threadIdx.x); e < piece.values(); e += step * static_cast<int>(blockDim.x)) {
      const std::int64_t at = piece.at + e / piece.length * apart + e % piece.length;
      unsigned set = 0;
      const auto value = [&](int k) {
        bool bit = false;
        const T output = f(q, e + k, at + k, bit);
        set |= static_cast<unsigned>(bit) << k;
        return output;
      };
      if (span.whole_vectors) {
        Vector<T> vector;
        for (int k = 0; k < kVector; ++k) vector.of[k] = value(k);
        *reinterpret_cast<Vector<T>*>(to + at) = vector;
      } else {
        to[at] = value(0);
      }
      if (bits != nullptr) set_bits(bits, at, set);
    }
  }
}

// What is to be done with the sums, or next: told in slab.told[0] by the thread that finishes.
enum Next { kApply, kAboutShift, kCompensate };
constexpr int kReadMemory = 15;  // in slab.told: whether who finished has read the channel in global memory

// Coefficients, from told[2] on: whether they are wide, and these.
BN_DEVICE void tell(double* told, const Coefficients<double, kernels::Affine>& k) {
  const auto& f = k.is_wide ? k.wide : k.narrow;
  told[2] = k.is_wide ? 1 : 0, told[3] = f.center, told[4] = f.scale, told[5] = f.offset;
}
BN_DEVICE void tell(double* told, const Coefficients<double, kernels::GradAffine>& k) {
  const auto& f = k.is_wide ? k.wide : k.narrow;
  told[2] = k.is_wide ? 1 : 0, told[3] = f.dy_center, told[4] = f.dy_scale, told[5] = f.x_center;
  told[6] = f.x_scale, told[7] = f.offset;
}
template <class T, int N>
BN_DEVICE Maps<T, N> told_maps(const double* told) {
  return {told + 3, told[2] != 0};
}

// ---- forward ----

template <class T>
struct HeldForward {
  using Value = T;
  using A = Arithmetic<T>;
  static constexpr int kInputs = 1;
  const T* x;
  T* y;
  ChannelValues gamma, beta;
  double eps;
  Moments* saved;
  std::int64_t channels = 0;  // of gamma and beta, which repeat where there are fewer; 0: all
  const T* residual = nullptr;
  bool relu = false;
  std::uint8_t* bits = nullptr;  // of the ReLU, which began as 0

  [[nodiscard]] BN_DEVICE const T* input(int) const { return x; }

  // sum(make) with what is summed next.
  template <class Sum>
  BN_DEVICE void with_terms(const Span&, const double* told, std::int64_t, Next next, const Sum& sum) const {
    using About = OfValue<typename TermsOfMoments<T, Again::about_shift>::Type>;
    if (next == kApply) sum([] { return OfValue<typename TermsOfMoments<T, Again::no>::Type>{}; });
    if (next == kAboutShift) sum([told] { return About{{told[1], {}, {}}}; });
    if (next == kCompensate) sum([] { return OfValue<typename TermsOfMoments<T, Again::compensated>::Type>{}; });
  }
  // By one thread of each block, all of which find the same; `done` is what the sums were taken for.
  BN_DEVICE_CALL void finish(const Span& span, const Mine& mine, double* told, std::int64_t channel,
                             const kernels::Sums& total, Next done) const {
    const DoubleDouble count{static_cast<double>(span.problem.count()), 0};
    auto m = moments_from_sums<A, double>(count, done == kAboutShift ? told[1] : 0, &total);
    if (done == kApply && needs_shift<A>(m)) {
      told[1] = static_cast<double>(static_cast<A>(m.mean));
      told[0] = kAboutShift;
      return;
    }
    if (done != kCompensate && mean_below(m, Conditioning<A>::kCompensateBelow) && std::isfinite(m.m2)) {
      told[0] = kCompensate;
      return;
    }
    told[0] = kApply;
    const bool reads_memory = wants_values<A>(m);
    if (reads_memory) settle(span, channel, m);
    told[kReadMemory] = reads_memory ? 1 : 0;
    if (mine.rank == 0) m.put(saved + channel);
    forward_coefficients<A, double>(m, eps, of_channel(gamma, channel, 1), of_channel(beta, channel, 0), true,
                                    [told](const Coefficients<double, kernels::Affine>& k) { tell(told, k); });
  }
  // Once in a blue moon.
  BN_DEVICE_CALL void settle(const Span& span, std::int64_t channel, MomentsOf<double>& of) const {
    Moments m;
    of.put(&m);
    settle_in_memory(span.problem, x, static_cast<const A*>(nullptr), {static_cast<double>(span.problem.count()), 0},
                     channel, m);
    of = MomentsOf<double>::at(&m);
  }
  BN_DEVICE void apply(const Span& span, const Slab<T, 1>& slab, const Mine& mine, std::int64_t channel) const {
    const auto maps = told_maps<T, 3>(slab.told);
    store(span, mine, channel, y, bits, [&](int q, int e, std::int64_t at, bool& bit) {
      A s = maps.of(AffineMap{}, static_cast<A>(slab.chunk(span, q)[e]));
      if (residual != nullptr) s += static_cast<A>(residual[at]);
      bit = !(s <= 0);
      return relu && s < 0 ? T(0) : static_cast<T>(s);
    });
  }

 private:
  [[nodiscard]] BN_DEVICE double of_channel(const ChannelValues& values, std::int64_t c, double absent) const {
    return value_of(values, c, channels, absent);
  }
};

// ---- backward ----

template <class T>
struct HeldBackward {
  using Value = T;
  using A = Arithmetic<T>;
  static constexpr int kInputs = 2;
  const T *dy, *x;
  T* dx;
  const Moments* saved;
  ChannelValues gamma;
  double eps;
  ChannelOutput dgamma, dbeta;
  std::int64_t channels = 0;  // of gamma, as above
  Gate gate = {};
  T* dresidual = nullptr;

  [[nodiscard]] BN_DEVICE const T* input(int i) const { return i == 0 ? dy : x; }

  template <class Sum>
  BN_DEVICE void with_terms(const Span& span, const double*, std::int64_t channel, Next, const Sum& sum) const {
    const double mean = saved[channel].mean;
    sum([&] { return OfPair<TermsOfGradients<T>>{span.stride * span.chunks_a_block, gate, {mean, {}, {}}}; });
  }
  BN_DEVICE_CALL void finish(const Span&, const Mine& mine, double* told, std::int64_t channel,
                             const kernels::Sums& total, Next) const {
    const bool puts = mine.rank == 0;
    told[0] = kApply, told[kReadMemory] = 0;
    tell(told, set_gradients<T>(grad_sums_of(total), saved[channel], value_of(gamma, channel, channels, 1), eps,
                                channel, puts ? dgamma : ChannelOutput(), puts ? dbeta : ChannelOutput()));
  }
  BN_DEVICE void apply(const Span& span, const Slab<T, 2>& slab, const Mine& mine, std::int64_t channel) const {
    const auto maps = told_maps<T, 5>(slab.told);
    store(span, mine, channel, dx, nullptr, [&](int q, int e, std::int64_t, bool&) {
      return static_cast<T>(
          maps.of(GradAffineMap{}, static_cast<A>(slab.chunk(span, q)[e]), static_cast<A>(slab.chunk(span, q, 1)[e])));
    });
    if (dresidual == nullptr) return;
    store(span, mine, channel, dresidual, nullptr,
          [&](int q, int e, std::int64_t, bool&) { return slab.chunk(span, q)[e]; });
  }
};

// ---- the kernel ----

template <class Pass>
__global__ void __launch_bounds__(kMostThreads, 1)
    resident(const __grid_constant__ Span span, const __grid_constant__ Pass pass) {
  BN_SHARED(memory);
  const Slab<typename Pass::Value, Pass::kInputs> slab(memory, span);
  Mine mine(span);
  if (threadIdx.x == 0) {
    for (int q = 0; q < span.chunks_a_block; ++q) device::begin(slab.arrived + q);
    device::after_begin();
  }
  if (span.sums == nullptr) {
    device::cluster_sync();  // all blocks have begun: their memory may be written to
  } else {
    __syncthreads();
  }

  int loaded = 0, summed = 0;
  for (std::int64_t channel = mine.index; channel < span.problem.channels;
       channel += gridDim.x / span.blocks, ++loaded) {
    load(span, slab, pass, channel, mine);
    if (!device::kHasClusters) device::wait(slab.arrived, 0);
    if (!device::kHasClusters || !span.whole_vectors) __syncthreads();
    for (Next next = kApply;; next = static_cast<Next>(static_cast<int>(slab.told[0]))) {
      kernels::Sums* const sums = mine.sums(span, slab, summed++ % 2);
      const int awaited = next == kApply && device::kHasClusters && span.whole_vectors ? loaded : -1;
      pass.with_terms(span, slab.told, channel, next,
                      [&](const auto& make) { sum_chunks(span, slab, mine, channel, awaited, sums, make); });
      mine.meet(span);  // all sums are there
      if (threadIdx.x == 0)
        pass.finish(span, mine, slab.told, channel, added_up(span.chunks, [sums](std::int64_t k) { return sums[k]; }),
                    next);
      __syncthreads();  // all know what is next
      if (slab.told[0] == static_cast<double>(kApply)) break;
    }
    if (slab.told[kReadMemory] != 0) mine.meet(span);  // who reads x has done so before it may be written over
    pass.apply(span, slab, mine, channel);
    // The copies that thread 0 issues come behind what each thread has written there.
    device::before_copies();
    __syncthreads();  // the slab, and what was told, are free
  }
  if (span.sums == nullptr) device::cluster_sync();  // nobody writes to the memory of a block that has ended
}

}  // namespace batchnorm::cuda
