// What every instruction-set variant of the CPU kernels offers, and the choice between them.
#pragma once

#include <cstddef>

#include "../dropout.h"
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

// Between the two phases of a step, per dense layer: the gradient of the outputs before the activation, a row of
// `grads_stride` images a feature, and the inputs, a row of `inputs_stride` features an image.
template <typename T>
struct DenseSums {
  T *grads, *inputs;
  int64_t grads_stride, inputs_stride;
};

// One chunk of the images of one step. A step has several when the batch is large; the gradients of all add up.
template <typename T>
struct TrainingStep {
  const Network<T>* network;
  Images<T> images;
  const int64_t* labels;            // by position in the order
  int64_t chunk_begin, chunk_size;  // positions in the order
  bool first_chunk, last_chunk;
  int64_t first_image;  // of the chunk, counted in the step's batch
  T factor;             // 1 / images of the batch
  T extra_score;        // of Output::distances
  double label_smoothing;
  Dropout<T> dropout;  // of this step
  char* thread_memory;
  int64_t thread_stride, threads;
  DenseSums<T> dense_sums[kMaxDenses];
  double* losses;    // (threads) summed over the images
  int64_t* correct;  // (threads)
};

// `memory` is `thread_bytes` long and aligned to 64 bytes; `prepare` gives it its initial value.
template <typename T>
struct NetworkKernels {
  int64_t lanes;
  size_t (*thread_bytes)(const NetworkGeometry&, bool training);
  void (*prepare)(const Network<T>&, const Images<T>&, bool training, void* memory);
  // Images [begin, end) of the chunk by one thread; begin is a multiple of `lanes`.
  void (*train)(const TrainingStep<T>&, int64_t begin, int64_t end, int64_t thread);
  // Part `part` of `parts` of every parameter.
  void (*update)(const TrainingStep<T>&, int64_t part, int64_t parts);
  void (*infer)(const Network<T>&, const Images<T>&, int64_t begin, int64_t end, T* output, void* memory);
  // The same for a few floating images in their order; `memory` needs no initial value.
  size_t (*few_bytes)(const NetworkGeometry&);
  void (*infer_few)(const Network<T>&, const T* images, int64_t count, T* output, void* memory);
  // A whole step on at most lanes / 2 images, on one thread; `memory` needs no initial value.
  size_t (*few_training_bytes)(const NetworkGeometry&, int64_t images);
  void (*train_few)(const TrainingStep<T>&, void* memory);
};

struct Kernels {
  const char* isa;
  ConvActPoolKernels<float> conv_act_pool_float;
  ConvActPoolKernels<double> conv_act_pool_double;
  NetworkKernels<float> network_float;
  NetworkKernels<double> network_double;

  template <typename T>
  const ConvActPoolKernels<T>& conv_act_pool() const {
    if constexpr (sizeof(T) == sizeof(float)) {
      return conv_act_pool_float;
    } else {
      return conv_act_pool_double;
    }
  }

  template <typename T>
  const NetworkKernels<T>& network() const {
    if constexpr (sizeof(T) == sizeof(float)) {
      return network_float;
    } else {
      return network_double;
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

// The variant in use, chosen at the first call.
const Kernels& kernels();

}  // namespace lenet_fast::cpu
