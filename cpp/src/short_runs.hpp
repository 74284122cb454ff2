// Short runs: channels that are one run each, side by side: what instance norm makes of small maps. A tile of
// neighbouring channels is turned, so that each of them is a column, and is then a tensor of rows like any other, whose
// kernels take many channels at once; the values of a channel are added in their order. What a tile needs beside its
// values stays on the stack of the task, since for all channels it would be more than the tensor.
//
// gamma and beta may be of fewer channels than x has: they repeat, as for the samples of instance norm.
#pragma once

#include "passes.hpp"

namespace batchnorm {

// For what a pass over a tile needs. A task's stack has room for it (parallel.cpp).
constexpr std::size_t kTileWorkBytes = 56 * 1024;

// The passes of passes.hpp, for problems that has_short_runs() holds for; what takes or makes y without a tail.
template <class T>
void run_short_moments(const T* x, const PassCall<T>& call, Moments* out);
template <class T>
void run_short_batch_norm(const T* x, const PassCall<T>& call, T* y, Moments* saved);
template <class T>
void run_short_normalize(const T* x, const PassCall<T>& call, const GivenStatistics& given, T* y);
template <class T>
void run_short_grad_sums(const T* dy, const T* x, const PassCall<T>& call, const Moments* moments, GradSums* out);
template <class T>
void run_short_grad_input(const T* dy, const T* x, const PassCall<T>& call, const Moments* moments,
                          const GradSums* sums, const FirstOutputs<T>& out);
template <class T>
void run_short_backward(const T* dy, const T* x, const PassCall<T>& call, const Moments* saved,
                        const FirstOutputs<T>& out);
template <class T>
void run_short_jvp(const T* x_dot, const T* x, const PassCall<T>& call, const Moments* saved, const GradSums* sums,
                   const Tangents& tangents, T* y_dot);

}  // namespace batchnorm
