// From the sums of a channel to its moments: looks at their conditioning, and sums the rare bad channel again.
#pragma once

#include "batchnorm/types.hpp"
#include "double_double.hpp"
#include "parallel.hpp"
#include "plan.hpp"
#include "staged.hpp"

namespace batchnorm {

// The values that are summed: x, all of them alike or with weights.
template <class T>
struct SummedValues {
  MomentOperands<T> operands;
  DoubleDouble count;  // of each channel: how many there are, or what they weigh
};

// Moments of the channels in `channels`, whose sums about 0 are totals[c - channels.begin], into out[c].
// Reads x again for a channel whose |mean| is far above its std (about a shift), or whose mean is far below its values
// (compensated, in the last resort exactly), or whose sums left float64 (scaled). The decisions depend on the values
// alone, never on threads or ISA.
template <class T>
void settle(const Plan& plan, const SummedValues<T>& values, Range channels, const kernels::Sums* totals, Moments* out);

}  // namespace batchnorm
