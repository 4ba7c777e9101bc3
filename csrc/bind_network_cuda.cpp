// The whole-network training operator on CUDA: check, lay out one workspace, queue all steps.
#include <algorithm>

#include "cuda/train_network.h"
#include "current_stream.h"
#include "training_operands.h"

namespace lenet_fast::cuda {
namespace {

// Values and moments by slot, as TrainingRun counts them.
std::array<Parameter<float>*, 4 * kMaxConvs + 2 * kMaxDenses> slots_of(Network<float>& network) {
  std::array<Parameter<float>*, 4 * kMaxConvs + 2 * kMaxDenses> slots{};
  size_t next = 0;
  for (int l = 0; l < network.geometry.num_convs; ++l) {
    ConvParameters<float>& p = network.conv[l];
    for (Parameter<float>* parameter : {&p.weight, &p.bias, &p.coefficient, &p.subsample_bias}) {
      slots[next++] = parameter;
    }
  }
  for (int l = 0; l < network.geometry.num_denses; ++l) {
    slots[next++] = &network.dense[l].weight;
    slots[next++] = &network.dense[l].bias;
  }
  return slots;
}

// Unlike on the CPU, labels and order are on the device and not read here: a label or image that does not exist makes
// the loss of its step NaN. A step whose loss is not finite is not taken, nor any after it; their losses are NaN.
std::tuple<Tensor, Tensor> network_train(const std::vector<int64_t>& numbers, const std::vector<Tensor>& parameters,
                                         const std::vector<Tensor>& first_moments,
                                         const std::vector<Tensor>& second_moments,
                                         const std::vector<Tensor>& step_counts, const std::vector<int64_t>& trains,
                                         const Tensor& images, const Tensor& labels, const std::optional<Tensor>& order,
                                         int64_t batch_size, double scale, double background, const Name& optimizer,
                                         const std::vector<double>& settings_numbers,
                                         const std::vector<double>& learning_rates, double j) {
  const NetworkOperand operand(numbers);
  const OptimizerSettings settings(optimizer, settings_numbers);
  operand.check(parameters);
  const Tensor& like = parameters[0];
  if (like.scalar_type() != ScalarType::Float) {
    fail("parameters: expected dtype float32 on CUDA");
  }
  const CurrentStream stream(like);
  if (const char* reason = why_unsupported(operand.geometry())) {
    fail("network: cannot be trained by the CUDA kernels: ", reason);
  }

  TrainingRun run{};
  run.network.geometry = operand.geometry();
  run.images = images_of<float>(images, operand.geometry(), like, scale, background);
  run.num_images = images.size(0);
  run.labels = indices_of("labels", labels, like);
  if (labels.numel() != run.num_images) {
    fail("labels: expected one for each of the ", run.num_images, " images, got ", labels.numel());
  }
  run.total = run.num_images;
  if (order.has_value()) {
    run.images.order = indices_of("order", *order, like);
    run.total = order->numel();
  }
  if (batch_size < 1) {
    fail("batch_size: expected at least 1, got ", batch_size);
  }
  run.batch_size = batch_size;
  const int64_t steps = run.total / batch_size + (run.total % batch_size != 0 ? 1 : 0);
  if (static_cast<int64_t>(learning_rates.size()) != steps) {
    fail("learning_rates: expected one for each of the ", steps, " steps, got ", learning_rates.size());
  }
  run.learning_rates = learning_rates;

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
  const auto slots = slots_of(run.network);
  operand.for_each_trained(parameters, [&](const Tensor& tensor, size_t slot, size_t index) {
    Parameter<float>& parameter = *slots[slot];
    parameter.value = static_cast<float*>(tensor.mutable_data_ptr());
    run.trained[slot] = trains[index] != 0;
    if (!run.trained[slot]) {
      return;
    }
    const auto moment = [&](const char* name, const std::vector<Tensor>& tensors) -> float* {
      if (tensors.empty()) {
        return nullptr;
      }
      operand.check_tensor(name, tensors[index], slot, like);
      return static_cast<float*>(tensors[index].mutable_data_ptr());
    };
    parameter.first = moment("first_moments", first_moments);
    parameter.second = moment("second_moments", second_moments);
    if (!step_counts.empty()) {
      const Tensor& count = step_counts[index];
      check_device("step_counts", count, like);
      if (count.scalar_type() != ScalarType::Float || count.numel() != 1) {
        fail("step_counts: expected float32 (), got shape ", shape(count));
      }
      run.counts[slot] = static_cast<float*>(count.mutable_data_ptr());
    }
  });
  if (operand.geometry().output == Output::distances) {
    run.network.codes = static_cast<const float*>(parameters.back().const_data_ptr());
  }
  run.optimizer = settings.optimizer;
  run.nesterov = settings.nesterov != 0;
  run.momentum = settings.momentum;
  run.weight_decay = settings.weight_decay;
  run.beta1 = settings.beta1;
  run.beta2 = settings.beta2;
  run.epsilon = settings.epsilon;
  run.extra_score = static_cast<float>(-j);

  const Tensor losses = torch::stable::new_empty(like, {steps}, ScalarType::Double);
  const Tensor correct = torch::stable::new_empty(like, {steps}, ScalarType::Long);
  run.losses = static_cast<double*>(losses.mutable_data_ptr());
  run.correct = static_cast<int64_t*>(correct.mutable_data_ptr());
  if (steps > 0) {
    const Tensor workspace =
        torch::stable::new_empty(like, {static_cast<int64_t>(workspace_bytes(run))}, ScalarType::Byte);
    train(run, workspace.mutable_data_ptr(), stream);
  }
  return std::tuple(losses, correct);
}

STABLE_TORCH_LIBRARY_IMPL(LENET_FAST_LIBRARY, LENET_FAST_DISPATCH_KEY, library) {
  library.impl("network_train", TORCH_BOX(&network_train));
}

}  // namespace
}  // namespace lenet_fast::cuda
