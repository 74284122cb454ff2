// NumPy arrays as pointers and spans. Nothing here copies or casts: an array is taken as it lies, or refused.
//
// py::array_t would do neither: it accepts misaligned memory and converts other dtypes silently.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cmath>
#include <cstdint>
#include <span>
#include <string>
#include <type_traits>

#include "batchnorm/float16.hpp"
#include "batchnorm/types.hpp"

namespace batchnorm::bindings {

namespace py = pybind11;

enum class Access { read, write };

inline constexpr int kFloat32 = py::detail::npy_api::NPY_FLOAT_, kFloat64 = py::detail::npy_api::NPY_DOUBLE_;
inline constexpr int kUint8 = py::detail::npy_api::NPY_UBYTE_, kInt64 = py::detail::npy_api::NPY_INT64_;

inline bool has_dtype(const py::array& a, int type_number) { return a.dtype().num() == type_number; }
inline bool is_float32(const py::array& a) { return has_dtype(a, kFloat32); }
inline bool is_float64(const py::array& a) { return has_dtype(a, kFloat64); }

inline bool is_float16(const py::array& a) { return has_dtype(a, 23); }  // NPY_HALF
// That of ml_dtypes, known by its name alone: NumPy gives it a number of the process's own.
inline bool is_bfloat16(const py::array& a) {
  return a.dtype().kind() == 'V' && a.itemsize() == 2 && a.dtype().attr("name").cast<std::string>() == "bfloat16";
}
template <class T>
bool holds(const py::array& a) {
  if constexpr (std::is_same_v<T, float>) {
    return is_float32(a);
  } else if constexpr (std::is_same_v<T, double>) {
    return is_float64(a);
  } else if constexpr (std::is_same_v<T, Float16>) {
    return is_float16(a);
  } else {
    return is_bfloat16(a);
  }
}

inline void check_memory(const py::array& a, const char* name, Access access) {
  if (!is_float32(a) && !is_float64(a) && !is_float16(a) && !is_bfloat16(a)) {
    throw py::type_error(std::string(name) + " must have dtype float16, bfloat16, float32 or float64, got " +
                         py::str(a.dtype()).cast<std::string>());
  }
  if (a.dtype().byteorder() != '=' && a.dtype().byteorder() != '|') {
    throw py::type_error(std::string(name) + " must be in native byte order, got dtype " +
                         a.dtype().attr("str").cast<std::string>());
  }
  if ((a.flags() & py::detail::npy_api::NPY_ARRAY_ALIGNED_) == 0) {
    throw py::value_error(std::string(name) +
                          " must be aligned to its item size, got an address or a stride that is "
                          "not a multiple of " +
                          std::to_string(a.itemsize()));
  }
  if (access == Access::write && !a.writeable()) {
    throw py::value_error(std::string(name) + " must be writeable, got a read-only array");
  }
}

// Whether the elements fill one block of memory, in whatever order of the axes.
inline bool is_dense(const py::array& a) {
  if (a.size() == 0 || (a.flags() & (py::array::c_style | py::array::f_style)) != 0) return true;
  // Walk from the innermost axis out: each stride must be the size of the block so far.
  py::ssize_t block = a.itemsize();
  for (py::ssize_t found = 0, ndim = a.ndim(); found < ndim; ++found) {
    bool extended = false;
    for (py::ssize_t d = 0; d < ndim && !extended; ++d) {
      if (a.shape(d) > 1 && a.strides(d) == block) {
        block *= a.shape(d);
        extended = true;
      }
    }
    if (!extended) break;
  }
  return block == a.itemsize() * a.size();
}

// The values of a dense array in memory order. T is what x holds.
template <class T>
std::span<const T> tensor(const py::array& a, const char* name) {
  check_memory(a, name, Access::read);
  if (!is_dense(a)) throw py::value_error(std::string(name) + " must be dense, got an array with gaps or repeats");
  if (!holds<T>(a)) throw py::type_error(std::string(name) + " must have the dtype of x");
  return {static_cast<const T*>(a.data()), static_cast<std::size_t>(a.size())};
}
template <class T>
std::span<T> output(py::array& a, const char* name) {
  check_memory(a, name, Access::write);
  const std::span<const T> values = tensor<T>(a, name);
  return {static_cast<T*>(a.mutable_data()), values.size()};
}

inline py::array checked_array(const py::object& o, const char* name) {
  if (!py::isinstance<py::array>(o)) throw py::type_error(std::string(name) + " must be an array or None");
  return py::reinterpret_borrow<py::array>(o);
}
inline void check_contiguous(const py::array& a, const char* name) {
  check_memory(a, name, Access::read);
  if ((a.flags() & py::array::c_style) == 0) {
    throw py::value_error(std::string(name) + " must be C-contiguous, got a strided array");
  }
}

// One value per channel of either dtype, or None.
inline ChannelValues channel_values(const py::object& o, const char* name) {
  if (o.is_none()) return {};
  const py::array a = checked_array(o, name);
  check_contiguous(a, name);
  const auto size = static_cast<std::size_t>(a.size());
  if (is_float32(a)) return std::span<const float>(static_cast<const float*>(a.data()), size);
  if (!is_float64(a)) throw py::type_error(std::string(name) + " must have dtype float32 or float64");
  return std::span<const double>(static_cast<const double*>(a.data()), size);
}

// A (channels, fields) float64 table whose rows are the C++ struct `Row`.
template <class Row>
std::span<const Row> table(const py::array& a, const char* name) {
  constexpr auto kFields = static_cast<py::ssize_t>(sizeof(Row) / sizeof(double));
  check_contiguous(a, name);
  if (!is_float64(a) || a.ndim() != 2 || a.shape(1) != kFields) {
    throw py::value_error(std::string(name) + " must be a float64 table of " + std::to_string(kFields) + " columns");
  }
  return {static_cast<const Row*>(a.data()), static_cast<std::size_t>(a.shape(0))};
}
// The Python error that is set. py::error_already_set takes memory to say as much, where that may be what there is none
// of.
struct PythonError {};

// A new C-contiguous array, its values unset. py::array's own constructor takes several times as long.
inline py::array new_array(int type_number, int dimensions, const py::ssize_t* shape) {
  const auto& numpy = py::detail::npy_api::get();
  PyObject* type = numpy.PyArray_DescrFromType_(type_number);  // which the array takes over
  PyObject* array =
      numpy.PyArray_NewFromDescr_(numpy.PyArray_Type_, type, dimensions, shape, nullptr, nullptr, 0, nullptr);
  if (array == nullptr) throw PythonError{};
  return py::reinterpret_steal<py::array>(array);
}
// The first channel whose mean or m2 is infinite or NaN; -1: none.
inline std::int64_t first_nonfinite(std::span<const Moments> moments) {
  for (std::size_t c = 0; c < moments.size(); ++c) {
    if (!std::isfinite(moments[c].mean) || !std::isfinite(moments[c].m2)) return static_cast<std::int64_t>(c);
  }
  return -1;
}

// A new table of rows, its values unset, which Python may not write to.
template <class Row>
py::array new_table(std::int64_t channels) {
  const py::ssize_t shape[] = {static_cast<py::ssize_t>(channels),
                               static_cast<py::ssize_t>(sizeof(Row) / sizeof(double))};
  py::array array = new_array(kFloat64, 2, shape);
  py::detail::array_proxy(array.ptr())->flags &= ~py::detail::npy_api::NPY_ARRAY_WRITEABLE_;
  return array;
}
template <class Row>
std::span<Row> rows(py::array& a) {
  return {static_cast<Row*>(const_cast<void*>(a.data())), static_cast<std::size_t>(a.shape(0))};
}
// One that Python has had made for a call.
template <class Row>
std::span<Row> rows(py::array& a, const char* name) {
  table<Row>(a, name);
  return rows<Row>(a);
}
inline std::span<double> values(py::array_t<double>& a) {
  return {a.mutable_data(), static_cast<std::size_t>(a.size())};
}

}  // namespace batchnorm::bindings
