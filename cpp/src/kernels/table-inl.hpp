// The table of one ISA, from the passes compiled for it. Include last, after one vec/<isa>.hpp.
#pragma once

#include "kernels/grad_input-inl.hpp"
#include "kernels/grad_sums-inl.hpp"
#include "kernels/moments-inl.hpp"
#include "kernels/normalize-inl.hpp"
#include "kernels/second_grad-inl.hpp"
#include "kernels/weighted-inl.hpp"

namespace batchnorm::kernels {
namespace {

constexpr KernelTable make_table() {
  KernelTable t{};
  t.f32 = {.runs_moments = runs_moments<float, Plain>,
           .rows_moments = rows_moments<float, Plain>,
           .runs_moments_about = runs_moments_about<float, Plain>,
           .rows_moments_about = rows_moments_about<float, Plain>,
           .runs_moments_compensated = runs_moments<float, Compensated>,
           .rows_moments_compensated = rows_moments<float, Compensated>,
           .runs_normalize = runs_normalize<float, Stores::ordinary>,
           .runs_normalize_wide = runs_normalize_wide<float>,
           .rows_normalize = rows_normalize<float>,
           .rows_normalize_mixed = rows_normalize_mixed,
           .runs_normalize_around_cache = runs_normalize<float, Stores::around_cache>,
           .rows_normalize_around_cache = rows_normalize_around_cache<float>,
           .runs_grad_sums = runs_grad_sums<float, Plain>,
           .rows_grad_sums = rows_grad_sums<float, Plain>,
           .runs_grad_input = runs_grad_input<float, Stores::ordinary>,
           .runs_grad_input_wide = runs_grad_input_wide<float>,
           .rows_grad_input = rows_grad_input<float>,
           .rows_grad_input_mixed = rows_grad_input_mixed,
           .runs_grad_input_around_cache = runs_grad_input<float, Stores::around_cache>,
           .rows_grad_input_around_cache = rows_grad_input_around_cache<float>,
           .add_blocks = add_blocks<Plain>,
           .runs_second_grad = runs_second_grad<float>,
           .rows_second_grad = rows_second_grad<float>};
  // float64 has nothing wider to go to.
  t.f64 = {.runs_moments = runs_moments<double, Compensated>,
           .rows_moments = rows_moments<double, Compensated>,
           .runs_moments_about = runs_moments_about<double, Compensated>,
           .rows_moments_about = rows_moments_about<double, Compensated>,
           .runs_moments_compensated = runs_moments<double, Compensated>,
           .rows_moments_compensated = rows_moments<double, Compensated>,
           .runs_normalize = runs_normalize<double, Stores::ordinary>,
           .runs_normalize_wide = runs_normalize_wide<double>,
           .rows_normalize = rows_normalize<double>,
           .rows_normalize_mixed = nullptr,
           .runs_normalize_around_cache = runs_normalize<double, Stores::around_cache>,
           .rows_normalize_around_cache = rows_normalize_around_cache<double>,
           .runs_grad_sums = runs_grad_sums<double, Compensated>,
           .rows_grad_sums = rows_grad_sums<double, Compensated>,
           .runs_grad_input = runs_grad_input<double, Stores::ordinary>,
           .runs_grad_input_wide = runs_grad_input_wide<double>,
           .rows_grad_input = rows_grad_input<double>,
           .rows_grad_input_mixed = nullptr,
           .runs_grad_input_around_cache = runs_grad_input<double, Stores::around_cache>,
           .rows_grad_input_around_cache = rows_grad_input_around_cache<double>,
           .add_blocks = add_blocks<Compensated>,
           .runs_second_grad = runs_second_grad<double>,
           .rows_second_grad = rows_second_grad<double>};
  t.weighted_f32 = make_weighted_kernels<float, Plain>();
  t.weighted_f64 = make_weighted_kernels<double, Compensated>();
  return t;
}

}  // namespace
}  // namespace batchnorm::kernels
