// Functions as CPython calls them, without pybind11 between: for calls so short that it would be seen in them.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <exception>
#include <new>

#include "arrays.hpp"

namespace batchnorm::bindings {

// f of N arguments as CPython calls it.
template <std::size_t N, PyObject* (*f)(PyObject* const (&)[N])>
PyObject* entry(PyObject* /*module*/, PyObject* const* arguments, Py_ssize_t given) {
  if (given != static_cast<Py_ssize_t>(N)) {
    return PyErr_Format(PyExc_TypeError, "arguments must be %zd, got %zd", static_cast<Py_ssize_t>(N), given);
  }
  try {
    return f(reinterpret_cast<PyObject* const(&)[N]>(*arguments));
  } catch (const PythonError&) {
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const py::builtin_exception& error) {
    error.set_error();
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;  // an exception of C++ must not go on into the interpreter
}

template <std::size_t N, PyObject* (*f)(PyObject* const (&)[N])>
PyMethodDef method(const char* name, const char* doc) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(entry<N, f>)), METH_FASTCALL, doc};
}

}  // namespace batchnorm::bindings
