// Every public function that works on tensors, with arguments, for tests of what is true of all of them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "batchnorm/batchnorm.hpp"
#include "batchnorm/relu.hpp"
#include "batchnorm/segments.hpp"
#include "batchnorm/weighted.hpp"
#include "data.hpp"

namespace every_call {

using namespace batchnorm;

struct Call {
  std::string name;
  std::vector<std::span<std::byte>> outputs;
  std::function<void()> run;
};

template <class T>
struct Arguments {
  using W = typename detail::WeightType<T>::type;

  explicit Arguments(const Problem& problem) : p(problem) {
    data::Generator g(7);
    for (auto* tensor : {&x, &dy, &v, &residual}) *tensor = data::values<T>(g, p.size());
    for (auto* values : {&gamma, &beta, &mean, &tangent}) *values = data::values<double>(g, p.channels);
    for (std::int64_t c = 0; c < p.channels; ++c) var.push_back(1 + g.below(10));
    for (std::int64_t k = 0; k < p.count(); ++k) {
      mask.push_back(static_cast<W>(g.below(2)));
      weights.push_back(static_cast<W>(g.below(8)) / 4);
    }
    offsets = {0};
    for (std::int64_t row = 0; row < p.outer;)
      offsets.push_back(row = std::min<std::int64_t>(row + 1 + g.below(3), p.outer));
    const auto channels = gamma.size();
    saved.resize(channels);
    saved_mask.resize(channels);
    saved_segments.resize((offsets.size() - 1) * channels);
    sums.resize(channels);
    sums_mask.resize(channels);
    relu_mask.resize(static_cast<std::size_t>(relu_mask_bytes(p)));
    y.resize(x.size());
    y2.resize(x.size());
    dgamma.resize(channels);
    dbeta.resize(channels);
    moments_out.resize(saved_segments.size());
    sums_out.resize(channels);
    mask_out.resize(relu_mask.size());
    moments<T>(x, p, saved);
    moments<T>(x, p, WeightsFor<T>{mask, Padding::zero}, saved_mask);
    segment_moments<T>(x, p, offsets, saved_segments);
    grad_sums<T>(dy, x, p, saved, sums);
    grad_sums<T>(dy, x, p, WeightsFor<T>{mask, Padding::zero}, saved_mask, sums_mask);
    batch_norm_relu<T>(x, p, residual, gamma, beta, 1e-5, y, relu_mask, saved);
  }

  Problem p;
  std::vector<T> x, dy, v, residual;
  std::vector<double> gamma, beta, mean, var, tangent;
  std::vector<W> mask, weights;
  std::vector<std::int64_t> offsets;
  std::vector<Moments> saved, saved_mask, saved_segments;
  std::vector<GradSums> sums, sums_mask;
  std::vector<std::uint8_t> relu_mask;
  std::vector<T> y, y2;
  std::vector<double> dgamma, dbeta;
  std::vector<Moments> moments_out;
  std::vector<GradSums> sums_out;
  std::vector<std::uint8_t> mask_out;
};

template <class T>
std::vector<Call> of(Arguments<T>& a, const Options& options = {}) {
  const auto bytes = [](auto& values) { return std::as_writable_bytes(std::span(values)); };
  const auto y = bytes(a.y), y2 = bytes(a.y2), dgamma = bytes(a.dgamma), dbeta = bytes(a.dbeta);
  const auto table = bytes(a.moments_out), sums = bytes(a.sums_out), mask_out = bytes(a.mask_out);
  const std::span<const T> x(a.x), dy(a.dy), v(a.v), residual(a.residual);
  const std::span<const double> gamma(a.gamma), beta(a.beta), mean(a.mean), var(a.var), tangent(a.tangent);
  const std::span<Moments> moments_out = std::span(a.moments_out).first(a.gamma.size());
  const Problem p = a.p;
  const double eps = 1e-5;
  std::vector<Call> calls = {
      {"moments", {table}, [=] { moments<T>(x, p, moments_out, options); }},
      {"batch_norm", {y, table}, [=, &a] { batch_norm<T>(x, p, gamma, beta, eps, a.y, moments_out, options); }},
      {"batch_norm in place",
       {bytes(a.x), table},
       [=, &a] { batch_norm<T>(x, p, gamma, beta, eps, a.x, moments_out, options); }},
      {"normalize", {y}, [=, &a] { normalize<T>(x, p, mean, var, gamma, beta, eps, a.y, options); }},
      {"normalize by moments",
       {y},
       [=, &a] { normalize<T>(x, p, std::span<const Moments>(a.saved), gamma, beta, eps, a.y, options); }},
      {"grad_sums", {sums}, [=, &a] { grad_sums<T>(dy, x, p, a.saved, a.sums_out, options); }},
      {"grad_input", {y}, [=, &a] { grad_input<T>(dy, x, p, a.saved, a.sums, gamma, eps, a.y, options); }},
      {"batch_norm_backward",
       {y, dgamma, dbeta},
       [=, &a] { batch_norm_backward<T>(dy, x, p, a.saved, gamma, eps, a.y, a.dgamma, a.dbeta, options); }},
      {"batch_norm_backward in place",
       {bytes(a.dy), dgamma, dbeta},
       [=, &a] { batch_norm_backward<T>(dy, x, p, a.saved, gamma, eps, a.dy, a.dgamma, a.dbeta, options); }},
      {"normalize_backward",
       {y, dgamma, dbeta},
       [=, &a] { normalize_backward<T>(dy, x, p, mean, var, gamma, eps, a.y, a.dgamma, a.dbeta, options); }},
      {"batch_norm_jvp",
       {y},
       [=, &a] { batch_norm_jvp<T>(v, x, p, a.saved, gamma, tangent, tangent, eps, a.y, options); }},
      {"normalize_jvp",
       {y},
       [=, &a] { normalize_jvp<T>(v, x, p, mean, var, gamma, tangent, tangent, tangent, tangent, eps, a.y, options); }},
      {"batch_norm_double_backward",
       {y, y2, dgamma},
       [=, &a] {
         batch_norm_double_backward<T>(v, dy, x, p, a.saved, gamma, tangent, tangent, eps, a.y, a.y2, a.dgamma,
                                       options);
       }},
      {"normalize_double_backward",
       {y, y2, dgamma},
       [=, &a] {
         normalize_double_backward<T>(v, dy, x, p, mean, var, gamma, tangent, tangent, eps, a.y, a.y2, a.dgamma,
                                      options);
       }},
      {"batch_norm_relu",
       {y, table, mask_out},
       [=, &a] { batch_norm_relu<T>(x, p, residual, gamma, beta, eps, a.y, a.mask_out, moments_out, options); }},
      {"normalize_relu",
       {y, mask_out},
       [=, &a] { normalize_relu<T>(x, p, residual, mean, var, gamma, beta, eps, a.y, a.mask_out, options); }},
      {"batch_norm_relu_backward",
       {y, y2, dgamma, dbeta},
       [=, &a] {
         batch_norm_relu_backward<T>(dy, x, p, a.relu_mask, a.saved, gamma, eps, a.y, a.y2, a.dgamma, a.dbeta, options);
       }},
      {"normalize_relu_backward",
       {y, y2, dgamma, dbeta},
       [=, &a] {
         normalize_relu_backward<T>(dy, x, p, a.relu_mask, mean, var, gamma, eps, a.y, a.y2, a.dgamma, a.dbeta,
                                    options);
       }},
      {"segment_moments", {table}, [=, &a] { segment_moments<T>(x, p, a.offsets, a.moments_out, options); }},
      {"segment_batch_norm",
       {y, table},
       [=, &a] { segment_batch_norm<T>(x, p, a.offsets, gamma, beta, eps, a.y, a.moments_out, options); }},
      {"segment_batch_norm in place",
       {bytes(a.x), table},
       [=, &a] { segment_batch_norm<T>(x, p, a.offsets, gamma, beta, eps, a.x, a.moments_out, options); }},
      {"segment_batch_norm_backward",
       {y, dgamma, dbeta},
       [=, &a] {
         segment_batch_norm_backward<T>(dy, x, p, a.offsets, a.saved_segments, gamma, eps, a.y, a.dgamma, a.dbeta,
                                        options);
       }},
  };
  for (const bool is_mask : {true, false}) {
    const WeightsFor<T> w{is_mask ? a.mask : a.weights, is_mask ? Padding::zero : Padding::normalize};
    const WeightsFor<T> keep{w.values, Padding::keep};
    const std::string with = is_mask ? " with a mask" : " with weights";
    calls.push_back({"moments" + with, {table}, [=] { moments<T>(x, p, w, moments_out, options); }});
    calls.push_back({"batch_norm" + with, {y, table}, [=, &a] {
                       batch_norm<T>(x, p, w, gamma, beta, eps, a.y, moments_out, options);
                     }});
    calls.push_back(
        {"normalize" + with, {y}, [=, &a] { normalize<T>(x, p, keep, mean, var, gamma, beta, eps, a.y, options); }});
    calls.push_back(
        {"grad_sums" + with, {sums}, [=, &a] { grad_sums<T>(dy, x, p, w, a.saved_mask, a.sums_out, options); }});
    calls.push_back({"grad_input" + with, {y}, [=, &a] {
                       grad_input<T>(dy, x, p, w, a.saved_mask, a.sums_mask, gamma, eps, a.y, options);
                     }});
    calls.push_back({"batch_norm_backward" + with, {y, dgamma, dbeta}, [=, &a] {
                       batch_norm_backward<T>(dy, x, p, w, a.saved_mask, gamma, eps, a.y, a.dgamma, a.dbeta, options);
                     }});
    calls.push_back({"normalize_backward" + with, {y, dgamma, dbeta}, [=, &a] {
                       normalize_backward<T>(dy, x, p, keep, mean, var, gamma, eps, a.y, a.dgamma, a.dbeta, options);
                     }});
  }
  return calls;
}

}  // namespace every_call
