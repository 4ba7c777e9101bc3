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
  int64_t weight_points, input, output, record, grad_input, scratch, weight_sums, map_sums, end;

  Workspace(const ConvGeometry& g, const BlockLayout& layout, bool backward) {
    int64_t next = 0;
    const auto take = [&next](int64_t vectors) { return std::exchange(next, next + vectors); };
    weight_points = take(round_up(layout.weight_points_size, kLanes<T>) / kLanes<T>);
    input = take(layout.input_size);
    output = take(g.out_channels * g.out_height() * g.out_width());
    record = take(backward ? layout.record_size : 0);
    grad_input = take(backward ? g.in_channels * g.height * g.width : 0);
    scratch = take(std::max(forward_scratch_size(g, layout), backward ? backward_scratch_size(g, layout) : 0));
    weight_sums = take(backward ? layout.weight_sums_size : 0);
    map_sums = take(backward ? layout.map_sums_size : 0);
    end = next;
  }
};

template <typename T, bool Backward>
size_t workspace_bytes(const ConvGeometry& piece) {
  return static_cast<size_t>(Workspace<T>(piece, BlockLayout(piece), Backward).end) * sizeof(Vec<T>);
}

template <typename T>
int64_t record_size(const ConvGeometry& piece) {
  return BlockLayout(piece).record_size * kLanes<T>;
}

// Where the record of the block that begins with band `first` is; null without a record.
template <typename T, typename Value>
auto block_record(Value* record, const BlockLayout& layout, int64_t first) {
  using V = std::conditional_t<std::is_const_v<Value>, const Vec<T>, Vec<T>>;
  return record != nullptr ? reinterpret_cast<V*>(record) + first / kLanes<T> * layout.record_size : nullptr;
}

// The lanes of the block of bands [first, end): each begins `band_size` values behind the band before it in its image.
template <typename Value>
Lanes<Value> block_lanes(const Bands& bands, int64_t first, int64_t end, Value* images, int64_t image_size,
                         int64_t band_size) {
  Lanes<Value> lanes;
  for (int64_t lane = 0; lane < std::min<int64_t>(lanes.count, end - first); ++lane) {
    const int64_t image = (first + lane) / bands.per_image, band = (first + lane) % bands.per_image;
    lanes.begin[lane] = images + image * image_size + band * band_size;
  }
  return lanes;
}

// The bands [first, end) of the input into the (cleared) input planes of a layer.
template <typename T>
void load_input(const ConvLayer<T>& layer, const ConvGeometry& image, const Bands& bands, const T* images,
                int64_t first, int64_t end, Vec<T>* input) {
  const ConvGeometry& piece = layer.g;
  const int64_t image_size = image.in_channels * image.height * image.width;
  const T* const images_end = images + image.batch * image_size;
  const Lanes<const T> lanes = block_lanes(bands, first, end, images, image_size, bands.conv_rows() * image.width);
  if (bands.per_image == 1 && layer.layout.input_plane == image.height * image.width) {  // the image as it lies
    return load_run<T>(input, lanes, 0, image_size, images_end);
  }
  const Planes<Vec<T>> target = layer.inner(input);
  for (int64_t y = 0; y < piece.height; ++y) {
    // The frame above the first band and below the last one is no part of the image.
    Lanes<const T> inside = lanes;
    for (int64_t lane = 0; bands.frame > 0 && lane < lanes.count; ++lane) {
      const int64_t row = (first + lane) % bands.per_image * bands.conv_rows() + y - bands.frame;
      inside.begin[lane] = row >= 0 && row < image.height ? lanes.begin[lane] : nullptr;
    }
    for (int64_t c = 0; c < piece.in_channels; ++c) {
      load_run<T>(target.at(c, y, bands.frame), inside, (c * image.height + y - bands.frame) * image.width, image.width,
                  images_end);
    }
  }
}

// How the pooled rows of a band lie in the output of the whole batch: one run an image, or one a band and map.
struct OutputRuns {
  int64_t image_size, band_size, count, stride, length;

  OutputRuns(const ConvGeometry& image, const Bands& bands)
      : image_size(image.out_channels * image.out_height() * image.out_width()),
        band_size(bands.piece.out_height() * image.out_width()),
        count(bands.per_image > 1 ? image.out_channels : 1),
        stride(image.out_height() * image.out_width()),
        length(bands.per_image > 1 ? band_size : image_size) {}
};

template <typename V>
Planes<V> dense_planes(V* data, int64_t height, int64_t width) {
  return {data, height * width, width};
}

// `Arguments`: ConvActPoolForward or ConvActPoolBackward. The points of the weight are put where `points` says.
template <typename T, typename Arguments>
ConvLayer<T> prepared_layer(const Arguments& p, Vec<T>* points) {
  const ConvGeometry& piece = p.bands.piece;
  const ConvLayer<T> layer{
      piece, BlockLayout(piece), p.weight, p.bias, p.coefficient, p.subsample_bias, reinterpret_cast<const T*>(points)};
  if (layer.layout.uses_winograd) {
    winograd::weight_points(reinterpret_cast<T*>(points), piece.num_connections(), p.weight);
  }
  return layer;
}

template <typename T>
void conv_act_pool_forward(const ConvActPoolForward<T>& p, int64_t begin, int64_t end, void* memory) {
  const ConvGeometry& piece = p.bands.piece;
  const Workspace<T> at(piece, BlockLayout(piece), false);
  const OutputRuns runs(p.geometry, p.bands);
  Vec<T>* const workspace = static_cast<Vec<T>*>(memory);
  const ConvLayer<T> layer = prepared_layer<T>(p, workspace + at.weight_points);
  const Planes<Vec<T>> output = dense_planes(workspace + at.output, piece.out_height(), piece.out_width());
  std::fill(workspace + at.input, workspace + at.output, Vec<T>{});
  for (int64_t first = begin; first < end; first += kLanes<T>) {
    load_input<T>(layer, p.geometry, p.bands, p.input, first, end, workspace + at.input);
    forward_block<T>(layer, workspace + at.input, output, block_record<T>(p.record, layer.layout, first),
                     workspace + at.scratch);
    const Lanes<T> lanes = block_lanes(p.bands, first, end, p.output, runs.image_size, runs.band_size);
    for (int64_t run = 0; run < runs.count; ++run) {
      store_run<T>(lanes, run * runs.stride, output.data + run * runs.length, runs.length);
    }
  }
}

// totals[i] = sum of the lanes of sums[i * stride]; nothing where totals is null.
template <typename T>
void sum_lanes(T* totals, const Vec<T>* sums, int64_t count, int64_t stride = 1) {
  for (int64_t i = 0; totals != nullptr && i < count; ++i) {
    totals[i] = sum_of_lanes<T>(sums[i * stride]);
  }
}

template <typename T>
void conv_act_pool_backward(const ConvActPoolBackward<T>& p, int64_t begin, int64_t end, void* memory) {
  const ConvGeometry& piece = p.bands.piece;
  const Workspace<T> at(piece, BlockLayout(piece), true);
  const OutputRuns runs(p.geometry, p.bands);
  Vec<T>* const workspace = static_cast<Vec<T>*>(memory);
  const ConvLayer<T> layer = prepared_layer<T>(p, workspace + at.weight_points);
  Vec<T>* const map_sums = workspace + at.map_sums;
  const Planes<Vec<T>> output = dense_planes(workspace + at.output, piece.out_height(), piece.out_width());
  const Planes<Vec<T>> grad_input =
      dense_planes(p.grad_input != nullptr ? workspace + at.grad_input : nullptr, piece.height, piece.width);
  const BlockSums<T> sums{p.sums.weight != nullptr ? workspace + at.weight_sums : nullptr, map_sums};
  const int64_t piece_size = piece.in_channels * piece.height * piece.width;
  const T* const grad_output_end = p.grad_output + p.geometry.batch * runs.image_size;
  std::fill(workspace + at.input, workspace + at.output, Vec<T>{});
  std::fill(workspace + at.weight_sums, workspace + at.end, Vec<T>{});
  for (int64_t first = begin; first < end; first += kLanes<T>) {
    VecInt<T> valid{};
    for (int64_t lane = 0; lane < std::min<int64_t>(kLanes<T>, end - first); ++lane) {
      valid[lane] = -1;
    }
    load_input<T>(layer, p.geometry, p.bands, p.input, first, end, workspace + at.input);
    const Vec<T>* record = block_record<T>(p.record, layer.layout, first);
    if (record == nullptr) {
      forward_block<T>(layer, workspace + at.input, output, workspace + at.record, workspace + at.scratch);
      record = workspace + at.record;
    }
    const Lanes<const T> lanes = block_lanes(p.bands, first, end, p.grad_output, runs.image_size, runs.band_size);
    for (int64_t run = 0; run < runs.count; ++run) {
      load_run<T>(output.data + run * runs.length, lanes, run * runs.stride, runs.length, grad_output_end);
    }
    backward_block<T>(layer, valid, record, output, workspace + at.input, sums, grad_input, workspace + at.scratch);
    if (p.grad_input != nullptr) {
      const Bands pieces{1, piece, 0};
      store_run<T>(block_lanes(pieces, first, end, p.grad_input, piece_size, 0), 0, grad_input.data, piece_size);
    }
  }
  sum_lanes<T>(p.sums.weight, workspace + at.weight_sums, layer.layout.weight_sums_size);
  sum_lanes<T>(p.sums.bias, map_sums, piece.out_channels, 3);
  sum_lanes<T>(p.sums.coefficient, map_sums + 1, piece.out_channels, 3);
  sum_lanes<T>(p.sums.subsample_bias, map_sums + 2, piece.out_channels, 3);
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
