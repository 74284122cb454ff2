#include "device.hpp"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <span>
#include <stdexcept>

#include "batchnorm/batchnorm.hpp"
#include "batchnorm/cuda.hpp"
#include "tensors.hpp"

namespace bench {
namespace {

using batchnorm::Call;
using batchnorm::Moments;

void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + " failed: " + cudaGetErrorString(status));
}

// Values in memory of the device.
template <class V>
class OnDevice {
 public:
  explicit OnDevice(std::size_t count) : count_(count) {
    void* memory = nullptr;
    check(cudaMalloc(&memory, std::max<std::size_t>(count, 1) * sizeof(V)), "asking for memory of the device");
    memory_.reset(static_cast<V*>(memory));
    check(cudaMemset(memory, 0xFF, count * sizeof(V)), "filling memory");  // NaN
  }
  explicit OnDevice(const std::vector<V>& values) : OnDevice(values.size()) {
    check(cudaMemcpy(memory_.get(), values.data(), count_ * sizeof(V), cudaMemcpyHostToDevice), "copying");
  }
  [[nodiscard]] std::span<V> values() const { return {memory_.get(), count_}; }
  [[nodiscard]] std::vector<V> on_host() const {
    std::vector<V> values(count_);
    check(cudaMemcpy(values.data(), memory_.get(), count_ * sizeof(V), cudaMemcpyDeviceToHost), "copying");
    return values;
  }

 private:
  struct Free {
    void operator()(V* p) const { static_cast<void>(cudaFree(p)); }
  };
  std::size_t count_;
  std::unique_ptr<V, Free> memory_;
};

template <class T>
std::vector<T> normals(std::size_t count, unsigned seed) {
  std::minstd_rand random(seed);
  std::normal_distribution<float> normal(0.5F, 1);
  std::vector<T> values(count);
  // A million values again and again: their order is what costs time, not their number.
  constexpr std::size_t kDrawn = 1 << 20;
  for (std::size_t i = 0; i < std::min(count, kDrawn); ++i) values[i] = static_cast<T>(normal(random));
  for (std::size_t i = kDrawn; i < count; ++i) values[i] = values[i - kDrawn];
  return values;
}

bool follows(Pass pass) { return is_relu(pass); }
bool adds(Pass pass) {
  return pass == Pass::train_add_relu || pass == Pass::infer_add_relu || pass == Pass::backward_add_relu;
}
bool is_of_lines(Pass pass) { return pass >= Pass::train_lines && pass <= Pass::backward_rms; }
bool infers(Pass pass) { return pass == Pass::infer || pass == Pass::infer_relu || pass == Pass::infer_add_relu; }

// The tensors of a case, and a pass on them: on the CPU, whose arrays `Array` has, or on the device.
template <class T, template <class> class Array>
struct Tensors {
  using PerChannel = std::conditional_t<sizeof(T) == sizeof(double), double, float>;
  batchnorm::Problem problem;
  Array<T> x, dy, residual, y, dx, dresidual;
  Array<PerChannel> gamma, beta, mean, var, dgamma, dbeta;
  Array<Moments> saved;
  Array<std::uint8_t> bits;
};

template <class T>
class CaseOnDevice {
  template <class V>
  using Host = std::vector<V>;
  using HostTensors = Tensors<T, Host>;
  using DeviceTensors = Tensors<T, OnDevice>;
  using PerChannel = typename HostTensors::PerChannel;

 public:
  explicit CaseOnDevice(const batchnorm::Problem& problem)
      : host_(on_host(problem)),
        device_{problem,
                OnDevice<T>(host_.x),
                OnDevice<T>(host_.dy),
                OnDevice<T>(host_.residual),
                OnDevice<T>(host_.y),
                OnDevice<T>(host_.dx),
                OnDevice<T>(host_.dresidual),
                OnDevice<PerChannel>(host_.gamma),
                OnDevice<PerChannel>(host_.beta),
                OnDevice<PerChannel>(host_.mean),
                OnDevice<PerChannel>(host_.var),
                OnDevice<PerChannel>(host_.dgamma),
                OnDevice<PerChannel>(host_.dbeta),
                OnDevice<Moments>(host_.saved),
                OnDevice<std::uint8_t>(host_.bits)} {}

  // One call on the device.
  void run(Pass pass) { run_with<true>(pass, device_); }
  // Runs on both, training before what needs its results, and compares.
  void verify(Pass pass) {
    const Pass before = training_of(pass);
    run_with<false>(before, host_), run(before);
    run_with<false>(pass, host_), run(pass);
    check(cudaDeviceSynchronize(), name_of(pass));
    const bool gradients = writes_dx(pass);
    require_same(pass, gradients ? "dx" : "y", gradients ? host_.dx : host_.y,
                 (gradients ? device_.dx : device_.y).on_host());
    if (gradients) require_same(pass, "dgamma", host_.dgamma, device_.dgamma.on_host());
    if (pass == Pass::backward_add_relu) require_same(pass, "dresidual", host_.dresidual, device_.dresidual.on_host());
  }
  [[nodiscard]] double planned_bytes(Pass pass) {
    const auto call = call_of(pass, device_);
    const double n = static_cast<double>(host_.x.size()) * sizeof(T);
    if (infers(pass)) return n * facts_of(pass).tensors;
    return writes_dx(pass) ? batchnorm::cuda::plan_batch_norm_backward(call).bytes
                           : batchnorm::cuda::plan_batch_norm(call).bytes;
  }

 private:
  static HostTensors on_host(const batchnorm::Problem& p) {
    const auto n = static_cast<std::size_t>(p.size()), channels = static_cast<std::size_t>(p.channels);
    const auto per_channel = [&](unsigned seed) { return normals<PerChannel>(channels, seed); };
    return {p,
            normals<T>(n, 1),
            normals<T>(n, 2),
            normals<T>(n, 3),
            Host<T>(n),
            Host<T>(n),
            Host<T>(n),
            per_channel(4),
            per_channel(5),
            per_channel(6),
            Host<PerChannel>(channels, 2),
            per_channel(7),
            per_channel(8),
            Host<Moments>(std::max(channels, static_cast<std::size_t>(p.count()))),
            Host<std::uint8_t>(static_cast<std::size_t>(batchnorm::relu_mask_bytes(p)))};
  }
  static Pass training_of(Pass pass) {
    if (pass == Pass::backward_lines) return Pass::train_lines;
    if (pass == Pass::backward_rms) return Pass::train_rms;
    if (pass == Pass::backward_relu) return Pass::train_relu;
    return pass == Pass::backward_add_relu ? Pass::train_add_relu : Pass::train;
  }
  template <class V>
  static std::span<V> span(std::vector<V>& v) {
    return v;
  }
  template <class V>
  static std::span<V> span(const OnDevice<V>& v) {
    return v.values();
  }
  template <class Of>
  static Call<T> call_of(Pass pass, Of& t) {
    Call<T> call{.problem = t.problem, .gamma = span(t.gamma), .beta = span(t.beta), .eps = kEps};
    if (is_of_lines(pass)) {
      call.groups.width = t.problem.channels, call.groups.each_position = true;
      const bool rms = pass == Pass::train_rms || pass == Pass::backward_rms;
      call.groups.about = rms ? batchnorm::About::zero : batchnorm::About::mean;
    }
    if (follows(pass)) call.tail.relu = true;
    if (follows(pass) && !infers(pass)) call.tail.bits = span(t.bits);
    if (adds(pass)) call.tail.residual = span(t.residual);
    return call;
  }
  template <bool kOnDevice, class Of>
  static void run_with(Pass pass, Of& t) {
    namespace bn = batchnorm;
    const Call<T> call = call_of(pass, t);
    const std::span<const T> x = span(t.x), dy = span(t.dy);
    const std::size_t entries = static_cast<std::size_t>(is_of_lines(pass) ? t.problem.count() : t.problem.channels);
    const std::span<Moments> saved = span(t.saved).first(entries);
    const std::span<T> residual = pass == Pass::backward_add_relu ? span(t.dresidual) : std::span<T>();
    const bn::Gradients<T> out{span(t.dx), residual, span(t.dgamma), span(t.dbeta)};
    const bn::ChannelValues mean = span(t.mean), var = span(t.var);
    if constexpr (kOnDevice) {
      if (infers(pass)) return bn::cuda::normalize<T>(x, call, mean, var, span(t.y));
      if (writes_dx(pass)) return bn::cuda::batch_norm_backward<T>(dy, x, call, saved, out);
      bn::cuda::batch_norm<T>(x, call, span(t.y), saved);
    } else {
      if (infers(pass)) return bn::normalize<T>(x, call, mean, var, span(t.y));
      if (writes_dx(pass)) return bn::batch_norm_backward<T>(dy, x, call, saved, out);
      bn::batch_norm<T>(x, call, span(t.y), saved);
    }
  }
  template <class V>
  static void require_same(Pass pass, const char* what, const std::vector<V>& wanted, const std::vector<V>& got) {
    for (std::size_t at = 0; at < wanted.size(); ++at) {
      if (std::memcmp(&wanted[at], &got[at], sizeof(V)) == 0) continue;
      throw std::runtime_error(std::string(name_of(pass)) + " is wrong: " + what + "[" + std::to_string(at) +
                               "] has other bits than on the CPU");
    }
  }

  HostTensors host_;
  DeviceTensors device_;
};

// Seconds of works on the default stream, with nothing of theirs in the second-level cache.
class ColdTimer {
 public:
  ColdTimer() : other_(kFlushed) {
    check(cudaEventCreate(&begin_), "making an event");
    check(cudaEventCreate(&end_), "making an event");
  }
  ~ColdTimer() {
    static_cast<void>(cudaEventDestroy(begin_));
    static_cast<void>(cudaEventDestroy(end_));
  }
  ColdTimer(const ColdTimer&) = delete;
  ColdTimer& operator=(const ColdTimer&) = delete;

  double time(const std::function<void()>& work) {
    // Longer than it takes to launch what follows.
    check(cudaMemsetAsync(other_.values().data(), 0, kFlushed, nullptr), "clearing the caches");
    check(cudaEventRecord(begin_, nullptr), "recording an event");
    work();
    check(cudaEventRecord(end_, nullptr), "recording an event");
    check(cudaEventSynchronize(end_), "waiting for the device");
    float milliseconds = 0;
    check(cudaEventElapsedTime(&milliseconds, begin_, end_), "reading the time");
    return static_cast<double>(milliseconds) / 1e3;
  }

 private:
  static constexpr std::size_t kFlushed = std::size_t{512} << 20;  // several times the largest cache there is
  OnDevice<std::byte> other_;
  cudaEvent_t begin_ = nullptr, end_ = nullptr;
};

}  // namespace

bool is_on_device(Pass pass) {
  return pass == Pass::train || pass == Pass::infer || pass == Pass::backward || is_of_lines(pass) || is_relu(pass);
}

std::string device_name() {
  static_cast<void>(batchnorm::cuda::plan_batch_norm<float>({.problem = {2, 1, 1}}));  // says what is missing
  cudaDeviceProp properties{};
  int number = 0;
  check(cudaGetDevice(&number), "asking for the current device");
  check(cudaGetDeviceProperties(&properties, number), "asking for the device's name");
  return std::string(properties.name) + ", " + std::to_string(properties.multiProcessorCount) + " multiprocessors";
}

template <class T>
Measured measure_on_device(const Case& shape, Layout layout, const Request& request) {
  CaseOnDevice<T> tensors(problem_of(shape.shape, layout));
  ColdTimer timer;
  Measured measured{{}, false, 0};
  for (const PassFacts& p : request.passes) {
    tensors.verify(p.pass);
    const double bytes = tensors.planned_bytes(p.pass);
    const auto half = static_cast<std::size_t>(bytes / 2);
    const OnDevice<std::byte> from(half), to(half);
    const auto copy = [&] {
      check(cudaMemcpyAsync(to.values().data(), from.values().data(), half, cudaMemcpyDeviceToDevice, nullptr),
            "copying");
    };
    Samples seconds, copies, ratios;
    for (int round = -3; round < request.rounds; ++round) {
      const double of_copy = timer.time(copy), of_pass = timer.time([&] { tensors.run(p.pass); });
      if (round < 0) continue;
      seconds.push_back(of_pass), copies.push_back(of_copy), ratios.push_back(of_pass / of_copy);
    }
    measured.rows.push_back(
        {p.name, bytes, spread_of(seconds), spread_of(ratios), "copy of the planned bytes", spread_of(copies).median});
  }
  return measured;
}

template Measured measure_on_device<batchnorm::Float16>(const Case&, Layout, const Request&);
template Measured measure_on_device<batchnorm::BFloat16>(const Case&, Layout, const Request&);
template Measured measure_on_device<float>(const Case&, Layout, const Request&);
template Measured measure_on_device<double>(const Case&, Layout, const Request&);

}  // namespace bench
