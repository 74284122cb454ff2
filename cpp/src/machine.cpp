#include "machine.hpp"

#include <unistd.h>

#include <cstring>

namespace batchnorm {
namespace {

// Where the system does not say (some containers and aarch64 kernels report 0).
constexpr std::int64_t kTypicalL2 = 512 * 1024;

std::int64_t l2_bytes() {
#ifdef _SC_LEVEL2_CACHE_SIZE
  const long bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (bytes > 0) return bytes;
#endif
  return kTypicalL2;
}

}  // namespace

const Machine& machine() {
  static const Machine m{l2_bytes()};
  return m;
}

bool machine_runs(const char* isa) {
  if (std::strcmp(isa, "generic") == 0) return true;
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
