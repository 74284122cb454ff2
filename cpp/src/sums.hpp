// Sums of pieces of one channel add up to the sums of the channel, in the order of the pieces.
#pragma once

#include "double_double.hpp"
#include "kernels/table.hpp"

namespace batchnorm {

// total += part, keeping what the addition rounds off.
inline void add(kernels::Sums& total, const kernels::Sums& part) {
  const DoubleDouble first = two_sum(total.first, part.first), second = two_sum(total.second, part.second);
  total = {first.hi, total.first_lo + (first.lo + part.first_lo), second.hi,
           total.second_lo + (second.lo + part.second_lo)};
}

inline kernels::Sums at(const kernels::ColumnSums& sums, std::int64_t column) {
  return {sums.first[column], sums.first_lo[column], sums.second[column], sums.second_lo[column]};
}

inline void put(const kernels::ColumnSums& sums, std::int64_t column, const kernels::Sums& value) {
  sums.first[column] = value.first;
  sums.first_lo[column] = value.first_lo;
  sums.second[column] = value.second;
  sums.second_lo[column] = value.second_lo;
}

// Arrays for the sums of `columns` columns, in 4*columns values of `memory`. Low parts start as 0, because kernels
// that add plainly leave them alone.
inline kernels::ColumnSums column_sums(double* memory, std::int64_t columns) {
  const kernels::ColumnSums sums{memory, memory + columns, memory + 2 * columns, memory + 3 * columns};
  for (std::int64_t e = 0; e < columns; ++e) sums.first_lo[e] = sums.second_lo[e] = 0;
  return sums;
}

}  // namespace batchnorm
