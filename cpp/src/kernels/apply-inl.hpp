// The two walks (runs, rows) of the passes that write an output, element by element.
// normalize-inl.hpp and grad_input-inl.hpp say what is written.
#pragma once

#include "kernels/lanes-inl.hpp"
#include "kernels/table.hpp"

namespace batchnorm::kernels {
namespace {

// map(p..., n) gives the outputs for the next 16 (or n < 16) values at the input pointers p.
template <class Map, class T, class... Input>
BN_INLINE void apply_runs(const Map& map, Runs runs, T* out, const Input*... input) {
  for (std::int64_t k = 0; k < runs.count; ++k) {
    const std::int64_t start = k * runs.stride;
    std::int64_t i = 0;
    for (; i + kLanes <= runs.length; i += kLanes) store_as(out + start + i, map((input + start + i)..., kLanes));
    if (i < runs.length) {
      const std::int64_t n = runs.length - i;
      store_first(out + start + i, n, map((input + start + i)..., n));
    }
  }
}

// The same with stores around the caches: values up to the first whole line of `out`, lines, and the rest.
template <class Map, class T, class... Input>
BN_INLINE void apply_runs_around_cache(const Map& map, Runs runs, T* out, const Input*... input) {
  for (std::int64_t k = 0; k < runs.count; ++k) {
    const std::int64_t start = k * runs.stride;
    const auto past_line = static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(out + start) % kStreamBytes);
    std::int64_t i = (kStreamBytes - past_line) % kStreamBytes / static_cast<std::int64_t>(sizeof(T));
    if (i > runs.length) i = runs.length;
    if (i > 0) store_first(out + start, i, map((input + start)..., i));
    for (; i + kLanes <= runs.length; i += kLanes) stream_lanes(out + start + i, map((input + start + i)..., kLanes));
    if (i < runs.length) {
      const std::int64_t n = runs.length - i;
      store_first(out + start + i, n, map((input + start + i)..., n));
    }
  }
  finish_streams();
}

// Four rows a visit: coefficients are loaded once for four vectors of each input.
constexpr std::int64_t kRowsPerApply = 4;

template <class Map, class T, class... Input>
BN_INLINE void apply_columns(const Map& map, std::int64_t rows, std::int64_t stride, std::int64_t n, T* out,
                             const Input*... input) {
  for (std::int64_t r = 0; r < rows; ++r) store_upto(out + r * stride, n, map((input + r * stride)..., n));
}

// make(c, n) gives the map of the n <= 16 columns from c on.
template <class Make, class T, class... Input>
BN_INLINE void apply_rows(Make make, Rows rows, T* out, const Input*... input) {
  for (std::int64_t r = 0; r < rows.count; r += kRowsPerApply) {
    const std::int64_t visit = rows.count - r < kRowsPerApply ? rows.count - r : kRowsPerApply;
    const std::int64_t start = r * rows.stride;
    std::int64_t c = 0;
    for (; c + kLanes <= rows.columns; c += kLanes) {
      apply_columns(make(c, kLanes), visit, rows.stride, kLanes, out + start + c, (input + start + c)...);
    }
    if (c < rows.columns) {
      const std::int64_t n = rows.columns - c;
      apply_columns(make(c, n), visit, rows.stride, n, out + start + c, (input + start + c)...);
    }
  }
}

// The same with stores around the caches: rows of whole vectors, `out` and its stride aligned to kStreamBytes. One row
// a visit, so that each line is written in one go after the one before it.
template <class Make, class T, class... Input>
BN_INLINE void apply_rows_around_cache(Make make, Rows rows, T* out, const Input*... input) {
  for (std::int64_t r = 0; r < rows.count; ++r) {
    const std::int64_t start = r * rows.stride;
    for (std::int64_t c = 0; c < rows.columns; c += kLanes) {
      stream_lanes(out + start + c, make(c, kLanes)((input + start + c)..., kLanes));
    }
  }
  finish_streams();
}

// A vector of columns of which those in `mask` are computed by `wide` (in float64), the others by `narrow`.
template <class Narrow, class Wide>
struct Mixed {
  Narrow narrow;
  Wide wide;
  unsigned mask;

  BN_INLINE Lanes<float> operator()(const float* a, std::int64_t n) const { return choose(n, a); }
  BN_INLINE Lanes<float> operator()(const float* a, const float* b, std::int64_t n) const { return choose(n, a, b); }

  template <class... Input>
  BN_INLINE Lanes<float> choose(std::int64_t n, const Input*... input) const {
    const Lanes<float> fast = narrow(input..., n);
    if (mask == 0) return fast;
    float result[kLanes], exact[kLanes];
    store(result, fast);
    store_as(exact, wide(input..., n));
    for (int l = 0; l < kLanes; ++l) {
      if ((mask >> l) & 1u) result[l] = exact[l];
    }
    return load<float>(result);
  }
};

}  // namespace
}  // namespace batchnorm::kernels
