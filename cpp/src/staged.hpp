// What no kernel does in one go, in steps on tiles that lie in the first-level cache: weights are laid out as kernels
// take them; positions that do not count keep their input, or are written beside a tail; tensors of 16 bits become
// float32 for all but the plain passes; sums of float32 that need it are compensated as those of float64; channels
// whose coefficients leave float32's range are applied in float64. Each feature is one step here, and they compose:
// what is read, let through, kept, mapped, put.
//
// The bits are those of the same kernels on the whole tensor: values are summed in the order of table.hpp, by chunks
// that a tile holds, and rows continue the sums of those before.
#pragma once

#include "coefficients.hpp"
#include "counted.hpp"
#include "dispatch.hpp"
#include "kernels/table.hpp"

namespace batchnorm {

// x, which is summed, and the positions of it that count.
template <class T>
struct MomentOperands {
  const kernels::KernelTable& table;
  const T* x;
  Positions<T> positions;
};
// How: about a value of T where shift is not null (rows: one per column), and compensated or as T's kernels do.
template <class T>
struct Summing {
  const Arithmetic<T>* shift = nullptr;
  bool compensated = false;
};
// Sums of the planar piece at `offset`, from channel c on; of a part of a block of rows, which begins at `column`.
template <class T>
void sum_moments(const MomentOperands<T>& in, std::int64_t offset, const kernels::Runs& runs, std::int64_t c,
                 const Summing<T>& how, kernels::Sums* out);
template <class T>
void sum_moments(const MomentOperands<T>& in, std::int64_t offset, std::int64_t column, const kernels::Rows& rows,
                 const Summing<T>& how, const kernels::ColumnSums& out);

// y from x, and what follows; at positions that do not count y is what `padding` says.
template <class T>
struct NormalizeOperands {
  const kernels::KernelTable& table;
  const T* x;
  T* y;
  Positions<T> positions;
  Padding padding = Padding::normalize;
  kernels::Tail<T> tail;
  bool around_cache = false;  // whether what is put goes around the caches
};
// With the coefficients of all channels, some of them perhaps in float64.
template <class T>
void normalize_staged(const NormalizeOperands<T>& in, std::int64_t offset, const kernels::Runs& runs, std::int64_t c,
                      const CoefficientTable<Arithmetic<T>, kernels::Affine>& coefficients);
template <class T>
void normalize_staged(const NormalizeOperands<T>& in, std::int64_t offset, const kernels::Rows& rows,
                      const CoefficientTable<Arithmetic<T>, kernels::Affine>& coefficients);

// dy, let through the bits of a ReLU where there are some, and x; dx and dresidual.
template <class T>
struct GradientOperands {
  const kernels::KernelTable& table;
  kernels::GradInputs<T> in;
  T* dx = nullptr;
  Positions<T> positions = {};
  Padding padding = Padding::normalize;
  bool around_cache = false;
  // Forward-mode: dy is the tangent of x, and dx becomes that of y. Then weights are factors in the sums and not in the
  // formula, a residual's tangent is added, and the bits stop what comes out.
  bool forward_mode = false;
  const T* residual_dot = nullptr;

  // Whether dy is summed as the bits of a ReLU let it through, and times its weight.
  [[nodiscard]] bool lets_through() const { return in.bits != nullptr && !forward_mode; }
  [[nodiscard]] bool weighs() const { return positions && forward_mode && !positions.is_mask; }
  // Those that are summed: where padding is normalized too, all depend on the statistics.
  [[nodiscard]] const Positions<T>& summed_positions() const {
    static constexpr Positions<T> kAll{};
    return forward_mode || padding != Padding::normalize ? positions : kAll;
  }
};
template <class T>
void sum_gradients(const GradientOperands<T>& in, std::int64_t offset, const kernels::Runs& runs, std::int64_t c,
                   const double* mean, kernels::Sums* out);
template <class T>
void sum_gradients(const GradientOperands<T>& in, std::int64_t offset, std::int64_t column, const kernels::Rows& rows,
                   const double* mean, const kernels::ColumnSums& out);
template <class T>
void grad_input_staged(const GradientOperands<T>& in, std::int64_t offset, const kernels::Runs& runs, std::int64_t c,
                       const CoefficientTable<Arithmetic<T>, kernels::GradAffine>& coefficients);
template <class T>
void grad_input_staged(const GradientOperands<T>& in, std::int64_t offset, const kernels::Rows& rows,
                       const CoefficientTable<Arithmetic<T>, kernels::GradAffine>& coefficients);

}  // namespace batchnorm
