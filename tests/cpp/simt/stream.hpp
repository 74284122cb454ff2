// A stream of the machine that runs kernels on the CPU (cuda/stream.hpp): launches are done when they return. The
// device is what a test says.
#pragma once

#include <cstring>
#include <new>
#include <string>

#include "cuda/resident.hpp"

namespace batchnorm::cuda {

class Stream {
 public:
  static constexpr unsigned kThreads = 64;  // of a block that holds chunks: fibers are begun for each
  inline static Device current = {};
  inline static int number = 0;                   // of it
  inline static int held = 0, blocks_in_use = 0;  // launches of held channels, and memory that is not given back
  inline static std::uint64_t seed = 0;           // of schedules

  explicit Stream(void*) {}

  template <class Kernel, class... Args>
  void launch(Kernel kernel, unsigned grid, unsigned block, std::int64_t shared_bytes, const Args&... args) {
    simt::launch({.grid = grid,
                  .block = block,
                  .cluster = 1,
                  .shared_bytes = static_cast<std::size_t>(shared_bytes),
                  .seed = seed},
                 kernel, args...);
  }
  template <class Pass>
  void launch_held(const Resident& plan, const Pass& pass) {
    const unsigned grid = plan.span.blocks * plan.spans;
    ++held;
    simt::launch({.grid = grid,
                  .block = kThreads,
                  .cluster = plan.through_memory ? grid : plan.span.blocks,
                  .shared_bytes = static_cast<std::size_t>(plan.shared_bytes),
                  .seed = seed},
                 resident<Pass>, plan.span, pass);
  }
  std::byte* allocate(std::size_t bytes) {
    auto* memory = static_cast<std::byte*>(::operator new(bytes, std::align_val_t{256}));
    std::memset(memory, 0xFF, bytes);
    ++blocks_in_use;
    return memory;
  }
  void free(std::byte* memory) {
    --blocks_in_use;
    ::operator delete(memory, std::align_val_t{256});
  }
  void zero(void* memory, std::size_t bytes) { std::memset(memory, 0, bytes); }
  void copy_to_host(void* to, const void* from, std::size_t bytes) { std::memcpy(to, from, bytes); }
  void copy_to_device(void* to, const void* from, std::size_t bytes) { std::memcpy(to, from, bytes); }
  void* mark() { return &number; }
  static bool is_past(void*) { return true; }
  void wait_for(void*) {}
  static int count_devices() { return 2; }
  static int set_device(int device) {
    const int before = number;
    number = device;
    return before;
  }
  static int device_of(const void*) { return 0; }
  static std::string describe_device(int) { return "emulated"; }
  static Device device() { return current; }
};

}  // namespace batchnorm::cuda
