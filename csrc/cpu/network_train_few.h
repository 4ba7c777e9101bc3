// A training step on fewer images than a block has lanes: the convolutions with bands of rows in the lanes (bands.h,
// conv_act_pool.h), the dense layers image by image as in network_few.h. One thread: a step is tens of microseconds.
//
// Operations as in network_pass.h. Every dense weight is read three times and its gradient written and read once, out
// of the L2 cache: 1.2 MB of traffic for LeNet-5's 59,000.
#pragma once

#include "conv_act_pool.h"
#include "dense_block.h"
#include "drop_block.h"
#include "loss_block.h"
#include "network_few.h"
#include "update.h"

namespace lenet_fast::cpu::LENET_FAST_ISA {

// output[column] = the sum over the rows of a (rows, columns) matrix: add(sum, row, column, the row's values there).
template <typename T, typename F>
LF_INLINE void reduce_columns(const T* matrix, int64_t rows, int64_t columns, T* output, F&& add) {
  constexpr int n = kLanes<T>, wide = LENET_FAST_VECTOR_REGISTERS / 4;
  const auto strip = [&](auto vectors, int64_t column) __attribute__((always_inline)) {
    Vec<T> sum[vectors]{};
    for (int64_t row = 0; row < rows; ++row) {
      unroll<vectors>([&](auto v) __attribute__((always_inline)) {
        sum[v] = add(sum[v], row, column + v * n, load(matrix + row * columns + column + v * n));
      });
    }
    unroll<vectors>([&](auto v) __attribute__((always_inline)) { store(output + column + v * n, sum[v]); });
  };
  if (columns < n) {
    Vec<T> sum{};
    for (int64_t row = 0; row < rows; ++row) {
      sum = add(sum, row, 0, load_partial(matrix + row * columns, columns));
    }
    return store_partial(output, sum, columns);
  }
  int64_t column = 0;
  for (; column + wide * n <= columns; column += wide * n) {
    strip(std::integral_constant<int, wide>{}, column);
  }
  for (; column < columns; column += n) {  // the last vector may begin among columns that are done already
    strip(std::integral_constant<int, 1>{}, std::min(column, columns - n));
  }
}

// grad (of the output) becomes the gradient of the pre-activation.
template <typename T>
void differentiate_few(Activation activation, const T* output, T* grad, int64_t size) {
  constexpr int n = kLanes<T>;
  with_activation(activation, [&]<Activation A>() {
    int64_t i = 0;
    for (; i + n <= size; i += n) {
      store(grad + i, load(grad + i) * derivative_from_output<A, T>(load(output + i)));
    }
    store_partial(grad + i,
                  load_partial(grad + i, size - i) * derivative_from_output<A, T>(load_partial(output + i, size - i)),
                  size - i);
  });
}

// The convolutions for a batch of `images`, cut into bands, and offsets in values: what forward leaves for backward,
// the gradients of the same, and room for what one layer needs.
template <typename T>
struct FewTraining {
  ConvGeometry conv[kMaxConvs];
  Bands bands[kMaxConvs];
  // Of all images: inputs of the convolutions, of the dense layers with what the last one gives, distances or scores.
  int64_t conv_input[kMaxConvs], dense[kMaxDenses + 1], scores;
  int64_t undropped[kMaxDenses];  // outputs of the dense layers before some are dropped
  int64_t record[kMaxConvs], grad_conv_input[kMaxConvs], grad_dense[kMaxDenses + 1];
  int64_t block, transposed, pieces, workspace, end;

  FewTraining(const NetworkGeometry& g, int64_t images) {
    constexpr int n = kLanes<T>;
    int64_t next = 0, most_pieces = 0, most_workspace = 0, most_features = 0;
    // Beyond its end, what a matrix product loads of a last partial vector.
    const auto take = [&next](int64_t values) { return std::exchange(next, next + round_up(values + n, 64)); };
    for (int l = 0; l < g.num_convs; ++l) {
      conv[l] = g.conv[l];
      conv[l].batch = images;
      bands[l] = choose_bands(conv[l], n);
      const ConvGeometry& piece = bands[l].piece;
      const int64_t input = images * conv[l].in_channels * conv[l].height * conv[l].width;
      conv_input[l] = take(input);
      grad_conv_input[l] = take(l > 0 ? input : 0);
      record[l] = take((piece.batch + n - 1) / n * record_size<T>(piece));
      most_pieces = std::max(most_pieces, l > 0 ? piece.batch * piece.in_channels * piece.height * piece.width : 0);
      most_workspace = std::max({most_workspace, static_cast<int64_t>(workspace_bytes<T, false>(piece) / sizeof(T)),
                                 static_cast<int64_t>(workspace_bytes<T, true>(piece) / sizeof(T))});
    }
    for (int l = 0; l <= g.num_denses; ++l) {
      const int64_t features = l < g.num_denses ? g.dense[l].in_features : g.last_dense().out_features;
      dense[l] = take(images * features);
      grad_dense[l] = take(images * features);
      most_features = std::max(most_features, features);
    }
    for (int l = 0; l < g.num_denses; ++l) {
      undropped[l] = take(images * g.dense[l].out_features);
    }
    scores = g.output == Output::distances ? take(images * g.classes) : dense[g.num_denses];
    block = take(g.classes * n);
    transposed = take(images * most_features);
    pieces = take(most_pieces);
    workspace = take(most_workspace);
    end = next;
  }
};

template <typename T>
size_t network_few_training_bytes(const NetworkGeometry& g, int64_t images) {
  return static_cast<size_t>(FewTraining<T>(g, images).end) * sizeof(T);
}

// Image `index` as floating planes of the first convolution's size.
template <typename T>
void load_one(const Images<T>& images, const ConvGeometry& g, int64_t index, T* input) {
  const int64_t pixels = images.height * images.width, plane = g.height * g.width;
  if (!images.are_bytes) {
    const T* const source = static_cast<const T*>(images.data) + index * g.in_channels * pixels;
    std::copy(source, source + g.in_channels * pixels, input);
    return;
  }
  const auto* source = static_cast<const uint8_t*>(images.data) + index * g.in_channels * pixels;
  std::fill(input, input + g.in_channels * plane, images.background);
  input += (g.height - images.height) / 2 * g.width + (g.width - images.width) / 2;
  for (int64_t c = 0; c < g.in_channels; ++c, input += plane) {
    for (int64_t y = 0; y < images.height; ++y, source += images.width) {
      for (int64_t x = 0; x < images.width; ++x) {
        input[y * g.width + x] = images.scale * static_cast<T>(source[x]) + images.background;
      }
    }
  }
}

template <typename T>
class FewImages {
 public:
  FewImages(const TrainingStep<T>& step, void* memory)
      : step_(step),
        network_(*step.network),
        g_(network_.geometry),
        images_(step.chunk_size),
        at_(g_, images_),
        values_(static_cast<T*>(memory)) {}

  void forward() {
    const ConvGeometry& first = at_.conv[0];
    for (int64_t i = 0; i < images_; ++i) {
      load_one<T>(step_.images, first, image(i),
                  values_ + at_.conv_input[0] + i * first.in_channels * first.height * first.width);
    }
    drop(0, values_ + at_.conv_input[0]);
    for (int l = 0; l < g_.num_convs; ++l) {
      const ConvParameters<T>& p = network_.conv[l];
      T* const output = values_ + (l + 1 < g_.num_convs ? at_.conv_input[l + 1] : at_.dense[0]);
      conv_act_pool_forward<T>({at_.conv[l], at_.bands[l], values_ + at_.conv_input[l], p.weight.value, p.bias.value,
                                p.coefficient.value, p.subsample_bias.value, output, values_ + at_.record[l]},
                               0, at_.bands[l].piece.batch, values_ + at_.workspace);
      drop(l + 1, output);
    }
    for (int64_t i = 0; i < images_; ++i) {
      for (int l = 0; l < g_.num_denses; ++l) {
        const int64_t outputs = g_.dense[l].out_features;
        T* const output = dense_output(l) + i * outputs;
        dense_few<T>(g_.dense[l], network_.dense[l], row(at_.dense, l, i), output);
        if (const int place = g_.num_convs + l + 1; drops(place)) {
          std::copy(output, output + outputs, row(at_.dense, l + 1, i));
          drop_one(place, i, row(at_.dense, l + 1, i));
        }
      }
      if (g_.output == Output::distances) {
        distances_few<T>(network_.codes, g_.classes, g_.last_dense().out_features, row(at_.dense, g_.num_denses, i),
                         values_ + at_.scores + i * g_.classes);
      }
    }
  }

  // Leaves the gradient of the scores in `block`.
  BlockLoss<T> loss() {
    const T sign = g_.output == Output::distances ? T(-1) : T(1);
    auto* const block = reinterpret_cast<Vec<T>*>(values_ + at_.block);
    std::fill(block, block + g_.classes, Vec<T>{});
    for (int64_t i = 0; i < images_; ++i) {
      for (int64_t c = 0; c < g_.classes; ++c) {
        block[c][i] = sign * values_[at_.scores + i * g_.classes + c];
      }
    }
    return score_loss<T>(block, g_.classes, g_.output == Output::distances ? &step_.extra_score : nullptr,
                         step_.labels + step_.chunk_begin, images_, step_.factor, step_.label_smoothing, block);
  }

  // From the gradient of the scores to updated parameters: a layer's are when no gradient needs them any more.
  void backward() {
    const auto* const block = reinterpret_cast<const Vec<T>*>(values_ + at_.block);
    for (int64_t i = 0; i < images_; ++i) {
      T* const grad = row(at_.grad_dense, g_.num_denses, i);
      if (g_.output == Output::scores) {
        for (int64_t c = 0; c < g_.classes; ++c) {
          grad[c] = block[c][i];
        }
        continue;
      }
      const int64_t size = g_.last_dense().out_features;
      const T* const features = row(at_.dense, g_.num_denses, i);
      reduce_columns<T>(network_.codes, g_.classes, size, grad,
                        [&](Vec<T> sum, int64_t c, int64_t column, Vec<T> code) __attribute__((always_inline)) {
                          return sum - T(2) * block[c][i] * (load(features + column) - code);
                        });
    }
    for (int l = g_.num_denses - 1; l >= 0; --l) {
      dense_backward(l);
    }
    for (int l = g_.num_convs - 1; l >= 0; --l) {
      conv_backward(l);
    }
  }

 private:
  void dense_backward(int l) {
    const DenseGeometry& dense = g_.dense[l];
    const DenseParameters<T>& p = network_.dense[l];
    T* const grads = values_ + at_.grad_dense[l + 1];
    drop(g_.num_convs + l + 1, grads);
    differentiate_few<T>(dense.activation, dense_output(l), grads, images_ * dense.out_features);
    T* const by_feature = values_ + at_.transposed;
    for (int64_t i = 0; i < images_; ++i) {
      for (int64_t f = 0; f < dense.out_features; ++f) {
        by_feature[f * images_ + i] = grads[i * dense.out_features + f];
      }
    }
    for (int64_t i = 0; i < images_; ++i) {
      const T* const grad = row(at_.grad_dense, l + 1, i);
      reduce_columns<T>(p.weight.value, dense.out_features, dense.in_features, row(at_.grad_dense, l, i),
                        [&](Vec<T> sum, int64_t f, int64_t, Vec<T> weight)
                            __attribute__((always_inline)) { return sum + grad[f] * weight; });
    }
    constexpr int64_t rows = 2 * kGradientRows;  // their gradients are still in the L1 cache when they are updated
    for (int64_t begin = 0; begin < dense.out_features; begin += rows) {
      const int64_t end = std::min(begin + rows, dense.out_features);
      dense_weight_gradient<T>(p.weight.grad, dense.in_features, begin, end, false, by_feature, images_,
                               values_ + at_.dense[l], dense.in_features, images_);
      update_parameter<T>(p.weight, begin * dense.in_features, end * dense.in_features);
    }
    if (p.bias.value != nullptr) {
      dense_bias_gradient<T>(p.bias.grad, 0, dense.out_features, false, by_feature, images_, images_);
      update_parameter<T>(p.bias, 0, dense.out_features);
    }
  }

  void conv_backward(int l) {
    const ConvParameters<T>& p = network_.conv[l];
    const Bands& bands = at_.bands[l];
    T* const grad_input = l > 0 ? values_ + at_.grad_conv_input[l] : nullptr;
    T* const pieces = grad_input != nullptr && bands.per_image > 1 ? values_ + at_.pieces : grad_input;
    T* const grad_output = values_ + (l + 1 < g_.num_convs ? at_.grad_conv_input[l + 1] : at_.grad_dense[0]);
    drop(l + 1, grad_output);
    conv_act_pool_backward<T>({at_.conv[l],
                               bands,
                               grad_output,
                               values_ + at_.conv_input[l],
                               p.weight.value,
                               p.bias.value,
                               p.coefficient.value,
                               p.subsample_bias.value,
                               values_ + at_.record[l],
                               pieces,
                               {p.weight.grad, p.bias.grad, p.coefficient.grad, p.subsample_bias.grad}},
                              0, bands.piece.batch, values_ + at_.workspace);
    if (pieces != grad_input) {
      merge_bands(grad_input, pieces, at_.conv[l], bands);
    }
    const ConvGeometry& conv = g_.conv[l];
    update_parameter<T>(p.weight, 0, conv.num_connections() * conv.kernel_size * conv.kernel_size);
    for (const Parameter<T>* parameter : {&p.bias, &p.coefficient, &p.subsample_bias}) {
      update_parameter<T>(*parameter, 0, conv.out_channels);
    }
  }

  bool drops(int place) const { return step_.dropout.at[place].is_active(); }

  // Values of all images at `place`, or their gradients, times the masks that the step has for them.
  void drop(int place, T* values) const {
    if (drops(place)) {
      for (int64_t i = 0; i < images_; ++i) {
        drop_one(place, i, values + i * step_.dropout.at[place].num_values());
      }
    }
  }

  void drop_one(int place, int64_t i, T* values) const {
    drop_image<T>(step_.dropout.at[place], step_.dropout.step, static_cast<uint32_t>(i), values);
  }

  // The output of dense layer l, of all images, before any of it is dropped.
  T* dense_output(int l) const { return values_ + (drops(g_.num_convs + l + 1) ? at_.undropped[l] : at_.dense[l + 1]); }

  int64_t image(int64_t i) const { return step_.images.index(step_.chunk_begin + i); }

  // Image i's features before dense layer l, or their gradient.
  T* row(const int64_t* offsets, int l, int64_t i) const {
    return values_ + offsets[l] + i * (l < g_.num_denses ? g_.dense[l].in_features : g_.last_dense().out_features);
  }

  const TrainingStep<T>& step_;
  const Network<T>& network_;
  const NetworkGeometry& g_;
  const int64_t images_;
  const FewTraining<T> at_;
  T* const values_;
};

// A whole step whose batch is the one chunk. Where the loss is not finite, nothing is updated.
template <typename T>
void network_train_few(const TrainingStep<T>& step, void* memory) {
  FewImages<T> images(step, memory);
  images.forward();
  const BlockLoss<T> loss = images.loss();
  step.losses[0] = loss.loss;
  step.correct[0] = loss.correct;
  if (std::isfinite(loss.loss)) {
    images.backward();
  }
}

}  // namespace lenet_fast::cpu::LENET_FAST_ISA
