// Prints a hash of the bits of every result, one line a pass or call, shape and type. Two machines, or two instruction
// sets, that print the same have computed the same bits. One thread and seven are held against each other at once.
//     bits                  the hashes, after a line that names the instruction set in use
//     bits --bench-shapes   those of the benchmark's shapes of up to 3 million values instead, in float32
//     bits ... --threads    holds 2, 3, 7 and 16 threads against one
//     bits --list           the instruction sets that run here
#include <algorithm>
#include <array>
#include <cstdio>
#include <cstring>
#include <exception>
#include <set>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "../../bench/cases.hpp"
#include "all_passes.hpp"
#include "every_call.hpp"

namespace {

using namespace batchnorm;
using all_passes::Kind;

struct Shape {
  Problem problem;
  std::vector<Kind> kinds;
};

const std::vector<Shape>& shapes() {
  const std::vector<Kind> every(std::begin(all_passes::kKinds), std::end(all_passes::kKinds));
  static const std::vector<Shape> list = {
      // planar: a few long runs, many short ones, tails, more than one chunk a channel and a run, one channel
      {{4, 7, 49}, every},
      {{3, 5, 17}, every},
      {{16, 8, 100}, every},
      {{2, 3, 20'011}, every},
      {{700, 4, 33}, {Kind::ordinary, Kind::cancelling}},
      {{1, 1, 50'000}, {Kind::ordinary, Kind::huge_mean, Kind::cancelling}},
      {{5000, 1, 3}, {Kind::ordinary}},
      // interleaved: channels that are and are not whole vectors, short rows side by side, several blocks
      {{300, 64, 1}, every},
      {{301, 7, 1}, every},
      {{5, 130, 1}, every},
      {{5000, 33, 1}, {Kind::ordinary, Kind::huge_mean, Kind::wide}},
      {{2100, 100, 1}, {Kind::ordinary, Kind::cancelling}},
      {{2, 4099, 1}, {Kind::ordinary, Kind::wide}},
      // short runs, which are columns too
      {{50, 6, 4}, every},
      {{33, 3, 16}, every},
      // short runs
      {{1, 300, 4}, every},
      {{1, 70, 31}, every},
      {{900, 20, 5}, {Kind::ordinary, Kind::huge_mean, Kind::cancelling, Kind::wide}},
  };
  return list;
}

// FNV-1a over the bits of values, in four lanes that need not wait for each other.
class Hash {
 public:
  template <class T>
  Hash& add(std::span<const T> values) {
    auto [a, b, c, d] = lanes_;  // in registers
    std::size_t e = 0;
    for (; e + 4 <= values.size(); e += 4) {
      a = (a ^ data::bits(values[e])) * kPrime;
      b = (b ^ data::bits(values[e + 1])) * kPrime;
      c = (c ^ data::bits(values[e + 2])) * kPrime;
      d = (d ^ data::bits(values[e + 3])) * kPrime;
    }
    for (; e < values.size(); ++e) a = (a ^ data::bits(values[e])) * kPrime;
    lanes_ = {a, b, c, d};
    count_ += values.size();
    return *this;
  }
  template <class T>
  Hash& add(const std::vector<T>& values) {
    return add(std::span<const T>(values));
  }
  Hash& add(const std::vector<Moments>& values) {
    for (const Moments& m : values) add(std::span<const double>(std::array{m.count, m.mean, m.mean_lo, m.m2, m.m2_lo}));
    return *this;
  }
  Hash& add(const std::vector<GradSums>& values) {
    for (const GradSums& s : values) {
      add(std::span<const double>(std::array{s.sum_dy, s.sum_dy_lo, s.sum_dy_xmu, s.sum_dy_xmu_lo}));
    }
    return *this;
  }
  [[nodiscard]] std::uint64_t value() const {
    std::uint64_t h = count_;
    for (const std::uint64_t lane : lanes_) h = (h ^ lane) * kPrime;
    return h ^ (h >> 32);
  }

 private:
  static constexpr std::uint64_t kPrime = 0x100000001b3u, kStart = 0xcbf29ce484222325u;
  std::array<std::uint64_t, 4> lanes_ = {kStart, kStart + 1, kStart + 2, kStart + 3};
  std::uint64_t count_ = 0;
};
template <class... Values>
std::uint64_t hash_of(const Values&... values) {
  Hash hash;
  (hash.add(values), ...);
  return hash.value();
}

// The hashes of the passes of that order, by name.
template <class T>
std::vector<std::pair<const char*, std::uint64_t>> hashes(const all_passes::Results<T>& r, all_passes::Order order) {
  std::vector<std::pair<const char*, std::uint64_t>> list = {
      {"moments", hash_of(r.moments, r.saved)},
      {"y", hash_of(r.y, r.y_from_moments)},
      {"normalize", hash_of(r.y_given)},
      {"grad_sums", hash_of(r.sums)},
      {"dx", hash_of(r.dx, r.dx_from_sums)},
      {"dgamma", hash_of(r.dgamma)},
      {"dbeta", hash_of(r.dbeta)},
      {"frozen_backward", hash_of(r.dx_frozen, r.dgamma_frozen, r.dbeta_frozen)},
      {"running", hash_of(r.running_mean, r.running_var)}};
  if (order == all_passes::Order::first) return list;
  list.emplace_back("jvp", hash_of(r.y_dot, r.y_dot_frozen));
  list.emplace_back("double_backward", hash_of(r.ddy, r.dx_second, r.dgamma_second));
  list.emplace_back("frozen_double_backward", hash_of(r.ddy_frozen, r.dx_second_frozen, r.dgamma_second_frozen));
  return list;
}

template <class T>
constexpr const char* kName = "float64";
template <>
constexpr const char* kName<float> = "float32";
template <>
constexpr const char* kName<Float16> = "float16";
template <>
constexpr const char* kName<BFloat16> = "bfloat16";

template <class T>
void print_line(const Problem& p, Kind kind, const char* pass, std::uint64_t hash, bool same) {
  std::printf("%s {%lld, %lld, %lld} %s %s %016llx%s\n", kName<T>, static_cast<long long>(p.outer),
              static_cast<long long>(p.channels), static_cast<long long>(p.inner),
              all_passes::kKindNames[static_cast<int>(kind)], pass, static_cast<unsigned long long>(hash),
              same ? "" : "  differs between numbers of threads");
}

// Returns whether all numbers of threads gave the same bits.
template <class T>
bool print(const Problem& p, Kind kind, const std::vector<int>& numbers,
           all_passes::Order order = all_passes::Order::second) {
  const all_passes::Batch<T> batch = all_passes::make_batch<T>(p, kind);
  all_passes::Results<T> results = all_passes::room_for(batch);
  const auto with = [&](int threads) {
    all_passes::forget(results);
    all_passes::run_into(results, batch, {.threads = threads}, 1e-5, order);
    return hashes(results, order);
  };
  const auto expected = with(1);
  bool same = true;
  for (const int threads : numbers) same = with(threads) == expected && same;
  for (const auto& [pass, value] : expected) {
    print_line<T>(p, kind, pass, value, same);
  }
  return same;
}

// The calls with weights, segments and a tail too. Where bits of a ReLU lie depends on addresses; y and dresidual tell
// them.
template <class T>
bool print_calls(const Problem& p, Kind kind, const std::vector<int>& numbers) {
  every_call::Arguments<T> a(p);
  a.x = all_passes::make_batch<T>(p, kind).x;
  const auto hash_after = [&a](const every_call::NamedCall& call) {
    const auto clear = [](auto&... values) {
      (std::fill(values.begin(), values.end(), std::remove_reference_t<decltype(values[0])>{}), ...);
    };
    clear(a.y, a.y2, a.dgamma, a.dbeta, a.moments_out, a.sums_out);
    call.run();
    return hash_of(a.y, a.y2, a.dgamma, a.dbeta, a.moments_out, a.sums_out);
  };
  const auto calls = every_call::of<T>(a, {.threads = 1});
  std::vector<std::vector<every_call::NamedCall>> shared;
  for (const int threads : numbers) shared.push_back(every_call::of<T>(a, {.threads = threads}));
  bool all_same = true;
  for (std::size_t k = 0; k < calls.size(); ++k) {
    if (calls[k].name.ends_with("in place")) continue;
    const std::uint64_t expected = hash_after(calls[k]);
    const bool same = std::ranges::all_of(shared, [&](const auto& of) { return hash_after(of[k]) == expected; });
    print_line<T>(p, kind, calls[k].name.c_str(), expected, same);
    all_same = all_same && same;
  }
  return all_same;
}

bool print_bench_shapes(bool all_threads) {
  const std::vector<int> numbers = all_threads ? std::vector{3, 16} : std::vector{16};
  constexpr std::int64_t kMostValues = 3'000'000;
  bool same = true;
  std::set<std::array<std::int64_t, 3>> seen;
  for (const bench::Case& c : bench::kCases) {
    for (const bench::Layout layout : bench::layouts_of(c.shape)) {
      const Problem p = bench::problem_of(c.shape, layout);
      if (p.count() < 2 || p.size() > kMostValues || !seen.insert({p.outer, p.channels, p.inner}).second) continue;
      same = print<float>(p, Kind::ordinary, numbers, all_passes::Order::first) && same;
    }
  }
  return same;
}

template <class T>
bool print_own_shapes(const std::vector<int>& numbers) {
  bool same = true;
  for (const Shape& shape : shapes()) {
    for (const Kind kind : shape.kinds) same = print<T>(shape.problem, kind, numbers) && same;
  }
  // Rows side by side, wide rows, short runs, long ones, several chunks.
  for (const Problem& p : {Problem{301, 7, 1}, {40, 700, 1}, {5, 4100, 1}, {50, 6, 4}, {4, 90, 17}, {3, 2, 5000}}) {
    for (const Kind kind : {Kind::ordinary, Kind::wide}) same = print_calls<T>(p, kind, numbers) && same;
  }
  return same;
}
bool print_own_shapes(bool all_threads) {
  const std::vector<int> numbers = all_threads ? std::vector{2, 3, 7, 16} : std::vector{7};
  bool same = print_own_shapes<Float16>(numbers);
  same = print_own_shapes<BFloat16>(numbers) && same;
  same = print_own_shapes<float>(numbers) && same;
  return print_own_shapes<double>(numbers) && same;
}

}  // namespace

int main(int argc, char** argv) try {
  const auto has = [&](const char* option) {
    return std::any_of(argv + 1, argv + argc, [&](const char* given) { return std::strcmp(given, option) == 0; });
  };
  if (has("--list")) {
    for (const std::string& isa : available_isas()) std::printf("%s\n", isa.c_str());
    return 0;
  }
  std::printf("isa %s\n", active_isa().c_str());
  const bool all_threads = has("--threads");
  return (has("--bench-shapes") ? print_bench_shapes(all_threads) : print_own_shapes(all_threads)) ? 0 : 1;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 2;
}
