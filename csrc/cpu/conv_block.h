// Convolution + activation + 2x2 pooling of one block of images (image_block.h), forward. Pixels come from padded
// planes and go to planes of any layout, so that layers chain without copies; nothing here touches images.
//
// With M = sum over connections of K*K * conv_height * conv_width multiply-adds an image, forward takes 2 M operations.
// LeNet-5 at 28x28 (d2l): C1 M = 117,600, C3 M = 240,000 (sparse C3: 150,000).
//
// Everything is a loop over connections (output map, input map), so a sparse table is just a shorter loop. Layers with
// many connections take fewer multiplications (conv_winograd.h).
#pragma once

#include "conv_winograd.h"

namespace lenet_fast::cpu::LENET_FAST_ISA {

// Pre-activations of 2 rows x Columns of one map. K = 0: any kernel size, known at run time.
template <int K, int Columns, typename T>
void conv_tile(Tile<T>& z, const ConvLayer<T>& layer, const Vec<T>* input, int64_t map, int64_t y, int64_t x) {
  const Connections& table = layer.g.connections;
  const int64_t kernel_size = K > 0 ? K : layer.g.kernel_size;
  const int64_t input_row = layer.layout.input_row;
  // The products of each input map are summed by themselves where every product is rounded, too: fewer of the roundings
  // are of the whole sum, which is larger.
  constexpr bool sums_maps = !kHasMultiplyAdd;
  Vec<T> sum[2 * Columns];
  const Vec<T> start = layer.bias != nullptr ? splat(layer.bias[map]) : Vec<T>{};
  unroll<2 * Columns>([&](auto i) __attribute__((always_inline)) {
    sum[i] = sums_maps ? Vec<T>{} : start;
    if constexpr (sums_maps) {
      z[i / Columns][i % Columns] = start;
    }
  });
  for (int32_t c = table.row_begin[map]; c < table.row_begin[map + 1]; ++c) {
    const T* weight = layer.weight + c * kernel_size * kernel_size;
    const Vec<T>* row = input + table.in_channel[c] * layer.layout.input_plane + y * input_row + x;
    for (int64_t ky = 0; ky < kernel_size; ++ky, weight += kernel_size, row += input_row) {
      if constexpr (K > 0 && 2 * Columns + K + 1 < LENET_FAST_VECTOR_REGISTERS) {
        Vec<T> tap[K];
        unroll<K>([&](auto kx) __attribute__((always_inline)) { tap[kx] = splat(weight[kx]); });
        unroll<2>([&](auto dy) __attribute__((always_inline)) {
          const Vec<T>* pixels = row + dy * input_row;
          unroll<Columns + K - 1>([&](auto i) __attribute__((always_inline)) {
            const Vec<T> pixel = pixels[i];
            unroll<K>([&](auto kx) __attribute__((always_inline)) {
              if constexpr (i - kx >= 0 && i - kx < Columns) {
                sum[dy * Columns + i - kx] += tap[kx] * pixel;
              }
            });
          });
        });
      } else {
        for (int64_t kx = 0; kx < kernel_size; ++kx) {
          const Vec<T> tap = splat(weight[kx]);
          unroll<2>([&](auto dy) __attribute__((always_inline)) {
            const Vec<T>* pixels = row + dy * input_row + kx;
            unroll<Columns>([&](auto i) __attribute__((always_inline)) { sum[dy * Columns + i] += tap * pixels[i]; });
          });
        }
      }
    }
    if constexpr (sums_maps) {
      unroll<2 * Columns>([&](auto i) __attribute__((always_inline)) {
        z[i / Columns][i % Columns] += std::exchange(sum[i], Vec<T>{});
      });
    }
  }
  if constexpr (!sums_maps) {
    unroll<2>([&](auto dy) __attribute__((always_inline)) {
      unroll<Columns>([&](auto i) __attribute__((always_inline)) { z[dy][i] = sum[dy * Columns + i]; });
    });
  }
}

// --- activation and pooling ------------------------------------------------------------------------------------------

// The larger of two values as PyTorch's pooling has it: the first of equals, and NaN before everything.
template <typename T>
LF_INLINE VecInt<T> takes_over(Vec<T> value, Vec<T> best) {
  return (value > best) | (value != value);
}

// One output map: where it goes, what is kept of it (null: nothing), and its subsampling parameters.
template <typename T>
struct MapTarget {
  Vec<T>* output;
  int64_t output_row, height, width;
  Vec<T>* record;
  int64_t record_row;
  T coefficient, subsample_bias;
};

// Activate and pool the tile at convolution coordinates (y, x).
template <Activation A, Pool P, bool Keep, typename T>
void finish_tile(const Tile<T>& z, int columns, int64_t y, int64_t x, const MapTarget<T>& map) {
  Vec<T>* record = Keep ? map.record + y / 2 * map.record_row + x / 2 * window_record(P) : nullptr;
  for (int64_t dx = 0; dx < columns; dx += 2, record += Keep ? window_record(P) : 0) {
    const Vec<T> window[4] = {z[0][dx], z[0][dx + 1], z[1][dx], z[1][dx + 1]};
    if constexpr (P == Pool::none) {
      unroll<4>([&](auto i) __attribute__((always_inline)) {
        const Activated<T> value = activate<A, T>(window[i]);
        const int64_t row = y + i / 2, column = x + dx + i % 2;
        if (row < map.height && column < map.width) {
          map.output[row * map.output_row + column] = value.y;
        }
        if constexpr (Keep) {
          record[i] = value.derivative;
        }
      });
      continue;
    }
    Vec<T>& output = map.output[y / 2 * map.output_row + (x + dx) / 2];
    if constexpr (P == Pool::max) {
      // Every activation is nondecreasing, so that the maximum comes first and one activation a window suffices.
      Vec<T> best = window[0];
      VecInt<T> winner{};
      unroll<3>([&](auto i) __attribute__((always_inline)) {
        const VecInt<T> wins = takes_over<T>(window[i + 1], best);
        best = wins ? window[i + 1] : best;
        winner = wins ? VecInt<T>{} + (i + 1) : winner;
      });
      const Activated<T> value = activate<A, T>(best);
      output = value.y;
      if constexpr (Keep) {
        record[0] = value.derivative;
        record[1] = (Vec<T>)winner;
      }
    } else {
      Activated<T> value[4];
      unroll<4>([&](auto i) __attribute__((always_inline)) { value[i] = activate<A, T>(window[i]); });
      const Vec<T> sum = (value[0].y + value[1].y) + (value[2].y + value[3].y);
      if constexpr (Keep) {
        unroll<4>([&](auto i) __attribute__((always_inline)) { record[i] = value[i].derivative; });
      }
      if constexpr (P == Pool::avg) {
        output = T(0.25) * sum;
      } else {
        const Activated<T> outer = activate<A, T>(map.coefficient * sum + map.subsample_bias);
        output = outer.y;
        if constexpr (Keep) {
          record[4] = outer.derivative;
          record[5] = sum;
        }
      }
    }
  }
}

inline int64_t forward_scratch_size(const ConvGeometry& g, const BlockLayout& layout) {
  return layout.uses_winograd ? winograd::forward_scratch_size(g) : 0;
}

// `input` in the layer's layout; the pooled output of every map into the planes of `output`. `record` (null: not
// wanted) receives what backward needs.
template <typename T>
void forward_block(const ConvLayer<T>& layer, const Vec<T>* input, Planes<Vec<T>> output, Vec<T>* record,
                   Vec<T>* scratch) {
  const ConvGeometry& g = layer.g;
  const BlockLayout& layout = layer.layout;
  const auto finish = with_activation(g.activation, [&]<Activation A>() {
    return with_pool(
        g.pool, [&]<Pool P>() { return record != nullptr ? finish_tile<A, P, true, T> : finish_tile<A, P, false, T>; });
  });
  const auto target = [&](int64_t map) {
    const bool subsample = g.pool == Pool::subsample;
    return MapTarget<T>{.output = output.at(map, 0),
                        .output_row = output.row,
                        .height = g.out_height(),
                        .width = g.out_width(),
                        .record = record != nullptr ? record + map * layout.map_record : nullptr,
                        .record_row = layout.columns / 2 * window_record(g.pool),
                        .coefficient = subsample ? layer.coefficient[map] : T(0),
                        .subsample_bias = subsample ? layer.subsample_bias[map] : T(0)};
  };
  if constexpr (winograd::kFitsRegisters) {
    if (layout.uses_winograd) {
      for (int64_t y = 0; y < layout.rows; y += 2) {
        for_each_tile(layout.columns, [&](int64_t x, auto width) __attribute__((always_inline)) {
          const Tile<T>* z = winograd::conv_tiles<width, T>(scratch, layer, input, y, x);
          for (int64_t map = 0; map < g.out_channels; ++map) {
            finish(z[map], width, y, x, target(map));
          }
        });
      }
      return;
    }
  }
  with_kernel_size(g.kernel_size, [&](auto K) {
    for (int64_t map = 0; map < g.out_channels; ++map) {
      const MapTarget<T> to = target(map);
      Tile<T> z;
      for (int64_t y = 0; y < layout.rows; y += 2) {
        for_each_tile(layout.columns, [&](int64_t x, auto width) __attribute__((always_inline)) {
          conv_tile<K, width, T>(z, layer, input, map, y, x);
          finish(z, width, y, x, to);
        });
      }
    }
  });
}

}  // namespace lenet_fast::cpu::LENET_FAST_ISA
