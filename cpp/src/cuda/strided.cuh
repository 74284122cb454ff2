// Copies of arrays of any strides and any plain type, value by value: what is given in another order or another type
// than kernels read, and what is wanted so.
#pragma once

#include "batchnorm/cuda.hpp"
#include "cuda/visit.cuh"

namespace batchnorm::cuda {

template <class F>
BN_DEVICE void with_type(Element element, const F& f) {
  switch (element) {
    case Element::boolean:
      return f(std::uint8_t{});
    case Element::int8:
      return f(std::int8_t{});
    case Element::int16:
      return f(std::int16_t{});
    case Element::int32:
      return f(std::int32_t{});
    case Element::int64:
      return f(std::int64_t{});
    case Element::uint8:
      return f(std::uint8_t{});
    case Element::uint16:
      return f(std::uint16_t{});
    case Element::uint32:
      return f(std::uint32_t{});
    case Element::uint64:
      return f(std::uint64_t{});
    case Element::float16:
      return f(Float16{});
    case Element::bfloat16:
      return f(BFloat16{});
    case Element::float32:
      return f(float{});
    case Element::float64:
      return f(double{});
  }
}

// A float64 holds all values of these types but long integers.
BN_DEVICE double value_at(Element element, const std::byte* p) {
  double value = 0;
  with_type(element, [&]<class T>(T) { value = static_cast<double>(*reinterpret_cast<const T*>(p)); });
  return value;
}
BN_DEVICE void put_at(Element element, std::byte* p, double value) {
  with_type(element, [&]<class T>(T) { *reinterpret_cast<T*>(p) = static_cast<T>(value); });
}

// By a thread for each value.
template <class Views>
__global__ void __launch_bounds__(kStepThreads) copy_strided(const __grid_constant__ Views views, bool as_flags) {
  std::int64_t rest = this_thread();
  if (rest >= views.count) return;
  const std::byte* from = views.from;
  std::byte* to = views.to;
  for (int d = views.dimensions - 1; d >= 0; --d) {
    const std::int64_t at = rest % views.sizes[d];
    rest /= views.sizes[d];
    from += at * views.from_strides[d];
    to += at * views.to_strides[d];
  }
  if (views.from_element == views.to_element && !as_flags) {  // the bits, of NaN too
    return with_type(views.from_element,
                     [&]<class T>(T) { *reinterpret_cast<T*>(to) = *reinterpret_cast<const T*>(from); });
  }
  const double value = value_at(views.from_element, from);
  put_at(views.to_element, to, as_flags ? (value != 0 ? 1.0 : 0.0) : value);
}

}  // namespace batchnorm::cuda
