// The table of one ISA, from the passes compiled for it. Include last, after one vec/<isa>.hpp.
#pragma once

#include "kernels/formulas-inl.hpp"
#include "kernels/grad_input-inl.hpp"
#include "kernels/grad_sums-inl.hpp"
#include "kernels/lines-inl.hpp"
#include "kernels/moments-inl.hpp"
#include "kernels/normalize-inl.hpp"
#include "kernels/second_grad-inl.hpp"
#include "kernels/steps-inl.hpp"

namespace batchnorm::kernels {
namespace {

// Accumulator: what sums are taken with.
template <class T, class Accumulator>
constexpr Kernels<T> make_kernels() {
  Kernels<T> k{};
  k.runs_moments = runs_moments<T, Accumulator>;
  k.rows_moments = rows_moments<T, Accumulator>;
  k.runs_normalize = runs_normalize<T>;
  k.rows_normalize = rows_normalize<T>;
  k.runs_grad_sums = runs_grad_sums<T, Accumulator>;
  k.rows_grad_sums = rows_grad_sums<T, Accumulator>;
  k.runs_grad_input = runs_grad_input<T>;
  k.rows_grad_input = rows_grad_input<T>;
  k.add_blocks = add_blocks<Accumulator>;
  if constexpr (kIsSixteen<T>) {
    k.widen = widen<T>;
    k.narrow = narrow<T>;
  } else {
    k.lines_normalize = lines_normalize<T>;
    k.lines_grad_sums = lines_grad_sums<T, Accumulator>;
    k.lines_grad_input = lines_grad_input<T>;
    k.keep_bits = keep_bits<T>;
    k.put_counted = put_counted<T>;
    k.repeat_weights = repeat_weights<T>;
    k.count_weights = count_weights<T>;
  }
  if constexpr (sizeof(T) == sizeof(double)) {
    k.runs_second_grad = runs_second_grad;
    k.rows_second_grad = rows_second_grad;
  }
  return k;
}

constexpr KernelTable make_table() {
  return {.f32 = make_kernels<float, Plain>(),
          .f64 = make_kernels<double, Compensated>(),
          .f16 = make_kernels<Float16, Plain>(),
          .bf16 = make_kernels<BFloat16, Plain>(),
          .formulas = {many_moments, many_normalize, many_grad_input}};
}

}  // namespace
}  // namespace batchnorm::kernels
