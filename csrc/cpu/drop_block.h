// Dropout: values multiplied by their masks, in blocks of images or image by image. Backward multiplies their gradients
// by the same masks, drawn again.
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

// A number for each lane of a Vec<T>: lane i has part i % kParts, there number i / kParts.
template <typename T>
inline constexpr int kParts = static_cast<int>(sizeof(uint64_t) / sizeof(T));
template <typename T>
struct LaneNumbers {
  Words part[kParts<T>];
};

template <typename T>
LF_INLINE LaneNumbers<T> all_lanes(uint32_t number) {
  LaneNumbers<T> numbers;
  unroll<kParts<T>>([&](auto p) __attribute__((always_inline)) { numbers.part[p] = Words{} + uint64_t{number}; });
  return numbers;
}

// number, number + 1, ...
template <typename T>
LF_INLINE LaneNumbers<T> ascending_lanes(uint32_t number) {
  LaneNumbers<T> numbers;
  unroll<kLanes<T>>([&](auto i) __attribute__((always_inline)) { numbers.part[i % kParts<T>][i / kParts<T>] = i; });
  unroll<kParts<T>>([&](auto p) __attribute__((always_inline)) { numbers.part[p] += uint64_t{number}; });
  return numbers;
}

// factor[w] of a lane: what multiplies number 4 * block + w of its image.
template <typename T>
LF_INLINE void draw(Vec<T> (&factor)[4], const DropRule<T>& rule, const DropStep& step, const LaneNumbers<T>& block,
                    const LaneNumbers<T>& image) {
  using Lanes = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  typedef Lanes Word __attribute__((vector_size(LENET_FAST_VECTOR_BYTES)));
  Words words[kParts<T>][4];
  unroll<kParts<T>>([&](auto p) __attribute__((always_inline)) {
    words[p][0] = block.part[p];
    words[p][1] = image.part[p];
    words[p][2] = Words{} + uint64_t{step.step};
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

// The values of a block of images times their masks; lane i is image `first_image` + i of the batch.
template <typename T>
void drop_block(const DropRules<T>& rules, const DropStep& step, uint32_t first_image, Planes<Vec<T>> values) {
  const LaneNumbers<T> image = ascending_lanes<T>(first_image);
  // f(number, its factor) for all numbers in order.
  const auto for_each = [&](const DropRule<T>& rule, int64_t numbers, auto&& f) {
    for (int64_t first = 0; first < numbers; first += 4) {
      Vec<T> factor[4];
      draw<T>(factor, rule, step, all_lanes<T>(static_cast<uint32_t>(first / 4)), image);
      for (int64_t i = 0; i < std::min<int64_t>(4, numbers - first); ++i) {
        f(first + i, factor[i]);
      }
    }
  };
  if (rules.values.drops) {
    int64_t map = 0, y = 0, x = 0;  // of the number at hand
    for_each(rules.values, rules.num_values(), [&](int64_t, Vec<T> factor) __attribute__((always_inline)) {
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
  if (rules.maps.drops) {
    for_each(rules.maps, rules.num_maps, [&](int64_t map, Vec<T> factor) {
      for (int64_t y = 0; y < rules.height; ++y) {
        for (int64_t x = 0; x < rules.width; ++x) {
          *values.at(map, y, x) *= factor;
        }
      }
    });
  }
}

// The values of one image, which lie one after another, times their masks.
template <typename T>
void drop_image(const DropRules<T>& rules, const DropStep& step, uint32_t image_number, T* values) {
  constexpr int64_t n = kLanes<T>;
  const LaneNumbers<T> image = all_lanes<T>(image_number);
  // f(number, its factor) for all numbers in order.
  const auto for_each = [&](const DropRule<T>& rule, int64_t numbers, auto&& f) {
    for (int64_t first = 0; first < numbers; first += 4 * n) {
      Vec<T> factor[4];
      draw<T>(factor, rule, step, ascending_lanes<T>(static_cast<uint32_t>(first / 4)), image);
      T in_order[4 * n];
      for (int64_t i = 0; i < 4 * n; ++i) {
        in_order[i] = factor[i % 4][i / 4];
      }
      for (int64_t i = 0; i < std::min(4 * n, numbers - first); ++i) {
        f(first + i, in_order[i]);
      }
    }
  };
  const int64_t area = rules.height * rules.width;
  if (rules.values.drops) {
    for_each(rules.values, rules.num_values(),
             [&](int64_t i, T factor) __attribute__((always_inline)) { values[i] *= factor; });
  }
  if (rules.maps.drops) {
    for_each(rules.maps, rules.num_maps, [&](int64_t map, T factor) {
      for (int64_t i = 0; i < area; ++i) {
        values[map * area + i] *= factor;
      }
    });
  }
}

}  // namespace lenet_fast::cpu::LENET_FAST_ISA
