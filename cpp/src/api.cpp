// The public functions: check, run, return.
#include <limits>

#include "batchnorm/batchnorm.hpp"
#include "channel_math.hpp"
#include "checked_call.hpp"
#include "floating_point.hpp"
#include "parallel.hpp"
#include "passes.hpp"
#include "segments.hpp"

namespace batchnorm {
namespace {

template <class T>
T* data_or_null(std::span<T> s, std::int64_t at = 0) {
  return s.empty() ? nullptr : s.data() + at;
}

template <class T>
FirstOutputs<T> outputs(const Gradients<T>& out, std::int64_t at) {
  return {data_or_null(out.dx, at), data_or_null(out.dresidual, at), out.dgamma, out.dbeta};
}

template <class T>
void check_jvp(CheckedCall<T>& checked, std::span<const T> x_dot, std::span<const T> x, const Tangents& tangents,
               std::span<T> y_dot) {
  checked.reads("x_dot", x_dot);
  checked.reads("x", x);
  checked.reads("gamma_dot", tangents.gamma);
  checked.reads("beta_dot", tangents.beta);
  checked.reads("mean_dot", tangents.mean);
  checked.reads("var_dot", tangents.var);
  checked.follow_along();
  checked.writes("y_dot", y_dot);
}

// ddy is written before dx is computed from v, dy and x.
template <class T>
void check_double_backward(CheckedCall<T>& checked, std::span<const T> v, std::span<const T> dy, std::span<const T> x,
                           const Cotangents& w, std::span<T> ddy, std::span<T> dx, ChannelOutput dgamma) {
  checked.reads("v", v);
  checked.reads("dy", dy);
  checked.reads("x", x);
  checked.reads("v_dgamma", w.dgamma);
  checked.reads("v_dbeta", w.dbeta);
  if (!dx.empty()) checked.writes("dx", dx);
  if (!ddy.empty()) dx.empty() ? checked.writes("ddy", ddy) : checked.writes_apart("ddy", ddy);
  checked.writes("dgamma", dgamma);
}

template <class F>
auto in_default_environment(F f) {
  decltype(f()) result{};
  run_here([&] { result = f(); });
  return result;
}

}  // namespace

std::int64_t relu_mask_bytes(const Problem& problem) {
  check::problem(problem);
  return bits_bytes(problem);
}

template <class T>
void moments(std::span<const T> x, const Call<T>& call, std::span<Moments> out, const Options& options) {
  const DefaultFloatingPoint environment;
  CheckedCall<T> checked(call, options);
  checked.reads("x", x);
  checked.writes_entries("out", out);
  checked.run([&](const PassCall<T>& part, std::int64_t at, std::int64_t entry) {
    Forward<T>{part}.moments(x.data() + at, out.data() + entry / part.width);
  });
}

Moments merge(const Moments& a, const Moments& b) {
  return in_default_environment([&] { return merge_moments(a, b); });
}

double variance(const Moments& moments, int ddof) {
  // Of nothing nothing is known: normalizing by infinity gives beta, as batch_norm() does there.
  if (moments.count == 0 && ddof == 0) return std::numeric_limits<double>::infinity();
  return in_default_environment([&] { return variance_of(moments, ddof).hi; });
}

double rstd(const Moments& moments, double eps) {
  if (moments.count == 0) return 0;
  return in_default_environment([&] { return rstd_of(moments, eps).hi; });
}

void update_running(std::span<double> running_mean, std::span<double> running_var, std::span<const Moments> batch,
                    double update_rate, int ddof) {
  const DefaultFloatingPoint environment;
  const auto channels = static_cast<std::int64_t>(batch.size());
  check::channels("running_mean", running_mean.size(), channels);
  check::channels("running_var", running_var.size(), channels);
  check::Memories memories;
  memories.reads("batch", std::as_bytes(batch));
  memories.writes("running_var", std::as_bytes(running_var));
  memories.writes("running_mean", std::as_bytes(running_mean));
  check::counts("batch", batch);
  check::update_rate(update_rate);
  check::ddof(ddof);
  check::counts_above("batch", batch, ddof);
  run_here([&] {
    for (std::size_t c = 0; c < batch.size(); ++c) {
      if (batch[c].count == 0) continue;
      running_mean[c] = blended(running_mean[c], batch[c].mean, update_rate);
      running_var[c] = blended(running_var[c], variance_of(batch[c], ddof).hi, update_rate);
    }
  });
}

template <class T>
void batch_norm(std::span<const T> x, const Call<T>& call, std::span<T> y, std::span<Moments> saved,
                const Options& options) {
  const DefaultFloatingPoint environment;
  CheckedCall<T> checked(call, options);
  checked.reads("x", x);
  checked.check_batch();
  checked.follow(y.data());
  checked.writes("y", y);
  checked.writes_entries("saved", saved);
  checked.run(
      [&](const PassCall<T>& part, std::int64_t at, std::int64_t entry) {
        Forward<T>{part}.batch_norm(x.data() + at, y.data() + at, saved.data() + entry / part.width);
      },
      1);
}

template <class T>
void normalize(std::span<const T> x, const Call<T>& call, ChannelValues mean, ChannelValues var, std::span<T> y,
               const Options& options) {
  const DefaultFloatingPoint environment;
  CheckedCall<T> checked(call, options);
  checked.reads("x", x);
  checked.reads_statistics(mean, var);
  checked.follow(y.data());
  checked.writes("y", y);
  Forward<T>{checked.whole()}.normalize(x.data(), {mean, var}, y.data());
}

template <class T>
void normalize(std::span<const T> x, const Call<T>& call, std::span<const Moments> moments, std::span<T> y,
               const Options& options) {
  const DefaultFloatingPoint environment;
  CheckedCall<T> checked(call, options);
  checked.reads("x", x);
  checked.reads_entries("moments", moments);
  check::counts("moments", moments);
  checked.follow(y.data());
  checked.writes("y", y);
  checked.run([&](const PassCall<T>& part, std::int64_t at, std::int64_t entry) {
    Forward<T>{part}.normalize(x.data() + at, {{}, {}, moments.data() + entry / part.width}, y.data() + at);
  });
}

template <class T>
void grad_sums(std::span<const T> dy, std::span<const T> x, const Call<T>& call, std::span<const Moments> moments,
               std::span<GradSums> out, const Options& options) {
  const DefaultFloatingPoint environment;
  CheckedCall<T> checked(call, options);
  checked.reads("dy", dy);
  checked.reads("x", x);
  checked.reads_entries("moments", moments);
  check::counts("moments", moments);
  checked.let_through();
  checked.writes_entries("out", out);
  checked.run([&](const PassCall<T>& part, std::int64_t at, std::int64_t entry) {
    Backward<T>{part}.grad_sums(dy.data() + at, x.data() + at, moments.data() + entry / part.width, out.data() + entry);
  });
}

template <class T>
void grad_input(std::span<const T> dy, std::span<const T> x, const Call<T>& call, std::span<const Moments> moments,
                std::span<const GradSums> sums, std::span<T> dx, std::span<T> dresidual, const Options& options) {
  const DefaultFloatingPoint environment;
  CheckedCall<T> checked(call, options);
  checked.reads("dy", dy);
  checked.reads("x", x);
  checked.reads_counts("moments", moments);
  checked.reads_entries("sums", sums);
  checked.let_through();
  const Gradients<T> out{dx, dresidual};
  check::size("dx", dx.size(), call.problem);
  checked.writes_gradients(out);
  checked.run([&](const PassCall<T>& part, std::int64_t at, std::int64_t entry) {
    Backward<T>{part}.grad_input(dy.data() + at, x.data() + at, moments.data() + entry / part.width,
                                 sums.data() + entry, outputs(out, at));
  });
}

template <class T>
void batch_norm_backward(std::span<const T> dy, std::span<const T> x, const Call<T>& call,
                         std::span<const Moments> saved, const Gradients<T>& out, const Options& options) {
  const DefaultFloatingPoint environment;
  CheckedCall<T> checked(call, options);
  checked.reads("dy", dy);
  checked.reads("x", x);
  checked.reads_counts("saved", saved);
  checked.let_through();
  checked.writes_gradients(out);
  std::vector<double> of_gamma(checked.is_sum(out.dgamma) ? checked.entries() : 0),
      of_beta(checked.is_sum(out.dbeta) ? checked.entries() : 0);
  checked.run(
      [&](const PassCall<T>& part, std::int64_t at, std::int64_t entry) {
        FirstOutputs<T> to = outputs(out, at);
        const auto of_part = [&](std::vector<double>& all, const ChannelOutput& wanted) {
          if (all.empty()) return checked.part_of(wanted, entry, part.problem.channels);
          return checked.part_of(ChannelOutput(std::span<double>(all)), entry, part.problem.channels);
        };
        to.dgamma = of_part(of_gamma, out.dgamma);
        to.dbeta = of_part(of_beta, out.dbeta);
        Backward<T>{part}.batch_norm(dy.data() + at, x.data() + at, saved.data() + entry / part.width, to);
      },
      2);
  if (checked.is_sum(out.dgamma)) sum_over_segments(of_gamma, call.problem.channels, options.threads, out.dgamma);
  if (checked.is_sum(out.dbeta)) sum_over_segments(of_beta, call.problem.channels, options.threads, out.dbeta);
}

template <class T>
void normalize_backward(std::span<const T> dy, std::span<const T> x, const Call<T>& call, ChannelValues mean,
                        ChannelValues var, const Gradients<T>& out, const Options& options) {
  const DefaultFloatingPoint environment;
  CheckedCall<T> checked(call, options);
  checked.reads("dy", dy);
  checked.reads("x", x);
  checked.reads_statistics(mean, var);
  checked.let_through();
  checked.writes_gradients(out);
  Backward<T>{checked.whole()}.normalize(dy.data(), x.data(), {mean, var}, outputs(out, 0));
}

template <class T>
void batch_norm_jvp(std::span<const T> x_dot, std::span<const T> x, const Call<T>& call, std::span<const Moments> saved,
                    ChannelValues gamma_dot, ChannelValues beta_dot, std::span<T> y_dot, const Options& options) {
  const DefaultFloatingPoint environment;
  CheckedCall<T> checked(call, options);
  checked.reads_counts("saved", saved);
  check_jvp(checked, x_dot, x, {gamma_dot, beta_dot, {}, {}}, y_dot);
  checked.run(
      [&](const PassCall<T>& part, std::int64_t at, std::int64_t entry) {
        const Tangents along{checked.part_of(gamma_dot, entry, part.problem.channels),
                             checked.part_of(beta_dot, entry, part.problem.channels),
                             {},
                             {}};
        Backward<T>{part}.batch_norm_jvp(x_dot.data() + at, x.data() + at, saved.data() + entry / part.width, nullptr,
                                         along, y_dot.data() + at);
      },
      2);
}

template <class T>
void normalize_jvp(std::span<const T> x_dot, std::span<const T> x, const Call<T>& call, ChannelValues mean,
                   ChannelValues var, ChannelValues mean_dot, ChannelValues var_dot, ChannelValues gamma_dot,
                   ChannelValues beta_dot, std::span<T> y_dot, const Options& options) {
  const DefaultFloatingPoint environment;
  const Tangents tangents{gamma_dot, beta_dot, mean_dot, var_dot};
  CheckedCall<T> checked(call, options);
  checked.reads_statistics(mean, var);
  check_jvp(checked, x_dot, x, tangents, y_dot);
  Backward<T>{checked.whole()}.normalize_jvp(x_dot.data(), x.data(), {mean, var}, tangents, y_dot.data());
}

template <class T>
void batch_norm_double_backward(std::span<const T> v, std::span<const T> dy, std::span<const T> x, const Call<T>& call,
                                std::span<const Moments> saved, ChannelValues v_dgamma, ChannelValues v_dbeta,
                                std::span<T> ddy, std::span<T> dx, ChannelOutput dgamma, const Options& options) {
  const DefaultFloatingPoint environment;
  const Cotangents w{v_dgamma, v_dbeta};
  CheckedCall<T> checked(call, options);
  check::second_order(call);
  checked.reads_counts("saved", saved);
  check_double_backward(checked, v, dy, x, w, ddy, dx, dgamma);
  DoubleBackward<T>{checked.whole()}.batch_norm(v.data(), dy.data(), x.data(), saved.data(), w,
                                                {data_or_null(ddy), data_or_null(dx), dgamma});
}

template <class T>
void normalize_double_backward(std::span<const T> v, std::span<const T> dy, std::span<const T> x, const Call<T>& call,
                               ChannelValues mean, ChannelValues var, ChannelValues v_dgamma, ChannelValues v_dbeta,
                               std::span<T> ddy, std::span<T> dx, ChannelOutput dgamma, const Options& options) {
  const DefaultFloatingPoint environment;
  const Cotangents w{v_dgamma, v_dbeta};
  CheckedCall<T> checked(call, options);
  check::second_order(call);
  checked.reads_statistics(mean, var);
  check_double_backward(checked, v, dy, x, w, ddy, dx, dgamma);
  DoubleBackward<T>{checked.whole()}.normalize(v.data(), dy.data(), x.data(), {mean, var}, w,
                                               {data_or_null(ddy), data_or_null(dx), dgamma});
}

#define BN_INSTANTIATE(T)                                                                                              \
  template void moments(std::span<const T>, const Call<T>&, std::span<Moments>, const Options&);                       \
  template void batch_norm(std::span<const T>, const Call<T>&, std::span<T>, std::span<Moments>, const Options&);      \
  template void normalize(std::span<const T>, const Call<T>&, ChannelValues, ChannelValues, std::span<T>,              \
                          const Options&);                                                                             \
  template void normalize(std::span<const T>, const Call<T>&, std::span<const Moments>, std::span<T>, const Options&); \
  template void grad_sums(std::span<const T>, std::span<const T>, const Call<T>&, std::span<const Moments>,            \
                          std::span<GradSums>, const Options&);                                                        \
  template void grad_input(std::span<const T>, std::span<const T>, const Call<T>&, std::span<const Moments>,           \
                           std::span<const GradSums>, std::span<T>, std::span<T>, const Options&);                     \
  template void batch_norm_backward(std::span<const T>, std::span<const T>, const Call<T>&, std::span<const Moments>,  \
                                    const Gradients<T>&, const Options&);                                              \
  template void normalize_backward(std::span<const T>, std::span<const T>, const Call<T>&, ChannelValues,              \
                                   ChannelValues, const Gradients<T>&, const Options&);                                \
  template void batch_norm_jvp(std::span<const T>, std::span<const T>, const Call<T>&, std::span<const Moments>,       \
                               ChannelValues, ChannelValues, std::span<T>, const Options&);                            \
  template void normalize_jvp(std::span<const T>, std::span<const T>, const Call<T>&, ChannelValues, ChannelValues,    \
                              ChannelValues, ChannelValues, ChannelValues, ChannelValues, std::span<T>,                \
                              const Options&);                                                                         \
  template void batch_norm_double_backward(std::span<const T>, std::span<const T>, std::span<const T>, const Call<T>&, \
                                           std::span<const Moments>, ChannelValues, ChannelValues, std::span<T>,       \
                                           std::span<T>, ChannelOutput, const Options&);                               \
  template void normalize_double_backward(std::span<const T>, std::span<const T>, std::span<const T>, const Call<T>&,  \
                                          ChannelValues, ChannelValues, ChannelValues, ChannelValues, std::span<T>,    \
                                          std::span<T>, ChannelOutput, const Options&);
BN_INSTANTIATE(Float16)
BN_INSTANTIATE(BFloat16)
BN_INSTANTIATE(float)
BN_INSTANTIATE(double)
#undef BN_INSTANTIATE

}  // namespace batchnorm
