// Tiles: some values of a tensor in the first-level cache, in the type that a step computes in, and the weights beside
// them. staged_sums.cpp and staged_maps.cpp are made of these.
#pragma once

#include <algorithm>
#include <type_traits>

#include "counted.hpp"
#include "kernels/table.hpp"
#include "plan.hpp"

namespace batchnorm {

// What repeat_weights may write too much, and what vectors lie before a line.
constexpr std::int64_t kMargin = 4 * kernels::kVectorColumns;

template <class T>
constexpr bool kIsSixteen = sizeof(T) == 2;

// How far ahead values are asked for, into the second-level cache, where a step reads what no kernel has fetched: the
// machine's own prefetchers stop at the end of a page.
constexpr std::int64_t kStepsAheadBytes = 4096;
template <class T>
void fetch_ahead(const T* from, std::int64_t n) {
  const char* begin = reinterpret_cast<const char*>(from) + kStepsAheadBytes;
  for (std::int64_t at = 0; at < n * static_cast<std::int64_t>(sizeof(T)); at += kernels::kStreamBytes) {
    __builtin_prefetch(begin + at, 0, 2);
  }
}

// n values in the type V of a tile, copied.
template <class V, class T>
void read(const kernels::KernelTable& table, const T* from, std::int64_t n, V* to) {
  if constexpr (kIsSixteen<T> && sizeof(V) == sizeof(float)) {
    table.of<T>().widen(from, n, to);
  } else {
    for (std::int64_t i = 0; i < n; ++i) to[i] = static_cast<V>(from[i]);
  }
}
// The same, where they lie if they have that type.
template <class V, class T>
const V* in_tile(const kernels::KernelTable& table, const T* from, std::int64_t n, V* memory) {
  if constexpr (std::is_same_v<V, T>) {
    return from;
  } else {
    read(table, from, n, memory);
    return memory;
  }
}
template <class T>
void write(const kernels::KernelTable& table, const Arithmetic<T>* from, std::int64_t n, T* to) {
  if constexpr (kIsSixteen<T>) {
    table.of<T>().narrow(from, n, to);
  } else if (from != to) {
    std::copy_n(from, n, to);
  }
}

// `count` rows of `width` columns, the first of which begins at `offset`, and in the tensor at `column` of a row.
struct RowsOfTile {
  std::int64_t offset, count, width, column;
};
// f(RowsOfTile) for some rows of a block at a time, of at most `widest` columns and, where that is less than a row,
// `tile` values.
template <class F>
void for_row_tiles(std::int64_t offset, std::int64_t column, const kernels::Rows& rows, std::int64_t tile,
                   std::int64_t widest, const F& f) {
  for (std::int64_t c = 0; c < rows.columns; c += widest) {
    const std::int64_t width = std::min(widest, rows.columns - c), most = std::max<std::int64_t>(tile / width, 1);
    for (std::int64_t r = 0; r < rows.count; r += most) {
      f(RowsOfTile{offset + r * rows.stride + c, std::min(most, rows.count - r), width, column + c});
    }
  }
}

// The tail alone: -0 as the offset leaves every value as it is.
template <class A>
void follow(const kernels::KernelTable& table, const A* in, A* out, const kernels::Tail<A>& tail, std::int64_t n) {
  const kernels::Affine<A> same{A(0), A(1), A(-0.0)};
  table.of<A>().runs_normalize(in, out, tail, {.length = n, .count = 1, .stride = 0}, &same);
}

// ---- weights ----

// n weights in the type V of a tile, where they lie if they have it.
template <class V, class W>
const V* weights_in_tile(const W* weights, std::int64_t n, V* memory) {
  if constexpr (std::is_same_v<V, W>) {
    return weights;
  } else {
    std::copy_n(weights, n, memory);
    return memory;
  }
}

// One per value, of rows `stride` values apart. The memory has kMargin more than that.
template <class V, class T>
const V* repeated_weights(const kernels::KernelTable& table, const Positions<T>& positions, const RowsOfTile& tile,
                          std::int64_t stride, V* memory) {
  using W = typename Positions<T>::W;
  const auto [outer, channels, inner] = positions.problem;
  const std::int64_t tensor_row = channels * inner;
  if constexpr (std::is_same_v<V, W>) {
    if (tile.width == stride && stride % tensor_row == 0) {
      table.of<V>().repeat_weights(positions.of_row(tile.offset), tile.count * stride / tensor_row, channels, inner,
                                   memory);
      return memory;
    }
  }
  V* to = memory;
  for (std::int64_t r = 0; r < tile.count; ++r) {
    std::int64_t at = tile.offset + r * stride, i = at % inner, left = tensor_row - at % tensor_row;
    const W* w = positions.of_row(at);
    for (std::int64_t e = 0; e < tile.width; ++e) {
      *to++ = static_cast<V>(w[i]);
      if (++i == inner) i = 0;
      if (--left == 0) w += inner, left = tensor_row;
    }
  }
  return memory;
}

}  // namespace batchnorm
