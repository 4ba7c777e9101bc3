// Blocks of images with the batch innermost: one vector holds one pixel of `lanes` images, so that every weight of a
// convolution is a broadcast and nothing is ever shuffled in the arithmetic. Conversion is one transpose each way.
#pragma once

#include "vec.h"

namespace lenet_fast::cpu::LENET_FAST_ISA {

// Interleave the lower (Half = 0) or upper half of a and b.
template <int Half, typename T>
LF_INLINE Vec<T> zip(Vec<T> a, Vec<T> b) {
  constexpr int n = kLanes<T>;
  return [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
    return __builtin_shufflevector(a, b, (Half * n / 2 + I / 2 + I % 2 * n)...);
  }(std::make_integer_sequence<int, n>{});
}

template <typename T>
LF_INLINE void transpose(Vec<T> (&m)[kLanes<T>]) {
  constexpr int n = kLanes<T>;
  constexpr int rounds = n == 16 ? 4 : n == 8 ? 3 : n == 4 ? 2 : 1;
  unroll<rounds>([&](auto) __attribute__((always_inline)) {
    Vec<T> zipped[n];
    unroll<n / 2>([&](auto i) __attribute__((always_inline)) {
      zipped[2 * i] = zip<0, T>(m[i], m[i + n / 2]);
      zipped[2 * i + 1] = zip<1, T>(m[i], m[i + n / 2]);
    });
    unroll<n>([&](auto i) __attribute__((always_inline)) { m[i] = zipped[i]; });
  });
}

// Where each lane's pixels begin in memory; null: the lane is empty.
template <typename Value>
struct Lanes {
  static constexpr int count = kLanes<std::remove_const_t<Value>>;
  Value* begin[count] = {};
};

// block[p] = pixel p of every lane, of empty lanes 0. Up to `end`, what lies behind the pixels may be read.
template <typename T>
void load_run(Vec<T>* block, const Lanes<const T>& lanes, int64_t offset, int64_t pixels, const T* end) {
  constexpr int n = kLanes<T>;
  for (int64_t p = 0; p < pixels; p += n) {
    Vec<T> m[n];
    unroll<n>([&](auto i) __attribute__((always_inline)) {
      const T* source = lanes.begin[i];
      if (source == nullptr) {
        m[i] = Vec<T>{};
      } else if (end - source >= offset + p + n) {
        m[i] = load(source + offset + p);
      } else {
        m[i] = load_partial(source + offset + p, pixels - p);
      }
    });
    transpose<T>(m);
    if (pixels - p >= n) {
      unroll<n>([&](auto i) __attribute__((always_inline)) { block[p + i] = m[i]; });
    } else {
      std::copy(m, m + (pixels - p), block + p);
    }
  }
}

// Pixel p of every lane that is not empty = block[p].
template <typename T>
void store_run(const Lanes<T>& lanes, int64_t offset, const Vec<T>* block, int64_t pixels) {
  constexpr int n = kLanes<T>;
  for (int64_t p = 0; p < pixels; p += n) {
    const int64_t width = std::min<int64_t>(n, pixels - p);
    Vec<T> m[n];
    if (width == n) {
      unroll<n>([&](auto i) __attribute__((always_inline)) { m[i] = block[p + i]; });
    } else {
      std::copy(block + p, block + pixels, m);
      std::fill(m + width, m + n, Vec<T>{});
    }
    transpose<T>(m);
    unroll<n>([&](auto i) __attribute__((always_inline)) {
      if (lanes.begin[i] != nullptr) {
        T* target = lanes.begin[i] + offset + p;
        width == n ? store(target, m[i]) : store_partial(target, m[i], width);
      }
    });
  }
}

}  // namespace lenet_fast::cpu::LENET_FAST_ISA
