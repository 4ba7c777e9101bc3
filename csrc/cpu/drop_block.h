// Multiplies values by the masks of dropout, in blocks of images or image by image. Backward draws the masks again and
// multiplies the gradients by them.
//
// Four values of an image cost 20 multiplications, 20 shifts and 40 exclusive-ors: all of LeNet-5's values, forward and
// backward, 87 thousand operations beside the 2.26 million of a step.
#pragma once

#include "../philox.h"
#include "conv_layer.h"

namespace lenet_fast::cpu::LENET_FAST_ISA {

// Words of 32 bits in the lower halves of 64.
typedef uint64_t Words __attribute__((vector_size(LENET_FAST_VECTOR_BYTES)));

// GCC takes three multiplications where one instruction multiplies the lower halves.
struct WideProduct {
  LF_INLINE Words operator()(uint32_t multiplier, Words words) const {
#if defined(__x86_64__)
    const Words factor = Words{} + uint64_t{multiplier};
#if LENET_FAST_VECTOR_BYTES > 16
    Words product;
    asm("vpmuludq %2, %1, %0" : "=v"(product) : "v"(words), "v"(factor));
    return product;
#else
    asm("pmuludq %1, %0" : "+x"(words) : "x"(factor));
    return words;
#endif
#else
    return (words & uint64_t{0xffffffff}) * uint64_t{multiplier};
#endif
  }
};

// A word of the counters, one for each lane of a Vec<T>: that of lane i is in part i % kParts, at i / kParts.
template <typename T>
inline constexpr int kParts = static_cast<int>(sizeof(uint64_t) / sizeof(T));
template <typename T>
struct CounterWords {
  Words part[kParts<T>];
};

template <typename T>
LF_INLINE CounterWords<T> same_words(uint32_t word) {
  CounterWords<T> words;
  unroll<kParts<T>>([&](auto p) __attribute__((always_inline)) { words.part[p] = Words{} + uint64_t{word}; });
  return words;
}

// first, first + 1, ...
template <typename T>
LF_INLINE CounterWords<T> ascending_words(uint32_t first) {
  CounterWords<T> words;
  unroll<kLanes<T>>([&](auto i) __attribute__((always_inline)) { words.part[i % kParts<T>][i / kParts<T>] = i; });
  unroll<kParts<T>>([&](auto p) __attribute__((always_inline)) { words.part[p] += uint64_t{first}; });
  return words;
}

// factor[w] of a lane: what multiplies the value, or the map, at index 4 * block + w of its image.
template <typename T>
LF_INLINE void draw(Vec<T> (&factor)[4], const DropRule<T>& rule, const DropStep& step, const CounterWords<T>& block,
                    const CounterWords<T>& image) {
  using Lanes = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  typedef Lanes Word __attribute__((vector_size(LENET_FAST_VECTOR_BYTES)));
  Words words[kParts<T>][4];
  unroll<kParts<T>>([&](auto p) __attribute__((always_inline)) {
    words[p][0] = block.part[p];
    words[p][1] = image.part[p];
    words[p][2] = Words{} + uint64_t{step.index};
    words[p][3] = Words{} + uint64_t{rule.stream};
    philox(words[p], step.seed, WideProduct{});
  });
  unroll<4>([&](auto w) __attribute__((always_inline)) {
    Words word = words[0][w] & uint64_t{0xffffffff};
    if constexpr (kParts<T> == 2) {
      word |= words[1][w] << 32;
    }
    factor[w] = (Word)word > Lanes{rule.last_dropped} ? splat(rule.scale) : Vec<T>{};
  });
}

// The values of one image, or of a vector of images, times their masks. for_each_factor(rule, count, f) calls f with
// what multiplies the values, or the maps, at the indices from 0 to count - 1, in order.
template <typename T, typename Value, typename ForEachFactor>
LF_INLINE void drop_planes(const DropRules<T>& rules, Planes<Value> values, const ForEachFactor& for_each_factor) {
  if (rules.values.is_active) {
    int64_t map = 0, y = 0, x = 0;  // of the next value
    for_each_factor(rules.values, rules.num_values(), [&](Value factor) __attribute__((always_inline)) {
      *values.at(map, y, x) *= factor;
      if (++x == rules.width) {
        x = 0;
        if (++y == rules.height) {
          y = 0;
          ++map;
        }
      }
    });
  }
  if (rules.maps.is_active) {
    int64_t map = 0;  // the next
    for_each_factor(rules.maps, rules.num_maps, [&](Value factor) {
      for (int64_t y = 0; y < rules.height; ++y) {
        for (int64_t x = 0; x < rules.width; ++x) {
          *values.at(map, y, x) *= factor;
        }
      }
      ++map;
    });
  }
}

// The values of a block of images times their masks; lane i is image `first_image` + i of the batch.
template <typename T>
void drop_block(const DropRules<T>& rules, const DropStep& step, uint32_t first_image, Planes<Vec<T>> values) {
  const CounterWords<T> image = ascending_words<T>(first_image);
  drop_planes(rules, values, [&](const DropRule<T>& rule, int64_t count, auto&& f) __attribute__((always_inline)) {
    for (int64_t first = 0; first < count; first += 4) {
      Vec<T> factor[4];
      draw<T>(factor, rule, step, same_words<T>(static_cast<uint32_t>(first / 4)), image);
      for (int64_t i = 0; i < std::min<int64_t>(4, count - first); ++i) {
        f(factor[i]);
      }
    }
  });
}

// The values of image `image_index` of the batch, which lie one after another, times their masks.
template <typename T>
void drop_image(const DropRules<T>& rules, const DropStep& step, uint32_t image_index, T* values) {
  constexpr int64_t n = kLanes<T>;
  const CounterWords<T> image = same_words<T>(image_index);
  const Planes<T> planes{values, rules.height * rules.width, rules.width};
  drop_planes(rules, planes, [&](const DropRule<T>& rule, int64_t count, auto&& f) __attribute__((always_inline)) {
    for (int64_t first = 0; first < count; first += 4 * n) {
      Vec<T> factor[4];
      draw<T>(factor, rule, step, ascending_words<T>(static_cast<uint32_t>(first / 4)), image);
      T in_order[4 * n];
      for (int64_t i = 0; i < 4 * n; ++i) {
        in_order[i] = factor[i % 4][i / 4];
      }
      for (int64_t i = 0; i < std::min(4 * n, count - first); ++i) {
        f(in_order[i]);
      }
    }
  });
}

}  // namespace lenet_fast::cpu::LENET_FAST_ISA
