// Convolution + activation + 2x2 pooling of one image, forward, where there are too few images to fill a vector's lanes
// with: they hold neighbouring columns, or the output maps where that leaves fewer lanes empty.
//
// LeNet-5 (d2l), 16 lanes: C1 by columns 8,400 vector multiply-adds of 7,350 at least, C3 by maps 15,000 of 15,000.
#pragma once

#include "conv_block.h"
#include "image_block.h"

namespace lenet_fast::cpu::LENET_FAST_ISA {

template <typename T>
LF_INLINE VecInt<T> lane_index() {
  return []<int... I>(std::integer_sequence<int, I...>)
             __attribute__((always_inline)) { return VecInt<T>{I...}; }(std::make_integer_sequence<int, kLanes<T>>{});
}

// A layer's padded input planes, in values, row behind row: what is computed beyond the used rows and columns reads the
// rows that follow, and is dropped.
struct FewPlanes {
  int64_t row, plane, begin, size;  // begin: the first pixel inside the padding

  FewPlanes(const ConvGeometry& g, int64_t lanes)
      : row(g.padded_width()),
        plane(g.padded_height() * row),
        begin(g.padding * row + g.padding),
        size(g.in_channels * plane + 2 * (row + lanes)) {}
};

template <typename T>
struct FewLayer {
  const ConvGeometry& g;
  const ConvParameters<T>& p;
  const T* input;
  FewPlanes planes;
  Planes<T> output;  // with room for a vector behind the last pixel

  T bias(int64_t map) const { return p.bias.value != nullptr ? p.bias.value[map] : T(0); }
  int64_t rows() const { return round_up(g.conv_height(), 2); }
};

// target[i] = value[i] for i < count (at most the lanes); what lies behind stays.
template <typename T>
LF_INLINE void store_first(T* target, Vec<T> value, int64_t count) {
  using Bits = typename VecTraits<T>::Bits;
  store(target, lane_index<T>() < static_cast<Bits>(count) ? value : load(target));
}

// --- lanes hold columns ----------------------------------------------------------------------------------------------

// Pre-activations of Rows rows x a vector of columns of one map. K = 0: any kernel size.
template <int K, int Rows, typename T>
LF_INLINE void conv_columns(Vec<T>* z, const FewLayer<T>& layer, int64_t map, int64_t y, int64_t x) {
  const Connections& table = layer.g.connections;
  const int64_t kernel_size = K > 0 ? K : layer.g.kernel_size;
  const int64_t stride = layer.planes.row;
  Vec<T> sum[Rows];
  unroll<Rows>([&](auto r) __attribute__((always_inline)) { sum[r] = splat(layer.bias(map)); });
  for (int32_t c = table.row_begin[map]; c < table.row_begin[map + 1]; ++c) {
    const T* weight = layer.p.weight.value + c * kernel_size * kernel_size;
    const T* source = layer.input + table.in_channel[c] * layer.planes.plane + y * stride + x;
    for (int64_t kx = 0; kx < kernel_size; ++kx) {
      if constexpr (K > 0 && Rows + K + 1 < LENET_FAST_VECTOR_REGISTERS) {
        Vec<T> tap[K];
        unroll<K>([&](auto ky) __attribute__((always_inline)) { tap[ky] = splat(weight[ky * K + kx]); });
        unroll<Rows + K - 1>([&](auto i) __attribute__((always_inline)) {
          const Vec<T> pixels = load(source + i * stride + kx);
          unroll<K>([&](auto ky) __attribute__((always_inline)) {
            if constexpr (i - ky >= 0 && i - ky < Rows) {
              sum[i - ky] += tap[ky] * pixels;
            }
          });
        });
      } else {
        for (int64_t ky = 0; ky < kernel_size; ++ky) {
          const T tap = weight[ky * kernel_size + kx];
          unroll<Rows>([&](auto r)
                           __attribute__((always_inline)) { sum[r] += tap * load(source + (r + ky) * stride + kx); });
        }
      }
    }
  }
  unroll<Rows>([&](auto r) __attribute__((always_inline)) { z[r] = sum[r]; });
}

// Every second element of a, then of b.
template <int First, typename T>
LF_INLINE Vec<T> every_second(Vec<T> a, Vec<T> b) {
  return []<int... I>(Vec<T> a, Vec<T> b, std::integer_sequence<int, I...>) __attribute__((always_inline)) {
    return __builtin_shufflevector(a, b, (First + 2 * I)...);
  }(a, b, std::make_integer_sequence<int, kLanes<T>>{});
}

template <typename T>
LF_INLINE Vec<T> upper_half_first(Vec<T> a) {
  constexpr int n = kLanes<T>;
  return []<int... I>(Vec<T> a, std::integer_sequence<int, I...>) __attribute__((always_inline)) {
    return __builtin_shufflevector(a, a, ((I + n / 2) % n)...);
  }(a, std::make_integer_sequence<int, n>{});
}

template <Activation A, Pool P, typename T>
void finish_columns(const Vec<T>* z, int rows, const FewLayer<T>& layer, int64_t map, int64_t y, int64_t x) {
  const ConvGeometry& g = layer.g;
  Vec<T> value[4];
  MapTarget<T> target{value, 2, 2, 2, nullptr, 0, T(0), T(0)};
  if constexpr (P == Pool::subsample) {
    target.coefficient = layer.p.coefficient.value[map];
    target.subsample_bias = layer.p.subsample_bias.value[map];
  }
  for (int row = 0; row < rows; row += 4, z += 4) {
    Tile<T> tile;
    if constexpr (P == Pool::none) {
      tile[0][0] = z[0], tile[0][1] = z[1], tile[1][0] = z[2], tile[1][1] = z[3];
      finish_tile<A, P, false, T>(tile, 2, 0, 0, target);
      const int64_t width = std::min<int64_t>(kLanes<T>, g.out_width() - x);
      for (int64_t i = 0; i < std::min<int64_t>(4, std::min<int64_t>(rows - row, g.out_height() - y - row)); ++i) {
        store_first(layer.output.at(map, y + row + i, x), value[i], width);
      }
    } else {  // the windows of two rows of them
      tile[0][0] = every_second<0, T>(z[0], z[2]), tile[0][1] = every_second<1, T>(z[0], z[2]);
      tile[1][0] = every_second<0, T>(z[1], z[3]), tile[1][1] = every_second<1, T>(z[1], z[3]);
      finish_tile<A, P, false, T>(tile, 2, 0, 0, target);
      const int64_t width = std::min<int64_t>(kLanes<T> / 2, g.out_width() - x / 2), out_row = (y + row) / 2;
      if (out_row < g.out_height()) {
        store_first(layer.output.at(map, out_row, x / 2), value[0], width);
      }
      if (row + 2 < rows && out_row + 1 < g.out_height()) {
        store_first(layer.output.at(map, out_row + 1, x / 2), upper_half_first<T>(value[0]), width);
      }
    }
  }
}

template <typename T>
void conv_few_by_columns(const FewLayer<T>& layer) {
  const ConvGeometry& g = layer.g;
  const auto finish = with_activation(g.activation, [&]<Activation A>() {
    return with_pool(g.pool, [&]<Pool P>() { return finish_columns<A, P, T>; });
  });
  with_kernel_size(g.kernel_size, [&](auto K) {
    for (int64_t map = 0; map < g.out_channels; ++map) {
      for (int64_t x = 0; x < g.conv_width(); x += kLanes<T>) {
        for_each_tile(layer.rows(), [&](int64_t y, auto rows) __attribute__((always_inline)) {
          Vec<T> z[kMaxColumns + 2]{};
          conv_columns<K, rows, T>(z, layer, map, y, x);
          finish(z, rows, layer, map, y, x);
        });
      }
    }
  });
}

// --- lanes hold output maps ------------------------------------------------------------------------------------------

// Pre-activations of 2 rows x Columns of a vector of maps; `weight` holds a vector a tap.
template <int K, int Columns, typename T>
LF_INLINE void conv_maps(Tile<T>& z, const FewLayer<T>& layer, const Vec<T>* weight, Vec<T> bias, int64_t y,
                         int64_t x) {
  const int64_t kernel_size = K > 0 ? K : layer.g.kernel_size;
  const int64_t stride = layer.planes.row;
  Vec<T> sum[2 * Columns];
  unroll<2 * Columns>([&](auto i) __attribute__((always_inline)) { sum[i] = bias; });
  for (int64_t in = 0; in < layer.g.in_channels; ++in) {
    const T* row = layer.input + in * layer.planes.plane + y * stride + x;
    for (int64_t ky = 0; ky < kernel_size; ++ky, weight += kernel_size, row += stride) {
      if constexpr (K > 0 && 2 * Columns + K + 1 < LENET_FAST_VECTOR_REGISTERS) {
        unroll<2>([&](auto dy) __attribute__((always_inline)) {
          unroll<Columns + K - 1>([&](auto i) __attribute__((always_inline)) {
            const Vec<T> pixel = splat(row[dy * stride + i]);
            unroll<K>([&](auto kx) __attribute__((always_inline)) {
              if constexpr (i - kx >= 0 && i - kx < Columns) {
                sum[dy * Columns + i - kx] += weight[kx] * pixel;
              }
            });
          });
        });
      } else {
        for (int64_t kx = 0; kx < kernel_size; ++kx) {
          unroll<2>([&](auto dy) __attribute__((always_inline)) {
            unroll<Columns>([&](auto i) __attribute__((always_inline)) {
              sum[dy * Columns + i] += weight[kx] * row[dy * stride + kx + i];
            });
          });
        }
      }
    }
  }
  unroll<2>([&](auto dy) __attribute__((always_inline)) {
    unroll<Columns>([&](auto i) __attribute__((always_inline)) { z[dy][i] = sum[dy * Columns + i]; });
  });
}

// Vectors for the weights of a group of maps and their outputs.
inline int64_t few_maps_scratch(const ConvGeometry& g) {
  return g.in_channels * g.kernel_size * g.kernel_size + g.out_height() * g.out_width();
}

template <typename T>
void conv_few_by_maps(const FewLayer<T>& layer, Vec<T>* scratch) {
  constexpr int n = kLanes<T>;
  const ConvGeometry& g = layer.g;
  const int64_t fan_in = g.in_channels * g.kernel_size * g.kernel_size;
  const T* const weight = layer.p.weight.value;
  Vec<T>* const outputs = scratch + fan_in;
  const bool is_plain = layer.output.plane == g.out_height() * layer.output.row && layer.output.row == g.out_width();
  const auto finish = with_activation(g.activation, [&]<Activation A>() {
    return with_pool(g.pool, [&]<Pool P>() { return finish_tile<A, P, false, T>; });
  });
  const MapTarget<T> target{outputs, g.out_width(), g.out_height(), g.out_width(), nullptr, 0, T(0), T(0)};
  for (int64_t first = 0; first < g.out_channels; first += n) {
    const int64_t maps = std::min<int64_t>(n, g.out_channels - first);
    Lanes<const T> weights;
    Lanes<T> planes;
    for (int64_t m = 0; m < maps; ++m) {
      weights.begin[m] = weight + (first + m) * fan_in;
      planes.begin[m] = layer.output.at(first + m, 0);
    }
    load_run<T>(scratch, weights, 0, fan_in, weight + g.out_channels * fan_in);
    const Vec<T> bias = layer.p.bias.value != nullptr ? load_partial(layer.p.bias.value + first, maps) : Vec<T>{};
    with_kernel_size(g.kernel_size, [&](auto K) {
      for (int64_t y = 0; y < layer.rows(); y += 2) {
        for_each_tile(round_up(g.conv_width(), 2), [&](int64_t x, auto columns) __attribute__((always_inline)) {
          Tile<T> z;
          conv_maps<K, columns, T>(z, layer, scratch, bias, y, x);
          finish(z, columns, y, x, target);
        });
      }
    });
    for (int64_t y = 0; y < (is_plain ? 1 : g.out_height()); ++y) {
      store_run<T>(planes, y * layer.output.row, outputs + y * g.out_width(),
                   is_plain ? g.out_height() * g.out_width() : g.out_width());
    }
  }
}

// Whether maps leave fewer lanes empty. Not for a sparse table: its maps read different planes.
inline bool is_by_maps(const ConvGeometry& g, int64_t lanes) {
  const int64_t rows = round_up(g.conv_height(), 2);
  return g.num_connections() == g.out_channels * g.in_channels && g.pool != Pool::subsample &&
         round_up(g.out_channels, lanes) * round_up(g.conv_width(), 2) * rows <
             g.out_channels * round_up(g.conv_width(), lanes) * rows;
}

// `scratch`: few_maps_scratch vectors.
template <typename T>
void conv_few(const FewLayer<T>& layer, Vec<T>* scratch) {
  is_by_maps(layer.g, kLanes<T>) ? conv_few_by_maps<T>(layer, scratch) : conv_few_by_columns<T>(layer);
}

}  // namespace lenet_fast::cpu::LENET_FAST_ISA
