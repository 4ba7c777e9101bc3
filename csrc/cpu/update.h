// The optimizers, PyTorch's definitions in PyTorch's order of operations, on any part of a parameter.
#pragma once

#include "vec.h"

namespace lenet_fast::cpu::LENET_FAST_ISA {

template <typename T>
LF_INLINE Vec<T> square_root(Vec<T> value) {
  T lanes[kLanes<T>];
  store(lanes, value);
  for (int i = 0; i < kLanes<T>; ++i) {
    lanes[i] = std::sqrt(lanes[i]);
  }
  return load(lanes);
}

template <typename T>
LF_INLINE void update_values(const Update<T>& u, Vec<T>& value, Vec<T> grad, Vec<T>& first, Vec<T>& second,
                             bool has_momentum) {
  if (u.optimizer == Optimizer::adamw) {
    value = value * u.shrink;
  } else {
    grad = grad + u.weight_decay * value;
  }
  if (u.optimizer == Optimizer::sgd) {
    if (has_momentum) {
      first = u.momentum * first + grad;
      grad = u.nesterov ? grad + u.momentum * first : first;
    }
    value = value - u.rate * grad;
  } else {
    first = first + u.one_minus_beta1 * (grad - first);
    second = u.beta2 * second + u.one_minus_beta2 * grad * grad;
    value = value - u.rate * (first / (square_root<T>(second) / u.correction + u.epsilon));
  }
}

// Values [begin, end) of a parameter.
template <typename T>
void update_parameter(const Parameter<T>& p, int64_t begin, int64_t end) {
  if (p.value == nullptr || p.update.frozen) {
    return;
  }
  const bool has_first = p.first != nullptr, has_second = p.second != nullptr;
  for (int64_t i = begin; i < end; i += kLanes<T>) {
    const int64_t count = std::min<int64_t>(kLanes<T>, end - i);
    const size_t bytes = static_cast<size_t>(count) * sizeof(T);
    Vec<T> value{}, grad{}, first{}, second{};
    const auto copy = [bytes](void* to, const void* from) __attribute__((always_inline)) {
      if (bytes == sizeof(Vec<T>)) {
        __builtin_memcpy(to, from, sizeof(Vec<T>));
      } else {
        __builtin_memcpy(to, from, bytes);
      }
    };
    copy(&value, p.value + i);
    copy(&grad, p.grad + i);
    if (has_first) {
      copy(&first, p.first + i);
    }
    if (has_second) {
      copy(&second, p.second + i);
    }
    update_values<T>(p.update, value, grad, first, second, has_first);
    copy(p.value + i, &value);
    if (has_first) {
      copy(p.first + i, &first);
    }
    if (has_second) {
      copy(p.second + i, &second);
    }
  }
}

}  // namespace lenet_fast::cpu::LENET_FAST_ISA
