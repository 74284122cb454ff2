#include "report.hpp"

#include <array>
#include <cstdio>
#include <ctime>
#include <fstream>
#include <ostream>
#include <string_view>
#include <thread>
#include <utility>

#include "batchnorm/batchnorm.hpp"

namespace bench {
namespace {

std::string quoted(const std::string& text) {
  std::string result = "\"";
  for (const char ch : text) {
    if (ch == '"' || ch == '\\') result += '\\';
    if (static_cast<unsigned char>(ch) >= ' ') result += ch;
  }
  return result + '"';
}

std::string number(double value) {
  std::array<char, 32> text{};
  std::snprintf(text.data(), text.size(), "%.9g", value);
  return text.data();
}

std::string integer(double value) {
  std::array<char, 32> text{};
  std::snprintf(text.data(), text.size(), "%.0f", value);
  return text.data();
}

std::string joined(std::string_view open, const std::vector<std::string>& parts, std::string_view close) {
  std::string result(open);
  for (const std::string& part : parts) {
    if (&part != &parts.front()) result += ", ";
    result += part;
  }
  result += close;
  return result;
}

// {"a": 1, "b": "c"} from names and values that are already JSON.
using Fields = std::vector<std::pair<const char*, std::string>>;
std::string object(const Fields& fields) {
  std::vector<std::string> parts;
  for (const auto& [name, value] : fields) parts.push_back(quoted(name) + ": " + value);
  return joined("{", parts, "}");
}

std::string array(const std::vector<std::string>& values) { return joined("[", values, "]"); }

std::string sizes_of(const Shape& shape) {
  std::vector<std::string> sizes;
  for (const std::int64_t size : shape) {
    if (size > 0) sizes.push_back(std::to_string(size));
  }
  return array(sizes);
}

std::string layouts_json(const Shape& shape) {
  std::vector<std::string> names;
  for (const Layout layout : layouts_of(shape)) names.push_back(quoted(name_of(layout)));
  return array(names);
}

std::string first_line(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

std::string cpu_model() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    if (line.starts_with("model name")) return line.substr(line.find(':') + 2);
  }
  return "unknown";
}

// {"L1 Data": "32K", ...} of the first processor.
std::string caches() {
  std::vector<std::string> parts;
  for (int index = 0;; ++index) {
    const std::string folder = "/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(index) + "/";
    const std::string level = first_line(folder + "level");
    if (level.empty()) return joined("{", parts, "}");
    std::string name = "L";
    name.append(level).append(" ").append(first_line(folder + "type"));
    parts.push_back(quoted(name) + ": " + quoted(first_line(folder + "size")));
  }
}

std::string machine() {
  return object({{"cpu", quoted(cpu_model())},
                 {"cores", std::to_string(std::thread::hardware_concurrency())},
                 {"caches", caches()},
                 {"kernel", quoted(first_line("/proc/sys/kernel/osrelease"))},
                 {"huge_pages", quoted(first_line("/sys/kernel/mm/transparent_hugepage/enabled"))}});
}

std::string library(const Run& run) {
  const auto info = batchnorm::build_info();
  return object({{"name", quoted("batchnorm")},
                 {"version", quoted(info.version)},
                 {"compiler", quoted(info.compiler)},
                 {"flags", quoted(info.flags)},
                 {"build_type", quoted(info.build_type)},
                 {"isa", quoted(run.isa)}});
}

std::string now() {
  const std::time_t seconds = std::time(nullptr);
  std::tm utc{};
  gmtime_r(&seconds, &utc);
  std::array<char, 32> text{};
  std::strftime(text.data(), text.size(), "%Y-%m-%dT%H:%M:%SZ", &utc);
  return text.data();
}

std::string row_json(const Run& run, const Result& result, const Row& row) {
  const auto& [shape, layout, dtype] = result.subject;
  return object({{"case", quoted(shape->name)},
                 {"origin", quoted(shape->origin)},
                 {"shape", sizes_of(shape->shape)},
                 {"layout", quoted(name_of(layout))},
                 {"dtype", quoted(dtype)},
                 {"pass", quoted(row.pass)},
                 {"isa", quoted(run.isa)},
                 {"threads", std::to_string(run.threads)},
                 {"rounds", std::to_string(run.rounds)},
                 {"out", quoted(run.out)},
                 {"bytes", integer(row.bytes)},
                 {"seconds", number(row.seconds.median)},
                 {"mad", number(row.seconds.mad)},
                 {"gb_per_s", number(row.bytes / row.seconds.median / 1e9)},
                 {"ratio", number(row.ratio.median)},
                 {"ratio_mad", number(row.ratio.mad)},
                 {"yardstick", quoted(row.yardstick)},
                 {"yardstick_seconds", number(row.yardstick_seconds)},
                 {"disturbed", result.measured.disturbed ? "true" : "false"},
                 {"others", number(result.measured.others)}});
}

double megabytes(const Subject& subject) {
  const auto size = static_cast<double>(problem_of(subject.shape->shape, subject.layout).size());
  return size * bytes_of(subject.dtype) / 1e6;
}

}  // namespace

void print(const Result& result) {
  constexpr double kQuiet = 0.2;  // processors; an idle system's own work stays below
  const Subject& s = result.subject;
  std::printf("%s %s %s: %s, %.2f MB a tensor%s\n", s.shape->name, name_of(s.layout), s.dtype.c_str(), s.shape->origin,
              megabytes(s), result.measured.disturbed ? "; DISTURBED: other threads would not sleep" : "");
  if (result.measured.others > kQuiet) {
    std::printf("  NOT ALONE: other processes kept %.1f processors busy\n", result.measured.others);
  }
  for (const Row& r : result.measured.rows) {
    std::printf("  %-17s %11.2f us +-%4.1f %% %7.1f GB/s %6.2f +-%5.2f x %s\n", r.pass.c_str(), r.seconds.median * 1e6,
                100 * r.seconds.mad / r.seconds.median, r.bytes / r.seconds.median / 1e9, r.ratio.median, r.ratio.mad,
                r.yardstick.c_str());
  }
  std::fflush(stdout);
}

void write_json(std::ostream& file, const Run& run, const std::vector<Result>& results) {
  file << "{\"format\": 1,\n \"date\": " << quoted(now()) << ",\n \"library\": " << library(run)
       << ",\n \"machine\": " << machine() << ",\n \"rows\": [";
  const char* before = "\n  ";
  for (const Result& result : results) {
    for (const Row& row : result.measured.rows) {
      file << before << row_json(run, result, row);
      before = ",\n  ";
    }
  }
  file << "\n ]}\n";
}

void write_list_json(std::ostream& file, const std::vector<Case>& cases) {
  file << "{\"cases\": [";
  const char* before = "\n  ";
  for (const Case& c : cases) {
    file << before
         << object({{"case", quoted(c.name)},
                    {"origin", quoted(c.origin)},
                    {"shape", sizes_of(c.shape)},
                    {"layouts", layouts_json(c.shape)}});
    before = ",\n  ";
  }
  file << "\n ]}\n";
}

}  // namespace bench
