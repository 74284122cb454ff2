// The public functions for GPUs, on the machine that runs kernels on the CPU: bits of the library's own, whatever the
// device holds; memory is given back; what is wrong is refused before anything is launched.
#include <stdexcept>

#include "cuda_every_function.hpp"

namespace {

using namespace cuda_tensors;

constexpr cuda::Device kLarge{90, 20, kShared, {20, 10, 5, 2, 1}}, kWithoutClusters{80, 20, kShared, {20, 0, 0, 0, 0}},
    kTiny{80, 1, 4096, {1, 0, 0, 0, 0}};

template <class T>
Call<T> plain(const Inputs<T>& t) {
  return {.problem = t.problem, .gamma = t.gamma, .beta = t.beta, .eps = 1e-5};
}
template <class T>
void expect_same(const Problem& problem, const char* kind, const cuda::Device& device) {
  Stream::current = device;
  const Inputs<T> t(problem, kind);
  expect_same(t, plain(t), "");
}

TEST(each_function_has_the_bits_of_the_library_on_any_device) {
  for (const cuda::Device& device : {kLarge, kWithoutClusters, kTiny}) {
    for (const Problem& problem : {Problem{40, 3, 196}, {1, 2, 69'632}, {300, 3, 1}, {1, 37, 31}, {0, 4, 9}}) {
      for (const char* kind : {"normal", "far from 0", "cancelled to nothing"}) {
        expect_same<float>(problem, kind, device);
        expect_same<double>(problem, kind, device);
        expect_same<BFloat16>(problem, kind, device);
        expect_same<Float16>(problem, kind, device);
      }
    }
  }
}

TEST(channels_are_held_where_the_device_can) {
  const Inputs<float> t({40, 3, 196}, "normal");
  for (const auto& [device, held] : {std::pair{kLarge, 2}, {kWithoutClusters, 2}, {kTiny, 0}}) {
    Stream::current = device;
    Stream::held = 0;
    on_device::every_function(t, plain(t));
    EXPECT(Stream::held == held, Stream::held);
  }
}

// Whole vectors and not, of chunks of several runs and of several chunks a run; samples each by itself are held, too.
template <class T>
void expect_held_same(const Problem& problem, const cuda::Device& device) {
  Stream::current = device;
  const Inputs<T> t(problem, "normal");
  std::vector<std::int64_t> samples;
  for (std::int64_t s = 0; s <= problem.outer; ++s) samples.push_back(s);
  for (const auto& [name, groups] : {std::pair<const char*, Groups>{"", {}}, {" by samples", {samples}}}) {
    for (const auto& [tail, what] : {std::pair<const char*, Tail<T>>{"", {}},
                                     {", ReLU", {{}, true}},
                                     {", residual", {t.residual}},
                                     {", residual and ReLU", {t.residual, true}}}) {
      Call<T> call = plain(t);
      call.groups = groups, call.tail = what;
      Stream::held = 0;
      expect_same(t, call, expect::text(name, tail));
      EXPECT(Stream::held == 2, Stream::held, " held of ", problem.inner, name, tail);
    }
  }
}
TEST(what_follows_is_done_where_channels_are_held) {
  for (const cuda::Device& device : {kLarge, kWithoutClusters}) {
    for (const Problem& problem : {Problem{6, 3, 196}, {3, 4, 49}, {2, 2, 10'000}}) {
      expect_held_same<float>(problem, device);
      expect_held_same<double>(problem, device);
      expect_held_same<BFloat16>(problem, device);
      expect_held_same<Float16>(problem, device);
    }
  }
}

TEST(the_plan_tells_kernels_and_bytes) {
  const Inputs<float> t({40, 3, 196}, "normal");
  const double n = 40 * 3 * 196;
  Call<float> call = plain(t);
  Stream::current = kLarge;
  const cuda::Planned forward = cuda::plan_batch_norm(call), backward = cuda::plan_batch_norm_backward(call);
  EXPECT(forward.kernels == "1-block cluster holds a channel, 3 at once, up to 2 of 2 chunks and 31744 bytes a block",
         forward.kernels);
  EXPECT(forward.bytes == 2 * 4 * n && backward.bytes == 3 * 4 * n, forward.bytes, ", ", backward.bytes);
  call.tail = {t.residual, true};
  EXPECT(cuda::plan_batch_norm(call).bytes == 3 * 4 * n + n / 8, cuda::plan_batch_norm(call).bytes);
  EXPECT(cuda::plan_batch_norm_backward(call).bytes == 4 * 4 * n + n / 8);
  Stream::current = kTiny;
  const cuda::Planned tiny = cuda::plan_batch_norm_backward(call);
  EXPECT(tiny.kernels == "sums of 6 pieces through memory, then each value", tiny.kernels);
  EXPECT(tiny.bytes == 6 * 4 * n + 2 * n / 8, tiny.bytes);
  call = plain(t);
  call.groups = {{}, 3, true};
  call.counted = {t.mask, Padding::zero};
  EXPECT(cuda::plan_batch_norm(call).bytes == 3 * 4 * n + 2 * 4 * n / 3, cuda::plan_batch_norm(call).bytes);
  const Inputs<float> tokens({5, 256, 1}, "normal");
  call = plain(tokens);
  call.groups = {{}, 256, true};
  Stream::current = kLarge;
  EXPECT(cuda::plan_batch_norm(call).kernels == "blocks hold 8 lines each, of 5", cuda::plan_batch_norm(call).kernels);
  EXPECT(cuda::plan_batch_norm(call).bytes == 2 * 4 * 5 * 256, cuda::plan_batch_norm(call).bytes);
}

template <class F>
void expect_refused(const std::string& message, const F& f) {
  Stream::held = 0;
  try {
    f();
    EXPECT(false, "accepted: ", message);
  } catch (const std::invalid_argument& error) {
    EXPECT(error.what() == message, error.what());
  }
  EXPECT(Stream::held == 0 && Stream::blocks_in_use == 0, "launched before: ", message);
}
// What becomes of results between calls.
template <class F>
void with_batch(F f) {
  Stream::current = kLarge;
  std::vector<Moments> batch(600);
  for (std::size_t c = 0; c < batch.size(); ++c) {
    const auto k = static_cast<double>(c);
    batch[c] = c % 7 == 0 ? Moments{} : Moments{2 + k, 0.1 * k, 0, 0.3 * k, 0};
  }
  f(batch, std::vector<double>(batch.size(), 0.7), std::vector<double>(batch.size(), 1.3));
}

TEST(running_statistics_have_the_bits_of_the_library) {
  with_batch([](std::vector<Moments>& batch, std::vector<double> mean, std::vector<double> var) {
    for (const double rate : {0.0, 0.1, 1.0}) {
      std::vector<double> to_mean = mean, to_var = var, new_mean(600), new_var(600);
      update_running(to_mean, to_var, batch, rate, 1);
      cuda::update_running(mean, var, batch, rate, 1, true, new_mean, new_var);
      EXPECT(same(to_mean, new_mean) && same(to_var, new_var), rate);
    }
    for (const Moments bad : {Moments{5, std::numeric_limits<double>::infinity(), 0, 1, 0}, Moments{1, 2, 0, 0, 0}}) {
      batch[599] = bad;
      std::vector<double> new_mean(600), new_var(600);
      cuda::update_running(mean, var, batch, 0.1, 1, true, new_mean, new_var);
      EXPECT(same(mean, new_mean) && same(var, new_var), "learned of what is not finite");
      cuda::update_running(mean, var, batch, 0.1, 1, false, new_mean, new_var);
      EXPECT(new_mean[1] != mean[1] && !std::isfinite(new_mean[599] + new_var[599]), "finite");
    }
  });
}

TEST(pooled_moments_have_the_bits_of_the_library) {
  with_batch([](std::vector<Moments>& batch, std::vector<double> mean, std::vector<double> var) {
    std::vector<Moments> pooled(batch.rbegin(), batch.rend()), to(600), wanted(600);
    const auto expect_merged = [&](int ddof) {
      for (std::size_t c = 0; c < 600; ++c) {
        wanted[c] = merge(pooled[c], batch[c]);
        const double variance_or_1 = wanted[c].count < 2 ? 1 : variance(wanted[c], ddof);
        EXPECT(mean[c] == wanted[c].mean && var[c] == variance_or_1, c);
      }
      EXPECT(same(numbers(to), numbers(wanted)), ddof);
    };
    for (const int ddof : {0, 1}) {
      cuda::pool(pooled, batch, ddof, true, to, mean, var);
      expect_merged(ddof);
    }
    const std::vector<Moments> before = to;
    batch[3].m2 = std::numeric_limits<double>::infinity();
    cuda::pool(to, batch, 1, true, to, mean, var);  // in place
    EXPECT(same(numbers(to), numbers(before)), "pooled what is not finite");
  });
}

TEST(gradients_of_segments_are_put_together_in_their_order) {
  Stream::current = kLarge;
  const std::vector<double> a = {1, 2, 3, 4}, x = {1e17, 1, -1e17, 1}, b = {1, 1, 1, 1}, y = {0.5, 0.25, 8, 4};
  std::vector<double> to(2);
  cuda::combine(to, {}, x, {}, {});
  EXPECT(to[0] == 0 && to[1] == 2, to[0], to[1]);
  cuda::combine(to, a, x, b, y);
  EXPECT(to[0] == -2e17 + 8.5 && to[1] == 2 + 0.25 + 4 + 4, to[0], to[1]);
  std::vector<float> negative(4);
  cuda::combine(negative, {}, std::vector<double>{-0.0, 1, 2, 3}, {}, {});
  EXPECT(std::signbit(negative[0]) && negative[3] == 3, negative[0]);
}

TEST(arrays_are_laid_out_in_another_order_and_type) {
  Stream::current = kLarge;
  std::vector<std::int32_t> from = {0, 1, 2, 3, 4, 5};  // 2 x 3
  std::vector<float> to(6);
  const std::int64_t sizes[] = {3, 2}, from_strides[] = {4, 12}, to_strides[] = {8, 4};
  const cuda::View source{from.data(), cuda::Element::int32, sizes, from_strides};
  const cuda::View target{to.data(), cuda::Element::float32, sizes, to_strides};
  cuda::lay_out(source, target);
  EXPECT(to == std::vector<float>({0, 3, 1, 4, 2, 5}), to[1]);
  cuda::lay_out(source, target, true);
  EXPECT(to == std::vector<float>({0, 1, 1, 1, 1, 1}), to[0]);
  std::vector<BFloat16> halves(6);
  const std::int64_t of_halves[] = {4, 2};
  cuda::lay_out(target, {halves.data(), cuda::Element::bfloat16, sizes, of_halves});
  EXPECT(float{halves[1]} == 1, float{halves[1]});
  expect_refused("arrays must have the same sizes and a stride for each, got 2 and 1", [&] {
    cuda::lay_out(source, {to.data(), cuda::Element::float32, std::span(sizes).first(1), to_strides});
  });
}

TEST(what_is_wrong_is_refused_by_name) {
  Stream::current = kLarge;
  const Inputs<float> t({2, 3, 4}, "normal");
  std::vector<float> y(24);
  std::vector<Moments> saved(3);
  const std::span<const float> x = t.x;
  const auto norm = [&](std::span<const float> from, std::span<float> to, std::span<Moments> moments,
                        const auto& change) {
    Call<float> call{.problem = t.problem};
    change(call);
    cuda::batch_norm<float>(from, call, to, moments);
  };
  const auto refused = [&](const std::string& message, const auto& change) {
    expect_refused(message, [&] { norm(x, y, saved, change); });
  };
  const auto none = [](Call<float>&) {};
  expect_refused("x must have 24 values, got 23", [&] { norm(x.first(23), y, saved, none); });
  expect_refused("y must have 24 values, got 20", [&] { norm(x, std::span(y).first(20), saved, none); });
  expect_refused("saved must have 3 values (one per channel), got 2",
                 [&] { norm(x, y, std::span(saved).first(2), none); });
  refused("gamma must have 3 values (one per channel), got 24", [&](auto& call) { call.gamma = t.x; });
  refused("eps must be finite and >= 0, got -1", [](auto& call) { call.eps = -1; });
  refused("width must divide the channels, 3, got 2", [](auto& call) { call.groups.width = 2; });
  const std::int64_t offsets[] = {0, 1};
  refused("offsets must begin with 0 and end with 2, the outer size, got 0 and 1",
          [&](auto& call) { call.groups.offsets = offsets; });
  refused("weights must have 8 values (one per position), got 3", [&](auto& call) { call.counted.weights = t.alpha; });
  refused("residual must have 24 values, got 3", [&](auto& call) { call.tail.residual = t.alpha; });
  std::vector<std::uint8_t> bits(8);
  refused("bits must be empty without a ReLU, got 8 bytes", [&](auto& call) { call.tail.bits = bits; });
  expect_refused("y must be x itself or share no memory with it, got a partial overlap", [&] {
    cuda::batch_norm<float>(std::span<const float>(y).first(20), {.problem = {1, 5, 4}}, std::span(y).subspan(4),
                            std::span(saved));
  });
  expect_refused("mean must have 3 values (one per channel), got none",
                 [&] { cuda::normalize<float>(x, {.problem = t.problem}, ChannelValues{}, t.gamma, y); });
  const auto too_many = [](const char* got) {
    return std::string(
               "problem must have fewer than 2^32 channels and pieces (chunks, or columns of blocks of rows), "
               "and rows in segments of other lengths, got ") +
           got;
  };
  expect_refused(too_many("{outer 2, channels 536870912, inner 16}"),
                 [&] { cuda::moments<float>(x, {.problem = {2, 1 << 29, 16}}, saved); });
  const std::vector<double> three(3);
  std::vector<double> into(3);
  expect_refused("var must have 3 values (one per channel), got 2",
                 [&] { cuda::update_running(three, std::span(three).first(2), saved, 0.1, 1, true, into, into); });
  expect_refused("update_rate must be in [0, 1], got 2",
                 [&] { cuda::update_running(three, three, saved, 2, 1, true, into, into); });
  expect_refused("ddof must be >= 0, got -1", [&] { cuda::pool(saved, saved, -1, true, saved, into, into); });
  expect_refused("y must have 3 values (one per channel), got 0", [&] { cuda::combine(into, {}, three, three, {}); });
  const std::int64_t far_apart[] = {0, 1, std::int64_t{1} << 33};
  expect_refused(too_many("{outer 8589934592, channels 1, inner 1}"), [&] {
    cuda::moments<float>(x, {.problem = {std::int64_t{1} << 33, 1, 1}, .groups = {far_apart}}, saved);
  });
}

}  // namespace

int main(int argc, char** argv) { return expect::run_tests(argc > 1 ? argv[1] : nullptr); }
