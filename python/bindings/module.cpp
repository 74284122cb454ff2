// batchnorm._core: the C++ API on NumPy arrays. No logic: views in, outputs made, GIL released, core called.
//
// Tensors are dense arrays together with their Problem as three sizes (outer, channels, inner) in memory order; how an
// axis and strides become that is the Python layer's affair. Moments are float64 tables (channels, 5): count, mean,
// mean_lo, m2, m2_lo. GradSums are float64 tables (channels, 4): sum_dy, sum_dy_lo, sum_dy_xmu, sum_dy_xmu_lo.
#include <pybind11/stl.h>

#include <optional>
#include <tuple>

#include "arrays.hpp"
#include "batchnorm/batchnorm.hpp"
#include "release_for_work.hpp"

namespace batchnorm::bindings {

void add_ordinary_calls(py::module_& m);  // ordinary.cpp

namespace {

using Sizes = std::tuple<std::int64_t, std::int64_t, std::int64_t>;

Problem problem_of(const Sizes& sizes) { return {std::get<0>(sizes), std::get<1>(sizes), std::get<2>(sizes)}; }

// f(T{}) for the dtype of x.
template <class F>
auto with_dtype_of(const py::array& x, F&& f) {
  check_memory(x, "x", Access::read);
  if (is_float32(x)) return f(float{});
  if (is_float64(x)) return f(double{});
  return is_float16(x) ? f(Float16{}) : f(BFloat16{});
}

py::array py_moments(const py::array& x, const Sizes& sizes, int threads) {
  const Problem problem = problem_of(sizes);
  auto out = new_table<Moments>(problem.channels);
  with_dtype_of(x, [&]<class T>(T) {
    const auto values = tensor<T>(x, "x");
    const auto result = rows<Moments>(out);
    const ReleaseForWork gil(x.size());
    moments<T>(values, problem, result, {threads});
  });
  return out;
}

py::array py_batch_norm(const py::array& x, const Sizes& sizes, const py::object& gamma, const py::object& beta,
                        double eps, py::array y, int threads) {
  const Problem problem = problem_of(sizes);
  const ChannelValues g = channel_values(gamma, "gamma"), b = channel_values(beta, "beta");
  auto saved = new_table<Moments>(problem.channels);
  with_dtype_of(x, [&]<class T>(T) {
    const auto in = tensor<T>(x, "x");
    const auto out = output<T>(y, "out");
    const auto result = rows<Moments>(saved);
    const ReleaseForWork gil(x.size());
    batch_norm<T>(in, problem, g, b, eps, out, result, {threads});
  });
  return saved;
}

void py_normalize(const py::array& x, const Sizes& sizes, const py::object& mean, const py::object& var,
                  const py::object& gamma, const py::object& beta, double eps, py::array y, int threads) {
  const Problem problem = problem_of(sizes);
  const ChannelValues m = channel_values(mean, "mean"), v = channel_values(var, "var");
  const ChannelValues g = channel_values(gamma, "gamma"), b = channel_values(beta, "beta");
  with_dtype_of(x, [&]<class T>(T) {
    const auto in = tensor<T>(x, "x");
    const auto out = output<T>(y, "out");
    const ReleaseForWork gil(x.size());
    normalize<T>(in, problem, m, v, g, b, eps, out, {threads});
  });
}

py::array py_grad_sums(const py::array& dy, const py::array& x, const Sizes& sizes, const py::array& moments_table,
                       int threads) {
  const Problem problem = problem_of(sizes);
  const auto stats = table<Moments>(moments_table, "moments");
  auto out = new_table<GradSums>(problem.channels);
  with_dtype_of(x, [&]<class T>(T) {
    const auto g = tensor<T>(dy, "dy");
    const auto in = tensor<T>(x, "x");
    const auto result = rows<GradSums>(out);
    const ReleaseForWork gil(x.size());
    grad_sums<T>(g, in, problem, stats, result, {threads});
  });
  return out;
}

void py_grad_input(const py::array& dy, const py::array& x, const Sizes& sizes, const py::array& moments_table,
                   const py::array& sums_table, const py::object& gamma, double eps, py::array dx, int threads) {
  const Problem problem = problem_of(sizes);
  const auto stats = table<Moments>(moments_table, "moments");
  const auto sums = table<GradSums>(sums_table, "sums");
  const ChannelValues scale = channel_values(gamma, "gamma");
  with_dtype_of(x, [&]<class T>(T) {
    const auto g = tensor<T>(dy, "dy");
    const auto in = tensor<T>(x, "x");
    const auto out = output<T>(dx, "out");
    const ReleaseForWork gil(x.size());
    grad_input<T>(g, in, problem, stats, sums, scale, eps, out, {threads});
  });
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

ChannelGradients py_batch_norm_backward(const py::array& dy, const py::array& x, const Sizes& sizes,
                                        const py::array& moments_table, const py::object& gamma, double eps,
                                        std::optional<py::array> dx, bool need_gamma, bool need_beta, int threads) {
  const Problem problem = problem_of(sizes);
  const auto stats = table<Moments>(moments_table, "moments");
  const ChannelValues scale = channel_values(gamma, "gamma");
  const WantedGradient dgamma(need_gamma, problem.channels, gamma), dbeta(need_beta, problem.channels, gamma);
  with_dtype_of(x, [&]<class T>(T) {
    const auto g = tensor<T>(dy, "dy");
    const auto in = tensor<T>(x, "x");
    const auto out = dx ? output<T>(*dx, "out") : std::span<T>{};
    const ReleaseForWork gil(x.size());
    batch_norm_backward<T>(g, in, problem, stats, scale, eps, out, dgamma.output(), dbeta.output(), {threads});
  });
  return {dgamma.array(), dbeta.array()};
}

ChannelGradients py_normalize_backward(const py::array& dy, const py::array& x, const Sizes& sizes,
                                       const py::object& mean, const py::object& var, const py::object& gamma,
                                       double eps, std::optional<py::array> dx, bool need_gamma, bool need_beta,
                                       int threads) {
  const Problem problem = problem_of(sizes);
  const ChannelValues m = channel_values(mean, "mean"), v = channel_values(var, "var");
  const ChannelValues scale = channel_values(gamma, "gamma");
  const WantedGradient dgamma(need_gamma, problem.channels, gamma), dbeta(need_beta, problem.channels, gamma);
  with_dtype_of(x, [&]<class T>(T) {
    const auto g = tensor<T>(dy, "dy");
    const auto in = tensor<T>(x, "x");
    const auto out = dx ? output<T>(*dx, "out") : std::span<T>{};
    const ReleaseForWork gil(x.size());
    normalize_backward<T>(g, in, problem, m, v, scale, eps, out, dgamma.output(), dbeta.output(), {threads});
  });
  return {dgamma.array(), dbeta.array()};
}

py::array py_merge(const py::array& a, const py::array& b) {
  const auto left = table<Moments>(a, "a"), right = table<Moments>(b, "b");
  if (left.size() != right.size()) {
    throw py::value_error("moments must have the same channels to be merged, got " + std::to_string(left.size()) +
                          " and " + std::to_string(right.size()));
  }
  auto out = new_table<Moments>(static_cast<std::int64_t>(left.size()));
  const auto result = rows<Moments>(out);
  for (std::size_t c = 0; c < left.size(); ++c) result[c] = merge(left[c], right[c]);
  return out;
}

// f of the moments of each channel.
template <class F>
py::array_t<double> each_channel(const py::array& moments_table, F f) {
  const auto stats = table<Moments>(moments_table, "moments");
  py::array_t<double> out(static_cast<py::ssize_t>(stats.size()));
  const auto result = values(out);
  for (std::size_t c = 0; c < stats.size(); ++c) result[c] = f(stats[c]);
  return out;
}

py::array_t<double> py_variance(const py::array& moments_table, int ddof) {
  return each_channel(moments_table, [ddof](const Moments& m) { return variance(m, ddof); });
}

py::array_t<double> py_rstd(const py::array& moments_table, double eps) {
  return each_channel(moments_table, [eps](const Moments& m) { return rstd(m, eps); });
}

// A new array of the same float64 values.
py::array_t<double> copy_of(const py::array& a, const char* name) {
  check_contiguous(a, name);
  if (!is_float64(a)) throw py::type_error(std::string(name) + " must have dtype float64");
  return py::array_t<double>(a.size(), static_cast<const double*>(a.data()));
}

// New arrays: what is given is not changed.
std::tuple<py::array_t<double>, py::array_t<double>> py_update_running(const py::array& mean, const py::array& var,
                                                                       const py::array& moments_table,
                                                                       double update_rate, int ddof) {
  auto new_mean = copy_of(mean, "running_mean"), new_var = copy_of(var, "running_var");
  update_running(values(new_mean), values(new_var), table<Moments>(moments_table, "moments"), update_rate, ddof);
  return {new_mean, new_var};
}

py::dict py_build_info() {
  const BuildInfo info = build_info();
  py::dict d;
  d["version"] = info.version;
  d["compiler"] = info.compiler;
  d["flags"] = info.flags;
  d["build_type"] = info.build_type;
  d["openmp"] = info.openmp;
  d["assertions"] = info.assertions;
  return d;
}

}  // namespace
}  // namespace batchnorm::bindings

// Every function is safe to call from several threads at once: the core keeps no state but atomic settings.
PYBIND11_MODULE(_core, m, pybind11::mod_gil_not_used()) {
  using namespace batchnorm::bindings;
  m.doc() = "The C++ core of batchnorm on dense NumPy arrays. Private: use the functions of the package.";

  m.def("moments", &py_moments, py::arg("x"), py::arg("sizes"), py::arg("threads"), "Moments of each channel.");
  m.def("batch_norm", &py_batch_norm, py::arg("x"), py::arg("sizes"), py::arg("gamma"), py::arg("beta"), py::arg("eps"),
        py::arg("out"), py::arg("threads"), "Training forward into out; returns the moments.");
  m.def("normalize", &py_normalize, py::arg("x"), py::arg("sizes"), py::arg("mean"), py::arg("var"), py::arg("gamma"),
        py::arg("beta"), py::arg("eps"), py::arg("out"), py::arg("threads"), "Inference forward into out.");
  m.def("grad_sums", &py_grad_sums, py::arg("dy"), py::arg("x"), py::arg("sizes"), py::arg("moments"),
        py::arg("threads"), "First half of the backward pass.");
  m.def("grad_input", &py_grad_input, py::arg("dy"), py::arg("x"), py::arg("sizes"), py::arg("moments"),
        py::arg("sums"), py::arg("gamma"), py::arg("eps"), py::arg("out"), py::arg("threads"),
        "Second half of the backward pass, into out.");
  m.def("batch_norm_backward", &py_batch_norm_backward, py::arg("dy"), py::arg("x"), py::arg("sizes"),
        py::arg("moments"), py::arg("gamma"), py::arg("eps"), py::arg("out"), py::arg("need_gamma"),
        py::arg("need_beta"), py::arg("threads"), "Gradients of batch_norm; returns dgamma and dbeta.");
  m.def("normalize_backward", &py_normalize_backward, py::arg("dy"), py::arg("x"), py::arg("sizes"), py::arg("mean"),
        py::arg("var"), py::arg("gamma"), py::arg("eps"), py::arg("out"), py::arg("need_gamma"), py::arg("need_beta"),
        py::arg("threads"), "Gradients of normalize; returns dgamma and dbeta.");

  m.def("merge", &py_merge, py::arg("a"), py::arg("b"), "Moments of the union, channel by channel.");
  m.def("variance", &py_variance, py::arg("moments"), py::arg("ddof"), "m2/(count - ddof).");
  m.def("rstd", &py_rstd, py::arg("moments"), py::arg("eps"), "1/sqrt(var + eps), var biased.");
  m.def("update_running", &py_update_running, py::arg("mean"), py::arg("var"), py::arg("moments"),
        py::arg("update_rate"), py::arg("ddof"), "The running statistics after one batch, as new arrays.");

  add_ordinary_calls(m);

  m.def("built_isas", &batchnorm::built_isas, "Instruction sets compiled in, best first.");
  m.def("available_isas", &batchnorm::available_isas, "Those that run on this machine, best first.");
  m.def("active_isa", &batchnorm::active_isa, "The one in use.");
  m.def("set_num_threads", &batchnorm::set_num_threads, py::arg("threads"), "Limit for the process; 0 removes it.");
  m.def("get_num_threads", &batchnorm::get_num_threads, "Threads that a large call would use now.");
  m.def("build_info", &py_build_info, "Version, compiler, flags.");
  m.def(
      "explain",
      [](const Sizes& sizes, std::size_t item_size, int threads) {
        return batchnorm::explain(problem_of(sizes), item_size, {threads});
      },
      py::arg("sizes"), py::arg("item_size"), py::arg("threads"), "The plan of a training call, as text.");
  m.attr("__version__") = BATCHNORM_VERSION;
}
