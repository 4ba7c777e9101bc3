// A training run as the device sees it: the network's layers with their places in shared memory, the images, the
// optimizer. Passed by value; no torch.
#pragma once

#include <cstdint>

#include "../dropout.h"
#include "layer.cuh"

namespace lenet_fast::cuda {

// Output maps a thread computes in a window.
inline constexpr int kNetworkMaps = 2;
inline constexpr int kNetworkThreads = 512;

// A convolution. Offsets are in floats from the start of shared memory; planes hold one image.
struct ConvPlan {
  AnyLayer<0> layer;
  Activation activation;
  Pool pool;
  int out_height, out_width;
  const int32_t* indices;  // (out, in) of the connections, null: all
  const int32_t* pairs;    // (num_pairs, 3): input map, two output maps (the second perhaps -1) that use it
  int num_pairs, num_weights;
  // Padded input. Rows are aligned for loads of four values.
  int pixels, stride, plane;
  // Pre-activations, then their gradients, with a border for the input gradient.
  int grads, grad_stride, grad_plane, grad_origin, grad_border;
  int grad_output;                        // (out_channels, out_height, out_width)
  int weights, flipped, masks, in_masks;  // staged for a step
  int sums;                               // weight, bias, coefficient, subsample_bias, summed over a block's images
  int groups() const { return divide_up(layer.out_channels, kNetworkMaps); }
  __host__ __device__ int num_sums() const { return num_weights + 3 * layer.out_channels; }
};

struct DensePlan {
  int in_features, out_features;
  Activation activation;
  int input, z;                  // in shared memory; the output is the next layer's input
  int grad_input;                // of this layer's input
  float *inputs, *grad_outputs;  // (batch, features) of a whole step, in global memory
};

struct SlotPlan {
  float *value, *first, *second;  // value null: absent
  float* count;                   // steps taken, null: not counted
  bool trained;
};

struct NetworkPlan {
  int num_convs, num_denses, classes;
  bool distances;
  ConvPlan conv[kMaxConvs];
  DensePlan dense[kMaxDenses];
  int output;       // of the last dense layer, in shared memory
  int grad_output;  // its gradient
  int scores;       // (classes), and their gradients
  const float* codes;
  int update;  // UpdateMemory: from here on, a step's two phases have the memory in turn
  int shared_floats;

  SlotPlan slot[kMaxSlots];
  OptimizerSettings settings;

  const void* images;
  bool are_bytes;
  int image_height, image_width;  // of bytes; centred in the first convolution's input
  float scale, background;
  const int64_t *labels, *order;          // order null: as they lie
  int64_t num_images, total, batch_size;  // total: of `order`
  float extra_score;                      // -j
  float label_smoothing;
  Dropout<float> dropout;  // of the first step, from whose index on the later ones are counted

  int steps;
  const double* learning_rates;  // (steps)
  double* losses;                // (steps)
  int64_t* correct;              // (steps)
  int32_t* stopped;              // 1 + the number of steps taken when the run ends before its last one, else 0
  int32_t* asked;                // whether to stop before this step, as the last block saw it
  int32_t* images_step;          // that the phase is at, where it is a launch of its own
  int32_t* update_step;          // likewise
  volatile double* watch;        // (1 + steps) in the host's memory: asks to stop; losses, see TrainingRun. Or null
  float* block_sums;             // (blocks, num_sums of all convolutions)
  double* block_losses;          // (blocks)
  int32_t* block_correct;        // (blocks)
  int num_sums;
};

}  // namespace lenet_fast::cuda
