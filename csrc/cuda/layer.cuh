// Shapes and connection tables, known at compile time for the LeNet layers, at run time for everything else. Both kinds
// are read the same way (layer.height), so that one kernel template serves them.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../geometry.h"

namespace lenet_fast::cuda {

__host__ __device__ constexpr int round_up(int value, int step) { return (value + step - 1) / step * step; }
__host__ __device__ constexpr int divide_up(int value, int step) { return (value + step - 1) / step; }

// One convolution: outputs are computed on conv_height x conv_width. padding may be negative in an input gradient.
template <int InChannels, int Height, int Width, int OutChannels, int KernelSize, int Padding>
struct StaticLayer {
  static constexpr int static_kernel_size = KernelSize;
  static constexpr int in_channels = InChannels, height = Height, width = Width;
  static constexpr int out_channels = OutChannels, kernel_size = KernelSize, padding = Padding;
  static constexpr int conv_height = (Height + 2 * Padding - KernelSize + 1) / 2 * 2;
  static constexpr int conv_width = (Width + 2 * Padding - KernelSize + 1) / 2 * 2;

  static bool matches(const ConvGeometry& g) {
    return g.in_channels == InChannels && g.height == Height && g.width == Width && g.out_channels == OutChannels &&
           g.kernel_size == KernelSize && g.padding == Padding && g.conv_height() == conv_height &&
           g.conv_width() == conv_width;
  }
};

// KernelSize 0: known at run time only.
template <int KernelSize>
struct KernelSizeMember {
  static constexpr int kernel_size = KernelSize;
};
template <>
struct KernelSizeMember<0> {
  int kernel_size;
};

template <int KernelSize>
struct AnyLayer : KernelSizeMember<KernelSize> {
  static constexpr int static_kernel_size = KernelSize;
  int in_channels, height, width, out_channels, padding, conv_height, conv_width;
};

template <int K>
AnyLayer<K> any_layer(const ConvGeometry& g) {
  AnyLayer<K> layer;
  if constexpr (K == 0) {
    layer.kernel_size = static_cast<int>(g.kernel_size);
  }
  layer.in_channels = static_cast<int>(g.in_channels);
  layer.height = static_cast<int>(g.height);
  layer.width = static_cast<int>(g.width);
  layer.out_channels = static_cast<int>(g.out_channels);
  layer.padding = static_cast<int>(g.padding);
  layer.conv_height = static_cast<int>(g.conv_height());
  layer.conv_width = static_cast<int>(g.conv_width());
  return layer;
}

// --- tables: index(out, in) is the position of a connection's kernel in the weight, or -1 ----------------------------

// Two output maps that share an input map; second is -1 where there is none.
struct MapPair {
  int8_t in, first, second;
};

template <typename Layer>
struct DenseTable {
  static constexpr int num_connections = Layer::in_channels * Layer::out_channels;
  static constexpr int num_pairs = Layer::in_channels * divide_up(Layer::out_channels, 2);
  __device__ static int index(int out, int in) { return out * Layer::in_channels + in; }
  __device__ static MapPair pair(int i) {
    const int in = i % Layer::in_channels, first = i / Layer::in_channels * 2;
    const int second = first + 1 < Layer::out_channels ? first + 1 : -1;
    return {static_cast<int8_t>(in), static_cast<int8_t>(first), static_cast<int8_t>(second)};
  }
  static bool matches(const ConvGeometry&, bool is_dense) { return is_dense; }
};

// C3 of LeCun et al. (1998), table I: (out, in) indices of its 60 connections.
struct Lenet5C3Indices {
  int8_t at[16 * 6];
};

constexpr Lenet5C3Indices lenet5_c3_indices() {
  constexpr uint8_t rows[16] = {0b000111, 0b001110, 0b011100, 0b111000, 0b110001, 0b100011, 0b001111, 0b011110,
                                0b111100, 0b111001, 0b110011, 0b100111, 0b011011, 0b110110, 0b101101, 0b111111};
  Lenet5C3Indices indices{};
  int8_t next = 0;
  for (int i = 0; i < 16 * 6; ++i) {
    const bool connected = (rows[i / 6] >> i % 6 & 1) != 0;  // bit: input map
    indices.at[i] = connected ? next++ : int8_t{-1};
  }
  return indices;
}

// Every input map is used by ten output maps: five pairs.
struct Lenet5C3Pairs {
  MapPair at[30];
};

constexpr Lenet5C3Pairs lenet5_c3_pairs() {
  constexpr Lenet5C3Indices indices = lenet5_c3_indices();
  Lenet5C3Pairs pairs{};
  int next = 0;
  for (int8_t in = 0; in < 6; ++in) {
    int8_t first = -1;
    for (int8_t out = 0; out < 16; ++out) {
      if (indices.at[out * 6 + in] < 0) {
        continue;
      }
      if (first < 0) {
        first = out;
      } else {
        pairs.at[next++] = {in, first, out};
        first = -1;
      }
    }
  }
  return pairs;
}

static __constant__ Lenet5C3Indices kLenet5C3Indices = lenet5_c3_indices();
static __constant__ Lenet5C3Pairs kLenet5C3Pairs = lenet5_c3_pairs();

template <typename Layer>
struct Lenet5C3Table {
  static_assert(Layer::in_channels == 6 && Layer::out_channels == 16);
  static constexpr int num_connections = 60, num_pairs = 30;
  __device__ static int index(int out, int in) { return kLenet5C3Indices.at[out * 6 + in]; }
  __device__ static MapPair pair(int i) { return kLenet5C3Pairs.at[i]; }

  static bool matches(const ConvGeometry& g, bool is_dense) {
    constexpr Lenet5C3Indices indices = lenet5_c3_indices();
    if (is_dense || g.in_channels != 6 || g.out_channels != 16 || g.num_connections() != num_connections) {
      return false;
    }
    for (int out = 0; out < 16; ++out) {
      for (int c = g.connections.row_begin[out]; c < g.connections.row_begin[out + 1]; ++c) {
        if (indices.at[out * 6 + g.connections.in_channel[c]] != c) {
          return false;
        }
      }
    }
    return true;
  }
};

// Seen from the input maps, as the input gradient sees it.
template <typename Table>
struct TransposedTable {
  __device__ static int index(int in, int out) { return Table::index(out, in); }
};

// Any table, from device memory; null: all connections. Transposed for the input gradient, whose "output" maps are the
// layer's input maps.
struct AnyTable {
  const int32_t* indices;  // (out, in)
  int in_channels;
  bool transposed;

  __device__ int index(int out, int in) const {
    const int position = transposed ? in * in_channels + out : out * in_channels + in;
    return indices == nullptr ? position : indices[position];
  }
};

}  // namespace lenet_fast::cuda
