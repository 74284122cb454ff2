// The calls that api.cpp makes once arguments are checked. Pointers may be null where the comment says so.
#pragma once

#include "batchnorm/types.hpp"
#include "dispatch.hpp"

namespace batchnorm {

// Statistics that are given, not computed: mean and var, or moments.
struct GivenStatistics {
  ChannelValues mean, var;
  const Moments* moments = nullptr;  // where not null, instead of mean and var
  bool only_scale = false;           // y = gamma*rstd*x: what normalize's gradient does to dy
};

// forward.cpp
template <class T>
void run_moments(const T* x, const Problem& problem, Moments* out, int threads);
template <class T>
void run_batch_norm(const T* x, const Problem& problem, ChannelValues gamma, ChannelValues beta, double eps, T* y,
                    Moments* saved, int threads);
template <class T>
void run_normalize(const T* x, const Problem& problem, const GivenStatistics& given, ChannelValues gamma,
                   ChannelValues beta, double eps, T* y, int threads);

// backward.cpp. dx may be null.
template <class T>
void run_grad_sums(const T* dy, const T* x, const Problem& problem, const Moments* moments, GradSums* out, int threads);
template <class T>
void run_grad_input(const T* dy, const T* x, const Problem& problem, const Moments* moments, const GradSums* sums,
                    ChannelValues gamma, double eps, T* dx, int threads);
template <class T>
void run_batch_norm_backward(const T* dy, const T* x, const Problem& problem, const Moments* saved, ChannelValues gamma,
                             double eps, T* dx, ChannelOutput dgamma, ChannelOutput dbeta, int threads);
template <class T>
void run_normalize_backward(const T* dy, const T* x, const Problem& problem, const GivenStatistics& given,
                            ChannelValues gamma, double eps, T* dx, ChannelOutput dgamma, ChannelOutput dbeta,
                            int threads);

}  // namespace batchnorm
