// Training steps of a whole network on the GPU, as the binding sees them.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <vector>

#include "../dropout.h"

namespace lenet_fast::cuda {

struct TrainingRun {
  Network<float> network;    // values and moments; gradients unused
  float* counts[kMaxSlots];  // steps taken before, by slot; null where not counted
  bool trained[kMaxSlots];
  OptimizerSettings settings;
  Images<float> images;
  int64_t num_images, total, batch_size;  // total: images in all steps together
  const int64_t* labels;
  float extra_score, label_smoothing;
  Dropout<float> dropout;              // of the first step
  std::vector<double> learning_rates;  // one a step
  double* losses;                      // (steps): of a step that was not taken, and of all after it, NaN
  int64_t* correct;                    // (steps)
  // (1 + steps) in the host's memory, where it can read and write while the steps run, or null. The first: not 0 asks
  // to stop, before the step that sees it is taken. The others: the loss of each step as soon as it is known. Where a
  // launch takes a phase only, the first few hundred steps alone are taken, so that asking has an effect.
  double* watch;
};

// Why the kernels cannot take this network; null when they can.
const char* why_unsupported(const NetworkGeometry& geometry);
size_t workspace_bytes(const TrainingRun& run);
// Queues the steps on `stream`, in one launch where the device takes a cooperative one of that size.
void train(const TrainingRun& run, void* workspace, cudaStream_t stream);

}  // namespace lenet_fast::cuda
