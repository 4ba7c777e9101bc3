// The training operators' arguments beside the network: images, indices, optimizer settings; checked.
#pragma once

#include <array>

#include "network_operands.h"

namespace lenet_fast {

inline void check_device(const char* name, const Tensor& tensor, const Tensor& like) {
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
    if (images.dim() != 3 || first.in_channels != 1) {
      fail("images: expected uint8 (N, H, W) for one channel, got ", shape(images));
    }
    result.height = images.size(1), result.width = images.size(2);
    for (const int64_t margin : {first.height - result.height, first.width - result.width}) {
      if (margin < 0 || margin % 2 != 0) {
        fail("images: height and width must be ", first.height, " x ", first.width,
             " or smaller by even numbers, got shape ", shape(images));
      }
    }
  } else {
    check_like("images", images, like);
    check_shape("images", images,
                {images.dim() > 0 ? images.size(0) : 0, first.in_channels, first.height, first.width});
  }
  return result;
}

// Labels or an order of images; the values are not looked at.
inline const int64_t* indices_of(const char* name, const Tensor& tensor, const Tensor& like) {
  check_device(name, tensor, like);
  if (tensor.scalar_type() != ScalarType::Long || tensor.dim() != 1) {
    fail(name, ": expected int64 (N,), got shape ", shape(tensor));
  }
  NetworkOperand::check_contiguous(name, tensor);
  return static_cast<const int64_t*>(tensor.const_data_ptr());
}

struct OptimizerSettings {
  Optimizer optimizer;
  double momentum, nesterov, weight_decay, beta1, beta2, epsilon;

  OptimizerSettings(const Name& name, const std::vector<double>& numbers) {
    if (numbers.size() != 6) {
      fail("settings: expected momentum, nesterov, weight_decay, beta1, beta2, epsilon");
    }
    constexpr std::array names{"sgd", "adam", "adamw"};
    size_t index = 0;
    while (index < names.size() && name.value != names[index]) {
      ++index;
    }
    if (index == names.size()) {
      fail("optimizer: expected sgd, adam or adamw, got '", name.value, "'");
    }
    optimizer = static_cast<Optimizer>(index);
    momentum = numbers[0], nesterov = numbers[1], weight_decay = numbers[2];
    beta1 = numbers[3], beta2 = numbers[4], epsilon = numbers[5];
  }

  size_t num_moments() const { return optimizer == Optimizer::sgd ? (momentum != 0 ? 1 : 0) : 2; }
};

}  // namespace lenet_fast
