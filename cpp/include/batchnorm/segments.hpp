// Ragged batches: statistics of each segment of rows on its own (graphs of a batch, packed sequences).
//
// Segment s of a Problem holds the outer indices [offsets[s], offsets[s + 1]); its channel c is a channel as any other:
// statistics over the (offsets[s + 1] - offsets[s])*inner values there, in place s*channels + c of tables. Segments may
// be empty (moments of count 0); one with a single value a channel has a variance of 0, and its y is beta. Gamma and
// beta are shared by all segments.
//
// What batchnorm.hpp says of all its functions holds here too. Results of a segment have the bits that a call on the
// segment alone would give. Memory beyond outputs: what a call on a segment takes, for each thread; 16 bytes a segment
// and channel in the backward pass.
#pragma once

#include <span>

#include "batchnorm/types.hpp"

namespace batchnorm {

// offsets: one more than there are segments, from 0 to problem.outer, never falling. out: segments*channels.
template <class T>
void segment_moments(std::span<const T> x, const Problem& problem, std::span<const std::int64_t> offsets,
                     std::span<Moments> out, const Options& options = {});

// y = (x - mean)*rstd*gamma + beta with the statistics of each row's segment, which `saved` receives.
template <class T>
void segment_batch_norm(std::span<const T> x, const Problem& problem, std::span<const std::int64_t> offsets,
                        ChannelValues gamma, ChannelValues beta, double eps, std::span<T> y, std::span<Moments> saved,
                        const Options& options = {});

// Its gradients: dx segment by segment; dgamma and dbeta, one per channel, are sums over all segments.
template <class T>
void segment_batch_norm_backward(std::span<const T> dy, std::span<const T> x, const Problem& problem,
                                 std::span<const std::int64_t> offsets, std::span<const Moments> saved,
                                 ChannelValues gamma, double eps, std::span<T> dx, ChannelOutput dgamma,
                                 ChannelOutput dbeta, const Options& options = {});

}  // namespace batchnorm
