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

  template <class T, class Tail>
  BN_INLINE Lanes<Arithmetic<T>> operator()(const T* x, const Tail& tail, std::int64_t n) const {
    using A = Arithmetic<T>;
    Lanes<A> sum = rounded_to<A>(map(x, n));
    if (tail.has_residual()) sum = sum + load_upto<A>(tail.residual, n, T(0));
    if (tail.has_mask()) put_bits<Tail::bits>(tail.mask, tail.bit, above_zero(sum), n);
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
  const auto make = [k](std::int64_t c) { return relu_map(normalize_map<T>(k[c])); };
  with_parts<Bits::whole_bytes>(tail, [&](const auto& parts) { apply_runs<kStores>(make, runs, y, x, parts); });
}
template <class T>
void runs_relu_wide(const T* x, T* y, const ReluTail<T>& tail, Runs runs, const Affine<double>& k) {
  apply_runs<Stores::ordinary>([&k](std::int64_t) { return relu_map(normalize_map<T>(k)); }, runs, y, x, moving(tail));
}
template <class T>
void rows_relu(const T* x, T* y, const ReluTail<T>& tail, Rows rows, const AffineColumns<Arithmetic<T>>& k) {
  const auto make = [&k](std::int64_t c, std::int64_t n) { return relu_map(normalize_map<T>(k, c, n)); };
  with_parts<Bits::anywhere>(tail, [&](const auto& parts) { apply_rows(make, rows, y, x, parts); });
}
template <class T, Stores kStores>
void rows_relu_in_line(const T* x, T* y, const ReluTail<T>& tail, Rows rows, const AffineColumns<Arithmetic<T>>& k) {
  const auto make = [&k](std::int64_t c, std::int64_t n) { return relu_map(normalize_map<T>(k, c, n)); };
  with_parts<Bits::whole_bytes>(tail, [&](const auto& parts) { apply_rows_in_line<kStores>(make, rows, y, x, parts); });
}
template <class T>
void rows_relu_mixed(const T* x, T* y, const ReluTail<T>& tail, Rows rows, const AffineColumns<float>& k,
                     const WideColumns<AffineColumns<double>>& wide) {
  const auto make = [&k, &wide](std::int64_t c, std::int64_t n) {
    return relu_map(Mixed<NormalizeMap<T, float>, NormalizeMap<T, double>>{
        normalize_map<T>(k, c, n), normalize_map<T>(wide.coefficients, c, n), wide.mask[c / kLanes]});
  };
  apply_rows(make, rows, y, x, moving(tail));
}

// ---- backward ----

template <class T, class Accumulator>
struct ReluGradTerms : GradTerms<T, Accumulator> {
  BN_INLINE void add_vector(int k, const SummedInputs<T>& in) {
    this->add_value(k, load_kept_vector<double>(in.dy, in.bits(), k), load_vector<double>(in.x, k));
  }
  BN_INLINE void add_part(int k, std::int64_t n, const SummedInputs<T>& in) {
    this->add_value(k, load_kept_vector_of_first<double>(in.dy, in.bits(), k, n),
                    load_vector_of_first<double>(in.x, k, n, T(0)));
  }
};

template <class T, class Accumulator>
void runs_relu_grad_sums(const ReluInputs<T>& in, Runs runs, const double* mean, Sums* out) {
  using Terms = ReluGradTerms<T, Accumulator>;
  sum_runs<Accumulator, T>([mean](std::int64_t c) { return Terms{{{}, {}, broadcast(mean[c])}}; }, runs, out,
                           SummedInputs<T>(in));
}
template <class T, class Accumulator>
void rows_relu_grad_sums(const ReluInputs<T>& in, Rows rows, const double* mean, const ColumnSums& out) {
  const auto make = [mean](std::int64_t c, std::int64_t n) {
    return ReluGradTerms<T, Accumulator>{{{}, {}, load_upto<double>(mean + c, n, 0.0)}};
  };
  sum_rows<T>(make, rows, out, SummedInputs<T>(in));
}

template <class T, class A>
struct ReluGradInputMap {
  GradInputMap<T, A> map;

  template <class Inputs>
  BN_INLINE Lanes<A> operator()(const Inputs& in, std::int64_t n) const {
    const Lanes<A> dy = load_kept<A>(in.dy, in.bits(), n);
    const Lanes<A> dx = in.has_x() ? map.of(dy, in.x, n) : map.of(dy);
    if (in.has_dresidual()) put_dresidual(in, dy, n);
    return dx;
  }
  template <class Inputs>
  BN_INLINE static void put_dresidual(const Inputs& in, const Lanes<A>& dy, std::int64_t n) {
    if constexpr (sizeof(A) == sizeof(Arithmetic<T>)) {
      if (in.streams && n == kLanes) return stream_lanes(in.dresidual, dy);
    }
    store_upto(in.dresidual, n, dy);
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
  const auto make = [k](std::int64_t c) { return relu_map(grad_input_map<T>(k[c])); };
  with_parts(in, [&](const auto& parts) { apply_runs<kStores>(make, runs, dx, parts); });
}
template <class T>
void runs_relu_grad_input_wide(const ReluInputs<T>& in, T* dx, Runs runs, const GradAffine<double>& k) {
  apply_runs<Stores::ordinary>([&k](std::int64_t) { return relu_map(grad_input_map<T>(k)); }, runs, dx, moving(in));
}
template <class T>
void rows_relu_grad_input(const ReluInputs<T>& in, T* dx, Rows rows, const GradAffineColumns<Arithmetic<T>>& k) {
  const auto make = [&k](std::int64_t c, std::int64_t n) { return relu_map(grad_input_map<T>(k, c, n)); };
  with_parts(in, [&](const auto& parts) { apply_rows(make, rows, dx, parts); });
}
template <class T>
void rows_relu_grad_input_around_cache(const ReluInputs<T>& in, T* dx, Rows rows,
                                       const GradAffineColumns<Arithmetic<T>>& k) {
  const auto make = [&k](std::int64_t c, std::int64_t n) { return relu_map(grad_input_map<T>(k, c, n)); };
  with_parts(in, [&](const auto& parts) { apply_rows_in_line<Stores::around_cache>(make, rows, dx, parts); });
}
template <class T>
void rows_relu_grad_input_mixed(const ReluInputs<T>& in, T* dx, Rows rows, const GradAffineColumns<float>& k,
                                const WideColumns<GradAffineColumns<double>>& wide) {
  const auto make = [&k, &wide](std::int64_t c, std::int64_t n) {
    return Mixed<ReluGradInputMap<T, float>, ReluGradInputMap<T, double>>{
        {grad_input_map<T>(k, c, n)}, {grad_input_map<T>(wide.coefficients, c, n)}, wide.mask[c / kLanes]};
  };
  apply_rows(make, rows, dx, moving(in));
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
