#include "grouped.hpp"

#include <algorithm>

#include "arithmetic.hpp"
#include "group_math.hpp"

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
    const GradSums terms = group_terms<A>(m, dy, dy_xmu, call_.eps, alpha_of(first), of_groups_[g].mean);
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
