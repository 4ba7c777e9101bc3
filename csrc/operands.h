// Checks and conversions shared by the bindings: operators can be called with anything, and must then say what is
// wrong.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "geometry.h"

namespace lenet_fast {

// A string argument of an operator. PyTorch's own conversion to std::string leaks the string (2.10 to 2.13).
struct Name {
  std::string value;
};

}  // namespace lenet_fast

template <>
struct torch::stable::detail::ToImpl<lenet_fast::Name> {
  static lenet_fast::Name call(StableIValue value, uint64_t, bool) {
    StringHandle handle = torch::stable::detail::to<StringHandle>(value);
    const char* characters = nullptr;
    size_t length = 0;
    TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &characters));
    lenet_fast::Name name{{characters, length}};
    TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return name;
  }
};

namespace lenet_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  message << "lenet_fast: ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline std::string shape(const Tensor& tensor) {
  std::ostringstream text;
  text << "(";
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    text << (i > 0 ? ", " : "") << tensor.size(i);
  }
  text << ")";
  return text.str();
}

inline void check_shape(const char* name, const Tensor& tensor, const std::vector<int64_t>& expected) {
  bool same = tensor.dim() == static_cast<int64_t>(expected.size());
  for (size_t i = 0; same && i < expected.size(); ++i) {
    same = tensor.size(static_cast<int64_t>(i)) == expected[i];
  }
  if (!same) {
    std::ostringstream text;
    for (size_t i = 0; i < expected.size(); ++i) {
      text << (i > 0 ? ", " : "") << expected[i];
    }
    fail(name, ": expected shape (", text.str(), "), got ", shape(tensor));
  }
}

// Raise where the memory of `tensor` ends before its last element: it can be freed or cut while there are tensors in
// it, as FSDP does with `untyped_storage().resize_(0)`. Copies and kernels read and write without looking.
inline void check_memory(const char* name, const Tensor& tensor) {
  if (tensor.numel() == 0) {
    return;
  }
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  int64_t end = tensor.storage_offset() + 1, available = 0;
  for (size_t i = 0; i < sizes.size(); ++i) {
    end += (sizes[i] - 1) * strides[i];
  }
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(tensor.get(), &available));
  const int64_t needed = end * static_cast<int64_t>(tensor.element_size());
  if (available < needed || tensor.const_data_ptr() == nullptr) {
    fail(name, ": its memory was freed or cut, it has ", available, " bytes and shape ", shape(tensor), " needs ",
         needed);
  }
}

// The memory, dtype and device of `tensor`; `of` names `like` in what is said.
inline void check_like(const char* name, const Tensor& tensor, const Tensor& like, const char* of = "input") {
  check_memory(name, tensor);
  if (tensor.scalar_type() != like.scalar_type()) {
    fail(name, ": expected the dtype of ", of);
  }
  if (tensor.is_cpu() != like.is_cpu() || tensor.get_device_index() != like.get_device_index()) {
    fail(name, ": expected on the device of ", of);
  }
}

inline void check_input(const Tensor& input) {
  check_memory("input", input);
  switch (input.scalar_type()) {
    case ScalarType::Float:
    case ScalarType::Double:
    case ScalarType::Half:
    case ScalarType::BFloat16:
      return;
    default:
      fail("input: expected dtype float32, float64, float16 or bfloat16");
  }
}

inline Activation parse_activation(const Name& activation) {
  constexpr std::array names{"identity", "relu", "sigmoid", "tanh", "scaled_tanh"};  // in the order of the enum
  for (size_t i = 0; i < names.size(); ++i) {
    if (activation.value == names[i]) {
      return static_cast<Activation>(i);
    }
  }
  fail("activation: expected identity, relu, sigmoid, tanh or scaled_tanh, got '", activation.value, "'");
}

inline Pool parse_pool(const Name& pool) {
  constexpr std::array names{"avg", "max", "none"};
  for (size_t i = 0; i < names.size(); ++i) {
    if (pool.value == names[i]) {
      return static_cast<Pool>(i);
    }
  }
  fail("pool: expected avg, max or none, got '", pool.value, "'");
}

// Contiguous and of `dtype`; the tensor itself where it already is. The one place where strides are made contiguous.
inline Tensor as_operand(const Tensor& tensor, ScalarType dtype) {
  const Tensor converted = tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype);
  return converted.is_contiguous() ? converted : torch::stable::contiguous(converted);
}

inline std::optional<Tensor> as_operand(const std::optional<Tensor>& tensor, ScalarType dtype) {
  return tensor.has_value() ? std::optional<Tensor>(as_operand(*tensor, dtype)) : std::nullopt;
}

// A connection table in the form the kernels walk, owning its storage.
class ConnectionTable {
 public:
  static ConnectionTable dense(int64_t out_channels, int64_t in_channels) {
    ConnectionTable table(out_channels, in_channels);
    for (int64_t out = 0; out < out_channels; ++out) {
      for (int64_t in = 0; in < in_channels; ++in) {
        table.append(out, in);
      }
    }
    table.close();
    return table;
  }

  // `indices`: positions of the connections in a row-major (out_channels, in_channels) table, ascending.
  static ConnectionTable sparse(const std::vector<int64_t>& indices, int64_t out_channels, int64_t in_channels) {
    ConnectionTable table(out_channels, in_channels);
    int64_t previous = -1;
    for (const int64_t index : indices) {
      if (index <= previous || index >= out_channels * in_channels) {
        fail("connections: expected ascending positions in a (", out_channels, ", ", in_channels, ") table, got ",
             index, " after ", previous);
      }
      table.append(index / in_channels, index % in_channels);
      previous = index;
    }
    table.close();
    return table;
  }

  Connections view() const {
    return {row_begin_.data(), in_channel_.data(), column_begin_.data(), column_entry_.data(), column_out_.data()};
  }

 private:
  ConnectionTable(int64_t out_channels, int64_t in_channels)
      : row_begin_(out_channels + 1), column_begin_(in_channels + 1) {}

  void append(int64_t out, int64_t in) {
    in_channel_.push_back(static_cast<int32_t>(in));
    out_channel_.push_back(static_cast<int32_t>(out));
    ++row_begin_[out + 1];
    ++column_begin_[in + 1];
  }

  void close() {
    for (size_t i = 1; i < row_begin_.size(); ++i) {
      row_begin_[i] += row_begin_[i - 1];
    }
    for (size_t i = 1; i < column_begin_.size(); ++i) {
      column_begin_[i] += column_begin_[i - 1];
    }
    column_entry_.resize(in_channel_.size());
    column_out_.resize(in_channel_.size());
    std::vector<int32_t> next(column_begin_.begin(), column_begin_.end() - 1);
    for (size_t c = 0; c < in_channel_.size(); ++c) {
      const int32_t slot = next[in_channel_[c]]++;
      column_entry_[slot] = static_cast<int32_t>(c);
      column_out_[slot] = out_channel_[c];
    }
  }

  std::vector<int32_t> row_begin_, in_channel_, out_channel_, column_begin_, column_entry_, column_out_;
};

}  // namespace lenet_fast
