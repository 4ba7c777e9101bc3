// The masks of dropout in a training step, shared by every back end: lenet_fast/dropout_masks.py says what they are.
// They have no state: the backward pass draws a mask again where it needs it.
#pragma once

#include "network.h"

namespace lenet_fast {

// Every step has masks of its own, which depend on the seed of its training and on its index in that.
struct DropStep {
  uint64_t seed;
  uint32_t index;
};

// How the masks of one kind are drawn at one place: a word up to `last_dropped` drops its value, a larger one
// multiplies it by `scale`.
template <typename T>
struct DropRule {
  bool is_active;  // false: there is no mask
  uint32_t last_dropped;
  T scale;
  uint32_t stream;  // the last word of the counters: 2 * place + (1 for whole maps)
};

// The rules of both kinds at one place, where an image is `num_maps` maps of height x width values.
template <typename T>
struct DropRules {
  DropRule<T> values, maps;
  int64_t num_maps, height, width;

  LENET_FAST_HOST_DEVICE bool is_active() const { return values.is_active || maps.is_active; }
  LENET_FAST_HOST_DEVICE int64_t num_values() const { return num_maps * height * width; }
};

// The dropout of a step: which step it is, and the rules of every place.
template <typename T>
struct Dropout {
  DropStep step;
  DropRules<T> at[kMaxPlaces];

  bool is_active() const {
    bool any = false;
    for (const DropRules<T>& rules : at) {
      any = any || rules.is_active();
    }
    return any;
  }
};

template <typename T>
DropRule<T> drop_rule(double p, int stream) {
  DropRule<T> rule{p > 0, 0, T(1), static_cast<uint32_t>(stream)};
  if (rule.is_active) {
    // A word is less than p * 2^32 exactly when it is at most that, rounded up, less one.
    rule.last_dropped = static_cast<uint32_t>(std::ceil(p * 4294967296.0) - 1);
    rule.scale = static_cast<T>(p < 1 ? 1 / (1 - p) : 0);
  }
  return rule;
}

// At a place where single values are dropped with probability `values` and whole maps with probability `maps`.
template <typename T>
DropRules<T> drop_rules(const NetworkGeometry& g, int place, double values, double maps) {
  DropRules<T> rules{drop_rule<T>(values, 2 * place), drop_rule<T>(maps, 2 * place + 1), 1, 1, 1};
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
