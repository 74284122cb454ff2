// The public functions on a device: check, plan, launch, return.
#include <algorithm>
#include <cstdint>

#include "batchnorm/cuda.hpp"
#include "check.hpp"
#include "cuda/passes.hpp"
#include "cuda/stream.hpp"

namespace batchnorm::cuda {
namespace {

// The arguments of a call: sizes, and that what is written is memory of its own.
class Checked {
 public:
  explicit Checked(const Problem& problem) : problem_(problem) {
    check::problem(problem);
    const Cut cut = make_cut(problem);  // whose pieces are counted by 32 bits (steps.cuh)
    if (std::max({cut.pieces(), single_rows(cut).pieces(), problem.channels}) > UINT32_MAX) {
      check::fail("problem must have fewer than 2^32 channels and pieces (chunks, or columns of blocks of rows), got ",
                  check::text(problem));
    }
  }

  template <class T>
  void reads(const char* name, std::span<const T> tensor) {
    check::size(name, tensor.size(), problem_);
    memories_.reads(name, std::as_bytes(tensor), true);
  }
  template <class T>
  void writes(const char* name, std::span<T> tensor) {
    check::size(name, tensor.size(), problem_);
    memories_.writes(name, std::as_bytes(tensor), true);
  }
  void reads(const char* name, const ChannelValues& values) {
    if (!values.present()) return;
    check::channels(name, values.size(), problem_.channels);
    memories_.reads(name, values.bytes());
  }
  void reads_given(const char* name, const ChannelValues& values) {
    check::given(name, values, problem_.channels);
    memories_.reads(name, values.bytes());
  }
  void writes(const char* name, const ChannelOutput& values) {
    if (!values.wanted()) return;
    check::channels(name, values.size(), problem_.channels);
    memories_.writes(name, values.bytes());
  }
  // What is empty is not wanted.
  template <class T>
  void writes_gradients(std::span<T> dx, const ChannelOutput& dgamma, const ChannelOutput& dbeta) {
    if (!dx.empty()) writes("dx", dx);
    writes("dgamma", dgamma);
    writes("dbeta", dbeta);
  }
  template <class V>
  void reads_each(const char* name, std::span<const V> values) {
    check::channels(name, values.size(), problem_.channels);
    memories_.reads(name, std::as_bytes(values));
  }
  template <class V>
  void writes_each(const char* name, std::span<V> values) {
    check::channels(name, values.size(), problem_.channels);
    memories_.writes(name, std::as_bytes(values));
  }

 private:
  Problem problem_;
  check::Memories memories_;
};

// Memory of the device, given back in the stream's order.
class Lent {
 public:
  Lent(Stream& stream, std::size_t bytes) : stream_(stream), memory_(bytes == 0 ? nullptr : stream.allocate(bytes)) {}
  ~Lent() {
    if (memory_ != nullptr) stream_.free(memory_);
  }
  Lent(const Lent&) = delete;
  Lent& operator=(const Lent&) = delete;
  [[nodiscard]] std::byte* get() const { return memory_; }

 private:
  Stream& stream_;
  std::byte* memory_;
};

// f(Passes) with memory to work in.
template <class T, class F>
void with_passes(const Problem& problem, const Options& options, const F& f) {
  if (problem.channels == 0) return;
  Stream stream(options.stream);
  const Lent memory(stream, Passes<T, Stream>::bytes(problem));
  Passes<T, Stream> passes(stream, problem, memory.get());
  f(passes);
}

template <class... P>
bool begin_vectors(const P*... tensors) {
  return ((reinterpret_cast<std::uintptr_t>(tensors) % 16 == 0) && ...);
}
// Whether a Pass that holds channels (planar.cuh) was launched: they fit into the device.
template <class Pass>
bool run_held(const Problem& problem, const Options& options, const Pass& pass, bool aligned) {
  if (problem.size() == 0) return false;
  Stream stream(options.stream);
  auto plan = plan_resident<typename Pass::Value, Pass::kInputs>(problem, Stream::device(), aligned);
  if (!plan) return false;
  const auto sums = Workspace::bytes_for<kernels::Sums>(plan->kept_sums());
  const auto counts = plan->through_memory ? Workspace::bytes_for<unsigned>(plan->spans) : 0;
  const Lent memory(stream, sums + counts);
  if (plan->through_memory) {
    Workspace workspace(memory.get());
    plan->span.sums = workspace.take<kernels::Sums>(plan->kept_sums());
    plan->span.count = workspace.take<unsigned>(plan->spans);
    stream.zero(plan->span.count, counts);
  }
  stream.launch_held(*plan, pass);
  return true;
}

}  // namespace

template <class T>
void moments(std::span<const T> x, const Problem& problem, std::span<Moments> out, const Options& options) {
  Checked checked(problem);
  checked.reads("x", x);
  checked.writes_each("out", out);
  with_passes<T>(problem, options, [&](auto& passes) { passes.moments(x.data(), out.data()); });
}

template <class T>
void batch_norm(std::span<const T> x, const Problem& problem, ChannelValues gamma, ChannelValues beta, double eps,
                std::span<T> y, std::span<Moments> saved, const Options& options) {
  Checked checked(problem);
  check::eps(eps);
  check::batch_values(problem);
  checked.reads("x", x);
  checked.reads("gamma", gamma);
  checked.reads("beta", beta);
  checked.writes("y", y);
  checked.writes_each("saved", saved);
  const Forward<T> pass{x.data(), y.data(), gamma, beta, eps, saved.data()};
  if (run_held(problem, options, pass, begin_vectors(x.data(), y.data()))) return;
  with_passes<T>(problem, options,
                 [&](auto& passes) { passes.batch_norm(x.data(), gamma, beta, eps, y.data(), saved.data()); });
}

template <class T>
void normalize(std::span<const T> x, const Problem& problem, ChannelValues mean, ChannelValues var, ChannelValues gamma,
               ChannelValues beta, double eps, std::span<T> y, const Options& options) {
  Checked checked(problem);
  check::eps(eps);
  checked.reads("x", x);
  checked.reads_given("mean", mean);
  checked.reads_given("var", var);
  checked.reads("gamma", gamma);
  checked.reads("beta", beta);
  checked.writes("y", y);
  with_passes<T>(problem, options,
                 [&](auto& passes) { passes.normalize(x.data(), {nullptr, mean, var}, gamma, beta, eps, y.data()); });
}

template <class T>
void normalize(std::span<const T> x, const Problem& problem, std::span<const Moments> moments, ChannelValues gamma,
               ChannelValues beta, double eps, std::span<T> y, const Options& options) {
  Checked checked(problem);
  check::eps(eps);
  checked.reads("x", x);
  checked.reads_each("moments", moments);
  checked.reads("gamma", gamma);
  checked.reads("beta", beta);
  checked.writes("y", y);
  with_passes<T>(problem, options, [&](auto& passes) {
    passes.normalize(x.data(), {moments.data(), {}, {}}, gamma, beta, eps, y.data());
  });
}

template <class T>
void grad_sums(std::span<const T> dy, std::span<const T> x, const Problem& problem, std::span<const Moments> moments,
               std::span<GradSums> out, const Options& options) {
  Checked checked(problem);
  checked.reads("dy", dy);
  checked.reads("x", x);
  checked.reads_each("moments", moments);
  checked.writes_each("out", out);
  with_passes<T>(problem, options,
                 [&](auto& passes) { passes.grad_sums(dy.data(), x.data(), moments.data(), out.data()); });
}

template <class T>
void grad_input(std::span<const T> dy, std::span<const T> x, const Problem& problem, std::span<const Moments> moments,
                std::span<const GradSums> sums, ChannelValues gamma, double eps, std::span<T> dx,
                const Options& options) {
  Checked checked(problem);
  check::eps(eps);
  checked.reads("dy", dy);
  checked.reads("x", x);
  checked.reads_each("moments", moments);
  checked.reads_each("sums", sums);
  checked.reads("gamma", gamma);
  checked.writes("dx", dx);
  with_passes<T>(problem, options, [&](auto& passes) {
    passes.grad_input(dy.data(), x.data(), moments.data(), sums.data(), gamma, eps, dx.data());
  });
}

template <class T>
void batch_norm_backward(std::span<const T> dy, std::span<const T> x, const Problem& problem,
                         std::span<const Moments> saved, ChannelValues gamma, double eps, std::span<T> dx,
                         ChannelOutput dgamma, ChannelOutput dbeta, const Options& options) {
  Checked checked(problem);
  check::eps(eps);
  checked.reads("dy", dy);
  checked.reads("x", x);
  checked.reads_each("saved", saved);
  checked.reads("gamma", gamma);
  checked.writes_gradients(dx, dgamma, dbeta);
  const Backward<T> pass{dy.data(), x.data(), dx.data(), saved.data(), gamma, eps, dgamma, dbeta};
  if (!dx.empty() && run_held(problem, options, pass, begin_vectors(dy.data(), x.data(), dx.data()))) return;
  with_passes<T>(problem, options, [&](auto& passes) {
    passes.backward(dy.data(), x.data(), saved.data(), gamma, eps, dx.empty() ? nullptr : dx.data(), dgamma, dbeta);
  });
}

template <class T>
void normalize_backward(std::span<const T> dy, std::span<const T> x, const Problem& problem, ChannelValues mean,
                        ChannelValues var, ChannelValues gamma, double eps, std::span<T> dx, ChannelOutput dgamma,
                        ChannelOutput dbeta, const Options& options) {
  Checked checked(problem);
  check::eps(eps);
  checked.reads("dy", dy);
  checked.reads("x", x);
  checked.reads_given("mean", mean);
  checked.reads_given("var", var);
  checked.reads("gamma", gamma);
  checked.writes_gradients(dx, dgamma, dbeta);
  with_passes<T>(problem, options, [&](auto& passes) {
    passes.normalize_backward(dy.data(), x.data(), mean, var, gamma, eps, dx.empty() ? nullptr : dx.data(), dgamma,
                              dbeta);
  });
}

#define BN_INSTANTIATE(T)                                                                                             \
  template void moments(std::span<const T>, const Problem&, std::span<Moments>, const Options&);                      \
  template void batch_norm(std::span<const T>, const Problem&, ChannelValues, ChannelValues, double, std::span<T>,    \
                           std::span<Moments>, const Options&);                                                       \
  template void normalize(std::span<const T>, const Problem&, ChannelValues, ChannelValues, ChannelValues,            \
                          ChannelValues, double, std::span<T>, const Options&);                                       \
  template void normalize(std::span<const T>, const Problem&, std::span<const Moments>, ChannelValues, ChannelValues, \
                          double, std::span<T>, const Options&);                                                      \
  template void grad_sums(std::span<const T>, std::span<const T>, const Problem&, std::span<const Moments>,           \
                          std::span<GradSums>, const Options&);                                                       \
  template void grad_input(std::span<const T>, std::span<const T>, const Problem&, std::span<const Moments>,          \
                           std::span<const GradSums>, ChannelValues, double, std::span<T>, const Options&);           \
  template void batch_norm_backward(std::span<const T>, std::span<const T>, const Problem&, std::span<const Moments>, \
                                    ChannelValues, double, std::span<T>, ChannelOutput, ChannelOutput,                \
                                    const Options&);                                                                  \
  template void normalize_backward(std::span<const T>, std::span<const T>, const Problem&, ChannelValues,             \
                                   ChannelValues, ChannelValues, double, std::span<T>, ChannelOutput, ChannelOutput,  \
                                   const Options&);
BN_INSTANTIATE(Float16)
BN_INSTANTIATE(BFloat16)
BN_INSTANTIATE(float)
BN_INSTANTIATE(double)
#undef BN_INSTANTIATE

}  // namespace batchnorm::cuda
