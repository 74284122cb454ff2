// The public functions on a device: check, plan, launch, return.
#include <cstdint>

#include "batchnorm/cuda.hpp"
#include "cuda/call_on_device.hpp"

namespace batchnorm::cuda {
namespace {

template <class T>
T* data_or_null(std::span<T> s) {
  return s.empty() ? nullptr : s.data();
}
template <class... P>
bool begin_vectors(const P*... tensors) {
  return ((reinterpret_cast<std::uintptr_t>(tensors) % 16 == 0) && ...);
}

}  // namespace

template <class T>
void moments(std::span<const T> x, const Call<T>& call, std::span<Moments> out, const Options& options) {
  CallOnDevice<T> checked(call, options);
  checked.reads("x", x);
  checked.writes_entries("out", out);
  checked.run([&](auto& passes) { passes.moments(x.data(), out.data()); });
}

template <class T>
void batch_norm(std::span<const T> x, const Call<T>& call, std::span<T> y, std::span<Moments> saved,
                const Options& options) {
  CallOnDevice<T> checked(call, options);
  checked.reads("x", x);
  checked.check_batch();
  checked.follow();
  checked.writes("y", y);
  checked.writes_entries("saved", saved);
  const kernels::Tail<T>& tail = checked.whole().tail;
  HeldForward<T> held{x.data(), y.data(), call.gamma, call.beta, call.eps, saved.data()};
  held.residual = tail.residual, held.relu = tail.relu, held.bits = tail.bits;
  if (checked.run_held(held, begin_vectors(x.data(), y.data()))) return;
  checked.run([&](auto& passes) { passes.batch_norm(x.data(), y.data(), saved.data()); });
}

template <class T>
void normalize(std::span<const T> x, const Call<T>& call, ChannelValues mean, ChannelValues var, std::span<T> y,
               const Options& options) {
  CallOnDevice<T> checked(call, options);
  checked.reads("x", x);
  checked.reads_given(mean, var);
  checked.follow();
  checked.writes("y", y);
  checked.run_channels([&](auto& passes) { passes.normalize(x.data(), {nullptr, mean, var}, y.data()); });
}

template <class T>
void normalize(std::span<const T> x, const Call<T>& call, std::span<const Moments> moments, std::span<T> y,
               const Options& options) {
  CallOnDevice<T> checked(call, options);
  checked.reads("x", x);
  checked.reads_entries("moments", moments);
  checked.follow();
  checked.writes("y", y);
  checked.run([&](auto& passes) { passes.normalize(x.data(), {moments.data(), {}, {}}, y.data()); });
}

template <class T>
void grad_sums(std::span<const T> dy, std::span<const T> x, const Call<T>& call, std::span<const Moments> moments,
               std::span<GradSums> out, const Options& options) {
  CallOnDevice<T> checked(call, options);
  checked.reads("dy", dy);
  checked.reads("x", x);
  checked.reads_entries("moments", moments);
  checked.let_through();
  checked.writes_entries("out", out);
  checked.run([&](auto& passes) { passes.grad_sums(dy.data(), x.data(), moments.data(), out.data()); });
}

template <class T>
void grad_input(std::span<const T> dy, std::span<const T> x, const Call<T>& call, std::span<const Moments> moments,
                std::span<const GradSums> sums, std::span<T> dx, std::span<T> dresidual, const Options& options) {
  CallOnDevice<T> checked(call, options);
  checked.reads("dy", dy);
  checked.reads("x", x);
  checked.reads_entries("moments", moments);
  checked.reads_entries("sums", sums);
  checked.let_through();
  check::size("dx", dx.size(), call.problem);
  checked.writes_gradients({dx, dresidual});
  checked.run([&](auto& passes) {
    passes.grad_input(dy.data(), x.data(), moments.data(), sums.data(), {data_or_null(dx), data_or_null(dresidual)});
  });
}

template <class T>
void batch_norm_backward(std::span<const T> dy, std::span<const T> x, const Call<T>& call,
                         std::span<const Moments> saved, const Gradients<T>& out, const Options& options) {
  CallOnDevice<T> checked(call, options);
  checked.reads("dy", dy);
  checked.reads("x", x);
  checked.reads_entries("saved", saved);
  checked.let_through();
  checked.writes_gradients(out);
  checked.with_parameters(out, [&](const ChannelOutput& dgamma, const ChannelOutput& dbeta) {
    HeldBackward<T> held{dy.data(), x.data(), out.dx.data(), saved.data(), call.gamma, call.eps, dgamma, dbeta};
    held.gate.head = call.tail.relu ? call.tail.bits.data() : nullptr, held.dresidual = data_or_null(out.dresidual);
    const bool aligned = begin_vectors(dy.data(), x.data(), out.dx.data(), held.dresidual);
    if (!out.dx.empty() && checked.run_held(held, aligned)) return;
    checked.run([&](auto& passes) {
      passes.backward(dy.data(), x.data(), saved.data(),
                      {data_or_null(out.dx), data_or_null(out.dresidual), dgamma, dbeta});
    });
  });
}

template <class T>
void normalize_backward(std::span<const T> dy, std::span<const T> x, const Call<T>& call, ChannelValues mean,
                        ChannelValues var, const Gradients<T>& out, const Options& options) {
  CallOnDevice<T> checked(call, options);
  checked.reads("dy", dy);
  checked.reads("x", x);
  checked.reads_given(mean, var);
  checked.let_through();
  checked.writes_gradients(out);
  checked.run_channels([&](auto& passes) {
    passes.normalize_backward(dy.data(), x.data(), mean, var,
                              {data_or_null(out.dx), data_or_null(out.dresidual), out.dgamma, out.dbeta});
  });
}

template <class T>
Planned plan_batch_norm(const Call<T>& call, const Options& options) {
  return CallOnDevice<T>(call, options).template planned<1>();
}
template <class T>
Planned plan_batch_norm_backward(const Call<T>& call, const Options& options) {
  return CallOnDevice<T>(call, options).template planned<2>();
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
  template Planned plan_batch_norm(const Call<T>&, const Options&);                                                    \
  template Planned plan_batch_norm_backward(const Call<T>&, const Options&);
BN_INSTANTIATE(Float16)
BN_INSTANTIATE(BFloat16)
BN_INSTANTIATE(float)
BN_INSTANTIATE(double)
#undef BN_INSTANTIATE

}  // namespace batchnorm::cuda
