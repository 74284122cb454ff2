// From the sums of a channel to its moments: looks at their conditioning, and sums the rare bad channel again.
#pragma once

#include "batchnorm/types.hpp"
#include "kernels/table.hpp"
#include "parallel.hpp"
#include "plan.hpp"

namespace batchnorm {

// Moments of the channels in `channels`, whose sums about 0 are totals[c - channels.begin], into out[c].
// Reads x again for a channel whose |mean| is far above its std (about a shift), or whose mean is far below its values
// (compensated, in the last resort exactly). The decisions depend on the values alone, never on threads or ISA.
template <class T>
void settle(const Plan& plan, const kernels::Kernels<T>& kernels, const T* x, Range channels,
            const kernels::Sums* totals, Moments* out);

}  // namespace batchnorm
