#include "positionwise.hpp"

#include <algorithm>
#include <cmath>
#include <memory>

#include "arithmetic.hpp"
#include "coefficients.hpp"
#include "gradient_math.hpp"
#include "parallel.hpp"
#include "position_rows.hpp"
#include "position_tasks.hpp"
#include "workspace.hpp"

namespace batchnorm {
namespace {

using kernels::ColumnSums;
using kernels::Lines;
using kernels::LineStatistics;
using kernels::Sums;
using kernels::Tail;

// ---- forward ----

double of_channel(const ChannelValues& values, std::int64_t c, double absent) {
  return values.present() ? values[c % static_cast<std::int64_t>(values.size())] : absent;
}
// Lines from channel c on whose coefficients leave float32: in float64 and rounded once.
template <class T, class A>
void normalize_wide(const PassCall<T>& call, std::int64_t c, const A* x, A* y, const Lines& lines,
                    const LineStatistics& s) {
  for (std::int64_t l = 0; l < lines.count; ++l) {
    for (std::int64_t i = 0; i < lines.length; ++i) {
      const double gamma = of_channel(call.gamma, c + i, 1), beta = of_channel(call.beta, c + i, 0);
      const std::int64_t at = l * lines.stride + i;
      y[at] = static_cast<A>(((x[at] - s.mean[l]) * s.rstd[l]) * gamma + beta);
    }
  }
}

// Where moments are given they are read, else taken and saved.
template <class T>
void forward(const PassCall<T>& call, const T* x, T* y, const Moments* given, Moments* saved) {
  using A = Arithmetic<T>;
  const PositionRows<T> v(call, call.tail.residual == nullptr ? 2 : 3, true);
  Tail<T> tail = call.tail;
  if (call.bits_head != nullptr) tail.first_bit = values_past_line(y);
  if (call.problem.size() == 0) return call.write_head(tail.first_bit);
  const auto gamma = along(call.gamma, v.channels, A(1)), beta = along(call.beta, v.channels, A(0));
  const bool wide = Task<T>::kScales && !fit_into_float(call.gamma, call.beta);
  const bool staged = !v.in_rows() || !std::is_same_v<A, T> || !tail.empty();
  const auto run_block = [&](Task<T>& task, const Block& block) {
    const A* rows = v.rows(x, block, task.tile[0], task.tile[1]);
    const Moments* moments = given;
    if (given == nullptr) task.take_moments(rows, block, saved + block.first * v.groups), moments = saved;
    task.set_scales(moments + block.first * v.groups, block, wide);
    const auto map = [&](std::int64_t first, std::int64_t count, A* to, bool around_cache) {
      for (std::int64_t g = 0; g < v.groups; ++g) {
        task.for_scales(g, block.count, first, count, [&](std::int64_t r, std::int64_t n, bool in_double) {
          const std::int64_t c = g * call.width, at = r * v.channels + c;
          const Lines lines{.count = n,
                            .length = call.width,
                            .stride = v.channels,
                            .ahead = around_cache ? block.count * v.channels : 0,
                            .around_cache = around_cache};
          if (in_double) {
            return normalize_wide(call, c, rows + at, to + at, lines, task.statistics(g, block.count, r));
          }
          v.table.template of<A>().lines_normalize(rows + at, to + at, lines, task.scale(g, block.count, r),
                                                   gamma.get() + c, beta.get() + c);
        });
      }
    };
    if (staged) {
      map(0, block.count, task.tile[2], false);
      return v.put(task.tile[2], block, {call.padding, rows}, tail, task.tile[1], y);
    }
    if constexpr (std::is_same_v<A, T>) {
      T* to = y + block.first * v.channels;
      v.for_alike(block, [&](std::int64_t r, std::int64_t n, bool counted) {
        if (counted || !v.pads()) return map(r, n, to, v.plan.around_cache && y != x);
        v.put_padding((block.first + r) * v.channels, n * v.channels, rows + r * v.channels, call.padding, y);
      });
    }
  };
  Tasks<T> tasks(v, staged, given == nullptr);
  call.write_head(tail.first_bit);
  tasks.run_blocks(run_block);
}

// ---- backward ----

// Sums by columns of each chunk, and those of all.
template <class T>
class ChunkSums {
  static constexpr bool kHasLow = sizeof(T) == sizeof(double);
  static constexpr std::int64_t kArrays = kHasLow ? 4 : 2;

 public:
  ChunkSums(const PositionRows<T>& v, std::int64_t chunks)
      : v_(v), chunks_(chunks), memory_(Workspace::allocate(bytes(v.channels, chunks))) {}

  // Of chunk k, zeros at first.
  [[nodiscard]] ColumnSums begin(std::int64_t k) const {
    const ColumnSums sums = of(k);
    std::fill_n(sums.first, kArrays * v_.channels, 0.0);
    return sums;
  }
  void put(const FirstOutputs<T>& out) const {
    const std::int64_t channels = v_.channels;
    if (chunks_ == 1) {  // which no thread is worth waking for
      for (std::int64_t c = 0; c < channels; c += kStripe) {
        put_sums(of(0, c), kHasLow, c, std::min(kStripe, channels - c), out);
      }
      return;
    }
    double* total = array(chunks_ * kArrays);
    run_tasks(v_.plan.threads, (channels + kStripe - 1) / kStripe, [&](Range stripes) {
      for (std::int64_t s = stripes.begin; s < stripes.end; ++s) {
        const std::int64_t c = s * kStripe, n = std::min(kStripe, channels - c);
        const ColumnSums to{total + c, total + channels + c, total + 2 * channels + c, total + 3 * channels + c};
        v_.table.template of<Arithmetic<T>>().add_blocks(of(0, c), chunks_, kArrays * channels, n, to);
        put_sums(to, true, c, n, out);
      }
    });
  }

 private:
  static constexpr std::int64_t kStripe = 64;

  // Of n <= kStripe columns. Those of one chunk of float32 have no low parts.
  static void put_sums(const ColumnSums& sums, bool has_low, std::int64_t first, std::int64_t n,
                       const FirstOutputs<T>& out) {
    double memory[kStripe];
    const auto put = [&](const double* sum, const double* low, const ChannelOutput& to) {
      for (std::int64_t i = 0; has_low && i < n; ++i) memory[i] = std::isfinite(low[i]) ? sum[i] + low[i] : sum[i];
      to.set(first, n, has_low ? memory : sum);
    };
    put(sums.first, sums.first_lo, out.dbeta);
    put(sums.second, sums.second_lo, out.dgamma);
  }
  static std::size_t bytes(std::int64_t channels, std::int64_t chunks) {
    std::int64_t values = 0;
    if (__builtin_mul_overflow(channels, (chunks * kArrays + 4) * std::int64_t{sizeof(double)}, &values)) {
      throw std::bad_alloc();
    }
    return static_cast<std::size_t>(values);
  }
  [[nodiscard]] double* array(std::int64_t k) const {
    return reinterpret_cast<double*>(memory_.get()) + k * v_.channels;
  }
  [[nodiscard]] ColumnSums of(std::int64_t k, std::int64_t c = 0) const {
    double* first = array(k * kArrays) + c;
    const std::int64_t n = v_.channels;
    return kHasLow ? ColumnSums{first, first + n, first + 2 * n, first + 3 * n}
                   : ColumnSums{first, first, first + n, first + n};
  }

  const PositionRows<T>& v_;
  std::int64_t chunks_;
  Workspace::Heap memory_;
};

GradSums grad_sums_of(const Sums& s) { return {s.first, s.first_lo, s.second, s.second_lo}; }

// The sums of a block's lines, to its memory.
template <class T>
void sum_lines(const PositionRows<T>& v, Task<T>& task, const Block& block, const Arithmetic<T>* dy,
               const Arithmetic<T>* x, const double* gamma) {
  for (std::int64_t g = 0; g < v.groups; ++g) {
    const std::int64_t at = g * v.call.width;
    const Lines lines{.count = block.count, .length = v.call.width, .stride = v.channels};
    v.table.template of<Arithmetic<T>>().lines_grad_sums(dy + at, x + at, lines, task.statistics(g, block.count),
                                                         gamma + at, task.sums + g * block.count);
  }
}

// Where sums are given they are read, else taken.
template <class T>
void backward(const PassCall<T>& call, const T* dy, const T* x, const Moments* moments, const GradSums* given,
              const FirstOutputs<T>& out) {
  using A = Arithmetic<T>;
  const PositionRows<T> v(call, 3, true);
  if (call.problem.size() == 0) {
    for (std::int64_t c = 0; c < v.channels; ++c) out.dbeta.set(c, 0), out.dgamma.set(c, 0);
    return;
  }
  const auto gamma = along(call.gamma, v.channels, 1.0);
  const bool staged = !v.in_rows() || !std::is_same_v<A, T> || call.tail.bits != nullptr || out.dresidual != nullptr;
  const ChunkSums<T> chunks(v, v.plan.chunks);
  // A line of memory of dx begins where that of the first position does.
  const bool around_cache =
      v.plan.around_cache && v.channels % kernels::kVectorColumns == 0 && out.dx != dy && out.dx != x;
  const Padded<A> zeros{v.pads() ? Padding::zero : Padding::normalize};
  const auto run_block = [&](Task<T>& task, const Block& block, const ColumnSums& columns) {
    A* const* tile = task.tile;
    const A* g_rows = v.rows(dy, block, tile[0], tile[3], call.tail.bits);
    const A* x_rows = v.rows(x, block, tile[1], tile[3]);
    // dx may be written to dy, before dresidual.
    if (out.dresidual != nullptr && g_rows != tile[0]) {
      g_rows = std::copy_n(g_rows, block.count * v.channels, tile[0]) - block.count * v.channels;
    }
    const Moments* of_block = moments + block.first * v.groups;
    task.set_statistics(of_block, block);
    if (given == nullptr) sum_lines(v, task, block, g_rows, x_rows, gamma.get());
    task.template set_terms<false>(of_block, block, [&](std::int64_t line, std::int64_t at) {
      return given == nullptr ? grad_sums_of(task.sums[at]) : given[block.first * v.groups + line];
    });
    A* to = staged ? tile[2] : nullptr;
    if constexpr (std::is_same_v<A, T>) {
      if (!staged && out.dx != nullptr) to = out.dx + block.first * v.channels;
    }
    v.for_alike(block, [&](std::int64_t r, std::int64_t n, bool counted) {
      if (!counted && v.pads()) {
        if (staged || out.dx == nullptr) return;
        const std::int64_t from = r * v.channels;
        return v.put_padding(block.first * v.channels + from, n * v.channels, g_rows + from, call.padding, out.dx);
      }
      for (std::int64_t g = 0; g < v.groups; ++g) {
        const std::int64_t c = g * call.width, at = r * v.channels + c;
        const Lines lines{.count = n,
                          .length = call.width,
                          .stride = v.channels,
                          .ahead = !staged && around_cache ? block.count * v.channels : 0,
                          .around_cache = !staged && around_cache,
                          .continues = true};
        const ColumnSums sums{columns.first + c, columns.first_lo + c, columns.second + c, columns.second_lo + c};
        v.table.template of<A>().lines_grad_input(g_rows + at, x_rows + at, to == nullptr ? nullptr : to + at, lines,
                                                  task.statistics(g, block.count, r), task.terms(g, block.count, r),
                                                  gamma.get() + c, sums);
      }
    });
    if (staged && out.dx != nullptr) v.put(to, block, {call.padding, g_rows}, {}, tile[3], out.dx);
    if (out.dresidual != nullptr) v.put(g_rows, block, zeros, {}, tile[3], out.dresidual);
  };
  Tasks<T>(v, staged, false).run(v.plan.positions_a_chunk, [&](Task<T>& task, std::int64_t chunk, Range range) {
    const ColumnSums columns = chunks.begin(chunk);
    v.for_blocks(range, [&](const Block& block) { run_block(task, block, columns); });
  });
  if (out.dgamma.wanted() || out.dbeta.wanted()) chunks.put(out);
}

}  // namespace

// ---- passes ----

template <class T>
Positionwise<T>::Positionwise(const PassCall<T>& call) : call_(call) {}

template <class T>
void Positionwise<T>::moments(const T* x, Moments* out) const {
  const PositionRows<T> v(call_, 1, false);
  const bool staged = !v.in_rows();
  Tasks<T>(v, staged, true).run_blocks([&](Task<T>& task, const Block& block) {
    if (!staged) return task.take_moments(x + block.first * v.channels, block, out + block.first * v.groups);
    task.take_moments(v.rows(x, block, task.tile[0], task.tile[1]), block, out + block.first * v.groups);
  });
}
template <class T>
void Positionwise<T>::batch_norm(const T* x, T* y, Moments* saved) const {
  forward(call_, x, y, nullptr, saved);
}
template <class T>
void Positionwise<T>::normalize(const T* x, const Moments* moments, T* y) const {
  forward<T>(call_, x, y, moments, nullptr);
}

template <class T>
void Positionwise<T>::grad_sums(const T* dy, const T* x, const Moments* moments, GradSums* out) const {
  const PositionRows<T> v(call_, 2, false);
  if (call_.problem.size() == 0) return;
  const auto gamma = along(call_.gamma, v.channels, 1.0);
  Tasks<T>(v, true, false).run_blocks([&](Task<T>& task, const Block& block) {
    const auto* g_rows = v.rows(dy, block, task.tile[0], task.tile[3], call_.tail.bits);
    const auto* x_rows = v.rows(x, block, task.tile[1], task.tile[3]);
    task.set_statistics(moments + block.first * v.groups, block);
    sum_lines(v, task, block, g_rows, x_rows, gamma.get());
    for (std::int64_t r = 0; r < block.count; ++r) {
      const bool counted = v.counts(block.first + r) || !v.pads();
      for (std::int64_t g = 0; g < v.groups; ++g) {
        out[(block.first + r) * v.groups + g] = counted ? grad_sums_of(task.sums[g * block.count + r]) : GradSums{};
      }
    }
  });
}
template <class T>
void Positionwise<T>::grad_input(const T* dy, const T* x, const Moments* moments, const GradSums* sums,
                                 const FirstOutputs<T>& out) const {
  backward<T>(call_, dy, x, moments, sums, {out.dx, out.dresidual});
}
template <class T>
void Positionwise<T>::batch_norm_backward(const T* dy, const T* x, const Moments* saved,
                                          const FirstOutputs<T>& out) const {
  backward<T>(call_, dy, x, saved, nullptr, out);
}

// y' = gamma*rstd*(x' + p*xhat + shift) + gamma'*xhat + beta': a plain loop, of which little is asked.
template <class T>
void Positionwise<T>::batch_norm_jvp(const T* x_dot, const T* x, const Moments* saved, const Tangents& tangents,
                                     T* y_dot) const {
  using A = Arithmetic<T>;
  constexpr bool kExact = sizeof(A) == sizeof(double);
  const PositionRows<T> v(call_, 3, true);
  if (call_.problem.size() == 0) return;
  const auto gamma = along(call_.gamma, v.channels, 1.0), ones = along({}, v.channels, 1.0);
  const auto gamma_dot = along(tangents.gamma, v.channels, 0.0), beta_dot = along(tangents.beta, v.channels, 0.0);
  Tasks<T>(v, true, false).run_blocks([&](Task<T>& task, const Block& block) {
    A* const* tile = task.tile;
    const A* dots = v.rows(x_dot, block, tile[0], tile[3]);
    const A* x_rows = v.rows(x, block, tile[1], tile[3]);
    const Moments* moments = saved + block.first * v.groups;
    task.set_statistics(moments, block);
    sum_lines(v, task, block, dots, x_rows, ones.get());
    task.template set_terms<true>(moments, block,
                                  [&](std::int64_t, std::int64_t at) { return grad_sums_of(task.sums[at]); });
    for (std::int64_t r = 0; r < block.count; ++r) {
      for (std::int64_t c = 0; c < v.channels; ++c) {
        const auto s = task.statistics(c / call_.width, block.count, r);
        const auto terms = task.terms(c / call_.width, block.count, r);
        const std::int64_t at = r * v.channels + c;
        const LineElement e{dots[at],   x_rows[at], *s.mean,      *s.mean_lo, *s.rstd,
                            *s.rstd_lo, gamma[c],   gamma_dot[c], beta_dot[c]};
        const LineTerms of_x_dot{*terms.x_scale, *terms.shift};
        tile[2][at] = static_cast<A>(kExact ? exact_line_tangent(e, of_x_dot) : line_tangent(e, of_x_dot));
      }
    }
    v.put_tangent(tile[2], block, {call_.padding, dots}, tile[3], y_dot);
  });
}

template class Positionwise<Float16>;
template class Positionwise<BFloat16>;
template class Positionwise<float>;
template class Positionwise<double>;

}  // namespace batchnorm
