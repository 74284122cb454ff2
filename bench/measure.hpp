// One case in one layout: verify, time in turns, compare with the yardsticks.
#pragma once

#include <string>
#include <vector>

#include "cases.hpp"
#include "passes.hpp"
#include "team.hpp"
#include "tensors.hpp"
#include "timing.hpp"

namespace bench {

// The types that are measured.
struct Dtype {
  const char* name;
  int bytes;
};
inline constexpr Dtype kDtypes[] = {{"float16", 2}, {"bfloat16", 2}, {"float32", 4}, {"float64", 8}};
inline int bytes_of(const std::string& dtype) {
  for (const Dtype& d : kDtypes) {
    if (dtype == d.name) return d.bytes;
  }
  return 0;
}

struct Row {
  std::string pass;  // or a yardstick's name: "copy", "stream"
  double bytes;      // that must move
  Spread seconds;
  Spread ratio;           // to the yardstick, of the same round
  std::string yardstick;  // "copy" or "stream", and which of its forms was best
  double yardstick_seconds;
};

struct Request {
  std::vector<PassFacts> passes;
  int threads, rounds;
  Out out;
  std::string spoil;  // the pass that gets a wrong result, for tests
};

struct Measured {
  std::vector<Row> rows;
  bool disturbed;  // threads kept running where all should have slept
  double others;   // processors that other processes kept busy meanwhile
};

// T is the type of the tensors. Throws where a result is wrong.
template <class T>
Measured measure(const Case& shape, Layout layout, const Request& request, Team& team);

extern template Measured measure<batchnorm::Float16>(const Case&, Layout, const Request&, Team&);
extern template Measured measure<batchnorm::BFloat16>(const Case&, Layout, const Request&, Team&);
extern template Measured measure<float>(const Case&, Layout, const Request&, Team&);
extern template Measured measure<double>(const Case&, Layout, const Request&, Team&);

}  // namespace bench
