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

#include <cstddef>
#include <cstdint>
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

// ---- what becomes of results between calls ----

// The running statistics after one more batch, those of update_running() of batchnorm.hpp, from (mean, var) to
// (to_mean, to_var), which may be the same memory. `only_finite`: nothing is learned of a batch with a channel whose
// mean or m2 is not finite, or whose count leaves no variance.
void update_running(std::span<const double> mean, std::span<const double> var, std::span<const Moments> batch,
                    double update_rate, int ddof, bool only_finite, std::span<double> to_mean, std::span<double> to_var,
                    const Options& options = {});

// Moments of the union of all that was pooled and a batch, merge() of batchnorm.hpp, to `to`, which may be `pooled`;
// their mean, and their variance, 1 where they have none. ddof 0 or 1. `only_finite`: nothing is learned of a batch
// that leaves a mean or m2 that is not finite.
void pool(std::span<const Moments> pooled, std::span<const Moments> batch, int ddof, bool only_finite,
          std::span<Moments> to, std::span<double> mean, std::span<double> var, const Options& options = {});

// to = the sum over segments of a*x + b*y, values of segments and channels: gradients of channels from those of each
// segment. a may be empty for 1, b and y for 0.
void combine(ChannelOutput to, std::span<const double> a, std::span<const double> x, std::span<const double> b,
             std::span<const double> y, const Options& options = {});

// An array of up to 8 dimensions, of any strides (in bytes), of such elements.
enum class Element {
  boolean,
  int8,
  int16,
  int32,
  int64,
  uint8,
  uint16,
  uint32,
  uint64,
  float16,
  bfloat16,
  float32,
  float64
};
struct View {
  void* data = nullptr;
  Element element = Element::float32;
  std::span<const std::int64_t> sizes = {}, strides = {};  // read before lay_out() returns
};
// Copies the values of one array to another of the same sizes, in its order and rounded to its elements; `as_flags`: 1
// for what is not 0. They must not overlap.
void lay_out(const View& from, const View& to, bool as_flags = false, const Options& options = {});

// ---- devices and memory, for those who link no CUDA runtime of their own ----

// How many devices there are; throws, as all functions here, where something is missing.
int count_devices();
// A device's name and compute capability.
std::string describe_device(int device);
// The device whose memory this is.
int device_of(const void* memory);
// Makes a device the calling thread's current one; gives the one before.
int set_device(int device);

// Memory of the current device, in the order of a stream: cudaMallocAsync and cudaFreeAsync.
void* allocate(std::size_t bytes, const Options& options = {});
void release(void* memory, const Options& options = {}) noexcept;
// Waits until the stream has come so far.
void copy_to_host(void* to, const void* from, std::size_t bytes, const Options& options = {});
// `from` may be used again as soon as this returns.
void copy_to_device(void* to, const void* from, std::size_t bytes, const Options& options = {});
// A mark behind all that has been launched on the stream; and whether that is done, once it is the mark is no more.
void* mark(const Options& options = {});
bool is_past(void* mark);
// What is launched on options.stream from now on comes after all that has been launched on `other`.
void wait_for(void* other, const Options& options = {});

// ---- plans ----

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
