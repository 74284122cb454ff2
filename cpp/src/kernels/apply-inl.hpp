// The two walks (runs, rows) of the passes that write an output, element by element.
// normalize-inl.hpp and grad_input-inl.hpp say what is written.
#pragma once

#include "kernels/lanes-inl.hpp"
#include "kernels/relu_bits-inl.hpp"
#include "kernels/table.hpp"

namespace batchnorm::kernels {
namespace {

// Values up to the first whole line of memory at p, or half a line where 16 values are no more.
template <class T>
BN_INLINE std::int64_t values_to_line(const T* p) {
  constexpr std::int64_t kVector = kLanes * static_cast<std::int64_t>(sizeof(T));
  constexpr std::int64_t kUnit = kVector < kStreamBytes ? kVector : kStreamBytes;
  const auto past_line = static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(p) % kUnit);
  return (kUnit - past_line) % kUnit / static_cast<std::int64_t>(sizeof(T));
}

// a where the weight is not 0, else b.
template <class A>
BN_INLINE Lanes<A> where_counted(const Lanes<A>& weight, const Lanes<A>& a, const Lanes<A>& b) {
  Lanes<A> r;
  BN_UNROLL for (int k = 0; k < Lanes<A>::kVectors; ++k) r.v[k] = weight.v[k] != 0 ? a.v[k] : b.v[k];
  return r;
}
enum class Stores { ordinary, around_cache };

// 16 outputs at p, which begins a line. What lies `ahead` is fetched: inputs where stores go around the caches, else
// the output.
template <Stores kStores, class A, class T, class... Input>
BN_INLINE void put(T* p, const Lanes<A>& outputs, std::int64_t ahead, const Input&... input) {
  if constexpr (kStores == Stores::around_cache) {
    stream_lanes(p, outputs);
    (fetch_lanes<Fetch::kFar>(input + ahead), ...);
  } else {
    if (ahead != 0) fetch_lanes_to_store(p + ahead);
    store_as(p, outputs);
  }
}

// One stretch: the runs of neighbouring channels as one piece of memory, so that only its ends are not whole vectors
// that begin at a line; a vector that holds the end of one run and the begin of the next computes with the
// coefficients of both. make(c) gives the map of channel c; map(p..., n) the outputs for the next 16 (or n < 16) values
// at the input pointers p.
template <Stores kStores, class Make, class T, class... Input>
BN_INLINE void apply_stretch(Make make, const Runs& runs, T* out, const Input&... input) {
  auto map = make(0);
  std::int64_t at = values_to_line(out);
  if (at > runs.length) at = runs.length;
  if (at > 0) store_first(out, at, map(input..., at));
  for (std::int64_t c = 0, begin = 0;; begin += runs.length) {
    const std::int64_t end = begin + runs.length;
    for (; at + kLanes <= end; at += kLanes) {
      put<kStores>(out + at, map((input + at)..., kLanes), runs.ahead, (input + at)...);
    }
    const std::int64_t rest = end - at;
    if (++c == runs.channels) {
      if (rest > 0) store_first(out + at, rest, map((input + at)..., rest));
      return;
    }
    const auto next = make(c);
    if (rest > 0) {
      put<kStores>(out + at, join(rest, map, next)((input + at)..., kLanes), runs.ahead, (input + at)...);
      at += kLanes;
    }
    map = next;
  }
}

template <class Make, class T, class... Input>
BN_INLINE void apply_runs(Make make, Runs runs, T* out, const Input&... input) {
  if (runs.around_cache) {
    for (std::int64_t k = 0, at = 0; k < runs.count; ++k, at += runs.stride) {
      apply_stretch<Stores::around_cache>(make, runs, out + at, (input + at)...);
    }
    return;
  }
  for (std::int64_t k = 0, at = 0; k < runs.count; ++k, at += runs.stride) {
    apply_stretch<Stores::ordinary>(make, runs, out + at, (input + at)...);
  }
}

// Four rows a visit: coefficients are loaded once for four vectors of each input.
constexpr std::int64_t kRowsPerApply = 4;

// What rows.ahead asks for at row r of the columns from c on, whose row 0 is at `out` and `input`.
template <class T, class... Input>
BN_INLINE void fetch_ahead_of_row(const Rows& rows, std::int64_t c, std::int64_t r, T* out, const Input&... input) {
  if (rows.ahead == 0) return;
  const std::int64_t at = RowsAhead(rows, rows.ahead, kRowsPerApply).at(c, r);
  (fetch_lanes<Fetch::kFar>(input + at), ...);
  fetch_lanes_to_store(out + at);
}

template <class Map, class T, class... Input>
BN_INLINE void apply_columns(const Map& map, std::int64_t count, const Rows& rows, std::int64_t c, std::int64_t n,
                             T* out, const Input&... input) {
  for (std::int64_t r = 0; r < count; ++r) {
    fetch_ahead_of_row(rows, c, r, out, input...);
    const std::int64_t at = r * rows.stride;
    store_upto(out + at, n, map((input + at)..., n));
  }
}

template <class Make, class T, class... Input>
BN_INLINE void apply_rows_by_columns(Make make, Rows rows, T* out, const Input&... input) {
  for (std::int64_t r = 0; r < rows.count; r += kRowsPerApply) {
    const std::int64_t visit = rows.count - r < kRowsPerApply ? rows.count - r : kRowsPerApply;
    std::int64_t c = 0, at = r * rows.stride;
    for (; c + kLanes <= rows.columns; c += kLanes, at += kLanes) {
      apply_columns(make(c, kLanes), visit, rows, c, kLanes, out + at, (input + at)...);
    }
    if (const std::int64_t n = rows.columns - c; n > 0) {
      apply_columns(make(c, n), visit, rows, c, n, out + at, (input + at)...);
    }
  }
}

// The same for rows side by side, as one piece of memory of which only the ends are not whole lines. A vector across
// the end of a row takes the coefficients behind the last column, which are those of the first.
template <Stores kStores, class Make, class T, class... Input>
BN_INLINE void apply_rows_in_line(Make make, Rows rows, T* out, const Input&... input) {
  const std::int64_t total = rows.count * rows.columns;
  std::int64_t at = values_to_line(out);
  if (at > total) at = total;
  if (at > 0) store_first(out, at, make(0, at)(input..., at));
  std::int64_t c = at;
  for (; at + kLanes <= total; at += kLanes) {
    const auto outputs = make(c, kLanes)((input + at)..., kLanes);
    if constexpr (kStores == Stores::around_cache) {
      stream_lanes(out + at, outputs);
    } else {
      store_as(out + at, outputs);
    }
    c += kLanes;
    if (c >= rows.columns) c -= rows.columns;
  }
  if (at < total) store_first(out + at, total - at, make(c, total - at)((input + at)..., total - at));
}

template <class Make, class T, class... Input>
BN_INLINE void apply_rows_along(Make make, Rows rows, T* out, const Input&... input) {
  if (rows.walk == RowWalk::around_cache) return apply_rows_in_line<Stores::around_cache>(make, rows, out, input...);
  apply_rows_in_line<Stores::ordinary>(make, rows, out, input...);
}

// make(c, n) gives the map of the n <= 16 columns from c on.
template <class Make, class T, class... Input>
BN_INLINE void apply_rows(Make make, Rows rows, T* out, const Input&... input) {
  if (rows.walk == RowWalk::columns) return apply_rows_by_columns(make, rows, out, input...);
  apply_rows_along(make, rows, out, input...);
}

}  // namespace
}  // namespace batchnorm::kernels
