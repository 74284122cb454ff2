#include "position_rows.hpp"

#include "coefficients.hpp"

namespace batchnorm {

std::unique_ptr<double[]> along(const ChannelValues& values, std::int64_t channels, double absent) {
  std::unique_ptr<double[]> to(new double[static_cast<std::size_t>(channels + kernels::kVectorColumns)]);
  std::fill_n(to.get() + channels, kernels::kVectorColumns, 0.0);
  read_channels(values, {0, channels}, absent, to.get());
  return to;
}

}  // namespace batchnorm
