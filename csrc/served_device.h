// Which devices the CUDA kernels can run on, asked of each at its first use; elsewhere another implementation of the
// operator takes its place.
#pragma once

#include <torch/csrc/stable/library.h>

#include <string>

#include "operands.h"

// Of PyTorch 2.13: the message of the last exception in this thread that the stable ABI turned into an error code.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace lenet_fast::cuda {

// Why the kernels cannot run on this device; empty: they can.
std::string why_unserved(int32_t device);

// A boxed kernel whose first argument is a tensor, with its replacement: on a device that is not served the operator
// lenet_fast::_NAME_fallback gets the same arguments (differentiable.py).
template <auto kernel>
struct ServedOrFallback {
  static inline const char* name = nullptr;  // the operator's, set where the kernel is registered (bind_cuda.cpp)

  static void boxed(StableIValue* stack, uint64_t num_arguments, uint64_t num_results) {
    int32_t device = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(torch::stable::detail::to<AtenTensorHandle>(stack[0]), &device));
    const std::string reason = why_unserved(device);
    if (reason.empty()) {
      TORCH_BOX(kernel)(stack, num_arguments, num_results);
      return;
    }
    const std::string fallback = "lenet_fast::_" + std::string(name) + "_fallback";
    if (torch_call_dispatcher(fallback.c_str(), "", stack, TORCH_ABI_VERSION) != TORCH_SUCCESS) {
      fail(torch_exception_get_what_without_backtrace != nullptr
               ? torch_exception_get_what_without_backtrace()
               : fallback + " failed; PyTorch has logged its error above");
    }
  }
};

}  // namespace lenet_fast::cuda
