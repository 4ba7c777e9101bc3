// Instruction sets of the CPU kernels: what this machine can run and which one is used.
#pragma once

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

namespace lenet_fast::cpu {

// Runnable variants, best first.
inline std::vector<std::string> supported_isas() {
  std::vector<std::string> isas;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    isas.emplace_back("avx512");
  }
  if (avx2) {
    isas.emplace_back("avx2");
  }
#endif
  isas.emplace_back("portable");
  return isas;
}

// The best variant, or the one that LENET_FAST_CPU_ISA names; throws if that one cannot run here.
inline std::string selected_isa() {
  const std::vector<std::string> supported = supported_isas();
  const char* wanted = std::getenv("LENET_FAST_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') {
    return supported.front();
  }
  std::string names;
  for (const std::string& isa : supported) {
    if (isa == wanted) {
      return isa;
    }
    names += (names.empty() ? "" : ", ") + isa;
  }
  throw std::runtime_error(std::string("LENET_FAST_CPU_ISA: expected one that this machine runs (") + names +
                           "), got '" + wanted + "'");
}

}  // namespace lenet_fast::cpu
