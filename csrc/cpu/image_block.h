// Blocks of images with the batch innermost: one vector holds one pixel of `lanes` images, so that every weight of a
// convolution is a broadcast and nothing is ever shuffled in the arithmetic. Conversion is one transpose each way.
#pragma once

#include "vec.h"

namespace lenet_fast::cpu::LENET_FAST_ISA {

// Interleave the lower (Half = 0) or upper half of a and b.
template <int Half, int n, typename V>
LF_INLINE V zip(V a, V b) {
  return [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
    return __builtin_shufflevector(a, b, (Half * n / 2 + I / 2 + I % 2 * n)...);
  }(std::make_integer_sequence<int, n>{});
}

// n vectors of n elements.
template <typename V, int n>
LF_INLINE void transpose(V (&m)[n]) {
  static_assert(sizeof(V) == n * sizeof(m[0][0]));
  constexpr int rounds = n == 16 ? 4 : n == 8 ? 3 : n == 4 ? 2 : 1;
  unroll<rounds>([&](auto) __attribute__((always_inline)) {
    V zipped[n];
    unroll<n / 2>([&](auto i) __attribute__((always_inline)) {
      zipped[2 * i] = zip<0, n>(m[i], m[i + n / 2]);
      zipped[2 * i + 1] = zip<1, n>(m[i], m[i + n / 2]);
    });
    unroll<n>([&](auto i) __attribute__((always_inline)) { m[i] = zipped[i]; });
  });
}

// Where each lane's pixels begin in memory, ascending; null: the lane is empty.
template <typename Value>
struct Lanes {
  static constexpr int count = kLanes<std::remove_const_t<Value>>;
  Value* begin[count] = {};

  bool full() const { return std::find(begin, begin + count, nullptr) == begin + count; }
};

// block[p] = pixel p of every lane, of empty lanes 0. Up to `end`, what lies behind the pixels may be read.
template <typename T>
void load_run(Vec<T>* block, const Lanes<const T>& lanes, int64_t offset, int64_t pixels, const T* end) {
  constexpr int n = kLanes<T>;
  const auto transposed = [&](int64_t p, auto&& lane_pixels) __attribute__((always_inline)) {
    Vec<T> m[n];
    unroll<n>([&](auto i) __attribute__((always_inline)) { m[i] = lane_pixels(lanes.begin[i]); });
    transpose(m);
    if (pixels - p >= n) {
      unroll<n>([&](auto i) __attribute__((always_inline)) { block[p + i] = m[i]; });
    } else {
      std::copy(m, m + (pixels - p), block + p);
    }
  };
  int64_t p = 0;
  if (lanes.full()) {
    for (; p < pixels && end - lanes.begin[n - 1] >= offset + p + n; p += n) {
      transposed(p, [&](const T* lane) __attribute__((always_inline)) { return load(lane + offset + p); });
    }
  }
  for (; p < pixels; p += n) {
    transposed(p, [&](const T* lane) __attribute__((always_inline)) {
      return lane == nullptr                ? Vec<T>{}
             : end - lane >= offset + p + n ? load(lane + offset + p)
                                            : load_partial(lane + offset + p, pixels - p);
    });
  }
}

// Pixel p of every lane that is not empty = block[p].
template <typename T>
void store_run(const Lanes<T>& lanes, int64_t offset, const Vec<T>* block, int64_t pixels) {
  constexpr int n = kLanes<T>;
  int64_t p = 0;
  for (; lanes.full() && p + n <= pixels; p += n) {
    Vec<T> m[n];
    unroll<n>([&](auto i) __attribute__((always_inline)) { m[i] = block[p + i]; });
    transpose(m);
    unroll<n>([&](auto i) __attribute__((always_inline)) { store(lanes.begin[i] + offset + p, m[i]); });
  }
  for (; p < pixels; p += n) {
    const int64_t width = std::min<int64_t>(n, pixels - p);
    Vec<T> m[n]{};
    std::copy(block + p, block + p + width, m);
    transpose(m);
    unroll<n>([&](auto i) __attribute__((always_inline)) {
      if (lanes.begin[i] != nullptr) {
        store_partial(lanes.begin[i] + offset + p, m[i], width);
      }
    });
  }
}

}  // namespace lenet_fast::cpu::LENET_FAST_ISA
