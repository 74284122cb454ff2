// The positions of a call as rows of their channels: where they lie, or in tiles; and back.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <type_traits>

#include "arithmetic.hpp"
#include "passes.hpp"
#include "tiles.hpp"
#include "turn.hpp"

namespace batchnorm {

// Gamma, beta and their like along the channels of a position, in float32 (to which they are rounded) or float64, with
// what kernels may read behind.
template <class A>
std::unique_ptr<A[]> along(const ChannelValues& values, std::int64_t channels, A absent);
// Whether the float32 that gamma and beta are rounded to keep their digits: always where they are given so.
bool fit_into_float(const ChannelValues& gamma, const ChannelValues& beta);

// Neighbouring positions, in the order of (outer, inner).
struct Block {
  std::int64_t first, count;
};

// What is written where a position does not count: 0, or the rows of the input.
template <class A>
struct Padded {
  Padding padding = Padding::normalize;
  const A* input = nullptr;
};

// What the positions of a call are, and how they are visited.
template <class T>
class PositionRows {
 public:
  using A = Arithmetic<T>;

  // Of a pass that goes through `streams` tensors.
  PositionRows(const PassCall<T>& call, int streams, bool applies)
      : call(call),
        problem(call.problem),
        channels(problem.channels),
        groups(channels / std::max<std::int64_t>(call.width, 1)),
        positions(problem.count()),
        plan(make_line_plan(problem, call.work(true, applies, streams), call.options.threads)) {}

  const PassCall<T>& call;
  const Problem problem;
  const std::int64_t channels, groups, positions;
  const LinePlan plan;
  const kernels::KernelTable& table = *active_implementation().table;

  // Whether the channels of a position lie side by side.
  [[nodiscard]] bool in_rows() const { return problem.inner == 1; }
  // Where the first channel of a position lies.
  [[nodiscard]] std::int64_t place(std::int64_t position) const {
    return position / problem.inner * channels * problem.inner + position % problem.inner;
  }
  [[nodiscard]] bool pads() const { return call.positions && call.padding != Padding::normalize; }
  [[nodiscard]] bool counts(std::int64_t position) const {
    return !call.positions || call.positions.values[position] != 0;
  }
  [[nodiscard]] std::int64_t lines_of(const Block& block) const { return block.count * groups; }

  // f(Block) for the positions of a range, some at a time and none across two outer indices that lie apart.
  template <class F>
  void for_blocks(Range range, const F& f) const {
    const std::int64_t row = in_rows() ? std::max<std::int64_t>(positions, 1) : problem.inner;
    for (std::int64_t p = range.begin, n = 0; p < range.end; p += n) {
      n = std::min({plan.positions_a_block, row - p % row, range.end - p});
      f(Block{p, n});
    }
  }
  // f(first of the block, how many, whether they count) for positions that are alike.
  template <class F>
  void for_alike(const Block& block, const F& f) const {
    for (std::int64_t r = 0, end = 0; r < block.count; r = end) {
      const bool counted = counts(block.first + r);
      while (end < block.count && counts(block.first + end) == counted) ++end;
      f(r, end - r, counted);
    }
  }

  // ---- tiles ----

  [[nodiscard]] std::int64_t tile_values() const { return plan.positions_a_block * channels + kMargin; }

  // The positions of a block as rows: where they lie, or in `tile`. `flat` is a tile to work in. Through bits, if any.
  const A* rows(const T* tensor, const Block& block, A* tile, A* flat, const std::uint8_t* bits = nullptr) const {
    const std::int64_t at = place(block.first), n = block.count;
    if (in_rows()) return values(tensor, at, n * channels, tile, bits, block, channels);
    const bool reads_in_place = std::is_same_v<A, T> && bits == nullptr;
    if (!reads_in_place) {
      for (std::int64_t c = 0; c < channels; ++c) {
        fetch_ahead_of_run(tensor + at + c * problem.inner, n);
        const A* run = values(tensor, at + c * problem.inner, n, flat + c * n, bits, block, 1);
        if (run != flat + c * n) std::copy_n(run, n, flat + c * n);
      }
      turn(flat, n, channels, n, tile, channels);
    } else if constexpr (std::is_same_v<A, T>) {
      for (std::int64_t c = 0; c < channels; ++c) fetch_ahead_of_run(tensor + at + c * problem.inner, n);
      turn(tensor + at, problem.inner, channels, n, tile, channels);
    }
    return tile;
  }

  // Rows of a tile to a tensor, and what follows; at positions that do not count 0, or the rows of `input`.
  void put(const A* tile, const Block& block, const Padded<A>& padded, const kernels::Tail<T>& tail, A* flat,
           T* to) const {
    put_runs(tile, block, padded, flat, to,
             [&](const A* run, std::int64_t n, std::int64_t at) { put_run(run, n, at, tail, to); });
  }
  // The same of a tangent: that of the residual is added, and the bits stop what comes out.
  void put_tangent(const A* tile, const Block& block, const Padded<A>& padded, A* flat, T* to) const {
    const kernels::Tail<T>& tail = call.tail;
    put_runs(tile, block, padded, flat, to, [&](const A* run, std::int64_t n, std::int64_t at) {
      for_portions(run, n, at, [&](const A* some, std::int64_t m, std::int64_t from) {
        A memory[kPortion], residual[kPortion];
        std::copy_n(some, m, memory);
        if (tail.residual != nullptr) {
          const A* added = in_tile(table, tail.residual + from, m, residual);
          for (std::int64_t i = 0; i < m; ++i) memory[i] += added[i];
        }
        if (tail.bits != nullptr) table.template of<A>().keep_bits(memory, tail.bits, tail.first_bit + from, m, memory);
        write(table, memory, m, to + from);
      });
    });
  }
  void put_padding(std::int64_t at, std::int64_t n, const A* input, Padding padding, T* to) const {
    if (padding == Padding::zero) std::fill_n(to + at, n, T(0));
    if (padding == Padding::keep) write(table, input, n, to + at);
  }

 private:
  static constexpr std::int64_t kPortion = 1024;  // on the stack, up to 16 KB with what is beside it

  static void fetch_ahead_of_run(const T* run, std::int64_t n) {
    for (std::int64_t at = n; at < 2 * n; at += kernels::kStreamBytes / static_cast<std::int64_t>(sizeof(T))) {
      __builtin_prefetch(run + at, 0, 2);
    }
  }
  // n values that lie side by side, `stride` of which (or, turned, one) are a position's. Where one does not count, dy
  // is wanted as it is: that is its padding.
  const A* values(const T* tensor, std::int64_t at, std::int64_t n, A* memory, const std::uint8_t* bits,
                  const Block& block, std::int64_t stride) const {
    const A* v = in_tile(table, tensor + at, n, memory);
    if (bits == nullptr) return v;
    table.template of<A>().keep_bits(v, bits, call.tail.first_bit + at, n, memory);
    for (std::int64_t r = 0; pads() && r < block.count; ++r) {
      if (!counts(block.first + r)) std::copy_n(tensor + at + r * stride, stride, memory + r * stride);
    }
    return memory;
  }
  template <class Put>
  void put_runs(const A* tile, const Block& block, const Padded<A>& padded, A* flat, T* to, const Put& put) const {
    const std::int64_t at = place(block.first), n = block.count;
    const bool has_padding = call.positions && padded.padding != Padding::normalize;
    if (in_rows() && !has_padding) return put(tile, n * channels, at);
    if (in_rows()) {
      return for_alike(block, [&](std::int64_t r, std::int64_t some, bool counted) {
        const std::int64_t from = r * channels, m = some * channels;
        counted ? put(tile + from, m, at + from) : put_padding(at + from, m, padded.input + from, padded.padding, to);
      });
    }
    turn(tile, channels, n, channels, flat, n);
    for (std::int64_t c = 0; c < channels; ++c) put(flat + c * n, n, at + c * problem.inner);
    for (std::int64_t r = 0; has_padding && r < n; ++r) {
      if (counts(block.first + r)) continue;
      for (std::int64_t c = 0; c < channels; ++c) {
        put_padding(at + c * problem.inner + r, 1, padded.input + r * channels + c, padded.padding, to);
      }
    }
  }
  template <class F>
  static void for_portions(const A* run, std::int64_t n, std::int64_t at, const F& f) {
    for (std::int64_t i = 0; i < n; i += kPortion) f(run + i, std::min(kPortion, n - i), at + i);
  }
  void put_run(const A* run, std::int64_t n, std::int64_t at, const kernels::Tail<T>& tail, T* to) const {
    if (tail.empty()) return write(table, run, n, to + at);
    if constexpr (std::is_same_v<A, T>) {
      kernels::Tail<A> here = tail;
      here.at = at;
      return follow(table, run, to + at, here, n);
    } else {
      for_portions(run, n, at, [&](const A* some, std::int64_t m, std::int64_t from) {
        alignas(64) A memory[kPortion + kMargin];
        A residual[kPortion];
        // The bits of vectors that begin at a line are to be whole bytes.
        const std::int64_t bit = tail.first_bit + from;
        A* y = memory + bit % kernels::kVectorColumns;
        kernels::Tail<A> here{.relu = tail.relu, .bits = tail.bits, .first_bit = bit};
        if (tail.residual != nullptr) here.residual = in_tile(table, tail.residual + from, m, residual);
        follow(table, some, y, here, m);
        write(table, y, m, to + from);
      });
    }
  }
};

}  // namespace batchnorm
