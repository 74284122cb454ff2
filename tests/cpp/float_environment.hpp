// The floating-point control and status of the calling thread: what a caller may have set, and wants back.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace float_environment {

struct Named {
  const char* name;
  std::uint64_t value;
};

#if defined(__x86_64__)

// MXCSR: flags in bits 0-5, DAZ in bit 6, masks in bits 7-12, rounding in bits 13-14, FTZ in bit 15.
inline std::uint64_t get() { return _mm_getcsr(); }
inline void set(std::uint64_t value) { _mm_setcsr(static_cast<unsigned>(value)); }
constexpr std::uint64_t kDefault = 0x1f80;
constexpr Named kAll[] = {{"default", kDefault},
                          {"flush to zero, denormals are zero", kDefault | 0x8040},
                          {"all exception flags raised", kDefault | 0x3f},
                          {"rounding down", kDefault | 0x2000},
                          {"rounding up", kDefault | 0x4000},
                          {"rounding to zero", kDefault | 0x6000}};

#elif defined(__aarch64__)

// FPCR (rounding in bits 22-23, flush to zero in bit 24) above FPSR (flags in bits 0-4 and 7, saturation in bit 27).
inline std::uint64_t get() {
  std::uint64_t control, status;
  __asm__ __volatile__("mrs %0, fpcr\n\tmrs %1, fpsr" : "=r"(control), "=r"(status));
  return control << 32 | status;
}
inline void set(std::uint64_t value) {
  __asm__ __volatile__("msr fpcr, %0\n\tmsr fpsr, %1" ::"r"(value >> 32), "r"(value & 0xffffffffu));
}
constexpr std::uint64_t kDefault = 0;
constexpr Named kAll[] = {{"default", kDefault},
                          {"flush to zero", std::uint64_t{1} << 56},
                          {"all exception flags raised", 0x1f},
                          {"rounding up", std::uint64_t{1} << 54},
                          {"rounding down", std::uint64_t{2} << 54},
                          {"rounding to zero", std::uint64_t{3} << 54}};

#else

inline std::uint64_t get() { return 0; }
inline void set(std::uint64_t) {}
constexpr std::uint64_t kDefault = 0;
constexpr Named kAll[] = {{"default", kDefault}};

#endif

// Runs f in the given environment and gives back what f left of it. The caller of this has the default one again.
template <class F>
std::uint64_t after_running_in(std::uint64_t environment, F&& f) {
  set(environment);
  f();
  const std::uint64_t left = get();
  set(kDefault);
  return left;
}

}  // namespace float_environment
