// Fused convolution + activation + 2x2 pooling, forward and backward, on blocks of images (image_block.h).
//
// With M = sum over connections of K*K * conv_height * conv_width multiply-adds an image, and sizes in values:
//   forward   2 M operations;            reads the input once, writes the pooled output once
//   backward  2 M each for the recomputed pre-activation, the weight gradient and the input gradient;
//             reads input and output gradient, writes the input gradient
// LeNet-5 at 28x28 (d2l): C1 M = 117,600, C3 M = 240,000 (sparse C3: 150,000). LeNet layers stay in the L2 cache:
// a block of 16 images takes 64 KiB (C1 input) to 301 KiB (C1 pre-activation gradient).
//
// Everything is a loop over connections (output map, input map), so a sparse table is just a shorter loop.
#pragma once

#include "image_block.h"

namespace lenet_fast::cpu::LENET_FAST_ISA {

constexpr int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// Columns of a register tile, widest first. With 32 vector registers, 2 x 10 accumulators, 7 weights and a pixel fit.
#if LENET_FAST_VECTOR_REGISTERS >= 32
inline constexpr int kTileColumns[] = {10, 8, 6, 4, 2};
inline constexpr int kMaxColumns = 10;
inline constexpr int weight_rows(int K) { return K <= 5 ? 3 : 2; }
#else
inline constexpr int kTileColumns[] = {4, 2};
inline constexpr int kMaxColumns = 4;
inline constexpr int weight_rows(int K) { return K <= 3 ? 3 : 2; }
#endif
inline constexpr int kNumTiles = sizeof(kTileColumns) / sizeof(int);

// Cut `columns` (even) into tiles: f(first column, std::integral_constant<int, width>).
template <typename F>
LF_INLINE void for_each_tile(int64_t columns, F&& f) {
  int64_t x = 0;
  unroll<kNumTiles>([&](auto tile) __attribute__((always_inline)) {
    constexpr int width = kTileColumns[tile];
    for (; x + width <= columns; x += width) {
      f(x, std::integral_constant<int, width>{});
    }
  });
}

// Layout of a block in the workspace. Planes of the convolution have even sides; what lies beyond the used rows and
// columns is computed and dropped (forward) or zero (gradients), which is why the input has some slack at its end.
template <typename T>
struct Planes {
  int64_t rows, columns;                      // of the convolution, rounded up to even
  int64_t input_width, input_size, channels;  // padded input plane
  // Offsets in vectors. The sums of one map: bias, coefficient, subsample_bias.
  int64_t input, output, grads, grad_row, grad_input, weight_sums, map_sums, positions, end;

  Planes(const ConvGeometry& g, bool backward) {
    rows = round_up(g.conv_height(), 2);
    columns = round_up(g.conv_width(), 2);
    input_width = g.padded_width() + columns - g.conv_width();  // what a rounded-up column reads is 0
    input_size = g.padded_height() * input_width;
    channels = g.in_channels;
    int64_t next = 0;
    const auto take = [&next](int64_t vectors) { return std::exchange(next, next + vectors); };
    input = take(channels * input_size + input_width + 2);
    output = take(g.out_channels * g.out_height() * g.out_width());
    grads = take(backward ? g.out_channels * rows * columns : 0);
    grad_row = take(backward ? columns + g.kernel_size : 0);
    grad_input = take(backward ? channels * g.height * g.width : 0);
    weight_sums = take(backward ? g.num_connections() * g.kernel_size * g.kernel_size : 0);
    map_sums = take(backward ? 3 * g.out_channels : 0);
    positions = take(round_up(channels * g.height * g.width * 4, sizeof(Vec<T>)) / int64_t{sizeof(Vec<T>)});
    end = next;
  }
};

template <typename T>
size_t forward_workspace_bytes(const ConvGeometry& g) {
  return static_cast<size_t>(Planes<T>(g, false).end) * sizeof(Vec<T>);
}

template <typename T>
size_t backward_workspace_bytes(const ConvGeometry& g) {
  return static_cast<size_t>(Planes<T>(g, true).end) * sizeof(Vec<T>);
}

// One range's view of its arguments and workspace.
template <typename T>
struct BlockContext {
  const ConvGeometry& g;
  Planes<T> planes;
  const T *weight, *bias;
  Vec<T>* workspace;
  int32_t* positions;

  BlockContext(const ConvGeometry& geometry, const T* weight_, const T* bias_, void* memory, bool backward)
      : g(geometry),
        planes(geometry, backward),
        weight(weight_),
        bias(bias_),
        workspace(static_cast<Vec<T>*>(memory)),
        positions(reinterpret_cast<int32_t*>(workspace + planes.positions)) {
    std::fill(workspace + planes.input, workspace + planes.output, Vec<T>{});
    int32_t* position = positions;
    for (int64_t c = 0; c < g.in_channels; ++c) {
      for (int64_t y = 0; y < g.height; ++y) {
        for (int64_t x = 0; x < g.width; ++x) {
          *position++ =
              static_cast<int32_t>(c * planes.input_size + (y + g.padding) * planes.input_width + x + g.padding);
        }
      }
    }
  }

  void load_input(const T* images, int64_t first, int64_t count) {
    const int64_t pixels = g.in_channels * g.height * g.width;
    load_block<T>(workspace + planes.input, planes.input_size == g.height * g.width ? nullptr : positions,
                  images + first * pixels, pixels, count);
  }

  Vec<T>* map_sums(int64_t map) const { return workspace + planes.map_sums + 3 * map; }

  const Vec<T>* input_row(int64_t channel, int64_t row) const {
    return workspace + planes.input + channel * planes.input_size + row * planes.input_width;
  }
};

// Pre-activations of 2 rows x Columns of one map. K = 0: any kernel size, known at run time.
template <int K, int Columns, typename T>
void conv_tile(Vec<T> (&z)[2][kMaxColumns], const BlockContext<T>& block, int64_t map, int64_t y, int64_t x) {
  const Connections& table = block.g.connections;
  const int64_t kernel_size = K > 0 ? K : block.g.kernel_size;
  Vec<T> sum[2 * Columns];
  const Vec<T> start = block.bias != nullptr ? splat(block.bias[map]) : Vec<T>{};
  unroll<2 * Columns>([&](auto i) __attribute__((always_inline)) { sum[i] = start; });
  for (int32_t c = table.row_begin[map]; c < table.row_begin[map + 1]; ++c) {
    const T* weight = block.weight + c * kernel_size * kernel_size;
    const Vec<T>* row = block.input_row(table.in_channel[c], y) + x;
    for (int64_t ky = 0; ky < kernel_size; ++ky, weight += kernel_size, row += block.planes.input_width) {
      if constexpr (K > 0) {
        Vec<T> tap[K];
        unroll<K>([&](auto kx) __attribute__((always_inline)) { tap[kx] = splat(weight[kx]); });
        unroll<2>([&](auto dy) __attribute__((always_inline)) {
          const Vec<T>* pixels = row + dy * block.planes.input_width;
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
            const Vec<T>* pixels = row + dy * block.planes.input_width + kx;
            unroll<Columns>([&](auto i) __attribute__((always_inline)) { sum[dy * Columns + i] += tap * pixels[i]; });
          });
        }
      }
    }
  }
  unroll<2>([&](auto dy) __attribute__((always_inline)) {
    unroll<Columns>([&](auto i) __attribute__((always_inline)) { z[dy][i] = sum[dy * Columns + i]; });
  });
}

// The larger of two values as PyTorch's pooling has it: the first of equals, and NaN before everything.
template <typename T>
LF_INLINE VecInt<T> takes_over(Vec<T> value, Vec<T> best) {
  return (value > best) | (value != value);
}

// Every activation is nondecreasing, so that max pooling comes first and one activation a window suffices.
template <typename T>
LF_INLINE Vec<T> window_max(const Vec<T> (&z)[2][kMaxColumns], int64_t x) {
  Vec<T> best = z[0][x];
  for (const Vec<T> value : {z[0][x + 1], z[1][x], z[1][x + 1]}) {
    best = takes_over<T>(value, best) ? value : best;
  }
  return best;
}

// Per-map constants of an output map's subsampling; unused by the plain pools.
template <typename T>
struct Subsample {
  T coefficient, bias;

  Subsample(const T* coefficients, const T* biases, int64_t map)
      : coefficient(coefficients != nullptr ? coefficients[map] : T(0)), bias(biases != nullptr ? biases[map] : T(0)) {}
};

// Activate and pool a tile into the output map (row stride `width`) at convolution coordinates (y, x).
template <Activation A, Pool P, typename T>
void finish_tile(const Vec<T> (&z)[2][kMaxColumns], int columns, Vec<T>* map, int64_t height, int64_t width, int64_t y,
                 int64_t x, const Subsample<T>& subsample) {
  if constexpr (P == Pool::none) {
    for (int64_t dy = 0; dy < std::min<int64_t>(2, height - y); ++dy) {
      for (int64_t dx = 0; dx < std::min<int64_t>(columns, width - x); ++dx) {
        map[(y + dy) * width + x + dx] = activate<A, T>(z[dy][dx]);
      }
    }
  } else {
    Vec<T>* row = map + y / 2 * width + x / 2;
    for (int64_t dx = 0; dx < columns; dx += 2) {
      if constexpr (P == Pool::max) {
        row[dx / 2] = activate<A, T>(window_max<T>(z, dx));
      } else {
        const Vec<T> sum = (activate<A, T>(z[0][dx]) + activate<A, T>(z[0][dx + 1])) +
                           (activate<A, T>(z[1][dx]) + activate<A, T>(z[1][dx + 1]));
        row[dx / 2] = P == Pool::avg ? T(0.25) * sum : activate<A, T>(subsample.coefficient * sum + subsample.bias);
      }
    }
  }
}

// Pre-activation gradients of a tile from the output gradient of its map; lanes outside `valid` give 0. Subsampling
// adds the gradients of its two parameters to map_sums[1] and map_sums[2].
template <Activation A, Pool P, typename T>
void differentiate_tile(const Vec<T> (&z)[2][kMaxColumns], int columns, const Vec<T>* grad_output, int64_t height,
                        int64_t width, Vec<T>* grads, int64_t grads_width, VecInt<T> valid, int64_t y, int64_t x,
                        const Subsample<T>& subsample, Vec<T>* map_sums) {
  const auto masked = [&](Vec<T> grad) { return valid ? grad : Vec<T>{}; };
  Vec<T>* row[2] = {grads + y * grads_width + x, grads + (y + 1) * grads_width + x};
  if constexpr (P == Pool::none) {
    for (int64_t dy = 0; dy < 2; ++dy) {
      for (int64_t dx = 0; dx < columns; ++dx) {
        const bool inside = y + dy < height && x + dx < width;
        row[dy][dx] =
            inside ? masked(activation_derivative<A, T>(z[dy][dx]) * grad_output[(y + dy) * width + x + dx]) : Vec<T>{};
      }
    }
  } else {
    const Vec<T>* grad_row = grad_output + y / 2 * width + x / 2;
    for (int64_t dx = 0; dx < columns; dx += 2) {
      const Vec<T> grad = grad_row[dx / 2];
      if constexpr (P == Pool::max) {
        const Vec<T> window[4] = {z[0][dx], z[0][dx + 1], z[1][dx], z[1][dx + 1]};
        Vec<T> best = window[0];
        VecInt<T> winner{};
        for (int i = 1; i < 4; ++i) {
          const VecInt<T> wins = takes_over<T>(window[i], best);
          best = wins ? window[i] : best;
          winner = wins ? VecInt<T>{} + i : winner;
        }
        const Vec<T> routed = masked(activation_derivative<A, T>(best) * grad);
        for (int i = 0; i < 4; ++i) {
          row[i / 2][dx + i % 2] = winner == i ? routed : Vec<T>{};
        }
      } else {
        Vec<T> sum_grad = T(0.25) * grad;
        if constexpr (P == Pool::subsample) {
          const Vec<T> sum = (activate<A, T>(z[0][dx]) + activate<A, T>(z[0][dx + 1])) +
                             (activate<A, T>(z[1][dx]) + activate<A, T>(z[1][dx + 1]));
          const Vec<T> outer = activation_derivative<A, T>(subsample.coefficient * sum + subsample.bias) * grad;
          map_sums[1] += masked(outer * sum);
          map_sums[2] += masked(outer);
          sum_grad = subsample.coefficient * outer;
        }
        for (int i = 0; i < 4; ++i) {
          row[i / 2][dx + i % 2] = masked(activation_derivative<A, T>(z[i / 2][dx + i % 2]) * sum_grad);
        }
      }
    }
  }
}

// Call f.template operator()<A, P>() for the activation and pooling at hand.
template <typename F>
void with_activation_and_pool(Activation activation, Pool pool, F&& f) {
  const auto with_pool = [&]<Activation A>() {
    switch (pool) {
      case Pool::avg:
        return f.template operator()<A, Pool::avg>();
      case Pool::max:
        return f.template operator()<A, Pool::max>();
      case Pool::none:
        return f.template operator()<A, Pool::none>();
      case Pool::subsample:
        return f.template operator()<A, Pool::subsample>();
    }
  };
  switch (activation) {
    case Activation::identity:
      return with_pool.template operator()<Activation::identity>();
    case Activation::relu:
      return with_pool.template operator()<Activation::relu>();
    case Activation::sigmoid:
      return with_pool.template operator()<Activation::sigmoid>();
    case Activation::tanh:
      return with_pool.template operator()<Activation::tanh>();
    case Activation::scaled_tanh:
      return with_pool.template operator()<Activation::scaled_tanh>();
  }
}

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

// f(z, width, y, x) for the pre-activations z of every tile of a map.
template <int K, typename T, typename F>
void for_each_conv_tile(const BlockContext<T>& block, int64_t map, F&& f) {
  Vec<T> z[2][kMaxColumns];
  for (int64_t y = 0; y < block.planes.rows; y += 2) {
    for_each_tile(block.planes.columns, [&](int64_t x, auto width) __attribute__((always_inline)) {
      conv_tile<K, width, T>(z, block, map, y, x);
      f(z, width, y, x);
    });
  }
}

template <typename T>
void conv_act_pool_forward(const ConvActPoolForward<T>& p, int64_t begin, int64_t end, void* memory) {
  const ConvGeometry& g = p.geometry;
  BlockContext<T> block(g, p.weight, p.bias, memory, false);
  const int64_t height = g.out_height(), width = g.out_width();
  Vec<T>* const output = block.workspace + block.planes.output;
  for (int64_t first = begin; first < end; first += kLanes<T>) {
    const int64_t count = std::min<int64_t>(kLanes<T>, end - first);
    block.load_input(p.input, first, count);
    with_kernel_size(g.kernel_size, [&](auto K) {
      with_activation_and_pool(g.activation, g.pool, [&]<Activation A, Pool P>() {
        for (int64_t map = 0; map < g.out_channels; ++map) {
          const Subsample<T> subsample(p.coefficient, p.subsample_bias, map);
          for_each_conv_tile<K, T>(block, map, [&](const auto& z, int columns, int64_t y, int64_t x) {
            finish_tile<A, P, T>(z, columns, output + map * height * width, height, width, y, x, subsample);
          });
        }
      });
    });
    const int64_t values = g.out_channels * height * width;
    store_block<T>(p.output + first * values, output, values, count);
  }
}

// --- backward --------------------------------------------------------------------------------------------------------

// Add the products of gradients and input pixels to the sums of kernel rows ky .. ky + Rows - 1 of one connection:
// `Rows` * K sums stay in registers while a strip of Columns columns is walked down.
template <int K, int Rows, int Columns, typename T>
void weight_gradient_strip(Vec<T>* sums, const Vec<T>* grads, int64_t grads_width, const Vec<T>* input,
                           int64_t input_width, int64_t rows) {
  Vec<T> sum[Rows * K];
  unroll<Rows * K>([&](auto i) __attribute__((always_inline)) { sum[i] = sums[i]; });
  for (int64_t y = 0; y < rows; ++y, grads += grads_width, input += input_width) {
    Vec<T> grad[Columns];
    unroll<Columns>([&](auto i) __attribute__((always_inline)) { grad[i] = grads[i]; });
    unroll<Columns + K - 1>([&](auto i) __attribute__((always_inline)) {
      unroll<Rows>([&](auto ky) __attribute__((always_inline)) {
        const Vec<T> pixel = input[ky * input_width + i];
        unroll<K>([&](auto kx) __attribute__((always_inline)) {
          if constexpr (i - kx >= 0 && i - kx < Columns) {
            sum[ky * K + kx] += grad[i - kx] * pixel;
          }
        });
      });
    });
  }
  unroll<Rows * K>([&](auto i) __attribute__((always_inline)) { sums[i] = sum[i]; });
}

// The same for one kernel tap of any kernel size.
template <int Columns, typename T>
void weight_gradient_tap(Vec<T>* tap_sum, const Vec<T>* grads, int64_t grads_width, const Vec<T>* input,
                         int64_t input_width, int64_t rows) {
  Vec<T> sum[Columns]{};
  for (int64_t y = 0; y < rows; ++y, grads += grads_width, input += input_width) {
    unroll<Columns>([&](auto i) __attribute__((always_inline)) { sum[i] += grads[i] * input[i]; });
  }
  Vec<T> total = *tap_sum;
  unroll<Columns>([&](auto i) __attribute__((always_inline)) { total += sum[i]; });
  *tap_sum = total;
}

template <int K, typename T>
void weight_gradient(const BlockContext<T>& block, int64_t map) {
  const ConvGeometry& g = block.g;
  const Planes<T>& planes = block.planes;
  const Vec<T>* grads = block.workspace + planes.grads + map * planes.rows * planes.columns;
  Vec<T>* const all_sums = block.workspace + planes.weight_sums;
  const int64_t rows = g.conv_height();
  for (int32_t c = g.connections.row_begin[map]; c < g.connections.row_begin[map + 1]; ++c) {
    Vec<T>* sums = all_sums + c * g.kernel_size * g.kernel_size;
    const Vec<T>* input = block.input_row(g.connections.in_channel[c], 0);
    for_each_tile(planes.columns, [&](int64_t x, auto width) __attribute__((always_inline)) {
      if constexpr (K > 0) {
        constexpr int step = weight_rows(K);
        unroll<(K + step - 1) / step>([&](auto part) __attribute__((always_inline)) {
          constexpr int ky = part * step;
          constexpr int count = K - ky < step ? K - ky : step;
          weight_gradient_strip<K, count, width, T>(sums + ky * K, grads + x, planes.columns,
                                                    input + ky * planes.input_width + x, planes.input_width, rows);
        });
      } else {
        for (int64_t ky = 0; ky < g.kernel_size; ++ky) {
          for (int64_t kx = 0; kx < g.kernel_size; ++kx) {
            weight_gradient_tap<width, T>(sums + ky * g.kernel_size + kx, grads + x, planes.columns,
                                          input + ky * planes.input_width + kx + x, planes.input_width, rows);
          }
        }
      }
    });
  }
}

template <typename T>
void bias_gradient(const BlockContext<T>& block, int64_t map) {
  const int64_t size = block.planes.rows * block.planes.columns;
  const Vec<T>* grads = block.workspace + block.planes.grads + map * size;
  Vec<T> sum[4]{};  // sizes are multiples of 4
  for (int64_t i = 0; i < size; i += 4) {
    unroll<4>([&](auto j) __attribute__((always_inline)) { sum[j] += grads[i + j]; });
  }
  block.map_sums(map)[0] += (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// Scatter the gradients of Columns neighbouring outputs into one row of the padded input's gradient, over all output
// maps and kernel rows that reach it.
template <int K, int Columns, typename T>
void input_gradient_tile(Vec<T>* target, const BlockContext<T>& block, int64_t channel, int64_t row, int64_t x) {
  const ConvGeometry& g = block.g;
  const Planes<T>& planes = block.planes;
  const Connections& table = g.connections;
  const int64_t kernel_size = K > 0 ? K : g.kernel_size;
  const int64_t first = std::max<int64_t>(0, row - g.conv_height() + 1);
  const int64_t last = std::min<int64_t>(kernel_size - 1, row);
  constexpr int reach = K > 0 ? Columns + K - 1 : 1;
  Vec<T> sum[reach];
  if constexpr (K > 0) {
    unroll<reach>([&](auto i) __attribute__((always_inline)) { sum[i] = target[i]; });
  }
  for (int32_t entry = table.column_begin[channel]; entry < table.column_begin[channel + 1]; ++entry) {
    const int32_t c = table.column_entry[entry];
    const T* weight = block.weight + (c * kernel_size + first) * kernel_size;
    const Vec<T>* grads =
        block.workspace + planes.grads + (table.column_out[entry] * planes.rows + row - first) * planes.columns + x;
    for (int64_t ky = first; ky <= last; ++ky, weight += kernel_size, grads -= planes.columns) {
      if constexpr (K > 0) {
        Vec<T> tap[K];
        unroll<K>([&](auto kx) __attribute__((always_inline)) { tap[kx] = splat(weight[kx]); });
        unroll<Columns>([&](auto i) __attribute__((always_inline)) {
          const Vec<T> grad = grads[i];
          unroll<K>([&](auto kx) __attribute__((always_inline)) { sum[i + kx] += tap[kx] * grad; });
        });
      } else {
        for (int64_t kx = 0; kx < kernel_size; ++kx) {
          const Vec<T> tap = splat(weight[kx]);
          unroll<Columns>([&](auto i) __attribute__((always_inline)) { target[i + kx] += tap * grads[i]; });
        }
      }
    }
  }
  if constexpr (K > 0) {
    unroll<reach>([&](auto i) __attribute__((always_inline)) { target[i] = sum[i]; });
  }
}

template <int K, typename T>
void input_gradient(const BlockContext<T>& block) {
  const ConvGeometry& g = block.g;
  const Planes<T>& planes = block.planes;
  Vec<T>* const padded_row = block.workspace + planes.grad_row;
  Vec<T>* target = block.workspace + planes.grad_input;
  for (int64_t channel = 0; channel < g.in_channels; ++channel) {
    for (int64_t y = 0; y < g.height; ++y, target += g.width) {
      std::fill(padded_row, padded_row + planes.columns + g.kernel_size, Vec<T>{});
      for_each_tile(planes.columns, [&](int64_t x, auto width) __attribute__((always_inline)) {
        input_gradient_tile<K, width, T>(padded_row + x, block, channel, y + g.padding, x);
      });
      // Columns that no window of the convolution reaches (a dropped last one) have gradient 0.
      const int64_t reached = planes.columns + g.kernel_size - 1 - g.padding;
      for (int64_t x = 0; x < g.width; ++x) {
        target[x] = x < reached ? padded_row[x + g.padding] : Vec<T>{};
      }
    }
  }
}

// totals[i] = sum of the lanes of sums[i * stride], pairwise; nothing where totals is null.
template <typename T>
void sum_lanes(T* totals, const Vec<T>* sums, int64_t count, int64_t stride = 1) {
  for (int64_t i = 0; totals != nullptr && i < count; ++i) {
    T lanes[kLanes<T>];
    store(lanes, sums[i * stride]);
    for (int width = kLanes<T> / 2; width > 0; width /= 2) {
      for (int lane = 0; lane < width; ++lane) {
        lanes[lane] += lanes[lane + width];
      }
    }
    totals[i] = lanes[0];
  }
}

template <typename T>
void conv_act_pool_backward(const ConvActPoolBackward<T>& p, int64_t begin, int64_t end, void* memory) {
  const ConvGeometry& g = p.geometry;
  BlockContext<T> block(g, p.weight, p.bias, memory, true);
  const Planes<T>& planes = block.planes;
  const int64_t height = g.out_height(), width = g.out_width();
  const int64_t values = g.out_channels * height * width, pixels = g.in_channels * g.height * g.width;
  Vec<T>* const grad_output = block.workspace + planes.output;
  std::fill(block.workspace + planes.weight_sums, block.workspace + planes.positions, Vec<T>{});
  for (int64_t first = begin; first < end; first += kLanes<T>) {
    const int64_t count = std::min<int64_t>(kLanes<T>, end - first);
    VecInt<T> valid{};
    for (int64_t lane = 0; lane < count; ++lane) {
      valid[lane] = -1;
    }
    block.load_input(p.input, first, count);
    load_block<T>(grad_output, nullptr, p.grad_output + first * values, values, count);
    with_kernel_size(g.kernel_size, [&](auto K) {
      with_activation_and_pool(g.activation, g.pool, [&]<Activation A, Pool P>() {
        for (int64_t map = 0; map < g.out_channels; ++map) {
          const Subsample<T> subsample(p.coefficient, p.subsample_bias, map);
          Vec<T> sums[3]{};  // of this block alone first: shorter chains of additions round less
          for_each_conv_tile<K, T>(block, map, [&](const auto& z, int columns, int64_t y, int64_t x) {
            differentiate_tile<A, P, T>(z, columns, grad_output + map * height * width, height, width,
                                        block.workspace + planes.grads + map * planes.rows * planes.columns,
                                        planes.columns, valid, y, x, subsample, sums);
          });
          for (int i = 1; P == Pool::subsample && i < 3; ++i) {
            block.map_sums(map)[i] += sums[i];
          }
          if (p.sums.weight != nullptr) {
            weight_gradient<K, T>(block, map);
          }
          if (p.sums.bias != nullptr) {
            bias_gradient<T>(block, map);
          }
        }
      });
      if (p.grad_input != nullptr) {
        input_gradient<K, T>(block);
        store_block<T>(p.grad_input + first * pixels, block.workspace + planes.grad_input, pixels, count);
      }
    });
  }
  const Vec<T>* weight_sums = block.workspace + planes.weight_sums;
  sum_lanes<T>(p.sums.weight, weight_sums, g.num_connections() * g.kernel_size * g.kernel_size);
  sum_lanes<T>(p.sums.bias, block.map_sums(0), g.out_channels, 3);
  sum_lanes<T>(p.sums.coefficient, block.map_sums(0) + 1, g.out_channels, 3);
  sum_lanes<T>(p.sums.subsample_bias, block.map_sums(0) + 2, g.out_channels, 3);
}

template <typename T>
constexpr ConvActPoolKernels<T> conv_act_pool_kernels() {
  return {kLanes<T>, forward_workspace_bytes<T>, backward_workspace_bytes<T>, conv_act_pool_forward<T>,
          conv_act_pool_backward<T>};
}

}  // namespace lenet_fast::cpu::LENET_FAST_ISA
