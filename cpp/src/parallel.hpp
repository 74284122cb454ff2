// Threads: a call is a list of phases of independent tasks, worked off by the calling thread and by what the process's
// pool has idle. No phase waits for a thread that has not begun one of its tasks.
// parallel.cpp is the only file that knows OpenMP, and knows it for its settings alone.
#pragma once

#include <cstdint>

namespace batchnorm {

struct Range {
  std::int64_t begin, end;
};

// Part `rank` of `size` contiguous parts of `tasks` tasks.
inline Range share(std::int64_t tasks, int rank, int size) { return {tasks * rank / size, tasks * (rank + 1) / size}; }

// One phase of a call: `tasks` independent tasks. A thread has a contiguous share of them (share r of `threads`) and
// takes over tasks from the shares of others when its own is done.
struct Phase {
  std::int64_t tasks;
  std::int64_t grain;  // tasks claimed at a time, >= 1
  bool backwards;      // shares are visited from their ends, and run() goes through its range from the end
  // Gets at most `grain` tasks at a time where several threads work, and all tasks where one does. What can fail must
  // come before: the others would go on in the frame of a call that has been left.
  void (*run)(void* context, Range tasks) noexcept;
};

constexpr int kMostPhases = 8;

// Runs the phases in order, each after all tasks of the one before are done, on at most `threads` threads, this one
// among them. While a phase runs the thread has the default floating-point environment; the caller's is put back after.
// Called from a task, it runs on the task's thread alone; from a thread with a small stack, on others alone.
void run_phases(int threads, const Phase* phases, int count, void* context);

// One phase of tasks: f(Range) for all of them.
template <class F>
void run_tasks(int threads, std::int64_t tasks, F f, std::int64_t grain = 1) {
  const Phase phase{tasks, grain, false, [](void* self, Range range) noexcept { (*static_cast<F*>(self))(range); }};
  run_phases(threads, &phase, 1, &f);
}

// Runs f() on this thread, in the default floating-point environment and as a function of its own, which the compiler
// cannot mix with the caller's arithmetic.
void run_task_here(void (*run)(void* context, Range tasks) noexcept, void* context);
template <class F>
void run_here(F&& f) {
  run_task_here([](void* context, Range) noexcept { (*static_cast<F*>(context))(); }, &f);
}

// Threads for a call that asks for `requested` (0: the process's setting, else OpenMP's for this thread, else
// OMP_NUM_THREADS, else the processors this process may use). 1 inside somebody's OpenMP region.
int available_threads(int requested);

// The most threads that a call of this thread has been shared among since this was last asked; 1: none was shared.
int widest_call();

void set_thread_limit(int threads);

// Whether OpenMP is compiled in.
bool has_openmp();

// Before a task ends that has stored around the caches: another thread may read next. Costs nothing where none is under
// way; x86 alone has such stores.
inline void fence_streams() {
#if defined(__x86_64__)
  __builtin_ia32_sfence();
#endif
}

}  // namespace batchnorm
