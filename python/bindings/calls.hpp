// What the calls of the core have in common: sizes, the dtype of x, gradients that may not be wanted.
//
// All that a call writes is an array that Python has made before: when the core has written, nothing may be asked for
// any more that there might not be.
#pragma once

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "arrays.hpp"
#include "release_for_work.hpp"

namespace batchnorm::bindings {

using Sizes = std::tuple<std::int64_t, std::int64_t, std::int64_t>;

inline Problem problem_of(const Sizes& sizes) { return {std::get<0>(sizes), std::get<1>(sizes), std::get<2>(sizes)}; }

// f(T{}) for the dtype of x.
template <class F>
auto with_dtype_of(const py::array& x, F&& f) {
  check_memory(x, "x", Access::read);
  if (is_float32(x)) return f(float{});
  if (is_float64(x)) return f(double{});
  return is_float16(x) ? f(Float16{}) : f(BFloat16{});
}

// An array that takes one value per channel, or none where they are not wanted. One of 16 bits gets them as float32,
// rounded by deliver().
class GradientInto {
 public:
  GradientInto(std::optional<py::array>& array, const char* name) {
    if (!array) return;
    check_memory(*array, name, Access::write);
    check_contiguous(*array, name);
    const auto size = static_cast<std::size_t>(array->size());
    if (is_float32(*array)) {
      output_ = std::span<float>(static_cast<float*>(array->mutable_data()), size);
    } else if (is_float64(*array)) {
      output_ = std::span<double>(static_cast<double*>(array->mutable_data()), size);
    } else {
      wide_.resize(size);
      output_ = std::span<float>(wide_);
      (is_float16(*array) ? float16_ : bfloat16_) = array->mutable_data();
    }
  }
  [[nodiscard]] ChannelOutput output() const { return output_; }
  void deliver() const {
    if (float16_ != nullptr) round_to(static_cast<Float16*>(float16_));
    if (bfloat16_ != nullptr) round_to(static_cast<BFloat16*>(bfloat16_));
  }

 private:
  template <class T>
  void round_to(T* to) const {
    std::transform(wide_.begin(), wide_.end(), to, [](float value) { return T(value); });
  }

  ChannelOutput output_;
  std::vector<float> wide_;
  void *float16_ = nullptr, *bfloat16_ = nullptr;
};

}  // namespace batchnorm::bindings
