#include "parallel.hpp"

#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cassert>
#include <chrono>
#include <cstdlib>
#include <thread>

#include "floating_point.hpp"

#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __linux__
#include <sched.h>
#endif

namespace batchnorm {
namespace {

// The most threads of one call. Idle workers are the bits of one word, and long before 64 threads memory is the limit.
constexpr int kMostThreads = 64;
constexpr int kMostWorkers = kMostThreads - 1;

std::atomic<int> thread_limit{0};
std::atomic<bool> is_forked_child{false};

void note_fork() { is_forked_child.store(true, std::memory_order_relaxed); }
[[maybe_unused]] const int fork_handler_registered = pthread_atfork(nullptr, nullptr, note_fork);

// Processors that this process may use.
int count_processors() {
#ifdef __linux__
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}
int processors() {
  static const int count = count_processors();
  return count;
}

// ---- waiting -----------------------------------------------------------------------------------------------------

// How long a thread looks before it sleeps: what waking one takes here. Calls of 10 and 135 us took, on average, 1.5
// and 1.9 times as long beside a process that kept one of two cores busy; 1.7 and 2.0 at 1 us, 2.0 and 1.9 at 1 ms.
constexpr std::chrono::microseconds kSpin{50};
constexpr int kLooksPerClock = 16;

void pause() {
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

  // Works until the call has ended; for a worker that comes late, it may have long since.
  void work(const Order& order) {
    const bool spins = order.threads <= processors();
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

// ---- the pool ----------------------------------------------------------------------------------------------------

// Whether this thread is in a task of a call that has several threads.
thread_local bool is_working = false;

// Workers are made when first wanted and live, mostly asleep, as long as the process. They and the pool are never
// destroyed, since they may be looking at it while the process ends.
class Pool {
 public:
  // Takes up to `wanted` workers away from other calls: bits of their numbers.
  std::uint64_t take(int wanted) {
    std::uint64_t idle = idle_.load(std::memory_order_relaxed), taken = 0;
    do {
      taken = lowest(idle, wanted);
    } while (!idle_.compare_exchange_weak(idle, idle & ~taken, std::memory_order_acquire, std::memory_order_relaxed));
    if (std::popcount(taken) < wanted && made_.load(std::memory_order_relaxed) < wanted) taken |= make(wanted, taken);
    return taken;
  }
  void give_back(std::uint64_t workers) { idle_.fetch_or(workers, std::memory_order_release); }

  // A call owns the control blocks of its workers and uses that of the first.
  void run(std::uint64_t workers, const Phase* phases, int count, void* context) {
    const int first = std::countr_zero(workers);
    Job& job = workers_[first]->job;
    Order order = job.open(1 + std::popcount(workers), phases, count, context);
    order.job = static_cast<std::uint8_t>(first);
    const Order mine = order;
    for (; workers != 0; workers &= workers - 1) {
      ++order.rank;
      workers_[std::countr_zero(workers)]->call(order);
    }
    job.work(mine);
  }

 private:
  struct Worker {
    Signal bell;
    std::atomic<Order> order;
    Job job;

    void call(const Order& what) {
      order.store(what, std::memory_order_relaxed);
      bell.set(bell.get() + 1);
    }
  };

  static std::uint64_t lowest(std::uint64_t bits, int count) {
    std::uint64_t chosen = 0;
    for (; count > 0 && bits != 0; --count, bits &= bits - 1) chosen |= bits & -bits;
    return chosen;
  }

  // Up to as many workers as are missing, where nobody else is making some and the process has never wanted so many.
  std::uint64_t make(int wanted, std::uint64_t have) {
    std::uint64_t made = 0;
    if (is_making_.test_and_set(std::memory_order_acquire)) return made;
    for (int n = made_.load(std::memory_order_relaxed); n < wanted && std::popcount(have | made) < wanted; ++n) {
      if (!start(n)) break;
      made |= std::uint64_t{1} << n;
      made_.store(n + 1, std::memory_order_relaxed);
    }
    is_making_.clear(std::memory_order_release);
    return made;
  }

  // Signals are for the threads of the program. A system that has no thread left leaves the call with fewer.
  bool start(int number) noexcept {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    bool started = true;
    try {
      if (workers_[number] == nullptr) workers_[number] = new Worker;
      std::thread([this, number] { serve(*workers_[number]); }).detach();
    } catch (...) {
      started = false;
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    return started;
  }

  [[noreturn]] void serve(Worker& worker) {
    const DefaultFloatingPoint environment;
    is_working = true;
    Order order{};
    for (std::uint32_t heard = 0;;) {
      heard = worker.bell.wait(heard, order.threads <= processors());
      order = worker.order.load(std::memory_order_relaxed);
      workers_[order.job]->job.work(order);
    }
  }

  alignas(64) std::atomic<std::uint64_t> idle_{0};
  std::atomic<int> made_{0};
  std::atomic_flag is_making_;
  Worker* workers_[kMostWorkers] = {};
};
constinit Pool pool;

// ---- without a pool ----------------------------------------------------------------------------------------------

// A setting that is no number, or not above 0, is none.
[[maybe_unused]] int threads_of_environment() {
  const char* text = std::getenv("OMP_NUM_THREADS");
  const long threads = text != nullptr ? std::strtol(text, nullptr, 10) : 0;
  return static_cast<int>(std::clamp(threads, 0L, 1'000'000L));
}

void run_alone(const Phase* phases, int count, void* context) {
  for (int p = 0; p < count; ++p) {
    if (phases[p].tasks > 0) phases[p].run(context, {0, phases[p].tasks});
  }
}

}  // namespace

void run_phases(int threads, const Phase* phases, int count, void* context) {
  assert(count <= kMostPhases);
  const DefaultFloatingPoint environment;
  if (threads <= 1) return run_alone(phases, count, context);

  Phase filled[kMostPhases];
  int filled_count = 0;
  std::int64_t most_blocks = 1;
  for (int p = 0; p < count; ++p) {
    if (phases[p].tasks <= 0) continue;
    filled[filled_count++] = phases[p];
    most_blocks = std::max(most_blocks, (phases[p].tasks + phases[p].grain - 1) / phases[p].grain);
  }
  threads = static_cast<int>(std::min<std::int64_t>({threads, kMostThreads, most_blocks}));
  const bool alone = threads == 1 || is_working || is_forked_child.load(std::memory_order_relaxed);
  const std::uint64_t workers = alone ? 0 : pool.take(threads - 1);
  if (workers == 0) return run_alone(phases, count, context);

  is_working = true;
  pool.run(workers, filled, filled_count, context);
  is_working = false;
  pool.give_back(workers);
}

int available_threads(int requested) {
  if (requested == 1 || is_forked_child.load(std::memory_order_relaxed)) return 1;
#ifdef _OPENMP
  if (omp_in_parallel()) return 1;
  const int setting = omp_get_max_threads();
#else
  static const int of_environment = threads_of_environment();
  const int setting = of_environment > 0 ? of_environment : processors();
#endif
  const int limit = thread_limit.load(std::memory_order_relaxed);
  int threads = requested > 0 ? requested : setting;
  if (requested == 0 && limit > 0) threads = std::min(threads, limit);
  return std::clamp(threads, 1, kMostThreads);
}

void set_thread_limit(int threads) { thread_limit.store(threads, std::memory_order_relaxed); }

bool has_openmp() {
#ifdef _OPENMP
  return true;
#else
  return false;
#endif
}

}  // namespace batchnorm
