// The coefficients of every channel, and, for interleaved tensors, laid out per column as the kernels want them.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstring>

#include "gradient_math.hpp"
#include "parallel.hpp"
#include "plan.hpp"
#include "workspace.hpp"

namespace batchnorm {

// Channels whose values are gathered in arrays before their coefficients are formed.
constexpr std::int64_t kTogether = 64;

// The values of channels, which repeat where there are fewer, or `absent` where there are none.
inline void read_channels(const ChannelValues& from, Range channels, double absent, double* to) {
  const auto size = static_cast<std::int64_t>(from.size());
  if (!from.present()) std::fill_n(to, channels.end - channels.begin, absent);
  for (std::int64_t c = channels.begin; from.present() && c < channels.end;) {
    const std::int64_t first = c < size ? c : c % size, n = std::min(channels.end - c, size - first);
    from.copy_to(first, n, to);
    to += n;
    c += n;
  }
}

template <class V>
V read_channels(const ChannelValues& from, std::int64_t c, double absent) {
  if constexpr (kChannelsOf<V> == 1) {
    return from.value_or(c, absent);
  } else {
    return V{from.value_or(c, absent), from.value_or(c + 1, absent)};
  }
}

// Rows side by side: the `width` columns of the first one again and again.
template <class V>
void repeat_row(V* row, std::int64_t width, std::int64_t columns) {
  for (std::int64_t done = width; done < columns; done *= 2)
    std::copy_n(row, std::min(done, columns - done), row + done);
}

// Interleaved: mean(c) of every channel c, for the columns that are summed, if any.
template <class F>
double* lay_out_means(const Plan& plan, Workspace& workspace, const F& mean) {
  if (plan.sum_rows.columns == 0) return nullptr;
  const Problem& p = plan.problem;
  auto* means = workspace.take<double>(plan.sum_rows.columns);
  for (std::int64_t c = 0; c < p.channels; ++c) std::fill_n(means + c * p.inner, p.inner, mean(c));
  repeat_row(means, p.channels * p.inner, plan.sum_rows.columns);
  return means;
}

// Channels that are finished at once sooner than in pairs.
constexpr std::int64_t kWorthTurning = 16;
// The sums of at most kTogether channels as those of columns.
struct SumsTogether {
  SumsTogether(const kernels::Sums* sums, std::int64_t channels) {
    for (std::int64_t c = 0; c < channels; ++c) {
      columns.first[c] = sums[c].first;
      columns.first_lo[c] = sums[c].first_lo;
      columns.second[c] = sums[c].second;
      columns.second_lo[c] = sums[c].second_lo;
    }
  }
  alignas(kernels::kStreamBytes) double memory[4][kTogether];
  kernels::ColumnSums columns{memory[0], memory[1], memory[2], memory[3]};
};

// Map is kernels::Affine (normalize), GradAffine (grad_input) or SecondAffine (second_grad). Interleaved, their fields
// become one array each.
template <class T, template <class> class Map>
class CoefficientTable {
  static constexpr std::int64_t kFields = sizeof(Map<double>) / sizeof(double);

 public:
  static std::size_t bytes(const Plan& plan) {
    const std::int64_t channels = plan.problem.channels;
    const std::size_t per_channel = Workspace::bytes_for<Map<T>>(channels) +
                                    Workspace::bytes_for<Map<double>>(channels) + Workspace::bytes_for<bool>(channels);
    if (plan.planar()) return per_channel;
    const std::int64_t columns = plan.apply_rows.columns;
    return per_channel + Workspace::bytes_for<T>(kFields * (columns + kRepeated)) +
           Workspace::bytes_for<double>(kFields * columns);
  }
  CoefficientTable(const Plan& plan, Workspace& workspace)
      : plan_(plan),
        is_column_(plan.path == Path::row_blocks && plan.problem.inner == 1),
        channels_(workspace.take<Map<T>>(plan.problem.channels)),
        wide_channels_(workspace.take<Map<double>>(plan.problem.channels)),
        is_wide_(workspace.take<bool>(plan.problem.channels)) {
    if (plan.planar()) return;
    const std::int64_t columns = plan.apply_rows.columns;
    narrow_ = workspace.take<T>(kFields * (columns + kRepeated));
    wide_ = workspace.take<double>(kFields * columns);
  }

  // Of the channels of a V from c on, written by whoever owns them.
  template <class V>
  void set(std::int64_t c, const Coefficients<V, Map>& k) {
    is_column_ ? put_columns<V>(k.narrow, c) : put(k.narrow, channels_ + c);
    for (int l = 0; l < kChannelsOf<V>; ++l) is_wide_[c + l] = lane(k.is_wide, l);
    if (!any(k.is_wide)) return;
    put(k.wide, wide_channels_ + c);
    any_wide_.store(true, std::memory_order_relaxed);
  }
  // Of at most kTogether channels, none of which is wide.
  using Fields = T[kFields][kTogether];
  void set(Range channels, const Fields& k) {
    const std::int64_t n = channels.end - channels.begin;
    std::fill_n(is_wide_ + channels.begin, n, false);
    for (std::int64_t f = 0; is_column_ && f < kFields; ++f) std::copy_n(k[f], n, narrow_field(f) + channels.begin);
    for (std::int64_t c = 0; !is_column_ && c < n; ++c) {
      T of_channel[kFields];
      for (std::int64_t f = 0; f < kFields; ++f) of_channel[f] = k[f][c];
      std::memcpy(channels_ + channels.begin + c, of_channel, sizeof of_channel);
    }
  }
  // Planar: of channel c and those that follow it.
  [[nodiscard]] const Map<T>* narrow(std::int64_t c) const { return channels_ + c; }
  [[nodiscard]] const Map<double>& wide(std::int64_t c) const { return wide_channels_[c]; }
  [[nodiscard]] bool any_wide() const { return any_wide_.load(std::memory_order_relaxed); }
  [[nodiscard]] bool is_wide_channel(std::int64_t c) const { return any_wide() && is_wide_[c]; }
  [[nodiscard]] bool is_wide_column(std::int64_t e) const { return is_wide_channel(channel_of(e)); }
  // Values of a row of the tensor.
  [[nodiscard]] std::int64_t width() const { return plan_.problem.channels * plan_.problem.inner; }

  // Interleaved: lays out the columns of finished channels, whose columns are whole vectors or all there are.
  void lay_out(Range channels) {
    lay_out_columns(channels);
    if (channels.begin == 0) repeat_first();
  }

  // Array of field `f` of the maps. The first columns of the narrow ones are repeated behind the last; of the wide ones
  // only columns that are wide have meaning.
  [[nodiscard]] const T* narrow_columns(std::int64_t f) const { return narrow_field(f); }
  [[nodiscard]] const double* wide_columns(int f) const { return wide_ + f * plan_.apply_rows.columns; }

 private:
  static constexpr std::int64_t kRepeated = kernels::kVectorColumns;

  [[nodiscard]] std::int64_t channel_of(std::int64_t column) const {
    return column / plan_.problem.inner % plan_.problem.channels;
  }
  [[nodiscard]] T* narrow_field(std::int64_t f) const { return narrow_ + f * (plan_.apply_rows.columns + kRepeated); }

  template <class V, class A>
  static void put(const kernels::Affine<V>& k, kernels::Affine<A>* to) {
    for (int l = 0; l < kChannelsOf<V>; ++l) {
      to[l] = {static_cast<A>(lane(k.center, l)), static_cast<A>(lane(k.scale, l)), static_cast<A>(lane(k.offset, l))};
    }
  }
  template <class V, class A>
  static void put(const kernels::GradAffine<V>& k, kernels::GradAffine<A>* to) {
    for (int l = 0; l < kChannelsOf<V>; ++l) {
      to[l] = {static_cast<A>(lane(k.dy_center, l)), static_cast<A>(lane(k.dy_scale, l)),
               static_cast<A>(lane(k.x_center, l)), static_cast<A>(lane(k.x_scale, l)),
               static_cast<A>(lane(k.offset, l))};
    }
  }
  static void put(const kernels::SecondAffine& k, kernels::SecondAffine* to) { *to = k; }

  // Each field of the channels of a V, where a column is a channel.
  template <class V>
  void put_columns(const Map<V>& k, std::int64_t c) {
    V fields[kFields];
    std::memcpy(fields, &k, sizeof k);
    for (std::int64_t f = 0; f < kFields; ++f) put_values(fields[f], narrow_field(f) + c);
  }

  void lay_out_columns(Range channels) {
    const std::int64_t inner = plan_.problem.inner;
    std::int64_t e = channels.begin * inner;
    for (std::int64_t c = channels.begin; !is_column_ && c < channels.end; ++c) {
      for (std::int64_t i = 0; i < inner; ++i)
        scatter(channels_[c], narrow_, plan_.apply_rows.columns + kRepeated, e++);
    }
    for (std::int64_t f = 0; plan_.apply_rows.repeat > 1 && f < kFields; ++f) {
      repeat_row(narrow_field(f), width(), plan_.apply_rows.columns);
    }
    const bool all = channels.begin == 0 && channels.end == plan_.problem.channels;
    lay_out_wide(channels.begin * inner, all ? plan_.apply_rows.columns : channels.end * inner);
  }
  void repeat_first() {
    const std::int64_t columns = plan_.apply_rows.columns;
    for (std::int64_t f = 0; f < kFields; ++f) {
      for (std::int64_t e = 0; e < std::min(kRepeated, columns); ++e) narrow_field(f)[columns + e] = narrow_field(f)[e];
    }
  }
  // The float64 coefficients of the columns that want them.
  void lay_out_wide(std::int64_t begin, std::int64_t end) {
    for (std::int64_t e = begin; any_wide() && e < end; ++e) {
      if (is_wide_column(e)) scatter(wide_channels_[channel_of(e)], wide_, plan_.apply_rows.columns, e);
    }
  }
  template <class A>
  void scatter(const Map<A>& map, A* arrays, std::int64_t stride, std::int64_t column) const {
    A fields[kFields];
    std::memcpy(fields, &map, sizeof map);
    for (std::int64_t f = 0; f < kFields; ++f) arrays[f * stride + column] = fields[f];
  }

  const Plan& plan_;
  bool is_column_;  // whether coefficients are laid out as soon as they are known
  Map<T>* channels_;
  Map<double>* wide_channels_;
  bool* is_wide_;
  T* narrow_ = nullptr;
  double* wide_ = nullptr;
  std::atomic<bool> any_wide_{false};
};

}  // namespace batchnorm
