// Launches and most of CUDA's host side, for one device that is the CPU. See README.md.
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <fstream>
#include <mutex>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "block.h"
#include "launch.h"

namespace cuda_host {

constexpr size_t shared_default_limit = size_t{48} << 10;
constexpr size_t shared_per_multiprocessor = size_t{228} << 10;
constexpr size_t shared_reserved = size_t{1} << 10;  // by the system, of every block
constexpr size_t threads_per_multiprocessor = 2048;

// All `extern __shared__` arrays: the linker gives their names to this one (build.py).
extern "C" {
alignas(16) extern unsigned char cuda_host_shared_memory[shared_limit];
alignas(16) unsigned char cuda_host_shared_memory[shared_limit];
}
unsigned char* const shared_memory = cuda_host_shared_memory;

namespace {

void run_one_after_another(Order& order, size_t shared_bytes, Fiber* fibers[], const std::function<void()>& body) {
  for (const size_t number : order.of(volume(gridDim))) {
    Block block(number, shared_bytes, fibers, body);
    if (block.run(order) == State::at_grid_barrier) {
      throw Fault(block.name() + ": grid.sync in a launch that is not cooperative");
    }
  }
}

void run_together(Order& order, size_t shared_bytes, Fiber* fibers[], const std::function<void()>& body) {
  std::vector<Block> blocks;
  for (size_t number = 0; number < volume(gridDim); ++number) {
    blocks.emplace_back(number, shared_bytes, fibers + number * volume(blockDim), body);
  }
  while (true) {
    std::vector<State> states(blocks.size());
    for (const size_t number : order.of(blocks.size())) {
      states[number] = blocks[number].run(order);
    }
    const auto odd = std::find_if(states.begin(), states.end(), [&](State state) { return state != states[0]; });
    if (odd != states.end()) {
      const char* what[] = {" has returned", " waits at grid.sync"};
      throw Fault("divergent grid barrier: " + blocks[0].name() + what[states[0] == State::at_grid_barrier] + ", " +
                  blocks[static_cast<size_t>(odd - states.begin())].name() + what[*odd == State::at_grid_barrier]);
    }
    if (states[0] == State::finished) {
      return;
    }
    for (Block& block : blocks) {
      block.release();
    }
    forget_global_accesses();
  }
}

std::string kernel_name(const void* kernel) {
  static char name[8192];
  void* const inside = reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(kernel) + 1);  // it takes a return address
  __sanitizer_symbolize_pc(inside, "%f", name, sizeof name);
  return name;
}

// --- the state of the "device" ---------------------------------------------------------------------------------------

std::mutex device_mutex;
std::unordered_map<const void*, size_t> shared_limits;  // that cudaFuncSetAttribute raised
std::string last_failure;
thread_local cudaError_t last_error = cudaSuccess;

int from_environment(const char* name, int otherwise) {
  const char* value = std::getenv(name);
  return value != nullptr ? std::atoi(value) : otherwise;
}

int multiprocessors() { return std::max(1, from_environment("CUDA_HOST_MULTIPROCESSORS", 2)); }

int driver() { return from_environment("CUDA_HOST_DRIVER", CUDART_VERSION); }

int capability() { return from_environment("CUDA_HOST_CAPABILITY", __CUDA_ARCH_LIST__ / 10); }

// What every call of the runtime reports first.
cudaError_t initialise() { return driver() < CUDART_VERSION ? cudaErrorInsufficientDriver : cudaSuccess; }

cudaError_t check_cooperative(const Launch& launch) {
  const char* const has = std::getenv("CUDA_HOST_COOPERATIVE");
  if (has != nullptr && std::string_view(has) != "1") {
    return cudaErrorNotSupported;
  }
  int resident;
  blocks_per_multiprocessor(&resident, static_cast<int>(volume(launch.block)), launch.shared_bytes);
  const auto usable = static_cast<size_t>(from_environment("CUDA_HOST_USABLE_MULTIPROCESSORS", multiprocessors()));
  return volume(launch.grid) > static_cast<size_t>(resident) * usable ? cudaErrorCooperativeLaunchTooLarge
                                                                      : cudaSuccess;
}

cudaError_t check(const Launch& launch) {
  if (const cudaError_t error = load_kernel(); error != cudaSuccess) {
    return error;
  }
  const dim3 grid = launch.grid, block = launch.block;
  if (volume(grid) == 0 || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535 || volume(block) == 0 ||
      volume(block) > 1024 || block.z > 64) {
    return cudaErrorInvalidConfiguration;
  }
  const auto raised = shared_limits.find(launch.kernel);
  if (launch.shared_bytes > (raised != shared_limits.end() ? raised->second : shared_default_limit)) {
    return cudaErrorInvalidValue;
  }
  return launch.cooperative ? check_cooperative(launch) : cudaSuccess;
}

}  // namespace

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, const std::function<void()>& thread) {
  const bool cooperative = std::any_of(config.attrs, config.attrs + config.numAttrs, [](const auto& attribute) {
    return attribute.id == cudaLaunchAttributeCooperative && attribute.val.cooperative != 0;
  });
  const Launch launch{config.gridDim, config.blockDim, config.dynamicSmemBytes, cooperative, kernel, thread};
  return remember(is_capturing(config.stream) ? record(launch, config.stream) : run(launch));
}

cudaError_t run(const Launch& launch) {
  const std::lock_guard lock(device_mutex);
  if (const cudaError_t error = check(launch); error != cudaSuccess) {
    return error;
  }
  log(volume(launch.block), launch.shared_bytes, kernel_name(launch.kernel));
  gridDim = launch.grid;
  blockDim = launch.block;
  static std::deque<Fiber> stacks;
  stacks.resize(std::max(stacks.size(), volume(blockDim) * (launch.cooperative ? volume(gridDim) : 1)));
  std::vector<Fiber*> fibers;
  for (Fiber& stack : stacks) {
    fibers.push_back(&stack);
  }
  __asan_poison_memory_region(cuda_host_shared_memory, shared_limit);
  __asan_unpoison_memory_region(cuda_host_shared_memory, launch.shared_bytes);
  forget_global_accesses();
  cudaError_t error = cudaSuccess;
  try {
    Order order;
    (launch.cooperative ? run_together : run_one_after_another)(order, launch.shared_bytes, fibers.data(),
                                                                launch.thread);
  } catch (const Fault& fault) {
    last_failure = "cuda_host: kernel " + kernel_name(launch.kernel) + ", " + fault.what();
    std::fprintf(stderr, "%s\n", last_failure.c_str());
    error = cudaErrorLaunchFailure;
  }
  __asan_poison_memory_region(cuda_host_shared_memory, shared_limit);
  return error;
}

void log(size_t threads, size_t shared_bytes, const std::string& what) {
  if (const char* path = std::getenv("CUDA_HOST_LAUNCHES")) {
    std::ofstream(path, std::ios::app) << threads << ' ' << shared_bytes << ' ' << what << '\n';
  }
}

cudaError_t remember(cudaError_t error) { return error == cudaSuccess ? error : last_error = error; }

cudaError_t load_kernel() {
  if (const cudaError_t error = initialise(); error != cudaSuccess) {
    return remember(error);
  }
  if (const int error = from_environment("CUDA_HOST_LOAD_ERROR", 0)) {
    return remember(static_cast<cudaError_t>(error));
  }
  const bool has_code = capability() / 10 == __CUDA_ARCH_LIST__ / 100 && capability() >= __CUDA_ARCH_LIST__ / 10;
  return has_code ? cudaSuccess : remember(cudaErrorNoKernelImageForDevice);
}

cudaError_t blocks_per_multiprocessor(int* blocks, int threads, size_t shared_bytes) {
  *blocks = static_cast<int>(std::min({threads_per_multiprocessor / static_cast<size_t>(threads), size_t{32},
                                       shared_per_multiprocessor / (shared_bytes + shared_reserved)}));
  return cudaSuccess;
}

}  // namespace cuda_host

using namespace cuda_host;

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    case cudaErrorInsufficientDriver:
      return "CUDA driver version is insufficient for CUDA runtime version";
    case cudaErrorInvalidDeviceFunction:
      return "invalid device function";
    case cudaErrorNoKernelImageForDevice:
      return "no kernel image is available for execution on the device";
    case cudaErrorInvalidPtx:
      return "a PTX JIT compilation failed";
    case cudaErrorJitCompilerNotFound:
      return "PTX JIT compiler library not found";
    case cudaErrorUnsupportedPtxVersion:
      return "the provided PTX was compiled with an unsupported toolchain.";
    case cudaErrorJitCompilationDisabled:
      return "PTX JIT compilation was disabled";
    case cudaErrorNotSupported:
      return "operation not supported";
    case cudaErrorSystemDriverMismatch:
      return "system has unsupported display driver / cuda driver combination";
    case cudaErrorCompatNotSupportedOnDevice:
      return "forward compatibility was attempted on non supported HW";
    case cudaErrorLaunchFailure:
      return last_failure.c_str();
    case cudaErrorCooperativeLaunchTooLarge:
      return "too many blocks in cooperative launch";
    case cudaErrorStreamCaptureUnsupported:
      return "operation not permitted when stream is capturing";
  }
  return "unrecognized error code";
}

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return last_error; }

// Not CUDA's: for tests, whether an error was left behind for a later call.
extern "C" __attribute__((visibility("default"))) int cuda_host_last_error() { return last_error; }

cudaError_t cudaDriverGetVersion(int* version) {
  *version = driver();
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return remember(initialise());
}

cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : remember(cudaErrorInvalidDevice); }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = multiprocessors();
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = capability() / 10;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = capability() % 10;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = shared_per_multiprocessor;
      return cudaSuccess;
    case cudaDevAttrCooperativeLaunch: {
      const char* const has = std::getenv("CUDA_HOST_COOPERATIVE");
      *value = has == nullptr || std::string_view(has) != "0";
      return cudaSuccess;
    }
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = shared_limit;
      return cudaSuccess;
  }
  return remember(cudaErrorInvalidValue);
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  const std::lock_guard lock(device_mutex);
  if (value < 0 || static_cast<size_t>(value) > shared_limit) {
    return remember(cudaErrorInvalidValue);
  }
  shared_limits[kernel] = static_cast<size_t>(value);
  return cudaSuccess;
}

cudaError_t cudaHostGetDevicePointer(void** on_device, void* on_host, unsigned) {
  *on_device = on_host;
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t stream) {
  if (is_capturing(stream)) {
    return remember(cudaErrorStreamCaptureUnsupported);
  }
  std::memset(memory, value, bytes);
  return cudaSuccess;
}
