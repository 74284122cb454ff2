// Where memory runs out: an error changes nothing, whichever allocation fails.
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>
#include <span>

#include "every_call.hpp"
#include "expect.hpp"

namespace {

// Allocations until one fails; below 0: none does. Then that one fails alone, or all from there on.
std::atomic<long> left{-1};
std::atomic<bool> goes_on{false};

bool fails() {
  const long before = left.load();
  if (before < 0) return false;
  if (before > 0) {
    left = before - 1;
    return false;
  }
  if (!goes_on) left = -1;
  return true;
}

void* allocate(std::size_t bytes, std::size_t alignment) {
  if (fails()) return nullptr;
  return std::aligned_alloc(alignment, (std::max<std::size_t>(bytes, 1) + alignment - 1) / alignment * alignment);
}
void* allocate_or_throw(std::size_t bytes, std::size_t alignment) {
  void* p = allocate(bytes, alignment);
  if (p == nullptr) throw std::bad_alloc();
  return p;
}
constexpr std::size_t kPlain = 16;

}  // namespace

// What the library and this program allocate by.
void* operator new(std::size_t bytes) { return allocate_or_throw(bytes, kPlain); }
void* operator new[](std::size_t bytes) { return allocate_or_throw(bytes, kPlain); }
void* operator new(std::size_t bytes, std::align_val_t a) {
  return allocate_or_throw(bytes, static_cast<std::size_t>(a));
}
void* operator new(std::size_t bytes, const std::nothrow_t&) noexcept { return allocate(bytes, kPlain); }
void* operator new[](std::size_t bytes, const std::nothrow_t&) noexcept { return allocate(bytes, kPlain); }
void* operator new(std::size_t bytes, std::align_val_t a, const std::nothrow_t&) noexcept {
  return allocate(bytes, static_cast<std::size_t>(a));
}
void operator delete(void* p) noexcept { std::free(p); }
void operator delete[](void* p) noexcept { std::free(p); }
void operator delete(void* p, std::size_t) noexcept { std::free(p); }
void operator delete[](void* p, std::size_t) noexcept { std::free(p); }
void operator delete(void* p, std::align_val_t) noexcept { std::free(p); }
void operator delete(void* p, std::size_t, std::align_val_t) noexcept { std::free(p); }

namespace {

using namespace batchnorm;

constexpr long kMany = 1'000'000;

long allocations_of(const every_call::NamedCall& call) {
  left = kMany;
  call.run();
  return kMany - left.exchange(-1);
}

// Whether the call ends well although allocation `n` fails, and with it all later ones or none.
bool succeeds(const every_call::NamedCall& call, long n, bool and_later) {
  bool done = true;
  goes_on = and_later;
  left = n;
  try {
    call.run();
  } catch (const std::bad_alloc&) {
    done = false;
  }
  left = -1;
  return done;
}

using Bytes = std::vector<std::byte>;

// By memcmp: algorithms compare one std::byte after the other.
bool same_bytes(std::span<const std::byte> a, std::span<const std::byte> b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size()) == 0);
}

// How many allocations the call could not do without. Before each its outputs are filled with what it would not write.
int check_each_allocation(const every_call::NamedCall& call, const std::string& what) {
  std::vector<Bytes> inputs;  // of a call in place
  for (const auto& output : call.outputs) inputs.emplace_back(output.begin(), output.end());
  const long count = allocations_of(call);
  int needed = 0;
  for (const bool and_later : {false, true}) {
    for (long n = 0; n < count; ++n) {
      for (std::size_t k = 0; k < inputs.size(); ++k) {
        if (!inputs[k].empty()) std::memcpy(call.outputs[k].data(), inputs[k].data(), inputs[k].size());
      }
      if (succeeds(call, n, and_later)) continue;
      ++needed;
      for (std::size_t k = 0; k < inputs.size(); ++k) {
        EXPECT(same_bytes(inputs[k], call.outputs[k]), what, ": output ", k, " has changed when allocation ", n,
               and_later ? " and all later ones" : "", " of ", count, " failed");
      }
    }
  }
  return needed;
}

template <class T>
void check_every_call(const char* type) {
  // Planar and interleaved; of so many channels that the stack does not hold what a call needs, and so large that
  // threads share it.
  for (const Problem& p : {Problem{3, 900, 20}, Problem{40, 700, 1}, Problem{90, 700, 1}, Problem{60, 20, 40}}) {
    for (const int threads : {1, 3}) {
      every_call::Arguments<T> arguments(p);
      int needed = 0;
      for (const every_call::NamedCall& call : every_call::of<T>(arguments, {threads})) {
        needed += check_each_allocation(call, expect::text(call.name, " of ", type, ", ", threads, " threads, {",
                                                           p.outer, ", ", p.channels, ", ", p.inner, "}"));
      }
      EXPECT(needed > 20, needed, " allocations have failed");
    }
  }
}

TEST(a_call_that_gets_no_memory_changes_nothing) {
  check_every_call<float>("float");
  check_every_call<double>("double");
  check_every_call<Float16>("float16");
}

TEST(a_call_that_gets_no_memory_for_workers_does_without) {
  const pid_t child = fork();  // which has none yet
  if (child == 0) {
    every_call::Arguments<float> arguments({60, 20, 400});
    bool done = true;
    for (const every_call::NamedCall& call : every_call::of<float>(arguments, {4})) {
      if (call.name == "normalize") done &= succeeds(call, 0, true);
    }
    _exit(done ? 0 : 1);
  }
  int status = -1;
  waitpid(child, &status, 0);
  EXPECT_EQUAL(status, 0);
}

}  // namespace

int main(int argc, char** argv) { return expect::run_tests(argc > 1 ? argv[1] : nullptr); }
