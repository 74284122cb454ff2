// Where passes run, of which passes.cpp knows no more: on this machine's processors by so many threads, or, with
// BATCHNORM_ON_DEVICE, on a stream of a GPU, whose memory arrays then say the addresses of.
#pragma once

#if defined(BATCHNORM_ON_DEVICE)

#include <pybind11/stl.h>

#include <cstdint>
#include <utility>

#include "batchnorm/batchnorm.hpp"
#include "batchnorm/cuda.hpp"

namespace batchnorm::bindings {

namespace site = batchnorm::cuda;
using Where = std::pair<int, std::uintptr_t>;  // device and stream

// The device is the thread's current one as long as this lives.
class Site {
 public:
  explicit Site(const Where& where) : before_(cuda::set_device(where.first)), where_(where) {}
  ~Site() {
    try {
      cuda::set_device(before_);
    } catch (const std::exception&) {  // which the next call will tell
    }
  }
  Site(const Site&) = delete;
  Site& operator=(const Site&) = delete;
  [[nodiscard]] cuda::Options options() const { return {reinterpret_cast<void*>(where_.second)}; }

 private:
  int before_;
  Where where_;
};

}  // namespace batchnorm::bindings

#else

#include "batchnorm/batchnorm.hpp"

namespace batchnorm::bindings {

namespace site = batchnorm;
using Where = int;  // threads

class Site {
 public:
  explicit Site(Where threads) : threads_(threads) {}
  [[nodiscard]] Options options() const { return {threads_}; }

 private:
  int threads_;
};

}  // namespace batchnorm::bindings

#endif
