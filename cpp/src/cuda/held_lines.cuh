// Lines that lie in one piece and fit into shared memory, some to a block: 16 threads read a line, sum it where they
// hold it, and normalize it. Each thread holds the values that it sums, so that no other waits for it.
#pragma once

#include "cuda/gpu.hpp"
#include "cuda/lines.cuh"

namespace batchnorm::cuda {

// How many lines a block holds, `stride` values apart; none where there are no such lines.
struct HeldLines {
  int lines = 0;
  std::int64_t stride = 0, shared_bytes = 0;
};
// Of a cut of lines (make_line_cut): of one chunk each. The lines of a warp lie in other banks. `with_bits`: of the
// bits of a ReLU eight neighbouring values are to be a byte.
template <class T>
HeldLines plan_held_lines(const Cut& cut, const Device& device, bool with_bits) {
  constexpr int kMostLines = kStepThreads / kLanes, kLeastLines = 32 / kLanes;
  const std::int64_t width = cut.lines.width;
  if (cut.lines.inner != 1 || !cut.planar || cut.runs.chunks != 1 || (with_bits && width % 8 != 0)) return {};
  HeldLines held;
  held.stride = width + (16 - width % 32 + 32) % 32;
  for (held.lines = kMostLines; held.lines >= kLeastLines; held.lines /= 2) {
    held.shared_bytes = held.lines * held.stride * std::int64_t{sizeof(T)};
    if (held.shared_bytes <= device.shared_bytes) return held;
  }
  return {};
}

// A line as its threads hold it.
template <class T>
struct HeldLine {
  T* values;
  std::int64_t width;
  int lane;

  // Some values are on their way at a time.
  BN_DEVICE void load(const T* from) {
    constexpr int kSome = 8;
    for (std::int64_t j = lane; j < width; j += kSome * kLanes) {
      T some[kSome];
      BN_UNROLLED for (int k = 0; k < kSome; ++k) {
        if (j + k * kLanes < width) some[k] = from[j + k * kLanes];
      }
      BN_UNROLLED for (int k = 0; k < kSome; ++k) {
        if (j + k * kLanes < width) values[j + k * kLanes] = some[k];
      }
    }
  }
  template <class Terms>
  BN_DEVICE void sum(Terms& terms) const {
    for (std::int64_t j = lane; j < width; j += kLanes) terms.add(widened(values[j]));
  }
  // Once in a blue moon, by each thread alone.
  BN_DEVICE_CALL void settle(Moments& m) const { settle_line(values, width, 1, m); }
};

// The moments of a line, which all its threads get. All threads of a warp come; a line that is not there has a width of
// 0.
template <class T>
BN_DEVICE Moments moments_of(const HeldLine<T>& line) {
  using A = Arithmetic<T>;
  const DoubleDouble count{static_cast<double>(line.width), 0};
  Moments m;
  typename TermsOfMoments<T, Again::no>::Type about_zero{};
  line.sum(about_zero);
  const kernels::Sums sums = folded(about_zero);
  if (line.width > 0) moments_from_sums<A, double>(count, 0, &sums).put(&m);

  const bool shifts = line.width > 0 && needs_shift<A>(m);
  if (__ballot_sync(~0u, shifts) != 0) {
    typename TermsOfMoments<T, Again::about_shift>::Type about_shift{
        static_cast<double>(static_cast<A>(m.mean)), {}, {}};
    line.sum(about_shift);
    const kernels::Sums again = folded(about_shift);
    if (shifts) moments_from_sums<A, double>(count, about_shift.shift, &again).put(&m);
  }
  const bool cancels = line.width > 0 && mean_below(m, Conditioning<A>::kCompensateBelow) && std::isfinite(m.m2);
  if (__ballot_sync(~0u, cancels) != 0) {
    typename TermsOfMoments<T, Again::compensated>::Type compensated{};
    line.sum(compensated);
    const kernels::Sums again = folded(compensated);
    if (cancels) moments_from_sums<A, double>(count, 0, &again).put(&m);
  }
  if (line.width > 0 && wants_values<A>(MomentsOf<double>::at(&m))) line.settle(m);
  return m;
}

template <class T>
__global__ void __launch_bounds__(kStepThreads)
    hold_lines(const __grid_constant__ LineCall call, const __grid_constant__ Normalize<T, OfLine<T>> body,
               const Arithmetic<T>* weights, const int* wide, std::int64_t stride, Moments* saved) {
  BN_SHARED(memory);
  const int lane = static_cast<int>(threadIdx.x) % kLanes, row = static_cast<int>(threadIdx.x) / kLanes;
  const std::int64_t number = std::int64_t{blockIdx.x} * (blockDim.x / kLanes) + row, width = call.lines.width;
  const bool is_there = number < call.count;
  HeldLine<T> line{reinterpret_cast<T*>(memory) + row * stride, is_there ? width : 0, lane};
  const std::int64_t begin = is_there ? call.lines.begin(number) : 0;
  const std::int64_t position = is_there ? call.lines.position(number) : 0;
  line.load(body.x + begin);
  __syncwarp();
  Moments m = moments_of(line);
  if (is_there && weights != nullptr && weights[position] == 0) m = {};
  if (is_there && lane == 0) saved[number] = m;

  const auto known = OfLine<T>::known_of(MomentsOf<double>::at(&m), call, *wide != 0);
  const std::int64_t c = begin - position * call.lines.channels;
  for (std::int64_t j0 = 0; j0 < width; j0 += kLanes) {
    const std::int64_t j = j0 + lane, at = begin + j;
    const bool goes = is_there && j < width;
    bool bit = false;
    if (goes) {
      const T in[] = {line.values[j], body.residual == nullptr ? T(0) : body.residual[at]};
      bit = body.put(known, in, {0, c + j, 0, 0}, at, position);
    }
    if (body.bits() != nullptr) put_bits(body.bits(), at, goes, bit);
  }
}

}  // namespace batchnorm::cuda
