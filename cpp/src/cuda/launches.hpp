// What all passes on a device launch kernels by.
#pragma once

#include <algorithm>

#include "cuda/finish.cuh"

namespace batchnorm::cuda {

// On is where kernels are launched: on.launch(kernel, grid, block, bytes of shared memory, arguments...).
template <class On>
class Launches {
 public:
  explicit Launches(On& on) : on_(on) {}

  // So many threads, in blocks.
  template <class Kernel, class... Args>
  void each(std::int64_t threads, Kernel kernel, const Args&... args) {
    if (threads == 0) return;
    on_.launch(kernel, static_cast<unsigned>((threads + kStepThreads - 1) / kStepThreads), kStepThreads,
               std::int64_t{0}, args...);
  }
  template <class Kernel, class... Args>
  void blocks(std::int64_t count, int threads, std::int64_t shared_bytes, Kernel kernel, const Args&... args) {
    if (count == 0) return;
    on_.launch(kernel, static_cast<unsigned>(count), static_cast<unsigned>(threads), shared_bytes, args...);
  }
  // One warp.
  template <class Kernel, class... Args>
  void warp(Kernel kernel, const Args&... args) {
    on_.launch(kernel, 1u, 32u, std::int64_t{0}, args...);
  }
  template <class Body>
  void visit_all(const Cut& cut, const Body& body) {
    each(cut.threads(), visit<Body>, cut, body);
  }
  template <class Body>
  void map_all(const Elements& elements, const Body& body) {
    each(elements.threads(), map<Body>, elements, body);
  }

 private:
  On& on_;
};

// Of a cut: sums of the first kind, then those of channels that want it again, which all others leave at once.
template <class T>
struct MomentsTaken {
  const T* x;
  Weights<Arithmetic<T>> weights;
  kernels::Sums* sums;
  Conditioned* conditioned;

  template <class On>
  void run(Launches<On>& on, const Cut& cut, Moments* out) const {
    const Cut again = single_rows(cut);
    take<Again::no>(on, cut, out);
    take<Again::about_shift>(on, again, out);
    take<Again::compensated>(on, again, out);
    on.each(cut.entries(), settle_moments<T>, cut, x, weights, out);
  }

 private:
  template <Again kAgain, class On>
  void take(Launches<On>& on, const Cut& cut, Moments* out) const {
    on.visit_all(cut, SumMoments<T, kAgain>{x, weights, conditioned, sums});
    on.each(cut.entries(), finish_moments<T>, cut, sums, weights, kAgain, conditioned, out);
  }
};
// Pieces of a cut, whichever way it is summed.
inline std::int64_t most_pieces(const Cut& cut) {
  return cut.segments.count * std::max(cut.pieces(), single_rows(cut).pieces());
}

}  // namespace batchnorm::cuda
