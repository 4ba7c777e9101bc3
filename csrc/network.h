// A whole LeNet as the native step takes it, shared by every back end: convolutions, dense layers, and scores or
// distances at the end. No torch, no pointers owned but by the connection tables' keeper.
#pragma once

#include <array>
#include <cmath>

#include "geometry.h"

#if defined(__CUDACC__)
#define LENET_FAST_HOST_DEVICE __host__ __device__
#else
#define LENET_FAST_HOST_DEVICE
#endif

namespace lenet_fast {

inline constexpr int kMaxConvs = 4;
inline constexpr int kMaxDenses = 4;
inline constexpr int kMaxSlots = 4 * kMaxConvs + 2 * kMaxDenses;  // of parameters, see Network::slots
inline constexpr int kMaxPlaces = kMaxConvs + kMaxDenses + 1;     // see NetworkGeometry::num_places

// output = activation(weight input + bias), weight (out_features, in_features).
struct DenseGeometry {
  int64_t in_features, out_features;
  Activation activation;
};

// scores: softmax cross-entropy of the last dense layer. distances: LeCun's MAP loss of the squared Euclidean distances
// between the last dense layer and one code a class.
enum class Output { scores, distances };

struct NetworkGeometry {
  int num_convs, num_denses;
  ConvGeometry conv[kMaxConvs];  // `batch` unused
  DenseGeometry dense[kMaxDenses];
  Output output;
  int64_t classes;

  const DenseGeometry& last_dense() const { return dense[num_denses - 1]; }

  // Where a training step may drop values: the input of each layer, in order, then the last layer's output.
  int num_places() const { return num_convs + num_denses + 1; }
};

// What is subtracted from one parameter in one step, PyTorch's definitions with every scalar computed beforehand.
enum class Optimizer { sgd, adam, adamw };

struct OptimizerSettings {
  Optimizer optimizer;
  bool nesterov;
  double momentum, weight_decay, beta1, beta2, epsilon;
};

template <typename T>
struct Update {
  Optimizer optimizer;
  bool frozen, nesterov;
  T rate;          // sgd: lr; adam: lr / (1 - beta1^step)
  T weight_decay;  // added to the gradient (sgd, adam)
  T shrink;        // adamw: 1 - lr * weight_decay
  T momentum;
  T beta2, one_minus_beta1, one_minus_beta2;
  T correction;  // sqrt(1 - beta2^step)
  T epsilon;
};

// Of a parameter's next step, `step` counted from 1; computed in double as PyTorch does.
template <typename T>
LENET_FAST_HOST_DEVICE Update<T> update_of(const OptimizerSettings& s, bool trains, double step, double lr) {
  const bool adaptive = s.optimizer != Optimizer::sgd;
  Update<T> u{};
  u.optimizer = s.optimizer;
  u.frozen = !trains;
  u.nesterov = s.nesterov;
  u.rate = static_cast<T>(adaptive ? lr / (1 - std::pow(s.beta1, step)) : lr);
  u.weight_decay = static_cast<T>(s.optimizer == Optimizer::adamw ? 0 : s.weight_decay);
  u.shrink = static_cast<T>(1 - lr * s.weight_decay);
  u.momentum = static_cast<T>(s.momentum);
  u.beta2 = static_cast<T>(s.beta2);
  u.one_minus_beta1 = static_cast<T>(1 - s.beta1);
  u.one_minus_beta2 = static_cast<T>(1 - s.beta2);
  u.correction = static_cast<T>(adaptive ? std::sqrt(1 - std::pow(s.beta2, step)) : 1);
  u.epsilon = static_cast<T>(s.epsilon);
  return u;
}

// A trained tensor with its optimizer state: `first` is the momentum or the mean of gradients, `second` the mean of
// their squares; null where the optimizer has none.
template <typename T>
struct Parameter {
  T *value, *grad, *first, *second;
  Update<T> update;
};

template <typename T>
struct ConvParameters {
  Parameter<T> weight, bias, coefficient, subsample_bias;  // value null: absent
};

template <typename T>
struct DenseParameters {
  Parameter<T> weight, bias;
};

template <typename T>
struct Network {
  NetworkGeometry geometry;
  ConvParameters<T> conv[kMaxConvs];
  DenseParameters<T> dense[kMaxDenses];
  const T* codes;  // (classes, in_features of the distances), null for scores

  // Weight, bias, coefficient, subsample_bias of each convolution, then weight, bias of each dense layer.
  std::array<Parameter<T>*, kMaxSlots> slots() {
    std::array<Parameter<T>*, kMaxSlots> all{};
    size_t next = 0;
    for (int l = 0; l < geometry.num_convs; ++l) {
      ConvParameters<T>& p = conv[l];
      for (Parameter<T>* parameter : {&p.weight, &p.bias, &p.coefficient, &p.subsample_bias}) {
        all[next++] = parameter;
      }
    }
    for (int l = 0; l < geometry.num_denses; ++l) {
      all[next++] = &dense[l].weight;
      all[next++] = &dense[l].bias;
    }
    return all;
  }
};

// Images (count, C, height, width), taken in `order` (null: as they lie). Bytes become scale * byte + background, in
// the middle of a plane of the first convolution's size that is background elsewhere.
template <typename T>
struct Images {
  const void* data;
  bool are_bytes;
  int64_t height, width;
  T scale, background;
  const int64_t* order;

  int64_t index(int64_t position) const { return order != nullptr ? order[position] : position; }
};

}  // namespace lenet_fast
