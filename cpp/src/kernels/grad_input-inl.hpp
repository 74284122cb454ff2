// Pass 2 of backward: dx = (dy - dy_center)*dy_scale + (x - x_center)*x_scale + offset.
#pragma once

#include "kernels/apply-inl.hpp"

namespace batchnorm::kernels {
namespace {

template <class T, class A>
struct GradInputMap {
  Lanes<A> dy_center, dy_scale, x_center, x_scale, offset;

  BN_INLINE Lanes<A> operator()(const T* dy, const T* x, std::int64_t n) const {
    return of(load_upto<A>(dy, n, T(0)), x, n);
  }
  BN_INLINE Lanes<A> of(const Lanes<A>& dy, const T* x, std::int64_t n) const {
    return (dy - dy_center) * dy_scale + (load_upto<A>(x, n, T(0)) - x_center) * x_scale + offset;
  }
  BN_INLINE Lanes<A> of(const Lanes<A>& dy) const { return (dy - dy_center) * dy_scale + offset; }
};

template <class T, class A>
BN_INLINE GradInputMap<T, A> grad_input_map(const GradAffineColumns<A>& k, std::int64_t c, std::int64_t n) {
  return {load_upto<A>(k.dy_center + c, n, A(0)), load_upto<A>(k.dy_scale + c, n, A(0)),
          load_upto<A>(k.x_center + c, n, A(0)), load_upto<A>(k.x_scale + c, n, A(0)),
          load_upto<A>(k.offset + c, n, A(0))};
}

template <class T, class A>
BN_INLINE GradInputMap<T, A> grad_input_map(const GradAffine<A>& k) {
  return {broadcast(k.dy_center), broadcast(k.dy_scale), broadcast(k.x_center), broadcast(k.x_scale),
          broadcast(k.offset)};
}

template <class T, class A>
BN_INLINE GradInputMap<T, A> join(std::int64_t n, const GradInputMap<T, A>& a, const GradInputMap<T, A>& b) {
  return {join(n, a.dy_center, b.dy_center), join(n, a.dy_scale, b.dy_scale), join(n, a.x_center, b.x_center),
          join(n, a.x_scale, b.x_scale), join(n, a.offset, b.offset)};
}

template <class T, Stores kStores>
void runs_grad_input(const T* dy, const T* x, T* dx, Runs runs, const GradAffine<Arithmetic<T>>* k) {
  apply_runs<kStores>([k](std::int64_t c) { return grad_input_map<T>(k[c]); }, runs, dx, dy, x);
}

template <class T>
void runs_grad_input_wide(const T* dy, const T* x, T* dx, Runs runs, const GradAffine<double>& k) {
  apply_runs<Stores::ordinary>([&k](std::int64_t) { return grad_input_map<T>(k); }, runs, dx, dy, x);
}

template <class T>
void rows_grad_input_around_cache(const T* dy, const T* x, T* dx, Rows rows,
                                  const GradAffineColumns<Arithmetic<T>>& k) {
  apply_rows_in_line<Stores::around_cache>([&k](std::int64_t c, std::int64_t n) { return grad_input_map<T>(k, c, n); },
                                           rows, dx, dy, x);
}

template <class T>
void rows_grad_input(const T* dy, const T* x, T* dx, Rows rows, const GradAffineColumns<Arithmetic<T>>& k) {
  apply_rows([&k](std::int64_t c, std::int64_t n) { return grad_input_map<T>(k, c, n); }, rows, dx, dy, x);
}

template <class T>
void rows_grad_input_mixed(const T* dy, const T* x, T* dx, Rows rows, const GradAffineColumns<float>& k,
                           const WideColumns<GradAffineColumns<double>>& wide) {
  const auto make = [&k, &wide](std::int64_t c, std::int64_t n) {
    return Mixed<GradInputMap<T, float>, GradInputMap<T, double>>{
        grad_input_map<T>(k, c, n), grad_input_map<T>(wide.coefficients, c, n), wide.mask[c / kLanes]};
  };
  apply_rows(make, rows, dx, dy, x);
}

}  // namespace
}  // namespace batchnorm::kernels
