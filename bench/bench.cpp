// batchnorm-bench: the time of each pass of each case, against a copy of the same bytes in the same run.
//
// Every row is verified against plain float64 loops before it is timed.
#include <getopt.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <fstream>
#include <memory>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>

#include "batchnorm/batchnorm.hpp"
#include "cases.hpp"
#include "copy.hpp"
#include "timing.hpp"

namespace {

using batchnorm::GradSums;
using batchnorm::Moments;
using batchnorm::Problem;

struct Settings {
  std::string only;
  int threads = 0, rounds = 15;
  std::string json;
};

constexpr double kEps = 1e-5;

struct Free {
  void operator()(float* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<float, Free>;
Buffer page_aligned(std::size_t n) {
  constexpr std::size_t kPage = 4096;
  void* p = std::aligned_alloc(kPage, (n * sizeof(float) + kPage - 1) / kPage * kPage);
  if (p == nullptr) throw std::bad_alloc();
  return Buffer(static_cast<float*>(p));
}

// The tensors of one case, and the calls that are measured on them.
class Tensors {
 public:
  Tensors(const Problem& problem, int threads)
      : problem_(problem),
        options_{threads},
        n_(static_cast<std::size_t>(problem.size())),
        channels_(static_cast<std::size_t>(problem.channels)),
        x_(page_aligned(n_)),
        y_(page_aligned(n_)),
        dy_(page_aligned(n_)),
        dx_(page_aligned(n_)),
        gamma_(channels_),
        beta_(channels_),
        dgamma_(channels_),
        dbeta_(channels_),
        moments_(channels_),
        sums_(channels_) {
    std::mt19937 bits(1);
    std::normal_distribution<float> normal;
    for (std::size_t i = 0; i < n_; ++i) {
      x_.get()[i] = 0.5f + normal(bits);
      dy_.get()[i] = normal(bits);
      y_.get()[i] = dx_.get()[i] = 0;
    }
    for (std::size_t c = 0; c < channels_; ++c) {
      gamma_[c] = 1 + 0.1f * normal(bits);
      beta_[c] = normal(bits);
    }
  }

  void train() { batchnorm::batch_norm<float>(x(), problem_, gamma(), beta(), kEps, y(), moments_, options_); }
  void infer() { batchnorm::normalize<float>(x(), problem_, moments(), gamma(), beta(), kEps, y(), options_); }
  void backward() {
    batchnorm::batch_norm_backward<float>(dy(), x(), problem_, moments(), gamma(), kEps, dx(), std::span(dgamma_),
                                          std::span(dbeta_), options_);
  }
  void only_moments() { batchnorm::moments<float>(x(), problem_, moments_, options_); }
  void only_grad_sums() { batchnorm::grad_sums<float>(dy(), x(), problem_, moments(), sums_, options_); }
  void only_grad_input() {
    batchnorm::grad_input<float>(dy(), x(), problem_, moments(), sums_, gamma(), kEps, dx(), options_);
  }

  void copy_ordinary() { bench::copy_ordinary(y_.get(), x_.get(), n_, threads()); }
  void copy_around_cache() { bench::copy_around_cache(y_.get(), x_.get(), n_, threads()); }
  void add_streams() { bench::add_streams(dx_.get(), dy_.get(), x_.get(), n_, threads()); }

  // Throws where a result differs from the definition by more than rounding.
  void verify() {
    train();
    backward();
    for (std::int64_t c = 0; c < problem_.channels; ++c) verify_channel(c);
  }

  [[nodiscard]] double bytes() const { return static_cast<double>(n_) * sizeof(float); }

 private:
  [[nodiscard]] int threads() const { return options_.threads > 0 ? options_.threads : batchnorm::get_num_threads(); }
  [[nodiscard]] std::span<const float> x() const { return {x_.get(), n_}; }
  [[nodiscard]] std::span<const float> dy() const { return {dy_.get(), n_}; }
  [[nodiscard]] std::span<float> y() const { return {y_.get(), n_}; }
  [[nodiscard]] std::span<float> dx() const { return {dx_.get(), n_}; }
  [[nodiscard]] std::span<const float> gamma() const { return gamma_; }
  [[nodiscard]] std::span<const float> beta() const { return beta_; }
  [[nodiscard]] std::span<const Moments> moments() const { return moments_; }

  template <class F>
  void each_of_channel(std::int64_t c, F f) const {
    for (std::int64_t o = 0; o < problem_.outer; ++o) {
      for (std::int64_t i = 0; i < problem_.inner; ++i) f((o * problem_.channels + c) * problem_.inner + i);
    }
  }

  void verify_channel(std::int64_t c) const {
    const auto m = static_cast<double>(problem_.count());
    const float *x = x_.get(), *dy = dy_.get();
    const double g = static_cast<double>(gamma_[static_cast<std::size_t>(c)]);
    const double b = static_cast<double>(beta_[static_cast<std::size_t>(c)]);
    double mean = 0, var = 0, sum = 0, dot = 0;
    each_of_channel(c, [&](std::int64_t at) { mean += static_cast<double>(x[at]) / m; });
    each_of_channel(c, [&](std::int64_t at) { var += std::pow(static_cast<double>(x[at]) - mean, 2) / m; });
    const double rstd = 1 / std::sqrt(var + kEps);
    each_of_channel(c, [&](std::int64_t at) {
      sum += static_cast<double>(dy[at]) / m;
      dot += static_cast<double>(dy[at]) * (static_cast<double>(x[at]) - mean) * rstd / m;
    });
    // The data are within 10 standard deviations, so rounding stays far below this.
    constexpr double kRounding = 1e-5;
    each_of_channel(c, [&](std::int64_t at) {
      const double xhat = (static_cast<double>(x[at]) - mean) * rstd;
      const double y_off = std::abs(g * xhat + b - static_cast<double>(y_.get()[at]));
      const double dx_off =
          std::abs(g * rstd * (static_cast<double>(dy[at]) - sum - xhat * dot) - static_cast<double>(dx_.get()[at]));
      if (!(y_off < kRounding && dx_off < kRounding)) throw std::runtime_error("verification failed");
    });
  }

  Problem problem_;
  batchnorm::Options options_;
  std::size_t n_, channels_;
  Buffer x_, y_, dy_, dx_;
  std::vector<float> gamma_, beta_, dgamma_, dbeta_;
  std::vector<Moments> moments_;
  std::vector<GradSums> sums_;
};

struct Row {
  const char* pass;
  int tensors;  // that must be read or written at least once
  bench::Sample time;
  double ratio;  // to the copy (or the two-in one-out stream) of the same run
};

std::vector<Row> measure(Tensors& t, int rounds) {
  t.verify();
  t.only_grad_sums();
  const auto times =
      bench::time_in_turns({[&] { t.copy_ordinary(); }, [&] { t.copy_around_cache(); }, [&] { t.add_streams(); },
                            [&] { t.train(); }, [&] { t.infer(); }, [&] { t.backward(); }, [&] { t.only_moments(); },
                            [&] { t.only_grad_sums(); }, [&] { t.only_grad_input(); }},
                           rounds);
  const double copy = std::min(times[0].median, times[1].median), stream = times[2].median;
  const auto row = [&](const char* pass, int tensors, std::size_t at, double yardstick) {
    return Row{pass, tensors, times[at], times[at].median / yardstick};
  };
  return {{"copy", 2, times[0].median <= times[1].median ? times[0] : times[1], 1},
          {"stream", 3, times[2], 1},
          row("train", 2, 3, copy),
          row("infer", 2, 4, copy),
          row("backward", 3, 5, stream),
          row("moments", 1, 6, copy),
          row("grad_sums", 2, 7, stream),
          row("grad_input", 3, 8, stream)};
}

void print(const bench::Case& c, const Tensors& t, const std::vector<Row>& rows) {
  std::printf("%s: %s, {%lld, %lld, %lld}, %.2f MB\n", c.name, c.origin, static_cast<long long>(c.problem.outer),
              static_cast<long long>(c.problem.channels), static_cast<long long>(c.problem.inner), t.bytes() / 1e6);
  for (const Row& r : rows) {
    std::printf("  %-11s %10.2f us  +- %4.1f %%  %7.1f GB/s  %5.2f x %s\n", r.pass, r.time.median * 1e6,
                100 * r.time.mad / r.time.median, r.tensors * t.bytes() / r.time.median / 1e9, r.ratio,
                r.tensors == 3 || std::strcmp(r.pass, "grad_sums") == 0 ? "stream" : "copy");
  }
}

std::string json_of(const bench::Case& c, const Tensors& t, const std::vector<Row>& rows) {
  std::ostringstream s;
  for (const Row& r : rows) {
    s << (&r == &rows.front() ? "" : ",\n") << R"(  {"case": ")" << c.name << R"(", "outer": )" << c.problem.outer
      << R"(, "channels": )" << c.problem.channels << R"(, "inner": )" << c.problem.inner
      << R"(, "dtype": "float32", "pass": ")" << r.pass << R"(", "bytes": )"
      << static_cast<long long>(r.tensors * t.bytes()) << R"(, "seconds": )" << r.time.median << R"(, "mad": )"
      << r.time.mad << R"(, "ratio": )" << r.ratio << "}";
  }
  return s.str();
}

constexpr const char* kHelp =
    "batchnorm-bench [--case NAME] [--threads N] [--rounds N] [--isa NAME] [--json FILE] [--list]\n"
    "  times every pass of every case (or of those whose name contains NAME) in float32,\n"
    "  against the better of two copies of the tensor (backward passes: against a two-in one-out stream)\n";

int run(const Settings& settings) {
  std::printf("batchnorm %s, %s, %d threads\n", BATCHNORM_VERSION, batchnorm::active_isa().c_str(),
              settings.threads > 0 ? settings.threads : batchnorm::get_num_threads());
  std::string json;
  for (const bench::Case& c : bench::kCases) {
    if (std::string(c.name).find(settings.only) == std::string::npos) continue;
    Tensors tensors(c.problem, settings.threads);
    const auto rows = measure(tensors, settings.rounds);
    print(c, tensors, rows);
    json += (json.empty() ? "" : ",\n") + json_of(c, tensors, rows);
  }
  if (!settings.json.empty()) std::ofstream(settings.json) << "[\n" << json << "\n]\n";
  return 0;
}

int list() {
  for (const bench::Case& c : bench::kCases) std::printf("%-12s %s\n", c.name, c.origin);
  return 0;
}

int at_least_one(const char* text) {
  const int value = std::atoi(text);
  if (value < 1) throw std::invalid_argument(std::string("a count must be >= 1, got ") + text);
  return value;
}

int main_or_throw(int argc, char** argv) {
  const option options[] = {{"case", required_argument, nullptr, 'c'},   {"threads", required_argument, nullptr, 't'},
                            {"rounds", required_argument, nullptr, 'r'}, {"isa", required_argument, nullptr, 'i'},
                            {"json", required_argument, nullptr, 'j'},   {"list", no_argument, nullptr, 'l'},
                            {"help", no_argument, nullptr, 'h'},         {}};
  Settings settings;
  for (int o = 0; (o = getopt_long(argc, argv, "", options, nullptr)) != -1;) {
    switch (o) {
      case 'c':
        settings.only = optarg;
        break;
      case 't':
        settings.threads = at_least_one(optarg);
        break;
      case 'r':
        settings.rounds = at_least_one(optarg);
        break;
      case 'i':
        setenv("BATCHNORM_ISA", optarg, 1);
        break;
      case 'j':
        settings.json = optarg;
        break;
      case 'l':
        return list();
      case 'h':
        std::fputs(kHelp, stdout);
        return 0;
      default:
        std::fputs(kHelp, stderr);
        return 2;
    }
  }
  return run(settings);
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return main_or_throw(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "batchnorm-bench: %s\n", error.what());
    return 1;
  }
}
