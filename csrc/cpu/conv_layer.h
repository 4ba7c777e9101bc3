// A fused convolution as the kernels of a block of images (image_block.h) see it: the planes and sizes of a block, the
// tiles that fit the registers, and what is chosen once a layer rather than once a pixel.
#pragma once

#include "vec_math.h"
#include "winograd.h"

namespace lenet_fast::cpu::LENET_FAST_ISA {

constexpr int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// Pixel (y, x) of plane p is data[p * plane + y * row + x].
template <typename V>
struct Planes {
  V* data;
  int64_t plane, row;

  V* at(int64_t p, int64_t y, int64_t x = 0) const { return data + p * plane + y * row + x; }
  operator Planes<const V>() const { return {data, plane, row}; }
};

// Vectors that a 2x2 window leaves for backward. avg, none: act'(z) of its four pixels. max: act'(z) of the winner, and
// which one won. subsample: act'(z) of the four, act' of the outer activation, the window's sum.
constexpr int64_t window_record(Pool pool) { return pool == Pool::max ? 2 : pool == Pool::subsample ? 6 : 4; }

// Sizes of a layer's block, in vectors. Planes of the convolution have even sides: what lies beyond the used rows and
// columns is computed and dropped (forward) or 0 (gradients), which is why the input has some slack at its end.
struct BlockLayout {
  int64_t rows, columns;                       // of the convolution, rounded up to even
  int64_t input_row, input_plane, input_size;  // padded input planes; padding and slack are 0
  int64_t input_begin;                         // the first pixel inside the padding
  int64_t map_record, record_size;             // what forward keeps for backward, of a map and of all
  bool uses_winograd;                          // conv_winograd.h
  int64_t weight_points_size;                  // scalars
  int64_t weight_sums_size, map_sums_size;

  explicit BlockLayout(const ConvGeometry& g)
      : rows(round_up(g.conv_height(), 2)),
        columns(round_up(g.conv_width(), 2)),
        input_row(g.padded_width() + columns - g.conv_width()),  // what a rounded-up column reads is 0
        input_plane(g.padded_height() * input_row),
        input_size(g.in_channels * input_plane + input_row + 2),
        input_begin(g.padding * input_row + g.padding),
        map_record(rows * columns / 4 * window_record(g.pool)),
        record_size(g.out_channels * map_record),
        uses_winograd(winograd::kFitsRegisters && g.kernel_size == winograd::kTaps &&
                      g.num_connections() >= 4 * g.out_channels),  // fewer save less than the points of the input cost
        weight_points_size(uses_winograd ? winograd::kPoints * winograd::kPoints * g.num_connections() : 0),
        weight_sums_size(g.num_connections() * g.kernel_size * g.kernel_size),
        map_sums_size(3 * g.out_channels) {}
};

template <typename T>
struct ConvLayer {
  const ConvGeometry& g;
  BlockLayout layout;
  const T *weight, *bias;                 // bias may be null
  const T *coefficient, *subsample_bias;  // (out_channels) for Pool::subsample
  const T* weight_points;                 // (7, connections, 7) where the layout uses Winograd's algorithm

  // The pixels inside the padding of a block of input planes: where a block is loaded, or the layer before writes to.
  template <typename V>
  Planes<V> inner(V* input) const {
    return {input + layout.input_begin, layout.input_plane, layout.input_row};
  }
};

// --- register tiles --------------------------------------------------------------------------------------------------

// Columns of the widest register tile: with 32 vector registers, 2 x 10 accumulators, 7 weights and a pixel fit. With
// 16, 2 x 4, 5 weights and a pixel do, and 2 x 6 with every weight loaded anew.
#if LENET_FAST_VECTOR_REGISTERS >= 32
inline constexpr int kMaxColumns = 10;
constexpr int64_t num_tiles(int64_t columns) { return (columns + 9) / 10; }
#else
inline constexpr int kMaxColumns = 6;
constexpr int64_t num_tiles(int64_t columns) { return std::max<int64_t>(1, columns / 4); }
#endif

// Cut `count` into `parts` parts of nearly the same size, at most Most: f(first, std::integral_constant<int, size>).
template <int Most, typename F>
LF_INLINE void for_each_part(int64_t count, int64_t parts, F&& f) {
  for (int64_t part = 0, first = 0; part < parts; ++part) {
    const int64_t end = count * (part + 1) / parts;
    unroll<Most>([&](auto i) __attribute__((always_inline)) {
      if (end - first == i + 1) {
        f(first, std::integral_constant<int, i + 1>{});
      }
    });
    first = end;
  }
}

// Cut `columns` (even) into tiles of nearly the same, even width: f(first column, std::integral_constant<int, width>).
// A narrow tile has too few accumulators to hide their latency.
template <typename F>
LF_INLINE void for_each_tile(int64_t columns, F&& f) {
  for_each_part<kMaxColumns / 2>(columns / 2, num_tiles(columns),
                                 [&](int64_t first, auto size) __attribute__((always_inline)) {
                                   f(2 * first, std::integral_constant<int, 2 * size>{});
                                 });
}

// Call f with the kernel size as a compile-time constant; 0 for one that has no code of its own.
template <typename F>
void with_kernel_size(int64_t kernel_size, F&& f) {
  switch (kernel_size) {
    case 3:
      return f(std::integral_constant<int, 3>{});
    case 5:
      return f(std::integral_constant<int, 5>{});
    case 7:
      return f(std::integral_constant<int, 7>{});
    default:
      return f(std::integral_constant<int, 0>{});
  }
}

// f.template operator()<P>() for the pooling at hand.
template <typename F>
auto with_pool(Pool pool, F&& f) {
  switch (pool) {
    case Pool::avg:
      return f.template operator()<Pool::avg>();
    case Pool::max:
      return f.template operator()<Pool::max>();
    case Pool::none:
      return f.template operator()<Pool::none>();
    default:
      return f.template operator()<Pool::subsample>();
  }
}

// f.template operator()<A>() for the activation at hand.
template <typename F>
auto with_activation(Activation activation, F&& f) {
  switch (activation) {
    case Activation::relu:
      return f.template operator()<Activation::relu>();
    case Activation::sigmoid:
      return f.template operator()<Activation::sigmoid>();
    case Activation::tanh:
      return f.template operator()<Activation::tanh>();
    case Activation::scaled_tanh:
      return f.template operator()<Activation::scaled_tanh>();
    default:
      return f.template operator()<Activation::identity>();
  }
}

// Pre-activations of two rows.
template <typename T>
using Tile = Vec<T>[2][kMaxColumns];

}  // namespace lenet_fast::cpu::LENET_FAST_ISA
