// Groups of channels that share their statistics, neighbours or every so many: what the passes give of channels is
// added up to groups, and what a group has is given to each of its channels. Gamma, beta and their gradients stay those
// of the channels.
//
// With cells for the values of one channel (of a segment), n for those of a group, and xmu = x - mean:
//     moments of the group = those of its cells, merged
//     dx = gamma*rstd*dy + p*xmu + shift,  p = -rstd^3*sum(gamma*dy*xmu)/n,  shift = -rstd*sum(gamma*dy)/n
// where the sums are over the group: gamma times the sums of each cell, added. dgamma and dbeta are those of cells.
// Forward-mode takes sum(x_dot) and sum(x_dot*xmu) of the group in the place of a channel's.
//
// Groups may be taken about alpha times their mean, o = x - alpha*mean in the place of xmu (0: RMS norm; alpha of each
// channel, of width 1: graph norm). With do = gamma*rstd*dy + p*o the gradient by o, whose mean is that of
// gamma*rstd*dy and p*(1 - alpha)*mean,
//     dx = do - alpha*mean(do),  y' = gamma*rstd*(o' - xhat*mean(o'*xhat)),  o' = x' - alpha*mean(x').
#pragma once

#include "passes.hpp"
#include "workspace.hpp"

namespace batchnorm {

// The passes of passes.hpp for a call whose width is above 1: `moments` have one entry a group, `sums` one a channel.
template <class T>
class Grouped {
 public:
  explicit Grouped(const PassCall<T>& call);
  ~Grouped();
  Grouped(const Grouped&) = delete;
  Grouped& operator=(const Grouped&) = delete;

  void moments(const T* x, Moments* out);
  void batch_norm(const T* x, T* y, Moments* saved);
  void normalize(const T* x, const Moments* moments, T* y);

  void grad_sums(const T* dy, const T* x, const Moments* moments, GradSums* out);
  void grad_input(const T* dy, const T* x, const Moments* moments, const GradSums* sums, const FirstOutputs<T>& out);
  void batch_norm_backward(const T* dy, const T* x, const Moments* saved, const FirstOutputs<T>& out);
  void batch_norm_jvp(const T* x_dot, const T* x, const Moments* saved, const Tangents& tangents, T* y_dot);

 private:
  [[nodiscard]] bool measures() const { return call_.options.needed != nullptr; }
  [[nodiscard]] std::int64_t groups() const { return cells_.problem.channels / call_.width; }
  // Channels of group g: the first, then each `step` further on.
  [[nodiscard]] std::int64_t first_of(std::int64_t g) const { return call_.strided ? g : g * call_.width; }
  [[nodiscard]] std::int64_t step() const { return call_.strided ? groups() : 1; }
  template <class F>
  void for_channels_of(std::int64_t g, const F& f) const {
    const std::int64_t first = first_of(g), by = step();
    for (std::int64_t k = 0; k < call_.width; ++k) f(first + k * by);
  }

  [[nodiscard]] double alpha_of(std::int64_t c) const;
  void share(const Moments* of_groups);
  void set_terms(const GradSums* of_cells);
  void add_up_sums();
  void put_parameters(const FirstOutputs<T>& out) const;

  const PassCall<T>& call_;
  PassCall<T> cells_;  // the same, of channels by themselves
  std::size_t own_, needed_by_cells_ = 0;
  PassWorkspace workspace_;
  Moments* moments_;  // one a channel: those of its group
  GradSums* sums_;    // one a channel: of the cell, then what it is given
  const Moments* of_groups_ = nullptr;
};

}  // namespace batchnorm
