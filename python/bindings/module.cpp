// batchnorm._core: the C++ API on NumPy arrays. No logic: views in, outputs made, GIL released, core called.
//
// Tensors are dense arrays together with their Problem as three sizes (outer, channels, inner) in memory order; how an
// axis and strides become that is the Python layer's affair. Moments are float64 tables (channels, 5): count, mean,
// mean_lo, m2, m2_lo. GradSums are float64 tables (channels, 4): sum_dy, sum_dy_lo, sum_dy_xmu, sum_dy_xmu_lo.
#include <pybind11/stl.h>

#include <optional>
#include <tuple>

#include "batchnorm/batchnorm.hpp"
#include "calls.hpp"

namespace batchnorm::bindings {

void add_ordinary_calls(py::module_& m);  // ordinary.cpp
void add_passes(py::module_& m);          // passes.cpp
void add_weighted_calls(py::module_& m);  // weighted.cpp
void add_relu_calls(py::module_& m);      // relu.cpp

namespace {

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

void py_batch_norm(const py::array& x, const Sizes& sizes, const py::object& gamma, const py::object& beta, double eps,
                   py::array y, py::array saved, int threads) {
  const Problem problem = problem_of(sizes);
  const ChannelValues g = channel_values(gamma, "gamma"), b = channel_values(beta, "beta");
  with_dtype_of(x, [&]<class T>(T) {
    const auto in = tensor<T>(x, "x");
    const auto out = output<T>(y, "out");
    const auto result = rows<Moments>(saved, "moments");
    const ReleaseForWork gil(x.size());
    batch_norm<T>(in, problem, g, b, eps, out, result, {threads});
  });
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

void py_batch_norm_backward(const py::array& dy, const py::array& x, const Sizes& sizes, const py::array& moments_table,
                            const py::object& gamma, double eps, std::optional<py::array> dx,
                            std::optional<py::array> dgamma, std::optional<py::array> dbeta, int threads) {
  const Problem problem = problem_of(sizes);
  const auto stats = table<Moments>(moments_table, "moments");
  const ChannelValues scale = channel_values(gamma, "gamma");
  const GradientInto to_gamma(dgamma, "dgamma"), to_beta(dbeta, "dbeta");
  with_dtype_of(x, [&]<class T>(T) {
    const auto g = tensor<T>(dy, "dy");
    const auto in = tensor<T>(x, "x");
    const auto out = dx ? output<T>(*dx, "out") : std::span<T>{};
    const ReleaseForWork gil(x.size());
    batch_norm_backward<T>(g, in, problem, stats, scale, eps, out, to_gamma.output(), to_beta.output(), {threads});
  });
  to_gamma.deliver();
  to_beta.deliver();
}

void py_normalize_backward(const py::array& dy, const py::array& x, const Sizes& sizes, const py::object& mean,
                           const py::object& var, const py::object& gamma, double eps, std::optional<py::array> dx,
                           std::optional<py::array> dgamma, std::optional<py::array> dbeta, int threads) {
  const Problem problem = problem_of(sizes);
  const ChannelValues m = channel_values(mean, "mean"), v = channel_values(var, "var");
  const ChannelValues scale = channel_values(gamma, "gamma");
  const GradientInto to_gamma(dgamma, "dgamma"), to_beta(dbeta, "dbeta");
  with_dtype_of(x, [&]<class T>(T) {
    const auto g = tensor<T>(dy, "dy");
    const auto in = tensor<T>(x, "x");
    const auto out = dx ? output<T>(*dx, "out") : std::span<T>{};
    const ReleaseForWork gil(x.size());
    normalize_backward<T>(g, in, problem, m, v, scale, eps, out, to_gamma.output(), to_beta.output(), {threads});
  });
  to_gamma.deliver();
  to_beta.deliver();
}

void py_batch_norm_jvp(const py::array& x_dot, const py::array& x, const Sizes& sizes, const py::array& moments_table,
                       const py::object& gamma, const py::object& gamma_dot, const py::object& beta_dot, double eps,
                       py::array y_dot, int threads) {
  const Problem problem = problem_of(sizes);
  const auto stats = table<Moments>(moments_table, "moments");
  const ChannelValues scale = channel_values(gamma, "gamma");
  const ChannelValues g = channel_values(gamma_dot, "gamma_dot"), b = channel_values(beta_dot, "beta_dot");
  with_dtype_of(x, [&]<class T>(T) {
    const auto tangent = tensor<T>(x_dot, "x_dot");
    const auto in = tensor<T>(x, "x");
    const auto out = output<T>(y_dot, "out");
    const ReleaseForWork gil(x.size());
    batch_norm_jvp<T>(tangent, in, Call<T>{.problem = problem, .gamma = scale, .eps = eps}, stats, g, b, out,
                      {threads});
  });
}

void py_normalize_jvp(const py::array& x_dot, const py::array& x, const Sizes& sizes, const py::object& mean,
                      const py::object& var, const py::object& gamma, const py::object& mean_dot,
                      const py::object& var_dot, const py::object& gamma_dot, const py::object& beta_dot, double eps,
                      py::array y_dot, int threads) {
  const Problem problem = problem_of(sizes);
  const ChannelValues m = channel_values(mean, "mean"), v = channel_values(var, "var");
  const ChannelValues md = channel_values(mean_dot, "mean_dot"), vd = channel_values(var_dot, "var_dot");
  const ChannelValues scale = channel_values(gamma, "gamma");
  const ChannelValues g = channel_values(gamma_dot, "gamma_dot"), b = channel_values(beta_dot, "beta_dot");
  with_dtype_of(x, [&]<class T>(T) {
    const auto tangent = tensor<T>(x_dot, "x_dot");
    const auto in = tensor<T>(x, "x");
    const auto out = output<T>(y_dot, "out");
    const ReleaseForWork gil(x.size());
    normalize_jvp<T>(tangent, in, Call<T>{.problem = problem, .gamma = scale, .eps = eps}, m, v, md, vd, g, b, out,
                     {threads});
  });
}

// f(v, dy, x, ddy, dx, dgamma), the outputs empty where None or not needed.
template <class F>
void double_backward(const py::array& v, const py::array& dy, const py::array& x, std::optional<py::array> ddy,
                     std::optional<py::array> dx, std::optional<py::array> dgamma, const F& f) {
  const GradientInto to_gamma(dgamma, "dgamma");
  with_dtype_of(x, [&]<class T>(T) {
    const auto of_dx = tensor<T>(v, "v_dx");
    const auto g = tensor<T>(dy, "dy");
    const auto in = tensor<T>(x, "x");
    const auto to_dy = ddy ? output<T>(*ddy, "out") : std::span<T>{};
    const auto to_x = dx ? output<T>(*dx, "out") : std::span<T>{};
    const ReleaseForWork gil(x.size());
    f(of_dx, g, in, to_dy, to_x, to_gamma.output());
  });
  to_gamma.deliver();
}

void py_batch_norm_double_backward(const py::array& v, const py::array& dy, const py::array& x, const Sizes& sizes,
                                   const py::array& moments_table, const py::object& gamma, const py::object& v_dgamma,
                                   const py::object& v_dbeta, double eps, std::optional<py::array> ddy,
                                   std::optional<py::array> dx, std::optional<py::array> dgamma, int threads) {
  const Problem problem = problem_of(sizes);
  const auto stats = table<Moments>(moments_table, "moments");
  const ChannelValues scale = channel_values(gamma, "gamma");
  const ChannelValues wg = channel_values(v_dgamma, "v_dgamma"), wb = channel_values(v_dbeta, "v_dbeta");
  double_backward(v, dy, x, std::move(ddy), std::move(dx), std::move(dgamma),
                  [&]<class T>(std::span<const T> of_dx, std::span<const T> g, std::span<const T> in,
                               std::span<T> to_dy, std::span<T> to_x, ChannelOutput to_gamma) {
                    const Call<T> call{.problem = problem, .gamma = scale, .eps = eps};
                    batch_norm_double_backward<T>(of_dx, g, in, call, stats, wg, wb, to_dy, to_x, to_gamma, {threads});
                  });
}

void py_normalize_double_backward(const py::array& v, const py::array& dy, const py::array& x, const Sizes& sizes,
                                  const py::object& mean, const py::object& var, const py::object& gamma,
                                  const py::object& v_dgamma, const py::object& v_dbeta, double eps,
                                  std::optional<py::array> ddy, std::optional<py::array> dx,
                                  std::optional<py::array> dgamma, int threads) {
  const Problem problem = problem_of(sizes);
  const ChannelValues m = channel_values(mean, "mean"), s = channel_values(var, "var");
  const ChannelValues scale = channel_values(gamma, "gamma");
  const ChannelValues wg = channel_values(v_dgamma, "v_dgamma"), wb = channel_values(v_dbeta, "v_dbeta");
  double_backward(v, dy, x, std::move(ddy), std::move(dx), std::move(dgamma),
                  [&]<class T>(std::span<const T> of_dx, std::span<const T> g, std::span<const T> in,
                               std::span<T> to_dy, std::span<T> to_x, ChannelOutput to_gamma) {
                    const Call<T> call{.problem = problem, .gamma = scale, .eps = eps};
                    normalize_double_backward<T>(of_dx, g, in, call, m, s, wg, wb, to_dy, to_x, to_gamma, {threads});
                  });
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

std::int64_t py_first_nonfinite(const py::array& moments_table) {
  return first_nonfinite(table<Moments>(moments_table, "moments"));
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

// Whether the module is being imported in one, which is an ImportError then. pybind11 and NumPy keep things of the
// process that belong to the main interpreter, whose GIL they would wait for.
bool is_subinterpreter() {
  if (PyInterpreterState_Get() == PyInterpreterState_Main()) return false;
  PyErr_SetString(PyExc_ImportError,
                  "batchnorm must be imported in the main interpreter of a process, got a subinterpreter (of mod_wsgi: "
                  "see WSGIApplicationGroup %{GLOBAL})");
  return true;
}

}  // namespace
}  // namespace batchnorm::bindings

// Every function is safe to call from several threads at once: the core keeps no state but atomic settings.
PYBIND11_MODULE(_core_of_main, m, pybind11::mod_gil_not_used()) {
  using namespace batchnorm::bindings;
  if (is_subinterpreter()) throw pybind11::error_already_set();
  pybind11::register_local_exception_translator([](std::exception_ptr thrown) {
    try {
      if (thrown) std::rethrow_exception(thrown);
    } catch (const PythonError&) {  // which is set
    }
  });
  m.doc() = "The C++ core of batchnorm on dense NumPy arrays. Private: use the functions of the package.";

  m.def("moments", &py_moments, py::arg("x"), py::arg("sizes"), py::arg("threads"), "Moments of each channel.");
  m.def("batch_norm", &py_batch_norm, py::arg("x"), py::arg("sizes"), py::arg("gamma"), py::arg("beta"), py::arg("eps"),
        py::arg("out"), py::arg("moments"), py::arg("threads"), "Training forward into out and moments.");
  m.def("new_moments", &new_table<batchnorm::Moments>, py::arg("channels"), "Room for the moments of a call.");
  m.def("normalize", &py_normalize, py::arg("x"), py::arg("sizes"), py::arg("mean"), py::arg("var"), py::arg("gamma"),
        py::arg("beta"), py::arg("eps"), py::arg("out"), py::arg("threads"), "Inference forward into out.");
  m.def("grad_sums", &py_grad_sums, py::arg("dy"), py::arg("x"), py::arg("sizes"), py::arg("moments"),
        py::arg("threads"), "First half of the backward pass.");
  m.def("grad_input", &py_grad_input, py::arg("dy"), py::arg("x"), py::arg("sizes"), py::arg("moments"),
        py::arg("sums"), py::arg("gamma"), py::arg("eps"), py::arg("out"), py::arg("threads"),
        "Second half of the backward pass, into out.");
  m.def("batch_norm_backward", &py_batch_norm_backward, py::arg("dy"), py::arg("x"), py::arg("sizes"),
        py::arg("moments"), py::arg("gamma"), py::arg("eps"), py::arg("out"), py::arg("dgamma"), py::arg("dbeta"),
        py::arg("threads"), "Gradients of batch_norm.");
  m.def("normalize_backward", &py_normalize_backward, py::arg("dy"), py::arg("x"), py::arg("sizes"), py::arg("mean"),
        py::arg("var"), py::arg("gamma"), py::arg("eps"), py::arg("out"), py::arg("dgamma"), py::arg("dbeta"),
        py::arg("threads"), "Gradients of normalize.");

  m.def("batch_norm_jvp", &py_batch_norm_jvp, py::arg("x_dot"), py::arg("x"), py::arg("sizes"), py::arg("moments"),
        py::arg("gamma"), py::arg("gamma_dot"), py::arg("beta_dot"), py::arg("eps"), py::arg("out"), py::arg("threads"),
        "Derivative of batch_norm along tangents, into out.");
  m.def("normalize_jvp", &py_normalize_jvp, py::arg("x_dot"), py::arg("x"), py::arg("sizes"), py::arg("mean"),
        py::arg("var"), py::arg("gamma"), py::arg("mean_dot"), py::arg("var_dot"), py::arg("gamma_dot"),
        py::arg("beta_dot"), py::arg("eps"), py::arg("out"), py::arg("threads"),
        "Derivative of normalize along tangents, into out.");
  m.def("batch_norm_double_backward", &py_batch_norm_double_backward, py::arg("v_dx"), py::arg("dy"), py::arg("x"),
        py::arg("sizes"), py::arg("moments"), py::arg("gamma"), py::arg("v_dgamma"), py::arg("v_dbeta"), py::arg("eps"),
        py::arg("ddy"), py::arg("dx"), py::arg("dgamma"), py::arg("threads"), "Gradients of batch_norm_backward.");
  m.def("normalize_double_backward", &py_normalize_double_backward, py::arg("v_dx"), py::arg("dy"), py::arg("x"),
        py::arg("sizes"), py::arg("mean"), py::arg("var"), py::arg("gamma"), py::arg("v_dgamma"), py::arg("v_dbeta"),
        py::arg("eps"), py::arg("ddy"), py::arg("dx"), py::arg("dgamma"), py::arg("threads"),
        "Gradients of normalize_backward.");

  m.def("merge", &py_merge, py::arg("a"), py::arg("b"), "Moments of the union, channel by channel.");
  m.def("variance", &py_variance, py::arg("moments"), py::arg("ddof"), "m2/(count - ddof).");
  m.def("rstd", &py_rstd, py::arg("moments"), py::arg("eps"), "1/sqrt(var + eps), var biased.");
  m.def("first_nonfinite", &py_first_nonfinite, py::arg("moments"),
        "The first channel whose mean or m2 is not finite; -1: none.");
  m.def("update_running", &py_update_running, py::arg("mean"), py::arg("var"), py::arg("moments"),
        py::arg("update_rate"), py::arg("ddof"), "The running statistics after one batch, as new arrays.");

  add_ordinary_calls(m);
  add_passes(m);
  add_weighted_calls(m);
  add_relu_calls(m);

  m.def("built_isas", &batchnorm::built_isas, "Instruction sets compiled in, best first.");
  m.def("available_isas", &batchnorm::available_isas, "Those that run on this machine, best first.");
  m.def("active_isa", &batchnorm::active_isa, "The one in use.");
  m.def("set_num_threads", &batchnorm::set_num_threads, py::arg("threads"), "Limit for the process; 0 removes it.");
  m.def("threads_worked", &batchnorm::threads_worked,
        "The most threads that a call of this thread was shared among since this was last asked; 1: none was shared.");
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

// What Python calls to import batchnorm._core.
extern "C" PYBIND11_EXPORT PyObject* PyInit__core() {
  return batchnorm::bindings::is_subinterpreter() ? nullptr : PyInit__core_of_main();
}
