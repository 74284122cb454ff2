// Some float64 side by side: two, which the instruction sets that every machine has (SSE2, NEON) compute at once, or as
// many as the kernels of one have (kernels/formulas-inl.hpp). A formula written for V = double or such a vector gives
// each channel the same bits.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "double_double.hpp"

namespace batchnorm {

using Pair = double __attribute__((vector_size(16)));
using Four = double __attribute__((vector_size(32)));

// Channels that a V holds.
template <class V>
constexpr std::int64_t kChannelsOf = sizeof(V) / sizeof(double);

// One of these types, and what comparisons of it give.
template <class V>
concept ManyChannels = sizeof(V) > sizeof(double) && requires(V v) { v[0]; };

// What has as many values as so many channels.
template <std::int64_t kChannels>
struct As {
  typedef float Floats __attribute__((vector_size(kChannels * sizeof(float))));         // NOLINT: not as `using`
  typedef std::uint64_t Bits __attribute__((vector_size(kChannels * sizeof(double))));  // NOLINT
};
template <class V>
using FloatsOf = typename As<kChannelsOf<V>>::Floats;
template <class V>
using BitsOf = typename As<kChannelsOf<V>>::Bits;

// V{f(0), f(1), ...}, of one value a channel.
template <class V, class F>
BN_FORMULA V by_channel(const F& f) {
  if constexpr (kChannelsOf<V> == 1) {
    return f(0);
  } else {
    return [&]<int... kLane>(std::integer_sequence<int, kLane...>) __attribute__((always_inline)) {
      return V{f(kLane)...};
    }(std::make_integer_sequence<int, kChannelsOf<V>>{});
  }
}

// The values of the channels of a V: one field of consecutive structures.
template <class V, class S>
BN_FORMULA V gather(const S* s, double S::* field) {
  return by_channel<V>([&](int l) __attribute__((always_inline)) { return s[l].*field; });
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

#if !defined(__CUDACC__)  // which has one channel a thread
// Lane 4*q + j of vector i and lane 4*q + i of vector j change places.
template <ManyChannels V>
BN_FORMULA void turn_fours(V& a, V& b, V& c, V& d) {
  constexpr int n = kChannelsOf<V>;
  [&]<int... kLane>(std::integer_sequence<int, kLane...>) __attribute__((always_inline)) {
    const V ab = __builtin_shufflevector(a, b, ((kLane & ~1) + (kLane & 1) * n)...);
    const V cd = __builtin_shufflevector(c, d, ((kLane & ~1) + (kLane & 1) * n)...);
    const V ab_odd = __builtin_shufflevector(a, b, ((kLane | 1) + (kLane & 1) * n)...);
    const V cd_odd = __builtin_shufflevector(c, d, ((kLane | 1) + (kLane & 1) * n)...);
    a = __builtin_shufflevector(ab, cd, ((kLane & ~2) + (kLane & 2) / 2 * n)...);
    b = __builtin_shufflevector(ab_odd, cd_odd, ((kLane & ~2) + (kLane & 2) / 2 * n)...);
    c = __builtin_shufflevector(ab, cd, ((kLane | 2) + (kLane & 2) / 2 * n)...);
    d = __builtin_shufflevector(ab_odd, cd_odd, ((kLane | 2) + (kLane & 2) / 2 * n)...);
  }(std::make_integer_sequence<int, n>{});
}

// Four float64 of each channel, which lie together in consecutive structures, as a V each; and back.
template <ManyChannels V, class S>
BN_FORMULA void gather_fours(const S* s, double S::* first, V& a, V& b, V& c, V& d) {
  const auto row = [&](int l) __attribute__((always_inline)) {
    if constexpr (kChannelsOf<V> == 4) {
      return gather<V>(&(s[l].*first));
    } else {
      const auto low = gather<Four>(&(s[l].*first)), high = gather<Four>(&(s[l + 4].*first));
      return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7);
    }
  };
  a = row(0), b = row(1), c = row(2), d = row(3);
  turn_fours(a, b, c, d);
}
template <ManyChannels V, class S>
BN_FORMULA void scatter_fours(V a, V b, V c, V d, S* s, double S::* first) {
  turn_fours(a, b, c, d);
  [&]<int... kFour>(std::integer_sequence<int, kFour...>) __attribute__((always_inline)) {
    const auto row = [&](const V& v, int l) __attribute__((always_inline)) {
      (scatter(Four(__builtin_shufflevector(v, v, 4 * kFour, 4 * kFour + 1, 4 * kFour + 2, 4 * kFour + 3)),
               &(s[4 * kFour + l].*first)),
       ...);
    };
    row(a, 0), row(b, 1), row(c, 2), row(d, 3);
  }(std::make_integer_sequence<int, kChannelsOf<V> / 4>{});
}

#endif

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

template <class V>
BN_FORMULA V square_root(const V& v) {
  return by_channel<V>([&](int l) __attribute__((always_inline)) { return __builtin_sqrt(lane(v, l)); });
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
#if defined(__CUDACC__)  // whose device code has no such vectors
#elif defined(__x86_64__)
  __asm__("" : "+x"(rounded));
#elif defined(__aarch64__)
  __asm__("" : "+w"(rounded));
#endif
  return static_cast<double>(rounded);
}
template <class T, ManyChannels V>
BN_FORMULA V round_to(const V& v) {
  static_assert(sizeof(T) == sizeof(float));
  const FloatsOf<V> rounded = __builtin_convertvector(v, FloatsOf<V>);
  return by_channel<V>([&](int l) __attribute__((always_inline)) { return static_cast<double>(rounded[l]); });
}

// Whether a comparison holds in any lane.
BN_FORMULA bool any(bool holds) { return holds; }
template <ManyChannels V>
BN_FORMULA bool any(const V& holds) {
  auto either = holds[0];
  for (int l = 1; l < kChannelsOf<V>; ++l) either |= holds[l];
  return either != 0;
}

#if !defined(__CUDACC__)
// f<V>(i) for channels i < n: in pairs for tensors of float32, and one by one.
template <class T, class F>
void for_channels(std::int64_t n, const F& f) {
  std::int64_t i = 0;
  if constexpr (sizeof(T) == sizeof(float)) {
    for (; i + 2 <= n; i += 2) f.template operator()<Pair>(i);
  }
  for (; i < n; ++i) f.template operator()<double>(i);
}
#endif

}  // namespace batchnorm
