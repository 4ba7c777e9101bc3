// Convolution with whatever follows it on a 2x2 window in registers: the forward operators, the gradient of their
// pre-activations, and, with turned kernels, the gradient of their input.
//
// Per image, with M = connections * K*K * conv_height * conv_width multiply-adds: 2 M operations; reads the input once
// per block of output maps, writes the pooled output once. LeNet-5 at 28x28 in float32: C1 235 kFLOP, 3.1 KB read, 4.7
// KB written; C3 480 (sparse: 300) kFLOP, 4.7 KB read, 1.6 KB written. Arithmetic bounds both: C3 needs 76 FLOP a byte.
//
// A block takes `images` images x a tile of windows x `groups` groups of Maps output maps; its threads are laid out as
// (group, window), a group filling whole warps, so that a warp shares its weights. LeNet layers: the whole image is one
// tile and all maps are in one block, which stages the weights once and then strides over the batch. Designed for at
// most 128 registers a thread: a block of 512 threads always fits a multiprocessor.
#pragma once

#include "window.cuh"

namespace lenet_fast::cuda {

inline constexpr int kMaxThreads = 512;

// How a block cuts its work; windows are 2x2 outputs.
struct AnyTiling {
  static constexpr bool whole = false;
  int images, window_rows, window_columns, groups, channels, kernel_rows;
};

// Whole images, all maps.
template <typename Layer, int Maps>
struct WholeImage {
  static constexpr bool whole = true;
  int images;
  static constexpr int window_rows = Layer::conv_height / 2, window_columns = Layer::conv_width / 2;
  static constexpr int groups = divide_up(Layer::out_channels, Maps);
  static constexpr int channels = Layer::in_channels, kernel_rows = Layer::kernel_size;
};

// Sizes that follow from a tiling, on the host for the launch and on the device.
template <typename Tiling>
struct TileSizes {
  int windows, lanes, threads, tile_height, stride, plane, pixels, weights, masks;

  __host__ __device__ TileSizes(const Tiling& t, int kernel_size, int maps)
      : windows(t.window_rows * t.window_columns),
        lanes(round_up(t.images * windows, 32)),
        threads(t.groups * lanes),
        tile_height(2 * t.window_rows + t.kernel_rows - 1),
        stride(row_stride(2 * t.window_columns + kernel_size - 1, t.window_columns)),
        plane(tile_height * stride),
        pixels(round_up(t.images * t.channels * plane, 4)),
        weights(round_up(t.groups * t.channels * t.kernel_rows * kernel_size * maps, 4)),
        masks(t.groups * t.channels) {}

  template <typename T>
  size_t shared_bytes() const {
    return static_cast<size_t>(pixels + weights) * sizeof(T) + static_cast<size_t>(masks) * sizeof(unsigned);
  }

  // Even, for pairs of pixels; two rows of windows should fall into different banks (32 words): window x reads the pair
  // of words 2x, the next row of windows starts 2 * stride words on.
  __host__ __device__ static constexpr int row_stride(int width, int window_columns) {
    const int least = round_up(width, 2);
    const int wanted = 2 * window_columns % 32;
    for (int stride = least; stride < least + 16; stride += 2) {
      const int shift = 2 * stride % 32;
      if (shift == wanted || shift == wanted + 2) {
        return stride;
      }
    }
    return least;
  }
};

template <typename In, typename S, typename Layer, typename Table, typename Tiling, typename Epilogue>
struct Convolution {
  using Input = In;
  using Weight = S;
  using LayerType = Layer;
  using TilingType = Tiling;

  Layer layer;
  Table table;
  Tiling tiling;
  Epilogue epilogue;
  int64_t batch;
  const In* input;
  const S *weight, *bias;  // bias may be null
  bool vectorised;         // input is aligned for vector loads

  __host__ __device__ int64_t image_blocks() const { return (batch + tiling.images - 1) / tiling.images; }
  __host__ __device__ int tile_rows() const { return divide_up(layer.conv_height, 2 * tiling.window_rows); }
  __host__ __device__ int tile_columns() const { return divide_up(layer.conv_width, 2 * tiling.window_columns); }
  __host__ __device__ int map_blocks(int maps) const { return divide_up(layer.out_channels, tiling.groups * maps); }
};

template <int Maps, bool Flipped, typename Arguments>
__global__ void __launch_bounds__(kMaxThreads, 1) convolution(const __grid_constant__ Arguments a) {
  using T = Compute<typename Arguments::Weight>;
  constexpr int K = Arguments::LayerType::static_kernel_size;
  const auto& layer = a.layer;
  using Tiling = typename Arguments::TilingType;
  const Tiling& tiling = a.tiling;
  const TileSizes sizes(tiling, layer.kernel_size, Maps);
  T* const pixels = reinterpret_cast<T*>(shared_memory());
  T* const weights = pixels + sizes.pixels;
  unsigned* const masks = reinterpret_cast<unsigned*>(weights + sizes.weights);

  const int group = threadIdx.x / sizes.lanes, lane = threadIdx.x % sizes.lanes;
  const int image_in_block = lane / sizes.windows, window = lane % sizes.windows;
  const int window_y = window / tiling.window_columns, window_x = window % tiling.window_columns;

  const int map_blocks = a.map_blocks(Maps), tile_rows = a.tile_rows(), tile_columns = a.tile_columns();
  const bool weights_stay =
      map_blocks == 1 && tiling.channels >= layer.in_channels && tiling.kernel_rows >= layer.kernel_size;
  bool staged = false;
  if constexpr (Tiling::whole) {
    fill_zero(pixels, sizes.pixels);  // the padding, which no image overwrites
  }
  const int tiles = map_blocks * tile_rows * tile_columns;
  for (int tile = blockIdx.y; tile < tiles; tile += gridDim.y) {
    const int first_map = tile % map_blocks * tiling.groups * Maps;
    const int tile_x = tile / map_blocks % tile_columns * tiling.window_columns;
    const int tile_y = tile / map_blocks / tile_columns * tiling.window_rows;
    for (int64_t first_image = int64_t{blockIdx.x} * tiling.images; first_image < a.batch;
         first_image += int64_t{gridDim.x} * tiling.images) {
      const int64_t image = first_image + image_in_block;
      const int map = first_map + group * Maps;
      const int y = tile_y + window_y, x = tile_x + window_x;
      const bool active = image_in_block < tiling.images && image < a.batch && 2 * y < layer.conv_height &&
                          2 * x < layer.conv_width && map < layer.out_channels;
      T z[Maps][4];
#pragma unroll
      for (int m = 0; m < Maps; ++m) {
        const T start = a.bias != nullptr && map + m < layer.out_channels ? T(widen(a.bias[map + m])) : T(0);
        z[m][0] = z[m][1] = z[m][2] = z[m][3] = start;
      }
      for (int first_channel = 0; first_channel < layer.in_channels; first_channel += tiling.channels) {
        const int channels = min(tiling.channels, layer.in_channels - first_channel);
        for (int first_row = 0; first_row < layer.kernel_size; first_row += tiling.kernel_rows) {
          const int kernel_rows = min(tiling.kernel_rows, layer.kernel_size - first_row);
          __syncthreads();  // everybody is done with what was staged before
          if constexpr (Tiling::whole) {
            const int images = static_cast<int>(min(int64_t{tiling.images}, a.batch - first_image));
            stage_images(pixels + layer.padding * (sizes.stride + 1), sizes.stride, sizes.plane,
                         a.input + first_image * layer.in_channels * layer.height * layer.width,
                         images * layer.in_channels, layer, a.vectorised);
          } else {
            for (int i = 0; i < tiling.images; ++i) {
              for (int c = 0; c < channels && first_image + i < a.batch; ++c) {
                const int64_t plane = (first_image + i) * layer.in_channels + first_channel + c;
                stage_pixels(pixels + (i * tiling.channels + c) * sizes.plane, sizes.stride,
                             a.input + plane * layer.height * layer.width, layer.height, layer.width,
                             2 * tile_y + first_row - layer.padding, 2 * tile_x - layer.padding, sizes.tile_height,
                             sizes.stride);
              }
            }
          }
          if (!staged) {
            const WeightTile tile{tiling.groups, first_map, tiling.channels, first_channel, kernel_rows, first_row};
            stage_weights<Maps, Flipped>(weights, masks, tile, a.weight, a.table, layer.in_channels, layer.out_channels,
                                         layer.kernel_size);
            staged = weights_stay;
          }
          __syncthreads();
          if (active) {
            const T* const corner =
                pixels + image_in_block * tiling.channels * sizes.plane + 2 * window_y * sizes.stride + 2 * window_x;
            const int taps = kernel_rows * layer.kernel_size * Maps;  // values of one (group, channel)
            for (int c = 0; c < channels; ++c) {
              const int pair = group * tiling.channels + c;
              convolve_connected<Maps, K>(z, masks[pair], corner + c * sizes.plane, sizes.stride, weights + pair * taps,
                                          kernel_rows, layer.kernel_size);
            }
          }
        }
      }
      if (active) {
        a.epilogue(z, image, map, min(Maps, layer.out_channels - map), y, x);
      }
    }
  }
}

// Activate, pool, store.
template <typename S, typename Out>
struct StoreOutput {
  Activation activation;
  Pool pool;
  const S *coefficient, *subsample_bias;
  int out_channels, out_height, out_width;
  Out* output;

  template <int Maps, typename T>
  __device__ __forceinline__ void operator()(T (&z)[Maps][4], int64_t image, int first_map, int maps, int y,
                                             int x) const {
    with_activation(activation, [&](auto A) {
#pragma unroll
      for (int m = 0; m < Maps; ++m) {
        if (m >= maps) {
          return;
        }
        const int map = first_map + m;
        Out* const plane = output + (image * out_channels + map) * out_height * out_width;
        if (pool == Pool::none) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int row = 2 * y + i / 2, column = 2 * x + i % 2;
            if (row < out_height && column < out_width) {
              plane[row * out_width + column] = narrow<Out>(activate<A.value>(z[m][i]));
            }
          }
        } else {
          Subsample<T> subsample{T(0), T(0)};
          if (pool == Pool::subsample) {
            subsample = {T(widen(coefficient[map])), T(widen(subsample_bias[map]))};
          }
          plane[y * out_width + x] = narrow<Out>(pool_window<A.value>(z[m], pool, subsample));
        }
      }
    });
  }
};

// Store the gradient of the pre-activations; for subsampling also what each window adds to its parameters' gradients.
template <typename S>
struct StoreGradient {
  using T = Compute<S>;
  Activation activation;
  Pool pool;
  const S *grad_output, *coefficient, *subsample_bias;
  int out_channels, out_height, out_width, conv_height, conv_width;
  T *grad_conv, *grad_coefficient, *grad_subsample_bias;  // the last two (N, C, out_height, out_width), or null

  template <int Maps>
  __device__ __forceinline__ void operator()(T (&z)[Maps][4], int64_t image, int first_map, int maps, int y,
                                             int x) const {
    with_activation(activation, [&](auto A) {
#pragma unroll
      for (int m = 0; m < Maps; ++m) {
        if (m >= maps) {
          return;
        }
        const int map = first_map + m;
        const int64_t plane = image * out_channels + map;
        T grad[4];
        load_gradients(grad, grad_output + plane * out_height * out_width, pool, out_height, out_width, y, x);
        Subsample<T> subsample{T(0), T(0)};
        if (pool == Pool::subsample) {
          subsample = {T(widen(coefficient[map])), T(widen(subsample_bias[map]))};
        }
        const auto sums = differentiate_window<A.value>(z[m], grad, pool, subsample);
        if (pool == Pool::subsample) {
          const int64_t position = (plane * out_height + y) * out_width + x;
          grad_coefficient[position] = sums.coefficient;
          grad_subsample_bias[position] = sums.bias;
        }
        T* const target = grad_conv + plane * conv_height * conv_width;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = 2 * y + i / 2, column = 2 * x + i % 2;
          if (row < conv_height && column < conv_width) {
            target[row * conv_width + column] = z[m][i];
          }
        }
      }
    });
  }
};

}  // namespace lenet_fast::cuda
