// The calls with weights per position, and those of segments. As module.cpp: views in, GIL released, core called.
#include <pybind11/stl.h>

#include <optional>

#include "batchnorm/batchnorm.hpp"
#include "calls.hpp"

namespace batchnorm::bindings {
namespace {

Padding padding_of(int value) {
  if (value < 0 || value > 2) throw py::value_error("padding must be 0 (zero), 1 (keep) or 2 (normalize)");
  return static_cast<Padding>(value);
}

template <class T>
Counted<T> weights_of(const py::array& weights, int padding) {
  using W = typename detail::WeightType<T>::type;
  return {tensor<W>(weights, "weights"), padding_of(padding)};
}

py::array py_weighted_moments(const py::array& x, const Sizes& sizes, const py::array& weights, int threads) {
  const Problem problem = problem_of(sizes);
  auto out = new_table<Moments>(problem.channels);
  with_dtype_of(x, [&]<class T>(T) {
    const auto in = tensor<T>(x, "x");
    const auto w = weights_of<T>(weights, 0);
    const auto result = rows<Moments>(out);
    const ReleaseForWork gil(x.size());
    moments<T>(in, Call<T>{.problem = problem, .counted = w}, result, {threads});
  });
  return out;
}

void py_weighted_batch_norm(const py::array& x, const Sizes& sizes, const py::array& weights, int padding,
                            const py::object& gamma, const py::object& beta, double eps, py::array y, py::array saved,
                            int threads) {
  const Problem problem = problem_of(sizes);
  const ChannelValues g = channel_values(gamma, "gamma"), b = channel_values(beta, "beta");
  with_dtype_of(x, [&]<class T>(T) {
    const auto in = tensor<T>(x, "x");
    const auto w = weights_of<T>(weights, padding);
    const auto out = output<T>(y, "out");
    const auto result = rows<Moments>(saved, "moments");
    const ReleaseForWork gil(x.size());
    batch_norm<T>(in, Call<T>{.problem = problem, .counted = w, .gamma = g, .beta = b, .eps = eps}, out, result,
                  {threads});
  });
}

void py_weighted_normalize(const py::array& x, const Sizes& sizes, const py::array& weights, int padding,
                           const py::object& mean, const py::object& var, const py::object& gamma,
                           const py::object& beta, double eps, py::array y, int threads) {
  const Problem problem = problem_of(sizes);
  const ChannelValues m = channel_values(mean, "mean"), v = channel_values(var, "var");
  const ChannelValues g = channel_values(gamma, "gamma"), b = channel_values(beta, "beta");
  with_dtype_of(x, [&]<class T>(T) {
    const auto in = tensor<T>(x, "x");
    const auto w = weights_of<T>(weights, padding);
    const auto out = output<T>(y, "out");
    const ReleaseForWork gil(x.size());
    normalize<T>(in, Call<T>{.problem = problem, .counted = w, .gamma = g, .beta = b, .eps = eps}, m, v, out,
                 {threads});
  });
}

py::array py_weighted_grad_sums(const py::array& dy, const py::array& x, const Sizes& sizes, const py::array& weights,
                                int padding, const py::array& moments_table, int threads) {
  const Problem problem = problem_of(sizes);
  const auto stats = table<Moments>(moments_table, "moments");
  auto out = new_table<GradSums>(problem.channels);
  with_dtype_of(x, [&]<class T>(T) {
    const auto g = tensor<T>(dy, "dy");
    const auto in = tensor<T>(x, "x");
    const auto w = weights_of<T>(weights, padding);
    const auto result = rows<GradSums>(out);
    const ReleaseForWork gil(x.size());
    grad_sums<T>(g, in, Call<T>{.problem = problem, .counted = w}, stats, result, {threads});
  });
  return out;
}

void py_weighted_grad_input(const py::array& dy, const py::array& x, const Sizes& sizes, const py::array& weights,
                            int padding, const py::array& moments_table, const py::array& sums_table,
                            const py::object& gamma, double eps, py::array dx, int threads) {
  const Problem problem = problem_of(sizes);
  const auto stats = table<Moments>(moments_table, "moments");
  const auto sums = table<GradSums>(sums_table, "sums");
  const ChannelValues scale = channel_values(gamma, "gamma");
  with_dtype_of(x, [&]<class T>(T) {
    const auto g = tensor<T>(dy, "dy");
    const auto in = tensor<T>(x, "x");
    const auto w = weights_of<T>(weights, padding);
    const auto out = output<T>(dx, "out");
    const ReleaseForWork gil(x.size());
    grad_input<T>(g, in, Call<T>{.problem = problem, .counted = w, .gamma = scale, .eps = eps}, stats, sums, out, {},
                  {threads});
  });
}

void py_weighted_batch_norm_backward(const py::array& dy, const py::array& x, const Sizes& sizes,
                                     const py::array& weights, int padding, const py::array& moments_table,
                                     const py::object& gamma, double eps, std::optional<py::array> dx,
                                     std::optional<py::array> dgamma, std::optional<py::array> dbeta, int threads) {
  const Problem problem = problem_of(sizes);
  const auto stats = table<Moments>(moments_table, "moments");
  const ChannelValues scale = channel_values(gamma, "gamma");
  const GradientInto to_gamma(dgamma, "dgamma"), to_beta(dbeta, "dbeta");
  with_dtype_of(x, [&]<class T>(T) {
    const auto g = tensor<T>(dy, "dy");
    const auto in = tensor<T>(x, "x");
    const auto w = weights_of<T>(weights, padding);
    const auto out = dx ? output<T>(*dx, "out") : std::span<T>{};
    const ReleaseForWork gil(x.size());
    batch_norm_backward<T>(g, in, Call<T>{.problem = problem, .counted = w, .gamma = scale, .eps = eps}, stats,
                           Gradients<T>{.dx = out, .dgamma = to_gamma.output(), .dbeta = to_beta.output()}, {threads});
  });
  to_gamma.deliver();
  to_beta.deliver();
}

void py_weighted_normalize_backward(const py::array& dy, const py::array& x, const Sizes& sizes,
                                    const py::array& weights, int padding, const py::object& mean,
                                    const py::object& var, const py::object& gamma, double eps,
                                    std::optional<py::array> dx, std::optional<py::array> dgamma,
                                    std::optional<py::array> dbeta, int threads) {
  const Problem problem = problem_of(sizes);
  const ChannelValues m = channel_values(mean, "mean"), v = channel_values(var, "var");
  const ChannelValues scale = channel_values(gamma, "gamma");
  const GradientInto to_gamma(dgamma, "dgamma"), to_beta(dbeta, "dbeta");
  with_dtype_of(x, [&]<class T>(T) {
    const auto g = tensor<T>(dy, "dy");
    const auto in = tensor<T>(x, "x");
    const auto w = weights_of<T>(weights, padding);
    const auto out = dx ? output<T>(*dx, "out") : std::span<T>{};
    const ReleaseForWork gil(x.size());
    normalize_backward<T>(g, in, Call<T>{.problem = problem, .counted = w, .gamma = scale, .eps = eps}, m, v,
                          Gradients<T>{.dx = out, .dgamma = to_gamma.output(), .dbeta = to_beta.output()}, {threads});
  });
  to_gamma.deliver();
  to_beta.deliver();
}

std::span<const std::int64_t> offsets_of(const py::array& offsets) {
  if (!py::dtype::of<std::int64_t>().is(offsets.dtype()) || (offsets.flags() & py::array::c_style) == 0 ||
      offsets.ndim() != 1) {
    throw py::type_error("offsets must be a contiguous int64 array of 1 dimension");
  }
  return {static_cast<const std::int64_t*>(offsets.data()), static_cast<std::size_t>(offsets.size())};
}
std::int64_t entries(std::span<const std::int64_t> offsets, const Problem& problem) {
  return (static_cast<std::int64_t>(offsets.size()) - 1) * problem.channels;
}

py::array py_segment_moments(const py::array& x, const Sizes& sizes, const py::array& offsets, int threads) {
  const Problem problem = problem_of(sizes);
  const auto bounds = offsets_of(offsets);
  auto out = new_table<Moments>(entries(bounds, problem));
  with_dtype_of(x, [&]<class T>(T) {
    const auto in = tensor<T>(x, "x");
    const auto result = rows<Moments>(out);
    const ReleaseForWork gil(x.size());
    moments<T>(in, Call<T>{.problem = problem, .groups = {bounds}}, result, {threads});
  });
  return out;
}

void py_segment_batch_norm(const py::array& x, const Sizes& sizes, const py::array& offsets, const py::object& gamma,
                           const py::object& beta, double eps, py::array y, py::array saved, int threads) {
  const Problem problem = problem_of(sizes);
  const auto bounds = offsets_of(offsets);
  const ChannelValues g = channel_values(gamma, "gamma"), b = channel_values(beta, "beta");
  with_dtype_of(x, [&]<class T>(T) {
    const auto in = tensor<T>(x, "x");
    const auto out = output<T>(y, "out");
    const auto result = rows<Moments>(saved, "moments");
    const ReleaseForWork gil(x.size());
    batch_norm<T>(in, Call<T>{.problem = problem, .groups = {bounds}, .gamma = g, .beta = b, .eps = eps}, out, result,
                  {threads});
  });
}

void py_segment_batch_norm_backward(const py::array& dy, const py::array& x, const Sizes& sizes,
                                    const py::array& offsets, const py::array& moments_table, const py::object& gamma,
                                    double eps, std::optional<py::array> dx, std::optional<py::array> dgamma,
                                    std::optional<py::array> dbeta, int threads) {
  const Problem problem = problem_of(sizes);
  const auto bounds = offsets_of(offsets);
  const auto stats = table<Moments>(moments_table, "moments");
  const ChannelValues scale = channel_values(gamma, "gamma");
  const GradientInto to_gamma(dgamma, "dgamma"), to_beta(dbeta, "dbeta");
  with_dtype_of(x, [&]<class T>(T) {
    const auto g = tensor<T>(dy, "dy");
    const auto in = tensor<T>(x, "x");
    const auto out = dx ? output<T>(*dx, "out") : std::span<T>{};
    const ReleaseForWork gil(x.size());
    batch_norm_backward<T>(g, in, Call<T>{.problem = problem, .groups = {bounds}, .gamma = scale, .eps = eps}, stats,
                           Gradients<T>{.dx = out, .dgamma = to_gamma.output(), .dbeta = to_beta.output()}, {threads});
  });
  to_gamma.deliver();
  to_beta.deliver();
}

}  // namespace

void add_weighted_calls(py::module_& m) {
  using py::arg;
  m.def("weighted_moments", &py_weighted_moments, arg("x"), arg("sizes"), arg("weights"), arg("threads"),
        "moments with a weight per position.");
  m.def("weighted_batch_norm", &py_weighted_batch_norm, arg("x"), arg("sizes"), arg("weights"), arg("padding"),
        arg("gamma"), arg("beta"), arg("eps"), arg("out"), arg("moments"), arg("threads"),
        "batch_norm with a weight per position.");
  m.def("weighted_normalize", &py_weighted_normalize, arg("x"), arg("sizes"), arg("weights"), arg("padding"),
        arg("mean"), arg("var"), arg("gamma"), arg("beta"), arg("eps"), arg("out"), arg("threads"),
        "normalize where there is a weight.");
  m.def("weighted_grad_sums", &py_weighted_grad_sums, arg("dy"), arg("x"), arg("sizes"), arg("weights"), arg("padding"),
        arg("moments"), arg("threads"), "grad_sums where there is a weight.");
  m.def("weighted_grad_input", &py_weighted_grad_input, arg("dy"), arg("x"), arg("sizes"), arg("weights"),
        arg("padding"), arg("moments"), arg("sums"), arg("gamma"), arg("eps"), arg("out"), arg("threads"),
        "grad_input with a weight per position.");
  m.def("weighted_batch_norm_backward", &py_weighted_batch_norm_backward, arg("dy"), arg("x"), arg("sizes"),
        arg("weights"), arg("padding"), arg("moments"), arg("gamma"), arg("eps"), arg("out"), arg("dgamma"),
        arg("dbeta"), arg("threads"), "Gradients of weighted_batch_norm.");
  m.def("weighted_normalize_backward", &py_weighted_normalize_backward, arg("dy"), arg("x"), arg("sizes"),
        arg("weights"), arg("padding"), arg("mean"), arg("var"), arg("gamma"), arg("eps"), arg("out"), arg("dgamma"),
        arg("dbeta"), arg("threads"), "Gradients of weighted_normalize.");
  m.def("segment_moments", &py_segment_moments, arg("x"), arg("sizes"), arg("offsets"), arg("threads"),
        "moments of each segment.");
  m.def("segment_batch_norm", &py_segment_batch_norm, arg("x"), arg("sizes"), arg("offsets"), arg("gamma"), arg("beta"),
        arg("eps"), arg("out"), arg("moments"), arg("threads"), "batch_norm of each segment.");
  m.def("segment_batch_norm_backward", &py_segment_batch_norm_backward, arg("dy"), arg("x"), arg("sizes"),
        arg("offsets"), arg("moments"), arg("gamma"), arg("eps"), arg("out"), arg("dgamma"), arg("dbeta"),
        arg("threads"), "Gradients of segment_batch_norm.");
}

}  // namespace batchnorm::bindings
