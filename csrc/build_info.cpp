// How this installation was built and what the processor offers: the only pybind11 module, free of tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/isa.h"

PYBIND11_MODULE(_build_info, module) {
  module.doc() = "Build facts and processor features.";
#if defined(__clang__)
  module.attr("compiler") = "clang " __clang_version__;
#else
  module.attr("compiler") = "g++ " __VERSION__;
#endif
  module.attr("flags") = LENET_FAST_BUILD_FLAGS;
  module.attr("torch_version") = LENET_FAST_BUILD_TORCH;
  module.attr("cuda_architectures") = LENET_FAST_BUILD_CUDA_ARCHITECTURES;  // empty: built without CUDA
  module.def("supported_isas", &lenet_fast::cpu::supported_isas, "CPU kernel variants this machine runs, best first.");
  module.def("selected_isa", &lenet_fast::cpu::selected_isa,
             "The variant in use; raises if LENET_FAST_CPU_ISA is wrong.");
}
