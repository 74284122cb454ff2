// Steps on tiles in the first-level cache: what no pass does by itself (staged.hpp puts them together).
#pragma once

#include <type_traits>

#include "kernels/accumulate-inl.hpp"
#include "kernels/apply-inl.hpp"

namespace batchnorm::kernels {
namespace {

template <class T>
void widen(const T* from, std::int64_t n, Arithmetic<T>* to) {
  for (std::int64_t i = 0; i < n; i += kLanes) {
    store_upto(to + i, n - i, load_upto<Arithmetic<T>>(from + i, n - i, T(0)));
  }
}
template <class T>
void narrow(const Arithmetic<T>* from, std::int64_t n, T* to) {
  for (std::int64_t i = 0; i < n; i += kLanes) {
    store_upto(to + i, n - i, load_upto<Arithmetic<T>>(from + i, n - i, 0));
  }
}

template <class A>
void keep_bits(const A* from, const std::uint8_t* bits, std::int64_t first_bit, std::int64_t n, A* to) {
  for (std::int64_t i = 0; i < n; i += kLanes) {
    store_upto(to + i, n - i, load_kept<A>(from + i, bits_at(bits, first_bit + i), n - i));
  }
}
// The stretches as one piece of memory, whose vectors begin at lines of `to`: of runs of 7 x 7 values each would lie in
// two lines otherwise, and be stored twice.
template <Stores kStores, class A>
BN_INLINE void put_counted_as(const A* tile, const A* weights, const A* input, std::int64_t n, std::int64_t total,
                              A* to) {
  const auto put = [&](std::int64_t at, std::int64_t w, std::int64_t count) {
    const auto some = [count](const A* p) { return load_upto<A>(p, count, A(0)); };
    const Lanes<A> other = input == nullptr ? broadcast(A(0)) : some(input + at);
    const Lanes<A> r = where_counted(some(weights + w), some(tile + at), other);
    if constexpr (kStores == Stores::around_cache) {
      if (count == kLanes) return stream_lanes(to + at, r);
    }
    store_upto(to + at, count, r);
  };
  std::int64_t at = values_to_line(to);
  if (at > total) at = total;
  if (at > 0) put(0, 0, at);
  // Vectors up to the end of the weights have no branch.
  for (std::int64_t w = at; at + kLanes <= total;) {
    if (w >= n) w -= n;
    const std::int64_t end = n - w < total - at - (kLanes - 1) ? at + (n - w) : total - (kLanes - 1);
    for (; at < end; at += kLanes, w += kLanes) put(at, w, kLanes);
  }
  if (at < total) put(at, at % n, total - at);
}
template <class A>
void put_counted(const A* tile, const A* weights, const A* input, std::int64_t n, std::int64_t times, bool around_cache,
                 A* to) {
  if (around_cache) return put_counted_as<Stores::around_cache>(tile, weights, input, n, n * times, to);
  put_counted_as<Stores::ordinary>(tile, weights, input, n, n * times, to);
}

// Of rows with one weight each, of 3 channels up to half a vector's: the weights of a vector of values are permuted
// from the few that it lies within, by numbers that come again after as many vectors as there are channels. (A store
// for every row took masked training of 65536 rows of 3 channels to 5 times the time without a mask.)
template <class W>
struct RepeatedNumbers {
  static constexpr int kWidth = Lanes<W>::kWidth, kMost = kWidth / 2;
  using One = std::conditional_t<sizeof(W) == sizeof(float), std::int32_t, std::int64_t>;

  alignas(64) One number[kMost + 1][kMost][kWidth]{};  // of `channels` channels, vector v and lane l: behind that row
  std::int64_t row[kMost + 1][kMost]{};

  constexpr RepeatedNumbers() {
    for (int channels = 1; channels <= kMost; ++channels) {
      for (int v = 0; v < channels; ++v) {
        const int first = v * kWidth / channels;
        row[channels][v] = first;
        for (int l = 0; l < kWidth; ++l) {
          number[channels][v][l] = static_cast<One>((v * kWidth + l) / channels - first);
        }
      }
    }
  }
};
template <class W>
BN_INLINE void repeat_by_number(const W* weights, std::int64_t rows, std::int64_t channels, W* to) {
  constexpr int kWidth = Lanes<W>::kWidth;
  using Numbers = RepeatedNumbers<W>;
  typedef typename Numbers::One Vector __attribute__((vector_size(sizeof(typename Lanes<W>::Native))));
  static constexpr Numbers kNumbers;
  W* const end = to + rows * channels;
  const auto put_rows = [&](const W* from) __attribute__((always_inline)) {  // kWidth of them, or those that are left
    for (std::int64_t v = 0; v < channels && to < end; ++v, to += kWidth) {
      Vector number;
      __builtin_memcpy(&number, kNumbers.number[channels][v], sizeof number);
      const typename Lanes<W>::Native some = load_by_number(from + kNumbers.row[channels][v], number);
      __builtin_memcpy(to, &some, sizeof some);
    }
  };
  // Behind the first row of a vector as many weights are loaded as it has lanes.
  for (; rows >= 2 * kWidth; rows -= kWidth, weights += kWidth) put_rows(weights);
  W last[3 * kWidth];
  for (std::int64_t r = 0; r < rows; ++r) last[r] = weights[r];
  for (const W* from = last; to < end; from += kWidth) put_rows(from);
}

// Each store may reach into the next one's values, which are written after it.
template <class W>
void repeat_weights(const W* weights, std::int64_t rows, std::int64_t channels, std::int64_t inner, W* to) {
  constexpr int kWidth = Lanes<W>::kWidth;
  if (inner == 1 && channels >= 3 && channels <= kWidth / 2) return repeat_by_number(weights, rows, channels, to);
  if (inner == 1) {
    for (std::int64_t r = 0; r < rows; ++r, to += channels) {
      const typename Lanes<W>::Native one = weights[r] - typename Lanes<W>::Native{};
      for (std::int64_t c = 0; c < channels; c += kWidth) __builtin_memcpy(to + c, &one, sizeof one);
    }
    return;
  }
  if (inner <= kLanes) {
    for (std::int64_t r = 0; r < rows; ++r, weights += inner) {
      const Lanes<W> some = load_upto<W>(weights, inner, W(0));
      for (std::int64_t c = 0; c < channels; ++c, to += inner) store(to, some);
    }
    return;
  }
  for (std::int64_t r = 0; r < rows; ++r, weights += inner) {
    for (std::int64_t c = 0; c < channels; ++c, to += inner) {
      for (std::int64_t i = 0; i < inner; i += kLanes) {
        store_upto(to + i, inner - i, load_upto<W>(weights + i, inner - i, W(0)));
      }
    }
  }
}

// A loop that compilers turn into vectors, since the counters are as wide as the weights. All of a mask is good.
template <class W>
WeightCounts count_weights(const W* w, std::int64_t n) {
  using Counter = std::conditional_t<sizeof(W) == sizeof(std::int32_t), std::int32_t, std::int64_t>;
  Counter zeros = 0, ones = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    zeros += static_cast<Counter>(w[i] == 0);
    ones += static_cast<Counter>(w[i] == 1);
  }
  if (zeros + ones == n) return {zeros, ones, n, static_cast<double>(ones), 0, 1};
  constexpr W kMost = sizeof(W) == sizeof(float) ? static_cast<W>(__FLT_MAX__) : static_cast<W>(__DBL_MAX__);
  using Native = typename Lanes<W>::Native;
  decltype(Native{} < Native{}) bad[Lanes<W>::kVectors] = {};
  Lanes<W> least = broadcast(W(1));
  Compensated sum;
  for (std::int64_t i = 0; i < n; i += kLanes) {
    const Lanes<W> some = load_upto<W>(w + i, n - i, W(0));
    BN_UNROLL for (int k = 0; k < Lanes<W>::kVectors; ++k) {
      const Native v = some.v[k];
      bad[k] -= ~((v >= 0) & (v <= kMost));
      least.v[k] = ((v > 0) & (v < least.v[k])) ? v : least.v[k];
    }
    const Lanes<double> wide = load_upto<double>(w + i, n - i, W(0));
    BN_UNROLL for (int k = 0; k < Lanes<double>::kVectors; ++k) sum.add(k, wide.v[k]);
  }
  WeightCounts counts{zeros, ones, n, 0, 0, 1};
  for (int k = 0; k < Lanes<W>::kVectors; ++k) {
    for (int l = 0; l < Lanes<W>::kWidth; ++l) {
      counts.good -= static_cast<std::int64_t>(bad[k][l]);
      if (least.v[k][l] < counts.least) counts.least = least.v[k][l];
    }
  }
  fold(sum, &counts.total, &counts.total_lo);
  return counts;
}

}  // namespace
}  // namespace batchnorm::kernels
