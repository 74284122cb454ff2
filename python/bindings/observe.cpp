// One observation of a stream: what is known after it, and y, as new arrays.
#include "arrays.hpp"
#include "batchnorm/batchnorm.hpp"
#include "method.hpp"
#include "ordinary.hpp"

namespace batchnorm::bindings {
namespace {

// ((moments, importance_dof), y); None where an array is not ordinary, the core refuses what it says, or what is known
// would leave float64. `how`: keep, eps, clip, center, scale, missing, learn.
PyObject* try_observe(PyObject* const (&arguments)[3]) {
  const auto& [known, x, how] = arguments;
  Arguments a;
  const Array in = a.tensor(x);
  const std::int64_t channels = in.size();
  a.need(a.ordinary() && in.shape[in.dimensions - 1] == channels);
  if (!a.need(PyTuple_CheckExact(known) && PyTuple_GET_SIZE(known) == 2 && PyTuple_CheckExact(how) &&
              PyTuple_GET_SIZE(how) == 7)) {
    Py_RETURN_NONE;
  }
  const auto before = a.table<Moments>(PyTuple_GET_ITEM(known, 0), channels);
  const Array dof = a.channel_values_or_none(PyTuple_GET_ITEM(known, 1), channels);
  PyObject* const missing = PyTuple_GET_ITEM(how, 5);
  a.need(PyFloat_CheckExact(missing));
  const Observing observing{.keep = a.number(PyTuple_GET_ITEM(how, 0), 0, 1),
                            .eps = a.eps(PyTuple_GET_ITEM(how, 1)),
                            .clip = a.number(PyTuple_GET_ITEM(how, 2), 0, std::numeric_limits<double>::infinity()),
                            .center = PyTuple_GET_ITEM(how, 3) == Py_True,
                            .scale = PyTuple_GET_ITEM(how, 4) == Py_True,
                            .missing = a.ordinary() ? PyFloat_AS_DOUBLE(missing) : 0,
                            .learn = PyTuple_GET_ITEM(how, 6) == Py_True};
  if (!a.ordinary()) Py_RETURN_NONE;

  py::array moments = new_table<Moments>(channels);
  const auto after = rows<Moments>(moments);
  std::ranges::copy(before, after.begin());
  py::object new_dof = py::none();
  std::span<double> to_dof;
  if (dof.present()) {
    const py::ssize_t shape = channels;
    new_dof = new_array(kFloat64, 1, &shape);
    to_dof = {static_cast<double*>(static_cast<py::array&>(new_dof).mutable_data()),
              static_cast<std::size_t>(channels)};
    std::ranges::copy(dof.values<const double>(), to_dof.begin());
  }
  py::array y = new_array(in.is_double ? kFloat64 : kFloat32, in.dimensions, in.shape);
  try {
    const auto work = [&]<class T>(T) {
      observe<T>(in.values<const T>(), after, to_dof, {static_cast<T*>(y.mutable_data()), std::size_t(channels)},
                 observing);
    };
    in.is_double ? work(double{}) : work(float{});
  } catch (const std::invalid_argument&) {
    Py_RETURN_NONE;
  }
  if (first_nonfinite(after) >= 0) Py_RETURN_NONE;
  const py::object both = py::reinterpret_steal<py::object>(PyTuple_Pack(2, moments.ptr(), new_dof.ptr()));
  return both ? PyTuple_Pack(2, both.ptr(), y.ptr()) : nullptr;
}

py::array py_standardizing(const py::array& moments, double eps, bool center, bool scale) {
  const auto known = table<Moments>(moments, "moments");
  auto line = new_table<Moments>(static_cast<std::int64_t>(known.size()));
  standardizing(known, {.eps = eps, .center = center, .scale = scale}, rows<Moments>(line));
  return line;
}

}  // namespace

void add_observe(py::module_& m) {
  static PyMethodDef methods[] = {
      method<3, try_observe>(
          "try_observe",
          "try_observe($module, known, x, how, /)\n--\n\n"
          "((moments, importance_dof), y) after one observation more, if all arguments are ordinary."),
      {nullptr, nullptr, 0, nullptr},
  };
  if (PyModule_AddFunctions(m.ptr(), methods) != 0) throw py::error_already_set();
  m.def("standardizing", &py_standardizing, py::arg("moments"), py::arg("eps"), py::arg("center"), py::arg("scale"),
        "Moments by which x is brought to a mean of 0 and a variance of 1, with an eps of 0.");
}

}  // namespace batchnorm::bindings
