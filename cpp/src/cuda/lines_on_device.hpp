// The passes of a call whose positions have statistics of their own, as launches of kernels (passes_on_device.hpp).
#pragma once

#include <cstddef>

#include "cuda/held_lines.cuh"
#include "cuda/launches.hpp"
#include "workspace.hpp"

namespace batchnorm::cuda {

template <class T, class On>
class LinePasses {
  using A = Arithmetic<T>;

 public:
  // In which the sums of columns are taken.
  static std::int64_t chunks(const PassCall<T>& call) { return plan_of(call).chunks; }
  static std::size_t bytes(const PassCall<T>& call) {
    const Cut cut = make_line_cut(call.problem, call.width);
    const std::int64_t lines = cut.entries();
    return Workspace::bytes_for<kernels::Sums>(most_pieces(cut)) + Workspace::bytes_for<Conditioned>(lines) +
           4 * Workspace::bytes_for<double>(lines) + Workspace::bytes_for<LineFactors>(lines) +
           Workspace::bytes_for<LineTerms>(lines) + Workspace::bytes_for<GradSums>(lines) +
           Workspace::bytes_for<kernels::Sums>(chunks(call) * call.problem.channels) + Workspace::bytes_for<int>(1);
  }
  // How lines are held where y is wanted.
  static HeldLines held(const PassCall<T>& call, const Device& device) {
    if (call.problem.size() == 0) return {};
    return plan_held_lines<T>(make_line_cut(call.problem, call.width), device, call.tail.bits != nullptr);
  }
  LinePasses(On& on, const PassCall<T>& call, const Device& device, std::byte* memory)
      : on_(on),
        held_(held(call, device)),
        call_(call),
        plan_(plan_of(call)),
        cut_(make_line_cut(call.problem, call.width)),
        elements_(call.problem, 1),
        how_{cut_.lines, cut_.entries(), call.eps, call.about_zero, call.gamma, call.beta} {
    Workspace workspace(memory);
    const std::int64_t lines = cut_.entries();
    sums_ = workspace.take<kernels::Sums>(most_pieces(cut_));
    conditioned_ = workspace.take<Conditioned>(lines);
    for (double** of : {&table_.mean, &table_.mean_lo, &table_.rstd, &table_.rstd_lo}) {
      *of = workspace.take<double>(lines);
    }
    table_.factors = workspace.take<LineFactors>(lines);
    table_.terms = workspace.take<LineTerms>(lines);
    grad_sums_ = workspace.take<GradSums>(lines);
    columns_ = workspace.take<kernels::Sums>(plan_.chunks * call.problem.channels);
    wide_ = workspace.take<int>(1);
  }

  void moments(const T* x, Moments* out) {
    MomentsTaken<T>{x, {}, sums_, conditioned_}.run(on_, cut_, out);
    if (call_.positions) on_.each(how_.count, leave_out<T>, how_, call_.positions.values, out);
  }
  void batch_norm(const T* x, T* y, Moments* saved) {
    if (held_.lines > 0) {
      find_wide_parameters();
      return on_.blocks((how_.count + held_.lines - 1) / held_.lines, held_.lines * kLanes, held_.shared_bytes,
                        hold_lines<T>, how_, body_of(x, y), call_.positions.values, wide_, held_.stride, saved);
    }
    moments(x, saved);
    normalize(x, {saved, {}, {}}, y);
  }
  void normalize(const T* x, const Statistics& given, T* y) {
    finish(given.moments);
    on_.map_all(elements_, body_of(x, y));
  }

  void grad_sums(const T* dy, const T* x, const Moments* saved, GradSums* out) {
    finish(saved);
    on_.each(how_.count * kLanes, sum_lines<T>, how_, inputs(dy, x), table_, out);
  }
  // dx or dresidual may be null.
  void grad_input(const T* dy, const T* x, const Moments* saved, const GradSums* sums, const FirstOutputs<T>& out) {
    finish(saved);
    go_down(dy, x, saved, sums, out);
  }
  void backward(const T* dy, const T* x, const Moments* saved, const FirstOutputs<T>& out) {
    grad_sums(dy, x, saved, grad_sums_);
    go_down(dy, x, saved, grad_sums_, out);
    if (!out.dgamma.wanted() && !out.dbeta.wanted()) return;
    on_.each(call_.problem.channels, finish_columns<T>, call_.problem.channels, plan_.chunks, columns_, out.dgamma,
             out.dbeta);
  }

 private:
  // Chunks are those of the CPU, a function of the problem alone.
  static LinePlan plan_of(const PassCall<T>& call) {
    return make_line_plan(call.problem, call.work(true, true, 3), Machine{}, 1);
  }
  [[nodiscard]] Padded<A> padded() const { return {call_.positions.values, call_.padding}; }
  [[nodiscard]] LineInputs<T> inputs(const T* dy, const T* x) const {
    return {dy, x, {call_.tail.bits == nullptr ? nullptr : call_.tail.bits - kBitsHead}, padded()};
  }

  [[nodiscard]] Normalize<T, OfLine<T>> body_of(const T* x, T* y) const {
    Normalize<T, OfLine<T>> body{x, call_.tail.residual, y, {how_, table_}};
    body.relu = call_.tail.relu, body.bits_of_relu = call_.tail.bits, body.padded = padded();
    return body;
  }
  void find_wide_parameters() { on_.warp(find_wide<T>, how_, wide_); }
  void finish(const Moments* moments) {
    if (how_.count == 0) return;
    find_wide_parameters();
    on_.each(how_.count, finish_lines<T>, how_, moments, wide_, table_);
  }
  void go_down(const T* dy, const T* x, const Moments* saved, const GradSums* sums, const FirstOutputs<T>& out) {
    on_.each(how_.count, finish_line_terms<T>, how_, saved, sums, table_);
    on_.each(plan_.chunks * call_.problem.channels, go_down_lines<T>, how_, inputs(dy, x), call_.problem.count(),
             plan_.positions_a_chunk, table_, out.dx, out.dresidual, columns_);
  }

  Launches<On> on_;
  HeldLines held_;
  const PassCall<T>& call_;
  LinePlan plan_;
  Cut cut_;
  Elements elements_;
  LineCall how_;
  LineTable table_;
  kernels::Sums *sums_, *columns_;
  Conditioned* conditioned_;
  GradSums* grad_sums_;
  int* wide_;
};

}  // namespace batchnorm::cuda
