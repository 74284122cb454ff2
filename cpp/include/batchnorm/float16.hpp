// The 16-bit floating types that tensors may hold, as plain values: no arithmetic, only conversions.
#pragma once

#include <cstdint>
#include <type_traits>

namespace batchnorm {

// Always inlined, so that no copy compiled for one instruction set can be linked into code for another.
#define BATCHNORM_CONVERSION [[gnu::always_inline]] constexpr

// IEEE 754 binary16: 5 bits of exponent, 10 of fraction; numpy.float16, _Float16. Rounds to nearest even; what is
// beyond 65504 by half a spacing or more becomes an infinity. A NaN keeps its sign and the high bits of its payload,
// and is quiet.
struct Float16 {
  std::uint16_t bits;

  Float16() = default;
  // A float64 is rounded to float32 first.
  template <class Number>
    requires std::is_arithmetic_v<Number>
  BATCHNORM_CONVERSION explicit Float16(Number value) : bits(rounded(static_cast<float>(value))) {}
  BATCHNORM_CONVERSION operator float() const {
    const std::uint32_t sign = (bits & 0x8000u) << 16, rest = bits & 0x7fffu;
    if (rest < 0x0400) {  // subnormals are multiples of 2^-24
      const float value = static_cast<float>(rest) * 0x1p-24f;
      return sign != 0 ? -value : value;
    }
    const std::uint32_t quiet = rest > 0x7c00 ? 0x00400000u : 0u, exponent = rest >= 0x7c00 ? 0x70000000u : 0x38000000u;
    return __builtin_bit_cast(float, sign | quiet | ((rest << 13) + exponent));
  }

 private:
  BATCHNORM_CONVERSION static std::uint16_t rounded(float value) {
    const auto all = __builtin_bit_cast(std::uint32_t, value);
    const std::uint32_t sign = all >> 16 & 0x8000u, rest = all & 0x7fffffffu;
    std::uint32_t half = 0;
    if (rest > 0x7f800000) {
      half = 0x7e00u | (rest >> 13 & 0x03ffu);
    } else if (rest >= 0x47800000) {
      half = 0x7c00u;
    } else if (rest >= 0x38800000) {
      half = (rest - 0x38000000u + 0x0fffu + (rest >> 13 & 1u)) >> 13;  // may carry into the exponent, up to infinity
    } else if (rest > 0x33000000) {                                     // above half the smallest subnormal
      const std::uint32_t significand = (rest & 0x007fffffu) | 0x00800000u, shift = 126 - (rest >> 23);
      const std::uint32_t last = significand >> shift & 1u;
      half = (significand + (1u << (shift - 1)) - 1 + last) >> shift;
    }
    return static_cast<std::uint16_t>(sign | half);
  }
};

// bfloat16: the upper half of a float32; 8 bits of exponent, 7 of fraction. Rounds as Float16 does.
struct BFloat16 {
  std::uint16_t bits;

  BFloat16() = default;
  // A float64 is rounded to float32 first.
  template <class Number>
    requires std::is_arithmetic_v<Number>
  BATCHNORM_CONVERSION explicit BFloat16(Number value) : bits(rounded(static_cast<float>(value))) {}
  BATCHNORM_CONVERSION operator float() const {
    return __builtin_bit_cast(float, static_cast<std::uint32_t>(bits) << 16);
  }

 private:
  BATCHNORM_CONVERSION static std::uint16_t rounded(float value) {
    const auto all = __builtin_bit_cast(std::uint32_t, value);
    if ((all & 0x7fffffffu) > 0x7f800000) return static_cast<std::uint16_t>(all >> 16 | 0x0040u);
    return static_cast<std::uint16_t>((all + 0x7fffu + (all >> 16 & 1u)) >> 16);
  }
};

#undef BATCHNORM_CONVERSION

}  // namespace batchnorm
