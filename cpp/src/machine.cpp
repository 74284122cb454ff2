#include "machine.hpp"

#include <unistd.h>

#include <atomic>
#include <cstring>

namespace batchnorm {
namespace {

// Bytes of a cache by its sysconf name, or what is typical where the system does not say (some containers and aarch64
// kernels report 0).
std::int64_t cache_bytes(int name, std::int64_t typical) {
  const long bytes = sysconf(name);
  return bytes > 0 ? bytes : typical;
}

Machine read_machine() {
  constexpr std::int64_t kTypicalL2 = 512 * 1024, kTypicalL3 = 16 * 1024 * 1024;
#if defined(_SC_LEVEL2_CACHE_SIZE) && defined(_SC_LEVEL3_CACHE_SIZE)
  return {cache_bytes(_SC_LEVEL2_CACHE_SIZE, kTypicalL2), cache_bytes(_SC_LEVEL3_CACHE_SIZE, kTypicalL3)};
#else
  return {kTypicalL2, kTypicalL3};
#endif
}

}  // namespace

Machine machine() {
  // As in dispatch.cpp, not one static of the function. Whoever comes first together with others reads the same.
  static std::atomic<std::int64_t> l2{0}, l3{0};
  const Machine known{l2.load(std::memory_order_relaxed), l3.load(std::memory_order_relaxed)};
  if (known.l2_bytes != 0 && known.l3_bytes != 0) return known;
  const Machine read = read_machine();
  l2.store(read.l2_bytes, std::memory_order_relaxed);
  l3.store(read.l3_bytes, std::memory_order_relaxed);
  return read;
}

bool machine_runs(const char* isa) {
  if (std::strcmp(isa, "generic") == 0 || std::strcmp(isa, "reference") == 0) return true;
#if defined(__x86_64__)
  // The builtin also asks the operating system (XGETBV) whether it saves the wide registers.
  if (std::strcmp(isa, "x86-64-v2") == 0) return __builtin_cpu_supports("x86-64-v2");
  if (std::strcmp(isa, "x86-64-v3") == 0) return __builtin_cpu_supports("x86-64-v3");
  if (std::strcmp(isa, "x86-64-v4") == 0) return __builtin_cpu_supports("x86-64-v4");
#elif defined(__aarch64__)
  if (std::strcmp(isa, "neon") == 0) return true;
#endif
  return false;
}

}  // namespace batchnorm
