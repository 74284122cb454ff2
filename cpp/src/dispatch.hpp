// The list of kernel tables, and the choice of one.
#pragma once

#include <span>
#include <string>

#include "kernels/table.hpp"

namespace batchnorm {

struct Implementation {
  const char* name;
  const kernels::KernelTable* table;
};

// The vector kernels compiled in, best first. All give the same bits.
std::span<const Implementation> implementations();

// The plain definition; chosen by name, or on a machine that runs none of the others.
extern const Implementation& reference_implementation;

// The first of the list that this machine runs, or what BATCHNORM_ISA names; read once, at the first call. Throws
// std::invalid_argument, with the valid names, where BATCHNORM_ISA names none that runs here.
const Implementation& active_implementation();

}  // namespace batchnorm
