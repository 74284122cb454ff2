// The machine that runs kernels of CUDA on the CPU: what it computes, and that it finds mistakes. Those that end the
// process are run by ctest, one at a time: simt_test --mistake NAME.
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <string>
#include <vector>

#include "cuda/device.hpp"
#include "expect.hpp"

namespace {

using namespace batchnorm;

constexpr std::uint64_t kSeeds = 20;

enum class Mistake {
  none,
  no_barrier_before_reuse,  // values are loaded to where others still read
  no_cluster_sync,          // sums are added up before all have come
  no_barrier_after_loads,   // values are summed before they are there
  barrier_in_a_branch,
  copies_not_awaited,
  copy_of_odd_bytes,
  part_of_a_warp,
  counter_without_release,
};

// y[channel][i] = x[channel][i] times the sum of the channel, which the blocks of a cluster share: each brings its part
// into shared memory, its first warp sums that and tells all others, and all its threads write. `n` is a multiple of 4
// for each block; sums are by channel parity, so that one meeting a channel is enough.
struct Sums {
  const float* x;
  float* y;
  unsigned channels, n;
  bool by_copies;
  Mistake mistake;
};
constexpr unsigned kThreads = 2 * simt::kWarp, kMostBlocks = 16;
struct Shared {
  device::CopyBarrier arrived;
  double sums[2][kMostBlocks];
  float values[1];
};

void bring(const Sums& c, Shared& s, const float* from, unsigned n, unsigned channel) {
  if (!c.by_copies) {
    for (unsigned i = threadIdx.x; i < n; i += blockDim.x) s.values[i] = from[i];
    if (c.mistake != Mistake::no_barrier_after_loads) __syncthreads();
    return;
  }
  if (threadIdx.x == 0) {
    device::before_copies();
    device::announce(&s.arrived, n * 4);
    device::copy(s.values, from, c.mistake == Mistake::copy_of_odd_bytes ? n * 4 - 4 : n * 4, &s.arrived);
  }
  if (c.mistake != Mistake::copies_not_awaited) device::wait(&s.arrived, channel);
}
// To all blocks of the cluster.
void tell_sum(const Sums& c, Shared& s, unsigned n, unsigned channel) {
  if (threadIdx.x >= simt::kWarp) return;
  double sum = 0;
  for (unsigned i = threadIdx.x; i < n; i += simt::kWarp) sum += s.values[i];
  const unsigned lanes = c.mistake == Mistake::part_of_a_warp ? 0xffffu : ~0u;
  for (unsigned d = simt::kWarp / 2; d > 0; d /= 2) sum += __shfl_xor_sync(lanes, sum, d);
  if (threadIdx.x < device::cluster_size()) {
    device::of_rank(s.sums[channel % 2], threadIdx.x)[device::cluster_rank()] = sum;
  }
}
void scale_by_sums(Sums c) {
  BN_SHARED(memory);
  Shared& s = *reinterpret_cast<Shared*>(memory);
  const unsigned blocks = device::cluster_size(), n = c.n / blocks;
  if (threadIdx.x == 0) device::begin(&s.arrived), device::after_begin();
  device::cluster_sync();
  for (unsigned channel = 0; channel < c.channels; ++channel) {
    const unsigned at = channel * c.n + device::cluster_rank() * n;
    bring(c, s, c.x + at, n, channel);
    tell_sum(c, s, n, channel);
    if (c.mistake != Mistake::no_cluster_sync) device::cluster_sync();
    double total = 0;
    for (unsigned b = 0; b < blocks; ++b) total += s.sums[channel % 2][b];
    for (unsigned i = threadIdx.x; i < n; i += blockDim.x) c.y[at + i] = static_cast<float>(total) * s.values[i];
    if (c.mistake == Mistake::barrier_in_a_branch) {
      if (threadIdx.x == 0) __syncthreads();
    } else if (c.mistake != Mistake::no_barrier_before_reuse) {
      __syncthreads();
    }
  }
  device::cluster_sync();
}

std::vector<float> values_of(std::size_t n) {
  std::vector<float> x(n);
  for (std::size_t i = 0; i < n; ++i) x[i] = 1.0f / static_cast<float>(i % 977 + 1);
  return x;
}
constexpr unsigned kChannels = 4, kValues = 512;
std::vector<float> run(unsigned blocks, bool by_copies, std::uint64_t seed, Mistake mistake = Mistake::none) {
  const std::vector<float> x = values_of(kChannels * kValues);
  std::vector<float> y(x.size(), -1);
  const std::size_t shared = sizeof(Shared) + kValues / blocks * 4;
  simt::launch({.grid = blocks, .block = kThreads, .cluster = blocks, .shared_bytes = shared, .seed = seed},
               scale_by_sums, Sums{x.data(), y.data(), kChannels, kValues, by_copies, mistake});
  return y;
}

// How many of the seeds give other bits than threads in order.
std::size_t differ(unsigned blocks, bool by_copies, Mistake mistake) {
  const std::vector<float> wanted = run(blocks, by_copies, 0);
  std::size_t others = 0;
  for (std::uint64_t seed = 1; seed <= kSeeds; ++seed) {
    const std::vector<float> got = run(blocks, by_copies, seed, mistake);
    others += std::memcmp(got.data(), wanted.data(), got.size() * sizeof(float)) != 0;
  }
  return others;
}

TEST(a_kernel_gives_the_same_bits_whoever_runs_first_and_whenever_copies_land) {
  for (const unsigned blocks : {1u, 2u, 8u, 16u}) {
    for (const bool by_copies : {false, true}) {
      EXPECT(differ(blocks, by_copies, Mistake::none) == 0, blocks, " blocks");
    }
  }
}

TEST(a_kernel_computes_what_its_source_says) {
  const std::vector<float> x = values_of(kChannels * kValues), got = run(4, true, 3);
  for (std::size_t c = 0; c < kChannels; ++c) {
    double sum = 0;
    for (std::size_t i = 0; i < kValues; ++i) sum += x[c * kValues + i];
    for (std::size_t i = c * kValues; i < (c + 1) * kValues; ++i) {
      EXPECT(std::abs(got[i] - sum * x[i]) < 1e-6 * sum, got[i], ", wanted ", sum * x[i]);
    }
  }
}

// Thread sanitizers find these whatever the schedule; the schedules do for themselves.
#if !defined(__SANITIZE_THREAD__)
TEST(a_barrier_that_is_missing_gives_other_bits_for_some_schedule) {
  EXPECT(differ(4, true, Mistake::no_barrier_before_reuse) > 0, "before reuse");
  EXPECT(differ(4, true, Mistake::no_cluster_sync) > 0, "of the cluster");
  EXPECT(differ(4, false, Mistake::no_barrier_after_loads) > 0, "after loads");
}
#endif

void look_at_memory(unsigned char* seen, unsigned bytes) {
  BN_SHARED(memory);
  for (unsigned i = threadIdx.x; i < bytes; i += blockDim.x) seen[blockIdx.x * bytes + i] = memory[i], memory[i] = 0;
}
TEST(shared_memory_begins_as_what_is_no_number) {
  std::vector<unsigned char> seen(3 * 100);
  simt::launch({.grid = 3, .block = 40, .shared_bytes = 100}, look_at_memory, seen.data(), 100u);
  for (const unsigned char byte : seen) EXPECT(byte == 0xFF, static_cast<int>(byte));
}

// Blocks that meet through global memory: y = the sum over blocks of what each has written, twice.
struct Spans {
  const double* x;
  double *part, *y;
  unsigned *count, rounds;
  bool releases;
};
void sum_over_blocks(Spans s) {
  for (unsigned round = 0; round < s.rounds; ++round) {
    double* of_round = s.part + round % 2 * gridDim.x;
    if (threadIdx.x == 0) of_round[blockIdx.x] = s.x[blockIdx.x] * (round + 1);
    if (s.releases) {
      device::meet(s.count, gridDim.x, round);
    } else {
      __syncthreads();
      if (threadIdx.x == 0) atomicAdd(s.count, 1u);
      while (*s.count < gridDim.x * (round + 1)) __nanosleep(64);
      __syncthreads();
    }
    double sum = 0;
    for (unsigned b = 0; b < gridDim.x; ++b) sum += of_round[b];
    if (threadIdx.x == 0) s.y[round * gridDim.x + blockIdx.x] = sum;
  }
}
std::vector<double> spans(std::uint64_t seed, bool releases) {
  constexpr unsigned kBlocks = 24, kRounds = 3;
  std::vector<double> x(kBlocks), part(2 * kBlocks), y(kRounds * kBlocks);
  std::iota(x.begin(), x.end(), 1.0);
  unsigned count = 0;
  simt::launch({.grid = kBlocks, .block = 3, .cluster = kBlocks, .seed = seed}, sum_over_blocks,
               Spans{x.data(), part.data(), y.data(), &count, kRounds, releases});
  return y;
}
TEST(blocks_that_run_at_once_meet_through_global_memory) {
  for (std::uint64_t seed = 0; seed <= 5; ++seed) {
    const std::vector<double> y = spans(seed, true);
    for (std::size_t i = 0; i < y.size(); ++i) {
      EXPECT(y[i] == 300.0 * static_cast<double>(i / 24 + 1), y[i], " at ", i);
    }
  }
}

void spin(unsigned* turns) {
  for (unsigned i = 0; i < 5; ++i) turns[threadIdx.x] += 1, __nanosleep(1);
}
TEST(who_only_lets_others_run_goes_on) {
  std::vector<unsigned> turns(70);
  simt::launch({.block = 70, .seed = 5}, spin, turns.data());
  for (const unsigned n : turns) EXPECT(n == 5, n);
}

TEST(a_lane_reads_the_lane_that_it_names) {
  struct Lanes {
    static void shuffle(unsigned* out) {
      out[threadIdx.x] = __shfl_sync(~0u, threadIdx.x * 10, (threadIdx.x + 1) % 32);
    }
  };
  std::vector<unsigned> out(32);
  simt::launch({.block = 32, .seed = 9}, Lanes::shuffle, out.data());
  for (unsigned i = 0; i < 32; ++i) EXPECT(out[i] == (i + 1) % 32 * 10, out[i], " in lane ", i);
}

constexpr std::pair<const char*, Mistake> kMistakes[] = {
    {"no_barrier_before_reuse", Mistake::no_barrier_before_reuse},
    {"no_cluster_sync", Mistake::no_cluster_sync},
    {"no_barrier_after_loads", Mistake::no_barrier_after_loads},
    {"barrier_in_a_branch", Mistake::barrier_in_a_branch},
    {"copies_not_awaited", Mistake::copies_not_awaited},
    {"copy_of_odd_bytes", Mistake::copy_of_odd_bytes},
    {"part_of_a_warp", Mistake::part_of_a_warp},
    {"counter_without_release", Mistake::counter_without_release},
};
int make(const char* name) {
  // ctest takes an abort for a failure, whatever was printed.
  std::signal(SIGABRT, [](int) { std::_Exit(3); });
  for (const auto& [named, mistake] : kMistakes) {
    if (std::strcmp(name, named) != 0) continue;
    if (mistake == Mistake::counter_without_release) {
      spans(7, false);
    } else {
      // In order, copies land when nobody can run without them.
      run(4, mistake != Mistake::no_barrier_after_loads, mistake == Mistake::copies_not_awaited ? 0 : 7, mistake);
    }
    return 0;
  }
  std::printf("no mistake is called %s\n", name);
  return 2;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 2 && std::strcmp(argv[1], "--mistake") == 0) return make(argv[2]);
  return expect::run_tests(argc > 1 ? argv[1] : nullptr);
}
