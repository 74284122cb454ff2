// Sums, as kernels that hand on through global memory: of every problem, type and half. planar.cuh is quicker where a
// channel fits into the memory of the blocks that share it.
//
// One kernel, visit<Body>, goes over the values of a tensor as the CPU cuts it into chunks or columns of blocks of rows
// (plan.hpp). Sums of pieces have the order of the CPU's kernels inside, and are added up in its order by the thread
// that finishes a channel (finish.cuh).
//
// Segments of a call that have as many rows are cut alike, and are visited together: segment s of those of a cut has
// the pieces behind those of segment s - 1.
#pragma once

#include "arithmetic.hpp"
#include "cuda/sums.cuh"
#include "passes.hpp"
#include "plan.hpp"

namespace batchnorm::cuda {

constexpr unsigned kStepThreads = 128;
BN_DEVICE std::int64_t this_thread() { return std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x; }

// Quotient and remainder of numbers of pieces, channels and columns, of which there are fewer than 2^32
// (call_on_device.hpp): to divide 64 bits is a call, for which registers are spilled.
struct Divided {
  std::int64_t quotient, rest;

  BN_DEVICE Divided(std::int64_t a, std::int64_t b) {
    const auto n = static_cast<unsigned>(a), d = static_cast<unsigned>(b), q = n / d;
    quotient = q, rest = n - q * d;
  }
};

// Lines of a tensor, each position's channels `width` at a time, that share statistics (positionwise.hpp).
struct LinesOf {
  std::int64_t width = 0, groups = 1, channels = 1, inner = 1;  // groups of a position; width 0: none

  [[nodiscard]] std::int64_t count(const Problem& p) const { return p.count() * groups; }
  // The position of a line, and where its first value lies; the next are `inner` values apart.
  [[nodiscard]] BN_DEVICE std::int64_t position(std::int64_t line) const { return Divided(line, groups).quotient; }
  [[nodiscard]] BN_DEVICE std::int64_t begin(std::int64_t line) const {
    const Divided place(line, groups), of_row(place.quotient, inner);
    return (of_row.quotient * channels + place.rest * width) * inner + of_row.rest;
  }
};

// Which segments of a call these are: `number` and those behind, or some of a list. A position is what the channels of
// a row and place have in common (call.hpp).
constexpr int kMostListed = 224;  // so that all arguments of a kernel are less than 4 KB
struct Segments {
  std::int64_t count = 1, number = 0, first = 0;  // first: position of the first one
  bool listed = false;
  int numbers[kMostListed] = {};
  std::int64_t positions[kMostListed] = {};

  [[nodiscard]] BN_DEVICE std::int64_t number_of(std::int64_t s) const { return listed ? numbers[s] : number + s; }
  // The first position, of segments of `each`.
  [[nodiscard]] BN_DEVICE std::int64_t position_of(std::int64_t s, std::int64_t each) const {
    return listed ? positions[s] : first + s * each;
  }
};

// How a tensor is cut. Interleaved: columns, of rows that lie `down` values apart, in blocks; of short runs, which are
// turned, a column is a channel.
struct Cut {
  Problem problem;  // of a segment, whose channels are these
  Segments segments;
  bool planar = false;
  RunCut runs;
  RowCut rows;
  std::int64_t width = 1, across = 1;  // columns of a single row; values between neighbouring columns
  std::int64_t inner = 1;              // columns of a channel
  LinesOf lines;                       // or channels are these

  // Of a segment.
  [[nodiscard]] BN_BOTH std::int64_t pieces() const {
    return planar ? problem.channels * runs.chunks : rows.blocks * rows.columns;
  }
  [[nodiscard]] BN_BOTH std::int64_t entries() const { return segments.count * problem.channels; }
  [[nodiscard]] std::int64_t threads() const { return segments.count * pieces() * (planar ? kLanes : 1); }
  // The first position of segment s, and the entry of its first channel.
  [[nodiscard]] BN_DEVICE std::int64_t position_of(std::int64_t s) const {
    return segments.position_of(s, problem.count());
  }
  [[nodiscard]] BN_DEVICE std::int64_t entry_of(std::int64_t s) const {
    return segments.number_of(s) * problem.channels;
  }
};
inline Cut make_cut(const Problem& problem, const Segments& segments, bool turned) {
  const Problem seen = turned ? Problem{problem.inner, problem.channels, 1} : problem;
  const Plan plan = make_plan(seen, {true, false, 1, sizeof(float), 0, turned}, Machine{}, 1);
  Cut cut;
  cut.problem = turned ? problem : plan.problem, cut.segments = segments, cut.planar = plan.planar();
  cut.runs = plan.sum_runs, cut.rows = plan.sum_rows;
  cut.inner = plan.problem.inner, cut.width = plan.problem.channels * plan.problem.inner;
  cut.across = turned ? problem.inner : 1;
  return cut;
}
inline Cut make_cut(const Problem& problem, const Segments& segments = {}) {
  return make_cut(problem, segments, has_short_runs(problem));
}
// Of lines: the order in which one is summed is that of its length, however many there are.
inline Cut make_line_cut(const Problem& problem, std::int64_t width) {
  LinesOf lines{width, problem.channels / width, problem.channels, problem.inner};
  const Problem seen{1, lines.count(problem), width};
  Cut cut = make_cut(seen, {}, has_short_runs({1, 2, width}));
  cut.problem = seen, cut.lines = lines;
  return cut;
}
// As channels are summed again: rows by themselves (settle.cpp).
inline Cut single_rows(Cut cut) {
  if (cut.planar || cut.rows.repeat == 1) return cut;
  constexpr std::int64_t kTileRows = 1024;
  RowCut& rows = cut.rows;
  rows.rows = rows.rows * rows.repeat + rows.rest_rows, rows.columns = cut.width, rows.repeat = 1, rows.rest_rows = 0;
  rows.block_rows = kTileRows, rows.blocks = rows.full_blocks = (rows.rows + kTileRows - 1) / kTileRows;
  return cut;
}

// ---- visiting ----

// A Body gives of each piece a State begin(entry, segment): whether it `goes` there, add(at, position) for each value,
// and takes end(State&, piece, whether lanes are to be folded), with a piece of -1 for threads that have none.
template <class Body>
BN_DEVICE void visit_chunk(const Cut& cut, const Body& body, std::int64_t index) {
  const std::int64_t piece = index / kLanes, channels = cut.problem.channels, pieces = cut.pieces();
  const bool is_there = piece < cut.segments.count * pieces;
  const Divided of_all(is_there ? piece : 0, pieces), place(of_all.rest, channels);
  const std::int64_t s = of_all.quotient, c = place.rest, inner = cut.problem.inner;
  auto state = body.begin(cut.entry_of(s) + c, cut.segments.number_of(s));
  if (is_there && state.goes) {
    const RunCut& runs = cut.runs;
    const Divided of_run(place.quotient, runs.pieces_per_run);
    const std::int64_t o = of_run.quotient * runs.runs_per_chunk, i = of_run.rest * runs.piece_length;
    const std::int64_t left = cut.problem.outer - o, behind = inner - i;
    const std::int64_t count = left < runs.runs_per_chunk ? left : runs.runs_per_chunk;
    const std::int64_t length = behind < runs.piece_length ? behind : runs.piece_length;
    const std::int64_t first = cut.position_of(s);
    std::int64_t at = first * channels + (o * channels + c) * inner + i, position = first + o * inner + i, along = 1;
    if (cut.lines.width > 0) along = cut.lines.inner, at = cut.lines.begin(c) + i * along;
    for (std::int64_t r = 0; r < count; ++r, at += channels * inner, position += inner) {
      for (std::int64_t j = index % kLanes; j < length; j += kLanes) state.add(at + j * along, position + j);
    }
  }
  body.end(state, is_there && state.goes ? piece : -1, true);
}
template <class Body>
BN_DEVICE void visit_columns(const Cut& cut, const Body& body, std::int64_t index) {
  const std::int64_t pieces = cut.pieces();
  if (index >= cut.segments.count * pieces) return;
  const RowCut& rows = cut.rows;
  const Divided of_all(index, pieces);
  const Divided place(of_all.rest, rows.columns);
  const std::int64_t s = of_all.quotient, b = place.quotient, e = place.rest;
  const bool is_rest = b >= rows.full_blocks;  // of single rows
  if (is_rest && e >= cut.width) return;
  const Divided of_row(e, cut.width), of_channel(of_row.rest, cut.inner);
  auto state = body.begin(cut.entry_of(s) + of_channel.quotient, cut.segments.number_of(s));
  if (!state.goes) return;
  const std::int64_t first = is_rest ? rows.rows : b * rows.block_rows, left = rows.rows - first;
  const std::int64_t count = is_rest ? rows.rest_rows : left < rows.block_rows ? left : rows.block_rows;
  const bool turned = cut.across != 1;
  std::int64_t down = turned ? 1 : is_rest ? cut.width : rows.columns;
  const std::int64_t begin = cut.position_of(s);
  std::int64_t at = begin * cut.problem.channels + first * (turned ? 1 : rows.columns) + e * cut.across;
  if (cut.lines.width > 0) {
    down = cut.lines.inner;
    at = cut.lines.begin(of_channel.quotient) + (turned ? first : of_channel.rest) * down;
  }
  // The row of the tensor that this is, and how many on the next is.
  const std::int64_t row = first * rows.repeat + of_row.quotient, rows_on = is_rest ? 1 : rows.repeat;
  std::int64_t position = begin + row * cut.inner + of_channel.rest;
  for (std::int64_t r = 0; r < count; ++r, at += down, position += rows_on * cut.inner) state.add(at, position);
  body.end(state, index, false);
}
// Six blocks to a multiprocessor are 80 registers a thread; where more were asked for, some were spilled.
template <class Body>
__global__ void __launch_bounds__(kStepThreads, 6)
    visit(const __grid_constant__ Cut cut, const __grid_constant__ Body body) {
  const std::int64_t index = this_thread();
  if (cut.planar) return visit_chunk(cut, body, index);
  visit_columns(cut, body, index);
}

// ---- weights ----

// What the weights of a segment are, or of a chunk of it (counted.hpp).
struct Weighed {
  DoubleDouble total;
  double least;  // of those above 0, where not all are 0 or 1
  bool is_mask;
};
// The weights of positions, and what is known of those of each segment; none where all count alike.
template <class W>
struct Weights {
  const W* values = nullptr;
  const Weighed* weighed = nullptr;

  // What the values of a channel of segment s weigh, of which there are `count`.
  [[nodiscard]] BN_DEVICE DoubleDouble count(std::int64_t s, std::int64_t count) const {
    return values == nullptr ? DoubleDouble{static_cast<double>(count), 0} : weighed[s].total;
  }
  [[nodiscard]] BN_DEVICE bool is_mask(std::int64_t s) const { return values == nullptr || weighed[s].is_mask; }
};

// What the weights of chunks are (counted.cpp); then a thread adds those of a segment.
constexpr std::int64_t kWeightsOfChunk = 16 * 1024;
BN_BOTH inline std::int64_t chunks_of_weights(std::int64_t count) {
  return (count + kWeightsOfChunk - 1) / kWeightsOfChunk;
}
template <class W>
__global__ void __launch_bounds__(kStepThreads)
    weigh_chunks(const __grid_constant__ Cut cut, const W* weights, Weighed* out) {
  const std::int64_t index = this_thread(), chunk = index / kLanes;
  const std::int64_t count = cut.problem.count(), chunks = chunks_of_weights(count);
  const bool is_there = chunk < cut.segments.count * chunks;
  const Divided place(is_there ? chunk : 0, chunks);
  const std::int64_t first = place.rest * kWeightsOfChunk, left = count - first;
  const std::int64_t n = !is_there ? 0 : left < kWeightsOfChunk ? left : kWeightsOfChunk;
  const W* const from = weights + cut.position_of(place.quotient) + first;
  Compensated sum;
  double least = 1, others = 0;
  for (std::int64_t i = index % kLanes; i < n; i += kLanes) {
    const auto w = static_cast<double>(from[i]);
    sum.add(w);
    if (w > 0 && w < least) least = w;
    if (w != 0 && w != 1) others = 1;
  }
  sum.fold();
  for (unsigned d = kLanes / 2; d > 0; d /= 2) {
    least = std::fmin(least, __shfl_xor_sync(~0u, least, d));
    others += __shfl_xor_sync(~0u, others, d);
  }
  if (is_there && index % kLanes == 0) out[chunk] = {two_sum(sum.sum, sum.rest), least, others == 0};
}
template <class W>
__global__ void __launch_bounds__(kStepThreads)
    weigh_segments(const __grid_constant__ Cut cut, const Weighed* of_chunks, Weighed* out) {
  const std::int64_t s = this_thread();
  if (s >= cut.segments.count) return;
  const std::int64_t chunks = chunks_of_weights(cut.problem.count());
  Weighed all{{}, 1, true};
  for (std::int64_t k = s * chunks; k < (s + 1) * chunks; ++k) {
    all.total = all.total + of_chunks[k].total;
    all.least = std::fmin(all.least, of_chunks[k].least);
    all.is_mask = all.is_mask && of_chunks[k].is_mask;
  }
  out[cut.segments.number_of(s)] = all;
}

// ---- what is summed ----

// Why a channel is summed again.
enum class Again : int { no, about_shift, compensated };
struct Conditioned {
  Again again;
  double shift;
};

template <class T, Again kAgain>
struct TermsOfMoments {
  static constexpr bool kIsDouble = sizeof(T) == sizeof(double);
  using Type = std::conditional_t<
      kAgain == Again::about_shift, std::conditional_t<kIsDouble, CompensatedAboutShift, AboutShift>,
      std::conditional_t<kIsDouble || kAgain == Again::compensated, CompensatedAboutZero, AboutZero>>;
};

// sum(w*(x - shift)), sum(w*(x - shift)^2) of each piece; again, of the channels that want it so.
template <class T, Again kAgain>
struct SumMoments {
  const T* x;
  Weights<Arithmetic<T>> weights;
  const Conditioned* conditioned;
  kernels::Sums* out;

  struct State {
    const T* x;
    const Arithmetic<T>* weights;
    bool goes, weighs;
    typename TermsOfMoments<T, kAgain>::Type terms;

    BN_DEVICE void add(std::int64_t at, std::int64_t position) {
      const double w = weights == nullptr ? 1 : static_cast<double>(weights[position]);
      if (w == 0) return;
      weighs ? terms.add_weighted(w, widened(x[at])) : terms.add(widened(x[at]));
    }
  };
  [[nodiscard]] BN_DEVICE State begin(std::int64_t entry, std::int64_t segment) const {
    State state{x, weights.values, true, !weights.is_mask(segment), {}};
    if constexpr (kAgain != Again::no) state.goes = conditioned[entry].again == kAgain;
    if constexpr (kAgain == Again::about_shift) state.terms.shift = conditioned[entry].shift;
    return state;
  }
  BN_DEVICE void end(State& state, std::int64_t piece, bool folds) const { put(state.terms, piece, folds, out); }
};

// The bits of a ReLU behind their head (passes.hpp), or none.
struct Gate {
  const std::uint8_t* head = nullptr;

  [[nodiscard]] BN_DEVICE bool lets_through(std::int64_t value) const {
    if (head == nullptr) return true;
    const std::int64_t bit = head[0] % kernels::kVectorColumns + value;
    return ((head[kBitsHead + bit / 8] >> (bit % 8)) & 1) != 0;
  }
};

template <class T>
using TermsOfGradients =
    std::conditional_t<sizeof(T) == sizeof(double), GradientTerms<Compensated>, GradientTerms<Plain>>;

// sum(dy), sum(dy*(x - mean)) of the positions that have a weight, with the mean of moments or, where these are null,
// one that is given.
template <class T>
struct SumGradients {
  const T *dy, *x;
  Gate gate;
  const Arithmetic<T>* weights;
  const Moments* saved;
  ChannelValues mean;
  kernels::Sums* out;

  struct State {
    const SumGradients* of;
    bool goes;
    TermsOfGradients<T> terms;

    BN_DEVICE void add(std::int64_t at, std::int64_t position) {
      if (of->weights != nullptr && of->weights[position] == 0) return;
      terms.add(of->gate.lets_through(at) ? widened(of->dy[at]) : 0, widened(of->x[at]));
    }
  };
  [[nodiscard]] BN_DEVICE State begin(std::int64_t entry, std::int64_t) const {
    return {this, true, {saved == nullptr ? mean[entry] : saved[entry].mean, {}, {}}};
  }
  BN_DEVICE void end(State& state, std::int64_t piece, bool folds) const { put(state.terms, piece, folds, out); }
};

}  // namespace batchnorm::cuda
