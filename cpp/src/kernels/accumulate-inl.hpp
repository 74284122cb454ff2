// Sums on virtual lanes, plain and compensated, and the two walks (runs, rows) that feed them.
// moments-inl.hpp and grad_sums-inl.hpp say what is summed.
#pragma once

#include "kernels/lanes-inl.hpp"
#include "kernels/relu_bits-inl.hpp"
#include "kernels/table.hpp"
#include "kernels/weights-inl.hpp"

namespace batchnorm::kernels {
namespace {

struct Plain {
  static constexpr bool kHasLow = false;
  Lanes<double> sum = broadcast(0.0);

  // To the lanes of vector k.
  BN_INLINE void add(int k, NativeDouble term) { sum.v[k] = sum.v[k] + term; }
  // The same on other units; a pass that adds two terms a value uses both kinds.
  BN_INLINE void other_add(int k, NativeDouble term) { sum.v[k] = kernels::other_add(sum.v[k], term); }
};

// sum + low is the sum to about twice float64's digits.
struct Compensated {
  static constexpr bool kHasLow = true;
  Lanes<double> sum = broadcast(0.0), low = broadcast(0.0);

  BN_INLINE void add(int k, NativeDouble term) {
    const NativeDouble next = sum.v[k] + term;
    low.v[k] = low.v[k] + sum_error(sum.v[k], term, next);
    sum.v[k] = next;
  }
  BN_INLINE void other_add(int k, NativeDouble term) { add(k, term); }
};

// A pair of sums takes values by
//   add_vector(k, p...)         those of the values at each input p that belong to vector k of the lanes, reading these
//                               alone: there may be no more,
//   add_part(k, n, p...)        the same where there are n < 16 values; missing lanes get what adds nothing.
// Quarters of the lanes that get nothing are left out on every instruction set, so that 0*(0 - mean) of an infinite
// mean reaches the same lanes. Runs of 7 x 7 values end with one value in a vector, of 14 x 14 with four.
template <class Pair, class... Input>
BN_INLINE void add_first(Pair& pair, std::int64_t n, const Input&... input) {
  constexpr int kWidth = Lanes<double>::kWidth, kQuarter = kLanes / 4;
  static_assert(kWidth <= kQuarter);
  BN_UNROLL for (int k = 0; k < Lanes<double>::kVectors; ++k) {
    if (n >= (k + 1) * kWidth) {
      pair.add_vector(k, input...);
    } else if (n > k * kWidth / kQuarter * kQuarter) {
      pair.add_part(k, n, input...);
    }
  }
}

// What is summed is added vector by vector of the 16 lanes, and of no more vectors in one sweep over some values than
// have their accumulators in registers, with eight registers left for what is added. Where all 16 lanes were taken step
// by step, GCC kept accumulators of AVX2 on the stack: grad_sums of 8 x 32 x 256 values of float32 took 17 us, now 12,
// moments of float64 52, now 40 (Zen 3, one thread).
template <class Accumulator>
constexpr int vectors_a_sweep() {
  int vectors = Lanes<double>::kVectors;
  while (vectors * (Accumulator::kHasLow ? 4 : 2) > kVectorRegisters - 8) vectors /= 2;
  return vectors;
}
// Values that stay in the first-level cache until the last sweep: 4 KB of float64.
constexpr std::int64_t kSweepValues = 512;

// Folds the lanes of one channel: (l, l+8), (l, l+4), (l, l+2), (l, l+1); whole vectors as long as there are two.
BN_INLINE void fold(Plain a, double* sum, double* low) {
  constexpr int kWidth = Lanes<double>::kWidth;
  NativeDouble* v = a.sum.v;
  BN_UNROLL for (int half = Lanes<double>::kVectors / 2; half > 0; half /= 2) {
    BN_UNROLL for (int k = 0; k < half; ++k) v[k] = v[k] + v[k + half];
  }
  double s[kWidth];
  __builtin_memcpy(s, v, sizeof s);
  BN_UNROLL for (int half = kWidth / 2; half > 0; half /= 2) {
    BN_UNROLL for (int l = 0; l < half; ++l) s[l] = s[l] + s[l + half];
  }
  *sum = s[0];
  *low = 0.0;
}
BN_INLINE void fold(const Compensated& a, double* sum, double* low) {
  double s[kLanes], e[kLanes];
  store(s, a.sum);
  store(e, a.low);
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int l = 0; l < half; ++l) {
      const double t = s[l] + s[l + half];
      e[l] = (e[l] + e[l + half]) + sum_error(s[l], s[l + half], t);
      s[l] = t;
    }
  }
  *sum = s[0];
  *low = e[0];
}

// How far ahead values of runs are fetched, in all inputs together, where a stretch is as long. The machine's own
// prefetchers stop at the end of a page and of a stretch: without this, moments of 32 x 1024 runs of 192 values took
// 0.65 ms (Zen 4, two threads, 25 MB), with it 0.39. Of 128 x 256 runs of 784 values (103 MB): 5.0 ms at 2 KB ahead and
// into the first-level cache, 3.6 at 4 or 8 KB into the second. Fetching further costs more where values are near:
// grad_sums of 32 x 256 runs of 196 values (Zen 3, two threads, 13 MB) ran at 57 GB/s with 4 KB of each input, at 68
// with 2 KB, at 75 without.
constexpr std::int64_t kAheadBytes = 4096;

// Where an input has what belongs to channel c of stretch k, and to row r.
template <class Input>
BN_INLINE Input run_of(const Input& input, const Runs& runs, std::int64_t k, std::int64_t c) {
  return input + (k * runs.stride + c * runs.length);
}
template <class Input>
BN_INLINE Input row_of(const Input& input, std::int64_t r, std::int64_t stride) {
  return input + r * stride;
}
template <class Input>
BN_INLINE void fetch_at(const Input& input, std::int64_t n) {
  fetch_lanes<Fetch::kFar>(input + n);
}

// Where a run lies in its stretch: `left` values from here to the end of the stretch, the next one `jump` values
// behind.
struct InStretch {
  std::int64_t left, jump, ahead;
};

template <class Accumulator, int kFirst = 0, class Pair, class... Input>
BN_INLINE void sweep_run(Pair& pair, std::int64_t begin, std::int64_t end, const InStretch& in, const Input&... input) {
  constexpr int kEnd = kFirst + vectors_a_sweep<Accumulator>();
  for (std::int64_t i = begin; i + kLanes <= end; i += kLanes) {
    if constexpr (kFirst == 0) {
      const std::int64_t ahead = i + in.ahead + (i + in.ahead < in.left ? 0 : in.jump);
      (fetch_at(input, ahead), ...);
    }
    BN_UNROLL for (int k = kFirst; k < kEnd; ++k) pair.add_vector(k, (input + i)...);
  }
  if constexpr (kEnd < Lanes<double>::kVectors) sweep_run<Accumulator, kEnd>(pair, begin, end, in, input...);
}
template <class Accumulator, class Pair, class... Input>
BN_INLINE void sum_run(Pair& pair, std::int64_t length, const InStretch& in, const Input&... input) {
  const std::int64_t whole = length / kLanes * kLanes;
  if constexpr (vectors_a_sweep<Accumulator>() == Lanes<double>::kVectors) {
    sweep_run<Accumulator>(pair, 0, whole, in, input...);
  } else {
    for (std::int64_t begin = 0; begin < whole; begin += kSweepValues) {
      const std::int64_t end = begin + kSweepValues < whole ? begin + kSweepValues : whole;
      sweep_run<Accumulator>(pair, begin, end, in, input...);
    }
  }
  if (whole < length) add_first(pair, length - whole, (input + whole)...);
}

// Accumulators in memory.
BN_INLINE void restore(Plain& a, const double* sum, const double*, std::int64_t n) {
  a.sum = load_upto<double>(sum, n, 0.0);
}
BN_INLINE void restore(Compensated& a, const double* sum, const double* low, std::int64_t n) {
  a.sum = load_upto<double>(sum, n, 0.0);
  a.low = load_upto<double>(low, n, 0.0);
}
BN_INLINE void keep(const Plain& a, double* sum, double*, std::int64_t n) { store_upto(sum, n, a.sum); }
BN_INLINE void keep(const Compensated& a, double* sum, double* low, std::int64_t n) {
  store_upto(sum, n, a.sum);
  store_upto(low, n, a.low);
}

// The lanes of one channel while others are visited.
template <class Accumulator>
struct KeptLanes {
  double first[kLanes], second[kLanes];
  double first_lo[Accumulator::kHasLow ? kLanes : 1], second_lo[Accumulator::kHasLow ? kLanes : 1];
};

// Stretches that are visited together, so that lanes are kept and restored once for all of them, where runs are shorter
// than this.
constexpr std::int64_t kStretchesPerVisit = 4, kShortRun = 256;

// The stretches of a visit: channel by channel.
template <class Accumulator, class T, class Make, class... Input>
BN_INLINE void sum_visit(const Make& make, const Runs& runs, std::int64_t k, std::int64_t visit, std::int64_t jump,
                         KeptLanes<Accumulator>* kept, Sums* out, const Input&... input) {
  constexpr std::int64_t kAhead = kAheadBytes / static_cast<std::int64_t>(sizeof(T) * sizeof...(Input));
  const std::int64_t stretch = runs.channels * runs.length, ahead = stretch < kAhead ? stretch : kAhead;
  for (std::int64_t c = 0; c < runs.channels; ++c) {
    KeptLanes<Accumulator>& lanes = kept[c];
    auto pair = make(c);
    if (k > 0) {
      restore(pair.first, lanes.first, lanes.first_lo, kLanes);
      restore(pair.second, lanes.second, lanes.second_lo, kLanes);
    }
    const InStretch in{stretch - c * runs.length, jump, ahead};
    for (std::int64_t v = 0; v < visit; ++v) {
      sum_run<Accumulator>(pair, runs.length, in, run_of(input, runs, k + v, c)...);
    }
    if (k + visit < runs.count) {
      keep(pair.first, lanes.first, lanes.first_lo, kLanes);
      keep(pair.second, lanes.second, lanes.second_lo, kLanes);
    } else {
      fold(pair.first, &out[c].first, &out[c].first_lo);
      fold(pair.second, &out[c].second, &out[c].second_lo);
    }
  }
}
// make(c) gives the pair of channel c. Inputs walk together.
template <class Accumulator, class T, class Make, class... Input>
BN_INLINE void sum_runs(Make make, Runs runs, Sums* out, const Input&... input) {
  KeptLanes<Accumulator> kept[kMostChannels];
  for (std::int64_t c = 0; runs.count == 0 && c < runs.channels; ++c) out[c] = Sums{};
  const std::int64_t most = runs.length < kShortRun ? kStretchesPerVisit : 1;
  const std::int64_t jump = most * runs.stride - runs.channels * runs.length;
  for (std::int64_t k = 0; k < runs.count; k += most) {
    const std::int64_t visit = runs.count - k < most ? runs.count - k : most;
    sum_visit<Accumulator, T>(make, runs, k, visit, jump, kept, out, input...);
  }
}

// Accumulators of a block of rows stay in memory (one per column); eight rows are taken per visit, so that they are
// loaded and stored once for eight vectors of input, and the machine's prefetchers see eight streams.
constexpr std::int64_t kRowsPerVisit = 8;

// Values of rows are fetched a visit ahead, or this far. Moments of 100352 x 256 values ran at 34 GB/s (Zen 3, two
// threads; reading alone at 41), at 24 where lines were fetched in the order of the visit and 20 where none were;
// grad_sums at 36, 22 and 20. What is in the caches anyway loses up to a tenth.
constexpr std::int64_t kFarBytes = 4096;
// A visit of more is too much to fetch ahead: a quarter of a small second-level cache. Then 4 KB along each row.
constexpr std::int64_t kMostVisitBytes = 128 * 1024;

template <class T>
BN_INLINE RowsAhead rows_ahead(const Rows& rows) {
  constexpr std::int64_t kSize = sizeof(T), kFar = kFarBytes / kSize;
  const std::int64_t visit = kRowsPerVisit * rows.stride;
  if (visit > kMostVisitBytes / kSize) return {{.count = 0, .columns = 0, .stride = rows.stride}, kFar, kRowsPerVisit};
  return {rows, visit > kFar ? visit : kFar / rows.stride * rows.stride, kRowsPerVisit};
}

template <class Accumulator, int kFirst = 0, class Pair, class... Input>
BN_INLINE void sweep_rows(Pair& pair, std::int64_t rows, std::int64_t stride, const RowsAhead& ahead, std::int64_t c,
                          const Input&... input) {
  constexpr int kEnd = kFirst + vectors_a_sweep<Accumulator>();
  for (std::int64_t r = 0; r < rows; ++r) {
    if constexpr (kFirst == 0) (fetch_at(input, ahead.at(c, r)), ...);
    BN_UNROLL for (int k = kFirst; k < kEnd; ++k) pair.add_vector(k, row_of(input, r, stride)...);
  }
  if constexpr (kEnd < Lanes<double>::kVectors) {
    sweep_rows<Accumulator, kEnd>(pair, rows, stride, ahead, c, input...);
  }
}

// One visit: up to eight rows of the n <= 16 columns from `c` on, where the inputs are.
template <class Pair, class... Input>
BN_INLINE void visit_columns(Pair&& pair, bool first_visit, std::int64_t rows, std::int64_t stride,
                             const RowsAhead& ahead, std::int64_t c, std::int64_t n, const ColumnSums& out,
                             const Input&... input) {
  using Accumulator = std::remove_cvref_t<decltype(pair.first)>;
  if (!first_visit) {
    restore(pair.first, out.first + c, out.first_lo + c, n);
    restore(pair.second, out.second + c, out.second_lo + c, n);
  }
  if (n == kLanes) {
    sweep_rows<Accumulator>(pair, rows, stride, ahead, c, input...);
  } else {
    for (std::int64_t r = 0; r < rows; ++r) add_first(pair, n, row_of(input, r, stride)...);
  }
  keep(pair.first, out.first + c, out.first_lo + c, n);
  keep(pair.second, out.second + c, out.second_lo + c, n);
}

// make(c, n) gives the empty Pair of the n columns from c on.
template <class T, class Make, class... Input>
BN_INLINE void sum_rows(Make make, Rows rows, const ColumnSums& out, const Input&... input) {
  const RowsAhead ahead = rows_ahead<T>(rows);
  for (std::int64_t r = 0; r < rows.count; r += kRowsPerVisit) {
    const std::int64_t visit = rows.count - r < kRowsPerVisit ? rows.count - r : kRowsPerVisit;
    const bool first_visit = r == 0 && !rows.continues;
    std::int64_t c = 0;
    for (; c + kLanes <= rows.columns; c += kLanes) {
      visit_columns(make(c, kLanes), first_visit, visit, rows.stride, ahead, c, kLanes, out,
                    (row_of(input, r, rows.stride) + c)...);
    }
    if (const std::int64_t n = rows.columns - c; n > 0) {
      visit_columns(make(c, n), first_visit, visit, rows.stride, ahead, c, n, out,
                    (row_of(input, r, rows.stride) + c)...);
    }
  }
}

// One sum of the 16 (or n < 16) columns from c on, over all blocks.
template <class Accumulator>
BN_INLINE void add_blocks_of_columns(const double* sum, const double* low, std::int64_t count, std::int64_t stride,
                                     std::int64_t c, std::int64_t n, double* total, double* total_low) {
  Compensated bundle, all;
  for (std::int64_t b = 0; b < count; ++b) {
    const Lanes<double> term = load_upto<double>(sum + b * stride + c, n, 0.0);
    Lanes<double> term_low;
    if constexpr (Accumulator::kHasLow) term_low = load_upto<double>(low + b * stride + c, n, 0.0);
    BN_UNROLL for (int k = 0; k < Lanes<double>::kVectors; ++k) {
      const NativeDouble next = bundle.sum.v[k] + term.v[k];
      NativeDouble error = sum_error(bundle.sum.v[k], term.v[k], next);
      if constexpr (Accumulator::kHasLow) error = error + term_low.v[k];
      bundle.low.v[k] = bundle.low.v[k] + error;
      bundle.sum.v[k] = next;
    }
    if (b + 1 < count && (b + 1) % kBundle != 0) continue;
    BN_UNROLL for (int k = 0; k < Lanes<double>::kVectors; ++k) {
      all.add(k, bundle.sum.v[k]);
      all.low.v[k] = all.low.v[k] + bundle.low.v[k];
    }
    bundle = {};
  }
  keep(all, total + c, total_low + c, n);
}

template <class Accumulator>
void add_blocks(const ColumnSums& first, std::int64_t count, std::int64_t stride, std::int64_t columns,
                const ColumnSums& total) {
  for (std::int64_t c = 0; c < columns; c += kLanes) {
    const std::int64_t n = columns - c < kLanes ? columns - c : kLanes;
    add_blocks_of_columns<Accumulator>(first.first, first.first_lo, count, stride, c, n, total.first, total.first_lo);
    add_blocks_of_columns<Accumulator>(first.second, first.second_lo, count, stride, c, n, total.second,
                                       total.second_lo);
  }
}

}  // namespace
}  // namespace batchnorm::kernels
