// All argument checks of the C++ API and their messages: argument, what was needed, what came.
#pragma once

#include <span>

#include "batchnorm/types.hpp"

namespace batchnorm::check {

// Sizes >= 0 whose product fits std::int64_t.
void problem(const Problem& problem);
// Lengths. `name` is the argument's name in the public API.
void size(const char* name, std::size_t got, const Problem& problem);
void channels(const char* name, std::size_t got, const Problem& problem);
void channels_or_absent(const char* name, const ChannelValues& values, const Problem& problem);
void channels_present(const char* name, const ChannelValues& values, const Problem& problem);
// Finite and >= 0.
void eps(double eps);
// No negative variance. NaN passes: it stays in its channel.
void variances(const ChannelValues& var);
void counts(const char* name, std::span<const Moments> moments);
// No values at all in a channel, or more than `ddof`.
void counts_above(const char* name, std::span<const Moments> moments, int ddof);
// A batch that has a variance: no values at all, or at least 2 a channel.
void batch_values(const Problem& problem);
void update_rate(double rate);
void threads(int threads);
void ddof(int ddof);
// Bytes of a value of a tensor.
void item_size(std::size_t bytes);
// Moments over at least one value in every channel, where there are gradients to be taken.
void counts_of_batch(const char* name, std::span<const Moments> moments, const Problem& problem);
// `out` is exactly `in`, or does not touch it.
void no_partial_overlap(const char* out_name, const void* out, const char* in_name, const void* in, std::size_t bytes);

}  // namespace batchnorm::check
