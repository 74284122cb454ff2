// How a tensor is cut into pieces and visited: a pure function of sizes, giving a value that can be printed and tested.
#pragma once

#include <cstdint>
#include <string>

#include "batchnorm/types.hpp"
#include "kernels/table.hpp"
#include "machine.hpp"
#include "parallel.hpp"

namespace batchnorm {

// Values of one chunk of a sum. A lane then adds 2^8 of them (up to 480 where runs are just longer than a vector)
// before sums are added with the error kept; the error bounds in channel_math.hpp count on at most 2^10. 16 KB of
// float32, and 32 with those of dy, is what a thread block of a GPU can hold beside others and sum once more from
// there. On a CPU it takes as long as with chunks of four times as many values where memory is the limit (planar layers
// of ResNet-50: moments 1.00, training 0.99, backward 0.98; Zen 4, one thread), 2 % longer in the second-level cache.
constexpr std::int64_t kChunkValues = 4 * 1024;

// The orders in which the pieces of a tensor can be visited.
enum class Path {
  nothing,        // no values at all
  channel_tasks,  // planar: a thread reduces a group of channels and applies it while its values are still in cache
  chunk_tasks,  // planar: all threads reduce the chunks of a wave of channels, meet, and apply them; then the next wave
  row_blocks,   // interleaved: all threads reduce blocks of rows, meet, and apply blocks
};

// A planar tensor: each channel is cut into chunks of `runs_per_chunk` whole runs, or a long run into `pieces_per_run`
// pieces of `piece_length` values. Chunk k starts at outer index k / pieces_per_run * runs_per_chunk.
struct RunCut {
  std::int64_t piece_length = 0, runs_per_chunk = 0, pieces_per_run = 0, chunks = 0;

  struct Chunk {
    std::int64_t offset;
    kernels::Runs runs;
  };
  // Where chunk k of neighbouring channels of `problem` lies. The stride of a piece leads to the one that follows it.
  [[nodiscard]] Chunk chunk(const Problem& problem, std::int64_t k, Range channels) const;
};

// An interleaved tensor as rows of the kernels: `repeat` rows of the tensor stand side by side in one of `columns`
// values; column e belongs to channel (e / inner) % channels. `rows` of them are cut into blocks of `block_rows`; the
// last block holds, instead, the rows of the tensor (single ones) that did not fill a row of the kernels, if any.
struct RowCut {
  std::int64_t repeat = 0, columns = 0, rows = 0, block_rows = 0, full_blocks = 0, rest_rows = 0, blocks = 0;

  // Where block b lies.
  [[nodiscard]] std::int64_t offset(std::int64_t b) const;
  [[nodiscard]] kernels::Rows block(std::int64_t b) const;
};

// What is summed together decides the order of summation. Where the pass reduces, `sum_runs` and `sum_rows` are
// therefore a function of the Problem alone: the bits cannot depend on the machine, on threads or on the rest of the
// plan. sums.hpp says in what order the sums of chunks and blocks are added.
struct Plan {
  Problem problem;  // as the kernels see it: one channel has become one run

  // Planar: how it is summed and how it is applied.
  RunCut sum_runs, apply_runs;
  // Planar: neighbouring channels that are visited together, and those that are reduced before any is applied.
  std::int64_t group = 0, wave = 0;
  // Planar: chunks of a group that a thread sums at a time, where threads share them.
  std::int64_t chunks_together = 1;

  // Interleaved: how it is summed and how it is applied.
  RowCut sum_rows, apply_rows;
  // Interleaved: columns of a block that one task sums, all of them where rows stand side by side; and how many tasks
  // that makes of a block.
  std::int64_t stripe = 0, stripes = 0;

  Path path = Path::nothing;
  bool around_cache = false;     // whether outputs are stored around the caches
  bool fetches_outputs = false;  // whether lines of outputs are fetched before they are stored to
  int threads = 1;

  [[nodiscard]] bool planar() const { return path == Path::channel_tasks || path == Path::chunk_tasks; }
  [[nodiscard]] std::int64_t groups() const { return (problem.channels + group - 1) / group; }
};

// What a call does to the tensor, for the choice of a path.
struct Work {
  bool reduces, applies;
  int streams;             // tensors read and written: x and y are 2; dy, x and dx are 3
  std::int64_t item_size;  // bytes of a value
  // Values of the tensor that this is one part of, of many that are worked on one after the other; 0: it is all of it.
  std::int64_t part_of = 0;
  bool is_turned = false;  // a tile of short runs, whose columns are channels: rows are not to stand side by side
};

// Whether a problem is small (small.hpp), of at most so many channels, and of kSmallBlocks blocks of rows as they
// are cut for summing, that one thread takes.
constexpr std::int64_t kMostSmall = 256, kSmallBlocks = 4, kBlockRows = 64;
bool is_small(const Problem& problem, const Work& work, int threads);
bool small_goes_around_cache(const Problem& problem, const Work& work, const Machine& machine);

// Whether channels are short runs (short_runs.hpp): one each, so short that what a channel costs is more than its
// values.
bool has_short_runs(const Problem& problem);
// Runs that are turned together, of values of item_size bytes: whole vectors of columns, as long as there are enough.
// What is computed for a run, up to 200 bytes, stays near the values.
constexpr std::int64_t kMostTurned = kMostSmall, kTurnedBytes = 8 * 1024;
std::int64_t runs_of_tile(const Problem& problem, std::int64_t item_size);

// Whether one thread does it whatever is allowed: asking how many are allowed costs more than a tiny call.
bool is_serial(const Problem& problem, const Work& work);

// Channels of a planar problem of one outer index that are worked on at once, in whole groups of `width`: as many as a
// core's own cache holds while they are read twice, and few enough for each thread to have some of them. All of them
// where that gains nothing. `problems` such there are in the tensor, `bytes` of a value in all that is read.
std::int64_t channels_a_part(const Problem& problem, std::int64_t width, std::int64_t problems, std::int64_t bytes,
                             const Machine& machine, int threads);

// How positions that have statistics of their own are visited (positionwise.hpp): some at a time, which stay in a
// core's own cache, and for sums over positions in chunks, which are a function of the Problem alone.
struct LinePlan {
  std::int64_t positions_a_block = 1, positions_a_chunk = 1, chunks = 0;
  bool around_cache = false;
  int threads = 1;
};
LinePlan make_line_plan(const Problem& problem, const Work& work, const Machine& machine, int threads);
LinePlan make_line_plan(const Problem& problem, const Work& work, int threads);

Plan make_plan(const Problem& problem, const Work& work, const Machine& machine, int threads);
// On this machine, for a call that asks for so many threads.
Plan make_plan(const Problem& problem, const Work& work, int threads);

std::string to_string(const Plan& plan);

}  // namespace batchnorm
