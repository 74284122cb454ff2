// The passes as launches of the kernels of steps.cuh, one after another. Pointers are of the device; nothing here
// waits, allocates or looks at values.
#pragma once

#include <algorithm>
#include <cstddef>

#include "cuda/steps.cuh"
#include "workspace.hpp"

namespace batchnorm::cuda {

// On is where kernels are launched: on.launch(kernel, grid, block, arguments...).
template <class T, class On>
class Passes {
 public:
  static std::size_t bytes(const Problem& problem) {
    const Cut cut = make_cut(problem);
    return Workspace::bytes_for<kernels::Sums>(most_pieces(cut)) + Workspace::bytes_for<Conditioned>(problem.channels) +
           Workspace::bytes_for<Factors>(problem.channels);
  }
  // `memory`: bytes(problem) of the device, at a line of 64 bytes.
  Passes(On& on, const Problem& problem, std::byte* memory)
      : on_(on), cut_(make_cut(problem)), again_(single_rows(cut_)) {
    Workspace workspace(memory);
    sums_ = workspace.take<kernels::Sums>(most_pieces(cut_));
    conditioned_ = workspace.take<Conditioned>(problem.channels);
    factors_ = workspace.take<Factors>(problem.channels);
  }

  void moments(const T* x, Moments* out) {
    visit_all(cut_, SumMoments<T, Again::no>{x, conditioned_, sums_});
    finish(cut_, Again::no, out);
    visit_all(again_, SumMoments<T, Again::about_shift>{x, conditioned_, sums_});
    finish(again_, Again::about_shift, out);
    visit_all(again_, SumMoments<T, Again::compensated>{x, conditioned_, sums_});
    finish(again_, Again::compensated, out);
    each_channel(settle_moments<T>, cut_.problem, x, out);
  }
  void batch_norm(const T* x, ChannelValues gamma, ChannelValues beta, double eps, T* y, Moments* saved) {
    moments(x, saved);
    normalize(x, {saved, {}, {}}, gamma, beta, eps, y);
  }
  void normalize(const T* x, const Statistics& of, ChannelValues gamma, ChannelValues beta, double eps, T* y) {
    each_channel(finish_forward<T>, cut_.problem.channels, of, gamma, beta, eps, factors_);
    visit_all(cut_, Normalize<T>{x, y, factors_});
  }

  void grad_sums(const T* dy, const T* x, const Moments* saved, GradSums* out) {
    visit_all(cut_, SumGradients<T>{dy, x, saved, {}, sums_});
    finish_gradients(nullptr, saved, {}, 0, {out, {}, {}, nullptr});
  }
  void grad_input(const T* dy, const T* x, const Moments* saved, const GradSums* sums, ChannelValues gamma, double eps,
                  T* dx) {
    finish_gradients(sums, saved, gamma, eps, {nullptr, {}, {}, factors_});
    visit_all(cut_, GradInput<T>{dy, x, dx, factors_});
  }
  // dx may be null.
  void backward(const T* dy, const T* x, const Moments* saved, ChannelValues gamma, double eps, T* dx,
                ChannelOutput dgamma, ChannelOutput dbeta) {
    visit_all(cut_, SumGradients<T>{dy, x, saved, {}, sums_});
    finish_gradients(nullptr, saved, gamma, eps, {nullptr, dgamma, dbeta, dx == nullptr ? nullptr : factors_});
    if (dx != nullptr) visit_all(cut_, GradInput<T>{dy, x, dx, factors_});
  }

  // Of normalize() with a mean and var that are constants. x is read where dgamma is wanted.
  void normalize_backward(const T* dy, const T* x, ChannelValues mean, ChannelValues var, ChannelValues gamma,
                          double eps, T* dx, ChannelOutput dgamma, ChannelOutput dbeta) {
    const bool sums = dgamma.wanted() || dbeta.wanted();
    if (sums) visit_all(cut_, SumGradients<T>{dy, dgamma.wanted() ? x : dy, nullptr, mean, sums_});
    const GradientOutputs out{nullptr, dgamma, dbeta, dx == nullptr ? nullptr : factors_};
    each_channel(finish_constant<T>, cut_, sums ? sums_ : nullptr, mean, var, gamma, eps, out);
    if (dx != nullptr) visit_all(cut_, Normalize<T>{dy, dx, factors_});
  }

 private:
  static std::int64_t most_pieces(const Cut& cut) { return std::max(cut.pieces(), single_rows(cut).pieces()); }

  template <class Kernel, class... Args>
  void launch(std::int64_t threads, Kernel kernel, const Args&... args) {
    if (threads == 0) return;
    on_.launch(kernel, static_cast<unsigned>((threads + kStepThreads - 1) / kStepThreads), kStepThreads, args...);
  }
  template <class Body>
  void visit_all(const Cut& cut, const Body& body) {
    launch(cut.threads(), visit<Body>, cut, body);
  }
  template <class Kernel, class... Args>
  void each_channel(Kernel kernel, const Args&... args) {
    launch(cut_.problem.channels, kernel, args...);
  }
  void finish(const Cut& cut, Again taken, Moments* out) {
    each_channel(finish_moments<T>, cut, sums_, taken, conditioned_, out);
  }
  void finish_gradients(const GradSums* given, const Moments* saved, ChannelValues gamma, double eps,
                        const GradientOutputs& out) {
    each_channel(finish_backward<T>, cut_, sums_, given, saved, gamma, eps, out);
  }

  On& on_;
  Cut cut_, again_;
  kernels::Sums* sums_;
  Conditioned* conditioned_;
  Factors* factors_;
};

}  // namespace batchnorm::cuda
