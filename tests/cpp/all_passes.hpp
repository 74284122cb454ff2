// Batches of every kind that the library treats differently, and every pass of the public API over one of them.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <limits>
#include <span>
#include <type_traits>
#include <vector>

#include "batchnorm/batchnorm.hpp"
#include "data.hpp"

namespace all_passes {

using batchnorm::GradSums;
using batchnorm::Moments;
using batchnorm::Options;
using batchnorm::Problem;
using data::Generator;

enum class Kind {
  ordinary,
  huge_mean,   // |mean| is 10^6 times std: summed again about a shift
  cancelling,  // |mean| is far below std, or 0: summed again compensated, or exactly
  wide,        // channels near the ends of the range of T, beside ordinary ones: applied in float64
  constant,
  not_finite,  // a NaN in one channel, an infinity in another
};
constexpr Kind kKinds[] = {Kind::ordinary, Kind::huge_mean, Kind::cancelling,
                           Kind::wide,     Kind::constant,  Kind::not_finite};
constexpr const char* kKindNames[] = {"ordinary", "huge mean", "cancelling", "wide", "constant", "not finite"};

template <class T>
struct Batch {
  Problem problem;
  std::vector<T> x, dy;
  std::vector<double> gamma, beta, mean, var;
};

// The j-th value of channel c.
template <class T>
T value(Generator& g, Kind kind, std::int64_t c, std::int64_t j, std::int64_t count, T before) {
  constexpr bool kIsFloat = sizeof(T) == sizeof(float);
  const T v = g.value<T>();
  switch (kind) {
    case Kind::huge_mean:
      return (kIsFloat ? T(0x1p20) : T(0x1p40)) + (c % 3 == 0 ? T(0) : v);
    case Kind::cancelling:
      if (c % 3 == 0) return v;
      if (j == count - 1) return c % 3 == 1 ? T(0) : T(0x1p-30);
      return j % 2 == 0 ? v : -before;
    case Kind::wide:
      if (c % 3 == 0) return v;
      return c % 3 == 1 ? v * (kIsFloat ? T(0x1p123) : T(0x1p450)) : v * (kIsFloat ? T(0x1p-140) : T(0x1p-400));
    case Kind::constant:
      return T(c) + T(0.1);
    case Kind::not_finite:
      if (c % 4 == 1 && j == count / 2) return std::numeric_limits<T>::quiet_NaN();
      if (c % 4 == 2 && j == count - 1) return std::numeric_limits<T>::infinity();
      return v;
    default:
      return v + T(0.5);
  }
}

// Keeps the huge mean finite in float16; a power of two.
template <class T>
constexpr float kScale = 1;
template <>
inline constexpr float kScale<batchnorm::Float16> = 0x1p-6f;

template <class T>
Batch<T> make_batch(const Problem& p, Kind kind, std::uint64_t seed = 1) {
  Generator g(seed);
  Batch<T> b{p, {}, data::values<T>(g, p.size()), {}, {}, {}, {}};
  b.x.resize(static_cast<std::size_t>(p.size()));
  using Wide = std::conditional_t<sizeof(T) == sizeof(double), double, float>;
  for (std::int64_t c = 0; c < p.channels; ++c) {
    Wide before = 0;
    for (std::int64_t o = 0; o < p.outer; ++o) {
      for (std::int64_t i = 0; i < p.inner; ++i) {
        before = value<Wide>(g, kind, c, o * p.inner + i, p.count(), before);
        b.x.data()[(o * p.channels + c) * p.inner + i] = static_cast<T>(before * Wide{kScale<T>});
      }
    }
    b.gamma.push_back(g.value<double>());
    b.beta.push_back(g.value<double>());
    b.mean.push_back(kind == Kind::huge_mean ? 0x1p20 + g.value<double>() : g.value<double>());
    b.var.push_back(1 + static_cast<double>(g.below(1000)) / 7);
  }
  return b;
}

template <class T>
struct Results {
  std::vector<Moments> moments, saved;
  std::vector<T> y, y_from_moments, y_given;
  std::vector<GradSums> sums;
  std::vector<T> dx, dx_from_sums, dx_frozen;
  std::vector<double> dgamma, dbeta, dgamma_frozen, dbeta_frozen, running_mean, running_var;
  std::vector<T> y_dot, ddy, dx_second, y_dot_frozen, ddy_frozen, dx_second_frozen;
  std::vector<double> dgamma_second, dgamma_second_frozen;
};

// The passes of training, or the derivatives too, which take as long once more.
enum class Order { first, second };

// Room for the results of every pass.
template <class T>
Results<T> room_for(const Batch<T>& b) {
  const auto n = b.x.size(), channels = b.gamma.size();
  return {std::vector<Moments>(channels),
          std::vector<Moments>(channels),
          std::vector<T>(n),
          std::vector<T>(n),
          std::vector<T>(n),
          std::vector<GradSums>(channels),
          std::vector<T>(n),
          std::vector<T>(n),
          std::vector<T>(n),
          std::vector<double>(channels),
          std::vector<double>(channels),
          std::vector<double>(channels),
          std::vector<double>(channels),
          b.mean,
          b.var,
          std::vector<T>(n),
          std::vector<T>(n),
          std::vector<T>(n),
          std::vector<T>(n),
          std::vector<T>(n),
          std::vector<T>(n),
          std::vector<double>(channels),
          std::vector<double>(channels)};
}

// Makes sure that no result of an earlier run stands for one that a later run fails to write.
template <class T>
void forget(Results<T>& r) {
  const auto clear = [](auto&... values) {
    (std::fill(values.begin(), values.end(), std::remove_reference_t<decltype(values[0])>{}), ...);
  };
  clear(r.moments, r.saved, r.y, r.y_from_moments, r.y_given, r.sums, r.dx, r.dx_from_sums, r.dx_frozen, r.dgamma,
        r.dbeta, r.dgamma_frozen, r.dbeta_frozen, r.y_dot, r.ddy, r.dx_second, r.y_dot_frozen, r.ddy_frozen,
        r.dx_second_frozen, r.dgamma_second, r.dgamma_second_frozen);
}

// Every pass over the batch, into room that was made for it. Does no arithmetic of its own, so that it may run in any
// floating-point environment.
template <class T>
void run_into(Results<T>& r, const Batch<T>& b, const Options& options, double eps = 1e-5,
              Order order = Order::second) {
  const std::span<const T> x(b.x), dy(b.dy);
  const std::span<const double> gamma(b.gamma), beta(b.beta), mean(b.mean), var(b.var);
  const Problem& p = b.problem;
  batchnorm::moments<T>(x, p, r.moments, options);
  batchnorm::batch_norm<T>(x, p, gamma, beta, eps, r.y, r.saved, options);
  batchnorm::normalize<T>(x, p, std::span<const Moments>(r.moments), gamma, beta, eps, r.y_from_moments, options);
  batchnorm::normalize<T>(x, p, mean, var, gamma, beta, eps, r.y_given, options);
  batchnorm::grad_sums<T>(dy, x, p, r.saved, r.sums, options);
  batchnorm::grad_input<T>(dy, x, p, r.saved, r.sums, gamma, eps, r.dx_from_sums, options);
  batchnorm::batch_norm_backward<T>(dy, x, p, r.saved, gamma, eps, r.dx, std::span(r.dgamma), std::span(r.dbeta),
                                    options);
  batchnorm::normalize_backward<T>(dy, x, p, mean, var, gamma, eps, r.dx_frozen, std::span(r.dgamma_frozen),
                                   std::span(r.dbeta_frozen), options);
  r.running_mean = b.mean;
  r.running_var = b.var;
  batchnorm::update_running(r.running_mean, r.running_var, r.saved, 0.1, 1);
  if (order == Order::first) return;
  const std::span<const T> v(r.dx);  // any values that are not dy
  const batchnorm::Call<T> call{.problem = p, .gamma = gamma, .eps = eps};
  batchnorm::batch_norm_jvp<T>(v, x, call, r.saved, beta, mean, r.y_dot, options);
  batchnorm::batch_norm_double_backward<T>(v, dy, x, call, r.saved, beta, mean, r.ddy, r.dx_second,
                                           std::span(r.dgamma_second), options);
  batchnorm::normalize_jvp<T>(v, x, call, mean, var, beta, var, beta, mean, r.y_dot_frozen, options);
  batchnorm::normalize_double_backward<T>(v, dy, x, call, mean, var, beta, mean, r.ddy_frozen, r.dx_second_frozen,
                                          std::span(r.dgamma_second_frozen), options);
}
template <class T>
Results<T> run(const Batch<T>& b, const Options& options, double eps = 1e-5, Order order = Order::second) {
  Results<T> r = room_for(b);
  run_into(r, b, options, eps, order);
  return r;
}

// ---- bits ------------------------------------------------------------------------------------------------------

using Bits = std::vector<std::uint64_t>;

template <class T>
void append(Bits& out, const T* values, std::size_t count) {
  out.resize(out.size() + count);
  std::uint64_t* to = out.data() + out.size() - count;
  for (std::size_t e = 0; e < count; ++e) to[e] = data::bits(values[e]);
}
template <class T>
void append(Bits& out, const std::vector<T>& values) {
  append(out, values.data(), values.size());
}
inline void append(Bits& out, const std::vector<Moments>& values) {
  for (const Moments& m : values) append(out, std::array{m.count, m.mean, m.mean_lo, m.m2, m.m2_lo}.data(), 5);
}
inline void append(Bits& out, const std::vector<GradSums>& values) {
  for (const GradSums& s : values) {
    append(out, std::array{s.sum_dy, s.sum_dy_lo, s.sum_dy_xmu, s.sum_dy_xmu_lo}.data(), 4);
  }
}

template <class... Values>
Bits bits_of(const Values&... values) {
  Bits out;
  (append(out, values), ...);
  return out;
}
template <class T>
Bits bits_of(const Results<T>& r) {
  return bits_of(r.moments, r.saved, r.y, r.y_from_moments, r.y_given, r.sums, r.dx, r.dx_from_sums, r.dx_frozen,
                 r.dgamma, r.dbeta, r.dgamma_frozen, r.dbeta_frozen, r.running_mean, r.running_var, r.y_dot, r.ddy,
                 r.dx_second, r.y_dot_frozen, r.ddy_frozen, r.dx_second_frozen, r.dgamma_second,
                 r.dgamma_second_frozen);
}

}  // namespace all_passes
