#include "copy.hpp"

#include <algorithm>
#include <cstring>

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

// The yardstick gets the best vectors the machine has.
#if defined(__x86_64__)
#define BENCH_BEST_VECTORS __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define BENCH_BEST_VECTORS
#endif

namespace bench {
namespace {

// Not memcpy: glibc's goes around the caches by itself from some size on.
BENCH_BEST_VECTORS void copy_part(float* to, const float* from, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) to[i] = from[i];
}

BENCH_BEST_VECTORS void add_part(float* to, const float* a, const float* b, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) to[i] = a[i] + b[i];
}

// `to` is aligned to 16 bytes: buffers start at a page, and parts are cut at multiples of 1024 values.
void stream_part(float* to, const float* from, std::size_t n) {
#if defined(__x86_64__)
  std::size_t i = 0;
  for (; i + 4 <= n; i += 4) _mm_stream_ps(to + i, _mm_loadu_ps(from + i));
  for (; i < n; ++i) to[i] = from[i];
  _mm_sfence();
#else
  copy_part(to, from, n);
#endif
}

// Below this many bytes moved a copy is one thread's work, as it is in the library.
constexpr std::size_t kSerialBytes = 128 * 1024;

// f(begin, end) on each thread's part, cut at multiples of 1024 values.
template <class F>
void in_parts(std::size_t n, int threads, F f) {
  if (2 * n * sizeof(float) <= kSerialBytes) threads = 1;
  constexpr std::size_t kGrain = 1024;
  const std::size_t grains = (n + kGrain - 1) / kGrain,
                    each = (grains + static_cast<std::size_t>(threads) - 1) / static_cast<std::size_t>(threads);
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
#endif
  for (int t = 0; t < threads; ++t) {
    const std::size_t begin = std::min(n, static_cast<std::size_t>(t) * each * kGrain);
    const std::size_t end = std::min(n, begin + each * kGrain);
    if (begin < end) f(begin, end);
  }
}

}  // namespace

void copy_ordinary(float* to, const float* from, std::size_t n, int threads) {
  in_parts(n, threads, [=](std::size_t begin, std::size_t end) { copy_part(to + begin, from + begin, end - begin); });
}

void copy_around_cache(float* to, const float* from, std::size_t n, int threads) {
  in_parts(n, threads, [=](std::size_t begin, std::size_t end) { stream_part(to + begin, from + begin, end - begin); });
}

void add_streams(float* to, const float* a, const float* b, std::size_t n, int threads) {
  in_parts(n, threads,
           [=](std::size_t begin, std::size_t end) { add_part(to + begin, a + begin, b + begin, end - begin); });
}

}  // namespace bench
