// batchnorm._cuda: the functions for NVIDIA GPUs, in builds that have them. As module.cpp, but that arrays say
// addresses on a device, at which nothing here looks; the last argument of each function is (device, stream).
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <utility>

#include "calls.hpp"
#include "dlpack.hpp"
#include "site.hpp"

namespace batchnorm::bindings {

void add_passes(py::module_& m);  // passes.cpp

namespace {

using MaybeArray = std::optional<py::array>;
using cuda::Element;

std::span<const double> doubles(const MaybeArray& a, const char* name) {
  if (!a) return {};
  check_contiguous(*a, name);
  if (!is_float64(*a)) throw py::type_error(std::string(name) + " must have dtype float64");
  return {static_cast<const double*>(a->data()), static_cast<std::size_t>(a->size())};
}
std::span<double> doubles_into(py::array& a, const char* name) {
  const auto values = doubles(a, name);
  return {static_cast<double*>(a.mutable_data()), values.size()};
}

// ---- between calls ----

void py_update_running(const py::array& mean, const py::array& var, const py::array& moments, double update_rate,
                       int ddof, bool only_finite, py::array to_mean, py::array to_var, const Where& where) {
  const Site at(where);
  cuda::update_running(doubles(mean, "mean"), doubles(var, "var"), table<Moments>(moments, "moments"), update_rate,
                       ddof, only_finite, doubles_into(to_mean, "to_mean"), doubles_into(to_var, "to_var"),
                       at.options());
}
void py_pool(const py::array& pooled, const py::array& moments, int ddof, bool only_finite, py::array to,
             py::array mean, py::array var, const Where& where) {
  const Site at(where);
  cuda::pool(table<Moments>(pooled, "pooled"), table<Moments>(moments, "moments"), ddof, only_finite,
             rows<Moments>(to, "to"), doubles_into(mean, "mean"), doubles_into(var, "var"), at.options());
}
void py_combine(py::array to, const MaybeArray& a, const py::array& x, const MaybeArray& b, const MaybeArray& y,
                const Where& where) {
  const Site at(where);
  std::optional<py::array> into = to;
  cuda::combine(GradientInto(into, "to").output(), doubles(a, "a"), doubles(x, "x"), doubles(b, "b"), doubles(y, "y"),
                at.options());
}

// ---- memory ----

Element element_of(const py::array& a) {
  static const std::pair<const char*, Element> known[] = {
      {"bool", Element::boolean},    {"int8", Element::int8},         {"int16", Element::int16},
      {"int32", Element::int32},     {"int64", Element::int64},       {"uint8", Element::uint8},
      {"uint16", Element::uint16},   {"uint32", Element::uint32},     {"uint64", Element::uint64},
      {"float16", Element::float16}, {"bfloat16", Element::bfloat16}, {"float32", Element::float32},
      {"float64", Element::float64}};
  const auto name = a.dtype().attr("name").cast<std::string>();
  for (const auto& [known_name, element] : known) {
    if (name == known_name) return element;
  }
  throw py::type_error("an array on a device must have a dtype of numbers, got " + name);
}
using Numbers = std::array<std::int64_t, 8>;
cuda::View view_of(py::array& a, Numbers& sizes, Numbers& strides) {
  const auto dimensions = static_cast<std::size_t>(a.ndim());
  if (dimensions > sizes.size()) throw py::value_error("an array must have at most 8 dimensions");
  for (std::size_t d = 0; d < dimensions; ++d) {
    sizes[d] = a.shape(static_cast<py::ssize_t>(d));
    strides[d] = a.strides(static_cast<py::ssize_t>(d));
  }
  return {const_cast<void*>(a.data()), element_of(a), std::span(sizes).first(dimensions),
          std::span(strides).first(dimensions)};
}
void py_lay_out(py::array from, py::array to, bool as_flags, const Where& where) {
  const Site at(where);
  Numbers sizes, strides, to_sizes, to_strides;
  const cuda::View source = view_of(from, sizes, strides), target = view_of(to, to_sizes, to_strides);
  cuda::lay_out(source, target, as_flags, at.options());
}

std::uintptr_t py_allocate(std::size_t bytes, const Where& where) {
  const Site at(where);
  return reinterpret_cast<std::uintptr_t>(cuda::allocate(bytes, at.options()));
}
void py_release(std::uintptr_t address, const Where& where) {
  const Site at(where);
  cuda::release(reinterpret_cast<void*>(address), at.options());
}
// Between contiguous arrays, one of them on the device.
void py_copy_to_host(py::array to, const py::array& from, const Where& where) {
  const auto bytes = static_cast<std::size_t>(to.nbytes());
  void* const memory = to.mutable_data();
  const void* const source = from.data();
  const py::gil_scoped_release gil;  // it waits
  const Site at(where);
  cuda::copy_to_host(memory, source, bytes, at.options());
}
void py_copy_to_device(py::array to, const py::array& from, const Where& where) {
  const Site at(where);
  cuda::copy_to_device(to.mutable_data(), from.data(), static_cast<std::size_t>(from.nbytes()), at.options());
}
void py_wait_for(std::uintptr_t other, const Where& where) {
  const Site at(where);
  cuda::wait_for(reinterpret_cast<void*>(other), at.options());
}

std::uintptr_t py_mark(const Where& where) {
  const Site at(where);
  return reinterpret_cast<std::uintptr_t>(cuda::mark(at.options()));
}

py::object py_to_dlpack(std::uintptr_t address, int device, std::pair<int, int> type, std::vector<std::int64_t> shape,
                        std::vector<std::int64_t> strides, const py::object& keeper, bool versioned) {
  constexpr int kCuda = 2;
  const dlpack::Device on{kCuda, device};
  const dlpack::Type of{static_cast<std::uint8_t>(type.first), static_cast<std::uint8_t>(type.second), 1};
  return versioned ? dlpack::to_capsule<dlpack::ManagedVersioned>(address, on, of, std::move(shape), std::move(strides),
                                                                  keeper)
                   : dlpack::to_capsule<dlpack::Managed>(address, on, of, std::move(shape), std::move(strides), keeper);
}

}  // namespace
}  // namespace batchnorm::bindings

PYBIND11_MODULE(_cuda, m, pybind11::mod_gil_not_used()) {
  using namespace batchnorm::bindings;
  using pybind11::arg;
  m.doc() = "The functions for NVIDIA GPUs. Private: use the functions of the package.";
  add_passes(m);
  m.def("update_running", &py_update_running, "The running statistics after one batch.", arg("mean"), arg("var"),
        arg("moments"), arg("update_rate"), arg("ddof"), arg("only_finite"), arg("to_mean"), arg("to_var"),
        arg("where"));
  m.def("pool", &py_pool, "Merge moments into those pooled.", arg("pooled"), arg("moments"), arg("ddof"),
        arg("only_finite"), arg("to"), arg("mean"), arg("var"), arg("where"));
  m.def("combine", &py_combine, "to = the sum over sets of a*x + b*y.", arg("to"), arg("a"), arg("x"), arg("b"),
        arg("y"), arg("where"));
  m.def("lay_out", &py_lay_out, "Copy values to an array of other strides or another type.", arg("source"), arg("to"),
        arg("as_flags"), arg("where"));
  m.def("allocate", &py_allocate, "The address of new memory.", arg("bytes"), arg("where"));
  m.def("release", &py_release, "Give it back.", arg("address"), arg("where"));
  m.def("copy_to_host", &py_copy_to_host, "Wait, and copy.", arg("to"), arg("source"), arg("where"));
  m.def("copy_to_device", &py_copy_to_device, "Copy.", arg("to"), arg("source"), arg("where"));
  m.def("wait_for", &py_wait_for, "Let a stream wait for another.", arg("other"), arg("where"));
  m.def("mark", &py_mark, "A mark behind what a stream has to do.", arg("where"));
  m.def(
      "is_past", [](std::uintptr_t mark) { return batchnorm::cuda::is_past(reinterpret_cast<void*>(mark)); },
      arg("mark"), "Whether that is done; then the mark is no more.");
  m.def("count_devices", &batchnorm::cuda::count_devices, "How many devices there are.");
  m.def("describe_device", &batchnorm::cuda::describe_device, "Its name and compute capability.", arg("device"));
  m.def(
      "device_of",
      [](std::uintptr_t address) { return batchnorm::cuda::device_of(reinterpret_cast<const void*>(address)); },
      arg("address"), "The device whose memory this is.");
  m.def("from_dlpack", &dlpack::from_capsule, "What a capsule of DLPack tells, which is taken.", arg("capsule"));
  m.def("to_dlpack", &py_to_dlpack, "A capsule of DLPack.", arg("address"), arg("device"), arg("type"), arg("shape"),
        arg("strides"), arg("keeper"), arg("versioned"));
}
