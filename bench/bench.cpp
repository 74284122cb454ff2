// batchnorm-bench: the time of each pass of each case, against a copy of the same bytes in the same run.
//
// Every row is verified against plain float64 loops before it is timed.
#include <getopt.h>
#include <malloc.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <exception>
#include <fstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "batchnorm/batchnorm.hpp"
#include "cases.hpp"
#include "device.hpp"
#include "measure.hpp"
#include "report.hpp"

namespace {

using bench::Case;
using bench::Layout;
using Words = std::vector<std::string>;

struct Settings {
  Words cases, passes, layouts, dtypes;  // empty: all, for dtypes float32
  int threads = 0, rounds = 15, samples = 0;
  double max_mb = 450;
  std::string json, spoil;
  bench::Out out = bench::Out::given;
  bool only_list = false, on_device = false;
};

constexpr const char* kHelp =
    "batchnorm-bench: the time of each pass of each case, against a copy of the same bytes in the same run.\n"
    "  --case NAME       only the case of that name, or those whose name contains it; may be repeated, as the next "
    "three\n"
    "  --pass NAME       train, infer, backward, moments, normalize, grad_sums or grad_input; and, only by name,\n"
    "                    train_masked, infer_masked, backward_masked, train_weighted, backward_weighted,\n"
    "                    train_segments, backward_segments, train_graphs, backward_graphs (graph norm), train_groups,\n"
    "                    backward_groups, train_lines, backward_lines (layer norm over channels), train_rms,\n"
    "                    backward_rms, train_relu, infer_relu, backward_relu, train_add_relu,\n"
    "                    infer_add_relu, backward_add_relu\n"
    "  --layout NAME     nchw, nhwc or nc\n"
    "  --dtype NAME      float16, bfloat16, float32 (default) or float64\n"
    "  --device NAME     cpu (default) or cuda: an NVIDIA GPU, where the program was built with -DBATCHNORM_CUDA=ON\n"
    "  --isa NAME        the kernels to use, as the environment variable BATCHNORM_ISA\n"
    "  --threads N       at most; default: as many as the library takes by itself\n"
    "  --samples N       in each case instead of its own number\n"
    "  --rounds N        samples of each time (15)\n"
    "  --out given|fresh write to memory in use (default), or to memory that each call's time includes getting\n"
    "  --max-mb N        skip tensors that are larger (450)\n"
    "  --json FILE       also write everything there\n"
    "  --list            only name the cases; with --json, list them there\n";

bool among(const Words& words, std::string_view name) {
  return words.empty() || std::find(words.begin(), words.end(), name) != words.end();
}

// A case of other samples: "resnet50-32x64x7x7" becomes "resnet50-256x64x7x7".
Case with_samples(Case c, int samples) {
  static std::deque<std::string> names;  // which stay where they are
  const std::string name = c.name;
  const std::size_t at = name.rfind('-') + 1;
  names.push_back(name.substr(0, at) + std::to_string(samples) + name.substr(name.find_first_of("x", at)));
  c.name = names.back().c_str();
  c.shape[0] = samples;
  return c;
}

// A name picks exactly its case, or else every case whose name contains it.
std::vector<Case> picked(const Words& names, int samples = 0) {
  std::vector<Case> result;
  const auto exact = [&](const std::string& name) {
    return std::any_of(bench::kCases.begin(), bench::kCases.end(), [&](const Case& c) { return name == c.name; });
  };
  for (const Case& c : bench::kCases) {
    const std::string_view has = c.name;
    const bool wanted = std::any_of(names.begin(), names.end(), [&](const std::string& name) {
      return exact(name) ? name == has : has.find(name) != std::string_view::npos;
    });
    if (names.empty() || wanted) result.push_back(samples == 0 ? c : with_samples(c, samples));
  }
  if (result.empty()) throw std::invalid_argument("no case has such a name; --list names them all");
  return result;
}

std::vector<bench::PassFacts> passes_for(const Settings& settings, const batchnorm::Problem& problem) {
  std::vector<bench::PassFacts> result;
  for (const auto& facts : bench::kPasses) {
    if (facts.by_name && settings.passes.empty()) continue;
    if (settings.on_device && !bench::is_on_device(facts.pass)) continue;
    if (among(settings.passes, facts.name) && problem.count() >= facts.values_needed) result.push_back(facts);
  }
  return result;
}

bool too_large(const Case& c, const std::string& dtype, double max_mb) {
  const auto values = static_cast<double>(problem_of(c.shape, Layout::nchw).size());
  const double mb = values * bench::bytes_of(dtype) / 1e6;
  if (mb > max_mb) std::printf("%s %s: skipped, %.0f MB a tensor; --max-mb allows it\n", c.name, dtype.c_str(), mb);
  return mb > max_mb;
}

// f(T{}) with the type of that name.
template <class F>
bench::Measured with_type(const std::string& dtype, const F& f) {
  if (dtype == "float16") return f(batchnorm::Float16{});
  if (dtype == "bfloat16") return f(batchnorm::BFloat16{});
  return dtype == "float32" ? f(float{}) : f(double{});
}

void measure_case(const Settings& settings, const Case& c, const std::string& dtype, bench::Team& team,
                  std::vector<bench::Result>& results) {
  for (const Layout layout : bench::layouts_of(c.shape)) {
    const auto passes = passes_for(settings, problem_of(c.shape, layout));
    if (!among(settings.layouts, name_of(layout)) || passes.empty()) continue;
    const bench::Request request{passes, team.size(), settings.rounds, settings.out, settings.spoil};
    const bench::Subject subject{&c, layout, dtype};
    try {
      results.push_back({subject, with_type(dtype, [&]<class T>(T) {
                           return settings.on_device ? bench::measure_on_device<T>(c, layout, request)
                                                     : bench::measure<T>(c, layout, request, team);
                         })});
    } catch (const std::exception& error) {
      throw std::runtime_error(std::string(c.name) + " " + name_of(layout) + " " + dtype + ": " + error.what());
    }
    print(results.back());
  }
}

int run(const Settings& settings) {
  const std::vector<Case> cases = picked(settings.cases, settings.samples);
  const int threads = settings.threads > 0 ? settings.threads : batchnorm::get_num_threads();
  const std::string where = settings.on_device ? bench::device_name() : batchnorm::active_isa();
  const bench::Run common{where, settings.out == bench::Out::given ? "given" : "fresh", threads, settings.rounds};
  std::printf("batchnorm %s, %s, %d threads, %d rounds\n", BATCHNORM_VERSION, where.c_str(), threads, settings.rounds);
  std::ofstream file;
  if (!settings.json.empty()) file.open(settings.json);
  if (!settings.json.empty() && !file) throw std::runtime_error("cannot write " + settings.json);

  bench::Team team(threads);
  std::vector<bench::Result> results;
  for (const Case& c : cases) {
    for (const std::string& dtype : settings.dtypes) {
      if (!too_large(c, dtype, settings.max_mb)) measure_case(settings, c, dtype, team, results);
    }
  }
  if (file.is_open()) write_json(file, common, results);
  return 0;
}

int list(const Settings& settings) {
  const std::vector<Case> cases = picked(settings.cases);
  for (const Case& c : cases) std::printf("%-34s %s\n", c.name, c.origin);
  if (settings.json.empty()) return 0;
  std::ofstream file(settings.json);
  write_list_json(file, cases);
  return file ? 0 : 1;
}

template <class Number>
Number at_least(Number least, const char* option, const char* text) {
  const auto value = static_cast<Number>(std::atof(text));
  if (!(value >= least)) {
    throw std::invalid_argument(std::string(option) + " must be >= " + std::to_string(least) + ", got " + text);
  }
  return value;
}

const char* one_of(const Words& allowed, const char* option, const char* text) {
  if (among(allowed, text)) return text;
  std::string names;
  for (const std::string& name : allowed) names += (names.empty() ? "" : ", ") + name;
  throw std::invalid_argument(std::string(option) + " must be one of " + names + ", got " + text);
}

const Words& pass_names() {
  static const Words names = [] {
    Words result;
    for (const auto& facts : bench::kPasses) result.emplace_back(facts.name);
    return result;
  }();
  return names;
}

void take(Settings& settings, char option, const char* text) {
  switch (option) {
    case 'c':
      settings.cases.emplace_back(text);
      break;
    case 'p':
      settings.passes.emplace_back(one_of(pass_names(), "--pass", text));
      break;
    case 'a':
      settings.layouts.emplace_back(one_of({"nchw", "nhwc", "nc"}, "--layout", text));
      break;
    case 'd':
      settings.dtypes.emplace_back(one_of({"float16", "bfloat16", "float32", "float64"}, "--dtype", text));
      break;
    case 'g':
      settings.on_device = one_of({"cpu", "cuda"}, "--device", text) == std::string_view("cuda");
      break;
    case 'i':
      setenv("BATCHNORM_ISA", text, 1);
      break;
    case 't':
      settings.threads = at_least(1, "--threads", text);
      break;
    case 'n':
      settings.samples = at_least(1, "--samples", text);
      break;
    case 'r':
      settings.rounds = at_least(1, "--rounds", text);
      break;
    case 'o':
      settings.out = one_of({"given", "fresh"}, "--out", text)[0] == 'f' ? bench::Out::fresh : bench::Out::given;
      break;
    case 'm':
      settings.max_mb = at_least(0.0, "--max-mb", text);
      break;
    case 'j':
      settings.json = text;
      break;
    case 's':
      settings.spoil = one_of(pass_names(), "--spoil", text);
      break;
    case 'l':
      settings.only_list = true;
      break;
    default:
      throw std::logic_error("an option that nobody takes");
  }
}

int main_or_throw(int argc, char** argv) {
  // --spoil makes a result of that pass wrong, so that a test can see it refused.
  const option options[] = {{"case", required_argument, nullptr, 'c'},    {"pass", required_argument, nullptr, 'p'},
                            {"layout", required_argument, nullptr, 'a'},  {"dtype", required_argument, nullptr, 'd'},
                            {"device", required_argument, nullptr, 'g'},  {"isa", required_argument, nullptr, 'i'},
                            {"threads", required_argument, nullptr, 't'}, {"samples", required_argument, nullptr, 'n'},
                            {"rounds", required_argument, nullptr, 'r'},  {"out", required_argument, nullptr, 'o'},
                            {"max-mb", required_argument, nullptr, 'm'},  {"json", required_argument, nullptr, 'j'},
                            {"spoil", required_argument, nullptr, 's'},   {"list", no_argument, nullptr, 'l'},
                            {"help", no_argument, nullptr, 'h'},          {}};
  Settings settings;
  for (int o = 0; (o = getopt_long(argc, argv, "", options, nullptr)) != -1;) {
    if (o == 'h' || o == '?') {
      std::fputs(kHelp, o == 'h' ? stdout : stderr);
      return o == 'h' ? 0 : 2;
    }
    take(settings, static_cast<char>(o), optarg);
  }
  if (optind < argc) throw std::invalid_argument(std::string("what is ") + argv[optind] + "? --help tells the options");
  if (settings.dtypes.empty()) settings.dtypes = {"float32"};
  // Without this, glibc keeps what large outputs free from the second on, and --out fresh would not be.
  if (settings.out == bench::Out::fresh) mallopt(M_MMAP_THRESHOLD, 128 * 1024);
  return settings.only_list ? list(settings) : run(settings);
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
