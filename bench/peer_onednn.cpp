// batchnorm-peer-onednn: oneDNN's batch normalization, timed as batchnorm-bench times the library's.
//
// A server for `python -m batchnorm bench`: one line "32x64x112x112 15 batch" (shape, rounds, norm) in, one line of
// JSON out, with a row for each pass in each memory layout that oneDNN has. Norms are batch, and lines: its layer norm.
// It has no RMS norm and, as of 3.2, no group norm. Threads come from OMP_NUM_THREADS.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <exception>
#include <iostream>
#include <random>
#include <span>
#include <sstream>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "oneapi/dnnl/dnnl.hpp"
#include "timing.hpp"

namespace {

using dnnl::memory;
using Tag = memory::format_tag;
using Arguments = std::unordered_map<int, memory>;

constexpr float kEps = 1e-5f;
const auto kScaleAndShift = dnnl::normalization_flags::use_scale | dnnl::normalization_flags::use_shift;

struct LayoutOfPeer {
  std::string name;
  Tag tag;
};

// Channels first, channels last, and oneDNN's own blocks of 16 and of 8 channels (it fills up the last one).
std::vector<LayoutOfPeer> layouts_of(const memory::dims& shape) {
  using enum Tag;
  const bool no_planes = std::all_of(shape.begin() + 2, shape.end(), [](auto size) { return size == 1; });
  if (shape.size() == 2) return {{"nc", nc}};
  const std::size_t rank = shape.size() - 3;
  const Tag first[] = {ncw, nchw, ncdhw}, last[] = {nwc, nhwc, ndhwc}, blocks_of_16[] = {nCw16c, nChw16c, nCdhw16c},
            blocks_of_8[] = {nCw8c, nChw8c, nCdhw8c};
  std::vector<LayoutOfPeer> result = {{"blocks of 16", blocks_of_16[rank]}, {"blocks of 8", blocks_of_8[rank]}};
  if (no_planes) {
    result.push_back({"nc", first[rank]});
  } else {
    result.push_back({"nchw", first[rank]});
    result.push_back({"nhwc", last[rank]});
  }
  return result;
}

memory::desc plain(const memory::dims& shape) {
  const Tag tags[] = {Tag::nc, Tag::ncw, Tag::nchw, Tag::ncdhw};
  return {shape, memory::data_type::f32, tags[shape.size() - 2]};
}

std::span<float> values_of(const memory& m) {
  return {static_cast<float*>(m.get_data_handle()), m.get_desc().get_size() / sizeof(float)};
}

// A primitive with its arguments, put together once: only execution is timed.
struct Call {
  dnnl::primitive primitive;
  std::string implementation;  // oneDNN's name of it
  Arguments arguments;

  void run(dnnl::stream& stream) const {
    primitive.execute(stream, arguments);
    stream.wait();
  }
};

// oneDNN's objects for one shape in one layout.
class Problem {
 public:
  Problem(const memory::dims& shape, Tag tag)
      : shape_(shape),
        desc_(shape, memory::data_type::f32, tag),
        channel_desc_({shape[1]}, memory::data_type::f32, Tag::x) {
    fill(given_x_, 0.5f);
    fill(given_dy_, 0);
    for (auto* m : {&scale_, &shift_, &running_mean_, &running_variance_}) fill(*m, 1, 0.1f);
    convert(given_x_, x_);
    convert(given_dy_, dy_);
  }

  [[nodiscard]] Call train() const {
    return {dnnl::batch_normalization_forward(training_),
            training_.impl_info_str(),
            {{DNNL_ARG_SRC, x_},
             {DNNL_ARG_SCALE, scale_},
             {DNNL_ARG_SHIFT, shift_},
             {DNNL_ARG_DST, y_},
             {DNNL_ARG_MEAN, mean_},
             {DNNL_ARG_VARIANCE, variance_}}};
  }
  [[nodiscard]] Call infer() const {
    const auto desc = forward(dnnl::prop_kind::forward_inference, kScaleAndShift | Flags::use_global_stats);
    return {dnnl::batch_normalization_forward(desc),
            desc.impl_info_str(),
            {{DNNL_ARG_SRC, x_},
             {DNNL_ARG_SCALE, scale_},
             {DNNL_ARG_SHIFT, shift_},
             {DNNL_ARG_DST, y_},
             {DNNL_ARG_MEAN, running_mean_},
             {DNNL_ARG_VARIANCE, running_variance_}}};
  }
  [[nodiscard]] Call backward() const {
    const dnnl::batch_normalization_backward::primitive_desc desc(engine_, dnnl::prop_kind::backward, desc_, desc_,
                                                                  desc_, kEps, kScaleAndShift, training_);
    return {dnnl::batch_normalization_backward(desc),
            desc.impl_info_str(),
            {{DNNL_ARG_SRC, x_},
             {DNNL_ARG_SCALE, scale_},
             {DNNL_ARG_MEAN, mean_},
             {DNNL_ARG_VARIANCE, variance_},
             {DNNL_ARG_DIFF_DST, dy_},
             {DNNL_ARG_DIFF_SRC, dx_},
             {DNNL_ARG_DIFF_SCALE, dscale_},
             {DNNL_ARG_DIFF_SHIFT, dshift_}}};
  }
  dnnl::stream& stream() { return stream_; }

  // Throws where the first or the last channel differs from the definition by more than float32 sums may.
  void verify(bool gradients);

 private:
  using Flags = dnnl::normalization_flags;
  [[nodiscard]] dnnl::batch_normalization_forward::primitive_desc forward(dnnl::prop_kind kind, Flags flags) const {
    return {engine_, kind, desc_, desc_, kEps, flags};
  }

  void convert(memory& from, memory& to) {
    dnnl::reorder(from, to).execute(stream_, from, to);
    stream_.wait();
  }

  void fill(memory& m, float mean, float deviation = 1) {
    std::normal_distribution<float> normal(mean, deviation);
    for (float& value : values_of(m)) value = normal(bits_);
  }

  // f(place in given_x_ and other plain memory) for each value of channel c.
  template <class F>
  void each_of_channel(std::size_t c, F f) const {
    const auto outer = static_cast<std::size_t>(shape_[0]), channels = static_cast<std::size_t>(shape_[1]);
    const std::size_t inner = values_of(given_x_).size() / outer / channels;
    for (std::size_t o = 0; o < outer; ++o) {
      for (std::size_t i = 0; i < inner; ++i) f((o * channels + c) * inner + i);
    }
  }

  memory::dims shape_;
  memory::desc desc_, channel_desc_;
  dnnl::engine engine_{dnnl::engine::kind::cpu, 0};
  dnnl::stream stream_{engine_};
  std::minstd_rand bits_{1};
  dnnl::batch_normalization_forward::primitive_desc training_ =
      forward(dnnl::prop_kind::forward_training, kScaleAndShift);
  memory given_x_{plain(shape_), engine_}, given_dy_{plain(shape_), engine_};
  memory x_{desc_, engine_}, y_{desc_, engine_}, dy_{desc_, engine_}, dx_{desc_, engine_};
  memory scale_{channel_desc_, engine_}, shift_{channel_desc_, engine_}, mean_{channel_desc_, engine_},
      variance_{channel_desc_, engine_}, running_mean_{channel_desc_, engine_},
      running_variance_{channel_desc_, engine_}, dscale_{channel_desc_, engine_}, dshift_{channel_desc_, engine_};
};

void Problem::verify(bool gradients) {
  memory y(plain(shape_), engine_), dx(plain(shape_), engine_);
  convert(y_, y);
  if (gradients) convert(dx_, dx);
  const auto x = values_of(given_x_), dy = values_of(given_dy_);
  for (const std::size_t c : {std::size_t{0}, static_cast<std::size_t>(shape_[1] - 1)}) {
    double count = 0, mean = 0, var = 0, sum = 0, dot = 0;
    each_of_channel(c, [&](std::size_t at) { mean += double{x[at]}, ++count; });
    mean /= count;
    each_of_channel(c, [&](std::size_t at) {
      var += (double{x[at]} - mean) * (double{x[at]} - mean) / count;
      sum += double{dy[at]} / count;
      dot += double{dy[at]} * (double{x[at]} - mean) / count;
    });
    const double rstd = 1 / std::sqrt(var + double{kEps}), g = double{values_of(scale_)[c]};
    const double b = double{values_of(shift_)[c]};
    each_of_channel(c, [&](std::size_t at) {
      const double xhat = (double{x[at]} - mean) * rstd;
      const double y_off = std::abs(g * xhat + b - double{values_of(y)[at]});
      const double exact_dx = g * rstd * (double{dy[at]} - sum - xhat * dot * rstd);
      const double dx_off = gradients ? std::abs(exact_dx - double{values_of(dx)[at]}) : 0;
      if (!(y_off < 1e-3 && dx_off < 1e-3 * (1 + rstd))) throw std::runtime_error("a result is wrong");
    });
  }
}

// The same of layer norm, of (rows, D).
class Lines {
 public:
  explicit Lines(const memory::dims& shape)
      : features_(static_cast<std::size_t>(shape[1])),
        desc_(shape, memory::data_type::f32, Tag::nc),
        line_desc_({shape[1]}, memory::data_type::f32, Tag::x),
        of_rows_({shape[0]}, memory::data_type::f32, Tag::x) {
    fill(x_, 0.5f, 1);
    fill(dy_, 0, 1);
    fill(scale_, 1, 0.1f);
    fill(shift_, 1, 0.1f);
  }

  [[nodiscard]] Call train() const {
    return {dnnl::layer_normalization_forward(training_),
            training_.impl_info_str(),
            {{DNNL_ARG_SRC, x_},
             {DNNL_ARG_SCALE, scale_},
             {DNNL_ARG_SHIFT, shift_},
             {DNNL_ARG_DST, y_},
             {DNNL_ARG_MEAN, mean_},
             {DNNL_ARG_VARIANCE, variance_}}};
  }
  [[nodiscard]] Call backward() const {
    const dnnl::layer_normalization_backward::primitive_desc desc(engine_, dnnl::prop_kind::backward, desc_, desc_,
                                                                  desc_, of_rows_, kEps, kScaleAndShift, training_);
    return {dnnl::layer_normalization_backward(desc),
            desc.impl_info_str(),
            {{DNNL_ARG_SRC, x_},
             {DNNL_ARG_SCALE, scale_},
             {DNNL_ARG_SHIFT, shift_},  // not read, but asked for
             {DNNL_ARG_MEAN, mean_},
             {DNNL_ARG_VARIANCE, variance_},
             {DNNL_ARG_DIFF_DST, dy_},
             {DNNL_ARG_DIFF_SRC, dx_},
             {DNNL_ARG_DIFF_SCALE, dscale_},
             {DNNL_ARG_DIFF_SHIFT, dshift_}}};
  }
  dnnl::stream& stream() { return stream_; }

  // Throws where the first or the last line differs from the definition by more than float32 sums may.
  void verify() const;

 private:
  void fill(memory& m, float mean, float deviation) {
    std::normal_distribution<float> normal(mean, deviation);
    for (float& value : values_of(m)) value = normal(bits_);
  }

  std::size_t features_;
  memory::desc desc_, line_desc_, of_rows_;
  dnnl::engine engine_{dnnl::engine::kind::cpu, 0};
  dnnl::stream stream_{engine_};
  std::minstd_rand bits_{1};
  dnnl::layer_normalization_forward::primitive_desc training_{
      engine_, dnnl::prop_kind::forward_training, desc_, desc_, of_rows_, kEps, kScaleAndShift};
  memory x_{desc_, engine_}, y_{desc_, engine_}, dy_{desc_, engine_}, dx_{desc_, engine_};
  memory scale_{line_desc_, engine_}, shift_{line_desc_, engine_}, dscale_{line_desc_, engine_},
      dshift_{line_desc_, engine_}, mean_{of_rows_, engine_}, variance_{of_rows_, engine_};
};

void Lines::verify() const {
  const std::size_t d = features_, last = values_of(x_).size() - d;
  const auto gamma = values_of(scale_), beta = values_of(shift_);
  for (const std::size_t at : {std::size_t{0}, last}) {
    const auto line = [&](const memory& m) { return values_of(m).subspan(at, d); };
    const auto x = line(x_), dy = line(dy_), y = line(y_), dx = line(dx_);
    const double n = static_cast<double>(d);
    double mean = 0, var = 0, of_h = 0, of_xhat = 0;
    for (const float v : x) mean += double{v} / n;
    for (const float v : x) var += (double{v} - mean) * (double{v} - mean) / n;
    const double rstd = 1 / std::sqrt(var + double{kEps});
    for (std::size_t i = 0; i < d; ++i) {
      const double h = double{dy[i]} * double{gamma[i]};
      of_h += h / n;
      of_xhat += h * (double{x[i]} - mean) * rstd / n;
    }
    for (std::size_t i = 0; i < d; ++i) {
      const double xhat = (double{x[i]} - mean) * rstd, h = double{dy[i]} * double{gamma[i]};
      const double y_off = std::abs(xhat * double{gamma[i]} + double{beta[i]} - double{y[i]});
      const double dx_off = std::abs(rstd * (h - of_h - xhat * of_xhat) - double{dx[i]});
      if (!(y_off < 1e-3 && dx_off < 1e-3 * (1 + rstd))) throw std::runtime_error("a result is wrong");
    }
  }
}

std::string row(const char* pass, const std::string& layout, const Call& call, const bench::Samples& seconds) {
  const auto [median, mad] = bench::spread_of(seconds);
  std::ostringstream text;
  text << R"({"pass": ")" << pass << R"(", "layout": ")" << layout << R"(", "form": ")" << call.implementation
       << R"(", "seconds": )" << median << R"(, "mad": )" << mad << "}";
  return text.str();
}

using Calls = std::vector<std::pair<const char*, Call>>;

void time(const Calls& calls, dnnl::stream& stream, const std::string& layout, int rounds,
          std::vector<std::string>& rows) {
  std::vector<std::function<void()>> works;
  for (const auto& [name, call] : calls) works.push_back([&stream, &run = call] { run.run(stream); });
  bool disturbed = false;
  const auto samples = bench::time_in_turns(works, rounds, disturbed);
  for (std::size_t w = 0; w < works.size(); ++w)
    rows.push_back(row(calls[w].first, layout, calls[w].second, samples[w]));
}

void measure(const memory::dims& shape, const LayoutOfPeer& layout, int rounds, std::vector<std::string>& rows) {
  Problem problem(shape, layout.tag);
  // The library refuses to train on one value a channel.
  const bool gradients =
      std::any_of(shape.begin(), shape.end(), [&](const auto& size) { return &size != &shape[1] && size > 1; });
  Calls calls = {{"infer", problem.infer()}, {"train", problem.train()}};
  if (gradients) calls.emplace_back("backward", problem.backward());
  for (const auto& [name, call] : calls) call.run(problem.stream());
  problem.verify(gradients);
  if (!gradients) calls.pop_back();
  time(calls, problem.stream(), layout.name, rounds, rows);
}

void measure_lines(const memory::dims& shape, int rounds, std::vector<std::string>& rows) {
  Lines lines(shape);
  const Calls calls = {{"train_lines", lines.train()}, {"backward_lines", lines.backward()}};
  for (const auto& [name, call] : calls) call.run(lines.stream());
  lines.verify();
  time(calls, lines.stream(), "nc", rounds, rows);
}

// "32x64x112x112 15 batch"
std::string answer(const std::string& request) {
  std::istringstream words(request);
  memory::dims shape(1);
  int rounds = 0;
  std::string norm;
  words >> shape[0];
  while (words.peek() == 'x') {
    words.ignore();
    words >> shape.emplace_back();
  }
  if (!(words >> rounds >> norm) || shape.size() < 2)
    return R"({"error": "needs a shape, a number of rounds and a norm"})";
  std::vector<std::string> rows;
  if (norm == "batch") {
    for (const LayoutOfPeer& layout : layouts_of(shape)) measure(shape, layout, rounds, rows);
  } else if (norm == "lines" && shape.size() == 2) {
    measure_lines(shape, rounds, rows);
  }
  std::string result = R"({"rows": [)";
  for (const std::string& text : rows) result.append(&text == &rows.front() ? "" : ", ").append(text);
  return result + "]}";
}

}  // namespace

int main() {
  const dnnl_version_t& v = *dnnl_version();
  std::printf("{\"peer\": \"oneDNN\", \"version\": \"%d.%d.%d\"}\n", v.major, v.minor, v.patch);
  std::fflush(stdout);
  for (std::string line; std::getline(std::cin, line);) {
    try {
      std::printf("%s\n", answer(line).c_str());
    } catch (const std::exception& error) {
      std::printf("{\"error\": \"%s\"}\n", error.what());
    }
    std::fflush(stdout);
  }
}
