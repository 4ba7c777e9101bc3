// The masks of dropout in a training step, shared by every back end: lenet_fast/dropout_masks.py says what they are. No
// state: a mask is drawn again where the backward pass needs it.
#pragma once

#include "network.h"

namespace lenet_fast {

// Which masks: those of one step.
struct DropStep {
  uint64_t seed;
  uint32_t step;
};

// How the masks of one kind at one place are drawn: a word up to `last_dropped` drops, otherwise `scale` multiplies.
template <typename T>
struct DropRule {
  bool drops;  // false: there is no mask
  uint32_t last_dropped;
  T scale;
  uint32_t stream;  // the last word of the counters: 2 * place + (1 for whole maps)
};

// At one place, where an image is `num_maps` maps of height x width values.
template <typename T>
struct DropRules {
  DropRule<T> values, maps;
  int64_t num_maps, height, width;

  LENET_FAST_HOST_DEVICE bool drops() const { return values.drops || maps.drops; }
  LENET_FAST_HOST_DEVICE int64_t num_values() const { return num_maps * height * width; }
};

template <typename T>
DropRules<T> drop_rules(const NetworkGeometry& g, int place) {
  const auto rule = [](double p, int stream) {
    DropRule<T> result{p > 0, 0, T(1), static_cast<uint32_t>(stream)};
    if (result.drops) {
      // A word is less than p * 2^32 exactly when it is at most that, rounded up, less one.
      result.last_dropped = static_cast<uint32_t>(std::ceil(p * 4294967296.0) - 1);
      result.scale = static_cast<T>(p < 1 ? 1 / (1 - p) : 0);
    }
    return result;
  };
  DropRules<T> rules{rule(g.dropout[place].values, 2 * place), rule(g.dropout[place].maps, 2 * place + 1), 1, 1, 1};
  if (place < g.num_convs) {
    rules.num_maps = g.conv[place].in_channels;
    rules.height = g.conv[place].height;
    rules.width = g.conv[place].width;
  } else if (place == g.num_convs) {  // the first dense layer's input are the maps of the last convolution
    const ConvGeometry& last = g.conv[place - 1];
    rules.num_maps = last.out_channels;
    rules.height = last.out_height();
    rules.width = last.out_width();
  } else {
    rules.num_maps = g.dense[place - g.num_convs - 1].out_features;
  }
  return rules;
}

}  // namespace lenet_fast
