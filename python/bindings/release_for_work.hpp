// The GIL around calls of the core.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <optional>

namespace batchnorm::bindings {

// Releases the GIL around work worth it: giving it up and taking it back costs about as much as a few thousand values,
// and while another thread wants it, up to a switch interval (5 ms).
class ReleaseForWork {
 public:
  explicit ReleaseForWork(std::int64_t values) {
    if (values >= kWorth) released_.emplace();
  }

 private:
  static constexpr std::int64_t kWorth = 32 * 1024;
  std::optional<pybind11::gil_scoped_release> released_;
};

}  // namespace batchnorm::bindings
