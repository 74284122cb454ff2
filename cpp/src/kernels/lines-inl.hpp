// Lines: what is between the passes, for many channels at once, by the formulas of channel_math.hpp on the machine's
// vectors.
#pragma once

#define BN_FORMULA BN_INLINE
#include "channel_math.hpp"
#include "kernels/lanes-inl.hpp"
#include "kernels/table.hpp"

namespace batchnorm::kernels {
namespace {

using Many = double __attribute__((vector_size(sizeof(NativeDouble))));
constexpr std::int64_t kMany = kChannelsOf<Many>;

// Whether a condition held for any channel.
class AnyChannel {
 public:
  BN_INLINE void add(bool holds) { one_ |= holds; }
  BN_INLINE void add(const decltype(Many{} < Many{})& holds) { many_ |= holds; }
  BN_INLINE bool found() const { return one_ | any(many_); }

 private:
  decltype(Many{} < Many{}) many_{};
  bool one_ = false;
};

// f<V>(i) for the channels from i on, until all n were there. Where the last are not as many as a vector holds, some
// are there twice.
template <class F>
BN_INLINE void for_many(std::int64_t n, const F& f) {
  std::int64_t i = 0;
  for (; i + kMany <= n; i += kMany) f.template operator()<Many>(i);
  if (i < n && n > kMany) return f.template operator()<Many>(n - kMany);
  for (; i < n; ++i) f.template operator()<double>(i);
}

// The sum of the channels from i on, high and low part.
template <class V>
BN_INLINE TwoParts<V> sum_at(const double* sum, const double* low, std::int64_t i) {
  return {gather<V>(sum + i), gather<V>(low + i)};
}

bool lines_moments(const ColumnSums& sums, std::int64_t n, double count, Moments* out) {
  AnyChannel rare;
  for_many(n, [&]<class V>(std::int64_t i) __attribute__((always_inline)) {
    const MomentsOf<V> m = moments_from_sums<float, V>({count, 0}, 0, sum_at<V>(sums.first, sums.first_lo, i),
                                                       sum_at<V>(sums.second, sums.second_lo, i));
    m.put(out + i);
    rare.add(needs_shift<float>(m) | mean_below(m, Conditioning<float>::kCompensateBelow));
  });
  return !rare.found();
}

bool lines_normalize(const Moments* moments, std::int64_t n, double eps, const double* gamma, const double* beta,
                     const AffineOut& out) {
  AnyChannel rare;
  for_many(n, [&]<class V>(std::int64_t i) __attribute__((always_inline)) {
    const MomentsOf<V> m = MomentsOf<V>::at(moments + i);
    const auto k =
        quick_coefficients(m.mean, m.mean_lo, rstd_for<float>(m, eps).hi, gather<V>(gamma + i), gather<V>(beta + i));
    put_values(k.narrow.center, out.center + i);
    put_values(k.narrow.scale, out.scale + i);
    put_values(k.narrow.offset, out.offset + i);
    rare.add(k.is_wide);
  });
  return !rare.found();
}

bool lines_grad_input(const Moments* moments, const ColumnSums& of_columns, std::int64_t n, double eps,
                      const double* gamma, const GradAffineOut& out, double* dgamma, double* dbeta) {
  AnyChannel rare;
  for_many(n, [&]<class V>(std::int64_t i) __attribute__((always_inline)) {
    const MomentsOf<V> m = MomentsOf<V>::at(moments + i);
    const GradSumsOf<V> sums{sum_at<V>(of_columns.first, of_columns.first_lo, i),
                             sum_at<V>(of_columns.second, of_columns.second_lo, i)};
    const TwoParts<V> rstd = rstd_for<float>(m, eps);
    scatter(dgamma_of<float>(m, sums, rstd), dgamma + i);
    scatter(dbeta_of(sums), dbeta + i);
    const auto k = backward_coefficients<float, V>(m, sums, rstd, gather<V>(gamma + i));
    put_values(k.narrow.dy_center, out.dy_center + i);
    put_values(k.narrow.dy_scale, out.dy_scale + i);
    put_values(k.narrow.x_center, out.x_center + i);
    put_values(k.narrow.x_scale, out.x_scale + i);
    put_values(k.narrow.offset, out.offset + i);
    rare.add(k.is_wide);
  });
  return !rare.found();
}

}  // namespace
}  // namespace batchnorm::kernels
