// The CPU kernels as operators: check, fill the parameter struct, run in PyTorch's thread pool.
#include <algorithm>
#include <cstring>
#include <memory>
#include <new>

#include "cpu/isa.h"
#include "cpu/kernels.h"
#include "fused_convolutions.h"

namespace lenet_fast::cpu {
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

namespace {

// Call f(T{}, dtype) with the type that the kernels compute in: float64 as it is, everything shorter in float32.
template <typename F>
auto with_compute_type(const Tensor& input, F&& f) {
  return input.scalar_type() == ScalarType::Double ? f(double{}, ScalarType::Double) : f(float{}, ScalarType::Float);
}

// A new contiguous tensor. `new_empty` goes through the dispatcher, which takes longer than a small convolution.
Tensor allocate(const std::vector<int64_t>& sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) {
    strides[i - 1] = strides[i] * std::max<int64_t>(1, sizes[i]);
  }
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                                  static_cast<int32_t>(dtype), aoti_torch_device_type_cpu(), 0,
                                                  &handle));
  return Tensor(handle);
}

// A thread's memory for intermediate results, aligned to 64 bytes. Small ones are kept from call to call: fresh pages
// cost more than the work on them. With LENET_FAST_POISON set, as in the tests, it begins as NaN in every call.
class Workspace {
 public:
  explicit Workspace(size_t bytes) {
    constexpr size_t kept = size_t{4} << 20;
    static thread_local Memory own;
    Memory& memory = bytes <= kept ? own : large_;
    if (memory.size() < bytes) {
      memory = Memory(bytes);
    }
    data_ = memory.data();
    static const bool poison = std::getenv("LENET_FAST_POISON") != nullptr;
    if (poison) {
      std::memset(data_, 0xff, bytes);
    }
  }

  void* data() const { return data_; }

 private:
  class Memory {
   public:
    explicit Memory(size_t bytes = 0) : size_(bytes), data_(bytes > 0 ? allocate(bytes) : nullptr) {}
    size_t size() const { return size_; }
    void* data() const { return data_.get(); }

   private:
    struct Free {
      void operator()(void* data) const { ::operator delete(data, std::align_val_t{64}); }
    };
    static void* allocate(size_t bytes) { return ::operator new(bytes, std::align_val_t{64}); }

    size_t size_;
    std::unique_ptr<void, Free> data_;
  };

  Memory large_;
  void* data_;
};

// Contiguous ranges of whole blocks, one a thread, each with its own workspace.
class Ranges {
 public:
  Ranges(int64_t batch, int64_t lanes, size_t workspace_bytes, const Tensor& like)
      : batch_(batch),
        lanes_(lanes),
        blocks_((batch + lanes - 1) / lanes),
        count_(std::min<int64_t>(blocks_, torch::stable::get_num_threads())),
        workspace_bytes_(workspace_bytes) {
    constexpr int64_t limit = int64_t{4} << 30;  // rather an error than a machine out of memory
    if (count_ * static_cast<int64_t>(workspace_bytes) > limit) {
      fail("input: shape ", shape(like), " needs ", (count_ * static_cast<int64_t>(workspace_bytes)) >> 20,
           " MiB of workspace, more than the 4096 that the CPU kernels take; use backend='reference'");
    }
  }

  int64_t count() const { return count_; }

  // f(range, first image, end image, workspace)
  template <typename F>
  void run(const F& f) const {
    const auto run_range = [&](int64_t range) {
      const Workspace workspace(workspace_bytes_);
      f(range, lanes_ * (blocks_ * range / count_), std::min(batch_, lanes_ * (blocks_ * (range + 1) / count_)),
        workspace.data());
    };
    if (count_ == 1) {
      return run_range(0);
    }
    torch::stable::parallel_for(0, count_, 1, [&](int64_t first, int64_t last) {
      for (int64_t range = first; range < last; ++range) {
        run_range(range);
      }
    });
  }

 private:
  int64_t batch_, lanes_, blocks_, count_;
  size_t workspace_bytes_;
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

// Beyond this size, writing and reading a record costs more than recomputing it (docs/performance.md).
constexpr int64_t kMaxRecordBytes = int64_t{16} << 20;

template <typename T>
int64_t total_record_size(const ConvActPoolKernels<T>& kernel, const Bands& bands) {
  return (bands.piece.batch + kernel.lanes - 1) / kernel.lanes * kernel.record_size(bands.piece);
}

// The output and, if wanted, a record for backward; an empty one where it would be too large.
std::pair<Tensor, Tensor> forward(const Operands& operands, const ConvGeometry& geometry, bool recording) {
  return with_compute_type(operands.input, [&]<typename T>(T, ScalarType dtype) {
    const auto& kernel = kernels().conv_act_pool<T>();
    const Bands bands = choose_bands(geometry, kernel.lanes);
    const Ranges ranges(bands.piece.batch, kernel.lanes, kernel.forward_workspace_bytes(bands.piece), operands.input);
    const std::optional<Tensor> x = as_operand(operands.input, dtype), w = as_operand(operands.weight, dtype),
                                b = as_operand(operands.bias, dtype), c = as_operand(operands.coefficient, dtype),
                                d = as_operand(operands.subsample_bias, dtype);
    const Tensor output =
        allocate({geometry.batch, geometry.out_channels, geometry.out_height(), geometry.out_width()}, dtype);
    const int64_t record_size = recording ? total_record_size(kernel, bands) : 0;
    const bool keep = record_size > 0 && record_size <= kMaxRecordBytes / int64_t{sizeof(T)};
    const Tensor record = allocate({keep ? record_size : 0}, dtype);
    const ConvActPoolForward<T> arguments{geometry,
                                          bands,
                                          data<T>(x),
                                          data<T>(w),
                                          data<T>(b),
                                          data<T>(c),
                                          data<T>(d),
                                          mutable_data<T>(output),
                                          keep ? mutable_data<T>(record) : nullptr};
    ranges.run([&](int64_t, int64_t begin, int64_t end, void* workspace) {
      kernel.forward(arguments, begin, end, workspace);
    });
    return std::pair(as_operand(output, operands.input.scalar_type()), record);
  });
}

// `record`: of forward for these operands; empty: recompute.
Gradients backward(const Tensor& grad_output, const std::optional<Tensor>& record, const Operands& operands,
                   const ConvGeometry& geometry, const Needs& needs) {
  return with_compute_type(operands.input, [&]<typename T>(T, ScalarType dtype) {
    const auto& kernel = kernels().conv_act_pool<T>();
    const Bands bands = choose_bands(geometry, kernel.lanes);
    const Ranges ranges(bands.piece.batch, kernel.lanes, kernel.backward_workspace_bytes(bands.piece), operands.input);
    const std::optional<Tensor> g = as_operand(grad_output, dtype), x = as_operand(operands.input, dtype),
                                w = as_operand(operands.weight, dtype), b = as_operand(operands.bias, dtype),
                                c = as_operand(operands.coefficient, dtype),
                                d = as_operand(operands.subsample_bias, dtype);
    const bool recorded = record.has_value() && record->numel() > 0;
    if (recorded && (record->numel() != total_record_size(kernel, bands) || record->scalar_type() != dtype ||
                     !record->is_contiguous())) {
      fail("record: expected the one that forward made of these operands, got shape ", shape(*record));
    }
    // Hooks on saved tensors may have put it where vectors cannot be loaded: then it is made anew.
    const bool is_aligned = recorded && reinterpret_cast<uintptr_t>(record->const_data_ptr()) % 64 == 0;
    const auto gradient = [&](bool needed, const std::optional<Tensor>& of) {
      return needed && of.has_value() ? allocate({of->sizes().begin(), of->sizes().end()}, dtype)
                                      : allocate({0}, dtype);
    };
    const std::array grads{gradient(needs.input, x), gradient(needs.weight, w), gradient(needs.bias, b),
                           gradient(needs.coefficient, c), gradient(needs.subsample_bias, d)};
    // Each range sums into a row of its own: weight, bias, coefficient, subsample_bias, where needed.
    std::array<int64_t, 5> offset{};
    for (size_t i = 1; i < grads.size(); ++i) {
      offset[i] = (i > 1 ? offset[i - 1] + grads[i - 1].numel() : 0);
    }
    const int64_t length = offset.back() + grads.back().numel();
    const Tensor pieces =
        needs.input && bands.per_image > 1
            ? allocate({bands.piece.batch, geometry.in_channels, bands.piece.height, bands.piece.width}, dtype)
            : grads[0];
    std::vector<T> sums(ranges.count() * length);
    T* const rows = sums.data();
    ranges.run([&](int64_t range, int64_t begin, int64_t end, void* workspace) {
      const auto at = [&](size_t i) { return grads[i].numel() > 0 ? rows + range * length + offset[i] : nullptr; };
      T* const grad_input = pieces.numel() > 0 ? mutable_data<T>(pieces) : nullptr;
      kernel.backward({geometry,
                       bands,
                       data<T>(g),
                       data<T>(x),
                       data<T>(w),
                       data<T>(b),
                       data<T>(c),
                       data<T>(d),
                       is_aligned ? data<T>(record) : nullptr,
                       grad_input,
                       {at(1), at(2), at(3), at(4)}},
                      begin, end, workspace);
    });
    if (needs.input && bands.per_image > 1) {
      merge_bands(mutable_data<T>(grads[0]), mutable_data<T>(pieces), geometry, bands);
    }
    for (size_t i = 1; i < grads.size(); ++i) {
      sum_rows(mutable_data<T>(grads[i]), rows + offset[i], ranges.count(), length, grads[i].numel());
    }
    const ScalarType stored = operands.input.scalar_type();
    return Gradients{as_operand(grads[0], stored), as_operand(grads[1], stored), as_operand(grads[2], stored),
                     as_operand(grads[3], stored), as_operand(grads[4], stored)};
  });
}

struct Backend {
  static Tensor forward(const Operands& operands, const ConvGeometry& geometry) {
    return cpu::forward(operands, geometry, false).first;
  }

  static Gradients backward(const Tensor& grad_output, const Operands& operands, const ConvGeometry& geometry,
                            const Needs& needs) {
    return cpu::backward(grad_output, std::nullopt, operands, geometry, needs);
  }
};

// --- private operators: any fused convolution with a record from forward to backward ---------------------------------

using Indices = std::vector<int64_t>;

Pool parse_pool(const Name& pool, const std::optional<Tensor>& coefficient) {
  return coefficient.has_value() ? Pool::subsample : lenet_fast::parse_pool(pool);
}

std::tuple<Tensor, Tensor> conv_recording(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                                          const std::optional<Tensor>& coefficient,
                                          const std::optional<Tensor>& pool_bias,
                                          const std::optional<Indices>& connections, int64_t out_channels,
                                          int64_t padding, const Name& activation, const Name& pool) {
  return with_geometry({input, weight, bias, coefficient, pool_bias}, connections, out_channels, padding, activation,
                       parse_pool(pool, coefficient), [](const Operands& operands, const ConvGeometry& geometry) {
                         const auto [output, record] = forward(operands, geometry, true);
                         return std::tuple(output, record);
                       });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> conv_recorded_backward(
    const Tensor& grad_output, const Tensor& record, const Tensor& input, const Tensor& weight,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& coefficient, const std::optional<Tensor>& pool_bias,
    const std::optional<Indices>& connections, int64_t out_channels, int64_t padding, const Name& activation,
    const Name& pool, bool need_input, bool need_weight, bool need_bias, bool need_coefficient, bool need_pool_bias) {
  const Needs needs{need_input, need_weight, need_bias, need_coefficient, need_pool_bias};
  return with_geometry({input, weight, bias, coefficient, pool_bias}, connections, out_channels, padding, activation,
                       parse_pool(pool, coefficient), [&](const Operands& operands, const ConvGeometry& geometry) {
                         check_grad_output(grad_output, operands, geometry);
                         const Gradients grads = backward(grad_output, record, operands, geometry, needs);
                         return std::tuple(grads[0], grads[1], grads[2], grads[3], grads[4]);
                       });
}

STABLE_TORCH_LIBRARY_FRAGMENT(lenet_fast, library) {
  const std::string arguments =
      "Tensor input, Tensor weight, Tensor? bias, Tensor? coefficient, Tensor? pool_bias, int[]? connections, "
      "int out_channels, int padding, str activation, str pool";
  library.def(("_conv_recording(" + arguments + ") -> (Tensor, Tensor)").c_str());
  library.def(("_conv_recorded_backward(Tensor grad_output, Tensor record, " + arguments +
               ", bool need_input, bool need_weight, bool need_bias, bool need_coefficient, bool need_pool_bias) "
               "-> (Tensor, Tensor, Tensor, Tensor, Tensor)")
                  .c_str());
}

STABLE_TORCH_LIBRARY_IMPL(lenet_fast, CPU, library) {
  FusedConvolutions<Backend>::for_each([&]<auto kernel>(const char* name) { library.impl(name, TORCH_BOX(kernel)); });
  library.impl("_conv_recording", TORCH_BOX(&conv_recording));
  library.impl("_conv_recorded_backward", TORCH_BOX(&conv_recorded_backward));
}

}  // namespace
}  // namespace lenet_fast::cpu
