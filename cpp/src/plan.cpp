#include "plan.hpp"

#include <algorithm>
#include <sstream>

namespace batchnorm {
namespace {

// Values of one chunk. A lane then adds 2^10 of them (up to 1926 where runs are just longer than a vector) before sums
// are added with the error kept; the error bounds in channel_math.hpp count on fewer than 2^11. A chunk of 64 KB is
// small enough to share one channel between threads.
constexpr std::int64_t kChunkValues = 16 * 1024;

// Rows of one block: at most 2^10 for the same bound; at least 64, so that the sums of a block (32 bytes a column) are
// few against its values; about 32 blocks in between, to share among threads.
constexpr std::int64_t kMostBlockRows = 1024, kLeastBlockRows = 64, kWantedBlocks = 32;

// Runs up to this long are visited as columns of rows: a run of 16 values is one vector of the kernels, and a shorter
// one would leave lanes empty.
constexpr std::int64_t kShortRun = 16;

// Rows shorter than this stand side by side, so that no vector is left half empty: 8 vectors.
constexpr std::int64_t kShortRow = 128;

// Serial below this many bytes read and written. A parallel region costs 2 to 5 microseconds, in which one core moves
// about as much from its caches.
constexpr std::int64_t kSerialBytes = 128 * 1024;

// Outputs above this many times a core's own cache, and above half the shared one, are stored around the caches. On a
// Sapphire Rapids (2 MB L2) a copy that does takes 1.7 times as long at 4 MB, 1.1 at 8 MB, 0.8 at 16 MB, 0.7 at 32 MB.
// A virtual machine tells the host's shared cache, of which it has only a part: no more than 16 MB of it are believed.
constexpr std::int64_t kAroundCacheAboveL2 = 6, kMostBelievedShare = 16 * 1024 * 1024;

// Runs shorter than this many values are stored as usual: the parts of lines at both ends would outweigh the lines.
constexpr std::int64_t kShortestStream = 128;

std::int64_t ceil_divide(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// One channel is one run; one run per channel stays planar; runs of 1 are interleaved.
Problem canonical(const Problem& p) {
  if (p.channels == 1) return {1, 1, p.outer * p.inner};
  return p;
}

void cut_planar(Plan& plan) {
  const Problem& p = plan.problem;
  plan.pieces_per_run = ceil_divide(p.inner, kChunkValues);
  if (plan.pieces_per_run == 1) {
    plan.piece_length = p.inner;
    plan.runs_per_chunk = std::min(p.outer, kChunkValues / p.inner);
    plan.chunks = ceil_divide(p.outer, plan.runs_per_chunk);
  } else {
    plan.piece_length = kChunkValues;
    plan.runs_per_chunk = 1;
    plan.chunks = p.outer * plan.pieces_per_run;
  }
}

void cut_interleaved(Plan& plan) {
  const Problem& p = plan.problem;
  const std::int64_t width = p.channels * p.inner;
  plan.repeat = 1;
  if (width % kernels::kVectorColumns != 0 && width < kShortRow) {
    plan.repeat = kernels::kVectorColumns;  // so that columns are whole vectors
  } else if (width < kShortRow / 2) {
    plan.repeat = kShortRow / 2 / width;
  }
  plan.repeat = std::min(plan.repeat, p.outer);
  plan.columns = plan.repeat * width;
  plan.rows = p.outer / plan.repeat;
  plan.rest_rows = p.outer % plan.repeat;
  plan.block_rows = std::clamp(ceil_divide(plan.rows, kWantedBlocks), kLeastBlockRows, kMostBlockRows);
  plan.full_blocks = ceil_divide(plan.rows, plan.block_rows);
  plan.blocks = plan.full_blocks + (plan.rest_rows > 0 ? 1 : 0);
}

bool stores_go_around_cache(const Plan& plan, bool interleaved, const Work& work, const Machine& machine) {
  if (!work.applies) return false;
  const std::int64_t stays =
      std::max(kAroundCacheAboveL2 * machine.l2_bytes, std::min(machine.l3_bytes / 2, kMostBelievedShare));
  const bool whole_lines =
      interleaved ? plan.columns % kernels::kVectorColumns == 0 : plan.problem.inner >= kShortestStream;
  return whole_lines && plan.problem.size() > stays / work.item_size;
}

}  // namespace

std::int64_t Plan::chunk_offset(std::int64_t k, std::int64_t c) const {
  const std::int64_t o = k / pieces_per_run * runs_per_chunk, piece = k % pieces_per_run;
  return (o * problem.channels + c) * problem.inner + piece * piece_length;
}

kernels::Runs Plan::chunk_runs(std::int64_t k) const {
  const std::int64_t o = k / pieces_per_run * runs_per_chunk, piece = k % pieces_per_run;
  return {std::min(piece_length, problem.inner - piece * piece_length), std::min(runs_per_chunk, problem.outer - o),
          problem.channels * problem.inner};
}

std::int64_t Plan::block_offset(std::int64_t b) const { return std::min(b * block_rows, rows) * columns; }

kernels::Rows Plan::block(std::int64_t b) const {
  if (b < full_blocks) return {std::min(block_rows, rows - b * block_rows), columns, columns};
  const std::int64_t width = columns / repeat;
  return {rest_rows, width, width};
}

Plan make_plan(const Problem& problem, const Work& work, const Machine& machine, int threads) {
  Plan plan;
  plan.problem = canonical(problem);
  const Problem& p = plan.problem;
  if (p.size() == 0) return plan;

  const bool interleaved = p.channels > 1 && p.inner <= kShortRun;
  if (interleaved) {
    cut_interleaved(plan);
  } else {
    cut_planar(plan);
  }
  plan.around_cache = stores_go_around_cache(plan, interleaved, work, machine);

  const std::int64_t bytes_a_value = work.item_size * work.streams;  // divided by, since bytes may not fit 64 bits
  const bool serial = p.size() <= kSerialBytes / bytes_a_value;
  std::int64_t tasks = 0;
  if (interleaved) {
    plan.path = Path::row_blocks;
    tasks = plan.blocks;
  } else {
    // A channel's slab must survive in the core's own cache between the two passes, beside what is written there.
    const std::int64_t cached_streams = work.streams - (plan.around_cache ? 1 : 0);
    const bool slab_stays = p.count() <= machine.l2_bytes / (work.item_size * cached_streams);
    const bool enough_channels = p.channels >= threads || serial;
    plan.path = work.reduces && enough_channels && slab_stays ? Path::channel_tasks : Path::chunk_tasks;
    tasks = plan.path == Path::channel_tasks ? p.channels : p.channels * plan.chunks;
  }
  if (!serial) plan.threads = static_cast<int>(std::clamp<std::int64_t>(tasks, 1, threads));
  return plan;
}

std::string to_string(const Plan& plan) {
  std::ostringstream s;
  s << "problem {outer " << plan.problem.outer << ", channels " << plan.problem.channels << ", inner "
    << plan.problem.inner << "}: ";
  switch (plan.path) {
    case Path::nothing:
      s << "nothing to do";
      break;
    case Path::channel_tasks:
    case Path::chunk_tasks:
      s << (plan.path == Path::channel_tasks ? "a task is a channel" : "a task is a chunk") << " (" << plan.chunks
        << " chunk(s) a channel, " << plan.runs_per_chunk << " x " << plan.piece_length << " values each)";
      break;
    case Path::row_blocks:
      s << "a task is a block of rows (" << plan.blocks << " blocks of up to " << plan.block_rows << " rows of "
        << plan.columns << " columns, " << plan.repeat << " rows of the tensor in each)";
      break;
  }
  if (plan.around_cache) s << ", stores around the caches";
  s << ", threads " << plan.threads;
  return s.str();
}

}  // namespace batchnorm
