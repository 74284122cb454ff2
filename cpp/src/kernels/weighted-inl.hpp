// The passes with a weight per position: terms and maps around those without.
#pragma once

#include "kernels/grad_input-inl.hpp"
#include "kernels/grad_sums-inl.hpp"
#include "kernels/moments-inl.hpp"
#include "kernels/normalize-inl.hpp"

namespace batchnorm::kernels {
namespace {

// ---- moments ----

template <class T, class Accumulator, Shift kShift>
struct MaskedMoments : MomentTerms<T, Accumulator, kShift> {
  using Base = MomentTerms<T, Accumulator, kShift>;
  MaskedMoments(const Lanes<double>& about, Arithmetic<T> fill_with) : Base{{}, {}, about, fill_with} {}

  template <class Weights>
  BN_INLINE void add_vector(int k, const T* p, const Weights& w) {
    if constexpr (kShift == Shift::none) {
      this->add_value(k, vector_where(p, w, k));
    } else {
      this->add_value(k, weight_vector<double>(w, k) != 0 ? load_vector<double>(p, k) : this->shift.v[k]);
    }
  }
  template <class Weights>
  BN_INLINE void add_part(int k, std::int64_t n, const T* p, const Weights& w) {
    if constexpr (kShift == Shift::none) {
      this->add_value(k, vector_of_first_where(p, w, k, n));
    } else {
      const NativeDouble x = load_vector_of_first<double>(p, k, n, this->fill);
      this->add_value(k, weight_vector_of_first<double>(w, k, n) != 0 ? x : this->shift.v[k]);
    }
  }
};

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
  template <class Weights>
  BN_INLINE void add_part(int k, std::int64_t n, const T* p, const Weights& weights) {
    add_value(k, weight_vector_of_first<double>(weights, k, n), load_vector_of_first<double>(p, k, n, fill));
  }
  BN_INLINE void add_value(int k, NativeDouble w, NativeDouble value) {
    const NativeDouble x = w != 0 ? value : shift.v[k];
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

// Rows that count, where each row of the tensor has a weight of its own (has_ones): the others add nothing and are not
// visited. What is given is the same, bit for bit.
struct ChosenRows {
  std::int64_t place[kRowsPerVisit], count = 0;

  BN_INLINE void choose(std::int64_t where) { place[count++] = where; }
  BN_INLINE std::int64_t operator()(std::int64_t r) const { return place[r]; }
};
template <class T, class Make, class W, class... Input>
BN_INLINE void sum_counted_rows(Make make, Rows rows, const ColumnSums& out, const RowWeights<W>& weights,
                                const Input*... input) {
  const RowsAhead ahead = rows_ahead<T>(rows);
  for (std::int64_t r = 0; r < rows.count; r += kRowsPerVisit) {
    const std::int64_t visit = rows.count - r < kRowsPerVisit ? rows.count - r : kRowsPerVisit, at = r * rows.stride;
    for (std::int64_t t = 0; t < weights.repeat; ++t) {
      ChosenRows chosen;
      for (std::int64_t k = 0; k < visit; ++k) {
        if (weights.values[(r + k) * weights.repeat + t] != 0) chosen.choose(k * rows.stride);
      }
      if (chosen.count == 0 && r > 0) continue;
      const std::int64_t end = weights.repeat == 1 ? rows.columns : (t + 1) * weights.channels;
      for (std::int64_t c = t * weights.channels; c < end; c += kLanes) {
        const std::int64_t n = end - c < kLanes ? end - c : kLanes;
        visit_columns(make(c, n), r == 0, chosen.count, chosen, ahead, c, n, out, (input + at + c)...);
      }
    }
  }
}

template <class T, class Accumulator, template <class, class, Shift> class Terms>
void runs_weighted_moments(const T* x, const RunWeights<WeightOf<T>>& w, Runs runs, Sums* out) {
  const auto make = [](std::int64_t) { return Terms<T, Accumulator, Shift::none>(broadcast(0.0), T(0)); };
  sum_runs<Accumulator, T>(make, runs, out, x, w);
}
template <class T, class Accumulator, template <class, class, Shift> class Terms>
void runs_weighted_moments_about(const T* x, const RunWeights<WeightOf<T>>& w, Runs runs, Arithmetic<T> shift,
                                 Sums* out) {
  const auto make = [shift](std::int64_t) {
    return Terms<T, Accumulator, Shift::given>(broadcast(static_cast<double>(shift)), shift);
  };
  sum_runs<Accumulator, T>(make, runs, out, x, w);
}
template <class T, class Accumulator, template <class, class, Shift> class Terms>
void rows_weighted_moments(const T* x, const RowWeights<WeightOf<T>>& w, Rows rows, const ColumnSums& out) {
  using Masked = MaskedMoments<T, Accumulator, Shift::none>;
  if constexpr (std::is_same_v<Terms<T, Accumulator, Shift::none>, Masked>) {
    const auto plain = [](std::int64_t, std::int64_t) { return typename Masked::Base{{}, {}, {}, T(0)}; };
    if (has_ones(w)) return sum_counted_rows<T>(plain, rows, out, w, x);
  }
  const auto make = [](std::int64_t, std::int64_t) { return Terms<T, Accumulator, Shift::none>(broadcast(0.0), T(0)); };
  sum_rows<T>(make, rows, out, x, w);
}
template <class T, class Accumulator, template <class, class, Shift> class Terms>
void rows_weighted_moments_about(const T* x, const RowWeights<WeightOf<T>>& w, Rows rows, const Arithmetic<T>* shift,
                                 const ColumnSums& out) {
  const auto make = [shift](std::int64_t c, std::int64_t n) {
    return Terms<T, Accumulator, Shift::given>(load_upto<double>(shift + c, n, T(0)), T(0));
  };
  sum_rows<T>(make, rows, out, x, w);
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
  BN_INLINE void add_part(int k, std::int64_t n, const T* dy, const T* x, const Weights& weights) {
    this->add_value(k, vector_of_first_where(dy, weights, k, n), vector_of_first_where(x, weights, k, n));
  }
};

template <class T, class Accumulator>
void runs_masked_grad_sums(const T* dy, const T* x, const RunWeights<WeightOf<T>>& w, Runs runs, const double* mean,
                           Sums* out) {
  using Terms = MaskedGradTerms<T, Accumulator>;
  sum_runs<Accumulator, T>([mean](std::int64_t c) { return Terms{{{}, {}, broadcast(mean[c])}}; }, runs, out, dy, x, w);
}
template <class T, class Accumulator>
void rows_masked_grad_sums(const T* dy, const T* x, const RowWeights<WeightOf<T>>& w, Rows rows, const double* mean,
                           const ColumnSums& out) {
  const auto plain = [mean](std::int64_t c, std::int64_t n) {
    return GradTerms<T, Accumulator>{{}, {}, load_upto<double>(mean + c, n, 0.0)};
  };
  if (has_ones(w)) return sum_counted_rows<T>(plain, rows, out, w, dy, x);
  const auto make = [mean](std::int64_t c, std::int64_t n) {
    return MaskedGradTerms<T, Accumulator>{{{}, {}, load_upto<double>(mean + c, n, 0.0)}};
  };
  sum_rows<T>(make, rows, out, dy, x, w);
}

// ---- what is written ----

// The outputs of `map` where the weight is not 0.
template <class T, class A>
struct WeightedNormalizeMap {
  NormalizeMap<T, A> map;
  AtPadding at_padding;

  template <class Weights>
  BN_INLINE Lanes<A> operator()(const T* x, const Weights& weights, std::int64_t n) const {
    return where(weight_lanes<A>(weights, n), map(x, n), padding(n, x));
  }
  // Whether what has this weight is as without weights.
  template <class W>
  [[nodiscard]] BN_INLINE bool is_plain(W weight) const {
    return weight != 0 || at_padding == AtPadding::formula;
  }
  BN_INLINE Lanes<A> padding(std::int64_t n, const T* x) const {
    if (at_padding == AtPadding::formula) return map(x, n);
    return at_padding == AtPadding::input ? load_upto<A>(x, n, T(0)) : broadcast(A(0));
  }
};
template <class T, class A>
BN_INLINE WeightedNormalizeMap<T, A> join(std::int64_t n, const WeightedNormalizeMap<T, A>& a,
                                          const WeightedNormalizeMap<T, A>& b) {
  return {join(n, a.map, b.map), a.at_padding};
}

template <class T, class A>
struct WeightedGradInputMap {
  GradInputMap<T, A> map;
  AtPadding at_padding;

  template <class Weights>
  BN_INLINE Lanes<A> operator()(const T* dy, const T* x, const Weights& weights, std::int64_t n) const {
    const Lanes<A> w = weight_lanes<A>(weights, n), g = load_upto<A>(dy, n, T(0));
    const Lanes<A> from_x = (load_upto<A>(x, n, T(0)) - map.x_center) * map.x_scale;
    const Lanes<A> counted = (g - w * map.dy_center) * map.dy_scale + w * from_x + w * map.offset;
    return where(w, counted, padding(n, dy, x));
  }
  BN_INLINE Lanes<A> padding(std::int64_t n, const T* dy, const T*) const {
    if (at_padding == AtPadding::zero) return broadcast(A(0));
    const Lanes<A> g = load_upto<A>(dy, n, T(0));
    return at_padding == AtPadding::input ? g : g * map.dy_scale;
  }
  template <class W>
  [[nodiscard]] BN_INLINE bool is_plain(W weight) const {
    return weight == 1;
  }
};
template <class T, class A>
BN_INLINE WeightedGradInputMap<T, A> join(std::int64_t n, const WeightedGradInputMap<T, A>& a,
                                          const WeightedGradInputMap<T, A>& b) {
  return {join(n, a.map, b.map), a.at_padding};
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
BN_INLINE void apply_weighted_runs(Make make, Runs runs, T* out, const RunWeights<W>& w, const Input*... input) {
  if (runs.length <= kLongestRepeated) return apply_runs<kStores>(make, runs, out, input..., w);
  for (std::int64_t k = 0; k < runs.count; ++k) {
    for (std::int64_t c = 0; c < runs.channels; ++c) {
      const std::int64_t at = k * runs.stride + c * runs.length;
      apply_weighted_run<kStores>(make(c), runs.length, runs.ahead, out + at, run_at(w, 0, k), (input + at)...);
    }
  }
  if constexpr (kStores == Stores::around_cache) finish_streams();
}

template <class Map, class T, class W, class... Input>
BN_INLINE void apply_weighted_columns(const Map& map, std::int64_t count, const Rows& rows, std::int64_t c,
                                      std::int64_t n, T* out, const WeightedColumns<W>& w, const Input*... input) {
  for (std::int64_t r = 0; r < count; ++r) {
    fetch_ahead_of_row(rows, c, r, out, input...);
    const std::int64_t at = r * rows.stride;
    store_upto(out + at, n, map((input + at)..., row_of(w, r, 0), n));
  }
}
// A row that is not as without weights.
template <class Make, class T, class W, class... Input>
BN_INLINE void apply_row_with(const W& weight, Make make, std::int64_t columns, T* out, const Input*... input) {
  for (std::int64_t c = 0; c < columns; c += kLanes) {
    const std::int64_t n = columns - c < kLanes ? columns - c : kLanes;
    const auto map = make(c, n);
    if (weight == 0) {
      store_upto(out + c, n, map.padding(n, (input + c)...));
    } else {
      store_upto(out + c, n, map((input + c)..., WeightedColumns<W>{nullptr, &weight}, n));
    }
  }
}
// Rows with a weight each: those that are as without weights are visited together, the others alone, so that no vector
// looks at its weight and padding at no input.
template <class Make, class T, class W, class... Input>
BN_INLINE void apply_rows_with_one_each(Make make, const Rows& rows, T* out, const W* weights, const Input*... input) {
  const auto some = make(0, rows.columns < kLanes ? rows.columns : kLanes);
  const auto plain = [&make](std::int64_t c, std::int64_t n) { return make(c, n).map; };
  for (std::int64_t r = 0; r < rows.count;) {
    const std::int64_t first = r, from = first * rows.stride;
    ChosenRows chosen;
    for (; r < rows.count && chosen.count < kRowsPerApply; ++r) {
      if (some.is_plain(weights[r])) {
        chosen.choose((r - first) * rows.stride);
        continue;
      }
      const std::int64_t at = r * rows.stride;
      apply_row_with(weights[r], make, rows.columns, out + at, (input + at)...);
    }
    apply_visit(plain, chosen.count, chosen, rows, out + from, (input + from)...);
  }
}

template <class Make, class T, class W, class... Input>
BN_INLINE void apply_weighted_rows(Make make, Rows rows, T* out, const RowWeights<W>& weights, const Input*... input) {
  if constexpr (requires { make(0, 0).map; }) {
    const std::int64_t width = weights.repeat == 1 ? rows.columns : weights.channels;
    const std::int64_t stride = weights.repeat == 1 ? rows.stride : weights.channels;
    const Rows of_tensor{rows.count * weights.repeat, width, stride, rows.ahead};
    if (has_ones(weights)) return apply_rows_with_one_each(make, of_tensor, out, weights.values, input...);
  }
  for (std::int64_t r = 0; r < rows.count; r += kRowsPerApply) {
    const std::int64_t visit = rows.count - r < kRowsPerApply ? rows.count - r : kRowsPerApply;
    const WeightedRows<W> w = rows_of(weights, r, visit, 0, 0);
    for (std::int64_t c = 0; c < rows.columns; c += kLanes) {
      const std::int64_t n = rows.columns - c < kLanes ? rows.columns - c : kLanes, at = r * rows.stride + c;
      apply_weighted_columns(make(c, n), visit, rows, c, n, out + at, columns_of(w, c), (input + at)...);
    }
  }
}

// Rows side by side as one piece of memory, each with a single weight; as apply_rows_around_cache.
template <class Make, class T, class W, class... Input>
BN_INLINE void apply_weighted_rows_around_cache(Make make, Rows rows, T* out, const RowWeights<W>& weights,
                                                const Input*... input) {
  const std::int64_t total = rows.count * rows.columns;
  std::int64_t at = values_to_line(out);
  if (at > total) at = total;
  const W* w = weights.values;
  if (at > 0) store_first(out, at, make(0, at)(input..., WeightedColumns<W>{nullptr, w}, at));
  std::int64_t c = at;
  for (; at + kLanes <= total; at += kLanes) {
    const std::int64_t rest = rows.columns - c;
    if (rest >= kLanes || rest == 0) {
      if (rest == 0) c = 0, ++w;
      stream_lanes(out + at, make(c, kLanes)((input + at)..., WeightedColumns<W>{nullptr, w}, kLanes));
    } else {
      W both[kLanes];
      for (std::int64_t l = 0; l < kLanes; ++l) both[l] = w[l < rest ? 0 : 1];
      stream_lanes(out + at, make(c, kLanes)((input + at)..., WeightedColumns<W>{both, nullptr}, kLanes));
    }
    c += kLanes;
    if (c > rows.columns) c -= rows.columns, ++w;
  }
  // What is left lies in the last row: a row has at least a vector.
  if (at < total) {
    const W* last = weights.values + rows.count - 1;
    store_first(
        out + at, total - at,
        make(rows.columns - (total - at), total - at)((input + at)..., WeightedColumns<W>{nullptr, last}, total - at));
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
  const auto make = [&k, at_padding](std::int64_t) {
    return WeightedNormalizeMap<T, double>{normalize_map<T>(k), at_padding};
  };
  apply_weighted_runs<Stores::ordinary>(make, runs, y, w, x);
}
template <class T>
void rows_weighted_normalize(const T* x, T* y, const RowWeights<WeightOf<T>>& w, AtPadding at_padding, Rows rows,
                             const AffineColumns<Arithmetic<T>>& k) {
  const auto make = [&k, at_padding](std::int64_t c, std::int64_t n) {
    return WeightedNormalizeMap<T, Arithmetic<T>>{normalize_map<T>(k, c, n), at_padding};
  };
  apply_weighted_rows(make, rows, y, w, x);
}
template <class T>
void rows_weighted_normalize_around_cache(const T* x, T* y, const RowWeights<WeightOf<T>>& w, AtPadding at_padding,
                                          Rows rows, const AffineColumns<Arithmetic<T>>& k) {
  const auto make = [&k, at_padding](std::int64_t c, std::int64_t n) {
    return WeightedNormalizeMap<T, Arithmetic<T>>{normalize_map<T>(k, c, n), at_padding};
  };
  apply_weighted_rows_around_cache(make, rows, y, w, x);
}
template <class T>
void rows_weighted_normalize_mixed(const T* x, T* y, const RowWeights<float>& w, AtPadding at_padding, Rows rows,
                                   const AffineColumns<float>& k, const WideColumns<AffineColumns<double>>& wide) {
  const auto make = [&k, &wide, at_padding](std::int64_t c, std::int64_t n) {
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
  const auto make = [&k, at_padding](std::int64_t) {
    return WeightedGradInputMap<T, double>{grad_input_map<T>(k), at_padding};
  };
  apply_weighted_runs<Stores::ordinary>(make, runs, dx, w, dy, x);
}
template <class T>
void rows_weighted_grad_input(const T* dy, const T* x, T* dx, const RowWeights<WeightOf<T>>& w, AtPadding at_padding,
                              Rows rows, const GradAffineColumns<Arithmetic<T>>& k) {
  const auto make = [&k, at_padding](std::int64_t c, std::int64_t n) {
    return WeightedGradInputMap<T, Arithmetic<T>>{grad_input_map<T>(k, c, n), at_padding};
  };
  apply_weighted_rows(make, rows, dx, w, dy, x);
}
template <class T>
void rows_weighted_grad_input_around_cache(const T* dy, const T* x, T* dx, const RowWeights<WeightOf<T>>& w,
                                           AtPadding at_padding, Rows rows, const GradAffineColumns<Arithmetic<T>>& k) {
  const auto make = [&k, at_padding](std::int64_t c, std::int64_t n) {
    return WeightedGradInputMap<T, Arithmetic<T>>{grad_input_map<T>(k, c, n), at_padding};
  };
  apply_weighted_rows_around_cache(make, rows, dx, w, dy, x);
}
template <class T>
void rows_weighted_grad_input_mixed(const T* dy, const T* x, T* dx, const RowWeights<float>& w, AtPadding at_padding,
                                    Rows rows, const GradAffineColumns<float>& k,
                                    const WideColumns<GradAffineColumns<double>>& wide) {
  const auto make = [&k, &wide, at_padding](std::int64_t c, std::int64_t n) {
    return Mixed<WeightedGradInputMap<T, float>, WeightedGradInputMap<T, double>>{
        {grad_input_map<T>(k, c, n), at_padding},
        {grad_input_map<T>(wide.coefficients, c, n), at_padding},
        wide.mask[c / kLanes]};
  };
  apply_weighted_rows(make, rows, dx, w, dy, x);
}

// ---- counts ----

// A loop that compilers turn into vectors, since the counters are as wide as the weights.
template <class W>
WeightCounts count_weights(const W* w, std::int64_t n) {
  using Counter = std::conditional_t<sizeof(W) == sizeof(std::int32_t), std::int32_t, std::int64_t>;
  constexpr W kMost = sizeof(W) == sizeof(float) ? static_cast<W>(__FLT_MAX__) : static_cast<W>(__DBL_MAX__);
  Counter zeros = 0, ones = 0, good = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    zeros += static_cast<Counter>(w[i] == 0);
    ones += static_cast<Counter>(w[i] == 1);
    good += static_cast<Counter>(w[i] >= 0) & static_cast<Counter>(w[i] <= kMost);
  }
  return {zeros, ones, good};
}

// ---- the table ----

template <class T, class Accumulator, template <class, class, Shift> class Terms>
constexpr typename WeightedKernels<T>::Moments weighted_moments_kernels() {
  return {.runs = runs_weighted_moments<T, Accumulator, Terms>,
          .rows = rows_weighted_moments<T, Accumulator, Terms>,
          .runs_about = runs_weighted_moments_about<T, Accumulator, Terms>,
          .rows_about = rows_weighted_moments_about<T, Accumulator, Terms>,
          .runs_compensated = runs_weighted_moments<T, Compensated, Terms>,
          .rows_compensated = rows_weighted_moments<T, Compensated, Terms>};
}

template <class T, class Accumulator>
constexpr WeightedKernels<T> make_weighted_kernels() {
  WeightedKernels<T> k{.masked = weighted_moments_kernels<T, Accumulator, MaskedMoments>(),
                       .weighted = weighted_moments_kernels<T, Accumulator, WeightedMoments>(),
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
