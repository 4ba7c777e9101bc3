// Vectors of the instruction set being compiled, one image a lane. Included by kernel sources only, inside the
// target pragma of their variant: everything lives in the variant's namespace, so no two variants share a symbol.
#pragma once

namespace lenet_fast::cpu::LENET_FAST_ISA {

#define LF_INLINE inline __attribute__((always_inline))

template <typename T>
struct VecTraits {
  typedef T Vec __attribute__((vector_size(LENET_FAST_VECTOR_BYTES)));
  using Bits = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  typedef Bits Int __attribute__((vector_size(LENET_FAST_VECTOR_BYTES)));
  static constexpr int lanes = LENET_FAST_VECTOR_BYTES / sizeof(T);
};

template <typename T>
using Vec = typename VecTraits<T>::Vec;
template <typename T>
using VecInt = typename VecTraits<T>::Int;
template <typename T>
inline constexpr int kLanes = VecTraits<T>::lanes;

template <typename T>
LF_INLINE Vec<T> splat(T value) {
  return value - Vec<T>{};
}

template <typename T>
LF_INLINE Vec<T> load(const T* source) {
  Vec<T> value;
  __builtin_memcpy(&value, source, sizeof(value));
  return value;
}

template <typename T>
LF_INLINE void store(T* target, Vec<T> value) {
  __builtin_memcpy(target, &value, sizeof(value));
}

// Call f with the compile-time indices 0 .. N-1: the only loop that reliably keeps an array in registers.
template <int N, typename F>
LF_INLINE void unroll(F&& f) {
  [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
    (f(std::integral_constant<int, I>{}), ...);
  }(std::make_integer_sequence<int, N>{});
}

// --- math: NaN stays NaN, infinities give the limit --------------------------------------------------------------

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
  x = x < lowest ? splat(lowest) : x;
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

template <typename T>
LF_INLINE Vec<T> sigmoid(Vec<T> z) {
  const Vec<T> e = exp_nonpositive<T>(z > T(0) ? -z : z);
  return (z > T(0) ? splat(T(1)) : e) / (T(1) + e);
}

// Odd polynomial (float) or rational (double) below 5/8, where 1 - exp would cancel; S. Moshier, Cephes.
template <typename T>
LF_INLINE Vec<T> tanh(Vec<T> z) {
  using V = Vec<T>;
  const V magnitude = z < T(0) ? -z : z;
  const V e = exp_nonpositive<T>(T(-2) * magnitude);
  const V large = (T(1) - e) / (T(1) + e);
  const V s = z * z;
  V small;
  if constexpr (sizeof(T) == 4) {
    const V p =
        (((T(-5.70498872745e-3) * s + T(2.06390887954e-2)) * s - T(5.37397155531e-2)) * s + T(1.33314422036e-1)) * s -
        T(3.33332819422e-1);
    small = p * s * z + z;
  } else {
    const V p = (T(-9.64399179425052238628e-1) * s - T(9.92877231001918586564e1)) * s - T(1.61468768441708447952e3);
    const V q = ((s + T(1.12811678491632931402e2)) * s + T(2.23548839060100448583e3)) * s + T(4.84406305325125486048e3);
    small = p / q * s * z + z;
  }
  return magnitude < T(0.625) ? small : (z < T(0) ? -large : large);
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
    return {y, y * (T(1) - y)};
  } else if constexpr (A == Activation::tanh) {
    const Vec<T> y = tanh<T>(z);
    return {y, T(1) - y * y};
  } else if constexpr (A == Activation::scaled_tanh) {
    const Vec<T> y = tanh<T>(T(kScaledTanhSlope) * z);
    return {T(kScaledTanhAmplitude) * y, T(kScaledTanhAmplitude * kScaledTanhSlope) * (T(1) - y * y)};
  } else {
    return {z, splat(T(1))};
  }
}

}  // namespace lenet_fast::cpu::LENET_FAST_ISA
