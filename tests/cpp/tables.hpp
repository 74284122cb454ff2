// The tables of kernels that can be tried on this machine.
#pragma once

#include <vector>

#include "dispatch.hpp"
#include "machine.hpp"

namespace tables {

// The definition, then what runs here, best first.
inline std::vector<batchnorm::Implementation> runnable() {
  std::vector<batchnorm::Implementation> list{batchnorm::reference_implementation};
  for (const batchnorm::Implementation& implementation : batchnorm::implementations()) {
    if (batchnorm::machine_runs(implementation.name)) list.push_back(implementation);
  }
  return list;
}

inline bool is_reference(const batchnorm::Implementation& implementation) {
  return implementation.table == batchnorm::reference_implementation.table;
}

}  // namespace tables
