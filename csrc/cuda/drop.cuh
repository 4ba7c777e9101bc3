// Dropout: values of an image in shared memory multiplied by their masks. Backward multiplies their gradients by the
// same masks, drawn again.
//
// A thread draws for four values at a time, with 20 multiplications of 32 by 32 bits.
#pragma once

#include "../philox.h"
#include "network_plan.h"

namespace lenet_fast::cuda {

struct WideProduct {
  __host__ __device__ uint64_t operator()(uint32_t multiplier, uint64_t word) const {
    return uint64_t{multiplier} * static_cast<uint32_t>(word);
  }
};

// Whose masks: those of one step for one image, its number in the batch.
struct DropImage {
  uint32_t step, image;
};

__device__ inline void draw(uint64_t (&words)[4], const NetworkPlan& n, const DropRule<float>& rule, DropImage of,
                            int block) {
  words[0] = static_cast<uint32_t>(block);
  words[1] = of.image;
  words[2] = of.step;
  words[3] = rule.stream;
  philox(words, n.seed, WideProduct{});
}

// What multiplies the value that word i decides about.
__device__ __forceinline__ float factor(const DropRule<float>& rule, const uint64_t (&words)[4], int i) {
  const uint64_t word = i < 2 ? (i == 0 ? words[0] : words[1]) : (i == 2 ? words[2] : words[3]);
  return static_cast<uint32_t>(word) > rule.last_dropped ? rule.scale : 0.0f;
}

// The values at `place` times their masks. Pixel (y, x) of a map is values[map * plane + y * stride + x]. All threads
// come here. Not inlined: what it computes of the plan and the step would be kept in registers from image to image.
static __device__ __attribute__((noinline)) void drop(const NetworkPlan& n, int place, DropImage of, float* values,
                                                      int plane, int stride) {
  const DropRules<float>& rules = n.drop_rules[place];
  const int height = static_cast<int>(rules.height), width = static_cast<int>(rules.width);
  const int area = height * width, number = static_cast<int>(rules.num_values());
  for (int first = 4 * threadIdx.x; first < number; first += 4 * kNetworkThreads) {
    uint64_t words[4], map_words[4];
    if (rules.values.drops) {
      draw(words, n, rules.values, of, first / 4);
    }
    int drawn = -1;  // four maps, those of map_words
    for (int i = 0; i < 4 && first + i < number; ++i) {
      const int map = (first + i) / area, pixel = (first + i) % area;
      float& value = values[map * plane + pixel / width * stride + pixel % width];
      if (rules.values.drops) {
        value *= factor(rules.values, words, i);
      }
      if (rules.maps.drops) {
        if (drawn != map / 4) {
          drawn = map / 4;
          draw(map_words, n, rules.maps, of, drawn);
        }
        value *= factor(rules.maps, map_words, map % 4);
      }
    }
  }
}

}  // namespace lenet_fast::cuda
