#include "grouped.hpp"

#include <algorithm>
#include <cmath>

#include "arithmetic.hpp"
#include "gradient_math.hpp"

namespace batchnorm {

template <class T>
Grouped<T>::Grouped(const PassCall<T>& call)
    : call_(call),
      cells_(call),
      own_(Workspace::bytes_for<Moments>(call.problem.channels) +
           Workspace::bytes_for<GradSums>(call.problem.channels)),
      workspace_(measures() ? 0 : own_, call.options.memory),
      moments_(measures() ? nullptr : workspace_.take<Moments>(call.problem.channels)),
      sums_(measures() ? nullptr : workspace_.take<GradSums>(call.problem.channels)) {
  cells_.width = 1;
  cells_.is_shared = true;
  cells_.about_zero = false;
  cells_.alpha = {};
  if (measures()) cells_.options.needed = &needed_by_cells_;
  if (call.options.memory != nullptr) cells_.options.memory += own_;
}
template <class T>
Grouped<T>::~Grouped() {
  if (measures()) *call_.options.needed = std::max(*call_.options.needed, own_ + needed_by_cells_);
}

// ---- between cells and groups ----

namespace {

// The moments about alpha times the mean: m2 is the sum of the squares of what is left.
Moments about(const Moments& m, double alpha) {
  const DoubleDouble mean{m.mean, m.mean_lo}, center = mean * DoubleDouble{alpha, 0}, apart = mean - center;
  const DoubleDouble squares = DoubleDouble{m.m2, m.m2_lo} + apart * apart * DoubleDouble{m.count, 0};
  if (std::isfinite(squares.lo)) return {m.count, center.hi, center.lo, squares.hi, squares.lo};
  const double far = m.mean - alpha * m.mean;
  return {m.count, alpha * m.mean, 0, m.m2 + far * far * m.count, 0};
}

// Cells of a group have the same count. Of float32 and narrower, float64 is enough between the sums of cells, but for
// the mean, whose low part says where float64 values lie: merged one after another in two parts, cells of 14 x 14
// values took a third of the time of training.
template <class A>
Moments merged(const Moments* cells, std::int64_t width, std::int64_t step) {
  Moments all;
  const std::int64_t end = width * step;
  if constexpr (sizeof(A) == sizeof(double)) {
    for (std::int64_t c = 0; c < end; c += step) all = merge_moments(all, cells[c]);
    return all;
  }
  const double count = cells[0].count;
  if (count == 0) return all;
  DoubleDouble sum{};
  for (std::int64_t c = 0; c < end; c += step) {
    const DoubleDouble next = two_sum(sum.hi, cells[c].mean);
    sum = {next.hi, sum.lo + next.lo + cells[c].mean_lo};
  }
  const DoubleDouble mean = two_sum(sum.hi, sum.lo) / DoubleDouble{static_cast<double>(width), 0};
  double within = 0, between = 0;
  for (std::int64_t c = 0; c < end; c += step) {
    const double apart = (cells[c].mean - mean.hi) + (cells[c].mean_lo - mean.lo);
    within += cells[c].m2;
    between += apart * apart;
  }
  return {count * static_cast<double>(width), mean.hi, mean.lo, within + count * between, 0};
}

// A sum of products. Of float64 tensors in two parts, and in one where two leave the range on the way.
template <class A>
struct SumOfProducts {
  DoubleDouble exact;
  double plain = 0;

  void add(double factor, const DoubleDouble& value) {
    plain += factor * (value.hi + value.lo);
    if constexpr (sizeof(A) == sizeof(double)) exact = exact + DoubleDouble{factor, 0} * value;
  }
  // times the powers of rstd, one after the other: rstd^2 alone may overflow where this does not.
  [[nodiscard]] double mean(double n, const DoubleDouble& rstd, int powers) const {
    double value = plain / n;
    for (int k = 0; k < powers; ++k) value *= rstd.hi;
    if constexpr (sizeof(A) == sizeof(double)) {
      DoubleDouble wide = exact / DoubleDouble{n, 0};
      for (int k = 0; k < powers; ++k) wide = wide * rstd;
      if (std::isfinite(wide.lo)) return wide.hi + wide.lo;
    }
    return value;
  }
};

}  // namespace

// What of the mean is taken from the values of a channel.
template <class T>
double Grouped<T>::alpha_of(std::int64_t c) const {
  return call_.about_zero ? 0 : call_.alpha.value_or(c, 1);
}
template <class T>
void Grouped<T>::share(const Moments* of_groups) {
  of_groups_ = of_groups;
  for (std::int64_t g = 0; !measures() && g < groups(); ++g) {
    for_channels_of(g, [&](std::int64_t c) {
      const double alpha = alpha_of(c);
      moments_[c] = of_groups[g];
      if (alpha != 1 && moments_[c].count > 0) moments_[c] = about(moments_[c], alpha);
    });
  }
}

template <class T>
void Grouped<T>::set_terms(const GradSums* of_cells) {
  using A = Arithmetic<T>;
  for (std::int64_t g = 0; !measures() && g < groups(); ++g) {
    const std::int64_t first = first_of(g);
    const auto m = MomentsOf<double>::at(moments_ + first);
    SumOfProducts<A> dy, dy_xmu;
    for_channels_of(g, [&](std::int64_t c) {
      const auto s = GradSumsOf<double>::at(of_cells + c);
      const double gamma = call_.gamma.value_or(c, 1);
      dy.add(gamma, s.dy);
      dy_xmu.add(gamma, centered_dot(m, s));
    });
    GradSums terms;
    if (m.count > 0) {
      const DoubleDouble rstd = rstd_for<A>(m, call_.eps);
      terms.sum_dy_xmu = -dy_xmu.mean(m.count, rstd, 3);
      // The mean of what dx is without it, times alpha: that of x - alpha*mean is (1 - alpha)*mean.
      const double alpha = alpha_of(first), apart = (1 - alpha) * of_groups_[g].mean;
      terms.sum_dy = -dy.mean(m.count, rstd, 1);
      if (alpha != 1) terms.sum_dy = alpha * (terms.sum_dy - terms.sum_dy_xmu * apart);
    }
    for_channels_of(g, [&](std::int64_t c) { sums_[c] = terms; });
  }
}

template <class T>
void Grouped<T>::add_up_sums() {
  for (std::int64_t g = 0; !measures() && g < groups(); ++g) {
    DoubleDouble dy{}, dy_xmu{};
    for_channels_of(g, [&](std::int64_t c) {
      dy = dy + DoubleDouble{sums_[c].sum_dy, sums_[c].sum_dy_lo};
      dy_xmu = dy_xmu + DoubleDouble{sums_[c].sum_dy_xmu, sums_[c].sum_dy_xmu_lo};
    });
    const double alpha = alpha_of(first_of(g));
    if (alpha != 1) {
      const DoubleDouble apart = DoubleDouble{1 - alpha, 0} * DoubleDouble{of_groups_[g].mean, of_groups_[g].mean_lo};
      dy = dy * DoubleDouble{alpha, 0};
      dy_xmu = dy_xmu - dy * apart;
    }
    for_channels_of(g, [&](std::int64_t c) { sums_[c] = {dy.hi, dy.lo, dy_xmu.hi, dy_xmu.lo}; });
  }
}

template <class T>
void Grouped<T>::put_parameters(const FirstOutputs<T>& out) const {
  using A = Arithmetic<T>;
  for (std::int64_t g = 0; !measures() && g < groups(); ++g) {
    const auto m = MomentsOf<double>::at(moments_ + first_of(g));
    const DoubleDouble rstd = m.count == 0 ? DoubleDouble{} : rstd_for<A>(m, call_.eps);
    for_channels_of(g, [&](std::int64_t c) {
      const auto s = GradSumsOf<double>::at(sums_ + c);
      out.dgamma.set(c, dgamma_of<A>(m, s, rstd));
      out.dbeta.set(c, dbeta_of(s));
    });
  }
}

// ---- passes ----

template <class T>
void Grouped<T>::moments(const T* x, Moments* out) {
  Forward<T>{cells_}.moments(x, moments_);
  for (std::int64_t g = 0; !measures() && g < groups(); ++g) {
    out[g] = merged<Arithmetic<T>>(moments_ + first_of(g), call_.width, step());
  }
}
template <class T>
void Grouped<T>::normalize(const T* x, const Moments* moments, T* y) {
  share(moments);
  Forward<T>{cells_}.normalize(x, {{}, {}, moments_}, y);
}
template <class T>
void Grouped<T>::batch_norm(const T* x, T* y, Moments* saved) {
  moments(x, saved);
  normalize(x, saved, y);
}

template <class T>
void Grouped<T>::grad_sums(const T* dy, const T* x, const Moments* moments, GradSums* out) {
  share(moments);
  Backward<T>{cells_}.grad_sums(dy, x, moments_, out);
}
template <class T>
void Grouped<T>::grad_input(const T* dy, const T* x, const Moments* moments, const GradSums* sums,
                            const FirstOutputs<T>& out) {
  share(moments);
  set_terms(sums);
  Backward<T>{cells_}.grad_input(dy, x, moments_, sums_, {out.dx, out.dresidual});
}
template <class T>
void Grouped<T>::batch_norm_backward(const T* dy, const T* x, const Moments* saved, const FirstOutputs<T>& out) {
  grad_sums(dy, x, saved, sums_);
  put_parameters(out);
  if (out.dx == nullptr && out.dresidual == nullptr) return;
  set_terms(sums_);
  Backward<T>{cells_}.grad_input(dy, x, moments_, sums_, {out.dx, out.dresidual});
}
template <class T>
void Grouped<T>::batch_norm_jvp(const T* x_dot, const T* x, const Moments* saved, const Tangents& tangents, T* y_dot) {
  share(saved);
  Backward<T>{cells_}.tangent_sums(x_dot, x, moments_, sums_);
  add_up_sums();
  Backward<T>{cells_}.batch_norm_jvp(x_dot, x, moments_, sums_, tangents, y_dot);
}

template class Grouped<Float16>;
template class Grouped<BFloat16>;
template class Grouped<float>;
template class Grouped<double>;

}  // namespace batchnorm
