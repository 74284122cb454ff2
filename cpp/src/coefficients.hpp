// The coefficients of every channel, and, for interleaved tensors, laid out per column as the kernels want them.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cstring>

#include "channel_math.hpp"
#include "parallel.hpp"
#include "plan.hpp"
#include "workspace.hpp"

namespace batchnorm {

// Map is kernels::Affine (normalize) or kernels::GradAffine (grad_input); their fields become one array each.
template <class T, template <class> class Map>
class CoefficientTable {
 public:
  static std::size_t bytes(const Plan& plan) {
    const std::size_t channels = Workspace::bytes_for<Coefficients<T, Map>>(plan.problem.channels);
    if (plan.planar()) return channels;
    return channels + Workspace::bytes_for<T>(kFields * plan.columns) +
           Workspace::bytes_for<double>(kFields * plan.columns) + Workspace::bytes_for<std::uint16_t>(groups(plan));
  }
  CoefficientTable(const Plan& plan, Workspace& workspace)
      : plan_(plan), channels_(workspace.take<Coefficients<T, Map>>(plan.problem.channels)) {
    if (plan.planar()) return;
    narrow_ = workspace.take<T>(kFields * plan.columns);
    wide_ = workspace.take<double>(kFields * plan.columns);
    mask_ = workspace.take<std::uint16_t>(groups(plan));
  }

  // One entry per channel, written by whoever owns the channel.
  Coefficients<T, Map>& operator[](std::int64_t c) { return channels_[c]; }

  // Interleaved: lays this thread's share of the columns out. Every entry must be there; a barrier must follow.
  void lay_out(const Team& team) {
    const Range mine = team.share(groups(plan_));
    for (std::int64_t g = mine.begin; g < mine.end; ++g) {
      const std::int64_t begin = g * kernels::kVectorColumns;
      const std::int64_t end = std::min(begin + kernels::kVectorColumns, plan_.columns);
      unsigned mask = 0;
      for (std::int64_t e = begin; e < end; ++e) {
        const Coefficients<T, Map>& k = channels_[(e / plan_.problem.inner) % plan_.problem.channels];
        scatter(k.narrow, narrow_, e);
        scatter(k.wide, wide_, e);
        if (k.is_wide) mask |= 1u << (e - begin);
      }
      mask_[g] = static_cast<std::uint16_t>(mask);
      if (mask != 0) any_wide_.store(true, std::memory_order_relaxed);
    }
  }

  [[nodiscard]] bool any_wide() const { return any_wide_.load(std::memory_order_relaxed); }
  [[nodiscard]] const std::uint16_t* mask() const { return mask_; }
  // Array of field `f` of the maps.
  [[nodiscard]] const T* narrow(int f) const { return narrow_ + f * plan_.columns; }
  [[nodiscard]] const double* wide(int f) const { return wide_ + f * plan_.columns; }

 private:
  static constexpr std::int64_t kFields = sizeof(Map<double>) / sizeof(double);

  static std::int64_t groups(const Plan& plan) {
    return (plan.columns + kernels::kVectorColumns - 1) / kernels::kVectorColumns;
  }
  template <class A>
  void scatter(const Map<A>& map, A* arrays, std::int64_t column) {
    const auto fields = std::bit_cast<std::array<A, kFields>>(map);
    for (std::size_t f = 0; f < kFields; ++f) arrays[static_cast<std::int64_t>(f) * plan_.columns + column] = fields[f];
  }

  const Plan& plan_;
  Coefficients<T, Map>* channels_;
  T* narrow_ = nullptr;
  double* wide_ = nullptr;
  std::uint16_t* mask_ = nullptr;
  std::atomic<bool> any_wide_{false};
};

}  // namespace batchnorm
