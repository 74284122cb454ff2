#include "dispatch.hpp"

#include <array>
#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "machine.hpp"

namespace batchnorm {
namespace {

constexpr std::array kImplementations = {
#ifdef BATCHNORM_HAS_X86_64_V4
    Implementation{"x86-64-v4", &kernels::x86_64_v4_table},
#endif
#ifdef BATCHNORM_HAS_X86_64_V3
    Implementation{"x86-64-v3", &kernels::x86_64_v3_table},
#endif
#ifdef BATCHNORM_HAS_X86_64_V2
    Implementation{"x86-64-v2", &kernels::x86_64_v2_table},
#endif
#ifdef BATCHNORM_HAS_NEON
    Implementation{"neon", &kernels::neon_table},
#endif
    Implementation{"generic", &kernels::generic_table},
};

const Implementation& choose() {
  const char* forced = std::getenv("BATCHNORM_ISA");
  const std::string wanted = forced == nullptr ? "" : forced;
  if (wanted == reference_implementation.name) return reference_implementation;
  std::string valid;
  for (const Implementation& implementation : kImplementations) {
    if (!machine_runs(implementation.name)) continue;
    if (wanted.empty() || wanted == implementation.name) return implementation;
    valid += std::string(implementation.name) + ", ";
  }
  throw std::invalid_argument("BATCHNORM_ISA must be one of " + valid + reference_implementation.name + ", got " +
                              wanted);
}

}  // namespace

const Implementation reference_implementation{"reference", &kernels::reference_table};

std::span<const Implementation> implementations() { return kImplementations; }

const Implementation& active_implementation() {
  // Not a static of the function: a child that is forked while another thread makes one would wait for it for ever.
  static std::atomic<const Implementation*> active{nullptr};
  const Implementation* chosen = active.load(std::memory_order_acquire);
  if (chosen == nullptr) active.store(chosen = &choose(), std::memory_order_release);
  return *chosen;
}

}  // namespace batchnorm
