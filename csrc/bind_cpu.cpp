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

ConvGeometry check_conv(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, int64_t padding,
                        const std::string& activation, const std::string& pool) {
  check_floating(input);
  check_like("weight", weight, input);
  if (input.dim() != 4) {
    fail("input: expected (N, C, H, W), got shape ", shape(input));
  }
  if (weight.dim() != 4 || weight.size(2) != weight.size(3) || weight.numel() == 0) {
    fail("weight: expected (C_out, C_in, K, K), got shape ", shape(weight));
  }
  if (weight.size(1) != input.size(1)) {
    fail("input: expected ", weight.size(1), " channels as weight has, got shape ", shape(input));
  }
  if (bias.has_value()) {
    check_like("bias", *bias, input);
    check_shape("bias", *bias, {weight.size(0)});
  }
  if (padding < 0) {
    fail("padding: expected at least 0, got ", padding);
  }
  ConvGeometry geometry{input.size(0),    input.size(1),
                        input.size(2),    input.size(3),
                        weight.size(0),   weight.size(2),
                        padding,          parse_activation(activation),
                        parse_pool(pool), {}};
  // Positions and connections are 32-bit; a block of images must fit in memory anyway.
  constexpr int64_t limit = int64_t{1} << 28;
  if (padding > limit || weight.numel() > limit || geometry.padded_height() > limit ||
      geometry.padded_width() > limit / std::max<int64_t>(1, geometry.padded_height()) / input.size(1)) {
    fail("input: ", shape(input), " with padding ", padding, " is too large for the CPU kernels");
  }
  if (geometry.padded_height() < geometry.kernel_size || geometry.padded_width() < geometry.kernel_size) {
    fail("weight: kernel size ", geometry.kernel_size, " is larger than the padded input, ", geometry.padded_height(),
         " x ", geometry.padded_width());
  }
  if (geometry.out_height() < 1 || geometry.out_width() < 1) {
    fail("pool: '", pool, "' needs a convolution output of at least 2x2");
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
        stride_((workspace_bytes + 63) / 64 * 64),
        memory_(torch::stable::new_empty(like, {count_ * static_cast<int64_t>(stride_)}, ScalarType::Byte)) {}

  int64_t count() const { return count_; }

  // f(range, first image, end image, workspace)
  template <typename F>
  void run(const F& f) const {
    char* memory = mutable_data<char>(memory_);
    torch::stable::parallel_for(0, count_, 1, [&](int64_t first, int64_t last) {
      for (int64_t range = first; range < last; ++range) {
        f(range, lanes_ * (blocks_ * range / count_), std::min(batch_, lanes_ * (blocks_ * (range + 1) / count_)),
          memory + static_cast<int64_t>(stride_) * range);
      }
    });
  }

 private:
  int64_t batch_, lanes_, blocks_, count_;
  size_t stride_;
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

Tensor conv_act_pool(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, int64_t padding,
                     const std::string& activation, const std::string& pool) {
  ConvGeometry geometry = check_conv(input, weight, bias, padding, activation, pool);
  const ConnectionTable table = ConnectionTable::dense(geometry.out_channels, geometry.in_channels);
  geometry.connections = table.view();
  return with_compute_type(input, [&]<typename T>(T, ScalarType dtype) {
    const auto& kernel = kernels().conv_act_pool<T>();
    const std::optional<Tensor> x = as_operand(input, dtype), w = as_operand(weight, dtype),
                                b = as_operand(bias, dtype);
    const Tensor output = torch::stable::new_empty(
        *x, {geometry.batch, geometry.out_channels, geometry.out_height(), geometry.out_width()});
    const ConvActPoolForward<T> arguments{geometry, data<T>(x), data<T>(w), data<T>(b), mutable_data<T>(output)};
    const Ranges ranges(geometry.batch, kernel.lanes, kernel.forward_workspace_bytes(geometry), input);
    ranges.run([&](int64_t, int64_t begin, int64_t end, void* workspace) {
      kernel.forward(arguments, begin, end, workspace);
    });
    return as_operand(output, input.scalar_type());
  });
}

std::tuple<Tensor, Tensor, Tensor> conv_act_pool_backward(const Tensor& grad_output, const Tensor& input,
                                                          const Tensor& weight, const std::optional<Tensor>& bias,
                                                          int64_t padding, const std::string& activation,
                                                          const std::string& pool, bool need_input, bool need_weight,
                                                          bool need_bias) {
  ConvGeometry geometry = check_conv(input, weight, bias, padding, activation, pool);
  check_like("grad_output", grad_output, input);
  check_shape("grad_output", grad_output,
              {geometry.batch, geometry.out_channels, geometry.out_height(), geometry.out_width()});
  need_bias = need_bias && bias.has_value();
  const ConnectionTable table = ConnectionTable::dense(geometry.out_channels, geometry.in_channels);
  geometry.connections = table.view();
  return with_compute_type(input, [&]<typename T>(T, ScalarType dtype) {
    const auto& kernel = kernels().conv_act_pool<T>();
    const std::optional<Tensor> g = as_operand(grad_output, dtype), x = as_operand(input, dtype),
                                w = as_operand(weight, dtype), b = as_operand(bias, dtype);
    const auto gradient = [&](bool needed, const Tensor& of) {
      return needed ? torch::stable::new_empty(of, of.sizes(), dtype) : torch::stable::new_empty(of, {0}, dtype);
    };
    const Tensor grad_input = gradient(need_input, *x), grad_weight = gradient(need_weight, *w),
                 grad_bias = gradient(need_bias, need_bias ? *b : *w);
    const int64_t weights = grad_weight.numel(), biases = grad_bias.numel(), length = weights + biases;
    const Ranges ranges(geometry.batch, kernel.lanes, kernel.backward_workspace_bytes(geometry), input);
    const Tensor sums = torch::stable::new_empty(*x, {ranges.count(), length});
    T* const rows = mutable_data<T>(sums);
    ranges.run([&](int64_t range, int64_t begin, int64_t end, void* workspace) {
      T* const row = rows + range * length;
      kernel.backward(
          {geometry, data<T>(g), data<T>(x), data<T>(w), data<T>(b), need_input ? mutable_data<T>(grad_input) : nullptr,
           need_weight ? row : nullptr, need_bias ? row + weights : nullptr},
          begin, end, workspace);
    });
    sum_rows(mutable_data<T>(grad_weight), rows, ranges.count(), length, weights);
    sum_rows(mutable_data<T>(grad_bias), rows + weights, ranges.count(), length, biases);
    const ScalarType stored = input.scalar_type();
    return std::tuple(as_operand(grad_input, stored), as_operand(grad_weight, stored), as_operand(grad_bias, stored));
  });
}

STABLE_TORCH_LIBRARY_IMPL(lenet_fast, CPU, library) {
  library.impl("conv_act_pool", TORCH_BOX(&conv_act_pool));
  library.impl("conv_act_pool_backward", TORCH_BOX(&conv_act_pool_backward));
}

}  // namespace
}  // namespace lenet_fast::cpu
