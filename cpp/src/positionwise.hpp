// Positions that have statistics of their own: layer and RMS norm. A position is a row of its channels, cut into lines
// of `width` of them, along which gamma and beta move (kernels/lines-inl.hpp). Where the channels of a position do not
// lie side by side, positions are turned a tile at a time.
//
// With n values a line, xmu = x - mean and h = gamma*dy:
//     dx = rstd*h + p*xmu + shift,  p = -rstd^3*sum(h*xmu)/n,  shift = -rstd*sum(h)/n,
// and about 0 instead of the mean xmu = x and shift = 0. dgamma and dbeta are sums over positions: chunks of them,
// which depend on the problem alone, position after position; then the chunks in their order.
#pragma once

#include "passes.hpp"

namespace batchnorm {

// The passes of passes.hpp for a call of each position: `moments` and `sums` have one entry a line, position first;
// sums are those of h.
template <class T>
class Positionwise {
 public:
  explicit Positionwise(const PassCall<T>& call);

  void moments(const T* x, Moments* out) const;
  void batch_norm(const T* x, T* y, Moments* saved) const;
  void normalize(const T* x, const Moments* moments, T* y) const;

  void grad_sums(const T* dy, const T* x, const Moments* moments, GradSums* out) const;
  void grad_input(const T* dy, const T* x, const Moments* moments, const GradSums* sums,
                  const FirstOutputs<T>& out) const;
  void batch_norm_backward(const T* dy, const T* x, const Moments* saved, const FirstOutputs<T>& out) const;
  void batch_norm_jvp(const T* x_dot, const T* x, const Moments* saved, const Tangents& tangents, T* y_dot) const;

 private:
  const PassCall<T>& call_;
};

}  // namespace batchnorm
