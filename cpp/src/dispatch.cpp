#include "dispatch.hpp"

#include <atomic>
#include <cstdlib>
#include <iterator>
#include <stdexcept>

#include "machine.hpp"

namespace batchnorm {
namespace {

constexpr Implementation kAll[] = {
#ifdef BATCHNORM_HAS_X86_64_V4
    {"x86-64-v4", &kernels::x86_64_v4_table},
#endif
#ifdef BATCHNORM_HAS_X86_64_V3
    {"x86-64-v3", &kernels::x86_64_v3_table},
#endif
#ifdef BATCHNORM_HAS_X86_64_V2
    {"x86-64-v2", &kernels::x86_64_v2_table},
#endif
#ifdef BATCHNORM_HAS_NEON
    {"neon", &kernels::neon_table},
#endif
#ifdef BATCHNORM_HAS_GENERIC
    {"generic", &kernels::generic_table},
#endif
    {"reference", &kernels::reference_table},
};

const Implementation& choose() {
  const char* forced = std::getenv("BATCHNORM_ISA");
  const std::string wanted = forced == nullptr ? "" : forced;
  std::string valid;
  for (const Implementation& implementation : kAll) {
    if (!machine_runs(implementation.name)) continue;
    if (wanted.empty() || wanted == implementation.name) return implementation;
    valid += (valid.empty() ? "" : ", ") + std::string(implementation.name);
  }
  throw std::invalid_argument("BATCHNORM_ISA must be one of " + valid + ", got " + wanted);
}

}  // namespace

std::span<const Implementation> implementations() { return std::span(kAll).first(std::size(kAll) - 1); }

const Implementation& reference_implementation = *std::rbegin(kAll);

const Implementation& active_implementation() {
  // Not a static of the function: a child that is forked while another thread makes one would wait for it for ever.
  static std::atomic<const Implementation*> active{nullptr};
  const Implementation* chosen = active.load(std::memory_order_acquire);
  if (chosen == nullptr) active.store(chosen = &choose(), std::memory_order_release);
  return *chosen;
}

}  // namespace batchnorm
