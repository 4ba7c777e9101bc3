// Gradients of one block of a fused convolution, from what forward_block (conv_block.h) kept: 2 M operations for the
// weight gradient and 2 M for the input gradient, if it is wanted.
#pragma once

#include "conv_block.h"

namespace lenet_fast::cpu::LENET_FAST_ISA {

// Sums over the images seen so far, lane by lane; null: not wanted.
template <typename T>
struct BlockSums {
  Vec<T>* weight;  // (connections, K, K)
  Vec<T>* maps;    // (out_channels, 3): bias, coefficient, subsample_bias
};

// Pre-activation gradients of columns begin .. end - 1 of a map (rows x columns of the layout) from its output
// gradient; lanes outside `valid` give 0. Adds to the map's three sums.
template <Pool P, typename T>
void differentiate_strip(const ConvLayer<T>& layer, int64_t map, int64_t begin, int64_t end, VecInt<T> valid,
                         const Vec<T>* record, Planes<const Vec<T>> grad_output, Vec<T>* grads, Vec<T>* map_sums) {
  const ConvGeometry& g = layer.g;
  const int64_t columns = layer.layout.columns, width = end - begin;
  const T scale = P == Pool::avg ? T(0.25) : P == Pool::subsample ? layer.coefficient[map] : T(1);
  const auto masked = [&](Vec<T> value) __attribute__((always_inline)) { return valid ? value : Vec<T>{}; };
  // Of this strip alone first: shorter chains of additions round less.
  Vec<T> bias[4]{}, coefficient{}, subsample_bias{};
  for (int64_t y = 0; y < layer.layout.rows; y += 2) {
    const Vec<T>* source = grad_output.at(map, P == Pool::none ? y : y / 2);
    const Vec<T>* window = record + (y * columns / 4 + begin / 2) * window_record(P);
    Vec<T>* row = grads + y * width;
    for (int64_t x = begin; x < end; x += 2, window += window_record(P), row += 2) {
      const auto put = [&](auto i, Vec<T> grad) __attribute__((always_inline)) {
        row[i / 2 * width + i % 2] = grad;
        bias[i] += grad;
      };
      if constexpr (P == Pool::none) {
        unroll<4>([&](auto i) __attribute__((always_inline)) {
          const bool inside = y + i / 2 < g.conv_height() && x + i % 2 < g.conv_width();
          put(i, inside ? masked(window[i] * source[i / 2 * grad_output.row + x + i % 2]) : Vec<T>{});
        });
      } else if constexpr (P == Pool::max) {
        const Vec<T> routed = masked(window[0] * source[x / 2]);
        const VecInt<T> winner = (VecInt<T>)window[1];
        unroll<4>([&](auto i) __attribute__((always_inline)) { put(i, winner == int{i} ? routed : Vec<T>{}); });
      } else {
        Vec<T> grad = source[x / 2];
        if constexpr (P == Pool::subsample) {
          grad *= window[4];
          coefficient += masked(grad * window[5]);
          subsample_bias += masked(grad);
        }
        grad *= scale;
        unroll<4>([&](auto i) __attribute__((always_inline)) { put(i, masked(window[i] * grad)); });
      }
    }
  }
  map_sums[0] += (bias[0] + bias[1]) + (bias[2] + bias[3]);
  map_sums[1] += coefficient;
  map_sums[2] += subsample_bias;
}

// --- weight gradient -------------------------------------------------------------------------------------------------

// Kernel rows whose sums share the registers with a tile's gradients.
constexpr int weight_rows(int K) { return LENET_FAST_VECTOR_REGISTERS >= 32 ? (K <= 5 ? 3 : 2) : (K <= 3 ? 3 : 2); }

// Add the products of gradients and input pixels to the sums of kernel rows ky .. ky + Rows - 1 of one connection:
// `Rows` * K sums stay in registers while a strip of Columns columns is walked down.
template <int K, int Rows, int Columns, typename T>
void weight_gradient_strip(Vec<T>* sums, const Vec<T>* grads, const Vec<T>* input, int64_t input_row, int64_t rows) {
  Vec<T> sum[Rows * K];
  unroll<Rows * K>([&](auto i) __attribute__((always_inline)) { sum[i] = sums[i]; });
  for (int64_t y = 0; y < rows; ++y, grads += Columns, input += input_row) {
    Vec<T> grad[Columns];
    unroll<Columns>([&](auto i) __attribute__((always_inline)) { grad[i] = grads[i]; });
    unroll<Columns + K - 1>([&](auto i) __attribute__((always_inline)) {
      unroll<Rows>([&](auto ky) __attribute__((always_inline)) {
        const Vec<T> pixel = input[ky * input_row + i];
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
void weight_gradient_tap(Vec<T>* tap_sum, const Vec<T>* grads, const Vec<T>* input, int64_t input_row, int64_t rows) {
  Vec<T> sum[Columns]{};
  for (int64_t y = 0; y < rows; ++y, grads += Columns, input += input_row) {
    unroll<Columns>([&](auto i) __attribute__((always_inline)) { sum[i] += grads[i] * input[i]; });
  }
  Vec<T> total = *tap_sum;
  unroll<Columns>([&](auto i) __attribute__((always_inline)) { total += sum[i]; });
  *tap_sum = total;
}

// All connections of a map, columns x .. x + Columns - 1.
template <int K, int Columns, typename T>
void weight_gradient(const ConvLayer<T>& layer, int64_t map, int64_t x, const Vec<T>* grads, const Vec<T>* input,
                     Vec<T>* weight_sums) {
  const ConvGeometry& g = layer.g;
  const BlockLayout& layout = layer.layout;
  const int64_t rows = g.conv_height();
  for (int32_t c = g.connections.row_begin[map]; c < g.connections.row_begin[map + 1]; ++c) {
    Vec<T>* sums = weight_sums + c * g.kernel_size * g.kernel_size;
    const Vec<T>* strip = input + g.connections.in_channel[c] * layout.input_plane + x;
    if constexpr (K > 0) {
      constexpr int step = weight_rows(K);
      unroll<(K + step - 1) / step>([&](auto part) __attribute__((always_inline)) {
        constexpr int ky = part * step;
        constexpr int count = K - ky < step ? K - ky : step;
        weight_gradient_strip<K, count, Columns, T>(sums + ky * K, grads, strip + ky * layout.input_row,
                                                    layout.input_row, rows);
      });
    } else {
      for (int64_t ky = 0; ky < g.kernel_size; ++ky) {
        for (int64_t kx = 0; kx < g.kernel_size; ++kx) {
          weight_gradient_tap<Columns, T>(sums + ky * g.kernel_size + kx, grads, strip + ky * layout.input_row + kx,
                                          layout.input_row, rows);
        }
      }
    }
  }
}

// --- input gradient --------------------------------------------------------------------------------------------------

// Scatter the gradients of Columns neighbouring outputs into `target`, part of a row of the padded input's gradient,
// over all output maps and kernel rows that reach it. The first K - 1 vectors of `target` hold what the tile before
// left there; K = 0 expects zeros in the others, too.
template <int K, int Columns, typename T>
void input_gradient_tile(Vec<T>* target, const ConvLayer<T>& layer, const Vec<T>* all_grads, int64_t channel,
                         int64_t row, int64_t x) {
  const ConvGeometry& g = layer.g;
  const BlockLayout& layout = layer.layout;
  const Connections& table = g.connections;
  const int64_t kernel_size = K > 0 ? K : g.kernel_size;
  const int64_t first = std::max<int64_t>(0, row - g.conv_height() + 1);
  const int64_t last = std::min<int64_t>(kernel_size - 1, row);
  constexpr int reach = K > 0 ? Columns + K - 1 : 1;
  Vec<T> sum[reach]{};
  if constexpr (K > 0) {
    unroll<K - 1>([&](auto i) __attribute__((always_inline)) { sum[i] = target[i]; });
  }
  for (int32_t entry = table.column_begin[channel]; entry < table.column_begin[channel + 1]; ++entry) {
    const int32_t c = table.column_entry[entry];
    const T* weight = layer.weight + (c * kernel_size + first) * kernel_size;
    const Vec<T>* grads =
        all_grads + table.column_out[entry] * layout.rows * layout.columns + x * layout.rows + (row - first) * Columns;
    for (int64_t ky = first; ky <= last; ++ky, weight += kernel_size, grads -= Columns) {
      if constexpr (K > 0 && reach + K + 1 < LENET_FAST_VECTOR_REGISTERS) {
        Vec<T> tap[K];
        unroll<K>([&](auto kx) __attribute__((always_inline)) { tap[kx] = splat(weight[kx]); });
        unroll<Columns>([&](auto i) __attribute__((always_inline)) {
          const Vec<T> grad = grads[i];
          unroll<K>([&](auto kx) __attribute__((always_inline)) { sum[i + kx] += tap[kx] * grad; });
        });
      } else if constexpr (K > 0) {
        unroll<K>([&](auto kx) __attribute__((always_inline)) {
          const Vec<T> tap = splat(weight[kx]);
          unroll<Columns>([&](auto i) __attribute__((always_inline)) { sum[i + kx] += tap * grads[i]; });
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

// `padded_row`: room for columns + kernel_size vectors.
template <int K, typename T>
void input_gradient(const ConvLayer<T>& layer, const Vec<T>* grads, Planes<Vec<T>> grad_input, Vec<T>* padded_row) {
  const ConvGeometry& g = layer.g;
  const int64_t columns = layer.layout.columns, reached = columns + g.kernel_size - 1;
  const bool direct = reached == g.width;  // no padding, no odd column
  for (int64_t channel = 0; channel < g.in_channels; ++channel) {
    for (int64_t y = 0; y < g.height; ++y) {
      Vec<T>* const target = grad_input.at(channel, y);
      Vec<T>* const row = direct ? target : padded_row;
      std::fill(row, row + (K > 0 ? K - 1 : reached), Vec<T>{});
      for_each_tile(columns, [&](int64_t x, auto width) __attribute__((always_inline)) {
        input_gradient_tile<K, width, T>(row + x, layer, grads, channel, y + g.padding, x);
      });
      for (int64_t x = 0; !direct && x < g.width; ++x) {
        // A column that no window of the convolution reaches (a dropped last one) has gradient 0.
        target[x] = x + g.padding < reached ? padded_row[x + g.padding] : Vec<T>{};
      }
    }
  }
}

inline int64_t backward_scratch_size(const ConvGeometry& g, const BlockLayout& layout) {
  return g.out_channels * layout.rows * layout.columns +
         (layout.uses_winograd ? winograd::gradient_scratch_size(g, layout) : layout.columns + g.kernel_size);
}

// `record` and `input` of forward_block. Adds to `sums`; writes the height x width pixels of each plane of `grad_input`
// (data null: not wanted). Lanes outside `valid` (-1 where there is an image) add nothing.
template <typename T>
void backward_block(const ConvLayer<T>& layer, VecInt<T> valid, const Vec<T>* record, Planes<const Vec<T>> grad_output,
                    const Vec<T>* input, const BlockSums<T>& sums, Planes<Vec<T>> grad_input, Vec<T>* scratch) {
  const ConvGeometry& g = layer.g;
  const BlockLayout& layout = layer.layout;
  const int64_t map_size = layout.rows * layout.columns;
  const auto differentiate = with_pool(g.pool, [&]<Pool P>() { return differentiate_strip<P, T>; });
  with_kernel_size(g.kernel_size, [&](auto K) {
    for (int64_t map = 0; map < g.out_channels; ++map) {
      Vec<T> unwanted[3]{};
      for_each_tile(layout.columns, [&](int64_t x, auto width) {
        // The input gradient needs all strips of all maps at once; without it, they share one place.
        Vec<T>* const grads = scratch + (grad_input.data != nullptr ? map * map_size + x * layout.rows : 0);
        differentiate(layer, map, x, x + width, valid, record + map * layout.map_record, grad_output, grads,
                      sums.maps != nullptr ? sums.maps + 3 * map : unwanted);
        if (sums.weight != nullptr) {
          weight_gradient<K, width, T>(layer, map, x, grads, input, sums.weight);
        }
      });
    }
    if (grad_input.data != nullptr) {
      auto gradient = input_gradient<K, T>;
      if constexpr (winograd::kFitsRegisters) {
        gradient = layout.uses_winograd ? winograd::input_gradient<T> : gradient;
      }
      gradient(layer, scratch, grad_input, scratch + g.out_channels * map_size);
    }
  });
}

}  // namespace lenet_fast::cpu::LENET_FAST_ISA
