// Every call, with each array that it is given between two pages whose touch ends the program: the array ends at the
// one or begins at the other. On the instruction set of BATCHNORM_ISA. (kernels_test does the same with each kernel.)
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "arithmetic.hpp"
#include "batchnorm/batchnorm.hpp"
#include "data.hpp"
#include "dispatch.hpp"
#include "expect.hpp"
#include "guarded.hpp"

namespace {

using namespace batchnorm;
using guarded::Array;
using guarded::Place;

constexpr std::int64_t kRemainders = 64;

// What is being called, for messages.
struct Call {
  const char* name = "";
  std::size_t item_size = 0;
  Place place = Place::ends_at_guard;
  Problem problem{};
} current;

std::string described() {
  const auto& [name, item_size, place, p] = current;
  return expect::text(active_implementation().name, " ", name, ", items of ", item_size, " bytes, ",
                      guarded::name(place), ", ", p.outer, " x ", p.channels, " x ", p.inner);
}

// ---- arrays ----------------------------------------------------------------------------------------------------

// `count` of the same few thousand values, from the `from`-th on.
template <class T>
std::vector<T> values(std::int64_t count, std::int64_t from = 0) {
  constexpr std::int64_t kMost = 6000;
  static const std::vector<T> all = [] {
    data::Generator g(1);
    return data::values<T>(g, kMost);
  }();
  return std::vector<T>(all.begin() + from, all.begin() + from + count);
}
template <class W>
std::vector<W> weights(std::int64_t count, bool is_mask) {
  data::Generator g(2);
  std::vector<W> w(static_cast<std::size_t>(count));
  for (W& e : w) e = static_cast<W>(is_mask ? g.below(4) > 0 : g.below(4) * 0.375);
  return w;
}
template <class Coefficients>
std::vector<Coefficients> each_of(std::int64_t channels, const Coefficients& one) {
  return std::vector<Coefficients>(static_cast<std::size_t>(channels), one);
}

// ---- calls -----------------------------------------------------------------------------------------------------

template <class T>
struct CallArrays {
  Array<T> x, dy, residual, y, dx, dresidual;
  Array<Arithmetic<T>> weights;
  Array<std::uint8_t> mask;
  Array<Moments> saved;
  Array<GradSums> sums;
  Array<double> gamma, beta, mean, var, dgamma, dbeta;
  Array<std::int64_t> offsets;
};

template <class T>
class Calls {
 public:
  explicit Calls(const Problem& problem) : p(problem) {
    const std::int64_t n = p.size();
    const auto values_at = [](auto& array, auto content) {
      const std::size_t size = content.size();
      return std::span(array.place(content, current.place), size);
    };
    x = values_at(a.x, values<T>(n));
    dy = values_at(a.dy, values<T>(n, 100));
    residual = values_at(a.residual, values<T>(n, 200));
    y = values_at(a.y, values<T>(n));
    dx = values_at(a.dx, values<T>(n));
    dresidual = values_at(a.dresidual, values<T>(n));
    mask = values_at(a.mask, std::vector<std::uint8_t>(static_cast<std::size_t>(relu_mask_bytes(p))));
    gamma = values_at(a.gamma, values<double>(p.channels));
    beta = values_at(a.beta, values<double>(p.channels));
    mean = values_at(a.mean, values<double>(p.channels));
    var = values_at(a.var, each_of(p.channels, 2.0));
    dgamma = values_at(a.dgamma, values<double>(p.channels));
    dbeta = values_at(a.dbeta, values<double>(p.channels));
    set_entries(p.channels);
    current.item_size = sizeof(T);
  }

  void plain() { run("calls", {.problem = p, .gamma = gamma, .beta = beta}); }
  void derivatives() {
    current.name = "derivatives";
    const batchnorm::Call<T> call{.problem = p, .gamma = gamma};
    moments<T>(x, call, saved);
    batch_norm_jvp<T>(residual, x, call, saved, mean, beta, y);
    normalize_jvp<T>(residual, x, call, mean, var, beta, var, mean, beta, y);
    batch_norm_double_backward<T>(residual, dy, x, call, saved, mean, beta, y, dx, dgamma);
    normalize_double_backward<T>(residual, dy, x, call, mean, var, mean, beta, y, dx, dgamma);
    expect_inside();
  }
  void weighted(bool is_mask) {
    const auto w = weights<Arithmetic<T>>(p.count(), is_mask);
    const std::span<const Arithmetic<T>> given(a.weights.place(w, current.place), w.size());
    for (const Padding padding : {Padding::zero, Padding::keep, Padding::normalize}) {
      run(is_mask ? "calls with a mask" : "calls with weights",
          {.problem = p, .counted = {given, padding}, .gamma = gamma, .beta = beta});
      EXPECT(a.weights.untouched(), described());
    }
  }
  void tails() {
    run("calls with a residual", {.problem = p, .gamma = gamma, .beta = beta, .tail = {.residual = residual}});
    run("calls with a ReLU",
        {.problem = p, .gamma = gamma, .beta = beta, .tail = {.residual = residual, .relu = true, .bits = mask}});
    const auto bytes = static_cast<std::int64_t>(mask.size());
    EXPECT(a.mask.untouched_outside({bytes, 1, bytes}), described());
  }
  void positions() {
    set_entries(p.count());
    const Groups groups{{}, p.channels, true};
    run("calls of each position", {.problem = p, .groups = groups, .gamma = gamma, .beta = beta});
    run("calls of each position with a ReLU", {.problem = p,
                                               .groups = groups,
                                               .gamma = gamma,
                                               .beta = beta,
                                               .tail = {.residual = residual, .relu = true, .bits = mask}});
    const batchnorm::Call<T> call{.problem = p, .groups = groups, .gamma = gamma};
    moments<T>(x, call, saved);
    batch_norm_jvp<T>(residual, x, call, saved, mean, beta, y);
    expect_inside();
    set_entries(p.channels);
  }
  void segments() {
    const std::vector<std::int64_t> ends{0, p.outer};
    const std::span<const std::int64_t> offsets(a.offsets.place(ends, current.place), 2);
    run("calls with segments", {.problem = p, .groups = {offsets}, .gamma = gamma, .beta = beta});
    EXPECT(a.offsets.untouched(), described());
  }

 private:
  // Of moments and sums.
  void set_entries(std::int64_t count) {
    saved = std::span(a.saved.place(each_of(count, Moments{}), current.place), static_cast<std::size_t>(count));
    sums = std::span(a.sums.place(each_of(count, GradSums{}), current.place), static_cast<std::size_t>(count));
  }
  static CallArrays<T>& arrays() {
    static CallArrays<T> all;
    return all;
  }
  // Everything before and after the statistics, whole and in halves, and with statistics that are given.
  void run(const char* name, const batchnorm::Call<T>& call) {
    current.name = name;
    batch_norm<T>(x, call, y, saved);
    moments<T>(x, call, saved);
    normalize<T>(x, call, saved, y);
    const Gradients<T> out{dx, dresidual, dgamma, dbeta};
    batch_norm_backward<T>(dy, x, call, saved, out);
    grad_sums<T>(dy, x, call, saved, sums);
    grad_input<T>(dy, x, call, saved, sums, dx, dresidual);
    if (call.groups.offsets.empty() && !call.groups.each_position &&
        (call.counted.weights.empty() || call.counted.padding != Padding::normalize)) {
      normalize<T>(x, call, mean, var, y);
      normalize_backward<T>(dy, x, call, mean, var, out);
    }
    expect_inside();
  }
  void expect_inside() {
    const std::int64_t n = p.size(), c = p.channels;
    EXPECT(a.x.untouched() && a.dy.untouched() && a.residual.untouched(), described());
    EXPECT(a.gamma.untouched() && a.beta.untouched() && a.mean.untouched() && a.var.untouched(), described());
    for (auto* written : {&a.y, &a.dx, &a.dresidual}) EXPECT(written->untouched_outside({n, 1, n}), described());
    for (auto* written : {&a.dgamma, &a.dbeta}) EXPECT(written->untouched_outside({c, 1, c}), described());
    const auto entries = static_cast<std::int64_t>(saved.size());
    const guarded::Strided table{entries, 1, entries};
    EXPECT(a.saved.untouched_outside(table) && a.sums.untouched_outside(table), described());
  }

  CallArrays<T>& a = arrays();
  Problem p;
  std::span<const T> x, dy, residual;
  std::span<T> y, dx, dresidual;
  std::span<std::uint8_t> mask;
  std::span<const double> gamma, beta, mean, var;
  std::span<double> dgamma, dbeta;
  std::span<Moments> saved;
  std::span<GradSums> sums;
};

template <class T>
void try_calls(const Problem& p) {
  for (const Place place : {Place::ends_at_guard, Place::starts_at_guard}) {
    current = {.place = place, .problem = p};
    Calls<T> calls(p);
    calls.plain();
    for (const bool is_mask : {false, true}) calls.weighted(is_mask);
    calls.tails();
    calls.segments();
    calls.positions();
    calls.derivatives();
  }
}

// Planar and interleaved, of one channel and several.
template <class T>
void try_all_calls() {
  for (std::int64_t r = 1; r <= kRemainders; ++r) {
    for (const Problem& p :
         {Problem{1, 2, 1040 + r}, {4, 1, r}, {5, 3, 30 + r}, {12, r, 1}, {6, r, 5}, {50, 3, r % 4}}) {
      if (p.size() > 0) try_calls<T>(p);
    }
  }
}

TEST(calls_touch_no_byte_outside_of_their_arrays) {
  try_all_calls<float>();
  try_all_calls<double>();
  try_all_calls<Float16>();
  try_all_calls<BFloat16>();
}

}  // namespace

int main(int argc, char** argv) {
  guarded::describe_call = described;
  guarded::report_faults();
  return expect::run_tests(argc > 1 ? argv[1] : nullptr);
}
