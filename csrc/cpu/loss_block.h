// The loss of a block of images and its gradient. Scores s: softmax cross-entropy, log(sum_i exp(s_i)) - s_D. LeCun's
// MAP loss of distances y, y_D + log(exp(-j) + sum_i exp(-y_i)), is the same of the scores -y with one more, -j, that
// no image belongs to: LeCun et al. (1998), equation (9). Label smoothing e takes the mean of the cross-entropies of
// all classes with the weight e, and that of the label with 1 - e.
#pragma once

#include "vec_math.h"

namespace lenet_fast::cpu::LENET_FAST_ISA {

template <typename T>
struct BlockLoss {
  double loss;      // sum over the images
  int64_t correct;  // images whose highest score, the first of equals, is their label's
};

// The loss of `count` images. `grad` receives the gradient of `factor` times the summed loss by the scores, 0 in absent
// lanes; it may be the same memory as `scores`. `extra` null: no further score; otherwise no label smoothing.
template <typename T>
BlockLoss<T> score_loss(const Vec<T>* scores, int64_t classes, const T* extra, const int64_t* labels, int64_t count,
                        T factor, double label_smoothing, Vec<T>* grad) {
  using I = VecInt<T>;
  I label{};
  Vec<T> weight{};
  for (int64_t i = 0; i < count; ++i) {
    label[i] = static_cast<typename VecTraits<T>::Bits>(labels[i]);
    weight[i] = factor;
  }
  Vec<T> highest = scores[0], own = scores[0];
  I best{};
  for (int64_t c = 1; c < classes; ++c) {
    const I index = I{} + static_cast<typename VecTraits<T>::Bits>(c);
    const I higher = scores[c] > highest;
    highest = higher ? scores[c] : highest;
    best = higher ? index : best;
    own = label == index ? scores[c] : own;
  }
  const Vec<T> top = extra != nullptr ? (splat(*extra) > highest ? splat(*extra) : highest) : highest;
  Vec<T> below_top{};  // the sum over the classes
  for (int64_t c = 0; label_smoothing > 0 && c < classes; ++c) {
    below_top += top - scores[c];
  }
  Vec<T> total = extra != nullptr ? exp_nonpositive<T>(splat(*extra) - top) : Vec<T>{};
  for (int64_t c = 0; c < classes; ++c) {
    const Vec<T> e = exp_nonpositive<T>(scores[c] - top);
    total += e;
    grad[c] = e;
  }
  const Vec<T> share = weight / total;
  const double of_each_class = label_smoothing / static_cast<double>(classes);
  const Vec<T> of_label = weight * static_cast<T>(1 - label_smoothing);
  const Vec<T> of_each = weight * static_cast<T>(of_each_class);
  for (int64_t c = 0; c < classes; ++c) {
    const I index = I{} + static_cast<typename VecTraits<T>::Bits>(c);
    const Vec<T> value = grad[c] * share - (label == index ? of_label : Vec<T>{}) - of_each;
    grad[c] = weight != T(0) ? value : Vec<T>{};
  }
  BlockLoss<T> result{};
  for (int64_t i = 0; i < count; ++i) {
    const double own_below_top = static_cast<double>(top[i]) - static_cast<double>(own[i]);
    const double target_below_top =
        label_smoothing > 0 ? (1 - label_smoothing) * own_below_top + of_each_class * static_cast<double>(below_top[i])
                            : own_below_top;
    result.loss += target_below_top + std::log(static_cast<double>(total[i]));
    result.correct += best[i] == label[i];
  }
  return result;
}

// scores[c] = -(squared distance between the features and the code of class c)
template <typename T>
void negative_distances(const Vec<T>* features, const T* codes, int64_t classes, int64_t size, Vec<T>* scores) {
  for (int64_t c = 0; c < classes; ++c) {
    Vec<T> sum[4]{};
    for (int64_t i = 0; i < size; ++i) {
      const Vec<T> difference = features[i] - codes[c * size + i];
      sum[i % 4] += difference * difference;
    }
    scores[c] = -((sum[0] + sum[1]) + (sum[2] + sum[3]));
  }
}

// grad_features from the gradient of the scores.
template <typename T>
void negative_distances_gradient(const Vec<T>* features, const T* codes, int64_t classes, int64_t size,
                                 const Vec<T>* grad_scores, Vec<T>* grad_features) {
  for (int64_t i = 0; i < size; ++i) {
    Vec<T> sum{};
    for (int64_t c = 0; c < classes; ++c) {
      sum += grad_scores[c] * (features[i] - codes[c * size + i]);
    }
    grad_features[i] = T(-2) * sum;
  }
}

}  // namespace lenet_fast::cpu::LENET_FAST_ISA
