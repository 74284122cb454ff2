// What is between the passes, for many channels at once, by the formulas of gradient_math.hpp on the machine's
// vectors.
#pragma once

#define BN_FORMULA BN_INLINE
#include "gradient_math.hpp"
#include "kernels/lanes-inl.hpp"
#include "kernels/table.hpp"

namespace batchnorm::kernels {
namespace {

using Many = double __attribute__((vector_size(sizeof(NativeFloat))));
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

// Quotients by an integer below 2^31, as a division rounds them, of values of float32 and their sums and products:
// by its reciprocal, and by what that leaves. An estimate q and (a - q*count)/count are off by 2^-50 units in the last
// place of q; a/count is no nearer than 2^-32 to the middle between two float64, since the product of count and one of
// 54 bits is none of 53.
class Count {
 public:
  BN_INLINE explicit Count(double count) : count_(count), inverse_(1 / count) {}
  [[nodiscard]] BN_INLINE bool is_exact() const {
    return count_ >= 1 && count_ < 0x1p31 && count_ == static_cast<double>(static_cast<std::int32_t>(count_));
  }

  template <class V>
  BN_INLINE friend V operator/(const V& a, const Count& n) {
#if defined(__FMA__) || defined(__aarch64__)
    const V q = a * n.inverse_, above = fused(q, all<V>(n.count_), -a), exact = fused(-above, all<V>(n.inverse_), q);
    return above == above ? exact : q;  // infinity leaves NaN
#else
    return a / n.count_;
#endif
  }

 private:
  template <class V>
  BN_INLINE static V fused(const V& a, const V& b, const V& c) {
    return by_channel<V>(
        [&](int l) __attribute__((always_inline)) { return __builtin_fma(lane(a, l), lane(b, l), lane(c, l)); });
  }
  double count_, inverse_;
};

// f<V>(i, first<V>(i)) likewise, where first() takes so long (a root and its inverse) that it is begun for the next
// two vectors meanwhile: as one chain the formulas took 1.2 (AVX-512) to 1.5 times (SSE) as long (Zen 5).
template <class First, class F>
BN_INLINE void for_many_ahead(std::int64_t n, const First& first, const F& f) {
  if (n < kMany) {
    for (std::int64_t i = 0; i < n; ++i) f.template operator()<double>(i, first.template operator()<double>(i));
    return;
  }
  const auto at = [n](std::int64_t i) __attribute__((always_inline)) { return i + kMany <= n ? i : n - kMany; };
  Many next = first.template operator()<Many>(0), after = first.template operator()<Many>(at(kMany));
  for (std::int64_t i = 0; i < n; i += kMany) {
    const Many now = next;
    next = after;
    after = first.template operator()<Many>(at(i + 2 * kMany));
    f.template operator()<Many>(at(i), now);
  }
}

// The sum of the channels from i on, high and low part.
template <class V>
BN_INLINE TwoParts<V> sum_at(const double* sum, const double* low, std::int64_t i) {
  return {gather<V>(sum + i), gather<V>(low + i)};
}

// Of the channels from m on, all of which have that count.
template <class V>
BN_INLINE V rstd_at(const Moments* m, const Count& count, double eps) {
  return rstd_for<float, V>(gather<V>(m, &Moments::m2) / count, eps).hi;
}

// Whether a variance may be below the normal numbers, where quotients by reciprocals are not those of divisions, and is
// not lost in eps. No float32 values have one.
BN_INLINE bool may_be_tiny(const Moments* m, std::int64_t n, double eps) {
  bool found = false;
  for (std::int64_t i = 0; eps < 0x1p-960 && i < n; ++i) found |= (m[i].m2 != 0) & (m[i].m2 < 0x1p-900);
  return found;
}

bool many_moments(const ColumnSums& sums, std::int64_t n, double count, Moments* out) {
  AnyChannel rare;
  const Count each(count);
  for_many(n, [&]<class V>(std::int64_t i) __attribute__((always_inline)) {
    const V sum = gather<V>(sums.first + i) + gather<V>(sums.first_lo + i);
    const MomentsOf<V> m = moments_from_mean<V>(count, 0, sum, sum / each, sum_at<V>(sums.second, sums.second_lo, i));
    m.put(out + i);
    rare.add(needs_shift<float>(m) | mean_below(m, Conditioning<float>::kCompensateBelow));
  });
  return each.is_exact() && !rare.found();
}

bool many_normalize(const Moments* moments, std::int64_t n, double eps, const double* gamma, const double* beta,
                    const AffineOut& out) {
  AnyChannel rare;
  const Count count(moments->count);
  for_many_ahead(
      n, [&]<class V>(std::int64_t i) __attribute__((always_inline)) { return rstd_at<V>(moments + i, count, eps); },
      [&]<class V>(std::int64_t i, const V& rstd) __attribute__((always_inline)) {
        const MomentsOf<V> m = MomentsOf<V>::at(moments + i);
        const auto k = quick_coefficients(m.mean, m.mean_lo, rstd, gather<V>(gamma + i), gather<V>(beta + i));
        put_values(k.narrow.center, out.center + i);
        put_values(k.narrow.scale, out.scale + i);
        put_values(k.narrow.offset, out.offset + i);
        rare.add(k.is_wide | (m.count != moments->count));
      });
  return count.is_exact() && !rare.found() && !may_be_tiny(moments, n, eps);
}

bool many_grad_input(const Moments* moments, const ColumnSums& of_columns, std::int64_t n, double eps,
                     const double* gamma, const GradAffineOut& out, double* dgamma, double* dbeta) {
  AnyChannel rare;
  const Count count(moments->count);
  for_many_ahead(
      n, [&]<class V>(std::int64_t i) __attribute__((always_inline)) { return rstd_at<V>(moments + i, count, eps); },
      [&]<class V>(std::int64_t i, const V& of_var) __attribute__((always_inline)) {
        const MomentsOf<V> m = MomentsOf<V>::at(moments + i);
        const GradSumsOf<V> sums{sum_at<V>(of_columns.first, of_columns.first_lo, i),
                                 sum_at<V>(of_columns.second, of_columns.second_lo, i)};
        const TwoParts<V> rstd{of_var, V{}};
        scatter(dgamma_of<float>(m, sums, rstd), dgamma + i);
        scatter(dbeta_of(sums), dbeta + i);
        const auto k = backward_coefficients<float, V>(m, count, sums, rstd, gather<V>(gamma + i));
        put_values(k.narrow.dy_center, out.dy_center + i);
        put_values(k.narrow.dy_scale, out.dy_scale + i);
        put_values(k.narrow.x_center, out.x_center + i);
        put_values(k.narrow.x_scale, out.x_scale + i);
        put_values(k.narrow.offset, out.offset + i);
        rare.add(may_be_wide(k) | (m.count != moments->count));
      });
  return count.is_exact() && !rare.found() && !may_be_tiny(moments, n, eps);
}

}  // namespace
}  // namespace batchnorm::kernels
