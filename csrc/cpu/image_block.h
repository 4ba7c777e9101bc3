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

// block[position[p]] (block[p] without positions) = pixel p of each image; absent images become 0.
template <typename T>
void load_block(Vec<T>* block, const int32_t* position, const T* images, int64_t pixels, int64_t count) {
  constexpr int n = kLanes<T>;
  const auto at = [&](int64_t p) { return position == nullptr ? p : int64_t{position[p]}; };
  int64_t p = 0;
  for (; p + n <= pixels; p += n) {
    Vec<T> m[n];
    unroll<n>([&](auto i)
                  __attribute__((always_inline)) { m[i] = i < count ? load(images + i * pixels + p) : Vec<T>{}; });
    transpose<T>(m);
    unroll<n>([&](auto i) __attribute__((always_inline)) { block[at(p + i)] = m[i]; });
  }
  for (; p < pixels; ++p) {
    Vec<T> pixel{};
    for (int64_t i = 0; i < count; ++i) {
      pixel[i] = images[i * pixels + p];
    }
    block[at(p)] = pixel;
  }
}

template <typename T>
void store_block(T* images, const Vec<T>* block, int64_t pixels, int64_t count) {
  constexpr int n = kLanes<T>;
  int64_t p = 0;
  for (; p + n <= pixels; p += n) {
    Vec<T> m[n];
    unroll<n>([&](auto i) __attribute__((always_inline)) { m[i] = block[p + i]; });
    transpose<T>(m);
    unroll<n>([&](auto i) __attribute__((always_inline)) {
      if (i < count) {
        store(images + i * pixels + p, m[i]);
      }
    });
  }
  for (; p < pixels; ++p) {
    for (int64_t i = 0; i < count; ++i) {
      images[i * pixels + p] = block[p][i];
    }
  }
}

}  // namespace lenet_fast::cpu::LENET_FAST_ISA
