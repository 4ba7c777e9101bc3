// Small kernels, right and with planted faults: proof that the shim lets the right ones pass and sees the others.
// Plain CUDA: nvcc compiles this file too.
#include "samples.h"

#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <type_traits>

namespace samples {

__device__ inline float* shared_floats() {
  extern __shared__ __align__(16) unsigned char sample_shared[];
  return reinterpret_cast<float*>(sample_shared);
}

namespace {

// output[i] = sum of input[i .. i+2], through a tile with a halo. One block for every `threads` outputs.
constexpr int threads = 64, tile = threads + 2;

template <Fault fault>
__global__ void __launch_bounds__(threads) stencil(const float* __restrict__ input, float* output, int count) {
  float* const pixels = shared_floats();
  const int first = blockIdx.x * threads, i = threadIdx.x;
  const int readable = count + (fault == Fault::global_read ? 3 : 2);
  for (int j = i; j < tile; j += threads) {
    pixels[j] = first + j < readable ? input[first + j] : 0.0f;
  }
  if (fault == Fault::early_exit && i == 7) {
    return;
  }
  if (fault == Fault::divergent_barrier && i >= 32) {
    output[0] = 0.0f;
  } else if (fault != Fault::missing_barrier) {
    __syncthreads();
  }
  const int last = fault == Fault::shared_read ? i + 3 : i + 2;
  if (first + i < count + (fault == Fault::global_write ? 1 : 0)) {
    output[first + i] = pixels[i] + pixels[i + 1] + pixels[last];
  }
  if (fault == Fault::shared_write) {
    pixels[tile + i] = 0.0f;
  }
}

// output[block] = sum of the block's 2 * threads inputs: a tree within each warp, then over the warps.
template <Fault fault>
__global__ void block_sum(const float* input, float* output) {
  float* const of_warp = shared_floats();
  const int i = threadIdx.x, warps = threads / 32;
  const float* const own = input + blockIdx.x * 2 * threads + 2 * i;
  const float2 pair = *reinterpret_cast<const float2*>(fault == Fault::misaligned ? own + 1 : own);
  float sum = pair.x + pair.y;
  const unsigned mask = fault == Fault::shuffle_mask ? 0xffffffffu >> (i % 32) : 0xffffffffu;
  if (fault == Fault::shuffle_from_nobody && i % 32 == 31) {
    return;
  }
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    sum += fault == Fault::shuffle_from_nobody ? __shfl_xor_sync(0x7fffffffu, sum, lanes)
                                               : __shfl_down_sync(mask, sum, lanes);
  }
  if (fault == Fault::race) {
    of_warp[i % warps] = sum;  // every lane writes it, though lane 0 alone has the sum
  } else if (i % 32 == 0 && !(fault == Fault::uninitialised && i > 0)) {
    of_warp[i / 32] = sum;
  }
  if (fault == Fault::benign_race && i % 32 == 31) {
    of_warp[warps] = 0.0f;  // two threads write the same value
  }
  __syncthreads();
  if (i == 0) {
    float total = 0.0f;
    for (int warp = 0; warp < warps; ++warp) {
      total += of_warp[warp];
    }
    output[blockIdx.x] = total;
  }
}

// The same sums, and their total in output[gridDim.x], by a grid that waits for itself.
template <Fault fault>
__global__ void grid_sum(const float* input, float* output) {
  float* const value = shared_floats();
  value[threadIdx.x] =
      input[blockIdx.x * 2 * threads + 2 * threadIdx.x] + input[blockIdx.x * 2 * threads + 2 * threadIdx.x + 1];
  __syncthreads();
  if (threadIdx.x == 0) {
    float sum = 0.0f;
    for (int i = 0; i < threads; ++i) {
      sum += value[i];
    }
    output[blockIdx.x] = sum;
  }
  if (fault == Fault::grid_exit && blockIdx.x == 1) {
    return;
  }
  if (fault != Fault::missing_grid_barrier) {
    cooperative_groups::this_grid().sync();
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    float total = 0.0f;
    for (unsigned block = 0; block < gridDim.x; ++block) {
      total += output[block];
    }
    output[gridDim.x] = total;
  }
}

template <typename... Parameters, typename... Arguments>
const char* launch(void (*kernel)(Parameters...), unsigned blocks, size_t shared_bytes, bool cooperative,
                   Arguments... arguments) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.attrs = &attribute;
  config.numAttrs = cooperative ? 1 : 0;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// The kernel with `fault` planted: one instantiation for each fault.
template <int number = 0, typename F>
const char* with(Fault fault, F&& f) {
  if constexpr (number == static_cast<int>(Fault::count)) {
    return "no such fault";
  } else {
    return static_cast<int>(fault) == number ? f(std::integral_constant<Fault, static_cast<Fault>(number)>{})
                                             : with<number + 1>(fault, f);
  }
}

}  // namespace

const char* run_stencil(Fault fault, const float* input, float* output, int count) {
  return with(fault, [=](auto planted) {
    return launch(stencil<planted()>, (count + threads - 1) / threads, tile * sizeof(float), false, input, output,
                  count);
  });
}

const char* run_block_sum(Fault fault, const float* input, float* output, int blocks) {
  return with(fault, [=](auto planted) {
    return launch(block_sum<planted()>, blocks, (threads / 32 + 1) * sizeof(float), false, input, output);
  });
}

const char* run_grid_sum(Fault fault, const float* input, float* output, int blocks) {
  return with(fault, [=](auto planted) {
    const size_t shared_bytes = fault == Fault::too_much_shared ? size_t{49} << 10 : threads * sizeof(float);
    if (fault == Fault::too_many_blocks) {
      return launch(grid_sum<planted()>, 1000, shared_bytes, true, input, output);
    }
    return launch(grid_sum<planted()>, blocks, shared_bytes, fault != Fault::not_cooperative, input, output);
  });
}

}  // namespace samples
