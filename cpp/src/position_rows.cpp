#include "position_rows.hpp"

#include <cmath>
#include <limits>

#include "channel_math.hpp"
#include "coefficients.hpp"

namespace batchnorm {

template <class A>
std::unique_ptr<A[]> along(const ChannelValues& values, std::int64_t channels, A absent) {
  std::unique_ptr<A[]> to(new A[static_cast<std::size_t>(channels + kernels::kVectorColumns)]);
  std::fill_n(to.get() + channels, kernels::kVectorColumns, A(0));
  if (!values.present()) std::fill_n(to.get(), channels, absent);
  const auto size = static_cast<std::int64_t>(values.size());
  for (std::int64_t c = 0; values.present() && c < channels; c += size) {
    values.copy_to(0, std::min(size, channels - c), to.get() + c);
  }
  return to;
}
template std::unique_ptr<float[]> along(const ChannelValues&, std::int64_t, float);
template std::unique_ptr<double[]> along(const ChannelValues&, std::int64_t, double);

bool fit_into_float(const ChannelValues& gamma, const ChannelValues& beta) {
  const auto all = [](const ChannelValues& values, const auto& fits) {
    const bool are_double = values.bytes().size() == values.size() * sizeof(double);
    for (std::int64_t c = 0; are_double && c < static_cast<std::int64_t>(values.size()); ++c) {
      if (static_cast<double>(static_cast<float>(values[c])) != values[c] && !fits(values[c])) return false;
    }
    return true;
  };
  return all(gamma, [](double v) { return factor_fits<float>(v) != 0; }) &&
         all(beta, [](double v) { return std::abs(v) <= std::numeric_limits<float>::max(); });
}

}  // namespace batchnorm
