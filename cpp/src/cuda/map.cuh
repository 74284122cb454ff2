// What is done to every value by itself, as one kernel, map<Body>, of every layout, mask and tail: a thread takes some
// values of a tensor, neighbouring threads neighbouring ones, and walks along the coefficients of their channels and
// the weights of their positions.
#pragma once

#include "arithmetic.hpp"
#include "cuda/visit.cuh"
#include "gradient_math.hpp"

namespace batchnorm::cuda {

// ---- coefficients ----

// Those of all entries: field f of entry e is narrow[f*entries + e], and where they are wide, wide[kMostFields*e + f].
constexpr int kMostFields = 5;
template <class A>
struct FactorTable {
  A* narrow = nullptr;
  double* wide = nullptr;
  bool* is_wide = nullptr;
  std::int64_t entries = 0;

  BN_DEVICE void set(std::int64_t e, const Coefficients<double, kernels::Affine>& k) const {
    const double narrow_fields[] = {k.narrow.center, k.narrow.scale, k.narrow.offset};
    const double wide_fields[] = {k.wide.center, k.wide.scale, k.wide.offset};
    put(e, narrow_fields, wide_fields, k.is_wide);
  }
  BN_DEVICE void set(std::int64_t e, const Coefficients<double, kernels::GradAffine>& k) const {
    const double narrow_fields[] = {k.narrow.dy_center, k.narrow.dy_scale, k.narrow.x_center, k.narrow.x_scale,
                                    k.narrow.offset};
    const double wide_fields[] = {k.wide.dy_center, k.wide.dy_scale, k.wide.x_center, k.wide.x_scale, k.wide.offset};
    put(e, narrow_fields, wide_fields, k.is_wide);
  }

 private:
  template <int N>
  BN_DEVICE void put(std::int64_t e, const double (&narrow_fields)[N], const double (&wide_fields)[N], bool w) const {
    is_wide[e] = w;
    for (int f = 0; f < N; ++f) narrow[f * entries + e] = static_cast<A>(narrow_fields[f]);
    for (int f = 0; w && f < N; ++f) wide[kMostFields * e + f] = wide_fields[f];
  }
};

// Those of an entry: map(coefficients, values...) in the arithmetic type of T, or in float64 and rounded where that is
// wider and they want it.
template <class T, int N>
struct Maps {
  using A = Arithmetic<T>;
  const double* wide = nullptr;  // null: narrow
  A narrow[N] = {};

  BN_DEVICE Maps() {}
  BN_DEVICE Maps(const FactorTable<A>& table, std::int64_t e) {
    if (sizeof(A) < sizeof(double) && table.is_wide[e]) wide = table.wide + kMostFields * e;
    for (int f = 0; f < N; ++f) narrow[f] = table.narrow[f * table.entries + e];
  }
  // All of them in float64.
  BN_DEVICE Maps(const double* fields, bool is_wide) : wide(sizeof(A) < sizeof(double) && is_wide ? fields : nullptr) {
    for (int f = 0; f < N; ++f) narrow[f] = static_cast<A>(fields[f]);
  }
  template <class Map, class... V>
  [[nodiscard]] BN_DEVICE A of(const Map& map, V... v) const {
    if constexpr (sizeof(A) < sizeof(double)) {
      if (wide != nullptr) return static_cast<A>(map(wide, static_cast<double>(v)...));
    }
    return map(narrow, static_cast<A>(v)...);
  }
};

// The maps of kernels/table.hpp, of the fields of a table.
struct AffineMap {
  template <class A>
  BN_DEVICE A operator()(const A* k, A x) const {
    return (x - k[0]) * k[1] + k[2];
  }
};
struct GradAffineMap {
  template <class A>
  BN_DEVICE A operator()(const A* k, A dy, A x) const {
    return (dy - k[0]) * k[1] + (x - k[2]) * k[3] + k[4];
  }
};
// Without x.
struct ScaleMap {
  template <class A>
  BN_DEVICE A operator()(const A* k, A dy) const {
    return (dy - k[0]) * k[1] + k[4];
  }
};
// With a weight; where that is 0, x is not looked at.
struct WeightedGradAffineMap {
  template <class A>
  BN_DEVICE A operator()(const A* k, A dy, A x, A w) const {
    const A counted = w != 0 ? x : k[2];
    return (dy - w * k[0]) * k[1] + w * ((counted - k[2]) * k[3]) + w * k[4];
  }
};

// ---- walking ----

// Where a value lies: in row o of segment s, channel c, at i of its run.
struct Place {
  std::int64_t i, c, o, s;
};
constexpr std::int64_t kEach = 8, kTile = kEach * kStepThreads;  // values of a thread, kStepThreads apart; of a block

// The values of a tensor: of segments of as many rows each, or of one that has all rows and tells the segment of each.
struct Elements {
  Problem problem;
  std::int64_t size = 0;
  const int* numbers = nullptr;               // of the segments of rows
  Place step{};                               // from a value to the one kStepThreads on
  double per_inner, per_channels, per_outer;  // one over each

  Elements(const Problem& p, std::int64_t segments, const int* of_rows = nullptr)
      : problem(p),
        size(segments * p.size()),
        numbers(of_rows),
        per_inner(1 / static_cast<double>(p.inner)),
        per_channels(1 / static_cast<double>(p.channels)),
        per_outer(1 / static_cast<double>(p.outer)) {
    if (size > 0) step = place(kStepThreads);
  }
  [[nodiscard]] std::int64_t threads() const { return (size + kEach - 1) / kEach; }

  [[nodiscard]] BN_BOTH Place place(std::int64_t at) const {
    Place p{};
    p.i = cut_off(at, problem.inner, per_inner);
    p.c = cut_off(at, problem.channels, per_channels);
    p.o = cut_off(at, problem.outer, per_outer);
    p.s = at;
    return p;
  }
  BN_DEVICE void advance(Place& p) const {
    p.i += step.i, p.c += step.c, p.o += step.o, p.s += step.s;
    if (p.i >= problem.inner) p.i -= problem.inner, ++p.c;
    if (p.c >= problem.channels) p.c -= problem.channels, ++p.o;
    if (p.o >= problem.outer) p.o -= problem.outer, ++p.s;
  }
  [[nodiscard]] BN_DEVICE std::int64_t entry(const Place& p) const {
    return (numbers == nullptr ? p.s : numbers[p.o]) * problem.channels + p.c;
  }
  [[nodiscard]] BN_DEVICE std::int64_t position(const Place& p) const {
    return (p.s * problem.outer + p.o) * problem.inner + p.i;
  }

 private:
  // Divides `at`, of fewer than 2^52; gives the remainder. To divide 64 bits is a call.
  BN_BOTH static std::int64_t cut_off(std::int64_t& at, std::int64_t by, double per) {
    auto q = static_cast<std::int64_t>(static_cast<double>(at) * per);
    std::int64_t rest = at - q * by;
    if (rest < 0) --q, rest += by;
    if (rest >= by) ++q, rest -= by;
    at = q;
    return rest;
  }
};

// The bits of eight neighbouring lanes are a byte, of which the first `at` begins one.
BN_DEVICE void put_bits(std::uint8_t* bits, std::int64_t at, bool is_there, bool bit) {
  const unsigned lane = threadIdx.x % 32, first = lane & ~7u;
  const unsigned set = __ballot_sync(~0u, bit) >> first & 0xFF;
  if (lane == first && is_there) bits[at / 8] = static_cast<std::uint8_t>(set);
}

// A Body has the inputs input(0), ... of a value, null where it has none. know() is told its place, to have in Known
// what belongs there; put(Known, values, place, at, position) gives whether a bit is set, which goes to bits(), if that
// is not null.
// Four blocks to a multiprocessor are 128 registers a thread: with 64, which the compiler took by itself, and with 80
// some were spilled.
template <class Body>
__global__ void __launch_bounds__(kStepThreads, 4)
    map(const __grid_constant__ Elements elements, const __grid_constant__ Body body) {
  using T = typename Body::Value;
  const std::int64_t begin = std::int64_t{blockIdx.x} * kTile + threadIdx.x;
  // All are read before any is written: outputs may be inputs.
  T values[Body::kInputs][kEach];
  BN_UNROLLED for (int n = 0; n < Body::kInputs; ++n) {
    const T* from = body.input(n);
    std::int64_t at = begin;
    BN_UNROLLED for (int k = 0; k < kEach; ++k, at += kStepThreads) {
      if (from != nullptr && at < elements.size) values[n][k] = from[at];
    }
  }
  std::int64_t at = begin;
  typename Body::Known known;
  Place place = elements.place(at);
  BN_UNROLLED for (int k = 0; k < kEach; ++k, at += kStepThreads) {
    const bool is_there = at < elements.size;
    bool bit = false;
    if (is_there) {
      body.know(known, elements, place);
      T of[Body::kInputs];
      for (int n = 0; n < Body::kInputs; ++n) of[n] = values[n][k];
      bit = body.put(known, of, place, at, elements.position(place));
    }
    elements.advance(place);
    if (body.bits() != nullptr) put_bits(body.bits(), at, is_there, bit);
  }
}

// ---- what is mapped ----

// What a position that does not count becomes.
template <class W>
struct Padded {
  const W* weights = nullptr;  // null: all positions have what the formula gives
  Padding padding = Padding::normalize;

  [[nodiscard]] BN_DEVICE bool at(std::int64_t position) const {
    return weights != nullptr && padding != Padding::normalize && weights[position] == 0;
  }
};

// The coefficients of the entry that a value belongs to.
template <class T, int N>
struct KnownEntry {
  std::int64_t entry = -1;
  Maps<T, N> maps;

  BN_DEVICE void know(const FactorTable<Arithmetic<T>>& factors, std::int64_t e) {
    if (factors.narrow != nullptr && e != entry) maps = Maps<T, N>(factors, e);
    entry = e;
  }
};
// (x - center)*scale + offset.
template <class T>
struct OfEntry {
  using A = Arithmetic<T>;
  using Known = KnownEntry<T, 3>;
  FactorTable<A> factors;

  BN_DEVICE void know(Known& known, const Elements& elements, const Place& place) const {
    known.know(factors, elements.entry(place));
  }
  [[nodiscard]] BN_DEVICE A at(const Known& known, A x, std::int64_t) const { return known.maps.of(AffineMap{}, x); }
};

// y from x as Of says, and what follows.
template <class T, class Of = OfEntry<T>>
struct Normalize {
  using Value = T;
  using A = Arithmetic<T>;
  using Known = typename Of::Known;
  static constexpr int kInputs = 2;
  const T *x, *residual;  // no residual: null
  T* y;
  Of of;
  bool relu = false;
  std::uint8_t* bits_of_relu = nullptr;  // of the tensor
  Padded<A> padded = {};

  [[nodiscard]] BN_DEVICE const T* input(int n) const { return n == 0 ? x : residual; }
  [[nodiscard]] BN_DEVICE std::uint8_t* bits() const { return bits_of_relu; }
  BN_DEVICE void know(Known& known, const Elements& elements, const Place& place) const {
    of.know(known, elements, place);
  }
  BN_DEVICE bool put(const Known& known, const T* in, const Place& place, std::int64_t to,
                     std::int64_t position) const {
    A s = of.at(known, static_cast<A>(in[0]), place.c);
    if (residual != nullptr) s += static_cast<A>(in[1]);
    const bool is_padded = padded.at(position);
    y[to] = is_padded ? (padded.padding == Padding::zero ? T(0) : in[0]) : (relu && s < 0) ? T(0) : static_cast<T>(s);
    return !(s <= 0);
  }
};

// dx = (dy - w*dy_center)*dy_scale + w*((x - x_center)*x_scale) + w*offset, of dy as a ReLU lets it through, which is
// dresidual. Without x: dx = (dy - dy_center)*dy_scale + offset.
template <class T>
struct GradInput {
  using Value = T;
  using A = Arithmetic<T>;
  using Known = KnownEntry<T, 5>;
  static constexpr int kInputs = 2;
  const T *dy, *x;
  T *dx, *dresidual;  // null: not wanted
  FactorTable<A> factors;
  Gate gate = {};
  const A* weights = nullptr;
  Padded<A> padded = {};

  [[nodiscard]] BN_DEVICE const T* input(int n) const { return n == 0 ? dy : x; }
  [[nodiscard]] BN_DEVICE std::uint8_t* bits() const { return nullptr; }
  BN_DEVICE void know(Known& known, const Elements& elements, const Place& place) const {
    known.know(factors, elements.entry(place));
  }
  BN_DEVICE bool put(const Known& known, const T* in, const Place&, std::int64_t at, std::int64_t position) const {
    const T through = gate.lets_through(at) ? in[0] : T(0);
    const bool is_padded = padded.at(position);
    if (dx != nullptr) {
      const T zero_or_dy = padded.padding == Padding::zero ? T(0) : in[0];
      dx[at] = is_padded ? zero_or_dy : static_cast<T>(gradient(known.maps, static_cast<A>(through), in[1], position));
    }
    if (dresidual != nullptr) dresidual[at] = is_padded ? T(0) : through;
    return false;
  }

 private:
  [[nodiscard]] BN_DEVICE A gradient(const Maps<T, 5>& maps, A g, T x_value, std::int64_t position) const {
    if (x == nullptr) return maps.of(ScaleMap{}, g);
    const auto v = static_cast<A>(x_value);
    if (weights == nullptr) return maps.of(GradAffineMap{}, g, v);
    return maps.of(WeightedGradAffineMap{}, g, v, weights[position]);
  }
};

}  // namespace batchnorm::cuda
