// batchnorm._core: the C++ API on NumPy arrays. No logic: views in, outputs made, GIL released, core called.
//
// Tensors are dense arrays together with their Problem as three sizes (outer, channels, inner) in memory order; how an
// axis and strides become that is the Python layer's affair. Moments are float64 tables (channels, 5): count, mean,
// mean_lo, m2, m2_lo. GradSums are float64 tables (channels, 4): sum_dy, sum_dy_lo, sum_dy_xmu, sum_dy_xmu_lo.
#include <pybind11/stl.h>

#include <tuple>

#include "batchnorm/batchnorm.hpp"
#include "calls.hpp"

namespace batchnorm::bindings {

void add_ordinary_calls(py::module_& m);  // ordinary.cpp
void add_passes(py::module_& m);          // passes.cpp
void add_observe(py::module_& m);         // observe.cpp

namespace {

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

  m.def("merge", &py_merge, py::arg("a"), py::arg("b"), "Moments of the union, channel by channel.");
  m.def("variance", &py_variance, py::arg("moments"), py::arg("ddof"), "m2/(count - ddof).");
  m.def("rstd", &py_rstd, py::arg("moments"), py::arg("eps"), "1/sqrt(var + eps), var biased.");
  m.def("first_nonfinite", &py_first_nonfinite, py::arg("moments"),
        "The first channel whose mean or m2 is not finite; -1: none.");
  m.def("update_running", &py_update_running, py::arg("mean"), py::arg("var"), py::arg("moments"),
        py::arg("update_rate"), py::arg("ddof"), "The running statistics after one batch, as new arrays.");

  add_ordinary_calls(m);
  add_passes(m);
  add_observe(m);

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
