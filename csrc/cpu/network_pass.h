// The whole network on a range of images: forward, loss and backward of one group of blocks after another, then, over
// all images of the batch, the weight gradients of the dense layers and the update.
//
// A step is two parallel phases. In the first a thread takes whole blocks of images: nothing of them leaves its cache
// but the dense layers' inputs and output gradients, and the convolutions' gradients stay sums of its own. In the
// second a thread takes a slice of every parameter: it sums what the threads have of it, in order, and updates it.
// LeNet-5: 2.26 million operations an image; 3.3 KB an image and 164 KB a thread go from one phase to the other.
#pragma once

#include "conv_block_backward.h"
#include "dense_block.h"
#include "drop_block.h"
#include "image_block.h"
#include "loss_block.h"
#include "network_train_few.h"
#include "update.h"

namespace lenet_fast::cpu::LENET_FAST_ISA {

// Offsets, in vectors, of what a thread holds: sums for the whole step, then `kGroup` blocks of images.
template <typename T>
struct NetworkLayout {
  struct Block {
    int64_t conv_input[kMaxConvs], record[kMaxConvs];  // see BlockLayout
    int64_t dense[kMaxDenses + 1];                     // inputs of the dense layers and what the last one gives
    int64_t undropped[kMaxDenses];                     // outputs of the dense layers before some are dropped
    int64_t scores;
    int64_t grad_dense[kMaxDenses + 1];  // gradients of `dense`
    int64_t grad_conv[kMaxConvs];        // of the inputs of the convolutions but the first
    int64_t end;
  };
  int64_t weight_sums[kMaxConvs], map_sums[kMaxConvs], weight_points[kMaxConvs];
  int64_t sums_end, positions, scratch, end;
  Block block[kGroup];

  NetworkLayout(const NetworkGeometry& n, bool training) {
    int64_t next = 0;
    const auto take = [&next](int64_t vectors) { return std::exchange(next, next + vectors); };
    for (int l = 0; l < n.num_convs; ++l) {
      const BlockLayout layout(n.conv[l]);
      weight_sums[l] = take(training ? layout.weight_sums_size : 0);
      map_sums[l] = take(training ? layout.map_sums_size : 0);
    }
    sums_end = next;
    const ConvGeometry& first = n.conv[0];
    const auto lanes = static_cast<int64_t>(sizeof(Vec<T>) / sizeof(int32_t));
    positions = take((first.in_channels * first.height * first.width + lanes - 1) / lanes);
    int64_t most = 0;
    for (int l = 0; l < n.num_convs; ++l) {
      const BlockLayout layout(n.conv[l]);
      weight_points[l] = take(round_up(layout.weight_points_size, kLanes<T>) / kLanes<T>);
      most = std::max(
          {most, forward_scratch_size(n.conv[l], layout), training ? backward_scratch_size(n.conv[l], layout) : 0});
    }
    scratch = take(most);
    for (Block& b : block) {
      for (int l = 0; l < n.num_convs; ++l) {
        const ConvGeometry& g = n.conv[l];
        const BlockLayout layout(g);
        b.conv_input[l] = take(layout.input_size);
        b.record[l] = take(training ? layout.record_size : 0);
        b.grad_conv[l] = take(training && l > 0 ? g.in_channels * g.height * g.width : 0);
      }
      for (int l = 0; l <= n.num_denses; ++l) {
        const int64_t size = l < n.num_denses ? n.dense[l].in_features : n.last_dense().out_features;
        b.dense[l] = take(size);
        b.grad_dense[l] = take(training ? size : 0);
      }
      for (int l = 0; l < n.num_denses; ++l) {
        b.undropped[l] = take(training ? n.dense[l].out_features : 0);
      }
      b.scores = take(n.output == Output::distances ? n.classes : 0);
    }
    end = next;
  }
};

template <typename T>
size_t network_thread_bytes(const NetworkGeometry& geometry, bool training) {
  return static_cast<size_t>(NetworkLayout<T>(geometry, training).end) * sizeof(Vec<T>);
}

// block[position[p]] = scale * pixel p + offset of each image; absent images become 0.
template <typename T, typename Pixel>
void load_pixels(Vec<T>* block, const int32_t* position, const Pixel* const* images, int64_t pixels, int64_t count,
                 T scale, T offset) {
  constexpr int n = kLanes<T>;
  typedef Pixel Row __attribute__((vector_size(n * sizeof(Pixel))));
  const auto value = [&](Vec<T> pixel) __attribute__((always_inline)) {
    if constexpr (std::is_same_v<Pixel, T>) {
      return pixel;
    } else {
      return scale * pixel + offset;
    }
  };
  int64_t p = 0;
  for (; p + n <= pixels; p += n) {
    Row m[n]{};
    unroll<n>([&](auto i) __attribute__((always_inline)) {
      if (i < count) {
        __builtin_memcpy(&m[i], images[i] + p, sizeof(Row));
      }
    });
    transpose(m);
    unroll<n>([&](auto i) __attribute__((always_inline)) {
      block[position[p + i]] = value(__builtin_convertvector(m[i], Vec<T>));
    });
  }
  for (; p < pixels; ++p) {
    Vec<T> pixel{};
    for (int64_t i = 0; i < count; ++i) {
      pixel[i] = static_cast<T>(images[i][p]);
    }
    block[position[p]] = value(pixel);
  }
}

// images[i * stride + f] = feature f of image i
template <typename T>
void store_rows(T* images, const Vec<T>* block, int64_t features, int64_t stride, int64_t count) {
  constexpr int n = kLanes<T>;
  int64_t f = 0;
  for (; f + n <= features; f += n) {
    Vec<T> m[n];
    unroll<n>([&](auto i) __attribute__((always_inline)) { m[i] = block[f + i]; });
    transpose(m);
    unroll<n>([&](auto i) __attribute__((always_inline)) {
      if (i < count) {
        store(images + i * stride + f, m[i]);
      }
    });
  }
  for (; f < features; ++f) {
    for (int64_t i = 0; i < count; ++i) {
      images[i * stride + f] = block[f][i];
    }
  }
}

// One thread's view of the network and its memory.
template <typename T>
class NetworkBlocks {
 public:
  // `dropout` is that of the training step, null outside of one.
  NetworkBlocks(const Network<T>& network, void* memory, bool training, const Dropout<T>* dropout = nullptr)
      : n_(network),
        g_(network.geometry),
        training_(training),
        dropout_(dropout),
        layout_(g_, training),
        memory_(static_cast<Vec<T>*>(memory)) {}

  // What lies between the pixels of any images: once before the first ones.
  void prepare(const Images<T>& images) {
    const ConvGeometry& first = g_.conv[0];
    const BlockLayout planes(first);
    const int64_t top = (first.height - images.height) / 2, left = (first.width - images.width) / 2;
    const auto at = [&](int64_t c, int64_t y, int64_t x) {
      return planes.input_begin + c * planes.input_plane + y * planes.input_row + x;
    };
    for (int b = 0; b < kGroup; ++b) {
      for (int l = 0; l < g_.num_convs; ++l) {
        Vec<T>* const input = memory_ + layout_.block[b].conv_input[l];
        std::fill(input, input + BlockLayout(g_.conv[l]).input_size, Vec<T>{});
      }
      if (images.are_bytes) {
        fill_background(images, b);
      }
    }
    auto* position = reinterpret_cast<int32_t*>(memory_ + layout_.positions);
    for (int64_t c = 0; c < first.in_channels; ++c) {
      for (int64_t y = 0; y < images.height; ++y) {
        for (int64_t x = 0; x < images.width; ++x) {
          *position++ = static_cast<int32_t>(at(c, y + top, x + left));
        }
      }
    }
  }

  // What is made of the parameters: once before every use of new ones.
  void prepare_weights() {
    for (int l = 0; l < g_.num_convs; ++l) {
      if (layer(l).layout.uses_winograd) {
        winograd::weight_points(reinterpret_cast<T*>(memory_ + layout_.weight_points[l]), g_.conv[l].num_connections(),
                                n_.conv[l].weight.value);
      }
    }
  }

  // Images smaller than the first convolution's planes lie in the middle of that.
  void fill_background(const Images<T>& images, int b) {
    const Planes<Vec<T>> planes = input_planes(b);
    for (int64_t c = 0; c < g_.conv[0].in_channels; ++c) {
      for (int64_t y = 0; y < g_.conv[0].height; ++y) {
        std::fill(planes.at(c, y), planes.at(c, y) + g_.conv[0].width, splat(images.background));
      }
    }
  }

  // Images `first` to `first` + `count` of the order, as they are before anything is dropped.
  void load(const Images<T>& images, int b, int64_t first, int64_t count) {
    if (images.are_bytes && drops(0)) {  // some of the background of the images before was dropped
      fill_background(images, b);
    }
    const int64_t pixels = g_.conv[0].in_channels * images.height * images.width;
    Vec<T>* const planes = memory_ + layout_.block[b].conv_input[0];
    const auto* position = reinterpret_cast<const int32_t*>(memory_ + layout_.positions);
    const auto load_as = [&]<typename Pixel>(Pixel) {
      const Pixel* sources[kLanes<T>]{};
      for (int64_t i = 0; i < count; ++i) {
        sources[i] = static_cast<const Pixel*>(images.data) + images.index(first + i) * pixels;
      }
      load_pixels<T, Pixel>(planes, position, sources, pixels, count, images.scale, images.background);
    };
    images.are_bytes ? load_as(uint8_t{}) : load_as(T{});
  }

  // Shuffled images come from memory, one cache line at a time unless they are asked for before. (Inline: GCC drops
  // calls of a function that does nothing but this.)
  LF_INLINE void prefetch(const Images<T>& images, int64_t begin, int64_t end) const {
    constexpr int64_t line = 64;
    const int64_t bytes = g_.conv[0].in_channels * images.height * images.width *
                          (images.are_bytes ? 1 : static_cast<int64_t>(sizeof(T)));
    for (int64_t i = begin; i < end; ++i) {
      const char* image = static_cast<const char*>(images.data) + images.index(i) * bytes;
      for (int64_t at = 0; at < bytes; at += line) {
        __builtin_prefetch(image + at, 0, 2);
      }
    }
  }

  // From the loaded images to the last dense layer's output. `first_image` is the index that the first of them has in
  // the batch of a training step: what is dropped depends on it.
  template <int Blocks>
  void forward(int64_t first_image) {
    for (int b = 0; b < Blocks; ++b) {
      const auto& block = layout_.block[b];
      drop(0, b, first_image, input_planes(b));
      for (int l = 0; l < g_.num_convs; ++l) {
        const ConvGeometry& g = g_.conv[l];
        const Planes<Vec<T>> output =
            l + 1 < g_.num_convs
                ? layer(l + 1).inner(memory_ + block.conv_input[l + 1])
                : Planes<Vec<T>>{memory_ + block.dense[0], g.out_height() * g.out_width(), g.out_width()};
        forward_block<T>(layer(l), memory_ + block.conv_input[l], output,
                         training_ ? memory_ + block.record[l] : nullptr, memory_ + layout_.scratch);
        drop(l + 1, b, first_image, output);
      }
    }
    for (int l = 0; l < g_.num_denses; ++l) {
      const Vec<T>* input[Blocks];
      Vec<T>* output[Blocks];
      for (int b = 0; b < Blocks; ++b) {
        input[b] = memory_ + layout_.block[b].dense[l];
        output[b] = dense_output(b, l);
      }
      dense_forward<Blocks, T>(g_.dense[l], n_.dense[l].weight.value, n_.dense[l].bias.value, input, output);
      for (int b = 0; b < Blocks && drops(g_.num_convs + l + 1); ++b) {
        Vec<T>* const kept = memory_ + layout_.block[b].dense[l + 1];
        std::copy(output[b], output[b] + g_.dense[l].out_features, kept);
        drop(g_.num_convs + l + 1, b, first_image, {kept, 1, 1});
      }
    }
    for (int b = 0; g_.output == Output::distances && b < Blocks; ++b) {
      const auto& block = layout_.block[b];
      negative_distances<T>(memory_ + block.dense[g_.num_denses], n_.codes, g_.classes, g_.last_dense().out_features,
                            memory_ + block.scores);
    }
  }

  const Vec<T>* scores(int b) const {
    return memory_ + (g_.output == Output::distances ? layout_.block[b].scores : layout_.block[b].dense[g_.num_denses]);
  }

  // Where the gradient of the scores belongs. Scores are the last dense layer's output, which its activation's
  // derivative is computed from, so their gradient has its own memory; that of distances may overwrite them.
  Vec<T>* grad_scores(int b) const {
    const auto& block = layout_.block[b];
    return memory_ + (g_.output == Output::distances ? block.scores : block.grad_dense[g_.num_denses]);
  }

  // From `grad_scores` to the sums of the convolutions, and the pre-activation gradients of the dense layers.
  template <int Blocks>
  void backward(int64_t first_image) {
    for (int b = 0; g_.output == Output::distances && b < Blocks; ++b) {
      const auto& block = layout_.block[b];
      negative_distances_gradient<T>(memory_ + block.dense[g_.num_denses], n_.codes, g_.classes,
                                     g_.last_dense().out_features, grad_scores(b),
                                     memory_ + block.grad_dense[g_.num_denses]);
    }
    for (int l = g_.num_denses - 1; l >= 0; --l) {
      const Vec<T>* grad[Blocks];
      Vec<T>* grad_input[Blocks];
      for (int b = 0; b < Blocks; ++b) {
        const auto& block = layout_.block[b];
        drop(g_.num_convs + l + 1, b, first_image, {memory_ + block.grad_dense[l + 1], 1, 1});
        dense_differentiate<T>(g_.dense[l], dense_output(b, l), memory_ + block.grad_dense[l + 1]);
        grad[b] = memory_ + block.grad_dense[l + 1];
        grad_input[b] = memory_ + block.grad_dense[l];
      }
      dense_input_gradient<Blocks, T>(g_.dense[l], n_.dense[l].weight.value, grad, grad_input);
    }
    for (int b = 0; b < Blocks; ++b) {
      const auto& block = layout_.block[b];
      Vec<T>* grad = memory_ + block.grad_dense[0];
      for (int l = g_.num_convs - 1; l >= 0; --l) {
        const ConvGeometry& g = g_.conv[l];
        const int64_t outputs = g.out_height() * g.out_width();
        drop(l + 1, b, first_image, {grad, outputs, g.out_width()});
        Vec<T>* const grad_input = l > 0 ? memory_ + block.grad_conv[l] : nullptr;
        // Every lane is valid: absent images are 0 and so is the gradient of their outputs.
        backward_block<T>(layer(l), VecInt<T>{} - 1, memory_ + block.record[l], {grad, outputs, g.out_width()},
                          memory_ + block.conv_input[l],
                          {memory_ + layout_.weight_sums[l], memory_ + layout_.map_sums[l]},
                          {grad_input, g.height * g.width, g.width}, memory_ + layout_.scratch);
        grad = grad_input;
      }
    }
  }

  void clear_sums() { std::fill(memory_, memory_ + layout_.sums_end, Vec<T>{}); }
  const Vec<T>* dense_input(int b, int l) const { return memory_ + layout_.block[b].dense[l]; }
  const Vec<T>* dense_grad(int b, int l) const { return memory_ + layout_.block[b].grad_dense[l + 1]; }

 private:
  bool drops(int place) const { return dropout_ != nullptr && dropout_->at[place].is_active(); }

  // Values at `place` of block b, or their gradients, times the masks that the step has for them.
  LF_INLINE void drop(int place, int b, int64_t first_image, Planes<Vec<T>> values) const {
    if (drops(place)) {
      drop_block<T>(dropout_->at[place], dropout_->step, static_cast<uint32_t>(first_image + b * kLanes<T>), values);
    }
  }

  // The output of dense layer l before any of it is dropped.
  Vec<T>* dense_output(int b, int l) const {
    const auto& block = layout_.block[b];
    return memory_ + (drops(g_.num_convs + l + 1) ? block.undropped[l] : block.dense[l + 1]);
  }

  // Where the images of block b are loaded.
  Planes<Vec<T>> input_planes(int b) const { return layer(0).inner(memory_ + layout_.block[b].conv_input[0]); }

  ConvLayer<T> layer(int l) const {
    const ConvParameters<T>& p = n_.conv[l];
    return {g_.conv[l],
            BlockLayout(g_.conv[l]),
            p.weight.value,
            p.bias.value,
            p.coefficient.value,
            p.subsample_bias.value,
            reinterpret_cast<const T*>(memory_ + layout_.weight_points[l])};
  }

  const Network<T>& n_;
  const NetworkGeometry& g_;
  const bool training_;
  const Dropout<T>* const dropout_;
  NetworkLayout<T> layout_;
  Vec<T>* memory_;
};

// Images [begin, end) of the chunk: everything of them but the dense layers' weight gradients.
template <typename T>
void network_train(const TrainingStep<T>& step, int64_t begin, int64_t end, int64_t thread) {
  constexpr int n = kLanes<T>;
  const NetworkGeometry& g = step.network->geometry;
  NetworkBlocks<T> blocks(*step.network, step.thread_memory + step.thread_stride * thread, true, &step.dropout);
  if (step.first_chunk) {
    blocks.prepare_weights();
    blocks.clear_sums();
  }
  BlockLoss<T> total{};
  const auto run = [&](auto group, int64_t first) {
    for (int b = 0; b < group; ++b) {
      blocks.load(step.images, b, step.chunk_begin + first + b * n, std::min<int64_t>(n, end - first - b * n));
    }
    const int64_t next = first + group * n;
    blocks.prefetch(step.images, step.chunk_begin + next, step.chunk_begin + std::min<int64_t>(end, next + kGroup * n));
    blocks.template forward<group>(step.first_image + first);
    for (int b = 0; b < group; ++b) {
      const int64_t at = first + b * n, count = std::min<int64_t>(n, end - at);
      const auto loss = score_loss<T>(
          blocks.scores(b), g.classes, g.output == Output::distances ? &step.extra_score : nullptr,
          step.labels + step.chunk_begin + at, count, step.factor, step.label_smoothing, blocks.grad_scores(b));
      total.loss += loss.loss;
      total.correct += loss.correct;
    }
    blocks.template backward<group>(step.first_image + first);
    for (int b = 0; b < group; ++b) {
      const int64_t at = first + b * n, count = std::min<int64_t>(n, end - at);
      for (int l = 0; l < g.num_denses; ++l) {
        const DenseGeometry& dense = g.dense[l];
        const DenseSums<T>& sums = step.dense_sums[l];
        store_rows<T>(sums.inputs + at * sums.inputs_stride, blocks.dense_input(b, l), dense.in_features,
                      sums.inputs_stride, count);
        for (int64_t row = 0; row < dense.out_features; ++row) {
          store(sums.grads + row * sums.grads_stride + at, blocks.dense_grad(b, l)[row]);
        }
      }
    }
  };
  int64_t first = begin;
  for (; first + (kGroup - 1) * n < end; first += kGroup * n) {
    run(std::integral_constant<int, kGroup>{}, first);
  }
  for (; first < end; first += n) {
    run(std::integral_constant<int, 1>{}, first);
  }
  step.losses[thread] += total.loss;
  step.correct[thread] += total.correct;
}

// Part `part` of `parts` of every parameter: sum its gradient and, after the last chunk, update it.
template <typename T>
void network_update(const TrainingStep<T>& step, int64_t part, int64_t parts) {
  const NetworkGeometry& g = step.network->geometry;
  for (int l = 0; l < g.num_denses; ++l) {
    const DenseGeometry& dense = g.dense[l];
    const DenseParameters<T>& p = step.network->dense[l];
    const DenseSums<T>& sums = step.dense_sums[l];
    const int64_t begin = dense.out_features * part / parts, end = dense.out_features * (part + 1) / parts;
    dense_weight_gradient<T>(p.weight.grad, dense.in_features, begin, end, !step.first_chunk, sums.grads,
                             sums.grads_stride, sums.inputs, sums.inputs_stride, step.chunk_size);
    if (p.bias.value != nullptr) {
      dense_bias_gradient<T>(p.bias.grad, begin, end, !step.first_chunk, sums.grads, sums.grads_stride,
                             step.chunk_size);
    }
    if (step.last_chunk) {
      update_parameter<T>(p.weight, begin * dense.in_features, end * dense.in_features);
      update_parameter<T>(p.bias, begin, end);
    }
  }
  if (!step.last_chunk) {
    return;
  }
  const NetworkLayout<T> layout(g, true);
  const auto reduce = [&](const Parameter<T>& p, int64_t sums, int64_t stride, int64_t length) {
    if (p.value == nullptr) {
      return;
    }
    const int64_t begin = length * part / parts, end = length * (part + 1) / parts;
    for (int64_t i = begin; i < end; ++i) {
      Vec<T> sum{};
      for (int64_t thread = 0; thread < step.threads; ++thread) {
        sum += reinterpret_cast<const Vec<T>*>(step.thread_memory + step.thread_stride * thread)[sums + i * stride];
      }
      p.grad[i] = sum_of_lanes<T>(sum);
    }
    update_parameter<T>(p, begin, end);
  };
  for (int l = 0; l < g.num_convs; ++l) {
    const ConvGeometry& conv = g.conv[l];
    const ConvParameters<T>& p = step.network->conv[l];
    reduce(p.weight, layout.weight_sums[l], 1, conv.num_connections() * conv.kernel_size * conv.kernel_size);
    reduce(p.bias, layout.map_sums[l], 3, conv.out_channels);
    reduce(p.coefficient, layout.map_sums[l] + 1, 3, conv.out_channels);
    reduce(p.subsample_bias, layout.map_sums[l] + 2, 3, conv.out_channels);
  }
}

template <typename T>
void network_prepare(const Network<T>& network, const Images<T>& images, bool training, void* memory) {
  NetworkBlocks<T>(network, memory, training).prepare(images);
}

// Scores, or distances, of images [begin, end) into output (images, classes).
template <typename T>
void network_infer(const Network<T>& network, const Images<T>& images, int64_t begin, int64_t end, T* output,
                   void* memory) {
  constexpr int n = kLanes<T>;
  const NetworkGeometry& g = network.geometry;
  NetworkBlocks<T> blocks(network, memory, false);
  blocks.prepare_weights();
  const auto run = [&](auto group, int64_t first) {
    for (int b = 0; b < group; ++b) {
      blocks.load(images, b, first + b * n, std::min<int64_t>(n, end - first - b * n));
    }
    blocks.template forward<group>(0);
    for (int b = 0; b < group; ++b) {
      const int64_t at = first + b * n, count = std::min<int64_t>(n, end - at);
      for (int64_t c = 0; c < g.classes; ++c) {
        const Vec<T> score = blocks.scores(b)[c];
        for (int64_t i = 0; i < count; ++i) {
          output[(at + i) * g.classes + c] = g.output == Output::distances ? -score[i] : score[i];
        }
      }
    }
  };
  int64_t first = begin;
  for (; first + (kGroup - 1) * n < end; first += kGroup * n) {
    run(std::integral_constant<int, kGroup>{}, first);
  }
  for (; first < end; first += n) {
    run(std::integral_constant<int, 1>{}, first);
  }
}

template <typename T>
constexpr NetworkKernels<T> network_kernels() {
  return {kLanes<T>,
          network_thread_bytes<T>,
          network_prepare<T>,
          network_train<T>,
          network_update<T>,
          network_infer<T>,
          network_few_bytes<T>,
          network_infer_few<T>,
          network_few_training_bytes<T>,
          network_train_few<T>};
}

}  // namespace lenet_fast::cpu::LENET_FAST_ISA
