// What batchnorm-bench prints and writes.
#pragma once

#include <iosfwd>
#include <string>
#include <vector>

#include "cases.hpp"
#include "measure.hpp"

namespace bench {

// What all rows of a run have in common.
struct Run {
  std::string isa, out;
  int threads, rounds;
};

// What the rows of one case in one layout and dtype have in common.
struct Subject {
  const Case* shape;
  Layout layout;
  std::string dtype;
};

struct Result {
  Subject subject;
  Measured measured;
};

void print(const Result& result);

// {"format": 1, "library": {...}, "machine": {...}, "date": ..., "rows": [...]}; bench/README.md names the fields.
void write_json(std::ostream& file, const Run& run, const std::vector<Result>& results);

// {"cases": [...]}
void write_list_json(std::ostream& file, const std::vector<Case>& cases);

}  // namespace bench
