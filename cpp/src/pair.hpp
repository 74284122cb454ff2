// Two float64 side by side: what the instruction sets that every machine has (SSE2, NEON) compute at once. A formula
// written for V = double or Pair gives each channel the same bits either way.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace batchnorm {

using Pair = double __attribute__((vector_size(16)));

// Channels that a V holds.
template <class V>
constexpr std::int64_t kChannelsOf = sizeof(V) / sizeof(double);

// The values of the channels of a V: one field of consecutive structures.
template <class V, class S>
V gather(const S* s, double S::* field) {
  if constexpr (kChannelsOf<V> == 1) {
    return s->*field;
  } else {
    return V{s[0].*field, s[1].*field};
  }
}
template <class V>
V gather(const double* p) {
  if constexpr (kChannelsOf<V> == 1) {
    return *p;
  } else {
    return V{p[0], p[1]};
  }
}
inline double lane(double v, int) { return v; }
inline double lane(const Pair& v, int l) { return v[l]; }
using PairOfBools = decltype(Pair{} < Pair{});
inline bool lane(bool v, int) { return v; }
inline bool lane(const PairOfBools& v, int l) { return v[l] != 0; }
template <class V>
void scatter(const V& v, double* p) {
  for (int l = 0; l < kChannelsOf<V>; ++l) p[l] = lane(v, l);
}

// The channels of a V, rounded to T.
template <class T>
void put_values(double v, T* p) {
  *p = static_cast<T>(v);
}
template <class T>
void put_values(const Pair& v, T* p) {
  typedef T Two __attribute__((vector_size(2 * sizeof(T))));
  const Two rounded = __builtin_convertvector(v, Two);
  std::memcpy(p, &rounded, sizeof rounded);
}

// The same value in all lanes.
template <class V>
V all(double value) {
  return value - V{};  // which keeps the sign of -0
}

inline double square_root(double v) { return std::sqrt(v); }
inline Pair square_root(const Pair& v) { return Pair{std::sqrt(v[0]), std::sqrt(v[1])}; }

inline double absolute(double v) { return std::abs(v); }
inline Pair absolute(const Pair& v) { return Pair{std::abs(v[0]), std::abs(v[1])}; }

// The largest power of two that is at most |v|; 0 for 0 and subnormals.
inline double power_of_two_below(double v) {
  return std::bit_cast<double>(std::bit_cast<std::uint64_t>(v) & 0x7ff0'0000'0000'0000);
}
inline Pair power_of_two_below(const Pair& v) {
  using Bits = std::uint64_t __attribute__((vector_size(16)));
  return reinterpret_cast<Pair>(reinterpret_cast<Bits>(v) & 0x7ff0'0000'0000'0000);
}

// As the nearest value of T. Behind a wall for the compiler: GCC 11.3 and 12.2 at -O3 left out the rounding of two
// values side by side to float and back (SLP vectors), without which the center of a channel is not its own.
template <class T>
double round_to(double v) {
  auto rounded = static_cast<T>(v);
#if defined(__x86_64__)
  __asm__("" : "+x"(rounded));
#elif defined(__aarch64__)
  __asm__("" : "+w"(rounded));
#endif
  return static_cast<double>(rounded);
}
template <class T>
Pair round_to(const Pair& v) {
  using Floats = float __attribute__((vector_size(8)));
  static_assert(sizeof(T) == sizeof(float));
  return __builtin_convertvector(__builtin_convertvector(v, Floats), Pair);
}

// Whether a comparison holds in any lane.
inline bool any(bool holds) { return holds; }
inline bool any(const PairOfBools& holds) { return (holds[0] | holds[1]) != 0; }

// f<V>(i) for channels i < n: in pairs for tensors of float32, and one by one.
template <class T, class F>
void for_channels(std::int64_t n, const F& f) {
  std::int64_t i = 0;
  if constexpr (sizeof(T) == sizeof(float)) {
    for (; i + 2 <= n; i += 2) f.template operator()<Pair>(i);
  }
  for (; i < n; ++i) f.template operator()<double>(i);
}

}  // namespace batchnorm
