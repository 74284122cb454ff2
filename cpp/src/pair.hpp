// Some float64 side by side: two, which the instruction sets that every machine has (SSE2, NEON) compute at once, or as
// many as the kernels of one have (kernels/lines-inl.hpp). A formula written for V = double or such a vector gives
// each channel the same bits.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "double_double.hpp"

namespace batchnorm {

using Pair = double __attribute__((vector_size(16)));

// Channels that a V holds.
template <class V>
constexpr std::int64_t kChannelsOf = sizeof(V) / sizeof(double);

// One of these types, and what comparisons of it give.
template <class V>
concept ManyChannels = sizeof(V) > sizeof(double) && requires(V v) { v[0]; };

// What has as many values as so many channels.
template <std::int64_t kChannels>
struct As;
template <>
struct As<2> {
  using Floats = float __attribute__((vector_size(8)));
  using Bits = std::uint64_t __attribute__((vector_size(16)));
};
template <>
struct As<4> {
  using Floats = float __attribute__((vector_size(16)));
  using Bits = std::uint64_t __attribute__((vector_size(32)));
};
template <class V>
using FloatsOf = typename As<kChannelsOf<V>>::Floats;
template <class V>
using BitsOf = typename As<kChannelsOf<V>>::Bits;

// The values of the channels of a V: one field of consecutive structures.
template <class V, class S>
BN_FORMULA V gather(const S* s, double S::* field) {
  if constexpr (kChannelsOf<V> == 1) {
    return s->*field;
  } else if constexpr (kChannelsOf<V> == 2) {
    return V{s[0].*field, s[1].*field};
  } else {
    return V{s[0].*field, s[1].*field, s[2].*field, s[3].*field};
  }
}
template <class V>
BN_FORMULA V gather(const double* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
BN_FORMULA double lane(double v, int) { return v; }
BN_FORMULA bool lane(bool v, int) { return v; }
template <ManyChannels V>
BN_FORMULA auto lane(const V& v, int l) {
  if constexpr (std::is_same_v<std::remove_cvref_t<decltype(v[0])>, double>) {
    return v[l];
  } else {
    return v[l] != 0;
  }
}
template <class V>
BN_FORMULA void scatter(const V& v, double* p) {
  std::memcpy(p, &v, sizeof v);
}

// The channels of a V, rounded to T.
template <class T, class V>
BN_FORMULA void put_values(const V& v, T* p) {
  if constexpr (kChannelsOf<V> == 1) {
    *p = static_cast<T>(v);
  } else if constexpr (sizeof(T) == sizeof(double)) {
    scatter(v, p);
  } else {
    const auto rounded = __builtin_convertvector(v, FloatsOf<V>);
    std::memcpy(p, &rounded, sizeof rounded);
  }
}

// The same value in all lanes.
template <class V>
BN_FORMULA V all(double value) {
  return value - V{};  // which keeps the sign of -0
}

BN_FORMULA double square_root(double v) { return __builtin_sqrt(v); }
template <ManyChannels V>
BN_FORMULA V square_root(const V& v) {
  if constexpr (kChannelsOf<V> == 2) {
    return V{__builtin_sqrt(v[0]), __builtin_sqrt(v[1])};
  } else {
    return V{__builtin_sqrt(v[0]), __builtin_sqrt(v[1]), __builtin_sqrt(v[2]), __builtin_sqrt(v[3])};
  }
}

BN_FORMULA double absolute(double v) { return __builtin_fabs(v); }
template <ManyChannels V>
BN_FORMULA V absolute(const V& v) {
  return reinterpret_cast<V>(reinterpret_cast<BitsOf<V>>(v) & ~(std::uint64_t{1} << 63));
}

// The largest power of two that is at most |v|; 0 for 0 and subnormals.
BN_FORMULA double power_of_two_below(double v) {
  return __builtin_bit_cast(double, __builtin_bit_cast(std::uint64_t, v) & 0x7ff0'0000'0000'0000);
}
template <ManyChannels V>
BN_FORMULA V power_of_two_below(const V& v) {
  return reinterpret_cast<V>(reinterpret_cast<BitsOf<V>>(v) & 0x7ff0'0000'0000'0000);
}

// As the nearest value of T. Behind a wall for the compiler: GCC 11.3 and 12.2 at -O3 left out the rounding of two
// values side by side to float and back (SLP vectors), without which the center of a channel is not its own.
template <class T>
BN_FORMULA double round_to(double v) {
  auto rounded = static_cast<T>(v);
#if defined(__x86_64__)
  __asm__("" : "+x"(rounded));
#elif defined(__aarch64__)
  __asm__("" : "+w"(rounded));
#endif
  return static_cast<double>(rounded);
}
template <class T, ManyChannels V>
BN_FORMULA V round_to(const V& v) {
  static_assert(sizeof(T) == sizeof(float));
  return __builtin_convertvector(__builtin_convertvector(v, FloatsOf<V>), V);
}

// Whether a comparison holds in any lane.
BN_FORMULA bool any(bool holds) { return holds; }
template <ManyChannels V>
BN_FORMULA bool any(const V& holds) {
  auto either = holds[0];
  for (int l = 1; l < kChannelsOf<V>; ++l) either |= holds[l];
  return either != 0;
}

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
