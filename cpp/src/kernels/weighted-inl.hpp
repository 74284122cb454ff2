// The passes with a weight per position: terms and maps around those without.
#pragma once

#include "kernels/counted-inl.hpp"
#include "kernels/grad_input-inl.hpp"
#include "kernels/grad_sums-inl.hpp"
#include "kernels/moments-inl.hpp"
#include "kernels/normalize-inl.hpp"

namespace batchnorm::kernels {
namespace {

// ---- moments ----

// About 0.
template <class T, class Accumulator>
struct MaskedMoments : MomentTerms<T, Accumulator, Shift::none> {
  template <class Weights>
  BN_INLINE void add_vector(int k, const T* p, const Weights& w) {
    this->add_value(k, vector_where(p, w, k));
  }
  template <class Weights>
  BN_INLINE void add_vector_of_all(int k, const T* p, const Weights& w) {
    this->add_value(k, vector_of_all_where(p, w, k));
  }
  template <class Weights>
  BN_INLINE void add_part(int k, std::int64_t n, const T* p, const Weights& w) {
    this->add_value(k, vector_of_first_where(p, w, k, n));
  }
};

template <class T, class Accumulator>
void runs_masked_moments(const T* x, const RunWeights<WeightOf<T>>& w, Runs runs, Sums* out) {
  const auto make = [](std::int64_t) { return MaskedMoments<T, Accumulator>{{{}, {}, {}, T(0)}}; };
  with_weights_of_sums<1>(w, runs, [&](const auto& weights) __attribute__((always_inline)) {
    sum_runs<Accumulator, T>(make, runs, out, x, weights);
  });
}
template <class T, class Accumulator>
void rows_masked_moments(const T* x, const RowWeights<WeightOf<T>>& w, Rows rows, const ColumnSums& out) {
  const auto make = []<class V>(std::int64_t, std::int64_t) {
    return MomentTerms<V, Accumulator, Shift::none>{{}, {}, {}, V(0)};
  };
  sum_counted_rows<T>(make, rows, out, w, x);
}

// What rounding took from product = a*b; taken as 0 where square_error is (lanes-inl.hpp).
BN_INLINE NativeDouble normal_product_error(NativeDouble a, NativeDouble b, NativeDouble product) {
  const NativeDouble size = product < 0 ? -product : product;
  return size >= 0x1p-960 ? product_error(a, b, product) : NativeDouble{};
}

template <class T, class Accumulator, Shift kShift>
struct WeightedMoments {
  Accumulator first, second;
  Lanes<double> shift;
  Arithmetic<T> fill;

  WeightedMoments(const Lanes<double>& about, Arithmetic<T> fill_with) : shift(about), fill(fill_with) {}

  template <class Weights>
  BN_INLINE void add_vector(int k, const T* p, const Weights& weights) {
    add_value(k, weight_vector<double>(weights, k), load_vector<double>(p, k));
  }
  BN_INLINE void add_vector(int k, const T* p, const ExpandedLanes<2>& run) {
    static_assert(kShift == Shift::none);
    add_chosen(k, run.weight(k), vector_where(p, run, k));
  }
  BN_INLINE void add_part(int k, std::int64_t n, const T* p, const ExpandedLanes<2>& run) {
    add_chosen(k, run.weight(k), vector_of_first_where(p, run, k, n));
  }
  template <class Weights>
  BN_INLINE void add_part(int k, std::int64_t n, const T* p, const Weights& weights) {
    add_value(k, weight_vector_of_first<double>(weights, k, n), load_vector_of_first<double>(p, k, n, fill));
  }
  BN_INLINE void add_value(int k, NativeDouble w, NativeDouble value) { add_chosen(k, w, w != 0 ? value : shift.v[k]); }
  BN_INLINE void add_chosen(int k, NativeDouble w, NativeDouble x) {
    if constexpr (Accumulator::kHasLow) {
      add_compensated(k, w, x);
    } else {
      add_plain(k, w, x);
    }
  }
  BN_INLINE void add_plain(int k, NativeDouble w, NativeDouble x) {
    const NativeDouble d = kShift == Shift::none ? x : x - shift.v[k];
    const NativeDouble term = w * d;
    first.add(k, term);
    second.add(k, term * d);
  }
  BN_INLINE void add_compensated(int k, NativeDouble w, NativeDouble x) {
    NativeDouble d = x, d_lo = {};
    if constexpr (kShift == Shift::given) {
      d = x - shift.v[k];
      d_lo = sum_error(x, NativeDouble{} - shift.v[k], d);
    }
    const NativeDouble term = w * d;
    const NativeDouble term_lo = normal_product_error(w, d, term) + w * d_lo;
    const NativeDouble square = term * d;
    first.add(k, term);
    first.low.v[k] = first.low.v[k] + term_lo;
    second.add(k, square);
    second.low.v[k] = second.low.v[k] + (normal_product_error(term, d, square) + (term_lo * d + term * d_lo));
  }
};

// Rows whose weights are numbered: they are laid out for some rows at a time.
template <class W>
BN_NOINLINE void lay_out_rows(const NumberedWeights<W>& weights, std::int64_t r, std::int64_t count,
                              std::int64_t columns, W* to) {
  for (std::int64_t k = 0; k < count; ++k) {
    auto of_row = weights.row(r + k);
    for (std::int64_t c = 0; c < columns; c += kLanes) store(to + k * columns + c, of_row.next());
  }
}
template <class T, class Make>
BN_INLINE void sum_weighted_rows(Make make, const Rows& rows, const ColumnSums& out, const RowWeights<WeightOf<T>>& w,
                                 const T* x) {
  using W = WeightOf<T>;
  if (!is_numbered(w)) return sum_rows<T>(make, rows, out, x, w);
  const NumberedWeights<W> weights(w, rows.count, rows.columns);
  const RowsAhead ahead = rows_ahead<T>(rows);
  const std::int64_t held = kCopied / rows.columns, most = held < kRowsPerVisit ? held : kRowsPerVisit;
  Copies<1, W> laid_out;
  for (std::int64_t r = 0; r < rows.count; r += most) {
    const std::int64_t visit = rows.count - r < most ? rows.count - r : most;
    lay_out_rows(weights, r, visit, rows.columns, laid_out.values);
    visit_rows(make, r == 0, visit, rows.columns, rows.columns, ahead, out, x + r * rows.columns,
               NearRows<W>{laid_out.values});
  }
}

template <class T, class Accumulator>
void runs_weighted_moments(const T* x, const RunWeights<WeightOf<T>>& w, Runs runs, Sums* out) {
  const auto make = [](std::int64_t) { return WeightedMoments<T, Accumulator, Shift::none>(broadcast(0.0), T(0)); };
  with_weights_of_sums<2>(w, runs, [&](const auto& weights) __attribute__((always_inline)) {
    sum_runs<Accumulator, T>(make, runs, out, x, weights);
  });
}
template <class T, class Accumulator>
void runs_weighted_moments_about(const T* x, const RunWeights<WeightOf<T>>& w, Runs runs, Arithmetic<T> shift,
                                 Sums* out) {
  const auto make = [shift](std::int64_t) {
    return WeightedMoments<T, Accumulator, Shift::given>(broadcast(static_cast<double>(shift)), shift);
  };
  sum_runs<Accumulator, T>(make, runs, out, x, w);
}
template <class T, class Accumulator>
void rows_weighted_moments(const T* x, const RowWeights<WeightOf<T>>& w, Rows rows, const ColumnSums& out) {
  const auto make = [](std::int64_t, std::int64_t) {
    return WeightedMoments<T, Accumulator, Shift::none>(broadcast(0.0), T(0));
  };
  sum_weighted_rows(make, rows, out, w, x);
}
template <class T, class Accumulator>
void rows_weighted_moments_about(const T* x, const RowWeights<WeightOf<T>>& w, Rows rows, const Arithmetic<T>* shift,
                                 const ColumnSums& out) {
  const auto make = [shift](std::int64_t c, std::int64_t n) {
    return WeightedMoments<T, Accumulator, Shift::given>(load_upto<double>(shift + c, n, Arithmetic<T>(0)), T(0));
  };
  sum_rows<T>(make, rows, out, x, w);  // rare
}

// ---- grad_sums ----

// Where there is no weight: 0*(0 - mean).
template <class T, class Accumulator>
struct MaskedGradTerms : GradTerms<T, Accumulator> {
  template <class Weights>
  BN_INLINE void add_vector(int k, const T* dy, const T* x, const Weights& weights) {
    this->add_value(k, vector_where(dy, weights, k), vector_where(x, weights, k));
  }
  template <class Weights>
  BN_INLINE void add_vector_of_all(int k, const T* dy, const T* x, const Weights& weights) {
    this->add_value(k, vector_of_all_where(dy, weights, k), vector_of_all_where(x, weights, k));
  }
  template <class Weights>
  BN_INLINE void add_part(int k, std::int64_t n, const T* dy, const T* x, const Weights& weights) {
    this->add_value(k, vector_of_first_where(dy, weights, k, n), vector_of_first_where(x, weights, k, n));
  }
};

template <class T, class Accumulator>
void runs_masked_grad_sums(const T* dy, const T* x, const RunWeights<WeightOf<T>>& w, Runs runs, const double* mean,
                           Sums* out) {
  const auto make = [mean](std::int64_t c) { return MaskedGradTerms<T, Accumulator>{{{}, {}, broadcast(mean[c])}}; };
  with_weights_of_sums<1>(w, runs, [&](const auto& weights) __attribute__((always_inline)) {
    sum_runs<Accumulator, T>(make, runs, out, dy, x, weights);
  });
}
template <class T, class Accumulator>
void rows_masked_grad_sums(const T* dy, const T* x, const RowWeights<WeightOf<T>>& w, Rows rows, const double* mean,
                           const ColumnSums& out) {
  const auto make = [mean]<class V>(std::int64_t c, std::int64_t n) {
    return GradTerms<V, Accumulator>{{}, {}, load_upto<double>(mean + c, n, 0.0)};
  };
  sum_counted_rows<T>(make, rows, out, w, dy, x);
}

// ---- what is written ----

// The outputs of `map` where the weight is not 0, else 0. This is what the usual case, a mask with zeros at padding,
// comes to: fewer operations, and no branches.
template <class A, class Map>
struct MapOrZero {
  Map map;

  template <class X, class Weights>
  BN_INLINE Lanes<A> operator()(const X* x, const Weights& weights, std::int64_t n) const {
    return where(weight_lanes<A>(weights, n), map(x, n), broadcast(A(0)));
  }
  template <class X, class Weights>
  BN_INLINE Lanes<A> operator()(const X* dy, const X* x, const Weights& weights, std::int64_t n) const {
    return where(weight_lanes<A>(weights, n), map(dy, x, n), broadcast(A(0)));
  }
};
template <class A, class Map>
BN_INLINE MapOrZero<A, Map> join(std::int64_t n, const MapOrZero<A, Map>& a, const MapOrZero<A, Map>& b) {
  return {join(n, a.map, b.map)};
}
template <class T, class A>
struct WeightedNormalizeMap {
  using OrZero = MapOrZero<A, NormalizeMap<T, A>>;
  NormalizeMap<T, A> map;
  AtPadding at_padding;

  template <class Weights>
  BN_INLINE Lanes<A> operator()(const T* x, const Weights& weights, std::int64_t n) const {
    return where(weight_lanes<A>(weights, n), map(x, n), padding(n, x));
  }
  BN_INLINE Lanes<A> padding(std::int64_t n, const T* x) const {
    if (at_padding == AtPadding::formula) return map(x, n);
    return at_padding == AtPadding::input ? load_upto<A>(x, n, T(0)) : broadcast(A(0));
  }
  [[nodiscard]] BN_INLINE bool is_map_or_zero(bool) const { return at_padding == AtPadding::zero; }
};
template <class T, class A>
BN_INLINE WeightedNormalizeMap<T, A> join(std::int64_t n, const WeightedNormalizeMap<T, A>& a,
                                          const WeightedNormalizeMap<T, A>& b) {
  return {join(n, a.map, b.map), a.at_padding};
}

template <class T, class A>
struct WeightedGradInputMap {
  using OrZero = MapOrZero<A, GradInputMap<T, A>>;
  GradInputMap<T, A> map;
  AtPadding at_padding;

  template <class Weights>
  BN_INLINE Lanes<A> operator()(const T* dy, const T* x, const Weights& weights, std::int64_t n) const {
    const Lanes<A> w = weight_lanes<A>(weights, n), g = load_upto<A>(dy, n, T(0));
    const Lanes<A> from_x = (load_upto<A>(x, n, T(0)) - map.x_center) * map.x_scale;
    const Lanes<A> counted = (g - w * map.dy_center) * map.dy_scale + w * from_x + w * map.offset;
    return where(w, counted, padding(n, dy));
  }
  BN_INLINE Lanes<A> padding(std::int64_t n, const T* dy) const {
    if (at_padding == AtPadding::zero) return broadcast(A(0));
    const Lanes<A> g = load_upto<A>(dy, n, T(0));
    return at_padding == AtPadding::input ? g : g * map.dy_scale;
  }
  [[nodiscard]] BN_INLINE bool is_map_or_zero(bool is_mask) const { return is_mask && at_padding == AtPadding::zero; }
};
template <class T, class A>
BN_INLINE WeightedGradInputMap<T, A> join(std::int64_t n, const WeightedGradInputMap<T, A>& a,
                                          const WeightedGradInputMap<T, A>& b) {
  return {join(n, a.map, b.map), a.at_padding};
}

// f(make) with the simplest maps that do for these weights what those of `make` do. `first`: arguments of make.
template <class Make, class F, class... First>
BN_INLINE void with_simplest_maps(bool is_mask, Make make, const F& f, First... first) {
  if constexpr (requires { make(first...).is_map_or_zero(is_mask); }) {
    using OrZero = typename decltype(make(first...))::OrZero;
    if (make(first...).is_map_or_zero(is_mask)) {
      return f([make](First... c) __attribute__((always_inline)) { return OrZero{make(c...).map}; });
    }
  }
  f(make);
}

template <Stores kStores, class Map, class T, class W, class... Input>
BN_INLINE void apply_weighted_run(const Map& map, std::int64_t length, std::int64_t ahead, T* out, const W* w,
                                  const Input*... input) {
  std::int64_t at = values_to_line(out);
  if (at > length) at = length;
  if (at > 0) store_first(out, at, map(input..., w, at));
  for (; at + kLanes <= length; at += kLanes) {
    put<kStores>(out + at, map((input + at)..., w + at, kLanes), ahead, (input + at)...);
  }
  if (at < length) store_first(out + at, length - at, map((input + at)..., w + at, length - at));
}
// Stretches as without weights, which are repeated for that; run by run where this would take long.
template <Stores kStores, class Make, class T, class W, class... Input>
BN_INLINE void apply_runs_with(Make make, const Runs& runs, T* out, const RunWeights<W>& w, const Input*... input) {
  if (runs.length <= kLongestRepeated) return apply_runs<kStores>(make, runs, out, input..., w);
  for (std::int64_t k = 0; k < runs.count; ++k) {
    for (std::int64_t c = 0; c < runs.channels; ++c) {
      const std::int64_t at = k * runs.stride + c * runs.length;
      apply_weighted_run<kStores>(make(c), runs.length, runs.ahead, out + at, run_at(w, 0, k), (input + at)...);
    }
  }
  if constexpr (kStores == Stores::around_cache) finish_streams();
}
template <Stores kStores, class Make, class T, class W, class... Input>
BN_INLINE void apply_weighted_runs(Make make, const Runs& runs, T* out, const RunWeights<W>& w, const Input*... input) {
  const auto apply = [&](const auto& simplest)
                         __attribute__((always_inline)) { apply_runs_with<kStores>(simplest, runs, out, w, input...); };
  with_simplest_maps(w.is_mask, make, apply, std::int64_t{0});
}

// Row by row: coefficients are loaded anew for each, which costs less than going down the columns with weights. A
// function of its own, which has the registers for itself: inlined, GCC 12 kept its addresses on the stack.
template <class Make, class T, class Weights, class... Input>
BN_NOINLINE void apply_row_by_row(Make make, const Rows rows, T* out, const Weights& weights, const Input*... input) {
  const std::int64_t ahead = rows.ahead, columns = rows.columns, to_next = rows.stride - rows.columns;
  for (std::int64_t r = 0; r < rows.count; ++r) {
    auto some = weights.row(r);
    std::int64_t c = 0;
    for (; c + kLanes <= columns; c += kLanes) {
      if (ahead != 0) {
        (fetch_lanes<Fetch::kFar>(input + ahead), ...);
        fetch_lanes_to_store(out + ahead);
      }
      store_as(out, make(c, kLanes)(input..., some.next(), kLanes));
      ((input += kLanes), ...);
      out += kLanes;
    }
    if (const std::int64_t n = columns - c; n > 0) {
      store_first(out, n, make(c, n)(input..., some.next(), n));
      ((input += n), ...);
      out += n;
    }
    ((input += to_next), ...);
    out += to_next;
  }
}
template <class Make, class T, class W, class... Input>
BN_INLINE void apply_rows_with(Make make, Rows rows, T* out, const RowWeights<W>& weights, const Input*... input) {
  if (has_ones(weights)) {
    if (weights.repeat > 1) rows = {rows.count * weights.repeat, weights.channels, weights.channels, rows.ahead};
    return apply_row_by_row(make, rows, out, OneEach<W>{weights.values}, input...);
  }
  if (is_numbered(weights)) {
    return apply_row_by_row(make, rows, out, NumberedWeights<W>(weights, rows.count, rows.columns), input...);
  }
  W laid_out[kMostLaidOut];
  apply_row_by_row(make, rows, out, SeveralEach<W>{weights, laid_out}, input...);
}
template <class Make, class T, class W, class... Input>
BN_INLINE void apply_weighted_rows(Make make, const Rows& rows, T* out, const RowWeights<W>& weights,
                                   const Input*... input) {
  const auto apply = [&](const auto& simplest)
                         __attribute__((always_inline)) { apply_rows_with(simplest, rows, out, weights, input...); };
  with_simplest_maps(weights.is_mask, make, apply, std::int64_t{0}, std::int64_t{1});
}

// Rows side by side as one piece of memory, each with a single weight; as apply_rows_around_cache.
template <class Make, class T, class W, class... Input>
BN_INLINE void apply_weighted_rows_around_cache(Make make, const Rows& rows, T* out, const RowWeights<W>& weights,
                                                const Input*... input) {
  const std::int64_t total = rows.count * rows.columns;
  std::int64_t at = values_to_line(out);
  if (at > total) at = total;
  const W* w = weights.values;
  if (at > 0) store_first(out, at, make(0, at)(input..., OneWeight<W>{*w}, at));
  std::int64_t c = at;
  for (; at + kLanes <= total; at += kLanes) {
    const std::int64_t rest = rows.columns - c;
    if (rest >= kLanes || rest == 0) {
      if (rest == 0) c = 0, ++w;
      stream_lanes(out + at, make(c, kLanes)((input + at)..., OneWeight<W>{*w}, kLanes));
    } else {
      W both[kLanes];
      for (std::int64_t l = 0; l < kLanes; ++l) both[l] = w[l < rest ? 0 : 1];
      stream_lanes(out + at, make(c, kLanes)((input + at)..., static_cast<const W*>(both), kLanes));
    }
    c += kLanes;
    if (c > rows.columns) c -= rows.columns, ++w;
  }
  // What is left lies in the last row: a row has at least a vector.
  if (at < total) {
    const W* last = weights.values + rows.count - 1;
    store_first(out + at, total - at,
                make(rows.columns - (total - at), total - at)((input + at)..., OneWeight<W>{*last}, total - at));
  }
  finish_streams();
}

template <class T, Stores kStores>
void runs_weighted_normalize(const T* x, T* y, const RunWeights<WeightOf<T>>& w, AtPadding at_padding, Runs runs,
                             const Affine<Arithmetic<T>>* k) {
  const auto make = [k, at_padding](std::int64_t c) {
    return WeightedNormalizeMap<T, Arithmetic<T>>{normalize_map<T>(k[c]), at_padding};
  };
  apply_weighted_runs<kStores>(make, runs, y, w, x);
}
template <class T>
void runs_weighted_normalize_wide(const T* x, T* y, const RunWeights<WeightOf<T>>& w, AtPadding at_padding, Runs runs,
                                  const Affine<double>& k) {
  const auto make = [k, at_padding](std::int64_t) {
    return WeightedNormalizeMap<T, double>{normalize_map<T>(k), at_padding};
  };
  apply_runs_with<Stores::ordinary>(make, runs, y, w, x);
}
template <class T>
void rows_weighted_normalize(const T* x, T* y, const RowWeights<WeightOf<T>>& w, AtPadding at_padding, Rows rows,
                             const AffineColumns<Arithmetic<T>>& k) {
  const auto make = [k, at_padding](std::int64_t c, std::int64_t n) {
    return WeightedNormalizeMap<T, Arithmetic<T>>{normalize_map<T>(k, c, n), at_padding};
  };
  apply_weighted_rows(make, rows, y, w, x);
}
template <class T>
void rows_weighted_normalize_around_cache(const T* x, T* y, const RowWeights<WeightOf<T>>& w, AtPadding at_padding,
                                          Rows rows, const AffineColumns<Arithmetic<T>>& k) {
  const auto make = [k, at_padding](std::int64_t c, std::int64_t n) {
    return WeightedNormalizeMap<T, Arithmetic<T>>{normalize_map<T>(k, c, n), at_padding};
  };
  apply_weighted_rows_around_cache(make, rows, y, w, x);
}
template <class T>
void rows_weighted_normalize_mixed(const T* x, T* y, const RowWeights<float>& w, AtPadding at_padding, Rows rows,
                                   const AffineColumns<float>& k, const WideColumns<AffineColumns<double>>& wide) {
  const auto make = [k, wide, at_padding](std::int64_t c, std::int64_t n) {
    return Mixed<WeightedNormalizeMap<T, float>, WeightedNormalizeMap<T, double>>{
        {normalize_map<T>(k, c, n), at_padding},
        {normalize_map<T>(wide.coefficients, c, n), at_padding},
        wide.mask[c / kLanes]};
  };
  apply_weighted_rows(make, rows, y, w, x);
}

template <class T, Stores kStores>
void runs_weighted_grad_input(const T* dy, const T* x, T* dx, const RunWeights<WeightOf<T>>& w, AtPadding at_padding,
                              Runs runs, const GradAffine<Arithmetic<T>>* k) {
  const auto make = [k, at_padding](std::int64_t c) {
    return WeightedGradInputMap<T, Arithmetic<T>>{grad_input_map<T>(k[c]), at_padding};
  };
  apply_weighted_runs<kStores>(make, runs, dx, w, dy, x);
}
template <class T>
void runs_weighted_grad_input_wide(const T* dy, const T* x, T* dx, const RunWeights<WeightOf<T>>& w,
                                   AtPadding at_padding, Runs runs, const GradAffine<double>& k) {
  const auto make = [k, at_padding](std::int64_t) {
    return WeightedGradInputMap<T, double>{grad_input_map<T>(k), at_padding};
  };
  apply_runs_with<Stores::ordinary>(make, runs, dx, w, dy, x);
}
template <class T>
void rows_weighted_grad_input(const T* dy, const T* x, T* dx, const RowWeights<WeightOf<T>>& w, AtPadding at_padding,
                              Rows rows, const GradAffineColumns<Arithmetic<T>>& k) {
  const auto make = [k, at_padding](std::int64_t c, std::int64_t n) {
    return WeightedGradInputMap<T, Arithmetic<T>>{grad_input_map<T>(k, c, n), at_padding};
  };
  apply_weighted_rows(make, rows, dx, w, dy, x);
}
template <class T>
void rows_weighted_grad_input_around_cache(const T* dy, const T* x, T* dx, const RowWeights<WeightOf<T>>& w,
                                           AtPadding at_padding, Rows rows, const GradAffineColumns<Arithmetic<T>>& k) {
  const auto make = [k, at_padding](std::int64_t c, std::int64_t n) {
    return WeightedGradInputMap<T, Arithmetic<T>>{grad_input_map<T>(k, c, n), at_padding};
  };
  apply_weighted_rows_around_cache(make, rows, dx, w, dy, x);
}
template <class T>
void rows_weighted_grad_input_mixed(const T* dy, const T* x, T* dx, const RowWeights<float>& w, AtPadding at_padding,
                                    Rows rows, const GradAffineColumns<float>& k,
                                    const WideColumns<GradAffineColumns<double>>& wide) {
  const auto make = [k, wide, at_padding](std::int64_t c, std::int64_t n) {
    return Mixed<WeightedGradInputMap<T, float>, WeightedGradInputMap<T, double>>{
        {grad_input_map<T>(k, c, n), at_padding},
        {grad_input_map<T>(wide.coefficients, c, n), at_padding},
        wide.mask[c / kLanes]};
  };
  apply_weighted_rows(make, rows, dx, w, dy, x);
}

// ---- counts ----

// Loops that compilers turn into vectors, since the counters are as wide as the weights. All of a mask is good.
template <class W>
WeightCounts count_weights(const W* w, std::int64_t n) {
  using Counter = std::conditional_t<sizeof(W) == sizeof(std::int32_t), std::int32_t, std::int64_t>;
  constexpr W kMost = sizeof(W) == sizeof(float) ? static_cast<W>(__FLT_MAX__) : static_cast<W>(__DBL_MAX__);
  Counter zeros = 0, ones = 0, good = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    zeros += static_cast<Counter>(w[i] == 0);
    ones += static_cast<Counter>(w[i] == 1);
  }
  if (zeros + ones == n) return {zeros, ones, n, static_cast<double>(ones), 0};
  for (std::int64_t i = 0; i < n; ++i) {
    good += static_cast<Counter>(w[i] >= 0) & static_cast<Counter>(w[i] <= kMost);
  }
  WeightCounts counts{zeros, ones, good, 0, 0};
  Compensated sum;
  for (std::int64_t i = 0; i < n; i += kLanes) {
    const Lanes<double> some = load_upto<double>(w + i, n - i, W(0));
    BN_UNROLL for (int k = 0; k < Lanes<double>::kVectors; ++k) sum.add(k, some.v[k]);
  }
  fold(sum, &counts.total, &counts.total_lo);
  return counts;
}

// ---- the table ----

template <class T, class Accumulator>
constexpr WeightedKernels<T> make_weighted_kernels() {
  WeightedKernels<T> k{.masked = {.runs = runs_masked_moments<T, Accumulator>,
                                  .rows = rows_masked_moments<T, Accumulator>,
                                  .runs_about = runs_weighted_moments_about<T, Accumulator>,
                                  .rows_about = rows_weighted_moments_about<T, Accumulator>,
                                  .runs_compensated = runs_weighted_moments<T, Compensated>,
                                  .rows_compensated = rows_weighted_moments<T, Compensated>},
                       .weighted = {.runs = runs_weighted_moments<T, Accumulator>,
                                    .rows = rows_weighted_moments<T, Accumulator>,
                                    .runs_about = runs_weighted_moments_about<T, Accumulator>,
                                    .rows_about = rows_weighted_moments_about<T, Accumulator>,
                                    .runs_compensated = runs_weighted_moments<T, Compensated>,
                                    .rows_compensated = rows_weighted_moments<T, Compensated>},
                       .count = count_weights<WeightOf<T>>,
                       .runs_normalize = runs_weighted_normalize<T, Stores::ordinary>,
                       .runs_normalize_around_cache = runs_weighted_normalize<T, Stores::around_cache>,
                       .runs_normalize_wide = runs_weighted_normalize_wide<T>,
                       .rows_normalize = rows_weighted_normalize<T>,
                       .rows_normalize_around_cache = rows_weighted_normalize_around_cache<T>,
                       .rows_normalize_mixed = nullptr,
                       .runs_grad_sums = runs_masked_grad_sums<T, Accumulator>,
                       .rows_grad_sums = rows_masked_grad_sums<T, Accumulator>,
                       .runs_grad_input = runs_weighted_grad_input<T, Stores::ordinary>,
                       .runs_grad_input_around_cache = runs_weighted_grad_input<T, Stores::around_cache>,
                       .runs_grad_input_wide = runs_weighted_grad_input_wide<T>,
                       .rows_grad_input = rows_weighted_grad_input<T>,
                       .rows_grad_input_around_cache = rows_weighted_grad_input_around_cache<T>,
                       .rows_grad_input_mixed = nullptr};
  if constexpr (sizeof(T) < sizeof(double)) {
    k.rows_normalize_mixed = rows_weighted_normalize_mixed<T>;
    k.rows_grad_input_mixed = rows_weighted_grad_input_mixed<T>;
  }
  return k;
}

}  // namespace
}  // namespace batchnorm::kernels
