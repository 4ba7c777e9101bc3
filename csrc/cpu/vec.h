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

// Whether the compiler makes one instruction, with one rounding, of a multiplication and an addition.
#if defined(__aarch64__)
inline constexpr bool kHasMultiplyAdd = true;
#else
inline constexpr bool kHasMultiplyAdd = LENET_FAST_VECTOR_BYTES > 16;
#endif

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

// The first `count` elements; the others 0.
template <typename T>
LF_INLINE Vec<T> load_partial(const T* source, int64_t count) {
  T values[kLanes<T>] = {};
  std::copy(source, source + count, values);
  return load(values);
}

template <typename T>
LF_INLINE void store_partial(T* target, Vec<T> value, int64_t count) {
  T values[kLanes<T>];
  store(values, value);
  std::copy(values, values + count, target);
}

// Clamp from one side; NaN stays.
template <typename T>
LF_INLINE Vec<T> at_least(Vec<T> value, T bound) {
  return value < bound ? splat(bound) : value;
}

template <typename T>
LF_INLINE Vec<T> at_most(Vec<T> value, T bound) {
  return value > bound ? splat(bound) : value;
}

// Have the compiler load `value` here and once, rather than from memory at every use.
template <typename V>
LF_INLINE void load_once([[maybe_unused]] V& value) {
#if defined(__x86_64__)
  asm("" : "+v"(value));
#elif defined(__aarch64__)
  asm("" : "+w"(value));
#endif
}

// Call f with the compile-time indices 0 .. N-1: the only loop that reliably keeps an array in registers.
template <int N, typename F>
LF_INLINE void unroll(F&& f) {
  [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
    (f(std::integral_constant<int, I>{}), ...);
  }(std::make_integer_sequence<int, N>{});
}

// The sum of the lanes, pairwise: halves onto each other.
template <typename T>
LF_INLINE T sum_of_lanes(Vec<T> value) {
  constexpr int n = kLanes<T>;
  unroll<n>([&](auto round) __attribute__((always_inline)) {
    constexpr int width = n >> (round + 1);
    if constexpr (width > 0) {
      value += [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
        return __builtin_shufflevector(value, value, ((I + width) % n)...);
      }(std::make_integer_sequence<int, n>{});
    }
  });
  return value[0];
}

}  // namespace lenet_fast::cpu::LENET_FAST_ISA
