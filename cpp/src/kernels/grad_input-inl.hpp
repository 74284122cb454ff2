// Pass 2 of backward: dx = (dy - dy_center)*dy_scale + (x - x_center)*x_scale + offset.
#pragma once

#include "kernels/apply-inl.hpp"

namespace batchnorm::kernels {
namespace {

template <class T, class A>
struct GradInputMap {
  Lanes<A> dy_center, dy_scale, x_center, x_scale, offset;

  BN_INLINE Lanes<A> operator()(const T* dy, const T* x, std::int64_t n) const {
    return (load_upto<A>(dy, n, T(0)) - dy_center) * dy_scale + (load_upto<A>(x, n, T(0)) - x_center) * x_scale +
           offset;
  }
};

template <class T, class A>
BN_INLINE GradInputMap<T, A> grad_input_map(const GradAffineColumns<A>& k, std::int64_t c, std::int64_t n) {
  return {load_upto<A>(k.dy_center + c, n, A(0)), load_upto<A>(k.dy_scale + c, n, A(0)),
          load_upto<A>(k.x_center + c, n, A(0)), load_upto<A>(k.x_scale + c, n, A(0)),
          load_upto<A>(k.offset + c, n, A(0))};
}

template <class T, class A>
void runs_grad_input(const T* dy, const T* x, T* dx, Runs runs, const GradAffine<A>& k) {
  const GradInputMap<T, A> map{broadcast(k.dy_center), broadcast(k.dy_scale), broadcast(k.x_center),
                               broadcast(k.x_scale), broadcast(k.offset)};
  apply_runs(map, runs, dx, dy, x);
}

template <class T>
void runs_grad_input_around_cache(const T* dy, const T* x, T* dx, Runs runs, const GradAffine<T>& k) {
  const GradInputMap<T, T> map{broadcast(k.dy_center), broadcast(k.dy_scale), broadcast(k.x_center),
                               broadcast(k.x_scale), broadcast(k.offset)};
  apply_runs_around_cache(map, runs, dx, dy, x);
}

template <class T>
void rows_grad_input_around_cache(const T* dy, const T* x, T* dx, Rows rows, const GradAffineColumns<T>& k) {
  apply_rows_around_cache([&k](std::int64_t c, std::int64_t n) { return grad_input_map<T>(k, c, n); }, rows, dx, dy, x);
}

template <class T>
void rows_grad_input(const T* dy, const T* x, T* dx, Rows rows, const GradAffineColumns<T>& k) {
  apply_rows([&k](std::int64_t c, std::int64_t n) { return grad_input_map<T>(k, c, n); }, rows, dx, dy, x);
}

void rows_grad_input_mixed(const float* dy, const float* x, float* dx, Rows rows, const GradAffineColumns<float>& k,
                           const WideColumns<GradAffineColumns<double>>& wide) {
  const auto make = [&k, &wide](std::int64_t c, std::int64_t n) {
    return Mixed<GradInputMap<float, float>, GradInputMap<float, double>>{
        grad_input_map<float>(k, c, n), grad_input_map<float>(wide.coefficients, c, n), wide.mask[c / kLanes]};
  };
  apply_rows(make, rows, dx, dy, x);
}

}  // namespace
}  // namespace batchnorm::kernels
