// exp and the activations on vectors. Errors, as tests/test_operators.py checks them: at most 4 ulp wherever the result
// is a normal number. NaN stays NaN, infinities give the limit.
#pragma once

#include "vec.h"

namespace lenet_fast::cpu::LENET_FAST_ISA {

// exp for x <= 0 (what the activations need): Cody-Waite reduction and a Taylor polynomial on |r| <= ln2 / 2, whose
// remainder is below half an ulp. Gradual underflow is right: the scale is applied in two steps.
template <typename T>
LF_INLINE Vec<T> exp_nonpositive(Vec<T> x) {
  using V = Vec<T>;
  using I = VecInt<T>;
  constexpr bool single = sizeof(T) == 4;
  constexpr T lowest = single ? T(-104) : T(-746);
  constexpr T log2e = T(1.4426950408889634074);
  constexpr T ln2_high = single ? T(0.693359375) : T(6.93145751953125e-1);
  constexpr T ln2_low = single ? T(-2.12194440e-4) : T(1.42860682030941723212e-6);
  constexpr T round_magic = single ? T(12582912.0) : T(6755399441055744.0);  // 1.5 * 2^mantissa
  constexpr int mantissa = single ? 23 : 52;
  constexpr int bias = single ? 127 : 1023;
  constexpr int degree = single ? 7 : 13;
  x = at_least<T>(x, lowest);
  const V shifted = x * log2e + round_magic;
  const V n = shifted - round_magic;
  const V r = (x - n * ln2_high) - n * ln2_low;
  constexpr auto inverse_factorial = [](int k) constexpr {
    double f = 1;
    for (int i = 2; i <= k; ++i) {
      f *= i;
    }
    return T(1.0 / f);
  };
  V p = splat(inverse_factorial(degree));
  unroll<degree>([&](auto i) __attribute__((always_inline)) {
    constexpr T coefficient = inverse_factorial(degree - 1 - i);
    p = p * r + coefficient;
  });
  const I exponent = (I)shifted - (I)splat(round_magic);
  const I half = exponent >> 1;
  return p * (V)((half + bias) << mantissa) * (V)((exponent - half + bias) << mantissa);
}

// float32: e^x = scale * (1 + m) for |x| < 88, m by a minimax polynomial on |r| <= ln2 / 2 (1.3e-8 of m).
struct ExpParts {
  Vec<float> scale, m;
};

LF_INLINE ExpParts exp_parts(Vec<float> x) {
  constexpr float round_magic = 12582912.0f;  // 1.5 * 2^23
  const Vec<float> shifted = x * 1.44269504f + round_magic;
  const Vec<float> n = shifted - round_magic;
  const Vec<float> r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // exact product: right without FMA, too
  Vec<float> q = r * 1.3882520e-3f + 8.3665286e-3f;
  q = q * r + 4.1667200e-2f;
  q = q * r + 1.66665436e-1f;
  q = q * r + 4.99999982e-1f;
  return {(Vec<float>)(((VecInt<float>)shifted + (127 - 0x4b400000)) << 23), r * r * q + r};
}

// 1 / (1 + exp(-z)).
template <typename T>
LF_INLINE Vec<T> sigmoid(Vec<T> z) {
  if constexpr (sizeof(T) == 4) {
    const auto [scale, m] = exp_parts(at_least<T>(-z, T(-87)));
    const Vec<T> y = T(1) / ((T(1) + scale) + scale * m);
    return z < T(-87.33654) ? Vec<T>{} : y;  // would be subnormal
  } else {
    const Vec<T> e = exp_nonpositive<T>(z > T(0) ? -z : z);
    return (z > T(0) ? splat(T(1)) : e) / (T(1) + e);
  }
}

// float32: through exp(2 z) - 1, which is m itself near 0. float64: through exp, and below 5/8, where 1 - exp would
// cancel, the rational of S. Moshier, Cephes.
template <typename T>
LF_INLINE Vec<T> tanh(Vec<T> z) {
  using V = Vec<T>;
  if constexpr (sizeof(T) == 4) {
    const auto [scale, m] = exp_parts(T(2) * at_most<T>(at_least<T>(z, T(-20)), T(20)));
    const V e = scale * m + (scale - T(1));
    return e / (e + T(2));
  } else {
    const V magnitude = z < T(0) ? -z : z;
    const V e = exp_nonpositive<T>(T(-2) * magnitude);
    const V large = (T(1) - e) / (T(1) + e);
    const V s = z * z;
    const V p = (T(-9.64399179425052238628e-1) * s - T(9.92877231001918586564e1)) * s - T(1.61468768441708447952e3);
    const V q = ((s + T(1.12811678491631932402e2)) * s + T(2.23548839060100448583e3)) * s + T(4.84406305325125486048e3);
    const V small = p / q * s * z + z;
    return magnitude < T(0.625) ? small : (z < T(0) ? -large : large);
  }
}

// 1 - y^2 without cancelling what was rounded.
template <typename T>
LF_INLINE Vec<T> one_minus_square(Vec<T> y) {
  return kHasMultiplyAdd ? T(1) - y * y : (T(1) - y) * (T(1) + y);
}

template <typename T>
struct Activated {
  Vec<T> y, derivative;
};

// The activation at z and its derivative there; what the caller does not use costs nothing.
template <Activation A, typename T>
LF_INLINE Activated<T> activate(Vec<T> z) {
  if constexpr (A == Activation::relu) {
    return {z < T(0) ? Vec<T>{} : z, z <= T(0) ? Vec<T>{} : splat(T(1))};
  } else if constexpr (A == Activation::sigmoid) {
    const Vec<T> y = sigmoid<T>(z);
    return {y, kHasMultiplyAdd ? y - y * y : y * (T(1) - y)};
  } else if constexpr (A == Activation::tanh) {
    const Vec<T> y = tanh<T>(z);
    return {y, one_minus_square<T>(y)};
  } else if constexpr (A == Activation::scaled_tanh) {
    const Vec<T> y = tanh<T>(T(kScaledTanhSlope) * z);
    return {T(kScaledTanhAmplitude) * y, T(kScaledTanhAmplitude * kScaledTanhSlope) * one_minus_square<T>(y)};
  } else {
    return {z, splat(T(1))};
  }
}

}  // namespace lenet_fast::cpu::LENET_FAST_ISA
