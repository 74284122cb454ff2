// The exact sum of any float32 or float64 values: a fixed-point number wide enough for all of them (Kulisch).
// Slow, about ten times a plain sum; used where everything else has cancelled.
#pragma once

#include <array>
#include <bit>
#include <cstdint>

#include "double_double.hpp"

namespace batchnorm {

class ExactSum {
 public:
  // Finite values only. At most 2^30 additions may lie between two calls of carry().
  BN_BOTH void add(double value) {
    const auto bits = std::bit_cast<std::uint64_t>(value);
    const auto exponent = static_cast<int>((bits >> 52) & 0x7ff);
    std::uint64_t mantissa = bits & ((std::uint64_t{1} << 52) - 1);
    if (exponent != 0) mantissa |= std::uint64_t{1} << 52;
    const int position = exponent == 0 ? 0 : exponent - 1;  // of the lowest bit, in units of 2^-1074
    const auto limb = static_cast<std::size_t>(position / 32);
    const int shift = position % 32;
    // mantissa << shift has up to 84 bits: three pieces of 32.
    const std::uint64_t low = mantissa << shift, high = shift == 0 ? 0 : mantissa >> (64 - shift);
    const std::int64_t pieces[3] = {static_cast<std::int64_t>(low & 0xffffffffu), static_cast<std::int64_t>(low >> 32),
                                    static_cast<std::int64_t>(high)};
    const bool negative = (bits >> 63) != 0;
    for (std::size_t k = 0; k < 3; ++k) limbs_[limb + k] += negative ? -pieces[k] : pieces[k];
  }

  // Brings every limb but the last back to [0, 2^32).
  BN_BOTH void carry() {
    for (std::size_t k = 0; k + 1 < limbs_.size(); ++k) {
      const std::int64_t over = limbs_[k] >> 32;  // floor, also for negative limbs
      limbs_[k] -= over * (std::int64_t{1} << 32);
      limbs_[k + 1] += over;
    }
  }

  // The sum to about 100 bits.
  [[nodiscard]] BN_BOTH DoubleDouble value() {
    carry();
    const bool negative = limbs_.back() < 0;
    if (negative) {  // so that all limbs have one sign and nothing cancels below
      for (auto& limb : limbs_) limb = -limb;
      carry();
    }
    DoubleDouble sum;
    for (std::size_t k = limbs_.size(); k-- > 0;) {
      sum = sum + DoubleDouble{std::ldexp(static_cast<double>(limbs_[k]), 32 * static_cast<int>(k) - 1074), 0};
    }
    return negative ? DoubleDouble{-sum.hi, -sum.lo} : sum;
  }

 private:
  // 2046 positions, 53 bits and 64 bits of carries fit 68 limbs.
  std::array<std::int64_t, 68> limbs_{};
};

}  // namespace batchnorm
