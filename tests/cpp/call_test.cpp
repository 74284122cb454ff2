// Every combination of what a Call can say: against its definition in plain loops, and against itself in other ways.
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <span>
#include <string>
#include <type_traits>
#include <vector>

#include "all_passes.hpp"
#include "batchnorm/batchnorm.hpp"
#include "data.hpp"
#include "expect.hpp"

namespace {

using namespace batchnorm;
using all_passes::Kind;

template <class T>
using WeightOf = typename detail::WeightType<T>::type;
// What the definition is computed in: the library's own sums are of float64, and compensated for double.
template <class T>
using Real = std::conditional_t<sizeof(T) == sizeof(double), long double, double>;

// ---- what a call can say ---------------------------------------------------------------------------------------

enum class Counting { none, mask, weights };
enum class Statistics { batch, segments, groups, given, lines, lines_about_zero, batch_about_zero, graphs };
struct Combination {
  Counting counting;
  Padding padding;
  bool residual, relu;
  Statistics statistics;
};

std::vector<Combination> combinations() {
  std::vector<Combination> list;
  for (const Counting counting : {Counting::none, Counting::mask, Counting::weights}) {
    for (const Padding padding : {Padding::zero, Padding::keep, Padding::normalize}) {
      for (const bool residual : {false, true}) {
        for (const bool relu : {false, true}) {
          for (const Statistics statistics :
               {Statistics::batch, Statistics::segments, Statistics::groups, Statistics::given, Statistics::lines,
                Statistics::lines_about_zero, Statistics::batch_about_zero, Statistics::graphs}) {
            const bool is_refused = statistics == Statistics::given && counting != Counting::none;
            if (is_refused && padding == Padding::normalize) continue;
            list.push_back({counting, padding, residual, relu, statistics});
          }
        }
      }
    }
  }
  return list;
}

std::string text(const Combination& c) {
  constexpr const char* kCounting[] = {"no weights", "a mask", "weights"};
  constexpr const char* kPadding[] = {"zero", "keep", "normalize"};
  constexpr const char* kStatistics[] = {"one group",          "segments",
                                         "groups of channels", "given statistics",
                                         "each position",      "each position about 0",
                                         "one group about 0",  "segments about alpha times their mean"};
  return expect::text(kCounting[static_cast<int>(c.counting)], ", padding ", kPadding[static_cast<int>(c.padding)],
                      c.residual ? ", residual" : "", c.relu ? ", ReLU" : "", ", ",
                      kStatistics[static_cast<int>(c.statistics)]);
}

// ---- tensors ---------------------------------------------------------------------------------------------------

template <class T>
struct Tensors {
  all_passes::Batch<T> batch;
  std::vector<T> residual;
  std::vector<WeightOf<T>> mask, weights, ones;
  std::vector<std::int64_t> offsets;
  std::vector<double> gamma, beta;  // one per segment and channel
};

// Some segments have no row, some one, the last many; every seventh row of positions does not count.
template <class T>
Tensors<T> make_tensors(const Problem& p, Kind kind) {
  data::Generator g(11);
  Tensors<T> t{all_passes::make_batch<T>(p, kind), data::values<T>(g, p.size()), {}, {}, {}, {0, 0}, {}, {}};
  constexpr double kWeights[] = {0, 0.25, 1, 1.5, 3};
  for (std::int64_t at = 0; at < p.count(); ++at) {
    const bool is_left_out = at / p.inner % 7 == 3;
    t.mask.push_back(static_cast<WeightOf<T>>(is_left_out ? 0 : g.below(3) > 0));
    t.weights.push_back(static_cast<WeightOf<T>>(is_left_out ? 0 : kWeights[g.below(5)]));
    t.ones.push_back(1);
  }
  for (std::int64_t rows = 1, at = 1; at < p.outer && rows < 12; at += ++rows) t.offsets.push_back(at);
  t.offsets.push_back(p.outer);
  const std::int64_t entries = (static_cast<std::int64_t>(t.offsets.size()) - 1) * p.channels;
  for (auto* values : {&t.gamma, &t.beta}) *values = data::values<double>(g, entries);
  return t;
}

// What one call is given: all of some tensors, or one of their segments.
template <class T>
struct Inputs {
  Problem problem;
  std::span<const T> x, dy, residual;
  std::span<const WeightOf<T>> weights;
  std::span<const std::int64_t> offsets;
  std::span<const double> gamma, beta, mean, var;
  Padding padding;
  bool relu, given;
  std::int64_t width = 1;  // channels that share statistics
  bool each_position = false, about_zero = false;
  std::span<const double> alpha = {};  // per channel
  bool strided = false;                // whether these channels are not neighbours

  [[nodiscard]] std::size_t groups() const {
    if (each_position) return static_cast<std::size_t>(problem.count());
    return offsets.empty() ? 1 : offsets.size() - 1;
  }
  [[nodiscard]] std::size_t channels() const { return static_cast<std::size_t>(problem.channels); }
  // Entries of statistics.
  [[nodiscard]] std::size_t entries() const { return groups() * channels() / static_cast<std::size_t>(width); }
  // The channels of an entry of a group: the first, and from each to the next.
  [[nodiscard]] std::size_t lines() const { return channels() / static_cast<std::size_t>(width); }
  [[nodiscard]] std::size_t first_of(std::size_t line) const {
    return strided ? line : line * static_cast<std::size_t>(width);
  }
  [[nodiscard]] std::size_t step() const { return strided ? lines() : 1; }
  // The place of gamma of a channel of a group.
  [[nodiscard]] std::size_t of_gamma(std::size_t group, std::size_t c) const {
    return gamma.size() == channels() ? c : group * channels() + c;
  }
  [[nodiscard]] std::size_t sums() const { return each_position ? entries() : groups() * channels(); }
  [[nodiscard]] bool counts(std::size_t position) const { return weights.empty() || weights[position] > 0; }
  // The position of an element.
  [[nodiscard]] std::size_t position(std::size_t e) const {
    const auto inner = static_cast<std::size_t>(problem.inner),
               slab = static_cast<std::size_t>(problem.channels) * inner;
    return e / slab * inner + e % inner;
  }
  // Whether the element is what the formula says.
  [[nodiscard]] bool is_normalized(std::size_t e) const { return padding == Padding::normalize || counts(position(e)); }
};

// Segments that a residual is added to have a gamma and beta each.
template <class T>
Inputs<T> inputs_of(const Tensors<T>& t, const Combination& c) {
  const auto& b = t.batch;
  Inputs<T> in{b.problem, b.x, b.dy, {}, {}, {}, b.gamma, b.beta, b.mean, b.var, c.padding, c.relu, false};
  if (c.residual) in.residual = t.residual;
  if (c.counting != Counting::none) in.weights = c.counting == Counting::mask ? t.mask : t.weights;
  const std::int64_t channels = b.problem.channels;
  if (c.statistics == Statistics::groups) in.width = channels % 2 == 0 ? channels / 2 : channels;
  in.strided = in.width > 1 && c.relu;
  if (c.statistics == Statistics::graphs) in.alpha = b.mean;
  if (c.statistics == Statistics::segments || c.statistics == Statistics::groups ||
      c.statistics == Statistics::graphs) {
    in.offsets = t.offsets;
    if (c.residual) in.gamma = t.gamma, in.beta = t.beta;
  }
  in.given = c.statistics == Statistics::given;
  in.each_position = c.statistics == Statistics::lines || c.statistics == Statistics::lines_about_zero;
  in.about_zero = c.statistics == Statistics::lines_about_zero || c.statistics == Statistics::batch_about_zero;
  // All channels of a position, or beside a residual half of them, where that can be.
  if (in.each_position) in.width = c.residual && channels % 2 == 0 ? channels / 2 : channels;
  return in;
}
template <class T>
Inputs<T> segment_of(const Inputs<T>& in, std::size_t s) {
  const std::int64_t first = in.offsets[s];
  Inputs<T> part = in;
  part.problem.outer = in.offsets[s + 1] - first;
  part.offsets = {};
  const auto of = [&](auto& span, std::int64_t row) {
    if (!span.empty()) {
      span = span.subspan(static_cast<std::size_t>(first * row), static_cast<std::size_t>(part.problem.outer * row));
    }
  };
  for (auto* tensor : {&part.x, &part.dy, &part.residual}) of(*tensor, in.problem.channels * in.problem.inner);
  of(part.weights, in.problem.inner);
  for (auto* values : {&part.gamma, &part.beta}) *values = values->subspan(in.of_gamma(s, 0), in.channels());
  return part;
}

// ---- a call ----------------------------------------------------------------------------------------------------

struct How {
  int threads = 1;
  bool halves = false, in_place = false;
  std::size_t place = 0;  // values before each tensor
};

// Values behind `place` others.
template <class T>
class Tensor {
 public:
  Tensor(std::span<const T> values, std::size_t place) : memory_(values.size() + place), place_(place) {
    std::copy(values.begin(), values.end(), span().begin());
  }
  std::span<T> span() { return std::span<T>(memory_).subspan(place_); }
  std::vector<T> values() { return {span().begin(), span().end()}; }

 private:
  std::vector<T> memory_;
  std::size_t place_;
};

template <class T>
struct Found {
  std::vector<T> y = {}, dx = {}, dresidual = {}, y_dot = {};
  std::vector<bool> bits = {};
  std::vector<Moments> saved = {};
  std::vector<double> dgamma = {}, dbeta = {};  // of the whole alone
};

std::vector<bool> decoded(const std::vector<std::uint8_t>& bits, std::size_t count) {
  std::vector<bool> list(count);
  for (std::size_t e = 0; !bits.empty() && e < count; ++e) {
    const std::size_t at = 64 + bits[0] + e;
    list[e] = ((bits[at / 8] >> (at % 8)) & 1) != 0;
  }
  return list;
}

// In place: y lies where x does, dx where dy, dresidual where x, y_dot where x_dot. As tangents serve dy and what is at
// hand per channel.
template <class T>
Found<T> run(const Inputs<T>& in, const How& how = {}) {
  const std::size_t n = in.x.size();
  const Tensor<T> nothing(std::vector<T>(n, static_cast<T>(-77)), how.place);
  Tensor<T> x(in.x, how.place), dy(in.dy, how.place), residual(in.residual, how.place);
  Tensor<T> y = how.in_place ? x : nothing, dx = how.in_place ? dy : nothing, dresidual = how.in_place ? x : nothing;
  Tensor<T> y_dot = how.in_place ? dy : nothing;
  std::vector<std::uint8_t> bits(in.relu ? static_cast<std::size_t>(relu_mask_bytes(in.problem)) : 0, 0xa5);
  const Call<T> call{.problem = in.problem,
                     .groups = {in.offsets, in.width, in.each_position, in.about_zero ? About::zero : About::mean,
                                in.alpha.empty() ? ChannelValues{} : ChannelValues(in.alpha), in.strided},
                     .counted = {in.weights, in.padding},
                     .gamma = in.gamma,
                     .beta = in.beta,
                     .tail = {residual.span(), in.relu, bits}};
  const Options options{how.threads};
  Found<T> f{.saved = std::vector<Moments>(in.entries()),
             .dgamma = std::vector<double>(in.gamma.size(), -77),
             .dbeta = std::vector<double>(in.gamma.size(), -77)};

  const std::span<const T> x_forward = how.in_place ? y.span() : x.span();
  if (in.given) {
    normalize<T>(x_forward, call, in.mean, in.var, y.span(), options);
  } else if (how.halves) {
    moments<T>(x_forward, call, f.saved, options);
    normalize<T>(x_forward, call, f.saved, y.span(), options);
  } else {
    batch_norm<T>(x_forward, call, y.span(), f.saved, options);
  }

  const std::span<const T> x_backward = how.in_place ? dresidual.span() : x.span();
  const std::span<const T> dy_backward = how.in_place ? dx.span() : dy.span();
  const Gradients<T> out{dx.span(), dresidual.span(), f.dgamma, f.dbeta};
  if (in.given) {
    normalize_backward<T>(dy_backward, x_backward, call, in.mean, in.var, out, options);
  } else if (how.halves) {
    std::vector<GradSums> sums(in.sums());
    grad_sums<T>(dy_backward, x_backward, call, f.saved, sums, options);
    grad_input<T>(dy_backward, x_backward, call, f.saved, sums, out.dx, out.dresidual, options);
  } else {
    batch_norm_backward<T>(dy_backward, x_backward, call, f.saved, out, options);
  }

  const std::span<const T> x_dot = how.in_place ? y_dot.span() : dy.span();
  if (in.given) {
    normalize_jvp<T>(x_dot, x.span(), call, in.mean, in.var, in.beta, in.gamma, in.beta, in.gamma, y_dot.span(),
                     options);
  } else {
    batch_norm_jvp<T>(x_dot, x.span(), call, f.saved, in.beta, in.gamma, y_dot.span(), options);
  }
  f.y_dot = y_dot.values();
  f.y = y.values();
  f.dx = dx.values();
  f.dresidual = dresidual.values();
  f.bits = decoded(bits, n);
  return f;
}

// ---- against itself --------------------------------------------------------------------------------------------

// Where they differ: the first element for which `looks(element)`, or -1.
template <class T, class Looks>
std::ptrdiff_t difference(const std::vector<T>& a, const std::vector<T>& b, const Looks& looks) {
  if (data::same_bytes(a, b)) return -1;
  for (std::size_t e = 0; e < a.size(); ++e) {
    if (looks(e) && !data::same_bits(a[e], b[e])) return static_cast<std::ptrdiff_t>(e);
  }
  return a.size() == b.size() ? -1 : 0;
}

// The same bits in all results; `looks`: at which elements.
template <class T, class Looks>
void expect_same(const Inputs<T>& in, const Found<T>& got, const Found<T>& wanted, const Looks& looks, bool parameters,
                 const std::string& what) {
  EXPECT_EQUAL(difference(got.y, wanted.y, looks), -1, "y, ", what);
  EXPECT_EQUAL(difference(got.dx, wanted.dx, looks), -1, "dx, ", what);
  EXPECT_EQUAL(difference(got.dresidual, wanted.dresidual, looks), -1, "dresidual, ", what);
  EXPECT_EQUAL(difference(got.y_dot, wanted.y_dot, looks), -1, "y_dot, ", what);
  EXPECT(
      data::same_bytes(got.saved, wanted.saved) || all_passes::bits_of(got.saved) == all_passes::bits_of(wanted.saved),
      "saved, ", what);
  const std::size_t differing = got.bits == wanted.bits ? 0 : got.bits.size();
  std::size_t wrong = 0;  // what bits are elsewhere has no meaning
  for (std::size_t e = 0; e < differing; ++e) wrong += looks(e) && in.is_normalized(e) && got.bits[e] != wanted.bits[e];
  EXPECT_EQUAL(wrong, std::size_t{0}, "bits, ", what);
  if (!parameters) return;
  EXPECT(data::same_bits(got.dgamma, wanted.dgamma), "dgamma, ", what);
  EXPECT(data::same_bits(got.dbeta, wanted.dbeta), "dbeta, ", what);
}
constexpr auto kAll = [](std::size_t) { return true; };

// Each segment by itself; in halves, since a whole call refuses a single value.
template <class T>
void expect_segments_alone(const Inputs<T>& in, const Found<T>& whole, const std::string& what) {
  Found<T> all;
  const auto append = [](auto& to, const auto& from) { to.insert(to.end(), from.begin(), from.end()); };
  for (std::size_t s = 0; s < in.groups(); ++s) {
    const Found<T> one = run(segment_of(in, s), {.halves = true});
    append(all.y, one.y);
    append(all.dx, one.dx);
    append(all.dresidual, one.dresidual);
    append(all.y_dot, one.y_dot);
    append(all.bits, one.bits);
    append(all.saved, one.saved);
  }
  expect_same(in, all, whole, kAll, false, "segments alone, " + what);
}

// Some positions that have statistics of their own, each by itself.
template <class T>
void expect_positions_alone(const Inputs<T>& in, const Found<T>& whole, const std::string& what) {
  const auto inner = static_cast<std::size_t>(in.problem.inner), channels = in.channels();
  const std::size_t entries = channels / static_cast<std::size_t>(in.width);
  for (std::size_t at = 0; at < in.groups(); at += 1 + in.groups() / 5) {
    const auto gather = [&](const auto& of_all) {
      std::vector<T> row;
      for (std::size_t c = 0; c < channels && !of_all.empty(); ++c) {
        row.push_back(of_all[(at / inner * channels + c) * inner + at % inner]);
      }
      return row;
    };
    const std::vector<T> x = gather(in.x), dy = gather(in.dy), residual = gather(in.residual);
    Inputs<T> one = in;
    one.problem = {1, in.problem.channels, 1};
    one.x = x, one.dy = dy, one.residual = residual;
    if (!in.weights.empty()) one.weights = in.weights.subspan(at, 1);
    const Found<T> got = run(one);
    EXPECT(data::same_bits(got.y, gather(whole.y)) && data::same_bits(got.dx, gather(whole.dx)) &&
               data::same_bits(got.y_dot, gather(whole.y_dot)),
           "position ", at, " alone, ", what);
    const auto first = whole.saved.begin() + static_cast<std::ptrdiff_t>(at * entries);
    const std::vector<Moments> saved(first, first + static_cast<std::ptrdiff_t>(entries));
    EXPECT(all_passes::bits_of(got.saved) == all_passes::bits_of(saved), "moments of ", at, " alone, ", what);
  }
}

// NaN where nothing counts. With padding that is normalized the sums of backward cannot do without those values, and
// there y is NaN.
template <class T>
void expect_nan_unread(const Inputs<T>& in, const Found<T>& wanted, const std::string& what) {
  std::vector<T> x(in.x.begin(), in.x.end()), dy(in.dy.begin(), in.dy.end());
  std::vector<T> residual(in.residual.begin(), in.residual.end());
  const auto counts = [&](std::size_t e) { return in.counts(in.position(e)); };
  for (auto* tensor : {&x, &dy, &residual}) {
    for (std::size_t e = 0; e < tensor->size(); ++e) {
      if (!counts(e)) (*tensor)[e] = static_cast<T>(std::numeric_limits<float>::quiet_NaN());
    }
  }
  Inputs<T> with_nan = in;
  with_nan.x = x;
  with_nan.dy = dy;
  with_nan.residual = residual;
  Found<T> got = run(with_nan);
  const bool is_normalized = in.padding == Padding::normalize;
  if (is_normalized) {
    got.dx = wanted.dx;
    got.dresidual = wanted.dresidual;
  }
  expect_same(in, got, wanted, counts, !is_normalized, "NaN where nothing counts, " + what);
  std::size_t wrong = 0;
  for (std::size_t e = 0; e < got.y.size() && !is_normalized; ++e) {
    if (counts(e)) continue;
    const auto is_padding = [&](T v) {
      return in.padding == Padding::keep ? std::isnan(static_cast<double>(v)) : v == 0;
    };
    wrong += !is_padding(got.y[e]) || !is_padding(got.dx[e]) || !is_padding(got.y_dot[e]) ||
             static_cast<double>(got.dresidual[e]) != 0;
  }
  EXPECT_EQUAL(wrong, std::size_t{0}, "padding, ", what);
}

// ---- against the definition ------------------------------------------------------------------------------------

// Half the spacing at 1 of what T is computed in, and of T; the smallest value of T.
template <class T>
constexpr double kU = sizeof(T) == sizeof(double) ? 0x1p-53 : 0x1p-24;
template <class T>
constexpr double kRounding = 0;  // that of the arithmetic is in the bounds
template <>
constexpr double kRounding<Float16> = 0x1p-11;
template <>
constexpr double kRounding<BFloat16> = 0x1p-8;
template <class T>
constexpr double kSmallest = sizeof(T) == sizeof(double) ? 0x1p-1074 : 0x1p-149;
template <>
constexpr double kSmallest<Float16> = 0x1p-24;
template <>
constexpr double kSmallest<BFloat16> = 0x1p-133;
// The errors of the loops below: sums of some thousand terms in float64 against u of float32, or in long double against
// u of float64.
template <class T>
constexpr double kOracle = sizeof(T) == sizeof(double) ? 64 * 0x1p-63 : 64 * 0x1p-53;

// What shares statistics: one channel of one segment, or some.
template <class T>
class Line {
  using R = Real<T>;

 public:
  Line(const Inputs<T>& in, const Found<T>& found, std::size_t group, std::size_t line, const std::string& what)
      : in_(in), f_(found), c_(in.first_of(line)), entry_(group * in.lines() + line), what_(what) {
    const Problem& p = in.problem;
    if (in.each_position) add_position(group, c_);
    const std::int64_t begin = in.offsets.empty() ? 0 : in.offsets[group];
    const std::int64_t end = in.each_position ? begin : in.offsets.empty() ? p.outer : in.offsets[group + 1];
    for (std::size_t k = 0; k < static_cast<std::size_t>(in.width); ++k) {
      const std::size_t c = c_ + k * in.step();
      for (std::int64_t o = begin; o < end; ++o) {
        for (std::int64_t i = 0; i < p.inner; ++i)
          add(static_cast<std::size_t>((o * p.channels) * p.inner + i) + c * static_cast<std::size_t>(p.inner),
              in.of_gamma(group, c));
      }
    }
  }
  // Adds what it should be to dgamma, dbeta and the sums of their absolute terms.
  void expect(std::vector<std::array<R, 5>>& parameters) {
    find_statistics(parameters);
    for (std::size_t k = 0; k < at_.size(); ++k) expect_y(k);
    for (std::size_t k = 0; k < at_.size(); ++k) expect_dx(k);
    expect_y_dot();
  }

 private:
  void add_position(std::size_t position, std::size_t first) {
    const auto inner = static_cast<std::size_t>(in_.problem.inner);
    for (std::size_t c = first; c < first + static_cast<std::size_t>(in_.width); ++c) {
      add((position / inner * in_.channels() + c) * inner + position % inner, c);
    }
  }
  void add(std::size_t e, std::size_t of_gamma) {
    parameter_.push_back(of_gamma);
    gamma_.push_back(in_.gamma[of_gamma]);
    beta_.push_back(in_.beta[of_gamma]);
    const bool lets_through = !in_.relu || f_.bits[e];
    at_.push_back(e);
    x_.push_back(static_cast<R>(in_.x[e]));
    dy_.push_back(lets_through ? static_cast<R>(in_.dy[e]) : R(0));
    const R w = in_.weights.empty() ? R(1) : static_cast<R>(in_.weights[in_.position(e)]);
    w_.push_back(in_.each_position && w > 0 ? R(1) : w);
  }
  void find_statistics(std::vector<std::array<R, 5>>& parameters) {
    R total = 0, sum = 0, squares = 0;
    for (std::size_t k = 0; k < at_.size(); ++k) total += w_[k], sum += w_[k] * x_[k];
    count_ = total;
    mean_ = in_.given ? R(in_.mean[c_]) : total > 0 ? sum / total : R(0);
    // About the rounded mean, whose error is taken off again.
    R rest = 0;
    for (std::size_t k = 0; k < at_.size(); ++k) {
      const R d = x_[k] - mean_;
      squares += w_[k] * d * d;
      rest += w_[k] * d;
    }
    if (!in_.given && total > 0) {
      mean_ += rest / total;
      squares -= rest * rest / total;
      expect_moments(f_.saved[entry_], squares);
    }
    R var = in_.given ? R(in_.var[c_]) : total > 0 ? squares / total : R(0);
    alpha_ = in_.about_zero ? R(0) : in_.alpha.empty() ? R(1) : R(in_.alpha[c_]);
    const R apart = in_.given ? R(0) : (1 - alpha_) * mean_;
    var += apart * apart;
    mean_ -= apart;
    const R plus = var + R(1e-5);
    rstd_ = total > 0 || in_.given ? 1 / std::sqrt(plus) : R(0);
    mean_of_xhat_ = apart * rstd_;
    for (std::size_t k = 0; k < at_.size(); ++k) {
      xhat_.push_back((x_[k] - mean_) * rstd_);
      scale_ = std::max(scale_, std::abs(gamma_[k] * xhat_[k]));
      if (!in_.is_normalized(at_[k])) continue;
      const R terms[] = {dy_[k] * xhat_[k], dy_[k], std::abs(dy_[k] * xhat_[k]), std::abs(dy_[k])};
      for (std::size_t s = 0; s < 4; ++s) {
        parameters[parameter_[k]][s] += terms[s];
        sums_[s] += (s < 2 ? gamma_[k] : std::abs(gamma_[k])) * terms[s];
      }
      // A mean that cancels between channels of unlike size is off by a part of std, whose product with rstd is 1.
      parameters[parameter_[k]][4] += std::abs(dy_[k]) * (std::abs(mean_) * rstd_ + (in_.strided ? 1 : 0));
    }
  }
  // The mean may cancel: within std too.
  void expect_moments(const Moments& m, R squares) {
    const R bound = kU<T> + R(kOracle<T>), std = std::sqrt(squares / count_);
    EXPECT(m.count == static_cast<double>(count_), "count ", m.count, ", ", what_);
    EXPECT(std::abs(m.mean - mean_) <= bound * (std::abs(mean_) + std), "mean ", m.mean, ", ", what_);
    EXPECT(std::abs(m.m2 - squares) <= bound * squares, "m2 ", m.m2, ", ", what_);
  }
  // A segment of equal values that count, beside large ones that do not.
  static bool is_beyond(T got, R wanted) {
    constexpr R kLargest = std::is_same_v<T, double>    ? R(std::numeric_limits<double>::max())
                           : std::is_same_v<T, Float16> ? R(65504)
                                                        : R(std::numeric_limits<float>::max());
    return std::isinf(static_cast<double>(got)) && std::abs(wanted) > kLargest && (got > 0) == (wanted > 0);
  }
  // 3u of the channel's largest |y - beta| and a rounding each of beta and y (README); one each for what is added, and
  // for T.
  void expect_y(std::size_t k) const {
    const std::size_t e = at_[k];
    const T got = f_.y[e];
    if (!in_.is_normalized(e)) {
      EXPECT(data::same_bits(got, in_.padding == Padding::keep ? in_.x[e] : T(0)), "padding of y, ", what_);
      return;
    }
    const R normalized = xhat_[k] * gamma_[k] + beta_[k],
            residual = in_.residual.empty() ? R(0) : static_cast<R>(in_.residual[e]);
    const R sum = normalized + residual, wanted = in_.relu && sum < 0 ? R(0) : sum;
    const R bound = 3 * kU<T> * scale_ + kU<T> * (std::abs(beta_[k]) + std::abs(normalized)) +
                    (in_.residual.empty() ? 0 : kU<T> * std::abs(sum)) + R(kOracle<T>) * (scale_ + std::abs(sum)) +
                    kRounding<T> * std::abs(sum) + R(kSmallest<T>);
    const bool is_close = std::abs(static_cast<R>(got) - wanted) <= bound || is_beyond(got, wanted);
    EXPECT(is_close, "y ", static_cast<double>(got), ", wanted ", wanted, " within ", bound, " at ", e, ", ", what_);
    if (in_.relu && std::abs(sum) > bound) EXPECT(f_.bits[e] == (sum > 0), "bit of ", e, ", ", what_);
  }
  // 4u of the sum of absolute terms; 6u with weights, whose products round too.
  void expect_dx(std::size_t k) const {
    const std::size_t e = at_[k];
    const T got = f_.dx[e];
    const bool is_normalized = in_.is_normalized(e);
    EXPECT(data::same_bits(f_.dresidual[e], is_normalized && (!in_.relu || f_.bits[e]) ? in_.dy[e] : T(0)),
           "dresidual ", static_cast<double>(f_.dresidual[e]), " at ", e, ", ", what_);
    if (!is_normalized) {
      EXPECT(data::same_bits(got, in_.padding == Padding::keep ? in_.dy[e] : T(0)), "padding of dx, ", what_);
      return;
    }
    const R part = in_.given || count_ == 0 ? R(0) : w_[k] / count_, of_k = gamma_[k] * dy_[k];
    const R of_mean = part * alpha_ * (sums_[1] - sums_[0] * mean_of_xhat_);
    const R wanted = rstd_ * (of_k - of_mean - part * xhat_[k] * sums_[0]);
    // What double rounds dy and x - mean to before they are summed.
    const bool is_double = sizeof(T) == sizeof(double);
    const R of_dy = std::abs(sums_[is_double ? 3 : 1]), of_xhat = std::abs(sums_[is_double ? 2 : 0]);
    const R along_mean = part * std::abs(alpha_) * (of_dy + of_xhat * std::abs(mean_of_xhat_));
    const R terms = rstd_ * (std::abs(of_k) + along_mean + part * std::abs(xhat_[k]) * of_xhat);
    const R bound = ((in_.weights.empty() ? 4 : 6) * kU<T> + R(kOracle<T>)) * terms + kRounding<T> * std::abs(wanted) +
                    R(kSmallest<T>) + R(kOracle<T>) * part * rstd_ * (sums_[3] + std::abs(xhat_[k]) * sums_[2]);
    const bool is_close = std::abs(static_cast<R>(got) - wanted) <= bound || is_beyond(got, wanted);
    EXPECT(is_close, "dx ", static_cast<double>(got), ", wanted ", wanted, " within ", bound, " at ", e, ", ", what_);
  }

  // As dx, and a rounding each for what is added; var_dot counts half.
  void expect_y_dot() const {
    const auto x_dot = [this](std::size_t k) { return static_cast<R>(in_.dy[at_[k]]); };
    R sums[4] = {};
    for (std::size_t k = 0; k < at_.size() && count_ > 0; ++k) {
      const R first = w_[k] / count_ * x_dot(k), second = first * xhat_[k];
      sums[0] += alpha_ * first, sums[1] += second, sums[2] += std::abs(first), sums[3] += std::abs(second);
    }
    sums[2] *= std::abs(alpha_);
    sums[1] -= sums[0] * mean_of_xhat_, sums[3] += sums[2] * std::abs(mean_of_xhat_);
    if (in_.given) {
      sums[0] = in_.beta[c_], sums[1] = rstd_ * in_.gamma[c_] / 2;
      sums[2] = std::abs(sums[0]), sums[3] = std::abs(sums[1]);
    }
    for (std::size_t k = 0; k < at_.size(); ++k) {
      const std::size_t e = at_[k];
      const R scale = gamma_[k] * rstd_, gamma_dot = beta_[k], beta_dot = gamma_[k];
      const T got = f_.y_dot[e];
      if (!in_.is_normalized(e)) {
        EXPECT(data::same_bits(got, in_.padding == Padding::keep ? in_.dy[e] : T(0)), "padding of y_dot, ", what_);
        continue;
      }
      const R normalized = scale * (x_dot(k) - sums[0] - xhat_[k] * sums[1]) + gamma_dot * xhat_[k] + beta_dot;
      const R terms = std::abs(scale) * (std::abs(x_dot(k)) + sums[2] + std::abs(xhat_[k]) * sums[3]) +
                      std::abs(gamma_dot * xhat_[k]) + std::abs(beta_dot);
      const R sum = normalized + (in_.residual.empty() ? R(0) : static_cast<R>(in_.residual[e]));
      const R wanted = !in_.relu || f_.bits[e] ? sum : R(0);
      const R bound = (6 * kU<T> + R(kOracle<T>)) * terms + (in_.residual.empty() ? 0 : kU<T> * std::abs(sum)) +
                      kRounding<T> * std::abs(sum) + R(kSmallest<T>);
      const bool is_close = std::abs(static_cast<R>(got) - wanted) <= bound || is_beyond(got, wanted);
      EXPECT(is_close, "y_dot ", static_cast<double>(got), ", wanted ", wanted, " within ", bound, " at ", e, ", ",
             what_);
    }
  }

  const Inputs<T>& in_;
  const Found<T>& f_;
  std::size_t c_, entry_;
  const std::string& what_;
  std::vector<std::size_t> at_;
  std::vector<std::size_t> parameter_;
  std::vector<R> x_, dy_, w_, xhat_, gamma_, beta_;
  R count_ = 0, mean_ = 0, rstd_ = 0, scale_ = 0, alpha_ = 1, mean_of_xhat_ = 0;
  R sums_[4] = {};  // of gamma*dy*xhat and gamma*dy, and of their absolute values
};

template <class T>
void expect_definition(const Inputs<T>& in, const Found<T>& found, const std::string& what) {
  std::vector<std::array<Real<T>, 5>> parameters(in.gamma.size());
  for (std::size_t group = 0; group < in.groups(); ++group) {
    for (std::size_t line = 0; line < in.lines(); ++line) Line<T>(in, found, group, line, what).expect(parameters);
  }
  for (std::size_t at = 0; at < parameters.size(); ++at) {
    for (const std::size_t k : {0u, 1u}) {
      const double got = (k == 0 ? found.dgamma : found.dbeta)[at];
      const Real<T> wanted = parameters[at][k], scale = parameters[at][k + 2];
      const Real<T> of_mean = k == 0 ? parameters[at][4] : 0;  // what the mean of the loops is off by
      EXPECT(std::abs(got - wanted) <= (4 * kU<T> + kOracle<T>)*scale + kOracle<T> * of_mean + kSmallest<double>,
             k == 0 ? "dgamma " : "dbeta ", got, ", wanted ", wanted, ", scale ", scale, " at ", at, ", ", what);
    }
  }
}

// ---- all of it -------------------------------------------------------------------------------------------------

// AddressSanitizer looks at what the library does, of which it takes tenfold the time: each combination on every sixth
// problem, all of them on some, and not the loops of the definition.
#ifdef __SANITIZE_ADDRESS__
constexpr std::size_t kEvery = 6;
#else
constexpr std::size_t kEvery = 1;
#endif

template <class T>
void expect_combination(const Tensors<T>& tensors, const Combination& c, const std::string& where) {
  const std::string what = where + text(c);
  Inputs<T> in = inputs_of(tensors, c);
  const Found<T> whole = run(in);
  const bool has_weights = c.counting != Counting::none;
  // Without weights padding has no meaning, and is tried once.
  if (has_weights || c.padding == Padding::zero) {
    expect_same(in, run(in, {.threads = 2, .halves = true, .place = 5}), whole, kAll, in.given, "halves, " + what);
    expect_same(in, run(in, {.threads = 2, .in_place = true, .place = 1}), whole, kAll, true, "in place, " + what);
    if (!in.offsets.empty()) expect_segments_alone(in, whole, what);
    if (in.each_position) expect_positions_alone(in, whole, what);
    if (has_weights) expect_nan_unread(in, whole, what);
    if (kEvery == 1) expect_definition(in, whole, what);
  }
  if (!has_weights) {
    if (in.given && c.padding == Padding::normalize) return;
    in.weights = tensors.ones;
    expect_same(in, run(in, {.threads = 2}), whole, kAll, true, "weights of 1, " + what);
  }
}

// Interleaved, of rows that are short, uneven, wide, wider than a tile; planar, of runs that are columns, short, longer
// than a tile. The larger are shared among threads.
constexpr Problem kShapes[] = {{700, 3, 1}, {90, 10, 1}, {25, 700, 1}, {5, 4100, 1}, {70, 1, 1},
                               {30, 6, 4},  {8, 5, 49},  {4, 90, 17},  {4, 1, 700},  {3, 2, 5000}};

template <class T>
void expect_all(const char* type) {
  const std::vector<Combination> all = combinations();
  std::size_t problem = 0;
  (void)threads_worked();
  for (const Problem& p : kShapes) {
    for (const Kind kind : {Kind::ordinary, Kind::wide}) {
      // For float64 they are computed like all others.
      const bool is_left_out = std::is_same_v<T, Float16> || (std::is_same_v<T, double> && p.channels > 10);
      if (kind == Kind::wide && (is_left_out || p.channels < 3)) continue;
      const Tensors<T> tensors = make_tensors<T>(p, kind);
      const std::string where = expect::text(type, " {", p.outer, ", ", p.channels, ", ", p.inner, "} ",
                                             all_passes::kKindNames[static_cast<int>(kind)], ", ");
      for (std::size_t c = problem++ % kEvery; c < all.size(); c += kEvery) expect_combination(tensors, all[c], where);
    }
  }
  EXPECT_EQUAL(threads_worked(), 2, "no tensor was large enough to share");
}

TEST(every_combination_in_float32_is_the_composition_of_its_steps) { expect_all<float>("float32"); }
TEST(every_combination_in_float64_is_the_composition_of_its_steps) { expect_all<double>("float64"); }
TEST(every_combination_in_float16_is_the_composition_of_its_steps) { expect_all<Float16>("float16"); }
TEST(every_combination_in_bfloat16_is_the_composition_of_its_steps) { expect_all<BFloat16>("bfloat16"); }

}  // namespace

int main(int argc, char** argv) { return expect::run_tests(argc > 1 ? argv[1] : nullptr); }
