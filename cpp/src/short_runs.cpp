#include "short_runs.hpp"

#include <algorithm>
#include <array>
#include <span>
#include <type_traits>

#include "arithmetic.hpp"
#include "coefficients.hpp"
#include "parallel.hpp"
#include "plan.hpp"
#include "small.hpp"
#include "turn.hpp"

namespace batchnorm {
namespace {

// ---- tiles ----

// Asks for the n values behind p, which the next tile reads or writes.
template <class V>
void fetch_next(const V* p, std::int64_t n) {
  constexpr std::int64_t kLine = kernels::kStreamBytes;
  const auto* at = reinterpret_cast<const char*>(p);
  const std::int64_t bytes = n * static_cast<std::int64_t>(sizeof(V));
#pragma GCC unroll 4
  for (std::int64_t b = bytes; b < 2 * bytes; b += kLine) __builtin_prefetch(at + b);
}

// Turned channels: their tensors, in the type that is computed in. An output takes the place of the input of that
// number.
template <class A, std::size_t kTensors>
struct Tile {
  Range channels;
  Problem problem;
  std::array<A*, kTensors> values;
  PassOptions options;

  [[nodiscard]] std::int64_t count() const { return problem.channels; }
  // What these channels have of an array of all, null if that is. The next tile's is fetched meanwhile.
  template <class V>
  [[nodiscard]] V* of(V* all) const {
    if (all == nullptr) return nullptr;
    fetch_next(all + channels.begin, count());
    return all + channels.begin;
  }
};

// Tensors of a call. Of the first, which is dy where there are bits of a ReLU, what these let through is taken; it goes
// to `dresidual` too, where that is not null.
template <class T, std::size_t kTensors>
struct Tensors {
  std::array<const T*, kTensors> in;
  T* out = nullptr;  // in the place of the first; null: none
  const std::uint8_t* bits = nullptr;
  std::int64_t first_bit = 0;
  T* dresidual = nullptr;
  const kernels::WeightOf<T>* counted = nullptr;  // weights of a run, where outputs are padded
};

// f(Tile) for all channels. All inputs of a tile are read before anything is written, since outputs may be inputs.
template <class T, std::size_t kTensors, class F>
class EachTile {
  using A = Arithmetic<T>;

 public:
  EachTile(const Problem& problem, const Tensors<T, kTensors>& tensors, const F& f)
      : problem_(problem), runs_(runs_of_tile(problem, sizeof(A))), tensors_(tensors), f_(f) {}

  void run(int threads) {
    run_tasks(threads, (problem_.channels + runs_ - 1) / runs_, [this](Range tiles) { run(tiles); });
  }

 private:
  using Values = A[kTurnedBytes / sizeof(A)];
  struct Memory {
    alignas(64) Values turned[kTensors];
    alignas(64) Values flat[kTensors];
    alignas(64) A weights[kTurnedBytes / sizeof(A) + kernels::kVectorColumns];
    alignas(64) std::byte work[kTileWorkBytes];
  };

  void run(Range tiles) {
    Memory memory;  // NOLINT: kernels overwrite
    for (std::int64_t t = tiles.begin; t < tiles.end; ++t) {
      run({t * runs_, std::min((t + 1) * runs_, problem_.channels)}, memory);
    }
  }
  void run(const Range& channels, Memory& memory) const {
    const std::int64_t count = channels.end - channels.begin, n = count * problem_.inner;
    const std::int64_t at = channels.begin * problem_.inner;
    Tile<A, kTensors> tile{
        channels, {problem_.inner, count, 1}, {}, {.threads = 1, .memory = memory.work, .is_turned = true}};
    if (tensors_.counted != nullptr) {
      table_.of<A>().repeat_weights(tensors_.counted, 1, count, problem_.inner, memory.weights);
    }
    if (tensors_.out != nullptr) fetch_next(tensors_.out + at, n);
    const A* first = nullptr;
    for (std::size_t k = 0; k < kTensors; ++k) {
      fetch_next(tensors_.in[k] + at, n);
      const A* values = read(tensors_.in[k] + at, n, memory.flat[k]);
      if (k == 0) values = first = let_through(values, at, n, memory);
      tile.values[k] = memory.turned[k];
      turn(values, problem_.inner, count, problem_.inner, tile.values[k], count);
    }
    if (tensors_.dresidual != nullptr) write_residual(first, at, n, memory);
    f_(tile);
    if (tensors_.out == nullptr) return;
    A* flat = memory.flat[0];
    if constexpr (sizeof(T) == sizeof(A)) flat = tensors_.out + at;
    turn(tile.values[0], count, problem_.inner, count, flat, problem_.inner);
    if constexpr (sizeof(T) != sizeof(A)) write(flat, n, tensors_.out + at);
  }

  // The values as they are computed with: where they lie, or in `flat`.
  const A* read(const T* from, std::int64_t n, A* flat) const {
    if constexpr (sizeof(T) == sizeof(A)) {
      return from;
    } else {
      table_.of<T>().widen(from, n, flat);
      return flat;
    }
  }
  void write(const A* from, std::int64_t n, T* to) const {
    if constexpr (sizeof(T) == sizeof(A)) {
      if (from != to) std::copy_n(from, n, to);
    } else {
      table_.of<T>().narrow(from, n, to);
    }
  }
  // What does not count is padded with the input: dy as it is.
  const A* let_through(const A* values, std::int64_t at, std::int64_t n, Memory& memory) const {
    if (tensors_.bits == nullptr) return values;
    A* through = memory.flat[tensors_.counted == nullptr ? 0 : kTensors - 1];  // whose values come next
    table_.of<A>().keep_bits(values, tensors_.bits, tensors_.first_bit + at, n, through);
    if (tensors_.counted == nullptr) return through;
    table_.of<A>().put_counted(through, memory.weights, values, n, 1, false, memory.flat[0]);
    return memory.flat[0];
  }
  void write_residual(const A* values, std::int64_t at, std::int64_t n, Memory& memory) const {
    if (tensors_.counted != nullptr) {
      table_.of<A>().put_counted(values, memory.weights, nullptr, n, 1, false, memory.flat[0]);
      values = memory.flat[0];
    }
    write(values, n, tensors_.dresidual + at);
  }

  Problem problem_;
  std::int64_t runs_;
  Tensors<T, kTensors> tensors_;
  const F& f_;
  const kernels::KernelTable& table_ = *active_implementation().table;
};

// Of a pass that is only asked for its memory nothing is done: a tile has what it needs.
template <class T, std::size_t kTensors, class F>
void for_tiles(const PassCall<T>& call, const Tensors<T, kTensors>& tensors, const F& f) {
  if (call.options.needed != nullptr) return;
  const bool alone = is_serial(call.problem, call.work(true, true, static_cast<int>(kTensors) + 1));
  EachTile<T, kTensors, F>(call.problem, tensors, f).run(alone ? 1 : available_threads(call.options.threads));
}

// dy, x and dx of a call, of which dy goes through the ReLU.
template <class T>
Tensors<T, 2> gradients(const T* dy, const T* x, const PassCall<T>& call, T* dx = nullptr, T* dresidual = nullptr) {
  const bool is_padded = call.positions && call.padding != Padding::normalize;
  return {{dy, x}, dx, call.tail.bits, call.tail.first_bit, dresidual, is_padded ? call.positions.values : nullptr};
}

// ---- channels ----

// Those of gamma or its like, which may repeat.
class ValuesOfTile {
 public:
  ValuesOfTile(const ChannelValues& from, Range channels, double absent) : count_(channels.end - channels.begin) {
    read_channels(from, channels, absent, values_.data());
  }
  [[nodiscard]] const double* data() const { return values_.data(); }
  [[nodiscard]] ChannelValues values() const { return std::span(values_.data(), static_cast<std::size_t>(count_)); }

 private:
  std::int64_t count_;
  OfSmall values_;
};

void put(const OfSmall& values, Range channels, const ChannelOutput& to) {
  for (std::int64_t c = channels.begin; to.wanted() && c < channels.end; ++c)
    to.set(c, values.data()[c - channels.begin]);
}

// What a call is to a tile.
template <class T>
struct CallOfTile {
  using A = Arithmetic<T>;

  template <std::size_t kTensors>
  CallOfTile(const PassCall<T>& call, const Tile<A, kTensors>& tile)
      : gamma(call.gamma, tile.channels, 1), beta(call.beta, tile.channels, 0) {
    part = {.problem = tile.problem, .summary = call.summary, .padding = call.padding};
    part.positions = {call.positions.values, call.positions.is_mask, tile.problem};
    part.gamma = gamma.values();
    part.beta = beta.values();
    part.eps = call.eps;
    part.options = tile.options;
    part.is_shared = call.is_shared;
  }
  ValuesOfTile gamma, beta;
  PassCall<A> part;
};

// Whether f(Small) did a tile as a small problem of one block: not where positions have weights, nor in float64.
template <class T, std::size_t kTensors, class F>
bool as_small(const PassCall<T>& call, const Tile<Arithmetic<T>, kTensors>& tile, const F& f) {
  if constexpr (std::is_same_v<Arithmetic<T>, float>) {
    if (call.positions) return false;
    Small<float, 1> small(tile.problem);
    return f(small);
  }
  return false;
}

}  // namespace

template <class T>
void run_short_moments(const T* x, const PassCall<T>& call, Moments* out) {
  using A = Arithmetic<T>;
  for_tiles<T, 1>(call, {{x}}, [&](const Tile<A, 1>& tile) {
    Moments* to = tile.of(out);
    if (as_small(call, tile, [&](auto& small) { return small.moments(tile.values[0], to); })) return;
    Forward<A>{CallOfTile<T>(call, tile).part}.moments(tile.values[0], to);
  });
}

template <class T>
void run_short_batch_norm(const T* x, const PassCall<T>& call, T* y, Moments* saved) {
  using A = Arithmetic<T>;
  for_tiles<T, 1>(call, {{x}, y}, [&](const Tile<A, 1>& tile) {
    const CallOfTile<T> k(call, tile);
    A* values = tile.values[0];
    Moments* to = tile.of(saved);
    const bool done = as_small(call, tile, [&](auto& small) {
      return small.moments(values, to) && small.normalize(values, values, to, call.eps, k.gamma.data(), k.beta.data());
    });
    if (!done) Forward<A>{k.part}.batch_norm(values, values, to);
  });
}

template <class T>
void run_short_normalize(const T* x, const PassCall<T>& call, const GivenStatistics& given, T* y) {
  using A = Arithmetic<T>;
  for_tiles<T, 1>(call, {{x}, y}, [&](const Tile<A, 1>& tile) {
    const CallOfTile<T> k(call, tile);
    A* values = tile.values[0];
    const Moments* moments = tile.of(given.moments);
    const bool done = moments != nullptr && as_small(call, tile, [&](auto& small) {
                        return small.normalize(values, values, moments, call.eps, k.gamma.data(), k.beta.data());
                      });
    if (done) return;
    const ValuesOfTile mean(given.mean, tile.channels, 0), var(given.var, tile.channels, 0);
    Forward<A>{k.part}.normalize(values, {mean.values(), var.values(), moments, given.only_scale}, values);
  });
}

template <class T>
void run_short_grad_sums(const T* dy, const T* x, const PassCall<T>& call, const Moments* moments, GradSums* out) {
  using A = Arithmetic<T>;
  for_tiles<T, 2>(call, gradients(dy, x, call), [&](const Tile<A, 2>& tile) {
    Backward<A>{CallOfTile<T>(call, tile).part}.grad_sums(tile.values[0], tile.values[1], tile.of(moments),
                                                          tile.of(out));
  });
}

template <class T>
void run_short_grad_input(const T* dy, const T* x, const PassCall<T>& call, const Moments* moments,
                          const GradSums* sums, const FirstOutputs<T>& out) {
  using A = Arithmetic<T>;
  const auto tensors = gradients(dy, x, call, out.dx, out.dresidual);
  for_tiles<T, 2>(call, tensors, [&](const Tile<A, 2>& tile) {
    Backward<A>{CallOfTile<T>(call, tile).part}.grad_input(tile.values[0], tile.values[1], tile.of(moments),
                                                           tile.of(sums), {.dx = tile.values[0]});
  });
}

template <class T>
void run_short_backward(const T* dy, const T* x, const PassCall<T>& call, const Moments* saved,
                        const FirstOutputs<T>& out) {
  using A = Arithmetic<T>;
  const auto tensors = gradients(dy, x, call, out.dx, out.dresidual);
  for_tiles<T, 2>(call, tensors, [&](const Tile<A, 2>& tile) {
    const CallOfTile<T> k(call, tile);
    const Moments* moments = tile.of(saved);
    A* dx = out.dx == nullptr ? nullptr : tile.values[0];
    OfSmall dgamma, dbeta;
    const bool done = as_small(call, tile, [&](auto& small) {
      return small.backward(tile.values[0], tile.values[1], dx, moments, call.eps, k.gamma.data(), dgamma, dbeta);
    });
    if (!done) {
      const auto count = static_cast<std::size_t>(tile.count());
      const FirstOutputs<A> to{
          .dx = dx, .dgamma = std::span(dgamma.data(), count), .dbeta = std::span(dbeta.data(), count)};
      Backward<A>{k.part}.batch_norm(tile.values[0], tile.values[1], moments, to);
    }
    put(dgamma, tile.channels, out.dgamma);
    put(dbeta, tile.channels, out.dbeta);
  });
}

template <class T>
void run_short_jvp(const T* x_dot, const T* x, const PassCall<T>& call, const Moments* saved, const GradSums* sums,
                   const Tangents& tangents, T* y_dot) {
  using A = Arithmetic<T>;
  for_tiles<T, 2>(call, {{x_dot, x}, y_dot}, [&](const Tile<A, 2>& tile) {
    const ValuesOfTile gamma(tangents.gamma, tile.channels, 0), beta(tangents.beta, tile.channels, 0);
    Backward<A>{CallOfTile<T>(call, tile).part}.batch_norm_jvp(tile.values[0], tile.values[1], tile.of(saved),
                                                               tile.of(sums), {gamma.values(), beta.values(), {}, {}},
                                                               tile.values[0]);
  });
}

#define BN_INSTANTIATE(T)                                                                                           \
  template void run_short_moments(const T*, const PassCall<T>&, Moments*);                                          \
  template void run_short_batch_norm(const T*, const PassCall<T>&, T*, Moments*);                                   \
  template void run_short_normalize(const T*, const PassCall<T>&, const GivenStatistics&, T*);                      \
  template void run_short_grad_sums(const T*, const T*, const PassCall<T>&, const Moments*, GradSums*);             \
  template void run_short_grad_input(const T*, const T*, const PassCall<T>&, const Moments*, const GradSums*,       \
                                     const FirstOutputs<T>&);                                                       \
  template void run_short_backward(const T*, const T*, const PassCall<T>&, const Moments*, const FirstOutputs<T>&); \
  template void run_short_jvp(const T*, const T*, const PassCall<T>&, const Moments*, const GradSums*,              \
                              const Tangents&, T*);
BN_INSTANTIATE(Float16)
BN_INSTANTIATE(BFloat16)
BN_INSTANTIATE(float)
BN_INSTANTIATE(double)
#undef BN_INSTANTIATE

}  // namespace batchnorm
