// What lines are worked on with (positionwise.cpp): the memory of a task, the statistics of its lines, and all tasks.
#pragma once

#include <algorithm>
#include <cstdint>

#include "arithmetic.hpp"
#include "gradient_math.hpp"
#include "parallel.hpp"
#include "position_rows.hpp"
#include "short_runs.hpp"
#include "workspace.hpp"

namespace batchnorm {

// What the lines of a block have: those of a group one behind the other.
template <class T>
class Task {
  using A = Arithmetic<T>;

 public:
  static constexpr int kTiles = 4;
  static constexpr bool kScales = sizeof(A) == sizeof(float);

  // Tiles are made where `staged`; moments of a block are taken where `reduces`.
  static std::size_t bytes(const PositionRows<T>& v, bool staged, bool reduces) {
    const std::int64_t lines = v.plan.positions_a_block * v.groups;
    std::size_t all = 6 * Workspace::bytes_for<double>(lines) + Workspace::bytes_for<kernels::Sums>(lines);
    if (kScales) all += 4 * Workspace::bytes_for<float>(lines) + Workspace::bytes_for<bool>(lines);
    if (staged) all += kTiles * Workspace::bytes_for<A>(v.tile_values());
    if (reduces) all += bytes_of_moments(v, lines);
    return all;
  }
  Task(const PositionRows<T>& v, std::byte* memory, bool staged) : v_(v) {
    Workspace workspace(memory);
    const std::int64_t lines = v.plan.positions_a_block * v.groups;
    for (double*& of : columns_) of = workspace.take<double>(lines);
    sums = workspace.take<kernels::Sums>(lines);
    for (float*& of : scale_) of = kScales ? workspace.take<float>(lines) : nullptr;
    is_wide_ = kScales ? workspace.take<bool>(lines) : nullptr;
    for (int k = 0; staged && k < kTiles; ++k) tile[k] = workspace.take<A>(v.tile_values());
    rest_ = workspace.take<std::byte>(0);
  }

  A* tile[kTiles] = {};
  kernels::Sums* sums;

  // Moments of the lines of some rows. Those that do not count have none.
  template <class V>
  void take_moments(const V* rows, const Block& block, Moments* out) const {
    const std::int64_t n = v_.lines_of(block);
    const PassCall<V> part{.problem = {1, n, v_.call.width}, .options = {.threads = 1, .memory = rest_}};
    if (is_short(v_.call.width)) {
      run_short_moments(rows, part, out);
    } else {
      Forward<V>{part}.moments(rows, out);
    }
    if (!v_.call.positions) return;
    for (std::int64_t r = 0; r < block.count; ++r) {
      if (!v_.counts(block.first + r)) std::fill_n(out + r * v_.groups, v_.groups, Moments{});
    }
  }

  // From the moments of a block's lines.
  void set_statistics(const Moments* moments, const Block& block) {
    for (std::int64_t g = 0; g < v_.groups; ++g) {
      for (std::int64_t r = 0; r < block.count; ++r) {
        set_statistics(MomentsOf<double>::at(moments + r * v_.groups + g), g * block.count + r);
      }
    }
  }
  // The same, and what kernels of float32 take: a line is done in float64 where `wide`, or where it needs that.
  void set_scales(const Moments* moments, const Block& block, bool wide) {
    set_statistics(moments, block);
    for (std::int64_t at = 0; kScales && at < v_.lines_of(block); ++at) {
      const auto& m = moments[at % block.count * v_.groups + at / block.count];
      const double square = v_.call.about_zero ? m.m2 + m.count * (m.mean * m.mean) : m.m2;
      const LineFactors f = line_factors(m.count, columns_[0][at], columns_[1][at], columns_[2][at], square);
      scale_[0][at] = f.center, scale_[1][at] = f.rest, scale_[2][at] = f.rstd, scale_[3][at] = f.rstd_lo;
      is_wide_[at] = wide || f.is_wide;
    }
  }
  // f(row, how many, whether in float64) for rows [r, r + n) of group g that are alike.
  template <class F>
  void for_scales(std::int64_t g, std::int64_t rows, std::int64_t r, std::int64_t n, const F& f) const {
    const auto is_wide = [&](std::int64_t row) { return kScales && is_wide_[g * rows + row]; };
    for (std::int64_t from = r, to = r; from < r + n; from = to) {
      while (to < r + n && is_wide(to) == is_wide(from)) ++to;
      f(from, to - from, is_wide(from));
    }
  }
  // From the moments, and sums of h (of x' for tangents) of which `sum(line)` gives those of each.
  template <bool kTangents, class Sum>
  void set_terms(const Moments* moments, const Block& block, const Sum& sum) {
    for (std::int64_t g = 0; g < v_.groups; ++g) {
      for (std::int64_t r = 0; r < block.count; ++r) {
        const std::int64_t line = r * v_.groups + g, at = g * block.count + r;
        const auto m = MomentsOf<double>::at(moments + line);
        const DoubleDouble rstd{columns_[2][at], columns_[3][at]};
        const LineTerms terms = kTangents ? tangent_terms<A>(m, sum(line, at), rstd, v_.call.about_zero)
                                          : line_terms<A>(m, sum(line, at), rstd, v_.call.about_zero);
        columns_[4][at] = terms.x_scale, columns_[5][at] = terms.shift;
      }
    }
  }
  // Those of the lines of group g, from row r of `rows` on.
  [[nodiscard]] kernels::LineStatistics statistics(std::int64_t g, std::int64_t rows, std::int64_t r = 0) const {
    const std::int64_t at = g * rows + r;
    return {columns_[0] + at, columns_[1] + at, columns_[2] + at, columns_[3] + at};
  }
  [[nodiscard]] kernels::LineScale<A> scale(std::int64_t g, std::int64_t rows, std::int64_t r) const {
    const std::int64_t at = g * rows + r;
    if constexpr (kScales) {
      return {scale_[0] + at, scale_[1] + at, scale_[2] + at, scale_[3] + at};
    } else {
      return {columns_[0] + at, columns_[1] + at, columns_[2] + at, columns_[3] + at};
    }
  }
  [[nodiscard]] kernels::LineTermsOf terms(std::int64_t g, std::int64_t rows, std::int64_t r) const {
    return {columns_[4] + g * rows + r, columns_[5] + g * rows + r};
  }

 private:
  // Lines that are turned, whatever their number: the order in which they are summed is that of their length.
  static bool is_short(std::int64_t width) { return has_short_runs({1, 2, width}); }
  static std::size_t bytes_of_moments(const PositionRows<T>& v, std::int64_t lines) {
    std::size_t needed = 0;
    if (is_short(v.call.width) || lines == 0) return 0;
    for (const std::int64_t n : {std::int64_t{1}, lines}) {
      const PassCall<A> part{.problem = {1, n, v.call.width}, .options = {.threads = 1, .needed = &needed}};
      Forward<A>{part}.moments(nullptr, nullptr);
    }
    return needed;
  }
  void set_statistics(const MomentsOf<double>& m, std::int64_t at) {
    DoubleDouble rstd{};
    if (m.count > 0) rstd = v_.call.about_zero ? rstd_about_zero<A>(m, v_.call.eps) : rstd_for<A>(m, v_.call.eps);
    const bool about_mean = m.count > 0 && !v_.call.about_zero;
    columns_[0][at] = about_mean ? m.mean : 0, columns_[1][at] = about_mean ? m.mean_lo : 0;
    columns_[2][at] = rstd.hi, columns_[3][at] = rstd.lo;
  }

  const PositionRows<T>& v_;
  double* columns_[6];  // mean, mean_lo, rstd, rstd_lo, x_scale, shift
  float* scale_[4];     // fields of LineFactors
  bool* is_wide_;
  std::byte* rest_;
};

// All positions, in tasks. What can fail is done when there is one of these.
template <class T>
class Tasks {
 public:
  Tasks(const PositionRows<T>& v, bool staged, bool reduces)
      : v_(v), staged_(staged), memory_(Task<T>::bytes(v, staged, reduces), v.plan.threads) {}

  // f(Task, number of the task, Range), `a_task` positions in each.
  template <class F>
  void run(std::int64_t a_task, const F& f) {
    const std::int64_t tasks = (v_.positions + a_task - 1) / a_task;
    run_tasks(v_.plan.threads, tasks, [&](Range range) {
      const ThreadMemory::Place place(memory_);
      Task<T> task(v_, place.begin(), staged_);
      for (std::int64_t t = range.begin; t < range.end; ++t) {
        f(task, t, Range{t * a_task, std::min((t + 1) * a_task, v_.positions)});
      }
      if (v_.plan.around_cache) fence_streams();
    });
  }
  // f(Task, Block) for all blocks.
  template <class F>
  void run_blocks(const F& f) {
    run(v_.plan.positions_a_block, [&](Task<T>& task, std::int64_t, Range range) {
      v_.for_blocks(range, [&](const Block& block) { f(task, block); });
    });
  }

 private:
  const PositionRows<T>& v_;
  bool staged_;
  ThreadMemory memory_;
};

}  // namespace batchnorm
