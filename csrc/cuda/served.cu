// Asks CUDA whether the kernels can run on a device. All .cu files are compiled for the same GPUs, so that one kernel
// answers for all of them; it is empty because a driver that has to compile it from PTX does so at once.
#include "served.h"

#include <cuda_runtime.h>

#include "launch.cuh"

namespace lenet_fast::cuda {
namespace {

__global__ void empty_kernel() {}

std::string release(int version) { return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10); }

// Those that nvcc compiled this file for.
std::string architectures() {
  constexpr int compiled_for[] = {__CUDA_ARCH_LIST__};
  std::string names;
  for (const int architecture : compiled_for) {
    names += (names.empty() ? "sm_" : ", sm_") + std::to_string(architecture / 10);
  }
  return names;
}

std::string architecture_here() {
  return "sm_" + std::to_string(10 * device_attribute(cudaDevAttrComputeCapabilityMajor) +
                                device_attribute(cudaDevAttrComputeCapabilityMinor));
}

}  // namespace

std::optional<std::string> ask_current_device() {
  cudaFuncAttributes attributes{};
  const cudaError_t error = cudaFuncGetAttributes(&attributes, &empty_kernel);
  if (error != cudaSuccess) {
    cudaGetLastError();  // answered here: no later call shall report it
  }
  switch (error) {
    case cudaSuccess:
      return "";
    case cudaErrorInsufficientDriver: {
      int driver = 0;
      cudaDriverGetVersion(&driver);
      return "the driver supports CUDA " + release(driver) + ", the kernels were built with CUDA " +
             release(CUDART_VERSION);
    }
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction:
      return "no kernel image for " + architecture_here() + ": built for " + architectures();
    case cudaErrorUnsupportedPtxVersion:
    case cudaErrorJitCompilerNotFound:
    case cudaErrorJitCompilationDisabled:
    case cudaErrorInvalidPtx:
      return "no kernel image for " + architecture_here() + ": built for " + architectures() +
             ", and the driver does not compile their PTX (" + cudaGetErrorString(error) + ")";
    case cudaErrorSystemDriverMismatch:
    case cudaErrorCompatNotSupportedOnDevice:
      return std::string("the driver cannot run them: ") + cudaGetErrorString(error);
    default:
      return std::nullopt;
  }
}

}  // namespace lenet_fast::cuda
