// Sums, formulas and maps as kernels of their own, which hand on through global memory: of every problem, type and
// half. planar.cuh is quicker where a channel fits into the memory of the blocks that share it.
//
// One kernel, visit<Body>, goes over the values of a tensor as the CPU cuts it into chunks or columns of blocks of rows
// (plan.hpp), whether they are summed or mapped. Sums of pieces have the order of the CPU's kernels inside, and are
// added up in its order by the thread that finishes a channel.
#pragma once

#include "arithmetic.hpp"
#include "cuda/sums.cuh"
#include "gradient_math.hpp"
#include "plan.hpp"
#include "resum.hpp"

namespace batchnorm::cuda {

constexpr unsigned kStepThreads = 128;

// Quotient and remainder of numbers of pieces, channels and columns, of which there are fewer than 2^32 (api.cu): to
// divide 64 bits is a call, for which registers are spilled.
struct Divided {
  std::int64_t quotient, rest;

  BN_DEVICE Divided(std::int64_t a, std::int64_t b) {
    const auto n = static_cast<unsigned>(a), d = static_cast<unsigned>(b), q = n / d;
    quotient = q, rest = n - q * d;
  }
};

// How a tensor is cut. Interleaved: columns, of rows that lie `down` values apart, in blocks; of short runs, which are
// turned, a column is a channel.
struct Cut {
  Problem problem;  // whose channels are these
  bool planar = false;
  RunCut runs;
  RowCut rows;
  std::int64_t width = 1, across = 1;  // columns of a single row; values between neighbouring columns
  std::int64_t inner = 1;              // columns of a channel

  [[nodiscard]] BN_BOTH std::int64_t pieces() const {
    return planar ? problem.channels * runs.chunks : rows.blocks * rows.columns;
  }
  [[nodiscard]] std::int64_t threads() const { return planar ? pieces() * kLanes : pieces(); }
};
inline Cut make_cut(const Problem& problem) {
  const bool turned = has_short_runs(problem);
  const Problem seen = turned ? Problem{problem.inner, problem.channels, 1} : problem;
  const Plan plan = make_plan(seen, {true, false, 1, sizeof(float), 0, turned}, Machine{}, 1);
  Cut cut;
  cut.problem = turned ? problem : plan.problem, cut.planar = plan.planar();
  cut.runs = plan.sum_runs, cut.rows = plan.sum_rows;
  cut.inner = plan.problem.inner, cut.width = plan.problem.channels * plan.problem.inner;
  cut.across = turned ? problem.inner : 1;
  return cut;
}
// As channels are summed again: rows by themselves (settle.cpp).
inline Cut single_rows(Cut cut) {
  if (cut.planar || cut.rows.repeat == 1) return cut;
  constexpr std::int64_t kTileRows = 1024;
  RowCut& rows = cut.rows;
  rows.rows = rows.rows * rows.repeat + rows.rest_rows, rows.columns = cut.width, rows.repeat = 1, rows.rest_rows = 0;
  rows.block_rows = kTileRows, rows.blocks = rows.full_blocks = (rows.rows + kTileRows - 1) / kTileRows;
  return cut;
}

// ---- visiting ----

// A Body gives of each piece a State begin(channel): whether it `goes` there, add(at) for each value, and where the
// Body sums end(State&, piece, whether lanes are to be folded), with a piece of -1 for threads that have none.
template <class Body>
BN_DEVICE void visit_chunk(const Cut& cut, const Body& body, std::int64_t index) {
  const std::int64_t piece = index / kLanes, channels = cut.problem.channels;
  const bool is_there = piece < cut.pieces();
  const Divided place(piece, channels);
  const std::int64_t c = place.rest, inner = cut.problem.inner;
  auto state = body.begin(is_there ? c : 0);
  if (is_there && state.goes) {
    const RunCut& runs = cut.runs;
    const Divided of_run(place.quotient, runs.pieces_per_run);
    const std::int64_t o = of_run.quotient * runs.runs_per_chunk, i = of_run.rest * runs.piece_length;
    const std::int64_t left = cut.problem.outer - o, behind = inner - i;
    const std::int64_t count = left < runs.runs_per_chunk ? left : runs.runs_per_chunk;
    const std::int64_t length = behind < runs.piece_length ? behind : runs.piece_length;
    std::int64_t at = (o * channels + c) * inner + i;
    for (std::int64_t r = 0; r < count; ++r, at += channels * inner) {
      for (std::int64_t j = index % kLanes; j < length; j += kLanes) state.add(at + j);
    }
  }
  if constexpr (Body::kSums) body.end(state, is_there && state.goes ? piece : -1, true);
}
template <class Body>
BN_DEVICE void visit_columns(const Cut& cut, const Body& body, std::int64_t index) {
  if (index >= cut.pieces()) return;
  const RowCut& rows = cut.rows;
  const Divided place(index, rows.columns);
  const std::int64_t b = place.quotient, e = place.rest;
  const bool is_rest = b >= rows.full_blocks;  // of single rows
  if (is_rest && e >= cut.width) return;
  auto state = body.begin(Divided(Divided(e, cut.inner).quotient, cut.problem.channels).rest);
  if (!state.goes) return;
  const std::int64_t first = is_rest ? rows.rows : b * rows.block_rows, left = rows.rows - first;
  const std::int64_t count = is_rest ? rows.rest_rows : left < rows.block_rows ? left : rows.block_rows;
  const std::int64_t down = cut.across != 1 ? 1 : is_rest ? cut.width : rows.columns;
  std::int64_t at = first * (cut.across != 1 ? 1 : rows.columns) + e * cut.across;
  for (std::int64_t r = 0; r < count; ++r, at += down) state.add(at);
  if constexpr (Body::kSums) body.end(state, index, false);
}
// Six blocks to a multiprocessor are 80 registers a thread; where more were asked for, some were spilled.
template <class Body>
__global__ void __launch_bounds__(kStepThreads, 6)
    visit(const __grid_constant__ Cut cut, const __grid_constant__ Body body) {
  const std::int64_t index = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (cut.planar) return visit_chunk(cut, body, index);
  visit_columns(cut, body, index);
}

// ---- what is summed ----

// Why a channel is summed again.
enum class Again : int { no, about_shift, compensated };
struct Conditioned {
  Again again;
  double shift;
};

template <class T, Again kAgain>
struct TermsOfMoments {
  static constexpr bool kIsDouble = sizeof(T) == sizeof(double);
  using Type = std::conditional_t<
      kAgain == Again::about_shift, std::conditional_t<kIsDouble, CompensatedAboutShift, AboutShift>,
      std::conditional_t<kIsDouble || kAgain == Again::compensated, CompensatedAboutZero, AboutZero>>;
};

// sum(x - shift), sum((x - shift)^2) of each piece; again, of the channels that want it so.
template <class T, Again kAgain>
struct SumMoments {
  static constexpr bool kSums = true;
  const T* x;
  const Conditioned* conditioned;
  kernels::Sums* out;

  struct State {
    const T* x;
    bool goes;
    typename TermsOfMoments<T, kAgain>::Type terms;

    BN_DEVICE void add(std::int64_t at) { terms.add(widened(x[at])); }
  };
  [[nodiscard]] BN_DEVICE State begin(std::int64_t c) const {
    State state{x, true, {}};
    if constexpr (kAgain != Again::no) state.goes = conditioned[c].again == kAgain;
    if constexpr (kAgain == Again::about_shift) state.terms.shift = conditioned[c].shift;
    return state;
  }
  BN_DEVICE void end(State& state, std::int64_t piece, bool folds) const { put(state.terms, piece, folds, out); }
};

template <class T>
using TermsOfGradients =
    std::conditional_t<sizeof(T) == sizeof(double), GradientTerms<Compensated>, GradientTerms<Plain>>;

// sum(dy), sum(dy*(x - mean)), with the mean of moments or, where these are null, one that is given.
template <class T>
struct SumGradients {
  static constexpr bool kSums = true;
  const T *dy, *x;
  const Moments* saved;
  ChannelValues mean;
  kernels::Sums* out;

  struct State {
    const T *dy, *x;
    bool goes;
    TermsOfGradients<T> terms;

    BN_DEVICE void add(std::int64_t at) { terms.add(widened(dy[at]), widened(x[at])); }
  };
  [[nodiscard]] BN_DEVICE State begin(std::int64_t c) const {
    return {dy, x, true, {saved == nullptr ? mean[c] : saved[c].mean, {}, {}}};
  }
  BN_DEVICE void end(State& state, std::int64_t piece, bool folds) const { put(state.terms, piece, folds, out); }
};

// ---- what is mapped ----

// The coefficients of a channel: fields of an Affine or a GradAffine, those in float64 where they are wide.
struct Factors {
  double of[5];
  bool is_wide;

  BN_BOTH void set(const Coefficients<double, kernels::Affine>& k) {
    const auto& f = k.is_wide ? k.wide : k.narrow;
    of[0] = f.center, of[1] = f.scale, of[2] = f.offset, is_wide = k.is_wide;
  }
  BN_BOTH void set(const Coefficients<double, kernels::GradAffine>& k) {
    const auto& f = k.is_wide ? k.wide : k.narrow;
    of[0] = f.dy_center, of[1] = f.dy_scale, of[2] = f.x_center, of[3] = f.x_scale, of[4] = f.offset;
    is_wide = k.is_wide;
  }
};

// A map of N coefficients in the arithmetic type of T, or in float64 where that is wider and they want it.
template <class T, int N>
struct Maps {
  using A = Arithmetic<T>;
  bool is_wide;
  double wide[N];
  A narrow[N];

  BN_DEVICE explicit Maps(const Factors& factors) : is_wide(sizeof(A) < sizeof(double) && factors.is_wide) {
    for (int f = 0; f < N; ++f) wide[f] = factors.of[f], narrow[f] = static_cast<A>(wide[f]);
  }
  // map(coefficients, values...), rounded to A and then to T.
  template <class Map, class... V>
  [[nodiscard]] BN_DEVICE T of(const Map& map, V... v) const {
    if constexpr (sizeof(A) < sizeof(double)) {
      if (is_wide) return static_cast<T>(static_cast<A>(map(wide, static_cast<double>(v)...)));
    }
    return static_cast<T>(map(narrow, v...));
  }
};

// The maps of kernels/table.hpp, of the fields of Factors.
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

// y = (x - center)*scale + offset.
template <class T>
struct Normalize {
  static constexpr bool kSums = false;
  const T* x;
  T* y;
  const Factors* factors;

  struct State {
    const T* x;
    T* y;
    bool goes;
    Maps<T, 3> maps;

    BN_DEVICE void add(std::int64_t at) { y[at] = maps.of(AffineMap{}, static_cast<Arithmetic<T>>(x[at])); }
  };
  [[nodiscard]] BN_DEVICE State begin(std::int64_t c) const { return {x, y, true, Maps<T, 3>(factors[c])}; }
};

// dx = (dy - dy_center)*dy_scale + (x - x_center)*x_scale + offset.
template <class T>
struct GradInput {
  static constexpr bool kSums = false;
  const T *dy, *x;
  T* dx;
  const Factors* factors;

  struct State {
    const T *dy, *x;
    T* dx;
    bool goes;
    Maps<T, 5> maps;

    BN_DEVICE void add(std::int64_t at) {
      using A = Arithmetic<T>;
      dx[at] = maps.of(GradAffineMap{}, static_cast<A>(dy[at]), static_cast<A>(x[at]));
    }
  };
  [[nodiscard]] BN_DEVICE State begin(std::int64_t c) const { return {dy, x, dx, true, Maps<T, 5>(factors[c])}; }
};

// ---- finishing: a thread a channel ----

// Sums of the blocks of a column, as kernels add blocks (kernels/accumulate-inl.hpp): bundles, each begun at 0.
BN_DEVICE kernels::Sums sum_of_column(const Cut& cut, const kernels::Sums* sums, std::int64_t e) {
  const std::int64_t blocks = e < cut.width ? cut.rows.blocks : cut.rows.full_blocks;
  kernels::Sums total, bundle;
  for (std::int64_t b = 0; b < blocks; ++b) {
    batchnorm::add(bundle, sums[b * cut.rows.columns + e]);
    if (b + 1 < blocks && (b + 1) % kernels::kBundle != 0) continue;
    batchnorm::add(total, bundle);
    bundle = {};
  }
  return total;
}
// Of rows side by side: half of them to the other half, until there is one. Of column e of a single row.
BN_DEVICE kernels::Sums sum_side_by_side(const Cut& cut, const kernels::Sums* sums, std::int64_t e) {
  constexpr std::int64_t kMostRepeated = 64;  // rows of a column up to 64 values (plan.cpp)
  kernels::Sums of[kMostRepeated];
  std::int64_t rows = cut.rows.repeat;
  for (std::int64_t r = 0; r < rows; ++r) {
    const std::int64_t column = r * cut.width + e;
    of[r] = cut.rows.blocks == 1 ? sums[column] : sum_of_column(cut, sums, column);
  }
  for (; rows > 1; rows -= rows / 2) {
    for (std::int64_t r = 0; r < rows / 2; ++r) batchnorm::add(of[r], of[rows - rows / 2 + r]);
  }
  return of[0];
}
BN_DEVICE kernels::Sums sums_of_channel(const Cut& cut, const kernels::Sums* sums, std::int64_t c, bool again) {
  if (cut.pieces() == 0) return {};
  if (cut.planar) {
    const std::int64_t channels = cut.problem.channels;
    return added_up(cut.runs.chunks, [&](std::int64_t k) -> const kernels::Sums& { return sums[k * channels + c]; });
  }
  kernels::Sums total = again ? kernels::Sums{} : sum_side_by_side(cut, sums, c * cut.inner);
  for (std::int64_t i = again ? 0 : 1; i < cut.inner; ++i) {
    const std::int64_t e = c * cut.inner + i;
    batchnorm::add(total, again ? sum_of_column(cut, sums, e) : sum_side_by_side(cut, sums, e));
  }
  return total;
}

// From the first sums, then from those about a shift, then from compensated ones, where a channel wanted them.
template <class T>
__global__ void __launch_bounds__(kStepThreads)
    finish_moments(const __grid_constant__ Cut cut, const kernels::Sums* sums, Again taken, Conditioned* conditioned,
                   Moments* saved) {
  using A = Arithmetic<T>;
  const std::int64_t c = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (c >= cut.problem.channels) return;
  const DoubleDouble count{static_cast<double>(cut.problem.count()), 0};
  if (count.hi == 0) {
    saved[c] = {};
    return;
  }
  Conditioned& how = conditioned[c];
  if (taken == Again::no || how.again == taken) {
    const double shift = taken == Again::about_shift ? how.shift : 0;
    const kernels::Sums total = sums_of_channel(cut, sums, c, taken != Again::no);
    moments_from_sums<A, double>(count, shift, &total).put(saved + c);
  }
  Moments& m = saved[c];
  how = {Again::no, 0};
  if (taken == Again::no && needs_shift<A>(m)) how = {Again::about_shift, static_cast<double>(static_cast<A>(m.mean))};
  if (taken == Again::about_shift && mean_below(m, Conditioning<A>::kCompensateBelow) && std::isfinite(m.m2)) {
    how.again = Again::compensated;
  }
}
// Of the values of channel c in memory, one after the other: what no sum tells.
template <class T>
BN_DEVICE void settle_in_memory(const Problem& p, const T* x, std::int64_t c, Moments& m) {
  const auto each = [&](const auto& f) {
    for (std::int64_t o = 0; o < p.outer; ++o) {
      for (std::int64_t i = 0; i < p.inner; ++i) f(widened(x[(o * p.channels + c) * p.inner + i]), 1.0);
    }
  };
  settle_value_by_value<Arithmetic<T>>(each, {static_cast<double>(p.count()), 0}, m);
}
// At last, where no sum tells enough: by threads of which nearly all leave at once.
template <class T>
__global__ void __launch_bounds__(kStepThreads)
    settle_moments(const __grid_constant__ Problem p, const T* x, Moments* saved) {
  const std::int64_t c = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (c < p.channels && p.count() > 0) settle_in_memory(p, x, c, saved[c]);
}

// What a tensor is normalized by: moments, or where these are null the mean and var that are given.
struct Statistics {
  const Moments* moments = nullptr;
  ChannelValues mean = {}, var = {};
};
template <class T>
__global__ void __launch_bounds__(kStepThreads)
    finish_forward(std::int64_t channels, Statistics of, ChannelValues gamma, ChannelValues beta, double eps,
                   Factors* factors) {
  using A = Arithmetic<T>;
  const std::int64_t c = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (c >= channels) return;
  const auto to = [&](const Coefficients<double, kernels::Affine>& k) { factors[c].set(k); };
  const double g = gamma.value_or(c, 1), b = beta.value_or(c, 0);
  if (of.moments != nullptr) {
    return forward_coefficients<A, double>(MomentsOf<double>::at(of.moments + c), eps, g, b, true, to);
  }
  forward_coefficients<A, double>(of.mean[c], rstd_for<A, double>(of.var[c], eps), g, b, to);
}

// What comes of the sums of a channel: `taken` of pieces, or `given`; each output may be unwanted, factors null.
struct GradientOutputs {
  GradSums* sums = nullptr;
  ChannelOutput dgamma = {}, dbeta = {};
  Factors* factors = nullptr;
};
template <class T>
BN_DEVICE void set_gradients(const GradSums& sums, const Moments& saved, double gamma, double eps, std::int64_t c,
                             const GradientOutputs& out) {
  using A = Arithmetic<T>;
  auto m = MomentsOf<double>::at(&saved);
  const GradSumsOf<double> s{{sums.sum_dy, sums.sum_dy_lo}, {sums.sum_dy_xmu, sums.sum_dy_xmu_lo}};
  const DoubleDouble rstd = m.count == 0 ? DoubleDouble{} : rstd_for<A>(m, eps);
  out.dgamma.set(c, dgamma_of<A>(m, s, rstd));
  out.dbeta.set(c, dbeta_of(s));
  m.count = m.count == 0 ? 1 : m.count;
  if (out.factors != nullptr) out.factors->set(backward_coefficients<A, double>(m, m.count, s, rstd, gamma));
}
template <class T>
__global__ void __launch_bounds__(kStepThreads)
    finish_backward(const __grid_constant__ Cut cut, const kernels::Sums* taken, const GradSums* given,
                    const Moments* saved, ChannelValues gamma, double eps, GradientOutputs out) {
  const std::int64_t c = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (c >= cut.problem.channels) return;
  GradSums sums;
  if (given != nullptr) {
    sums = given[c];
  } else {
    const kernels::Sums total = sums_of_channel(cut, taken, c, false);
    sums = {total.first, total.first_lo, total.second, total.second_lo};
  }
  if (out.sums != nullptr) out.sums[c] = sums;
  if (out.factors != nullptr) out.factors += c;
  set_gradients<T>(sums, saved[c], gamma.value_or(c, 1), eps, c, out);
}

// The same where statistics are constants: dx = gamma*rstd*dy. `taken` may be null, where no sums are wanted.
template <class T>
__global__ void __launch_bounds__(kStepThreads)
    finish_constant(const __grid_constant__ Cut cut, const kernels::Sums* taken, ChannelValues mean, ChannelValues var,
                    ChannelValues gamma, double eps, GradientOutputs out) {
  using A = Arithmetic<T>;
  const std::int64_t c = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (c >= cut.problem.channels) return;
  if (taken != nullptr) {
    const kernels::Sums total = sums_of_channel(cut, taken, c, false);
    const GradSumsOf<double> s{{total.first, total.first_lo}, {total.second, total.second_lo}};
    const MomentsOf<double> about{0, mean[c], 0, 0, 0};
    out.dgamma.set(c, dgamma_of<double>(about, s, rstd_of(DoubleDouble{var[c], 0}, eps)));
    out.dbeta.set(c, dbeta_of(s));
  }
  if (out.factors == nullptr) return;
  out.factors[c].set(frozen_backward_coefficients<A>(rstd_for<A, double>(var[c], eps), gamma.value_or(c, 1)));
}

}  // namespace batchnorm::cuda
