// The control block of a call that several threads share (parallel.hpp): how its tasks are claimed, and how its threads
// wait for each other.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>

#include "parallel.hpp"

namespace batchnorm {

// The most threads of one call. Idle workers are the bits of one word, and long before 64 threads memory is the limit.
constexpr int kMostThreads = 64;

// ---- waiting -----------------------------------------------------------------------------------------------------

// How long a thread looks before it sleeps: what waking one takes here. Calls of 10 and 135 us took, on average, 1.5
// and 1.9 times as long beside a process that kept one of two cores busy; 1.7 and 2.0 at 1 us, 2.0 and 1.9 at 1 ms.
constexpr std::chrono::microseconds kSpin{50};
constexpr int kLooksPerClock = 16;

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ __volatile__("isb");
#endif
}

// A word that one thread changes and others wait for.
class alignas(64) Signal {
 public:
  [[nodiscard]] std::uint32_t get() const { return word_.load(std::memory_order_acquire); }

  void set(std::uint32_t value) {
    // Ordered against the two lines of sleep(): either that sees the value, or this sees the sleeper.
    word_.store(value, std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst) != 0) word_.notify_all();
  }

  // Returns what the word has become when it is no longer `old`.
  std::uint32_t wait(std::uint32_t old, bool spins) {
    if (!spins || !has_changed_soon(old)) sleep(old);
    return get();
  }

 private:
  [[nodiscard]] bool has_changed_soon(std::uint32_t old) const {
    const auto end = std::chrono::steady_clock::now() + kSpin;
    do {
      for (int k = 0; k < kLooksPerClock; ++k) {
        if (get() != old) return true;
        pause();
      }
    } while (std::chrono::steady_clock::now() < end);
    return false;
  }
  void sleep(std::uint32_t old) {
    sleepers_.fetch_add(1, std::memory_order_seq_cst);
    word_.wait(old, std::memory_order_seq_cst);
    sleepers_.fetch_sub(1, std::memory_order_relaxed);
  }

  std::atomic<std::uint32_t> word_{0};
  std::atomic<std::uint32_t> sleepers_{0};
};

// ---- one call ----------------------------------------------------------------------------------------------------

// Tasks are claimed in blocks of `grain`; the last block of a share may be smaller.
struct Share {
  Range tasks;
  std::int64_t grain, blocks;

  Share(const Phase& phase, int rank, int size) : tasks(share(phase.tasks, rank, size)) {
    const std::int64_t count = tasks.end - tasks.begin;
    grain = std::max(phase.grain, count >> 31);  // a count of blocks has 32 bits
    blocks = (count + grain - 1) / grain;
  }
  [[nodiscard]] Range block(std::int64_t k) const {
    const std::int64_t begin = tasks.begin + k * grain;
    return {begin, std::min(begin + grain, tasks.end)};
  }
};

// A worker's part in a call. One word, so that a worker that comes late reads the newest whole.
struct alignas(8) Order {
  std::uint32_t generation;
  std::uint8_t job, rank, threads, phases;
};
static_assert(std::atomic<Order>::is_always_lock_free);

// The control block of a call. It is never freed, and its next call has another generation, which is part of every
// word that a claim looks at: a worker that comes late claims nothing. What is not atomic is read after a claim alone,
// and until the claimed tasks are done the call goes on.
class Job {
 public:
  // Returns the order for the call; rank and job are the caller's to fill in. No phase is empty.
  Order open(int threads, const Phase* phases, int count, void* context) {
    ++generation_;
    context_ = context;
    for (int p = 0; p < count; ++p) {
      phases_[p] = phases[p];
      std::int64_t blocks = 0;
      for (int r = 0; r < threads; ++r) {
        const std::int64_t mine = Share(phases[p], r, threads).blocks;
        claims_[r].left[p].store(std::uint64_t{generation_} << 32 | static_cast<std::uint64_t>(mine),
                                 std::memory_order_relaxed);
        blocks += mine;
      }
      unfinished_[p].store(blocks, std::memory_order_relaxed);
    }
    progress_.set(progress(generation_, 0));
    return {generation_, 0, 0, static_cast<std::uint8_t>(threads), static_cast<std::uint8_t>(count)};
  }

  // Works until the call has ended; for a worker that comes late, it may have long since. `spins`: a processor is left
  // for each thread of the call.
  void work(const Order& order, bool spins) {
    std::uint32_t now = progress_.get();
    for (std::uint32_t p = 0; p < order.phases; ++p) {
      if (now == progress(order.generation, p)) {
        work_on_phase(order, p);
        now = progress_.wait(now, spins);
      }
    }
  }

 private:
  struct alignas(64) Claims {
    std::atomic<std::uint64_t> left[kMostPhases];  // generation above, blocks not yet claimed below
  };

  static std::uint32_t progress(std::uint32_t generation, std::uint32_t phase) {
    static_assert(kMostPhases < 16);
    return generation << 4 | phase;
  }

  // Whether there was a block, of which `left` were left.
  static bool claim(std::atomic<std::uint64_t>& word, std::uint32_t generation, std::int64_t& left) {
    std::uint64_t seen = word.load(std::memory_order_relaxed);
    do {
      left = static_cast<std::uint32_t>(seen);
      if (seen >> 32 != generation || left == 0) return false;
    } while (!word.compare_exchange_weak(seen, seen - 1, std::memory_order_acquire, std::memory_order_relaxed));
    return true;
  }

  void work_on_phase(const Order& order, std::uint32_t p) {
    std::int64_t finished = 0;
    for (int k = 0; k < order.threads; ++k) {
      const int r = (order.rank + k) % order.threads;
      std::int64_t left = 0;
      while (claim(claims_[r].left[p], order.generation, left)) {
        const Phase& phase = phases_[p];
        const Share from(phase, r, order.threads);
        phase.run(context_, from.block(phase.backwards ? left - 1 : from.blocks - left));
        ++finished;
      }
    }
    if (finished == 0) return;
    if (unfinished_[p].fetch_sub(finished, std::memory_order_acq_rel) == finished) {
      progress_.set(progress(order.generation, p + 1));
    }
  }

  Signal progress_;
  std::uint32_t generation_ = 0;
  void* context_ = nullptr;
  Phase phases_[kMostPhases];
  alignas(64) std::atomic<std::int64_t> unfinished_[kMostPhases];
  Claims claims_[kMostThreads];
};

}  // namespace batchnorm
