#include "plan.hpp"

#include <algorithm>
#include <sstream>

namespace batchnorm {
namespace {

// Rows of one block: at most 2^10 for the bound of plan.hpp; at least 64, so that the sums of a block (32 bytes a
// column) are few against its values; about 32 blocks in between, to share among threads. A column is a chain of its
// own: who cannot hold a block of wide rows holds some of its columns.
constexpr std::int64_t kMostBlockRows = 1024, kLeastBlockRows = kBlockRows, kWantedBlocks = 32;

// A block that is applied may have as few rows as a kernel visits at once, where threads share them.
constexpr std::int64_t kLeastAppliedRows = 4;

// Runs up to this long are visited as columns of rows: a run of 16 values is one vector of the kernels, and a shorter
// one would leave lanes empty.
constexpr std::int64_t kShortRun = 16;

// Rows shorter than this stand side by side: a row of 64 values is four vectors, with one of them partly empty at
// worst.
constexpr std::int64_t kShortRow = 64;

// Rows that are not whole vectors stand side by side when they are applied, up to this many values: above, the two ends
// of a row are few against the rest.
constexpr std::int64_t kMostUneven = 256;

// Serial below this many bytes read and written. Handing work to another thread costs 1 to 5 microseconds, in which one
// core moves about as much from its caches.
constexpr std::int64_t kSerialBytes = 128 * 1024;

// Outputs above this many times a core's own cache, and above half the shared one, are stored around the caches. On a
// Sapphire Rapids (2 MB L2) a copy that does takes 1.7 times as long at 4 MB, 1.1 at 8 MB, 0.8 at 16 MB, 0.7 at 32 MB.
// A virtual machine may tell the host's shared cache, of which it has only a part: no more than 32 MB are believed.
// Interleaved tensors are read twice before they leave, so that inputs and output should fit into it together: backward
// of 25088 x 128 and 1568 x 2048 values (12.8 MB) took 0.8 times as long around a cache of 32 MB. Planar ones, whose
// channels leave one after another, 1.1 times.
constexpr std::int64_t kAroundCacheAboveL2 = 6, kMostBelievedL3 = 32 * 1024 * 1024;

// Runs and rows shorter than this many values are stored as usual: the parts of lines at both ends of a stretch would
// outweigh its lines.
constexpr std::int64_t kShortestStream = 16;

// A channel of a single run shorter than this is turned. Training and backward of 4096 of them took 0.48 and 0.48 of
// the time that they take as runs where they have 16 values, 1.0 and 1.05 at 32, 1.4 and 1.4 at 64 (Zen 4, AVX-512).
constexpr std::int64_t kShortestRun = 32;

// Neighbouring channels are visited together until a stretch has this many values (16 KB): several pages, which the
// machine's prefetchers need to get going.
constexpr std::int64_t kStretch = 4096;

// Values of a piece that is applied, or that a thread sums at a time: 64 KB, some microseconds.
constexpr std::int64_t kTileValues = 16 * 1024;

// Columns of a stripe: 1 KB of each row, a quarter of a page.
constexpr std::int64_t kLeastStripe = 256;

// Groups of channels that each thread should have, so that none waits long for the last.
constexpr std::int64_t kGroupsAThread = 4;

// Groups of planar channels are worked on some at a time, as many as take an eighth of a core's own cache. Training and
// backward of group norm of 2 x 640 x 48 x 48 values took 860 and 1400 us a sample at a time, 915 and 1170 with half of
// the cache, 740 and 1130 with an eighth, 660 and 940 to 1030 with a 32nd, which is one group (Sapphire Rapids, 2 MB,
// two threads, noisy).
constexpr std::int64_t kPartOfL2 = 8;

// Positions with statistics of their own: those of a block of 64 KB are summed and then applied from the caches. Where
// sums of columns are taken too, dy and x of a block take a quarter of a core's own cache at most; at least so many
// positions share a visit to the sums of their columns, and no more than the machine knows pages: backward of 8192 x
// 1024 values took 17 ms with 64 rows of a page each, 10 with 16 (Sapphire Rapids, one thread).
constexpr std::int64_t kLineBlockBytes = 64 * 1024, kLeastSummedLines = 4, kSummedLines = 16, kMostLines = 512;
// Sums of a chunk are 16 bytes a column, against 12 of each position: a tenth at 16 positions, where all is in cache, a
// 200th at 256.
constexpr std::int64_t kLeastChunkLines = 8, kMostChunkLines = 256, kMostChunks = 1024;

std::int64_t ceil_divide(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// One channel is one run; one run per channel stays planar; runs of 1 are interleaved.
Problem canonical(const Problem& p) {
  if (p.channels == 1) return {1, 1, p.outer * p.inner};
  return p;
}

RunCut cut_runs(const Problem& p, std::int64_t chunk_values) {
  RunCut cut;
  if (p.inner <= chunk_values) {
    cut.pieces_per_run = 1;
    cut.piece_length = p.inner;
    cut.runs_per_chunk = std::min(p.outer, chunk_values / p.inner);
    cut.chunks = ceil_divide(p.outer, cut.runs_per_chunk);
  } else {
    cut.pieces_per_run = ceil_divide(p.inner, chunk_values);
    // As long as each other, as far as they are whole vectors: a short one would cost as much beside its values.
    const std::int64_t vectors = ceil_divide(ceil_divide(p.inner, cut.pieces_per_run), kernels::kVectorColumns);
    cut.piece_length = vectors * kernels::kVectorColumns;
    cut.runs_per_chunk = 1;
    cut.chunks = p.outer * cut.pieces_per_run;
  }
  return cut;
}

RowCut cut_rows(const Problem& p, std::int64_t repeat, std::int64_t least_block_rows) {
  RowCut cut;
  cut.repeat = std::min(repeat, p.outer);
  cut.columns = cut.repeat * p.channels * p.inner;
  cut.rows = p.outer / cut.repeat;
  cut.rest_rows = p.outer % cut.repeat;
  cut.block_rows = std::clamp(ceil_divide(cut.rows, kWantedBlocks), least_block_rows, kMostBlockRows);
  cut.full_blocks = ceil_divide(cut.rows, cut.block_rows);
  cut.blocks = cut.full_blocks + (cut.rest_rows > 0 ? 1 : 0);
  return cut;
}

// Rows of `width` values side by side: whole vectors where they are uneven and shorter than `uneven`, and kShortRow as
// long as that leaves a visit of eight rows: sums of columns are added up at the end, which is work without values.
std::int64_t repeat_of(const Problem& p, std::int64_t uneven) {
  constexpr std::int64_t kLanes = kernels::kVectorColumns, kVisit = 8;
  const std::int64_t width = p.channels * p.inner;
  std::int64_t repeat = 1;
  if (width < uneven) {
    while (width * repeat % kLanes != 0) repeat *= 2;  // at most 16
  }
  while (width * repeat < kShortRow && p.outer >= 2 * kVisit * repeat) repeat *= 2;
  return repeat;
}

std::int64_t shared_cache(const Machine& machine) { return std::min(machine.l3_bytes, kMostBelievedL3) / 2; }

// Whether the tensors of a call, of so many values each, take more than that. The bytes of one fit 64 bits, those of
// all need not.
bool take_more_than(std::int64_t bytes, std::int64_t values, const Work& work) {
  const std::int64_t of_one = values * work.item_size;
  return of_one > bytes || of_one * work.streams > bytes;
}

// What passes through the caches before they see the same memory again.
std::int64_t values_of(const Problem& p, const Work& work) { return std::max(p.size(), work.part_of); }

bool stores_go_around_cache(const Plan& plan, bool interleaved, const Work& work, const Machine& machine) {
  if (!work.applies) return false;
  const std::int64_t values = values_of(plan.problem, work), bytes = values * work.item_size;
  const bool long_enough = (interleaved ? plan.apply_rows.columns : plan.problem.inner) >= kShortestStream;
  const std::int64_t shared = shared_cache(machine);
  return long_enough && bytes > kAroundCacheAboveL2 * machine.l2_bytes &&
         (interleaved ? take_more_than(2 * shared, values, work) : bytes > shared);
}

// Slabs of a group that a core's own cache has to hold at once. While one is applied and stored around the caches, the
// inputs of the next are fetched. Where both do not fit, values fall into a shared cache that is near, or are read
// three times: backward of 32 x 256 x 3136 values (two slabs of 0.8 MB a group, L2 of 2 MB, a shared cache of 480 MB by
// the machine's word) took 2.36 times its stream, with a slab a group 1.59. With 32 MB shared by eight cores (Zen 4),
// groups of two slabs in 1 MB of L2 gain: training of 16 x 256 x 3136 took 1.08 times as long by single channels.
std::int64_t slabs_at_once(const Plan& plan, const Machine& machine) {
  const bool shared_is_near = machine.l3_bytes <= kMostBelievedL3;
  return plan.around_cache && !shared_is_near ? 2 : 1;
}

// Channels side by side whose stretch is long enough, as far as they do not crowd the cache and leave each thread some.
std::int64_t group_of(const Plan& plan, std::int64_t slab_bytes, const Machine& machine, int threads) {
  const Problem& p = plan.problem;
  const std::int64_t longest = std::min(ceil_divide(kStretch, p.inner), kernels::kMostChannels);
  const std::int64_t in_cache = machine.l2_bytes / slabs_at_once(plan, machine) / std::max<std::int64_t>(slab_bytes, 1);
  const std::int64_t shared = threads == 1 ? p.channels : p.channels / (kGroupsAThread * threads);
  return std::clamp<std::int64_t>(std::min({longest, in_cache, shared}), 1, p.channels);
}

// Bytes of one channel that the passes leave in cache; 2^60 stands for more.
std::int64_t slab_bytes_of(const Plan& plan, const Work& work) {
  const std::int64_t streams = work.streams - (plan.around_cache ? 1 : 0), most = std::int64_t{1} << 60;
  std::int64_t bytes = 0;
  return __builtin_mul_overflow(plan.problem.count(), streams * work.item_size, &bytes) ? most : std::min(bytes, most);
}

// Planar and reducing. A slab of a channel is applied from the core's own cache, or from its part of the shared one.
void choose_planar_path(Plan& plan, const Work& work, const Machine& machine, int threads) {
  const Problem& p = plan.problem;
  const std::int64_t slab = slab_bytes_of(plan, work);
  const bool slab_stays = slab <= machine.l2_bytes || slab <= shared_cache(machine) / threads;
  plan.path = p.channels >= threads && slab_stays ? Path::channel_tasks : Path::chunk_tasks;
  plan.group = group_of(plan, slab, machine, threads);
  if (plan.path == Path::channel_tasks) {
    plan.wave = plan.group;
  } else {
    plan.wave = work.applies ? std::clamp<std::int64_t>(shared_cache(machine) / slab, 1, p.channels) : p.channels;
    plan.wave = ceil_divide(plan.wave, plan.group) * plan.group;
    const std::int64_t tile = plan.group * plan.sum_runs.runs_per_chunk * plan.sum_runs.piece_length;
    plan.chunks_together = std::max<std::int64_t>(kTileValues / tile, 1);
  }
}

// Planar and only applied: in the order of memory, tiles that are whole stretches where these are short.
void cut_applied(Plan& plan) {
  const Problem& p = plan.problem;
  plan.path = Path::chunk_tasks;
  plan.wave = p.channels;
  plan.group = std::clamp<std::int64_t>(kTileValues / p.inner, 1, p.channels);
  plan.apply_runs = cut_runs(p, std::max(kTileValues / plan.group, p.inner > kTileValues ? kTileValues : p.inner));
}

// Blocks of wide rows are few where rows are: for summing, their columns are shared out too, until each thread has some
// tasks. Not for applying: two threads that write to parts of the same rows take lines away from each other, which made
// normalizing 784 x 256 values 3 times slower.
void choose_stripes(Plan& plan, int threads) {
  const std::int64_t columns = plan.sum_rows.columns;
  plan.stripe = columns;
  plan.stripes = 1;
  if (threads == 1 || plan.sum_rows.repeat > 1) return;
  const std::int64_t wanted = ceil_divide(kGroupsAThread * threads, plan.sum_rows.blocks);
  const std::int64_t stripe = std::max(columns / wanted, kLeastStripe);
  plan.stripe = ceil_divide(stripe, kernels::kVectorColumns) * kernels::kVectorColumns;
  plan.stripes = ceil_divide(columns, plan.stripe);
}

std::int64_t tasks_of(const Plan& plan) {
  switch (plan.path) {
    case Path::nothing:
      return 1;
    case Path::channel_tasks:
      return plan.groups();
    case Path::chunk_tasks:
      return plan.groups() * std::max(ceil_divide(plan.sum_runs.chunks, plan.chunks_together), plan.apply_runs.chunks);
    default:
      return std::max(plan.sum_rows.blocks * plan.stripes, plan.apply_rows.blocks);
  }
}

}  // namespace

std::int64_t RowCut::offset(std::int64_t b) const { return std::min(b * block_rows, rows) * columns; }

kernels::Rows RowCut::block(std::int64_t b) const {
  if (b < full_blocks) return {std::min(block_rows, rows - b * block_rows), columns, columns};
  const std::int64_t width = columns / repeat;
  return {rest_rows, width, width};
}

RunCut::Chunk RunCut::chunk(const Problem& problem, std::int64_t k, Range channels) const {
  const std::int64_t o = pieces_per_run == 1 ? k * runs_per_chunk : k / pieces_per_run;
  const std::int64_t place = pieces_per_run == 1 ? 0 : (k - o * pieces_per_run) * piece_length;
  return {(o * problem.channels + channels.begin) * problem.inner + place,
          {.length = std::min(piece_length, problem.inner - place),
           .count = std::min(runs_per_chunk, problem.outer - o),
           .stride = place + piece_length < problem.inner ? piece_length : problem.channels * problem.inner - place,
           .channels = channels.end - channels.begin}};
}

bool is_small(const Problem& p, const Work& work, int threads) {
  const bool is_one = p.inner == 1 && p.channels >= kShortRow && p.channels <= kMostSmall && p.outer > 0 &&
                      p.outer <= kSmallBlocks * kBlockRows;
  return is_one && (threads == 1 || is_serial(p, work));
}

bool small_goes_around_cache(const Problem& p, const Work& work, const Machine& machine) {
  Plan plan;
  plan.problem = p;
  plan.apply_rows.columns = p.channels;
  return stores_go_around_cache(plan, true, work, machine);
}

bool has_short_runs(const Problem& p) {
  return p.outer == 1 && p.channels > 1 && p.inner > 1 && p.inner < kShortestRun;
}

std::int64_t runs_of_tile(const Problem& p, std::int64_t item_size) {
  constexpr std::int64_t kLanes = kernels::kVectorColumns, kFloat = 4;
  const std::int64_t fit = kTurnedBytes / item_size / p.inner / kLanes * kLanes;
  return std::clamp(fit, kLanes, kMostTurned * kFloat / item_size);
}

bool is_serial(const Problem& problem, const Work& work) { return !take_more_than(kSerialBytes, problem.size(), work); }

Plan make_plan(const Problem& problem, const Work& work, const Machine& machine, int threads) {
  Plan plan;
  plan.problem = work.is_turned ? problem : canonical(problem);
  const Problem& p = plan.problem;
  if (p.size() == 0) return plan;

  if (threads > 1 && is_serial(problem, work)) threads = 1;
  const bool interleaved = work.is_turned || (p.channels > 1 && p.inner <= kShortRun);
  if (interleaved) {
    plan.path = Path::row_blocks;
    const auto repeat = [&](std::int64_t uneven) { return work.is_turned ? 1 : repeat_of(p, uneven); };
    if (work.reduces) {
      plan.sum_rows = cut_rows(p, repeat(kShortRow), kLeastBlockRows);
      choose_stripes(plan, threads);
    }
    const std::int64_t least_applied = threads == 1 ? kLeastBlockRows : kLeastAppliedRows;
    if (work.applies) plan.apply_rows = cut_rows(p, repeat(kMostUneven), least_applied);
  }
  plan.around_cache = stores_go_around_cache(plan, interleaved, work, machine);
  plan.fetches_outputs =
      work.applies && !plan.around_cache && take_more_than(shared_cache(machine), values_of(p, work), work);
  if (!interleaved && work.reduces) {
    plan.sum_runs = cut_runs(p, kChunkValues);
    if (work.applies) plan.apply_runs = cut_runs(p, kTileValues);
    choose_planar_path(plan, work, machine, threads);
  } else if (!interleaved) {
    cut_applied(plan);
  }
  if (threads > 1) plan.threads = static_cast<int>(std::clamp<std::int64_t>(tasks_of(plan), 1, threads));
  return plan;
}

Plan make_plan(const Problem& problem, const Work& work, int threads) {
  return make_plan(problem, work, machine(), is_serial(problem, work) ? 1 : available_threads(threads));
}

std::int64_t channels_a_part(const Problem& p, std::int64_t width, std::int64_t problems, std::int64_t bytes,
                             const Machine& machine, int threads) {
  if (p.outer != 1 || p.inner < kShortestRun) return p.channels;
  const std::int64_t in_cache = machine.l2_bytes / kPartOfL2 / bytes / p.inner;
  if (in_cache >= p.channels) return p.channels;
  const std::int64_t groups = p.channels / width, shared = problems * groups / (kGroupsAThread * threads);
  return std::max<std::int64_t>(std::min(in_cache / width, shared), 1) * width;
}

LinePlan make_line_plan(const Problem& p, const Work& work, const Machine& machine, int threads) {
  LinePlan plan;
  const std::int64_t positions = p.count();
  if (p.size() == 0) return plan;
  const bool is_turned = p.inner > 1, sums = work.streams >= 3;
  const std::int64_t row = p.channels * std::max<std::int64_t>(work.item_size, 4);
  const std::int64_t fit = sums ? std::min(std::max(kSummedLines, kLineBlockBytes / row), machine.l2_bytes / 8 / row)
                                : kLineBlockBytes / row;
  const std::int64_t least = is_turned ? kernels::kVectorColumns : sums ? kLeastSummedLines : 1;
  plan.positions_a_block = std::clamp(fit, least, kMostLines);
  if (is_turned) plan.positions_a_block -= plan.positions_a_block % kernels::kVectorColumns;
  plan.positions_a_chunk = std::max(std::clamp(positions / kWantedBlocks, kLeastChunkLines, kMostChunkLines),
                                    ceil_divide(positions, kMostChunks));
  plan.chunks = ceil_divide(positions, plan.positions_a_chunk);
  const std::int64_t bytes = p.size() * work.item_size;
  plan.around_cache = work.applies && !is_turned && p.channels >= kShortRow &&
                      bytes > kAroundCacheAboveL2 * machine.l2_bytes && bytes > shared_cache(machine);
  if (threads > 1 && is_serial(p, work)) threads = 1;
  if (threads > 1)
    plan.positions_a_block = std::min(plan.positions_a_block, ceil_divide(positions, kGroupsAThread * threads));
  plan.positions_a_block = std::min(plan.positions_a_block, positions);  // for which memory is asked
  plan.threads = static_cast<int>(std::clamp<std::int64_t>(positions, 1, threads));
  return plan;
}
LinePlan make_line_plan(const Problem& problem, const Work& work, int threads) {
  return make_line_plan(problem, work, machine(), is_serial(problem, work) ? 1 : available_threads(threads));
}

std::string to_string(const Plan& plan) {
  std::ostringstream s;
  s << "problem {outer " << plan.problem.outer << ", channels " << plan.problem.channels << ", inner "
    << plan.problem.inner << "}: ";
  const RowCut& rows = plan.sum_rows;
  switch (plan.path) {
    case Path::nothing:
      s << "nothing to do";
      break;
    case Path::channel_tasks:
      s << "a task is " << plan.group << " channel(s)";
      break;
    case Path::chunk_tasks:
      s << "a task is a chunk of " << plan.group << " channel(s), " << plan.wave << " channels a wave";
      break;
    case Path::row_blocks:
      s << "a task is a block of rows (" << rows.blocks << " blocks of up to " << rows.block_rows << " rows of "
        << rows.columns << " columns, " << rows.repeat << " row(s) of the tensor in each)";
      break;
  }
  if (plan.planar()) {
    const RunCut& runs = plan.sum_runs.chunks > 0 ? plan.sum_runs : plan.apply_runs;
    s << " (" << runs.chunks << " chunk(s) a channel, " << runs.runs_per_chunk << " x " << runs.piece_length
      << " values each)";
  }
  if (plan.around_cache) s << ", stores around the caches";
  s << ", threads " << plan.threads;
  return s.str();
}

}  // namespace batchnorm
