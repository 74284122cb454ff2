// The passes that api.cpp runs once arguments are checked, over a call or one of its segments. Pointers may be null
// where the comment says so.
#pragma once

#include <cstddef>

#include "batchnorm/call.hpp"
#include "counted.hpp"
#include "dispatch.hpp"
#include "kernels/table.hpp"

namespace batchnorm {

// The bits of a ReLU begin behind this many bytes, of which the first says by how many bits the first element is behind
// them.
constexpr std::int64_t kBitsHead = 8;

// How many values behind the begin of a vector's line p lies.
template <class T>
std::int64_t values_past_line(const T* p) {
  return static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(p) / sizeof(T)) % kernels::kVectorColumns;
}

// What of a call the passes read: all of it, or one segment.
template <class T>
struct Part {
  Problem problem;
  Positions<T> positions = {};
  WeightSummary summary = {};  // of the weights of these positions
  Padding padding = Padding::normalize;
  ChannelValues gamma = {}, beta = {};
  double eps = 0;
  kernels::Tail<T> tail = {};  // whose residual and first bit are those of the first value here
  // Forward with bits: where in their first byte they begin is for the pass to choose, and to write.
  std::uint8_t* bits_head = nullptr;

  // What the values of a channel weigh together.
  [[nodiscard]] DoubleDouble count() const {
    return positions ? summary.total : DoubleDouble{static_cast<double>(problem.count()), 0};
  }
};

// Of a larger call, to a pass over one part of it.
struct PartOf {
  // Values of the whole tensor, whose parts are worked on one after the other; 0: it is all of it.
  std::int64_t size = 0;
  std::byte* memory = nullptr;    // what the larger call has for the pass to work in; null: it sees to that itself
  bool is_turned = false;         // whether it is a tile of short runs (short_runs.hpp)
  std::size_t* needed = nullptr;  // where not null, the pass raises this to the memory that it needs, and does no more
};

// Statistics that are given, not computed: mean and var, or moments.
struct GivenStatistics {
  ChannelValues mean, var;
  const Moments* moments = nullptr;  // where not null, instead of mean and var
  bool only_scale = false;           // y = gamma*rstd*x: what normalize's gradient does to dy
};

// Tangents of the values of channels; 0 where absent. mean and var are for given statistics alone.
struct Tangents {
  ChannelValues gamma, beta, mean, var;
};

// Cotangents of dgamma and dbeta; 0 where absent.
struct Cotangents {
  ChannelValues dgamma, dbeta;
};
// Gradients of the gradients: ddy and dx may be null.
template <class T>
struct SecondOutputs {
  T *ddy, *dx;
  ChannelOutput dgamma;
};
// First ones: dx and dresidual may be null.
template <class T>
struct FirstOutputs {
  T *dx = nullptr, *dresidual = nullptr;
  ChannelOutput dgamma = {}, dbeta = {};
};

// forward.cpp
template <class T>
void run_moments(const T* x, const Part<T>& call, Moments* out, int threads, const PartOf& part = {});
template <class T>
void run_batch_norm(const T* x, const Part<T>& call, T* y, Moments* saved, int threads, const PartOf& part = {});
template <class T>
void run_normalize(const T* x, const Part<T>& call, const GivenStatistics& given, T* y, int threads,
                   const PartOf& part = {});

// backward.cpp
template <class T>
void run_grad_sums(const T* dy, const T* x, const Part<T>& call, const Moments* moments, GradSums* out, int threads,
                   const PartOf& part = {});
template <class T>
void run_grad_input(const T* dy, const T* x, const Part<T>& call, const Moments* moments, const GradSums* sums,
                    const FirstOutputs<T>& out, int threads, const PartOf& part = {});
template <class T>
void run_batch_norm_backward(const T* dy, const T* x, const Part<T>& call, const Moments* saved,
                             const FirstOutputs<T>& out, int threads, const PartOf& part = {});
template <class T>
void run_normalize_backward(const T* dy, const T* x, const Part<T>& call, const GivenStatistics& given,
                            const FirstOutputs<T>& out, int threads);
// `sums` of x_dot and x, or null where they are to be taken.
template <class T>
void run_batch_norm_jvp(const T* x_dot, const T* x, const Part<T>& call, const Moments* saved, const GradSums* sums,
                        const Tangents& tangents, T* y_dot, int threads, const PartOf& part = {});
template <class T>
void run_normalize_jvp(const T* x_dot, const T* x, const Part<T>& call, const GivenStatistics& given,
                       const Tangents& tangents, T* y_dot, int threads);

// double_backward.cpp
template <class T>
void run_batch_norm_double_backward(const T* v, const T* dy, const T* x, const Part<T>& call, const Moments* saved,
                                    const Cotangents& w, const SecondOutputs<T>& out, int threads);
template <class T>
void run_normalize_double_backward(const T* v, const T* dy, const T* x, const Part<T>& call,
                                   const GivenStatistics& given, const Cotangents& w, const SecondOutputs<T>& out,
                                   int threads);

}  // namespace batchnorm
