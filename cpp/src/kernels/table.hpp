// The kernel contract: what one instruction set must give. dispatch.cpp lists the tables.
//
// A kernel does one pass over one piece of a tensor and decides nothing: pieces, threads and order are the plan's.
// Kernels do not allocate, throw, check or start threads; they touch no byte outside the piece; pointers need
// alignof(T) only. There are two shapes of a piece:
//   runs  (planar)       a few neighbouring channels: `count` stretches of memory, `stride` values apart, each of one
//                        run of `length` values per channel, side by side; arguments have one entry per channel;
//   rows  (interleaved)  many channels: `count` rows of `columns` contiguous values, `stride` values apart; arguments
//                        are arrays with one entry per column.
// and for groups along which gamma moves a third, lines.
// What no kernel does in one go is done in steps on tiles that lie in the first-level cache (staged.hpp): tensors of
// float16 and bfloat16 with anything beside the plain passes, positions that do not count beside a tail or that keep
// their input, coefficients in float64.
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
#include "batchnorm/types.hpp"

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

// A piece of a planar tensor. With more than one channel, `length` is at least kVectorColumns. For kernels that store:
// `ahead`: how many values further on to fetch into the second-level cache meanwhile. Where they store around the
// caches that is of the inputs, so that memory is read while it is written; else of the output, whose lines are wanted
// before they are stored to. 0 for none. Any address will do: fetching never faults. `around_cache`: stores go around
// the caches, for outputs too large to be read from there; no output is an input then.
struct Runs {
  std::int64_t length, count, stride, channels = 1, ahead = 0;
  bool around_cache = false;
};

// How rows are walked: some at a time, column after column; or, side by side (stride == columns) and of kVectorColumns
// columns at least, as one piece of memory whose vectors begin at lines of the output, stored as usual or around the
// caches. In line, arrays have kVectorColumns more entries behind those of the last column, which repeat the first.
enum class RowWalk { columns, in_line, around_cache };

// A block of rows of an interleaved tensor. `ahead`: as above, of inputs and output; for the walk by columns.
// `continues`: sums are added to what is there, as if these rows followed those before.
struct Rows {
  std::int64_t count, columns, stride, ahead = 0;
  RowWalk walk = RowWalk::columns;
  bool continues = false;
};

// Lines of memory that share gamma and beta, which move along them: `count` lines of `length` values, `stride` values
// apart, each a group with statistics of its own (layer and RMS norm). `ahead`, `around_cache`: as of runs; then dx
// begins a line of memory alike in all. `continues`: as of rows.
struct Lines {
  std::int64_t count, length, stride, ahead = 0;
  bool around_cache = false, continues = false;
};
// What belongs to a line, one entry each. Low parts are read for double alone.
struct LineStatistics {
  const double *mean, *mean_lo, *rstd, *rstd_lo;
};
struct LineTermsOf {
  const double *x_scale, *shift;
};
// What a line is normalized by, in the type that its values are computed in. double: mean, mean_lo, rstd, rstd_lo.
// float: the nearest to the mean, what that leaves of the mean times rstd, and rstd in two parts.
template <class A>
struct LineScale {
  const A *center, *rest, *rstd, *rstd_lo;
};

// Two sums of one channel, each as high and low part (plain sums have a low part of 0):
// moments: sum(x - shift), sum((x - shift)^2); grad_sums: sum(dy), sum(dy*(x - mean)).
struct Sums {
  double first = 0, first_lo = 0, second = 0, second_lo = 0;
};

// The same for each column of a block. Plain sums leave the low parts alone.
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
// from left to right, in float64 whatever the tensors are: three products that may cancel, rounded to float64.
struct SecondAffine {
  double v_center, v_scale, dy_center, dy_scale, x_center, x_scale, offset;
};
struct SecondAffineColumns {
  const double *v_center, *v_scale, *dy_center, *dy_scale, *x_center, *x_scale, *offset;
};

// Which values of a piece that is summed count, and how much; null: all, alike. Of runs: the `length` weights from
// values + k*length on are those of stretch k, of each channel. Of rows: row r has one for all columns, values[r], or
// with a stride one a column, from values + r*stride on. No input is looked at where the weight is 0.
template <class W>
struct WeightsOf {
  const W* values = nullptr;
  bool is_mask = false;  // all are 0 or 1: without a shift, sums have the bits of those of the values that count
  std::int64_t stride = 0;
};

// How many weights are 0, 1, and neither negative, infinite nor NaN, of fewer than 2^31; their sum, as high and low
// part; and the least of 1 and those above 0.
struct WeightCounts {
  std::int64_t zeros = 0, ones = 0, good = 0;
  double total = 0, total_lo = 0, least = 1;
};

// What weights are given as, for tensors of T.
template <class T>
using WeightOf = Arithmetic<T>;

// The weights of a piece that is written; null: none. Of rows: like x. Of runs: those of one stretch, the same for all
// channels; with more than one, kVectorColumns more, which repeat the first.
template <class W>
struct WeightsAlong {
  const W* values = nullptr;
  bool zeros = false;  // whether what is written is 0 where the weight is
};

// What follows normalize: y = s + residual, or max(that, 0) with a ReLU, where s is what normalize gives in the
// arithmetic type. NaN and -0 stay. The bits of a ReLU: one an element, whether the sum is above 0 or NaN; that of the
// element at place e of the tensor is bit (first_bit + e) % 8 of byte (first_bit + e) / 8. Pieces of a tensor that are
// worked on at the same time may share a byte: bits of a byte that is not a piece's own alone are set in one step.
template <class T>
struct Tail {
  const T* residual = nullptr;  // like x; null: none
  bool relu = false;
  std::uint8_t* bits = nullptr;  // of the ReLU; null: not wanted
  // For runs, and rows in line: bits of the lines of y, and so of the vectors that begin at them, are whole bytes.
  std::int64_t first_bit = 0;
  std::int64_t at = 0;  // where x and y begin in the tensor, and the residual before it by as much
  // WeightsAlong of the pass: y is 0 where they are. Without residual and ReLU; null: y is 0 nowhere.
  const WeightOf<T>* weights = nullptr;

  [[nodiscard]] bool empty() const { return residual == nullptr && !relu; }
};

// What the passes of backward read: dy, x and the bits of a ReLU through which dy is let: dy*1, else 0, which is
// dresidual.
template <class T>
struct GradInputs {
  const T *dy, *x;                     // x null, where there are bits: grad_input without its term
  const std::uint8_t* bits = nullptr;  // null: no ReLU; may be read up to 4 bytes behind a bit
  std::int64_t first_bit = 0;
  T* dresidual = nullptr;  // written by grad_input through bits; may be dy or x; null: not wanted
  bool streams = false;    // whether dresidual goes around the caches where dx does: it lies alike in lines
  std::int64_t at = 0;     // where the pointers' piece begins in the tensor, behind dy, x and dresidual
};

template <class T>
struct Kernels {
  using A = Arithmetic<T>;
  using W = WeightOf<T>;

  // moments. float and narrower: plain. double: compensated. About 0 where shift is null, else about a value of T (for
  // rows one per column): no cancellation where |mean| is far above std. With weights the sums are of w*(x - shift) and
  // of that times (x - shift). Runs with a shift: of one channel.
  void (*runs_moments)(const T* x, const WeightsOf<W>&, Runs, const A* shift, Sums*);
  void (*rows_moments)(const T* x, const WeightsOf<W>&, Rows, const A* shift, const ColumnSums&);

  // normalize, and what follows. y may be exactly x or the residual.
  void (*runs_normalize)(const T* x, T* y, const Tail<T>&, Runs, const Affine<A>*);
  void (*rows_normalize)(const T* x, T* y, const Tail<T>&, Rows, const AffineColumns<A>&);

  // grad_sums. float: plain. double: compensated, of products as they are rounded. Of the values whose weight is not 0;
  // where there are bits of a ReLU, of all.
  void (*runs_grad_sums)(const GradInputs<T>&, const WeightsOf<W>&, Runs, const double* mean, Sums*);
  void (*rows_grad_sums)(const GradInputs<T>&, const WeightsOf<W>&, Rows, const double* mean, const ColumnSums&);

  // grad_input. dx may be exactly dy or exactly x. With weights, and then without a ReLU:
  //     dx = (dy - w*dy_center)*dy_scale + w*((x - x_center)*x_scale) + w*offset
  // which for a weight of 1 has the bits of that without. x is not looked at where the weight is 0.
  void (*runs_grad_input)(const GradInputs<T>&, const WeightsAlong<W>&, T* dx, Runs, const GradAffine<A>*);
  void (*rows_grad_input)(const GradInputs<T>&, const WeightsAlong<W>&, T* dx, Rows, const GradAffineColumns<A>&);

  // The sums of `count` blocks of rows added up in bundles of kBundle: the blocks of a bundle, then the bundles, first
  // to last, with the error of each addition in the low part. Of `columns` columns of each; the arrays of a block lie
  // `stride` values behind those of the one before. The low parts of blocks are read for double alone.
  void (*add_blocks)(const ColumnSums& first, std::int64_t count, std::int64_t stride, std::int64_t columns,
                     const ColumnSums& total);

  // Lines, of float and double alone. gamma and beta are `length` values, behind which kVectorColumns more may be read.
  //     normalize: y = xhat*gamma + beta; y may be exactly x. float: with fma for a fused multiplication and addition
  //                xhat = fma(d, rstd, fma(d, rstd_lo, rest)) of d = x - center, y = fma(xhat, gamma, beta).
  // The rest, and all of double, in float64 and rounded once; of double products and sums keep what they round off.
  //     grad_sums: per line sum(gamma*dy) and sum(gamma*dy*(x - mean)), without mean_lo.
  //     grad_input: dx = dy*rstd*gamma + (x_scale*(x - mean) + shift), which may be exactly dy or x; null: not wanted.
  //                 Per column sum(dy) and sum(dy*rstd*(x - mean)), lines in order.
  void (*lines_normalize)(const T* x, T* y, const Lines&, const LineScale<A>&, const A* gamma, const A* beta);
  void (*lines_grad_sums)(const T* dy, const T* x, const Lines&, const LineStatistics&, const double* gamma, Sums*);
  void (*lines_grad_input)(const T* dy, const T* x, T* dx, const Lines&, const LineStatistics&, const LineTermsOf&,
                           const double* gamma, const ColumnSums&);

  // ---- steps on tiles ----

  // n values in the arithmetic type, and back, rounded to nearest even. Null where that is T.
  void (*widen)(const T* from, std::int64_t n, A* to);
  void (*narrow)(const A* from, std::int64_t n, T* to);
  // The values whose bit is set, else 0; `to` may be from. Up to 4 bytes behind a bit may be read.
  void (*keep_bits)(const A* from, const std::uint8_t* bits, std::int64_t first_bit, std::int64_t n, A* to);
  // tile where the weight is not 0; else the input (null: 0): `times` stretches of n values, one behind the other, each
  // with the same n weights. `to` may be the tile or the input; around the caches it may not. With more than one
  // stretch n is at least kVectorColumns, and as many weights are behind the last, which repeat the first.
  void (*put_counted)(const A* tile, const W* weights, const A* input, std::int64_t n, std::int64_t times,
                      bool around_cache, A* to);
  // The weights of `rows` rows of a tensor that has `inner` of them a row, one per value: to[(r*channels + c)*inner +
  // i] = weights[r*inner + i]. May write kVectorColumns values too much.
  void (*repeat_weights)(const W* weights, std::int64_t rows, std::int64_t channels, std::int64_t inner, W* to);
  WeightCounts (*count_weights)(const W*, std::int64_t n);

  // second_grad, of double alone (narrower tensors are widened): dx of double backward, which may be exactly v, dy or
  // x.
  void (*runs_second_grad)(const T* v, const T* dy, const T* x, T* dx, Runs, const SecondAffine*);
  void (*rows_second_grad)(const T* v, const T* dy, const T* x, T* dx, Rows, const SecondAffineColumns&);
};
// float16 and bfloat16 have the plain passes alone: no weights, no tail, no bits, no lines, and of the steps widen and
// narrow.

// Arrays of coefficients to be written, one entry per channel.
struct AffineOut {
  float *center, *scale, *offset;
};
struct GradAffineOut {
  float *dy_center, *dy_scale, *x_center, *x_scale, *offset;
};

// The formulas between the passes (gradient_math.hpp) for n channels of float32 or narrower, from plain sums about 0.
// They return whether all is as usual. Else some channel is badly conditioned or may leave float32's range, or they do
// not all count the same integer below 2^31: what was written is then not to be used.
struct Formulas {
  bool (*moments)(const ColumnSums&, std::int64_t n, double count, Moments* out);
  bool (*normalize)(const Moments*, std::int64_t n, double eps, const double* gamma, const double* beta,
                    const AffineOut&);
  bool (*grad_input)(const Moments*, const ColumnSums&, std::int64_t n, double eps, const double* gamma,
                     const GradAffineOut&, double* dgamma, double* dbeta);
};

struct KernelTable {
  Kernels<float> f32;
  Kernels<double> f64;
  Kernels<Float16> f16;
  Kernels<BFloat16> bf16;
  Formulas formulas;

  template <class T>
  [[nodiscard]] const Kernels<T>& of() const {
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
};

// Exactly these symbols leave the per-ISA objects. Which of them are linked in is CMake's choice, told to dispatch.cpp.
extern const KernelTable reference_table, generic_table, x86_64_v2_table, x86_64_v3_table, x86_64_v4_table, neon_table;

}  // namespace batchnorm::kernels
