// The passes with a ReLU behind them: those of forward.cpp and backward.cpp on kernels that apply it, and that let dy
// through its mask.
#include "relu.hpp"

#include "backward_pass.hpp"
#include "forward_pass.hpp"

namespace batchnorm {
namespace {

using kernels::Affine;
using kernels::AffineColumns;
using kernels::ColumnSums;
using kernels::GradAffine;
using kernels::GradAffineColumns;
using kernels::ReluInputs;
using kernels::ReluTail;
using kernels::Rows;
using kernels::Runs;
using kernels::Sums;
using kernels::WideColumns;

// How many values behind the begin of a vector's line p lies.
template <class T>
std::int64_t values_past_line(const T* p) {
  return static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(p) / sizeof(T)) % kernels::kVectorColumns;
}

// Kernels that walk rows one below the other, or along memory from line to line.
enum class RowWalk { columns, in_line };

template <class T>
struct ReluForwardCalls {
  using A = Arithmetic<T>;

  const T* x;
  ReluInto<T> into;
  RowWalk walk = RowWalk::columns;
  std::int64_t first_bit = 0;
  const kernels::Kernels<T>& kernels = active_implementation().table->of<T>();
  const kernels::ReluKernels<T>& relu = active_implementation().table->relu<T>();

  // The bits of a vector are whole bytes of the mask where the mask begins like the lines of y, and the vectors are
  // lines of y; or where rows are whole bytes.
  void prepare(const Plan& plan) {
    const bool by_columns = plan.path == Path::row_blocks && !goes_around_cache(plan) &&
                            (into.mask == nullptr || plan.apply_rows.columns % 8 == 0);
    walk = by_columns ? RowWalk::columns : RowWalk::in_line;
    first_bit = by_columns ? 0 : values_past_line(into.y);
  }
  void begin() const {
    if (into.mask == nullptr) return;
    std::fill_n(into.mask, kReluMaskHead, std::uint8_t{0});
    into.mask[0] = static_cast<std::uint8_t>(first_bit);
  }
  [[nodiscard]] int streams() const { return into.residual == nullptr ? 2 : 3; }
  [[nodiscard]] SummedValues<T> summed(const Plan& plan) const {
    return {kernels, x, {static_cast<double>(plan.problem.count()), 0}};
  }

  void sum_runs(std::int64_t offset, const Runs& runs, std::int64_t, Sums* out) const {
    kernels.runs_moments(x + offset, runs, out);
  }
  void sum_rows(std::int64_t offset, std::int64_t, const Rows& rows, const ColumnSums& out) const {
    kernels.rows_moments(x + offset, rows, out);
  }

  void apply_runs(const Plan& plan, std::int64_t offset, const Runs& runs, std::int64_t, const Affine<A>* k) const {
    const auto apply = goes_around_cache(plan) ? relu.runs_normalize_around_cache : relu.runs_normalize;
    apply(x + offset, into.y + offset, tail(offset), runs, k);
  }
  void apply_runs_wide(std::int64_t offset, const Runs& runs, std::int64_t, const Affine<double>& k) const {
    relu.runs_normalize_wide(x + offset, into.y + offset, tail(offset), runs, k);
  }
  void apply_rows(const Plan& plan, std::int64_t offset, const Rows& rows, const AffineColumns<A>& k) const {
    auto apply = relu.rows_normalize;
    if (walk == RowWalk::in_line && rows.columns == plan.apply_rows.columns &&
        rows.columns >= kernels::kVectorColumns) {
      apply = goes_around_cache(plan) ? relu.rows_normalize_around_cache : relu.rows_normalize_in_line;
    }
    apply(x + offset, into.y + offset, tail(offset), rows, k);
  }
  void apply_rows_mixed(std::int64_t offset, const Rows& rows, const AffineColumns<A>& k,
                        const WideColumns<AffineColumns<double>>& wide) const {
    relu.rows_normalize_mixed(x + offset, into.y + offset, tail(offset), rows, k, wide);
  }

 private:
  [[nodiscard]] bool goes_around_cache(const Plan& plan) const {
    return plan.around_cache && into.y != x && into.y != into.residual;
  }
  [[nodiscard]] ReluTail<T> tail(std::int64_t offset) const {
    return {into.residual, into.mask == nullptr ? nullptr : into.mask + kReluMaskHead, first_bit, offset};
  }
};

template <class T>
struct ReluBackwardCalls {
  using A = Arithmetic<T>;

  ReluInputs<T> summed, applied;
  T* dx;
  const kernels::Kernels<T>& kernels = active_implementation().table->of<T>();
  const kernels::ReluKernels<T>& relu = active_implementation().table->relu<T>();

  // x is read, besides dy, for what is applied; dresidual may be null.
  ReluBackwardCalls(const T* dy, const T* x, const std::uint8_t* mask, const T* applied_x, T* to, T* dresidual)
      : summed{dy, x, mask + kReluMaskHead, mask[0] % kernels::kVectorColumns}, applied(summed), dx(to) {
    applied.x = applied_x;
    applied.dresidual = dresidual;
  }

  static void prepare(const Plan&) {}
  [[nodiscard]] int streams() const { return applied.dresidual == nullptr ? 3 : 4; }

  void sum_runs(std::int64_t offset, const Runs& runs, std::int64_t, const double* mean, Sums* out) const {
    relu.runs_grad_sums(at(summed, offset), runs, mean, out);
  }
  void sum_rows(std::int64_t offset, std::int64_t, const Rows& rows, const double* mean, const ColumnSums& out) const {
    relu.rows_grad_sums(at(summed, offset), rows, mean, out);
  }

  void apply_runs(const Plan& plan, std::int64_t offset, const Runs& runs, std::int64_t, const GradAffine<A>* k) const {
    const bool around = goes_around_cache(plan);
    const auto apply = around ? relu.runs_grad_input_around_cache : relu.runs_grad_input;
    apply(at(applied, offset, around), dx + offset, runs, k);
  }
  void apply_runs_wide(std::int64_t offset, const Runs& runs, std::int64_t, const GradAffine<double>& k) const {
    relu.runs_grad_input_wide(at(applied, offset), dx + offset, runs, k);
  }
  void apply_rows(const Plan& plan, std::int64_t offset, const Rows& rows, const GradAffineColumns<A>& k) const {
    const bool around = goes_around_cache(plan) && rows.columns == plan.apply_rows.columns;
    const auto apply = around ? relu.rows_grad_input_around_cache : relu.rows_grad_input;
    apply(at(applied, offset, around), dx + offset, rows, k);
  }
  void apply_rows_mixed(std::int64_t offset, const Rows& rows, const GradAffineColumns<A>& k,
                        const WideColumns<GradAffineColumns<double>>& wide) const {
    relu.rows_grad_input_mixed(at(applied, offset), dx + offset, rows, k, wide);
  }

 private:
  [[nodiscard]] bool is_input(const T* p) const { return p == summed.dy || p == summed.x; }
  [[nodiscard]] bool goes_around_cache(const Plan& plan) const { return plan.around_cache && !is_input(dx); }
  [[nodiscard]] ReluInputs<T> at(ReluInputs<T> in, std::int64_t offset, bool around = false) const {
    in.at = offset;
    in.streams = around && in.dresidual != nullptr && !is_input(in.dresidual) &&
                 values_past_line(in.dresidual) == values_past_line(dx);
    return in;
  }
};

template <class T>
using Forward = ForwardPass<T, ReluForwardCalls<T>>;
template <class T>
using Backward = BackwardPass<T, ReluBackwardCalls<T>>;

}  // namespace

template <class T>
void run_batch_norm_relu(const T* x, const Problem& problem, ChannelValues gamma, ChannelValues beta, double eps,
                         const ReluInto<T>& into, Moments* saved, int threads) {
  Forward<T> pass{.reduces = true, .applies = true, .calls = {x, into}, .saved = saved};
  pass.gamma = gamma;
  pass.beta = beta;
  pass.eps = eps;
  run(pass, problem, threads);
}

template <class T>
void run_normalize_relu(const T* x, const Problem& problem, const GivenStatistics& given, ChannelValues gamma,
                        ChannelValues beta, double eps, const ReluInto<T>& into, int threads) {
  Forward<T> pass{.reduces = false, .applies = true, .calls = {x, into}, .given = given};
  pass.gamma = gamma;
  pass.beta = beta;
  pass.eps = eps;
  run(pass, problem, threads);
}

// Without dx, dresidual takes its place, with coefficients that change nothing.
template <class T>
void run_batch_norm_relu_backward(const T* dy, const T* x, const Problem& problem, const std::uint8_t* mask,
                                  const Moments* saved, ChannelValues gamma, double eps, const ReluGradients<T>& out,
                                  int threads) {
  const ConstantScale unchanged;
  const bool gate_alone = out.dx == nullptr;
  T* dx = gate_alone ? out.dresidual : out.dx;
  Backward<T> pass{.reduces = true,
                   .applies = dx != nullptr,
                   .calls = {dy, x, mask, gate_alone ? nullptr : x, dx, gate_alone ? nullptr : out.dresidual},
                   .moments = saved};
  if (gate_alone) pass.constant_scale = &unchanged;
  pass.dgamma = out.dgamma;
  pass.dbeta = out.dbeta;
  pass.gamma = gamma;
  pass.eps = eps;
  run(pass, problem, threads);
}

template <class T>
void run_normalize_relu_backward(const T* dy, const T* x, const Problem& problem, const std::uint8_t* mask,
                                 const GivenStatistics& given, ChannelValues gamma, double eps,
                                 const ReluGradients<T>& out, int threads) {
  const auto sum = [&](const Moments* moments, GradSums* sums) {
    Backward<T> pass{.reduces = true,
                     .applies = false,
                     .calls = {dy, out.dgamma.wanted() ? x : dy, mask, nullptr, nullptr, nullptr},
                     .moments = moments};
    pass.sums_out = sums;
    run(pass, problem, threads);
  };
  const auto apply = [&] {
    const bool gate_alone = out.dx == nullptr;
    T* dx = gate_alone ? out.dresidual : out.dx;
    if (dx == nullptr) return;
    const ConstantScale scale = gate_alone ? ConstantScale{} : ConstantScale{given.var, gamma, eps};
    Backward<T> pass{.reduces = false,
                     .applies = true,
                     .calls = {dy, x, mask, nullptr, dx, gate_alone ? nullptr : out.dresidual},
                     .moments = nullptr};
    pass.constant_scale = &scale;
    run(pass, problem, threads);
  };
  gradients_of_constants(given, problem.channels, eps, out.dgamma, out.dbeta, sum, apply);
}

#define BN_INSTANTIATE(T)                                                                                             \
  template void run_batch_norm_relu(const T*, const Problem&, ChannelValues, ChannelValues, double,                   \
                                    const ReluInto<T>&, Moments*, int);                                               \
  template void run_normalize_relu(const T*, const Problem&, const GivenStatistics&, ChannelValues, ChannelValues,    \
                                   double, const ReluInto<T>&, int);                                                  \
  template void run_batch_norm_relu_backward(const T*, const T*, const Problem&, const std::uint8_t*, const Moments*, \
                                             ChannelValues, double, const ReluGradients<T>&, int);                    \
  template void run_normalize_relu_backward(const T*, const T*, const Problem&, const std::uint8_t*,                  \
                                            const GivenStatistics&, ChannelValues, double, const ReluGradients<T>&,   \
                                            int);
BN_INSTANTIATE(Float16)
BN_INSTANTIATE(BFloat16)
BN_INSTANTIATE(float)
BN_INSTANTIATE(double)
#undef BN_INSTANTIATE

}  // namespace batchnorm
