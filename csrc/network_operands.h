// A network as the operators are told it, int[] network:
//   channels, height, width of an image; 0 scores or 1 distances; classes; number of convolutions, of dense layers;
//   per convolution: output maps, kernel size, padding, activation, pool, bias (0 or 1), connections (-1: all), each
//   one; per dense layer: output features, activation, bias.
// Its tensors, in order: per convolution weight, bias, coefficient and pool_bias (subsampling), per dense layer weight,
// bias, those that there are; last the codes of the distances.
#pragma once

#include "network.h"
#include "operands.h"

namespace lenet_fast {

// Owns what the geometry points to.
class NetworkOperand {
 public:
  explicit NetworkOperand(std::vector<int64_t> numbers) : numbers_(std::move(numbers)) {
    int64_t channels = size(), height = size(), width = size();
    geometry_.output = static_cast<Output>(choice(2));
    geometry_.classes = size();
    geometry_.num_convs = static_cast<int>(count(1, kMaxConvs));
    geometry_.num_denses = static_cast<int>(count(1, kMaxDenses));
    tables_.reserve(kMaxConvs);
    for (int l = 0; l < geometry_.num_convs; ++l) {
      ConvGeometry& g = geometry_.conv[l];
      g = read_conv(channels, height, width);
      channels = g.out_channels, height = g.out_height(), width = g.out_width();
    }
    int64_t features = channels * height * width;
    for (int l = 0; l < geometry_.num_denses; ++l) {
      DenseGeometry& g = geometry_.dense[l];
      g.in_features = features;
      g.out_features = features = size();
      g.activation = static_cast<Activation>(choice(5));
      shapes_.push_back({g.out_features, g.in_features});
      add_bias(choice(2) != 0, g.out_features);
      if (g.out_features > kLimit / g.in_features) {
        fail("network: a dense layer of ", g.in_features, " x ", g.out_features, " is too large");
      }
    }
    if (geometry_.output == Output::scores && geometry_.classes != features) {
      fail("network: expected ", geometry_.classes, " scores, the last dense layer has ", features);
    }
    if (next_ != numbers_.size()) {
      fail("network: expected ", next_, " numbers, got ", numbers_.size());
    }
  }

  const NetworkGeometry& geometry() const { return geometry_; }
  // Of the trained tensors; empty: a bias that is not there.
  const std::vector<std::vector<int64_t>>& shapes() const { return shapes_; }
  size_t num_trained() const {
    size_t number = 0;
    for (const auto& shape : shapes_) {
      number += shape.empty() ? 0 : 1;
    }
    return number;
  }

  // Call f(tensor, slot) for each tensor in `tensors`, all checked; `slot` counts absent ones too.
  template <typename F>
  void for_each_trained(const std::vector<Tensor>& tensors, F&& f) const {
    size_t next = 0;
    for (size_t slot = 0; slot < shapes_.size(); ++slot) {
      if (!shapes_[slot].empty()) {
        f(tensors[next], slot, next);
        ++next;
      }
    }
  }

  // Parameters of the right number, shapes, one floating dtype and device, contiguous.
  void check(const std::vector<Tensor>& parameters) const {
    const bool has_codes = geometry_.output == Output::distances;
    const size_t expected = num_trained() + (has_codes ? 1 : 0);
    if (parameters.size() != expected) {
      fail("parameters: expected ", expected, " tensors, got ", parameters.size());
    }
    for_each_trained(parameters, [&](const Tensor& tensor, size_t slot, size_t) {
      check_tensor("parameters", tensor, slot, parameters[0]);
    });
    if (has_codes) {
      const Tensor& codes = parameters.back();
      check_like("codes", codes, parameters[0]);
      check_shape("codes", codes, {geometry_.classes, geometry_.last_dense().out_features});
      check_contiguous("codes", codes);
    }
  }

  // A trained tensor or its like. A dense weight may have any shape after the first dimension: C5 has a convolution's.
  void check_tensor(const char* name, const Tensor& tensor, size_t slot, const Tensor& like) const {
    check_like(name, tensor, like);
    const std::vector<int64_t>& expected = shapes_[slot];
    if (expected.size() != 2 || tensor.dim() < 2 || tensor.size(0) != expected[0] ||
        tensor.numel() != expected[0] * expected[1]) {
      check_shape(name, tensor, expected);
    }
    check_contiguous(name, tensor);
  }

  static void check_contiguous(const char* name, const Tensor& tensor) {
    if (!tensor.is_contiguous()) {
      fail(name, ": expected a contiguous tensor, got strides of another layout for shape ", shape(tensor));
    }
  }

 private:
  static constexpr int64_t kLimit = int64_t{1} << 28;

  ConvGeometry read_conv(int64_t channels, int64_t height, int64_t width) {
    ConvGeometry g{};
    g.in_channels = channels, g.height = height, g.width = width;
    g.out_channels = size();
    g.kernel_size = size();
    g.padding = count(0, kLimit);
    g.activation = static_cast<Activation>(choice(5));
    g.pool = static_cast<Pool>(choice(4));
    const bool has_bias = choice(2) != 0;
    if (g.out_channels > kLimit / g.in_channels || g.padded_height() > kLimit ||
        g.padded_width() > kLimit / g.padded_height() / g.in_channels ||
        g.padded_width() > kLimit / g.padded_height() / g.out_channels ||
        g.kernel_size > std::min(g.padded_height(), g.padded_width()) ||
        g.kernel_size * g.kernel_size > kLimit / (g.out_channels * g.in_channels)) {
      fail("network: a convolution of kernel size ", g.kernel_size, " from ", g.in_channels, " to ", g.out_channels,
           " maps does not fit an input of ", height, " x ", width, " padded by ", g.padding);
    }
    if (g.out_height() < 1 || g.out_width() < 1) {
      fail("network: pooling needs a convolution output of at least 2x2");
    }
    const int64_t connections = count(-1, g.out_channels * g.in_channels);
    if (connections < 0) {
      tables_.push_back(ConnectionTable::dense(g.out_channels, g.in_channels));
      shapes_.push_back({g.out_channels, g.in_channels, g.kernel_size, g.kernel_size});
    } else {
      std::vector<int64_t> indices(static_cast<size_t>(connections));
      for (int64_t& index : indices) {
        index = count(0, kLimit);
      }
      tables_.push_back(ConnectionTable::sparse(indices, g.out_channels, g.in_channels));
      shapes_.push_back({connections, g.kernel_size, g.kernel_size});
    }
    g.connections = tables_.back().view();
    add_bias(has_bias, g.out_channels);
    const bool subsamples = g.pool == Pool::subsample;
    add_bias(subsamples, g.out_channels);
    add_bias(subsamples, g.out_channels);
    return g;
  }

  void add_bias(bool present, int64_t length) {
    shapes_.push_back(present ? std::vector<int64_t>{length} : std::vector<int64_t>{});
  }

  int64_t count(int64_t least, int64_t most) {
    if (next_ >= numbers_.size()) {
      fail("network: expected more than ", numbers_.size(), " numbers");
    }
    const int64_t value = numbers_[next_++];
    if (value < least || value > most) {
      fail("network: expected ", least, " to ", most, " at position ", next_ - 1, ", got ", value);
    }
    return value;
  }
  int64_t size() { return count(1, kLimit); }
  int64_t choice(int64_t of) { return count(0, of - 1); }

  const std::vector<int64_t> numbers_;
  size_t next_ = 0;
  NetworkGeometry geometry_{};
  std::vector<ConnectionTable> tables_;
  std::vector<std::vector<int64_t>> shapes_;
};

}  // namespace lenet_fast
