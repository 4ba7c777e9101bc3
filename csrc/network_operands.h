// A network as the operators are told it, int[] network:
//   channels, height, width of an image; 0 scores or 1 distances; classes; number of convolutions, of dense layers;
//   per convolution: output maps, kernel size, padding, activation, pool, bias (0 or 1), connections (-1: all), each
//   one; per dense layer: output features, activation, bias, kernel size of its weight
//   (0: the weight is a matrix; K: it is that of a convolution over its whole input, K x K).
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
      const bool has_bias = choice(2) != 0;
      const int64_t kernel = count(0, kMaxKernel), window = kernel * kernel;
      if (kernel == 0) {
        shapes_.push_back({g.out_features, g.in_features});
      } else if (g.in_features % window == 0) {
        shapes_.push_back({g.out_features, g.in_features / window, kernel, kernel});
      } else {
        fail("network: a window of ", kernel, " x ", kernel, " does not cover ", g.in_features, " features");
      }
      add_bias(has_bias, g.out_features);
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
      check_like("codes", codes, parameters[0], kOf);
      check_shape("codes", codes, {geometry_.classes, geometry_.last_dense().out_features});
      check_contiguous("codes", codes);
    }
  }

  // A trained tensor or its like.
  void check_tensor(const char* name, const Tensor& tensor, size_t slot, const Tensor& like) const {
    check_like(name, tensor, like, kOf);
    check_shape(name, tensor, shapes_[slot]);
    check_contiguous(name, tensor);
  }

  static void check_contiguous(const char* name, const Tensor& tensor) {
    if (!tensor.is_contiguous()) {
      fail(name, ": expected a contiguous tensor, got strides of another layout for shape ", shape(tensor));
    }
  }

  // The checked parameters in their places.
  template <typename T>
  Network<T> network(const std::vector<Tensor>& parameters) const {
    check(parameters);
    Network<T> result{};
    result.geometry = geometry_;
    const auto slots = result.slots();
    for_each_trained(parameters, [&](const Tensor& tensor, size_t slot, size_t) {
      slots[slot]->value = static_cast<T*>(tensor.mutable_data_ptr());
    });
    if (geometry_.output == Output::distances) {
      result.codes = static_cast<const T*>(parameters.back().const_data_ptr());
    }
    return result;
  }

 private:
  static constexpr int64_t kLimit = int64_t{1} << 28, kMaxKernel = int64_t{1} << 14;
  static constexpr const char* kOf = "the parameters";

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

// The memory and the device.
inline void check_device(const char* name, const Tensor& tensor, const Tensor& like) {
  check_memory(name, tensor);
  if (tensor.is_cpu() != like.is_cpu() || tensor.get_device_index() != like.get_device_index()) {
    fail(name, ": expected on the device of the parameters");
  }
}

template <typename T>
Images<T> images_of(const Tensor& images, const NetworkGeometry& g, const Tensor& like, double scale,
                    double background) {
  const ConvGeometry& first = g.conv[0];
  Images<T> result{.data = images.const_data_ptr(),
                   .are_bytes = images.scalar_type() == ScalarType::Byte,
                   .height = first.height,
                   .width = first.width,
                   .scale = static_cast<T>(scale),
                   .background = static_cast<T>(background),
                   .order = nullptr};
  check_device("images", images, like);
  NetworkOperand::check_contiguous("images", images);
  if (result.are_bytes) {
    const bool names_channels = images.dim() == 4;
    if (names_channels ? images.size(1) != first.in_channels : images.dim() != 3 || first.in_channels != 1) {
      fail("images: expected uint8 (N, ", first.in_channels, ", H, W)", first.in_channels == 1 ? " or (N, H, W)" : "",
           ", got ", shape(images));
    }
    result.height = images.size(names_channels ? 2 : 1), result.width = images.size(names_channels ? 3 : 2);
    for (const int64_t margin : {first.height - result.height, first.width - result.width}) {
      if (margin < 0 || margin % 2 != 0) {
        fail("images: height and width must be ", first.height, " x ", first.width,
             " or smaller by even numbers, got shape ", shape(images));
      }
    }
  } else {
    check_like("images", images, like, "the parameters");
    check_shape("images", images,
                {images.dim() > 0 ? images.size(0) : 0, first.in_channels, first.height, first.width});
  }
  return result;
}

// Call f(T{}) with the parameters' type.
template <typename F>
auto with_parameter_type(const std::vector<Tensor>& parameters, F&& f) {
  if (parameters.empty()) {
    fail("parameters: expected at least one tensor");
  }
  switch (parameters[0].scalar_type()) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Double:
      return f(double{});
    default:
      fail("parameters: expected dtype float32 or float64");
  }
}

}  // namespace lenet_fast
