// The device of a tensor made current, and its current stream.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <stdexcept>

// Tests register the operators elsewhere, to run them where there is no CUDA.
#ifndef LENET_FAST_LIBRARY
#define LENET_FAST_LIBRARY lenet_fast
#define LENET_FAST_DISPATCH_KEY CUDA
#endif

// Of libtorch_cuda. Weak, so that the library can be loaded, and seen to register everything, beside a PyTorch without
// it.
extern "C" {
__attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
__attribute__((weak)) AOTITorchError aoti_torch_create_cuda_guard(int32_t device_index, CUDAGuardHandle* guard);
__attribute__((weak)) AOTITorchError aoti_torch_delete_cuda_guard(CUDAGuardHandle guard);
}

namespace lenet_fast::cuda {

// Makes a device the current one.
class DeviceGuard {
 public:
  explicit DeviceGuard(int32_t device) {
    if (aoti_torch_create_cuda_guard == nullptr) {
      throw std::runtime_error("lenet_fast: CUDA: libtorch_cuda was not found when the kernels were loaded");
    }
    TORCH_ERROR_CODE_CHECK(aoti_torch_create_cuda_guard(device, &guard_));
  }
  ~DeviceGuard() { aoti_torch_delete_cuda_guard(guard_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  CUDAGuardHandle guard_ = nullptr;
};

class CurrentStream {
 public:
  explicit CurrentStream(const torch::stable::Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  operator cudaStream_t() const { return stream_; }

 private:
  DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

}  // namespace lenet_fast::cuda
