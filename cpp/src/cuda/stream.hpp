// A stream of the current device: where kernels are launched, and where memory to work in comes from. With any other
// compiler than nvcc, the machine that runs kernels on the CPU (tests/cpp/simt).
#pragma once

#include "cuda/resident.hpp"

#if !defined(__CUDACC__)
#include "simt/stream.hpp"
#else

#include <cstdlib>
#include <map>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>

namespace batchnorm::cuda {

inline void check_runtime(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  static_cast<void>(cudaGetLastError());  // so that it is told once
  if (status == cudaErrorMemoryAllocation) throw std::bad_alloc();
  throw std::runtime_error(std::string(what) + " failed: " + cudaGetErrorString(status));
}

// That there is a device, by name of what is missing: without a driver the runtime says that it is too old.
inline void require_device() {
  int driver = 0, runtime = 0, devices = 0;
  const auto version = [](int number) {
    return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10);
  };
  check_runtime(cudaDriverGetVersion(&driver), "asking for the driver");
  if (driver == 0) throw std::runtime_error("no NVIDIA driver was found on this machine");
  const cudaError_t status = cudaGetDeviceCount(&devices);
  if (status == cudaErrorInsufficientDriver) {
    check_runtime(cudaRuntimeGetVersion(&runtime), "asking for the runtime");
    throw std::runtime_error("the NVIDIA driver is too old: CUDA " + version(runtime) + " is needed, it offers " +
                             version(driver));
  }
  if (status == cudaErrorNoDevice || (status == cudaSuccess && devices == 0)) {
    const char* visible = std::getenv("CUDA_VISIBLE_DEVICES");
    throw std::runtime_error("no CUDA device is visible" +
                             (visible == nullptr ? "" : " (CUDA_VISIBLE_DEVICES=\"" + std::string(visible) + "\")"));
  }
  check_runtime(status, "counting devices");
}

class Stream {
 public:
  explicit Stream(void* stream) : stream_(static_cast<cudaStream_t>(stream)) { device(); }

  template <class Kernel, class... Args>
  void launch(Kernel kernel, unsigned grid, unsigned block, std::int64_t shared_bytes, const Args&... args) {
    if (shared_bytes > 0) ask_for_shared(kernel, shared_bytes);
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(grid);
    config.blockDim = dim3(block);
    config.dynamicSmemBytes = static_cast<std::size_t>(shared_bytes);
    config.stream = stream_;
    check_runtime(cudaLaunchKernelEx(&config, kernel, args...), "launching a kernel");
  }
  // All spans at once: clusters, or blocks that meet through memory.
  template <class Pass>
  void launch_held(const Resident& plan, const Pass& pass) {
    constexpr auto kernel = resident<Pass>;
    ask_for_shared(kernel, plan.shared_bytes);
    cudaLaunchAttribute attribute = {};
    if (plan.through_memory) {
      attribute.id = cudaLaunchAttributeCooperative;
      attribute.val.cooperative = 1;
    } else {
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim = {plan.span.blocks, 1, 1};
      check_runtime(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
                    "asking for large clusters");
    }
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(plan.span.blocks * plan.spans);
    config.blockDim = dim3(kMostThreads);
    config.dynamicSmemBytes = static_cast<std::size_t>(plan.shared_bytes);
    config.stream = stream_;
    config.attrs = &attribute;
    config.numAttrs = plan.through_memory || plan.span.blocks > 1 ? 1 : 0;
    check_runtime(cudaLaunchKernelEx(&config, kernel, plan.span, pass), "launching a kernel");
  }

  std::byte* allocate(std::size_t bytes) {
    void* memory = nullptr;
    check_runtime(cudaMallocAsync(&memory, bytes, stream_), "asking for memory");
    return static_cast<std::byte*>(memory);
  }
  void free(std::byte* memory) { static_cast<void>(cudaFreeAsync(memory, stream_)); }
  void zero(void* memory, std::size_t bytes) {
    check_runtime(cudaMemsetAsync(memory, 0, bytes, stream_), "clearing memory");
  }

  void copy_to_host(void* to, const void* from, std::size_t bytes) {
    check_runtime(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream_), "copying to the host");
    check_runtime(cudaStreamSynchronize(stream_), "waiting for a stream");
  }
  // From memory that is not locked: it is read before this returns.
  void copy_to_device(void* to, const void* from, std::size_t bytes) {
    check_runtime(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, stream_), "copying to the device");
  }
  cudaEvent_t mark() {
    cudaEvent_t event = nullptr;
    check_runtime(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "making an event");
    const cudaError_t recorded = cudaEventRecord(event, stream_);
    if (recorded != cudaSuccess) static_cast<void>(cudaEventDestroy(event));
    check_runtime(recorded, "recording an event");
    return event;
  }
  static bool is_past(void* mark) {
    const auto event = static_cast<cudaEvent_t>(mark);
    const cudaError_t status = cudaEventQuery(event);
    static_cast<void>(cudaGetLastError());
    if (status == cudaErrorNotReady) return false;
    static_cast<void>(cudaEventDestroy(event));  // also of a stream that has failed, which the next call tells
    return true;
  }
  void wait_for(void* other) {
    cudaEvent_t event = Stream(other).mark();
    const cudaError_t waits = cudaStreamWaitEvent(stream_, event, 0);
    static_cast<void>(cudaEventDestroy(event));  // once it has passed
    check_runtime(waits, "letting a stream wait for another");
  }

  static int count_devices() {
    require_device();
    int devices = 0;
    check_runtime(cudaGetDeviceCount(&devices), "counting devices");
    return devices;
  }
  static int set_device(int device) {
    static const bool is_there = (require_device(), true);
    static_cast<void>(is_there);
    int before = 0;
    check_runtime(cudaGetDevice(&before), "asking for the current device");
    if (before != device) check_runtime(cudaSetDevice(device), "choosing a device");
    return before;
  }
  static int device_of(const void* memory) {
    cudaPointerAttributes attributes = {};
    check_runtime(cudaPointerGetAttributes(&attributes, memory), "asking where memory is");
    if (attributes.type != cudaMemoryTypeDevice && attributes.type != cudaMemoryTypeManaged) {
      throw std::invalid_argument("memory must be of a CUDA device, got an address of the host");
    }
    return attributes.device;
  }
  static std::string describe_device(int device) {
    cudaDeviceProp properties = {};
    check_runtime(cudaGetDeviceProperties(&properties, device), "asking for the device's name");
    return std::string(properties.name) + ", compute capability " + std::to_string(properties.major) + "." +
           std::to_string(properties.minor);
  }

  // The current one, asked once.
  static Device device() {
    static std::mutex mutex;
    static std::map<int, Device> known;
    int number = 0;
    const std::lock_guard lock(mutex);
    if (known.empty()) require_device();
    check_runtime(cudaGetDevice(&number), "asking for the current device");
    const auto found = known.find(number);
    return found != known.end() ? found->second : known[number] = ask(number);
  }

 private:
  template <class Kernel>
  static void ask_for_shared(Kernel kernel, std::int64_t bytes) {
    check_runtime(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
                  "asking for shared memory");
  }
  static int attribute_of(int device, cudaDeviceAttr which) {
    int value = 0;
    check_runtime(cudaDeviceGetAttribute(&value, which, device), "asking for an attribute of the device");
    return value;
  }
  static Device ask(int number) {
    Device d;
    d.capability = 10 * attribute_of(number, cudaDevAttrComputeCapabilityMajor) +
                   attribute_of(number, cudaDevAttrComputeCapabilityMinor);
    if (d.capability < 80) {
      cudaDeviceProp properties = {};
      check_runtime(cudaGetDeviceProperties(&properties, number), "asking for the device's name");
      throw std::runtime_error("device " + std::to_string(number) + " (" + properties.name +
                               ") has compute capability " + std::to_string(properties.major) + "." +
                               std::to_string(properties.minor) + "; 8.0 or later is needed");
    }
    d.multiprocessors = attribute_of(number, cudaDevAttrMultiProcessorCount);
    d.shared_bytes = attribute_of(number, cudaDevAttrMaxSharedMemoryPerBlockOptin);
    d.clusters[0] = d.multiprocessors;
    for (unsigned k = 1; d.capability >= 90 && k < d.clusters.size(); ++k) d.clusters[k] = clusters_of(1u << k, d);
    return d;
  }
  // How many run at once with all the shared memory there is; 0 where the device has no such clusters.
  static int clusters_of(unsigned blocks, const Device& device) {
    constexpr auto kernel = resident<HeldForward<float> >;
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(device.shared_bytes));
    cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {blocks, 1, 1};
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(blocks);
    config.blockDim = dim3(kMostThreads);
    config.dynamicSmemBytes = static_cast<std::size_t>(device.shared_bytes);
    config.attrs = &attribute;
    config.numAttrs = 1;
    int clusters = 0;
    const cudaError_t status = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
    static_cast<void>(cudaGetLastError());
    return status == cudaSuccess ? clusters : 0;
  }

  cudaStream_t stream_;
};

}  // namespace batchnorm::cuda

#endif
