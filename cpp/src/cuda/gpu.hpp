// What kernels are planned for.
#pragma once

#include <array>
#include <cstdint>

namespace batchnorm::cuda {

// What is known of a GPU.
struct Device {
  int capability = 0;  // 90 is 9.0
  int multiprocessors = 0;
  std::int64_t shared_bytes = 0;     // that a block may have
  std::array<int, 5> clusters = {};  // of 1, 2, 4, 8 and 16 blocks of so many bytes that run at once; 0: none
};

}  // namespace batchnorm::cuda
