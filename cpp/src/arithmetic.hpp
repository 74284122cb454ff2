// The type that values of a tensor are computed in, whatever type they are stored in.
#pragma once

#include "batchnorm/float16.hpp"

namespace batchnorm {

template <class T>
struct ArithmeticOf;
template <>
struct ArithmeticOf<Float16> {
  using Type = float;
};
template <>
struct ArithmeticOf<BFloat16> {
  using Type = float;
};
template <>
struct ArithmeticOf<float> {
  using Type = float;
};
template <>
struct ArithmeticOf<double> {
  using Type = double;
};
// The result is the one of a tensor of this type, rounded once more where T is narrower.
template <class T>
using Arithmetic = typename ArithmeticOf<T>::Type;

}  // namespace batchnorm
