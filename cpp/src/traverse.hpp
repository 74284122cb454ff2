// How a call visits a tensor: reduce the pieces, meet, finish the channels, apply to the pieces. forward.cpp and
// backward.cpp say what is done to a piece and to a channel.
//
// A Pass gives
//   bool reduces, applies
//   void sum_runs(offset, Runs, c, Sums&)      sums of one planar chunk of channel c
//   void sum_rows(offset, Rows, ColumnSums)    sums of one interleaved block, per column
//   void finish(Range channels, totals)        from the sums of channel c, totals[c - channels.begin], to its results
//   void lay_out(Team)                         interleaved: coefficients per column; all channels are finished
//   void apply_runs(offset, Runs, c), apply_rows(offset, Rows)
// Where it does not reduce, finish() is called with null totals.
#pragma once

#include "kernels/table.hpp"
#include "parallel.hpp"
#include "plan.hpp"
#include "sums.hpp"
#include "workspace.hpp"

namespace batchnorm {

template <class Pass>
class Traversal {
 public:
  static std::size_t bytes(const Plan& plan, bool reduces) {
    if (!reduces || plan.path == Path::nothing || plan.path == Path::channel_tasks) return 0;
    const std::size_t totals = Workspace::bytes_for<kernels::Sums>(plan.problem.channels);
    if (plan.path == Path::chunk_tasks) {
      return totals + Workspace::bytes_for<kernels::Sums>(plan.problem.channels * plan.chunks);
    }
    return totals + Workspace::bytes_for<double>(4 * plan.columns * (plan.blocks + 1));
  }

  Traversal(const Plan& plan, Pass& pass, Workspace& workspace) : plan_(plan), pass_(pass) {
    if (bytes(plan, pass.reduces) == 0) return;
    totals_ = workspace.take<kernels::Sums>(plan.problem.channels);
    if (plan.path == Path::chunk_tasks) {
      chunk_sums_ = workspace.take<kernels::Sums>(plan.problem.channels * plan.chunks);
    } else {
      column_memory_ = workspace.take<double>(4 * plan.columns * (plan.blocks + 1));
    }
  }

  void run() {
    parallel(plan_.threads, [this](const Team& team) {
      switch (plan_.path) {
        case Path::nothing:
          pass_.finish({0, plan_.problem.channels}, nullptr);  // on one thread
          break;
        case Path::channel_tasks:
          channel_tasks(team);
          break;
        case Path::chunk_tasks:
          chunk_tasks(team);
          break;
        case Path::row_blocks:
          row_blocks(team);
          break;
      }
    });
  }

 private:
  void channel_tasks(const Team& team) {
    const Range mine = team.share(plan_.problem.channels);
    for (std::int64_t c = mine.begin; c < mine.end; ++c) {
      kernels::Sums total;
      for (std::int64_t k = 0; k < plan_.chunks; ++k) {
        kernels::Sums part;
        pass_.sum_runs(plan_.chunk_offset(k, c), plan_.chunk_runs(k), c, part);
        add(total, part);
      }
      pass_.finish({c, c + 1}, &total);
      if (!pass_.applies) continue;
      // Last chunk first: it is the one still nearest in cache.
      for (std::int64_t k = plan_.chunks; k-- > 0;) pass_.apply_runs(plan_.chunk_offset(k, c), plan_.chunk_runs(k), c);
    }
  }

  // Chunks in the order they lie in memory: k outside, c inside.
  void chunk_tasks(const Team& team) {
    const std::int64_t channels = plan_.problem.channels;
    const Range mine = team.share(plan_.chunks * channels), my_channels = team.share(channels);
    if (pass_.reduces) {
      for (std::int64_t t = mine.begin; t < mine.end; ++t) {
        const std::int64_t k = t / channels, c = t % channels;
        pass_.sum_runs(plan_.chunk_offset(k, c), plan_.chunk_runs(k), c, chunk_sums_[t]);
      }
      team.barrier();
      for (std::int64_t c = my_channels.begin; c < my_channels.end; ++c) {
        totals_[c] = {};
        for (std::int64_t k = 0; k < plan_.chunks; ++k) add(totals_[c], chunk_sums_[k * channels + c]);
      }
    }
    pass_.finish(my_channels, pass_.reduces ? totals_ + my_channels.begin : nullptr);
    if (!pass_.applies) return;
    team.barrier();
    for (std::int64_t t = mine.end; t-- > mine.begin;) {
      const std::int64_t k = t / channels, c = t % channels;
      pass_.apply_runs(plan_.chunk_offset(k, c), plan_.chunk_runs(k), c);
    }
  }

  void row_blocks(const Team& team) {
    const Range mine = team.share(plan_.blocks), my_channels = team.share(plan_.problem.channels);
    if (pass_.reduces) {
      for (std::int64_t b = mine.begin; b < mine.end; ++b) {
        pass_.sum_rows(plan_.block_offset(b), plan_.block(b), column_sums(block_memory(b), plan_.columns));
      }
      team.barrier();
      total_columns(team.share(plan_.columns));
      team.barrier();
      for (std::int64_t c = my_channels.begin; c < my_channels.end; ++c) totals_[c] = channel_total(c);
    }
    pass_.finish(my_channels, pass_.reduces ? totals_ + my_channels.begin : nullptr);
    if (!pass_.applies) return;
    team.barrier();
    pass_.lay_out(team);
    team.barrier();
    for (std::int64_t b = mine.end; b-- > mine.begin;) pass_.apply_rows(plan_.block_offset(b), plan_.block(b));
  }

  double* block_memory(std::int64_t b) { return column_memory_ + 4 * plan_.columns * b; }
  // The arrays of block b as column_sums() laid them out; b == blocks holds the totals of all blocks.
  kernels::ColumnSums block_sums(std::int64_t b) {
    double* memory = block_memory(b);
    return {memory, memory + plan_.columns, memory + 2 * plan_.columns, memory + 3 * plan_.columns};
  }

  void total_columns(Range columns) {
    const kernels::ColumnSums total = block_sums(plan_.blocks);
    for (double* sums : {total.first, total.first_lo, total.second, total.second_lo}) {
      for (std::int64_t e = columns.begin; e < columns.end; ++e) sums[e] = 0;
    }
    for (std::int64_t b = 0; b < plan_.blocks; ++b) {
      const kernels::ColumnSums part = block_sums(b);
      const std::int64_t end = columns.end < plan_.block(b).columns ? columns.end : plan_.block(b).columns;
      for (std::int64_t e = columns.begin; e < end; ++e) {
        kernels::Sums sum = at(total, e);
        add(sum, at(part, e));
        put(total, e, sum);
      }
    }
  }

  kernels::Sums channel_total(std::int64_t c) {
    const kernels::ColumnSums columns = block_sums(plan_.blocks);
    const Problem& p = plan_.problem;
    kernels::Sums total;
    for (std::int64_t r = 0; r < plan_.repeat; ++r) {
      for (std::int64_t i = 0; i < p.inner; ++i) add(total, at(columns, (r * p.channels + c) * p.inner + i));
    }
    return total;
  }

  const Plan& plan_;
  Pass& pass_;
  kernels::Sums *totals_ = nullptr, *chunk_sums_ = nullptr;
  double* column_memory_ = nullptr;
};

}  // namespace batchnorm
