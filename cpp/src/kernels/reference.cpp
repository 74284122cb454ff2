// The definition: every pass as plain float64 loops, in the order a person would write them.
//
// This is what the vector kernels are held to. It is not one of them: it sums one value after the other, so its last
// bits differ. BATCHNORM_ISA=reference runs the library on it.
#include "kernels/table.hpp"

namespace batchnorm::kernels {
namespace {

// ---- pieces ----

// f(channel, place of the value) for all values, those of a channel in the order in which they are summed. A column is
// a channel.
template <class F>
void for_each(const Runs& runs, F f) {
  for (std::int64_t k = 0; k < runs.count; ++k) {
    for (std::int64_t c = 0; c < runs.channels; ++c) {
      for (std::int64_t i = 0; i < runs.length; ++i) f(c, k * runs.stride + c * runs.length + i);
    }
  }
}
template <class F>
void for_each(const Rows& rows, F f) {
  for (std::int64_t r = 0; r < rows.count; ++r) {
    for (std::int64_t c = 0; c < rows.columns; ++c) f(c, r * rows.stride + c);
  }
}
std::int64_t channels_of(const Runs& runs) { return runs.channels; }
std::int64_t channels_of(const Rows& rows) { return rows.columns; }
bool continues(const Runs&) { return false; }
bool continues(const Rows& rows) { return rows.continues; }

// ---- sums ----

// A sum in place, to about twice float64's digits.
struct Sum {
  double &hi, &lo;

  // term + low, with what the addition rounds off (Knuth 1969, TwoSum).
  void add(double term, double low = 0) const {
    const double sum = hi + term, part = sum - hi;
    lo += ((hi - (sum - part)) + (term - part)) + low;
    hi = sum;
  }
  // a*b, of which `a_lo` and `b_lo` are what a and b have lost.
  void add_product(double a, double b, double a_lo, double b_lo) const {
    const double product = a * b;
    add(product, __builtin_fma(a, b, -product) + (a * b_lo + a_lo * b));
  }
  // Infinity has no error, and plain sums have low parts of 0.
  void finish(bool keeps_low) const {
    if (!keeps_low || hi - hi != 0) lo = 0;
  }
};

// x - y, and what that rounds off.
struct Difference {
  double hi, lo;
  Difference(double x, double y) : hi(x - y) {
    const double part = hi - x;
    lo = (x - (hi - part)) - (y + part);
  }
};

// The two sums of a channel.
struct SumPair {
  Sum first, second;
};
SumPair at(Sums* s, std::int64_t c) { return {{s[c].first, s[c].first_lo}, {s[c].second, s[c].second_lo}}; }
SumPair at(const ColumnSums& s, std::int64_t c) { return {{s.first[c], s.first_lo[c]}, {s.second[c], s.second_lo[c]}}; }

// add(sums of the channel, channel, place) for all values. Sums of double alone keep their low parts.
template <class T, class Piece, class Out, class Add>
void sum(const Piece& piece, const Out& out, Add add) {
  for (std::int64_t c = 0; c < channels_of(piece) && !continues(piece); ++c) {
    const auto [first, second] = at(out, c);
    first.hi = first.lo = second.hi = second.lo = 0;
  }
  for_each(piece, [&](std::int64_t c, std::int64_t place) { add(at(out, c), c, place); });
  for (std::int64_t c = 0; c < channels_of(piece); ++c) {
    const auto [first, second] = at(out, c);
    first.finish(sizeof(T) == sizeof(double));
    second.finish(sizeof(T) == sizeof(double));
  }
}

// The weight of the value at `place`, in stretch k and at i of its run, or in row k.
template <class W>
double weight_at(const WeightsOf<W>& weights, const Runs& runs, std::int64_t place) {
  if (weights.values == nullptr) return 1;
  const std::int64_t k = runs.count == 1 ? 0 : place / runs.stride;
  return weights.values[k * runs.length + (place - k * runs.stride) % runs.length];
}
template <class W>
double weight_at(const WeightsOf<W>& weights, const Rows& rows, std::int64_t place) {
  if (weights.values == nullptr) return 1;
  const std::int64_t r = rows.count == 1 ? 0 : place / rows.stride;
  return weights.values[weights.stride == 0 ? r : r * weights.stride + (place - r * rows.stride)];
}

// moments: sum(w*(x - shift)) and sum(w*(x - shift)*(x - shift)).
template <class T, class Piece, class Out>
void moments(const T* x, const WeightsOf<WeightOf<T>>& weights, Piece piece, const Arithmetic<T>* shift, Out out) {
  sum<T>(piece, out, [&](const SumPair& sums, std::int64_t c, std::int64_t place) {
    const double w = weight_at(weights, piece, place);
    if (w == 0) return;
    const Difference d(x[place], shift == nullptr ? 0 : shift[c]);
    const double term = w * d.hi, term_lo = __builtin_fma(w, d.hi, -term) + w * d.lo;
    sums.first.add(term, term_lo);
    sums.second.add_product(term, d.hi, term_lo, d.lo);
  });
}

bool bit_of(const std::uint8_t* bits, std::int64_t at) { return ((bits[at / 8] >> (at % 8)) & 1) != 0; }

// dy as the ReLU lets it through.
template <class T>
T dy_at(const GradInputs<T>& in, std::int64_t place) {
  if (in.bits != nullptr && !bit_of(in.bits, in.first_bit + place)) return static_cast<T>(0);
  return in.dy[place];
}

// grad_sums: sum(dy) and sum(dy*(x - mean)).
template <class T, class Piece, class Out>
void grad_sums(const GradInputs<T>& in, const WeightsOf<WeightOf<T>>& weights, Piece piece, const double* mean,
               Out out) {
  sum<T>(piece, out, [&](const SumPair& sums, std::int64_t c, std::int64_t place) {
    if (in.bits == nullptr && weight_at(weights, piece, place) == 0) return;
    const double dy = dy_at(in, in.at + place);
    const Difference d(in.x[in.at + place], mean[c]);
    sums.first.add(dy);
    sums.second.add_product(dy, d.hi, 0, d.lo);
  });
}

// The low parts of blocks are left out for float, whose kernels need not write them.
template <class T>
void add_blocks(const ColumnSums& first, std::int64_t count, std::int64_t stride, std::int64_t columns,
                const ColumnSums& total) {
  constexpr bool kHasLow = sizeof(T) == sizeof(double);
  const Rows blocks{count, columns, stride};
  sum<double>(blocks, total, [&](const SumPair& sums, std::int64_t, std::int64_t place) {
    sums.first.add(first.first[place], kHasLow ? first.first_lo[place] : 0);
    sums.second.add(first.second[place], kHasLow ? first.second_lo[place] : 0);
  });
}

// ---- elements ----

// The weight of the value at `place`.
template <class W>
double weight_along(const W* weights, const Runs& runs, std::int64_t place) {
  return weights == nullptr ? 1 : weights[place % runs.length];
}
template <class W>
double weight_along(const W* weights, const Rows&, std::int64_t place) {
  return weights == nullptr ? 1 : weights[place];
}

// Coefficients of a channel, in float64.
template <class A>
Affine<double> at(const Affine<A>* k, std::int64_t c) {
  return {k[c].center, k[c].scale, k[c].offset};
}
template <class A>
Affine<double> at(const AffineColumns<A>& k, std::int64_t c) {
  return {k.center[c], k.scale[c], k.offset[c]};
}
template <class A>
GradAffine<double> at(const GradAffine<A>* k, std::int64_t c) {
  return {k[c].dy_center, k[c].dy_scale, k[c].x_center, k[c].x_scale, k[c].offset};
}
template <class A>
GradAffine<double> at(const GradAffineColumns<A>& k, std::int64_t c) {
  return {k.dy_center[c], k.dy_scale[c], k.x_center[c], k.x_scale[c], k.offset[c]};
}
SecondAffine at(const SecondAffine* k, std::int64_t c) { return k[c]; }
SecondAffine at(const SecondAffineColumns& k, std::int64_t c) {
  return {k.v_center[c], k.v_scale[c], k.dy_center[c], k.dy_scale[c], k.x_center[c], k.x_scale[c], k.offset[c]};
}

// Other threads may set other bits of the byte.
void set_bit(std::uint8_t* bits, std::int64_t at, bool value) {
  const auto bit = static_cast<std::uint8_t>(1u << (at % 8));
  if (value) {
    __atomic_fetch_or(bits + at / 8, bit, __ATOMIC_RELAXED);
  } else {
    __atomic_fetch_and(bits + at / 8, static_cast<std::uint8_t>(~bit), __ATOMIC_RELAXED);
  }
}

// normalize: y = (x - center)*scale + offset, and the tail.
template <class T, class Piece, class Coefficients>
void normalize(const T* x, T* y, const Tail<T>& tail, Piece piece, Coefficients coefficients) {
  for_each(piece, [&](std::int64_t c, std::int64_t place) {
    const Affine<double> k = at(coefficients, c);
    auto sum = static_cast<Arithmetic<T>>((x[place] - k.center) * k.scale + k.offset);
    if (tail.residual != nullptr) sum += static_cast<Arithmetic<T>>(tail.residual[tail.at + place]);
    if (tail.bits != nullptr) set_bit(tail.bits, tail.first_bit + tail.at + place, !(sum <= 0));
    const bool is_zero = (tail.relu && sum < 0) || weight_along(tail.weights, piece, place) == 0;
    y[place] = is_zero ? static_cast<T>(0) : static_cast<T>(sum);
  });
}

// grad_input: dx = (dy - w*dy_center)*dy_scale + w*((x - x_center)*x_scale) + w*offset.
template <class T, class Piece, class Coefficients>
void grad_input(const GradInputs<T>& in, const WeightsAlong<WeightOf<T>>& weights, T* dx, Piece piece,
                Coefficients coefficients) {
  for_each(piece, [&](std::int64_t c, std::int64_t place) {
    const GradAffine<double> k = at(coefficients, c);
    const double w = weight_along(weights.values, piece, place);
    const T dy = dy_at(in, in.at + place);
    double sum = (dy - w * k.dy_center) * k.dy_scale;
    if (in.x != nullptr && w != 0) sum += w * ((in.x[in.at + place] - k.x_center) * k.x_scale);
    if (in.dresidual != nullptr) in.dresidual[in.at + place] = dy;
    dx[place] = weights.zeros && w == 0 ? static_cast<T>(0) : static_cast<T>(sum + w * k.offset);
  });
}

// second_grad: dx = (v - v_center)*v_scale + (dy - dy_center)*dy_scale + (x - x_center)*x_scale + offset.
template <class Piece, class Coefficients>
void second_grad(const double* v, const double* dy, const double* x, double* dx, Piece piece,
                 Coefficients coefficients) {
  for_each(piece, [&](std::int64_t c, std::int64_t place) {
    const SecondAffine k = at(coefficients, c);
    dx[place] = (v[place] - k.v_center) * k.v_scale + (dy[place] - k.dy_center) * k.dy_scale +
                (x[place] - k.x_center) * k.x_scale + k.offset;
  });
}

// ---- lines ----

// f(line, place along it, place in memory) for all values.
template <class F>
void for_each(const Lines& lines, F f) {
  for (std::int64_t l = 0; l < lines.count; ++l) {
    for (std::int64_t i = 0; i < lines.length; ++i) f(l, i, l * lines.stride + i);
  }
}

// (hi + lo) times b, added to, rounded at the end alone: of double tensors.
struct Exactly {
  double hi, lo = 0;

  explicit Exactly(double a) : hi(a) {}
  Exactly(double a, double b, double b_lo) {
    const Difference d(a, b);
    hi = d.hi, lo = d.lo - b_lo;
  }
  [[nodiscard]] Exactly times(double b, double b_lo = 0) const {
    Exactly r(hi * b);
    r.lo = __builtin_fma(hi, b, -r.hi) + (lo * b + hi * b_lo);
    return r;
  }
  [[nodiscard]] Exactly plus(const Exactly& b) const {
    Exactly r(hi);
    r.lo = lo;
    Sum{r.hi, r.lo}.add(b.hi, b.lo);
    return r;
  }
  [[nodiscard]] double rounded() const { return lo - lo == 0 ? hi + lo : hi; }
};
// x - mean of a line; low parts are those of double tensors.
template <class T>
Exactly centered(T x, const LineStatistics& s, std::int64_t l) {
  return {x, s.mean[l], sizeof(T) == sizeof(double) ? s.mean_lo[l] : 0};
}
template <class T>
double rstd_lo(const LineStatistics& s, std::int64_t l) {
  return sizeof(T) == sizeof(double) ? s.rstd_lo[l] : 0;
}

template <class T>
void lines_normalize(const T* x, T* y, const Lines& lines, const LineScale<T>& s, const T* gamma, const T* beta) {
  for_each(lines, [&](std::int64_t l, std::int64_t i, std::int64_t at) {
    if constexpr (sizeof(T) == sizeof(double)) {
      Exactly d(x[at], s.center[l], s.rest[l]);
      y[at] = d.times(s.rstd[l], s.rstd_lo[l]).times(gamma[i]).plus(Exactly(beta[i])).rounded();
    } else {
      const T d = x[at] - s.center[l];
      const T xhat = __builtin_fmaf(d, s.rstd[l], __builtin_fmaf(d, s.rstd_lo[l], s.rest[l]));
      y[at] = __builtin_fmaf(xhat, gamma[i], beta[i]);
    }
  });
}
template <class T>
void lines_grad_sums(const T* dy, const T* x, const Lines& lines, const LineStatistics& s, const double* gamma,
                     Sums* out) {
  for (std::int64_t l = 0; l < lines.count; ++l) out[l] = {};
  for_each(lines, [&](std::int64_t l, std::int64_t i, std::int64_t at) {
    const SumPair sums = kernels::at(out, l);
    const double h = gamma[i] * dy[at];
    const Difference d(x[at], s.mean[l]);
    sums.first.add(h);
    sums.second.add_product(h, d.hi, 0, d.lo);
  });
  for (std::int64_t l = 0; l < lines.count; ++l) {
    const auto [first, second] = kernels::at(out, l);
    first.finish(sizeof(T) == sizeof(double));
    second.finish(sizeof(T) == sizeof(double));
  }
}
template <class T>
void lines_grad_input(const T* dy, const T* x, T* dx, const Lines& lines, const LineStatistics& s,
                      const LineTermsOf& terms, const double* gamma, const ColumnSums& out) {
  constexpr bool kHasLow = sizeof(T) == sizeof(double);  // else the low parts of `out` are no one's
  for (std::int64_t i = 0; i < lines.length; ++i) {
    double first = 0, first_lo = 0, second = 0, second_lo = 0;
    if (lines.continues) first = out.first[i], second = out.second[i];
    if (lines.continues && kHasLow) first_lo = out.first_lo[i], second_lo = out.second_lo[i];
    const SumPair sums{{first, first_lo}, {second, second_lo}};
    for (std::int64_t l = 0; l < lines.count; ++l) {
      const std::int64_t at = l * lines.stride + i;
      const Exactly xmu = centered(x[at], s, l), xhat = xmu.times(s.rstd[l], rstd_lo<T>(s, l));
      const Exactly factor = Exactly(gamma[i]).times(s.rstd[l], rstd_lo<T>(s, l));
      sums.first.add(dy[at]);
      sums.second.add_product(dy[at], xhat.hi, 0, xhat.lo);
      const Exactly all = factor.times(dy[at]).plus(xmu.times(terms.x_scale[l])).plus(Exactly(terms.shift[l]));
      if (dx != nullptr) dx[at] = static_cast<T>(all.rounded());
    }
    sums.first.finish(kHasLow), sums.second.finish(kHasLow);
    out.first[i] = first, out.second[i] = second;
    if (kHasLow) out.first_lo[i] = first_lo, out.second_lo[i] = second_lo;
  }
}

// ---- steps on tiles ----

template <class From, class To>
void convert(const From* from, std::int64_t n, To* to) {
  for (std::int64_t i = 0; i < n; ++i) to[i] = static_cast<To>(from[i]);
}
template <class T>
void put_counted(const T* tile, const T* weights, const T* input, std::int64_t n, std::int64_t times, bool, T* to) {
  for (std::int64_t e = 0; e < n * times; ++e) {
    to[e] = weights[e % n] != 0 ? tile[e] : input == nullptr ? 0 : input[e];
  }
}
template <class T>
void keep_bits(const T* from, const std::uint8_t* bits, std::int64_t first_bit, std::int64_t n, T* to) {
  for (std::int64_t i = 0; i < n; ++i) to[i] = bit_of(bits, first_bit + i) ? from[i] : 0;
}
template <class W>
void repeat_weights(const W* weights, std::int64_t rows, std::int64_t channels, std::int64_t inner, W* to) {
  for (std::int64_t e = 0; e < rows * channels * inner; ++e) {
    to[e] = weights[e / (channels * inner) * inner + e % inner];
  }
}
template <class W>
WeightCounts count_weights(const W* w, std::int64_t n) {
  WeightCounts counts;
  const Sum total{counts.total, counts.total_lo};
  for (std::int64_t i = 0; i < n; ++i) {
    if (w[i] == 0) ++counts.zeros;
    if (w[i] == 1) ++counts.ones;
    if (w[i] >= 0 && w[i] - w[i] == 0) ++counts.good;  // infinity less infinity is NaN
    if (w[i] > 0 && w[i] < counts.least) counts.least = w[i];
    total.add(w[i]);
  }
  total.finish(true);
  return counts;
}

// What a type does not have is null.
template <class T>
constexpr Kernels<T> make_kernels() {
  using A = Arithmetic<T>;
  Kernels<T> k{};
  k.runs_moments = moments<T, Runs, Sums*>;
  k.rows_moments = moments<T, Rows, const ColumnSums&>;
  k.runs_normalize = normalize<T, Runs, const Affine<A>*>;
  k.rows_normalize = normalize<T, Rows, const AffineColumns<A>&>;
  k.runs_grad_sums = grad_sums<T, Runs, Sums*>;
  k.rows_grad_sums = grad_sums<T, Rows, const ColumnSums&>;
  k.runs_grad_input = grad_input<T, Runs, const GradAffine<A>*>;
  k.rows_grad_input = grad_input<T, Rows, const GradAffineColumns<A>&>;
  k.add_blocks = add_blocks<T>;
  if constexpr (std::is_same_v<T, A>) {
    k.lines_normalize = lines_normalize<T>;
    k.lines_grad_sums = lines_grad_sums<T>;
    k.lines_grad_input = lines_grad_input<T>;
    k.keep_bits = keep_bits<T>;
    k.put_counted = put_counted<T>;
    k.repeat_weights = repeat_weights<T>;
    k.count_weights = count_weights<T>;
  } else {
    k.widen = convert<T, A>;
    k.narrow = convert<A, T>;
  }
  if constexpr (std::is_same_v<T, double>) {
    k.runs_second_grad = second_grad<Runs, const SecondAffine*>;
    k.rows_second_grad = second_grad<Rows, const SecondAffineColumns&>;
  }
  return k;
}

// Nothing is as usual here: all channels are done one by one.
constexpr Formulas kFormulas{
    [](const ColumnSums&, std::int64_t, double, Moments*) { return false; },
    [](const Moments*, std::int64_t, double, const double*, const double*, const AffineOut&) { return false; },
    [](const Moments*, const ColumnSums&, std::int64_t, double, const double*, const GradAffineOut&, double*, double*) {
      return false;
    }};

}  // namespace

const KernelTable reference_table = {make_kernels<float>(), make_kernels<double>(), make_kernels<Float16>(),
                                     make_kernels<BFloat16>(), kFormulas};

}  // namespace batchnorm::kernels
