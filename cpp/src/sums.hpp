// The order of summation, a function of the Problem alone, from inside out: 16 lanes a chunk or one a column
// (kernels/table.hpp); chunks of kChunkValues (plan.hpp) or blocks of rows (plan.cpp), in bundles of 16, here; rows
// side by side by halves, then the columns of a channel in order (traverse.hpp); segments in order (segments.hpp).
//
// Sums of pieces of one channel add up to the sums of the channel: in bundles of 16, each of which is its pieces in
// order, bundle after bundle, every addition with its error kept. Two short chains in place of a long one: a GPU, where
// an addition waits 16 cycles for the one before, adds 196 chunks in 0.3 us so, in 1.8 us one after the other.
#pragma once

#include <algorithm>

#include "double_double.hpp"
#include "kernels/table.hpp"

namespace batchnorm {

// total += part, keeping what the addition rounds off.
BN_BOTH inline void add(kernels::Sums& total, const kernels::Sums& part) {
  const DoubleDouble first = two_sum(total.first, part.first), second = two_sum(total.second, part.second);
  total = {first.hi, total.first_lo + (first.lo + part.first_lo), second.hi,
           total.second_lo + (second.lo + part.second_lo)};
}

// Left uninitialized: kernels overwrite.
union SumsOfChannels {
  SumsOfChannels() {}
  kernels::Sums of[kernels::kMostChannels];
};

// Sums of `count` >= 1 pieces of each of `channels` channels into totals[0], ...: piece(k, Sums*) gives those of piece
// k. The first is not added to 0: an infinity added to 0 has an error of NaN.
template <class Piece>
void add_pieces(std::int64_t count, std::int64_t channels, kernels::Sums* totals, const Piece& piece) {
  SumsOfChannels of_bundle, part;
  for (std::int64_t first = 0; first < count; first += kernels::kBundle) {
    kernels::Sums* bundle = first == 0 ? totals : of_bundle.of;
    piece(first, bundle);
    for (std::int64_t k = first + 1; k < std::min(first + kernels::kBundle, count); ++k) {
      piece(k, part.of);
      for (std::int64_t c = 0; c < channels; ++c) add(bundle[c], part.of[c]);
    }
    for (std::int64_t c = 0; first > 0 && c < channels; ++c) add(totals[c], bundle[c]);
  }
}

inline kernels::Sums at(const kernels::ColumnSums& sums, std::int64_t column) {
  return {sums.first[column], sums.first_lo[column], sums.second[column], sums.second_lo[column]};
}

// The same of `count` columns, which do not overlap.
inline void add_columns(double* __restrict sum, double* __restrict low, const double* __restrict part,
                        const double* __restrict part_low, std::int64_t count) {
  for (std::int64_t e = 0; e < count; ++e) {
    const DoubleDouble total = two_sum(sum[e], part[e]);
    sum[e] = total.hi;
    low[e] += total.lo + part_low[e];
  }
}
inline void add_columns(const kernels::ColumnSums& total, const kernels::ColumnSums& part, std::int64_t count) {
  add_columns(total.first, total.first_lo, part.first, part.first_lo, count);
  add_columns(total.second, total.second_lo, part.second, part.second_lo, count);
}

// Arrays for the sums of `columns` columns, in 4*columns values of `memory`. Low parts start as 0, because kernels
// that add plainly leave them alone.
inline kernels::ColumnSums column_sums(double* memory, std::int64_t columns) {
  const kernels::ColumnSums sums{memory, memory + columns, memory + 2 * columns, memory + 3 * columns};
  for (std::int64_t e = 0; e < columns; ++e) sums.first_lo[e] = sums.second_lo[e] = 0;
  return sums;
}

}  // namespace batchnorm
