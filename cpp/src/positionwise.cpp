#include "positionwise.hpp"

#include <algorithm>
#include <cmath>
#include <memory>

#include "arithmetic.hpp"
#include "coefficients.hpp"
#include "gradient_math.hpp"
#include "parallel.hpp"
#include "position_rows.hpp"
#include "short_runs.hpp"
#include "workspace.hpp"

namespace batchnorm {
namespace {

using kernels::ColumnSums;
using kernels::Lines;
using kernels::LineStatistics;
using kernels::LineTermsOf;
using kernels::Sums;
using kernels::Tail;

// ---- the memory of a task ----

// What the lines of a block have: those of a group one behind the other.
template <class T>
class Task {
  using A = Arithmetic<T>;

 public:
  static constexpr int kTiles = 4;

  // Tiles are made where `staged`; moments of a block are taken where `reduces`.
  static std::size_t bytes(const PositionRows<T>& v, bool staged, bool reduces) {
    const std::int64_t lines = v.plan.positions_a_block * v.groups;
    std::size_t all = 6 * Workspace::bytes_for<double>(lines) + Workspace::bytes_for<Sums>(lines);
    if (staged) all += kTiles * Workspace::bytes_for<A>(v.tile_values());
    if (reduces) all += bytes_of_moments(v, lines);
    return all;
  }
  Task(const PositionRows<T>& v, std::byte* memory, bool staged) : v_(v) {
    Workspace workspace(memory);
    const std::int64_t lines = v.plan.positions_a_block * v.groups;
    for (double*& of : columns_) of = workspace.take<double>(lines);
    sums = workspace.take<Sums>(lines);
    for (int k = 0; staged && k < kTiles; ++k) tile[k] = workspace.take<A>(v.tile_values());
    rest_ = workspace.take<std::byte>(0);
  }

  A* tile[kTiles] = {};
  Sums* sums;

  // Moments of the lines of some rows. Those that do not count have none.
  template <class V>
  void take_moments(const V* rows, const Block& block, Moments* out) const {
    const std::int64_t n = v_.lines_of(block);
    const PassCall<V> part{.problem = {1, n, v_.call.width}, .options = {.threads = 1, .memory = rest_}};
    if (is_short(v_.call.width)) {
      run_short_moments(rows, part, out);
    } else {
      Forward<V>{part}.moments(rows, out);
    }
    if (!v_.call.positions) return;
    for (std::int64_t r = 0; r < block.count; ++r) {
      if (!v_.counts(block.first + r)) std::fill_n(out + r * v_.groups, v_.groups, Moments{});
    }
  }

  // From the moments of a block's lines.
  void set_statistics(const Moments* moments, const Block& block) {
    for (std::int64_t g = 0; g < v_.groups; ++g) {
      for (std::int64_t r = 0; r < block.count; ++r) {
        set_statistics(MomentsOf<double>::at(moments + r * v_.groups + g), g * block.count + r);
      }
    }
  }
  // From the moments, and sums of h (of x' for tangents) of which `sum(line)` gives those of each.
  template <bool kTangents, class Sum>
  void set_terms(const Moments* moments, const Block& block, const Sum& sum) {
    for (std::int64_t g = 0; g < v_.groups; ++g) {
      for (std::int64_t r = 0; r < block.count; ++r) {
        const std::int64_t line = r * v_.groups + g, at = g * block.count + r;
        const auto m = MomentsOf<double>::at(moments + line);
        const DoubleDouble rstd{columns_[2][at], columns_[3][at]};
        const LineTerms terms = kTangents ? tangent_terms<A>(m, sum(line, at), rstd, v_.call.about_zero)
                                          : line_terms<A>(m, sum(line, at), rstd, v_.call.about_zero);
        columns_[4][at] = terms.x_scale, columns_[5][at] = terms.shift;
      }
    }
  }
  // Those of the lines of group g, from row r of `rows` on.
  [[nodiscard]] LineStatistics statistics(std::int64_t g, std::int64_t rows, std::int64_t r = 0) const {
    const std::int64_t at = g * rows + r;
    return {columns_[0] + at, columns_[1] + at, columns_[2] + at, columns_[3] + at};
  }
  [[nodiscard]] LineTermsOf terms(std::int64_t g, std::int64_t rows, std::int64_t r = 0) const {
    return {columns_[4] + g * rows + r, columns_[5] + g * rows + r};
  }

 private:
  // Lines that are turned, whatever their number: the order in which they are summed is that of their length.
  static bool is_short(std::int64_t width) { return has_short_runs({1, 2, width}); }
  static std::size_t bytes_of_moments(const PositionRows<T>& v, std::int64_t lines) {
    std::size_t needed = 0;
    if (is_short(v.call.width) || lines == 0) return 0;
    for (const std::int64_t n : {std::int64_t{1}, lines}) {
      const PassCall<A> part{.problem = {1, n, v.call.width}, .options = {.threads = 1, .needed = &needed}};
      Forward<A>{part}.moments(nullptr, nullptr);
    }
    return needed;
  }
  void set_statistics(const MomentsOf<double>& m, std::int64_t at) {
    DoubleDouble rstd{};
    if (m.count > 0) rstd = v_.call.about_zero ? rstd_about_zero<A>(m, v_.call.eps) : rstd_for<A>(m, v_.call.eps);
    const bool about_mean = m.count > 0 && !v_.call.about_zero;
    columns_[0][at] = about_mean ? m.mean : 0, columns_[1][at] = about_mean ? m.mean_lo : 0;
    columns_[2][at] = rstd.hi, columns_[3][at] = rstd.lo;
  }

  const PositionRows<T>& v_;
  double* columns_[6];  // mean, mean_lo, rstd, rstd_lo, x_scale, shift
  std::byte* rest_;
};

// All positions, in tasks. What can fail is done when there is one of these.
template <class T>
class Tasks {
 public:
  Tasks(const PositionRows<T>& v, bool staged, bool reduces)
      : v_(v), staged_(staged), memory_(Task<T>::bytes(v, staged, reduces), v.plan.threads) {}

  // f(Task, number of the task, Range), `a_task` positions in each.
  template <class F>
  void run(std::int64_t a_task, const F& f) {
    const std::int64_t tasks = (v_.positions + a_task - 1) / a_task;
    run_tasks(v_.plan.threads, tasks, [&](Range range) {
      const ThreadMemory::Place place(memory_);
      Task<T> task(v_, place.begin(), staged_);
      for (std::int64_t t = range.begin; t < range.end; ++t) {
        f(task, t, Range{t * a_task, std::min((t + 1) * a_task, v_.positions)});
      }
      if (v_.plan.around_cache) fence_streams();
    });
  }
  // f(Task, Block) for all blocks.
  template <class F>
  void run_blocks(const F& f) {
    run(v_.plan.positions_a_block, [&](Task<T>& task, std::int64_t, Range range) {
      v_.for_blocks(range, [&](const Block& block) { f(task, block); });
    });
  }

 private:
  const PositionRows<T>& v_;
  bool staged_;
  ThreadMemory memory_;
};

// ---- forward ----

// Where moments are given they are read, else taken and saved.
template <class T>
void forward(const PassCall<T>& call, const T* x, T* y, const Moments* given, Moments* saved) {
  using A = Arithmetic<T>;
  const PositionRows<T> v(call, call.tail.residual == nullptr ? 2 : 3, true);
  Tail<T> tail = call.tail;
  if (call.bits_head != nullptr) tail.first_bit = values_past_line(y);
  if (call.problem.size() == 0) return call.write_head(tail.first_bit);
  const auto gamma = along(call.gamma, v.channels, 1), beta = along(call.beta, v.channels, 0);
  const bool staged = !v.in_rows() || !std::is_same_v<A, T> || !tail.empty();
  const auto run_block = [&](Task<T>& task, const Block& block) {
    const A* rows = v.rows(x, block, task.tile[0], task.tile[1]);
    const Moments* moments = given;
    if (given == nullptr) task.take_moments(rows, block, saved + block.first * v.groups), moments = saved;
    task.set_statistics(moments + block.first * v.groups, block);
    const auto map = [&](std::int64_t r, std::int64_t n, A* to, bool around_cache) {
      for (std::int64_t g = 0; g < v.groups; ++g) {
        const std::int64_t at = r * v.channels + g * call.width;
        const Lines lines{.count = n,
                          .length = call.width,
                          .stride = v.channels,
                          .ahead = around_cache ? block.count * v.channels : 0,
                          .around_cache = around_cache};
        v.table.template of<A>().lines_normalize(rows + at, to + at, lines, task.statistics(g, block.count, r),
                                                 gamma.get() + g * call.width, beta.get() + g * call.width);
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
  const auto gamma = along(call.gamma, v.channels, 1);
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
  const auto gamma = along(call_.gamma, v.channels, 1);
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
  const auto gamma = along(call_.gamma, v.channels, 1), ones = along({}, v.channels, 1);
  const auto gamma_dot = along(tangents.gamma, v.channels, 0), beta_dot = along(tangents.beta, v.channels, 0);
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
