// Weight gradients and map sums of any convolution, from the gradient of its pre-activations in global memory.
//
// Per image 2 operations a multiply-add of the convolution. A thread takes four neighbouring outputs against a row of
// taps: for K = 5, 20 multiply-adds for 4 + 8 loads, which the L1 cache serves. Blocks are (connection, chunk of
// images); each writes its sums into its chunk's row, and sum_rows adds the rows.
#pragma once

#include "reduction.cuh"
#include "window.cuh"

namespace lenet_fast::cuda {

inline constexpr int kGradientThreads = 128;

template <typename S, typename Layer>
struct WeightGradient {
  Layer layer;
  AnyTable table;
  int64_t batch;
  int chunks;
  const S* input;
  const Compute<S>* grad_conv;  // (N, C_out, conv_height, conv_width)
  Compute<S>* rows;             // (chunks, row_length), the weight first
  int row_length;
};

// Images [first, last) of a chunk.
__device__ inline int64_t chunk_begin(int64_t batch, int chunk, int chunks) { return batch * chunk / chunks; }

template <typename S, typename Layer>
__global__ void __launch_bounds__(kGradientThreads)
    weight_gradient(const __grid_constant__ WeightGradient<S, Layer> a) {
  using T = Compute<S>;
  constexpr int taps = Layer::static_kernel_size > 0 ? Layer::static_kernel_size : 32 / sizeof(T);
  const Layer& layer = a.layer;
  const int K = layer.kernel_size;
  const int chunk = blockIdx.x % a.chunks, pair = blockIdx.x / a.chunks;
  const int out = pair / layer.in_channels, in = pair % layer.in_channels;
  const int connection = a.table.index(out, in);
  if (connection < 0) {
    return;  // the whole block
  }
  T* const scratch = reinterpret_cast<T*>(shared_memory());
  T* const row = a.rows + static_cast<int64_t>(chunk) * a.row_length + static_cast<int64_t>(connection) * K * K;
  const int64_t first = chunk_begin(a.batch, chunk, a.chunks), last = chunk_begin(a.batch, chunk + 1, a.chunks);
  const int quads = divide_up(layer.conv_width, 4), items = quads * layer.conv_height;
  for (int ky = 0; ky < K; ++ky) {
    for (int first_kx = 0; first_kx < K; first_kx += taps) {
      T sums[taps] = {};
      for (int64_t image = first; image < last; ++image) {
        const S* const plane = a.input + (image * layer.in_channels + in) * layer.height * layer.width;
        const T* const grads = a.grad_conv + (image * layer.out_channels + out) * layer.conv_height * layer.conv_width;
        for (int item = threadIdx.x; item < items; item += kGradientThreads) {
          const int y = item / quads, x = item % quads * 4;
          const int pixel_y = y + ky - layer.padding, pixel_x = x + first_kx - layer.padding;
          T pixels[taps + 3];
#pragma unroll
          for (int i = 0; i < taps + 3; ++i) {
            const int column = pixel_x + i;
            const bool inside = pixel_y >= 0 && pixel_y < layer.height && column >= 0 && column < layer.width;
            pixels[i] = inside ? T(widen(plane[pixel_y * layer.width + column])) : T(0);
          }
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            if (x + i < layer.conv_width) {
              const T grad = grads[y * layer.conv_width + x + i];
#pragma unroll
              for (int kx = 0; kx < taps; ++kx) {
                sums[kx] += grad * pixels[i + kx];
              }
            }
          }
        }
      }
      block_sum(sums, scratch);
      if (threadIdx.x == 0) {
#pragma unroll
        for (int kx = 0; kx < taps; ++kx) {
          if (first_kx + kx < K) {
            row[ky * K + first_kx + kx] = sums[kx];
          }
        }
      }
    }
  }
}

template <typename T>
struct MapSums {
  int64_t batch;
  int maps, plane_size, chunks;
  const T* source;  // (N, maps, plane_size)
  T* rows;          // (chunks, row_length), beginning at these sums
  int row_length;
};

// rows[chunk][map] = the sum over the chunk's images and a plane.
template <typename T>
__global__ void __launch_bounds__(kGradientThreads) map_sums(const __grid_constant__ MapSums<T> a) {
  const int chunk = blockIdx.x % a.chunks, map = blockIdx.x / a.chunks;
  const int64_t first = chunk_begin(a.batch, chunk, a.chunks), last = chunk_begin(a.batch, chunk + 1, a.chunks);
  T sums[1] = {T(0)};
  for (int64_t image = first; image < last; ++image) {
    const T* const plane = a.source + (image * a.maps + map) * a.plane_size;
    for (int i = threadIdx.x; i < a.plane_size; i += kGradientThreads) {
      sums[0] += plane[i];
    }
  }
  block_sum(sums, reinterpret_cast<T*>(shared_memory()));
  if (threadIdx.x == 0) {
    a.rows[static_cast<int64_t>(chunk) * a.row_length + map] = sums[0];
  }
}

}  // namespace lenet_fast::cuda
