// The public functions on a device: check, plan, launch, return.
#include <algorithm>
#include <cstdint>
#include <exception>

#include "batchnorm/cuda.hpp"
#include "cuda/call_on_device.hpp"
#include "cuda/statistics.cuh"
#include "cuda/strided.cuh"

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

unsigned blocks_of(std::int64_t threads, std::int64_t most = INT32_MAX) {
  const std::int64_t blocks = (threads + kStepThreads - 1) / kStepThreads;
  if (blocks > INT32_MAX) check::fail("an array must have fewer than 2^31 blocks of values, got ", blocks);
  return static_cast<unsigned>(std::min(blocks, most));
}

// What copy_strided() reads.
struct Views {
  std::int64_t count = 1;
  int dimensions = 0;
  Element from_element, to_element;
  const std::byte* from = nullptr;
  std::byte* to = nullptr;
  std::int64_t sizes[8] = {}, from_strides[8] = {}, to_strides[8] = {};
};

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

int count_devices() { return Stream::count_devices(); }
std::string describe_device(int device) { return Stream::describe_device(device); }
int device_of(const void* memory) { return Stream::device_of(memory); }
int set_device(int device) { return Stream::set_device(device); }
void* allocate(std::size_t bytes, const Options& options) { return Stream(options.stream).allocate(bytes); }
void release(void* memory, const Options& options) noexcept {
  try {
    Stream(options.stream).free(static_cast<std::byte*>(memory));
  } catch (const std::exception&) {  // the process ends, and takes its memory with it
  }
}
void copy_to_host(void* to, const void* from, std::size_t bytes, const Options& options) {
  if (bytes > 0) Stream(options.stream).copy_to_host(to, from, bytes);
}
void copy_to_device(void* to, const void* from, std::size_t bytes, const Options& options) {
  if (bytes > 0) Stream(options.stream).copy_to_device(to, from, bytes);
}
void* mark(const Options& options) { return Stream(options.stream).mark(); }
bool is_past(void* mark) { return Stream::is_past(mark); }
void wait_for(void* other, const Options& options) { Stream(options.stream).wait_for(other); }

template <class T>
Planned plan_batch_norm(const Call<T>& call, const Options& options) {
  return CallOnDevice<T>(call, options).template planned<1>();
}
template <class T>
Planned plan_batch_norm_backward(const Call<T>& call, const Options& options) {
  return CallOnDevice<T>(call, options).template planned<2>();
}

void update_running(std::span<const double> mean, std::span<const double> var, std::span<const Moments> batch,
                    double update_rate, int ddof, bool only_finite, std::span<double> to_mean, std::span<double> to_var,
                    const Options& options) {
  const auto channels = static_cast<std::int64_t>(batch.size());
  check::channels("mean", mean.size(), channels);
  check::channels("var", var.size(), channels);
  check::channels("to_mean", to_mean.size(), channels);
  check::channels("to_var", to_var.size(), channels);
  check::update_rate(update_rate);
  check::ddof(ddof);
  if (channels == 0) return;
  Stream stream(options.stream);
  const Running of{channels, mean.data(), var.data(),     batch.data(), update_rate,
                   ddof,     only_finite, to_mean.data(), to_var.data()};
  stream.launch(update_statistics<Running>, blocks_of(channels, kMostBlocksThatLook), kStepThreads,
                std::int64_t{sizeof(unsigned)}, of);
}

void pool(std::span<const Moments> pooled, std::span<const Moments> batch, int ddof, bool only_finite,
          std::span<Moments> to, std::span<double> mean, std::span<double> var, const Options& options) {
  const auto channels = static_cast<std::int64_t>(batch.size());
  check::channels("pooled", pooled.size(), channels);
  check::channels("to", to.size(), channels);
  check::channels("mean", mean.size(), channels);
  check::channels("var", var.size(), channels);
  check::ddof(ddof);
  if (channels == 0) return;
  Stream stream(options.stream);
  const Pooling of{channels, pooled.data(), batch.data(), ddof, only_finite, to.data(), mean.data(), var.data()};
  // Where some look at all that is pooled, none may have written yet: one block does both.
  const bool in_place = only_finite && pooled.data() == to.data();
  stream.launch(pool_moments<Pooling>, blocks_of(channels, in_place ? 1 : kMostBlocksThatLook), kStepThreads,
                std::int64_t{sizeof(unsigned)}, of);
}

void combine(ChannelOutput to, std::span<const double> a, std::span<const double> x, std::span<const double> b,
             std::span<const double> y, const Options& options) {
  const auto channels = static_cast<std::int64_t>(to.size());
  if (channels == 0) return;
  const std::int64_t sets = static_cast<std::int64_t>(x.size()) / channels;
  check::channels("x", x.size(), sets * channels);
  if (!a.empty()) check::channels("a", a.size(), sets * channels);
  if (!b.empty() || !y.empty()) {
    check::channels("b", b.size(), sets * channels);
    check::channels("y", y.size(), sets * channels);
  }
  Stream stream(options.stream);
  stream.launch(combine_sets<Combined>, blocks_of(channels), kStepThreads, std::int64_t{0},
                Combined{channels, sets, data_or_null(a), x.data(), data_or_null(b), data_or_null(y), to});
}

void lay_out(const View& from, const View& to, bool as_flags, const Options& options) {
  const std::size_t dimensions = from.sizes.size();
  if (dimensions > 8) check::fail("an array must have at most 8 dimensions, got ", dimensions);
  if (!std::ranges::equal(from.sizes, to.sizes) || from.strides.size() != dimensions ||
      to.strides.size() != dimensions) {
    check::fail("arrays must have the same sizes and a stride for each, got ", dimensions, " and ", to.sizes.size());
  }
  Views views{.dimensions = static_cast<int>(dimensions), .from_element = from.element, .to_element = to.element};
  views.from = static_cast<const std::byte*>(from.data), views.to = static_cast<std::byte*>(to.data);
  for (std::size_t d = 0; d < dimensions; ++d) {
    views.count *= views.sizes[d] = from.sizes[d];
    views.from_strides[d] = from.strides[d], views.to_strides[d] = to.strides[d];
  }
  if (views.count == 0) return;
  Stream stream(options.stream);
  stream.launch(copy_strided<Views>, blocks_of(views.count), kStepThreads, std::int64_t{0}, views, as_flags);
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
