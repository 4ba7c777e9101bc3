// Training of a whole network on CUDA: lay out one workspace, queue all steps.
#include <algorithm>

#include "cuda/train_network.h"
#include "current_stream.h"
#include "served_device.h"
#include "training_operands.h"

namespace lenet_fast::cuda {
namespace {

// Where the device finds what the host calls `memory`.
double* on_device(double* memory, const char* name) {
  void* found = nullptr;
  if (memory != nullptr && cudaHostGetDevicePointer(&found, memory, 0) != cudaSuccess) {
    fail(name, ": expected pinned memory");
  }
  return static_cast<double*>(found);
}

struct Backend {
  // Unlike on the CPU, labels and order are on the device and not read here: a label or image that does not exist makes
  // the loss of its step NaN. A step whose loss is not finite is not taken, nor any after it; their losses are NaN.
  static std::tuple<Tensor, Tensor> train(const NetworkOperand& operand, const TrainingArguments& arguments) {
    const Tensor& like = arguments.parameters[0];
    const CurrentStream stream(like);
    const std::string unserved = why_unserved(like.get_device_index());
    const char* const reason = !unserved.empty()                         ? unserved.c_str()
                               : like.scalar_type() != ScalarType::Float ? "parameters that are not of dtype float32"
                                                                         : why_unsupported(operand.geometry());
    if (reason != nullptr) {
      fail("network: cannot be trained by the CUDA kernels: ", reason);
    }
    Training<float> training(operand, arguments);
    TrainingRun run{};
    run.network = training.network;
    for (const auto& one : training.trained) {
      run.trained[one.slot] = one.trains;
      run.counts[one.slot] = one.trains ? one.count : nullptr;
    }
    run.settings = training.settings;
    run.images = training.images;
    run.labels = training.labels;
    run.num_images = training.num_images;
    run.total = training.total;
    run.batch_size = training.batch_size;
    run.extra_score = training.extra_score;
    run.label_smoothing = static_cast<float>(training.label_smoothing);
    run.dropout = training.dropout;
    run.learning_rates = training.learning_rates;
    run.watch = on_device(training.watch, "watch");

    const Tensor losses = torch::stable::new_empty(like, {training.steps}, ScalarType::Double);
    const Tensor correct = torch::stable::new_empty(like, {training.steps}, ScalarType::Long);
    run.losses = static_cast<double*>(losses.mutable_data_ptr());
    run.correct = static_cast<int64_t*>(correct.mutable_data_ptr());
    if (training.steps > 0) {
      const Tensor workspace =
          torch::stable::new_empty(like, {static_cast<int64_t>(workspace_bytes(run))}, ScalarType::Byte);
      cuda::train(run, workspace.mutable_data_ptr(), stream);
    }
    return std::tuple(losses, correct);
  }
};

STABLE_TORCH_LIBRARY_IMPL(LENET_FAST_LIBRARY, LENET_FAST_DISPATCH_KEY, library) {
  library.impl("network_train", TORCH_BOX(&network_train<Backend>));
}

}  // namespace
}  // namespace lenet_fast::cuda
