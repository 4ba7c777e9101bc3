// The register tile of every convolution here: a 2x2 window of outputs of Maps output maps, its input and weights
// staged in shared memory.
//
// A window and one input channel take 4 * Maps * K*K multiply-adds for (K+1) * ceil((K+1)/2) two-wide pixel loads and
// K*K weight vectors that all threads of a warp share: for K = 5 and 6 maps 600 for 18 + 25 loads of 2 and 6 values.
#pragma once

#include "layer.cuh"
#include "numeric.cuh"
#include "shared_memory.cuh"

namespace lenet_fast::cuda {

template <typename T, int N>
struct alignas(sizeof(T) * N) Pack {
  T at[N];
};

// The widest power of two that divides Maps, so that the weights of a tap are aligned for a vector load; 16 bytes at
// most.
template <typename T>
__host__ __device__ constexpr int pack_width(int maps) {
  const int widest = 16 / static_cast<int>(sizeof(T));
  const int power = maps & -maps;
  return power < widest ? power : widest;
}

template <int N, typename T>
__device__ __forceinline__ void load_vector(T (&values)[N], const T* source) {
  constexpr int width = pack_width<T>(N);
#pragma unroll
  for (int i = 0; i < N; i += width) {
    const auto pack = *reinterpret_cast<const Pack<T, width>*>(source + i);
#pragma unroll
    for (int j = 0; j < width; ++j) {
      values[i + j] = pack.at[j];
    }
  }
}

// z[m] += the taps of map m over one input channel. `pixels`: the window's first pixel, in rows of even `stride`;
// `taps`: (kernel rows, K, Stride), the weight of map m at m. The number of pixels read a row is K + 1, rounded up to
// even.
template <int Maps, int Stride, int K, typename T>
__device__ __forceinline__ void convolve_window(T (&z)[Maps][4], const T* pixels, int stride, const T* taps, int rows,
                                                int kernel_size) {
  if constexpr (K > 0) {
    constexpr int reach = round_up(K + 1, 2);
    T upper[reach], lower[reach];
    const auto load_row = [&](T(&row)[reach], int ky) {
#pragma unroll
      for (int x = 0; x < reach; x += 2) {
        const auto pair = *reinterpret_cast<const Pack<T, 2>*>(pixels + ky * stride + x);
        row[x] = pair.at[0];
        row[x + 1] = pair.at[1];
      }
    };
    load_row(upper, 0);
#pragma unroll
    for (int ky = 0; ky < K; ++ky) {
      load_row(lower, ky + 1);
#pragma unroll
      for (int kx = 0; kx < K; ++kx) {
        T weight[Maps];
        load_vector<Maps>(weight, taps + (ky * K + kx) * Stride);
#pragma unroll
        for (int m = 0; m < Maps; ++m) {
          z[m][0] += weight[m] * upper[kx];
          z[m][1] += weight[m] * upper[kx + 1];
          z[m][2] += weight[m] * lower[kx];
          z[m][3] += weight[m] * lower[kx + 1];
        }
      }
#pragma unroll
      for (int x = 0; x < reach; ++x) {
        upper[x] = lower[x];
      }
    }
  } else {
    for (int ky = 0; ky < rows; ++ky, pixels += stride) {
      for (int kx = 0; kx < kernel_size; ++kx, taps += Stride) {
        T weight[Maps];
        load_vector<Maps>(weight, taps);
#pragma unroll
        for (int m = 0; m < Maps; ++m) {
          z[m][0] += weight[m] * pixels[kx];
          z[m][1] += weight[m] * pixels[kx + 1];
          z[m][2] += weight[m] * pixels[stride + kx];
          z[m][3] += weight[m] * pixels[stride + kx + 1];
        }
      }
    }
  }
}

// The same for the maps in `mask` only: all of them together, or each alone.
template <int Maps, int K, typename T>
__device__ __forceinline__ void convolve_connected(T (&z)[Maps][4], unsigned mask, const T* pixels, int stride,
                                                   const T* taps, int rows, int kernel_size) {
  if (mask == (1u << Maps) - 1) {
    convolve_window<Maps, Maps, K>(z, pixels, stride, taps, rows, kernel_size);
  } else if (Maps > 1 && mask != 0) {
#pragma unroll
    for (int m = 0; m < Maps; ++m) {
      if ((mask >> m & 1) != 0) {
        T one[1][4] = {{z[m][0], z[m][1], z[m][2], z[m][3]}};
        convolve_window<1, Maps, K>(one, pixels, stride, taps + m, rows, kernel_size);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          z[m][i] = one[0][i];
        }
      }
    }
  }
}

// sums[i][kx] += the gradient of output map i times the pixel under tap kx of a row of at most five, over the rows of
// outputs slice, slice + slices, ... All rows are aligned for loads of four values and have some slack.
template <int Taps, typename T>
__device__ __forceinline__ void accumulate_weight_gradient(T (&sums)[2][Taps], const T* first, const T* second,
                                                           int grad_stride, const T* pixels, int stride, int rows,
                                                           int columns, int slice, int slices) {
  static_assert(Taps <= 5);
  for (int y = slice; y < rows; y += slices) {
    const T* const row = pixels + y * stride;
    T window[8], grads[2][4];
    load_vector<4>(reinterpret_cast<T(&)[4]>(window[4]), row);
#pragma unroll
    for (int x = 0; x < columns; x += 4) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        window[i] = window[i + 4];
      }
      load_vector<4>(reinterpret_cast<T(&)[4]>(window[4]), row + x + 4);
      load_vector<4>(grads[0], first + y * grad_stride + x);
      load_vector<4>(grads[1], second + y * grad_stride + x);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (x + i < columns) {
#pragma unroll
          for (int kx = 0; kx < Taps; ++kx) {
            sums[0][kx] += grads[0][i] * window[i + kx];
            sums[1][kx] += grads[1][i] * window[i + kx];
          }
        }
      }
    }
  }
}

// Stage one channel's pixels [first_row, +rows) x [first_column, +columns) of an image, 0 outside it. All `threads`
// threads of the block take part; `target` has rows of `stride`.
template <typename S, typename T>
__device__ __forceinline__ void stage_pixels(T* target, int stride, const S* plane, int height, int width,
                                             int first_row, int first_column, int rows, int columns) {
  for (int i = threadIdx.x; i < rows * columns; i += blockDim.x) {
    const int y = i / columns, x = i % columns;
    const int row = first_row + y, column = first_column + x;
    const bool inside = row >= 0 && row < height && column >= 0 && column < width;
    target[y * stride + x] = inside ? T(widen(plane[row * width + column])) : T(0);
  }
}

template <typename T>
__device__ __forceinline__ void fill_zero(T* target, int count) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    target[i] = T(0);
  }
}

// Elements of S in a 16-byte load.
template <typename S>
inline constexpr int kVector = 16 / sizeof(S);

// Whether every image starts at a multiple of 16 bytes.
template <typename S>
bool can_vectorise(const S* images, int64_t values_an_image) {
  return reinterpret_cast<uintptr_t>(images) % 16 == 0 && values_an_image % kVector<S> == 0;
}

// Stage whole planes, which lie one after another in global memory, into the interior of padded ones.
template <typename S, typename T, typename Layer>
__device__ __forceinline__ void stage_images(T* interior, int stride, int plane_size, const S* source, int planes,
                                             const Layer& layer, bool vectorised) {
  const int plane_pixels = layer.height * layer.width, count = planes * plane_pixels;
  const auto position = [&](int i) {
    const int pixel = i % plane_pixels;
    return i / plane_pixels * plane_size + pixel / layer.width * stride + pixel % layer.width;
  };
  if (vectorised) {
    for (int i = threadIdx.x * kVector<S>; i < count; i += blockDim.x * kVector<S>) {
      const auto pack = *reinterpret_cast<const Pack<S, kVector<S>>*>(source + i);
#pragma unroll
      for (int j = 0; j < kVector<S>; ++j) {
        interior[position(i + j)] = T(widen(pack.at[j]));
      }
    }
  } else {
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
      interior[position(i)] = T(widen(source[i]));
    }
  }
}

// The kernels of one convolution as the register tile reads them: (groups, channels, kernel rows, K, Maps), 0 where
// there is no connection, and for every (group, channel) the mask of its connected maps.
struct WeightTile {
  int groups, first_map, channels, first_channel, rows, first_row;
};

// Flipped: the kernels turned by 180 degrees, as the input gradient needs them.
template <int Maps, bool Flipped, typename S, typename T, typename Table>
__device__ __forceinline__ void stage_weights(T* target, unsigned* masks, const WeightTile& tile, const S* weight,
                                              const Table& table, int in_channels, int out_channels, int kernel_size) {
  const int taps = tile.rows * kernel_size, all_taps = kernel_size * kernel_size;
  const int values = tile.groups * tile.channels * taps * Maps;
  for (int i = threadIdx.x; i < values; i += blockDim.x) {
    const int m = i % Maps, tap = i / Maps % taps, pair = i / Maps / taps;
    const int channel = tile.first_channel + pair % tile.channels;
    const int map = tile.first_map + pair / tile.channels * Maps + m;
    const bool inside = map < out_channels && channel < in_channels;
    const int connection = inside ? table.index(map, channel) : -1;
    const int position = tile.first_row * kernel_size + tap;
    target[i] = connection < 0 ? T(0)
                               : T(widen(weight[static_cast<int64_t>(connection) * all_taps +
                                                (Flipped ? all_taps - 1 - position : position)]));
  }
  for (int i = threadIdx.x; i < tile.groups * tile.channels; i += blockDim.x) {
    const int channel = tile.first_channel + i % tile.channels;
    unsigned mask = 0;
    for (int m = 0; m < Maps; ++m) {
      const int map = tile.first_map + i / tile.channels * Maps + m;
      // A map beyond the last one counts as connected, by zeros, so that the last group stays whole.
      const bool connected = channel < in_channels && (map >= out_channels || table.index(map, channel) >= 0);
      mask |= static_cast<unsigned>(connected) << m;
    }
    masks[i] = mask;
  }
}

}  // namespace lenet_fast::cuda
