// The calls with a ReLU that api_relu.cpp makes once arguments are checked; as passes.hpp. What may be absent is null.
#pragma once

#include "passes.hpp"

namespace batchnorm {

// A mask begins with this many bytes, of which the first says by how many bits the first element is behind them.
constexpr std::int64_t kReluMaskHead = 8;

template <class T>
struct ReluInto {
  const T* residual;
  T* y;
  std::uint8_t* mask;
};
template <class T>
struct ReluGradients {
  T *dx, *dresidual;
  ChannelOutput dgamma, dbeta;
};

template <class T>
void run_batch_norm_relu(const T* x, const Problem& problem, ChannelValues gamma, ChannelValues beta, double eps,
                         const ReluInto<T>& into, Moments* saved, int threads);
template <class T>
void run_normalize_relu(const T* x, const Problem& problem, const GivenStatistics& given, ChannelValues gamma,
                        ChannelValues beta, double eps, const ReluInto<T>& into, int threads);
template <class T>
void run_batch_norm_relu_backward(const T* dy, const T* x, const Problem& problem, const std::uint8_t* mask,
                                  const Moments* saved, ChannelValues gamma, double eps, const ReluGradients<T>& out,
                                  int threads);
template <class T>
void run_normalize_relu_backward(const T* dy, const T* x, const Problem& problem, const std::uint8_t* mask,
                                 const GivenStatistics& given, ChannelValues gamma, double eps,
                                 const ReluGradients<T>& out, int threads);

}  // namespace batchnorm
