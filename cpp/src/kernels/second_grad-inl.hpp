// dx of double backward: (v - v_center)*v_scale + (dy - dy_center)*dy_scale + (x - x_center)*x_scale + offset, in
// float64.
#pragma once

#include "kernels/apply-inl.hpp"

namespace batchnorm::kernels {
namespace {

template <class T>
struct SecondGradMap {
  Lanes<double> v_center, v_scale, dy_center, dy_scale, x_center, x_scale, offset;

  BN_INLINE Lanes<double> operator()(const T* v, const T* dy, const T* x, std::int64_t n) const {
    return (load_upto<double>(v, n, T(0)) - v_center) * v_scale +
           (load_upto<double>(dy, n, T(0)) - dy_center) * dy_scale +
           (load_upto<double>(x, n, T(0)) - x_center) * x_scale + offset;
  }
};

template <class T>
BN_INLINE SecondGradMap<T> second_grad_map(const SecondAffine& k) {
  return {broadcast(k.v_center), broadcast(k.v_scale), broadcast(k.dy_center), broadcast(k.dy_scale),
          broadcast(k.x_center), broadcast(k.x_scale), broadcast(k.offset)};
}

template <class T>
BN_INLINE SecondGradMap<T> second_grad_map(const SecondAffineColumns& k, std::int64_t c, std::int64_t n) {
  return {load_upto<double>(k.v_center + c, n, 0.0),  load_upto<double>(k.v_scale + c, n, 0.0),
          load_upto<double>(k.dy_center + c, n, 0.0), load_upto<double>(k.dy_scale + c, n, 0.0),
          load_upto<double>(k.x_center + c, n, 0.0),  load_upto<double>(k.x_scale + c, n, 0.0),
          load_upto<double>(k.offset + c, n, 0.0)};
}

template <class T>
BN_INLINE SecondGradMap<T> join(std::int64_t n, const SecondGradMap<T>& a, const SecondGradMap<T>& b) {
  return {join(n, a.v_center, b.v_center), join(n, a.v_scale, b.v_scale),   join(n, a.dy_center, b.dy_center),
          join(n, a.dy_scale, b.dy_scale), join(n, a.x_center, b.x_center), join(n, a.x_scale, b.x_scale),
          join(n, a.offset, b.offset)};
}

template <class T>
void runs_second_grad(const T* v, const T* dy, const T* x, T* dx, Runs runs, const SecondAffine* k) {
  apply_runs<Stores::ordinary>([k](std::int64_t c) { return second_grad_map<T>(k[c]); }, runs, dx, v, dy, x);
}

template <class T>
void rows_second_grad(const T* v, const T* dy, const T* x, T* dx, Rows rows, const SecondAffineColumns& k) {
  apply_rows([&k](std::int64_t c, std::int64_t n) { return second_grad_map<T>(k, c, n); }, rows, dx, v, dy, x);
}

}  // namespace
}  // namespace batchnorm::kernels
