// The passes as launches of kernels, one after another. Pointers are of the device; nothing here waits, allocates or
// looks at values.
#pragma once

#include <cstddef>

#include "cuda/launches.hpp"
#include "workspace.hpp"

namespace batchnorm::cuda {

// Of some segments of as many rows each, or of all of a call. On: where kernels are launched (launches.hpp).
template <class T, class On>
class Passes {
  using A = Arithmetic<T>;

 public:
  // Of the device, for segments of this problem.
  static std::size_t bytes(const Problem& problem, std::int64_t segments, bool weighs) {
    const Cut cut = make_cut(problem, segments);
    const std::int64_t entries = cut.entries();
    std::size_t all = Workspace::bytes_for<kernels::Sums>(most_pieces(cut)) +
                      Workspace::bytes_for<Conditioned>(entries) + Workspace::bytes_for<Moments>(entries) +
                      2 * Workspace::bytes_for<GradSums>(entries) + Workspace::bytes_for<A>(kMostFields * entries) +
                      Workspace::bytes_for<double>(kMostFields * entries) + Workspace::bytes_for<bool>(entries);
    if (weighs) {
      all += Workspace::bytes_for<WeighedChunk>(segments * chunks_of_weights(problem.count())) +
             Workspace::bytes_for<Weighed>(segments);
    }
    return all;
  }
  // `call` is of one segment, at the first value of all; its gamma, beta and dgamma, dbeta are of channels or entries.
  // `first` is the number of that value in the tensor. `memory`: bytes() of the device, at a line of 64 bytes.
  Passes(On& on, const PassCall<T>& call, std::int64_t segments, std::int64_t first, std::byte* memory)
      : on_(on),
        call_(call),
        cut_(make_cut(call.problem, segments)),
        elements_(call.problem, segments, first),
        how_{call.problem.channels, call.width, call.strided, call.about_zero, call.alpha} {
    Workspace workspace(memory);
    const std::int64_t entries = cut_.entries();
    sums_ = workspace.take<kernels::Sums>(most_pieces(cut_));
    conditioned_ = workspace.take<Conditioned>(entries);
    cells_ = workspace.take<Moments>(entries);
    grad_sums_ = workspace.take<GradSums>(entries);
    terms_ = workspace.take<GradSums>(entries);
    factors_.narrow = workspace.take<A>(kMostFields * entries);
    factors_.wide = workspace.take<double>(kMostFields * entries);
    factors_.is_wide = workspace.take<bool>(entries);
    factors_.entries = entries;
    if (!call.positions) return;
    of_chunks_ = workspace.take<WeighedChunk>(segments * chunks_of_weights(call.problem.count()));
    of_segments_ = workspace.take<Weighed>(segments);
    weights_ = {call.positions.values, of_segments_};
  }

  void moments(const T* x, Moments* out) {
    weigh();
    Moments* const cells = is_shared() ? cells_ : out;
    MomentsTaken<T>{x, weights_, sums_, conditioned_}.run(on_, cut_, cells);
    if (is_shared()) on_.each(groups(), merge_groups<T>, how_, cut_.segments, cells, out);
  }
  void batch_norm(const T* x, T* y, Moments* saved) {
    moments(x, saved);
    normalize(x, {saved, {}, {}}, y);
  }
  void normalize(const T* x, const Statistics& given, T* y) {
    Statistics of = given;
    if (given.moments != nullptr) of.moments = of_cells(given.moments);
    on_.each(cut_.entries(), finish_forward<T>, call_.problem.channels, !is_shared(), of, call_.gamma, call_.beta,
             call_.eps, factors_);
    Normalize<T> body{x, call_.tail.residual, y, factors_};
    body.relu = call_.tail.relu, body.bits_of_relu = call_.tail.bits, body.padded = padded();
    on_.map_all(elements_, body);
  }

  void grad_sums(const T* dy, const T* x, const Moments* saved, GradSums* out) {
    take_sums(dy, x, of_cells(saved), {out, {}, {}});
  }
  // dx or dresidual may be null.
  void grad_input(const T* dy, const T* x, const Moments* saved, const GradSums* sums, const FirstOutputs<T>& out) {
    if (out.dx != nullptr) set_factors(saved, of_cells(saved), sums);
    map_gradients(dy, x, out);
  }
  void backward(const T* dy, const T* x, const Moments* saved, const FirstOutputs<T>& out) {
    const Moments* cells = of_cells(saved);
    take_sums(dy, x, cells, {grad_sums_, out.dgamma, out.dbeta});
    if (out.dx != nullptr) set_factors(saved, cells, grad_sums_);
    map_gradients(dy, x, out);
  }

  // Of normalize() with a mean and var that are constants. x is read where dgamma is wanted.
  void normalize_backward(const T* dy, const T* x, ChannelValues mean, ChannelValues var, const FirstOutputs<T>& out) {
    const bool sums = out.dgamma.wanted() || out.dbeta.wanted();
    if (sums) on_.visit_all(cut_, gradients(dy, out.dgamma.wanted() ? x : dy, nullptr, mean));
    on_.each(cut_.entries(), finish_constant<T>, cut_, sums ? sums_ : nullptr, mean, var, call_.gamma, call_.eps,
             out.dgamma, out.dbeta, factors_);
    map_gradients(dy, nullptr, out);
  }

 private:
  // Whether the moments of a channel are those of a group (grouped.hpp).
  [[nodiscard]] bool is_shared() const { return call_.is_grouped(); }
  [[nodiscard]] std::int64_t groups() const { return cut_.segments * how_.groups(); }
  [[nodiscard]] Padded<A> padded() const { return {call_.positions.values, call_.padding}; }
  [[nodiscard]] Gate gate() const {
    return {call_.tail.bits == nullptr ? nullptr : call_.tail.bits - kBitsHead, elements_.first};
  }

  // What is known of weights, for moments and coefficients of dx.
  void weigh() {
    if (!call_.positions) return;
    const std::int64_t count = call_.problem.count(), chunks = chunks_of_weights(count);
    on_.each(cut_.segments * chunks * kLanes, weigh_chunks<A>, weights_.values, count, cut_.segments, of_chunks_);
    on_.each(cut_.segments, weigh_segments<A>, of_chunks_, chunks, cut_.segments, of_segments_);
  }
  // The moments of channels, of given ones of what they share.
  const Moments* of_cells(const Moments* given) {
    if (!is_shared()) return given;
    on_.each(cut_.entries(), share_moments<T>, how_, cut_.segments, given, cells_);
    return cells_;
  }

  // Where padding is normalized too, all positions depend on the statistics.
  [[nodiscard]] SumGradients<T> gradients(const T* dy, const T* x, const Moments* cells, ChannelValues mean) const {
    return {dy, x, gate(), call_.padding == Padding::normalize ? nullptr : weights_.values, cells, mean, sums_};
  }
  void take_sums(const T* dy, const T* x, const Moments* cells, const GradientOutputs& out) {
    on_.visit_all(cut_, gradients(dy, x, cells, {}));
    on_.each(cut_.entries(), finish_sums<T>, cut_, sums_, cells, call_.eps, out);
  }
  void set_factors(const Moments* saved, const Moments* cells, const GradSums* sums) {
    weigh();
    if (is_shared()) {
      on_.each(groups(), set_terms<T>, how_, cut_.segments, saved, cells, sums, call_.gamma, call_.eps, terms_);
    }
    on_.each(cut_.entries(), finish_backward<T>, call_.problem.channels, is_shared(), is_shared() ? terms_ : sums,
             cells, weights_, call_.gamma, call_.eps, factors_);
  }
  void map_gradients(const T* dy, const T* x, const FirstOutputs<T>& out) {
    if (out.dx == nullptr && out.dresidual == nullptr) return;
    GradInput<T> body{dy, x, out.dx, out.dresidual, out.dx == nullptr ? FactorTable<A>{} : factors_};
    body.gate = gate(), body.weights = weights_.values, body.padded = padded();
    on_.map_all(elements_, body);
  }

  Launches<On> on_;
  const PassCall<T>& call_;
  Cut cut_;
  Elements elements_;
  Sharing how_;
  WeighedChunk* of_chunks_ = nullptr;
  Weighed* of_segments_ = nullptr;
  Weights<A> weights_;
  kernels::Sums* sums_;
  Conditioned* conditioned_;
  Moments* cells_;
  GradSums *grad_sums_, *terms_;
  FactorTable<A> factors_;
};

}  // namespace batchnorm::cuda
