// What the calls of the core have in common: sizes, the dtype of x, gradients that may not be wanted.
#pragma once

#include <optional>
#include <tuple>

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

// An array of one value per channel where it is wanted, in the dtype of gamma (float64 where there is none).
class WantedGradient {
 public:
  WantedGradient(bool wanted, std::int64_t channels, const py::object& gamma) {
    if (!wanted) return;
    const auto size = static_cast<py::ssize_t>(channels);
    if (!gamma.is_none() && is_float32(py::reinterpret_borrow<py::array>(gamma))) {
      py::array_t<float> array(size);
      output_ = std::span<float>(array.mutable_data(), static_cast<std::size_t>(channels));
      array_ = array;
    } else {
      py::array_t<double> array(size);
      output_ = values(array);
      array_ = array;
    }
  }
  [[nodiscard]] ChannelOutput output() const { return output_; }
  [[nodiscard]] std::optional<py::array> array() const { return array_; }

 private:
  std::optional<py::array> array_;
  ChannelOutput output_;
};
using ChannelGradients = std::tuple<std::optional<py::array>, std::optional<py::array>>;

}  // namespace batchnorm::bindings
