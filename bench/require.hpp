// What a verified result may be off by, and the error where it is off by more.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdio>
#include <stdexcept>

#include "batchnorm/float16.hpp"

namespace bench {

// What rounding may do to a result, relative to the absolute terms it is made of: some units in the last place of T,
// and for float64 what the plain loops themselves round away. The data lie within 4 standard deviations of their mean.
template <class T>
inline constexpr double kRounding = sizeof(T) == 4 ? 1e-6 : 1e-10;
template <>
inline constexpr double kRounding<batchnorm::Float16> = 0x1p-11 + 1e-6;
template <>
inline constexpr double kRounding<batchnorm::BFloat16> = 0x1p-8 + 1e-6;

inline void require(const char* pass, const char* what, std::size_t at, double got, double expected, double tolerance) {
  if (std::abs(got - expected) <= tolerance) return;  // false for NaN
  char text[200];
  std::snprintf(text, sizeof text, "%s is wrong: %s[%zu] is %.9g, by definition %.9g", pass, what, at, got, expected);
  throw std::runtime_error(text);
}

}  // namespace bench
