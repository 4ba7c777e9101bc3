// The operator that trains a network, over the kernels of one device: check everything, then run.
#pragma once

#include <array>
#include <tuple>

#include "dropout.h"
#include "network_operands.h"

namespace lenet_fast {

inline OptimizerSettings optimizer_settings(const Name& name, const std::vector<double>& numbers) {
  constexpr std::array names{"sgd", "adam", "adamw"};  // in the order of the enum
  size_t index = 0;
  while (index < names.size() && name.value != names[index]) {
    ++index;
  }
  if (index == names.size()) {
    fail("optimizer: expected sgd, adam or adamw, got '", name.value, "'");
  }
  if (numbers.size() != 6) {
    fail("settings: expected momentum, nesterov, weight_decay, beta1, beta2, epsilon");
  }
  return {.optimizer = static_cast<Optimizer>(index),
          .nesterov = numbers[1] != 0,
          .momentum = numbers[0],
          .weight_decay = numbers[2],
          .beta1 = numbers[3],
          .beta2 = numbers[4],
          .epsilon = numbers[5]};
}

inline size_t num_moments(const OptimizerSettings& settings) {
  return settings.optimizer == Optimizer::sgd ? (settings.momentum != 0 ? 1 : 0) : 2;
}

// The operator's arguments behind the network, as lenet_fast/ops.py declares them.
struct TrainingArguments {
  const std::vector<Tensor>&parameters, &first_moments, &second_moments, &step_counts;
  const std::vector<int64_t>& trains;
  const Tensor &images, &labels;
  const std::optional<Tensor>& order;
  int64_t batch_size;
  double scale, background;
  const Name& optimizer;
  const std::vector<double>&settings, &learning_rates;
  double j;
  const std::vector<double>& dropout;
  int64_t seed, first_step;
  double label_smoothing;
  const std::optional<Tensor>& watch;
};

// What the operator's probabilities say, which are those of (values, maps) at each place. Without any nothing is
// dropped.
template <typename T>
Dropout<T> read_dropout(const NetworkGeometry& g, const std::vector<double>& probabilities) {
  const auto expected = static_cast<size_t>(2 * g.num_places());
  if (!probabilities.empty() && probabilities.size() != expected) {
    fail("dropout: expected no numbers or ", expected, ", two for each of ", g.num_places() - 1,
         " layers and two for the output, got ", probabilities.size());
  }
  for (size_t i = 0; i < probabilities.size(); ++i) {
    if (!(probabilities[i] >= 0 && probabilities[i] <= 1)) {
      fail("dropout: expected probabilities from 0 to 1, got ", probabilities[i], " at ", i);
    }
  }
  Dropout<T> dropout{};
  for (int place = 0; place < g.num_places(); ++place) {
    const auto probability = [&](int kind) {
      return probabilities.empty() ? 0.0 : probabilities[static_cast<size_t>(2 * place + kind)];
    };
    dropout.at[place] = drop_rules<T>(g, place, probability(0), probability(1));
  }
  return dropout;
}

// The same, checked: all but the values of labels and order, which only a kernel may be able to read.
template <typename T>
struct Training {
  struct Trained {
    Parameter<T>* parameter;  // in `network`
    size_t slot;
    int64_t size;
    float* count;  // steps taken, as PyTorch keeps them; null where the optimizer counts none
    bool trains;
  };

  Network<T> network;  // values and moments
  std::vector<Trained> trained;
  OptimizerSettings settings;
  Images<T> images;  // with their order
  const int64_t* labels;
  int64_t num_images, total, batch_size, steps;  // total: images in all steps together
  T extra_score;                                 // -j
  std::vector<double> learning_rates;            // one a step
  Dropout<T> dropout;                            // of the first step
  double label_smoothing;
  double* watch = nullptr;  // (1 + steps) in the host's memory; null: nobody watches

  Training(const NetworkOperand& operand, const TrainingArguments& a)
      : network(operand.network<T>(a.parameters)),
        settings(optimizer_settings(a.optimizer, a.settings)),
        images(images_of<T>(a.images, operand.geometry(), a.parameters[0], a.scale, a.background)),
        labels(check_indices("labels", a.labels, a.parameters[0])),
        num_images(a.images.size(0)),
        total(num_images),
        batch_size(a.batch_size),
        extra_score(static_cast<T>(-a.j)),
        learning_rates(a.learning_rates),
        dropout(read_dropout<T>(operand.geometry(), a.dropout)),
        label_smoothing(a.label_smoothing) {
    const Tensor& like = a.parameters[0];
    if (a.labels.numel() != num_images) {
      fail("labels: expected one for each of the ", num_images, " images, got ", a.labels.numel());
    }
    if (a.order.has_value()) {
      images.order = check_indices("order", *a.order, like);
      total = a.order->numel();
    }
    if (num_images == 0 && total > 0) {
      fail("order: expected none, as there are no images, got ", total);
    }
    if (batch_size < 1) {
      fail("batch_size: expected at least 1, got ", batch_size);
    }
    steps = total / batch_size + (total % batch_size != 0 ? 1 : 0);
    if (static_cast<int64_t>(learning_rates.size()) != steps) {
      fail("learning_rates: expected one for each of the ", steps, " steps, got ", learning_rates.size());
    }
    constexpr int64_t most_steps = int64_t{1} << 32;
    if (a.first_step < 0 || a.first_step > most_steps - steps) {
      fail("first_step: expected 0 to 2^32 less the ", steps, " steps, got ", a.first_step);
    }
    dropout.step = {static_cast<uint64_t>(a.seed), static_cast<uint32_t>(a.first_step)};
    if (!(label_smoothing >= 0 && label_smoothing <= 1)) {
      fail("label_smoothing: expected 0 to 1, got ", label_smoothing);
    }
    if (label_smoothing > 0 && operand.geometry().output == Output::distances) {
      fail("label_smoothing: expected 0 for the MAP loss of distances, got ", label_smoothing);
    }
    add_state(operand, a, like);
    if (a.watch.has_value()) {
      watch = check_watch(*a.watch);
    }
  }

 private:
  double* check_watch(const Tensor& tensor) const {
    if (!tensor.is_cpu() || tensor.scalar_type() != ScalarType::Double || tensor.dim() != 1 ||
        tensor.size(0) != steps + 1) {
      fail("watch: expected float64 (", steps + 1, ",) on the CPU, got shape ", shape(tensor));
    }
    check_memory("watch", tensor);
    NetworkOperand::check_contiguous("watch", tensor);
    return static_cast<double*>(tensor.mutable_data_ptr());
  }

  static const int64_t* check_indices(const char* name, const Tensor& tensor, const Tensor& like) {
    check_device(name, tensor, like);
    if (tensor.scalar_type() != ScalarType::Long || tensor.dim() != 1) {
      fail(name, ": expected int64 (N,), got shape ", shape(tensor));
    }
    NetworkOperand::check_contiguous(name, tensor);
    return static_cast<const int64_t*>(tensor.const_data_ptr());
  }

  void add_state(const NetworkOperand& operand, const TrainingArguments& a, const Tensor& like) {
    const size_t number = operand.num_trained(), moments = num_moments(settings);
    for (const auto& [name, tensors, needed] : {std::tuple("first_moments", &a.first_moments, moments >= 1),
                                                std::tuple("second_moments", &a.second_moments, moments >= 2),
                                                std::tuple("step_counts", &a.step_counts, moments >= 2)}) {
      if (tensors->size() != (needed ? number : 0)) {
        fail(name, ": expected ", needed ? number : 0, " tensors, got ", tensors->size());
      }
    }
    if (a.trains.size() != number) {
      fail("trains: expected ", number, " numbers, got ", a.trains.size());
    }
    const auto slots = network.slots();
    operand.for_each_trained(a.parameters, [&](const Tensor& tensor, size_t slot, size_t index) {
      Trained one{slots[slot], slot, tensor.numel(), nullptr, a.trains[index] != 0};
      if (one.trains) {
        const auto moment = [&](const char* name, const std::vector<Tensor>& tensors) -> T* {
          if (tensors.empty()) {
            return nullptr;
          }
          operand.check_tensor(name, tensors[index], slot, like);
          return static_cast<T*>(tensors[index].mutable_data_ptr());
        };
        one.parameter->first = moment("first_moments", a.first_moments);
        one.parameter->second = moment("second_moments", a.second_moments);
      }
      if (!a.step_counts.empty()) {
        const Tensor& count = a.step_counts[index];
        check_device("step_counts", count, like);
        if (count.scalar_type() != ScalarType::Float || count.numel() != 1) {
          fail("step_counts: expected float32 (), got shape ", shape(count));
        }
        one.count = static_cast<float*>(count.mutable_data_ptr());
      }
      trained.push_back(one);
    });
  }
};

// Backend: static std::tuple<Tensor, Tensor> train(operand, arguments), losses and numbers right.
template <typename Backend>
std::tuple<Tensor, Tensor> network_train(const std::vector<int64_t>& numbers, const std::vector<Tensor>& parameters,
                                         const std::vector<Tensor>& first_moments,
                                         const std::vector<Tensor>& second_moments,
                                         const std::vector<Tensor>& step_counts, const std::vector<int64_t>& trains,
                                         const Tensor& images, const Tensor& labels, const std::optional<Tensor>& order,
                                         int64_t batch_size, double scale, double background, const Name& optimizer,
                                         const std::vector<double>& settings, const std::vector<double>& learning_rates,
                                         double j, const std::vector<double>& dropout, int64_t seed, int64_t first_step,
                                         double label_smoothing, const std::optional<Tensor>& watch) {
  if (parameters.empty()) {
    fail("parameters: expected at least one tensor");
  }
  return Backend::train(NetworkOperand(numbers), {parameters, first_moments, second_moments, step_counts,     trains,
                                                  images,     labels,        order,          batch_size,      scale,
                                                  background, optimizer,     settings,       learning_rates,  j,
                                                  dropout,    seed,          first_step,     label_smoothing, watch});
}

}  // namespace lenet_fast
