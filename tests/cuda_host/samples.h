// Kernels to try the shim with, each with faults that can be planted in it.
#pragma once

namespace samples {

// clang-format off
#define SAMPLES_FAULTS(X) \
  X(none) X(missing_barrier) X(divergent_barrier) X(early_exit) X(global_read) X(global_write) \
  X(shared_read) X(shared_write) X(misaligned) X(uninitialised) X(race) X(benign_race) X(shuffle_mask) \
  X(shuffle_from_nobody) X(missing_grid_barrier) X(grid_exit) X(not_cooperative) X(too_many_blocks) \
  X(too_much_shared)
// clang-format on

#define SAMPLES_ENUMERATOR(name) name,
enum class Fault { SAMPLES_FAULTS(SAMPLES_ENUMERATOR) count };

// Each launches its kernel and returns CUDA's error message, or null.
const char* run_stencil(Fault fault, const float* input, float* output, int count);     // count + 2 -> count
const char* run_block_sum(Fault fault, const float* input, float* output, int blocks);  // 128 * blocks -> blocks
const char* run_grid_sum(Fault fault, const float* input, float* output, int blocks);   // 128 * blocks -> blocks + 1

}  // namespace samples
