// The tensors of one case, and the calls that are measured on them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <span>
#include <type_traits>
#include <vector>

#include "batchnorm/batchnorm.hpp"
#include "copy.hpp"
#include "passes.hpp"

namespace bench {

// Where a call's output lies: in memory that earlier calls have written, or in memory that the call's own time
// includes getting (free, allocate, page faults).
enum class Out { given, fresh };

inline constexpr double kEps = 1e-5;

// n values of T from a 64-byte boundary; `bytes` covers them in whole units of 64.
template <class T>
class Buffer {
 public:
  explicit Buffer(std::size_t n) : n_(n) { renew(); }

  void renew() {
    memory_.reset();  // first, as a program would whose last result is no longer used
    memory_.reset(static_cast<T*>(std::aligned_alloc(kUnit, size_in_bytes())));
    if (memory_ == nullptr) throw std::bad_alloc();
  }
  [[nodiscard]] std::span<T> values() { return {memory_.get(), n_}; }
  [[nodiscard]] std::span<const T> values() const { return {memory_.get(), n_}; }
  [[nodiscard]] Bytes bytes() { return {reinterpret_cast<std::byte*>(memory_.get()), size_in_bytes()}; }

 private:
  static constexpr std::size_t kUnit = 64;
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  [[nodiscard]] std::size_t size_in_bytes() const { return (n_ * sizeof(T) + kUnit - 1) / kUnit * kUnit; }

  std::size_t n_;
  std::unique_ptr<T, Free> memory_;
};

template <class T>
class Tensors {
 public:
  Tensors(const batchnorm::Problem& problem, std::int64_t samples, int threads, Out out);

  // One call of the library. Those of backward type need what moments and grad_sums left; the constructor calls both.
  void run(Pass pass);
  // A yardstick: one stream in and one out, or two in and one out. It writes where the passes do.
  void move(Yardstick kind, Team& team, int threads, Stores stores);

  // Runs a pass. Throws std::runtime_error, naming the first wrong value, where a result differs from the definition
  // (plain float64 loops over every value) by more than rounding. `spoil`: first makes one result wrong, for tests.
  void verify(Pass pass, bool spoil);
  // Likewise where a yardstick did not move every byte.
  void verify(Yardstick kind, Team& team, int threads, Stores stores);

  [[nodiscard]] double megabytes() const { return static_cast<double>(problem_.size()) * sizeof(T) / 1e6; }

 private:
  // What values per channel are stored as.
  using PerChannel = std::conditional_t<sizeof(T) == sizeof(double), double, float>;
  // Per channel, in float64: what the results are held against.
  struct Definition {
    std::vector<double> mean, var, sum_dy, sum_dy_xmu;
  };
  [[nodiscard]] Definition define() const;

  // What is counted of the tensor where not all of it is, and what is known of that.
  struct Counted {
    std::vector<PerChannel> mask, weights;  // one per position
    std::vector<PerChannel> alpha;          // one per channel, of graph norm
    std::vector<std::int64_t> offsets = {0}, samples = {0};
    std::int64_t width = 1;  // channels of a group of a sample
    std::vector<batchnorm::Moments> moments, of_segments, of_groups, of_lines;
  };
  [[nodiscard]] batchnorm::Groups groups_of(Pass pass) const;
  void count_parts();
  void prepare_counted(Pass pass);
  void run_counted(Pass pass);
  void verify_counted(Pass pass, const char* name) const;

  // What a ReLU wants besides. The residual of a pass without one is empty.
  struct WithRelu {
    explicit WithRelu(const batchnorm::Problem& problem);
    Buffer<T> residual, dresidual;
    std::vector<std::uint8_t> mask;
    std::vector<batchnorm::Moments> moments;
  };
  void prepare_relu();
  void run_relu(Pass pass);
  void verify_relu(Pass pass, const char* name) const;

  void fill();
  void forget_results(Pass pass);
  void spoil_one_value(Pass pass);
  void verify_y(const char* pass, const std::vector<double>& mean, const std::vector<double>& var) const;
  void verify_dx(const char* pass) const;
  void verify_moments() const;
  void verify_grad_sums() const;
  void verify_channel_gradients() const;
  Buffer<T>& new_if_fresh(Buffer<T>& output);

  batchnorm::Problem problem_;
  std::int64_t samples_;
  batchnorm::Options options_;
  Out out_;
  Buffer<T> x_, y_, dy_, dx_;
  std::vector<PerChannel> gamma_, beta_, running_mean_, running_var_, dgamma_, dbeta_;
  std::vector<batchnorm::Moments> moments_;
  std::vector<batchnorm::GradSums> sums_;
  Definition definition_;
  std::unique_ptr<Counted> counted_;
  std::unique_ptr<WithRelu> with_relu_;
};

extern template class Tensors<batchnorm::Float16>;
extern template class Tensors<batchnorm::BFloat16>;
extern template class Tensors<float>;
extern template class Tensors<double>;

}  // namespace bench
