// What this build can do on this machine, and the settings of the process.
#pragma once

#include <string>
#include <vector>

#include "batchnorm/types.hpp"

namespace batchnorm {

// Instruction sets compiled in, best first: "x86-64-v4", ... "generic". All give the same bits.
[[nodiscard]] std::vector<std::string> built_isas();

// Those of them that this machine and its operating system can run, best first.
[[nodiscard]] std::vector<std::string> available_isas();

// The one in use: the first available, or the one that the environment variable BATCHNORM_ISA names (also
// "reference": the definition in plain float64 loops). Throws std::invalid_argument, listing the valid names,
// where that variable names none that can run here.
[[nodiscard]] std::string active_isa();

// Upper limit of threads for calls that do not give their own, for the whole process; 0 removes it.
void set_num_threads(int threads);

// Threads that a large call from this thread would use now.
[[nodiscard]] int get_num_threads();

// The most threads among which a call from this thread has been shared since this was last asked; 1: none was shared.
[[nodiscard]] int threads_worked();

struct BuildInfo {
  std::string version, compiler, flags, build_type;
  bool openmp;
  bool assertions;
};
[[nodiscard]] BuildInfo build_info();

// The decisions taken for a training call on `problem`, as text for people. item_size: 2, 4 or 8 bytes a value.
[[nodiscard]] std::string explain(const Problem& problem, std::size_t item_size, const Options& options = {});

}  // namespace batchnorm
