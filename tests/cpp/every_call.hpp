// Every public function that works on tensors, with arguments, for tests of what is true of all of them.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "batchnorm/batchnorm.hpp"
#include "data.hpp"

namespace every_call {

using namespace batchnorm;

struct NamedCall {
  std::string name;
  std::vector<std::span<std::byte>> outputs;
  std::function<void()> run;
};

// A Call with what its backward passes read.
template <class T>
struct Way {
  std::string name;
  Call<T> call;
  std::vector<Moments> saved;
  std::vector<GradSums> sums;
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
    const auto channels = gamma.size(), entries = (offsets.size() - 1) * channels;
    bits.resize(static_cast<std::size_t>(relu_mask_bytes(p)));
    y.resize(x.size());
    y2.resize(x.size());
    dgamma.resize(channels);
    dbeta.resize(channels);
    moments_out.resize(entries);
    sums_out.resize(entries);
    moments_of_positions.resize(static_cast<std::size_t>(p.count()));
    sums_of_positions.resize(moments_of_positions.size());
    bits_out.resize(bits.size());

    const Call<T> plain{.problem = p, .gamma = gamma, .beta = beta};
    const Counted<T> by_mask{mask, Padding::zero}, by_weights{weights, Padding::normalize};
    const Tail<T> relu{residual, true, bits};
    add("", plain);
    add(" with a mask", with(plain, {}, by_mask, {}));
    add(" with weights", with(plain, {}, by_weights, {}));
    add(" with a ReLU", with(plain, {}, {}, relu));
    add(" by segments", with(plain, {offsets}, {}, {}));
    add(" by segments with weights and a ReLU", with(plain, {offsets}, by_weights, relu));
    add(" by groups of channels", with(plain, {offsets, p.channels}, {}, {}));
    add(" by groups of channels with weights and a ReLU", with(plain, {offsets, p.channels}, by_weights, relu));
    add(" of each position", with(plain, {{}, p.channels, true}, {}, {}));
    add(" of each position with a mask and a ReLU", with(plain, {{}, p.channels, true}, by_mask, relu));
    add(" of each position about 0", with(plain, {{}, p.channels, true, About::zero}, {}, {}));
    add(" about 0", with(plain, {{}, 1, false, About::zero}, {}, {}));
    add(" about alpha times the mean", with(plain, {offsets, 1, false, About::mean, tangent}, {}, {}));
    add(" with a mask and a residual", with(plain, {}, {mask, Padding::keep}, {.residual = residual}));
  }
  Arguments(const Arguments&) = delete;  // calls refer to what they are made of
  Arguments& operator=(const Arguments&) = delete;

  Problem p;
  std::vector<T> x, dy, v, residual;
  std::vector<double> gamma, beta, mean, var, tangent;
  std::vector<W> mask, weights;
  std::vector<std::int64_t> offsets;
  std::vector<std::uint8_t> bits;
  std::vector<T> y, y2;
  std::vector<double> dgamma, dbeta;
  std::vector<Moments> moments_out, moments_of_positions;
  std::vector<GradSums> sums_out, sums_of_positions;
  std::vector<std::uint8_t> bits_out;
  std::vector<Way<T>> ways;

 private:
  static Call<T> with(Call<T> call, const Groups& groups, const Counted<T>& counted, const Tail<T>& tail) {
    call.groups = groups;
    call.counted = counted;
    call.tail = tail;
    return call;
  }
  void add(const char* name, const Call<T>& call) {
    const std::size_t entries = call.groups.offsets.empty() ? gamma.size() : moments_out.size();
    const auto groups = entries / static_cast<std::size_t>(call.groups.width);
    Way<T> way{name, call, std::vector<Moments>(groups), std::vector<GradSums>(entries)};
    if (call.groups.each_position) {
      way.saved.resize(static_cast<std::size_t>(p.count()) * groups);
      way.sums.resize(way.saved.size());
    }
    batch_norm<T>(x, call, y, way.saved);
    grad_sums<T>(dy, x, call, way.saved, way.sums);
    ways.push_back(std::move(way));
  }
};

template <class T>
void add_way(std::vector<NamedCall>& calls, Arguments<T>& a, const Way<T>& way, const Options& options) {
  const auto bytes = [](auto& values) { return std::as_writable_bytes(std::span(values)); };
  const auto y = bytes(a.y), y2 = bytes(a.y2), dgamma = bytes(a.dgamma), dbeta = bytes(a.dbeta);
  const auto bits = bytes(a.bits_out);
  const std::span<const T> x(a.x), dy(a.dy), v(a.v);
  const std::span<const double> mean(a.mean), var(a.var), tangent(a.tangent);
  const bool each = way.call.groups.each_position;
  const std::span<Moments> table = std::span(each ? a.moments_of_positions : a.moments_out).first(way.saved.size());
  const std::span<GradSums> sums = std::span(each ? a.sums_of_positions : a.sums_out).first(way.sums.size());
  const std::span<const Moments> saved(way.saved);
  const std::span<const GradSums> of_saved(way.sums);
  const Call<T> backward = way.call;
  Call<T> forward = way.call;
  if (!forward.tail.bits.empty()) forward.tail.bits = a.bits_out;
  const auto add = [&](const char* name, std::vector<std::span<std::byte>> outputs, std::function<void()> run) {
    calls.push_back({name + way.name, std::move(outputs), std::move(run)});
  };
  add("moments", {bytes(table)}, [=] { moments<T>(x, forward, table, options); });
  add("batch_norm", {y, bytes(table), bits}, [=, &a] { batch_norm<T>(x, forward, a.y, table, options); });
  add("normalize by moments", {y, bits}, [=, &a] { normalize<T>(x, forward, saved, a.y, options); });
  add("grad_sums", {bytes(sums)}, [=] { grad_sums<T>(dy, x, backward, saved, sums, options); });
  add("grad_input", {y, y2}, [=, &a] { grad_input<T>(dy, x, backward, saved, of_saved, a.y, a.y2, options); });
  add("batch_norm_backward", {y, y2, dgamma, dbeta},
      [=, &a] { batch_norm_backward<T>(dy, x, backward, saved, {a.y, a.y2, a.dgamma, a.dbeta}, options); });
  add("batch_norm_jvp", {y}, [=, &a] { batch_norm_jvp<T>(v, x, backward, saved, tangent, tangent, a.y, options); });
  // Given statistics are of one group.
  if (way.call.groups.offsets.empty() && !way.call.groups.each_position && way.call.groups.about == About::mean) {
    Call<T> given = forward, given_backward = backward;
    given.counted.padding = given_backward.counted.padding = Padding::keep;
    add("normalize", {y, bits}, [=, &a] { normalize<T>(x, given, mean, var, a.y, options); });
    add("normalize_backward", {y, y2, dgamma, dbeta},
        [=, &a] { normalize_backward<T>(dy, x, given_backward, mean, var, {a.y, a.y2, a.dgamma, a.dbeta}, options); });
    add("normalize_jvp", {y}, [=, &a] {
      normalize_jvp<T>(v, x, given_backward, mean, var, tangent, tangent, tangent, tangent, a.y, options);
    });
  }
  // Last: what is read is written.
  const std::string in_place = way.name + " in place";
  calls.push_back({"batch_norm" + in_place, {bytes(a.x), bytes(table), bits}, [=, &a] {
                     batch_norm<T>(x, forward, a.x, table, options);
                   }});
  calls.push_back({"batch_norm_backward" + in_place, {bytes(a.dy), bytes(a.x), dgamma, dbeta}, [=, &a] {
                     batch_norm_backward<T>(dy, x, backward, saved, {a.dy, a.x, a.dgamma, a.dbeta}, options);
                   }});
}

template <class T>
std::vector<NamedCall> of(Arguments<T>& a, const Options& options = {}) {
  std::vector<NamedCall> calls;
  const auto bytes = [](auto& values) { return std::as_writable_bytes(std::span(values)); };
  const auto y = bytes(a.y), y2 = bytes(a.y2), dgamma = bytes(a.dgamma);
  const std::span<const T> x(a.x), dy(a.dy), v(a.v);
  const std::span<const double> mean(a.mean), var(a.var), tangent(a.tangent);
  const Call<T> call = a.ways.front().call;
  const std::span<const Moments> saved(a.ways.front().saved);
  calls.push_back({"batch_norm_double_backward", {y, y2, dgamma}, [=, &a] {
                     batch_norm_double_backward<T>(v, dy, x, call, saved, tangent, tangent, a.y, a.y2, a.dgamma,
                                                   options);
                   }});
  calls.push_back({"normalize_double_backward", {y, y2, dgamma}, [=, &a] {
                     normalize_double_backward<T>(v, dy, x, call, mean, var, tangent, tangent, a.y, a.y2, a.dgamma,
                                                  options);
                   }});
  for (const Way<T>& way : a.ways) add_way(calls, a, way, options);
  return calls;
}

}  // namespace every_call
