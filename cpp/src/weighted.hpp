// The calls with weights that api_weighted.cpp makes once arguments are checked; as passes.hpp. dx may be null.
#pragma once

#include "passes.hpp"
#include "weights.hpp"

namespace batchnorm {

template <class T>
struct GivenWeights {
  const kernels::WeightOf<T>* values;
  WeightSummary summary;
  Padding padding;
};

template <class T>
void run_weighted_moments(const T* x, const Problem& problem, const GivenWeights<T>& weights, Moments* out,
                          int threads);
template <class T>
void run_weighted_batch_norm(const T* x, const Problem& problem, const GivenWeights<T>& weights, ChannelValues gamma,
                             ChannelValues beta, double eps, T* y, Moments* saved, int threads);
template <class T>
void run_weighted_normalize(const T* x, const Problem& problem, const GivenWeights<T>& weights,
                            const GivenStatistics& given, ChannelValues gamma, ChannelValues beta, double eps, T* y,
                            int threads);
template <class T>
void run_weighted_grad_sums(const T* dy, const T* x, const Problem& problem, const GivenWeights<T>& weights,
                            const Moments* moments, GradSums* out, int threads);
template <class T>
void run_weighted_grad_input(const T* dy, const T* x, const Problem& problem, const GivenWeights<T>& weights,
                             const Moments* moments, const GradSums* sums, ChannelValues gamma, double eps, T* dx,
                             int threads);
template <class T>
void run_weighted_batch_norm_backward(const T* dy, const T* x, const Problem& problem, const GivenWeights<T>& weights,
                                      const Moments* saved, ChannelValues gamma, double eps, T* dx,
                                      ChannelOutput dgamma, ChannelOutput dbeta, int threads);
template <class T>
void run_weighted_normalize_backward(const T* dy, const T* x, const Problem& problem, const GivenWeights<T>& weights,
                                     const GivenStatistics& given, ChannelValues gamma, double eps, T* dx,
                                     ChannelOutput dgamma, ChannelOutput dbeta, int threads);

}  // namespace batchnorm
