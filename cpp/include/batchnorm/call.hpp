// One call, as one value: what shares statistics, what counts, what the channels are scaled by, what follows.
//
// Every function of batchnorm.hpp takes a Call beside its tensors; all combinations are the composition of their steps:
//     s = (x - mean)*rstd*gamma + beta + residual,   y = max(s, 0) with a ReLU, else s,   and at positions that do not
// count y is what `padding` says.
#pragma once

#include <cstdint>
#include <span>

#include "batchnorm/types.hpp"

namespace batchnorm {

// What shares statistics: everything, or each segment on its own (graphs of a batch, packed sequences, ghost batches,
// samples); of that each channel, or `width` of them together, neighbours or strided. Segments of one sample and a
// width of 1 are instance norm, of C/G group norm (Wu and He 2018), of all channels layer norm over channels and
// places.
//
// Segment s of a Problem holds the outer indices [offsets[s], offsets[s + 1]); its channel c is a channel as
// any other, in place s*channels + c of tables (moments, sums of gradients). Segments may be empty (moments of count
// 0); one with a single value a channel has a variance of 0, and its y is beta. Gamma and beta are those of the
// channel, or, where so many are given, of the segment and channel; so are their tangents and gradients. Results of a
// segment have the bits that a call on the segment alone would give.
//
// Or each position by itself (`each_position`): its channels, `width` at a time, share statistics, that is layer norm
// (Ba, Kiros and Hinton 2016) where the width is all of them. There are no segments then. Moments, and sums of
// gradients, have one entry per position and `width` channels, position first; the sums are those of gamma*dy. A weight
// says no more than whether the position counts.
//
// About 0 the mean is taken to be 0, that is RMS norm (Zhang and Sennrich 2019) where it is of each position:
//     y = x*rstd*gamma + beta,  rstd = 1/sqrt(mean(x^2) + eps).
// Moments stay those of the values: mean(x^2) = m2/count + mean^2. There is no double backward.
//
// Or about alpha times the mean, alpha of each channel (width 1, not of each position): graph norm (Cai et al. 2021),
//     y = (x - alpha*mean)*rstd*gamma + beta,  rstd = 1/sqrt(var + (1 - alpha)^2*mean^2 + eps).
// Its gradient is -sum over segments of mean*gamma*rstd*(dbeta - (1 - alpha)*mean*rstd*dgamma), with those of each
// segment; its tangent is one of gamma, gamma*rstd^2*(1 - alpha)*mean^2*alpha', and of beta, -gamma*rstd*mean*alpha'.
enum class About { mean, zero };
struct Groups {
  // One more than there are segments, from 0 to problem.outer, never falling. Empty: everything is one segment.
  std::span<const std::int64_t> offsets = {};
  // Divides the channels. Above 1, moments have one entry per segment and `width` channels, and as their count the
  // values (or weights) of all of them; sums of gradients still have one per segment and channel, about the mean that
  // is shared. mean and var cannot be given then, and there is no double backward.
  std::int64_t width = 1;
  bool each_position = false;
  About about = About::mean;
  ChannelValues alpha = {};  // problem.channels values, or none (1)
  // Whether it is not neighbouring channels that share statistics: with G = channels/width groups those of group g are
  // then channels g, g + G, g + 2*G, ... Not with each_position.
  bool strided = false;
};

// What the output is where a position does not count: 0, the input as it is (x of y, dy of dx), or what the formula
// gives everywhere.
enum class Padding { zero, keep, normalize };

namespace detail {
template <class T>
struct WeightType {
  using type = float;
};
template <>
struct WeightType<double> {
  using type = double;
};
}  // namespace detail

// What counts. Position (o, i) of a Problem is what its channels have in common; it has the weight weights[o*inner + i]
// >= 0, float for float and narrower tensors and double for double ones. Per channel, with W = sum(w):
//     mean = sum(w*x)/W,  var = sum(w*(x - mean)^2)/W  (biased)
// A weight of 2 counts as two values of weight 1; moments have W as their count, of which ddof = 1 takes one away:
// right for weights that are counts. For those of which only the ratios matter the unbiased variance is m2/(W -
// sum(w^2)/W). With weights of 1 all functions give the bits of those without. Where the weight is 0, the position does
// not count: x is not looked at in the statistics (it may hold NaN), and y is what `padding` says. The sum of the
// weights must be finite. For weights other than 0 and 1 the products with them round once more: dx is within 6u of the
// sum of its absolute terms, u = 2^-24 for float.
template <class T>
struct Counted {
  std::span<const typename detail::WeightType<T>::type> weights = {};  // outer*inner; empty: all count alike
  Padding padding = Padding::normalize;
};

// What follows, in the same pass over memory: a residual is added, then ReLU (He et al. 2016, figure 2). The bits of y
// are those of normalizing in float (double for double tensors), adding and taking the maximum one after the other; for
// Float16 and BFloat16 with a single rounding at the end. NaN and -0 stay what they are.
template <class T>
struct Tail {
  std::span<const T> residual = {};  // problem.size() values; empty: none
  bool relu = false;
  // With a ReLU: its bits for the backward pass, one an element, whether s was above 0 (or NaN), relu_mask_bytes() of
  // them; written by forward, read by backward. Empty: not wanted. The first byte says where the bits begin; bits of
  // other content let other elements through, and harm nothing else.
  std::span<std::uint8_t> bits = {};
};

template <class T>
struct Call {
  Problem problem;
  Groups groups = {};
  Counted<T> counted = {};
  // problem.channels values each, or one per segment and channel, or none (gamma = 1, beta = 0).
  ChannelValues gamma = {}, beta = {};
  double eps = 1e-5;  // finite, >= 0
  Tail<T> tail = {};
};

// Gradients that a call is to give; what is empty is not computed. dresidual: dy where the position counts and the ReLU
// lets it through, else 0.
template <class T>
struct Gradients {
  std::span<T> dx = {};
  std::span<T> dresidual = {};
  ChannelOutput dgamma = {}, dbeta = {};
};

// Bytes of the bits of a ReLU: one bit for each element, and up to 24 bytes.
[[nodiscard]] std::int64_t relu_mask_bytes(const Problem& problem);

}  // namespace batchnorm
