// The passes that api.cpp runs once arguments are checked, over a call or one of its segments. Pointers may be null
// where the comment says so.
#pragma once

#include <cstddef>

#include "batchnorm/call.hpp"
#include "counted.hpp"
#include "dispatch.hpp"
#include "kernels/table.hpp"
#include "plan.hpp"

namespace batchnorm {

// The bits of a ReLU begin behind this many bytes, of which the first says by how many bits the first element is behind
// them.
constexpr std::int64_t kBitsHead = 8;

// How many values behind the begin of a vector's line p lies.
template <class T>
std::int64_t values_past_line(const T* p) {
  return static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(p) / sizeof(T)) % kernels::kVectorColumns;
}

// How a pass is run, which changes no bit: as a call of its own, or for a segment or a tile of a larger one.
struct PassOptions {
  int threads = 0;  // as in Options
  // Values of the whole tensor, whose segments are worked on one after the other; 0: this is all of it.
  std::int64_t whole_size = 0;
  std::byte* memory = nullptr;    // what the larger call has for the pass to work in; null: it sees to that itself
  bool is_turned = false;         // whether it is a tile of lines (short_runs.hpp)
  std::size_t* needed = nullptr;  // where not null, the pass raises this to the memory that it needs, and does no more
};

// A call as the passes read it: all of it, or one segment, or a tile of lines.
template <class T>
struct PassCall {
  Problem problem;
  std::int64_t width = 1;      // channels that share their statistics (grouped.hpp)
  bool strided = false;        // whether these are not neighbours
  bool each_position = false;  // whether these are of each position by itself (positionwise.hpp)
  bool about_zero = false;     // whether the mean is taken to be 0
  ChannelValues alpha = {};    // or times this
  // Channels of such a group, each by itself: the moments are the group's, about which y may hardly be spread, and the
  // sums that grad_input is given are its terms: sum_dy the shift, sum_dy_xmu the factor of x - mean.
  bool is_shared = false;
  Positions<T> positions = {};
  WeightSummary summary = {};  // of the weights of these positions
  Padding padding = Padding::normalize;
  ChannelValues gamma = {}, beta = {};
  double eps = 0;
  kernels::Tail<T> tail = {};  // whose residual and first bit are those of the first value here
  // Forward with bits: where in their first byte they begin is for the pass to choose, and to write.
  std::uint8_t* bits_head = nullptr;
  PassOptions options = {};

  // Whether statistics are other than those of a channel (grouped.hpp).
  [[nodiscard]] bool is_grouped() const { return width > 1 || about_zero || alpha.present(); }
  // What the values of a channel weigh together.
  [[nodiscard]] DoubleDouble count() const {
    return positions ? summary.total : DoubleDouble{static_cast<double>(problem.count()), 0};
  }
  // What a pass that goes through so many tensors does to them.
  [[nodiscard]] Work work(bool reduces, bool applies, int streams) const {
    return {reduces, applies, streams, sizeof(T), options.whole_size, options.is_turned};
  }
  void write_head(std::int64_t first_bit) const {
    if (bits_head == nullptr) return;
    std::fill_n(bits_head, kBitsHead, std::uint8_t{0});
    *bits_head = static_cast<std::uint8_t>(first_bit);
  }
};

// Statistics that are given, not computed: mean and var, or moments.
struct GivenStatistics {
  ChannelValues mean, var;
  const Moments* moments = nullptr;  // where not null, instead of mean and var
  bool only_scale = false;           // y = gamma*rstd*x: what normalize's gradient does to dy
};

// Tangents of the values of channels; 0 where absent. mean and var are for given statistics alone.
struct Tangents {
  ChannelValues gamma, beta, mean, var;
};

// Cotangents of dgamma and dbeta; 0 where absent.
struct Cotangents {
  ChannelValues dgamma, dbeta;
};
// Gradients of the gradients: ddy and dx may be null.
template <class T>
struct SecondOutputs {
  T *ddy, *dx;
  ChannelOutput dgamma;
};
// First ones: dx and dresidual may be null.
template <class T>
struct FirstOutputs {
  T *dx = nullptr, *dresidual = nullptr;
  ChannelOutput dgamma = {}, dbeta = {};
};

// forward.cpp
template <class T>
struct Forward {
  const PassCall<T>& call;

  void moments(const T* x, Moments* out) const;
  void batch_norm(const T* x, T* y, Moments* saved) const;
  void normalize(const T* x, const GivenStatistics& given, T* y) const;
};

// backward.cpp
template <class T>
struct Backward {
  const PassCall<T>& call;

  void grad_sums(const T* dy, const T* x, const Moments* moments, GradSums* out) const;
  void grad_input(const T* dy, const T* x, const Moments* moments, const GradSums* sums,
                  const FirstOutputs<T>& out) const;
  void batch_norm(const T* dy, const T* x, const Moments* saved, const FirstOutputs<T>& out) const;
  void normalize(const T* dy, const T* x, const GivenStatistics& given, const FirstOutputs<T>& out) const;
  // Forward-mode. `sums` of x_dot and x, or null where they are to be taken.
  void tangent_sums(const T* x_dot, const T* x, const Moments* saved, GradSums* out) const;
  void batch_norm_jvp(const T* x_dot, const T* x, const Moments* saved, const GradSums* sums, const Tangents& tangents,
                      T* y_dot) const;
  void normalize_jvp(const T* x_dot, const T* x, const GivenStatistics& given, const Tangents& tangents,
                     T* y_dot) const;
};

// double_backward.cpp
template <class T>
struct DoubleBackward {
  const PassCall<T>& call;

  void batch_norm(const T* v, const T* dy, const T* x, const Moments* saved, const Cotangents& w,
                  const SecondOutputs<T>& out) const;
  void normalize(const T* v, const T* dy, const T* x, const GivenStatistics& given, const Cotangents& w,
                 const SecondOutputs<T>& out) const;
};

}  // namespace batchnorm
