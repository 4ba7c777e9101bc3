// The second phase of a training step: every gradient summed in a fixed order, every parameter updated.
//
// The dense layers' weight gradients are sums over the whole batch of input times output gradient: 118 thousand
// operations an image for LeNet-5, whose operands (2.5 KB an image) lie in the L2 cache. The convolutions' are sums of
// one row a block. Four threads share what they sum, each a quarter of the images or rows.
#pragma once

#include "network_plan.h"
#include "reduction.cuh"

namespace lenet_fast::cuda {

inline constexpr int kUpdateSlices = 4, kUpdateRows = 4;
inline constexpr int kUpdateItems = kNetworkThreads / kUpdateSlices;

// The definitions of torch.optim, in its order of operations.
__device__ inline void update_value(const SlotPlan& slot, const Update<float>& u, int64_t i, float grad) {
  if (u.frozen) {
    return;
  }
  float value = slot.value[i];
  if (u.optimizer == Optimizer::adamw) {
    value = value * u.shrink;
  } else {
    grad = grad + u.weight_decay * value;
  }
  if (u.optimizer == Optimizer::sgd) {
    if (slot.first != nullptr) {
      const float velocity = u.momentum * slot.first[i] + grad;
      slot.first[i] = velocity;
      grad = u.nesterov ? grad + u.momentum * velocity : velocity;
    }
    value = value - u.rate * grad;
  } else {
    const float mean = slot.first[i] + u.one_minus_beta1 * (grad - slot.first[i]);
    const float square = u.beta2 * slot.second[i] + u.one_minus_beta2 * grad * grad;
    slot.first[i] = mean;
    slot.second[i] = square;
    value = value - u.rate * (mean / (sqrtf(square) / u.correction + u.epsilon));
  }
  slot.value[i] = value;
}

// Sums of a slice of images for one item of a dense layer: kUpdateRows outputs and one input, or one bias.
__device__ __forceinline__ void sum_dense(float (&sums)[kUpdateRows], const DensePlan& dense, int item, int64_t first,
                                          int64_t last) {
  const int in = item % dense.in_features, out = item / dense.in_features * kUpdateRows;
  const bool is_bias = out >= round_up(dense.out_features, kUpdateRows);  // items beyond the weight
  if (is_bias) {
    const int map = item - divide_up(dense.out_features, kUpdateRows) * dense.in_features;
    for (int64_t image = first; image < last; ++image) {
      sums[0] += dense.grad_outputs[image * dense.out_features + map];
    }
    return;
  }
  const int rows = min(kUpdateRows, dense.out_features - out);
#pragma unroll 4
  for (int64_t image = first; image < last; ++image) {
    const float input = dense.inputs[image * dense.in_features + in];
    const float* const grads = dense.grad_outputs + image * dense.out_features + out;
#pragma unroll
    for (int r = 0; r < kUpdateRows; ++r) {
      sums[r] += r < rows ? input * grads[r] : 0.0f;
    }
  }
}

__device__ inline int dense_items(const DensePlan& dense) {
  return divide_up(dense.out_features, kUpdateRows) * dense.in_features + dense.out_features;
}

__device__ inline bool is_finite(double value) { return value - value == 0.0; }

// Whether the step was taken: it is not when the loss is not finite. All blocks come to the same result.
__device__ inline bool update_parameters(const NetworkPlan& n, float* shared, int step) {
  const int64_t batch = min(n.batch_size, n.total - step * n.batch_size);
  const int blocks = static_cast<int>(min(batch, static_cast<int64_t>(gridDim.x)));
  Update<float>* const updates = reinterpret_cast<Update<float>*>(shared);
  double* const total = reinterpret_cast<double*>(updates + kMaxSlots);
  float* const partial = reinterpret_cast<float*>(total + 2);
  const int num_slots = 4 * n.num_convs + 2 * n.num_denses;
  if (threadIdx.x < 32) {
    double loss = 0;
    int correct = 0;
    for (int block = threadIdx.x; block < blocks; block += 32) {
      loss += n.block_losses[block];
      correct += n.block_correct[block];
    }
    loss = warp_sum(loss);
    correct = warp_sum(correct);
    if (threadIdx.x == 0) {
      total[0] = loss;
      if (blockIdx.x == 0) {
        n.losses[step] = loss / static_cast<double>(batch);
        n.correct[step] = correct;
        if (!is_finite(loss)) {
          *n.stopped = step + 1;
        }
      }
    }
  } else if (static_cast<int>(threadIdx.x) < 32 + num_slots) {
    const int slot = threadIdx.x - 32;
    const SlotPlan& plan = n.slot[slot];
    const double count = plan.count != nullptr ? static_cast<double>(*plan.count) + step + 1 : 1.0;
    updates[slot] = update_of<float>(n.settings, plan.trained, count, n.learning_rates[step]);
  }
  __syncthreads();
  if (!is_finite(total[0])) {
    return false;
  }

  int dense_total = 0;
  for (int l = 0; l < n.num_denses; ++l) {
    dense_total += dense_items(n.dense[l]);
  }
  const int items = dense_total + n.num_sums;
  const int slice = threadIdx.x / kUpdateItems, item_in_block = threadIdx.x % kUpdateItems;
  for (int first = blockIdx.x * kUpdateItems; first < items; first += gridDim.x * kUpdateItems) {
    const int item = first + item_in_block;
    int rest = item, l = 0;
    float sums[kUpdateRows] = {};
    if (item < dense_total) {
      while (rest >= dense_items(n.dense[l])) {
        rest -= dense_items(n.dense[l++]);
      }
      sum_dense(sums, n.dense[l], rest, batch * slice / kUpdateSlices, batch * (slice + 1) / kUpdateSlices);
    } else if (item < items) {
      const int column = item - dense_total;
#pragma unroll 8
      for (int row = blocks * slice / kUpdateSlices; row < blocks * (slice + 1) / kUpdateSlices; ++row) {
        sums[0] += n.block_sums[static_cast<int64_t>(row) * n.num_sums + column];
      }
    }
#pragma unroll
    for (int r = 0; r < kUpdateRows; ++r) {
      partial[(slice * kUpdateRows + r) * kUpdateItems + item_in_block] = sums[r];
    }
    __syncthreads();
    if (slice == 0 && item < items) {
#pragma unroll
      for (int r = 0; r < kUpdateRows; ++r) {
        for (int s = 1; s < kUpdateSlices; ++s) {
          sums[r] += partial[(s * kUpdateRows + r) * kUpdateItems + item_in_block];
        }
      }
      if (item < dense_total) {
        const DensePlan& dense = n.dense[l];
        const int slot = 4 * n.num_convs + 2 * l;
        const int weights = divide_up(dense.out_features, kUpdateRows) * dense.in_features;
        if (rest >= weights) {
          if (n.slot[slot + 1].value != nullptr) {
            update_value(n.slot[slot + 1], updates[slot + 1], rest - weights, sums[0]);
          }
        } else {
          const int in = rest % dense.in_features, out = rest / dense.in_features * kUpdateRows;
#pragma unroll
          for (int r = 0; r < kUpdateRows; ++r) {
            if (out + r < dense.out_features) {
              update_value(n.slot[slot], updates[slot], static_cast<int64_t>(out + r) * dense.in_features + in,
                           sums[r]);
            }
          }
        }
      } else {
        int value = item - dense_total, conv = 0;
        while (value >= n.conv[conv].num_sums()) {
          value -= n.conv[conv++].num_sums();
        }
        int slot = 4 * conv;
        if (value >= n.conv[conv].num_weights) {
          value -= n.conv[conv].num_weights;
          slot += 1 + value / n.conv[conv].layer.out_channels;
          value %= n.conv[conv].layer.out_channels;
        }
        if (n.slot[slot].value != nullptr) {
          update_value(n.slot[slot], updates[slot], value, sums[0]);
        }
      }
    }
    __syncthreads();
  }
  return true;
}

// Bytes of shared memory that update_parameters takes.
inline constexpr size_t kUpdateSharedBytes =
    kMaxSlots * sizeof(Update<float>) + 2 * sizeof(double) + kUpdateSlices * kUpdateRows * kUpdateItems * sizeof(float);

}  // namespace lenet_fast::cuda
