// The block's dynamic shared memory: the one declaration of it.
#pragma once

#include <cuda_runtime.h>

namespace lenet_fast::cuda {

__device__ inline unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char lenet_fast_shared[];
  return lenet_fast_shared;
}

}  // namespace lenet_fast::cuda
