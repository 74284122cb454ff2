// DLPack: how libraries hand arrays to each other, as capsules that hold a struct of C. The structs are those of the
// protocol's versions 0 and 1 (dmlc.github.io/dlpack).
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace batchnorm::bindings {

namespace py = pybind11;

namespace dlpack {

struct Device {
  std::int32_t type, id;
};
struct Type {
  std::uint8_t code, bits;
  std::uint16_t lanes;
};
struct Tensor {
  void* data;
  Device device;
  std::int32_t dimensions;
  Type type;
  std::int64_t *shape, *strides;  // in values; strides may be null: C order
  std::uint64_t byte_offset;
};
struct Managed {
  Tensor tensor;
  void* context;
  void (*deleter)(Managed*);
};
struct Version {
  std::uint32_t major, minor;
};
struct ManagedVersioned {
  Version version;
  void* context;
  void (*deleter)(ManagedVersioned*);
  std::uint64_t flags;
  Tensor tensor;
};
constexpr std::uint64_t kReadOnly = 1;

template <class M>
constexpr const char* name_of(bool used) {
  if constexpr (std::is_same_v<M, Managed>) return used ? "used_dltensor" : "dltensor";
  return used ? "used_dltensor_versioned" : "dltensor_versioned";
}

// ---- coming in ----

inline py::tuple described(const Tensor& t, bool read_only, py::object keeper) {
  py::list shape, strides;
  std::vector<std::int64_t> of_c_order(static_cast<std::size_t>(t.dimensions), 1);
  for (std::size_t d = of_c_order.size(); d-- > 1;) of_c_order[d - 1] = of_c_order[d] * t.shape[d];
  for (std::int32_t d = 0; d < t.dimensions; ++d) {
    shape.append(t.shape[d]);
    strides.append(t.strides == nullptr ? of_c_order[static_cast<std::size_t>(d)] : t.strides[d]);
  }
  const auto address = reinterpret_cast<std::uintptr_t>(t.data) + t.byte_offset;
  return py::make_tuple(address, py::make_tuple(t.device.type, t.device.id),
                        py::make_tuple(t.type.code, t.type.bits, t.type.lanes), py::tuple(shape), py::tuple(strides),
                        read_only, std::move(keeper));
}
// What a capsule tells: (address, (device type, id), (code, bits, lanes), shape, strides in values, whether it is
// read-only, what keeps the memory).
template <class M>
py::tuple take(PyObject* capsule) {
  auto* managed = static_cast<M*>(PyCapsule_GetPointer(capsule, name_of<M>(false)));
  if (managed == nullptr || PyCapsule_SetName(capsule, name_of<M>(true)) != 0) throw py::error_already_set();
  py::capsule keeper(managed, [](void* of) {
    auto* taken = static_cast<M*>(of);
    if (taken->deleter != nullptr) taken->deleter(taken);
  });
  bool read_only = false;
  if constexpr (std::is_same_v<M, ManagedVersioned>) {
    if (managed->version.major != 1) {
      throw py::buffer_error("an array must be of DLPack 1, got version " + std::to_string(managed->version.major));
    }
    read_only = (managed->flags & kReadOnly) != 0;
  }
  return described(managed->tensor, read_only, std::move(keeper));
}
inline py::tuple from_capsule(const py::object& capsule) {
  if (PyCapsule_IsValid(capsule.ptr(), name_of<ManagedVersioned>(false)) != 0) {
    return take<ManagedVersioned>(capsule.ptr());
  }
  return take<Managed>(capsule.ptr());
}

// ---- going out ----

// What a capsule of ours points to.
template <class M>
struct Given {
  M managed = {};
  std::vector<std::int64_t> shape, strides;
  PyObject* keeper = nullptr;
};
template <class M>
void give_back(M* managed) {
  const std::unique_ptr<Given<M>> given(static_cast<Given<M>*>(managed->context));
  if (Py_IsInitialized() == 0) return;
  const py::gil_scoped_acquire gil;  // libraries call this from threads of their own
  Py_XDECREF(given->keeper);
}
template <class M>
py::object to_capsule(std::uintptr_t address, Device device, Type type, std::vector<std::int64_t> shape,
                      std::vector<std::int64_t> strides, const py::object& keeper) {
  auto given = std::make_unique<Given<M>>();
  given->shape = std::move(shape), given->strides = std::move(strides);
  Tensor& t = given->managed.tensor;
  t = {reinterpret_cast<void*>(address),
       device,
       static_cast<std::int32_t>(given->shape.size()),
       type,
       given->shape.data(),
       given->strides.data(),
       0};
  if constexpr (std::is_same_v<M, ManagedVersioned>) given->managed.version = {1, 0};
  given->managed.context = given.get();
  given->managed.deleter = give_back<M>;
  PyObject* capsule = PyCapsule_New(&given->managed, name_of<M>(false), [](PyObject* of) {
    if (PyCapsule_IsValid(of, name_of<M>(false)) == 0) return;  // somebody took it
    auto* unused = static_cast<M*>(PyCapsule_GetPointer(of, name_of<M>(false)));
    unused->deleter(unused);
  });
  if (capsule == nullptr) throw py::error_already_set();
  given->keeper = py::object(keeper).release().ptr();
  given.release();
  return py::reinterpret_steal<py::object>(capsule);
}

}  // namespace dlpack
}  // namespace batchnorm::bindings
