// The table of one ISA, from the passes compiled for it. Include last, after one vec/<isa>.hpp.
#pragma once

#include "kernels/grad_input-inl.hpp"
#include "kernels/grad_sums-inl.hpp"
#include "kernels/moments-inl.hpp"
#include "kernels/normalize-inl.hpp"
#include "kernels/relu-inl.hpp"
#include "kernels/second_grad-inl.hpp"
#include "kernels/weighted-inl.hpp"

namespace batchnorm::kernels {
namespace {

// Accumulator: what plain sums are taken with.
template <class T, class Accumulator>
constexpr Kernels<T> make_kernels() {
  Kernels<T> k = {.runs_moments = runs_moments<T, Accumulator>,
                  .rows_moments = rows_moments<T, Accumulator>,
                  .runs_moments_about = runs_moments_about<T, Accumulator>,
                  .rows_moments_about = rows_moments_about<T, Accumulator>,
                  .runs_moments_compensated = runs_moments<T, Compensated>,
                  .rows_moments_compensated = rows_moments<T, Compensated>,
                  .runs_normalize = runs_normalize<T, Stores::ordinary>,
                  .runs_normalize_wide = runs_normalize_wide<T>,
                  .rows_normalize = rows_normalize<T>,
                  .rows_normalize_mixed = nullptr,
                  .runs_normalize_around_cache = runs_normalize<T, Stores::around_cache>,
                  .rows_normalize_around_cache = rows_normalize_around_cache<T>,
                  .runs_grad_sums = runs_grad_sums<T, Accumulator>,
                  .rows_grad_sums = rows_grad_sums<T, Accumulator>,
                  .runs_grad_input = runs_grad_input<T, Stores::ordinary>,
                  .runs_grad_input_wide = runs_grad_input_wide<T>,
                  .rows_grad_input = rows_grad_input<T>,
                  .rows_grad_input_mixed = nullptr,
                  .runs_grad_input_around_cache = runs_grad_input<T, Stores::around_cache>,
                  .rows_grad_input_around_cache = rows_grad_input_around_cache<T>,
                  .add_blocks = add_blocks<Accumulator>,
                  .runs_second_grad = runs_second_grad<T>,
                  .rows_second_grad = rows_second_grad<T>};
  if constexpr (sizeof(T) < sizeof(double)) {  // float64 has nothing wider to go to
    k.rows_normalize_mixed = rows_normalize_mixed<T>;
    k.rows_grad_input_mixed = rows_grad_input_mixed<T>;
  }
  return k;
}

template <class T, class Accumulator>
constexpr KernelsOf<T> make_all() {
  return {make_kernels<T, Accumulator>(), make_weighted_kernels<T, Accumulator>(), make_relu_kernels<T, Accumulator>()};
}
constexpr KernelTable make_table() {
  return {.f32 = make_all<float, Plain>(),
          .f64 = make_all<double, Compensated>(),
          .f16 = make_all<Float16, Plain>(),
          .bf16 = make_all<BFloat16, Plain>()};
}

}  // namespace
}  // namespace batchnorm::kernels
