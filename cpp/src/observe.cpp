// Observations of a stream, one by one, by the calling thread: plain loops over features, compiled once.
#include <algorithm>
#include <cmath>
#include <vector>

#include "batchnorm/batchnorm.hpp"
#include "channel_math.hpp"
#include "check.hpp"
#include "floating_point.hpp"
#include "parallel.hpp"

namespace batchnorm {
namespace {

template <class T>
void check_observation(std::span<const T> x, std::span<Moments> moments, std::span<double> dof, std::span<T> y,
                       const Observing& how) {
  const auto features = static_cast<std::int64_t>(x.size());
  check::channels("moments", moments.size(), features);
  if (!dof.empty()) check::channels("importance_dof", dof.size(), features);
  if (!y.empty()) check::channels("y", y.size(), features);
  check::counts("moments", moments);
  check::eps(how.eps);
  if (!(how.keep >= 0 && how.keep <= 1)) check::fail("keep must be in [0, 1], got ", how.keep);
  if (!(how.clip > 0)) check::fail("clip must be above 0, got ", how.clip);
  check::Memories memories;
  if (y.data() != x.data()) memories.reads("x", std::as_bytes(x));
  memories.writes("y", std::as_bytes(y));
  memories.writes("moments", std::as_bytes(moments));
  memories.writes("importance_dof", std::as_bytes(dof));
  for (std::size_t c = 0; c < x.size(); ++c) {
    if (std::isinf(x[c])) check::fail("x must be finite or NaN, got ", x[c], " in channel ", c);
  }
}

Moments kept(const Moments& m, double keep) {
  if (keep == 1 || !std::isfinite(m.m2)) return m;
  const DoubleDouble m2 = DoubleDouble{m.m2, m.m2_lo} * DoubleDouble{keep, 0};
  const double count = m.count * keep;
  return count > 0 ? Moments{count, m.mean, m.mean_lo, m2.hi, m2.lo} : Moments{};
}

// One value of weight 1 more: merge_moments() for that, in half of its time. dof is W - sum(w^2)/W, which merges as
// that of weights does.
void learn(double value, double keep, Moments& m, double* dof) {
  const Moments before = kept(m, keep);
  const double count = before.count + 1;
  const DoubleDouble mean{before.mean, before.mean_lo}, apart = DoubleDouble{value, 0} - mean;
  const DoubleDouble step = apart / DoubleDouble{count, 0}, new_mean = mean + step;
  // Not apart*(apart - step), which loses the digits of a count that is far below 1.
  const DoubleDouble m2 = DoubleDouble{before.m2, before.m2_lo} + apart * (step * DoubleDouble{before.count, 0});
  m = before.count > 0 && std::isfinite(m2.lo) ? Moments{count, new_mean.hi, new_mean.lo, m2.hi, m2.lo}
                                               : merge_moments(before, {1, value, 0, 0, 0});
  const double share = before.count / count;
  if (dof != nullptr) *dof = keep * *dof * share + 2 * share;
}

}  // namespace

void standardizing(std::span<const Moments> moments, const Observing& how, std::span<Moments> line) {
  check::channels("line", line.size(), static_cast<std::int64_t>(moments.size()));
  check::eps(how.eps);
  run_here([&] {
    for (std::size_t c = 0; c < moments.size(); ++c) {
      Moments m = moments[c];
      if (const double shifted = m.m2 + how.eps * m.count; std::isfinite(shifted)) {
        m.m2 = shifted;
      } else {  // for a count of 1 it is within float64 where var + eps is
        m = {1, m.mean, m.mean_lo, m.m2 / m.count + how.eps, 0};
      }
      if (!how.scale || m.m2 == 0 || m.count == 0) m = {1, m.mean, m.mean_lo, 1, 0};
      if (!how.center) m.mean = m.mean_lo = 0;
      line[c] = m;
    }
  });
}

template <class T>
void observe(std::span<const T> x, std::span<Moments> moments, std::span<double> importance_dof, std::span<T> y,
             const Observing& how) {
  const DefaultFloatingPoint environment;
  check_observation(x, moments, importance_dof, y, how);
  std::vector<Moments> line(y.size());
  run_here([&] {
    for (std::size_t c = 0; how.learn && c < x.size(); ++c) {
      const double value = static_cast<double>(x[c]);
      if (!std::isnan(value)) {
        learn(value, how.keep, moments[c], importance_dof.empty() ? nullptr : &importance_dof[c]);
      }
    }
  });
  if (y.empty()) return;
  standardizing(moments, how, line);
  const Call<T> call{.problem = {1, static_cast<std::int64_t>(x.size()), 1}, .eps = 0};
  normalize<T>(x, call, line, y, {1});
  for (T& value : y) {
    value = std::isnan(value) ? static_cast<T>(how.missing)
                              : static_cast<T>(std::clamp(static_cast<double>(value), -how.clip, how.clip));
  }
}

template void observe(std::span<const float>, std::span<Moments>, std::span<double>, std::span<float>,
                      const Observing&);
template void observe(std::span<const double>, std::span<Moments>, std::span<double>, std::span<double>,
                      const Observing&);

}  // namespace batchnorm
