// Whether the kernels can run on a device at all.
#pragma once

#include <optional>
#include <string>

namespace lenet_fast::cuda {

// Asks CUDA why none of the library's kernels can run on the current device: they were not compiled for it, or the
// driver is too old. Empty: they can. Nothing: an error that has nothing to do with either, and may pass.
std::optional<std::string> ask_current_device();

}  // namespace lenet_fast::cuda
