// dx of double backward: (v - v_center)*v_scale + (dy - dy_center)*dy_scale + (x - x_center)*x_scale + offset, in
// float64.
#pragma once

#include "kernels/apply-inl.hpp"

namespace batchnorm::kernels {
namespace {

struct SecondGradMap {
  Lanes<double> v_center, v_scale, dy_center, dy_scale, x_center, x_scale, offset;

  BN_INLINE Lanes<double> operator()(const double* v, const double* dy, const double* x, std::int64_t n) const {
    return (load_upto<double>(v, n, 0.0) - v_center) * v_scale +
           (load_upto<double>(dy, n, 0.0) - dy_center) * dy_scale +
           (load_upto<double>(x, n, 0.0) - x_center) * x_scale + offset;
  }
};

BN_INLINE SecondGradMap second_grad_map(const SecondAffine& k) {
  return {broadcast(k.v_center), broadcast(k.v_scale), broadcast(k.dy_center), broadcast(k.dy_scale),
          broadcast(k.x_center), broadcast(k.x_scale), broadcast(k.offset)};
}

BN_INLINE SecondGradMap second_grad_map(const SecondAffineColumns& k, std::int64_t c, std::int64_t n) {
  return {load_upto<double>(k.v_center + c, n, 0.0),  load_upto<double>(k.v_scale + c, n, 0.0),
          load_upto<double>(k.dy_center + c, n, 0.0), load_upto<double>(k.dy_scale + c, n, 0.0),
          load_upto<double>(k.x_center + c, n, 0.0),  load_upto<double>(k.x_scale + c, n, 0.0),
          load_upto<double>(k.offset + c, n, 0.0)};
}

BN_INLINE SecondGradMap join(std::int64_t n, const SecondGradMap& a, const SecondGradMap& b) {
  return {join(n, a.v_center, b.v_center), join(n, a.v_scale, b.v_scale),   join(n, a.dy_center, b.dy_center),
          join(n, a.dy_scale, b.dy_scale), join(n, a.x_center, b.x_center), join(n, a.x_scale, b.x_scale),
          join(n, a.offset, b.offset)};
}

[[maybe_unused]] void runs_second_grad(const double* v, const double* dy, const double* x, double* dx, Runs runs,
                                       const SecondAffine* k) {
  for (std::int64_t r = 0, at = 0; r < runs.count; ++r, at += runs.stride) {
    apply_stretch<Stores::ordinary>([k](std::int64_t c) { return second_grad_map(k[c]); }, runs, dx + at, v + at,
                                    dy + at, x + at);
  }
}

[[maybe_unused]] void rows_second_grad(const double* v, const double* dy, const double* x, double* dx, Rows rows,
                                       const SecondAffineColumns& k) {
  apply_rows_by_columns([&k](std::int64_t c, std::int64_t n) { return second_grad_map(k, c, n); }, rows, dx, v, dy, x);
}

}  // namespace
}  // namespace batchnorm::kernels
