// normalize with a residual added, ReLU and its mask; and the passes of backward through that mask.
#pragma once

#include "kernels/grad_input-inl.hpp"
#include "kernels/grad_sums-inl.hpp"
#include "kernels/normalize-inl.hpp"

namespace batchnorm::kernels {
namespace {

// ---- forward ----

// What a map in float64 gives for tensors that are computed in float32, rounded to that.
template <class A>
BN_INLINE Lanes<A> rounded_to(const Lanes<A>& a) {
  return a;
}
template <class A>
  requires(sizeof(A) == sizeof(float))
BN_INLINE Lanes<float> rounded_to(const Lanes<double>& a) {
  float values[kLanes];
  store_as(values, a);
  return load<float>(values);
}

template <class Map>
struct ReluMap {
  Map map;

  template <class T>
  BN_INLINE Lanes<Arithmetic<T>> operator()(const T* x, const ReluTail<T>& tail, std::int64_t n) const {
    using A = Arithmetic<T>;
    Lanes<A> sum = rounded_to<A>(map(x, n));
    if (tail.residual != nullptr) sum = sum + load_upto<A>(tail.residual + tail.at, n, T(0));
    if (tail.mask != nullptr) put_bits(tail.mask, tail.first_bit + tail.at, above_zero(sum), n);
    return relu(sum);
  }
};
template <class Map>
BN_INLINE ReluMap<Map> join(std::int64_t n, const ReluMap<Map>& a, const ReluMap<Map>& b) {
  return {join(n, a.map, b.map)};
}
template <class Map>
BN_INLINE ReluMap<Map> relu_map(const Map& map) {
  return {map};
}

template <class T, Stores kStores>
void runs_relu(const T* x, T* y, const ReluTail<T>& tail, Runs runs, const Affine<Arithmetic<T>>* k) {
  apply_runs<kStores>([k](std::int64_t c) { return relu_map(normalize_map<T>(k[c])); }, runs, y, x, tail);
}
template <class T>
void runs_relu_wide(const T* x, T* y, const ReluTail<T>& tail, Runs runs, const Affine<double>& k) {
  apply_runs<Stores::ordinary>([&k](std::int64_t) { return relu_map(normalize_map<T>(k)); }, runs, y, x, tail);
}
template <class T>
void rows_relu(const T* x, T* y, const ReluTail<T>& tail, Rows rows, const AffineColumns<Arithmetic<T>>& k) {
  apply_rows([&k](std::int64_t c, std::int64_t n) { return relu_map(normalize_map<T>(k, c, n)); }, rows, y, x, tail);
}
template <class T, Stores kStores>
void rows_relu_in_line(const T* x, T* y, const ReluTail<T>& tail, Rows rows, const AffineColumns<Arithmetic<T>>& k) {
  const auto make = [&k](std::int64_t c, std::int64_t n) { return relu_map(normalize_map<T>(k, c, n)); };
  apply_rows_in_line<kStores>(make, rows, y, x, tail);
}
template <class T>
void rows_relu_mixed(const T* x, T* y, const ReluTail<T>& tail, Rows rows, const AffineColumns<float>& k,
                     const WideColumns<AffineColumns<double>>& wide) {
  const auto make = [&k, &wide](std::int64_t c, std::int64_t n) {
    return relu_map(Mixed<NormalizeMap<T, float>, NormalizeMap<T, double>>{
        normalize_map<T>(k, c, n), normalize_map<T>(wide.coefficients, c, n), wide.mask[c / kLanes]});
  };
  apply_rows(make, rows, y, x, tail);
}

// ---- backward ----

template <class T, class Accumulator>
struct ReluGradTerms : GradTerms<T, Accumulator> {
  BN_INLINE void add(const ReluInputs<T>& in, std::int64_t n) {
    const Lanes<double> dy = load_upto<double>(in.dy + in.at, n, T(0));
    this->add_lanes(keep_lanes(dy, bits_at(in.mask, in.first_bit + in.at)), in.x + in.at, n);
  }
};

template <class T, class Accumulator>
void runs_relu_grad_sums(const ReluInputs<T>& in, Runs runs, const double* mean, Sums* out) {
  using Terms = ReluGradTerms<T, Accumulator>;
  sum_runs<Accumulator, T>([mean](std::int64_t c) { return Terms{{{}, {}, broadcast(mean[c])}}; }, runs, out, in);
}
template <class T, class Accumulator>
void rows_relu_grad_sums(const ReluInputs<T>& in, Rows rows, const double* mean, const ColumnSums& out) {
  const auto make = [mean](std::int64_t c, std::int64_t n) {
    return ReluGradTerms<T, Accumulator>{{{}, {}, load_upto<double>(mean + c, n, 0.0)}};
  };
  sum_rows<T>(make, rows, out, in);
}

template <class T, class A>
struct ReluGradInputMap {
  GradInputMap<T, A> map;

  BN_INLINE Lanes<A> operator()(const ReluInputs<T>& in, std::int64_t n) const {
    const Lanes<A> dy = keep_lanes(load_upto<A>(in.dy + in.at, n, T(0)), bits_at(in.mask, in.first_bit + in.at));
    const Lanes<A> dx = in.x == nullptr ? map.of(dy) : map.of(dy, in.x + in.at, n);
    if (in.dresidual != nullptr) put_dresidual(in, dy, n);
    return dx;
  }
  BN_INLINE static void put_dresidual(const ReluInputs<T>& in, const Lanes<A>& dy, std::int64_t n) {
    if constexpr (sizeof(A) == sizeof(Arithmetic<T>)) {
      if (in.streams && n == kLanes) return stream_lanes(in.dresidual + in.at, dy);
    }
    store_upto(in.dresidual + in.at, n, dy);
  }
};
template <class T, class A>
BN_INLINE ReluGradInputMap<T, A> join(std::int64_t n, const ReluGradInputMap<T, A>& a,
                                      const ReluGradInputMap<T, A>& b) {
  return {join(n, a.map, b.map)};
}
template <class T, class A>
BN_INLINE ReluGradInputMap<T, A> relu_map(const GradInputMap<T, A>& map) {
  return {map};
}

template <class T, Stores kStores>
void runs_relu_grad_input(const ReluInputs<T>& in, T* dx, Runs runs, const GradAffine<Arithmetic<T>>* k) {
  apply_runs<kStores>([k](std::int64_t c) { return relu_map(grad_input_map<T>(k[c])); }, runs, dx, in);
}
template <class T>
void runs_relu_grad_input_wide(const ReluInputs<T>& in, T* dx, Runs runs, const GradAffine<double>& k) {
  apply_runs<Stores::ordinary>([&k](std::int64_t) { return relu_map(grad_input_map<T>(k)); }, runs, dx, in);
}
template <class T>
void rows_relu_grad_input(const ReluInputs<T>& in, T* dx, Rows rows, const GradAffineColumns<Arithmetic<T>>& k) {
  apply_rows([&k](std::int64_t c, std::int64_t n) { return relu_map(grad_input_map<T>(k, c, n)); }, rows, dx, in);
}
template <class T>
void rows_relu_grad_input_around_cache(const ReluInputs<T>& in, T* dx, Rows rows,
                                       const GradAffineColumns<Arithmetic<T>>& k) {
  const auto make = [&k](std::int64_t c, std::int64_t n) { return relu_map(grad_input_map<T>(k, c, n)); };
  apply_rows_in_line<Stores::around_cache>(make, rows, dx, in);
}
template <class T>
void rows_relu_grad_input_mixed(const ReluInputs<T>& in, T* dx, Rows rows, const GradAffineColumns<float>& k,
                                const WideColumns<GradAffineColumns<double>>& wide) {
  const auto make = [&k, &wide](std::int64_t c, std::int64_t n) {
    return Mixed<ReluGradInputMap<T, float>, ReluGradInputMap<T, double>>{
        {grad_input_map<T>(k, c, n)}, {grad_input_map<T>(wide.coefficients, c, n)}, wide.mask[c / kLanes]};
  };
  apply_rows(make, rows, dx, in);
}

template <class T, class Accumulator>
constexpr ReluKernels<T> make_relu_kernels() {
  ReluKernels<T> k{.runs_normalize = runs_relu<T, Stores::ordinary>,
                   .runs_normalize_around_cache = runs_relu<T, Stores::around_cache>,
                   .runs_normalize_wide = runs_relu_wide<T>,
                   .rows_normalize = rows_relu<T>,
                   .rows_normalize_in_line = rows_relu_in_line<T, Stores::ordinary>,
                   .rows_normalize_around_cache = rows_relu_in_line<T, Stores::around_cache>,
                   .rows_normalize_mixed = nullptr,
                   .runs_grad_sums = runs_relu_grad_sums<T, Accumulator>,
                   .rows_grad_sums = rows_relu_grad_sums<T, Accumulator>,
                   .runs_grad_input = runs_relu_grad_input<T, Stores::ordinary>,
                   .runs_grad_input_around_cache = runs_relu_grad_input<T, Stores::around_cache>,
                   .runs_grad_input_wide = runs_relu_grad_input_wide<T>,
                   .rows_grad_input = rows_relu_grad_input<T>,
                   .rows_grad_input_around_cache = rows_relu_grad_input_around_cache<T>,
                   .rows_grad_input_mixed = nullptr};
  if constexpr (sizeof(T) < sizeof(double)) {
    k.rows_normalize_mixed = rows_relu_mixed<T>;
    k.rows_grad_input_mixed = rows_relu_grad_input_mixed<T>;
  }
  return k;
}

}  // namespace
}  // namespace batchnorm::kernels
