// The calls that api.cpp makes once arguments are checked. Pointers may be null where the comment says so.
#pragma once

#include <cstddef>

#include "batchnorm/types.hpp"
#include "dispatch.hpp"

namespace batchnorm {

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

// What a pass that is a part of a larger call is told about that.
struct PartOf {
  std::int64_t size =
      0;  // values of the whole tensor, whose parts are worked on one after the other; 0: it is all of it
  std::byte* memory = nullptr;    // what the larger call has for the pass to work in; null: it sees to that itself
  std::size_t* needed = nullptr;  // where not null, the pass raises this to the memory that it needs, and does no more
};

// forward.cpp
template <class T>
void run_moments(const T* x, const Problem& problem, Moments* out, int threads, const PartOf& part = {});
template <class T>
void run_batch_norm(const T* x, const Problem& problem, ChannelValues gamma, ChannelValues beta, double eps, T* y,
                    Moments* saved, int threads, const PartOf& part = {});
template <class T>
void run_normalize(const T* x, const Problem& problem, const GivenStatistics& given, ChannelValues gamma,
                   ChannelValues beta, double eps, T* y, int threads, const PartOf& part = {});

// backward.cpp. dx may be null.
template <class T>
void run_grad_sums(const T* dy, const T* x, const Problem& problem, const Moments* moments, GradSums* out, int threads);
template <class T>
void run_grad_input(const T* dy, const T* x, const Problem& problem, const Moments* moments, const GradSums* sums,
                    ChannelValues gamma, double eps, T* dx, int threads);
template <class T>
void run_batch_norm_backward(const T* dy, const T* x, const Problem& problem, const Moments* saved, ChannelValues gamma,
                             double eps, T* dx, ChannelOutput dgamma, ChannelOutput dbeta, int threads,
                             const PartOf& part = {});
template <class T>
void run_normalize_backward(const T* dy, const T* x, const Problem& problem, const GivenStatistics& given,
                            ChannelValues gamma, double eps, T* dx, ChannelOutput dgamma, ChannelOutput dbeta,
                            int threads);
// `sums` of x_dot and x, or null where they are to be taken.
template <class T>
void run_batch_norm_jvp(const T* x_dot, const T* x, const Problem& problem, const Moments* saved, const GradSums* sums,
                        ChannelValues gamma, const Tangents& tangents, double eps, T* y_dot, int threads);
template <class T>
void run_normalize_jvp(const T* x_dot, const T* x, const Problem& problem, const GivenStatistics& given,
                       ChannelValues gamma, const Tangents& tangents, double eps, T* y_dot, int threads);

// double_backward.cpp
template <class T>
void run_batch_norm_double_backward(const T* v, const T* dy, const T* x, const Problem& problem, const Moments* saved,
                                    ChannelValues gamma, const Cotangents& w, double eps, const SecondOutputs<T>& out,
                                    int threads);
template <class T>
void run_normalize_double_backward(const T* v, const T* dy, const T* x, const Problem& problem,
                                   const GivenStatistics& given, ChannelValues gamma, const Cotangents& w, double eps,
                                   const SecondOutputs<T>& out, int threads);

}  // namespace batchnorm
