// The whole network forward for fewer images than a block has lanes: image by image, a convolution's lanes filled with
// columns or maps (conv_few.h), a dense layer as a product of its matrix with a vector, 16 rows at a time.
//
// A dense layer's W weights: 2 W operations an image, and all of them are read, from the L1 cache but for the first
// image: LeNet-5 has 236 KB of them.
#pragma once

#include "conv_few.h"

namespace lenet_fast::cpu::LENET_FAST_ISA {

// The reductions of `inner` values by kLanes rows of a matrix, one a lane: sum of add(sum, weight, x).
// Rows from `rows` on repeat the last one. A row's tail is read as the vector that ends with it: nothing beyond.
template <typename T, typename F>
LF_INLINE Vec<T> reduce_rows(const T* matrix, int64_t rows, int64_t inner, const T* x, F&& add) {
  constexpr int n = kLanes<T>;
  // Where every product is rounded, too, the sum is that of four shorter ones: fewer roundings are of the whole.
  constexpr int parts = kHasMultiplyAdd ? 1 : 4;
  const T* row[n];
  Vec<T> sums[parts][n];
  Vec<T>(&sum)[n] = sums[0];
  unroll<n>([&](auto r) __attribute__((always_inline)) {
    row[r] = matrix + std::min<int64_t>(r, rows - 1) * inner;
    unroll<parts>([&](auto p) __attribute__((always_inline)) { sums[p][r] = Vec<T>{}; });
  });
  int64_t k = 0;
  if constexpr (parts > 1) {
    for (; k + parts * n <= inner; k += parts * n) {
      unroll<parts>([&](auto p) __attribute__((always_inline)) {
        const Vec<T> value = load(x + k + p * n);
        unroll<n>([&](auto r) __attribute__((always_inline)) {
          sums[p][r] = add(sums[p][r], load(row[r] + k + p * n), value);
        });
      });
    }
    unroll<n>([&](auto r)
                  __attribute__((always_inline)) { sum[r] = (sum[r] + sums[1][r]) + (sums[2][r] + sums[3][r]); });
  }
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
  transpose(sum);
  unroll<n / 2>([&](auto r) __attribute__((always_inline)) { sum[r] += sum[r + n / 2]; });
  Vec<T> total = sum[0];
  unroll<n / 2 - 1>([&](auto r) __attribute__((always_inline)) { total += sum[r + 1]; });
  return total;
}

template <typename T>
void dense_few(const DenseGeometry& g, const DenseParameters<T>& p, const T* input, T* output) {
  constexpr int n = kLanes<T>;
  with_activation(g.activation, [&]<Activation A>() {
    for (int64_t row = 0; row < g.out_features; row += n) {
      const int64_t rows = std::min<int64_t>(n, g.out_features - row);
      const Vec<T> bias = p.bias.value != nullptr ? load_partial(p.bias.value + row, rows) : Vec<T>{};
      const Vec<T> sum = reduce_rows<T>(p.weight.value + row * g.in_features, rows, g.in_features, input,
                                        [](Vec<T> total, Vec<T> weight, Vec<T> x)
                                            __attribute__((always_inline)) { return total + weight * x; });
      store_partial(output + row, activate<A, T>(sum + bias).y, rows);
    }
  });
}

template <typename T>
void distances_few(const T* codes, int64_t classes, int64_t size, const T* input, T* output) {
  constexpr int n = kLanes<T>;
  for (int64_t row = 0; row < classes; row += n) {
    const int64_t rows = std::min<int64_t>(n, classes - row);
    const Vec<T> sum = reduce_rows<T>(codes + row * size, rows, size, input,
                                      [](Vec<T> total, Vec<T> code, Vec<T> x)
                                          __attribute__((always_inline)) { return total + (x - code) * (x - code); });
    store_partial(output + row, sum, rows);
  }
}

// Offsets in values: the convolutions' padded inputs, the dense layers' inputs and the last one's output, scratch.
template <typename T>
struct FewLayout {
  int64_t conv_input[kMaxConvs], dense[kMaxDenses + 1], scratch, end;

  explicit FewLayout(const NetworkGeometry& g) {
    int64_t next = 0, most = 0;
    const auto take = [&next](int64_t values) { return std::exchange(next, next + round_up(values, 64)); };
    for (int l = 0; l < g.num_convs; ++l) {
      conv_input[l] = take(FewPlanes(g.conv[l], kLanes<T>).size);
      most = std::max(most, few_maps_scratch(g.conv[l]));
    }
    for (int l = 0; l < g.num_denses; ++l) {
      dense[l] = take(g.dense[l].in_features + kLanes<T>);
    }
    dense[g.num_denses] = take(g.last_dense().out_features + kLanes<T>);
    scratch = take(most * kLanes<T>);
    end = next;
  }
};

template <typename T>
size_t network_few_bytes(const NetworkGeometry& g) {
  return static_cast<size_t>(FewLayout<T>(g).end) * sizeof(T);
}

// One image's pixels into the middle of the padded planes.
template <typename T>
void load_few(const ConvGeometry& g, const FewPlanes& planes, const T* image, T* input) {
  if (g.padding == 0) {
    std::copy(image, image + g.in_channels * g.height * g.width, input);
    return;
  }
  for (int64_t c = 0; c < g.in_channels; ++c) {
    for (int64_t y = 0; y < g.height; ++y, image += g.width) {
      std::copy(image, image + g.width, input + planes.begin + c * planes.plane + y * planes.row);
    }
  }
}

// Scores, or distances, (images, classes) of floating images in their order.
template <typename T>
void network_infer_few(const Network<T>& network, const T* images, int64_t count, T* output, void* memory) {
  const NetworkGeometry& g = network.geometry;
  const FewLayout<T> at(g);
  T* const values = static_cast<T*>(memory);
  for (int l = 0; l < g.num_convs; ++l) {
    if (g.conv[l].padding > 0) {
      T* const input = values + at.conv_input[l];
      std::fill(input, input + FewPlanes(g.conv[l], kLanes<T>).size, T(0));
    }
  }
  const ConvGeometry& first = g.conv[0];
  const bool measures_distance = g.output == Output::distances;
  for (int64_t image = 0; image < count; ++image, images += first.in_channels * first.height * first.width) {
    load_few<T>(first, FewPlanes(first, kLanes<T>), images, values + at.conv_input[0]);
    for (int l = 0; l < g.num_convs; ++l) {
      const ConvGeometry& conv = g.conv[l];
      Planes<T> target{values + at.dense[0], conv.out_height() * conv.out_width(), conv.out_width()};
      if (l + 1 < g.num_convs) {
        const FewPlanes next(g.conv[l + 1], kLanes<T>);
        target = {values + at.conv_input[l + 1] + next.begin, next.plane, next.row};
      }
      conv_few<T>({conv, network.conv[l], values + at.conv_input[l], FewPlanes(conv, kLanes<T>), target},
                  reinterpret_cast<Vec<T>*>(values + at.scratch));
    }
    T* const scores = output + image * g.classes;
    for (int l = 0; l < g.num_denses; ++l) {
      const bool is_last = l + 1 == g.num_denses && !measures_distance;
      dense_few<T>(g.dense[l], network.dense[l], values + at.dense[l], is_last ? scores : values + at.dense[l + 1]);
    }
    if (measures_distance) {
      distances_few<T>(network.codes, g.classes, g.last_dense().out_features, values + at.dense[g.num_denses], scores);
    }
  }
}

}  // namespace lenet_fast::cpu::LENET_FAST_ISA
