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

// a where the weight is not 0, else b.
template <class A>
BN_INLINE Lanes<A> where_counted(const Lanes<A>& weight, const Lanes<A>& a, const Lanes<A>& b) {
  Lanes<A> r;
  BN_UNROLL for (int k = 0; k < Lanes<A>::kVectors; ++k) r.v[k] = weight.v[k] != 0 ? a.v[k] : b.v[k];
  return r;
}
template <class A>
void keep_counted(const A* from, const A* weights, std::int64_t n, A* to) {
  const Lanes<A> zero = broadcast(A(0));
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    store(to + i, where_counted(load(weights + i), load(from + i), zero));
  }
  for (; i < n; ++i) to[i] = weights[i] != 0 ? from[i] : A(0);
}
template <class A>
void keep_bits(const A* from, const std::uint8_t* bits, std::int64_t first_bit, std::int64_t n, A* to) {
  for (std::int64_t i = 0; i < n; i += kLanes) {
    store_upto(to + i, n - i, load_kept<A>(from + i, bits_at(bits, first_bit + i), n - i));
  }
}
template <Stores kStores, class A>
BN_INLINE void put_counted_as(const A* tile, const A* weights, const A* input, std::int64_t n, A* to) {
  const Lanes<A> zero = broadcast(A(0));
  const auto one = [&](std::int64_t i) { to[i] = weights[i] != 0 ? tile[i] : input == nullptr ? A(0) : input[i]; };
  std::int64_t i = 0;
  if constexpr (kStores == Stores::around_cache) {
    for (const std::int64_t line = values_to_line(to); i < line && i < n; ++i) one(i);
  }
  for (; i + kLanes <= n; i += kLanes) {
    const Lanes<A> r = where_counted(load(weights + i), load(tile + i), input == nullptr ? zero : load(input + i));
    if constexpr (kStores == Stores::around_cache) {
      stream_lanes(to + i, r);
    } else {
      store(to + i, r);
    }
  }
  for (; i < n; ++i) one(i);
}
template <class A>
void put_counted(const A* tile, const A* weights, const A* input, std::int64_t n, bool around_cache, A* to) {
  if (around_cache) return put_counted_as<Stores::around_cache>(tile, weights, input, n, to);
  put_counted_as<Stores::ordinary>(tile, weights, input, n, to);
}

// Of rows with one weight each, of 3 channels up to half a vector's: the weights of a vector of values are permuted
// from the few that it lies within, by numbers that come again after as many vectors as there are channels. (A store
// for every row took masked training of 65536 rows of 3 channels to 5 times the time without a mask.)
template <class W>
BN_INLINE void repeat_by_number(const W* weights, std::int64_t rows, std::int64_t channels, W* to) {
  constexpr int kWidth = Lanes<W>::kWidth;
  using One = std::conditional_t<sizeof(W) == sizeof(float), std::int32_t, std::int64_t>;
  typedef One Numbers __attribute__((vector_size(sizeof(typename Lanes<W>::Native))));
  Numbers numbers[kWidth];
  for (std::int64_t first = 0; first < channels; ++first) {
    One number = 0;  // (first + l)/channels; divisions would take longer than the tile
    std::int64_t next = channels - first;
    for (int l = 0; l < kWidth; ++l) {
      if (l == next) ++number, next += channels;
      numbers[first][l] = number;
    }
  }
  const std::int64_t total = rows * channels, rows_a_vector = kWidth / channels, rest = kWidth % channels;
  std::int64_t at = 0, row = 0, first = 0;
  for (; row + kWidth <= rows; at += kWidth) {  // as many weights are loaded
    const typename Lanes<W>::Native some = load_by_number(weights + row, numbers[first]);
    __builtin_memcpy(to + at, &some, sizeof some);
    row += rows_a_vector;
    first += rest;
    if (first >= channels) first -= channels, ++row;
  }
  for (; at < total; ++at) to[at] = weights[at / channels];
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

// Loops that compilers turn into vectors, since the counters are as wide as the weights. All of a mask is good.
template <class W>
WeightCounts count_weights(const W* w, std::int64_t n) {
  using Counter = std::conditional_t<sizeof(W) == sizeof(std::int32_t), std::int32_t, std::int64_t>;
  constexpr W kMost = sizeof(W) == sizeof(float) ? static_cast<W>(__FLT_MAX__) : static_cast<W>(__DBL_MAX__);
  Counter zeros = 0, ones = 0, good = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    zeros += static_cast<Counter>(w[i] == 0);
    ones += static_cast<Counter>(w[i] == 1);
  }
  if (zeros + ones == n) return {zeros, ones, n, static_cast<double>(ones), 0};
  for (std::int64_t i = 0; i < n; ++i) {
    good += static_cast<Counter>(w[i] >= 0) & static_cast<Counter>(w[i] <= kMost);
  }
  WeightCounts counts{zeros, ones, good, 0, 0};
  Compensated sum;
  for (std::int64_t i = 0; i < n; i += kLanes) {
    const Lanes<double> some = load_upto<double>(w + i, n - i, W(0));
    BN_UNROLL for (int k = 0; k < Lanes<double>::kVectors; ++k) sum.add(k, some.v[k]);
  }
  fold(sum, &counts.total, &counts.total_lo);
  return counts;
}

}  // namespace
}  // namespace batchnorm::kernels
