// The kernel contract: what one instruction set must give. dispatch.cpp lists the tables.
//
// A kernel does one pass over one piece of a tensor and decides nothing: pieces, threads and order are the plan's.
// Kernels do not allocate, throw, check or start threads; they touch no byte outside the piece; pointers need
// alignof(T) only. There are two shapes of a piece:
//   runs  (planar)       a few neighbouring channels: `count` stretches of memory, `stride` values apart, each of one
//                        run of `length` values per channel, side by side; arguments have one entry per channel;
//   rows  (interleaved)  many channels: `count` rows of `columns` contiguous values, `stride` values apart; arguments
//                        are arrays with one entry per column.
//
// A tensor's storage type T may be narrower than Arithmetic<T>, in which its elements are computed (float16, bfloat16
// in float32): lanes are widened as they are loaded, which is exact, and rounded once, to nearest even, as they are
// stored.
//
// Same bits on every instruction set, because all of this is part of the contract:
// - Sums are taken on 16 virtual lanes: value j of a run goes to lane j % 16, lanes live on from run to run, and fold
//   at the end as (l, l+8), (l, l+4), (l, l+2), (l, l+1). A column of a row has a single lane, rows in order.
// - "plain" sums are float64 additions; "compensated" ones add with the error of each addition (Knuth's TwoSum) and of
//   each product kept in a low part.
// - Multiplications and additions are separate, each rounded, except where a product is exact (float*float in
//   float64), when a fused one is the same.
//
// Room kept for a merge over ranks: it happens between the passes, where no kernel runs (docs/kernels.md).
#pragma once

#include <cstdint>
#include <type_traits>

#include "arithmetic.hpp"

namespace batchnorm::kernels {

// Lanes of the kernels: rows whose columns are a multiple of it leave none empty.
constexpr std::int64_t kVectorColumns = 16;

// Sums of pieces are added up in bundles of so many (sums.hpp).
constexpr std::int64_t kBundle = 16;

// A cache line. Stores around the caches write whole ones.
constexpr std::int64_t kStreamBytes = 64;

// Channels of a piece that is summed: their lanes stay on the kernel's stack (up to 640 bytes a channel) from stretch
// to stretch. Pieces that are only applied may have any number.
constexpr std::int64_t kMostChannels = 64;

// A piece of a planar tensor. With more than one channel, `length` is at least kVectorColumns. `ahead`, for kernels
// that store: how many values further on to fetch into the second-level cache meanwhile. Where they store around the
// caches that is of the inputs, so that memory is read while it is written; else of the output, whose lines are wanted
// before they are stored to. 0 for none. Any address will do: fetching never faults.
struct Runs {
  std::int64_t length, count, stride, channels = 1, ahead = 0;
};

// A block of rows of an interleaved tensor. `ahead`: as above, of inputs and output; not where stores go around the
// caches.
struct Rows {
  std::int64_t count, columns, stride, ahead = 0;
};

// Two sums of one channel, each as high and low part (plain sums have a low part of 0):
// moments: sum(x - shift), sum((x - shift)^2); grad_sums: sum(dy), sum(dy*(x - mean)).
struct Sums {
  double first = 0, first_lo = 0, second = 0, second_lo = 0;
};

// The same for each column of a block. Entries are overwritten, not added to.
struct ColumnSums {
  double *first, *first_lo, *second, *second_lo;
};

// y = (x - center)*scale + offset, in the arithmetic type A. Subtracting first is what keeps the digits of x where
// its mean is large; what center leaves of the mean is in offset.
template <class A>
struct Affine {
  A center, scale, offset;
};

// dx = (dy - dy_center)*dy_scale + (x - x_center)*x_scale + offset, summed from left to right.
template <class A>
struct GradAffine {
  A dy_center, dy_scale, x_center, x_scale, offset;
};

// One entry per column; the same fields.
template <class A>
struct AffineColumns {
  const A *center, *scale, *offset;
};
template <class A>
struct GradAffineColumns {
  const A *dy_center, *dy_scale, *x_center, *x_scale, *offset;
};

// dx of double backward = (v - v_center)*v_scale + (dy - dy_center)*dy_scale + (x - x_center)*x_scale + offset, summed
// from left to right, in float64 whatever the tensors are: three products that may cancel, rounded to T once.
struct SecondAffine {
  double v_center, v_scale, dy_center, dy_scale, x_center, x_scale, offset;
};
struct SecondAffineColumns {
  const double *v_center, *v_scale, *dy_center, *dy_scale, *x_center, *x_scale, *offset;
};

// Columns whose coefficients leave float32's normal range, to be applied in float64: bit l of mask[k] stands for
// column 16*k + l.
template <class Columns>
struct WideColumns {
  const std::uint16_t* mask;
  Columns coefficients;
};

template <class T>
struct Kernels {
  // moments. float and narrower: plain, about 0. double: compensated, about 0. Sums: one entry per channel.
  void (*runs_moments)(const T* x, Runs, Sums*);
  void (*rows_moments)(const T* x, Rows, const ColumnSums&);
  // About a shift, which is a value of T: no cancellation where |mean| is far above std. float: plain. double:
  // compensated. Runs: of one channel.
  void (*runs_moments_about)(const T* x, Runs, Arithmetic<T> shift, Sums*);
  void (*rows_moments_about)(const T* x, Rows, const Arithmetic<T>* shift, const ColumnSums&);
  // Compensated, about 0: keeps the digits of a mean far below std.
  void (*runs_moments_compensated)(const T* x, Runs, Sums*);
  void (*rows_moments_compensated)(const T* x, Rows, const ColumnSums&);

  // normalize. y may be exactly x. The wide form reads and writes T and computes in float64; runs of one channel.
  void (*runs_normalize)(const T* x, T* y, Runs, const Affine<Arithmetic<T>>*);
  void (*runs_normalize_wide)(const T* x, T* y, Runs, const Affine<double>&);
  void (*rows_normalize)(const T* x, T* y, Rows, const AffineColumns<Arithmetic<T>>&);
  void (*rows_normalize_mixed)(const T* x, T* y, Rows, const AffineColumns<Arithmetic<T>>&,
                               const WideColumns<AffineColumns<double>>&);

  // The same with stores that go around the caches, for outputs too large to be read from there. y must not be x. Rows:
  // side by side (stride == columns), of kVectorColumns columns at least, with kVectorColumns more coefficients behind
  // those of the last column, which repeat the first.
  void (*runs_normalize_around_cache)(const T* x, T* y, Runs, const Affine<Arithmetic<T>>*);
  void (*rows_normalize_around_cache)(const T* x, T* y, Rows, const AffineColumns<Arithmetic<T>>&);

  // grad_sums. float: plain. double: compensated.
  void (*runs_grad_sums)(const T* dy, const T* x, Runs, const double* mean, Sums*);
  void (*rows_grad_sums)(const T* dy, const T* x, Rows, const double* mean, const ColumnSums&);

  // grad_input. dx may be exactly dy or exactly x; not where it is stored around the caches.
  void (*runs_grad_input)(const T* dy, const T* x, T* dx, Runs, const GradAffine<Arithmetic<T>>*);
  void (*runs_grad_input_wide)(const T* dy, const T* x, T* dx, Runs, const GradAffine<double>&);
  void (*rows_grad_input)(const T* dy, const T* x, T* dx, Rows, const GradAffineColumns<Arithmetic<T>>&);
  void (*rows_grad_input_mixed)(const T* dy, const T* x, T* dx, Rows, const GradAffineColumns<Arithmetic<T>>&,
                                const WideColumns<GradAffineColumns<double>>&);
  void (*runs_grad_input_around_cache)(const T* dy, const T* x, T* dx, Runs, const GradAffine<Arithmetic<T>>*);
  void (*rows_grad_input_around_cache)(const T* dy, const T* x, T* dx, Rows, const GradAffineColumns<Arithmetic<T>>&);

  // The sums of `count` blocks of rows added up in bundles of kBundle: the blocks of a bundle, then the bundles, first
  // to last, with the error of each addition in the low part. Of `columns` columns of each; the arrays of a block lie
  // `stride` values behind those of the one before. The low parts of blocks are read for double alone.
  void (*add_blocks)(const ColumnSums& first, std::int64_t count, std::int64_t stride, std::int64_t columns,
                     const ColumnSums& total);

  // second_grad: dx of double backward, which may be exactly v, dy or x.
  void (*runs_second_grad)(const T* v, const T* dy, const T* x, T* dx, Runs, const SecondAffine*);
  void (*rows_second_grad)(const T* v, const T* dy, const T* x, T* dx, Rows, const SecondAffineColumns&);
};

// ---- weights ----
//
// One weight >= 0 per position, the same for all channels. Where it is 0, no input is looked at: it may hold anything.

// What weights are given as, for tensors of T.
template <class T>
using WeightOf = Arithmetic<T>;

// Of a piece of a planar tensor: those of the runs k begin at values + k*stride, for each of its channels. is_mask: all
// are known to be 0 or 1.
template <class W>
struct RunWeights {
  const W* values;
  std::int64_t stride;
  bool is_mask = false;
};
// Of a block of rows, each of which is `repeat` rows of the tensor side by side: the weights of row r begin at
// values + r*repeat*inner; column e of it, counted from `first_column` on, has that of row e / (channels*inner) of the
// tensor and of place e % inner. Where repeat is above 1, first_column is 0, channels are two at least, a row has at
// most kMostWeightedColumns, and the columns of each row of the tensor have the same coefficients.
template <class W>
struct RowWeights {
  const W* values;
  std::int64_t channels, inner, repeat, first_column;
  bool is_mask = false;
};
constexpr std::int64_t kMostWeightedColumns = 1024;

// How many weights are 0, 1, and neither negative, infinite nor NaN, of fewer than 2^31; and their sum, as high and low
// part.
struct WeightCounts {
  std::int64_t zeros, ones, good;
  double total, total_lo;
};

// What an output is where the weight is 0: 0; the input (x of normalize, dy of grad_input); or what the formula gives
// for that weight (grad_input: dy*dy_scale).
enum class AtPadding { zero, input, formula };

// With weights w, the sums are of w*(x - shift) and w*(x - shift)^2. The functions for masks take weights that are 0 or
// 1 and give the same bits sooner. grad_sums take every weight but 0 for 1: a weight counts in the statistics, and what
// it does to the gradient is in grad_input:
//     dx = (dy - w*dy_center)*dy_scale + w*((x - x_center)*x_scale) + w*offset.
// normalize and grad_input with weights of 1 give the bits of those without.
// Rows around the caches: rows side by side of kVectorColumns columns at least, with inner and repeat of 1.
template <class T>
struct WeightedKernels {
  using W = WeightOf<T>;
  using A = Arithmetic<T>;
  struct Moments {
    void (*runs)(const T* x, const RunWeights<W>&, Runs, Sums*);
    void (*rows)(const T* x, const RowWeights<W>&, Rows, const ColumnSums&);
    void (*runs_about)(const T* x, const RunWeights<W>&, Runs, A shift, Sums*);
    void (*rows_about)(const T* x, const RowWeights<W>&, Rows, const A* shift, const ColumnSums&);
    void (*runs_compensated)(const T* x, const RunWeights<W>&, Runs, Sums*);
    void (*rows_compensated)(const T* x, const RowWeights<W>&, Rows, const ColumnSums&);
  };
  Moments masked, weighted;

  WeightCounts (*count)(const W*, std::int64_t n);

  void (*runs_normalize)(const T* x, T* y, const RunWeights<W>&, AtPadding, Runs, const Affine<A>*);
  void (*runs_normalize_around_cache)(const T* x, T* y, const RunWeights<W>&, AtPadding, Runs, const Affine<A>*);
  void (*runs_normalize_wide)(const T* x, T* y, const RunWeights<W>&, AtPadding, Runs, const Affine<double>&);
  void (*rows_normalize)(const T* x, T* y, const RowWeights<W>&, AtPadding, Rows, const AffineColumns<A>&);
  void (*rows_normalize_around_cache)(const T* x, T* y, const RowWeights<W>&, AtPadding, Rows, const AffineColumns<A>&);
  void (*rows_normalize_mixed)(const T* x, T* y, const RowWeights<W>&, AtPadding, Rows, const AffineColumns<A>&,
                               const WideColumns<AffineColumns<double>>&);

  void (*runs_grad_sums)(const T* dy, const T* x, const RunWeights<W>&, Runs, const double* mean, Sums*);
  void (*rows_grad_sums)(const T* dy, const T* x, const RowWeights<W>&, Rows, const double* mean, const ColumnSums&);

  void (*runs_grad_input)(const T* dy, const T* x, T* dx, const RunWeights<W>&, AtPadding, Runs, const GradAffine<A>*);
  void (*runs_grad_input_around_cache)(const T* dy, const T* x, T* dx, const RunWeights<W>&, AtPadding, Runs,
                                       const GradAffine<A>*);
  void (*runs_grad_input_wide)(const T* dy, const T* x, T* dx, const RunWeights<W>&, AtPadding, Runs,
                               const GradAffine<double>&);
  void (*rows_grad_input)(const T* dy, const T* x, T* dx, const RowWeights<W>&, AtPadding, Rows,
                          const GradAffineColumns<A>&);
  void (*rows_grad_input_around_cache)(const T* dy, const T* x, T* dx, const RowWeights<W>&, AtPadding, Rows,
                                       const GradAffineColumns<A>&);
  void (*rows_grad_input_mixed)(const T* dy, const T* x, T* dx, const RowWeights<W>&, AtPadding, Rows,
                                const GradAffineColumns<A>&, const WideColumns<GradAffineColumns<double>>&);
};

// ---- ReLU ----
//
// y = max(s, 0), where s is what normalize gives, in the arithmetic type and rounded to it, and the residual added. NaN
// and -0 stay. The mask has one bit an element: whether s is above 0 or NaN. The bit of the element at place e
// of the tensor is bit (first_bit + e) % 8 of byte (first_bit + e) / 8.

// What follows normalize. Pieces of a tensor that are worked on at the same time may share a byte of the mask: bits of
// a byte that is not a piece's own alone are set in one step.
template <class T>
struct ReluTail {
  const T* residual;   // like x; null: none
  std::uint8_t* mask;  // null: none
  // For runs, and rows in line: bits of the lines of y, and so of the vectors that begin at them, are whole bytes.
  std::int64_t first_bit;
  std::int64_t at = 0;  // where x and y begin in the tensor
};

// What backward reads, and where the mask lets it through: dy*1, else 0, which is dresidual.
template <class T>
struct ReluInputs {
  const T *dy, *x;           // x null: grad_input without its term
  const std::uint8_t* mask;  // may be read up to 4 bytes behind a bit
  std::int64_t first_bit;
  T* dresidual = nullptr;  // written by grad_input; may be dy or x; null: not wanted
  bool streams = false;    // whether dresidual goes around the caches where dx does: it lies alike in cache lines
  std::int64_t at = 0;     // where the pointers' piece begins in the tensor
};

// The functions are those of Kernels. rows_normalize_in_line walks as rows_normalize_around_cache does, with ordinary
// stores and the same demands: vectors begin at lines of y, which is quicker where rows of the mask are not whole
// bytes.
template <class T>
struct ReluKernels {
  using A = Arithmetic<T>;
  void (*runs_normalize)(const T* x, T* y, const ReluTail<T>&, Runs, const Affine<A>*);
  void (*runs_normalize_around_cache)(const T* x, T* y, const ReluTail<T>&, Runs, const Affine<A>*);
  void (*runs_normalize_wide)(const T* x, T* y, const ReluTail<T>&, Runs, const Affine<double>&);
  void (*rows_normalize)(const T* x, T* y, const ReluTail<T>&, Rows, const AffineColumns<A>&);
  void (*rows_normalize_in_line)(const T* x, T* y, const ReluTail<T>&, Rows, const AffineColumns<A>&);
  void (*rows_normalize_around_cache)(const T* x, T* y, const ReluTail<T>&, Rows, const AffineColumns<A>&);
  void (*rows_normalize_mixed)(const T* x, T* y, const ReluTail<T>&, Rows, const AffineColumns<A>&,
                               const WideColumns<AffineColumns<double>>&);

  void (*runs_grad_sums)(const ReluInputs<T>&, Runs, const double* mean, Sums*);
  void (*rows_grad_sums)(const ReluInputs<T>&, Rows, const double* mean, const ColumnSums&);

  void (*runs_grad_input)(const ReluInputs<T>&, T* dx, Runs, const GradAffine<A>*);
  void (*runs_grad_input_around_cache)(const ReluInputs<T>&, T* dx, Runs, const GradAffine<A>*);
  void (*runs_grad_input_wide)(const ReluInputs<T>&, T* dx, Runs, const GradAffine<double>&);
  void (*rows_grad_input)(const ReluInputs<T>&, T* dx, Rows, const GradAffineColumns<A>&);
  void (*rows_grad_input_around_cache)(const ReluInputs<T>&, T* dx, Rows, const GradAffineColumns<A>&);
  void (*rows_grad_input_mixed)(const ReluInputs<T>&, T* dx, Rows, const GradAffineColumns<A>&,
                                const WideColumns<GradAffineColumns<double>>&);
};

// All that is made for one type of tensors.
template <class T>
struct KernelsOf {
  Kernels<T> plain;
  WeightedKernels<T> weighted;
  ReluKernels<T> relu;
};

struct KernelTable {
  KernelsOf<float> f32;
  KernelsOf<double> f64;
  KernelsOf<Float16> f16;
  KernelsOf<BFloat16> bf16;

  template <class T>
  [[nodiscard]] const KernelsOf<T>& all() const {
    if constexpr (std::is_same_v<T, Float16>) {
      return f16;
    } else if constexpr (std::is_same_v<T, BFloat16>) {
      return bf16;
    } else if constexpr (std::is_same_v<T, float>) {
      return f32;
    } else {
      return f64;
    }
  }
  template <class T>
  [[nodiscard]] const Kernels<T>& of() const {
    return all<T>().plain;
  }
  template <class T>
  [[nodiscard]] const WeightedKernels<T>& weighted() const {
    return all<T>().weighted;
  }
  template <class T>
  [[nodiscard]] const ReluKernels<T>& relu() const {
    return all<T>().relu;
  }
};

// Exactly these symbols leave the per-ISA objects. Which of them are linked in is CMake's choice, told to dispatch.cpp.
extern const KernelTable reference_table, generic_table, x86_64_v2_table, x86_64_v3_table, x86_64_v4_table, neon_table;

}  // namespace batchnorm::kernels
