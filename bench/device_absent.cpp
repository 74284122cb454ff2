// Of a program that was built without CUDA.
#include <stdexcept>

#include "device.hpp"

namespace bench {

bool is_on_device(Pass) { return false; }
std::string device_name() {
  throw std::runtime_error("--device cuda needs a batchnorm-bench that was built with -DBATCHNORM_CUDA=ON");
}
template <class T>
Measured measure_on_device(const Case&, Layout, const Request&) {
  throw std::logic_error(device_name());
}

template Measured measure_on_device<batchnorm::Float16>(const Case&, Layout, const Request&);
template Measured measure_on_device<batchnorm::BFloat16>(const Case&, Layout, const Request&);
template Measured measure_on_device<float>(const Case&, Layout, const Request&);
template Measured measure_on_device<double>(const Case&, Layout, const Request&);

}  // namespace bench
