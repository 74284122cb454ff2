// Batch normalization of dense arrays of float16, bfloat16, float32 and float64.
//
// Per channel, over the m = outer*inner values of that channel:
//     mean = sum(x)/m,  var = sum((x - mean)^2)/m  (biased),  rstd = 1/sqrt(var + eps)
//     y = (x - mean)*rstd*gamma + beta             (Ioffe & Szegedy 2015, algorithm 1)
// Where var + eps is 0, rstd is taken as 0, so that y = beta.
//
// All functions here:
// - are templates instantiated for T = float, T = double, and Float16 and BFloat16 (float16.hpp), for which a result in
//   T is that of the same values as float, rounded once more, to T; statistics and sums are the same;
// - check their arguments and throw std::invalid_argument ("gamma must have 64 values, got 32") before
//   anything is written; may throw std::bad_alloc, again before anything is written;
// - hold the bounds of the numerical contract (README) for every finite float input, and give the same bits for
//   any number of threads, any instruction set of the list in info.hpp, in place or not;
// - refuse outputs that share memory with another argument, but for tensors where it is said that they may;
// - keep a NaN or infinity in its own channel;
// - may be called from several threads at once, on outputs that do not overlap; from threads with stacks of 64 KB; in a
//   process that forks, whose children have threads of their own; and from an object that is unloaded later;
// - neither use nor change the caller's floating-point environment: subnormals count even under FTZ/DAZ.
// Spans may start at any address that is a multiple of alignof(T).
#pragma once

#include <limits>
#include <span>

#include "batchnorm/call.hpp"
#include "batchnorm/float16.hpp"
#include "batchnorm/info.hpp"
#include "batchnorm/types.hpp"
#include "batchnorm/version.hpp"

namespace batchnorm {

// ---- moments ---------------------------------------------------------------------------------------------------

// Moments of each channel of x; of each segment's.
// x: problem.size() values, not modified. out: one entry per channel, or per segment and channel (or `width` of these).
// count is the sum of the weights; of nothing all fields are 0.
template <class T>
void moments(std::span<const T> x, const Call<T>& call, std::span<Moments> out, const Options& options = {});

// Moments of the union of two sets of values (Chan, Golub, LeVeque 1979). A set of count 0 changes nothing.
[[nodiscard]] Moments merge(const Moments& a, const Moments& b);

// m2/(count - ddof), rounded once: ddof = 0 is the biased variance that normalizes, 1 the unbiased one.
// NaN where ddof leaves less than 1. Of no values the biased variance is infinity: normalizing by that gives beta, as
// batch_norm() does there.
[[nodiscard]] double variance(const Moments& moments, int ddof = 0);

// 1/sqrt(var + eps) with the biased variance, rounded once; 0 where var + eps or the count is 0.
[[nodiscard]] double rstd(const Moments& moments, double eps);

// running = (1 - update_rate)*running + update_rate*batch, in float64, for the mean and for the variance with `ddof`
// (1: unbiased; 0: biased). update_rate is in [0, 1]: 0 leaves the bits, 1 stores the batch value.
// A channel of count 0 is left alone; one where ddof leaves less than 1 throws before anything changes.
void update_running(std::span<double> running_mean, std::span<double> running_var, std::span<const Moments> batch,
                    double update_rate, int ddof);

// ---- observations ----------------------------------------------------------------------------------------------

// How observe() learns, and what y it gives.
struct Observing {
  // What has been seen counts for this much of what it did, from 0 to 1: 1 pools all, 1 - rate follows exponentially.
  double keep = 1;
  double eps = 0;                                             // finite, >= 0
  double clip = std::numeric_limits<double>::infinity();      // y is from -clip to clip; > 0
  bool center = true, scale = true;                           // without: y as of a mean of 0, of a variance of 1
  double missing = std::numeric_limits<double>::quiet_NaN();  // y of a value that is missing
  bool learn = true;                                          // else the moments stay as they are
};

// The moments by which normalize(), with an eps of 0, gives of what is known
//     y = (x - mean)*rstd,  rstd = 1/sqrt(var + eps), var biased, and 1 where var + eps or the count is 0;
// of a mean of 0 without `center`, a variance of 1 without `scale`. line: one entry a channel; may be exactly moments.
void standardizing(std::span<const Moments> moments, const Observing& how, std::span<Moments> line);

// One observation more of a stream, a value of each channel: it enters the moments, whose count and m2 are multiplied
// with `keep` before; and y is what normalize() gives by the line of the moments that there are then, clipped. NaN is a
// missing value: it changes nothing of its channel. Infinity throws, before anything is written. moments: one entry a
// channel, of count 0 at the start. importance_dof: none, or one value of each channel beside them, count -
// sum(w^2)/count of the weights w that values have by `keep`. y: like x, which it may be, or empty. For T = float and
// double, by the calling thread alone. mean and m2 have twice the digits of float64.
template <class T>
void observe(std::span<const T> x, std::span<Moments> moments, std::span<double> importance_dof, std::span<T> y,
             const Observing& how = {});

// ---- forward ---------------------------------------------------------------------------------------------------

// Training: y from the statistics of this batch, which `saved` receives for the backward pass.
// y: problem.size() values; may be exactly x or exactly the residual, must not overlap them otherwise.
// Throws where a channel has exactly one value that counts: one value has no variance (in segments it has one of 0). An
// empty batch gives moments of count 0; where nothing counts, y is beta wherever it is normalized.
template <class T>
void batch_norm(std::span<const T> x, const Call<T>& call, std::span<T> y, std::span<Moments> saved,
                const Options& options = {});

// Inference: y from given statistics of one group; var is the biased variance (or what the caller takes for it), >= 0
// or NaN. Of weights only what is 0 matters, and `padding`, which must not be `normalize`.
template <class T>
void normalize(std::span<const T> x, const Call<T>& call, ChannelValues mean, ChannelValues var, std::span<T> y,
               const Options& options = {});

// Second half of training alone: y from moments() that may have been merged with those of other batches or ranks. The
// bits are those of batch_norm(); the largest abs(y - beta) of its bound is that of all values that the moments are of.
template <class T>
void normalize(std::span<const T> x, const Call<T>& call, std::span<const Moments> moments, std::span<T> y,
               const Options& options = {});

// ---- backward --------------------------------------------------------------------------------------------------
//
// With a ReLU, call.tail.bits are those that forward wrote: dy is let through them, as dresidual, and what follows is
// of that. The residual and beta are not looked at.

// First half of the backward pass of training alone: sums over this part of the batch, about the means of `moments`;
// over the positions whose y depends on the channel's statistics: all where padding is `normalize`, else those that
// count.
template <class T>
void grad_sums(std::span<const T> dy, std::span<const T> x, const Call<T>& call, std::span<const Moments> moments,
               std::span<GradSums> out, const Options& options = {});

// Second half alone. With xhat = (x - mean)*rstd, w the weight (1 where there are none) and W = moments.count (that of
// the whole batch, over all ranks):
//     dx = gamma*rstd*(dy - w/W*sum(dy) - w/W*xhat*sum(dy*xhat))
// and where the weight is 0: 0 (padding `zero`), dy (`keep`), gamma*rstd*dy (`normalize`).
// dx, dresidual: problem.size() values each (dresidual may be empty); each may be exactly dy or exactly x, must not
// overlap these otherwise, nor each other.
template <class T>
void grad_input(std::span<const T> dy, std::span<const T> x, const Call<T>& call, std::span<const Moments> moments,
                std::span<const GradSums> sums, std::span<T> dx, std::span<T> dresidual = {},
                const Options& options = {});

// Both halves: gradients of batch_norm() from what it saved.
//     dgamma = sum(dy*xhat), dbeta = sum(dy), dx as above; sums over the positions of grad_sums()
// dgamma and dbeta: problem.channels values, summed over all segments, for which 16 bytes a segment and channel are
// taken; or one value per segment and channel.
template <class T>
void batch_norm_backward(std::span<const T> dy, std::span<const T> x, const Call<T>& call,
                         std::span<const Moments> saved, const Gradients<T>& out, const Options& options = {});

// Gradients of normalize(), whose statistics are constants of one group: dx = gamma*rstd*dy, dgamma and dbeta as above.
// x is read only where dgamma is asked for.
template <class T>
void normalize_backward(std::span<const T> dy, std::span<const T> x, const Call<T>& call, ChannelValues mean,
                        ChannelValues var, const Gradients<T>& out, const Options& options = {});

// ---- derivatives -----------------------------------------------------------------------------------------------

// n is the number of values that share statistics. Forward-mode: the derivative of batch_norm()'s y along the tangents
// x_dot, gamma_dot and beta_dot (0 where absent):
//     y_dot = gamma*rstd*(x_dot - sum(x_dot)/n - xhat*sum(x_dot*xhat)/n) + gamma_dot*xhat + beta_dot
// In the sums w*x_dot stands for x_dot where there are weights. call.tail: the residual is its tangent, which is added;
// bits are those that forward wrote, through which y_dot is let. At positions that do not count y_dot is 0 or x_dot.
// y_dot: problem.size() values; may be exactly x_dot or exactly x, must not overlap them otherwise.
template <class T>
void batch_norm_jvp(std::span<const T> x_dot, std::span<const T> x, const Call<T>& call, std::span<const Moments> saved,
                    ChannelValues gamma_dot, ChannelValues beta_dot, std::span<T> y_dot, const Options& options = {});

// The same of normalize(), whose statistics may have tangents of their own:
//     y_dot = gamma*rstd*(x_dot - mean_dot - xhat*rstd*var_dot/2) + gamma_dot*xhat + beta_dot
// x is read only where gamma_dot or var_dot is given.
template <class T>
void normalize_jvp(std::span<const T> x_dot, std::span<const T> x, const Call<T>& call, ChannelValues mean,
                   ChannelValues var, ChannelValues mean_dot, ChannelValues var_dot, ChannelValues gamma_dot,
                   ChannelValues beta_dot, std::span<T> y_dot, const Options& options = {});

// Double backward: gradients by dy, x and gamma of sum(v*dx) + sum(v_dgamma*dgamma) + sum(v_dbeta*dbeta), where dx,
// dgamma and dbeta are those of batch_norm_backward(); v_dgamma and v_dbeta are 0 where absent. With
// v0 = v - sum(v)/n, g0 = dy - sum(dy)/n, a = sum(v*xhat)/n, b = sum(dy*xhat)/n, c = sum(v0*g0)/n:
//     ddy = gamma*rstd*(v0 - a*xhat) + v_dgamma*xhat + v_dbeta
//     dx = -gamma*rstd^2*(b*v0 + a*g0 + (c - 3*a*b)*xhat) + v_dgamma*rstd*(g0 - b*xhat)
//     dgamma = rstd*n*(c - a*b)
// Of a call of one group, without weights and ReLU; all else is refused.
// ddy and dx: problem.size() values, dgamma: problem.channels values; what is empty is not computed. dx, or ddy without
// dx, may be exactly v, dy or x; must not overlap them otherwise.
template <class T>
void batch_norm_double_backward(std::span<const T> v, std::span<const T> dy, std::span<const T> x, const Call<T>& call,
                                std::span<const Moments> saved, ChannelValues v_dgamma, ChannelValues v_dbeta,
                                std::span<T> ddy, std::span<T> dx, ChannelOutput dgamma, const Options& options = {});

// The same of normalize_backward(), whose statistics are constants:
//     ddy = gamma*rstd*v + v_dgamma*xhat + v_dbeta,  dx = v_dgamma*rstd*dy,  dgamma = rstd*sum(v*dy)
// x is read only where v_dgamma is given.
template <class T>
void normalize_double_backward(std::span<const T> v, std::span<const T> dy, std::span<const T> x, const Call<T>& call,
                               ChannelValues mean, ChannelValues var, ChannelValues v_dgamma, ChannelValues v_dbeta,
                               std::span<T> ddy, std::span<T> dx, ChannelOutput dgamma, const Options& options = {});

// ---- without a Call: everything is one group, all counts, nothing follows ---------------------------------------

template <class T>
void moments(std::span<const T> x, const Problem& problem, std::span<Moments> out, const Options& options = {}) {
  moments(x, Call<T>{.problem = problem}, out, options);
}
template <class T>
void batch_norm(std::span<const T> x, const Problem& problem, ChannelValues gamma, ChannelValues beta, double eps,
                std::span<T> y, std::span<Moments> saved, const Options& options = {}) {
  batch_norm(x, Call<T>{.problem = problem, .gamma = gamma, .beta = beta, .eps = eps}, y, saved, options);
}
template <class T>
void normalize(std::span<const T> x, const Problem& problem, ChannelValues mean, ChannelValues var, ChannelValues gamma,
               ChannelValues beta, double eps, std::span<T> y, const Options& options = {}) {
  normalize(x, Call<T>{.problem = problem, .gamma = gamma, .beta = beta, .eps = eps}, mean, var, y, options);
}
template <class T>
void normalize(std::span<const T> x, const Problem& problem, std::span<const Moments> moments, ChannelValues gamma,
               ChannelValues beta, double eps, std::span<T> y, const Options& options = {}) {
  normalize(x, Call<T>{.problem = problem, .gamma = gamma, .beta = beta, .eps = eps}, moments, y, options);
}
template <class T>
void grad_sums(std::span<const T> dy, std::span<const T> x, const Problem& problem, std::span<const Moments> moments,
               std::span<GradSums> out, const Options& options = {}) {
  grad_sums(dy, x, Call<T>{.problem = problem}, moments, out, options);
}
template <class T>
void grad_input(std::span<const T> dy, std::span<const T> x, const Problem& problem, std::span<const Moments> moments,
                std::span<const GradSums> sums, ChannelValues gamma, double eps, std::span<T> dx,
                const Options& options = {}) {
  grad_input(dy, x, Call<T>{.problem = problem, .gamma = gamma, .eps = eps}, moments, sums, dx, {}, options);
}
template <class T>
void batch_norm_backward(std::span<const T> dy, std::span<const T> x, const Problem& problem,
                         std::span<const Moments> saved, ChannelValues gamma, double eps, std::span<T> dx,
                         ChannelOutput dgamma, ChannelOutput dbeta, const Options& options = {}) {
  const Call<T> call{.problem = problem, .gamma = gamma, .eps = eps};
  batch_norm_backward(dy, x, call, saved, Gradients<T>{.dx = dx, .dgamma = dgamma, .dbeta = dbeta}, options);
}
template <class T>
void normalize_backward(std::span<const T> dy, std::span<const T> x, const Problem& problem, ChannelValues mean,
                        ChannelValues var, ChannelValues gamma, double eps, std::span<T> dx, ChannelOutput dgamma,
                        ChannelOutput dbeta, const Options& options = {}) {
  const Call<T> call{.problem = problem, .gamma = gamma, .eps = eps};
  normalize_backward(dy, x, call, mean, var, Gradients<T>{.dx = dx, .dgamma = dgamma, .dbeta = dbeta}, options);
}

}  // namespace batchnorm
