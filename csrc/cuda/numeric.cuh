// Storage types, activations and 2x2 pooling of one window in registers.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "../geometry.h"

namespace lenet_fast::cuda {

// What a storage type is computed in.
template <typename S>
using Compute = std::conditional_t<std::is_same_v<S, double>, double, float>;

__device__ inline float widen(float value) { return value; }
__device__ inline double widen(double value) { return value; }
__device__ inline float widen(__half value) { return __half2float(value); }
__device__ inline float widen(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename S>
__device__ S narrow(Compute<S> value) {
  if constexpr (std::is_same_v<S, __half>) {
    return __float2half_rn(value);
  } else if constexpr (std::is_same_v<S, __nv_bfloat16>) {
    return __float2bfloat16_rn(value);
  } else {
    return value;
  }
}

// 1 / (1 + exp(-z)). The approximate division is within 2 ulp, and 0 where the result is below the normal numbers.
__device__ inline float sigmoid(float z) { return __fdividef(1.0f, 1.0f + expf(-z)); }
__device__ inline double sigmoid(double z) { return 1.0 / (1.0 + exp(-z)); }
__device__ inline float hyperbolic_tangent(float z) { return tanhf(z); }
__device__ inline double hyperbolic_tangent(double z) { return tanh(z); }

// Value and derivative of an activation. NaN propagates; the derivative of ReLU at 0 is 0.
template <Activation A, typename T>
__device__ __forceinline__ T activate(T z) {
  if constexpr (A == Activation::relu) {
    return z < T(0) ? T(0) : z;
  } else if constexpr (A == Activation::sigmoid) {
    return sigmoid(z);
  } else if constexpr (A == Activation::tanh) {
    return hyperbolic_tangent(z);
  } else if constexpr (A == Activation::scaled_tanh) {
    return T(kScaledTanhAmplitude) * hyperbolic_tangent(T(kScaledTanhSlope) * z);
  } else {
    return z;
  }
}

// From z and y = activate<A>(z).
template <Activation A, typename T>
__device__ __forceinline__ T derivative(T z, T y) {
  if constexpr (A == Activation::relu) {
    return z <= T(0) ? T(0) : T(1);
  } else if constexpr (A == Activation::sigmoid) {
    return y * (T(1) - y);
  } else if constexpr (A == Activation::tanh) {
    return T(1) - y * y;
  } else if constexpr (A == Activation::scaled_tanh) {
    constexpr T amplitude = T(kScaledTanhAmplitude), slope = T(kScaledTanhSlope);
    return slope * (amplitude - y * y * (T(1) / amplitude));
  } else {
    return T(1);
  }
}

// Call f(std::integral_constant<Activation, A>{}): one uniform branch outside the arithmetic.
template <typename F>
__device__ __forceinline__ void with_activation(Activation activation, F&& f) {
  switch (activation) {
    case Activation::identity:
      return f(std::integral_constant<Activation, Activation::identity>{});
    case Activation::relu:
      return f(std::integral_constant<Activation, Activation::relu>{});
    case Activation::sigmoid:
      return f(std::integral_constant<Activation, Activation::sigmoid>{});
    case Activation::tanh:
      return f(std::integral_constant<Activation, Activation::tanh>{});
    case Activation::scaled_tanh:
      return f(std::integral_constant<Activation, Activation::scaled_tanh>{});
  }
}

// The position of the largest of a window's four pre-activations as PyTorch's pooling has it: the first of equals,
// NaN before everything. Every activation is nondecreasing, so that pooling may come first.
template <typename T>
__device__ __forceinline__ int argmax(const T (&z)[4]) {
  int best = 0;
  T value = z[0];
#pragma unroll
  for (int i = 1; i < 4; ++i) {
    const bool takes_over = z[i] > value || z[i] != z[i];
    value = takes_over ? z[i] : value;
    best = takes_over ? i : best;
  }
  return best;
}

template <typename T>
__device__ __forceinline__ T select(const T (&z)[4], int i) {
  return i == 0 ? z[0] : i == 1 ? z[1] : i == 2 ? z[2] : z[3];
}

// Subsampling parameters of one output map.
template <typename T>
struct Subsample {
  T coefficient, bias;
};

// Pooled activation of a window; not for Pool::none.
template <Activation A, typename T>
__device__ __forceinline__ T pool_window(const T (&z)[4], Pool pool, Subsample<T> subsample) {
  if (pool == Pool::max) {
    return activate<A>(select(z, argmax(z)));
  }
  const T sum = (activate<A>(z[0]) + activate<A>(z[1])) + (activate<A>(z[2]) + activate<A>(z[3]));
  return pool == Pool::avg ? T(0.25) * sum : activate<A>(subsample.coefficient * sum + subsample.bias);
}

// The gradients of a window's outputs: one, or four where nothing is pooled.
template <typename S, typename T>
__device__ __forceinline__ void load_gradients(T (&grad)[4], const S* plane, Pool pool, int out_height, int out_width,
                                               int y, int x) {
  if (pool != Pool::none) {
    grad[0] = T(widen(plane[y * out_width + x]));
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = 2 * y + i / 2, column = 2 * x + i % 2;
    grad[i] = row < out_height && column < out_width ? T(widen(plane[row * out_width + column])) : T(0);
  }
}

// What a window contributes to the gradients of its map's subsampling parameters.
template <typename T>
struct SubsampleGradients {
  T coefficient, bias;
};

// z becomes the gradient of the pre-activations, given that of the pooled output (for Pool::none: of the four).
template <Activation A, typename T>
__device__ __forceinline__ SubsampleGradients<T> differentiate_window(T (&z)[4], const T (&grad)[4], Pool pool,
                                                                      Subsample<T> subsample) {
  SubsampleGradients<T> sums{T(0), T(0)};
  if (pool == Pool::max) {
    const int best = argmax(z);
    const T winner = select(z, best);
    const T gradient = grad[0] * derivative<A>(winner, activate<A>(winner));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      z[i] = i == best ? gradient : T(0);
    }
    return sums;
  }
  T y[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    y[i] = activate<A>(z[i]);
  }
  T scale = T(0.25) * grad[0];
  if (pool == Pool::subsample) {
    const T sum = (y[0] + y[1]) + (y[2] + y[3]);
    const T u = subsample.coefficient * sum + subsample.bias;
    sums.bias = grad[0] * derivative<A>(u, activate<A>(u));
    sums.coefficient = sums.bias * sum;
    scale = sums.bias * subsample.coefficient;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    z[i] = (pool == Pool::none ? grad[i] : scale) * derivative<A>(z[i], y[i]);
  }
  return sums;
}

}  // namespace lenet_fast::cuda
