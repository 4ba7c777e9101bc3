// The CUDA kernels as the binding sees them: parameter structs of plain pointers, a workspace, a stream.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>

#include "../geometry.h"

namespace lenet_fast::cuda {

template <typename S>
struct ConvActPoolForward {
  ConvGeometry geometry;                  // its connections are host memory
  bool dense;                             // all connections
  const S *input, *weight, *bias;         // bias may be null
  const S *coefficient, *subsample_bias;  // (out_channels) for Pool::subsample
  S* output;
};

// Gradients of the parameters; null: not wanted.
template <typename S>
struct ParameterGradients {
  S *weight, *bias, *coefficient, *subsample_bias;
};

template <typename S>
struct ConvActPoolBackward {
  ConvGeometry geometry;
  bool dense;
  const S *grad_output, *input, *weight, *bias, *coefficient, *subsample_bias;
  S* grad_input;  // null: not wanted
  ParameterGradients<S> grads;
};

// The functions queue work on `stream` and return at once: no synchronisation, no read of device memory, no allocation.
// The workspace is `workspace_bytes` long, aligned to 16 bytes, and needs no initial value. S: float, double, __half
// or __nv_bfloat16; the last two are computed in float. Throws std::runtime_error where CUDA reports an error.
template <typename S>
struct ConvActPool {
  static size_t workspace_bytes(const ConvActPoolForward<S>& p);
  static size_t workspace_bytes(const ConvActPoolBackward<S>& p);
  static void run(const ConvActPoolForward<S>& p, void* workspace, cudaStream_t stream);
  static void run(const ConvActPoolBackward<S>& p, void* workspace, cudaStream_t stream);
};

}  // namespace lenet_fast::cuda
