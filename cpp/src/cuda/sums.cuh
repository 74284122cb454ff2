// Sums of chunks in shared memory, in the order of the CPU's kernels (kernels/accumulate-inl.hpp): value j of a run
// goes to lane j % 16 of its chunk, lanes are folded by halves, chunks are added in bundles (sums.hpp). A thread is a
// lane.
#pragma once

#include "channel_math.hpp"
#include "cuda/device.hpp"
#include "kernels/table.hpp"
#include "sums.hpp"

namespace batchnorm::cuda {

constexpr int kLanes = static_cast<int>(kernels::kVectorColumns);

struct Plain {
  double sum = 0;

  BN_DEVICE void add(double term) { sum += term; }
  BN_DEVICE void fold() {
    for (unsigned d = kLanes / 2; d > 0; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
  }
  [[nodiscard]] BN_DEVICE double low() const { return 0; }
};
// sum + rest is the sum to about twice float64's digits.
struct Compensated {
  double sum = 0, rest = 0;

  BN_DEVICE void add(double term) {
    const DoubleDouble next = two_sum(sum, term);
    sum = next.hi, rest += next.lo;
  }
  BN_DEVICE void fold() {
    for (unsigned d = kLanes / 2; d > 0; d /= 2) {
      const DoubleDouble both = two_sum(sum, __shfl_xor_sync(~0u, sum, d));
      rest = (rest + __shfl_xor_sync(~0u, rest, d)) + both.lo;
      sum = both.hi;
    }
  }
  [[nodiscard]] BN_DEVICE double low() const { return rest; }
};

// What is summed of values of float32: each Terms adds what one position gives.

// sum(x), sum(x^2). Products are exact, so that fused and split additions give the same bits.
struct AboutZero {
  Plain first, second;

  BN_DEVICE void add(const float* x) {
    const double v = *x;
    first.add(v);
    second.sum = fma(v, v, second.sum);
  }
};
// sum(x - shift), sum((x - shift)^2).
struct AboutShift {
  double shift;
  Plain first, second;

  BN_DEVICE void add(const float* x) {
    const double d = *x - shift;
    first.add(d), second.add(d * d);
  }
};
// sum(x), sum(x^2), keeping what is rounded off. An error that float64 may not hold is left out.
struct CompensatedAboutZero {
  Compensated first, second;

  BN_DEVICE void add(const float* x) {
    const double v = *x, square = v * v;
    first.add(v), second.add(square);
    if (square >= 0x1p-960) second.rest += fma(v, v, -square);
  }
};
// sum(dy), sum(dy*(x - mean)): dy and, `apart` values behind, x.
struct Gradients {
  double mean;
  int apart;
  Plain first, second;

  BN_DEVICE void add(const float* dy) {
    const double g = *dy;
    first.add(g), second.add(g * (dy[apart] - mean));
  }
};

template <class Terms>
BN_DEVICE kernels::Sums folded(Terms& terms) {
  terms.first.fold(), terms.second.fold();
  return {terms.first.sum, terms.first.low(), terms.second.sum, terms.second.low()};
}

// Sums of the chunks of a channel, first chunk first, in bundles: what add_pieces() gives.
BN_DEVICE kernels::Sums added_up(const kernels::Sums* chunks, int count) {
  constexpr int kBundle = static_cast<int>(kernels::kBundle);
  kernels::Sums total;
  for (int begin = 0; begin < count; begin += kBundle) {
    kernels::Sums bundle = chunks[begin];
    for (int k = begin + 1; k < begin + kBundle && k < count; ++k) batchnorm::add(bundle, chunks[k]);
    begin == 0 ? void(total = bundle) : batchnorm::add(total, bundle);
  }
  return total;
}

}  // namespace batchnorm::cuda
