// The definition: every pass as plain float64 loops, in the order a person would write them.
//
// This is what the vector kernels are held to. It is not one of them: it sums one value after the other, so its last
// bits differ. BATCHNORM_ISA=reference runs the library on it.
#include "kernels/table.hpp"

namespace batchnorm::kernels {
namespace {

// A sum to about twice float64's digits.
class Sum {
 public:
  // term + low, with what the addition rounds off (Knuth 1969, TwoSum).
  void add(double term, double low = 0) {
    const double sum = hi_ + term, part = sum - hi_;
    lo_ += ((hi_ - (sum - part)) + (term - part)) + low;
    hi_ = sum;
  }
  // a*b, of which `a_lo` and `b_lo` are what a and b have lost.
  void add_product(double a, double b, double a_lo = 0, double b_lo = 0) {
    const double product = a * b;
    add(product, __builtin_fma(a, b, -product) + (a * b_lo + a_lo * b));
  }
  [[nodiscard]] double hi() const { return hi_; }
  // Infinity has no error.
  [[nodiscard]] double lo() const { return hi_ - hi_ == 0 ? lo_ : 0; }

 private:
  double hi_ = 0, lo_ = 0;
};
// Plain sums have low parts of 0.
template <class T>
constexpr bool kIsCompensated = sizeof(T) == sizeof(double);
template <bool kCompensated>
Sums sums_of(const Sum& first, const Sum& second) {
  if (!kCompensated) return {first.hi(), 0, second.hi(), 0};
  return {first.hi(), first.lo(), second.hi(), second.lo()};
}

// x - y, and what that rounds off.
struct Difference {
  double hi, lo;
  Difference(double x, double y) : hi(x - y) {
    const double part = hi - x;
    lo = (x - (hi - part)) - (y + part);
  }
};

// The runs of one channel of several.
Runs one_channel(const Runs& runs) { return {runs.length, runs.count, runs.stride}; }

// moments: sum(x - shift) and sum((x - shift)^2).
template <class T, bool kCompensated = kIsCompensated<T>>
void runs_moments_about(const T* x, Runs runs, Arithmetic<T> shift, Sums* out) {
  Sum first, second;
  for (std::int64_t k = 0; k < runs.count; ++k) {
    for (std::int64_t i = 0; i < runs.length; ++i) {
      const Difference d(static_cast<double>(x[k * runs.stride + i]), static_cast<double>(shift));
      first.add(d.hi, d.lo);
      second.add_product(d.hi, d.hi, d.lo, d.lo);
    }
  }
  *out = sums_of<kCompensated>(first, second);
}
template <class T, bool kCompensated = kIsCompensated<T>>
void runs_moments(const T* x, Runs runs, Sums* out) {
  for (std::int64_t c = 0; c < runs.channels; ++c) {
    runs_moments_about<T, kCompensated>(x + c * runs.length, one_channel(runs), 0, out + c);
  }
}

// normalize: y = (x - center)*scale + offset.
template <class T, class A>
void runs_normalize_one(const T* x, T* y, Runs runs, const Affine<A>& k) {
  for (std::int64_t r = 0; r < runs.count; ++r) {
    for (std::int64_t i = 0; i < runs.length; ++i) {
      const std::int64_t at = r * runs.stride + i;
      y[at] =
          static_cast<T>((static_cast<double>(x[at]) - static_cast<double>(k.center)) * static_cast<double>(k.scale) +
                         static_cast<double>(k.offset));
    }
  }
}
template <class T>
void runs_normalize(const T* x, T* y, Runs runs, const Affine<Arithmetic<T>>* k) {
  for (std::int64_t c = 0; c < runs.channels; ++c) {
    runs_normalize_one(x + c * runs.length, y + c * runs.length, one_channel(runs), k[c]);
  }
}

// grad_sums: sum(dy) and sum(dy*(x - mean)).
template <class T>
void add_gradient(T dy, T x, double mean, Sum& first, Sum& second) {
  const Difference d(static_cast<double>(x), mean);
  first.add(static_cast<double>(dy));
  second.add_product(static_cast<double>(dy), d.hi, 0, d.lo);
}
template <class T>
void runs_grad_sums_one(const T* dy, const T* x, Runs runs, double mean, Sums* out) {
  Sum first, second;
  for (std::int64_t k = 0; k < runs.count; ++k) {
    for (std::int64_t i = 0; i < runs.length; ++i) {
      add_gradient(dy[k * runs.stride + i], x[k * runs.stride + i], mean, first, second);
    }
  }
  *out = sums_of<kIsCompensated<T>>(first, second);
}
template <class T>
void runs_grad_sums(const T* dy, const T* x, Runs runs, const double* mean, Sums* out) {
  for (std::int64_t c = 0; c < runs.channels; ++c) {
    runs_grad_sums_one(dy + c * runs.length, x + c * runs.length, one_channel(runs), mean[c], out + c);
  }
}

// grad_input: dx = (dy - dy_center)*dy_scale + (x - x_center)*x_scale + offset.
template <class T, class A>
void runs_grad_input_one(const T* dy, const T* x, T* dx, Runs runs, const GradAffine<A>& k) {
  for (std::int64_t r = 0; r < runs.count; ++r) {
    for (std::int64_t i = 0; i < runs.length; ++i) {
      const std::int64_t at = r * runs.stride + i;
      const double from_dy =
          (static_cast<double>(dy[at]) - static_cast<double>(k.dy_center)) * static_cast<double>(k.dy_scale);
      const double from_x =
          (static_cast<double>(x[at]) - static_cast<double>(k.x_center)) * static_cast<double>(k.x_scale);
      dx[at] = static_cast<T>(from_dy + from_x + static_cast<double>(k.offset));
    }
  }
}
template <class T>
void runs_grad_input(const T* dy, const T* x, T* dx, Runs runs, const GradAffine<Arithmetic<T>>* k) {
  for (std::int64_t c = 0; c < runs.channels; ++c) {
    const std::int64_t at = c * runs.length;
    runs_grad_input_one(dy + at, x + at, dx + at, one_channel(runs), k[c]);
  }
}

// A column of a block of rows is a channel whose runs have length 1.
Runs column(Rows rows) { return Runs{1, rows.count, rows.stride}; }

void put(const ColumnSums& out, std::int64_t c, const Sums& s) {
  out.first[c] = s.first;
  out.first_lo[c] = s.first_lo;
  out.second[c] = s.second;
  out.second_lo[c] = s.second_lo;
}

template <class T, bool kCompensated = kIsCompensated<T>>
void rows_moments(const T* x, Rows rows, const ColumnSums& out) {
  for (std::int64_t c = 0; c < rows.columns; ++c) {
    Sums s;
    runs_moments<T, kCompensated>(x + c, column(rows), &s);
    put(out, c, s);
  }
}
template <class T>
void rows_moments_about(const T* x, Rows rows, const Arithmetic<T>* shift, const ColumnSums& out) {
  for (std::int64_t c = 0; c < rows.columns; ++c) {
    Sums s;
    runs_moments_about(x + c, column(rows), shift[c], &s);
    put(out, c, s);
  }
}

template <class T>
void rows_normalize(const T* x, T* y, Rows rows, const AffineColumns<Arithmetic<T>>& k) {
  for (std::int64_t c = 0; c < rows.columns; ++c) {
    runs_normalize_one(x + c, y + c, column(rows), Affine<Arithmetic<T>>{k.center[c], k.scale[c], k.offset[c]});
  }
}
template <class T>
void rows_normalize_mixed(const T* x, T* y, Rows rows, const AffineColumns<float>& k,
                          const WideColumns<AffineColumns<double>>& wide) {
  const AffineColumns<double>& w = wide.coefficients;
  for (std::int64_t c = 0; c < rows.columns; ++c) {
    if ((wide.mask[c / 16] >> (c % 16)) & 1) {
      runs_normalize_one(x + c, y + c, column(rows), Affine<double>{w.center[c], w.scale[c], w.offset[c]});
    } else {
      runs_normalize_one(x + c, y + c, column(rows), Affine<float>{k.center[c], k.scale[c], k.offset[c]});
    }
  }
}

template <class T>
void rows_grad_sums(const T* dy, const T* x, Rows rows, const double* mean, const ColumnSums& out) {
  for (std::int64_t c = 0; c < rows.columns; ++c) {
    Sums s;
    runs_grad_sums_one(dy + c, x + c, column(rows), mean[c], &s);
    put(out, c, s);
  }
}

template <class A>
GradAffine<A> at(const GradAffineColumns<A>& k, std::int64_t c) {
  return {k.dy_center[c], k.dy_scale[c], k.x_center[c], k.x_scale[c], k.offset[c]};
}
template <class T>
void rows_grad_input(const T* dy, const T* x, T* dx, Rows rows, const GradAffineColumns<Arithmetic<T>>& k) {
  for (std::int64_t c = 0; c < rows.columns; ++c) runs_grad_input_one(dy + c, x + c, dx + c, column(rows), at(k, c));
}
template <class T>
void rows_grad_input_mixed(const T* dy, const T* x, T* dx, Rows rows, const GradAffineColumns<float>& k,
                           const WideColumns<GradAffineColumns<double>>& wide) {
  for (std::int64_t c = 0; c < rows.columns; ++c) {
    if ((wide.mask[c / 16] >> (c % 16)) & 1) {
      runs_grad_input_one(dy + c, x + c, dx + c, column(rows), at(wide.coefficients, c));
    } else {
      runs_grad_input_one(dy + c, x + c, dx + c, column(rows), at(k, c));
    }
  }
}

// second_grad: dx = (v - v_center)*v_scale + (dy - dy_center)*dy_scale + (x - x_center)*x_scale + offset.
template <class T>
void runs_second_grad_one(const T* v, const T* dy, const T* x, T* dx, Runs runs, const SecondAffine& k) {
  for (std::int64_t r = 0; r < runs.count; ++r) {
    for (std::int64_t i = 0; i < runs.length; ++i) {
      const std::int64_t at = r * runs.stride + i;
      const double from_v = (static_cast<double>(v[at]) - k.v_center) * k.v_scale;
      const double from_dy = (static_cast<double>(dy[at]) - k.dy_center) * k.dy_scale;
      const double from_x = (static_cast<double>(x[at]) - k.x_center) * k.x_scale;
      dx[at] = static_cast<T>(from_v + from_dy + from_x + k.offset);
    }
  }
}
template <class T>
void runs_second_grad(const T* v, const T* dy, const T* x, T* dx, Runs runs, const SecondAffine* k) {
  for (std::int64_t c = 0; c < runs.channels; ++c) {
    const std::int64_t at = c * runs.length;
    runs_second_grad_one(v + at, dy + at, x + at, dx + at, one_channel(runs), k[c]);
  }
}
template <class T>
void rows_second_grad(const T* v, const T* dy, const T* x, T* dx, Rows rows, const SecondAffineColumns& k) {
  for (std::int64_t c = 0; c < rows.columns; ++c) {
    const SecondAffine one{k.v_center[c], k.v_scale[c], k.dy_center[c], k.dy_scale[c],
                           k.x_center[c], k.x_scale[c], k.offset[c]};
    runs_second_grad_one(v + c, dy + c, x + c, dx + c, column(rows), one);
  }
}

// The low parts of blocks are left out for float, whose kernels need not write them.
template <class T>
void add_blocks(const ColumnSums& first, std::int64_t count, std::int64_t stride, std::int64_t columns,
                const ColumnSums& total) {
  for (std::int64_t c = 0; c < columns; ++c) {
    Sum of_first, of_second;  // in a row: to twice float64's digits the order is no matter
    for (std::int64_t at = c; at < c + count * stride; at += stride) {
      of_first.add(first.first[at], kIsCompensated<T> ? first.first_lo[at] : 0);
      of_second.add(first.second[at], kIsCompensated<T> ? first.second_lo[at] : 0);
    }
    put(total, c, sums_of<true>(of_first, of_second));
  }
}

template <class T>
constexpr Kernels<T> make_kernels() {
  Kernels<T> k{};
  k.runs_moments = runs_moments<T>;
  k.rows_moments = rows_moments<T>;
  k.runs_moments_about = runs_moments_about<T>;
  k.rows_moments_about = rows_moments_about<T>;
  k.runs_moments_compensated = runs_moments<T, true>;
  k.rows_moments_compensated = rows_moments<T, true>;
  k.runs_normalize = runs_normalize<T>;
  k.runs_normalize_wide = runs_normalize_one<T, double>;
  k.rows_normalize = rows_normalize<T>;
  k.runs_normalize_around_cache = runs_normalize<T>;
  k.rows_normalize_around_cache = rows_normalize<T>;
  k.runs_grad_sums = runs_grad_sums<T>;
  k.rows_grad_sums = rows_grad_sums<T>;
  k.runs_grad_input = runs_grad_input<T>;
  k.runs_grad_input_wide = runs_grad_input_one<T, double>;
  k.rows_grad_input = rows_grad_input<T>;
  k.runs_grad_input_around_cache = runs_grad_input<T>;
  k.rows_grad_input_around_cache = rows_grad_input<T>;
  k.add_blocks = add_blocks<T>;
  k.runs_second_grad = runs_second_grad<T>;
  k.rows_second_grad = rows_second_grad<T>;
  if constexpr (sizeof(T) < sizeof(double)) {
    k.rows_normalize_mixed = rows_normalize_mixed<T>;
    k.rows_grad_input_mixed = rows_grad_input_mixed<T>;
  }
  return k;
}

// ---- weights: the same with a weight per position; what has none is not looked at ----

template <class W>
double weight_of(const RunWeights<W>& w, std::int64_t run, std::int64_t i) {
  return static_cast<double>(w.values[run * w.stride + i]);
}

// sum(w*(x - shift)) and sum(w*(x - shift)^2).
template <class T, bool kCompensated = kIsCompensated<T>>
void runs_weighted_moments_about(const T* x, const RunWeights<WeightOf<T>>& weights, Runs runs, Arithmetic<T> shift,
                                 Sums* out) {
  Sum first, second;
  for (std::int64_t k = 0; k < runs.count; ++k) {
    for (std::int64_t i = 0; i < runs.length; ++i) {
      const double w = weight_of(weights, k, i);
      if (w == 0) continue;
      const Difference d(static_cast<double>(x[k * runs.stride + i]), static_cast<double>(shift));
      const double term = w * d.hi, term_lo = __builtin_fma(w, d.hi, -term) + w * d.lo;
      first.add(term, term_lo);
      second.add_product(term, d.hi, term_lo, d.lo);
    }
  }
  *out = sums_of<kCompensated>(first, second);
}
template <class W>
WeightCounts count_weights(const W* w, std::int64_t n) {
  WeightCounts counts{};
  Sum total;
  for (std::int64_t i = 0; i < n; ++i) {
    if (w[i] == 0) ++counts.zeros;
    if (w[i] == 1) ++counts.ones;
    if (w[i] >= 0 && w[i] - w[i] == 0) ++counts.good;  // infinity less infinity is NaN
    total.add(static_cast<double>(w[i]));
  }
  counts.total = total.hi();
  counts.total_lo = total.lo();
  return counts;
}

template <class T, bool kCompensated = kIsCompensated<T>>
void runs_weighted_moments(const T* x, const RunWeights<WeightOf<T>>& w, Runs runs, Sums* out) {
  for (std::int64_t c = 0; c < runs.channels; ++c) {
    runs_weighted_moments_about<T, kCompensated>(x + c * runs.length, w, one_channel(runs), Arithmetic<T>(0), out + c);
  }
}

template <class T>
T at_padding_of(AtPadding at_padding, T input, double formula) {
  if (at_padding == AtPadding::zero) return T{};
  return at_padding == AtPadding::input ? input : static_cast<T>(formula);
}

// y = (x - center)*scale + offset where there is a weight.
template <class T, class A>
void runs_weighted_normalize_one(const T* x, T* y, const RunWeights<WeightOf<T>>& w, AtPadding at_padding, Runs runs,
                                 const Affine<A>& k) {
  for (std::int64_t r = 0; r < runs.count; ++r) {
    for (std::int64_t i = 0; i < runs.length; ++i) {
      const std::int64_t at = r * runs.stride + i;
      if (weight_of(w, r, i) != 0 || at_padding == AtPadding::formula) {
        runs_normalize_one(x + at, y + at, Runs{1, 1, 1}, k);
      } else {
        y[at] = at_padding_of(at_padding, x[at], 0);
      }
    }
  }
}
template <class T>
void runs_weighted_normalize(const T* x, T* y, const RunWeights<WeightOf<T>>& w, AtPadding at_padding, Runs runs,
                             const Affine<Arithmetic<T>>* k) {
  for (std::int64_t c = 0; c < runs.channels; ++c) {
    const std::int64_t at = c * runs.length;
    runs_weighted_normalize_one(x + at, y + at, w, at_padding, one_channel(runs), k[c]);
  }
}

// sum(dy) and sum(dy*(x - mean)) where there is a weight.
template <class T>
void runs_weighted_grad_sums_one(const T* dy, const T* x, const RunWeights<WeightOf<T>>& w, Runs runs, double mean,
                                 Sums* out) {
  Sum first, second;
  for (std::int64_t k = 0; k < runs.count; ++k) {
    for (std::int64_t i = 0; i < runs.length; ++i) {
      if (weight_of(w, k, i) != 0) add_gradient(dy[k * runs.stride + i], x[k * runs.stride + i], mean, first, second);
    }
  }
  *out = sums_of<kIsCompensated<T>>(first, second);
}
template <class T>
void runs_weighted_grad_sums(const T* dy, const T* x, const RunWeights<WeightOf<T>>& w, Runs runs, const double* mean,
                             Sums* out) {
  for (std::int64_t c = 0; c < runs.channels; ++c) {
    const std::int64_t at = c * runs.length;
    runs_weighted_grad_sums_one(dy + at, x + at, w, one_channel(runs), mean[c], out + c);
  }
}

// dx = (dy - w*dy_center)*dy_scale + w*((x - x_center)*x_scale) + w*offset.
template <class T, class A>
void runs_weighted_grad_input_one(const T* dy, const T* x, T* dx, const RunWeights<WeightOf<T>>& weights,
                                  AtPadding at_padding, Runs runs, const GradAffine<A>& k) {
  for (std::int64_t r = 0; r < runs.count; ++r) {
    for (std::int64_t i = 0; i < runs.length; ++i) {
      const std::int64_t at = r * runs.stride + i;
      const double w = weight_of(weights, r, i), g = static_cast<double>(dy[at]);
      if (w == 0) {
        dx[at] = at_padding_of(at_padding, dy[at], g * static_cast<double>(k.dy_scale));
        continue;
      }
      const double from_dy = (g - w * static_cast<double>(k.dy_center)) * static_cast<double>(k.dy_scale);
      const double from_x =
          (static_cast<double>(x[at]) - static_cast<double>(k.x_center)) * static_cast<double>(k.x_scale);
      dx[at] = static_cast<T>(from_dy + w * from_x + w * static_cast<double>(k.offset));
    }
  }
}
template <class T>
void runs_weighted_grad_input(const T* dy, const T* x, T* dx, const RunWeights<WeightOf<T>>& w, AtPadding at_padding,
                              Runs runs, const GradAffine<Arithmetic<T>>* k) {
  for (std::int64_t c = 0; c < runs.channels; ++c) {
    const std::int64_t at = c * runs.length;
    runs_weighted_grad_input_one(dy + at, x + at, dx + at, w, at_padding, one_channel(runs), k[c]);
  }
}

// The weights of column c of a block of rows.
template <class W>
RunWeights<W> column(const RowWeights<W>& w, std::int64_t c) {
  const std::int64_t e = w.first_column + c;
  return {w.values + e / (w.channels * w.inner) * w.inner + e % w.inner, w.repeat * w.inner};
}
template <class T, bool kCompensated = kIsCompensated<T>>
void rows_weighted_moments(const T* x, const RowWeights<WeightOf<T>>& w, Rows rows, const ColumnSums& out) {
  for (std::int64_t c = 0; c < rows.columns; ++c) {
    Sums s;
    runs_weighted_moments<T, kCompensated>(x + c, column(w, c), column(rows), &s);
    put(out, c, s);
  }
}
template <class T>
void rows_weighted_moments_about(const T* x, const RowWeights<WeightOf<T>>& w, Rows rows, const Arithmetic<T>* shift,
                                 const ColumnSums& out) {
  for (std::int64_t c = 0; c < rows.columns; ++c) {
    Sums s;
    runs_weighted_moments_about(x + c, column(w, c), column(rows), shift[c], &s);
    put(out, c, s);
  }
}
template <class T>
void rows_weighted_normalize(const T* x, T* y, const RowWeights<WeightOf<T>>& w, AtPadding at_padding, Rows rows,
                             const AffineColumns<Arithmetic<T>>& k) {
  for (std::int64_t c = 0; c < rows.columns; ++c) {
    const Affine<Arithmetic<T>> one{k.center[c], k.scale[c], k.offset[c]};
    runs_weighted_normalize_one(x + c, y + c, column(w, c), at_padding, column(rows), one);
  }
}
template <class T>
void rows_weighted_normalize_mixed(const T* x, T* y, const RowWeights<float>& w, AtPadding at_padding, Rows rows,
                                   const AffineColumns<float>& k, const WideColumns<AffineColumns<double>>& wide) {
  const AffineColumns<double>& exact = wide.coefficients;
  for (std::int64_t c = 0; c < rows.columns; ++c) {
    if ((wide.mask[c / 16] >> (c % 16)) & 1) {
      const Affine<double> one{exact.center[c], exact.scale[c], exact.offset[c]};
      runs_weighted_normalize_one(x + c, y + c, column(w, c), at_padding, column(rows), one);
    } else {
      const Affine<float> one{k.center[c], k.scale[c], k.offset[c]};
      runs_weighted_normalize_one(x + c, y + c, column(w, c), at_padding, column(rows), one);
    }
  }
}
template <class T>
void rows_weighted_grad_sums(const T* dy, const T* x, const RowWeights<WeightOf<T>>& w, Rows rows, const double* mean,
                             const ColumnSums& out) {
  for (std::int64_t c = 0; c < rows.columns; ++c) {
    Sums s;
    runs_weighted_grad_sums_one(dy + c, x + c, column(w, c), column(rows), mean[c], &s);
    put(out, c, s);
  }
}
template <class T>
void rows_weighted_grad_input(const T* dy, const T* x, T* dx, const RowWeights<WeightOf<T>>& w, AtPadding at_padding,
                              Rows rows, const GradAffineColumns<Arithmetic<T>>& k) {
  for (std::int64_t c = 0; c < rows.columns; ++c) {
    runs_weighted_grad_input_one(dy + c, x + c, dx + c, column(w, c), at_padding, column(rows), at(k, c));
  }
}
template <class T>
void rows_weighted_grad_input_mixed(const T* dy, const T* x, T* dx, const RowWeights<float>& w, AtPadding at_padding,
                                    Rows rows, const GradAffineColumns<float>& k,
                                    const WideColumns<GradAffineColumns<double>>& wide) {
  for (std::int64_t c = 0; c < rows.columns; ++c) {
    if ((wide.mask[c / 16] >> (c % 16)) & 1) {
      runs_weighted_grad_input_one(dy + c, x + c, dx + c, column(w, c), at_padding, column(rows),
                                   at(wide.coefficients, c));
    } else {
      runs_weighted_grad_input_one(dy + c, x + c, dx + c, column(w, c), at_padding, column(rows), at(k, c));
    }
  }
}

template <class T>
constexpr WeightedKernels<T> make_weighted_kernels() {
  WeightedKernels<T> k{};
  k.weighted = {runs_weighted_moments<T>,       rows_weighted_moments<T>,       runs_weighted_moments_about<T>,
                rows_weighted_moments_about<T>, runs_weighted_moments<T, true>, rows_weighted_moments<T, true>};
  k.masked = k.weighted;
  k.count = count_weights<WeightOf<T>>;
  k.runs_normalize = k.runs_normalize_around_cache = runs_weighted_normalize<T>;
  k.runs_normalize_wide = runs_weighted_normalize_one<T, double>;
  k.rows_normalize = k.rows_normalize_around_cache = rows_weighted_normalize<T>;
  k.runs_grad_sums = runs_weighted_grad_sums<T>;
  k.rows_grad_sums = rows_weighted_grad_sums<T>;
  k.runs_grad_input = k.runs_grad_input_around_cache = runs_weighted_grad_input<T>;
  k.runs_grad_input_wide = runs_weighted_grad_input_one<T, double>;
  k.rows_grad_input = k.rows_grad_input_around_cache = rows_weighted_grad_input<T>;
  if constexpr (sizeof(T) < sizeof(double)) {
    k.rows_normalize_mixed = rows_weighted_normalize_mixed<T>;
    k.rows_grad_input_mixed = rows_weighted_grad_input_mixed<T>;
  }
  return k;
}

// ---- ReLU: normalize, a residual added, and what is at or below 0 made 0; backward through the mask ----

bool bit_of(const std::uint8_t* mask, std::int64_t at) { return ((mask[at / 8] >> (at % 8)) & 1) != 0; }
// Other threads may set other bits of the byte.
void set_bit(std::uint8_t* mask, std::int64_t at, bool value) {
  const auto bit = static_cast<std::uint8_t>(1u << (at % 8));
  if (value) {
    __atomic_fetch_or(mask + at / 8, bit, __ATOMIC_RELAXED);
  } else {
    __atomic_fetch_and(mask + at / 8, static_cast<std::uint8_t>(~bit), __ATOMIC_RELAXED);
  }
}

template <class T, class A>
void runs_relu_one(const T* x, T* y, const ReluTail<T>& tail, Runs runs, const Affine<A>& k) {
  for (std::int64_t r = 0; r < runs.count; ++r) {
    for (std::int64_t i = 0; i < runs.length; ++i) {
      const std::int64_t at = r * runs.stride + i;
      const double exact = (static_cast<double>(x[at]) - static_cast<double>(k.center)) * static_cast<double>(k.scale) +
                           static_cast<double>(k.offset);
      auto sum = static_cast<Arithmetic<T>>(exact);
      if (tail.residual != nullptr) sum += static_cast<Arithmetic<T>>(tail.residual[tail.at + at]);
      if (tail.mask != nullptr) set_bit(tail.mask, tail.first_bit + tail.at + at, !(sum <= 0));
      y[at] = sum < 0 ? static_cast<T>(0) : static_cast<T>(sum);
    }
  }
}
template <class T>
ReluTail<T> from(const ReluTail<T>& tail, std::int64_t n) {
  return {tail.residual, tail.mask, tail.first_bit, tail.at + n};
}
template <class T>
void runs_relu(const T* x, T* y, const ReluTail<T>& tail, Runs runs, const Affine<Arithmetic<T>>* k) {
  for (std::int64_t c = 0; c < runs.channels; ++c) {
    const std::int64_t at = c * runs.length;
    runs_relu_one(x + at, y + at, from(tail, at), one_channel(runs), k[c]);
  }
}
template <class T>
void rows_relu(const T* x, T* y, const ReluTail<T>& tail, Rows rows, const AffineColumns<Arithmetic<T>>& k) {
  for (std::int64_t c = 0; c < rows.columns; ++c) {
    const Affine<Arithmetic<T>> one{k.center[c], k.scale[c], k.offset[c]};
    runs_relu_one(x + c, y + c, from(tail, c), column(rows), one);
  }
}
template <class T>
void rows_relu_mixed(const T* x, T* y, const ReluTail<T>& tail, Rows rows, const AffineColumns<float>& k,
                     const WideColumns<AffineColumns<double>>& wide) {
  const AffineColumns<double>& w = wide.coefficients;
  for (std::int64_t c = 0; c < rows.columns; ++c) {
    if ((wide.mask[c / 16] >> (c % 16)) & 1) {
      const Affine<double> one{w.center[c], w.scale[c], w.offset[c]};
      runs_relu_one(x + c, y + c, from(tail, c), column(rows), one);
    } else {
      const Affine<float> one{k.center[c], k.scale[c], k.offset[c]};
      runs_relu_one(x + c, y + c, from(tail, c), column(rows), one);
    }
  }
}

template <class T>
T dresidual_at(const ReluInputs<T>& in, std::int64_t at) {
  return bit_of(in.mask, in.first_bit + in.at + at) ? in.dy[in.at + at] : static_cast<T>(0);
}
template <class T>
void runs_relu_grad_sums_one(const ReluInputs<T>& in, Runs runs, double mean, Sums* out) {
  Sum first, second;
  for (std::int64_t k = 0; k < runs.count; ++k) {
    for (std::int64_t i = 0; i < runs.length; ++i) {
      const std::int64_t at = k * runs.stride + i;
      add_gradient(dresidual_at(in, at), in.x[in.at + at], mean, first, second);
    }
  }
  *out = sums_of<kIsCompensated<T>>(first, second);
}
template <class T, class A>
void runs_relu_grad_input_one(const ReluInputs<T>& in, T* dx, Runs runs, const GradAffine<A>& k) {
  for (std::int64_t r = 0; r < runs.count; ++r) {
    for (std::int64_t i = 0; i < runs.length; ++i) {
      const std::int64_t at = r * runs.stride + i;
      const T dy = dresidual_at(in, at);
      double d = (static_cast<double>(dy) - static_cast<double>(k.dy_center)) * static_cast<double>(k.dy_scale);
      if (in.x != nullptr) {
        d += (static_cast<double>(in.x[in.at + at]) - static_cast<double>(k.x_center)) * static_cast<double>(k.x_scale);
      }
      if (in.dresidual != nullptr) in.dresidual[in.at + at] = dy;
      dx[at] = static_cast<T>(d + static_cast<double>(k.offset));
    }
  }
}
template <class T>
ReluInputs<T> from(ReluInputs<T> in, std::int64_t n) {
  in.at += n;
  return in;
}
template <class T>
void runs_relu_grad_sums(const ReluInputs<T>& in, Runs runs, const double* mean, Sums* out) {
  for (std::int64_t c = 0; c < runs.channels; ++c) {
    runs_relu_grad_sums_one(from(in, c * runs.length), one_channel(runs), mean[c], out + c);
  }
}
template <class T>
void rows_relu_grad_sums(const ReluInputs<T>& in, Rows rows, const double* mean, const ColumnSums& out) {
  for (std::int64_t c = 0; c < rows.columns; ++c) {
    Sums s;
    runs_relu_grad_sums_one(from(in, c), column(rows), mean[c], &s);
    put(out, c, s);
  }
}
template <class T>
void runs_relu_grad_input(const ReluInputs<T>& in, T* dx, Runs runs, const GradAffine<Arithmetic<T>>* k) {
  for (std::int64_t c = 0; c < runs.channels; ++c) {
    runs_relu_grad_input_one(from(in, c * runs.length), dx + c * runs.length, one_channel(runs), k[c]);
  }
}
template <class T>
void rows_relu_grad_input(const ReluInputs<T>& in, T* dx, Rows rows, const GradAffineColumns<Arithmetic<T>>& k) {
  for (std::int64_t c = 0; c < rows.columns; ++c) {
    runs_relu_grad_input_one(from(in, c), dx + c, column(rows), at(k, c));
  }
}
template <class T>
void rows_relu_grad_input_mixed(const ReluInputs<T>& in, T* dx, Rows rows, const GradAffineColumns<float>& k,
                                const WideColumns<GradAffineColumns<double>>& wide) {
  for (std::int64_t c = 0; c < rows.columns; ++c) {
    if ((wide.mask[c / 16] >> (c % 16)) & 1) {
      runs_relu_grad_input_one(from(in, c), dx + c, column(rows), at(wide.coefficients, c));
    } else {
      runs_relu_grad_input_one(from(in, c), dx + c, column(rows), at(k, c));
    }
  }
}

template <class T>
constexpr ReluKernels<T> make_relu_kernels() {
  ReluKernels<T> k{};
  k.runs_normalize = k.runs_normalize_around_cache = runs_relu<T>;
  k.runs_normalize_wide = runs_relu_one<T, double>;
  k.rows_normalize = k.rows_normalize_in_line = k.rows_normalize_around_cache = rows_relu<T>;
  k.runs_grad_sums = runs_relu_grad_sums<T>;
  k.rows_grad_sums = rows_relu_grad_sums<T>;
  k.runs_grad_input = k.runs_grad_input_around_cache = runs_relu_grad_input<T>;
  k.runs_grad_input_wide = runs_relu_grad_input_one<T, double>;
  k.rows_grad_input = k.rows_grad_input_around_cache = rows_relu_grad_input<T>;
  if constexpr (sizeof(T) < sizeof(double)) {
    k.rows_normalize_mixed = rows_relu_mixed<T>;
    k.rows_grad_input_mixed = rows_relu_grad_input_mixed<T>;
  }
  return k;
}

template <class T>
constexpr KernelsOf<T> make_all() {
  return {make_kernels<T>(), make_weighted_kernels<T>(), make_relu_kernels<T>()};
}

}  // namespace

const KernelTable reference_table = {make_all<float>(), make_all<double>(), make_all<Float16>(), make_all<BFloat16>()};

}  // namespace batchnorm::kernels
