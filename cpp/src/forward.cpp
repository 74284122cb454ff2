// The passes of forward over whole tensors.
#include "forward_pass.hpp"

namespace batchnorm {
namespace {

using kernels::Affine;
using kernels::AffineColumns;
using kernels::ColumnSums;
using kernels::Rows;
using kernels::Runs;
using kernels::Sums;
using kernels::WideColumns;

template <class T>
struct ForwardCalls {
  using A = Arithmetic<T>;

  const T* x;
  T* y;
  const kernels::Kernels<T>& kernels = active_implementation().table->of<T>();

  static void prepare(const Plan&) {}
  static int streams() { return 2; }
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
    const bool around = plan.around_cache && x != y;
    (around ? kernels.runs_normalize_around_cache : kernels.runs_normalize)(x + offset, y + offset, runs, k);
  }
  void apply_runs_wide(std::int64_t offset, const Runs& runs, std::int64_t, const Affine<double>& k) const {
    kernels.runs_normalize_wide(x + offset, y + offset, runs, k);
  }
  void apply_rows(const Plan& plan, std::int64_t offset, const Rows& rows, const AffineColumns<A>& k) const {
    const bool around = plan.around_cache && x != y && rows.columns == plan.apply_rows.columns;
    (around ? kernels.rows_normalize_around_cache : kernels.rows_normalize)(x + offset, y + offset, rows, k);
  }
  void apply_rows_mixed(std::int64_t offset, const Rows& rows, const AffineColumns<A>& k,
                        const WideColumns<AffineColumns<double>>& wide) const {
    kernels.rows_normalize_mixed(x + offset, y + offset, rows, k, wide);
  }
};

template <class T>
using Pass = ForwardPass<T, ForwardCalls<T>>;

}  // namespace

template <class T>
void run_moments(const T* x, const Problem& problem, Moments* out, int threads, const PartOf& part) {
  run(Pass<T>{.reduces = true, .applies = false, .calls = {x, nullptr}, .saved = out}, problem, threads, part);
}

template <class T>
void run_batch_norm(const T* x, const Problem& problem, ChannelValues gamma, ChannelValues beta, double eps, T* y,
                    Moments* saved, int threads, const PartOf& part) {
  Pass<T> pass{.reduces = true, .applies = true, .calls = {x, y}, .saved = saved};
  pass.gamma = gamma;
  pass.beta = beta;
  pass.eps = eps;
  run(pass, problem, threads, part);
}

template <class T>
void run_normalize(const T* x, const Problem& problem, const GivenStatistics& given, ChannelValues gamma,
                   ChannelValues beta, double eps, T* y, int threads, const PartOf& part) {
  Pass<T> pass{.reduces = false, .applies = true, .calls = {x, y}, .given = given};
  pass.gamma = gamma;
  pass.beta = beta;
  pass.eps = eps;
  run(pass, problem, threads, part);
}

#define BN_INSTANTIATE(T)                                                                                             \
  template void run_moments(const T*, const Problem&, Moments*, int, const PartOf&);                                  \
  template void run_batch_norm(const T*, const Problem&, ChannelValues, ChannelValues, double, T*, Moments*, int,     \
                               const PartOf&);                                                                        \
  template void run_normalize(const T*, const Problem&, const GivenStatistics&, ChannelValues, ChannelValues, double, \
                              T*, int, const PartOf&);
BN_INSTANTIATE(Float16)
BN_INSTANTIATE(BFloat16)
BN_INSTANTIATE(float)
BN_INSTANTIATE(double)
#undef BN_INSTANTIATE

}  // namespace batchnorm
