// Runs kernels written for CUDA on the CPU, for tests: the same source, compiled as C++20. Threads are fibers of one OS
// thread. All blocks of a cluster live at once, clusters run one after another, and a cooperative launch is one
// cluster.
//
// A seed shuffles who runs next and when copies land; 0 takes threads in order and lands copies when nobody can run
// without them or somebody sleeps. Shared memory begins as bytes of 0xFF (NaN, -1), and is filled with 0xFB when its
// block ends. With -fsanitize=thread it is barriers that order memory, and nothing else: a missing one is reported as a
// race.
#pragma once

#include <cstring>
#include <functional>
#include <type_traits>
#include <utility>
#include <vector>

#include "simt/fiber.hpp"

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

namespace simt {

struct Thread;

// Where threads wait until so many are there.
struct Barrier {
  explicit Barrier(const char* what, bool orders = true) : name(what), orders_memory(orders) {}

  const char* name;
  bool orders_memory;
  unsigned expected = 0;
  std::vector<Thread*> waiting;
  Cell<unsigned> phase;
  char tags[2] = {};  // what the sanitizer sees, one a phase
};

// A barrier of bytes: phase p is over when all that was announced has landed.
struct CopyBarrier {
  Cell<std::int64_t> missing;
  Cell<unsigned> phase, announced;
};
struct Copy {
  void* to;
  const void* from;
  std::size_t bytes;
  CopyBarrier* done;
  Copy* next;
};

constexpr unsigned kWarp = 32;
// What lanes of a warp hand each other, in turns of two.
struct Warp {
  Barrier exchange{"a warp instruction", false}, sync{"__syncwarp"};
  Cell<std::uint64_t> value[2][kWarp];
  Cell<int> instruction[2][kWarp];
};

struct Block {
  dim3 index;
  unsigned rank = 0, alive = 0;
  std::size_t bytes = 0;
  std::unique_ptr<unsigned char, void (*)(void*)> shared{nullptr, std::free};
  Barrier barrier{"__syncthreads"};
  std::vector<Warp> warps;

  Block(unsigned number, unsigned of_cluster, unsigned threads, std::size_t shared_bytes)
      : index{number, 0, 0}, rank(of_cluster), alive(threads), bytes((shared_bytes + 127) / 128 * 128) {
    // A line more, so that no block asks for none.
    shared.reset(static_cast<unsigned char*>(std::aligned_alloc(128, bytes + 128)));
    if (shared == nullptr) fail("no memory");
    std::memset(shared.get(), 0xFF, bytes);
    barrier.expected = threads;
    warps = std::vector<Warp>((threads + kWarp - 1) / kWarp);
    for (unsigned w = 0; w < warps.size(); ++w) {
      const unsigned left = threads - w * kWarp, lanes = left < kWarp ? left : kWarp;
      warps[w].exchange.expected = warps[w].sync.expected = lanes;
    }
  }
};

struct Thread {
  Fiber fiber;
  Block* block = nullptr;
  dim3 index;
  // What it waits for, if anything.
  Cell<Barrier*> at;
  Cell<CopyBarrier*> polls;
  Cell<unsigned> polled_phase;
  Cell<bool> ended;
};

// One cluster at a time.
struct Machine {
  Fiber scheduler;
  Cell<Thread*> running;
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<Thread*> ready, polling;
  std::vector<std::unique_ptr<Block>> blocks;
  std::unique_ptr<Barrier> cluster;
  dim3 grid, block;
  std::function<void()> kernel;
  std::uint64_t seed = 0;

  Cell<Copy*> issued;            // since the scheduler has looked
  std::vector<Copy*> in_flight;  // whose order is as good as any
  bool phase_is_over = false;    // of some barrier of copies, since the scheduler has looked
  bool sleeps = false;           // whether a thread has waited for time to pass, in which copies land
  char begin_tag = 0, copy_tag = 0;
};
inline Machine& machine() {
  static Machine one;
  return one;
}
inline Thread& self() { return *machine().running.get(); }
inline Warp& warp() { return self().block->warps[self().index.x / kWarp]; }

// xorshift: a number below n.
inline std::size_t draw(std::size_t n) {
  std::uint64_t& s = machine().seed;
  s ^= s << 13, s ^= s >> 7, s ^= s << 17;
  return static_cast<std::size_t>(s % n);
}

// ---- what a thread does ----

inline void yield() { self().fiber.switch_to(machine().scheduler, Knows::all); }
inline void run_thread() {
  __tsan_acquire(&machine().begin_tag);
  machine().kernel();
  self().ended.set(true);
  yield();
  fail("a thread that has ended goes on");
}
inline void wait_at(Barrier& barrier) {
  Thread& thread = self();
  char* const tag = &barrier.tags[barrier.phase.get() & 1];
  if (barrier.orders_memory) __tsan_release(tag);
  thread.at.set(&barrier);
  yield();
  thread.at.set(nullptr);
  if (barrier.orders_memory) __tsan_acquire(tag);
}
inline void issue(void* to, const void* from, std::size_t bytes, CopyBarrier* done) {
  if ((reinterpret_cast<std::uintptr_t>(to) | reinterpret_cast<std::uintptr_t>(from) | bytes) % 16 != 0) {
    fail("a bulk copy must be of whole 16 bytes at such addresses");
  }
  Machine& m = machine();
  auto* copy = new Copy{to, from, bytes, done, m.issued.get()};
  __tsan_release(&m.copy_tag);
  m.issued.set(copy);
}
inline void announce(CopyBarrier* barrier, std::size_t bytes) {
  barrier->announced.set(1);
  barrier->missing.set(barrier->missing.get() + static_cast<std::int64_t>(bytes));
}
inline void wait_for_copies(CopyBarrier* barrier, unsigned phase) {
  Thread& thread = self();
  while (barrier->phase.get() <= phase) {
    thread.polled_phase.set(phase), thread.polls.set(barrier);
    yield();
    thread.polls.set(nullptr);
  }
  __tsan_acquire(barrier);
}

// f(lane) is what a lane of the warp gives. All lanes come, to the same instruction.
template <class T, class F>
void exchange_all(unsigned mask, T value, int instruction, const F& f) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  Warp& w = warp();
  const unsigned lane = self().index.x % kWarp, lanes = w.exchange.expected, turn = w.exchange.phase.get() & 1;
  if (mask != (lanes < kWarp ? (1u << lanes) - 1 : ~0u)) fail("a warp instruction of part of a warp");
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  w.value[turn][lane].set(bits), w.instruction[turn][lane].set(instruction);
  wait_at(w.exchange);
  f([&w, lanes, turn, instruction](unsigned from) {
    if (from >= lanes) fail("a warp instruction that reads a lane which is not there");
    if (w.instruction[turn][from].get() != instruction) fail("lanes of a warp met at different instructions");
    T given;
    const std::uint64_t all = w.value[turn][from].get();
    std::memcpy(&given, &all, sizeof given);
    return given;
  });
}
// What lane `from` gives.
template <class T>
T exchange(unsigned mask, T value, unsigned from, int instruction) {
  exchange_all(mask, value, instruction, [&](const auto& of_lane) { value = of_lane(from); });
  return value;
}

// ---- what the scheduler does ----

inline void land(std::size_t k) {
  static const Apart engine;
  Machine& m = machine();
  const std::unique_ptr<Copy> copy(std::exchange(m.in_flight[k], m.in_flight.back()));
  m.in_flight.pop_back();
  engine.run([&] {
    __tsan_acquire(&m.copy_tag);
    std::memcpy(copy->to, copy->from, copy->bytes);
    __tsan_release(copy->done);
  });
  CopyBarrier& barrier = *copy->done;
  barrier.missing.set(barrier.missing.get() - static_cast<std::int64_t>(copy->bytes));
  if (barrier.missing.get() != 0 || barrier.announced.get() == 0) return;
  barrier.announced.set(0), barrier.phase.set(barrier.phase.get() + 1);
  m.phase_is_over = true;
}
// Those whose copies have all landed go on.
inline void release_polling() {
  Machine& m = machine();
  if (!std::exchange(m.phase_is_over, false)) return;
  std::erase_if(m.polling, [&](Thread* thread) {
    const bool over = thread->polls.get()->phase.get() > thread->polled_phase.get();
    if (over) m.ready.push_back(thread);
    return over;
  });
}
inline void land_some() {
  Machine& m = machine();
  for (Copy* copy = m.issued.get(); copy != nullptr; copy = copy->next) m.in_flight.push_back(copy);
  m.issued.set(nullptr);
  while (m.seed != 0 && !m.in_flight.empty() && draw(4) == 0) land(draw(m.in_flight.size()));
  if (std::exchange(m.sleeps, false) && !m.in_flight.empty()) land(m.seed == 0 ? 0 : draw(m.in_flight.size()));
  release_polling();
  while (m.ready.empty() && !m.in_flight.empty()) {
    land(m.seed == 0 ? 0 : draw(m.in_flight.size()));
    release_polling();
  }
}
[[noreturn]] inline void report_deadlock() {
  for (const auto& thread : machine().threads) {
    if (thread->ended.get()) continue;
    const Barrier* at = thread->at.get();
    std::fprintf(stderr, "simt: block %u, thread %u waits at %s\n", thread->block->index.x, thread->index.x,
                 at == nullptr ? "a barrier of copies" : at->name);
    break;
  }
  fail("nobody can run: a barrier that not all threads reach, or copies that were announced and never issued");
}
inline Thread* next() {
  Machine& m = machine();
  if (m.seed != 0) std::swap(m.ready[draw(m.ready.size())], m.ready.back());
  Thread* thread = m.ready.back();
  m.ready.pop_back();
  return thread;
}
inline void arrive(Thread* thread) {
  Barrier& barrier = *thread->at.get();
  barrier.waiting.push_back(thread);
  if (barrier.waiting.size() < barrier.expected) return;
  barrier.phase.set(barrier.phase.get() + 1);
  machine().ready.insert(machine().ready.end(), barrier.waiting.rbegin(), barrier.waiting.rend());
  barrier.waiting.clear();
}
inline void run_cluster() {
  Machine& m = machine();
  for (std::size_t alive = m.threads.size(); alive > 0;) {
    land_some();
    if (m.ready.empty()) report_deadlock();
    Thread* thread = next();
    m.running.set(thread);
    m.scheduler.switch_to(thread->fiber, Knows::nothing);
    if (thread->ended.get()) {
      --alive;
      // From now on nobody may touch this block's shared memory.
      if (--thread->block->alive == 0) std::memset(thread->block->shared.get(), 0xFB, thread->block->bytes);
    } else if (thread->polls.get() != nullptr) {
      m.polling.push_back(thread);
    } else if (thread->at.get() != nullptr) {
      arrive(thread);
    } else {
      m.ready.insert(m.ready.begin(), thread);  // it only let others run
      m.sleeps = true;
    }
  }
  if (m.issued.get() != nullptr || !m.in_flight.empty()) fail("a kernel ended before its copies");
}

struct Launch {
  unsigned grid = 1, block = 1, cluster = 1;  // blocks, threads of each, blocks of a cluster
  std::size_t shared_bytes = 0;
  std::uint64_t seed = 0;
};
template <class Kernel, class... Args>
void launch(const Launch& how, Kernel kernel, const Args&... args) {
  if (how.grid % how.cluster != 0) fail("a grid must be of whole clusters");
  Machine& m = machine();
  m.grid = {how.grid, 1, 1}, m.block = {how.block, 1, 1}, m.seed = how.seed;
  m.kernel = [=] { kernel(args...); };
  m.scheduler.be_current();
  m.threads.resize(std::size_t{how.cluster} * how.block);
  for (unsigned first = 0; first < how.grid; first += how.cluster) {
    m.blocks.clear(), m.ready.clear();
    m.cluster = std::make_unique<Barrier>("cluster.sync");
    m.cluster->expected = how.cluster * how.block;
    for (unsigned r = 0; r < how.cluster; ++r) {
      m.blocks.push_back(std::make_unique<Block>(first + r, r, how.block, how.shared_bytes));
    }
    for (std::size_t i = m.threads.size(); i-- > 0;) {
      std::unique_ptr<Thread>& thread = m.threads[i];
      if (thread == nullptr) thread = std::make_unique<Thread>();
      thread->fiber.begin(run_thread);
      thread->block = m.blocks[i / how.block].get();
      thread->index = {static_cast<unsigned>(i % how.block), 0, 0};
      thread->ended.set(false);
      m.ready.push_back(thread.get());
    }
    __tsan_release(&m.begin_tag);
    run_cluster();
  }
  m.scheduler.release_main();
}

}  // namespace simt
