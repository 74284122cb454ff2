#include "grouped.hpp"

#include <algorithm>
#include <cmath>

#include "arithmetic.hpp"
#include "channel_math.hpp"

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
  if (measures()) cells_.options.needed = &needed_by_cells_;
  if (call.options.memory != nullptr) cells_.options.memory += own_;
}
template <class T>
Grouped<T>::~Grouped() {
  if (measures()) *call_.options.needed = std::max(*call_.options.needed, own_ + needed_by_cells_);
}

// ---- between cells and groups ----

template <class T>
void Grouped<T>::share(const Moments* of_groups) {
  for (std::int64_t c = 0; !measures() && c < cells_.problem.channels; ++c) moments_[c] = of_groups[c / call_.width];
}

namespace {

// A sum of products, and the same in float64 where that leaves the range of two parts on the way.
struct WideSum {
  DoubleDouble exact;
  double plain = 0;

  void add(double factor, const DoubleDouble& value) {
    exact = exact + DoubleDouble{factor, 0} * value;
    plain += factor * value.hi;
  }
};
double value_of(const DoubleDouble& exact, double plain) {
  return std::isfinite(exact.lo) ? exact.hi + exact.lo : plain;
}

}  // namespace

template <class T>
void Grouped<T>::set_terms(const GradSums* of_cells) {
  using A = Arithmetic<T>;
  for (std::int64_t g = 0; !measures() && g < groups(); ++g) {
    const std::int64_t first = g * call_.width;
    const auto m = MomentsOf<double>::at(moments_ + first);
    WideSum dy, dy_xmu;
    for (std::int64_t c = first; c < first + call_.width; ++c) {
      const auto s = GradSumsOf<double>::at(of_cells + c);
      const double gamma = call_.gamma.value_or(c, 1);
      dy.add(gamma, s.dy);
      dy_xmu.add(gamma, centered_dot(m, s));
    }
    GradSums terms;
    if (m.count > 0) {
      const DoubleDouble n{m.count, 0}, rstd = rstd_for<A>(m, call_.eps);
      terms.sum_dy = -value_of(rstd * (dy.exact / n), rstd.hi * (dy.plain / m.count));
      // rstd^2 alone is never formed: it may overflow where this does not.
      terms.sum_dy_xmu = -value_of(rstd * (rstd * (rstd * (dy_xmu.exact / n))),
                                   rstd.hi * (rstd.hi * (rstd.hi * (dy_xmu.plain / m.count))));
    }
    std::fill_n(sums_ + first, call_.width, terms);
  }
}

template <class T>
void Grouped<T>::add_up_sums() {
  for (std::int64_t g = 0; !measures() && g < groups(); ++g) {
    GradSums* of_group = sums_ + g * call_.width;
    DoubleDouble dy{}, dy_xmu{};
    for (std::int64_t c = 0; c < call_.width; ++c) {
      dy = dy + DoubleDouble{of_group[c].sum_dy, of_group[c].sum_dy_lo};
      dy_xmu = dy_xmu + DoubleDouble{of_group[c].sum_dy_xmu, of_group[c].sum_dy_xmu_lo};
    }
    std::fill_n(of_group, call_.width, GradSums{dy.hi, dy.lo, dy_xmu.hi, dy_xmu.lo});
  }
}

template <class T>
void Grouped<T>::put_parameters(const FirstOutputs<T>& out) const {
  using A = Arithmetic<T>;
  for (std::int64_t c = 0; !measures() && c < cells_.problem.channels; ++c) {
    const auto m = MomentsOf<double>::at(moments_ + c);
    const auto s = GradSumsOf<double>::at(sums_ + c);
    out.dgamma.set(c, m.count == 0 ? 0 : dgamma_of<A>(m, s, rstd_for<A>(m, call_.eps)));
    out.dbeta.set(c, dbeta_of(s));
  }
}

// ---- passes ----

template <class T>
void Grouped<T>::moments(const T* x, Moments* out) {
  Forward<T>{cells_}.moments(x, moments_);
  for (std::int64_t g = 0; !measures() && g < groups(); ++g) {
    Moments all;
    for (std::int64_t c = g * call_.width; c < (g + 1) * call_.width; ++c) all = merge_moments(all, moments_[c]);
    out[g] = all;
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
