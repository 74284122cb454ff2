#include "copy.hpp"

#include <algorithm>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

// Ordinary loops get the best vectors the machine has, by a choice when the program starts.
#if defined(__x86_64__)
#define BENCH_BEST_VECTORS __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define BENCH_BEST_VECTORS
#endif

namespace bench {
namespace {

// 64 bytes: one AVX-512 vector, or two or four narrower ones. Tensors of any type are read as such.
constexpr std::size_t kLine = 64;
using Line [[gnu::vector_size(kLine), gnu::may_alias]] = long long;

// Not memcpy: glibc's goes around the caches by itself from some size on.
BENCH_BEST_VECTORS void copy_ordinary(Line* to, const Line* from, std::size_t lines) {
  for (std::size_t i = 0; i < lines; ++i) to[i] = from[i];
}

BENCH_BEST_VECTORS void combine_ordinary(Line* to, const Line* a, const Line* b, std::size_t lines) {
  for (std::size_t i = 0; i < lines; ++i) to[i] = a[i] ^ b[i];
}

#if defined(__x86_64__)
// to = a, or a xor b where b is given: the branch costs nothing beside a store to memory.
__attribute__((target("avx512f"))) void stream_512(Line* to, const Line* a, const Line* b, std::size_t lines) {
  for (std::size_t i = 0; i < lines; ++i) {
    __m512i v = _mm512_loadu_si512(a + i);
    if (b != nullptr) v = _mm512_xor_si512(v, _mm512_loadu_si512(b + i));
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), v);
  }
  _mm_sfence();
}

__attribute__((target("avx2"))) void stream_256(Line* to, const Line* a, const Line* b, std::size_t lines) {
  const auto *from = reinterpret_cast<const __m256i*>(a), *with = reinterpret_cast<const __m256i*>(b);
  for (std::size_t i = 0; i < 2 * lines; ++i) {
    __m256i v = _mm256_loadu_si256(from + i);
    if (b != nullptr) v = _mm256_xor_si256(v, _mm256_loadu_si256(with + i));
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to) + i, v);
  }
  _mm_sfence();
}

void stream_128(Line* to, const Line* a, const Line* b, std::size_t lines) {
  const auto *from = reinterpret_cast<const __m128i*>(a), *with = reinterpret_cast<const __m128i*>(b);
  for (std::size_t i = 0; i < 4 * lines; ++i) {
    __m128i v = _mm_loadu_si128(from + i);
    if (b != nullptr) v = _mm_xor_si128(v, _mm_loadu_si128(with + i));
    _mm_stream_si128(reinterpret_cast<__m128i*>(to) + i, v);
  }
  _mm_sfence();
}

void stream(Line* to, const Line* a, const Line* b, std::size_t lines) {
  static const auto widest = __builtin_cpu_supports("avx512f") ? stream_512
                             : __builtin_cpu_supports("avx2")  ? stream_256
                                                               : stream_128;
  widest(to, a, b, lines);
}
#endif

void move(Stores stores, Line* to, const Line* a, const Line* b, std::size_t lines) {
#if defined(__x86_64__)
  if (stores == Stores::around_caches) return stream(to, a, b, lines);
#endif
  if (b == nullptr) return copy_ordinary(to, a, lines);
  combine_ordinary(to, a, b, lines);
}

// Each thread's part, cut at multiples of a page.
void move_in_parts(Team& team, int threads, Stores stores, Bytes to, const std::byte* a, const std::byte* b) {
  constexpr std::size_t kGrain = 4096 / kLine;
  const auto count = static_cast<std::size_t>(threads);
  const std::size_t lines = to.size() / kLine, grains = (lines + kGrain - 1) / kGrain;
  const auto line = [](const std::byte* p) { return reinterpret_cast<const Line*>(p); };
  team.run(threads, [&](int t) {
    const auto part = static_cast<std::size_t>(t);
    const std::size_t begin = std::min(lines, grains * part / count * kGrain),
                      end = std::min(lines, grains * (part + 1) / count * kGrain);
    if (begin == end) return;
    move(stores, reinterpret_cast<Line*>(to.data()) + begin, line(a) + begin, b == nullptr ? nullptr : line(b) + begin,
         end - begin);
  });
}

}  // namespace

void copy(Team& team, int threads, Stores stores, Bytes to, ConstBytes from) {
  move_in_parts(team, threads, stores, to, from.data(), nullptr);
}

void combine(Team& team, int threads, Stores stores, Bytes to, ConstBytes a, ConstBytes b) {
  move_in_parts(team, threads, stores, to, a.data(), b.data());
}

}  // namespace bench
