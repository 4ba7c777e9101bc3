// Multiplies values of an image in shared memory by the masks of dropout. Backward draws the masks again and multiplies
// the gradients by them.
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

// An image of a step: the two words of the counters that all of its masks have in common.
struct ImageOfStep {
  uint32_t step, index;  // the index in the training, and in the batch
};

__device__ inline void draw(uint64_t (&words)[4], uint64_t seed, const DropRule<float>& rule, ImageOfStep image,
                            int block) {
  words[0] = static_cast<uint32_t>(block);
  words[1] = image.index;
  words[2] = image.step;
  words[3] = rule.stream;
  philox(words, seed, WideProduct{});
}

// What multiplies the value that word i decides about.
__device__ __forceinline__ float factor(const DropRule<float>& rule, const uint64_t (&words)[4], int i) {
  const uint64_t word = i < 2 ? (i == 0 ? words[0] : words[1]) : (i == 2 ? words[2] : words[3]);
  return static_cast<uint32_t>(word) > rule.last_dropped ? rule.scale : 0.0f;
}

// The values at `place` times their masks. Pixel (y, x) of a map is values[map * plane + y * stride + x]. All threads
// of the block call this function. It is not inlined, as the compiler would keep what it computes of the rules and the
// step in registers from image to image.
static __device__ __attribute__((noinline)) void drop(const Dropout<float>& dropout, int place, ImageOfStep image,
                                                      float* values, int plane, int stride) {
  const DropRules<float>& rules = dropout.at[place];
  const uint64_t seed = dropout.step.seed;
  const int height = static_cast<int>(rules.height), width = static_cast<int>(rules.width);
  const int area = height * width, count = static_cast<int>(rules.num_values());
  for (int first = 4 * threadIdx.x; first < count; first += 4 * kNetworkThreads) {
    uint64_t words[4], map_words[4];
    if (rules.values.is_active) {
      draw(words, seed, rules.values, image, first / 4);
    }
    int drawn = -1;  // map_words are of the maps 4 * drawn to 4 * drawn + 3
    for (int i = 0; i < 4 && first + i < count; ++i) {
      const int map = (first + i) / area, pixel = (first + i) % area;
      float& value = values[map * plane + pixel / width * stride + pixel % width];
      if (rules.values.is_active) {
        value *= factor(rules.values, words, i);
      }
      if (rules.maps.is_active) {
        if (drawn != map / 4) {
          drawn = map / 4;
          draw(map_words, seed, rules.maps, image, drawn);
        }
        value *= factor(rules.maps, map_words, map % 4);
      }
    }
  }
}

}  // namespace lenet_fast::cuda
