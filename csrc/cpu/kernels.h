// What every instruction-set variant of the CPU kernels offers, and the choice between them.
#pragma once

#include <cstddef>

#include "bands.h"

namespace lenet_fast::cpu {

template <typename T>
struct ConvActPoolForward {
  ConvGeometry geometry;
  Bands bands;                            // of `geometry`
  const T *input, *weight, *bias;         // bias may be null
  const T *coefficient, *subsample_bias;  // (out_channels) for Pool::subsample
  T* output;
  T* record;  // what backward can use instead of recomputing it, `record_size` values a block; null: not wanted
};

// Where this range of bands puts its sums; null: not wanted.
template <typename T>
struct ParameterSums {
  T *weight, *bias, *coefficient, *subsample_bias;
};

template <typename T>
struct ConvActPoolBackward {
  ConvGeometry geometry;
  Bands bands;
  const T *grad_output, *input, *weight, *bias, *coefficient, *subsample_bias;
  const T* record;  // of forward, aligned to 64 bytes; null: recompute it
  T* grad_input;    // of the bands' pieces, for merge_bands unless an image is one band; null: not wanted
  ParameterSums<T> sums;
};

// Work on bands [begin, end) of the batch in blocks of `lanes`; begin is a multiple of `lanes`. Sizes are those of
// bands.piece. The workspace is `workspace_bytes` long, aligned to 64 bytes, and needs no initial value.
template <typename T>
struct ConvActPoolKernels {
  int64_t lanes;
  int64_t (*record_size)(const ConvGeometry& piece);
  size_t (*forward_workspace_bytes)(const ConvGeometry& piece);
  size_t (*backward_workspace_bytes)(const ConvGeometry& piece);
  void (*forward)(const ConvActPoolForward<T>&, int64_t begin, int64_t end, void* workspace);
  void (*backward)(const ConvActPoolBackward<T>&, int64_t begin, int64_t end, void* workspace);
};

struct Kernels {
  const char* isa;
  ConvActPoolKernels<float> conv_act_pool_float;
  ConvActPoolKernels<double> conv_act_pool_double;

  template <typename T>
  const ConvActPoolKernels<T>& conv_act_pool() const {
    if constexpr (sizeof(T) == sizeof(float)) {
      return conv_act_pool_float;
    } else {
      return conv_act_pool_double;
    }
  }
};

namespace portable {
extern const Kernels kernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
#endif

}  // namespace lenet_fast::cpu
