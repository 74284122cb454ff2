// What the machine is: the facts that plans and dispatch decide on.
#pragma once

#include <cstdint>

namespace batchnorm {

struct Machine {
  std::int64_t l2_bytes;  // private cache of one core
  std::int64_t l3_bytes;  // shared cache; of the host, on a virtual machine
};

// Read once from the operating system.
Machine machine();

// Whether CPU and operating system run code compiled for "x86-64-v2", "x86-64-v3", "x86-64-v4", "neon", "generic" or
// "reference".
bool machine_runs(const char* isa);

}  // namespace batchnorm
