#include "parallel.hpp"

#include <algorithm>
#include <atomic>

#ifdef _OPENMP
#include <omp.h>
#include <pthread.h>
#endif
#if defined(__x86_64__)
#include <xmmintrin.h>
#elif defined(__aarch64__)
#include <cstdint>
#endif

namespace batchnorm {
namespace {

constexpr int kMostThreads = 64;

std::atomic<int> thread_limit{0};
std::atomic<bool> used_threads{false};
std::atomic<bool> forked_after_use{false};

// The default environment (round to nearest, subnormals kept, no traps) for as long as it lives. The caller's control
// bits and exception flags come back unchanged.
class DefaultFloatingPoint {
 public:
#if defined(__x86_64__)
  DefaultFloatingPoint() : caller_(_mm_getcsr()) {
    if (caller_ != kDefault) _mm_setcsr(kDefault);
  }
  ~DefaultFloatingPoint() { _mm_setcsr(caller_); }

 private:
  static constexpr unsigned kDefault = 0x1f80;
  unsigned caller_;
#elif defined(__aarch64__)
  DefaultFloatingPoint() {
    __asm__ __volatile__("mrs %0, fpcr\n\tmrs %1, fpsr" : "=r"(control_), "=r"(status_));
    __asm__ __volatile__("msr fpcr, %0" ::"r"(std::uint64_t{0}));
  }
  ~DefaultFloatingPoint() { __asm__ __volatile__("msr fpcr, %0\n\tmsr fpsr, %1" ::"r"(control_), "r"(status_)); }

 private:
  std::uint64_t control_, status_;
#endif
 public:
  DefaultFloatingPoint(const DefaultFloatingPoint&) = delete;
  DefaultFloatingPoint& operator=(const DefaultFloatingPoint&) = delete;
};

#ifdef _OPENMP
void note_fork() {
  if (used_threads.load(std::memory_order_relaxed)) forked_after_use.store(true, std::memory_order_relaxed);
}
const int fork_handler_registered = pthread_atfork(nullptr, nullptr, note_fork);
#endif

}  // namespace

void Team::barrier() const {
#ifdef _OPENMP
  if (size_ > 1) {
#pragma omp barrier
  }
#endif
}

void run_in_parallel(int threads, void (*f)(void*, const Team&), void* context) {
#ifdef _OPENMP
  if (threads > 1) {
    used_threads.store(true, std::memory_order_relaxed);
#pragma omp parallel num_threads(threads)
    {
      const DefaultFloatingPoint environment;
      f(context, Team(omp_get_thread_num(), omp_get_num_threads()));
    }
    return;
  }
#endif
  (void)threads;
  const DefaultFloatingPoint environment;
  f(context, Team(0, 1));
}

int available_threads(int requested) {
#ifdef _OPENMP
  (void)fork_handler_registered;
  if (requested == 1 || forked_after_use.load(std::memory_order_relaxed) || omp_in_parallel()) return 1;
  // More threads than any machine would use are a mistake that must not end in "cannot create thread".
  if (requested > 0) return std::min(requested, std::max(kMostThreads, omp_get_num_procs()));
  const int limit = thread_limit.load(std::memory_order_relaxed), machine = omp_get_max_threads();
  return limit > 0 && limit < machine ? limit : machine;
#else
  (void)requested;
  return 1;
#endif
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
