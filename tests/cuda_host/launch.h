// A launch as it waits in a graph, or runs.
#pragma once

#include <functional>
#include <string>

#include "cuda_runtime.h"

namespace cuda_host {

struct Launch {
  dim3 grid, block;
  size_t shared_bytes;
  bool cooperative;
  const void* kernel;
  std::function<void()> thread;
};

cudaError_t run(const Launch& launch);
bool is_capturing(cudaStream_t stream);
cudaError_t record(const Launch& launch, cudaStream_t capturing);
// A line for the file CUDA_HOST_LAUNCHES: threads and bytes of dynamic shared memory of a block, and the kernel.
void log(size_t threads, size_t shared_bytes, const std::string& what);
// For cudaGetLastError; returns `error`.
cudaError_t remember(cudaError_t error);

}  // namespace cuda_host
