// The whole-network operators on the CPU: check, lay out one workspace, run the two phases in PyTorch's thread pool.
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

constexpr int64_t kChunk = 1024;  // images of a step between whose phases the dense layers' operands are kept
constexpr int64_t kWorkspaceLimit = int64_t{4} << 30;  // rather an error than a machine out of memory

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

template <typename T>
Network<T> network_of(const NetworkOperand& operand, const std::vector<Tensor>& parameters) {
  operand.check(parameters);
  Network<T> network{};
  network.geometry = operand.geometry();
  operand.for_each_trained(parameters, [&](const Tensor& tensor, size_t slot, size_t) {
    // Slots: weight, bias, coefficient, subsample_bias of each convolution, then weight, bias of each dense layer.
    const size_t convs = 4 * static_cast<size_t>(network.geometry.num_convs);
    Parameter<T>* parameter = nullptr;
    if (slot < convs) {
      ConvParameters<T>& conv = network.conv[slot / 4];
      Parameter<T>* const of[] = {&conv.weight, &conv.bias, &conv.coefficient, &conv.subsample_bias};
      parameter = of[slot % 4];
    } else {
      DenseParameters<T>& dense = network.dense[(slot - convs) / 2];
      parameter = (slot - convs) % 2 == 0 ? &dense.weight : &dense.bias;
    }
    parameter->value = static_cast<T*>(tensor.mutable_data_ptr());
  });
  if (operand.geometry().output == Output::distances) {
    network.codes = static_cast<const T*>(parameters.back().const_data_ptr());
  }
  return network;
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
  if (!images.is_cpu()) {
    fail("images: expected on the device of the parameters");
  }
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

void check_indices(const char* name, const Tensor& tensor, int64_t end) {
  if (tensor.scalar_type() != ScalarType::Long || tensor.dim() != 1 || !tensor.is_cpu()) {
    fail(name, ": expected int64 (N,) on the device of the parameters, got shape ", shape(tensor));
  }
  NetworkOperand::check_contiguous(name, tensor);
  const auto* values = static_cast<const int64_t*>(tensor.const_data_ptr());
  for (int64_t i = 0; i < tensor.numel(); ++i) {
    if (values[i] < 0 || values[i] >= end) {
      fail(name, ": expected 0 to ", end - 1, ", got ", values[i], " at ", i);
    }
  }
}

// PyTorch's scalars of one parameter's next step, computed in double as PyTorch does.
struct Settings {
  Optimizer optimizer;
  double momentum, nesterov, weight_decay, beta1, beta2, epsilon;

  Settings(const Name& name, const std::vector<double>& numbers) {
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

  // `step` counts from 1.
  template <typename T>
  Update<T> update(bool trains, double step, double lr) const {
    Update<T> u{};
    u.optimizer = optimizer;
    u.frozen = !trains;
    u.nesterov = nesterov != 0;
    const bool adaptive = optimizer != Optimizer::sgd;
    u.rate = static_cast<T>(adaptive ? lr / (1 - std::pow(beta1, step)) : lr);
    u.weight_decay = static_cast<T>(optimizer == Optimizer::adamw ? 0 : weight_decay);
    u.shrink = static_cast<T>(1 - lr * weight_decay);
    u.momentum = static_cast<T>(momentum);
    u.beta2 = static_cast<T>(beta2);
    u.one_minus_beta1 = static_cast<T>(1 - beta1);
    u.one_minus_beta2 = static_cast<T>(1 - beta2);
    u.correction = static_cast<T>(std::sqrt(1 - std::pow(beta2, step)));
    u.epsilon = static_cast<T>(epsilon);
    return u;
  }
};

// Bytes laid out one after another, each part at a multiple of 64.
class Arena {
 public:
  size_t take(int64_t bytes) {
    const size_t at = size_;
    size_ += static_cast<size_t>((bytes + 63) / 64 * 64);
    return at;
  }
  size_t size() const { return size_; }

 private:
  size_t size_ = 0;
};

Tensor workspace(const Tensor& like, size_t bytes) {
  if (bytes > static_cast<size_t>(kWorkspaceLimit)) {
    fail("network: needs ", bytes >> 20, " MiB of workspace, more than the ", kWorkspaceLimit >> 20,
         " that the CPU kernels take");
  }
  return torch::stable::new_empty(like, {static_cast<int64_t>(bytes)}, ScalarType::Byte);
}

std::tuple<Tensor, Tensor> network_train(const std::vector<int64_t>& numbers, const std::vector<Tensor>& parameters,
                                         const std::vector<Tensor>& first_moments,
                                         const std::vector<Tensor>& second_moments,
                                         const std::vector<Tensor>& step_counts, const std::vector<int64_t>& trains,
                                         const Tensor& images, const Tensor& labels, const std::optional<Tensor>& order,
                                         int64_t batch_size, double scale, double background, const Name& optimizer,
                                         const std::vector<double>& settings_numbers,
                                         const std::vector<double>& learning_rates, double j) {
  const NetworkOperand operand(numbers);
  const NetworkGeometry& g = operand.geometry();
  const Settings settings(optimizer, settings_numbers);
  return with_parameter_type(parameters, [&]<typename T>(T) {
    const NetworkKernels<T>& kernel = kernels().network<T>();
    Network<T> network = network_of<T>(operand, parameters);
    const Tensor& like = parameters[0];

    Images<T> source = images_of<T>(images, g, like, scale, background);
    check_indices("labels", labels, g.classes);
    if (labels.numel() != images.size(0)) {
      fail("labels: expected one for each of the ", images.size(0), " images, got ", labels.numel());
    }
    if (order.has_value()) {
      check_indices("order", *order, images.size(0));
      source.order = static_cast<const int64_t*>(order->const_data_ptr());
    }
    const int64_t total = order.has_value() ? order->numel() : images.size(0);
    if (batch_size < 1) {
      fail("batch_size: expected at least 1, got ", batch_size);
    }
    const int64_t steps = total / batch_size + (total % batch_size != 0 ? 1 : 0);
    if (static_cast<int64_t>(learning_rates.size()) != steps) {
      fail("learning_rates: expected one for each of the ", steps, " steps, got ", learning_rates.size());
    }

    const size_t trained = operand.num_trained(), moments = settings.num_moments();
    for (const auto& [name, tensors, needed] : {std::tuple("first_moments", &first_moments, moments >= 1),
                                                std::tuple("second_moments", &second_moments, moments >= 2),
                                                std::tuple("step_counts", &step_counts, moments >= 2)}) {
      if (tensors->size() != (needed ? trained : 0)) {
        fail(name, ": expected ", needed ? trained : 0, " tensors, got ", tensors->size());
      }
    }
    if (trains.size() != trained) {
      fail("trains: expected ", trained, " numbers, got ", trains.size());
    }
    std::vector<float*> counts(trained, nullptr);  // as PyTorch keeps them
    for (size_t index = 0; index < step_counts.size(); ++index) {
      const Tensor& count = step_counts[index];
      if (count.scalar_type() != ScalarType::Float || count.numel() != 1 || !count.is_cpu()) {
        fail("step_counts: expected float32 () on the CPU, got shape ", shape(count));
      }
      counts[index] = static_cast<float*>(count.mutable_data_ptr());
    }

    // The workspace.
    const int64_t largest = std::min(total, batch_size), chunk = std::min(largest, kChunk);
    const int64_t blocks = (chunk + kernel.lanes - 1) / kernel.lanes;
    const int64_t threads = std::max<int64_t>(1, std::min<int64_t>(blocks, torch::stable::get_num_threads()));
    Arena arena;
    const auto thread_stride = static_cast<int64_t>((kernel.thread_bytes(g, true) + 63) / 64 * 64);
    const size_t thread_memory = arena.take(threads * thread_stride);
    const size_t losses_at = arena.take(threads * int64_t{sizeof(double)});
    const size_t correct_at = arena.take(threads * int64_t{sizeof(int64_t)});
    std::vector<size_t> grad_at(trained);
    operand.for_each_trained(parameters, [&](const Tensor& tensor, size_t, size_t index) {
      grad_at[index] = arena.take(tensor.numel() * int64_t{sizeof(T)});
    });
    std::array<std::array<size_t, 2>, kMaxDenses> sums_at{};
    TrainingStep<T> step{};
    const int64_t padded = blocks * kernel.lanes;
    for (int l = 0; l < g.num_denses; ++l) {
      const int64_t row = (g.dense[l].in_features + kernel.lanes - 1) / kernel.lanes * kernel.lanes;
      step.dense_sums[l].grads_stride = padded;
      step.dense_sums[l].inputs_stride = row;
      sums_at[l] = {arena.take(g.dense[l].out_features * padded * int64_t{sizeof(T)}),
                    arena.take(chunk * row * int64_t{sizeof(T)})};
    }
    const Tensor memory_tensor = workspace(like, arena.size());
    char* const memory = static_cast<char*>(memory_tensor.mutable_data_ptr());
    for (int l = 0; l < g.num_denses; ++l) {
      step.dense_sums[l].grads = reinterpret_cast<T*>(memory + sums_at[l][0]);
      step.dense_sums[l].inputs = reinterpret_cast<T*>(memory + sums_at[l][1]);
    }
    step.network = &network;
    step.images = source;
    step.labels = static_cast<const int64_t*>(labels.const_data_ptr());
    step.extra_score = static_cast<T>(-j);
    step.thread_memory = memory + thread_memory;
    step.thread_stride = thread_stride;
    step.threads = threads;
    step.losses = reinterpret_cast<double*>(memory + losses_at);
    step.correct = reinterpret_cast<int64_t*>(memory + correct_at);

    // Parameters with their state.
    std::vector<Parameter<T>*> slots;
    for (int l = 0; l < g.num_convs; ++l) {
      ConvParameters<T>& p = network.conv[l];
      for (Parameter<T>* parameter : {&p.weight, &p.bias, &p.coefficient, &p.subsample_bias}) {
        slots.push_back(parameter);
      }
    }
    for (int l = 0; l < g.num_denses; ++l) {
      slots.push_back(&network.dense[l].weight);
      slots.push_back(&network.dense[l].bias);
    }
    std::vector<Parameter<T>*> trained_slots;
    operand.for_each_trained(parameters, [&](const Tensor& tensor, size_t slot, size_t index) {
      Parameter<T>& parameter = *slots[slot];
      parameter.grad = reinterpret_cast<T*>(memory + grad_at[index]);
      if (trains[index] != 0) {
        const auto moment = [&](const char* name, const std::vector<Tensor>& tensors) -> T* {
          if (tensors.empty()) {
            return nullptr;
          }
          operand.check_tensor(name, tensors[index], slot, like);
          return static_cast<T*>(tensors[index].mutable_data_ptr());
        };
        parameter.first = moment("first_moments", first_moments);
        parameter.second = moment("second_moments", second_moments);
      }
      trained_slots.push_back(&parameter);
    });

    Tensor losses = torch::stable::new_empty(like, {steps}, ScalarType::Double);
    Tensor correct = torch::stable::new_empty(like, {steps}, ScalarType::Long);
    auto* const loss_of = static_cast<double*>(losses.mutable_data_ptr());
    auto* const correct_of = static_cast<int64_t*>(correct.mutable_data_ptr());

    const auto in_parallel = [&](const auto& f) {
      torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
        for (int64_t thread = begin; thread < end; ++thread) {
          f(thread);
        }
      });
    };
    in_parallel(
        [&](int64_t thread) { kernel.prepare(network, source, true, step.thread_memory + thread * thread_stride); });
    int64_t done = 0;
    for (; done < steps; ++done) {
      const int64_t first = done * batch_size, batch = std::min(batch_size, total - first);
      for (size_t index = 0; index < trained; ++index) {
        trained_slots[index]->update =
            settings.update<T>(trains[index] != 0, counts[index] != nullptr ? *counts[index] + 1 : 0,
                               learning_rates[static_cast<size_t>(done)]);
      }
      std::fill(step.losses, step.losses + threads, 0.0);
      std::fill(step.correct, step.correct + threads, int64_t{0});
      step.factor = static_cast<T>(1.0 / static_cast<double>(batch));
      bool finite = true;
      for (int64_t at = 0; at < batch && finite; at += kChunk) {
        step.chunk_begin = first + at;
        step.chunk_size = std::min(kChunk, batch - at);
        step.first_chunk = at == 0;
        step.last_chunk = at + kChunk >= batch;
        const int64_t chunk_blocks = (step.chunk_size + kernel.lanes - 1) / kernel.lanes;
        in_parallel([&](int64_t thread) {
          kernel.train(step, kernel.lanes * (chunk_blocks * thread / threads),
                       std::min(step.chunk_size, kernel.lanes * (chunk_blocks * (thread + 1) / threads)), thread);
        });
        double loss = 0;
        int64_t right = 0;
        for (int64_t thread = 0; thread < threads; ++thread) {
          loss += step.losses[thread];
          right += step.correct[thread];
        }
        loss_of[done] = loss / static_cast<double>(batch);
        correct_of[done] = right;
        finite = std::isfinite(loss);
        if (finite) {
          in_parallel([&](int64_t thread) { kernel.update(step, thread, threads); });
        }
      }
      if (!finite) {  // the step is not taken
        ++done;
        break;
      }
      for (size_t index = 0; index < trained; ++index) {
        if (counts[index] != nullptr && trains[index] != 0) {
          *counts[index] += 1;
        }
      }
    }
    return std::tuple(torch::stable::narrow(losses, 0, 0, done), torch::stable::narrow(correct, 0, 0, done));
  });
}

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
    const Key key{id, static_cast<int64_t>(sizeof(T)), images.are_bytes ? images.height : 0, images.width,
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

// Training writes to its parameters, inference takes them in any layout, as layers do.
std::vector<Tensor> contiguous(std::vector<Tensor> tensors) {
  for (Tensor& tensor : tensors) {
    if (!tensor.is_contiguous()) {
      tensor = torch::stable::contiguous(tensor);
    }
  }
  return tensors;
}

Tensor network_infer(int64_t id, std::vector<Tensor> given, const Tensor& images, double scale, double background) {
  const std::vector<Tensor> parameters = contiguous(std::move(given));
  const std::shared_ptr<const NetworkOperand> operand = definitions().find(id);
  const NetworkGeometry& g = operand->geometry();
  return with_parameter_type(parameters, [&]<typename T>(T) {
    const NetworkKernels<T>& kernel = kernels().network<T>();
    const Network<T> network = network_of<T>(*operand, parameters);
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

STABLE_TORCH_LIBRARY_IMPL(lenet_fast, CPU, library) {
  library.impl("network_train", TORCH_BOX(&network_train));
  library.impl("network_infer", TORCH_BOX(&network_infer));
}

STABLE_TORCH_LIBRARY_IMPL(lenet_fast, CompositeExplicitAutograd, library) {
  library.impl("network_define", TORCH_BOX(&network_define));
  library.impl("network_release", TORCH_BOX(&network_release));
}

}  // namespace
}  // namespace lenet_fast::cpu
