// The two walks (runs, rows) of the passes that write an output, element by element.
// normalize-inl.hpp and grad_input-inl.hpp say what is written.
#pragma once

#include "kernels/lanes-inl.hpp"
#include "kernels/relu_inputs-inl.hpp"
#include "kernels/table.hpp"
#include "kernels/weights-inl.hpp"

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

// Stretch k of an input, and the input at a value of it, which has a place in its run; overloaded for weights, which
// begin anew with each run.
template <class Input>
BN_INLINE Input stretch_at(const Input& input, const Runs& runs, std::int64_t k) {
  return input + k * runs.stride;
}
template <class Input>
BN_INLINE Input value_at(const Input& input, std::int64_t at, std::int64_t) {
  return input + at;
}
template <Stores kStores, class Map, class T, class... Input>
BN_INLINE void put_mapped(const Map& map, std::int64_t begin, std::int64_t at, std::int64_t ahead, T* out,
                          const Input&... input) {
  put<kStores>(out + at, map(value_at(input, at, at - begin)..., kLanes), ahead, value_at(input, at, at - begin)...);
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
  if (at > 0) store_first(out, at, map(value_at(input, 0, 0)..., at));
  for (std::int64_t c = 0, begin = 0;; begin += runs.length) {
    const std::int64_t end = begin + runs.length;
    for (; at + kLanes <= end; at += kLanes) put_mapped<kStores>(map, begin, at, runs.ahead, out, input...);
    const std::int64_t rest = end - at;
    if (++c == runs.channels) {
      if (rest > 0) store_first(out + at, rest, map(value_at(input, at, at - begin)..., rest));
      return;
    }
    const auto next = make(c);
    if (rest > 0) {
      put_mapped<kStores>(join(rest, map, next), begin, at, runs.ahead, out, input...);
      at += kLanes;
    }
    map = next;
  }
}

template <Stores kStores, class Make, class T, class... Input>
BN_INLINE void apply_runs(Make make, Runs runs, T* out, const Input&... input) {
  for (std::int64_t k = 0; k < runs.count; ++k) {
    apply_stretch<kStores>(make, runs, out + k * runs.stride, stretch_at(input, runs, k)...);
  }
  if constexpr (kStores == Stores::around_cache) finish_streams();
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

// make(c, n) gives the map of the n <= 16 columns from c on.
template <class Make, class T, class... Input>
BN_INLINE void apply_rows(Make make, Rows rows, T* out, const Input&... input) {
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
  if constexpr (kStores == Stores::around_cache) finish_streams();
}

// A vector of columns of which those in `mask` are computed by `wide` (in float64), the others by `narrow`.
template <class Narrow, class Wide>
struct Mixed {
  Narrow narrow;
  Wide wide;
  unsigned mask;

  template <class... Arguments>
  BN_INLINE Lanes<float> operator()(const Arguments&... arguments) const {
    const Lanes<float> fast = narrow(arguments...);
    if (mask == 0) return fast;
    float result[kLanes], exact[kLanes];
    store(result, fast);
    store_as(exact, wide(arguments...));
    for (int l = 0; l < kLanes; ++l) {
      if ((mask >> l) & 1u) result[l] = exact[l];
    }
    return load<float>(result);
  }
};

}  // namespace
}  // namespace batchnorm::kernels
