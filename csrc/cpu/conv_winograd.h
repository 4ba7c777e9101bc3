// Forward and input gradient of convolutions with 5x5 kernels by Winograd's algorithm (winograd.h): 0.49 M
// multiply-adds an image where the direct ones take M, LeNet-5's C3 117,600.
//
// Beside them, C3 forward has 9,000 additions for the points of the input and 9,600 for the outputs, its input gradient
// 4,800 for the gradients of the sums and 20,000 for those of the pixels. With few input maps, as in C1 and in LeCun's
// sparse C3, that costs as much as is saved, and with 16 registers the sums do not fit.
//
// The points of a few windows of all input maps stay in the L1 cache while every output map uses them.
#pragma once

#include "conv_layer.h"

namespace lenet_fast::cpu::LENET_FAST_ISA::winograd {

// Windows whose sums, of two maps, share the registers with a pixel and the maps' weights.
inline constexpr int kMaxWindows = 3;

// points (7, connections, 7) of the weight (connections, 5, 5).
template <typename T>
void weight_points(T* points, int64_t connections, const T* weight) {
  for (int64_t c = 0; c < connections; ++c, weight += kTaps * kTaps, points += kPoints) {
    unroll<kPoints>([&](auto i) __attribute__((always_inline)) {
      T column[kTaps];
      unroll<kTaps>([&](auto kx) __attribute__((always_inline)) {
        column[kx] = weight_point<i>([&](int ky) __attribute__((always_inline)) { return weight[ky * kTaps + kx]; });
      });
      unroll<kPoints>([&](auto j) __attribute__((always_inline)) {
        points[i * connections * kPoints + j] =
            weight_point<j>([&](int kx) __attribute__((always_inline)) { return column[kx]; });
      });
    });
  }
}

// --- forward ---------------------------------------------------------------------------------------------------------

// Rows Begin to End - 1 of the points of some windows: points (in_channels, End - Begin, 7, Windows).
template <int Begin, int End, int Windows, typename T>
void input_points(Vec<T>* points, const ConvLayer<T>& layer, const Vec<T>* input) {
  const int64_t input_row = layer.layout.input_row;
  for (int64_t channel = 0; channel < layer.g.in_channels; ++channel, input += layer.layout.input_plane) {
    unroll<End - Begin>([&](auto i) __attribute__((always_inline)) {
      const auto column = [&](int x) __attribute__((always_inline)) {
        return input_point<Begin + i>([&](int k) __attribute__((always_inline)) { return input[k * input_row + x]; });
      };
      Vec<T> value[kPixels];
      unroll<kPixels - 2>([&](auto k) __attribute__((always_inline)) { value[k + 2] = column(k); });
      unroll<Windows>([&](auto w) __attribute__((always_inline)) {
        unroll<kPixels - 2>([&](auto k) __attribute__((always_inline)) { value[k] = value[k + 2]; });
        value[kPixels - 2] = column(2 * w + kPixels - 2);
        value[kPixels - 1] = column(2 * w + kPixels - 1);
        unroll<kPoints>([&](auto j) __attribute__((always_inline)) {
          points[j * Windows + w] = input_point<j>([&](int k) __attribute__((always_inline)) { return value[k]; });
        });
      });
      points += kPoints * Windows;
    });
  }
}

// What row A of the sums of a map adds to its pre-activations at columns x to x + 2 Windows - 1 of a tile.
template <int A, int Windows, typename T>
LF_INLINE void add_outputs(Tile<T>& z, int64_t x, const Vec<T> (&sum)[kSums][Windows], Vec<T> bias) {
  unroll<Windows>([&](auto w) __attribute__((always_inline)) {
    const auto value = [&](int b) __attribute__((always_inline)) { return sum[b][w]; };
    const Vec<T> row[kOutputs] = {output<0>(value), output<1>(value)};
    unroll<kOutputs>([&](auto dx) __attribute__((always_inline)) {
      unroll<kOutputs>([&](auto dy) __attribute__((always_inline)) {
        Vec<T>& target = z[dy][x + 2 * w + dx];
        if constexpr (A == dy) {
          target = bias + row[dx];
        } else if constexpr (kOutput[dy][A] == 1) {
          target += row[dx];
        } else if constexpr (kOutput[dy][A] == -1) {
          target -= row[dx];
        }
      });
    });
  });
}

// Pre-activations of all maps in `Windows` windows at columns x of their tiles, whose pixels begin at `input`. Two maps
// at a time share the points of the input maps that both are connected to.
template <int Windows, typename T>
void conv_windows(Tile<T>* z, int64_t x, const ConvLayer<T>& layer, const Vec<T>* input, Vec<T>* points) {
  const Connections& table = layer.g.connections;
  const int64_t maps = layer.g.out_channels, weight_row = layer.g.num_connections() * kPoints;
  unroll<kSums>([&](auto a) __attribute__((always_inline)) {
    constexpr int first = kSumBegin[a], rows = kSumBegin[a + 1] - first;
    input_points<first, first + rows, Windows, T>(points, layer, input);
    for (int64_t map = 0; map < maps; map += 2) {
      Vec<T> sum[2][kSums][Windows]{};
      // The products of the two maps' connections c and d with an input map, of which the first `Skip` and all behind
      // the next `Count` are missing. (A function of its own would make GCC keep the sums in memory.)
      const auto add = [&]<int Skip, int Count>(int32_t channel, int32_t c, int32_t d) __attribute__((always_inline)) {
        const Vec<T>* const pixels = points + channel * rows * kPoints * Windows;
        const T* const weights = layer.weight_points + first * weight_row;
        unroll<rows>([&](auto i) __attribute__((always_inline)) {
          unroll<kPoints>([&](auto j) __attribute__((always_inline)) {
            Vec<T> tap[2];
            unroll<Count>([&](auto k) __attribute__((always_inline)) {
              tap[Skip + k] = splat(weights[i * weight_row + (Skip + k == 0 ? c : d) * kPoints + j]);
            });
            unroll<Windows>([&](auto w) __attribute__((always_inline)) {
              Vec<T> point = pixels[(i * kPoints + j) * Windows + w];
              if constexpr (Count > 1) {
                load_once(point);
              }
              unroll<Count>(
                  [&](auto k) __attribute__((always_inline)) { sum[Skip + k][sum_of(j)][w] += tap[Skip + k] * point; });
            });
          });
        });
      };
      int32_t c = table.row_begin[map], d = table.row_begin[map + 1];
      const int32_t c_end = d, d_end = map + 1 < maps ? table.row_begin[map + 2] : d;
      while (c < c_end || d < d_end) {
        const int32_t channel_c = c < c_end ? table.in_channel[c] : std::numeric_limits<int32_t>::max();
        const int32_t channel_d = d < d_end ? table.in_channel[d] : std::numeric_limits<int32_t>::max();
        if (channel_c == channel_d) {
          add.template operator()<0, 2>(channel_c, c++, d++);
        } else if (channel_c < channel_d) {
          add.template operator()<0, 1>(channel_c, c++, d);
        } else {
          add.template operator()<1, 1>(channel_d, c, d++);
        }
      }
      unroll<2>([&](auto k) __attribute__((always_inline)) {
        if (map + k < maps) {
          add_outputs<a, Windows, T>(z[map + k], x, sum[k],
                                     layer.bias != nullptr ? splat(layer.bias[map + k]) : Vec<T>{});
        }
      });
    }
  });
}

inline int64_t forward_scratch_size(const ConvGeometry& g) {
  return g.out_channels * kOutputs * kMaxColumns + 2 * kPoints * g.in_channels * kMaxWindows;
}

// Pre-activations of 2 rows x Columns at (y, x) of every map, the beginning of `scratch`.
template <int Columns, typename T>
const Tile<T>* conv_tiles(Vec<T>* scratch, const ConvLayer<T>& layer, const Vec<T>* input, int64_t y, int64_t x) {
  auto* const z = reinterpret_cast<Tile<T>*>(scratch);
  Vec<T>* const points = scratch + layer.g.out_channels * kOutputs * kMaxColumns;
  input += y * layer.layout.input_row + x;
  constexpr int windows = Columns / 2;
  for_each_part<kMaxWindows>(windows, (windows + kMaxWindows - 1) / kMaxWindows, [&](int64_t first, auto size) {
    conv_windows<size, T>(z, 2 * first, layer, input + 2 * first, points);
  });
  return z;
}

// --- input gradient --------------------------------------------------------------------------------------------------

// Gradients of the sums (A, b) of a tile of every map: sums (out_channels, 4, Windows).
template <int A, int Windows, typename T>
void sum_gradients(Vec<T>* sums, const ConvLayer<T>& layer, const Vec<T>* grads) {
  for (int64_t map = 0; map < layer.g.out_channels; ++map, grads += layer.layout.rows * layer.layout.columns) {
    unroll<Windows>([&](auto w) __attribute__((always_inline)) {
      Vec<T> value[kOutputs];
      unroll<kOutputs>([&](auto dx) __attribute__((always_inline)) {
        value[dx] =
            sum_gradient<A>([&](int dy) __attribute__((always_inline)) { return grads[(dy * Windows + w) * 2 + dx]; });
      });
      unroll<kSums>([&](auto b) __attribute__((always_inline)) {
        sums[b * Windows + w] = sum_gradient<b>([&](int dx) __attribute__((always_inline)) { return value[dx]; });
      });
    });
    sums += kSums * Windows;
  }
}

// Gradients of points Begin to End - 1 of a row of an input map's points: target (End - Begin, Windows).
template <int Begin, int End, int Windows, typename T>
void point_gradients(Vec<T>* target, const ConvLayer<T>& layer, int64_t channel, const T* weights, const Vec<T>* sums) {
  const Connections& table = layer.g.connections;
  Vec<T> grad[End - Begin][Windows]{};
  for (int32_t entry = table.column_begin[channel]; entry < table.column_begin[channel + 1]; ++entry) {
    const T* weight = weights + table.column_entry[entry] * kPoints;
    const Vec<T>* sum = sums + table.column_out[entry] * kSums * Windows;
    unroll<kSums>([&](auto b) __attribute__((always_inline)) {
      constexpr int first = std::max(Begin, kSumBegin[b]), last = std::min(End, kSumBegin[b + 1]);
      if constexpr (first < last) {
        Vec<T> value[Windows];
        unroll<Windows>([&](auto w) __attribute__((always_inline)) {
          value[w] = sum[b * Windows + w];
          load_once(value[w]);
        });
        unroll<last - first>([&](auto j) __attribute__((always_inline)) {
          const Vec<T> tap = splat(weight[first + j]);
          unroll<Windows>([&](auto w) __attribute__((always_inline)) { grad[first + j - Begin][w] += tap * value[w]; });
        });
      }
    });
  }
  unroll<End - Begin>([&](auto j) __attribute__((always_inline)) {
    unroll<Windows>([&](auto w) __attribute__((always_inline)) { target[j * Windows + w] = grad[j][w]; });
  });
}

// Add the gradients of row I of an input map's points to those of the pixels below them.
template <int I, int Windows, typename T>
void add_pixel_gradients(Vec<T>* pixels, int64_t row, const Vec<T>* points) {
  Vec<T> open[kPixels]{};  // columns that the next window adds to
  const auto add = [&](int x, Vec<T> value) __attribute__((always_inline)) {
    unroll<kPixels>([&](auto k) __attribute__((always_inline)) {
      if constexpr (kInput[I][k] == 1) {
        pixels[k * row + x] += value;
      } else if constexpr (kInput[I][k] == -1) {
        pixels[k * row + x] -= value;
      }
    });
  };
  unroll<Windows>([&](auto w) __attribute__((always_inline)) {
    unroll<kPixels>([&](auto k) __attribute__((always_inline)) {
      open[k] += pixel_gradient<k>([&](int j) __attribute__((always_inline)) { return points[j * Windows + w]; });
    });
    add(2 * w, open[0]);
    add(2 * w + 1, open[1]);
    unroll<kPixels - 2>([&](auto k) __attribute__((always_inline)) { open[k] = open[k + 2]; });
    open[kPixels - 2] = open[kPixels - 1] = Vec<T>{};
  });
  unroll<kPixels - 2>([&](auto k) __attribute__((always_inline)) { add(2 * Windows + k, open[k]); });
}

// Sums and points of a tile, and planes of the gradient of all pixels that the convolution's rows and columns reach.
inline int64_t gradient_scratch_size(const ConvGeometry& g, const BlockLayout& layout) {
  return (kSums * g.out_channels + kPoints) * (kMaxColumns / 2) +
         g.in_channels * (layout.rows + kTaps - 1) * (layout.columns + kTaps - 1);
}

// From the gradients of the pre-activations, laid out as backward_block's strips.
template <typename T>
void input_gradient(const ConvLayer<T>& layer, const Vec<T>* grads, Planes<Vec<T>> grad_input, Vec<T>* scratch) {
  const ConvGeometry& g = layer.g;
  const BlockLayout& layout = layer.layout;
  const int64_t height = layout.rows + kTaps - 1, width = layout.columns + kTaps - 1;
  Vec<T>* const points = scratch + kSums * g.out_channels * (kMaxColumns / 2);
  Vec<T>* const pixels = points + kPoints * (kMaxColumns / 2);
  std::fill(pixels, pixels + g.in_channels * height * width, Vec<T>{});
  for_each_tile(layout.columns, [&](int64_t x, auto columns) __attribute__((always_inline)) {
    constexpr int windows = columns / 2;
    for (int64_t y = 0; y < layout.rows; y += 2) {
      unroll<kPoints>([&](auto i) __attribute__((always_inline)) {
        constexpr int a = sum_of(i);
        if constexpr (i == kSumBegin[a]) {
          sum_gradients<a, windows, T>(scratch, layer, grads + x * layout.rows + y * columns);
        }
        const T* weights = layer.weight_points + i * g.num_connections() * kPoints;
        for (int64_t channel = 0; channel < g.in_channels; ++channel) {
          constexpr int half = (kPoints + 1) / 2;  // the sums of all points at once do not fit the registers
          point_gradients<0, half, windows, T>(points, layer, channel, weights, scratch);
          point_gradients<half, kPoints, windows, T>(points + half * windows, layer, channel, weights, scratch);
          add_pixel_gradients<i, windows, T>(pixels + (channel * height + y) * width + x, width, points);
        }
      });
    }
  });
  for (int64_t channel = 0; channel < g.in_channels; ++channel) {
    for (int64_t y = 0; y < g.height; ++y) {
      Vec<T>* const target = grad_input.at(channel, y);
      const Vec<T>* const source = pixels + (channel * height + y + g.padding) * width + g.padding;
      for (int64_t x = 0; x < g.width; ++x) {
        // Rows and columns that no window of the convolution reaches (a dropped last one) have gradient 0.
        target[x] = y + g.padding < height && x + g.padding < width ? source[x] : Vec<T>{};
      }
    }
  }
}

}  // namespace lenet_fast::cpu::LENET_FAST_ISA::winograd
