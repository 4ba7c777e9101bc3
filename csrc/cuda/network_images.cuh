// The first phase of a training step: a block takes images one after another through forward, loss and backward.
//
// Per image of LeNet-5: 2.26 million operations. Activations stay in shared memory; what leaves it is 2.5 KB of dense
// layers' inputs and output gradients, and once a block the sums of the convolutions' gradients (10 KB).
#pragma once

#include "drop.cuh"
#include "network_plan.h"
#include "phase_clock.cuh"
#include "reduction.cuh"
#include "window.cuh"

namespace lenet_fast::cuda {

__device__ inline AnyTable table_of(const ConvPlan& conv, bool transposed) {
  return {conv.indices, conv.layer.in_channels, transposed};
}

// The pixels of a convolution's input inside the padding.
__device__ inline float* inner_planes(const ConvPlan& conv, float* shared) {
  return shared + conv.pixels + conv.layer.padding * (conv.stride + 1);
}

// The margin of a smaller image is background, the padding around it 0.
__device__ inline void fill_background(const NetworkPlan& n, float* shared) {
  const ConvPlan& first = n.conv[0];
  const AnyLayer<0>& layer = first.layer;
  float* const interior = inner_planes(first, shared);
  const int area = layer.height * layer.width;
  for (int i = threadIdx.x; i < layer.in_channels * area; i += blockDim.x) {
    interior[i / area * first.plane + i % area / layer.width * first.stride + i % layer.width] = n.background;
  }
}

// Once a launch: what no image overwrites.
__device__ inline void clear_borders(const NetworkPlan& n, float* shared) {
  fill_zero(shared, n.shared_floats);
  __syncthreads();
  if (n.are_bytes) {
    fill_background(n, shared);
  }
}

// Once a step: the convolutions' weights as the register tiles read them, and empty sums.
__device__ inline void stage_convolutions(const NetworkPlan& n, float* shared) {
  for (int l = 0; l < n.num_convs; ++l) {
    const ConvPlan& conv = n.conv[l];
    const int in = conv.layer.in_channels, out = conv.layer.out_channels, K = conv.layer.kernel_size;
    const WeightTile tile{divide_up(out, kNetworkMaps), 0, in, 0, K, 0};
    stage_weights<kNetworkMaps, false>(shared + conv.weights, reinterpret_cast<unsigned*>(shared + conv.masks), tile,
                                       n.slot[4 * l].value, table_of(conv, false), in, out, K);
    if (l > 0) {
      const WeightTile turned{divide_up(in, kNetworkMaps), 0, out, 0, K, 0};
      stage_weights<kNetworkMaps, true>(shared + conv.flipped, reinterpret_cast<unsigned*>(shared + conv.in_masks),
                                        turned, n.slot[4 * l].value, table_of(conv, true), out, in, K);
    }
    fill_zero(shared + conv.sums, conv.num_sums());
  }
}

// Where there is dropout, some of the background around the last image may have been dropped.
__device__ inline void load_image(const NetworkPlan& n, float* shared, int64_t index, bool has_dropout) {
  const ConvPlan& first = n.conv[0];
  const AnyLayer<0>& layer = first.layer;
  float* const interior = inner_planes(first, shared);
  if (n.are_bytes) {
    if (has_dropout && n.dropout.at[0].is_active()) {
      fill_background(n, shared);
      __syncthreads();
    }
    const int area = n.image_height * n.image_width, pixels = layer.in_channels * area;
    const auto* const bytes = static_cast<const uint8_t*>(n.images) + index * pixels;
    const int top = (layer.height - n.image_height) / 2, left = (layer.width - n.image_width) / 2;
    for (int i = threadIdx.x; i < pixels; i += blockDim.x) {
      interior[i / area * first.plane + (top + i % area / n.image_width) * first.stride + left + i % n.image_width] =
          n.scale * static_cast<float>(bytes[i]) + n.background;
    }
  } else {
    const int area = layer.height * layer.width;
    const auto* const values = static_cast<const float*>(n.images) + index * layer.in_channels * area;
    for (int i = threadIdx.x; i < layer.in_channels * area; i += blockDim.x) {
      interior[i / area * first.plane + i % area / layer.width * first.stride + i % layer.width] = values[i];
    }
  }
}

// z[m] of the maps of a group over all its input channels.
template <int K>
__device__ __forceinline__ void convolve_channels(float (&z)[kNetworkMaps][4], const float* corner, int stride,
                                                  int plane, const float* weights, const unsigned* masks, int group,
                                                  int channels, int kernel_size) {
  const int taps = kernel_size * kernel_size * kNetworkMaps;
  for (int c = 0; c < channels; ++c) {
    const int pair = group * channels + c;
    convolve_connected<kNetworkMaps, K>(z, masks[pair], corner + c * plane, stride, weights + pair * taps, kernel_size,
                                        kernel_size);
  }
}

// Pre-activations into conv.grads, pooled outputs into `next`: planes of `next_plane` in rows of `next_stride`.
template <int K>
__device__ void convolve_forward(const NetworkPlan& n, int l, float* shared, float* next, int next_stride,
                                 int next_plane) {
  const ConvPlan& conv = n.conv[l];
  const AnyLayer<0>& layer = conv.layer;
  const SlotPlan* const slot = n.slot + 4 * l;
  const int columns = divide_up(layer.conv_width, 2), windows = divide_up(layer.conv_height, 2) * columns;
  const int groups = divide_up(layer.out_channels, kNetworkMaps);
  for (int job = threadIdx.x; job < groups * windows; job += kNetworkThreads) {
    const int group = job / windows, y = job % windows / columns, x = job % columns;
    float z[kNetworkMaps][4];
#pragma unroll
    for (int m = 0; m < kNetworkMaps; ++m) {
      const int map = group * kNetworkMaps + m;
      const float start = slot[1].value != nullptr && map < layer.out_channels ? slot[1].value[map] : 0.0f;
      z[m][0] = z[m][1] = z[m][2] = z[m][3] = start;
    }
    convolve_channels<K>(z, shared + conv.pixels + 2 * y * conv.stride + 2 * x, conv.stride, conv.plane,
                         shared + conv.weights, reinterpret_cast<const unsigned*>(shared + conv.masks), group,
                         layer.in_channels, layer.kernel_size);
    with_activation(conv.activation, [&](auto A) {
#pragma unroll
      for (int m = 0; m < kNetworkMaps; ++m) {
        const int map = group * kNetworkMaps + m;
        if (map >= layer.out_channels) {
          return;
        }
        float* const keep =
            shared + conv.grads + map * conv.grad_plane + conv.grad_origin + 2 * y * conv.grad_stride + 2 * x;
        *reinterpret_cast<Pack<float, 2>*>(keep) = {z[m][0], z[m][1]};
        *reinterpret_cast<Pack<float, 2>*>(keep + conv.grad_stride) = {z[m][2], z[m][3]};
        float* const plane = next + map * next_plane;
        if (conv.pool == Pool::none) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            if (2 * y + i / 2 < conv.out_height && 2 * x + i % 2 < conv.out_width) {
              plane[(2 * y + i / 2) * next_stride + 2 * x + i % 2] = activate<A.value>(z[m][i]);
            }
          }
        } else {
          Subsample<float> subsample{0.0f, 0.0f};
          if (conv.pool == Pool::subsample) {
            subsample = {slot[2].value[map], slot[3].value[map]};
          }
          plane[y * next_stride + x] = pool_window<A.value>(z[m], conv.pool, subsample);
        }
      }
    });
  }
}

// conv.grads from pre-activations to their gradients, given conv.grad_output; a warp takes a map, and adds to its sums.
__device__ inline void differentiate(const NetworkPlan& n, int l, float* shared) {
  const ConvPlan& conv = n.conv[l];
  const AnyLayer<0>& layer = conv.layer;
  const SlotPlan* const slot = n.slot + 4 * l;
  const int columns = divide_up(layer.conv_width, 2), windows = divide_up(layer.conv_height, 2) * columns;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int map = warp; map < layer.out_channels; map += kNetworkThreads / 32) {
    float sums[3] = {0.0f, 0.0f, 0.0f};
    Subsample<float> subsample{0.0f, 0.0f};
    if (conv.pool == Pool::subsample) {
      subsample = {slot[2].value[map], slot[3].value[map]};
    }
    const float* const grad_output = shared + conv.grad_output + map * conv.out_height * conv.out_width;
    with_activation(conv.activation, [&](auto A) {
      for (int window = lane; window < windows; window += 32) {
        const int y = window / columns, x = window % columns;
        float* const at =
            shared + conv.grads + map * conv.grad_plane + conv.grad_origin + 2 * y * conv.grad_stride + 2 * x;
        float z[4] = {at[0], at[1], at[conv.grad_stride], at[conv.grad_stride + 1]};
        float grad[4];
        load_gradients(grad, grad_output, conv.pool, conv.out_height, conv.out_width, y, x);
        const auto of_subsample = differentiate_window<A.value>(z, grad, conv.pool, subsample);
#pragma unroll
        for (int i = 0; i < 4; ++i) {  // beyond an odd last row or column there is nothing
          z[i] = 2 * y + i / 2 < layer.conv_height && 2 * x + i % 2 < layer.conv_width ? z[i] : 0.0f;
          at[i / 2 * conv.grad_stride + i % 2] = z[i];
        }
        sums[0] += (z[0] + z[1]) + (z[2] + z[3]);
        sums[1] += of_subsample.coefficient;
        sums[2] += of_subsample.bias;
      }
    });
#pragma unroll
    for (int kind = 0; kind < 3; ++kind) {
      const float sum = warp_sum(sums[kind]);
      if (lane == 0) {
        shared[conv.sums + conv.num_weights + kind * layer.out_channels + map] += sum;
      }
    }
  }
}

// Adds to conv.sums. An owner is (pair of maps, row of taps, up to `taps` of its columns); `slices` neighbouring lanes
// share one, each some rows of outputs.
template <int K>
__device__ void add_weight_gradient(const ConvPlan& conv, float* shared) {
  constexpr int taps = K > 0 ? K : 4;
  const AnyLayer<0>& layer = conv.layer;
  const int kernel_size = layer.kernel_size, chunks = divide_up(kernel_size, taps);
  const int owners = conv.num_pairs * kernel_size * chunks;
  int slices = 1;
  while (slices < 32 && 2 * slices * owners <= kNetworkThreads && 2 * slices <= layer.conv_height) {
    slices *= 2;
  }
  for (int job = threadIdx.x; job < round_up(owners * slices, 32); job += kNetworkThreads) {
    const int owner = job / slices, slice = job % slices;
    const bool active = owner < owners;
    const int chunk = owner % chunks, ky = owner / chunks % kernel_size, first_kx = chunk * taps;
    const int32_t* const pair = conv.pairs + (active ? owner / chunks / kernel_size * 3 : 0);
    float sums[2][taps] = {};
    if (active) {
      const float* const grads = shared + conv.grads + conv.grad_origin;
      accumulate_weight_gradient<taps>(sums, grads + pair[1] * conv.grad_plane,
                                       grads + (pair[2] < 0 ? pair[1] : pair[2]) * conv.grad_plane, conv.grad_stride,
                                       shared + conv.pixels + pair[0] * conv.plane + ky * conv.stride + first_kx,
                                       conv.stride, layer.conv_height, layer.conv_width, slice, slices);
    }
#pragma unroll
    for (int i = 0; i < 2 * taps; ++i) {
      float sum = sums[i / taps][i % taps];
      for (int distance = 1; distance < slices; distance *= 2) {
        sum += __shfl_xor_sync(0xffffffffu, sum, distance);
      }
      const int out = active ? pair[1 + i / taps] : -1;
      if (slice == 0 && out >= 0 && first_kx + i % taps < kernel_size) {
        const int connection = table_of(conv, false).index(out, pair[0]);
        shared[conv.sums + (connection * kernel_size + ky) * kernel_size + first_kx + i % taps] += sum;
      }
    }
  }
}

// The gradient of the convolution's input, which is the previous one's pooled output.
template <int K>
__device__ void input_gradient(const ConvPlan& conv, float* shared, float* target) {
  const AnyLayer<0>& layer = conv.layer;
  const int columns = divide_up(layer.width, 2), windows = divide_up(layer.height, 2) * columns;
  const int groups = divide_up(layer.in_channels, kNetworkMaps);
  for (int job = threadIdx.x; job < groups * windows; job += kNetworkThreads) {
    const int group = job / windows, y = job % windows / columns, x = job % columns;
    float grad[kNetworkMaps][4] = {};
    const float* const corner = shared + conv.grads + conv.grad_origin - conv.grad_border * (conv.grad_stride + 1) +
                                2 * y * conv.grad_stride + 2 * x;
    convolve_channels<K>(grad, corner, conv.grad_stride, conv.grad_plane, shared + conv.flipped,
                         reinterpret_cast<const unsigned*>(shared + conv.in_masks), group, layer.out_channels,
                         layer.kernel_size);
#pragma unroll
    for (int i = 0; i < 4 * kNetworkMaps; ++i) {
      const int map = group * kNetworkMaps + i / 4, row = 2 * y + i % 4 / 2, column = 2 * x + i % 2;
      if (map < layer.in_channels && row < layer.height && column < layer.width) {
        target[(map * layer.height + row) * layer.width + column] = grad[i / 4][i % 4];
      }
    }
  }
}

// z and output of a dense layer; a warp takes four outputs at a time.
__device__ inline void dense_forward(const NetworkPlan& n, int l, float* shared, float* output) {
  constexpr int rows = 4;
  const DensePlan& dense = n.dense[l];
  const SlotPlan* const slot = n.slot + 4 * n.num_convs + 2 * l;
  const float* const input = shared + dense.input;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int first = warp * rows; first < dense.out_features; first += kNetworkThreads / 32 * rows) {
    float sums[rows] = {};
    for (int i = lane; i < dense.in_features; i += 32) {
      const float value = input[i];
#pragma unroll
      for (int r = 0; r < rows; ++r) {
        if (first + r < dense.out_features) {
          sums[r] += value * slot[0].value[static_cast<int64_t>(first + r) * dense.in_features + i];
        }
      }
    }
#pragma unroll
    for (int r = 0; r < rows; ++r) {
      const float sum = warp_sum(sums[r]);
      const int out = first + r;
      if (lane == r && out < dense.out_features) {
        const float z = slot[1].value != nullptr ? sum + slot[1].value[out] : sum;
        shared[dense.z + out] = z;
        with_activation(dense.activation, [&](auto A) { output[out] = activate<A.value>(z); });
      }
    }
  }
}

// grad_output becomes the gradient of the pre-activation z. It and the input go to global memory for the weight
// gradient, the gradient of the input goes to shared memory. Where some of the output was dropped, the derivative of
// the activation takes the output from z again.
__device__ inline void dense_backward(const NetworkPlan& n, int l, float* shared, const float* output,
                                      float* grad_output, int64_t image, bool has_dropout, const PhaseClock& clock) {
  const DensePlan& dense = n.dense[l];
  const float* const weight = n.slot[4 * n.num_convs + 2 * l].value;
  const bool is_masked = has_dropout && n.dropout.at[n.num_convs + l + 1].is_active();
  for (int out = threadIdx.x; out < dense.out_features; out += kNetworkThreads) {
    with_activation(dense.activation, [&](auto A) {
      const float z = shared[dense.z + out];
      const float grad = grad_output[out] * derivative<A.value>(z, is_masked ? activate<A.value>(z) : output[out]);
      grad_output[out] = grad;
      dense.grad_outputs[image * dense.out_features + out] = grad;
    });
  }
  clock.end(Phase::dense_activation, l);
  for (int in = threadIdx.x; in < dense.in_features; in += kNetworkThreads) {
    dense.inputs[image * dense.in_features + in] = shared[dense.input + in];
    float sum = 0.0f;
#pragma unroll 8
    for (int out = 0; out < dense.out_features; ++out) {
      sum += weight[static_cast<int64_t>(out) * dense.in_features + in] * grad_output[out];
    }
    shared[dense.grad_input + in] = sum;
  }
}

struct ImageLoss {
  double loss = 0;
  int correct = 0;
};

// Scores of the classes: the output, or the negative distances from the codes.
__device__ inline void score(const NetworkPlan& n, float* shared) {
  const int features = n.dense[n.num_denses - 1].out_features;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int c = warp; c < n.classes; c += kNetworkThreads / 32) {
    if (n.distances) {
      float sum = 0.0f;
      for (int i = lane; i < features; i += 32) {
        const float difference = shared[n.output + i] - n.codes[c * features + i];
        sum += difference * difference;
      }
      sum = warp_sum(sum);
      if (lane == 0) {
        shared[n.scores + c] = -sum;
      }
    } else if (lane == 0) {
      shared[n.scores + c] = shared[n.output + c];
    }
  }
}

// Softmax cross-entropy of the scores, by one warp: LeCun et al. (1998), equation (9), where there is one score more,
// that no image belongs to; label smoothing as in cpu/loss_block.h. The scores become their gradients. A label out of
// range makes the loss NaN.
__device__ inline ImageLoss score_loss(const NetworkPlan& n, float* scores, int64_t label, float factor) {
  const int lane = threadIdx.x;
  float top = -INFINITY;
  int best = 0x7fffffff;
  for (int c = lane; c < n.classes; c += 32) {
    if (scores[c] > top || best == 0x7fffffff) {
      top = scores[c];
      best = c;
    }
  }
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    const float other = __shfl_xor_sync(0xffffffffu, top, distance);
    const int index = __shfl_xor_sync(0xffffffffu, best, distance);
    if (other > top || (other == top && index < best)) {
      top = other;
      best = index;
    }
  }
  const bool valid = label >= 0 && label < n.classes;
  const float own = valid ? scores[label] : NAN;
  if (n.distances) {
    top = fmaxf(top, n.extra_score);
  }
  float total = 0.0f, below_top = 0.0f;
  for (int c = lane; c < n.classes; c += 32) {
    total += expf(scores[c] - top);
    below_top += top - scores[c];
  }
  total = warp_sum(total);
  if (n.distances) {
    total += expf(n.extra_score - top);
  }
  const float of_each = n.label_smoothing / static_cast<float>(n.classes);
  __syncwarp();
  for (int c = lane; c < n.classes; c += 32) {
    const float wanted = (c == label ? 1.0f - n.label_smoothing : 0.0f) + of_each;
    scores[c] = factor * (expf(scores[c] - top) / total - wanted);
  }
  double target_below_top = static_cast<double>(top) - static_cast<double>(own);
  if (n.label_smoothing > 0.0f) {
    target_below_top =
        (1.0 - n.label_smoothing) * target_below_top + static_cast<double>(of_each) * warp_sum(below_top);
  }
  return {target_below_top + log(static_cast<double>(total)), valid && best == label ? 1 : 0};
}

// The gradient of the network's output from that of the scores.
__device__ inline void score_backward(const NetworkPlan& n, float* shared) {
  const int features = n.dense[n.num_denses - 1].out_features;
  for (int i = threadIdx.x; i < features; i += kNetworkThreads) {
    float grad = 0.0f;
    if (n.distances) {
      for (int c = 0; c < n.classes; ++c) {
        grad += shared[n.scores + c] * (shared[n.output + i] - n.codes[c * features + i]);
      }
      grad *= -2.0f;
    } else {
      grad = shared[n.scores + i];
    }
    shared[n.grad_output + i] = grad;
  }
}

// Whether this thread is the one that talks to the host: of the block that has the fewest images and parameters, and of
// the warp that has the fewest of those.
__device__ inline bool talks_to_host() { return blockIdx.x + 1 == gridDim.x && threadIdx.x + 1 == blockDim.x; }

// Forward, loss and backward of the block's images of a step. K is the kernel size of all convolutions, 0 stands for
// any. HasDropout is false for networks without dropout, which it costs nothing that way.
template <int K, bool HasDropout>
__device__ void train_images(const NetworkPlan& n, float* shared, int step) {
  PhaseClock clock(step);
  const int64_t begin = step * n.batch_size;
  const int64_t batch = min(n.batch_size, n.total - begin);
  double request = 0;  // read first and used last, as the host's memory is microseconds away
  if (n.watch != nullptr && talks_to_host()) {
    request = n.watch[0];
  }
  clock.stamp(Phase::begin);
  stage_convolutions(n, shared);
  ImageLoss sum;  // in thread 0
  for (int64_t image = blockIdx.x; image < batch; image += gridDim.x) {
    const int64_t named = n.order != nullptr ? n.order[begin + image] : begin + image;
    const bool known = named >= 0 && named < n.num_images;  // an unknown image makes the loss NaN
    const int64_t index = known ? named : 0;
    const bool is_first = image == blockIdx.x;
    clock.end(is_first ? Phase::stage : Phase::gradients);  // nobody reads the last image any more
    if (!is_first) {
      clock.next_round();
    }
    // Drops some of the values at `place`, or of their gradients, which all threads have written.
    const auto drop_at = [&](int place, float* values, int plane, int stride) {
      if (HasDropout && n.dropout.at[place].is_active()) {
        drop(n.dropout, place, {n.dropout.step.index + step, static_cast<uint32_t>(image)}, values, plane, stride);
        __syncthreads();
      }
    };
    load_image(n, shared, index, HasDropout);
    clock.end(Phase::load);
    drop_at(0, inner_planes(n.conv[0], shared), n.conv[0].plane, n.conv[0].stride);
    for (int l = 0; l < n.num_convs; ++l) {
      const bool last = l + 1 == n.num_convs;
      float* const next = last ? shared + n.dense[0].input : inner_planes(n.conv[l + 1], shared);
      const int stride = last ? n.conv[l].out_width : n.conv[l + 1].stride;
      const int plane = last ? n.conv[l].out_height * n.conv[l].out_width : n.conv[l + 1].plane;
      convolve_forward<K>(n, l, shared, next, stride, plane);
      clock.end(Phase::convolution, l);
      drop_at(l + 1, next, plane, stride);
    }
    const auto output_of = [&](int l) { return shared + (l + 1 < n.num_denses ? n.dense[l + 1].input : n.output); };
    for (int l = 0; l < n.num_denses; ++l) {
      dense_forward(n, l, shared, output_of(l));
      clock.end(Phase::dense, l);
      drop_at(n.num_convs + l + 1, output_of(l), 1, 1);
    }
    score(n, shared);
    clock.end(Phase::score);
    if (threadIdx.x < 32) {
      const ImageLoss one =
          score_loss(n, shared + n.scores, known ? n.labels[index] : -1, 1.0f / static_cast<float>(batch));
      sum.loss += one.loss;
      sum.correct += one.correct;
    }
    clock.end(Phase::loss);
    score_backward(n, shared);
    clock.end(Phase::output_gradient);
    for (int l = n.num_denses - 1; l >= 0; --l) {
      float* const grad_output = shared + (l + 1 < n.num_denses ? n.dense[l + 1].grad_input : n.grad_output);
      drop_at(n.num_convs + l + 1, grad_output, 1, 1);
      dense_backward(n, l, shared, output_of(l), grad_output, image, HasDropout, clock);
      clock.end(Phase::dense_gradient, l);
    }
    for (int l = n.num_convs - 1; l >= 0; --l) {
      drop_at(l + 1, shared + n.conv[l].grad_output, n.conv[l].out_height * n.conv[l].out_width, n.conv[l].out_width);
      differentiate(n, l, shared);
      clock.end(Phase::conv_activation, l);
      add_weight_gradient<K>(n.conv[l], shared);
      if (l > 0) {
        input_gradient<K>(n.conv[l], shared, shared + n.conv[l - 1].grad_output);
        clock.end(Phase::gradients, l);
      }
    }
  }
  clock.end(blockIdx.x < batch ? Phase::gradients : Phase::stage);
  if (blockIdx.x < batch) {
    float* target = n.block_sums + static_cast<int64_t>(blockIdx.x) * n.num_sums;
    for (int l = 0; l < n.num_convs; ++l) {
      for (int i = threadIdx.x; i < n.conv[l].num_sums(); i += kNetworkThreads) {
        target[i] = shared[n.conv[l].sums + i];
      }
      target += n.conv[l].num_sums();
    }
    if (threadIdx.x == 0) {
      n.block_losses[blockIdx.x] = sum.loss;
      n.block_correct[blockIdx.x] = sum.correct;
    }
  }
  if (talks_to_host()) {
    *n.asked = request != 0;
  }
  clock.stamp(Phase::sums);
}

}  // namespace lenet_fast::cuda
