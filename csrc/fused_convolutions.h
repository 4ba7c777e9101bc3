// The operators as lenet_fast/ops.py declares them, over the kernels of one device: check everything, then run.
#pragma once

#include <algorithm>
#include <tuple>

#include "operands.h"

namespace lenet_fast {

// The operands of any of the fused convolutions; subsampling is there when `coefficient` is.
struct Operands {
  const Tensor& input;
  const Tensor& weight;
  const std::optional<Tensor>& bias;
  std::optional<Tensor> coefficient, subsample_bias;
};

// Which gradients are wanted.
struct Needs {
  bool input, weight, bias, coefficient = false, subsample_bias = false;
};

// Gradients of the operands in order; an empty tensor for each that is not needed.
using Gradients = std::array<Tensor, 5>;

template <typename T>
const T* data(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

template <typename T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

inline void check_vector(const char* name, const std::optional<Tensor>& tensor, int64_t length, const Tensor& input) {
  if (tensor.has_value()) {
    check_like(name, *tensor, input);
    check_shape(name, *tensor, {length});
  }
}

// `out_channels` counts for a packed weight; a dense one tells itself.
inline ConvGeometry check_conv(const Operands& operands, bool dense, int64_t out_channels, int64_t padding,
                               const Name& activation, Pool pool) {
  const auto& [input, weight, bias, coefficient, subsample_bias] = operands;
  check_floating(input);
  check_like("weight", weight, input);
  if (input.dim() != 4 || input.size(1) == 0) {
    fail("input: expected (N, C, H, W), got shape ", shape(input));
  }
  const int64_t rank = weight.dim();
  if (rank != (dense ? 4 : 3) || weight.size(rank - 1) != weight.size(rank - 2) || weight.size(rank - 1) == 0) {
    fail("weight: expected ", dense ? "(C_out, C_in, K, K)" : "(connections, K, K)", ", got shape ", shape(weight));
  }
  if (dense) {
    out_channels = weight.size(0);
    if (weight.size(1) != input.size(1)) {
      fail("input: expected ", weight.size(1), " channels as weight has, got shape ", shape(input));
    }
  }
  if (out_channels < 1) {
    fail("out_channels: expected at least 1, got ", out_channels);
  }
  check_vector("bias", bias, out_channels, input);
  check_vector("coefficient", coefficient, out_channels, input);
  check_vector("pool_bias", subsample_bias, out_channels, input);
  if (coefficient.has_value() != subsample_bias.has_value()) {
    fail(coefficient.has_value() ? "pool_bias: expected beside coefficient, got None"
                                 : "coefficient: expected beside pool_bias, got None");
  }
  if (padding < 0) {
    fail("padding: expected at least 0, got ", padding);
  }
  const ConvGeometry geometry{.batch = input.size(0),
                              .in_channels = input.size(1),
                              .height = input.size(2),
                              .width = input.size(3),
                              .out_channels = out_channels,
                              .kernel_size = weight.size(rank - 1),
                              .padding = padding,
                              .activation = parse_activation(activation),
                              .pool = pool,
                              .connections = {}};
  // Positions in an image and connections are 32-bit.
  constexpr int64_t limit = int64_t{1} << 28;
  if (padding > limit || weight.numel() > limit || out_channels > limit / input.size(1) ||
      geometry.padded_height() > limit ||
      geometry.padded_width() > limit / std::max<int64_t>(1, geometry.padded_height()) / input.size(1)) {
    fail("input: ", shape(input), " with padding ", padding, " is too large for the native kernels");
  }
  if (geometry.padded_height() < geometry.kernel_size || geometry.padded_width() < geometry.kernel_size) {
    fail("weight: kernel size ", geometry.kernel_size, " is larger than the padded input, ", geometry.padded_height(),
         " x ", geometry.padded_width());
  }
  if (geometry.out_height() < 1 || geometry.out_width() < 1) {
    fail("pool: needs a convolution output of at least 2x2");
  }
  return geometry;
}

// Check everything, then call f(operands, geometry) while the connection table lives.
template <typename F>
auto with_geometry(const Operands& operands, const std::optional<std::vector<int64_t>>& connections,
                   int64_t out_channels, int64_t padding, const Name& activation, Pool pool, F&& f) {
  ConvGeometry geometry = check_conv(operands, !connections.has_value(), out_channels, padding, activation, pool);
  if (connections.has_value() && static_cast<int64_t>(connections->size()) != operands.weight.size(0)) {
    fail("weight: expected ", connections->size(), " connections, got shape ", shape(operands.weight));
  }
  const ConnectionTable table = connections.has_value()
                                    ? ConnectionTable::sparse(*connections, geometry.out_channels, geometry.in_channels)
                                    : ConnectionTable::dense(geometry.out_channels, geometry.in_channels);
  geometry.connections = table.view();
  return f(operands, geometry);
}

inline void check_grad_output(const Tensor& grad_output, const Operands& operands, const ConvGeometry& geometry) {
  check_like("grad_output", grad_output, operands.input);
  check_shape("grad_output", grad_output,
              {geometry.batch, geometry.out_channels, geometry.out_height(), geometry.out_width()});
}

// Backend: static Tensor forward(operands, geometry); static Gradients backward(grad_output, operands, geometry,
// needs).
template <typename Backend>
struct FusedConvolutions {
  using Indices = std::vector<int64_t>;

  static Gradients backward(const Tensor& grad_output, const Operands& operands, const ConvGeometry& geometry,
                            const Needs& needs) {
    check_grad_output(grad_output, operands, geometry);
    return Backend::backward(grad_output, operands, geometry, needs);
  }

  // The gradients of a convolution without subsampling.
  static std::tuple<Tensor, Tensor, Tensor> plain_backward(const Tensor& grad_output, const Operands& operands,
                                                           const std::optional<Indices>& connections,
                                                           int64_t out_channels, int64_t padding,
                                                           const Name& activation, const Name& pool,
                                                           const Needs& needs) {
    return with_geometry(operands, connections, out_channels, padding, activation, parse_pool(pool),
                         [&](const Operands& checked, const ConvGeometry& geometry) {
                           const Gradients grads = backward(grad_output, checked, geometry, needs);
                           return std::tuple(grads[0], grads[1], grads[2]);
                         });
  }

  static Tensor conv_act_pool(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                              int64_t padding, const Name& activation, const Name& pool) {
    return with_geometry({input, weight, bias, {}, {}}, std::nullopt, -1, padding, activation, parse_pool(pool),
                         Backend::forward);
  }

  static std::tuple<Tensor, Tensor, Tensor> conv_act_pool_backward(const Tensor& grad_output, const Tensor& input,
                                                                   const Tensor& weight,
                                                                   const std::optional<Tensor>& bias, int64_t padding,
                                                                   const Name& activation, const Name& pool,
                                                                   bool need_input, bool need_weight, bool need_bias) {
    return plain_backward(grad_output, {input, weight, bias, {}, {}}, std::nullopt, -1, padding, activation, pool,
                          {need_input, need_weight, need_bias});
  }

  static Tensor sparse_conv_act_pool(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                                     const Indices& connections, int64_t out_channels, int64_t padding,
                                     const Name& activation, const Name& pool) {
    return with_geometry({input, weight, bias, {}, {}}, connections, out_channels, padding, activation,
                         parse_pool(pool), Backend::forward);
  }

  static std::tuple<Tensor, Tensor, Tensor> sparse_conv_act_pool_backward(
      const Tensor& grad_output, const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
      const Indices& connections, int64_t out_channels, int64_t padding, const Name& activation, const Name& pool,
      bool need_input, bool need_weight, bool need_bias) {
    return plain_backward(grad_output, {input, weight, bias, {}, {}}, connections, out_channels, padding, activation,
                          pool, {need_input, need_weight, need_bias});
  }

  static Tensor conv_subsample(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                               const Tensor& coefficient, const Tensor& pool_bias,
                               const std::optional<Indices>& connections, int64_t padding, const Name& activation) {
    return with_geometry({input, weight, bias, coefficient, pool_bias}, connections, coefficient.numel(), padding,
                         activation, Pool::subsample, Backend::forward);
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> conv_subsample_backward(
      const Tensor& grad_output, const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
      const Tensor& coefficient, const Tensor& pool_bias, const std::optional<Indices>& connections, int64_t padding,
      const Name& activation, bool need_input, bool need_weight, bool need_bias, bool need_coefficient,
      bool need_pool_bias) {
    return with_geometry({input, weight, bias, coefficient, pool_bias}, connections, coefficient.numel(), padding,
                         activation, Pool::subsample, [&](const Operands& operands, const ConvGeometry& geometry) {
                           const Gradients grads =
                               backward(grad_output, operands, geometry,
                                        {need_input, need_weight, need_bias, need_coefficient, need_pool_bias});
                           return std::tuple(grads[0], grads[1], grads[2], grads[3], grads[4]);
                         });
  }

  // Calls f<operator>(name) for every operator.
  static void for_each(auto&& f) {
    f.template operator()<&conv_act_pool>("conv_act_pool");
    f.template operator()<&conv_act_pool_backward>("conv_act_pool_backward");
    f.template operator()<&sparse_conv_act_pool>("sparse_conv_act_pool");
    f.template operator()<&sparse_conv_act_pool_backward>("sparse_conv_act_pool_backward");
    f.template operator()<&conv_subsample>("conv_subsample");
    f.template operator()<&conv_subsample_backward>("conv_subsample_backward");
  }
};

}  // namespace lenet_fast
