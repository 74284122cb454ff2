#include "parallel.hpp"

#include <dlfcn.h>
#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cassert>
#include <cstdlib>
#include <memory>
#include <new>
#include <thread>
#include <utility>

#include "floating_point.hpp"
#include "job.hpp"

#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __linux__
#include <sched.h>
#endif

namespace batchnorm {
namespace {

constexpr int kMostWorkers = kMostThreads - 1;

std::atomic<int> thread_limit{0};

// ---- processors --------------------------------------------------------------------------------------------------

#ifdef __linux__
// Processors of this process: those of its main thread, and those of the thread that asks, either of which may have
// been bound to a few. More than Linux can be built for.
class ProcessorSet {
 public:
  static constexpr std::size_t kMost = 8192;

  // False where the system does not say.
  bool read() {
    if (!read_places() && sched_getaffinity(getpid(), sizeof bits_, set()) != 0) return false;
    ProcessorSet own;
    if (sched_getaffinity(0, sizeof bits_, own.set()) == 0) CPU_OR_S(sizeof bits_, set(), set(), own.set());
    return true;
  }
  [[nodiscard]] int count() { return CPU_COUNT_S(sizeof bits_, set()); }
  void bind_this_thread() { sched_setaffinity(0, sizeof bits_, set()); }

 private:
  [[nodiscard]] cpu_set_t* set() { return reinterpret_cast<cpu_set_t*>(bits_); }

  // Where OpenMP binds threads to places, it has bound the main thread to one of them before anything could ask.
  bool read_places() {
#ifdef _OPENMP
    if (omp_get_proc_bind() == omp_proc_bind_false) return false;
    for (int place = 0; place < omp_get_num_places(); ++place) {
      const int count = omp_get_place_num_procs(place);
      const std::unique_ptr<int[]> numbers(new (std::nothrow) int[static_cast<std::size_t>(count)]);
      if (numbers == nullptr) return false;
      omp_get_place_proc_ids(place, numbers.get());
      for (int k = 0; k < count; ++k) CPU_SET_S(static_cast<std::size_t>(numbers[k]), sizeof bits_, set());
    }
    return count() > 0;
#else
    return false;
#endif
  }

  unsigned long bits_[kMost / (8 * sizeof(unsigned long))] = {};
};
#endif

void bind_to_processors_of_process() {
#ifdef __linux__
  ProcessorSet set;
  if (set.read()) set.bind_this_thread();
#endif
}

int count_processors() {
#ifdef __linux__
  ProcessorSet set;
  if (set.read()) return set.count();
#endif
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

// Processors that this process may use. Not a static of the function: a child that is forked while another thread makes
// one would wait for it for ever.
std::atomic<int> known_processors{0};
int processors() {
  int count = known_processors.load(std::memory_order_relaxed);
  if (count == 0) known_processors.store(count = count_processors(), std::memory_order_relaxed);
  return count;
}

bool has_processor_each(const Order& order) { return order.threads <= processors(); }

// ---- the pool ----------------------------------------------------------------------------------------------------

// Whether this thread is in a task of a call that has several threads.
thread_local bool is_working = false;
// Threads of the widest call of this thread since widest_call() was last asked.
thread_local int widest = 1;

// What tasks take is below 128 KB, with any kernels; sanitizers take several times as much.
constexpr std::size_t kStackBytes = 512 * 1024;

// Starts run(argument) on a stack of the system's choice, which leaves room for thread-local data that lie on it, but
// may be as small as a limit of the process says. Signals are for the threads of the program. False where the system
// has no thread left.
bool start_thread(void* (*run)(void*), void* argument, int detach_state, pthread_t& thread) {
  pthread_attr_t attributes;
  if (pthread_attr_init(&attributes) != 0) return false;
  pthread_attr_setdetachstate(&attributes, detach_state);
  std::size_t usual = 0;
  pthread_attr_getstacksize(&attributes, &usual);
  if (usual < kStackBytes) pthread_attr_setstacksize(&attributes, kStackBytes);
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  const bool started = pthread_create(&thread, &attributes, run, argument) == 0;
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  pthread_attr_destroy(&attributes);
  return started;
}

// Workers are made when first wanted and live, mostly asleep, as long as the process. They and the pool are never
// destroyed, since they may be looking at it while the process ends.
class Pool {
 public:
  // In a forked child, which has none of its parent's threads: what they may have been changing is left to itself.
  void forget() {
    for (Worker*& worker : workers_) worker = nullptr;
    idle_.store(0, std::memory_order_relaxed);
    made_.store(0, std::memory_order_relaxed);
    is_making_.clear(std::memory_order_relaxed);
  }

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
    job.work(mine, has_processor_each(mine));
  }

 private:
  struct Worker {
    Signal bell;
    std::atomic<Order> order;
    Job job;

    // Released, because a worker that is on its way to an earlier call may read it before the bell.
    void call(const Order& what) {
      order.store(what, std::memory_order_release);
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

  // A system that has no memory or no thread left leaves the call with fewer.
  bool start(int number) {
    if (workers_[number] == nullptr) workers_[number] = new (std::nothrow) Worker;
    if (workers_[number] == nullptr) return false;
    keep_code();
    pthread_t thread;
    return start_thread(serve, workers_[number], PTHREAD_CREATE_DETACHED, thread);
  }
  // Workers run this code as long as the process: an object that may be unloaded (a plugin that the library is linked
  // into) never is from now on. The program itself cannot be opened, and need not be.
  void keep_code() const {
    Dl_info here;
    if (dladdr(this, &here) != 0 && here.dli_fname != nullptr) {
      dlopen(here.dli_fname, RTLD_LAZY | RTLD_NOLOAD | RTLD_NODELETE);
    }
  }

  static void* serve(void* argument);

  alignas(64) std::atomic<std::uint64_t> idle_{0};
  std::atomic<int> made_{0};
  std::atomic_flag is_making_;
  Worker* workers_[kMostWorkers] = {};
};
constinit Pool pool;

// A worker, which begins with the processors of the thread that has made it, is bound to no fewer than the process.
void* Pool::serve(void* argument) {
  Worker& worker = *static_cast<Worker*>(argument);
  bind_to_processors_of_process();
  const DefaultFloatingPoint environment;
  is_working = true;
  Order order{};
  for (std::uint32_t heard = 0;;) {
    heard = worker.bell.wait(heard, has_processor_each(order));
    order = worker.order.load(std::memory_order_acquire);
    pool.workers_[order.job]->job.work(order, has_processor_each(order));
  }
}

void begin_in_child() {
  known_processors.store(0, std::memory_order_relaxed);
  pool.forget();
}
[[maybe_unused]] const int fork_handler_registered = pthread_atfork(nullptr, nullptr, begin_in_child);

// ---- small stacks ------------------------------------------------------------------------------------------------

// Below this a thread leaves tasks to one made for the call (some 20 us): the kernels with weights take 105 KB.
constexpr std::size_t kLeastStack = 192 * 1024;

bool find_small_stack() {
#ifdef __linux__
  pthread_attr_t attributes;
  if (pthread_getattr_np(pthread_self(), &attributes) != 0) return false;
  std::size_t bytes = kLeastStack;
  pthread_attr_getstacksize(&attributes, &bytes);
  pthread_attr_destroy(&attributes);
  return bytes < kLeastStack;
#else
  return false;
#endif
}
bool has_small_stack() {
  static thread_local signed char known = -1;
  if (known < 0) known = find_small_stack() ? 1 : 0;
  return known == 1;
}

struct Call {
  int threads;
  const Phase* phases;
  int count;
  void* context;
  int widest;
};

// Does the call on a thread of its own, with a stack of a worker's size; false where there is none to be had.
bool run_elsewhere(Call& call) {
  const auto run = [](void* argument) -> void* {
    Call& made = *static_cast<Call*>(argument);
    run_phases(made.threads, made.phases, made.count, made.context);
    made.widest = widest_call();
    return nullptr;
  };
  pthread_t thread;
  if (!start_thread(run, &call, PTHREAD_CREATE_JOINABLE, thread)) return false;
  // Not to be cancelled here, while the other thread works on this one's stack.
  int cancellable = PTHREAD_CANCEL_ENABLE;
  pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &cancellable);
  pthread_join(thread, nullptr);
  pthread_setcancelstate(cancellable, nullptr);
  return true;
}

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
  if (!is_working && has_small_stack()) {
    Call call{threads, phases, count, context, 1};
    if (run_elsewhere(call)) {
      widest = std::max(widest, call.widest);
      return;
    }
  }
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
  const std::uint64_t workers = threads == 1 || is_working ? 0 : pool.take(threads - 1);
  if (workers == 0) return run_alone(phases, count, context);

  widest = std::max(widest, 1 + std::popcount(workers));
  is_working = true;
  pool.run(workers, filled, filled_count, context);
  is_working = false;
  pool.give_back(workers);
}

void run_task_here(void (*run)(void* context, Range tasks) noexcept, void* context) {
  const DefaultFloatingPoint environment;
  run(context, {0, 1});
}

int available_threads(int requested) {
  if (requested == 1) return 1;
#ifdef _OPENMP
  if (omp_in_parallel()) return 1;
  const int setting = omp_get_max_threads();
#else
  static std::atomic<int> known{-1};  // as known_processors
  int of_environment = known.load(std::memory_order_relaxed);
  if (of_environment < 0) known.store(of_environment = threads_of_environment(), std::memory_order_relaxed);
  const int setting = of_environment > 0 ? of_environment : processors();
#endif
  const int limit = thread_limit.load(std::memory_order_relaxed);
  int threads = requested > 0 ? requested : setting;
  if (requested == 0 && limit > 0) threads = std::min(threads, limit);
  return std::clamp(threads, 1, kMostThreads);
}

int widest_call() { return std::exchange(widest, 1); }

void set_thread_limit(int threads) { thread_limit.store(threads, std::memory_order_relaxed); }

bool has_openmp() {
#ifdef _OPENMP
  return true;
#else
  return false;
#endif
}

}  // namespace batchnorm
