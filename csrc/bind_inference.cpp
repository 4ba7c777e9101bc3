// Inference of a whole network on the CPU.
#include <algorithm>
#include <cmath>
#include <memory>
#include <mutex>
#include <new>
#include <unordered_map>

#include "cpu/kernels.h"
#include "network_operands.h"

namespace lenet_fast::cpu {
namespace {

constexpr int64_t kWorkspaceLimit = int64_t{4} << 30;  // rather an error than a machine out of memory

// Networks that inference is called with again and again, read once.
class Definitions {
 public:
  int64_t add(const std::vector<int64_t>& numbers) {
    auto operand = std::make_shared<const NetworkOperand>(numbers);
    const std::lock_guard lock(mutex_);
    networks_.emplace(++last_, std::move(operand));
    return last_;
  }

  void remove(int64_t id) {
    const std::lock_guard lock(mutex_);
    networks_.erase(id);
  }

  std::shared_ptr<const NetworkOperand> find(int64_t id) {
    const std::lock_guard lock(mutex_);
    const auto found = networks_.find(id);
    if (found == networks_.end()) {
      fail("network: expected what network_define returned, got ", id);
    }
    return found->second;
  }

 private:
  std::mutex mutex_;
  std::unordered_map<int64_t, std::shared_ptr<const NetworkOperand>> networks_;
  int64_t last_ = 0;
};

Definitions& definitions() {
  static auto* const all = new Definitions;  // outlives every thread and finalizer
  return *all;
}

int64_t network_define(const std::vector<int64_t>& numbers) { return definitions().add(numbers); }

void network_release(int64_t id) { definitions().remove(id); }

// A thread's memory for inference, kept from call to call; a workspace from the allocator costs more than the work on
// one image.
class InferenceMemory {
 public:
  // What the network's own prepare gave it, if nothing else has used it since.
  template <typename T>
  void* prepared(int64_t id, const NetworkKernels<T>& kernel, const Network<T>& network, const Images<T>& images) {
    const Key key{id, static_cast<int64_t>(sizeof(T)), images.are_bytes ? images.height : -1, images.width,
                  images.background};
    if (key != key_) {
      key_ = {};
      reserve(kernel.thread_bytes(network.geometry, false));
      kernel.prepare(network, images, false, data_.get());
      key_ = key;
    }
    return data_.get();
  }

  void* plain(size_t bytes) {
    key_ = {};
    reserve(bytes);
    return data_.get();
  }

 private:
  using Key = std::tuple<int64_t, int64_t, int64_t, int64_t, double>;
  struct Delete {
    void operator()(char* memory) const { ::operator delete[](memory, std::align_val_t{64}); }
  };

  void reserve(size_t bytes) {
    if (bytes > static_cast<size_t>(kWorkspaceLimit)) {
      fail("network: needs ", bytes >> 20, " MiB of workspace a thread, more than the ", kWorkspaceLimit >> 20,
           " that the CPU kernels take");
    }
    if (bytes > size_) {
      size_ = 0;
      data_.reset();
      data_.reset(static_cast<char*>(::operator new[](bytes, std::align_val_t{64})));
      size_ = bytes;
    }
  }

  Key key_{};
  size_t size_ = 0;
  std::unique_ptr<char[], Delete> data_;
};

// Uninitialised (images, classes). Without the dispatcher, whose way to new_empty takes longer than a dense layer.
Tensor scores_tensor(ScalarType type, int64_t images, int64_t classes) {
  const std::array sizes{images, classes}, strides{classes, int64_t{1}};
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(2, sizes.data(), strides.data(),
                               type == ScalarType::Float ? aoti_torch_dtype_float32() : aoti_torch_dtype_float64(),
                               aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// Training writes to its parameters, inference takes everything in any layout, as layers do.
Tensor contiguous(const char* name, const Tensor& tensor) {
  if (tensor.is_contiguous()) {
    return tensor;
  }
  check_memory(name, tensor);
  return torch::stable::contiguous(tensor);
}

Tensor network_infer(int64_t id, std::vector<Tensor> parameters, const Tensor& given, double scale, double background) {
  for (Tensor& parameter : parameters) {
    parameter = contiguous("parameters", parameter);
  }
  const Tensor images = contiguous("images", given);
  const std::shared_ptr<const NetworkOperand> operand = definitions().find(id);
  const NetworkGeometry& g = operand->geometry();
  return with_parameter_type(parameters, [&]<typename T>(T) {
    const NetworkKernels<T>& kernel = kernels().network<T>();
    const Network<T> network = operand->network<T>(parameters);
    const Images<T> source = images_of<T>(images, g, parameters[0], scale, background);
    const int64_t total = images.size(0), blocks = (total + kernel.lanes - 1) / kernel.lanes;
    const int64_t threads = std::min<int64_t>(blocks, torch::stable::get_num_threads());
    const Tensor output = scores_tensor(parameters[0].scalar_type(), total, g.classes);
    auto* const values = static_cast<T*>(output.mutable_data_ptr());
    if (!source.are_bytes && total > 0 && 4 * total < 3 * kernel.lanes) {  // most lanes of a block would be empty
      static thread_local InferenceMemory memory;
      kernel.infer_few(network, static_cast<const T*>(source.data), total, values, memory.plain(kernel.few_bytes(g)));
      return output;
    }
    const auto run = [&](int64_t begin, int64_t end) {
      static thread_local InferenceMemory memory;
      void* const own = memory.prepared<T>(id, kernel, network, source);
      for (int64_t thread = begin; thread < end; ++thread) {
        kernel.infer(network, source, kernel.lanes * (blocks * thread / threads),
                     std::min(total, kernel.lanes * (blocks * (thread + 1) / threads)), values, own);
      }
    };
    threads > 1 ? torch::stable::parallel_for(0, threads, 1, run) : run(0, threads);
    return output;
  });
}

STABLE_TORCH_LIBRARY_IMPL(lenet_fast, CPU, library) { library.impl("network_infer", TORCH_BOX(&network_infer)); }

STABLE_TORCH_LIBRARY_IMPL(lenet_fast, CompositeExplicitAutograd, library) {
  library.impl("network_define", TORCH_BOX(&network_define));
  library.impl("network_release", TORCH_BOX(&network_release));
}

}  // namespace
}  // namespace lenet_fast::cpu
