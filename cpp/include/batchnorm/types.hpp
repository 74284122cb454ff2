// The plain values that the library's functions take and give.
#pragma once

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <span>

namespace batchnorm {

// A dense array seen from its channel axis: element (o, c, i) lies at (o*channels + c)*inner + i.
// NCHW is {N, C, H*W}; NHWC is {N*H*W, C, 1}; (N, C) is {N, C, 1}. Any size may be 0, none may be negative,
// and the product must fit std::int64_t.
struct Problem {
  std::int64_t outer = 1;
  std::int64_t channels = 1;
  std::int64_t inner = 1;

  // Values in each channel. Only meaningful once the sizes have been checked.
  [[nodiscard]] constexpr std::int64_t count() const { return outer * inner; }
  [[nodiscard]] constexpr std::int64_t size() const { return outer * channels * inner; }
};

// What is known of one channel after looking at `count` of its values: their mean and
// m2 = sum of (x - mean)^2, each as an unevaluated sum of two float64 (the low part is what float64 cannot hold).
// count = 0 is the identity of merge(); all other fields are then 0.
struct Moments {
  double count = 0;
  double mean = 0;
  double mean_lo = 0;
  double m2 = 0;
  double m2_lo = 0;
};

// First half of the backward pass of one channel: sum of dy and sum of dy*(x - mean), high and low parts.
// The sums of several parts of a batch (threads, ranks) simply add.
struct GradSums {
  double sum_dy = 0;
  double sum_dy_lo = 0;
  double sum_dy_xmu = 0;
  double sum_dy_xmu_lo = 0;
};

// One float32 or float64 value per channel, or none at all (gamma = 1, beta = 0). Does not own its memory.
class ChannelValues {
 public:
  constexpr ChannelValues() = default;
  constexpr ChannelValues(std::span<const float> v) : f32_(v.data()), size_(v.size()), present_(true) {}
  constexpr ChannelValues(std::span<const double> v) : f64_(v.data()), size_(v.size()), present_(true) {}
  // Vectors and arrays of either.
  template <class Range>
    requires std::convertible_to<const Range&, std::span<const float>>
  constexpr ChannelValues(const Range& v) : ChannelValues(std::span<const float>(v)) {}
  template <class Range>
    requires std::convertible_to<const Range&, std::span<const double>>
  constexpr ChannelValues(const Range& v) : ChannelValues(std::span<const double>(v)) {}

  [[nodiscard]] constexpr bool present() const { return present_; }
  [[nodiscard]] constexpr std::size_t size() const { return size_; }
  // Value of channel c. Only for a present value.
  [[nodiscard]] constexpr double operator[](std::int64_t c) const {
    return f32_ != nullptr ? static_cast<double>(f32_[c]) : f64_[c];
  }
  // `count` of them from channel `first` on, rounded to the type of `to`. Only for present values.
  template <std::floating_point V>
  constexpr void copy_to(std::int64_t first, std::int64_t count, V* to) const {
    for (std::int64_t k = 0; f32_ != nullptr && k < count; ++k) to[k] = static_cast<V>(f32_[first + k]);
    for (std::int64_t k = 0; f32_ == nullptr && k < count; ++k) to[k] = static_cast<V>(f64_[first + k]);
  }
  // `count` of them from the first on.
  [[nodiscard]] constexpr ChannelValues part(std::size_t first, std::size_t count) const {
    if (!present_) return {};
    if (f32_ != nullptr) return std::span<const float>(f32_ + first, count);
    return std::span<const double>(f64_ + first, count);
  }
  // The memory that they lie in.
  [[nodiscard]] std::span<const std::byte> bytes() const {
    return f32_ != nullptr ? std::as_bytes(std::span(f32_, size_)) : std::as_bytes(std::span(f64_, size_));
  }
  // Value of channel c, or `absent` where the caller gave none.
  [[nodiscard]] constexpr double value_or(std::int64_t c, double absent) const {
    return present_ ? (*this)[c] : absent;
  }

 private:
  const float* f32_ = nullptr;
  const double* f64_ = nullptr;
  std::size_t size_ = 0;
  bool present_ = false;
};

// Where one float32 or float64 value per channel goes, or {} where it is not wanted.
class ChannelOutput {
 public:
  constexpr ChannelOutput() = default;
  constexpr ChannelOutput(std::span<float> v) : f32_(v.data()), size_(v.size()), wanted_(true) {}
  constexpr ChannelOutput(std::span<double> v) : f64_(v.data()), size_(v.size()), wanted_(true) {}
  // Vectors and arrays of either.
  template <class Range>
    requires std::convertible_to<Range&, std::span<float>>
  constexpr ChannelOutput(Range& v) : ChannelOutput(std::span<float>(v)) {}
  template <class Range>
    requires std::convertible_to<Range&, std::span<double>>
  constexpr ChannelOutput(Range& v) : ChannelOutput(std::span<double>(v)) {}

  [[nodiscard]] constexpr bool wanted() const { return wanted_; }
  [[nodiscard]] constexpr std::size_t size() const { return size_; }
  // `count` of them from the first on.
  [[nodiscard]] constexpr ChannelOutput part(std::size_t first, std::size_t count) const {
    if (!wanted_) return {};
    if (f32_ != nullptr) return std::span<float>(f32_ + first, count);
    return std::span<double>(f64_ + first, count);
  }
  // The memory that they go to.
  [[nodiscard]] std::span<const std::byte> bytes() const {
    return f32_ != nullptr ? std::as_bytes(std::span(f32_, size_)) : std::as_bytes(std::span(f64_, size_));
  }
  // Rounds to the type of the output; does nothing where none is wanted.
  constexpr void set(std::int64_t c, double value) const {
    if (f32_ != nullptr) f32_[c] = static_cast<float>(value);
    if (f64_ != nullptr) f64_[c] = value;
  }
  // `count` of them from channel `first` on.
  constexpr void set(std::int64_t first, std::int64_t count, const double* values) const {
    for (std::int64_t k = 0; f32_ != nullptr && k < count; ++k) f32_[first + k] = static_cast<float>(values[k]);
    for (std::int64_t k = 0; f64_ != nullptr && k < count; ++k) f64_[first + k] = values[k];
  }

 private:
  float* f32_ = nullptr;
  double* f64_ = nullptr;
  std::size_t size_ = 0;
  bool wanted_ = false;
};

// How to run a call; what it computes does not depend on it: the bits are the same for any number of threads.
struct Options {
  // Threads to use at most; 0 means set_num_threads(), else OMP_NUM_THREADS, else the machine's.
  // 1: the calling thread alone.
  int threads = 0;
};

}  // namespace batchnorm
