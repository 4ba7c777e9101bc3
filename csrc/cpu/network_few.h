// The whole network forward for fewer images than a block has lanes: layer by layer, a convolution's lanes filled with
// bands of rows (bands.h), a dense layer as a product of its matrix with a vector, 16 rows at a time.
//
// A dense layer's W weights: 2 W operations an image, and all of them are read, from the L1 cache but for the first
// image: LeNet-5 has 236 KB of them.
#pragma once

#include "conv_act_pool.h"

namespace lenet_fast::cpu::LENET_FAST_ISA {

template <typename T>
LF_INLINE VecInt<T> lane_index() {
  return []<int... I>(std::integer_sequence<int, I...>)
             __attribute__((always_inline)) { return VecInt<T>{I...}; }(std::make_integer_sequence<int, kLanes<T>>{});
}

// The reductions of `inner` values by kLanes rows of a matrix, one a lane: sum of add(sum, weight, x).
// Rows from `rows` on repeat the last one. A row's tail is read as the vector that ends with it: nothing beyond.
template <typename T, typename F>
LF_INLINE Vec<T> reduce_rows(const T* matrix, int64_t rows, int64_t inner, const T* x, F&& add) {
  constexpr int n = kLanes<T>;
  const T* row[n];
  Vec<T> sum[n];
  unroll<n>([&](auto r) __attribute__((always_inline)) {
    row[r] = matrix + std::min<int64_t>(r, rows - 1) * inner;
    sum[r] = Vec<T>{};
  });
  int64_t k = 0;
  for (; k + n <= inner; k += n) {
    const Vec<T> value = load(x + k);
    unroll<n>([&](auto r) __attribute__((always_inline)) { sum[r] = add(sum[r], load(row[r] + k), value); });
  }
  if (k < inner) {
    // Both zero in the lanes that were taken already.
    const int64_t first = inner >= n ? inner - n : 0;
    const auto taken = static_cast<typename VecTraits<T>::Bits>(k - first);
    const auto tail = [&](const T* values) __attribute__((always_inline)) {
      return inner >= n ? (lane_index<T>() >= taken ? load(values + first) : Vec<T>{}) : load_partial(values, inner);
    };
    const Vec<T> value = tail(x);
    unroll<n>([&](auto r) __attribute__((always_inline)) { sum[r] = add(sum[r], tail(row[r]), value); });
  }
  transpose<T>(sum);
  unroll<n / 2>([&](auto r) __attribute__((always_inline)) { sum[r] += sum[r + n / 2]; });
  Vec<T> total = sum[0];
  unroll<n / 2 - 1>([&](auto r) __attribute__((always_inline)) { total += sum[r + 1]; });
  return total;
}

template <typename T>
void dense_few(const DenseGeometry& g, const DenseParameters<T>& p, const T* input, T* output, int64_t images) {
  constexpr int n = kLanes<T>;
  with_activation(g.activation, [&]<Activation A>() {
    for (int64_t row = 0; row < g.out_features; row += n) {
      const int64_t rows = std::min<int64_t>(n, g.out_features - row);
      const Vec<T> bias = p.bias.value != nullptr ? load_partial(p.bias.value + row, rows) : Vec<T>{};
      for (int64_t image = 0; image < images; ++image) {
        const Vec<T> sum = reduce_rows<T>(
            p.weight.value + row * g.in_features, rows, g.in_features, input + image * g.in_features,
            [](Vec<T> total, Vec<T> weight, Vec<T> x) __attribute__((always_inline)) { return total + weight * x; });
        store_partial(output + image * g.out_features + row, activate<A, T>(sum + bias).y, rows);
      }
    }
  });
}

template <typename T>
void distances_few(const T* codes, int64_t classes, int64_t size, const T* input, T* output, int64_t images) {
  constexpr int n = kLanes<T>;
  for (int64_t row = 0; row < classes; row += n) {
    const int64_t rows = std::min<int64_t>(n, classes - row);
    for (int64_t image = 0; image < images; ++image) {
      const Vec<T> sum = reduce_rows<T>(codes + row * size, rows, size, input + image * size,
                                        [](Vec<T> total, Vec<T> code, Vec<T> x)
                                            __attribute__((always_inline)) { return total + (x - code) * (x - code); });
      store_partial(output + image * classes + row, sum, rows);
    }
  }
}

// Offsets in bytes: the convolutions' workspace, and two buffers that the layers write to in turn.
template <typename T>
struct FewLayout {
  size_t buffer[2], end;

  FewLayout(const NetworkGeometry& g, int64_t images) {
    size_t workspace = 0;
    int64_t most = 0;
    for (int l = 0; l < g.num_convs; ++l) {
      ConvGeometry conv = g.conv[l];
      conv.batch = images;
      workspace = std::max(workspace, workspace_bytes<T, false>(choose_bands(conv, kLanes<T>).piece));
      most = std::max(most, conv.out_channels * conv.out_height() * conv.out_width());
    }
    for (int l = 0; l < g.num_denses; ++l) {
      most = std::max(most, g.dense[l].out_features);
    }
    const auto size = static_cast<size_t>(round_up(most * images * int64_t{sizeof(T)}, 64));
    buffer[0] = static_cast<size_t>(round_up(static_cast<int64_t>(workspace), 64));
    buffer[1] = buffer[0] + size;
    end = buffer[1] + size;
  }
};

template <typename T>
size_t network_few_bytes(const NetworkGeometry& g, int64_t images) {
  return FewLayout<T>(g, images).end;
}

// Scores, or distances, (images, classes) of floating images in their order.
template <typename T>
void network_infer_few(const Network<T>& network, const T* images, int64_t count, T* output, void* memory) {
  const NetworkGeometry& g = network.geometry;
  const FewLayout<T> layout(g, count);
  T* const buffer[2] = {reinterpret_cast<T*>(static_cast<char*>(memory) + layout.buffer[0]),
                        reinterpret_cast<T*>(static_cast<char*>(memory) + layout.buffer[1])};
  const T* input = images;
  int turn = 0;
  for (int l = 0; l < g.num_convs; ++l, turn ^= 1) {
    ConvGeometry conv = g.conv[l];
    conv.batch = count;
    const ConvParameters<T>& p = network.conv[l];
    const Bands bands = choose_bands(conv, kLanes<T>);
    conv_act_pool_forward<T>({conv, bands, input, p.weight.value, p.bias.value, p.coefficient.value,
                              p.subsample_bias.value, buffer[turn], nullptr},
                             0, count * bands.per_image, memory);
    input = buffer[turn];
  }
  const bool measures_distance = g.output == Output::distances;
  for (int l = 0; l < g.num_denses; ++l, turn ^= 1) {
    T* const target = l + 1 < g.num_denses || measures_distance ? buffer[turn] : output;
    dense_few<T>(g.dense[l], network.dense[l], input, target, count);
    input = target;
  }
  if (measures_distance) {
    distances_few<T>(network.codes, g.classes, g.last_dense().out_features, input, output, count);
  }
}

}  // namespace lenet_fast::cpu::LENET_FAST_ISA
