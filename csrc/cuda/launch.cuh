// Host side of a launch: configuration, limits of the device, errors as exceptions.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace lenet_fast::cuda {

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("lenet_fast: CUDA: ") + what + ": " + cudaGetErrorString(error));
  }
}

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device), "current device");
  check(cudaDeviceGetAttribute(&value, attribute, device), "device attribute");
  return value;
}

inline int multiprocessors() { return device_attribute(cudaDevAttrMultiProcessorCount); }

// What a block gets without asking.
inline constexpr size_t kDefaultSharedBytes = 48 * 1024;

// The one way a kernel is launched. Grids are cut to their limits: kernels stride over their work.
template <typename Argument>
cudaError_t try_launch(void (*kernel)(Argument), const char* name, int64_t blocks, int threads, size_t shared_bytes,
                       cudaStream_t stream, const Argument& argument, int64_t blocks_y, bool cooperative) {
  if (blocks == 0 || blocks_y == 0) {
    return cudaSuccess;
  }
  if (shared_bytes > kDefaultSharedBytes) {
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shared_bytes)),
          name);
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(std::min<int64_t>(blocks, INT32_MAX)),
                        static_cast<unsigned>(std::min<int64_t>(blocks_y, 65535)));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute attribute{};
  if (cooperative) {
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
    config.attrs = &attribute;
    config.numAttrs = 1;
  }
  return cudaLaunchKernelEx(&config, kernel, argument);
}

template <typename Argument>
void launch(void (*kernel)(Argument), const char* name, int64_t blocks, int threads, size_t shared_bytes,
            cudaStream_t stream, const Argument& argument, int64_t blocks_y = 1) {
  check(try_launch(kernel, name, blocks, threads, shared_bytes, stream, argument, blocks_y, false), name);
}

// Returns false where the device cannot hold all blocks at once: fewer multiprocessors may be usable than its attribute
// says (green contexts, partitions of MPS). Then nothing was launched, and no error is left behind.
template <typename Argument>
bool launch_cooperative(void (*kernel)(Argument), const char* name, int64_t blocks, int threads, size_t shared_bytes,
                        cudaStream_t stream, const Argument& argument) {
  const cudaError_t error = try_launch(kernel, name, blocks, threads, shared_bytes, stream, argument, 1, true);
  if (error == cudaErrorCooperativeLaunchTooLarge || error == cudaErrorNotSupported) {
    cudaGetLastError();
    return false;
  }
  check(error, name);
  return true;
}

}  // namespace lenet_fast::cuda
