// Arguments that share memory: a tensor may be written to one that is read; all else is refused, and nothing written.
#include <stdexcept>

#include "every_call.hpp"
#include "expect.hpp"

namespace {

using namespace batchnorm;

constexpr Problem kProblem{6, 5, 4};
constexpr double kEps = 1e-5;

template <class F>
void expect_refused(const char* written, const char* other, const F& call) {
  EXPECT_THROWS(std::invalid_argument, expect::text(written, " must share no memory with ", other, ", got an overlap"),
                call());
}

// Arguments of every function, all of float64 so that each can lie in the memory of each. What is not told lies apart.
struct Fixture : every_call::Arguments<double> {
  Fixture() : Arguments(kProblem) {}

  // Memory for any of them, and what a value per channel, a tensor, ... in it is.
  std::vector<double> memory = std::vector<double>(1000, 0.5);
  std::span<double> channels() { return std::span(memory).first(5); }
  std::span<double> tensor() { return std::span(memory).first(120); }
  std::span<double> positions() { return std::span(memory).first(24); }
  std::span<Moments> table() { return {reinterpret_cast<Moments*>(memory.data()), 5}; }
  std::span<GradSums> sums_table() { return {reinterpret_cast<GradSums*>(memory.data()), 5}; }
  std::span<Moments> segments_table() { return {reinterpret_cast<Moments*>(memory.data()), moments_out.size()}; }
  std::span<std::uint8_t> bits_in_memory() { return {reinterpret_cast<std::uint8_t*>(memory.data()), bits.size()}; }
  std::span<Moments> out() { return std::span(moments_out).first(5); }
  // Of the plain call.
  std::span<const Moments> saved = ways.front().saved;
  std::span<const GradSums> sums = ways.front().sums;
  std::span<const Moments> saved_segments = way(" by segments").saved;

  every_call::Way<double>& way(const std::string& name) {
    return *std::ranges::find(ways, name, &every_call::Way<double>::name);
  }
  // What the functions without wrappers take.
  [[nodiscard]] Call<double> with(ChannelValues gamma, ChannelValues beta = {}) const {
    return {.problem = kProblem, .gamma = gamma, .beta = beta};
  }
};

TEST(dgamma_in_the_memory_of_gamma_is_refused_and_leaves_gamma_alone) {
  Fixture f;
  const auto before = f.gamma;
  expect_refused("dgamma", "gamma", [&] {
    batch_norm_backward<double>(f.dy, f.x, kProblem, f.saved, f.gamma, kEps, f.y, f.gamma, f.dbeta);
  });
  EXPECT(before == f.gamma);
}

TEST(forward_passes_write_apart_from_all_that_they_read) {
  Fixture f;
  const auto m = f.channels();
  const auto train = [&](std::span<const double> x, ChannelValues gamma, ChannelValues beta, std::span<double> y,
                         std::span<Moments> saved) {
    return [=] { batch_norm<double>(x, kProblem, gamma, beta, kEps, y, saved); };
  };
  expect_refused("saved", "x", train(f.tensor(), f.gamma, f.beta, f.y, f.table()));
  expect_refused("saved", "y", train(f.x, f.gamma, f.beta, f.tensor(), f.table()));
  expect_refused("saved", "gamma", train(f.x, m, f.beta, f.y, f.table()));
  expect_refused("saved", "beta", train(f.x, f.gamma, m, f.y, f.table()));
  expect_refused("y", "gamma", train(f.x, m, f.beta, f.tensor(), f.out()));
  expect_refused("y", "beta", train(f.x, f.gamma, m, f.tensor(), f.out()));
  expect_refused("out", "x", [&] { moments<double>(f.tensor(), kProblem, f.table()); });

  const auto infer = [&](ChannelValues mean, ChannelValues var, ChannelValues gamma, ChannelValues beta) {
    return [=, &f] { normalize<double>(f.x, kProblem, mean, var, gamma, beta, kEps, f.tensor()); };
  };
  expect_refused("y", "mean", infer(m, f.var, f.gamma, f.beta));
  expect_refused("y", "var", infer(f.mean, m, f.gamma, f.beta));
  expect_refused("y", "gamma", infer(f.mean, f.var, m, f.beta));
  expect_refused("y", "beta", infer(f.mean, f.var, f.gamma, m));
  expect_refused("y", "moments", [&] {
    normalize<double>(f.x, kProblem, std::span<const Moments>(f.table()), f.gamma, f.beta, kEps, f.tensor());
  });
  expect_refused("running_mean", "running_var", [&] { update_running(m, m, f.saved, 0.1, 1); });
  expect_refused("running_mean", "batch", [&] { update_running(m, f.var, f.table(), 0.1, 1); });
  expect_refused("running_var", "batch", [&] { update_running(f.mean, m, f.table(), 0.1, 1); });
}

TEST(backward_passes_write_apart_from_all_that_they_read) {
  Fixture f;
  const auto m = f.channels();
  const auto train = [&](std::span<const double> dy, std::span<const double> x, std::span<const Moments> saved,
                         ChannelValues gamma, std::span<double> dx, ChannelOutput dgamma, ChannelOutput dbeta) {
    return [=] { batch_norm_backward<double>(dy, x, kProblem, saved, gamma, kEps, dx, dgamma, dbeta); };
  };
  expect_refused("dgamma", "dbeta", train(f.dy, f.x, f.saved, f.gamma, f.y, m, m));
  for (const bool is_gamma : {true, false}) {
    const char* name = is_gamma ? "dgamma" : "dbeta";
    const ChannelOutput dgamma = is_gamma ? ChannelOutput(m) : ChannelOutput(f.dgamma);
    const ChannelOutput dbeta = is_gamma ? ChannelOutput(f.dbeta) : ChannelOutput(m);
    expect_refused(name, "dy", train(f.tensor(), f.x, f.saved, f.gamma, f.y, dgamma, dbeta));
    expect_refused(name, "x", train(f.dy, f.tensor(), f.saved, f.gamma, f.y, dgamma, dbeta));
    expect_refused(name, "dx", train(f.dy, f.x, f.saved, f.gamma, f.tensor(), dgamma, dbeta));
    expect_refused(name, "gamma", train(f.dy, f.x, f.saved, m, f.y, dgamma, dbeta));
    expect_refused(name, "saved", train(f.dy, f.x, f.table(), f.gamma, f.y, dgamma, dbeta));
    expect_refused(name, "mean", [&] {
      normalize_backward<double>(f.dy, f.x, kProblem, m, f.var, f.gamma, kEps, f.y, dgamma, dbeta);
    });
    expect_refused(name, "var", [&] {
      normalize_backward<double>(f.dy, f.x, kProblem, f.mean, m, f.gamma, kEps, f.y, dgamma, dbeta);
    });
    expect_refused(name, "gamma", [&] {
      normalize_backward<double>(f.dy, f.x, kProblem, f.mean, f.var, m, kEps, f.y, dgamma, dbeta);
    });
  }
  expect_refused("dx", "gamma", train(f.dy, f.x, f.saved, m, f.tensor(), f.dgamma, f.dbeta));
  expect_refused("out", "dy", [&] { grad_sums<double>(f.tensor(), f.x, kProblem, f.saved, f.sums_table()); });
  expect_refused("out", "x", [&] { grad_sums<double>(f.dy, f.tensor(), kProblem, f.saved, f.sums_table()); });
  expect_refused("out", "moments", [&] { grad_sums<double>(f.dy, f.x, kProblem, f.table(), f.sums_table()); });
  expect_refused("dx", "sums",
                 [&] { grad_input<double>(f.dy, f.x, kProblem, f.saved, f.sums_table(), f.gamma, kEps, f.tensor()); });
}

TEST(derivatives_write_apart_from_all_that_they_read) {
  Fixture f;
  const auto m = f.channels(), t = f.tensor();
  const Call<double> call = f.with(f.gamma), in_memory = f.with(m);
  expect_refused("y_dot", "gamma_dot", [&] { batch_norm_jvp<double>(f.v, f.x, call, f.saved, m, f.beta, t); });
  expect_refused("y_dot", "saved", [&] { batch_norm_jvp<double>(f.v, f.x, call, f.table(), f.beta, f.beta, t); });
  expect_refused("y_dot", "gamma", [&] { batch_norm_jvp<double>(f.v, f.x, in_memory, f.saved, f.beta, f.beta, t); });
  expect_refused("y_dot", "mean",
                 [&] { normalize_jvp<double>(f.v, f.x, call, m, f.var, f.beta, f.beta, f.beta, f.beta, t); });
  expect_refused("y_dot", "var_dot",
                 [&] { normalize_jvp<double>(f.v, f.x, call, f.mean, f.var, f.beta, m, f.beta, f.beta, t); });
  const auto second = [&](ChannelValues gamma, ChannelValues v_dbeta, std::span<double> ddy, std::span<double> dx,
                          ChannelOutput dgamma) {
    return [=, &f] {
      batch_norm_double_backward<double>(f.v, f.dy, f.x, f.with(gamma), f.saved, f.tangent, v_dbeta, ddy, dx, dgamma);
    };
  };
  expect_refused("dgamma", "gamma", second(m, f.beta, f.y, f.y2, m));
  expect_refused("dgamma", "ddy", second(f.gamma, f.beta, t, f.y2, m));
  expect_refused("dgamma", "dx", second(f.gamma, f.beta, f.y, t, m));
  expect_refused("dgamma", "v_dbeta", second(f.gamma, m, f.y, f.y2, m));
  expect_refused("ddy", "v_dbeta", second(f.gamma, m, t, f.y2, f.dgamma));
  expect_refused("dx", "gamma", second(m, f.beta, f.y, t, f.dgamma));
  expect_refused("dgamma", "var", [&] {
    normalize_double_backward<double>(f.v, f.dy, f.x, call, f.mean, m, f.tangent, f.beta, f.y, f.y2, m);
  });
}

TEST(passes_with_weights_write_apart_from_these_too) {
  Fixture f;
  const auto m = f.channels(), t = f.tensor();
  Call<double> call = f.with(f.gamma, f.beta);
  call.counted = {f.positions(), Padding::zero};
  expect_refused("saved", "weights", [&] { batch_norm<double>(f.x, call, f.y, f.table()); });
  expect_refused("y", "weights", [&] { batch_norm<double>(f.x, call, t, f.out()); });
  expect_refused("y", "weights", [&] { normalize<double>(f.x, call, f.mean, f.var, t); });
  expect_refused("y", "weights", [&] { normalize<double>(f.x, call, f.saved, t); });
  expect_refused("out", "weights", [&] { moments<double>(f.x, call, f.table()); });
  expect_refused("out", "weights", [&] { grad_sums<double>(f.dy, f.x, call, f.saved, f.sums_table()); });
  expect_refused("dx", "weights", [&] { grad_input<double>(f.dy, f.x, call, f.saved, f.sums, t); });
  expect_refused("dgamma", "weights", [&] {
    batch_norm_backward<double>(f.dy, f.x, call, f.saved, {.dx = f.y, .dgamma = m, .dbeta = f.dbeta});
  });
  expect_refused("dx", "weights", [&] {
    normalize_backward<double>(f.dy, f.x, call, f.mean, f.var, {.dx = t, .dgamma = f.dgamma, .dbeta = f.dbeta});
  });
}

TEST(passes_by_segments_write_apart_from_all_that_they_read) {
  Fixture f;
  const auto m = f.channels(), t = f.tensor();
  const auto by_segments = [&](ChannelValues gamma, ChannelValues beta) {
    Call<double> call = f.with(gamma, beta);
    call.groups.offsets = f.offsets;
    return call;
  };
  expect_refused("saved", "gamma", [&] { batch_norm<double>(f.x, by_segments(m, f.beta), f.y, f.segments_table()); });
  expect_refused("y", "beta", [&] { batch_norm<double>(f.x, by_segments(f.gamma, m), t, f.moments_out); });
  expect_refused("dbeta", "saved", [&] {
    batch_norm_backward<double>(f.dy, f.x, by_segments(f.gamma, f.beta), f.segments_table(),
                                {.dx = f.y, .dgamma = f.dgamma, .dbeta = m});
  });
  expect_refused("dgamma", "gamma", [&] {
    batch_norm_backward<double>(f.dy, f.x, by_segments(m, f.beta), f.saved_segments,
                                {.dx = f.y, .dgamma = m, .dbeta = f.dbeta});
  });
  Call<double> call = f.with(f.gamma, f.beta);
  const std::span<std::int64_t> places(reinterpret_cast<std::int64_t*>(f.memory.data()), f.offsets.size());
  std::ranges::copy(f.offsets, places.begin());
  call.groups.offsets = places;
  expect_refused("y", "offsets", [&] { batch_norm<double>(f.x, call, t, f.moments_out); });
  expect_refused("out", "offsets", [&] { moments<double>(f.x, call, f.segments_table()); });
}

TEST(passes_with_a_tail_write_apart_from_it_too) {
  Fixture f;
  const auto m = f.channels(), t = f.tensor();
  const auto relu = [&](ChannelValues gamma, std::span<const double> residual, std::span<std::uint8_t> bits) {
    Call<double> call = f.with(gamma, f.beta);
    call.tail = {residual, true, bits};
    return call;
  };
  expect_refused("saved", "residual", [&] { batch_norm<double>(f.x, relu(f.gamma, t, f.bits_out), f.y, f.table()); });
  expect_refused("saved", "bits",
                 [&] { batch_norm<double>(f.x, relu(f.gamma, {}, f.bits_in_memory()), f.y, f.table()); });
  expect_refused("bits", "gamma", [&] { batch_norm<double>(f.x, relu(m, {}, f.bits_in_memory()), f.y, f.out()); });
  expect_refused("bits", "x", [&] { batch_norm<double>(t, relu(f.gamma, {}, f.bits_in_memory()), f.y, f.out()); });
  expect_refused("bits", "residual",
                 [&] { batch_norm<double>(f.x, relu(f.gamma, t, f.bits_in_memory()), f.y, f.out()); });
  expect_refused("bits", "mean", [&] { normalize<double>(f.x, relu(f.gamma, {}, f.bits_in_memory()), m, f.var, f.y); });
  expect_refused("bits", "moments",
                 [&] { normalize<double>(f.x, relu(f.gamma, {}, f.bits_in_memory()), f.table(), f.y); });
  Call<double> counted = relu(f.gamma, {}, f.bits_in_memory());
  counted.counted = {f.positions(), Padding::zero};
  expect_refused("bits", "weights", [&] { batch_norm<double>(f.x, counted, f.y, f.out()); });
  expect_refused("dgamma", "bits", [&] {
    batch_norm_backward<double>(f.dy, f.x, relu(f.gamma, {}, f.bits_in_memory()), f.saved, {f.y, f.y2, m, f.dbeta});
  });
  expect_refused("dresidual", "dbeta", [&] {
    batch_norm_backward<double>(f.dy, f.x, relu(f.gamma, {}, f.bits), f.saved, {f.y, t, f.dgamma, m});
  });
  expect_refused("dresidual", "dx", [&] {
    batch_norm_backward<double>(f.dy, f.x, relu(f.gamma, {}, f.bits), f.saved, {t, t, f.dgamma, f.dbeta});
  });
}

TEST(a_tensor_may_be_written_to_one_that_is_read) {
  Fixture f;
  for (const every_call::NamedCall& call : every_call::of<double>(f)) {
    if (call.name.ends_with("in place")) EXPECT_EQUAL(expect::thrown_by<std::exception>(call.run), "", call.name);
  }
}

}  // namespace

int main(int argc, char** argv) { return expect::run_tests(argc > 1 ? argv[1] : nullptr); }
