// The CPU kernels as operators: check, fill the parameter struct, run in PyTorch's thread pool.
#include <algorithm>
#include <cstring>

#include "cpu/isa.h"
#include "cpu/kernels.h"
#include "fused_convolutions.h"

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

Gradients backward(const Tensor& grad_output, const Operands& operands, const ConvGeometry& geometry,
                   const Needs& needs) {
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
    return Gradients{as_operand(grads[0], stored), as_operand(grads[1], stored), as_operand(grads[2], stored),
                     as_operand(grads[3], stored), as_operand(grads[4], stored)};
  });
}

struct Backend {
  static constexpr auto forward = &cpu::forward;
  static constexpr auto backward = &cpu::backward;
};

STABLE_TORCH_LIBRARY_IMPL(lenet_fast, CPU, library) { FusedConvolutions<Backend>::implement(library); }

}  // namespace
}  // namespace lenet_fast::cpu
