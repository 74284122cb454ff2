// Arguments as they come from Python, read without converting any.
//
// Ordinary is what most calls pass: arrays of exactly numpy.ndarray with float32 or float64 values in native byte
// order, aligned, C-contiguous and not empty; an int, a float, a tuple of exactly that type; None. Whether anything
// else is a mistake is not judged here: the Python layer does that, and converts what is none.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <climits>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <span>
#include <vector>

#include "batchnorm/call.hpp"

namespace batchnorm::bindings {

namespace py = pybind11;

// An ordinary array, or none. Does not own it: the caller of the function does, until the function returns.
struct Array {
  PyObject* object = nullptr;
  char* data = nullptr;
  std::int64_t bytes = 0;
  bool is_double = false;
  int dimensions = 0;
  const py::ssize_t* shape = nullptr;

  [[nodiscard]] bool present() const { return object != nullptr; }
  [[nodiscard]] std::int64_t size() const { return bytes / (is_double ? 8 : 4); }
  template <class T>
  [[nodiscard]] std::span<T> values() const {
    return {reinterpret_cast<T*>(data), static_cast<std::size_t>(size())};
  }
  [[nodiscard]] ChannelValues channel_values() const {
    if (!present()) return {};
    return is_double ? ChannelValues(values<const double>()) : ChannelValues(values<const float>());
  }
  [[nodiscard]] bool overlaps(const Array& other) const {
    return data < other.data + other.bytes && other.data < data + bytes;
  }
  [[nodiscard]] bool has_type_and_shape_of(const Array& other) const {
    return is_double == other.is_double && dimensions == other.dimensions &&
           std::equal(shape, shape + dimensions, other.shape);
  }
};

// What follows and what counts, of the options of a call: all that is ordinary of them.
struct Options {
  Padding padding = Padding::normalize;
  const bool* mask = nullptr;  // one for each position
  Array weights;               // the same
  std::int64_t ghost_size = 0;
  Array residual;
  bool relu = false;

  [[nodiscard]] bool counts() const { return mask != nullptr || weights.present(); }
  [[nodiscard]] bool present() const { return counts() || ghost_size > 0 || residual.present() || relu; }
};

// Whether of some set of so many positions one alone counts: of a channel by itself that is an error.
template <class T>
bool has_lone_position(std::span<T> weights, std::int64_t positions_a_set) {
  for (std::size_t begin = 0; begin < weights.size(); begin += static_cast<std::size_t>(positions_a_set)) {
    const auto set = weights.subspan(begin, static_cast<std::size_t>(positions_a_set));
    if (set.size() - static_cast<std::size_t>(std::count(set.begin(), set.end(), T(0))) == 1) return true;
  }
  return false;
}

// What shares statistics, as Python tells: None: the batch, or ghosts; a number above 0: so many groups of channels of
// each sample; 0: each channel of each sample; -1, -2: all channels of each position, about their mean or about 0.
struct Shares {
  bool of_samples = false;
  Groups groups;  // but for its offsets

  [[nodiscard]] bool present() const { return of_samples || groups.each_position; }
  [[nodiscard]] std::int64_t entries(const Problem& problem, std::int64_t sets) const {
    return (groups.each_position ? problem.count() : sets) * (problem.channels / groups.width);
  }
};

struct Needs {
  bool x = false, gamma = false, beta = false, residual = false;
};

// The arguments of one call, read one by one. After the first that is not ordinary, what the others give means nothing.
class Arguments {
 public:
  [[nodiscard]] bool ordinary() const { return ordinary_; }
  bool need(bool condition) { return ordinary_ = ordinary_ && condition; }

  Array array(PyObject* o) {
    if (!need(Py_IS_TYPE(o, py::detail::npy_api::get().PyArray_Type_))) return {};
    const auto* fields = py::detail::array_proxy(o);
    const auto* type = py::detail::array_descriptor_proxy(fields->descr);
    const bool is_double = type->type_num == py::detail::npy_api::NPY_DOUBLE_;
    constexpr int kPlain = py::detail::npy_api::NPY_ARRAY_C_CONTIGUOUS_ | py::detail::npy_api::NPY_ARRAY_ALIGNED_;
    std::int64_t bytes = is_double ? 8 : 4;
    for (int d = 0; d < fields->nd; ++d) bytes *= fields->dimensions[d];
    if (!need((is_double || type->type_num == py::detail::npy_api::NPY_FLOAT_) && type->byteorder == '=' &&
              (fields->flags & kPlain) == kPlain && bytes > 0)) {
      return {};
    }
    return {o, fields->data, bytes, is_double, fields->nd, fields->dimensions};
  }

  Array tensor(PyObject* o) {
    const Array a = array(o);
    need(a.dimensions >= 1 && a.dimensions <= 8);
    return a;
  }

  Array tensor_like(const Array& x, PyObject* o) {
    const Array a = array(o);
    need(ordinary_ && a.has_type_and_shape_of(x));
    return a;
  }

  // An array to write to, or none: like the first of `inputs`, each of which it may be itself, and apart from `values`.
  Array out(PyObject* o, std::initializer_list<Array> inputs, std::initializer_list<Array> values) {
    if (o == Py_None) return {};
    const Array a = tensor_like(*inputs.begin(), o);
    if (!ordinary_) return {};
    need((py::detail::array_proxy(o)->flags & py::detail::npy_api::NPY_ARRAY_WRITEABLE_) != 0);
    for (const Array& input : inputs) need(a.data == input.data || !a.overlaps(input));
    for (const Array& each : values) need(!a.overlaps(each));
    return a;
  }

  Array channel_values(PyObject* o, std::int64_t channels) {
    const Array a = array(o);
    need(a.dimensions == 1 && a.size() == channels);
    return a;
  }
  Array channel_values_or_none(PyObject* o, std::int64_t channels) {
    return o == Py_None ? Array{} : channel_values(o, channels);
  }

  // A (channels, fields) table whose rows are the C++ struct `Row`.
  template <class Row>
  std::span<const Row> table(PyObject* o, std::int64_t channels) {
    constexpr auto kFields = static_cast<py::ssize_t>(sizeof(Row) / sizeof(double));
    const Array a = array(o);
    if (!need(a.is_double && a.dimensions == 2 && a.shape[0] == channels && a.shape[1] == kFields)) return {};
    return {reinterpret_cast<const Row*>(a.data), static_cast<std::size_t>(channels)};
  }

  int integer(PyObject* o, int least, int most) {
    if (!need(PyLong_CheckExact(o))) return 0;
    int beyond = 0;
    const long value = PyLong_AsLongAndOverflow(o, &beyond);
    need(beyond == 0 && value >= least && value <= most);
    return static_cast<int>(value);
  }

  int axis(PyObject* o, const Array& x) {
    const int value = integer(o, -x.dimensions, x.dimensions - 1);
    return value < 0 ? value + x.dimensions : value;
  }

  int threads(PyObject* o) { return o == Py_None ? 0 : integer(o, 1, INT_MAX); }

  double number(PyObject* o, double least, double most) {
    if (!need(PyFloat_CheckExact(o))) return 0;
    const double value = PyFloat_AS_DOUBLE(o);
    need(value >= least && value <= most);
    return value;
  }

  double eps(PyObject* o) { return number(o, 0, std::numeric_limits<double>::max()); }

  Needs needs(PyObject* o) {
    Needs named;
    if (!need(PyTuple_CheckExact(o))) return named;
    for (py::ssize_t i = 0; i < PyTuple_GET_SIZE(o); ++i) {
      PyObject* name = PyTuple_GET_ITEM(o, i);
      if (!need(PyUnicode_CheckExact(name))) return named;
      const auto is = [name](const char* text) { return PyUnicode_CompareWithASCIIString(name, text) == 0; };
      const bool x = is("x"), gamma = !x && is("gamma"), beta = !x && !gamma && is("beta");
      const bool residual = !x && !gamma && !beta && is("residual");
      need(x || gamma || beta || residual);
      named = {named.x || x, named.gamma || gamma, named.beta || beta, named.residual || residual};
    }
    return named;
  }

  // Of a dict of keywords, or None: those that are None say nothing, but for `keep`; others than these are not
  // ordinary.
  Options options(PyObject* o, const Array& x, int axis) {
    Options given;
    if (o == Py_None || !need(PyDict_CheckExact(o) && ordinary_)) return given;
    PyObject *key = nullptr, *value = nullptr;
    Py_ssize_t at = 0;
    bool says_weights = false, says_padding = false;
    while (ordinary_ && PyDict_Next(o, &at, &key, &value) != 0) {
      const auto is = [key](const char* text) { return PyUnicode_CompareWithASCIIString(key, text) == 0; };
      if (is("keep")) {
        need(is_word(value, "x"));
      } else if (value == Py_None) {
        constexpr const char* kNames[] = {"mask",       "weights",  "lengths",    "padding",     "residual",
                                          "activation", "segments", "ghost_size", "weights_are", "renorm"};
        need(std::ranges::any_of(kNames, is));
      } else if (is("mask")) {
        given.mask = mask(value, x, axis);
      } else if (is("weights")) {
        given.weights = array(value);
        need(given.weights.is_double == x.is_double && fits(value, x, axis));
      } else if (is("weights_are")) {
        says_weights = need(is_word(value, "counts") || is_word(value, "importance"));
      } else if (is("ghost_size")) {
        given.ghost_size = integer(value, 1, INT_MAX);
      } else if (is("residual")) {
        given.residual = tensor_like(x, value);
      } else if (is("activation")) {
        given.relu = need(is_word(value, "relu"));
      } else if (is("padding")) {
        says_padding = true;
        given.padding = is_word(value, "zero")   ? Padding::zero
                        : is_word(value, "keep") ? Padding::keep
                                                 : Padding::normalize;
        need(given.padding != Padding::normalize || is_word(value, "normalize"));
      } else {
        need(false);
      }
    }
    need(given.counts() || !says_padding);
    need(given.mask == nullptr || !given.weights.present());
    need(given.weights.present() || !says_weights);
    if (!says_padding && given.mask != nullptr) given.padding = Padding::zero;
    return given;
  }

  Shares shares(PyObject* o, const Array& x, int axis, const Problem& problem) {
    Shares given;
    if (o == Py_None || !ordinary_) return given;
    const int number = integer(o, -2, INT_MAX);
    if (!ordinary_) return given;
    if (number < 0) {
      given.groups = {
          .width = problem.channels, .each_position = true, .about = number == -1 ? About::mean : About::zero};
      return given;
    }
    const std::int64_t groups = number == 0 ? problem.channels : number;
    if (!need(axis != 0 && problem.channels % groups == 0)) return given;
    given.of_samples = true;
    given.groups.width = problem.channels / groups;
    need(x.size() / x.shape[0] / groups >= 2);
    return given;
  }

  // Offsets of rows (indices of axis 0) in steps of the outer size, or none.
  std::vector<std::int64_t> offsets(PyObject* o, const Array& x, const Problem& problem) {
    if (o == Py_None || !need(Py_IS_TYPE(o, py::detail::npy_api::get().PyArray_Type_) && ordinary_)) return {};
    const auto* fields = py::detail::array_proxy(o);
    const auto* type = py::detail::array_descriptor_proxy(fields->descr);
    constexpr int kPlain = py::detail::npy_api::NPY_ARRAY_C_CONTIGUOUS_ | py::detail::npy_api::NPY_ARRAY_ALIGNED_;
    if (!need(type->byteorder == '=' && type->type_num == py::detail::npy_api::NPY_LONG_ && fields->nd == 1 &&
              fields->dimensions[0] > 0 && (fields->flags & kPlain) == kPlain && problem.outer % x.shape[0] == 0)) {
      return {};
    }
    const auto* from = reinterpret_cast<const std::int64_t*>(fields->data);
    std::vector<std::int64_t> to(from, from + fields->dimensions[0]);
    const std::int64_t steps = problem.outer / x.shape[0];
    for (std::int64_t& offset : to) need(!__builtin_mul_overflow(offset, steps, &offset));
    return to;
  }

  // A weight of each position in the type of x, flat, or none.
  Array weights(PyObject* o, const Array& x) {
    if (o == Py_None) return {};
    const Array a = array(o);
    need(a.dimensions == 1 && a.is_double == x.is_double);
    return a;
  }

  // The bytes of the bits of a ReLU, or none.
  std::span<std::uint8_t> bits(PyObject* o) {
    if (o == Py_None) return {};
    if (!need(Py_IS_TYPE(o, py::detail::npy_api::get().PyArray_Type_))) return {};
    const auto* fields = py::detail::array_proxy(o);
    const auto* type = py::detail::array_descriptor_proxy(fields->descr);
    if (!need(type->type_num == py::detail::npy_api::NPY_UBYTE_ && fields->nd == 1 && fields->dimensions[0] > 0 &&
              (fields->flags & py::detail::npy_api::NPY_ARRAY_C_CONTIGUOUS_) != 0)) {
      return {};
    }
    return {reinterpret_cast<std::uint8_t*>(fields->data), static_cast<std::size_t>(fields->dimensions[0])};
  }

  // How x lies in memory from its axis `axis`.
  [[nodiscard]] Problem problem(const Array& x, int axis) const {
    if (!ordinary_) return {};
    Problem p{1, x.shape[axis], 1};
    for (int d = 0; d < axis; ++d) p.outer *= x.shape[d];
    for (int d = axis + 1; d < x.dimensions; ++d) p.inner *= x.shape[d];
    return p;
  }

 private:
  static bool is_word(PyObject* o, const char* text) {
    return PyUnicode_CheckExact(o) && PyUnicode_CompareWithASCIIString(o, text) == 0;
  }

  // Bools of the shape of x without its channel axis.
  const bool* mask(PyObject* o, const Array& x, int axis) {
    if (!need(Py_IS_TYPE(o, py::detail::npy_api::get().PyArray_Type_))) return nullptr;
    const auto* fields = py::detail::array_proxy(o);
    const auto* type = py::detail::array_descriptor_proxy(fields->descr);
    need(type->type_num == py::detail::npy_api::NPY_BOOL_ && fits(o, x, axis) &&
         (fields->flags & py::detail::npy_api::NPY_ARRAY_C_CONTIGUOUS_) != 0);
    return ordinary_ ? reinterpret_cast<const bool*>(fields->data) : nullptr;
  }

  // Whether an array has the shape of x without its channel axis.
  [[nodiscard]] bool fits(PyObject* o, const Array& x, int axis) const {
    if (!ordinary_) return false;
    const auto* fields = py::detail::array_proxy(o);
    bool fits = fields->nd == x.dimensions - 1;
    for (int d = 0; fits && d < fields->nd; ++d) fits = fields->dimensions[d] == x.shape[d < axis ? d : d + 1];
    return fits;
  }

  bool ordinary_ = true;
};

}  // namespace batchnorm::bindings
