// The calls with a ReLU. As module.cpp: views in, GIL released, core called.
#include <pybind11/stl.h>

#include <optional>

#include "batchnorm/batchnorm.hpp"
#include "calls.hpp"

namespace batchnorm::bindings {
namespace {

using MaybeArray = std::optional<py::array>;

template <class T>
std::span<const T> tensor_or_none(const MaybeArray& a, const char* name) {
  return a ? tensor<T>(*a, name) : std::span<const T>{};
}
template <class T>
std::span<T> output_or_none(MaybeArray& a, const char* name) {
  return a ? output<T>(*a, name) : std::span<T>{};
}

// The bytes of a mask: a contiguous array of uint8.
void check_bytes(const py::array& mask) {
  if (!py::dtype::of<std::uint8_t>().is(mask.dtype()) || (mask.flags() & py::array::c_style) == 0) {
    throw py::type_error("mask must be a contiguous uint8 array");
  }
}
// Which are read alone.
std::span<std::uint8_t> bytes_of(const py::array& mask) {
  check_bytes(mask);
  return {static_cast<std::uint8_t*>(const_cast<void*>(mask.data())), static_cast<std::size_t>(mask.size())};
}
// Of one that Python has had made for the call, and may not write to itself.
std::span<std::uint8_t> new_bytes_of(MaybeArray& mask) {
  if (!mask) return {};
  check_bytes(*mask);
  return {static_cast<std::uint8_t*>(const_cast<void*>(mask->data())), static_cast<std::size_t>(mask->size())};
}

void py_batch_norm_relu(const py::array& x, const Sizes& sizes, const MaybeArray& residual, const py::object& gamma,
                        const py::object& beta, double eps, py::array y, MaybeArray mask, py::array saved,
                        int threads) {
  const Problem problem = problem_of(sizes);
  const ChannelValues g = channel_values(gamma, "gamma"), b = channel_values(beta, "beta");
  const auto bits = new_bytes_of(mask);
  with_dtype_of(x, [&]<class T>(T) {
    const auto in = tensor<T>(x, "x");
    const auto add = tensor_or_none<T>(residual, "residual");
    const auto out = output<T>(y, "out");
    const auto result = rows<Moments>(saved, "moments");
    const ReleaseForWork gil(x.size());
    batch_norm<T>(in, Call<T>{.problem = problem, .gamma = g, .beta = b, .eps = eps, .tail = {add, true, bits}}, out,
                  result, {threads});
  });
}

void py_normalize_relu(const py::array& x, const Sizes& sizes, const MaybeArray& residual, const py::object& mean,
                       const py::object& var, const py::object& gamma, const py::object& beta, double eps, py::array y,
                       MaybeArray mask, int threads) {
  const Problem problem = problem_of(sizes);
  const ChannelValues m = channel_values(mean, "mean"), v = channel_values(var, "var");
  const ChannelValues g = channel_values(gamma, "gamma"), b = channel_values(beta, "beta");
  const auto bits = new_bytes_of(mask);
  with_dtype_of(x, [&]<class T>(T) {
    const auto in = tensor<T>(x, "x");
    const auto add = tensor_or_none<T>(residual, "residual");
    const auto out = output<T>(y, "out");
    const ReleaseForWork gil(x.size());
    normalize<T>(in, Call<T>{.problem = problem, .gamma = g, .beta = b, .eps = eps, .tail = {add, true, bits}}, m, v,
                 out, {threads});
  });
}

void py_batch_norm_relu_backward(const py::array& dy, const py::array& x, const Sizes& sizes, const py::array& mask,
                                 const py::array& moments_table, const py::object& gamma, double eps, MaybeArray dx,
                                 MaybeArray dresidual, std::optional<py::array> dgamma, std::optional<py::array> dbeta,
                                 int threads) {
  const Problem problem = problem_of(sizes);
  const auto stats = table<Moments>(moments_table, "moments");
  const ChannelValues scale = channel_values(gamma, "gamma");
  const GradientInto to_gamma(dgamma, "dgamma"), to_beta(dbeta, "dbeta");
  const auto bits = bytes_of(mask);
  with_dtype_of(x, [&]<class T>(T) {
    const auto g = tensor<T>(dy, "dy");
    const auto in = tensor<T>(x, "x");
    const auto out = output_or_none<T>(dx, "out"), passed_on = output_or_none<T>(dresidual, "out");
    const ReleaseForWork gil(x.size());
    batch_norm_backward<T>(g, in, Call<T>{.problem = problem, .gamma = scale, .eps = eps, .tail = {{}, true, bits}},
                           stats, Gradients<T>{out, passed_on, to_gamma.output(), to_beta.output()}, {threads});
  });
  to_gamma.deliver();
  to_beta.deliver();
}

void py_normalize_relu_backward(const py::array& dy, const py::array& x, const Sizes& sizes, const py::array& mask,
                                const py::object& mean, const py::object& var, const py::object& gamma, double eps,
                                MaybeArray dx, MaybeArray dresidual, std::optional<py::array> dgamma,
                                std::optional<py::array> dbeta, int threads) {
  const Problem problem = problem_of(sizes);
  const ChannelValues m = channel_values(mean, "mean"), v = channel_values(var, "var");
  const ChannelValues scale = channel_values(gamma, "gamma");
  const GradientInto to_gamma(dgamma, "dgamma"), to_beta(dbeta, "dbeta");
  const auto bits = bytes_of(mask);
  with_dtype_of(x, [&]<class T>(T) {
    const auto g = tensor<T>(dy, "dy");
    const auto in = tensor<T>(x, "x");
    const auto out = output_or_none<T>(dx, "out"), passed_on = output_or_none<T>(dresidual, "out");
    const ReleaseForWork gil(x.size());
    normalize_backward<T>(g, in, Call<T>{.problem = problem, .gamma = scale, .eps = eps, .tail = {{}, true, bits}}, m,
                          v, Gradients<T>{out, passed_on, to_gamma.output(), to_beta.output()}, {threads});
  });
  to_gamma.deliver();
  to_beta.deliver();
}

}  // namespace

void add_relu_calls(py::module_& m) {
  using py::arg;
  m.def(
      "relu_mask_bytes", [](const Sizes& sizes) { return relu_mask_bytes(problem_of(sizes)); }, arg("sizes"),
      "Bytes of a mask.");
  m.def("batch_norm_relu", &py_batch_norm_relu, arg("x"), arg("sizes"), arg("residual"), arg("gamma"), arg("beta"),
        arg("eps"), arg("out"), arg("mask"), arg("moments"), arg("threads"), "batch_norm, residual added, ReLU.");
  m.def("normalize_relu", &py_normalize_relu, arg("x"), arg("sizes"), arg("residual"), arg("mean"), arg("var"),
        arg("gamma"), arg("beta"), arg("eps"), arg("out"), arg("mask"), arg("threads"),
        "normalize, residual added, ReLU.");
  m.def("batch_norm_relu_backward", &py_batch_norm_relu_backward, arg("dy"), arg("x"), arg("sizes"), arg("mask"),
        arg("moments"), arg("gamma"), arg("eps"), arg("out"), arg("dresidual"), arg("dgamma"), arg("dbeta"),
        arg("threads"), "Gradients of batch_norm_relu.");
  m.def("normalize_relu_backward", &py_normalize_relu_backward, arg("dy"), arg("x"), arg("sizes"), arg("mask"),
        arg("mean"), arg("var"), arg("gamma"), arg("eps"), arg("out"), arg("dresidual"), arg("dgamma"), arg("dbeta"),
        arg("threads"), "Gradients of normalize_relu.");
}

}  // namespace batchnorm::bindings
