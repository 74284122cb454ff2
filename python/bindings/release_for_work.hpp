// The GIL around calls of the core.
#pragma once

#include <pybind11/pybind11.h>
#include <unistd.h>

#include <cstdint>
#ifdef __GLIBCXX__
#include <cxxabi.h>
#endif

namespace batchnorm::bindings {

// Takes back the GIL, or never returns: a thread that wants it while the interpreter ends is ended itself by Python
// 3.11 to 3.13, with pthread_exit(). That unwinds the stack as an exception does, through destructors that must not
// throw (std::terminate) and that give back references without the GIL. So it is held here until the process is over,
// which is what Python does with it from 3.14 on.
inline void take_back_gil(PyThreadState* state) noexcept {
#ifdef __GLIBCXX__
  try {
    PyEval_RestoreThread(state);
  } catch (abi::__forced_unwind&) {
    for (;;) pause();
  }
#else
  PyEval_RestoreThread(state);
#endif
}

// Releases the GIL around work worth it: giving it up and taking it back costs about as much as a few thousand values,
// and while another thread wants it, up to a switch interval (5 ms).
class ReleaseForWork {
 public:
  explicit ReleaseForWork(std::int64_t values) : state_(values >= kWorth ? PyEval_SaveThread() : nullptr) {}
  ~ReleaseForWork() {
    if (state_ != nullptr) take_back_gil(state_);
  }
  ReleaseForWork(const ReleaseForWork&) = delete;
  ReleaseForWork& operator=(const ReleaseForWork&) = delete;

 private:
  static constexpr std::int64_t kWorth = 32 * 1024;
  PyThreadState* state_;
};

}  // namespace batchnorm::bindings
