// The passes as launches of kernels, one after another. Pointers are of the device; nothing here waits, allocates or
// looks at values.
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

#include "cuda/launches.hpp"
#include "workspace.hpp"

namespace batchnorm::cuda {

// The segments of a call: cut, those of as many rows together, and how many there are in all.
struct CutSegments {
  std::vector<Cut> cuts;
  std::int64_t count = 1;

  // Whether there are all, one after the other, in a single cut.
  [[nodiscard]] bool are_alike() const { return cuts.size() == 1 && !cuts.front().segments.listed; }
  template <class F>
  [[nodiscard]] std::int64_t most(const F& f) const {
    std::int64_t all = 0;
    for (const Cut& cut : cuts) all = std::max(all, f(cut));
    return all;
  }
};

// On: where kernels are launched (launches.hpp).
template <class T, class On>
class Passes {
  using A = Arithmetic<T>;

 public:
  // Of the device.
  static std::size_t bytes(const PassCall<T>& call, const CutSegments& segments) {
    const std::int64_t entries = segments.count * call.problem.channels;
    std::size_t all = Workspace::bytes_for<kernels::Sums>(segments.most(most_pieces)) +
                      Workspace::bytes_for<Conditioned>(entries) + Workspace::bytes_for<Moments>(entries) +
                      2 * Workspace::bytes_for<GradSums>(entries) + Workspace::bytes_for<A>(kMostFields * entries) +
                      Workspace::bytes_for<double>(kMostFields * entries) + Workspace::bytes_for<bool>(entries);
    if (call.positions) {
      all += Workspace::bytes_for<Weighed>(segments.most(chunks_of)) + Workspace::bytes_for<Weighed>(segments.count);
    }
    return all + (segments.are_alike() ? 0 : Workspace::bytes_for<int>(call.problem.outer));
  }
  // gamma, beta, dgamma and dbeta are of channels or of entries. `memory`: bytes() of the device, at a line of 64
  // bytes.
  Passes(On& on, const PassCall<T>& call, const CutSegments& segments, std::byte* memory)
      : on_(on),
        call_(call),
        segments_(segments),
        how_{call.problem.channels, call.width, call.strided, call.about_zero, call.alpha} {
    Workspace workspace(memory);
    sums_ = workspace.take<kernels::Sums>(segments.most(most_pieces));
    conditioned_ = workspace.take<Conditioned>(entries());
    cells_ = workspace.take<Moments>(entries());
    grad_sums_ = workspace.take<GradSums>(entries());
    terms_ = workspace.take<GradSums>(entries());
    factors_.narrow = workspace.take<A>(kMostFields * entries());
    factors_.wide = workspace.take<double>(kMostFields * entries());
    factors_.is_wide = workspace.take<bool>(entries());
    factors_.entries = entries();
    if (call.positions) {
      of_chunks_ = workspace.take<Weighed>(segments.most(chunks_of));
      of_segments_ = workspace.take<Weighed>(segments.count);
      weights_ = {call.positions.values, of_segments_};
    }
    if (!segments.are_alike()) numbers_ = workspace.take<int>(call.problem.outer);
  }

  void moments(const T* x, Moments* out) {
    weigh();
    Moments* const cells = is_shared() ? cells_ : out;
    const MomentsTaken<T> taken{x, weights_, sums_, conditioned_};
    for (const Cut& cut : segments_.cuts) taken.run(on_, cut, cells);
    if (is_shared()) on_.each(groups(), merge_groups<T>, how_, segments_.count, cells, out);
  }
  void batch_norm(const T* x, T* y, Moments* saved) {
    moments(x, saved);
    normalize(x, {saved, {}, {}}, y);
  }
  void normalize(const T* x, const Statistics& given, T* y) {
    Statistics of = given;
    if (given.moments != nullptr) of.moments = of_cells(given.moments);
    on_.each(entries(), finish_forward<T>, call_.problem.channels, !is_shared(), of, call_.gamma, call_.beta, call_.eps,
             factors_);
    Normalize<T> body{x, call_.tail.residual, y, factors_};
    body.relu = call_.tail.relu, body.bits_of_relu = call_.tail.bits, body.padded = padded();
    on_.map_all(elements(), body);
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
    const Cut& cut = segments_.cuts.front();  // of one segment
    if (sums) on_.visit_all(cut, gradients(dy, out.dgamma.wanted() ? x : dy, nullptr, mean));
    on_.each(entries(), finish_constant<T>, cut, sums ? sums_ : nullptr, mean, var, call_.gamma, call_.eps, out.dgamma,
             out.dbeta, factors_);
    map_gradients(dy, nullptr, out);
  }

 private:
  // Whether the moments of a channel are those of a group (grouped.hpp).
  [[nodiscard]] bool is_shared() const { return call_.is_grouped(); }
  [[nodiscard]] std::int64_t groups() const { return segments_.count * how_.groups(); }
  [[nodiscard]] std::int64_t entries() const { return segments_.count * call_.problem.channels; }
  static std::int64_t chunks_of(const Cut& cut) { return cut.segments.count * chunks_of_weights(cut.problem.count()); }
  [[nodiscard]] Padded<A> padded() const { return {call_.positions.values, call_.padding}; }
  [[nodiscard]] Gate gate() const { return {call_.tail.bits == nullptr ? nullptr : call_.tail.bits - kBitsHead}; }

  // The values of all segments; where these are of many lengths, each row is told its own first.
  Elements elements() {
    const Problem& p = call_.problem;
    if (segments_.are_alike())
      return {{p.outer / std::max<std::int64_t>(segments_.count, 1), p.channels, p.inner}, segments_.count};
    for (const Cut& cut : segments_.cuts) {
      const std::int64_t rows = p.inner == 0 ? 0 : cut.problem.count() / p.inner;
      on_.each(cut.segments.count * rows, number_rows<T>, cut, rows, p.inner, numbers_);
    }
    return {p, 1, numbers_};
  }
  // What is known of weights, for moments and coefficients of dx.
  void weigh() {
    if (!call_.positions) return;
    for (const Cut& cut : segments_.cuts) {
      on_.each(chunks_of(cut) * kLanes, weigh_chunks<A>, cut, weights_.values, of_chunks_);
      on_.each(cut.segments.count, weigh_segments<A>, cut, of_chunks_, of_segments_);
    }
  }
  // The moments of channels, of given ones of what they share.
  const Moments* of_cells(const Moments* given) {
    if (!is_shared()) return given;
    on_.each(entries(), share_moments<T>, how_, segments_.count, given, cells_);
    return cells_;
  }

  // Where padding is normalized too, all positions depend on the statistics.
  [[nodiscard]] SumGradients<T> gradients(const T* dy, const T* x, const Moments* cells, ChannelValues mean) const {
    return {dy, x, gate(), call_.padding == Padding::normalize ? nullptr : weights_.values, cells, mean, sums_};
  }
  void take_sums(const T* dy, const T* x, const Moments* cells, const GradientOutputs& out) {
    for (const Cut& cut : segments_.cuts) {
      on_.visit_all(cut, gradients(dy, x, cells, {}));
      on_.each(cut.entries(), finish_sums<T>, cut, sums_, cells, call_.eps, out);
    }
  }
  void set_factors(const Moments* saved, const Moments* cells, const GradSums* sums) {
    weigh();
    if (is_shared()) {
      on_.each(groups(), set_terms<T>, how_, segments_.count, saved, cells, sums, call_.gamma, call_.eps, terms_);
    }
    on_.each(entries(), finish_backward<T>, call_.problem.channels, is_shared(), is_shared() ? terms_ : sums, cells,
             weights_, call_.gamma, call_.eps, factors_);
  }
  void map_gradients(const T* dy, const T* x, const FirstOutputs<T>& out) {
    if (out.dx == nullptr && out.dresidual == nullptr) return;
    GradInput<T> body{dy, x, out.dx, out.dresidual, out.dx == nullptr ? FactorTable<A>{} : factors_};
    body.gate = gate(), body.weights = weights_.values, body.padded = padded();
    on_.map_all(elements(), body);
  }

  Launches<On> on_;
  const PassCall<T>& call_;
  const CutSegments& segments_;
  Sharing how_;
  Weighed* of_chunks_ = nullptr;
  Weighed* of_segments_ = nullptr;
  Weights<A> weights_;
  kernels::Sums* sums_;
  Conditioned* conditioned_;
  Moments* cells_;
  GradSums *grad_sums_, *terms_;
  FactorTable<A> factors_;
  int* numbers_ = nullptr;
};

}  // namespace batchnorm::cuda
