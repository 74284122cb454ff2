// The functions for GPUs on the machine that runs kernels on the CPU (tests/cpp/simt), for the module of Python.
#include "cuda/api.cu"

namespace {

// A large device, so that channels are held; a small one would sum them through memory, with the same bits.
[[maybe_unused]] const bool is_set = [] {
  batchnorm::cuda::Stream::current = {90, 20, 227 * 1024, {20, 10, 5, 2, 1}};
  return true;
}();

}  // namespace
