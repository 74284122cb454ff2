// What kernels sum, in the order of the CPU's (kernels/accumulate-inl.hpp): value j of a run goes to lane j % 16 of its
// chunk, lanes are folded by halves, chunks are added in bundles (sums.hpp). A thread is a lane, or a column of rows.
#pragma once

#include "arithmetic.hpp"
#include "channel_math.hpp"
#include "cuda/device.hpp"
#include "kernels/table.hpp"
#include "sums.hpp"

namespace batchnorm::cuda {

constexpr int kLanes = static_cast<int>(kernels::kVectorColumns);

// A value as it is summed.
template <class T>
BN_DEVICE double widened(T value) {
  return static_cast<double>(static_cast<Arithmetic<T>>(value));
}

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

// What is summed: each Terms adds what one value gives, in float64; add_weighted() with a weight that is not 0.

// sum(x), sum(x^2). Products of float32 are exact, so that fused and split additions give the same bits.
struct AboutZero {
  Plain first, second;

  BN_DEVICE void add(double v) {
    first.add(v);
    second.sum = fma(v, v, second.sum);
  }
  BN_DEVICE void add_weighted(double w, double v) {
    first.sum = fma(w, v, first.sum);
    second.add(w * v * v);
  }
};
// sum(x - shift), sum((x - shift)^2).
struct AboutShift {
  double shift;
  Plain first, second;

  BN_DEVICE void add(double v) {
    const double d = v - shift;
    first.add(d), second.add(d * d);
  }
  BN_DEVICE void add_weighted(double w, double v) {
    const double d = v - shift, term = w * d;
    first.add(term), second.add(term * d);
  }
};
// What rounding took from a square. An error that float64 may not hold is left out.
BN_DEVICE double square_error(double v, double square) { return square >= 0x1p-960 ? fma(v, v, -square) : 0; }
// The same of a product, which may not be split either (kernels/lanes-inl.hpp).
BN_DEVICE double normal_product_error(double a, double b, double product) {
  const bool is_normal = std::abs(product) >= 0x1p-960 && std::abs(a) < 0x1p995 && std::abs(b) < 0x1p995;
  return is_normal ? fma(a, b, -product) : 0;
}
// Compensated, with a weight.
template <class Terms>
BN_DEVICE void add_compensated(Terms& terms, double w, double v, double shift) {
  const DoubleDouble d = two_sum(v, -shift);
  const double term = w * d.hi, term_lo = normal_product_error(w, d.hi, term) + w * d.lo, square = term * d.hi;
  terms.first.add(term);
  terms.first.rest += term_lo;
  terms.second.add(square);
  terms.second.rest += normal_product_error(term, d.hi, square) + (term_lo * d.hi + term * d.lo);
}
// The same sums, keeping what is rounded off.
struct CompensatedAboutZero {
  Compensated first, second;

  BN_DEVICE void add(double v) {
    const double square = v * v;
    first.add(v), second.add(square);
    second.rest += square_error(v, square);
  }
  BN_DEVICE void add_weighted(double w, double v) { add_compensated(*this, w, v, 0); }
};
struct CompensatedAboutShift {
  double shift;
  Compensated first, second;

  BN_DEVICE void add(double v) {
    const DoubleDouble d = two_sum(v, -shift);
    const double square = d.hi * d.hi;
    first.add(d.hi);
    first.rest += d.lo;
    second.add(square);
    second.rest += square_error(d.hi, square) + (d.hi + d.hi) * d.lo;
  }
  BN_DEVICE void add_weighted(double w, double v) { add_compensated(*this, w, v, shift); }
};
// sum(dy), sum(dy*(x - mean)).
template <class Accumulator>
struct GradientTerms {
  double mean;
  Accumulator first, second;

  BN_DEVICE void add(double dy, double x) { first.add(dy), second.add(dy * (x - mean)); }
};

template <class Terms>
BN_DEVICE kernels::Sums sums_of(const Terms& terms) {
  return {terms.first.sum, terms.first.low(), terms.second.sum, terms.second.low()};
}
template <class Terms>
BN_DEVICE kernels::Sums folded(Terms& terms) {
  terms.first.fold(), terms.second.fold();
  return sums_of(terms);
}

// Sums of a piece to out[piece], of lanes that are folded or of one that has it all; below 0: to nowhere.
template <class Terms>
BN_DEVICE void put(Terms& terms, std::int64_t piece, bool folds, kernels::Sums* out) {
  const kernels::Sums sums = folds ? folded(terms) : sums_of(terms);
  if (piece >= 0 && (!folds || threadIdx.x % kLanes == 0)) out[piece] = sums;
}

// Sums of the chunks of a channel, of which at(k) gives one, first chunk first, in bundles: what add_pieces() gives.
template <class At>
BN_DEVICE kernels::Sums added_up(std::int64_t count, const At& at) {
  kernels::Sums total;
  for (std::int64_t begin = 0; begin < count; begin += kernels::kBundle) {
    kernels::Sums bundle = at(begin);
    for (std::int64_t k = begin + 1; k < begin + kernels::kBundle && k < count; ++k) batchnorm::add(bundle, at(k));
    begin == 0 ? void(total = bundle) : batchnorm::add(total, bundle);
  }
  return total;
}

}  // namespace batchnorm::cuda
