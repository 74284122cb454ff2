// One case in one layout on an NVIDIA GPU: verify, time by events with cold caches, compare with a copy.
#pragma once

#include <string>
#include <vector>

#include "cases.hpp"
#include "measure.hpp"
#include "passes.hpp"

namespace bench {

// Passes that are measured there: those of training and inference, with a ReLU or a residual, and of lines.
bool is_on_device(Pass pass);

// What the device is, in words. Throws std::runtime_error where there is none, or the program was built without CUDA.
std::string device_name();

// The ratio of a row is to a device copy of the bytes that the pass is planned to move. Throws where a result has other
// bits than the library on the CPU.
template <class T>
Measured measure_on_device(const Case& shape, Layout layout, const Request& request);

extern template Measured measure_on_device<batchnorm::Float16>(const Case&, Layout, const Request&);
extern template Measured measure_on_device<batchnorm::BFloat16>(const Case&, Layout, const Request&);
extern template Measured measure_on_device<float>(const Case&, Layout, const Request&);
extern template Measured measure_on_device<double>(const Case&, Layout, const Request&);

}  // namespace bench
