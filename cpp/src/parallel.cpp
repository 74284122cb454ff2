#include "parallel.hpp"

#include <algorithm>
#include <atomic>

#include "floating_point.hpp"

#ifdef _OPENMP
#include <omp.h>
#include <pthread.h>
#endif

namespace batchnorm {
namespace {

constexpr int kMostThreads = 64;

std::atomic<int> thread_limit{0};
std::atomic<bool> is_forked_child{false};

#ifdef _OPENMP
void note_fork() { is_forked_child.store(true, std::memory_order_relaxed); }
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

void run_phases(int threads, const Phase* phases, int count, void* context) {
  if (threads == 1) {
    const DefaultFloatingPoint environment;
    for (int p = 0; p < count; ++p) {
      if (phases[p].tasks > 0) phases[p].run(context, {0, phases[p].tasks});
    }
    return;
  }
  parallel(threads, [&](const Team& team) {
    for (int p = 0; p < count; ++p) {
      const Range r = team.share(phases[p].tasks);
      if (r.begin < r.end) phases[p].run(context, r);
      team.barrier();
    }
  });
}

int available_threads(int requested) {
#ifdef _OPENMP
  (void)fork_handler_registered;
  if (requested == 1 || is_forked_child.load(std::memory_order_relaxed) || omp_in_parallel()) return 1;
  const int limit = thread_limit.load(std::memory_order_relaxed);
  int threads = requested > 0 ? requested : omp_get_max_threads();
  if (requested == 0 && limit > 0) threads = std::min(threads, limit);
  // More than any machine would use is a mistake in a setting, which must not end in "cannot create thread".
  return std::clamp(threads, 1, std::max(kMostThreads, omp_get_num_procs()));
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
