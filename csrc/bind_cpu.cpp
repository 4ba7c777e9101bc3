// The CPU kernels as operators: check, fill the parameter struct, run in PyTorch's thread pool.
#include <algorithm>
#include <cstring>

#include "cpu/isa.h"
#include "cpu/kernels.h"
#include "operands.h"

namespace lenet_fast::cpu {
namespace {

const Kernels& kernels() {
  static const Kernels& chosen = []() -> const Kernels& {
    const std::string isa = selected_isa();
#if defined(__x86_64__)
    if (isa == avx512::kernels.isa) {
      return avx512::kernels;
    }
    if (isa == avx2::kernels.isa) {
      return avx2::kernels;
    }
#endif
    return portable::kernels;
  }();
  return chosen;
}

// Call f(T{}, dtype) with the type that the kernels compute in: float64 as it is, everything shorter in float32.
template <typename F>
auto with_compute_type(const Tensor& input, F&& f) {
  return input.scalar_type() == ScalarType::Double ? f(double{}, ScalarType::Double) : f(float{}, ScalarType::Float);
}

template <typename T>
const T* data(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

template <typename T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// The operands of any of the fused convolutions; subsampling is there when `coefficient` is.
struct Operands {
  const Tensor& input;
  const Tensor& weight;
  const std::optional<Tensor>& bias;
  std::optional<Tensor> coefficient, subsample_bias;
};

// Which gradients are wanted.
struct Needs {
  bool input, weight, bias, coefficient, subsample_bias;
};

void check_vector(const char* name, const std::optional<Tensor>& tensor, int64_t length, const Tensor& input) {
  if (tensor.has_value()) {
    check_like(name, *tensor, input);
    check_shape(name, *tensor, {length});
  }
}

// `out_channels` counts for a packed weight; a dense one tells itself.
ConvGeometry check_conv(const Operands& operands, bool dense, int64_t out_channels, int64_t padding,
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
  // Positions and connections are 32-bit; a block of images must fit in memory anyway.
  constexpr int64_t limit = int64_t{1} << 28;
  if (padding > limit || weight.numel() > limit || out_channels > limit / input.size(1) ||
      geometry.padded_height() > limit ||
      geometry.padded_width() > limit / std::max<int64_t>(1, geometry.padded_height()) / input.size(1)) {
    fail("input: ", shape(input), " with padding ", padding, " is too large for the CPU kernels");
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

// Contiguous ranges of whole blocks, one a thread, each with its own workspace.
class Ranges {
 public:
  Ranges(int64_t batch, int64_t lanes, size_t workspace_bytes, const Tensor& like)
      : batch_(batch),
        lanes_(lanes),
        blocks_((batch + lanes - 1) / lanes),
        count_(std::min<int64_t>(blocks_, torch::stable::get_num_threads())),
        stride_(static_cast<int64_t>((workspace_bytes + 63) / 64 * 64)) {
    constexpr int64_t limit = int64_t{4} << 30;  // rather an error than a machine out of memory
    if (count_ * stride_ > limit) {
      fail("input: shape ", shape(like), " needs ", (count_ * stride_) >> 20,
           " MiB of workspace, more than the 4096 that the CPU kernels take; use backend='reference'");
    }
    memory_ = torch::stable::new_empty(like, {count_ * stride_}, ScalarType::Byte);
  }

  int64_t count() const { return count_; }

  // f(range, first image, end image, workspace)
  template <typename F>
  void run(const F& f) const {
    char* memory = mutable_data<char>(memory_);
    torch::stable::parallel_for(0, count_, 1, [&](int64_t first, int64_t last) {
      for (int64_t range = first; range < last; ++range) {
        f(range, lanes_ * (blocks_ * range / count_), std::min(batch_, lanes_ * (blocks_ * (range + 1) / count_)),
          memory + stride_ * range);
      }
    });
  }

 private:
  int64_t batch_, lanes_, blocks_, count_, stride_;
  Tensor memory_;
};

// totals[i] = sum of row[i] over the rows, in order.
template <typename T>
void sum_rows(T* totals, const T* rows, int64_t count, int64_t stride, int64_t length) {
  std::fill(totals, totals + length, T(0));
  for (int64_t row = 0; row < count; ++row) {
    for (int64_t i = 0; i < length; ++i) {
      totals[i] += rows[row * stride + i];
    }
  }
}

Tensor forward(const Operands& operands, const ConvGeometry& geometry) {
  return with_compute_type(operands.input, [&]<typename T>(T, ScalarType dtype) {
    const auto& kernel = kernels().conv_act_pool<T>();
    const std::optional<Tensor> x = as_operand(operands.input, dtype), w = as_operand(operands.weight, dtype),
                                b = as_operand(operands.bias, dtype), c = as_operand(operands.coefficient, dtype),
                                d = as_operand(operands.subsample_bias, dtype);
    const Tensor output = torch::stable::new_empty(
        *x, {geometry.batch, geometry.out_channels, geometry.out_height(), geometry.out_width()});
    const ConvActPoolForward<T> arguments{
        geometry, data<T>(x), data<T>(w), data<T>(b), data<T>(c), data<T>(d), mutable_data<T>(output)};
    const Ranges ranges(geometry.batch, kernel.lanes, kernel.forward_workspace_bytes(geometry), operands.input);
    ranges.run([&](int64_t, int64_t begin, int64_t end, void* workspace) {
      kernel.forward(arguments, begin, end, workspace);
    });
    return as_operand(output, operands.input.scalar_type());
  });
}

// Gradients of the operands in order; an empty tensor for each that is not needed.
std::array<Tensor, 5> backward(const Tensor& grad_output, const Operands& operands, const ConvGeometry& geometry,
                               const Needs& needs) {
  check_like("grad_output", grad_output, operands.input);
  check_shape("grad_output", grad_output,
              {geometry.batch, geometry.out_channels, geometry.out_height(), geometry.out_width()});
  return with_compute_type(operands.input, [&]<typename T>(T, ScalarType dtype) {
    const auto& kernel = kernels().conv_act_pool<T>();
    const std::optional<Tensor> g = as_operand(grad_output, dtype), x = as_operand(operands.input, dtype),
                                w = as_operand(operands.weight, dtype), b = as_operand(operands.bias, dtype),
                                c = as_operand(operands.coefficient, dtype),
                                d = as_operand(operands.subsample_bias, dtype);
    const auto gradient = [&](bool needed, const std::optional<Tensor>& of) {
      return needed && of.has_value() ? torch::stable::new_empty(*of, of->sizes(), dtype)
                                      : torch::stable::new_empty(*x, {0}, dtype);
    };
    const std::array grads{gradient(needs.input, x), gradient(needs.weight, w), gradient(needs.bias, b),
                           gradient(needs.coefficient, c), gradient(needs.subsample_bias, d)};
    // Each range sums into a row of its own: weight, bias, coefficient, subsample_bias, where needed.
    std::array<int64_t, 5> offset{};
    for (size_t i = 1; i < grads.size(); ++i) {
      offset[i] = (i > 1 ? offset[i - 1] + grads[i - 1].numel() : 0);
    }
    const int64_t length = offset.back() + grads.back().numel();
    const Ranges ranges(geometry.batch, kernel.lanes, kernel.backward_workspace_bytes(geometry), operands.input);
    const Tensor sums = torch::stable::new_empty(*x, {ranges.count(), length});
    T* const rows = mutable_data<T>(sums);
    ranges.run([&](int64_t range, int64_t begin, int64_t end, void* workspace) {
      const auto at = [&](size_t i) { return grads[i].numel() > 0 ? rows + range * length + offset[i] : nullptr; };
      T* const grad_input = grads[0].numel() > 0 ? mutable_data<T>(grads[0]) : nullptr;
      kernel.backward({geometry,
                       data<T>(g),
                       data<T>(x),
                       data<T>(w),
                       data<T>(b),
                       data<T>(c),
                       data<T>(d),
                       grad_input,
                       {at(1), at(2), at(3), at(4)}},
                      begin, end, workspace);
    });
    for (size_t i = 1; i < grads.size(); ++i) {
      sum_rows(mutable_data<T>(grads[i]), rows + offset[i], ranges.count(), length, grads[i].numel());
    }
    const ScalarType stored = operands.input.scalar_type();
    return std::array{as_operand(grads[0], stored), as_operand(grads[1], stored), as_operand(grads[2], stored),
                      as_operand(grads[3], stored), as_operand(grads[4], stored)};
  });
}

// --- the operators, as lenet_fast/ops.py declares them ---------------------------------------------------------------

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

Tensor conv_act_pool(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, int64_t padding,
                     const Name& activation, const Name& pool) {
  return with_geometry({input, weight, bias, {}, {}}, std::nullopt, -1, padding, activation, parse_pool(pool), forward);
}

std::tuple<Tensor, Tensor, Tensor> conv_act_pool_backward(const Tensor& grad_output, const Tensor& input,
                                                          const Tensor& weight, const std::optional<Tensor>& bias,
                                                          int64_t padding, const Name& activation, const Name& pool,
                                                          bool need_input, bool need_weight, bool need_bias) {
  return with_geometry({input, weight, bias, {}, {}}, std::nullopt, -1, padding, activation, parse_pool(pool),
                       [&](const Operands& operands, const ConvGeometry& geometry) {
                         const auto grads = backward(grad_output, operands, geometry,
                                                     {need_input, need_weight, need_bias, false, false});
                         return std::tuple(grads[0], grads[1], grads[2]);
                       });
}

Tensor sparse_conv_act_pool(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                            const std::vector<int64_t>& connections, int64_t out_channels, int64_t padding,
                            const Name& activation, const Name& pool) {
  return with_geometry({input, weight, bias, {}, {}}, connections, out_channels, padding, activation, parse_pool(pool),
                       forward);
}

std::tuple<Tensor, Tensor, Tensor> sparse_conv_act_pool_backward(
    const Tensor& grad_output, const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
    const std::vector<int64_t>& connections, int64_t out_channels, int64_t padding, const Name& activation,
    const Name& pool, bool need_input, bool need_weight, bool need_bias) {
  return with_geometry({input, weight, bias, {}, {}}, connections, out_channels, padding, activation, parse_pool(pool),
                       [&](const Operands& operands, const ConvGeometry& geometry) {
                         const auto grads = backward(grad_output, operands, geometry,
                                                     {need_input, need_weight, need_bias, false, false});
                         return std::tuple(grads[0], grads[1], grads[2]);
                       });
}

Tensor conv_subsample(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                      const Tensor& coefficient, const Tensor& pool_bias,
                      const std::optional<std::vector<int64_t>>& connections, int64_t padding, const Name& activation) {
  return with_geometry({input, weight, bias, coefficient, pool_bias}, connections, coefficient.numel(), padding,
                       activation, Pool::subsample, forward);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> conv_subsample_backward(
    const Tensor& grad_output, const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
    const Tensor& coefficient, const Tensor& pool_bias, const std::optional<std::vector<int64_t>>& connections,
    int64_t padding, const Name& activation, bool need_input, bool need_weight, bool need_bias, bool need_coefficient,
    bool need_pool_bias) {
  return with_geometry({input, weight, bias, coefficient, pool_bias}, connections, coefficient.numel(), padding,
                       activation, Pool::subsample, [&](const Operands& operands, const ConvGeometry& geometry) {
                         const auto grads =
                             backward(grad_output, operands, geometry,
                                      {need_input, need_weight, need_bias, need_coefficient, need_pool_bias});
                         return std::tuple(grads[0], grads[1], grads[2], grads[3], grads[4]);
                       });
}

STABLE_TORCH_LIBRARY_IMPL(lenet_fast, CPU, library) {
  library.impl("conv_act_pool", TORCH_BOX(&conv_act_pool));
  library.impl("conv_act_pool_backward", TORCH_BOX(&conv_act_pool_backward));
  library.impl("sparse_conv_act_pool", TORCH_BOX(&sparse_conv_act_pool));
  library.impl("sparse_conv_act_pool_backward", TORCH_BOX(&sparse_conv_act_pool_backward));
  library.impl("conv_subsample", TORCH_BOX(&conv_subsample));
  library.impl("conv_subsample_backward", TORCH_BOX(&conv_subsample_backward));
}

}  // namespace
}  // namespace lenet_fast::cpu
