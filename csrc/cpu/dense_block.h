// Dense layers on blocks of images. Going forward and back a weight is a broadcast and a vector holds 16 images; the
// weight gradient, a sum over images, is the product of the output gradients (features, images) with the inputs
// (images, features), so that it is summed in registers and written once.
//
// With W weights: 2 W operations an image each way, and 2 W for the gradient; every weight is read once for all blocks
// of a group, every gradient written once a batch.
#pragma once

#include "conv_layer.h"

namespace lenet_fast::cpu::LENET_FAST_ISA {

// Image blocks that go through the dense layers together.
inline constexpr int kGroup = 2;

#if LENET_FAST_VECTOR_REGISTERS >= 32
inline constexpr int kProductRows = 8;
inline constexpr int kGradientRows = 5, kGradientColumns = 4;
#else
inline constexpr int kProductRows = 4;
inline constexpr int kGradientRows = 3, kGradientColumns = 3;
#endif

// f(row, block, sum over k of matrix[row * row_stride + k * inner_stride] * x[block][k]) for Rows rows.
template <int Rows, int Blocks, typename T, typename F>
LF_INLINE void product_tile(const T* matrix, int64_t row_stride, int64_t inner, int64_t inner_stride,
                            const Vec<T>* const* x, int64_t first_row, F&& f) {
  Vec<T> sum[Rows][Blocks]{};
  for (int64_t k = 0; k < inner; ++k, matrix += inner_stride) {
    unroll<Blocks>([&](auto b) __attribute__((always_inline)) {
      const Vec<T> value = x[b][k];
      unroll<Rows>([&](auto r) __attribute__((always_inline)) { sum[r][b] += matrix[r * row_stride] * value; });
    });
  }
  unroll<Rows>([&](auto r) __attribute__((always_inline)) {
    unroll<Blocks>([&](auto b) __attribute__((always_inline)) { f(first_row + r, int{b}, sum[r][b]); });
  });
}

// The product of a (rows, inner) matrix with `Blocks` blocks of `inner` vectors: f(row, block, sum).
template <int Blocks, typename T, typename F>
void product(const T* matrix, int64_t rows, int64_t row_stride, int64_t inner, int64_t inner_stride,
             const Vec<T>* const* x, F&& f) {
  int64_t row = 0;
  for (; row + kProductRows <= rows; row += kProductRows) {
    product_tile<kProductRows, Blocks, T>(matrix + row * row_stride, row_stride, inner, inner_stride, x, row, f);
  }
  for (; row + 2 <= rows; row += 2) {
    product_tile<2, Blocks, T>(matrix + row * row_stride, row_stride, inner, inner_stride, x, row, f);
  }
  for (; row < rows; ++row) {
    product_tile<1, Blocks, T>(matrix + row * row_stride, row_stride, inner, inner_stride, x, row, f);
  }
}

// The derivative of an activation from its own value y.
template <Activation A, typename T>
LF_INLINE Vec<T> derivative_from_output(Vec<T> y) {
  if constexpr (A == Activation::relu) {
    return y <= T(0) ? Vec<T>{} : splat(T(1));
  } else if constexpr (A == Activation::sigmoid) {
    return y * (T(1) - y);
  } else if constexpr (A == Activation::tanh) {
    return one_minus_square<T>(y);
  } else if constexpr (A == Activation::scaled_tanh) {
    const Vec<T> t = y * T(1 / kScaledTanhAmplitude);
    return T(kScaledTanhAmplitude * kScaledTanhSlope) * one_minus_square<T>(t);
  } else {
    return splat(T(1));
  }
}

template <int Blocks, typename T>
void dense_forward(const DenseGeometry& g, const T* weight, const T* bias, const Vec<T>* const* input,
                   Vec<T>* const* output) {
  with_activation(g.activation, [&]<Activation A>() {
    product<Blocks, T>(weight, g.out_features, g.in_features, g.in_features, 1, input,
                       [&](int64_t row, int block, Vec<T> sum) __attribute__((always_inline)) {
                         const T shift = bias != nullptr ? bias[row] : T(0);
                         output[block][row] = activate<A, T>(sum + shift).y;
                       });
  });
}

// grad (of the output) becomes the gradient of the pre-activation.
template <typename T>
void dense_differentiate(const DenseGeometry& g, const Vec<T>* output, Vec<T>* grad) {
  with_activation(g.activation, [&]<Activation A>() {
    for (int64_t i = 0; i < g.out_features; ++i) {
      grad[i] *= derivative_from_output<A, T>(output[i]);
    }
  });
}

template <int Blocks, typename T>
void dense_input_gradient(const DenseGeometry& g, const T* weight, const Vec<T>* const* grad,
                          Vec<T>* const* grad_input) {
  product<Blocks, T>(weight, g.in_features, 1, g.out_features, g.in_features, grad,
                     [&](int64_t row, int block, Vec<T> sum)
                         __attribute__((always_inline)) { grad_input[block][row] = sum; });
}

// sums (Rows, count <= Columns vectors) of grads[row][image] * inputs[image][column] over the images, put or added into
// target rows of `stride` values.
template <int Rows, int Columns, typename T>
void weight_gradient_tile(T* target, int64_t stride, int64_t columns, bool accumulate, const T* grads,
                          int64_t grads_stride, const T* inputs, int64_t inputs_stride, int64_t images) {
  Vec<T> sum[Rows][Columns]{};
  for (int64_t n = 0; n < images; ++n, inputs += inputs_stride) {
    Vec<T> input[Columns];
    unroll<Columns>([&](auto c) __attribute__((always_inline)) { input[c] = load(inputs + c * kLanes<T>); });
    unroll<Rows>([&](auto r) __attribute__((always_inline)) {
      const T grad = grads[r * grads_stride + n];
      unroll<Columns>([&](auto c) __attribute__((always_inline)) { sum[r][c] += grad * input[c]; });
    });
  }
  unroll<Rows>([&](auto r) __attribute__((always_inline)) {
    unroll<Columns>([&](auto c) __attribute__((always_inline)) {
      T* const at = target + r * stride + c * kLanes<T>;
      const int64_t left = columns - c * kLanes<T>;
      if (left >= kLanes<T>) {
        store(at, accumulate ? load(at) + sum[r][c] : sum[r][c]);
      } else {
        for (int64_t i = 0; i < left; ++i) {
          at[i] = accumulate ? at[i] + sum[r][c][i] : sum[r][c][i];
        }
      }
    });
  });
}

// Rows [begin, end) of the gradient of a weight (out_features, in_features). `grads` holds a row of `grads_stride`
// images a feature; `inputs` a row of `inputs_stride` (a multiple of the lanes) features an image.
template <typename T>
void dense_weight_gradient(T* target, int64_t in_features, int64_t begin, int64_t end, bool accumulate, const T* grads,
                           int64_t grads_stride, const T* inputs, int64_t inputs_stride, int64_t images) {
  const auto strip = [&](auto rows, int64_t row) {
    int64_t column = 0;
    const auto tile = [&](auto columns) {
      weight_gradient_tile<rows, columns, T>(target + row * in_features + column, in_features, in_features - column,
                                             accumulate, grads + row * grads_stride, grads_stride, inputs + column,
                                             inputs_stride, images);
      column += columns * kLanes<T>;
    };
    while (in_features - column > (kGradientColumns - 1) * kLanes<T>) {
      tile(std::integral_constant<int, kGradientColumns>{});
    }
    while (column < in_features) {
      tile(std::integral_constant<int, 1>{});
    }
  };
  int64_t row = begin;
  for (; row + kGradientRows <= end; row += kGradientRows) {
    strip(std::integral_constant<int, kGradientRows>{}, row);
  }
  for (; row < end; ++row) {
    strip(std::integral_constant<int, 1>{}, row);
  }
}

// The same for the bias.
template <typename T>
void dense_bias_gradient(T* target, int64_t begin, int64_t end, bool accumulate, const T* grads, int64_t grads_stride,
                         int64_t images) {
  for (int64_t row = begin; row < end; ++row) {
    Vec<T> sums{};
    const T* grad = grads + row * grads_stride;
    int64_t n = 0;
    for (; n + kLanes<T> <= images; n += kLanes<T>) {
      sums += load(grad + n);
    }
    T sum = sum_of_lanes<T>(sums);
    for (; n < images; ++n) {
      sum += grad[n];
    }
    target[row] = accumulate ? target[row] + sum : sum;
  }
}

}  // namespace lenet_fast::cpu::LENET_FAST_ISA
