// All gradients of a LeNet layer in one kernel: a block takes whole images, one after another.
//
// Per image, with M multiply-adds of the convolution: 2 M operations each for the recomputed pre-activation, the weight
// gradient and the input gradient (whose halo of zeros is multiplied too: 470 instead of 240 thousand for C3). Reads
// the input and the output gradient once, writes the input gradient once; the pre-activations' gradient stays in shared
// memory. LeNet-5 in float32: C1 470 kFLOP (no input gradient), 7.8 KB; C3 1,440 (sparse 900) kFLOP, 11 KB.
//
// Weight gradients stay in registers from image to image: a thread owns a row of taps of two output maps that share an
// input map, for some rows of outputs. Each block writes one row of sums, which sum_rows adds.
// Designed for 14 (C1) to 24 (C3) warps a multiprocessor, 128 to 80 registers a thread; shared memory at most 64 KB a
// block.
#pragma once

#include "convolution.cuh"
#include "reduction.cuh"

namespace lenet_fast::cuda {

template <typename S, typename LayerT, typename TableT, int MapsT, int InMapsT, int BlocksT>
struct WholeImageBackward {
  using Storage = S;
  using T = Compute<S>;
  using Layer = LayerT;
  using Table = TableT;
  static constexpr int maps = MapsT, in_maps = InMapsT;  // register tiles of the pre-activation and input gradient
  static constexpr int K = Layer::kernel_size;

  // Threads as (group of maps, window).
  static constexpr int window_columns = Layer::conv_width / 2, windows = Layer::conv_height / 2 * window_columns;
  static constexpr int lanes = round_up(windows, 32), groups = divide_up(Layer::out_channels, maps);
  static constexpr int owners = Table::num_pairs * K;  // of (pair of maps, row of taps)
  static constexpr int threads = groups * lanes > 128 ? groups * lanes : 128;
  static constexpr int slices = threads / owners;  // of the rows of outputs
  static_assert(slices >= 1, "more rows of taps than threads");
  static constexpr int blocks_per_multiprocessor = BlocksT;

  // Shared memory, in values. Rows are aligned for loads of four.
  static constexpr int stride = round_up(Layer::conv_width, 4) + round_up(K - 1, 4);
  static constexpr int plane = (Layer::height + 2 * Layer::padding) * stride;
  static constexpr int border = K - 1 - Layer::padding;  // zeros around the gradient, for the input gradient
  static constexpr int left = round_up(border, 4);
  static_assert(border >= 0 && (left - border) % 2 == 0 && K <= 5);
  static constexpr int in_groups = divide_up(Layer::in_channels, in_maps);
  static constexpr int pixels = Layer::in_channels * plane;
  static constexpr int weights = round_up(groups * maps * Layer::in_channels * K * K, 4);
  static constexpr int flipped_weights = round_up(in_groups * in_maps * Layer::out_channels * K * K, 4);
  static constexpr int masks = round_up(groups * Layer::in_channels, 4);
  static constexpr int in_masks = round_up(in_groups * Layer::out_channels, 4);
  static constexpr int sum_kinds = 3;  // bias, coefficient, subsample_bias
  static constexpr int scratch = slices * owners * 2 * K + threads / 32 * maps * sum_kinds;

  // The plane of gradients, with its border only where the input gradient is wanted.
  struct GradientPlane {
    int stride, size, origin;
    __host__ __device__ explicit GradientPlane(bool bordered)
        : stride(bordered ? left + round_up(Layer::conv_width + border, 4) : round_up(Layer::conv_width, 4)),
          size((Layer::conv_height + (bordered ? 2 * border : 0)) * stride),
          origin(bordered ? border * stride + left : 0) {}
  };

  static size_t shared_bytes(bool need_input) {
    const int gradients = Layer::out_channels * GradientPlane(need_input).size;
    const int values = pixels + (gradients > scratch ? gradients : scratch) + weights;
    const int flipped = need_input ? flipped_weights : 0;
    return static_cast<size_t>(values + flipped) * sizeof(T) + static_cast<size_t>(masks + in_masks) * sizeof(unsigned);
  }

  // The length of a row of sums: weight, bias, coefficient, subsample_bias.
  static constexpr int weight_length = Table::num_connections * K * K;
  static constexpr int row_length = weight_length + sum_kinds * Layer::out_channels;

  Activation activation;
  Pool pool;
  int64_t batch;
  const S *grad_output, *input, *weight, *bias, *coefficient, *subsample_bias;
  S* grad_input;  // null: not wanted
  T* rows;        // (blocks, row_length)
  bool vectorised;
};

// How many blocks of the kernel the compiler makes room for. Its code for Blackwell takes a few registers more: with
// the input gradient it would spill, and has room for one block less.
template <typename A>
constexpr int resident_blocks() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
  return A::blocks_per_multiprocessor - (A::in_maps > 1 ? 1 : 0);
#else
  return A::blocks_per_multiprocessor;
#endif
}

template <typename A>
__global__ void __launch_bounds__(A::threads, resident_blocks<A>()) whole_image_backward(const __grid_constant__ A a) {
  using S = typename A::Storage;
  using T = typename A::T;
  using Layer = typename A::Layer;
  using Table = typename A::Table;
  constexpr int K = A::K, maps = A::maps;
  constexpr Layer layer{};
  const bool need_input = a.grad_input != nullptr;
  const typename A::GradientPlane plane(need_input);

  T* const pixels = reinterpret_cast<T*>(shared_memory());
  T* const weights = pixels + A::pixels;
  T* const flipped_weights = weights + A::weights;
  unsigned* const masks = reinterpret_cast<unsigned*>(flipped_weights + (need_input ? A::flipped_weights : 0));
  unsigned* const in_masks = masks + A::masks;
  T* const gradients = reinterpret_cast<T*>(in_masks + A::in_masks);
  T* const scratch = gradients;  // after the last image

  const int group = threadIdx.x / A::lanes, window = threadIdx.x % A::lanes;
  const int window_y = window / A::window_columns, window_x = window % A::window_columns;
  const bool active = window < A::windows && group < A::groups;
  const int first_map = group * maps, valid_maps = min(maps, Layer::out_channels - first_map);

  const int owner = threadIdx.x % A::owners, slice = threadIdx.x / A::owners;
  const MapPair pair = Table::pair(owner / K);
  const int tap_row = owner % K;

  T weight_sums[2][K] = {};
  T map_sums[maps][A::sum_kinds] = {};

  fill_zero(pixels, A::pixels);
  fill_zero(gradients, Layer::out_channels * plane.size);
  const WeightTile tile{A::groups, 0, Layer::in_channels, 0, K, 0};
  stage_weights<maps, false>(weights, masks, tile, a.weight, Table{}, Layer::in_channels, Layer::out_channels, K);
  if (need_input) {
    const WeightTile in_tile{A::in_groups, 0, Layer::out_channels, 0, K, 0};
    stage_weights<A::in_maps, true>(flipped_weights, in_masks, in_tile, a.weight, TransposedTable<Table>{},
                                    Layer::out_channels, Layer::in_channels, K);
  }

  for (int64_t image = blockIdx.x; image < a.batch; image += gridDim.x) {
    __syncthreads();  // staged weights and zeros are written; the last image is read
    stage_images(pixels + layer.padding * (A::stride + 1), A::stride, A::plane,
                 a.input + image * Layer::in_channels * Layer::height * Layer::width, Layer::in_channels, layer,
                 a.vectorised);
    __syncthreads();

    if (active) {
      T z[maps][4];
#pragma unroll
      for (int m = 0; m < maps; ++m) {
        const T start = a.bias != nullptr && m < valid_maps ? T(widen(a.bias[first_map + m])) : T(0);
        z[m][0] = z[m][1] = z[m][2] = z[m][3] = start;
      }
      const T* const corner = pixels + 2 * window_y * A::stride + 2 * window_x;
      for (int c = 0; c < Layer::in_channels; ++c) {
        const int position = group * Layer::in_channels + c;
        convolve_connected<maps, K>(z, masks[position], corner + c * A::plane, A::stride,
                                    weights + position * K * K * maps, K, K);
      }
      with_activation(a.activation, [&](auto activation) {
        constexpr int conv_area = Layer::conv_height * Layer::conv_width;
        const int out_area = a.pool == Pool::none ? conv_area : conv_area / 4;
        const int out_width = a.pool == Pool::none ? Layer::conv_width : Layer::conv_width / 2;
#pragma unroll
        for (int m = 0; m < maps; ++m) {
          if (m >= valid_maps) {
            return;
          }
          const int map = first_map + m;
          T grad[4];
          load_gradients(grad, a.grad_output + (image * Layer::out_channels + map) * out_area, a.pool,
                         out_area / out_width, out_width, window_y, window_x);
          Subsample<T> subsample{T(0), T(0)};
          if (a.pool == Pool::subsample) {
            subsample = {T(widen(a.coefficient[map])), T(widen(a.subsample_bias[map]))};
          }
          const auto sums = differentiate_window<activation.value>(z[m], grad, a.pool, subsample);
          map_sums[m][0] += (z[m][0] + z[m][1]) + (z[m][2] + z[m][3]);
          map_sums[m][1] += sums.coefficient;
          map_sums[m][2] += sums.bias;
          T* const target = gradients + map * plane.size + plane.origin + 2 * window_y * plane.stride + 2 * window_x;
          *reinterpret_cast<Pack<T, 2>*>(target) = {z[m][0], z[m][1]};
          *reinterpret_cast<Pack<T, 2>*>(target + plane.stride) = {z[m][2], z[m][3]};
        }
      });
    }
    __syncthreads();

    if (slice < A::slices) {
      const T* const first = gradients + pair.first * plane.size + plane.origin;
      const T* const second = gradients + (pair.second < 0 ? pair.first : pair.second) * plane.size + plane.origin;
      accumulate_weight_gradient<K>(weight_sums, first, second, plane.stride,
                                    pixels + pair.in * A::plane + tap_row * A::stride, A::stride, Layer::conv_height,
                                    Layer::conv_width, slice, A::slices);
    }
    if (need_input) {
      constexpr int columns = divide_up(Layer::width, 2), in_windows = divide_up(Layer::height, 2) * columns;
      constexpr int in_lanes = round_up(in_windows, 32);
      for (int job = threadIdx.x; job < A::in_groups * in_lanes; job += A::threads) {
        const int in_group = job / in_lanes, in_window = job % in_lanes;
        const int y = in_window / columns, x = in_window % columns;
        if (in_window < in_windows) {
          T grad[A::in_maps][4] = {};
          const T* const corner = gradients + 2 * y * plane.stride + A::left - A::border + 2 * x;
          for (int out = 0; out < Layer::out_channels; ++out) {
            const int position = in_group * Layer::out_channels + out;
            convolve_connected<A::in_maps, K>(grad, in_masks[position], corner + out * plane.size, plane.stride,
                                              flipped_weights + position * K * K * A::in_maps, K, K);
          }
#pragma unroll
          for (int m = 0; m < A::in_maps; ++m) {
            const int in = in_group * A::in_maps + m;
            S* const target = a.grad_input + (image * Layer::in_channels + in) * Layer::height * Layer::width;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const int row = 2 * y + i / 2, column = 2 * x + i % 2;
              if (in < Layer::in_channels && row < Layer::height && column < Layer::width) {
                target[row * Layer::width + column] = narrow<S>(grad[m][i]);
              }
            }
          }
        }
      }
    }
  }

  __syncthreads();  // the gradients are read: their memory is scratch now
  T* const row = a.rows + static_cast<int64_t>(blockIdx.x) * A::row_length;
  if (slice < A::slices) {
#pragma unroll
    for (int i = 0; i < 2 * K; ++i) {
      scratch[(slice * A::owners + owner) * 2 * K + i] = weight_sums[i / K][i % K];
    }
  }
  T* const warp_sums = scratch + A::slices * A::owners * 2 * K;
#pragma unroll
  for (int i = 0; i < maps * A::sum_kinds; ++i) {
    const T sum = warp_sum(map_sums[i / A::sum_kinds][i % A::sum_kinds]);
    if (threadIdx.x % 32 == 0) {
      warp_sums[threadIdx.x / 32 * maps * A::sum_kinds + i] = sum;
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < A::owners * 2 * K; i += A::threads) {
    const MapPair of = Table::pair(i / (2 * K * K));
    const int out = i / K % 2 == 0 ? of.first : of.second;
    T sum = T(0);
    for (int s = 0; s < A::slices; ++s) {
      sum += scratch[s * A::owners * 2 * K + i];
    }
    if (out >= 0) {
      row[Table::index(out, of.in) * K * K + i / (2 * K) % K * K + i % K] = sum;
    }
  }
  for (int i = threadIdx.x; i < A::sum_kinds * Layer::out_channels; i += A::threads) {
    const int kind = i / Layer::out_channels, map = i % Layer::out_channels;
    constexpr int warps = A::lanes / 32;  // of a group
    T sum = T(0);
    for (int w = 0; w < warps; ++w) {
      sum += warp_sums[(map / maps * warps + w) * maps * A::sum_kinds + map % maps * A::sum_kinds + kind];
    }
    row[A::weight_length + i] = sum;
  }
}

}  // namespace lenet_fast::cuda
