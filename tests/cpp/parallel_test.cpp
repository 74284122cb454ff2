// Phases of tasks (parallel.hpp): each task once, phases in order, whoever works on them.
#include "parallel.hpp"

#include <pthread.h>
#include <sched.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <filesystem>
#include <string>
#include <thread>
#include <vector>

#include "expect.hpp"

namespace {

using namespace batchnorm;

// A call of several phases. Each counts how often its tasks run, and notes where a task of the phase before is missing.
struct Call {
  static constexpr int kPhases = 3;

  explicit Call(std::int64_t tasks) {
    for (auto& phase : runs) phase = std::vector<std::atomic<int>>(static_cast<std::size_t>(tasks));
  }

  template <int phase>
  static void run(void* context, Range range) noexcept {
    Call& call = *static_cast<Call*>(context);
    auto& mine = call.runs[phase];
    for (std::int64_t t = range.begin; t < range.end; ++t) ++mine.data()[t];
    std::int64_t longest = call.longest.load();
    while (longest < range.end - range.begin && !call.longest.compare_exchange_weak(longest, range.end - range.begin)) {
    }
    if constexpr (phase > 0)
      for (const auto& count : call.runs[phase - 1]) call.too_early += count.load(std::memory_order_relaxed) == 0;
  }

  void make(int threads, std::int64_t grain, bool backwards) {
    const auto tasks = static_cast<std::int64_t>(runs[0].size());
    const Phase phases[kPhases] = {
        {tasks, grain, backwards, run<0>}, {tasks, grain, !backwards, run<1>}, {tasks, grain, backwards, run<2>}};
    run_phases(threads, phases, kPhases, this);
  }

  [[nodiscard]] bool each_once() const {
    for (const auto& phase : runs) {
      for (const auto& count : phase) {
        if (count.load() != 1) return false;
      }
    }
    return true;
  }

  std::vector<std::atomic<int>> runs[kPhases];
  std::atomic<std::int64_t> longest{0};
  std::atomic<int> too_early{0};
};

TEST(each_task_runs_once_and_after_all_of_the_phase_before) {
  for (const int threads : {1, 2, 3, 7, 16, 64, 100}) {
    for (const std::int64_t tasks : {1, 2, 3, 10, 63, 64, 65, 300}) {
      for (const std::int64_t grain : {1, 4, 1000}) {
        for (const bool backwards : {false, true}) {
          Call call(tasks);
          call.make(threads, grain, backwards);
          const std::string what = expect::text(threads, " threads, ", tasks, " tasks, grain ", grain);
          EXPECT(call.each_once(), what);
          EXPECT_EQUAL(call.too_early.load(), 0, what);
          if (threads == 1) EXPECT_EQUAL(call.longest.load(), tasks, what);
        }
      }
    }
  }
}

TEST(phases_without_tasks_are_passed_over) {
  int runs = 0;
  const auto count = [](void* context, Range range) noexcept {
    *static_cast<int*>(context) += static_cast<int>(range.end - range.begin);
  };
  const Phase phases[] = {{0, 1, false, count}, {3, 10, false, count}, {0, 1, true, count}};
  for (const int threads : {1, 2}) run_phases(threads, phases, 3, &runs);
  EXPECT_EQUAL(runs, 6);
  run_phases(4, phases, 0, &runs);
  EXPECT_EQUAL(runs, 6);
}

TEST(calls_from_eight_threads_at_once_each_do_all_their_tasks) {
  std::atomic<int> wrong{0};
  std::vector<std::thread> callers;
  for (int c = 0; c < 8; ++c) {
    callers.emplace_back([&wrong, c] {
      for (int k = 0; k < 100; ++k) {
        Call call(1 + (c * 37 + k) % 50);
        call.make(1 + (c + k) % 5, 1, k % 2 == 0);
        wrong += !call.each_once() || call.too_early.load() != 0;
      }
    });
  }
  for (auto& caller : callers) caller.join();
  EXPECT_EQUAL(wrong.load(), 0);
}

TEST(a_task_that_calls_does_the_inner_call_alone) {
  std::atomic<int> inner_tasks{0};
  const auto outer = [](void* context, Range range) noexcept {
    for (std::int64_t t = range.begin; t < range.end; ++t) {
      const auto inner = [](void* counter, Range r) noexcept {
        *static_cast<std::atomic<int>*>(counter) += static_cast<int>(r.end - r.begin);
      };
      const Phase phase{5, 1, false, inner};
      run_phases(4, &phase, 1, context);
    }
  };
  const Phase phase{20, 1, false, outer};
  run_phases(4, &phase, 1, &inner_tasks);
  EXPECT_EQUAL(inner_tasks.load(), 100);
}

// One task lasts until all others are done, or three seconds: they must not wait for its thread.
TEST(a_slow_task_keeps_nobody_from_the_others) {
  struct Slow {
    std::atomic<int> done{0};
    std::atomic<bool> waited_in_vain{false};
  } slow;
  constexpr int kTasks = 50;
  const auto run = [](void* context, Range range) noexcept {
    Slow& s = *static_cast<Slow*>(context);
    if (range.begin == 0) {
      const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(3);
      while (s.done.load() < kTasks - 1 && std::chrono::steady_clock::now() < end) std::this_thread::yield();
      s.waited_in_vain = s.done.load() < kTasks - 1;
    }
    ++s.done;
  };
  const Phase phase{kTasks, 1, false, run};
  run_phases(2, &phase, 1, &slow);
  EXPECT_EQUAL(slow.done.load(), kTasks);
  EXPECT(!slow.waited_in_vain.load(), "the other thread did not take over the tasks of the slow one");
}

TEST(a_call_tells_how_many_threads_it_was_shared_among) {
  widest_call();
  for (const int threads : {3, 2, 1}) {
    Call call(40);
    call.make(threads, 1, false);
    EXPECT_EQUAL(widest_call(), threads);
    EXPECT_EQUAL(widest_call(), 1, "asked again");
  }
  Call narrow(40), wide(40), one(1);
  wide.make(4, 1, false);
  narrow.make(2, 1, false);
  one.make(4, 1, false);
  EXPECT_EQUAL(widest_call(), 4, "the widest of three");
}

#ifndef __SANITIZE_THREAD__  // which knows no threads of a forked child

int threads_of_process() {
  int count = 0;
  for (const auto& thread : std::filesystem::directory_iterator("/proc/self/task")) count += thread.exists();
  return count;
}

int status_of(pid_t child) {
  int status = -1;
  waitpid(child, &status, 0);
  return status;
}

// Runs f in a process of its own; 0 where it returned true.
template <class F>
int status_of_process(F&& f) {
  const pid_t child = fork();
  if (child == 0) {
    alarm(20);
    _exit(f() ? 0 : 1);
  }
  return status_of(child);
}

// The child's answer: 0 where a call did all its tasks on two threads, which the child then has.
int answer_of_child() {
  alarm(10);
  widest_call();
  Call call(40);
  call.make(2, 1, false);
  return call.each_once() && widest_call() == 2 && threads_of_process() == 2 ? 0 : 1;
}

TEST(a_child_forked_while_threads_compute_has_a_pool_of_its_own) {
  std::atomic<bool> over{false};
  std::thread other([&over] {
    while (!over) {
      Call call(30);
      call.make(3, 1, false);
    }
  });
  for (int k = 0; k < 20; ++k) {
    Call call(30);
    call.make(3, 1, true);
    const pid_t child = fork();
    if (child == 0) _exit(answer_of_child());
    EXPECT_EQUAL(status_of(child), 0, "child ", k);
  }
  over = true;
  other.join();
}

TEST(the_limit_of_the_process_holds_where_a_call_asks_for_no_number) {
  set_thread_limit(1);
  EXPECT_EQUAL(available_threads(0), 1);
  EXPECT_EQUAL(available_threads(3), 3);
  set_thread_limit(0);
  EXPECT_EQUAL(available_threads(1), 1);
  EXPECT(available_threads(1'000'000) <= 64, available_threads(1'000'000));
}

TEST(a_child_of_a_child_has_a_pool_too) {
  EXPECT_EQUAL(status_of_process([] {
                 return answer_of_child() == 0 && status_of_process([] { return answer_of_child() == 0; }) == 0;
               }),
               0);
}

#ifdef __linux__
// Processors that each thread of this process may use.
std::vector<cpu_set_t> affinities() {
  std::vector<cpu_set_t> sets;
  for (const auto& thread : std::filesystem::directory_iterator("/proc/self/task")) {
    cpu_set_t set;
    if (sched_getaffinity(std::stoi(thread.path().filename()), sizeof set, &set) == 0) sets.push_back(set);
  }
  return sets;
}

TEST(workers_have_the_processors_of_the_process_and_not_those_of_the_first_caller) {
  cpu_set_t all;
  sched_getaffinity(0, sizeof all, &all);
  if (CPU_COUNT(&all) < 2) return;
  const auto pinned = [&all] {
    cpu_set_t one;
    CPU_ZERO(&one);
    for (int k = 0; CPU_COUNT(&one) == 0; ++k) {
      if (CPU_ISSET(k, &all)) CPU_SET(k, &one);
    }
    std::atomic<int> bound{0};
    std::thread caller([&] {
      sched_setaffinity(0, sizeof one, &one);
      Call call(40);
      call.make(3, 1, false);
      // A worker binds itself when it comes to run.
      const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(5);
      do {
        bound = 0;
        for (const cpu_set_t& set : affinities()) bound += CPU_EQUAL(&set, &all) ? 0 : 1;
      } while (bound != 1 && std::chrono::steady_clock::now() < end);
    });
    caller.join();
    return bound == 1;  // the caller
  };
  EXPECT_EQUAL(status_of_process(pinned), 0);
}
#endif

// The stack that workers get must be enough where a limit of the process makes the system's small.
TEST(workers_have_stacks_of_a_size_of_their_own) {
  const auto with_small_stacks = [] {
    pthread_attr_t small;
    pthread_attr_init(&small);
    pthread_attr_setstacksize(&small, 64 * 1024);
    if (pthread_setattr_default_np(&small) != 0) return false;
    std::atomic<int> used{0};
    const auto run = [](void* context, Range) noexcept {
      volatile char bytes[200 * 1024];
      for (std::size_t k = 0; k < sizeof bytes; k += 1024) bytes[k] = 1;
      *static_cast<std::atomic<int>*>(context) += bytes[1024];
      std::this_thread::sleep_for(std::chrono::milliseconds(20));  // the other thread takes some
    };
    const Phase phase{8, 1, false, run};
    run_phases(2, &phase, 1, &used);
    return used == 8;
  };
  EXPECT_EQUAL(status_of_process(with_small_stacks), 0);
}

#endif

}  // namespace

int main(int argc, char** argv) { return expect::run_tests(argc > 1 ? argv[1] : nullptr); }
