// The passes with a weight per position: masks, padded sequences, samples that count more than others.
//
// Position (o, i) of a Problem is what its channels have in common; it has the weight weights.values[o*inner + i] >= 0.
// Per channel, with W = sum(w):
//     mean = sum(w*x)/W,  var = sum(w*(x - mean)^2)/W  (biased),  rstd = 1/sqrt(var + eps)
//     y = (x - mean)*rstd*gamma + beta
// A weight of 2 counts as two values of weight 1; moments have W as their count, of which ddof = 1 takes one away:
// right for weights that are counts. For those of which only the ratios matter the unbiased variance is m2/(W -
// sum(w^2)/W). With weights of 1 all functions give the bits of those of batchnorm.hpp. Where the weight is 0, x is not
// looked at (it may hold NaN) and y is what `padding` says. Weights are float for float tensors and double for double
// ones.
//
// What batchnorm.hpp says of all its functions holds here too. For weights other than 0 and 1 the products with them
// round once more: dx is within 6u of the sum of its absolute terms, u = 2^-24 for float.
// The sum of the weights must be finite.
#pragma once

#include <span>

#include "batchnorm/types.hpp"

namespace batchnorm {

// What the output is where the weight is 0: 0, the input as it is, or normalized as everywhere.
enum class Padding { zero, keep, normalize };

template <class W>
struct PositionWeights {
  std::span<const W> values;  // outer*inner
  Padding padding = Padding::normalize;
};

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
template <class T>
using WeightsFor = PositionWeights<typename detail::WeightType<T>::type>;

// Moments of each channel of x; count is the sum of the weights. No weight at all: all fields 0.
template <class T>
void moments(std::span<const T> x, const Problem& problem, const WeightsFor<T>& weights, std::span<Moments> out,
             const Options& options = {});

// Training. Throws where exactly one position has a weight: one value has no variance. Where none has, saved has a
// count of 0, and y is beta wherever it is normalized.
template <class T>
void batch_norm(std::span<const T> x, const Problem& problem, const WeightsFor<T>& weights, ChannelValues gamma,
                ChannelValues beta, double eps, std::span<T> y, std::span<Moments> saved, const Options& options = {});

// Statistics that are given: of the weights only what is 0 matters, and `padding`, which must not be `normalize`.
template <class T>
void normalize(std::span<const T> x, const Problem& problem, const WeightsFor<T>& weights, ChannelValues mean,
               ChannelValues var, ChannelValues gamma, ChannelValues beta, double eps, std::span<T> y,
               const Options& options = {});

// The two halves of the backward pass. Sums are over the positions whose y depends on the channel's statistics: all of
// them where padding is `normalize`, else those that have a weight.
template <class T>
void grad_sums(std::span<const T> dy, std::span<const T> x, const Problem& problem, const WeightsFor<T>& weights,
               std::span<const Moments> moments, std::span<GradSums> out, const Options& options = {});
//     dx = gamma*rstd*(dy - w/W*sum(dy) - w/W*xhat*sum(dy*xhat))
// and where the weight is 0: 0 (padding `zero`), dy (`keep`), gamma*rstd*dy (`normalize`).
template <class T>
void grad_input(std::span<const T> dy, std::span<const T> x, const Problem& problem, const WeightsFor<T>& weights,
                std::span<const Moments> moments, std::span<const GradSums> sums, ChannelValues gamma, double eps,
                std::span<T> dx, const Options& options = {});

// Both halves. dx, dgamma, dbeta: what is empty is not computed.
template <class T>
void batch_norm_backward(std::span<const T> dy, std::span<const T> x, const Problem& problem,
                         const WeightsFor<T>& weights, std::span<const Moments> saved, ChannelValues gamma, double eps,
                         std::span<T> dx, ChannelOutput dgamma, ChannelOutput dbeta, const Options& options = {});

// Gradients of normalize(), whose statistics are constants: dx = gamma*rstd*dy where there is a weight.
template <class T>
void normalize_backward(std::span<const T> dy, std::span<const T> x, const Problem& problem,
                        const WeightsFor<T>& weights, ChannelValues mean, ChannelValues var, ChannelValues gamma,
                        double eps, std::span<T> dx, ChannelOutput dgamma, ChannelOutput dbeta,
                        const Options& options = {});

}  // namespace batchnorm
