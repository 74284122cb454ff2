// Batch norm on NVIDIA GPUs, of tensors that live there: in builds with -DBATCHNORM_CUDA=ON.
//
// The functions are those of batchnorm.hpp without a Call, with the same formulas, checks of sizes and bits. All memory
// that they are given is the device's: tensors, gamma and beta, moments and sums. They launch work on a stream and
// return: what they read and write must stay until it is done. They never wait, and take memory to work in by
// cudaMallocAsync on that stream, so that a call can be captured in a graph. Values in device memory are not looked at:
// a negative variance gives NaN. T is Float16, BFloat16, float or double.
//
// Throws std::invalid_argument for sizes and overlaps as batchnorm.hpp does, before anything is launched;
// std::bad_alloc where the device has no memory; std::runtime_error where there is no driver, none that is new enough,
// no device, or one below compute capability 8.0, and with what the runtime says of all else.
#pragma once

#include <span>

#include "batchnorm/float16.hpp"
#include "batchnorm/types.hpp"

namespace batchnorm::cuda {

// Where a call is launched: a cudaStream_t of the current device; null: its default stream.
struct Options {
  void* stream = nullptr;
};

// Moments of each channel into out, problem.channels of them.
template <class T>
void moments(std::span<const T> x, const Problem& problem, std::span<Moments> out, const Options& options = {});

// y = (x - mean)*rstd*gamma + beta with the mean and the biased variance of x, whose moments go to saved. y may be
// exactly x.
template <class T>
void batch_norm(std::span<const T> x, const Problem& problem, ChannelValues gamma, ChannelValues beta, double eps,
                std::span<T> y, std::span<Moments> saved, const Options& options = {});

// The same with a mean and a variance that are given, or with moments: the second half.
template <class T>
void normalize(std::span<const T> x, const Problem& problem, ChannelValues mean, ChannelValues var, ChannelValues gamma,
               ChannelValues beta, double eps, std::span<T> y, const Options& options = {});
template <class T>
void normalize(std::span<const T> x, const Problem& problem, std::span<const Moments> moments, ChannelValues gamma,
               ChannelValues beta, double eps, std::span<T> y, const Options& options = {});

// sum(dy) and sum(dy*(x - mean)) of each channel.
template <class T>
void grad_sums(std::span<const T> dy, std::span<const T> x, const Problem& problem, std::span<const Moments> moments,
               std::span<GradSums> out, const Options& options = {});

// dx from these: the second half. dx may be exactly dy or x.
template <class T>
void grad_input(std::span<const T> dy, std::span<const T> x, const Problem& problem, std::span<const Moments> moments,
                std::span<const GradSums> sums, ChannelValues gamma, double eps, std::span<T> dx,
                const Options& options = {});

// Gradients of batch_norm() from what it saved; what is empty is not computed.
template <class T>
void batch_norm_backward(std::span<const T> dy, std::span<const T> x, const Problem& problem,
                         std::span<const Moments> saved, ChannelValues gamma, double eps, std::span<T> dx,
                         ChannelOutput dgamma, ChannelOutput dbeta, const Options& options = {});

// Gradients of normalize() with a mean and a variance that are constants. x is read where dgamma is asked for.
template <class T>
void normalize_backward(std::span<const T> dy, std::span<const T> x, const Problem& problem, ChannelValues mean,
                        ChannelValues var, ChannelValues gamma, double eps, std::span<T> dx, ChannelOutput dgamma,
                        ChannelOutput dbeta, const Options& options = {});

}  // namespace batchnorm::cuda
