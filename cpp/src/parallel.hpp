// Threads: one parallel region a call, in which every thread runs the same function with its own Team view.
// parallel.cpp is the only file that knows OpenMP.
#pragma once

#include <cstdint>

namespace batchnorm {

struct Range {
  std::int64_t begin, end;
};

struct Phase {
  std::int64_t tasks, grain;
  bool backwards;
  void (*run)(void* context, Range tasks);
};
void run_phases(int threads, const Phase* phases, int count, void* context);

// One thread's place in the running region.
class Team {
 public:
  Team(int rank, int size) : rank_(rank), size_(size) {}
  // This thread's contiguous part of `count` tasks.
  [[nodiscard]] Range share(std::int64_t count) const {
    const std::int64_t each = count / size_, more = count % size_;
    const std::int64_t begin = each * rank_ + (rank_ < more ? rank_ : more);
    return {begin, begin + each + (rank_ < more ? 1 : 0)};
  }
  // Returns when all threads of the region have come here.
  void barrier() const;

 private:
  int rank_, size_;
};

// Runs f(team) on `threads` threads, this one among them; on 1 it opens no region. f must not throw. While f runs,
// the thread has the default floating-point environment; the caller's is put back after.
void run_in_parallel(int threads, void (*f)(void* context, const Team& team), void* context);

template <class F>
void parallel(int threads, F&& f) {
  run_in_parallel(threads, [](void* context, const Team& team) { (*static_cast<F*>(context))(team); }, &f);
}

// Threads for a call that asks for `requested` (0: the process's setting, else OpenMP's). 1 inside a parallel region,
// and in a forked child: if anything in the parent had used OpenMP, libgomp would wait for threads that do not exist
// there.
int available_threads(int requested);

void set_thread_limit(int threads);

// Whether OpenMP is compiled in.
bool has_openmp();

}  // namespace batchnorm
