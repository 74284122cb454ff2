// Pass 2 of backward: dx = (dy - dy_center)*dy_scale + (x - x_center)*x_scale + offset, with dy as it is or let through
// the bits of a ReLU; or with weights.
#pragma once

#include "kernels/apply-inl.hpp"

namespace batchnorm::kernels {
namespace {

template <class T>
struct GradInputMap {
  using A = Arithmetic<T>;
  Lanes<A> dy_center, dy_scale, x_center, x_scale, offset;

  BN_INLINE Lanes<A> operator()(const T* dy, const T* x, std::int64_t n) const {
    return of(load_upto<A>(dy, n, T(0)), x, n);
  }
  BN_INLINE Lanes<A> of(const Lanes<A>& dy, const T* x, std::int64_t n) const {
    return (dy - dy_center) * dy_scale + (load_upto<A>(x, n, T(0)) - x_center) * x_scale + offset;
  }
  BN_INLINE Lanes<A> of(const Lanes<A>& dy) const { return (dy - dy_center) * dy_scale + offset; }
};
template <class T>
BN_INLINE GradInputMap<T> grad_input_map(const GradAffineColumns<Arithmetic<T>>& k, std::int64_t c, std::int64_t n) {
  using A = Arithmetic<T>;
  return {load_upto<A>(k.dy_center + c, n, A(0)), load_upto<A>(k.dy_scale + c, n, A(0)),
          load_upto<A>(k.x_center + c, n, A(0)), load_upto<A>(k.x_scale + c, n, A(0)),
          load_upto<A>(k.offset + c, n, A(0))};
}
template <class T>
BN_INLINE GradInputMap<T> grad_input_map(const GradAffine<Arithmetic<T>>& k) {
  return {broadcast(k.dy_center), broadcast(k.dy_scale), broadcast(k.x_center), broadcast(k.x_scale),
          broadcast(k.offset)};
}
template <class T>
BN_INLINE GradInputMap<T> join(std::int64_t n, const GradInputMap<T>& a, const GradInputMap<T>& b) {
  return {join(n, a.dy_center, b.dy_center), join(n, a.dy_scale, b.dy_scale), join(n, a.x_center, b.x_center),
          join(n, a.x_scale, b.x_scale), join(n, a.offset, b.offset)};
}

// A weight of 1 gives the bits of the map without; where it is 0, x is not looked at, nor dy where that gives 0. The
// weight of value i of a run lies `begin` values before that of the piece's value.
template <class T>
struct WeightedGradInputMap {
  using Native = typename Lanes<T>::Native;
  using Bits = decltype(Native{} < Native{});

  GradInputMap<T> map;
  std::int64_t begin;
  bool zeros;

  BN_RARE Lanes<T> operator()(const T* dy, const T* x, const T* weights, std::int64_t n) const {
    const Lanes<T> w = load_upto<T>(weights - begin, n, T(0)), g = load_upto<T>(dy, n, T(0));
    // 0 where x is not looked at: 0 times what is far from the center might be NaN.
    const Lanes<T> counted = where_counted(w, load_upto<T>(x, n, T(0)), map.x_center);
    const Lanes<T> from_x = (counted - map.x_center) * map.x_scale;
    const Lanes<T> dx = (g - w * map.dy_center) * map.dy_scale + w * from_x + w * map.offset;
    return where_counted(w, dx, others(dx));
  }
  // What is where the weight is 0: no branch, and no second loop.
  BN_INLINE Lanes<T> others(Lanes<T> dx) const {
    const Bits stay = (zeros ? 0 : -1) - Bits{};
    BN_UNROLL for (int k = 0; k < Lanes<T>::kVectors; ++k) dx.v[k] = (Native)((Bits)dx.v[k] & stay);
    return dx;
  }
};
template <class T>
BN_INLINE WeightedGradInputMap<T> join(std::int64_t n, const WeightedGradInputMap<T>& a,
                                       const WeightedGradInputMap<T>& b) {
  return {join(n, a.map, b.map), a.begin, a.zeros};
}

template <class T>
struct ReluGradInputMap {
  GradInputMap<T> map;

  template <class Inputs>
  BN_INLINE Lanes<T> operator()(const Inputs& in, std::int64_t n) const {
    const Lanes<T> dy = load_kept<T>(in.dy, in.bits(), n);
    Lanes<T> dx;
    if constexpr (Inputs::has_x()) {
      dx = map.of(dy, in.x, n);
    } else {
      dx = map.of(dy);
    }
    if (in.has_dresidual()) put_dresidual(in, dy, n);
    return dx;
  }
  template <class Inputs>
  BN_INLINE static void put_dresidual(const Inputs& in, const Lanes<T>& dy, std::int64_t n) {
    if (in.streams && n == kLanes) return stream_lanes(in.dresidual, dy);
    store_upto(in.dresidual, n, dy);
  }
};
template <class T>
BN_INLINE ReluGradInputMap<T> join(std::int64_t n, const ReluGradInputMap<T>& a, const ReluGradInputMap<T>& b) {
  return {join(n, a.map, b.map)};
}

// dresidual goes around the caches with dx alone.
template <class T>
BN_INLINE GradInputs<T> streaming_with_dx(GradInputs<T> in, bool dx_streams) {
  in.streams = in.streams && dx_streams;
  return in;
}

template <class T>
void runs_grad_input(const GradInputs<T>& in, const WeightsAlong<WeightOf<T>>& weights, T* dx, Runs runs,
                     const GradAffine<Arithmetic<T>>* k) {
  if constexpr (!kIsSixteen<T>) {
    if (in.bits != nullptr) {
      const auto make = [k](std::int64_t c) { return ReluGradInputMap<T>{grad_input_map<T>(k[c])}; };
      return with_parts(streaming_with_dx(in, runs.around_cache),
                        [&](const auto& parts) { apply_runs(make, runs, dx, parts); });
    }
    if (weights.values != nullptr) {
      const auto make = [k, &runs, &weights](std::int64_t c) {
        return WeightedGradInputMap<T>{grad_input_map<T>(k[c]), c * runs.length, weights.zeros};
      };
      return apply_runs(make, runs, dx, in.dy + in.at, in.x + in.at, weights.values);
    }
  }
  const auto make = [k](std::int64_t c) { return grad_input_map<T>(k[c]); };
  apply_runs(make, runs, dx, in.dy + in.at, in.x + in.at);
}

template <class T>
void rows_grad_input(const GradInputs<T>& in, const WeightsAlong<WeightOf<T>>& weights, T* dx, Rows rows,
                     const GradAffineColumns<Arithmetic<T>>& k) {
  if constexpr (!kIsSixteen<T>) {
    if (in.bits != nullptr) {
      const auto make = [&k](std::int64_t c, std::int64_t n) {
        return ReluGradInputMap<T>{grad_input_map<T>(k, c, n)};
      };
      return with_parts(streaming_with_dx(in, rows.walk == RowWalk::around_cache),
                        [&](const auto& parts) { apply_rows(make, rows, dx, parts); });
    }
    if (weights.values != nullptr) {
      const auto make = [&k, &weights](std::int64_t c, std::int64_t n) {
        return WeightedGradInputMap<T>{grad_input_map<T>(k, c, n), 0, weights.zeros};
      };
      return apply_rows(make, rows, dx, in.dy + in.at, in.x + in.at, weights.values);
    }
  }
  const auto make = [&k](std::int64_t c, std::int64_t n) { return grad_input_map<T>(k, c, n); };
  apply_rows(make, rows, dx, in.dy + in.at, in.x + in.at);
}

}  // namespace
}  // namespace batchnorm::kernels
