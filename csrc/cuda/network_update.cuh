// The second phase of a training step: every gradient summed in a fixed order, every parameter updated.
//
// The dense layers' weight gradients are sums over the whole batch of input times output gradient: 118 thousand
// operations an image for LeNet-5, whose operands (2.5 KB an image) lie in the L2 cache. The convolutions' are sums of
// one row a block. Every block takes as many items (sums), and its threads share them: 134 of LeNet-5's 17,602 on 132
// multiprocessors, each by three threads, that take a third of the images or rows.
#pragma once

#include "network_images.cuh"
#include "reduction.cuh"

namespace lenet_fast::cuda {

inline constexpr int kUpdateRows = 4;     // sums of a thread: outputs of a dense layer that share their input
inline constexpr int kUpdateSlices = 16;  // threads that share an item, at most: their sums are added one by one

// Shared memory of the phase.
struct UpdateMemory {
  Update<float> updates[kMaxSlots];
  double loss;  // sum over the batch
  bool asked;   // the host did, to stop: the step is not taken, nor where the loss is not finite
  float partial[kUpdateRows * kNetworkThreads];
};

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

// Whether the step was taken. All blocks come to the same result.
__device__ inline bool update_parameters(const NetworkPlan& n, UpdateMemory& shared, int step) {
  PhaseClock clock(step);
  const int64_t batch = min(n.batch_size, n.total - step * n.batch_size);
  const int blocks = static_cast<int>(min(batch, static_cast<int64_t>(gridDim.x)));
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
      shared.loss = loss;
      shared.asked = *n.asked != 0;
      if (blockIdx.x == 0 && !shared.asked) {
        n.losses[step] = loss / static_cast<double>(batch);
        n.correct[step] = correct;
      }
      if (blockIdx.x == 0 && (shared.asked || !is_finite(loss)) && *n.stopped == 0) {
        *n.stopped = step + 1;
      }
    }
  } else if (static_cast<int>(threadIdx.x) < 32 + num_slots) {
    const int slot = threadIdx.x - 32;
    const SlotPlan& plan = n.slot[slot];
    const double count = plan.count != nullptr ? static_cast<double>(*plan.count) + step + 1 : 1.0;
    shared.updates[slot] = update_of<float>(n.settings, plan.trained, count, n.learning_rates[step]);
  }
  clock.end(Phase::loss_sum);
  if (shared.asked) {
    return false;
  }
  if (n.watch != nullptr && talks_to_host()) {
    n.watch[1 + step] = shared.loss / static_cast<double>(batch);
  }
  if (!is_finite(shared.loss)) {
    return false;
  }

  int dense_total = 0;
  for (int l = 0; l < n.num_denses; ++l) {
    dense_total += dense_items(n.dense[l]);
  }
  const int items = dense_total + n.num_sums, of_block = divide_up(items, static_cast<int>(gridDim.x));
  const int columns = divide_up(of_block, divide_up(of_block, kNetworkThreads));
  const int slices = min(kUpdateSlices, kNetworkThreads / columns);
  const int slice = threadIdx.x / columns, column = threadIdx.x % columns;
  const int begin = blockIdx.x * of_block, end = min(begin + of_block, items);
  for (int first = begin; first < end; first += columns) {
    const int item = first + column;
    const bool active = item < end && slice < slices;
    int rest = item, l = 0;
    float sums[kUpdateRows] = {};
    if (active && item < dense_total) {
      while (rest >= dense_items(n.dense[l])) {
        rest -= dense_items(n.dense[l++]);
      }
      sum_dense(sums, n.dense[l], rest, batch * slice / slices, batch * (slice + 1) / slices);
    } else if (active) {
      const int value = item - dense_total;
#pragma unroll 8
      for (int row = blocks * slice / slices; row < blocks * (slice + 1) / slices; ++row) {
        sums[0] += n.block_sums[static_cast<int64_t>(row) * n.num_sums + value];
      }
    }
    if (active) {
#pragma unroll
      for (int r = 0; r < kUpdateRows; ++r) {
        shared.partial[(slice * kUpdateRows + r) * columns + column] = sums[r];
      }
    }
    clock.end(Phase::gradient_sums);
    if (active && slice == 0) {
#pragma unroll
      for (int r = 0; r < kUpdateRows; ++r) {
        for (int s = 1; s < slices; ++s) {
          sums[r] += shared.partial[(s * kUpdateRows + r) * columns + column];
        }
      }
      if (item < dense_total) {
        const DensePlan& dense = n.dense[l];
        const int slot = 4 * n.num_convs + 2 * l;
        const int weights = divide_up(dense.out_features, kUpdateRows) * dense.in_features;
        if (rest >= weights) {
          if (n.slot[slot + 1].value != nullptr) {
            update_value(n.slot[slot + 1], shared.updates[slot + 1], rest - weights, sums[0]);
          }
        } else {
          const int in = rest % dense.in_features, out = rest / dense.in_features * kUpdateRows;
#pragma unroll
          for (int r = 0; r < kUpdateRows; ++r) {
            if (out + r < dense.out_features) {
              update_value(n.slot[slot], shared.updates[slot], static_cast<int64_t>(out + r) * dense.in_features + in,
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
          update_value(n.slot[slot], shared.updates[slot], value, sums[0]);
        }
      }
    }
    clock.end(Phase::update);
    clock.next_round();
  }
  return true;
}

}  // namespace lenet_fast::cuda
