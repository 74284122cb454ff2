// Double backward: sums along x -> sums of v*dy -> coefficients -> second_grad, and forward-mode for the gradient of
// dy.
#include <algorithm>
#include <optional>
#include <vector>

#include "coefficients.hpp"
#include "gradient_math.hpp"
#include "parallel.hpp"
#include "passes.hpp"
#include "traverse.hpp"

namespace batchnorm {
namespace {

using kernels::ColumnSums;
using kernels::Rows;
using kernels::Runs;
using kernels::SecondAffine;
using kernels::SecondAffineColumns;
using kernels::Sums;

// What is known of the channels before the pass: sums of v and of dy along x - mean, and the mean of dy.
struct Along {
  std::vector<GradSums> v, dy;
  std::vector<Moments> of_dy;
};

template <class A>
using SecondMap = SecondAffine;  // in float64 whatever the tensors are

// The sums of v*(dy - mean(dy)), and from them dx and dgamma.
template <class T>
class SecondPass {
 public:
  using Value = T;
  using Table = CoefficientTable<double, SecondMap>;
  static constexpr bool reduces = true;
  const PassCall<T>& call;
  const T *v, *dy, *x;
  const Moments* moments;
  const Along& along;
  const Cotangents& w;
  const SecondOutputs<T>& out;

  // What follows from these.
  bool applies = out.dx != nullptr;
  Plan plan = make_plan(call.problem, call.work(reduces, applies, applies ? 4 : 2), call.options.threads);
  const kernels::KernelTable& table = *active_implementation().table;
  const double* column_mean = nullptr;
  std::optional<Table> coefficients = {};

  // Of dy.
  [[nodiscard]] double mean(std::int64_t c) const { return along.of_dy[static_cast<std::size_t>(c)].mean; }
  void begin() const {
    if (out.ddy == nullptr) return;
    Backward<T>{call}.batch_norm_jvp(v, x, moments, along.v.data(), {w.dgamma, w.dbeta, {}, {}}, out.ddy);
  }

  void sum_runs(std::int64_t offset, const Runs& runs, std::int64_t c, Sums* out) const {
    double means[kernels::kMostChannels];
    for (std::int64_t i = 0; i < runs.channels; ++i) means[i] = mean(c + i);
    table.of<T>().runs_grad_sums({v + offset, dy + offset}, {}, runs, means, out);
  }
  void sum_rows(std::int64_t offset, std::int64_t column, const Rows& rows, const ColumnSums& out) const {
    table.of<T>().rows_grad_sums({v + offset, dy + offset}, {}, rows, column_mean + column, out);
  }

  // `totals` are null for an empty batch, whose sums are 0.
  void finish(Range channels, const Sums* totals) {
    for (std::int64_t c = channels.begin; c < channels.end; ++c) {
      const Sums s = totals == nullptr ? Sums{} : totals[c - channels.begin];
      finish_channel(c, {{s.first, s.first_lo}, {s.second, s.second_lo}});
    }
  }

  // In float64, some values at a time where that is not the tensors' type.
  void apply_runs(std::int64_t offset, const Runs& runs, std::int64_t c) const {
    if constexpr (sizeof(T) == sizeof(double)) {
      table.f64.runs_second_grad(v + offset, dy + offset, x + offset, out.dx + offset, runs, coefficients->narrow(c));
    } else {
      for (std::int64_t k = 0; k < runs.count; ++k) {
        for (std::int64_t i = 0; i < runs.channels; ++i) {
          const std::int64_t at = offset + k * runs.stride + i * runs.length;
          for_tiles(at, runs.length, [&](std::int64_t, std::int64_t n, const double* const* in, double* out) {
            table.f64.runs_second_grad(in[0], in[1], in[2], out, {.length = n, .count = 1, .stride = 0},
                                       coefficients->narrow(c + i));
          });
        }
      }
    }
  }
  void apply_rows(std::int64_t offset, const Rows& rows) const {
    const auto field = [this](std::int64_t f) { return coefficients->narrow_columns(f); };
    const auto from = [&](std::int64_t c) {
      return SecondAffineColumns{field(0) + c, field(1) + c, field(2) + c, field(3) + c,
                                 field(4) + c, field(5) + c, field(6) + c};
    };
    if constexpr (sizeof(T) == sizeof(double)) {
      table.f64.rows_second_grad(v + offset, dy + offset, x + offset, out.dx + offset, rows, from(0));
    } else {
      for (std::int64_t r = 0; r < rows.count; ++r) {
        for_tiles(offset + r * rows.stride, rows.columns,
                  [&](std::int64_t c, std::int64_t n, const double* const* in, double* out) {
                    const Rows row{.count = 1, .columns = n, .stride = n};
                    table.f64.rows_second_grad(in[0], in[1], in[2], out, row, from(c));
                  });
      }
    }
  }

 private:
  // f(begin, n, tiles of v, dy and x, tile of dx) for the `count` values at `offset`. Narrower results are rounded from
  // float64 to float32, and those of 16 bits once more.
  template <class F>
  void for_tiles(std::int64_t offset, std::int64_t count, const F& f) const {
    constexpr std::int64_t kTile = 512;
    double memory[4][kTile];
    const double* const in[] = {memory[0], memory[1], memory[2]};
    for (std::int64_t begin = 0; begin < count; begin += kTile) {
      const std::int64_t n = std::min(kTile, count - begin), at = offset + begin;
      for (std::int64_t i = 0; i < n; ++i) {
        memory[0][i] = static_cast<double>(v[at + i]);
        memory[1][i] = static_cast<double>(dy[at + i]);
        memory[2][i] = static_cast<double>(x[at + i]);
      }
      f(begin, n, in, memory[3]);
      for (std::int64_t i = 0; i < n; ++i) out.dx[at + i] = static_cast<T>(memory[3][i]);
    }
  }
  void finish_channel(std::int64_t c, const GradSumsOf<double>& v_dy) {
    const auto at = static_cast<std::size_t>(c);
    const auto m = MomentsOf<double>::at(moments + c);
    const auto of_v = GradSumsOf<double>::at(&along.v[at]), of_dy = GradSumsOf<double>::at(&along.dy[at]);
    const auto mean_dy = MomentsOf<double>::at(&along.of_dy[at]);
    if (m.count == 0) return out.dgamma.set(c, 0);
    const SecondFactors<double> k =
        second_factors(m.count, centered_dot(m, of_v), centered_dot(m, of_dy), centered_dot(mean_dy, v_dy),
                       rstd_of(moments[c], call.eps), call.gamma.value_or(c, 1), w.dgamma.value_or(c, 0));
    out.dgamma.set(c, k.dgamma);
    if (!applies) return;
    const DoubleDouble mean_v = mean_of<double>(of_v.dy, m.count);
    const double offset = -(k.v * mean_v.lo + k.dy * mean_dy.mean_lo + k.x * m.mean_lo);
    const SecondAffine map{mean_v.hi, k.v, mean_dy.mean, k.dy, m.mean, k.x, offset};
    coefficients->set(c, Coefficients<double, SecondMap>{map, map, false});
  }
};

template <class T>
Along sums_along_x(const PassCall<T>& call, const T* v, const T* dy, const T* x, const Moments* saved) {
  const auto channels = static_cast<std::size_t>(call.problem.channels);
  Along along{std::vector<GradSums>(channels), std::vector<GradSums>(channels), std::vector<Moments>(channels)};
  Backward<T>{call}.grad_sums(v, x, saved, along.v.data());
  Backward<T>{call}.grad_sums(dy, x, saved, along.dy.data());
  run_here([&] {
    for (std::size_t c = 0; c < channels; ++c) {
      if (saved[c].count == 0) continue;
      const DoubleDouble mean = mean_of<double>(GradSumsOf<double>::at(&along.dy[c]).dy, saved[c].count);
      along.of_dy[c] = {saved[c].count, mean.hi, mean.lo, 0, 0};
    }
  });
  return along;
}

}  // namespace

template <class T>
void DoubleBackward<T>::batch_norm(const T* v, const T* dy, const T* x, const Moments* saved, const Cotangents& w,
                                   const SecondOutputs<T>& out) const {
  if (out.dx == nullptr && !out.dgamma.wanted()) {
    if (out.ddy == nullptr) return;
    return Backward<T>{call}.batch_norm_jvp(v, x, saved, nullptr, {w.dgamma, w.dbeta, {}, {}}, out.ddy);
  }
  const Along along = sums_along_x(call, v, dy, x, saved);
  SecondPass<T> pass{.call = call, .v = v, .dy = dy, .x = x, .moments = saved, .along = along, .w = w, .out = out};
  run_pass(pass, call.options);
}

template <class T>
void DoubleBackward<T>::normalize(const T* v, const T* dy, const T* x, const GivenStatistics& given,
                                  const Cotangents& w, const SecondOutputs<T>& out) const {
  const auto channels = static_cast<std::size_t>(call.problem.channels);
  const std::vector<Moments> about_0(out.dgamma.wanted() ? channels : 0);
  std::vector<GradSums> sums(about_0.size());
  if (out.dgamma.wanted()) Backward<T>{call}.grad_sums(v, dy, about_0.data(), sums.data());
  GivenStatistics scale = given;
  scale.only_scale = true;
  PassCall<T> by_w = call;
  by_w.gamma = w.dgamma;
  by_w.beta = {};
  by_w.options.threads = available_threads(call.options.threads);
  const bool scales = out.dx != nullptr && w.dgamma.present();
  std::size_t bytes = 0;  // before ddy is written
  by_w.options.needed = &bytes;
  if (scales) Forward<T>{by_w}.normalize(dy, scale, out.dx);
  const Workspace::Heap memory = Workspace::allocate(bytes);
  by_w.options.needed = nullptr;
  by_w.options.memory = memory.get();
  if (out.ddy != nullptr) Backward<T>{call}.normalize_jvp(v, x, given, {w.dgamma, w.dbeta, {}, {}}, out.ddy);
  if (scales) {
    Forward<T>{by_w}.normalize(dy, scale, out.dx);
  } else if (out.dx != nullptr) {
    std::fill_n(out.dx, call.problem.size(), T(0));
  }
  run_here([&] {
    for (std::size_t at = 0; at < sums.size(); ++at) {
      const auto c = static_cast<std::int64_t>(at);
      const auto m = MomentsOf<double>::at(&about_0[at]);
      const auto s = GradSumsOf<double>::at(&sums[at]);
      out.dgamma.set(c, dgamma_of<double>(m, s, rstd_of(DoubleDouble{given.var[c], 0}, call.eps)));
    }
  });
}

template struct DoubleBackward<Float16>;
template struct DoubleBackward<BFloat16>;
template struct DoubleBackward<float>;
template struct DoubleBackward<double>;

}  // namespace batchnorm
