// How a call visits a tensor: reduce the pieces, meet, finish the channels, apply to the pieces. forward.cpp and
// backward.cpp say what is done to a piece and to a channel.
//
// clang-format off
// A Pass gives
//   Value, bool reduces, applies                      the type of the tensors, and what is done to them
//   Plan plan, const KernelTable& table
//   Table, std::optional<Table> coefficients          where it applies: a CoefficientTable
//   double mean(c), const double* column_mean         if sums are about means: that of a channel, and those per column
//   void begin()                                      if anything is to be written before all else
//   void sum_runs(offset, Runs, c, Sums*)             sums of one planar piece, of each of its channels from c on
//   void sum_rows(offset, column, Rows, ColumnSums)   sums of a part of an interleaved block, whose columns begin at
//                                                     `column`
//   void finish(Range channels, totals)               from the sums of channel c, totals[c - channels.begin], to its
//                                                     results
//   void apply_runs(offset, Runs, c), apply_rows(offset, Rows)
// Where it does not reduce, finish() is called with null totals. run_pass() runs it.
// clang-format on
#pragma once

#include <algorithm>

#include "coefficients.hpp"
#include "kernels/table.hpp"
#include "parallel.hpp"
#include "passes.hpp"
#include "plan.hpp"
#include "sums.hpp"
#include "workspace.hpp"

namespace batchnorm {

template <class Pass>
class Traversal {
 public:
  static std::size_t bytes(const Pass& pass) {
    const Plan& plan = pass.plan;
    if (!pass.reduces || plan.path == Path::nothing || plan.path == Path::channel_tasks) return 0;
    if (plan.path == Path::chunk_tasks) return Workspace::bytes_for<kernels::Sums>(plan.wave * plan.sum_runs.chunks);
    return Workspace::bytes_for<double>(4 * plan.sum_rows.columns * (plan.sum_rows.blocks + 1));
  }

  Traversal(Pass& pass, Workspace& workspace) : plan_(pass.plan), pass_(pass) {
    if (bytes(pass) == 0) return;
    if (plan_.path == Path::chunk_tasks) {
      chunk_sums_ = workspace.take<kernels::Sums>(plan_.wave * plan_.sum_runs.chunks);
    } else {
      column_memory_ = workspace.take<double>(4 * plan_.sum_rows.columns * (plan_.sum_rows.blocks + 1));
    }
  }

  void run() {
    switch (plan_.path) {
      case Path::nothing:
        return run_phases({phase<&Traversal::finish_nothing>(1)});
      case Path::channel_tasks:
        return run_phases({phase<&Traversal::reduce_and_apply>(plan_.groups())});
      case Path::chunk_tasks:
        for (wave_ = {0, 0}; wave_.end < plan_.problem.channels;) {
          wave_ = {wave_.end, std::min(wave_.end + plan_.wave, plan_.problem.channels)};
          run_wave();
        }
        return;
      case Path::row_blocks:
        return run_row_blocks();
    }
  }

 private:
  // Channels that one task finishes: some microseconds of work.
  static constexpr std::int64_t kFinishedTogether = kernels::kMostChannels;

  // Rows that are fetched ahead: what a kernel visits at once. Normalizing 25088 x 128 and 1568 x 2048 values took 1.5
  // times as long as a copy without, 1.0 with it.
  static constexpr std::int64_t kRowsAhead = 4;

  template <void (Traversal::*f)(Range)>
  static Phase phase(std::int64_t tasks, bool backwards = false, std::int64_t grain = 1) {
    return {tasks, grain, backwards,
            [](void* self, Range range) noexcept { (static_cast<Traversal*>(self)->*f)(range); }};
  }
  void run_phases(std::initializer_list<Phase> phases) {
    batchnorm::run_phases(plan_.threads, phases.begin(), static_cast<int>(phases.size()), this);
  }

  void finish_nothing(Range) { pass_.finish({0, plan_.problem.channels}, nullptr); }

  // ---- planar ----

  // Of chunk k of neighbouring channels.
  void sum_chunk(std::int64_t k, Range channels, kernels::Sums* out) {
    const auto [offset, runs] = plan_.sum_runs.chunk(plan_.problem, k, channels);
    pass_.sum_runs(offset, runs, channels.begin, out);
  }

  void reduce_and_apply(Range groups) {
    for (std::int64_t g = groups.begin; g < groups.end; ++g) {
      const Range channels = channels_of_group(g);
      SumsOfChannels totals;
      add_pieces(plan_.sum_runs.chunks, channels.end - channels.begin, totals.of,
                 [&](std::int64_t k, kernels::Sums* out) { sum_chunk(k, channels, out); });
      pass_.finish(channels, totals.of);
      if (!pass_.applies) continue;
      // Last chunk first: it is the one still nearest in cache.
      for (std::int64_t k = plan_.apply_runs.chunks; k-- > 0;) apply_chunk(k, channels);
    }
    if (plan_.around_cache) fence_streams();
  }

  // Chunks in the order they lie in memory: k outside, groups of channels inside.
  void run_wave() {
    const std::int64_t summed = groups_in_wave() * plan_.sum_runs.chunks;
    const std::int64_t applied = groups_in_wave() * plan_.apply_runs.chunks;
    const std::int64_t channels = wave_.end - wave_.begin;
    const Phase finish = phase<&Traversal::finish_channels>((channels + kFinishedTogether - 1) / kFinishedTogether);
    const Phase apply = phase<&Traversal::apply_tiles>(applied, pass_.reduces);
    if (!pass_.reduces) return run_phases({finish, apply});
    const Phase sum = phase<&Traversal::sum_tiles>(summed, false, plan_.chunks_together);
    if (!pass_.applies) return run_phases({sum, finish});
    run_phases({sum, finish, apply});
  }

  void sum_tiles(Range tiles) {
    for (std::int64_t t = tiles.begin; t < tiles.end; ++t) {
      const std::int64_t k = t / groups_in_wave();
      const Range channels = channels_of_tile(t);
      sum_chunk(k, channels, chunk_sums_ + k * plan_.wave + channels.begin - wave_.begin);
    }
  }
  void finish_channels(Range parts) {
    for (std::int64_t part = parts.begin; part < parts.end; ++part) {
      const std::int64_t begin = wave_.begin + part * kFinishedTogether;
      const Range channels{begin, std::min(begin + kFinishedTogether, wave_.end)};
      if (!pass_.reduces) {
        pass_.finish(channels, nullptr);
        continue;
      }
      SumsOfChannels totals;
      for (std::int64_t c = channels.begin; c < channels.end; ++c) {
        add_pieces(plan_.sum_runs.chunks, 1, totals.of + (c - begin),
                   [&](std::int64_t k, kernels::Sums* out) { *out = chunk_sums_[k * plan_.wave + c - wave_.begin]; });
      }
      pass_.finish(channels, totals.of);
    }
  }
  // Backwards where they have been summed.
  void apply_tiles(Range tiles) {
    for (std::int64_t k = 0, count = tiles.end - tiles.begin; k < count; ++k) {
      const std::int64_t t = pass_.reduces ? tiles.end - 1 - k : tiles.begin + k;
      apply_chunk(t / groups_in_wave(), channels_of_tile(t));
    }
    if (plan_.around_cache) fence_streams();
  }

  void apply_chunk(std::int64_t k, Range channels) {
    auto [offset, runs] = plan_.apply_runs.chunk(plan_.problem, k, channels);
    if (plan_.around_cache && pass_.reduces && channels.begin + plan_.wave < plan_.problem.channels) {
      runs.ahead = plan_.wave * plan_.problem.inner;  // what the next group or wave has here
    } else if (plan_.fetches_outputs && pass_.reduces) {
      runs.ahead = runs.stride;  // the next stretch
    }
    pass_.apply_runs(offset, runs, channels.begin);
  }

  [[nodiscard]] std::int64_t groups_in_wave() const {
    return (wave_.end - wave_.begin + plan_.group - 1) / plan_.group;
  }
  [[nodiscard]] Range channels_of_group(std::int64_t g) const {
    return {g * plan_.group, std::min((g + 1) * plan_.group, plan_.problem.channels)};
  }
  [[nodiscard]] Range channels_of_tile(std::int64_t t) const {
    const std::int64_t begin = wave_.begin + t % groups_in_wave() * plan_.group;
    return {begin, std::min(begin + plan_.group, wave_.end)};
  }

  // ---- interleaved ----

  void run_row_blocks() {
    const Phase sum = phase<&Traversal::sum_stripes>(plan_.sum_rows.blocks * plan_.stripes);
    const Phase finish =
        phase<&Traversal::finish_columns>((plan_.problem.channels + channels_together() - 1) / channels_together());
    const Phase apply = phase<&Traversal::apply_blocks>(plan_.apply_rows.blocks, true);
    if (!pass_.reduces) return run_phases({finish, apply});
    if (plan_.sum_rows.blocks == 1) column_sums(column_memory_, plan_.sum_rows.columns);  // which are the totals
    if (!pass_.applies) return run_phases({sum, finish});
    run_phases({sum, finish, apply});
  }

  // Stripe t of all blocks. The last block may have fewer columns, but then there is one stripe a block.
  void sum_stripes(Range stripes) {
    for (std::int64_t t = stripes.begin; t < stripes.end; ++t) {
      const std::int64_t b = t / plan_.stripes, column = t % plan_.stripes * plan_.stripe;
      kernels::Rows rows = plan_.sum_rows.block(b);
      rows.columns = std::min(plan_.stripe, rows.columns - column);
      pass_.sum_rows(plan_.sum_rows.offset(b) + column, column, rows, column_sums_at(b, column));
    }
  }
  void apply_blocks(Range blocks) {
    for (std::int64_t b = blocks.end; b-- > blocks.begin;) {
      kernels::Rows rows = plan_.apply_rows.block(b);
      if (plan_.fetches_outputs) rows.ahead = kRowsAhead * rows.stride;
      pass_.apply_rows(plan_.apply_rows.offset(b), rows);
    }
    if (plan_.around_cache) fence_streams();
  }

  // All of them where rows stand side by side, since columns are then few; else so many that their columns are whole
  // vectors.
  [[nodiscard]] std::int64_t channels_together() const {
    const bool side_by_side = plan_.sum_rows.repeat > 1 || plan_.apply_rows.repeat > 1;
    return side_by_side ? plan_.problem.channels : kFinishedTogether;
  }
  void finish_columns(Range parts) {
    for (std::int64_t part = parts.begin; part < parts.end; ++part) {
      const std::int64_t begin = part * channels_together();
      const Range channels{begin, std::min(begin + channels_together(), plan_.problem.channels)};
      finish_columns_of(channels);
      if (pass_.applies) pass_.coefficients->lay_out(channels);
    }
  }
  void finish_columns_of(Range channels) {
    if (!pass_.reduces) return pass_.finish(channels, nullptr);
    add_columns_of(channels);
    for (std::int64_t begin = channels.begin; begin < channels.end; begin += kFinishedTogether) {
      const Range some{begin, std::min(begin + kFinishedTogether, channels.end)};
      SumsOfChannels totals;
      for (std::int64_t c = some.begin; c < some.end; ++c) totals.of[c - begin] = channel_total(c);
      pass_.finish(some, totals.of);
    }
  }

  // The arrays of block b; behind them the totals of all blocks, where there are several.
  kernels::ColumnSums block_sums(std::int64_t b) { return column_sums_at(b, 0); }
  kernels::ColumnSums totals_at(std::int64_t column) {
    return column_sums_at(plan_.sum_rows.blocks == 1 ? 0 : plan_.sum_rows.blocks, column);
  }
  kernels::ColumnSums column_sums_at(std::int64_t b, std::int64_t column) {
    const std::int64_t columns = plan_.sum_rows.columns;
    double* memory = column_memory_ + 4 * columns * b + column;
    return {memory, memory + columns, memory + 2 * columns, memory + 3 * columns};
  }
  // Totals of the columns of these channels, over all blocks and rows side by side. The last block may be of single
  // rows of the tensor: it adds to the first `width` columns alone.
  void add_columns_of(Range channels) {
    const auto add_blocks = pass_.table.template of<typename Pass::Value>().add_blocks;
    const RowCut& cut = plan_.sum_rows;
    const std::int64_t inner = plan_.problem.inner, stride = 4 * cut.columns;
    const std::int64_t first = channels.begin * inner, count = (channels.end - channels.begin) * inner;
    if (cut.blocks > 1 && cut.repeat == 1) {
      return add_blocks(column_sums_at(0, first), cut.blocks, stride, count, totals_at(first));
    }
    if (cut.blocks > 1) {
      add_blocks(block_sums(0), cut.blocks, stride, count, totals_at(0));
      add_blocks(column_sums_at(0, count), cut.full_blocks, stride, cut.columns - count, totals_at(count));
    }
    add_rows_side_by_side(totals_at(0), cut.repeat, count);
  }
  // Half of the rows to the other half, until there is one.
  static void add_rows_side_by_side(const kernels::ColumnSums& sums, std::int64_t rows, std::int64_t width) {
    while (rows > 1) {
      const std::int64_t half = rows / 2, behind = (rows - half) * width;
      add_columns(sums, {sums.first + behind, sums.first_lo + behind, sums.second + behind, sums.second_lo + behind},
                  half * width);
      rows -= half;
    }
  }
  kernels::Sums channel_total(std::int64_t c) {
    const kernels::ColumnSums columns = totals_at(0);
    const std::int64_t inner = plan_.problem.inner;
    kernels::Sums total = at(columns, c * inner);
    for (std::int64_t i = 1; i < inner; ++i) add(total, at(columns, c * inner + i));
    return total;
  }

  const Plan& plan_;
  Pass& pass_;
  Range wave_{0, 0};
  kernels::Sums* chunk_sums_ = nullptr;
  double* column_memory_ = nullptr;
};

// What can fail is done before anything is written.
template <class Pass>
void run_pass(Pass& pass, const PassOptions& options) {
  const Plan& plan = pass.plan;
  constexpr bool kAboutMeans = requires { pass.column_mean; };
  const std::size_t bytes = (pass.applies ? Pass::Table::bytes(plan) : 0) +
                            (kAboutMeans ? Workspace::bytes_for<double>(plan.sum_rows.columns) : 0) +
                            Traversal<Pass>::bytes(pass);
  if (options.needed != nullptr) {
    *options.needed = std::max(*options.needed, bytes);
    return;
  }
  PassWorkspace workspace(bytes, options.memory);
  if (pass.applies) pass.coefficients.emplace(plan, workspace);
  if constexpr (kAboutMeans) {
    pass.column_mean = lay_out_means(plan, workspace, [&](std::int64_t c) { return pass.mean(c); });
  }
  Traversal<Pass> traversal(pass, workspace);
  if constexpr (requires { pass.begin(); }) pass.begin();
  traversal.run();
}

}  // namespace batchnorm
