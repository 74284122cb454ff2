#include "small.hpp"

#include <type_traits>

#include "coefficients.hpp"
#include "parallel.hpp"
#include "traverse.hpp"

namespace batchnorm {
namespace {

template <class T>
constexpr bool kMayBeSmall = std::is_same_v<Arithmetic<T>, float>;

template <class T>
bool is_done_as_small(const PassCall<T>& call, const Work& work) {
  const PassOptions& options = call.options;
  return options.needed == nullptr && !options.is_turned && !call.positions &&
         is_small(call.problem, work, options.threads);
}

// f() as a task of this thread, or of one with a stack that has room; returns what it does.
template <class F>
bool as_task(const F& f) {
  bool result = false;
  run_tasks(1, 1, [&](Range) { result = f(); });
  return result;
}

OfSmall values_of(const ChannelValues& from, const Problem& problem, double absent) {
  OfSmall values;
  read_channels(from, {0, problem.channels}, absent, values.data());
  return values;
}

}  // namespace

template <class T>
bool run_small_moments(const T* x, const PassCall<T>& call, Moments* out) {
  if constexpr (kMayBeSmall<T>) {
    if (!is_done_as_small(call, call.work(true, false, 1))) return false;
    return as_task([&] { return Small<T, kSmallBlocks>(call.problem).moments(x, out); });
  }
  return false;
}

template <class T>
bool run_small_batch_norm(const T* x, const PassCall<T>& call, T* y, Moments* saved) {
  if constexpr (kMayBeSmall<T>) {
    const Work work = call.work(true, true, 2);
    if (!is_done_as_small(call, work)) return false;
    const bool around_cache = small_goes_around_cache(call.problem, work, machine());
    return as_task([&] {
      const OfSmall gamma = values_of(call.gamma, call.problem, 1), beta = values_of(call.beta, call.problem, 0);
      Small<T, kSmallBlocks> small(call.problem, around_cache);
      const bool done = small.moments(x, saved) && small.normalize(x, y, saved, call.eps, gamma.data(), beta.data());
      if (around_cache) fence_streams();
      return done;
    });
  }
  return false;
}

template <class T>
bool run_small_backward(const T* dy, const T* x, const PassCall<T>& call, const Moments* saved,
                        const FirstOutputs<T>& out) {
  if constexpr (kMayBeSmall<T>) {
    const Work work = call.work(true, true, 3);
    const bool is_plain = call.tail.bits == nullptr && out.dresidual == nullptr;
    if (!is_plain || !is_done_as_small(call, work)) return false;
    const bool around_cache = small_goes_around_cache(call.problem, work, machine());
    return as_task([&] {
      const OfSmall gamma = values_of(call.gamma, call.problem, 1);
      OfSmall dgamma, dbeta;
      Small<T, kSmallBlocks> small(call.problem, around_cache);
      if (!small.backward(dy, x, out.dx, saved, call.eps, gamma.data(), dgamma, dbeta)) return false;
      if (around_cache) fence_streams();
      for (std::int64_t c = 0; c < call.problem.channels; ++c) {
        out.dgamma.set(c, dgamma.data()[c]);
        out.dbeta.set(c, dbeta.data()[c]);
      }
      return true;
    });
  }
  return false;
}

#define BN_INSTANTIATE(T)                                                         \
  template bool run_small_moments(const T*, const PassCall<T>&, Moments*);        \
  template bool run_small_batch_norm(const T*, const PassCall<T>&, T*, Moments*); \
  template bool run_small_backward(const T*, const T*, const PassCall<T>&, const Moments*, const FirstOutputs<T>&);
BN_INSTANTIATE(Float16)
BN_INSTANTIATE(BFloat16)
BN_INSTANTIATE(float)
BN_INSTANTIATE(double)
#undef BN_INSTANTIATE

}  // namespace batchnorm
