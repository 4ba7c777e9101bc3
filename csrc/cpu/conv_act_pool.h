// Fused convolution + activation + 2x2 pooling over ranges of images: load a block, compute (conv_block.h), store.
//
// An image's bytes: forward reads the input once and writes the pooled output once; backward reads input and output
// gradient and writes the input gradient. Its operations: 2 M forward, 2 M each for the weight gradient, the input
// gradient and, unless forward kept a record, the recomputed pre-activation.
#pragma once

#include "conv_block_backward.h"
#include "image_block.h"

namespace lenet_fast::cpu::LENET_FAST_ISA {

// Offsets of a range's arrays in its workspace, in vectors.
template <typename T>
struct Workspace {
  int64_t input, output, record, grad_input, scratch, weight_sums, map_sums, positions, end;

  Workspace(const ConvGeometry& g, const BlockLayout& layout, bool backward) {
    int64_t next = 0;
    const auto take = [&next](int64_t vectors) { return std::exchange(next, next + vectors); };
    const int64_t pixels = g.in_channels * g.height * g.width;
    input = take(layout.input_size);
    output = take(g.out_channels * g.out_height() * g.out_width());
    record = take(backward ? layout.record_size : 0);
    grad_input = take(backward ? pixels : 0);
    scratch = take(backward ? layout.scratch_size : 0);
    weight_sums = take(backward ? layout.weight_sums_size : 0);
    map_sums = take(backward ? layout.map_sums_size : 0);
    positions = take(pixels * int64_t{sizeof(int32_t)} / int64_t{sizeof(Vec<T>)} + 1);
    end = next;
  }
};

template <typename T, bool Backward>
size_t workspace_bytes(const ConvGeometry& g) {
  return static_cast<size_t>(Workspace<T>(g, BlockLayout(g), Backward).end) * sizeof(Vec<T>);
}

// Loads images into the padded input planes of a layer; the padding is cleared once.
template <typename T>
class InputLoader {
 public:
  InputLoader(const ConvLayer<T>& layer, Vec<T>* input, int32_t* positions)
      : pixels_(layer.g.in_channels * layer.g.height * layer.g.width), input_(input) {
    const ConvGeometry& g = layer.g;
    std::fill(input, input + layer.layout.input_size, Vec<T>{});
    if (layer.layout.input_plane != g.height * g.width) {
      positions_ = positions;
      const Planes<Vec<T>> inner = layer.inner(input);
      for (int64_t c = 0; c < g.in_channels; ++c) {
        for (int64_t y = 0; y < g.height; ++y) {
          for (int64_t x = 0; x < g.width; ++x) {
            *positions++ = static_cast<int32_t>(inner.at(c, y, x) - input);
          }
        }
      }
    }
  }

  void load(const T* images, int64_t first, int64_t count) const {
    load_block<T>(input_, positions_, images + first * pixels_, pixels_, count);
  }

 private:
  int64_t pixels_;
  Vec<T>* input_;
  const int32_t* positions_ = nullptr;  // null: the planes have no padding
};

// Where the record of the block that begins with image `first` is; null without a record.
template <typename T, typename Value>
auto block_record(Value* record, const BlockLayout& layout, int64_t first) {
  using V = std::conditional_t<std::is_const_v<Value>, const Vec<T>, Vec<T>>;
  return record != nullptr ? reinterpret_cast<V*>(record) + first / kLanes<T> * layout.record_size : nullptr;
}

template <typename V>
Planes<V> dense_planes(V* data, int64_t height, int64_t width) {
  return {data, height * width, width};
}

template <typename T>
void conv_act_pool_forward(const ConvActPoolForward<T>& p, int64_t begin, int64_t end, void* memory) {
  const ConvGeometry& g = p.geometry;
  const ConvLayer<T> layer{g, BlockLayout(g), p.weight, p.bias, p.coefficient, p.subsample_bias};
  const Workspace<T> at(g, layer.layout, false);
  Vec<T>* const workspace = static_cast<Vec<T>*>(memory);
  const InputLoader<T> input(layer, workspace + at.input, reinterpret_cast<int32_t*>(workspace + at.positions));
  const Planes<Vec<T>> output = dense_planes(workspace + at.output, g.out_height(), g.out_width());
  const int64_t values = g.out_channels * g.out_height() * g.out_width();
  for (int64_t first = begin; first < end; first += kLanes<T>) {
    const int64_t count = std::min<int64_t>(kLanes<T>, end - first);
    input.load(p.input, first, count);
    forward_block<T>(layer, workspace + at.input, output, block_record<T>(p.record, layer.layout, first));
    store_block<T>(p.output + first * values, output.data, values, count);
  }
}

// totals[i] = sum of the lanes of sums[i * stride], pairwise; nothing where totals is null.
template <typename T>
void sum_lanes(T* totals, const Vec<T>* sums, int64_t count, int64_t stride = 1) {
  for (int64_t i = 0; totals != nullptr && i < count; ++i) {
    T lanes[kLanes<T>];
    store(lanes, sums[i * stride]);
    for (int width = kLanes<T> / 2; width > 0; width /= 2) {
      for (int lane = 0; lane < width; ++lane) {
        lanes[lane] += lanes[lane + width];
      }
    }
    totals[i] = lanes[0];
  }
}

template <typename T>
void conv_act_pool_backward(const ConvActPoolBackward<T>& p, int64_t begin, int64_t end, void* memory) {
  const ConvGeometry& g = p.geometry;
  const ConvLayer<T> layer{g, BlockLayout(g), p.weight, p.bias, p.coefficient, p.subsample_bias};
  const Workspace<T> at(g, layer.layout, true);
  Vec<T>* const workspace = static_cast<Vec<T>*>(memory);
  const InputLoader<T> input(layer, workspace + at.input, reinterpret_cast<int32_t*>(workspace + at.positions));
  const Planes<Vec<T>> output = dense_planes(workspace + at.output, g.out_height(), g.out_width());
  const Planes<Vec<T>> grad_input =
      dense_planes(p.grad_input != nullptr ? workspace + at.grad_input : nullptr, g.height, g.width);
  Vec<T>* const map_sums = workspace + at.map_sums;
  const BlockSums<T> sums{p.sums.weight != nullptr ? workspace + at.weight_sums : nullptr, map_sums};
  std::fill(workspace + at.weight_sums, workspace + at.positions, Vec<T>{});
  const int64_t values = g.out_channels * g.out_height() * g.out_width(), pixels = g.in_channels * g.height * g.width;
  for (int64_t first = begin; first < end; first += kLanes<T>) {
    const int64_t count = std::min<int64_t>(kLanes<T>, end - first);
    VecInt<T> valid{};
    for (int64_t lane = 0; lane < count; ++lane) {
      valid[lane] = -1;
    }
    input.load(p.input, first, count);
    const Vec<T>* record = block_record<T>(p.record, layer.layout, first);
    if (record == nullptr) {
      forward_block<T>(layer, workspace + at.input, output, workspace + at.record);
      record = workspace + at.record;
    }
    load_block<T>(output.data, nullptr, p.grad_output + first * values, values, count);
    backward_block<T>(layer, valid, record, output, workspace + at.input, sums, grad_input, workspace + at.scratch);
    if (p.grad_input != nullptr) {
      store_block<T>(p.grad_input + first * pixels, grad_input.data, pixels, count);
    }
  }
  sum_lanes<T>(p.sums.weight, workspace + at.weight_sums, layer.layout.weight_sums_size);
  sum_lanes<T>(p.sums.bias, map_sums, g.out_channels, 3);
  sum_lanes<T>(p.sums.coefficient, map_sums + 1, g.out_channels, 3);
  sum_lanes<T>(p.sums.subsample_bias, map_sums + 2, g.out_channels, 3);
}

template <typename T>
int64_t record_size(const ConvGeometry& g) {
  return BlockLayout(g).record_size * kLanes<T>;
}

template <typename T>
constexpr ConvActPoolKernels<T> conv_act_pool_kernels() {
  return {kLanes<T>,
          record_size<T>,
          workspace_bytes<T, false>,
          workspace_bytes<T, true>,
          conv_act_pool_forward<T>,
          conv_act_pool_backward<T>};
}

}  // namespace lenet_fast::cpu::LENET_FAST_ISA
