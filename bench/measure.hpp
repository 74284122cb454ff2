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

// T is float or double. Throws where a result is wrong.
template <class T>
Measured measure(const Case& shape, Layout layout, const Request& request, Team& team);

extern template Measured measure<float>(const Case&, Layout, const Request&, Team&);
extern template Measured measure<double>(const Case&, Layout, const Request&, Team&);

}  // namespace bench
