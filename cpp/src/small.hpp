// Small problems: a few rows of neighbouring columns, each of them a channel, of float32 or narrower. All of a pass at
// once, while the values are in the first-level cache: the kernels of rows, and the formulas that take many channels.
// The bits are those of the passes over rows (traverse.hpp), without a plan and its memory: what a segment, a small
// batch or a turned tile of short runs wants.
#pragma once

#include <array>

#include "dispatch.hpp"
#include "passes.hpp"
#include "plan.hpp"
#include "sums.hpp"

namespace batchnorm {

// A float64 for each channel.
struct alignas(kernels::kStreamBytes) OfSmall : std::array<double, kMostSmall> {};

// Of {rows, channels, 1}, in at most kBlocks blocks of rows. All functions return false where a channel is not as
// usual, so that the passes over rows have to do it, and have then written nothing but statistics.
template <class T, std::int64_t kBlocks>
class Small {
 public:
  explicit Small(const Problem& problem, bool around_cache = false)
      : problem_(problem), around_cache_(around_cache && problem.channels >= kernels::kVectorColumns) {}

  bool moments(const T* x, Moments* out) {
    const kernels::ColumnSums sums = sum([&](std::int64_t offset, const kernels::Rows& rows, const auto& to) {
      table_.of<T>().rows_moments(x + offset, {}, rows, nullptr, to);
    });
    return table_.formulas.moments(sums, problem_.channels, static_cast<double>(problem_.outer), out);
  }

  bool normalize(const T* x, T* y, const Moments* moments, double eps, const double* gamma, const double* beta) const {
    alignas(kernels::kStreamBytes) Field center, scale, offset;
    if (!table_.formulas.normalize(moments, problem_.channels, eps, gamma, beta, {center, scale, offset})) return false;
    const kernels::Rows rows = applied(x != y, {center, scale, offset});
    table_.of<T>().rows_normalize(x, y, {}, rows, {center, scale, offset});
    return true;
  }

  // dx may be null.
  bool backward(const T* dy, const T* x, T* dx, const Moments* moments, double eps, const double* gamma,
                OfSmall& dgamma, OfSmall& dbeta) {
    OfSmall mean;
    for (std::int64_t c = 0; c < problem_.channels; ++c) mean.data()[c] = moments[c].mean;
    const kernels::ColumnSums sums = sum([&](std::int64_t offset, const kernels::Rows& rows, const auto& to) {
      table_.of<T>().rows_grad_sums({.dy = dy + offset, .x = x + offset}, {}, rows, mean.data(), to);
    });
    alignas(kernels::kStreamBytes) Field dy_center, dy_scale, x_center, x_scale, offset;
    if (!table_.formulas.grad_input(moments, sums, problem_.channels, eps, gamma,
                                    {dy_center, dy_scale, x_center, x_scale, offset}, dgamma.data(), dbeta.data())) {
      return false;
    }
    if (dx == nullptr) return true;
    const kernels::Rows rows = applied(dx != dy && dx != x, {dy_center, dy_scale, x_center, x_scale, offset});
    table_.of<T>().rows_grad_input({.dy = dy, .x = x}, {}, dx, rows, {dy_center, dy_scale, x_center, x_scale, offset});
    return true;
  }

 private:
  using Field = float[kMostSmall + kernels::kVectorColumns];

  // The sums of all rows: rows(offset, Rows, ColumnSums) gives those of a block.
  template <class Rows>
  kernels::ColumnSums sum(const Rows& rows) {
    const std::int64_t n = problem_.channels, blocks = (problem_.outer + kBlockRows - 1) / kBlockRows;
    for (std::int64_t b = 0; b < blocks; ++b) {
      const std::int64_t first = b * kBlockRows, count = std::min(kBlockRows, problem_.outer - first);
      rows(first * n, kernels::Rows{count, n, n}, column_sums(memory_ + 4 * n * b, n));
    }
    if (blocks == 1) return sums_at(0);
    table_.of<T>().add_blocks(sums_at(0), blocks, 4 * n, n, sums_at(blocks));
    return sums_at(blocks);
  }
  kernels::ColumnSums sums_at(std::int64_t b) {
    const std::int64_t n = problem_.channels;
    double* memory = memory_ + 4 * n * b;
    return {memory, memory + n, memory + 2 * n, memory + 3 * n};
  }
  // Stores around the caches want the first coefficients again behind the last.
  [[nodiscard]] kernels::Rows applied(bool is_apart, std::initializer_list<float*> fields) const {
    kernels::Rows rows{problem_.outer, problem_.channels, problem_.channels};
    if (!around_cache_ || !is_apart) return rows;
    for (float* field : fields) std::copy_n(field, kernels::kVectorColumns, field + problem_.channels);
    rows.walk = kernels::RowWalk::around_cache;
    return rows;
  }

  const kernels::KernelTable& table_ = *active_implementation().table;
  Problem problem_;
  bool around_cache_;
  alignas(kernels::kStreamBytes) double memory_[4 * kMostSmall * (kBlocks > 1 ? kBlocks + 1 : 1)];
};

// The passes of passes.hpp over a problem that is small, on one thread. False where it is not, or a channel is not
// as usual: no tensor is written then.
template <class T>
bool run_small_moments(const T* x, const PassCall<T>& call, Moments* out);
template <class T>
bool run_small_batch_norm(const T* x, const PassCall<T>& call, T* y, Moments* saved);
template <class T>
bool run_small_backward(const T* dy, const T* x, const PassCall<T>& call, const Moments* saved,
                        const FirstOutputs<T>& out);

}  // namespace batchnorm
