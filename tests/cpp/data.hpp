// Test data from integers alone, so that every machine makes the same, and comparison of results by their bits.
#pragma once

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

namespace data {

template <class T>
using Bits = std::conditional_t<sizeof(T) == 2, std::uint16_t,
                                std::conditional_t<sizeof(T) == sizeof(float), std::uint32_t, std::uint64_t>>;

// SplitMix64 (Steele, Lea, Flood 2014).
class Generator {
 public:
  explicit Generator(std::uint64_t seed) : state_(seed) {}

  std::uint64_t next() {
    std::uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  // 0, 1, ... n - 1.
  int below(int n) { return static_cast<int>(next() % static_cast<std::uint64_t>(n)); }
  // A multiple of 2^-21 (float) or 2^-50 (double) in [-4, 4). Both steps are exact. Of 16 bits: that of float, rounded.
  template <class T>
  T value() {
    if constexpr (sizeof(T) == 2) {
      return static_cast<T>(value<float>());
    } else if constexpr (sizeof(T) == sizeof(float)) {
      return static_cast<T>(static_cast<std::int32_t>(next() >> 40) - (std::int32_t{1} << 23)) * T(0x1p-21);
    } else {
      return static_cast<T>(static_cast<std::int64_t>(next() >> 11) - (std::int64_t{1} << 52)) * T(0x1p-50);
    }
  }

 private:
  std::uint64_t state_;
};

template <class T>
std::vector<T> values(Generator& generator, std::int64_t count) {
  std::vector<T> v(static_cast<std::size_t>(count));
  for (T& e : v) e = generator.value<T>();
  return v;
}

// The bits of a value; all NaNs are one, because their sign and payload differ between machines.
template <class T>
Bits<T> bits(T value) {
  if constexpr (sizeof(T) == 2) {
    return std::isnan(static_cast<float>(value)) ? Bits<T>{0xffff} : value.bits;
  } else {
    return std::isnan(value) ? ~Bits<T>{0} : std::bit_cast<Bits<T>>(value);
  }
}
template <class T>
bool same_bits(T a, T b) {
  return bits(a) == bits(b);
}
// Whether they are the same byte by byte; if not they may still have the same bits, with other NaNs.
template <class T>
bool same_bytes(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}
template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  if (a.size() != b.size()) return false;
  if (same_bytes(a, b)) return true;
  for (std::size_t e = 0; e < a.size(); ++e) {
    if (!same_bits(a[e], b[e])) return false;
  }
  return true;
}

}  // namespace data
