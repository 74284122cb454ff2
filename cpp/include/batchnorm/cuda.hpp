// The passes on NVIDIA GPUs, of tensors that live there: in builds with -DBATCHNORM_CUDA=ON.
//
// The functions are those of batchnorm.hpp, of the same Call, with the same formulas, checks of sizes and bits. All
// memory that they are given is the device's: tensors, gamma, beta and alpha, weights, the bits of a ReLU, moments and
// sums; but call.groups.offsets, which is read before they return. They launch work on a stream and return: what they
// read and write must stay until it is done. They never wait, and take memory to work in by cudaMallocAsync on that
// stream, so that a call can be captured in a graph. Segments that have as many rows are launched together. T is
// Float16, BFloat16, float or double.
//
// Values in device memory are not looked at, so that what batchnorm.hpp refuses for its values is not refused here: a
// negative variance gives NaN, a channel with a single value that counts a variance of 0; weights that are not finite
// and >= 0 give what they give.
//
// Throws std::invalid_argument for sizes, overlaps and settings as batchnorm.hpp does, before anything is launched;
// std::bad_alloc where the device has no memory; std::runtime_error where there is no driver, none that is new enough,
// no device, or one below compute capability 8.0, and with what the runtime says of all else.
#pragma once

#include <span>
#include <string>

#include "batchnorm/call.hpp"
#include "batchnorm/float16.hpp"
#include "batchnorm/types.hpp"

namespace batchnorm::cuda {

// Where a call is launched: a cudaStream_t of the current device; null: its default stream.
struct Options {
  void* stream = nullptr;
};

// Moments of each channel, or of what else shares statistics, into out.
template <class T>
void moments(std::span<const T> x, const Call<T>& call, std::span<Moments> out, const Options& options = {});

// y from the statistics of this batch, which go to saved. y may be exactly x or exactly the residual.
template <class T>
void batch_norm(std::span<const T> x, const Call<T>& call, std::span<T> y, std::span<Moments> saved,
                const Options& options = {});

// y from a mean and a variance that are given, or from moments: the second half.
template <class T>
void normalize(std::span<const T> x, const Call<T>& call, ChannelValues mean, ChannelValues var, std::span<T> y,
               const Options& options = {});
template <class T>
void normalize(std::span<const T> x, const Call<T>& call, std::span<const Moments> moments, std::span<T> y,
               const Options& options = {});

// sum(dy) and sum(dy*(x - mean)): the first half of the gradients; and dx from these: the second. dx and dresidual may
// each be exactly dy or x.
template <class T>
void grad_sums(std::span<const T> dy, std::span<const T> x, const Call<T>& call, std::span<const Moments> moments,
               std::span<GradSums> out, const Options& options = {});
template <class T>
void grad_input(std::span<const T> dy, std::span<const T> x, const Call<T>& call, std::span<const Moments> moments,
                std::span<const GradSums> sums, std::span<T> dx, std::span<T> dresidual = {},
                const Options& options = {});

// Gradients of batch_norm() from what it saved; what is empty is not computed.
template <class T>
void batch_norm_backward(std::span<const T> dy, std::span<const T> x, const Call<T>& call,
                         std::span<const Moments> saved, const Gradients<T>& out, const Options& options = {});

// Gradients of normalize() with a mean and a variance that are constants. x is read where dgamma is asked for.
template <class T>
void normalize_backward(std::span<const T> dy, std::span<const T> x, const Call<T>& call, ChannelValues mean,
                        ChannelValues var, const Gradients<T>& out, const Options& options = {});

// What batch_norm() and batch_norm_backward() are planned to do on the current device, without doing it: a function of
// the call's sizes and settings and of the device alone. `bytes`: of tensors, weights and bits that move through its
// memory, where nothing stays in caches. Backward with dx, and with dresidual where the call has a residual.
struct Planned {
  std::string kernels;
  double bytes = 0;
};
template <class T>
Planned plan_batch_norm(const Call<T>& call, const Options& options = {});
template <class T>
Planned plan_batch_norm_backward(const Call<T>& call, const Options& options = {});

}  // namespace batchnorm::cuda
